"""Chromosome sizes, BED files, tiles and overlaps, against brute force and hand-written files."""

from __future__ import annotations

import gzip
import os
import random
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from hypothesis import given, settings

from epivi._errors import ConfigError, DataError
from epivi.pp import (
    chrom_sizes,
    natural_chromosome_order,
    overlaps,
    peak_names,
    read_bed,
    read_blacklist,
    tile,
)

# anndata 0.13 asks pandas 3 for options that pandas deprecates; not ours to mend
pytestmark = pytest.mark.filterwarnings("ignore:.*option is deprecated:DeprecationWarning")

DATA = Path(os.environ.get("EPIVI_TEST_DATA", "../shared/data"))


def data_file(name):
    path = DATA / name
    if not path.exists():
        pytest.skip(f"test data not found: set EPIVI_TEST_DATA (missing {name})")
    return path


def frame(rows):
    return pd.DataFrame(rows, columns=["chrom", "start", "end"])


def peaks(names):
    return AnnData(np.ones((2, len(names)), dtype="float32"), var=pd.DataFrame(index=names))


# ---------------------------------------------------------------- order


def test_natural_order():
    autosomes = [f"chr{i}" for i in range(1, 23)]
    wanted = [*autosomes, "chrX", "chrY", "chrM", "chr1_KI2_random", "chr1_KI10_random", "chrUn_KI1"]
    shuffled = wanted * 2
    random.Random(0).shuffle(shuffled)
    assert natural_chromosome_order(shuffled) == wanted
    assert natural_chromosome_order(["MT", "X", "10", "9", "Y"]) == ["9", "10", "X", "Y", "MT"]
    assert natural_chromosome_order([]) == []
    assert natural_chromosome_order(["2L", "3R", "2R", "X"]) == ["X", "2L", "2R", "3R"]


@given(st.lists(st.text(alphabet="chrXYMT0123456789_²", max_size=8)))
def test_natural_order_is_a_fixed_permutation(names):
    once = natural_chromosome_order(names)
    assert sorted(once) == sorted(set(names))
    assert natural_chromosome_order(once[::-1]) == once


# ---------------------------------------------------------------- sizes


@pytest.mark.parametrize(("genome", "n", "total"), [("hg38", 25, 3088286401), ("hg19", 25, 3095693983)])
def test_human_tables(genome, n, total):
    sizes = chrom_sizes(genome)
    assert list(sizes) == natural_chromosome_order(sizes)
    assert len(sizes) == n
    # published lengths of the assembled chromosomes of GRCh38 and GRCh37, with chrM as UCSC has it
    assert sum(sizes.values()) == total


def test_mouse_table():
    sizes = chrom_sizes("mm10")
    assert len(sizes) == 22
    assert sum(sizes.values()) - sizes["chrM"] == 2725521370
    assert "chr20" not in sizes


@pytest.mark.realdata
@pytest.mark.parametrize("genome", ["hg38", "hg19", "mm10"])
def test_tables_equal_the_files(genome):
    listed = chrom_sizes(data_file(f"annot/{genome}.chrom.sizes"))
    assert {name: size for name, size in listed.items() if "_" not in name} == chrom_sizes(genome)


def test_chrom_sizes_from_mapping_and_file(tmp_path):
    given_sizes = {"chr2": np.int64(5), "chr1": 7}
    assert chrom_sizes(given_sizes) == {"chr2": 5, "chr1": 7}
    assert all(type(size) is int for size in chrom_sizes(given_sizes).values())
    (tmp_path / "a.sizes").write_text("# sizes\nchr2\t5\tmore\n\nchr1\t7\r\n")
    assert list(chrom_sizes(tmp_path / "a.sizes").items()) == [("chr2", 5), ("chr1", 7)]
    with gzip.open(tmp_path / "b", "wt") as handle:
        handle.write("chr1 9\n")
    assert chrom_sizes(str(tmp_path / "b")) == {"chr1": 9}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("chr1\t5\nchr1\t6\n", r"s:2: chromosome 'chr1' occurs a second time"),
        ("chr1\n", r"s:1: 2 fields are needed, found 'chr1'"),
        ("chr1\tlong\n", r"s:1: size 'long' is not a position"),
        ("chr1\t0\n", r"s:1: the size of 'chr1' is 0"),
        ("chr1\t-4\n", r"s:1: size '-4'"),
        ("\n#\n", "There is no chromosome in"),
    ],
)
def test_chrom_sizes_file_refused(tmp_path, text, words):
    (tmp_path / "s").write_text(text)
    with pytest.raises(DataError, match=words):
        chrom_sizes(tmp_path / "s")


