"""What a setup refuses, and what it takes."""

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import epivi
from epivi._errors import ConfigError, DataError

setup = epivi.Expresser.setup_anndata


@pytest.mark.parametrize(
    ("value", "words"),
    [(-1.0, "negative"), (np.nan, "NaN"), (np.inf, "infinite"), (0.5, "not a whole number")],
)
def test_what_is_no_count_is_named_with_its_cell(counts, value, words) -> None:
    counts.X[3, 5] = value
    with pytest.raises(DataError, match=f"cell3.*column 5.*{words}"):
        setup(counts)


def test_normalised_data_point_to_the_layer_of_counts(counts) -> None:
    counts.layers["counts"] = counts.X.copy()
    counts.X = counts.X.log1p()
    with pytest.raises(DataError, match="Whole numbers are in: 'counts'"):
        setup(counts)
    setup(counts, layer="counts")


@pytest.mark.parametrize("where", ["names", "column", "versions"])
def test_genes_that_occur_twice_name_collapse_genes(counts, where) -> None:
    names = counts.var_names.to_list()
    key = None
    if where == "names":
        counts.var_names = [names[1], *names[1:]]
    elif where == "column":
        key = "symbol"
        counts.var[key] = [names[1], *names[1:]]
    else:
        counts.var_names = ["ENSG00000000001.1", "ENSG00000000001.2", *names[2:]]
    with pytest.raises(DataError, match=r"twice.*epivi\.pp\.collapse_genes"):
        setup(counts, gene_key=key)


def test_genes_need_names(counts) -> None:
    counts.var["ids"] = [None, *counts.var_names[1:]]
    with pytest.raises(DataError, match="1 missing values"):
        setup(counts, gene_key="ids")
    with pytest.raises(DataError, match="Did you mean 'ids'"):
        setup(counts, gene_key="idss")


def test_views_other_objects_and_unknown_choices_are_refused(counts) -> None:
    with pytest.raises(DataError, match="view"):
        setup(counts[:10])
    with pytest.raises(DataError, match="an AnnData is needed"):
        setup(counts.X)
    with pytest.raises(DataError, match="no entry 'count'"):
        setup(counts, layer="count")
    with pytest.raises(ConfigError, match="input_kind='log'"):
        setup(counts, input_kind="log")
    with pytest.raises(ConfigError, match="empty_cells='zero'"):
        setup(counts, empty_cells="zero")
    with pytest.raises(ConfigError, match="Unknown argument 'batchkey'"):
        setup(counts, batchkey="batch")
    with pytest.raises(DataError, match="2 are needed"):
        setup(ad.AnnData(np.ones((3, 1), dtype=np.float32)))


def test_empty_cells_are_kept_or_refused(counts) -> None:
    x = counts.X.toarray()
    x[[2, 7]] = 0
    counts.X = sparse.csr_matrix(x)
    setup(counts)
    with pytest.raises(DataError, match=r"2 of 40 cells .*express no gene.*cell2"):
        setup(counts, empty_cells="raise")


def test_a_refused_setup_leaves_the_data_as_they_were(counts) -> None:
    before = list(counts.obs)
    counts.obs["size"] = -1.0
    with pytest.raises(DataError, match="size"):
        setup(counts, size_factor_key="size")
    assert list(counts.obs) == [*before, "size"]


def test_log_normalised_values_are_checked(counts) -> None:
    raw = counts.X.copy()
    with pytest.raises(DataError, match="is not log-normalised: expm1 of its values sums to between"):
        setup(counts, input_kind="lognorm")
    x = raw.toarray() + 1e-3
    counts.X = sparse.csr_matrix(np.log1p(1e4 * x / x.sum(1, keepdims=True)))
    setup(counts, input_kind="lognorm")
    with pytest.raises(ConfigError, match="binning='count' needs counts"):
        epivi.Expresser(counts, size="test", binning="count")
    counts.X[1, 1] = -2.0
    with pytest.raises(DataError, match="cell 'cell1', gene 'g1' holds -2"):
        setup(counts, input_kind="lognorm")


def test_data_sets_need_the_table_of_what_they_measure(counts) -> None:
    with pytest.raises(DataError, match=r"needs varm\['measured'\].*union_genes"):
        setup(counts, dataset_key="batch")
    counts.varm["measured"] = pd.DataFrame(np.ones((60, 2), dtype=bool), index=counts.var_names, columns=["a", "b"])
    with pytest.raises(DataError, match=r"no column for the data sets \['c'\]"):
        setup(counts, dataset_key="batch")


def test_the_result_of_union_genes_needs_no_argument(build, make) -> None:
    one, two = build(seed=1), build(seed=2)
    two.var_names = [f"g{i + 30}" for i in range(60)]
    both = epivi.pp.union_genes({"one": one, "two": two})
    model = make(both)
    state = model._field_state("X")
    assert state["measured"].sum(1).tolist() == [60, 60]
    assert list(state["datasets"]) == ["one", "two"]
    assert state["measured"][1, :30].sum() == 0
    # data that are set up again as those of the model keep the table, a query of one data set needs none
    again = model._data_state(model._validate_anndata(epivi.pp.union_genes({"one": one, "two": two})))
    assert np.array_equal(again["measured"], state["measured"])
    alone = model._data_state(model._validate_anndata(build(seed=3)))
    assert alone["measured"].tolist() == [[True] * 60 + [False] * 30]
