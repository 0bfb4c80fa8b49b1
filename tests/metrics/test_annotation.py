"""Scores of predicted cell types against scikit-learn and by hand."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import (
    balanced_accuracy_score,
    f1_score,
    log_loss,
    roc_auc_score,
)

from epivi._errors import ConfigError, DataError
from epivi.metrics import annotation_scores

CLASSES = ["B", "Mono", "NK", "T"]


def example(n=300, k=4, seed=0):
    rng = np.random.default_rng(seed)
    y = rng.integers(k, size=n)
    logits = rng.normal(size=(n, k)) + 1.5 * np.eye(k)[y]
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return np.array(CLASSES)[y], p


def test_equals_sklearn():
    y, p = example()
    y_hat = np.array(CLASSES)[p.argmax(axis=1)]
    scores = annotation_scores(y, p, CLASSES)
    assert scores["accuracy"] == pytest.approx((y == y_hat).mean())
    assert scores["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(y, y_hat))
    for mean in ("macro", "micro", "weighted"):
        assert scores[f"f1_{mean}"] == pytest.approx(f1_score(y, y_hat, average=mean))
    assert scores["roc_auc_macro"] == pytest.approx(roc_auc_score(y, p, multi_class="ovr", labels=CLASSES))
    assert scores["log_loss"] == pytest.approx(log_loss(y, p, labels=CLASSES))
    assert (scores["n"], scores["n_classes"], scores["absent_classes"], scores["share_unassigned"]) == (300, 4, (), 0)


def test_labels_give_what_their_probabilities_give():
    y, p = example()
    labels = annotation_scores(y, np.array(CLASSES)[p.argmax(axis=1)])
    soft = annotation_scores(y, pd.DataFrame(p, columns=CLASSES))
    for name in ("accuracy", "balanced_accuracy", "f1_macro", "f1_micro", "f1_weighted"):
        assert labels[name] == soft[name]
    assert all(np.isnan(labels[name]) for name in ("roc_auc_macro", "log_loss", "ece"))


@given(st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_order_of_cells_and_of_classes_does_not_matter(seed):
    y, p = example(60, seed=seed)
    rng = np.random.default_rng(seed)
    rows, columns = rng.permutation(60), rng.permutation(4)
    permuted = annotation_scores(y[rows], p[rows][:, columns], np.array(CLASSES)[columns])
    expected = annotation_scores(y, p, CLASSES)
    for name in ("accuracy", "f1_macro", "roc_auc_macro", "log_loss", "ece"):
        assert permuted[name] == pytest.approx(expected[name])


def test_random_predictions_score_as_chance():
    rng = np.random.default_rng(0)
    found = annotation_scores(rng.permutation(np.repeat(CLASSES, 500)), rng.dirichlet(np.ones(4), 2000), CLASSES)
    assert found["accuracy"] == pytest.approx(0.25, abs=0.03)
    assert found["f1_macro"] == pytest.approx(0.25, abs=0.03)
    assert found["roc_auc_macro"] == pytest.approx(0.5, abs=0.03)


def test_calibration_error_by_hand():
    # two cells at 0.9 of which one is right, two at 0.6 which are both right
    p = np.array([[0.9, 0.1], [0.9, 0.1], [0.6, 0.4], [0.6, 0.4]])
    assert annotation_scores(["a", "b", "a", "a"], p, ["a", "b"])["ece"] == pytest.approx((2 * 0.4 + 2 * 0.4) / 4)


def test_calibration_error_equals_a_loop_over_bins():
    y, p = example(2000)
    confidence, right = p.max(axis=1), np.array(CLASSES)[p.argmax(axis=1)] == y
    expected = 0.0
    for b in range(15):
        inside = (confidence > b / 15) & (confidence <= (b + 1) / 15)
        if inside.any():
            expected += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    assert annotation_scores(y, p, CLASSES)["ece"] == pytest.approx(expected)


def test_calibrated_probabilities_have_a_small_error():
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(4), size=50_000)
    y = np.array(CLASSES)[(rng.random((len(p), 1)) > p.cumsum(axis=1)).sum(axis=1).clip(0, 3)]
    assert annotation_scores(y, p, CLASSES)["ece"] < 0.01
    flat = annotation_scores(y, np.full_like(p, 0.25), CLASSES)
    assert flat["log_loss"] == pytest.approx(np.log(4))
    assert flat["roc_auc_macro"] == 0.5


def test_classes_absent_from_the_test_set_are_left_out_and_named():
    y, p = example()
    kept = y != "NK"
    scores = annotation_scores(y[kept], p[kept], CLASSES)
    assert scores["absent_classes"] == ("NK",)
    one_against_rest = [roc_auc_score(y[kept] == name, p[kept, i]) for i, name in enumerate(CLASSES) if name != "NK"]
    assert scores["roc_auc_macro"] == pytest.approx(np.mean(one_against_rest))
    only = annotation_scores(["B", "B"], [[0.9, 0.1], [0.8, 0.2]], ["B", "T"])
    assert np.isnan(only["roc_auc_macro"])
    assert only["accuracy"] == 1.0


def test_labels_never_seen_are_reported_and_not_scored():
    y, p = example()
    more = annotation_scores(np.append(y, ["novel", "novel", "odd"]), np.vstack([p, p[:3]]), CLASSES)
    assert more["unseen_labels"] == {"novel": 2, "odd": 1}
    assert (more["n"], more["n_unseen"]) == (300, 3)
    expected = annotation_scores(y, p, CLASSES)
    assert all(more[name] == expected[name] for name in ("accuracy", "f1_macro", "log_loss", "ece", "roc_auc_macro"))
    assert more["share_unassigned_unseen"] == 0.0
    assert np.isnan(expected["share_unassigned_unseen"])


def test_unassigned_cells_are_wrong_and_no_class():
    truth, labels = ["B", "B", "T", "T"], ["B", "?", "T", "T"]
    scores = annotation_scores(truth, labels, unassigned="?")
    assert scores["share_unassigned"] == 0.25
    assert scores["accuracy"] == 0.75
    assert scores["balanced_accuracy"] == 0.75
    assert scores["f1_macro"] == pytest.approx((2 / 3 + 1) / 2)
    assert scores["f1_micro"] == pytest.approx(6 / 7)  # three right, none wrong, one missed
    p = np.array([[0.9, 0.1], [0.6, 0.4], [0.1, 0.9], [0.2, 0.8]])
    soft = annotation_scores(truth, p, ["B", "T"], threshold=0.7)
    assert all(soft[name] == scores[name] for name in ("accuracy", "f1_macro", "f1_micro", "share_unassigned"))
    unknown_truth = annotation_scores([*truth, "?"], [*labels, "T"], unassigned="?")
    assert unknown_truth["unseen_labels"] == {"?": 1}
    assert unknown_truth["accuracy"] == 0.75
    novel = annotation_scores([*truth, "new"], np.vstack([p, [[0.5, 0.5]]]), ["B", "T"], threshold=0.7)
    assert novel["share_unassigned_unseen"] == 1.0
    assert novel["share_unassigned"] == 0.25


def test_numbers_and_categories_are_labels():
    truth = pd.Categorical(["x", "y", "x"])
    assert annotation_scores(truth, pd.Series(["x", "y", "y"]))["accuracy"] == pytest.approx(2 / 3)
    assert annotation_scores([0, 1, 1], np.array([0.0, 1.0, 0.0]))["accuracy"] == pytest.approx(2 / 3)
    p32 = np.float32([[0.7, 0.3], [0.2, 0.8]]) * np.float32(1.0004)
    assert annotation_scores([0, 1], p32, [0, 1])["log_loss"] == pytest.approx(-np.log([0.7, 0.8]).mean(), rel=1e-6)


def test_inputs_are_not_modified():
    y, p = example()
    before = p.copy()
    annotation_scores(y, p, CLASSES, threshold=0.5)
    np.testing.assert_array_equal(p, before)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (([], []), {}, DataError, "y_true has no cell"),
        ((["B"], ["B", "T"]), {}, DataError, "predicted has 2 cells, y_true has 1"),
        ((["B", None], ["B", "T"]), {}, DataError, "y_true has 1 missing entries among 2"),
        (([["B"]], ["B"]), {}, DataError, r"y_true has shape \(1, 1\)"),
        ((["B"], ["B"]), {"threshold": 0.5}, ConfigError, "threshold is for probabilities"),
        ((["B"], [[1.0]], ["B"]), {"unassigned": "?"}, ConfigError, "unassigned is for labels"),
        ((["B"], [[1.0]]), {}, ConfigError, "needs classes"),
        ((["B"], [[0.5, 0.5]], ["B", "B"]), {}, ConfigError, "classes holds 'B' more than once"),
        ((["B"], [[0.5, 0.5]], ["B"]), {}, ConfigError, "classes names 1 classes, but predicted has 2 columns"),
        ((["B"], [["x", "y"]], ["B", "T"]), {}, DataError, "predicted cannot be read as probabilities"),
        ((["B"], [[[1.0]]], ["B"]), {}, DataError, r"predicted has shape \(1, 1, 1\)"),
        ((["B"], [[0.5, np.nan]], ["B", "T"]), {}, DataError, "predicted holds 1 NaN"),
        ((["B"], [[2.0, -1.0]], ["B", "T"]), {}, DataError, "row 0 with minimum -1 and sum 1"),
        ((["B"], [[2.0, 1.0]], ["B", "T"]), {}, DataError, "not logits"),
        ((["B"], [[0.5, 0.5]], ["B", "T"]), {"threshold": 2}, ConfigError, "threshold is 2"),
        ((["B", "T"], ["B", "X"], ["B", "T"]), {}, DataError, r"The predicted label 'X' \(row 1\)"),
        ((["Z"], ["B"], ["B"]), {}, DataError, "None of the 1 true labels"),
    ],
)
def test_bad_input_is_refused(arguments, options, error, message):
    with pytest.raises(error, match=message):
        annotation_scores(*arguments, **options)


def test_columns_and_classes_must_agree():
    frame = pd.DataFrame([[0.5, 0.5]], columns=["B", "T"])
    with pytest.raises(ConfigError, match="the columns of predicted are"):
        annotation_scores(["B"], frame, ["T", "B"])