@pytest.mark.parametrize("size", [0, -1, 1.5, "7", True, None, 1 << 41])
def test_chrom_sizes_mapping_refused(size):
    with pytest.raises(DataError, match="size of chromosome 'chr1' is"):
        chrom_sizes({"chr1": size})


def test_chrom_sizes_unknown():
    with pytest.raises(ConfigError, match=r"'hg37' is neither a known genome nor a file. Did you mean 'hg38'"):
        chrom_sizes("hg37")
    with pytest.raises(DataError, match="There is no chromosome"):
        chrom_sizes({})


# ---------------------------------------------------------------- BED


def test_read_bed(tmp_path):
    text = "track name=x\nbrowser position\n#c\n\nchr2\t5\t9\tHigh Signal\nchr10\t0\t1\r\nchr2 7 8\n"
    (tmp_path / "plain.bed").write_text(text)
    with gzip.open(tmp_path / "packed.bed", "wt") as handle:  # the content decides, not the suffix
        handle.write(text)
    for name in ("plain.bed", "packed.bed"):
        bed = read_bed(tmp_path / name)
        assert bed.to_numpy().tolist() == [["chr2", 5, 9, "High Signal"], ["chr10", 0, 1, ""], ["chr2", 7, 8, ""]]
        assert [bed[key].dtype for key in ("start", "end")] == [np.int64, np.int64]
    assert read_blacklist(tmp_path / "plain.bed")["start"].tolist() == [5, 7, 0]
    (tmp_path / "empty.bed").write_text("")
    assert read_bed(tmp_path / "empty.bed").shape == (0, 3)
    (tmp_path / "tracks.bed").write_text("track1 1 2\n")
    assert read_bed(tmp_path / "tracks.bed")["chrom"].tolist() == ["track1"]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"chr1\t5\t9\nchr1\t9\n", r"x.bed:2: 3 fields are needed"),
        (b"\t5\t9\n", r"x.bed:1: 3 fields are needed"),
        (b"chr1\t5\t5\n", r"x.bed:1: start 5 is not below end 5"),
        (b"chr1\t9\t5\n", r"x.bed:1: start 9 is not below end 5"),
        (b"#\nchr1\t-1\t5\n", r"x.bed:2: start '-1' is not a position"),
        (b"chr1\t1\t5.5\n", r"x.bed:1: end '5.5' is not a position"),
        (b"chr1\t1_0\t50\n", r"x.bed:1: start '1_0'"),
        ("chr1\t²\t50\n".encode(), r"x.bed:1: start '²'"),
        (b"chr1\t1\t" + b"9" * 5000, r"x.bed:1: end '9{40}' is not"),
        (b"chr1\t1\t5\n\xff\xfe\x00", r"cannot be read as text"),
        (gzip.compress(b"chr1\t1\t5\n" * 50)[:-12], r"cannot be read as text"),
        (b"\x1f\x8bnonsense", r"x.bed:1: the file cannot be read as text"),
    ],
)
def test_read_bed_refused(tmp_path, content, words):
    (tmp_path / "x.bed").write_bytes(content)
    with pytest.raises(DataError, match=words):
        read_bed(tmp_path / "x.bed")


def test_read_bed_missing_and_empty(tmp_path):
    for path in (tmp_path / "none.bed", tmp_path):
        with pytest.raises(DataError, match="is not a file"):
            read_bed(path)
    (tmp_path / "e.bed").write_text("# nothing\n")
    with pytest.raises(DataError, match="has no region"):
        read_blacklist(tmp_path / "e.bed")


