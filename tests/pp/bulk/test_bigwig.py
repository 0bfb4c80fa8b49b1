"""bigWig files against base-by-base means, the way back, and every file that cannot be used."""

from __future__ import annotations

import sys
import time

import numpy as np
import pytest

from epivi._errors import ConfigError, DataError, MissingDependencyError
from epivi.pp.bulk import BigWigWriter, read_bigwig, write_bigwig
from epivi.pp.bulk import bigwig as module

pybigwig = pytest.importorskip("pyBigWig")


def brute(values, width, uncovered):
    """Mean of each bin, bin by bin."""
    means = []
    for base in values.values():
        for low in range(0, base.size - width + 1, width):
            part = base[low : low + width]
            if uncovered == "zero":
                means.append(np.where(np.isnan(part), 0, part).mean())
            else:
                means.append(part[~np.isnan(part)].mean() if (~np.isnan(part)).any() else np.nan)
    return np.array(means)


@pytest.mark.parametrize("width", [1, 25, 200, 1000])
@pytest.mark.parametrize("uncovered", ["zero", "nan"])
def test_means_are_those_of_the_bases(bigwig_file, chroms, width, uncovered, monkeypatch):
    path, values = bigwig_file
    wanted = brute(values, width, uncovered)
    found = read_bigwig(path, chroms, width, transform="none", uncovered=uncovered)
    np.testing.assert_allclose(found.signal_l, wanted, rtol=1e-6, equal_nan=True)
    assert found.signal_l.dtype == np.float32
    assert (found.transform, found.uncovered, len(found.bins)) == ("none", uncovered, wanted.size)
    # pieces of any size give the same
    monkeypatch.setattr(module, "_PIECE_BP", 7 * width)
    again = read_bigwig(path, chroms, width, transform="none", uncovered=uncovered)
    np.testing.assert_array_equal(again.signal_l, found.signal_l)
    default = read_bigwig(path, chroms, width, uncovered=uncovered)
    assert default.transform == "arcsinh"
    np.testing.assert_allclose(default.signal_l, np.arcsinh(wanted), rtol=1e-6, equal_nan=True)


def test_chromosome_without_data_is_uncovered(tmp_path, caplog):
    path = tmp_path / "a.bw"
    write_bigwig(path, {"chr1": 100}, {"chr1": np.ones(4)})
    sizes = {"chr1": 100, "chr2": 50}
    assert read_bigwig(path, sizes, transform="none").signal_l.tolist() == [1, 1, 1, 1, 0, 0]
    assert "has no data on 1 of the 2 chromosomes of the genome ('chr2')" in caplog.text
    assert np.isnan(read_bigwig(path, sizes, uncovered="nan").signal_l[4:]).all()


