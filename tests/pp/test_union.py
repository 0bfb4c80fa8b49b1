"""Union of data sets with different genes: counts, names, and what each measures."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from epivi._errors import ConfigError, DataError
from epivi.pp import union_genes


def dataset(genes, cells, seed=0, form=sparse.csr_matrix):
    x = np.random.default_rng(seed).poisson(1.0, (len(cells), len(genes))).astype(np.float32)
    x[0, 0] += 1
    return ad.AnnData(form(x), obs=pd.DataFrame(index=cells), var=pd.DataFrame(index=genes))


def test_counts_are_those_of_pandas() -> None:
    one = dataset(["a", "b", "c"], ["x1", "x2"])
    two = dataset(["c", "d", "a"], ["y1", "y2", "y3"], seed=1, form=sparse.csc_matrix)
    both = union_genes({"one": one, "two": two})
    expected = pd.concat([one.to_df(), two.to_df()]).fillna(0.0)[["a", "b", "c", "d"]]
    assert both.to_df().equals(expected.astype(np.float32))
    assert both.obs["dataset"].tolist() == ["one"] * 2 + ["two"] * 3
    measured = both.varm["measured"]
    assert measured["one"].tolist() == [True, True, True, False]
    assert measured["two"].tolist() == [True, False, True, True]
    assert both.X.has_sorted_indices


def test_columns_of_obs_and_var_are_kept() -> None:
    one, two = dataset(["a", "b"], ["x1"]), dataset(["b", "c"], ["x1"], seed=1, form=np.asarray)
    one.obs["age"], one.var["kind"], two.var["kind"] = 3.0, ["k1", "k2"], ["other", "k3"]
    both = union_genes([one, two])
    assert both.obs_names.tolist() == ["x1-0", "x1-1"]
    assert both.obs["age"].isna().tolist() == [False, True]
    assert both.var["kind"].tolist() == ["k1", "k2", "k3"]


def test_genes_may_be_named_by_a_column_and_layers_hold_counts() -> None:
    one, two = dataset(["a", "b"], ["x1"]), dataset(["b2", "c"], ["y1"], seed=1)
    one.var["ids"], two.var["ids"] = (
        ["ENSG00000000001.1", "ENSG00000000002.4"],
        ["ENSG00000000002.9", "ENSG00000000003"],
    )
    for data in (one, two):
        data.layers["counts"], data.X = data.X.copy(), data.X * 0.5
    both = union_genes({"one": one, "two": two}, gene_key="ids", layer="counts", key_added="study")
    assert both.var_names.tolist() == [f"ENSG0000000000{i}" for i in (1, 2, 3)]
    assert both.obs["study"].tolist() == ["one", "two"]
    assert both.X.toarray()[1, 1] == two.layers["counts"].toarray()[0, 0]


def test_what_cannot_be_joined_is_refused() -> None:
    one = dataset(["a", "b"], ["x1"])
    with pytest.raises(ConfigError, match="one data set or more"):
        union_genes([])
    with pytest.raises(DataError, match=r"data\['two'\] shares no gene.*'q'.*gene_key"):
        union_genes({"one": one, "two": dataset(["q", "r"], ["y1"]), "three": dataset(["b", "c"], ["z1"])})
    with pytest.raises(DataError, match=r"data\['1'\] holds genes twice: \['ENSG00000000001'\].*collapse_genes"):
        union_genes([one, dataset(["ENSG00000000001.1", "ENSG00000000001.2"], ["y1"])])
    with pytest.raises(DataError, match=r"data\['0'\] is a numpy"):
        union_genes([np.ones((2, 2))])
    half = dataset(["a", "b"], ["y1", "y2"])
    half.X = half.X + sparse.csr_matrix(np.full((2, 2), 0.5))
    with pytest.raises(DataError, match=r"data\['1'\]\.X.*not a whole number"):
        union_genes([one, half])
