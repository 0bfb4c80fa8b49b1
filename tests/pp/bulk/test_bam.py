"""Counts of BAM files against a loop over reads, and the law of thinning."""

from __future__ import annotations

import os
import struct
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from epivi._errors import ConfigError, DataError
from epivi.pp.bulk import ReadRule, count_bam

pysam = pytest.importorskip("pysam")

DATA = Path(os.environ.get("EPIVI_TEST_DATA", "../shared/data"))
WIDTH = 25


def data_file(name):
    path = DATA / name
    if not path.exists():
        pytest.skip(f"test data not found: set EPIVI_TEST_DATA (missing {name})")
    return path


def naive(path, chroms, width, rule):
    """Count read by read, and tally why reads are left out."""
    counts = {name: np.zeros(size // width, dtype=np.int64) for name, size in chroms.items()}
    n_records, lengths = 0, []
    with pysam.AlignmentFile(str(path)) as file:
        for name, size in chroms.items():
            for read in file.fetch(name):
                n_records += 1
                if read.is_unmapped or read.flag & rule.exclude_flags or read.mapping_quality < rule.min_mapq:
                    continue
                proper = read.is_paired and read.is_proper_pair and read.template_length != 0
                if read.is_paired and proper and read.is_read2:
                    continue
                other = read.is_paired and not proper and read.is_read2 and not read.mate_is_unmapped
                if other or (read.is_paired and not proper and rule.improper == "drop"):
                    continue
                if proper:
                    start = min(read.reference_start, read.next_reference_start)
                    end = start + abs(read.template_length)
                elif rule.fragment_bp is None:
                    start, end = read.reference_start, read.reference_end
                elif read.is_reverse:
                    start, end = read.reference_end - rule.fragment_bp, read.reference_end
                else:
                    start, end = read.reference_start, read.reference_start + rule.fragment_bp
                middle = min(max((start + end) // 2, 0), size - 1)
                if middle // width < counts[name].size:
                    counts[name][middle // width] += 1
                    lengths.append(read.infer_query_length())
    return np.concatenate([counts[name] for name in chroms]), n_records, lengths


RULES = [
    ReadRule(),
    ReadRule(min_mapq=30),
    ReadRule(exclude_flags=0),
    ReadRule(fragment_bp=151, exclude_flags=0x400),
    ReadRule(fragment_bp=2000, improper="count"),
    ReadRule(improper="count", min_mapq=5),
]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", ["bam_file", "paired_file"])
def test_counts_are_those_of_a_loop_over_reads(request, kind, rule, chroms):
    path = request.getfixturevalue(kind)
    found = count_bam(path, chroms, WIDTH, rule=rule)
    wanted, n_records, lengths = naive(path, chroms, WIDTH, rule)
    np.testing.assert_array_equal(found.counts_l, wanted)
    assert found.counts_l.dtype == np.int32
    totals = dict(found.totals)
    assert totals["records"] == n_records
    assert totals["covered"] == np.count_nonzero(wanted)
    reasons = {key: n for key, n in totals.items() if key not in ("records", "covered", "paired")}
    assert sum(reasons.values()) == n_records  # every record has one reason
    assert found.covariates["depth"] == wanted.sum() == totals["counted"]
    assert found.covariates["coverage"] == np.count_nonzero(wanted) / wanted.size
    assert found.covariates["read_length"] == np.percentile(lengths, 50, method="inverted_cdf")
    assert found.covariates["run_type"] == ("paired" if kind == "paired_file" else "single")


def test_reasons(bam_file, chroms):
    with pysam.AlignmentFile(str(bam_file)) as file:
        flags = [(read.flag & 0xF00, read.mapping_quality) for read in file]
    totals = count_bam(bam_file, chroms, rule=ReadRule(min_mapq=30)).totals
    for name, flag in (("secondary", 0x100), ("qc_fail", 0x200), ("duplicate", 0x400), ("supplementary", 0x800)):
        assert totals[name] == sum(found == flag for found, _ in flags) > 0
    assert totals["low_mapq"] == sum(found == 0 and mapq < 30 for found, mapq in flags) > 0
    assert count_bam(bam_file, chroms, rule=ReadRule(exclude_flags=0x10)).totals["flagged"] > 0


def test_bins_are_of_one_width_and_a_rest_is_left_out(bams, tmp_path):
    _, write = bams
    reads = [
        {"name": "a", "chrom": 0, "pos": 90, "mapq": 9, "cigar": [(0, 8)], "flag": 0, "next": (-1, -1), "tlen": 0},
        {"name": "b", "chrom": 0, "pos": 100, "mapq": 9, "cigar": [(0, 8)], "flag": 0, "next": (-1, -1), "tlen": 0},
    ]
    path = write(tmp_path / "a.bam", reads, chroms={"chr1": 110})
    found = count_bam(path, {"chr1": 110}, 50)
    assert found.counts_l.tolist() == [0, 1]
    assert found.totals["outside"] == 1
    assert found.bins.to_dict("list") == {"chrom": ["chr1", "chr1"], "start": [0, 50], "end": [50, 100]}


def test_chromosomes_are_in_natural_order_and_some_may_be_left_out(bam_file, chroms):
    both = count_bam(bam_file, dict(reversed(chroms.items())), WIDTH)
    alone = [count_bam(bam_file, {name: size}, WIDTH).counts_l for name, size in chroms.items()]
    np.testing.assert_array_equal(both.counts_l, np.concatenate(alone))


def test_read_length_without_bases(bams, tmp_path, chroms):
    make, write = bams
    path = write(tmp_path / "a.bam", make(np.random.default_rng(5), 400), with_bases=False)
    assert count_bam(path, chroms).covariates["read_length"] == 36


def test_csi_index_gives_the_same(bam_file, chroms):
    wanted = count_bam(bam_file, chroms).counts_l
    bam_file.with_name(bam_file.name + ".bai").unlink()
    pysam.index("-c", str(bam_file))
    assert bam_file.with_name(bam_file.name + ".csi").exists()
    np.testing.assert_array_equal(count_bam(bam_file, chroms).counts_l, wanted)


def test_index_may_replace_the_suffix_and_lack_its_summary(bam_file, chroms):
    wanted = count_bam(bam_file, chroms).counts_l
    index = bam_file.with_name(bam_file.name + ".bai")
    raw = bytearray(index.read_bytes())
    at = raw.find(struct.pack("<II", 37450, 2))
    while at >= 0:  # give the summary the number of an ordinary bin: its first chunk spans the chromosome
        raw[at : at + 4] = struct.pack("<I", 1)
        raw[at + 24 : at + 40] = raw[at + 8 : at + 24]
        at = raw.find(struct.pack("<II", 37450, 2))
    index.unlink()
    bam_file.with_suffix(".bai").write_bytes(bytes(raw))
    np.testing.assert_array_equal(count_bam(bam_file, chroms).counts_l, wanted)


def test_standard_library_inflates_the_same(bam_file, chroms, monkeypatch):
    wanted = count_bam(bam_file, chroms).counts_l
    monkeypatch.setitem(sys.modules, "isal", None)
    np.testing.assert_array_equal(count_bam(bam_file, chroms).counts_l, wanted)


# ---------------------------------------------------------------- thinning


def test_thinning_is_binomial(bams, tmp_path, chroms):
    make, write = bams
    reads = [{**read, "flag": 0, "mapq": 9} for read in make(np.random.default_rng(7), 4000)]
    path = write(tmp_path / "a.bam", reads)
    full = count_bam(path, chroms, 1000).counts_l
    n_kept, values = [], []
    for seed in range(60):
        thin = count_bam(path, chroms, 1000, rule=ReadRule(keep=0.3, seed=seed)).counts_l
        assert (thin <= full).all()
        n_kept.append(int(thin.sum()))
        values.append(thin)
    total = int(full.sum())
    # the number kept over seeds: mean and variance of the binomial, and its distribution
    assert abs(np.mean(n_kept) - 0.3 * total) < 4 * np.sqrt(0.21 * total / 60)
    assert stats.kstest((np.array(n_kept) - 0.3 * total) / np.sqrt(0.21 * total), "norm").pvalue > 0.01
    # the counts of bins over seeds: chi-square of all bins with expected variance
    z = (np.array(values) - 0.3 * full) / np.sqrt(0.21 * np.maximum(full, 1))
    assert 0.001 < stats.chi2(z.size).cdf((z**2).sum()) < 0.999


def test_a_smaller_share_is_part_of_a_larger_one(paired_file, chroms):
    rule = ReadRule(keep=1.0, seed=3)
    last = count_bam(paired_file, chroms, rule=rule).counts_l
    for keep in (0.999, 0.7, 0.5, 0.1, 0.01):
        thin = count_bam(paired_file, chroms, rule=ReadRule(keep=keep, seed=3)).counts_l
        assert (thin <= last).all()
        last = thin
    again = count_bam(paired_file, chroms, rule=ReadRule(keep=0.01, seed=3)).counts_l
    np.testing.assert_array_equal(again, last)
    other = count_bam(paired_file, chroms, rule=ReadRule(keep=0.5, seed=4)).counts_l
    assert (other != count_bam(paired_file, chroms, rule=ReadRule(keep=0.5, seed=3)).counts_l).any()


@pytest.mark.parametrize("change", ["swap mates", "name mates"])
def test_mates_go_together(bams, tmp_path, chroms, change):
    make, write = bams
    reads = make(np.random.default_rng(8), 1500, paired=True)
    reads = [{**read, "flag": read["flag"] & ~0xF00, "mapq": 9} for read in reads]
    path = write(tmp_path / "a.bam", reads)
    for read in reads:
        if change == "swap mates":
            read["flag"] ^= 0xC0
        else:
            read["name"] += "/1" if read["flag"] & 0x40 else "/2"
    other = write(tmp_path / "b.bam", reads)
    rule = ReadRule(keep=0.4, seed=1)
    thin, same = count_bam(path, chroms, rule=rule), count_bam(other, chroms, rule=rule)
    assert 0 < thin.totals["counted"] < 0.6 * count_bam(path, chroms).totals["counted"]
    np.testing.assert_array_equal(thin.counts_l, same.counts_l)


def test_a_file_without_names_is_thinned(bams, tmp_path, chroms):
    make, write = bams
    reads = [{**read, "name": "1", "flag": 0} for read in make(np.random.default_rng(9), 2000)]
    path = write(tmp_path / "a.bam", reads)
    total = count_bam(path, chroms).totals["counted"]
    kept = count_bam(path, chroms, rule=ReadRule(keep=0.5)).totals["counted"]
    assert abs(kept - total / 2) < 5 * np.sqrt(total / 4)


def test_depth(bam_file, chroms):
    total = count_bam(bam_file, chroms).totals["counted"]
    found = count_bam(bam_file, chroms, depth=total // 3)
    assert abs(found.totals["counted"] - total / 3) < 5 * np.sqrt(total * 2 / 9)
    assert found.totals["thinned"] + found.totals["counted"] == total
    np.testing.assert_array_equal(
        count_bam(bam_file, chroms, depth=total).counts_l, count_bam(bam_file, chroms).counts_l
    )
    with pytest.raises(DataError, match=rf"has {total} fragments to count, fewer than depth={total + 1}"):
        count_bam(bam_file, chroms, depth=total + 1)
    with pytest.raises(ConfigError, match=r"Both depth=5 and keep=0.5"):
        count_bam(bam_file, chroms, depth=5, rule=ReadRule(keep=0.5))
    with pytest.raises(ConfigError, match="depth=0"):
        count_bam(bam_file, chroms, depth=0)


# ---------------------------------------------------------------- real files

GOLDEN = {
    "epicseg_chr21/H3K36me3.bam": (102_893, 36, "single"),
    "epicseg_chr21/H3K4me3.bam": (74_534, 36, "single"),
    "epicseg_chr21/H3K9me3.bam": (100_864, 36, "single"),
    "normr_K562_hg19_chr1/K562_H3K36me3.bam": (40_572, 50, "paired"),
    "normr_K562_hg19_chr1/K562_H3K4me3.bam": (24_802, 50, "paired"),
    "normr_K562_hg19_chr1/K562_Input.bam": (38_276, 50, "paired"),
}


@pytest.mark.realdata
@pytest.mark.parametrize("name", GOLDEN)
def test_real_files(name):
    path = data_file(f"bulk/bam_small/{name}")
    sizes = {"chr21": 48_129_895} if "chr21" in name else {"chr1": 249_250_621}
    found = count_bam(path, sizes, 200)
    wanted, n_records, _ = naive(path, sizes, 200, ReadRule())
    np.testing.assert_array_equal(found.counts_l, wanted)
    covariates = found.covariates
    assert (covariates["depth"], covariates["read_length"], covariates["run_type"]) == GOLDEN[name]
    assert found.totals["records"] == n_records
    mapq30 = count_bam(path, sizes, 200, rule=ReadRule(min_mapq=30, improper="count", fragment_bp=150))
    wanted, _, _ = naive(path, sizes, 200, ReadRule(min_mapq=30, improper="count", fragment_bp=150))
    np.testing.assert_array_equal(mapq30.counts_l, wanted)


@pytest.mark.realdata
@pytest.mark.slow
def test_five_times_as_fast_as_a_loop(tmp_path):
    path = data_file("bulk/bam_small/normr_K562_hg19_chr1/K562_Input.bam")
    sizes = {"chr1": 249_250_621}
    big = tmp_path / "big.bam"
    with pysam.AlignmentFile(str(path)) as file:
        reads = list(file.fetch("chr1"))
        with pysam.AlignmentFile(str(big), "wb", template=file) as out:
            for read in reads:
                for _ in range(10):
                    out.write(read)
    pysam.index(str(big))
    count_bam(big, sizes, 200)
    ratios = []
    for _ in range(3):
        start = time.perf_counter()
        found = count_bam(big, sizes, 200)
        ours = time.perf_counter() - start
        start = time.perf_counter()
        wanted, _, _ = naive(big, sizes, 200, ReadRule())
        ratios.append((time.perf_counter() - start) / ours)
        np.testing.assert_array_equal(found.counts_l, wanted)
    assert max(ratios) > 5, ratios
