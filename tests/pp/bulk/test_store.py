"""The store against single files, restarts at every point and after a kill, and everything that is refused."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from epivi._errors import ConfigError, DataError
from epivi.pp.bulk import (
    CountOverflowError,
    ReadRule,
    StoreOptions,
    _pieces,
    count_bam,
    ingest,
    open_store,
    read_bigwig,
    read_dna,
    write_bigwig,
)

pytest.importorskip("pysam")
pytest.importorskip("pyBigWig")

OPTIONS = StoreOptions(bin_size_bp=25, rule=ReadRule(min_mapq=5, keep=0.8, seed=2))


@pytest.fixture
def table(tmp_path, bams, bigwig_file, paired_file):
    """Three biosamples, three assays: counts and signal, counts alone, signal alone, nothing."""
    make, write = bams
    other = write(tmp_path / "other.bam", make(np.random.default_rng(11), 900))
    return pd.DataFrame(
        {
            "biosample": ["K562", "K562", "H1", "liver"],
            "assay": ["DNase", "H3K4me3", "H3K4me3", "CTCF"],
            "bam": [str(other), str(paired_file), str(other), None],
            "bigwig": [None, str(bigwig_file[0]), None, bigwig_file[0]],
            "read_length": [np.nan, np.nan, 101.0, np.nan],
            "platform": ["HiSeq", None, "NextSeq", "HiSeq"],
            "year": [2012, 2013, 2014, 2015],
        }
    )


def assert_same(one, other):
    assert sorted(one.obsm) == sorted(other.obsm)
    for key in one.obsm:
        np.testing.assert_array_equal(one.obsm[key][:], other.obsm[key][:])
    np.testing.assert_array_equal(one.X, other.X)
    np.testing.assert_array_equal(one.uns["dna"][:], other.uns["dna"][:])


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_store_holds_what_the_files_hold(table, fasta_file, chroms, tmp_path):
    adata = ingest(table, tmp_path / "s.zarr", chroms, options=OPTIONS, fasta=fasta_file[0], progress=False)
    assert adata.obs_names.tolist() == ["K562", "H1", "liver"]
    assert adata.var_names.tolist() == ["DNase", "H3K4me3", "CTCF"]
    np.testing.assert_array_equal(adata.X, [[1, 1, 0], [0, 1, 0], [0, 0, 1]])
    np.testing.assert_array_equal(adata.obsm["availability"], [[1, 1, 0], [0, 1, 0], [0, 0, 0]])
    np.testing.assert_array_equal(adata.obsm["availability_signal"], [[0, 1, 0], [0, 0, 0], [0, 0, 1]])
    assert adata.obsm["availability"].dtype == bool
    n_bins = 2000 + 800
    assert adata.obsm["counts"].shape == adata.obsm["signal"].shape == (3, 3, n_bins)
    assert (adata.obsm["counts"].dtype, adata.obsm["signal"].dtype) == (np.uint16, np.float32)
    assert adata.obsm["counts"].chunks == (1, 1, 2**16)
    places = {(0, 0): 0, (0, 1): 1, (1, 1): 2}
    for b in range(3):
        for a in range(3):
            counts, signal = adata.obsm["counts"][b, a], adata.obsm["signal"][b, a]
            if (b, a) in places:
                found = count_bam(table["bam"][places[b, a]], chroms, 25, rule=OPTIONS.rule)
                np.testing.assert_array_equal(counts, found.counts_l)
                assert adata.obsm["depth"][b, a] == found.covariates["depth"]
                assert adata.obsm["coverage"][b, a] == np.float32(found.covariates["coverage"])
                assert adata.obsm["read_length"][b, a] == (101 if (b, a) == (1, 1) else found.covariates["read_length"])
                assert adata.obsm["run_type"][b, a] == ["single", "paired"].index(found.covariates["run_type"])
            else:
                assert not counts.any()
                assert np.isnan(adata.obsm["depth"][b, a])
                assert adata.obsm["run_type"][b, a] == -1
            if (b, a) in ((0, 1), (2, 2)):
                np.testing.assert_array_equal(signal, read_bigwig(table["bigwig"][1], chroms, 25).signal_l)
            else:
                assert not signal.any()
    np.testing.assert_array_equal(adata.obsm["platform"], [[0, -1, -1], [-1, 1, -1], [-1, -1, 0]])
    assert {key: list(value) for key, value in adata.uns["categories"].items()} == {
        "run_type": ["single", "paired"],
        "platform": ["HiSeq", "NextSeq"],
    }
    assert adata.obsm["platform"].dtype == adata.obsm["run_type"].dtype == np.int8
    np.testing.assert_array_equal(
        adata.obsm["year"], np.float32([[2012, 2013, np.nan], [np.nan, 2014, np.nan], [np.nan, np.nan, 2015]])
    )
    bins = adata.uns["bins"]
    assert len(bins) == n_bins
    assert bins.iloc[[0, 2000, -1]].astype(str).to_numpy().tolist() == [
        ["chr1", "0", "25"], ["chr2", "0", "25"], ["chr2", "19975", "20000"],
    ]  # fmt: skip
    assert dict(adata.uns["genome"]["chrom_sizes"]) == chroms
    assert (adata.uns["genome"]["name"], adata.uns["genome"]["bin_size_bp"]) == ("", 25)
    assert (adata.uns["signal_transform"], adata.uns["signal_uncovered"]) == ("arcsinh", "zero")
    np.testing.assert_array_equal(
        adata.uns["dna"][:], np.concatenate(list(read_dna(fasta_file[0], chroms, 25).values()))
    )
    assert sorted(path.name for path in tmp_path.glob("s.zarr*")) == ["s.zarr"]


def test_store_is_a_plain_anndata_store(table, fasta_file, chroms, tmp_path):
    lazy = ingest(table, tmp_path / "s.zarr", chroms, fasta=fasta_file[0], progress=False)
    assert type(lazy.obsm["counts"]).__module__.startswith("zarr")
    assert type(lazy.uns["dna"]).__module__.startswith("zarr")
    assert_same(ad.read_zarr(tmp_path / "s.zarr"), lazy)
    in_memory = lazy.to_memory()
    assert isinstance(in_memory.obsm["counts"], np.ndarray)
    part = lazy[["H1"], ["H3K4me3"]]
    np.testing.assert_array_equal(part.obsm["counts"], lazy.obsm["counts"][1:2])
    # the same call opens it, another one is refused
    again = ingest(table, tmp_path / "s.zarr", chroms, fasta=fasta_file[0], progress=False)
    assert_same(again, lazy)
    for change in ({"options": OPTIONS}, {"fasta": None}):
        with pytest.raises(ConfigError, match="holds another store: table, files, genome or options differ"):
            ingest(table, tmp_path / "s.zarr", chroms, **{"fasta": fasta_file[0], "progress": False, **change})


def test_counts_alone_and_signal_alone(table, chroms, tmp_path):
    counts = ingest(table.drop(columns="bigwig")[:3], tmp_path / "c.zarr", chroms, progress=False)
    assert "signal" not in counts.obsm
    assert "availability_signal" not in counts.obsm
    signal = ingest(table.drop(columns="bam").iloc[[1, 3]], tmp_path / "s.zarr", chroms, progress=False)
    assert "counts" not in signal.obsm
    np.testing.assert_array_equal(signal.obsm["availability"], [[1, 0], [0, 1]])
    assert np.isnan(signal.obsm["depth"]).all()


def test_restart_at_every_piece(table, fasta_file, chroms, tmp_path, monkeypatch):
    """Stop in the middle of every write, and once after it and before its note; the result is the same to the byte."""
    wanted = tmp_path / "wanted.zarr"
    ingest(table, wanted, chroms, fasta=fasta_file[0], progress=False)
    write, text = _pieces.Workshop.write, _pieces._write_text
    written = []

    class StoppedError(Exception):
        pass

    def half(self, piece, part, at, values, note):
        if piece not in written:
            written.append(piece)
            if len(written) % 2:
                part[(*at[:-1], slice(at[-1].start, at[-1].start + values.size // 2))] = values[: values.size // 2]
            else:
                part[at] = values
            raise StoppedError
        write(self, piece, part, at, values, note)

    monkeypatch.setattr(_pieces.Workshop, "write", half)
    store = tmp_path / "s.zarr"
    for _ in range(100):
        try:
            ingest(table, store, chroms, fasta=fasta_file[0], progress=False)
        except StoppedError:
            assert not store.exists()
            with pytest.raises(DataError, match="Its ingestion is not finished: call ingest with the same arguments"):
                open_store(store)
        else:
            break
    assert len(written) == 2 * (1 + 3 + 2)
    assert files(store) == files(wanted)
    assert text is _pieces._write_text


def test_finished_pieces_are_not_read_again(table, chroms, tmp_path, monkeypatch):
    import epivi.pp.bulk.store as module

    counted, count = [], module.count_chrom

    def note(bam, chrom, grid, rule):
        counted.append((bam.path.name, chrom))
        if len(counted) == 4:
            raise KeyboardInterrupt
        return count(bam, chrom, grid, rule)

    monkeypatch.setattr(module, "count_chrom", note)
    with pytest.raises(KeyboardInterrupt):
        ingest(table, tmp_path / "s.zarr", chroms, progress=False)
    ingest(table, tmp_path / "s.zarr", chroms, progress=False)
    assert len(counted) == 6 + 1


def test_bar_ends_where_it_should(table, fasta_file, chroms, tmp_path, monkeypatch):
    import epivi.pp.bulk.store as module

    bars, bar = [], module._bar

    def note(total, *, progress):
        bars.append([total, 0])
        one = bar(total, progress=progress)
        monkeypatch.setattr(one, "update", lambda n: bars[-1].__setitem__(1, bars[-1][1] + n))
        return one

    monkeypatch.setattr(module, "_bar", note)
    monkeypatch.setattr(module, "_describe", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    for _ in range(2):  # the second finds all pieces written
        with pytest.raises(KeyboardInterrupt):
            ingest(table, tmp_path / "s.zarr", chroms, fasta=fasta_file[0])
    assert bars == [[6 * 2800, 6 * 2800]] * 2


def test_piece_that_was_noted_and_lost_is_written_again(table, fasta_file, chroms, tmp_path, monkeypatch):
    wanted = ingest(table, tmp_path / "wanted.zarr", chroms, fasta=fasta_file[0], progress=False)
    finish = _pieces.Workshop.finish
    monkeypatch.setattr(_pieces.Workshop, "finish", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        ingest(table, tmp_path / "s.zarr", chroms, fasta=fasta_file[0], progress=False)
    monkeypatch.setattr(_pieces.Workshop, "finish", finish)
    chunk = next((tmp_path / "s.zarr.partial" / "data.zarr" / "obsm" / "counts" / "c").rglob("0"))
    for path in [chunk] if chunk.is_file() else [path for path in chunk.rglob("*") if path.is_file()][:1]:
        path.unlink()
    assert_same(ingest(table, tmp_path / "s.zarr", chroms, fasta=fasta_file[0], progress=False), wanted)


KILLED = """
import os, signal, sys
import anndata, zarr
import pandas as pd
from epivi.pp.bulk import _bam_kernels, _pieces, ingest

