"""FASTA files to codes, against pyfaidx and letter by letter, and every file that cannot be used."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import numpy as np
import pytest

from epivi._errors import ConfigError, DataError
from epivi.pp.bulk import dna as module
from epivi.pp.bulk import read_dna

DATA = Path(os.environ.get("EPIVI_TEST_DATA", "../shared/data"))
CODE = {"A": 0, "C": 1, "G": 2, "T": 3, "U": 3}


def naive(text):
    return [CODE.get(letter.upper(), 4) for letter in text]


@pytest.mark.parametrize("form", ["plain", "gzip", "windows lines", "one line"])
def test_codes_are_those_of_the_letters(fasta_file, chroms, form, monkeypatch):
    path, letters = fasta_file
    text = path.read_text()
    if form == "gzip":
        path.write_bytes(gzip.compress(text.encode()))
    elif form == "windows lines":
        path.write_bytes(text.replace("\n", "\r\n").encode())
    elif form == "one line":
        path.write_text("".join(f">{name}\n{sequence}\n" for name, sequence in letters.items()))
    for chunk in (1 << 22, 1 << 8):
        monkeypatch.setattr(module, "_CHUNK_BYTES", chunk)
        monkeypatch.setattr(module, "_MAX_HEADER_BYTES", 1 << 7)
        found = read_dna(path, chroms, 25)
        assert list(found) == ["chr1", "chr2"]
        for name, size in chroms.items():
            assert found[name].dtype == np.uint8
            assert found[name].tolist() == naive(letters[name])[: size // 25 * 25]


def test_same_as_pyfaidx(fasta_file, chroms):
    pyfaidx = pytest.importorskip("pyfaidx")
    path, _ = fasta_file
    with pyfaidx.Fasta(str(path), sequence_always_upper=True) as genome:
        wanted = {name: naive(str(genome[name][:])) for name in chroms}
    found = read_dna(path, chroms, 1)
    assert {name: codes.tolist() for name, codes in found.items()} == wanted


def test_no_file_is_written(fasta_file, chroms):
    path, _ = fasta_file
    read_dna(path, chroms)
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (">chr1\nACGT\n", r"lacks 1 of the 2 chromosomes of the genome: 'chr2'\. It has 'chr1'"),
        (">chr1\nACG\n>chr2\nAC\n", r"'chr1' has 3 bases, 4 bp in the genome"),
        (">chr1\nACGTA\n>chr2\nAC\n", r"'chr1' has 5 bases, 4 bp in the genome"),
        (">chr1\nACGT\n>chr2\nA\n", r"'chr2' has 1 bases, 2 bp in the genome"),
        (">chr1\nACGT\n>chr1\nACGT\n>chr2\nAC\n", r"the sequence 'chr1' occurs twice"),
        (">chr1\nACGT\n>x\nA\n>x\nA\n>chr2\nAC\n", None),
        (">chr1\nAC\nG7\n>chr2\nAC\n", r"base 4 of 'chr1' is '7', no letter for bases"),
        ("ACGT\n", r"is not a FASTA file: it begins with b'ACGT\\n', a '>' is needed"),
        (">chr1\n\n>chr2\nAC\n", r"'chr1' has 0 bases"),
        (">\nAC\n>chr1\nACGT\n\n>chr2\nA C", None),
    ],
)
def test_refused_text(tmp_path, text, match):
    path = tmp_path / "a.fa"
    path.write_text(text)
    sizes = {"chr1": 4, "chr2": 2}
    if match is None:
        assert {name: codes.tolist() for name, codes in read_dna(path, sizes, 1).items()} == {
            "chr1": [0, 1, 2, 3],
            "chr2": [0, 1],
        }
        return
    with pytest.raises(DataError, match=match):
        read_dna(path, sizes, 1)


def test_refused_files(tmp_path, fasta_file, chroms):
    path, _ = fasta_file
    with pytest.raises(DataError, match="there is no such FASTA file"):
        read_dna(tmp_path / "no.fa", chroms)
    with pytest.raises(ConfigError, match="bin_size_bp=0"):
        read_dna(path, chroms, 0)
    packed = gzip.compress(path.read_bytes())
    path.write_bytes(packed[: len(packed) // 2])
    with pytest.raises(DataError, match="is damaged or cut off"):
        read_dna(path, chroms)
    path.write_bytes(b"")
    with pytest.raises(DataError, match="is empty, a FASTA file is needed"):
        read_dna(path, chroms)


@pytest.mark.realdata
def test_yeast():
    path = DATA / "bulk/yeast/sacCer3.fa.gz"
    if not path.exists():
        pytest.skip("test data not found: set EPIVI_TEST_DATA (missing bulk/yeast/sacCer3.fa.gz)")
    found = read_dna(path, {"chrI": 230_218, "chrM": 85_779, "chrXVI": 948_066}, 1)
    assert {name: codes.size for name, codes in found.items()} == {"chrI": 230_218, "chrM": 85_779, "chrXVI": 948_066}
    # composition of the published sequence: 39.27 % GC on chrI, 17.1 % on the mitochondrion
    share = {name: float(np.isin(codes, [1, 2]).mean()) for name, codes in found.items()}
    assert share["chrI"] == pytest.approx(0.3927, abs=5e-4)
    assert share["chrM"] == pytest.approx(0.171, abs=1e-3)
    assert max(int(codes.max()) for codes in found.values()) == 3
