"""Coordinates, order, filters and fragments against hand-made and brute-force answers."""

from __future__ import annotations

import os
from pathlib import Path

import anndata as ad
import hypothesis.strategies as st
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata import AnnData
from hypothesis import given, settings

from epivi._errors import ConfigError, DataError
from epivi.pp import (
    drop_blacklisted,
    filter_cells,
    filter_peaks,
    natural_chromosome_order,
    order_by_chromosome,
    peak_coordinates,
    peak_names,
    reads_to_fragments,
)

# anndata 0.13 asks pandas 3 for options that pandas deprecates; not ours to mend
pytestmark = pytest.mark.filterwarnings("ignore:.*option is deprecated:DeprecationWarning")

DATA = Path(os.environ.get("EPIVI_TEST_DATA", "../shared/data"))
CONTAINERS = [np.asarray, sp.csr_matrix, sp.csr_array, sp.csc_matrix, sp.csc_array]


def peaks(names, **columns):
    return AnnData(np.ones((2, len(names)), dtype="float32"), var=pd.DataFrame(columns, index=names))


def dense(matrix):
    return matrix.toarray() if sp.issparse(matrix) else np.asarray(matrix)


@pytest.fixture
def on_disk(tmp_path):
    adata = AnnData(sp.csr_matrix(np.array([[2, 0, 4], [2, 2, 0], [0, 0, 0]], dtype="float32")))
    adata.var_names = ["chr2:1-5", "chr1:7-9", "chr1:2-3"]
    adata.write_h5ad(tmp_path / "a.h5ad")
    backed = ad.read_h5ad(tmp_path / "a.h5ad", backed="r")
    yield backed
    backed.file.close()


# ---------------------------------------------------------------- coordinates


@given(
    chrom=st.sampled_from(["chr1", "X", "chr1_KI270706v1_random", "chrUn-GL.1", "HLA:A*01", "2L"]),
    start=st.integers(0, 10**9),
    width=st.integers(1, 10**6),
    form=st.sampled_from(["{}:{}-{}", "{}-{}-{}", "{}_{}_{}"]),
)
@settings(deadline=None, max_examples=40)
def test_names_are_parsed(chrom, start, width, form):
    name = form.format(chrom, start, start + width)
    regions = peak_coordinates(peaks([name]))
    assert regions.loc[name].tolist() == [chrom, start, start + width]
    assert regions[["start", "end"]].dtypes.tolist() == [np.int64, np.int64]
    assert peak_names(regions).tolist() == [f"{chrom}:{start}-{start + width}"]


def test_columns_win_over_names():
    adata = peaks(["chr1:1-2", "gene"], chrom=["chr5", "chr6"], start=[10, "20"], end=[11.0, 21.0])
    assert peak_coordinates(adata).to_numpy().tolist() == [["chr5", 10, 11], ["chr6", 20, 21]]
    adata.var = adata.var.rename(columns={"chrom": "seqnames"})
    regions = peak_coordinates(adata, chrom_key="seqnames")
    assert regions.columns.tolist() == ["chrom", "start", "end"]
    assert regions.index.equals(adata.var_names)
    adata.var["seqnames"] = adata.var["seqnames"].astype("category")
    assert peak_coordinates(adata, chrom_key="seqnames")["chrom"].tolist() == ["chr5", "chr6"]


def test_no_coordinates(caplog):
    assert peak_coordinates(peaks(["Gapdh", "RP11-34L1.2"])) is None
    assert not caplog.records
    assert peak_coordinates(peaks(["p0", "p1"], chrom=["chr1", "chr2"])) is None
    assert "has ['chrom'] but not ['start', 'end']" in caplog.text