write, n = _pieces.Workshop.write, 0

def killed(self, piece, part, at, values, note):
    global n
    n += 1
    if n == stop:
        part[(*at[:-1], slice(at[-1].start, at[-1].start + values.size // 3))] = values[: values.size // 3]
        os.kill(os.getpid(), signal.SIGKILL)
    write(self, piece, part, at, values, note)

_pieces.Workshop.write = killed
for stop in map(int, sys.argv[3:]):
    child = os.fork()  # before zarr starts its thread
    if child == 0:
        ingest(pd.read_csv(sys.argv[1]), sys.argv[2], {"chr1": 50_000, "chr2": 20_010}, progress=False)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), os.path.exists(sys.argv[2]))
"""


@pytest.mark.skipif(os.name == "nt", reason="there is no SIGKILL")
def test_kill_in_the_middle_of_a_chromosome(table, chroms, tmp_path):
    table.to_csv(tmp_path / "table.csv", index=False)
    store = tmp_path / "s.zarr"
    # the second run goes on at the fourth piece and is killed at the sixth
    command = [sys.executable, "-c", KILLED, str(tmp_path / "table.csv"), str(store), "4", "3"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout.splitlines() == [f"{-signal.SIGKILL} False"] * 2
    notes = sorted(path.name for path in (tmp_path / "s.zarr.partial" / "done").iterdir())
    assert notes == [f"counts-{i}-{c}.json" for i in range(3) for c in range(2)][:5]
    table = pd.read_csv(tmp_path / "table.csv")
    ingest(table, store, chroms, progress=False)
    ingest(table, tmp_path / "wanted.zarr", chroms, progress=False)
    assert files(store) == files(tmp_path / "wanted.zarr")


def test_many_chunks_and_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(_pieces, "CHUNK_BINS", 512)
    monkeypatch.setattr(_pieces, "_SHARD_CHUNKS", 2)
    sizes = {"chr1": 40_000, "chr2": 30_000}
    values = {name: np.arange(size // 25, dtype=np.float32) for name, size in sizes.items()}
    path = write_bigwig(tmp_path / "a.bw", sizes, values)
    table = pd.DataFrame({"biosample": ["a"], "assay": ["b"], "bigwig": [path]})
    adata = ingest(table, tmp_path / "s.zarr", sizes, options=StoreOptions(transform="none"), progress=False)
    assert (adata.obsm["signal"].chunks, adata.obsm["signal"].shards) == ((1, 1, 512), (1, 1, 1024))
    np.testing.assert_array_equal(adata.obsm["signal"][0, 0], np.concatenate(list(values.values())))


def test_overflow_is_refused(bams, tmp_path):
    _, write = bams
    one = {"chrom": 0, "pos": 60, "mapq": 9, "cigar": [(0, 8)], "flag": 0, "next": (-1, -1), "tlen": 0, "name": "a"}
    path = write(tmp_path / "a.bam", [one] * 65_536, chroms={"chr1": 200})
    table = pd.DataFrame({"biosample": ["K562"], "assay": ["DNase"], "bam": [path]})
    with pytest.raises(
        CountOverflowError, match=r"DNase of K562: 65536 fragments in chr1:50-75, more than uint16"
    ) as caught:
        ingest(table, tmp_path / "s.zarr", {"chr1": 200}, progress=False)
    assert isinstance(caught.value, OverflowError)
    assert isinstance(caught.value, DataError)
    wide = StoreOptions(counts_dtype="int32")
    adata = ingest(table, tmp_path / "wide.zarr", {"chr1": 200}, options=wide, progress=False)
    assert adata.obsm["counts"][0, 0, 2] == 65_536


# ---------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t.drop(columns="assay"), r"table has no entry 'assay'"),
        (
            lambda t: t.drop(columns=["bam", "bigwig"]),
            r"table has 4 rows and the columns .* 'bam' or 'bigwig', are needed",
        ),
        (lambda t: t[:0], r"table has 0 rows"),
        (lambda t: t.assign(assay=["a", None, "b", "c"]), r"table\['assay'\] is missing in row 1"),
        (lambda t: t.assign(biosample="K562", assay="a"), r"rows 0 and 1 are both a of K562"),
        (lambda t: t.assign(bigwig=None), r"row 3, CTCF of liver, has no file"),
        (lambda t: t.assign(bam="no.bam"), r"no\.bam: there is no such BAM file"),
        (lambda t: t.assign(bigwig="no.bw"), r"no\.bw: there is no such bigWig file"),
        (lambda t: t.assign(counts=1), r"table has a column 'counts'"),
        (lambda t: t.assign(**{"a/b": 1}), r"table has a column 'a/b'"),
        (lambda t: t.assign(year=np.inf), r"table\['year'\] has an infinite value"),
        (lambda t: t.assign(depth="deep"), r"table\['depth'\] holds .*, numbers are needed"),
        (lambda t: t.assign(run_type=["SE", "paired", None, None]), r"table\['run_type'\] has 'SE'\. Write 'single'"),
    ],
)
def test_refused_tables(table, chroms, tmp_path, change, match):
    with pytest.raises(DataError, match=match):
        ingest(change(table), tmp_path / "s.zarr", chroms, progress=False)
    assert not list(tmp_path.glob("s.zarr*"))


def test_too_many_categories(bam_file, chroms, tmp_path):
    n = 128
    rows = {"biosample": range(n), "assay": "a", "bam": str(bam_file), "lab": [f"lab {i}" for i in range(n)]}
    with pytest.raises(DataError, match=r"table\['lab'\] has 128 categories, at most 127"):
        ingest(pd.DataFrame(rows), tmp_path / "s.zarr", chroms, progress=False)


def test_files_are_checked_before_anything_is_written(table, chroms, tmp_path):
    bad = tmp_path / "bad.bw"
    bad.write_bytes(Path(table["bigwig"][1]).read_bytes()[:-1])
    with pytest.raises(DataError, match="is cut off"):
        ingest(table.assign(bigwig=[None, None, None, bad]), tmp_path / "s.zarr", chroms, progress=False)
    with pytest.raises(DataError, match="another assembly"):
        ingest(table, tmp_path / "s.zarr", {**chroms, "chr2": 25_000}, progress=False)
    with pytest.raises(DataError, match="there is no such FASTA file"):
        ingest(table, tmp_path / "s.zarr", chroms, fasta=tmp_path / "no.fa", progress=False)
    with pytest.raises(ConfigError, match="there is no folder"):
        ingest(table, tmp_path / "no" / "s.zarr", chroms, progress=False)
    assert not list(tmp_path.glob("s.zarr*"))


def test_other_ingestion_in_the_way(table, chroms, tmp_path, monkeypatch):
    import epivi.pp.bulk.store as module

    monkeypatch.setattr(module, "_describe", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        ingest(table, tmp_path / "s.zarr", chroms, progress=False)
    with pytest.raises(
        ConfigError, match=r"holds an unfinished ingestion that differs in: options\. Call ingest as before"
    ):
        ingest(table, tmp_path / "s.zarr", chroms, options=OPTIONS, progress=False)
    with pytest.raises(ConfigError, match=r"differs in: covariates\."):
        ingest(table.assign(year=1), tmp_path / "s.zarr", chroms, progress=False)
    (tmp_path / "plain").mkdir()
    with pytest.raises(DataError, match=r"plain is no store that epivi\.pp\.bulk\.ingest made"):
        ingest(table, tmp_path / "plain", chroms, progress=False)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="holds another store"):
        ingest(table, tmp_path / "file", chroms, progress=False)


@pytest.mark.skipif(os.name == "nt", reason="there are no locks of this kind")
def test_second_process_is_refused(table, chroms, tmp_path):
    with (
        _pieces.locked(tmp_path / "s.zarr"),
        pytest.raises(ConfigError, match="Another process is writing"),
        _pieces.locked(tmp_path / "s.zarr"),
    ):
        pass


def test_opening_what_is_not_there(tmp_path, table, chroms):
    with pytest.raises(DataError, match=r"no\.zarr: there is no such store\. Check the path"):
        open_store(tmp_path / "no.zarr")
    ingest(table[:1], tmp_path / "s.zarr", chroms, progress=False)
    meta = tmp_path / "s.zarr" / "zarr.json"
    meta.write_text(meta.read_text().replace('"epivi-bulk-store": 1', '"epivi-bulk-store": 9'))
    with pytest.raises(DataError, match="has the format 9, 1 is known"):
        open_store(tmp_path / "s.zarr")


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"bin_size_bp": 0}, "bin_size_bp=0"),
        ({"transform": "log"}, "transform='log'"),
        ({"uncovered": None}, "uncovered=None"),
        ({"counts_dtype": "uint8"}, "counts_dtype='uint8'"),
    ],
)
def test_options_check_themselves(values, match):
    with pytest.raises(ConfigError, match=match):
        StoreOptions(**values)
