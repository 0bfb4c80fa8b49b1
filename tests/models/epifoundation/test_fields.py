from __future__ import annotations

import anndata as ad
import mudata as md
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from epivi._errors import DataError
from epivi._keys import OBS_N_OPEN
from epivi.models.epifoundation.fields import (
    CHROM_CODES,
    CHROM_LENGTHS,
    CHROM_NAMES,
    FREQUENCY,
    NAMES,
    POSITIONS,
    GenesField,
    PeakTokensField,
    QueryCategoryField,
    places,
)

REGIONS = ["chr10:100-300", "chr2:50-150", "chr2:400-500", "GL000-1.1:0-10"]


def peaks_of(values, names=None, **kwargs):
    names = REGIONS[: np.shape(values)[1]] if names is None else names
    return ad.AnnData(sparse.csr_matrix(np.asarray(values, dtype=np.float32)), var=pd.DataFrame(index=names), **kwargs)


@pytest.fixture
def adata():
    return peaks_of([[1, 0, 2, 1], [0, 1, 0, 0], [3, 1, 1, 0]])


@pytest.fixture
def state(adata):
    return PeakTokensField("X", None).register_field(adata)


def test_places_are_codes_and_midpoints():
    table = pd.DataFrame({"chrom": ["b", "a", "c"], "start": [0, 10, 7], "end": [9, 20, 8]})
    codes, middle = places(table, 3, {"a": 0, "b": 1})
    assert codes.tolist() == [1, 0, -1]
    assert middle.tolist() == [4, 15, 7]
    assert [part.tolist() for part in places(None, 2, {})] == [[-1, -1], [0, 0]]


def test_peaks_are_registered_with_their_places(state, adata):
    assert state[CHROM_NAMES].tolist() == ["chr2", "chr10", "GL000-1.1"]
    assert state[CHROM_LENGTHS].tolist() == [500, 300, 10]
    assert state[CHROM_CODES].tolist() == [1, 0, 0, 2]
    assert state[POSITIONS].tolist() == [200, 100, 450, 5]
    assert (state["start"].tolist(), state["end"].tolist()) == ([100, 50, 400, 0], [300, 150, 500, 10])
    assert adata.obs[OBS_N_OPEN].tolist() == [3, 1, 3]


@pytest.mark.parametrize("separator", [":", "-"])
def test_both_formats_of_names_and_columns_give_the_same_places(state, adata, separator):
    named = adata.copy()
    named.var_names = [name.replace(":", separator) for name in REGIONS]
    columns = adata.copy()
    columns.var = pd.DataFrame(
        {"chrom": ["chr10", "chr2", "chr2", "GL000-1.1"], "start": [100, 50, 400, 0], "end": [300, 150, 500, 10]},
        index=[f"p{i}" for i in range(4)],
    )
    for other in (named, columns):
        found = PeakTokensField("X", None).register_field(other)
        for key in (CHROM_NAMES, CHROM_LENGTHS, CHROM_CODES, POSITIONS, "start", "end"):
            np.testing.assert_array_equal(found[key], state[key])


def test_peaks_without_coordinates_have_no_place(adata):
    adata.var_names = ["a", "b", "c", "d"]
    state = PeakTokensField("X", None).register_field(adata)
    assert state[CHROM_NAMES].size == 0
    assert state[CHROM_CODES].tolist() == [-1] * 4
    assert "start" not in state


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda a: setattr(a, "var_names", [*REGIONS[:3], REGIONS[0]]), r"holds peaks twice: \['chr10:100-300'\]"),
        (lambda a: setattr(a, "var_names", [*REGIONS[:3], "chr2:9-9"]), "chr2:9-9"),
        (lambda a: a.X.data.__setitem__(0, -1), "negative"),
        (lambda a: a.X.data.__setitem__(0, np.nan), "NaN|finite|missing"),
        (
            lambda a: setattr(a, "X", sparse.csr_matrix(a.X.toarray() * [[1], [0], [1]])),
            "1 of 3 cells of adata.X have no open peak",
        ),
    ],
)
def test_peaks_that_cannot_be_used_are_refused(adata, change, match):
    change(adata)
    with pytest.raises(DataError, match=match):
        PeakTokensField("X", None).register_field(adata)


def test_empty_cells_are_kept_where_that_is_asked_for(adata):
    adata.X = sparse.csr_matrix(adata.X.toarray() * [[1], [0], [1]])
    PeakTokensField("X", None, empty_cells="zero").register_field(adata)
    assert adata.obs[OBS_N_OPEN].tolist() == [3, 0, 3]


def test_peaks_are_matched_by_name(state, adata):
    order = [2, 0, 3, 1]
    query = adata[:, order].copy()
    found = PeakTokensField("X", None).transfer_field(state, query)
    np.testing.assert_array_equal(found["feature_indexer"], np.argsort(order))
    assert found["column_names"].tolist() == REGIONS
    np.testing.assert_array_equal(found[CHROM_CODES], state[CHROM_CODES])


