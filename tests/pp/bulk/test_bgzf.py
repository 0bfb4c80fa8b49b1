"""Every BAM file and index that cannot be used, and the way from their bytes to the counts."""

from __future__ import annotations

import gzip
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest

from epivi._errors import ConfigError, DataError
from epivi.pp.bulk import ReadRule, count_bam

pysam = pytest.importorskip("pysam")


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"min_mapq": -1}, "min_mapq=-1"),
        ({"min_mapq": 1.5}, "min_mapq=1.5"),
        ({"exclude_flags": 4096}, "exclude_flags=4096"),
        ({"fragment_bp": 0}, "fragment_bp=0"),
        ({"improper": "keep"}, "improper='keep'"),
        ({"keep": 0.0}, "keep=0.0"),
        ({"keep": 1.1}, "keep=1.1"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_rule_checks_itself(values, match):
    with pytest.raises(ConfigError, match=match):
        ReadRule(**values)


def test_bin_width_is_checked(bam_file, chroms):
    with pytest.raises(ConfigError, match="bin_size_bp=0"):
        count_bam(bam_file, chroms, 0)
    with pytest.raises(DataError, match=r"Shorter than one bin of 30000 bp: 'chr2'"):
        count_bam(bam_file, chroms, 30_000)


def test_no_file_empty_file_other_files(tmp_path, chroms):
    with pytest.raises(DataError, match=r"there is no such BAM file"):
        count_bam(tmp_path / "no.bam", chroms)
    path = tmp_path / "a.bam"
    path.touch()
    with pytest.raises(DataError, match=r"a\.bam is empty, a BAM file is needed"):
        count_bam(path, chroms)
    path.write_bytes(b"@HD\tVN:1.6\n")
    with pytest.raises(DataError, match=r"is not a BAM file: it begins with b'@HD\\t'"):
        count_bam(path, chroms)
    path.write_bytes(b"CRAM" + bytes(50))
    with pytest.raises(DataError, match="is a CRAM file"):
        count_bam(path, chroms)
    path.write_bytes(gzip.compress(b"BAM\1"))
    with pytest.raises(DataError, match="is not a BAM file"):
        count_bam(path, chroms)
    with pysam.BGZFile(str(path), "wb") as out:
        out.write(b"chr1\t0\t10\n")
    with pytest.raises(DataError, match="has no BAM header"):
        count_bam(path, chroms)
    with pysam.BGZFile(str(path), "wb") as out:
        out.write(b"BAM\1" + struct.pack("<III", 0, 3, 5))
    with pytest.raises(DataError, match="the header is cut off"):
        count_bam(path, chroms)
    one = struct.pack("<I", 5) + b"chr1\0" + struct.pack("<I", 9)
    with pysam.BGZFile(str(path), "wb") as out:
        out.write(b"BAM\1" + struct.pack("<II", 0, 2) + 2 * one)
    with pytest.raises(DataError, match="names 2 chromosomes, 1 of them different"):
        count_bam(path, chroms)


def test_cut_off_file(bam_file, chroms):
    raw = bam_file.read_bytes()
    for size in (len(raw) - 1, len(raw) - 28, len(raw) // 2, 30):
        bam_file.write_bytes(raw[:size])
        with pytest.raises(DataError, match=rf"is cut off: it has no end-of-file block \({size} bytes\)"):
            count_bam(bam_file, chroms)


def test_flipped_bytes_are_found(bam_file, chroms):
    raw, wanted = bam_file.read_bytes(), count_bam(bam_file, chroms).counts_l
    rng = np.random.default_rng(0)
    n_found = 0
    for at in rng.integers(0, len(raw), size=150):
        damaged = bytearray(raw)
        damaged[at] ^= 1 << int(rng.integers(8))
        bam_file.write_bytes(bytes(damaged))
        try:
            found = count_bam(bam_file, chroms).counts_l
        except DataError:
            n_found += 1
        else:  # bits of a block's head that mean nothing
            np.testing.assert_array_equal(found, wanted)
    assert n_found > 145


def test_damaged_block(bam_file, chroms):
    raw = bytearray(bam_file.read_bytes())
    second = struct.unpack_from("<H", raw, 16)[0] + 1
    raw[second + 200] ^= 0xFF
    bam_file.write_bytes(bytes(raw))
    with pytest.raises(DataError, match=rf"is damaged: the block at byte {second} cannot be read"):
        count_bam(bam_file, chroms)


def test_missing_and_wrong_index(bam_file, paired_file, bams, tmp_path, chroms):
    index = bam_file.with_name(bam_file.name + ".bai")
    raw = index.read_bytes()
    index.unlink()
    with pytest.raises(
        DataError, match=r"has no index \(single\.bam\.bai or single\.bam\.csi beside it\).*samtools index"
    ):
        count_bam(bam_file, chroms)
    index.write_bytes(b"what")
    with pytest.raises(DataError, match=r"is not an index: it begins with b'what'"):
        count_bam(bam_file, chroms)
    for size in (6, 30, len(raw) // 2):
        index.write_bytes(raw[:size])
        with pytest.raises(DataError, match=r"single\.bam\.bai: the index is damaged"):
            count_bam(bam_file, chroms)
    _, write = bams
    other = write(tmp_path / "other.bam", [], chroms={"chr1": 50_000})
    shutil.copy(f"{other}.bai", index)
    with pytest.raises(DataError, match=r"is the index of another file: it has 1 chromosomes, not 2"):
        count_bam(bam_file, chroms)


def test_stale_index(bams, tmp_path, chroms):
    make, write = bams
    reads = make(np.random.default_rng(4), 1000)
    path = write(tmp_path / "a.bam", reads)
    old = Path(f"{path}.bai").read_bytes()
    write(path, reads[:100] + reads[101:], index=False)
    Path(f"{path}.bai").write_bytes(old)
    with pytest.raises(DataError, match=r"index is of another version of the file|is damaged"):
        count_bam(path, chroms)
    write(path, reads[:3], index=False)
    Path(f"{path}.bai").write_bytes(old)
    with pytest.raises(DataError, match=r"index|is damaged"):
        count_bam(path, chroms)


def test_index_that_says_another_number(bam_file, chroms):
    index = bam_file.with_name(bam_file.name + ".bai")
    raw = bytearray(index.read_bytes())
    at = raw.find(struct.pack("<II", 37450, 2)) + 24
    (n_records,) = struct.unpack_from("<Q", raw, at)
    struct.pack_into("<Q", raw, at, n_records + 2)
    index.write_bytes(bytes(raw))
    with pytest.raises(DataError, match=rf"has {n_records} records on 'chr1', its index says {n_records + 2}"):
        count_bam(bam_file, chroms)


def test_unsorted_and_misplaced_reads(bams, tmp_path, chroms):
    make, write = bams
    reads = make(np.random.default_rng(4), 200)
    path = write(tmp_path / "a.bam", reads)
    reads[3], reads[4] = reads[4], reads[3]
    write(path, reads, index=False)  # the index is still that of the sorted file
    with pytest.raises(DataError, match=r"record 5 of 'chr1' stands before its place\. Sort and index"):
        count_bam(path, chroms)
    reads[3] = {**reads[3], "chrom": 1}
    write(path, reads, index=False)
    with pytest.raises(DataError, match=r"record 4 of 'chr1' is of another chromosome: the index"):
        count_bam(path, chroms)


def damage_first_record(path, offset, value):
    """Change a number in the first record, in a block that is whole."""
    raw = path.read_bytes()
    second = struct.unpack_from("<H", raw, 16)[0] + 1
    third = second + struct.unpack_from("<H", raw, second + 16)[0] + 1
    data = bytearray(zlib.decompress(raw[second + 18 : third - 8], -15))
    struct.pack_into("<i", data, offset, value)
    packer = zlib.compressobj(wbits=-15)
    body = packer.compress(bytes(data)) + packer.flush()
    head = raw[second : second + 16] + struct.pack("<H", len(body) + 25)
    tail = struct.pack("<II", zlib.crc32(bytes(data)), len(data))
    path.write_bytes(raw[:second] + head + body + tail + raw[third:])


@pytest.mark.parametrize(
    ("offset", "value", "match"),
    [
        (0, 12, r"record 1 of 'chr1' is damaged"),
        (20, -5, r"record 1 of 'chr1' is damaged"),
        (20, 4000, r"record 1 of 'chr1' is damaged"),
        (8, 60_000, r"record 1 of 'chr1' begins outside the chromosome \(50000 bp\)"),
    ],
)
def test_damaged_records(bams, tmp_path, chroms, offset, value, match):
    make, write = bams
    path = write(tmp_path / "a.bam", make(np.random.default_rng(4), 20))
    damage_first_record(path, offset, value)
    with pytest.raises(DataError, match=match):
        count_bam(path, chroms)


def test_wrong_assembly(bams, tmp_path):
    make, write = bams
    sizes = {"chr1": 249250621, "chr2": 243199373}
    path = write(tmp_path / "a.bam", make(np.random.default_rng(4), 20), chroms=sizes)
    assert count_bam(path, sizes, 1000).totals["records"] == 20
    with pytest.raises(
        DataError,
        match=r"another assembly: the length of 'chr1' is 249250621 bp in the file and 248956422 bp in the genome; 2 "
        r"such chromosomes\. The file looks like hg19\.",
    ):
        count_bam(path, "hg38")
    with pytest.raises(
        DataError, match=r"lacks 23 of the 25 chromosomes of the genome: 'chr3'.*Give as genome a mapping"
    ):
        count_bam(path, "hg19")
    with pytest.raises(DataError, match=r"lacks 1 of the 1 chromosomes.*differ by the prefix 'chr'"):
        count_bam(path, {"1": 249250621})
    with pytest.raises(
        DataError, match=r"is 249250621 bp in the file and 5000 bp in the genome; 1 such chromosomes\. The"
    ):
        count_bam(path, {"chr1": 5000})


def test_no_reads_and_none_counted(bams, tmp_path, chroms):
    make, write = bams
    with pytest.raises(DataError, match="has no reads on the chromosomes of the genome"):
        count_bam(write(tmp_path / "a.bam", []), chroms)
    reads = [{**read, "flag": 0x400} for read in make(np.random.default_rng(4), 20)]
    with pytest.raises(DataError, match=r"none of 20 records is counted \(duplicate 20\)\. Check the read rule"):
        count_bam(write(tmp_path / "b.bam", reads), chroms)
