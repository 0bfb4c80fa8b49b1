"""Scores of predicted expression against scipy, scikit-learn and by hand."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csc_matrix, csr_array, csr_matrix
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import balanced_accuracy_score, log_loss, roc_auc_score

from epivi._errors import DataError
from epivi.metrics import expression, expression_scores, open_gene_scores


def example(n=60, g=12, seed=0):
    rng = np.random.default_rng(seed)
    level = rng.gamma(1.0, size=(n, g))
    return rng.poisson(level), level + 0.3 * rng.normal(size=(n, g))


def test_genes_and_cells_equal_scipy():
    truth, predicted = example()
    scores = expression_scores(truth, predicted, per_cell=True)
    for table, x, y in ((scores.genes, truth.T, predicted.T), (scores.cells, truth, predicted)):
        np.testing.assert_allclose(table["pearson"], [pearsonr(a, b)[0] for a, b in zip(x, y, strict=True)])
        np.testing.assert_allclose(table["spearman"], [spearmanr(a, b)[0] for a, b in zip(x, y, strict=True)])
        np.testing.assert_allclose(table["mse"], ((x - y) ** 2).mean(axis=1))
        np.testing.assert_array_equal(table["n_expressed"], (x > 0).sum(axis=1))
    assert scores.summary["pearson"] == pytest.approx(scores.genes["pearson"].mean())
    assert scores.summary["spearman_within_cell"] == pytest.approx(scores.cells["spearman"].mean())
    assert scores.summary["mse"] == pytest.approx(((truth - predicted) ** 2).mean())
    assert (scores.summary["n_cells"], scores.summary["n_genes"], scores.summary["n_undefined"]) == (60, 12, 0)


@pytest.mark.parametrize("form", [csr_matrix, csc_matrix, csr_array])
def test_sparse_and_dense_agree_in_any_chunks(form, monkeypatch):
    truth, predicted = example()
    predicted = np.where(predicted > 1, predicted, 0.0)
    whole = expression_scores(truth, predicted, per_cell=True)
    monkeypatch.setattr(expression, "_CHUNK_VALUES", 150)
    chunked = expression_scores(form(truth), form(predicted.astype(np.float64)), per_cell=True)
    pd.testing.assert_frame_equal(whole.genes, chunked.genes)
    pd.testing.assert_frame_equal(whole.cells, chunked.cells)
    assert open_gene_scores(form(truth), form(predicted / 9)) == open_gene_scores(truth, predicted / 9)


def test_the_order_of_cells_changes_nothing():
    x, y = example()
    order = np.random.default_rng(1).permutation(len(x))
    first, second = expression_scores(x, y), expression_scores(x[order], y[order])
    for key in ("pearson", "spearman", "mse"):
        assert float(second.summary[key]) == pytest.approx(float(first.summary[key]))
    p = 1 / (1 + np.exp(-y))
    assert open_gene_scores(x[order] > 0, p[order])["auroc"] == pytest.approx(open_gene_scores(x > 0, p)["auroc"])


def test_random_predictions_score_as_chance():
    rng = np.random.default_rng(0)
    x, y = rng.poisson(1.0, size=(2000, 20)), rng.random((2000, 20))
    summary = expression_scores(x, y).summary
    assert abs(float(summary["pearson"])) < 0.02
    assert abs(float(summary["spearman"])) < 0.02
    assert open_gene_scores(x > 0, y)["auroc"] == pytest.approx(0.5, abs=0.02)


def test_constant_genes_have_no_correlation_and_are_counted():
    truth, predicted = example()
    truth, predicted = truth.astype(float), predicted.copy()
    truth[:, 0] = 0.0
    predicted[:, 1] = 0.1
    truth[:, 2] = predicted[:, 2] = 1 / 3
    scores = expression_scores(truth, predicted)
    assert scores.genes["pearson"].isna().tolist() == [True] * 3 + [False] * 9
    assert scores.genes["spearman"].isna().tolist() == [True] * 3 + [False] * 9
    assert scores.summary["n_undefined"] == 3
    assert scores.summary["n_constant_prediction"] == 1
    assert scores.summary["pearson"] == pytest.approx(scores.genes["pearson"][3:].mean())
    assert scores.cells is None
    nothing = expression_scores(np.zeros((3, 2)), np.zeros((3, 2))).summary
    assert np.isnan(nothing["pearson"])
    assert nothing["mse"] == 0.0


@given(st.integers(0, 10_000), st.floats(0.01, 1e6), st.floats(-1e6, 1e6))
@settings(max_examples=25, deadline=None)
def test_correlations_ignore_the_scale_of_the_prediction(seed, scale, shift):
    truth, predicted = example(30, 4, seed)
    truth[0] += 1  # no gene is constant
    expected, found = (
        expression_scores(truth, predicted).genes,
        expression_scores(truth, shift + scale * predicted).genes,
    )
    np.testing.assert_allclose(found["pearson"], expected["pearson"], atol=1e-6)
    exponential = expression_scores(truth, np.exp(predicted)).genes
    np.testing.assert_allclose(exponential["spearman"], expected["spearman"])


def test_gene_means_do_well_within_cells_and_have_no_correlation_within_genes():
    rng = np.random.default_rng(0)
    mean = 1 + rng.gamma(1.0, 5.0, size=50)
    truth = rng.poisson(mean, size=(40, 50))
    summary = expression_scores(truth, np.tile(mean, (40, 1)), per_cell=True).summary
    assert summary["pearson_within_cell"] > 0.9
    assert summary["n_undefined"] == summary["n_constant_prediction"] == 50


def test_names_of_genes():
    truth, predicted = example(20, 2)
    names = ["CD4", "ACTB"]
    assert expression_scores(truth, predicted, genes=names).genes.index.tolist() == names
    assert expression_scores(pd.DataFrame(truth, columns=names), predicted).genes.index.tolist() == names


def test_expressed_genes_equal_sklearn():
    rng = np.random.default_rng(0)
    p = rng.random((25, 40))
    y = rng.random((25, 40)) < 0.3 * p
    y[0], y[:, 3] = True, False
    y[0, 3] = True
    y[1] = False
    scores = open_gene_scores(y, p)
    both = [i for i in range(25) if 0 < y[i].sum() < 40]
    assert scores["n_undefined"] == 25 - len(both) == 2
    assert scores["auroc"] == pytest.approx(np.mean([roc_auc_score(y[i], p[i]) for i in both]))
    accuracy = [balanced_accuracy_score(y[i], p[i] > 0.5) for i in both]
    assert scores["balanced_accuracy"] == pytest.approx(np.mean(accuracy))
    losses = [log_loss(y[i], p[i], sample_weight=0.5 / np.where(y[i], y[i].sum(), (~y[i]).sum())) for i in both]
    assert scores["balanced_log_loss"] == pytest.approx(np.mean(losses))
    genes = [j for j in range(40) if 0 < y[:, j].sum() < 25]
    assert scores["n_undefined_genes"] == 40 - len(genes)
    assert scores["auroc_within_gene"] == pytest.approx(np.mean([roc_auc_score(y[:, j], p[:, j]) for j in genes]))


def test_frequency_of_genes_is_a_strong_baseline_within_cells_and_chance_within_genes():
    rng = np.random.default_rng(0)
    frequency = rng.beta(0.5, 2.0, size=300)
    counts = rng.random((200, 300)) < frequency
    scores = open_gene_scores(counts, frequency)
    assert scores["auroc"] > 0.8
    assert scores["auroc_within_gene"] == 0.5
    assert scores == open_gene_scores(counts, np.tile(frequency, (200, 1)))
    chance = open_gene_scores(counts, np.full(300, 0.5))
    assert (chance["auroc"], chance["balanced_accuracy"]) == (0.5, 0.5)
    assert chance["balanced_log_loss"] == pytest.approx(np.log(2))
    assert abs(open_gene_scores(counts, rng.random((200, 300)))["auroc"] - 0.5) < 0.02


def test_nothing_defined_is_nan():
    scores = open_gene_scores(np.ones((2, 3)), np.full((2, 3), 0.2))
    assert all(np.isnan(scores[name]) for name in ("auroc", "balanced_accuracy", "auroc_within_gene"))
    assert (scores["n_undefined"], scores["n_undefined_genes"]) == (2, 3)


def test_inputs_are_not_modified():
    truth, predicted = example()
    sparse = csr_matrix(truth)
    before = sparse.copy(), predicted.copy()
    expression_scores(sparse, predicted, per_cell=True)
    assert (sparse != before[0]).nnz == 0
    np.testing.assert_array_equal(predicted, before[1])


def test_bad_input_is_refused():
    good = np.ones((3, 2))
    with pytest.raises(DataError, match=r"truth_ng has shape \(3, 2\), predicted_ng \(3, 3\)"):
        expression_scores(good, np.ones((3, 3)))
    with pytest.raises(DataError, match=r"truth_ng has 1 cell\(s\)"):
        expression_scores(good[:1], good[:1])
    with pytest.raises(DataError, match="genes has 3 names, expected one for each of the 2 columns"):
        expression_scores(good, good, genes=["a", "b", "c"])
    with pytest.raises(DataError, match=r"predicted_ng has shape \(3,\)"):
        expression_scores(good, np.ones(3))
    with pytest.raises(DataError, match="truth_ng holds values of type"):
        expression_scores([["a", "b"], ["c", "d"]], good)
    with pytest.raises(DataError, match="predicted_ng holds 1 NaN and 0 infinite values, the first in row 1"):
        expression_scores(good, np.array([[1, 1], [np.nan, 1], [1, 1]]))
    with pytest.raises(DataError, match="truth_ng holds 1 NaN or infinite values, the first in row 2"):
        expression_scores(csr_matrix([[1, 0], [0, 0], [0, np.inf]]), good)
    with pytest.raises(DataError, match=r"is_expressed has shape \(3, 2\), probability \(2, 2\)"):
        open_gene_scores(good, good[:2])
    with pytest.raises(DataError, match="probability runs from -1 to 2"):
        open_gene_scores(good, [-1.0, 2.0])
