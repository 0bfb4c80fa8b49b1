"""Small BAM and bigWig files, written by pysam and pyBigWig."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

CHROMS = {"chr1": 50_000, "chr2": 20_010}


@pytest.fixture
def chroms() -> dict[str, int]:
    return dict(CHROMS)


def random_reads(rng, n, *, chroms=CHROMS, paired=False):
    """Reads as dicts, with all kinds of flags, qualities and alignments; for pairs, both mates."""
    reads = []
    names = list(chroms)
    for i in range(n):
        chrom = int(rng.integers(len(names)))
        size = chroms[names[chrom]]
        cigar = [[(0, 36)], [(4, 3), (0, 20), (2, 5), (0, 13)], [(0, 10), (3, 200), (1, 2), (0, 24)], [(7, 30), (8, 6)]]
        one = {
            "name": f"read.{i}",
            "chrom": chrom,
            "pos": int(rng.integers(0, size - 300)),
            "mapq": int(rng.choice([0, 5, 30, 42, 255])),
            "cigar": cigar[int(rng.integers(4))],
            "flag": int(rng.choice([0, 0, 0, 0x100, 0x200, 0x400, 0x800])) | int(rng.choice([0, 0x10])),
        }
        if not paired:
            reads.append({**one, "next": (-1, -1), "tlen": 0})
            continue
        kind = rng.choice(["proper", "proper", "proper", "improper", "alone", "apart"])
        start, length = one["pos"], int(rng.integers(40, 290))
        other = {**one, "mapq": int(rng.choice([0, 42])), "pos": start + max(0, length - 36), "cigar": [(0, 36)]}
        extra = one["flag"] & 0xF00
        swap = bool(rng.integers(2))
        flags = [0x1 | 0x40 | extra, 0x1 | 0x80 | extra]
        flags = flags[::-1] if swap else flags
        tlen = length
        if kind == "proper":
            flags = [flag | 0x2 for flag in flags]
        elif kind == "alone":
            flags, other["pos"], tlen = [flags[0] | 0x8, flags[1] | 0x4], start, 0
        elif kind == "apart":
            other["chrom"], other["pos"], tlen = 1 - chrom, int(rng.integers(0, 15_000)), 0
        one.update(flag=flags[0], cigar=[(0, 36)], next=(other["chrom"], other["pos"]), tlen=tlen)
        other.update(flag=flags[1] | 0x10, next=(one["chrom"], one["pos"]), tlen=-tlen)
        reads += [one, other]
    return sorted(reads, key=lambda read: (read["chrom"], read["pos"]))


def write_bam(path, reads, *, chroms=CHROMS, index=True, with_bases=True):
    """Write reads in the order given."""
    pysam = pytest.importorskip("pysam")
    header = {"HD": {"VN": "1.6"}, "SQ": [{"SN": name, "LN": size} for name, size in chroms.items()]}
    with pysam.AlignmentFile(str(path), "wb", header=header) as out:
        for read in reads:
            one = pysam.AlignedSegment(out.header)
            one.query_name = read["name"]
            one.flag, one.reference_id, one.reference_start = read["flag"], read["chrom"], read["pos"]
            one.mapping_quality = read["mapq"]
            if not read["flag"] & 0x4:
                one.cigartuples = read["cigar"]
            n_bases = sum(n for kind, n in read["cigar"] if kind in (0, 1, 4, 7, 8))
            if with_bases:
                one.query_sequence = "A" * n_bases
                one.query_qualities = pysam.qualitystring_to_array("I" * n_bases)
            one.next_reference_id, one.next_reference_start = read["next"]
            one.template_length = read["tlen"]
            out.write(one)
    if index:
        pysam.index(str(path))
    return Path(path)


@pytest.fixture
def bams():
    """Return (make random reads, write them)."""
    return random_reads, write_bam


@pytest.fixture
def bam_file(tmp_path):
    """Return a BAM file of single-end reads."""
    return write_bam(tmp_path / "single.bam", random_reads(np.random.default_rng(0), 3000))


@pytest.fixture
def paired_file(tmp_path):
    """Return a BAM file of pairs."""
    return write_bam(tmp_path / "paired.bam", random_reads(np.random.default_rng(1), 2000, paired=True))


@pytest.fixture
def bigwig_file(tmp_path):
    """Return a bigWig file with gaps and entries of all widths, and its values base by base."""
    pybigwig = pytest.importorskip("pyBigWig")
    rng = np.random.default_rng(2)
    path = tmp_path / "signal.bw"
    with pybigwig.open(str(path), "w") as out:
        out.addHeader(list(CHROMS.items()))
        values = {}
        for name, size in CHROMS.items():
            edges = np.unique(rng.integers(0, size, size=400))
            starts, ends = edges[:-1][::2], edges[1:][::2]
            n = min(starts.size, ends.size)
            starts, ends = starts[:n].tolist(), ends[:n].tolist()
            heights = rng.gamma(0.5, 4.0, size=n).astype(np.float32).astype(float).tolist()
            out.addEntries([name] * n, starts, ends=ends, values=heights)
            base = np.full(size, np.nan)
            for start, end, height in zip(starts, ends, heights, strict=True):
                base[start:end] = height
            values[name] = base
    return path, values


@pytest.fixture
def fasta_file(tmp_path):
    """Return a FASTA file and its sequences."""
    rng = np.random.default_rng(3)
    path = tmp_path / "genome.fa"
    letters = {name: "".join(rng.choice(list("ACGTacgtNRYk"), size=size)) for name, size in CHROMS.items()}
    letters = {"chrOther": "ACGT" * 30, **dict(reversed(letters.items()))}
    lines = []
    for name, text in letters.items():
        lines += [f">{name} of a test", *(text[i : i + 60] for i in range(0, len(text), 60))]
    path.write_text("\n".join(lines) + "\n")
    return path, letters