@pytest.mark.parametrize("width", [1, 25, 300])
def test_written_values_are_read_back(tmp_path, chroms, width):
    rng = np.random.default_rng(0)
    tracks = {}
    for name, size in chroms.items():
        track = rng.normal(size=-(-size // width)).astype(np.float32) * np.float32(1e3)
        track[rng.random(track.size) < 0.2] = np.nan
        track[:3], track[-1] = 0, 7.5
        tracks[name] = track
    path = write_bigwig(tmp_path / "a.bw", chroms, dict(reversed(tracks.items())), bin_size_bp=width)
    found = read_bigwig(path, chroms, width, transform="none", uncovered="nan").signal_l
    wanted = np.concatenate([tracks[name][: size // width] for name, size in chroms.items()])
    np.testing.assert_array_equal(found, wanted)
    with pybigwig.open(str(path)) as file:  # the narrower last bin ends with its chromosome
        for name, size in chroms.items():
            last = file.values(name, size - 1, size)
            assert last == [7.5]
    assert list(tmp_path.iterdir()) == [path]


def test_pieces_and_generators(tmp_path, chroms):
    values = np.arange(2000, dtype=np.float32)
    with BigWigWriter(tmp_path / "a.bw", chroms, 25) as writer:
        for low in range(0, 2000, 300):
            writer.add("chr1", values[low : low + 300], start_bp=low * 25)
        writer.add("chr2", values[:10], start_bp=250)
    write_bigwig(tmp_path / "b.bw", chroms, ((name, values[:800]) for name in chroms))
    found = read_bigwig(tmp_path / "a.bw", chroms, transform="none", uncovered="nan").signal_l
    np.testing.assert_array_equal(found[:2000], values)
    np.testing.assert_array_equal(found[2010:2020], values[:10])
    assert np.isnan(found[2020:]).all()
    found = read_bigwig(tmp_path / "b.bw", chroms, transform="none").signal_l
    np.testing.assert_array_equal(found[:800], found[2000:2800])


@pytest.mark.parametrize(
    ("pieces", "match"),
    [
        ([("chr3", [1.0], 0)], r"chromosome 'chr3' is not in the genome\. Did you mean"),
        ([("chr1", [[1.0]], 0)], r"\(1, 1\) values from 0 bp on do not fit on 'chr1'"),
        ([("chr1", [1.0], -25)], r"values from -25 bp on do not fit"),
        (
            [("chr1", [1.0, 2.0], 49_975)],
            r"\(2,\) values from 49975 bp on do not fit on 'chr1' \(50000 bp, bins of 25 bp\)",
        ),
        ([("chr2", [1.0], 0), ("chr1", [1.0], 0)], r"chr1:0 stands before or in what is already written"),
        ([("chr1", [1.0, 2.0], 0), ("chr1", [1.0], 25)], r"chr1:25 stands before or in what is already written"),
        ([("chr1", [1.0, np.inf], 0)], r"the value at chr1:25 is infinite or beyond float32"),
        ([("chr1", [1e300], 50)], r"the value at chr1:50 is infinite or beyond float32"),
        ([("chr1", [np.nan], 0)], r"no value was given, or NaN alone"),
        ([], r"no value was given"),
    ],
)
def test_refused_values_leave_the_old_file(tmp_path, chroms, pieces, match):
    path = tmp_path / "a.bw"
    path.write_text("old")

    def write():
        with BigWigWriter(path, chroms, 25) as writer:
            for chrom, values, start in pieces:
                writer.add(chrom, np.array(values), start_bp=start)

    with pytest.raises(DataError, match=match):
        write()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_refused_arguments(tmp_path, chroms, bigwig_file, monkeypatch):
    with pytest.raises(ConfigError, match="there is no folder"):
        write_bigwig(tmp_path / "no" / "a.bw", chroms, {})
    with pytest.raises(ConfigError, match="bin_size_bp=0"):
        write_bigwig(tmp_path / "a.bw", chroms, {}, bin_size_bp=0)
    with pytest.raises(ConfigError, match="transform='log'"):
        read_bigwig(bigwig_file[0], chroms, transform="log")
    with pytest.raises(ConfigError, match="uncovered='0'"):
        read_bigwig(bigwig_file[0], chroms, uncovered="0")
    monkeypatch.setitem(sys.modules, "pyBigWig", None)
    for call in (lambda: read_bigwig(bigwig_file[0], chroms), lambda: write_bigwig(tmp_path / "a.bw", chroms, {})):
        with pytest.raises(MissingDependencyError, match=r"pip install 'epivi\[tracks\]'"):
            call()


def test_refused_files(bigwig_file, tmp_path, chroms):
    path, _ = bigwig_file
    raw = path.read_bytes()
    with pytest.raises(DataError, match="there is no such bigWig file"):
        read_bigwig(tmp_path / "no.bw", chroms)
    path.write_bytes(b"")
    with pytest.raises(DataError, match="is empty, a bigWig file is needed"):
        read_bigwig(path, chroms)
    path.write_bytes(b"fixedStep chrom=chr1")
    with pytest.raises(DataError, match=r"is not a bigWig file: it begins with b'fixe'"):
        read_bigwig(path, chroms)
    for size in (5, 100, len(raw) // 2, len(raw) - 1):
        path.write_bytes(raw[:size])
        with pytest.raises(DataError, match="is cut off: it does not end as bigWig files do"):
            read_bigwig(path, chroms)
    path.write_bytes(raw[:4] + b"\xff" * 60 + raw[-4:])
    with pytest.raises(DataError, match="is damaged: its header does not lead to its tables"):
        read_bigwig(path, chroms)


def test_damaged_data(bigwig_file, chroms):
    path, _ = bigwig_file
    raw = bytearray(path.read_bytes())
    (start,) = np.frombuffer(bytes(raw[16:24]), dtype="<u8")
    raw[start + 12 : start + 60] = bytes(48)
    path.write_bytes(bytes(raw))
    with pytest.raises(DataError, match="'chr1' cannot be read from 0 bp on"):
        read_bigwig(path, chroms)


def test_infinite_value(tmp_path):
    path = tmp_path / "a.bw"
    with pybigwig.open(str(path), "w") as out:
        out.addHeader([("chr1", 1000)])
        out.addEntries(["chr1"], [60], ends=[70], values=[np.inf])
    with pytest.raises(DataError, match="an infinite value in chr1:50-75"):
        read_bigwig(path, {"chr1": 1000})


def test_wrong_assembly(bigwig_file):
    path, _ = bigwig_file
    with pytest.raises(DataError, match="another assembly: the length of 'chr1' is 50000 bp in the file"):
        read_bigwig(path, {"chr1": 50_001})
    with pytest.raises(DataError, match=r"lacks 1 of the 1 chromosomes of the genome: '2'.*differ by the prefix 'chr'"):
        read_bigwig(path, {"2": 20_010})


def test_a_hundred_times_as_fast_as_asking_for_each_bin(tmp_path):
    sizes = {"chr1": 2_000_000}
    rng = np.random.default_rng(0)
    path = write_bigwig(tmp_path / "a.bw", sizes, {"chr1": rng.gamma(0.5, size=80_000)})
    read_bigwig(path, sizes)
    ours = []
    for _ in range(3):
        start = time.perf_counter()
        found = read_bigwig(path, sizes, transform="none").signal_l
        ours.append(time.perf_counter() - start)
    with pybigwig.open(str(path)) as file:
        start = time.perf_counter()
        wanted = [file.stats("chr1", low, low + 25, exact=True)[0] for low in range(0, 25 * 2000, 25)]
        theirs = (time.perf_counter() - start) * 40
    np.testing.assert_allclose(found[:2000], wanted, rtol=1e-6)
    assert theirs / min(ours) > 100
