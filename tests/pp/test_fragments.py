"""Fragment files to cells by bins, against a counter that reads line by line, and every refusal."""

from __future__ import annotations

import gzip
import logging
import struct
import zlib
from collections import Counter

import hypothesis.strategies as st
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from hypothesis import HealthCheck, given, settings

import epivi.pp.fragments  # noqa: F401 - the function of the same name hides the module
from epivi._errors import ConfigError, DataError
from epivi.pp import chrom_sizes, fragments, tile

pytestmark = pytest.mark.filterwarnings("ignore:.*option is deprecated:DeprecationWarning")

SIZES = {"chr1": 1000, "chr2": 455, "chr10": 300}
MODULE = "epivi.pp.fragments"
LINES = ["chr1\t0\t90\tA\t1", "chr1\t80\t140\tA\t3", "chr1\t110\t130\tC\t1", "chr2\t400\t455\tB\t2"]


def module():
    import importlib

    return importlib.import_module(MODULE)


def write(path, lines, *, pack="plain", end="\n", last=True):
    text = end.join(lines) + (end if last else "")
    data = text.encode()
    if pack == "gzip":
        data = gzip.compress(data)
    elif pack == "bgzip":
        data = bgzip(data)
    path.write_bytes(data)
    return path


def bgzip(data, block=300):
    """Pack into blocks as htslib does (SAM specification, 4.1), small ones here."""
    packed = b""
    for at in [*range(0, len(data), block), None]:
        part = b"" if at is None else data[at : at + block]
        deflate = zlib.compressobj(6, zlib.DEFLATED, -15)
        body = deflate.compress(part) + deflate.flush()
        size = struct.pack("<H", len(body) + 25)
        packed += bytes.fromhex("1f8b08040000000000ff060042430200") + size + body
        packed += struct.pack("<II", zlib.crc32(part), len(part))
    return packed