BAD_COORDINATES = {
    "part": (lambda: peaks(["chr1:1-2", "gene", "x"]), "1 of 3 feature names .* 'gene' cannot"),
    "long": (lambda: peaks(["chr1:1-" + "9" * 20]), "'chr1:1-9+' cannot"),
    "reversed name": (
        lambda: peaks(["chr1:1-2", "chr1:9-5"]),
        r"'chr1:9-5' has a start which is not below its end: \[9, 5\)",
    ),
    "empty": (lambda: peaks(["chr1:5-5"]), "not below its end"),
    "no chromosome": (
        lambda: peaks(["a", "b"], chrom=["chr1", None], start=[1, 1], end=[2, 2]),
        "no chromosome for 'b'",
    ),
    "negative": (
        lambda: peaks(["a", "b"], chrom="chr1", start=[1, -4], end=[2, 2]),
        r"'b' has a negative start: \[-4, 2\)",
    ),
    "fraction": (lambda: peaks(["a"], chrom="chr1", start=[1.5], end=[2]), r"var\['start'\] of 'a' is .*1.5"),
    "nan": (lambda: peaks(["a"], chrom="chr1", start=[1], end=[np.nan]), r"var\['end'\] of 'a' is .*nan"),
    "huge": (lambda: peaks(["a"], chrom="chr1", start=[1], end=[1e300]), r"var\['end'\] of 'a' is"),
    "text": (lambda: peaks(["a"], chrom="chr1", start=["one"], end=[2]), r"var\['start'\] of 'a' is 'one'"),
}


@pytest.mark.parametrize("case", BAD_COORDINATES)
def test_coordinates_refused(case):
    make, words = BAD_COORDINATES[case]
    with pytest.raises(DataError, match=words):
        peak_coordinates(make())


def test_coordinates_named_column_must_exist():
    with pytest.raises(DataError, match=r"adata.var has no entry 'chromosom'. Did you mean 'chrom'?"):
        peak_coordinates(peaks(["chr1:1-2"], chrom=["chr1"]), chrom_key="chromosom")
    with pytest.raises(DataError, match="no entry 'end'"):
        peak_names(pd.DataFrame({"chrom": [], "start": []}))


# ---------------------------------------------------------------- order


def test_order_by_chromosome():
    names = ["chrX:1-2", "chr10:5-9", "chr2:7-9", "chr2:7-8", "chr1_KI1_random:1-2", "chr2:1-3", "chrM:1-2"]
    wanted = ["chr2:1-3", "chr2:7-8", "chr2:7-9", "chr10:5-9", "chrX:1-2", "chrM:1-2", "chr1_KI1_random:1-2"]
    adata = AnnData(sp.csr_matrix(np.arange(14.0).reshape(2, 7)), var=pd.DataFrame({"i": range(7)}, index=names))
    before = adata.copy()
    result = order_by_chromosome(adata, copy=True)
    assert adata.var_names.tolist() == names
    assert "chrom" not in adata.var
    assert order_by_chromosome(adata) is None
    for done in (adata, result):
        assert done.var_names.tolist() == wanted
        assert peak_names(done.var).tolist() == wanted
        np.testing.assert_array_equal(dense(done.X), dense(before[:, wanted].X))
        assert done.var["i"].tolist() == before.var.loc[wanted, "i"].tolist()
    again = order_by_chromosome(adata, copy=True)
    assert again.var.equals(adata.var)


def test_order_of_a_view_and_refusals(on_disk):
    adata = peaks(["chr2:1-2", "chr1:1-2", "chr3:1-2"])
    view = adata[:, :2]
    order_by_chromosome(view)
    assert view.var_names.tolist() == ["chr1:1-2", "chr2:1-2"]
    assert adata.var_names.tolist() == ["chr2:1-2", "chr1:1-2", "chr3:1-2"]
    with pytest.raises(DataError, match=r"features have no position.*'gene'"):
        order_by_chromosome(peaks(["gene"]))
    with pytest.raises(DataError, match=r"on disk .backed. and cannot be changed in place"):
        order_by_chromosome(on_disk)
    assert order_by_chromosome(on_disk, copy=True).var_names.tolist() == ["chr1:2-3", "chr1:7-9", "chr2:1-5"]


# ---------------------------------------------------------------- filters