def test_further_peaks_of_a_query_are_left_out_and_not_counted(state):
    query = peaks_of([[1, 1, 0, 0, 1], [0, 0, 0, 0, 1]], [*REGIONS, "chr3:1-2"])
    with pytest.raises(DataError, match=r"1 of 2 cells of adata.X have no open peak among those of the model"):
        PeakTokensField("X", None).transfer_field(state, query)
    PeakTokensField("X", None, empty_cells="zero").transfer_field(state, query)
    assert query.obs[OBS_N_OPEN].tolist() == [2, 0]


def test_missing_peaks_are_refused_with_the_way_out(state):
    query = peaks_of([[1, 1]], ["chr10:101-301", "chr2:50-150"])
    with pytest.raises(DataError, match=r"adata has 1 of the 4 peaks .*'chr10:101-301'.*model.project_peaks\(adata\)"):
        PeakTokensField("X", None).transfer_field(state, query)


def test_any_peaks_are_read_by_position(state):
    query = peaks_of(np.ones((2, 3)), ["chr10:120-220", "chr2:50-150", "chr7:1-3"])
    found = PeakTokensField("X", None, new_peaks="position").transfer_field(state, query)
    assert found["query_rows"].tolist() == [-1, 1, -1]
    assert found["query_chrom"].tolist() == [1, 0, -1]
    assert found["query_position"].tolist() == [170, 100, 2]
    assert found["column_names"].tolist() == REGIONS
    # the state of one query is no part of the next
    again = PeakTokensField("X", None, new_peaks="position").transfer_field(
        found, peaks_of(np.ones((2, 2)), REGIONS[1:3])
    )
    assert again["query_rows"].tolist() == [1, 2]


@pytest.mark.parametrize(
    ("names", "match"),
    [(["a", "b"], "peaks without positions"), (["2:1-3", "10:5-9"], "No chromosome of adata .*is it the same genome")],
)
def test_peaks_that_cannot_be_placed_are_refused(state, names, match):
    with pytest.raises(DataError, match=match):
        PeakTokensField("X", None, new_peaks="position").transfer_field(state, peaks_of(np.ones((2, 2)), names))


def test_a_vocabulary_is_matched_instead_of_registered(state):
    query = peaks_of([[1, 0, 1, 1]], REGIONS[::-1])
    found = PeakTokensField("X", None, vocabulary=state).register_field(query)
    assert found["column_names"].tolist() == REGIONS


def multiome_of(values, names=("g0", "g1", "g2"), var=None):
    values = np.asarray(values)
    n = len(values)
    matrix = values if values.dtype == object else sparse.csr_matrix(values.astype(np.float32))
    obs = pd.DataFrame(index=[f"c{i}" for i in range(n)])
    atac = peaks_of(np.ones((n, 2)), obs=obs)
    rna = ad.AnnData(matrix, obs=obs.copy(), var=pd.DataFrame(var, index=list(names)))
    return md.MuData({"atac": atac, "rna": rna})


def test_the_frequency_of_genes_against_a_count():
    mdata = multiome_of([[2, 0, 1], [1, 0, 0], [0, 0, 0], [5, 0, 1]])
    state = GenesField("rna", None).register_field(mdata)
    # the third cell has no RNA
    np.testing.assert_allclose(state[FREQUENCY], [3.5 / 4, 0.5 / 4, 2.5 / 4])
    assert state[NAMES].tolist() == ["g0", "g1", "g2"]
    assert state["kind"] == "counts"


def test_stored_zeros_and_duplicates_do_not_change_the_frequency():
    mdata = multiome_of([[2, 0, 1], [1, 0, 0], [0, 0, 0], [5, 0, 1]])
    expected = GenesField("rna", None).register_field(mdata)[FREQUENCY]
    # row 0: gene 0 twice; row 2: a stored zero
    values, *where = [1, 1, 1, 1, 0, 5, 1], [0, 0, 2, 0, 1, 0, 2], [0, 3, 4, 5, 7]
    messy = sparse.csr_matrix((np.array(values, dtype=np.float32), *where), shape=(4, 3))
    mdata.mod["rna"].X = messy
    np.testing.assert_allclose(GenesField("rna", None).register_field(mdata)[FREQUENCY], expected)
    # what the user holds stays as it was
    assert mdata["rna"].X.nnz == 7


def test_genes_have_places_where_the_data_tell_them():
    var = {"chrom": ["chr1", "chr2", "chr1"], "start": [0, 10, 5], "end": [10, 40, 6]}
    state = GenesField("rna", None).register_field(multiome_of(np.ones((2, 3)), var=var))
    assert state["chrom"].tolist() == ["chr1", "chr2", "chr1"]
    assert state[POSITIONS].tolist() == [5, 25, 5]
    bare = GenesField("rna", None).register_field(multiome_of(np.ones((2, 3))))
    assert bare["chrom"].size == bare[POSITIONS].size == 0
    assert (state["start"].tolist(), state["end"].tolist()) == ([0, 10, 5], [10, 40, 6])
    assert "start" not in bare
    alone = GenesField("rna", None).register_field(multiome_of(np.ones((2, 3)), var={"chrom": var["chrom"]}))
    assert alone["chrom"].tolist() == var["chrom"]
    assert alone[POSITIONS].size == 0
    gaps = var | {"start": [0, np.nan, 5], "end": [10, 40, None]}
    some = GenesField("rna", None).register_field(multiome_of(np.ones((2, 3)), var=gaps))
    assert [some[key].tolist() for key in ("start", "end", POSITIONS)] == [[0, -1, -1], [10, -1, -1], [5, -1, -1]]