def test_fuzzed_bed_raises_only_data_errors(tmp_path):
    rng = np.random.default_rng(0)
    good = b"chr1\t100\t200\tname\nchr2\t5\t70\n" * 20
    path = tmp_path / "f.bed"
    n_refused = 0
    for case in range(300):
        data = bytearray(gzip.compress(good) if case % 2 else good)
        for at in rng.integers(0, len(data), size=3):
            data[at] = rng.integers(256)
        path.write_bytes(bytes(data))
        try:
            read_bed(path)
        except DataError as error:
            n_refused += 1
            assert str(path) in str(error)  # noqa: PT017 - a frame may also come back whole
    assert n_refused > 100


@pytest.mark.realdata
def test_real_blacklist():
    path = data_file("annot/hg38-blacklist.v2.bed.gz")
    blacklist = read_blacklist(path)
    assert len(blacklist) == 636
    raw = pd.read_csv(path, sep="\t", header=None)
    assert (blacklist["end"] - blacklist["start"]).sum() == (raw[2] - raw[1]).sum()
    assert blacklist["name"].value_counts().to_dict() == raw[3].value_counts().to_dict()
    assert blacklist["chrom"].unique().tolist() == natural_chromosome_order(raw[0])
    assert overlaps(blacklist, blacklist).all()
    bins = tile("hg38", 5000)
    kept = tile("hg38", 5000, blacklist=blacklist)
    assert 0.90 < len(kept) / len(bins) < 0.95  # v2 covers 7 % of the genome
    assert not overlaps(kept, blacklist).any()


# ---------------------------------------------------------------- tiles


@given(
    sizes=st.dictionaries(st.sampled_from(["chr1", "chr2", "chr10", "chrX", "scaf"]), st.integers(1, 400), min_size=1),
    bin_size_bp=st.integers(1, 150),
)
def test_tile_covers_each_base_once(sizes, bin_size_bp):
    bins = tile(sizes, bin_size_bp)
    assert bins["chrom"].unique().tolist() == natural_chromosome_order(sizes)
    for name, part in bins.groupby("chrom"):
        assert part["start"].tolist() == list(range(0, sizes[name], bin_size_bp))
        assert part["end"].tolist() == [*part["start"].tolist()[1:], sizes[name]]


def test_tile_without_blacklist_regions():
    blacklist = frame([["chr1", 99, 100], ["chr1", 200, 201]])
    assert peak_names(tile({"chr1": 350}, 100, blacklist=blacklist)).tolist() == ["chr1:100-200", "chr1:300-350"]
    with pytest.raises(DataError, match="No bin of 400 bp is left"):
        tile({"chr1": 350}, 400, blacklist=blacklist)


@pytest.mark.parametrize("bin_size_bp", [0, -5, 2.5, True, "5"])
def test_tile_width_refused(bin_size_bp):
    with pytest.raises(ConfigError, match="bin_size_bp="):
        tile({"chr1": 350}, bin_size_bp)


# ---------------------------------------------------------------- overlaps

INTERVALS = st.lists(
    st.tuples(st.sampled_from(["chr1", "chr2", "chr3"]), st.integers(0, 30), st.integers(1, 9)).map(
        lambda t: [t[0], t[1], t[1] + t[2]]
    ),
    max_size=12,
)


@given(INTERVALS, INTERVALS)
@settings(deadline=None)
def test_overlaps_equal_brute_force(regions, blacklist):
    wanted = [any(c == d and s < f and t < e for d, t, f in blacklist) for c, s, e in regions]
    assert overlaps(frame(regions), frame(blacklist)).tolist() == wanted


def test_overlaps_touching_is_not_overlapping():
    blacklist = frame([["chr1", 10, 20], ["chr1", 12, 14]])  # nested
    regions = frame([["chr1", 0, 10], ["chr1", 20, 25], ["chr1", 19, 20], ["chr1", 15, 16], ["chr2", 12, 13]])
    assert overlaps(regions, blacklist).tolist() == [False, False, True, True, False]


def test_overlaps_refused():
    with pytest.raises(DataError, match=r"named differently: '1' in the regions, 'chr1' in the blacklist.*prefix"):
        overlaps(frame([["1", 0, 5]]), frame([["chr1", 0, 5]]))
    with pytest.raises(DataError, match="blacklist has no entry 'end'"):
        overlaps(frame([["1", 0, 5]]), frame([["1", 0, 5]]).drop(columns="end"))
    with pytest.raises(DataError, match="regions has no entry 'chrom'"):
        overlaps(pd.DataFrame(), frame([["1", 0, 5]]))