def naive(lines, sizes, width, rule="fragments", blacklist=()):
    """Count with a dictionary: (barcode, chrom, bin start) -> number."""
    counts, cells = Counter(), Counter()
    for line in lines:
        if not line.strip() or line.startswith("#"):
            continue
        chrom, start, end, barcode = line.split("\t")[:4]
        start, end = int(start), int(end)
        if chrom not in sizes:
            continue
        cells[barcode] += 1
        for site in [(start + end) // 2] if rule == "fragments" else [start, end - 1]:
            low = site // width * width
            high = min(low + width, sizes[chrom])
            if not any(c == chrom and s < high and e > low for c, s, e in blacklist):
                counts[barcode, chrom, low] += 1
    return counts, cells


def as_counter(adata):
    coo = adata.X.tocoo()
    chrom, start = adata.var["chrom"].to_numpy(dtype=object), adata.var["start"].to_numpy()
    found = zip(adata.obs_names[coo.row], chrom[coo.col], start[coo.col], coo.data, strict=True)
    return Counter({(cell, c, int(s)): int(n) for cell, c, s, n in found})


def check_against_naive(path, lines, width=100, rule="fragments", blacklist=(), **options):
    table = pd.DataFrame(blacklist, columns=["chrom", "start", "end"]) if blacklist else None
    adata = fragments(path, SIZES, bin_size_bp=width, count=rule, blacklist=table, **options)
    counts, cells = naive(lines, SIZES, width, rule, blacklist)
    assert as_counter(adata) == counts
    assert adata.obs["n_fragments"].to_dict() == cells
    assert list(adata.obs_names) == sorted(cells)
    return adata


# ---------------------------------------------------------------- counts


def test_golden(tmp_path):
    adata = fragments(write(tmp_path / "f.tsv", LINES), SIZES, bin_size_bp=100)
    assert adata.obs_names.tolist() == ["A", "B", "C"]
    assert adata.obs["n_fragments"].tolist() == [2, 1, 1]
    assert adata.var_names[:2].tolist() == ["chr1:0-100", "chr1:100-200"]
    pd.testing.assert_frame_equal(adata.var.reset_index(drop=True), tile(SIZES, 100))
    assert adata.X.dtype == np.int32
    assert adata.X.format == "csr"
    # midpoints: A 45 and 110, C 120, B 427 of chr2
    assert as_counter(adata) == {
        ("A", "chr1", 0): 1,
        ("A", "chr1", 100): 1,
        ("C", "chr1", 100): 1,
        ("B", "chr2", 400): 1,
    }
    assert adata.X.has_canonical_format
    report = adata.uns["fragments"]
    assert {key: report[key] for key in ("genome", "bin_size_bp", "count", "n_lines", "n_fragments")} == {
        "genome": "", "bin_size_bp": 100, "count": "fragments", "n_lines": 4, "n_fragments": 4,
    }  # fmt: skip


def test_insertions_count_both_sites_and_support_counts_nothing(tmp_path):
    path = write(tmp_path / "f.tsv", ["chr1\t10\t20\tA\t50", "chr1\t90\t101\tA\t7", "chr1\t90\t100\tA\t9"])
    adata = fragments(path, SIZES, bin_size_bp=100, count="insertions")
    assert adata.X[0, :2].toarray().tolist() == [[5, 1]]  # 10, 19, 90, 90, 99; 100
    assert adata.obs["n_fragments"].tolist() == [3]


random_line = st.tuples(
    st.sampled_from(["chr1", "chr2", "chr10", "chrUn_1"]),
    st.integers(0, 290),
    st.integers(1, 10),
    st.sampled_from(["AAAC-1", "AAAC-2", "s#b", "Ä"]),
    st.sampled_from(["", "\t1", "\t12", "\t.", "\t3\t+", "\t3\t.", "\t1\t-"]),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(random_line, min_size=1, max_size=60),
    notes=st.lists(st.tuples(st.integers(0, 60), st.sampled_from(["", "# id=x", "#"])), max_size=4),
    pack=st.sampled_from(["plain", "gzip", "bgzip"]),
    end=st.sampled_from(["\n", "\r\n"]),
    last=st.booleans(),
    chunk=st.sampled_from([1, 7, 50, 1 << 22]),
    merge=st.sampled_from([1, 5, 1 << 22]),
    width=st.sampled_from([1, 37, 100, 5000]),
    rule=st.sampled_from(["fragments", "insertions"]),
    blacklisted=st.booleans(),
)
def test_equals_the_naive_counter(tmp_path, rows, notes, pack, end, last, chunk, merge, width, rule, blacklisted):
    lines = ["chr1\t1\t9\tAAAC-1"] + [f"{c}\t{s}\t{s + n}\t{b}{rest}" for c, s, n, b, rest in rows]
    for at, note in notes:
        lines.insert(at, note)
    if not last and lines[-1] and not lines[-1].startswith("#"):
        lines.append("chr1\t1\t9\tAAAC-1\t1\t+")  # with fewer fields than the line before it would count as cut off
    blacklist = [("chr2", 30, 45), ("chr10", 0, 1)] if blacklisted and width < 5000 else []
    path = write(tmp_path / "f.tsv.gz", lines, pack=pack, end=end, last=last)
    with pytest.MonkeyPatch.context() as patch:
        from epivi.pp import _fragment_kernels as fk

        patch.setattr(module(), "_CHUNK_BYTES", chunk)
        patch.setattr(fk, "_MERGE_COUNTS", merge)
        adata = check_against_naive(path, lines, width, rule, blacklist)
    report = adata.uns["fragments"]
    unknown = Counter(line.split("\t")[0] for line in lines if line.startswith("chrUn"))
    assert dict(zip(report["unknown_chroms"], report["unknown_chrom_fragments"].tolist(), strict=True)) == unknown
    assert report["n_unknown_chrom"] == sum(unknown.values())
    sites = 1 if rule == "fragments" else 2
    assert report["n_blacklisted"] == report["n_fragments"] * sites - adata.X.sum()
    # a blank last line without its line end is no line
    assert report["n_lines"] in {len(lines), len(lines) - 1}


def test_many_barcodes_and_contigs_grow_the_tables(tmp_path):
    rng = np.random.default_rng(0)
    n = 40_000
    lines = [
        f"chr1\t{s}\t{s + 9}\tcell{b}{'x' * (b % 60)}"
        for s, b in zip(rng.integers(0, 990, n), rng.permutation(n), strict=True)
    ]
    lines += [f"contig{i}{'y' * (i % 50)}\t0\t9\tA" for i in range(500)]
    rng.shuffle(lines)
    adata = check_against_naive(write(tmp_path / "f.gz", lines, pack="gzip"), lines)
    assert adata.n_obs == n
    assert len(adata.uns["fragments"]["unknown_chroms"]) == 500


def test_order_of_lines_does_not_matter_and_is_reported(tmp_path):
    lines = [f"{c}\t{s}\t{s + 20}\t{b}" for c in ("chr1", "chr2") for s in range(0, 200, 10) for b in "AB"]
    shuffled = [lines[i] for i in np.random.default_rng(1).permutation(len(lines))]
    ordered = fragments(write(tmp_path / "a.tsv", lines), SIZES, bin_size_bp=50)
    mixed = fragments(write(tmp_path / "b.tsv", shuffled), SIZES, bin_size_bp=50)
    assert (ordered.X != mixed.X).nnz == 0
    assert ordered.uns["fragments"]["n_unsorted"] == 0
    back = ["chr1\t5\t9\tA", "chr1\t4\t9\tA", "chr2\t1\t9\tA", "chr1\t7\t9\tA", "chr1\t7\t9\tA"]
    assert fragments(write(tmp_path / "c.tsv", back), SIZES).uns["fragments"]["n_unsorted"] == 2


# ---------------------------------------------------------------- cells


def test_whitelist_gives_the_cells_and_their_order(tmp_path, caplog):
    path = write(tmp_path / "f.tsv", LINES)
    adata = fragments(path, SIZES, bin_size_bp=100, barcodes=["C", "X", "A"])
    assert adata.obs_names.tolist() == ["C", "A"]
    assert adata.obs["n_fragments"].tolist() == [1, 2]
    assert adata.X[:, :2].toarray().tolist() == [[0, 1], [1, 1]]
    assert adata.uns["fragments"]["n_other_barcodes"] == 1
    assert adata.uns["fragments"]["n_missing_barcodes"] == 1
    kept = fragments(path, SIZES, barcodes=pd.Index(["C", "X", "A"]), min_fragments=0)
    assert kept.obs_names.tolist() == ["C", "X", "A"]
    assert kept.X.sum(axis=1).ravel().tolist() == [[1, 0, 2]]
    with gzip.open(tmp_path / "barcodes.tsv.gz", "wt") as file:
        file.write("# cells\nC\tT cell\nX\nA\n")
    again = fragments(path, SIZES, bin_size_bp=100, barcodes=tmp_path / "barcodes.tsv.gz")
    assert (again.X != adata.X).nnz == 0
    assert again.obs_names.equals(adata.obs_names)


def test_min_fragments(tmp_path):
    path = write(tmp_path / "f.tsv", LINES)
    adata = fragments(path, SIZES, min_fragments=2)
    assert adata.obs_names.tolist() == ["A"]
    assert adata.uns["fragments"]["n_below_min"] == 2
    with pytest.raises(DataError, match=r"no cell has 3 fragments; the largest number is 2. Lower min_fragments"):
        fragments(path, SIZES, min_fragments=3)


def test_known_genome_is_named(tmp_path):
    path = write(tmp_path / "f.tsv", ["chr22\t50818000\t50818468\tA"])
    adata = fragments(path, "hg38", bin_size_bp=100_000)
    assert adata.uns["fragments"]["genome"] == "hg38"
    assert adata.var.loc[adata.var_names[adata.X.indices[0]], "end"] == chrom_sizes("hg38")["chr22"]


# ---------------------------------------------------------------- several files


def test_several_files_share_the_bins(tmp_path):
    one = write(tmp_path / "k27ac.fragments.tsv.gz", LINES, pack="gzip")
    two = write(tmp_path / "k27me3_fragments.tsv", LINES[2:])
    for source in ([one, str(two)], {"k27ac": one, "k27me3": two}):
        mdata = fragments(source, SIZES, bin_size_bp=100)
        assert list(mdata.mod) == ["k27ac", "k27me3"]
        assert mdata["k27me3"].obs_names.tolist() == ["B", "C"]
        assert mdata.n_obs == 3
        columns = ["chrom", "start", "end"]
        for part in mdata.mod.values():
            pd.testing.assert_frame_equal(part.var[columns].reset_index(drop=True), tile(SIZES, 100))
        assert mdata["k27ac"].var_names[0] == "k27ac:chr1:0-100"
    (tmp_path / "b").mkdir()
    other = write(tmp_path / "b" / "k27ac.tsv.gz", LINES)
    with pytest.raises(ConfigError, match=r"both give the modality name 'k27ac'. Pass a mapping"):
        fragments([one, other], SIZES)
    with pytest.raises(ConfigError, match="no fragment file in the list"):
        fragments([], SIZES)


@pytest.mark.parametrize("form", ["h5ad", "zarr"])
def test_round_trip(tmp_path, form):
    import anndata

    adata = fragments(write(tmp_path / "f.tsv", LINES), SIZES, bin_size_bp=100)
    path = tmp_path / f"a.{form}"
    getattr(adata, f"write_{form}")(path)
    again = getattr(anndata, f"read_{form}")(path)
    assert (again.X != adata.X).nnz == 0
    assert again.uns["fragments"]["n_lines"] == 4
    assert len(again.uns["fragments"]["unknown_chroms"]) == 0


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("chr1\t5\t9", "4 to 6 fields separated by tabs are needed, found 3"),
        ("chr1 5 9 A", "4 to 6 fields separated by tabs are needed, found 1"),
        ("chr1\t5\t9\tA\t1\t+\tx", "4 to 6 fields separated by tabs are needed, found 7"),
        ("chrom\tstart\tend\tbarcode", "start 'start' is not a position.* a header must begin with '#'"),
        ("chr1\t5\t9.5\tA", "end '9.5' is not a position"),
        ("chr1\t5\t\tA", "end '' is not a position"),
        ("chr1\t5\t9999999999999999999\tA", "end '9999999999999999999' is not a position"),
        ("chr1\t-5\t9\tA", "the start -5 is negative"),
        ("chr1\t9\t9\tA", "the end 9 is not above the start 9"),
        ("chr1\t9\t5\tA", "the end 5 is not above the start 9"),
        ("chr1\t990\t1001\tA", "the end 1001 lies beyond chr1, which has 1000 bp"),
        ("\t5\t9\tA", "chromosome or barcode is empty or has a blank"),
        ("chr1\t5\t9\t", "chromosome or barcode is empty or has a blank"),
        ("chr1\t5\t9\t\t1", "chromosome or barcode is empty or has a blank"),
        ("chr1\t5\t9\tA B", "chromosome or barcode is empty or has a blank"),
        ("chr1\t5\t9\tA\tx", "the read support 'x' is not a whole number"),
        ("chr1\t5\t9\tA\t", "the read support '' is not a whole number"),
        ("chr1\t5\t9\tA\t1\tx", "the strand 'x' is none of"),
        ("chr1\t5\t9\tA\t1\t", "the strand '' is none of"),
        ("\x00\x01\x02", "4 to 6 fields"),
    ],
)
@pytest.mark.parametrize("chunk", [16, 1 << 22])
def test_bad_lines_are_named(tmp_path, monkeypatch, line, message, chunk):
    monkeypatch.setattr(module(), "_CHUNK_BYTES", chunk)
    path = write(tmp_path / "f.tsv", ["# header", *LINES, "", line, *LINES])
    with pytest.raises(DataError, match=f"f.tsv:7: .*{message}") as caught:
        fragments(path, SIZES)
    assert f"The line is {line[:20]!r}"[:-1] in str(caught.value)