@pytest.mark.parametrize(
    ("values", "names", "kind", "match"),
    [
        (np.ones((2, 1)), ["g"], "counts", "has 1 genes; at least 2"),
        (np.ones((2, 2)), ["g", "g"], "counts", r"holds genes twice: \['g'\]. epivi.pp.collapse_genes"),
        ([[1, -1]], ["a", "b"], "counts", "negative"),
        ([[1, 0.5]], ["a", "b"], "counts", "0.5"),
        ([[1, -0.5]], ["a", "b"], "lognorm", r"1 values that are negative or not finite \(first: -0.5\)"),
        ([[1, np.inf]], ["a", "b"], "lognorm", "not finite"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*not unique:UserWarning")
def test_expression_that_cannot_be_used_is_refused(values, names, kind, match):
    with pytest.raises(DataError, match=match):
        GenesField("rna", None, kind=kind).register_field(multiome_of(values, names))


def test_a_layer_that_is_missing_is_named():
    mdata = multiome_of(np.ones((2, 3)))
    mdata.mod["rna"].layers["counts"] = mdata["rna"].X.copy()
    with pytest.raises(DataError, match=r"mdata\['rna'\].layers.*'counts'"):
        GenesField("rna", "count").validate_field(mdata)
    field = GenesField("rna", "counts")
    field.validate_field(mdata)
    assert field.where == "mdata['rna'].layers['counts']"


def test_data_without_expression_have_no_genes_and_take_those_of_a_model():
    field = GenesField(None, None)
    assert field.register_field(None)[NAMES].size == 0
    assert field.get_data_registry() == {}
    state = {NAMES: np.array(["a"]), "kind": "counts"}
    assert GenesField(None, None, vocabulary=state).register_field(None) == state


def test_genes_are_matched_by_name():
    state = GenesField("rna", None).register_field(multiome_of([[1, 0, 2]]))
    query = multiome_of([[7, 8, 9, 1]], ["g2", "g0", "x", "g1"])
    found = GenesField("rna", None).transfer_field(state, query)
    reader = GenesField("rna", None).make_reader(query, found)
    np.testing.assert_array_equal(reader.rows(np.array([0])).toarray(), [[8, 1, 7]])
    np.testing.assert_array_equal(found[FREQUENCY], state[FREQUENCY])
    with pytest.raises(DataError, match=r"mdata\['rna'\].*g2"):
        GenesField("rna", None).transfer_field(state, multiome_of([[1, 1]], ["g0", "g1"]))
    # a model of peaks alone takes the genes of the data
    assert GenesField("rna", None).transfer_field({NAMES: np.array([])}, query)[NAMES].tolist() == list(
        query["rna"].var_names
    )


def test_cells_without_expression_read_as_empty():
    mdata = multiome_of([[1, 0, 2], [3, 1, 0]])
    partial = md.MuData({"atac": mdata["atac"], "rna": mdata["rna"][["c1"]].copy()})
    field = GenesField("rna", None)
    reader = field.make_reader(partial, field.register_field(partial))
    rows = reader.rows(partial.obs_names.get_indexer(["c0", "c1"]))
    np.testing.assert_array_equal(rows.toarray(), [[0, 0, 0], [3, 1, 0]])


def test_new_categories_are_appended_and_a_missing_column_is_none():
    adata = peaks_of(np.ones((6, 2)))
    adata.obs["batch"] = pd.Categorical(["b", "a", "b", "a", "a", "b"])
    field = QueryCategoryField("batch", "batch")
    state = field.register_field(adata)
    query = peaks_of(np.ones((6, 2)))
    query.obs["batch"] = pd.Categorical(["c", "a", "c", "c", "a", "a"])
    found = field.transfer_field(state, query)
    assert list(found["categorical_mapping"]) == ["a", "b", "c"]
    assert query.obs["_scvi_batch"].tolist() == [2, 0, 2, 2, 0, 0]
    del query.obs["batch"]
    found = field.transfer_field(state, query)
    assert list(found["categorical_mapping"]) == ["a", "b"]
    assert query.obs["_scvi_batch"].tolist() == [0] * 6
    assert "batch" not in query.obs
    query.obs["batch"] = "z"
    with pytest.raises(DataError, match=r"\['z'\], unknown to the trained model.*load_query_data"):
        field.transfer_field(state, query, extend_categories=False)