def test_drop_blacklisted(tmp_path):
    blacklist = pd.DataFrame({"chrom": ["chr1"], "start": [5], "end": [6]})
    (tmp_path / "b.bed").write_text("chr1\t5\t6\n")
    for source in (blacklist, tmp_path / "b.bed", str(tmp_path / "b.bed")):
        adata = peaks(["chr1:0-5", "chr1:5-9", "chr2:5-9"])
        part = drop_blacklisted(adata, source, copy=True)
        assert adata.n_vars == 3
        assert drop_blacklisted(adata, source) is None
        assert adata.var_names.tolist() == part.var_names.tolist() == ["chr1:0-5", "chr2:5-9"]
    with pytest.raises(DataError, match="All 1 peaks overlap the blacklist"):
        drop_blacklisted(peaks(["chr1:5-9"]), blacklist)
    with pytest.raises(DataError, match="no position"):
        drop_blacklisted(peaks(["gene"]), blacklist)


@pytest.mark.parametrize("container", CONTAINERS)
def test_filters_equal_brute_force(container):
    counts = np.random.default_rng(0).poisson(0.6, (20, 30)) * (np.arange(30) % 5 > 0)
    n_cells, n_open = (counts > 0).sum(axis=0), (counts > 0).sum(axis=1)
    for options, keep in (
        ({"min_cells": 8}, n_cells >= 8),
        ({"min_fraction": 0.4}, n_cells >= 8),  # the bound itself is kept
        ({"max_fraction": 0.4}, n_cells <= 8),
        ({"min_cells": 1, "min_fraction": 0.3, "max_fraction": 0.5}, (n_cells >= 6) & (n_cells <= 10)),
    ):
        adata = AnnData(container(counts))
        result = filter_peaks(adata, copy=True, **options)
        assert adata.n_vars == 30
        assert filter_peaks(adata, **options) is None
        for done in (adata, result):
            np.testing.assert_array_equal(dense(done.X), counts[:, keep])
    adata = AnnData(np.log1p(counts), layers={"counts": container(counts)})
    assert filter_cells(adata, min_peaks=12, layer="counts") is None
    np.testing.assert_array_equal(dense(adata.layers["counts"]), counts[n_open >= 12])


def test_filter_cells_default_removes_empty_cells(on_disk):
    assert filter_cells(on_disk, copy=True).obs_names.tolist() == ["0", "1"]
    assert filter_peaks(on_disk, min_cells=1, copy=True).var_names.tolist() == on_disk.var_names.tolist()
    with pytest.raises(DataError, match="on disk"):
        filter_cells(on_disk)


def test_filters_refused():
    adata = AnnData(np.array([[1, 0], [1, 2]]))
    with pytest.raises(ConfigError, match="filter_peaks needs a bound"):
        filter_peaks(adata)
    for options, words in (
        ({"min_cells": -1}, "min_cells=-1 is out of range"),
        ({"min_cells": 0.5}, "min_cells=0.5 .float. is not valid: an integer"),
        ({"min_fraction": 1.5}, "min_fraction=1.5 is out of range"),
        ({"max_fraction": 90}, "max_fraction=90 is out of range"),
    ):
        with pytest.raises(ConfigError, match=words):
            filter_peaks(adata, **options)
    with pytest.raises(ConfigError, match="min_peaks=-1"):
        filter_cells(adata, min_peaks=-1)
    with pytest.raises(DataError, match="No peak is left: of 2 peaks each is open in 1 to 2 of 2 cells"):
        filter_peaks(adata, min_cells=3)
    with pytest.raises(DataError, match="No cell is left: the 2 cells have at most 2 open peaks, min_peaks is 3"):
        filter_cells(adata, min_peaks=3)
    with pytest.raises(DataError, match="no entry 'count'"):
        filter_cells(adata, layer="count")
    logged = AnnData(np.log1p(adata.X), layers={"counts": adata.X})
    with pytest.raises(DataError, match=r"adata.X: cell '0'.*log-normalised.*Whole numbers are in: 'counts'"):
        filter_cells(logged)
    assert adata.shape == (2, 2)