def test_unknown_chromosomes_are_counted_or_refused(tmp_path, caplog):
    path = write(tmp_path / "f.tsv", [*LINES, "KI1\t1\t9\tA", "KI1\t1\t9\tZ", "KI2\t1\t9\tA"])
    with caplog.at_level(logging.WARNING, logger=MODULE):
        adata = fragments(path, SIZES)
    assert "3 of 7 fragments lie on 2 chromosomes that the genome does not have ('KI1', 'KI2')" in caplog.text
    assert adata.uns["fragments"]["unknown_chroms"].tolist() == ["KI1", "KI2"]
    assert adata.uns["fragments"]["unknown_chrom_fragments"].tolist() == [2, 1]
    assert adata.obs_names.tolist() == ["A", "B", "C"]  # Z has no fragment on the genome
    with pytest.raises(DataError, match=r"f.tsv:5: the genome has no chromosome 'KI1'.*unknown_chroms='skip'"):
        fragments(path, SIZES, unknown_chroms="error")
    with pytest.raises(DataError, match=r"The file has 'chr1', 'chr2', 'KI1', 'KI2', the genome '1'. Give the genome"):
        fragments(path, {"1": 1000})


@pytest.mark.parametrize("pack", ["gzip", "bgzip"])
def test_files_that_are_cut_off(tmp_path, pack):
    rng = np.random.default_rng(0)
    lines = [
        f"chr1\t{s}\t{s + 9}\tcell{b}" for s, b in zip(rng.integers(0, 990, 400), rng.integers(0, 99, 400), strict=True)
    ]
    path = write(tmp_path / "f.tsv.gz", lines, pack=pack)
    whole = path.read_bytes()
    for size in (len(whole) - 1, len(whole) - 8, len(whole) // 2, 20):
        path.write_bytes(whole[:size])
        with pytest.raises(DataError, match="cut off"):
            fragments(path, SIZES)
    if pack == "bgzip":  # at the end of a block nothing but the missing last block tells
        path.write_bytes(whole[:-28])
        with pytest.raises(DataError, match="lacks the block that ends a bgzip file"):
            fragments(path, SIZES)
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 0xFF
    path.write_bytes(bytes(damaged))
    with pytest.raises(DataError, match=r"damaged or cut off|f.tsv.gz:"):
        fragments(path, SIZES)


@pytest.mark.parametrize("pack", ["plain", "gzip"])
@pytest.mark.parametrize("chunk", [16, 1 << 22])
def test_a_last_line_without_line_end(tmp_path, monkeypatch, caplog, pack, chunk):
    """Cut inside a line, a file is refused where it shows, and always warned of; whole lines are counted."""
    monkeypatch.setattr(module(), "_CHUNK_BYTES", chunk)
    for cut, n_fields in ((2, 4), (4, 3)):  # without the support; without the barcode
        path = write(tmp_path / "f.tsv", [*LINES[:3], LINES[3][:-cut]], pack=pack, last=False)
        with pytest.raises(
            DataError, match=f"is cut off: its last line has no line end and {n_fields} fields.* 5. The"
        ):
            fragments(path, SIZES)
    assert not caplog.records
    path = write(tmp_path / "f.tsv", LINES, pack=pack, last=False)
    with caplog.at_level(logging.WARNING):
        assert fragments(path, SIZES).uns["fragments"]["n_lines"] == 4
    assert [record.getMessage().partition(": ")[2][:34] for record in caplog.records] == [
        "the last line has no line end. If "
    ]
    caplog.clear()
    fragments(write(tmp_path / "f.tsv", LINES, pack=pack), SIZES)
    # nothing to compare with: a comment, or no line
    fragments(write(tmp_path / "f.tsv", ["#\ta\tb\tc\td\te", "chr1\t0\t9\tA"], pack=pack), SIZES)
    assert not caplog.records


@pytest.mark.parametrize("pack", ["plain", "gzip"])
@pytest.mark.parametrize("first", [[], ["# id=x"]])
def test_a_byte_order_mark_is_passed_over(tmp_path, pack, first):
    lines = [*first, *LINES]
    found = fragments(write(tmp_path / "f.tsv", ["\ufeff" + lines[0], *lines[1:]], pack=pack), SIZES)
    expected = fragments(write(tmp_path / "g.tsv", lines, pack=pack), SIZES)
    assert as_counter(found) == as_counter(expected)
    assert found.uns["fragments"]["n_unknown_chrom"] == 0
    (tmp_path / "mark.tsv").write_bytes(b"\xef\xbb\xbf")
    with pytest.raises(DataError, match="has no fragment"):
        fragments(tmp_path / "mark.tsv", SIZES)


def test_files_without_fragments(tmp_path):
    with pytest.raises(DataError, match="is not a file"):
        fragments(tmp_path / "none.tsv", SIZES)
    (tmp_path / "empty.tsv").write_bytes(b"")
    with pytest.raises(DataError, match=r"empty.tsv is empty"):
        fragments(tmp_path / "empty.tsv", SIZES)
    for pack in ("plain", "gzip"):
        with pytest.raises(DataError, match=r"has no fragment \(2 lines\)"):
            fragments(write(tmp_path / "f.tsv", ["# a", ""], pack=pack), SIZES)
    (tmp_path / "endless.tsv").write_bytes(b"x" * (1 << 17))
    with pytest.raises(DataError, match="a line after line 0 has no end"):
        fragments(tmp_path / "endless.tsv", SIZES)
    (tmp_path / "latin.tsv").write_bytes(b"chr1\t1\t9\tA\xff\n")
    with pytest.raises(DataError, match="no UTF-8 text"):
        fragments(tmp_path / "latin.tsv", SIZES)


def test_whitelists_that_cannot_be_used(tmp_path):
    path = write(tmp_path / "f.tsv", LINES)
    with pytest.raises(DataError, match=r"no fragment has one of the 2 barcodes of the whitelist, such as 'A-1'"):
        fragments(path, SIZES, barcodes=["A-1", "B-1"])
    with pytest.raises(DataError, match="'B' stands twice in the whitelist"):
        fragments(path, SIZES, barcodes=["A", "B", "C", "B"])
    with pytest.raises(DataError, match="barcodes has no barcode"):
        fragments(path, SIZES, barcodes=[])
    with pytest.raises(ConfigError, match=r"A barcode must be a string, found 3 \(int\)"):
        fragments(path, SIZES, barcodes=["A", 3])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bin_size_bp": 0}, "bin_size_bp=0"),
        ({"min_fragments": -1}, "min_fragments=-1"),
        ({"count": "reads"}, "count='reads'"),
        ({"unknown_chroms": "drop"}, "unknown_chroms='drop'"),
    ],
)
def test_options_that_are_not_valid(tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        fragments(write(tmp_path / "f.tsv", LINES), SIZES, **options)


def test_result_is_an_anndata_with_one_cell_too(tmp_path):
    assert isinstance(fragments(write(tmp_path / "f.tsv", LINES[:1]), SIZES), AnnData)
