"""Genes from hand-written BED and GTF files, and from real ones."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import pandas as pd
import pytest

from epivi._errors import ConfigError, DataError
from epivi.pp import read_genes

DATA = Path(os.environ.get("EPIVI_TEST_DATA", "../shared/data"))
COLUMNS = ["chrom", "start", "end", "name", "strand"]


def write(path, *rows, end="\n", pack=False):
    data = end.join("\t".join(row) if isinstance(row, tuple) else row for row in rows).encode()
    path.write_bytes(gzip.compress(data) if pack else data)
    return path


def gtf(
    *, chrom="chr1", feature="gene", start="11", end="20", strand="-", attributes='gene_id "E1"; gene_name "ACTB";'
):
    return (chrom, "HAVANA", feature, start, end, ".", strand, ".", attributes)


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_bed(tmp_path, pack, end):
    bed12 = ("chr2", "5", "50", "G2", "0", "-", "5", "50", "0", "2", "5,5,", "0,40,")
    rows = ["track name=x", "# a", ("chr1", "0", "10", "G1", "960", "+"), "", bed12, ("chrX", "7", "8", "G3")]
    genes = read_genes(write(tmp_path / "g.bed", *rows, pack=pack, end=end))
    wanted = [("chr1", 0, 10, "G1", "+"), ("chr2", 5, 50, "G2", "-"), ("chrX", 7, 8, "G3", ".")]
    pd.testing.assert_frame_equal(genes, pd.DataFrame(wanted, columns=COLUMNS))


@pytest.mark.parametrize(
    ("attributes", "name"),
    [
        ('gene_id "E1"; gene_name "ACTB";', "ACTB"),
        ('gene_name "ACTB"; gene_id "E1"', "ACTB"),
        ('gene_id "E1"; gene_type "protein_coding";', "E1"),
        ('gene_id "E1"; gene_name "";', "E1"),
        ("gene_id E1; gene_name ACTB;", "ACTB"),
        ('gene_id "E1"; note "a; b"; gene_name "HLA;A";', "HLA;A"),
        ('gene_id "E1"; old_gene_name "X";', "E1"),
        ('gene_id "E1";gene_name "ACTB"', "ACTB"),
    ],
)
def test_gtf_names(tmp_path, attributes, name):
    genes = read_genes(write(tmp_path / "g.gtf", gtf(attributes=attributes)))
    assert genes["name"].tolist() == [name]


@pytest.mark.parametrize("pack", [False, True])
def test_gtf_counts_from_one_and_includes_its_end(tmp_path, pack):
    rows = ["##format: gtf", gtf(), gtf(feature="transcript"), gtf(chrom="chr2", start="1", end="1", strand="+")]
    path = write(tmp_path / "g.gtf.gz", *rows, pack=pack)
    wanted = [("chr1", 10, 20, "ACTB", "-"), ("chr2", 0, 1, "ACTB", "+")]
    pd.testing.assert_frame_equal(read_genes(path), pd.DataFrame(wanted, columns=COLUMNS))
    assert len(read_genes(path, feature="transcript")) == 1
    other = write(tmp_path / "genes.txt", *rows)
    pd.testing.assert_frame_equal(read_genes(other, file_format="gtf"), read_genes(path))


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("g.bed", ("chr1", "0", "10"), "4 fields are needed"),
        ("g.bed", ("chr1", "x", "10", "G"), "start 'x' is not a position"),
        ("g.bed", ("chr1", "-1", "10", "G"), "start '-1' is not a position"),
        ("g.bed", ("chr1", "0", "1.5", "G"), "end '1.5' is not a position"),
        ("g.bed", ("chr1", "9", "9", "G"), r"the gene is empty, \[9, 9\)"),
        ("g.bed", ("chr1", "0", "9", "G", "0", "*"), "the strand '\\*' is none of"),
        ("g.bed", ("chr1", "0", "9", "", "0", "+"), "the gene has no name"),
        ("g.gtf", gtf()[:8], "9 fields are needed"),
        ("g.gtf", gtf(start="0"), "the start is 0, but GTF counts from 1"),
        ("g.gtf", gtf(start="30"), r"the gene is empty, \[29, 20\)"),
        ("g.gtf", gtf(strand="?"), r"the strand '\?' is none of"),
        ("g.gtf", gtf(attributes='tag "x";'), "the gene has no name"),
    ],
)
def test_bad_lines_are_named(tmp_path, name, row, message):
    path = write(tmp_path / name, "# one", row)
    with pytest.raises(DataError, match=f"{name}:2: .*{message}"):
        read_genes(path)


def test_files_that_cannot_be_used(tmp_path):
    with pytest.raises(DataError, match="is not a file"):
        read_genes(tmp_path / "none.bed")
    with pytest.raises(DataError, match="has no BED line"):
        read_genes(write(tmp_path / "g.bed", "# nothing"))
    with pytest.raises(DataError, match="has no GTF row with the feature 'gene'"):
        read_genes(write(tmp_path / "g.gtf", gtf(feature="exon")))
    path = write(tmp_path / "g.bed.gz", *[("chr1", "0", "10", f"G{i}") for i in range(999)], pack=True)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="cannot be read"):
        read_genes(path)
    with pytest.raises(ConfigError, match="file_format='gff3'"):
        read_genes(path, file_format="gff3")


@pytest.mark.realdata
def test_real_gtf_equals_a_reading_with_pandas():
    path = DATA / "annot" / "gencode.v29.chr19.gtf.gz"
    if not path.exists():
        pytest.skip(f"test data not found: set EPIVI_TEST_DATA (missing {path.name})")
    genes = read_genes(path)
    table = pd.read_csv(path, sep="\t", comment="#", header=None)
    table = table[table[2] == "gene"].reset_index(drop=True)
    assert len(genes) == 2959
    assert (genes["start"] == table[3] - 1).all()
    assert (genes["end"] == table[4]).all()
    assert (genes["strand"] == table[6]).all()
    assert (genes["name"] == table[8].str.extract(r'gene_name "([^"]+)"')[0]).all()