# ---------------------------------------------------------------- fragments


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("dtype", ["int32", "uint8", "float32"])
def test_fragments_equal_the_formula(container, dtype):
    reads = np.random.default_rng(0).poisson(0.7, (9, 12)) * 2
    reads[0, :4] = [1, 3, 255, 0]
    adata = AnnData(container(reads.astype(dtype)))
    before = adata.copy()
    result = reads_to_fragments(adata, copy=True)
    assert "fragments" not in adata.layers
    assert reads_to_fragments(adata, key_added="f") is None
    for layer in (adata.layers["f"], result.layers["fragments"]):
        np.testing.assert_array_equal(dense(layer), (reads + 1) // 2)
        assert layer.dtype == dtype
        assert type(layer) is type(before.X)
    np.testing.assert_array_equal(dense(adata.X), dense(before.X))


def test_fragments_of_entries_stored_twice():
    reads = sp.csr_array((np.array([1, 1, 2]), np.array([0, 0, 1]), np.array([0, 3, 3])), shape=(2, 2))
    adata = AnnData(reads)
    reads_to_fragments(adata)
    assert dense(adata.layers["fragments"]).tolist() == [[1, 1], [0, 0]]


def test_fragments_refused(on_disk):
    fragments = AnnData(np.array([[1, 1, 2], [1, 0, 3]]))
    with pytest.raises(DataError, match=r"adata.X does not look like reads: 3 counts are 1 and 1 are 2.*force=True"):
        reads_to_fragments(fragments)
    reads_to_fragments(fragments, force=True)
    assert fragments.layers["fragments"].tolist() == [[1, 1, 1], [1, 0, 2]]
    with pytest.raises(DataError, match=r"adata.layers\['fragments'\] does not look like reads"):
        reads_to_fragments(fragments, layer="fragments", key_added="again")
    with pytest.raises(ConfigError, match="key_added and layer are both 'fragments'"):
        reads_to_fragments(fragments, layer="fragments")
    with pytest.raises(DataError, match="on disk"):
        reads_to_fragments(on_disk)
    assert dense(reads_to_fragments(on_disk, copy=True).layers["fragments"]).tolist() == [[1, 0, 2], [1, 1, 0], [0] * 3]
    binary = AnnData(np.array([[True, False], [True, True]]))
    with pytest.raises(DataError, match="does not look like reads"):
        reads_to_fragments(binary)
    reads_to_fragments(binary, force=True)
    assert binary.layers["fragments"].tolist() == [[True, False], [True, True]]


# ---------------------------------------------------------------- real data


def data_file(name):
    path = DATA / name
    if not path.exists():
        pytest.skip(f"test data not found: set EPIVI_TEST_DATA (missing {name})")
    return path


@pytest.mark.realdata
def test_real_coordinates():
    adata = ad.read_h5ad(data_file("sc/chromvar_example_atac.h5ad"))
    by_columns = peak_coordinates(adata)
    adata.var = adata.var.drop(columns=["chrom", "start", "end"])
    by_names = peak_coordinates(adata)
    pd.testing.assert_frame_equal(by_columns, by_names)
    assert (by_names["end"] - by_names["start"]).unique().tolist() == [499]  # 500 bp, 1-based and closed in the source
    ordered = order_by_chromosome(adata, copy=True)
    chroms = ordered.var["chrom"]
    assert chroms.drop_duplicates().tolist() == natural_chromosome_order(chroms)
    assert all(part.is_monotonic_increasing for _, part in ordered.var.groupby("chrom")["start"])
    assert ordered.X.sum() == adata.X.sum()
    n_cells = np.asarray((adata.X > 0).sum(axis=0)).ravel()
    filtered = filter_peaks(adata, min_fraction=0.1, max_fraction=0.9, copy=True)
    assert filtered.n_vars == ((n_cells >= 5) & (n_cells <= 45)).sum() < adata.n_vars
