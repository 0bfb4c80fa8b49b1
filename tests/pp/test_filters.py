"""Filters of peaks and cells against brute force, and the rules of a multiome on hand-made depths."""

from __future__ import annotations

import inspect
import os
from pathlib import Path

import anndata as ad
import mudata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata import AnnData
from mudata import MuData

from epivi._errors import ConfigError, DataError
from epivi.pp import drop_blacklisted, filter_cells, filter_multiome, filter_peaks

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


# ---------------------------------------------------------------- peaks and cells


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


# ---------------------------------------------------------------- multiome


@pytest.fixture
def multiome():
    """Depths by modality: RNA of a to f, ATAC of f, e, d, c, b and g; in the ATAC modality other orders and tables."""
    rna = pd.Series({"a": 999, "b": 1000, "c": 5000, "d": 25000, "e": 25001, "f": 5000})
    atac = pd.Series({"f": 100000, "e": 5000, "d": 1000, "c": 999, "b": 100001, "g": 2000})
    parts = {}
    for name, depth in (("rna", rna), ("atac", atac)):
        half = depth.to_numpy() // 2
        parts[name] = AnnData(
            sp.csr_matrix(np.stack([half, depth - half, half * 0], axis=1)),
            obs=pd.DataFrame(index=depth.index),
            var=pd.DataFrame(index=[f"{name}{i}" for i in range(3)]),
            obsm={"depth": depth.to_numpy()[:, None]},
            layers={"counts": sp.csr_matrix(np.full((6, 3), 1000))},
        )
    mdata = MuData(parts)
    mdata.obs["number"] = np.arange(7)
    mdata.obsm["number"] = np.arange(7)[:, None]
    return mdata


def check_consistent(mdata, cells):
    assert mdata.obs_names.tolist() == cells
    assert (
        mdata.obs["number"].tolist() == ["abcdefg".index(cell) for cell in cells] == mdata.obsm["number"][:, 0].tolist()
    )
    for name, all_cells in (("rna", "abcdef"), ("atac", "fedcbg")):
        part = mdata[name]
        assert part.obs_names.tolist() == [cell for cell in all_cells if cell in cells]
        np.testing.assert_array_equal(part.obsm["depth"][:, 0], np.asarray(part.X.sum(axis=1)).ravel())
        at = mdata.obsmap[name]
        assert [part.obs_names[i - 1] for i in at if i > 0] == [cell for cell in cells if cell in part.obs_names]


RULES = [
    # both ends of the bounds are kept; g has no RNA and a no ATAC: the other rule decides on them
    ({}, list("dfg")),
    ({"rna_counts": None}, list("adefg")),
    ({"atac_counts": None}, list("bcdfg")),
    ({"rna_counts": (None, 5000), "atac_counts": (2000, None)}, list("abfg")),
    ({"rna_counts": (5000, 5000), "atac_counts": None}, list("cfg")),
    ({"layers": {"rna": "counts", "atac": "counts"}}, list("abcdefg")),
    ({"layers": {"rna": "counts"}}, list("adefg")),
]


@pytest.mark.parametrize(("options", "cells"), RULES)
def test_multiome_depths(multiome, options, cells):
    before = multiome.copy()
    result = filter_multiome(multiome, copy=True, **options)
    check_consistent(multiome, list("abcdefg"))
    assert filter_multiome(multiome, **options) is None
    check_consistent(result, cells)
    check_consistent(multiome, cells)
    for name in ("rna", "atac"):
        kept = multiome[name].obs_names
        np.testing.assert_array_equal(dense(multiome[name].X), dense(before[name][kept].X))
        np.testing.assert_array_equal(dense(result[name].X), dense(before[name][kept].X))


def test_multiome_defaults_are_those_of_the_paper():
    options = {k: v.default for k, v in inspect.signature(filter_multiome).parameters.items()}
    assert options["rna_counts"] == (1000, 25000)
    assert options["atac_counts"] == (1000, 100000)
    assert (options["nucleosome_signal"], options["tss_enrichment"]) == (2, 1)


def test_multiome_quality(multiome, caplog):
    caplog.set_level("INFO")
    # order f e d c b g; strict bounds: 2 and 1 themselves fail, as do missing and infinite values
    multiome["atac"].obs["nucleosome_signal"] = [1.9, 2.0, np.inf, 0.1, np.nan, 0.0]
    multiome["atac"].obs["tss_score"] = [1.1, 5, 5, 1.0, 5, 5]
    off = {"rna_counts": None, "atac_counts": None, "copy": True}
    assert filter_multiome(multiome, **off).obs_names.tolist() == list("afg")
    assert "nucleosome_signal < 2: 3 of 7 cells fail" in caplog.text
    assert "tss_enrichment > 1: 1 of 7 cells fail" in caplog.text
    assert "3 of 7 cells are kept" in caplog.text
    assert "mdata['atac'].obs['tss_score']" in caplog.text
    assert filter_multiome(multiome, tss_enrichment=None, **off).obs_names.tolist() == list("acfg")
    assert filter_multiome(multiome, nucleosome_signal=2.5, **off).obs_names.tolist() == list("aefg")
    # a named column, found in the table of the MuData; a has no ATAC and is not judged
    multiome.obs["tsse"] = [0.0, 9, 9, 9, 9, 9, 0.5]
    only = {"nucleosome_signal": None, "tss_key": "tsse"}
    assert filter_multiome(multiome, **only, **off).obs_names.tolist() == list("abcdef")
    both = filter_multiome(multiome, copy=True)
    assert both.obs_names.tolist() == list("fg")
    assert "rna_counts in [1000, 25000]: 2 of 7 cells fail" in caplog.text
    assert "atac_counts in [1000, 100000]: 2 of 7 cells fail" in caplog.text


