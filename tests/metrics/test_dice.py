"""Dice coefficients against F1, hand-made cases and chance."""

import importlib
import json

import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csc_array, csr_matrix
from sklearn.metrics import f1_score

from epivi._errors import ConfigError, DataError
from epivi.metrics import dice, dice_depth_correlation, dice_specific


def example(n=40, p=60, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.choice(["A", "B", "C"], size=n)
    labels[:3] = ["A", "B", "C"]
    bulk = pd.DataFrame(rng.gamma(1.0, size=(3, p)), index=["A", "B", "C"])
    return bulk.loc[labels].to_numpy() * rng.gamma(5.0, size=(n, p)), bulk, labels


def test_equals_f1_of_scikit_learn():
    imputed, bulk, labels = example()
    result = dice(imputed, bulk, labels)
    for i, kind in enumerate(labels):
        truth = bulk.loc[kind].to_numpy() > np.median(bulk.loc[kind])
        called = imputed[i] >= np.sort(imputed[i])[-truth.sum()]
        assert result.per_cell[i] == pytest.approx(f1_score(truth, called))
    assert result.score == pytest.approx(result.per_cell.mean())
    for kind in "ABC":
        assert result.by_type[kind] == pytest.approx(result.per_cell[labels == kind].mean())


@pytest.mark.parametrize("rule", ["mean", "row_column_mean", 1.5])
def test_other_rules_equal_f1(rule):
    imputed, bulk, labels = example()
    result = dice(imputed, bulk, labels, binarize=rule, bulk_binarize=0.7)
    called = {
        "mean": imputed > imputed.mean(axis=1, keepdims=True),
        "row_column_mean": (imputed > imputed.mean(axis=1, keepdims=True)) & (imputed > imputed.mean(axis=0)),
        1.5: imputed > 1.5,
    }[rule]
    truth = bulk.to_numpy() > np.quantile(bulk.to_numpy(), 0.7, axis=1, keepdims=True)
    expected = [f1_score(truth["ABC".index(kind)], called[i]) for i, kind in enumerate(labels)]
    np.testing.assert_allclose(result.per_cell, expected)


def test_the_bulk_itself_scores_one():
    _, bulk, labels = example()
    assert dice(bulk.loc[labels].to_numpy(), bulk, labels).score == 1.0
    assert dice_specific(bulk.loc[labels].to_numpy(), bulk, labels).score == 1.0


def test_chance_of_medians_is_one_half_and_is_met_by_noise():
    rng = np.random.default_rng(0)
    bulk = pd.DataFrame(rng.gamma(1.0, size=(2, 2000)), index=["A", "B"])
    result = dice(rng.random((100, 2000)), bulk, np.repeat(["A", "B"], 50))
    assert result.chance == 0.5
    assert result.score == pytest.approx(0.5, abs=0.01)


def test_chance_with_unequal_shares():
    rng = np.random.default_rng(1)
    bulk = {"A": rng.permutation(4000)}
    raw = (rng.random((50, 4000)) < 0.1).astype(float)
    result = dice(raw, bulk, ["A"] * 50, binarize=0)
    assert result.chance == pytest.approx(2 * 0.1 * 0.5 / 0.6, abs=0.005)
    assert result.score == pytest.approx(result.chance, abs=0.01)


def test_zeros_of_raw_data_stay_closed():
    raw = np.array([[1, 0, 0, 0, 1, 0], [2, 2, 2, 0, 0, 0]])
    bulk = {"A": [6, 5, 4, 3, 2, 1]}
    result = dice(raw, bulk, ["A", "A"])  # three open in bulk, two or three in the cells
    assert result.per_cell.tolist() == [2 * 1 / (2 + 3), 1.0]
    np.testing.assert_array_equal(result.per_cell, dice(raw, bulk, ["A", "A"], binarize=0).per_cell)


def test_quantile_can_call_every_region():
    assert dice([[3.0, 1.0, 2.0]], {"A": [1, 1, 1]}, ["A"], bulk_binarize="positive").score == 1.0


@pytest.mark.parametrize("form", [csr_matrix, csc_array])
@pytest.mark.parametrize("rule", ["quantile", "mean", "row_column_mean", 0])
def test_sparse_and_dense_agree(form, rule):
    imputed, bulk, labels = example()
    imputed[imputed < np.median(imputed)] = 0
    dense = dice(imputed, bulk, labels, binarize=rule)
    np.testing.assert_allclose(dice(form(imputed), bulk, labels, binarize=rule).per_cell, dense.per_cell)


def test_chunks_do_not_matter(monkeypatch):
    imputed, bulk, labels = example()
    whole = dice(imputed, bulk, labels).per_cell
    # by name: the function dice hides its module
    monkeypatch.setattr(importlib.import_module("epivi.metrics.dice"), "_CHUNK_VALUES", 100)
    np.testing.assert_array_equal(dice(imputed, bulk, labels).per_cell, whole)


def test_monotone_transform_changes_nothing_by_quantile():
    imputed, bulk, labels = example()
    np.testing.assert_array_equal(
        dice(imputed, bulk, labels).per_cell, dice(np.log(imputed) - 50, bulk, labels).per_cell
    )


def test_background_is_left_out_by_default():
    bulk = {"A": [4, 3, 0, 0], "B": [3, 4, 0, 0]}
    imputed = [[0.9, 0.1, 0.95, 0.2]]
    assert dice(imputed, bulk, ["A"]).n_regions == 2  # B is not among the cells
    assert dice(imputed, bulk, ["A"]).score == 1.0
    everything = dice(imputed, bulk, ["A"], regions="all")
    assert (everything.n_regions, everything.score) == (4, 0.5)
    for regions in ([True, True, False, False], [0, 1], "foreground"):
        assert dice(imputed, bulk, ["A"], regions=regions).score == 1.0


def test_specific_looks_only_where_types_differ_and_weights_types_equally():
    bulk = {"A": [9, 8, 2, 1, 9, 1], "B": [1, 2, 8, 9, 9, 1]}
    labels = ["A", "A", "A", "B"]
    imputed = np.array([bulk["A"]] * 3 + [bulk["A"]], dtype=float)  # the cell of B looks like A
    result = dice_specific(imputed, bulk, labels)
    assert result.n_regions == 4
    assert result.by_type.to_dict() == {"A": 1.0, "B": 0.0}
    assert (result.score, result.chance) == (0.5, 0.5)
    assert dice(imputed, bulk, labels).score > 0.75
    np.testing.assert_array_equal(dice(imputed, bulk, labels, specific=True).per_cell, result.per_cell)


def test_undefined_cells_are_counted_and_left_out():
    bulk = {"A": [1.0, 0.0], "B": [0.0, 0.0]}
    result = dice([[5, 0], [0, 0]], bulk, ["A", "B"], bulk_binarize="positive", binarize=0, regions="all")
    assert result.per_cell[0] == 1.0
    assert np.isnan(result.per_cell[1])
    assert (result.score, result.n_undefined) == (1.0, 1)


def test_to_dict_is_plain():
    imputed, bulk, labels = example()
    entry = dice(imputed, bulk, labels).to_dict()
    assert json.loads(json.dumps(entry)) == entry
    assert (entry["n"], entry["binarize"], entry["bulk_binarize"]) == (40, "quantile", "median")


def test_input_is_left_alone():
    imputed, bulk, labels = example()
    copies = imputed.copy(), bulk.copy()
    dice(imputed, bulk, labels)
    np.testing.assert_array_equal(imputed, copies[0])
    pd.testing.assert_frame_equal(bulk, copies[1])


def test_depth_correlation_is_spearman_over_defined_cells():
    rng = np.random.default_rng(0)
    score, depth = rng.random(50), rng.lognormal(8, 1, size=50)
    expected = pd.Series(score[:40]).rank().corr(pd.Series(depth[:40]).rank())
    score[40:] = np.nan
    assert dice_depth_correlation(score, depth) == pytest.approx(expected)


BULK = {"A": [3, 2, 1], "B": [1, 2, 3]}
CELLS = np.array([[0.9, 0.5, 0.1], [0.1, 0.5, 0.9]])
HOLED = np.array([[0.9, 0.5, 0.1], [0.1, np.nan, 0.9]])


@pytest.mark.parametrize(
    ("error", "call", "message"),
    [
        (DataError, lambda: dice(CELLS[0], BULK, ["A", "B"]), r"imputed has shape \(3,\), expected \(cells, regions\)"),
        (DataError, lambda: dice(HOLED, BULK, ["A", "B"]), "imputed holds 1 NaN and 0 infinite values, .* row 1"),
        (DataError, lambda: dice(csr_matrix(HOLED), BULK, ["A", "B"]), "imputed holds 1 NaN or infinite .* row 1"),
        (DataError, lambda: dice(CELLS, BULK, ["A"]), "labels has 1 entries, expected one entry for each of the 2"),
        (DataError, lambda: dice(CELLS, BULK, ["A", None]), "labels has 1 missing entries"),
        (DataError, lambda: dice(CELLS, BULK, ["A", "C"]), r"1 label\(s\) have no bulk profile, the first is 'C'"),
        (DataError, lambda: dice(CELLS, {"A": [1, 2]}, ["A", "A"]), r"profile of 'A' has shape \(2,\), .* 3 regions"),
        (DataError, lambda: dice(CELLS, [[1, 2, 3]], ["A", "A"]), "bulk is a list, expected a DataFrame"),
        (DataError, lambda: dice(CELLS, {"A": [1, 2, np.inf]}, ["A", "A"]), "bulk holds 0 NaN and 1 infinite"),
        (DataError, lambda: dice(CELLS, {"A": [0, 0, 0]}, ["A", "A"]), "No region is left to compare"),
        (DataError, lambda: dice(CELLS, BULK, ["A", "B"], regions=[True]), r"mask regions has shape \(1,\)"),
        (DataError, lambda: dice(CELLS, BULK, ["A", "B"], regions=[0, 3]), "index 0 to 3, valid are 0 to 2"),
        (DataError, lambda: dice(CELLS, BULK, ["A", "A"], specific=True), "No bulk call differs between the 1 types"),
        (
            DataError,
            lambda: dice([[0, 0]], {"A": [1, 1]}, ["A"], binarize=0),
            "None of 1 cells has a coefficient: nothing is called in 2 regions",
        ),
        (ConfigError, lambda: dice(CELLS, BULK, ["A", "B"], regions="some"), "Valid are: 'all', 'foreground'"),
        (ConfigError, lambda: dice(CELLS, BULK, ["A", "B"], regions=[0.5]), "regions has dtype float64"),
        (ConfigError, lambda: dice(CELLS, BULK, ["A", "B"], binarize="quantil"), "Did you mean 'quantile'"),
        (ConfigError, lambda: dice(CELLS, BULK, ["A", "B"], binarize=np.nan), "binarize is nan, expected a finite"),
        (ConfigError, lambda: dice(CELLS, BULK, ["A", "B"], bulk_binarize="med"), "bulk_binarize is 'med'"),
        (ConfigError, lambda: dice(CELLS, BULK, ["A", "B"], bulk_binarize=1.0), r"expected a quantile in \(0, 1\)"),
        (DataError, lambda: dice_depth_correlation([1, 2], [1, 2, 3]), r"per_cell has shape \(2,\) and depth \(3,\)"),
        (DataError, lambda: dice_depth_correlation([1, 2, 3], [1, 2, np.nan]), "depth holds 1 NaN"),
        (DataError, lambda: dice_depth_correlation([1, 1, 1], [1, 2, 3]), "3 cells with 1 coefficients and 3 depths"),
    ],
)
def test_bad_input_is_refused(error, call, message):
    with pytest.raises(error, match=message):
        call()
