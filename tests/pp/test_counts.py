"""Fragments by formula, and genes added up against brute force."""

from __future__ import annotations

import contextlib

import anndata as ad
import hypothesis.strategies as st
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata import AnnData
from hypothesis import given, settings

from epivi._errors import ConfigError, DataError
from epivi.pp import collapse_genes, reads_to_fragments

# anndata 0.13 asks pandas 3 for options that pandas deprecates; not ours to mend
pytestmark = pytest.mark.filterwarnings("ignore:.*option is deprecated:DeprecationWarning")

CONTAINERS = [np.asarray, sp.csr_matrix, sp.csr_array, sp.csc_matrix, sp.csc_array]


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


# ---------------------------------------------------------------- genes that occur twice


def genes(names, x=None, **kwargs):
    x = np.random.default_rng(0).poisson(1.0, (4, len(names))) if x is None else x
    with pytest.warns(UserWarning, match="not unique") if len(set(names)) < len(names) else contextlib.nullcontext():
        return AnnData(x, var=pd.DataFrame({"order": range(len(names))}, index=names), **kwargs)


@pytest.mark.parametrize("container", CONTAINERS)
@given(data=st.data())
@settings(deadline=None, max_examples=15)
def test_collapse_equals_brute_force(container, data):
    names = data.draw(st.lists(st.sampled_from(["A", "B", "C", "RP11-34L1.2", "RP11-34L1.3"]), min_size=1, max_size=8))
    counts = np.random.default_rng(1).poisson(0.8, (3, len(names)))
    counts[0, 0] += 1
    adata = AnnData(
        container(counts),
        var=pd.DataFrame({"symbol": names, "i": range(len(names))}, [f"{i}" for i in range(len(names))]),
    )
    result = collapse_genes(adata, "symbol")
    wanted = list(dict.fromkeys(names))
    assert result.var["symbol"].tolist() == wanted
    assert sp.issparse(result.X)
    assert result.X.format == "csr"
    expected = np.stack([counts[:, [n == name for n in names]].sum(axis=1) for name in wanted], axis=1)
    np.testing.assert_array_equal(dense(result.X), expected)
    assert result.var["i"].tolist() == [names.index(name) for name in wanted]
    assert result.var_names.tolist() == [str(names.index(name)) for name in wanted]  # those of the first
    np.testing.assert_array_equal(dense(adata.X), counts)


def test_collapse_by_var_names_and_versions():
    names = ["ENSG00000141510.18", "ENSMUSG00000059552.14", "ENSG00000141510.3", "AC000.1", "ENSG00000182378.14_PAR_Y"]
    adata = genes(names)
    result = collapse_genes(adata)
    assert result.var_names.tolist() == [
        "ENSG00000141510", "ENSMUSG00000059552", "AC000.1", "ENSG00000182378_PAR_Y",
    ]  # fmt: skip
    np.testing.assert_array_equal(
        dense(result.X), np.stack([adata.X[:, [0, 2]].sum(axis=1), *adata.X[:, [1, 3, 4]].T], 1)
    )
    assert result.var["order"].tolist() == [0, 1, 3, 4]
    kept = collapse_genes(adata, strip_versions=False)
    assert kept.var_names.tolist() == names
    np.testing.assert_array_equal(dense(kept.X), adata.X)
    twice = genes(["A", "B", "A"], np.array([[1, 2, 4], [0, 0, 7]]))
    assert dense(collapse_genes(twice).X).tolist() == [[5, 2], [7, 0]]


def test_collapse_keeps_what_belongs_to_cells_and_first_genes(caplog):
    x = np.array([[200, 2, 100], [0, 0, 7]], dtype="uint8")
    adata = AnnData(
        np.log1p(x),
        obs=pd.DataFrame({"batch": ["a", "b"]}, index=["c0", "c1"]),
        var=pd.DataFrame({"symbol": pd.Categorical(["A", "B", "A"])}, index=["g0", "g1", "g2"]),
        layers={"counts": x, "bool": x > 0},
        obsm={"X_pca": np.eye(2)},
        obsp={"graph": sp.eye_array(2).tocsr()},
        varm={"loadings": np.arange(3)[:, None]},
        uns={"colors": "red"},
    )
    result = collapse_genes(adata, "symbol", layer="counts")
    assert "adata.X holds no counts and is left out" in caplog.text
    assert result.X is None
    assert dense(result.layers["counts"]).tolist() == [[300, 2], [7, 0]]  # 300 does not fit uint8
    assert dense(result.layers["bool"]).tolist() == [[2, 1], [1, 0]]
    assert result.var_names.tolist() == ["g0", "g1"]
    assert result.varm["loadings"].ravel().tolist() == [0, 1]
    pd.testing.assert_frame_equal(result.obs, adata.obs)
    np.testing.assert_array_equal(result.obsm["X_pca"], np.eye(2))
    np.testing.assert_array_equal(dense(result.obsp["graph"]), np.eye(2))
    assert result.uns["colors"] == "red"
    result.obsm["X_pca"][:] = 0
    assert adata.obsm["X_pca"].any()
    # nothing is added up, so nothing is lost
    adata.var["symbol"] = ["A", "B", "C"]
    again = collapse_genes(adata, "symbol", layer="counts")
    np.testing.assert_array_equal(dense(again.X), np.log1p(x).astype("float32"))


def test_collapse_refused(on_disk):
    adata = genes(["A", "A"], np.log1p(np.array([[1, 2], [0, 3]])))
    with pytest.raises(DataError, match=r"adata.X: cell '0'.*log-normalised"):
        collapse_genes(adata)
    with pytest.raises(DataError, match="no entry 'count'"):
        collapse_genes(adata, layer="count")
    adata = genes(["A", "B"])
    with pytest.raises(DataError, match=r"adata.var has no entry 'ordr'. Did you mean 'order'"):
        collapse_genes(adata, "ordr")
    adata.var["symbol"] = ["A", None]
    with pytest.raises(DataError, match=r"var\['symbol'\]: 1 genes have no name, the first is column 1 .'B'."):
        collapse_genes(adata, "symbol")
    adata.var["symbol"] = [" ", "B"]
    with pytest.raises(DataError, match="1 genes have no name, the first is column 0"):
        collapse_genes(adata, "symbol")
    adata = genes(["A", "A"])
    with pytest.raises(
        DataError, match=r"var_names are not unique, 'A' is the name of several genes of adata.var\['order'\]"
    ):
        collapse_genes(adata, "order")
    with pytest.raises(DataError, match=r"adata is a numpy.ndarray"):
        collapse_genes(np.ones((2, 2)))
    assert dense(collapse_genes(on_disk).X).tolist() == [[2, 0, 4], [2, 2, 0], [0, 0, 0]]