def test_multiome_without_quality_says_so(multiome, caplog):
    filter_multiome(multiome)
    assert "no column 'nucleosome_signal': this rule is left out" in caplog.text
    assert "no column 'tss_enrichment' or 'tss_score': this rule is left out" in caplog.text


def test_multiome_names(multiome):
    other = MuData({"GEX": multiome["rna"], "peaks": multiome["atac"]})
    names = {"rna": "GEX", "atac": "peaks"}
    filter_multiome(other, modalities=names)
    assert sorted(other.obs_names) == list("dfg")


REFUSED_ARGUMENTS = [
    ({"rna_counts": 1000}, r"rna_counts=1000 is not valid: a pair"),
    ({"rna_counts": (1, 2, 3)}, "a pair .least, largest. is needed"),
    ({"atac_counts": (10, 1)}, "the least is above the largest"),
    ({"atac_counts": (-1, 5)}, "atac_counts=-1 is out of range"),
    ({"nucleosome_signal": "2"}, "nucleosome_signal='2' .str. is not valid"),
    ({"tss_enrichment": -1}, "tss_enrichment=-1 is out of range"),
    ({"modalities": "rna"}, "modalities='rna' is not valid: a dict"),
    ({"layers": {"ran": "counts"}}, "layers holds the unknown entry 'ran'. Did you mean 'rna'"),
]


@pytest.mark.parametrize(("options", "words"), REFUSED_ARGUMENTS)
def test_multiome_arguments_refused(multiome, options, words):
    with pytest.raises(ConfigError, match=words):
        filter_multiome(multiome, **options)


def test_multiome_data_refused(multiome, tmp_path):
    for options, words in (
        ({"modalities": {"rna": "gex"}}, "mdata has no modality 'gex' for 'rna'.*modalities="),
        ({"layers": {"rna": "count"}}, r"mdata\['rna'\].layers has no entry 'count'. Did you mean 'counts'"),
        ({"tss_key": "tsse"}, r"Neither mdata\['atac'\].obs nor mdata.obs has a column 'tsse'"),
    ):
        with pytest.raises(DataError, match=words):
            filter_multiome(multiome, **options)
    # g has no RNA and a no ATAC, so that both rules are needed
    words = r"No cell is left of 7. .*rna_counts in \[1000000, None\]: 6, atac_counts in \[None, 1\]: 6. Widen"
    with pytest.raises(DataError, match=words):
        filter_multiome(multiome, rna_counts=(10**6, None), atac_counts=(None, 1))
    check_consistent(multiome, list("abcdefg"))
    with pytest.raises(DataError, match="takes a MuData, found AnnData"):
        filter_multiome(multiome["rna"])
    with pytest.raises(DataError, match="mdata is a view and cannot be changed in place"):
        filter_multiome(multiome[:5])
    assert set(filter_multiome(multiome[:5], copy=True).obs_names) == {"d"}
    multiome.write_h5mu(tmp_path / "m.h5mu")
    backed = mudata.read_h5mu(tmp_path / "m.h5mu", backed="r")
    with pytest.raises(DataError, match=r"mdata is on disk .backed."):
        filter_multiome(backed, copy=True)
    backed.file.close()
    multiome["atac"].obs["tss_enrichment"] = list("xyzxyz")
    with pytest.raises(DataError, match=r"mdata\['atac'\].obs\['tss_enrichment'\] has dtype .*numbers are needed"):
        filter_multiome(multiome)
    multiome["rna"].X = np.log1p(multiome["rna"].X)
    with pytest.raises(DataError, match=r"mdata\['rna'\].X: cell 'a'.*log-normalised"):
        filter_multiome(multiome)
    genes = MuData(
        {name: AnnData(np.ones((2, 2)), obs=pd.DataFrame(index=[name, name + "2"])) for name in "xy"}, axis=1
    )
    with pytest.raises(DataError, match=r"share their features .axis=1."):
        filter_multiome(genes)


# ---------------------------------------------------------------- real data


@pytest.mark.realdata
def test_real_filters():
    path = DATA / "sc/chromvar_example_atac.h5ad"
    if not path.exists():
        pytest.skip("test data not found: set EPIVI_TEST_DATA (missing sc/chromvar_example_atac.h5ad)")
    adata = ad.read_h5ad(path)
    n_cells = np.asarray((adata.X > 0).sum(axis=0)).ravel()
    filtered = filter_peaks(adata, min_fraction=0.1, max_fraction=0.9, copy=True)
    assert filtered.n_vars == ((n_cells >= 5) & (n_cells <= 45)).sum() < adata.n_vars
