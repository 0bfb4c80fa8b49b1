from __future__ import annotations

import logging

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import brentq
from scipy.special import log_softmax, softmax

from epivi._errors import ConfigError
from epivi.models.epifoundation.outputs import labels
from epivi.models.epifoundation.outputs.labels import fit_temperature


def test_probabilities_are_a_softmax_of_the_logits_over_the_temperature(annotated):
    rows = np.arange(60)
    logits = annotated._logits(annotated.adata, rows, None)
    temperature = float(annotated.module.temperature)
    table = annotated.predict_labels(soft=True)
    expected = softmax(logits / temperature, axis=1)
    np.testing.assert_allclose(table[annotated.classes], expected, rtol=1e-9)
    np.testing.assert_allclose(table["entropy"], -(expected * np.log(expected)).sum(1), rtol=1e-9)
    assert list(table.columns) == ["type_0", "type_1", "type_2", "entropy"]
    assert list(table.index) == list(annotated.adata.obs_names)


def test_labels_are_the_most_likely_and_unassigned_below_the_threshold(annotated):
    table = annotated.predict_labels(soft=True)[annotated.classes]
    labels = annotated.predict_labels()
    assert isinstance(labels.dtype, pd.CategoricalDtype)
    assert labels.astype(str).tolist() == table.idxmax(axis=1).tolist()
    threshold = float(table.max(axis=1).median())
    found = annotated.predict_labels(threshold=threshold).astype(str)
    expected = np.where(table.max(axis=1) < threshold, "unassigned", labels.astype(str))
    assert found.tolist() == expected.tolist()
    assert (found == "unassigned").sum() == 30
    assert (annotated.predict_labels(threshold=1.0) == "unassigned").all()
    assert annotated.predict_labels(threshold=0.0).astype(str).tolist() == labels.astype(str).tolist()


def test_the_temperature_is_that_of_the_validation_cells(annotated, simulated):
    rows = np.asarray(annotated.validation_indices)
    logits = annotated._logits(annotated.adata, rows, None)
    truth = simulated.obs["cell_type"].cat.codes.to_numpy()[rows]
    assert float(annotated.module.temperature) == pytest.approx(fit_temperature(logits, truth), rel=1e-6)
    assert float(annotated.module.temperature) != 1.0


def test_a_temperature_leaves_the_order_of_classes(annotated, copy_of):
    labels, table = annotated.predict_labels(), annotated.predict_labels(soft=True)
    hotter = copy_of(annotated)
    hotter.module.temperature.fill_(10 * float(annotated.module.temperature))
    pd.testing.assert_series_equal(hotter.predict_labels(), labels)
    assert (hotter.predict_labels(soft=True)["entropy"] > table["entropy"]).all()


@pytest.mark.parametrize("share", [0.6, 0.75, 0.95, 1.0])
def test_the_temperature_of_two_classes_has_a_closed_form(share):
    # one logit, right with this share of n cells: sigmoid(a / T) is the mean of targets (n + 1) / (n + 2), 1 / (n + 2)
    n = 200
    logits = np.tile([3.0, 0.0], (n, 1))
    truth = (np.arange(n) >= share * n).astype(int)
    mean = (share * (n + 1) + (1 - share)) / (n + 2)
    assert fit_temperature(logits, truth) == pytest.approx(3.0 / np.log(mean / (1 - mean)), rel=1e-4)


@pytest.mark.parametrize("n", [20, 100, 5000])
@pytest.mark.parametrize("size", [0.1, 1.0, 12.0])
def test_no_certainty_is_claimed_beyond_what_the_cells_can_tell(n, size):
    # all right, with small or with large logits: one more could be wrong
    logits = size * np.eye(4)[np.arange(n) % 4]
    temperature = fit_temperature(logits, np.arange(n) % 4)
    found = softmax(logits / temperature, axis=1).max(1)
    np.testing.assert_allclose(found, (n + 1) / (n + 2), rtol=1e-4 if size > 0.1 else 0.5)


def test_a_threshold_abstains_after_few_labels_too(pretrained, simulated, tune):
    tuned = tune(
        pretrained, "annotation", simulated.copy(), labels_key="cell_type", train_size=0.6, max_epochs=20, lr=3e-3
    )
    assert 0.06 < float(tuned.module.temperature) < 19
    highest = tuned.predict_labels(soft=True)[tuned.classes].max(axis=1)
    assert (tuned.predict_labels(threshold=0.999) == "unassigned").any()
    assert highest.median() < 0.999


def test_the_temperature_is_a_stationary_point_of_the_likelihood():
    rng = np.random.default_rng(0)
    logits, truth = 4 * rng.normal(size=(300, 5)), rng.integers(0, 5, 300)
    truth[:200] = logits[:200].argmax(1)
    target = np.full((300, 5), 1 / (302 * 4))
    target[np.arange(300), truth] = 301 / 302

    def slope(t):
        # derivative of the mean log-likelihood by 1 / T
        return float(((target - softmax(logits / t, axis=1)) * logits).sum(1).mean())

    assert fit_temperature(logits, truth) == pytest.approx(brentq(slope, 0.1, 15), rel=1e-3)


def test_the_temperature_stays_within_bounds():
    logits = np.tile([0.05, 0.0], (50, 1))
    assert fit_temperature(logits, np.zeros(50, dtype=int)) == pytest.approx(np.exp(-3), rel=1e-2)
    assert fit_temperature(logits, np.ones(50, dtype=int)) == pytest.approx(np.exp(3), rel=1e-2)


def test_few_validation_cells_are_not_calibrated_on(pretrained, simulated, tune, caplog):
    with caplog.at_level(logging.WARNING, logger="epivi"):
        tuned = tune(pretrained, "annotation", simulated.copy(), labels_key="cell_type", train_size=0.9)
    assert "6 labelled validation cells are too few to calibrate probabilities (20 are needed)" in caplog.text
    assert float(tuned.module.temperature) == 1.0


@pytest.mark.parametrize("n_labelled", [0, 18])
def test_unlabeled_cells_are_not_calibrated_on(pretrained, simulated, tune, caplog, n_labelled):
    data = simulated.copy()
    column = data.obs["cell_type"].astype(str).to_numpy()
    validation = tune(
        pretrained, "annotation", data, labels_key="cell_type", train_size=0.5, max_epochs=1
    ).validation_indices
    column[np.asarray(validation)[n_labelled:]] = "?"
    data = simulated.copy()
    data.obs["cell_type"] = pd.Categorical(column)
    with caplog.at_level(logging.WARNING, logger="epivi"):
        tune(pretrained, "annotation", data, labels_key="cell_type", unlabeled_category="?", train_size=0.5)
    assert f"{n_labelled} labelled validation cells are too few" in caplog.text


@pytest.mark.parametrize("options", [{}, {"split_key": "batch"}, {"plan_kwargs": {"lr": 1e-3}, "seed": 4}])
def test_with_few_labels_all_cells_train_and_none_stops_the_training(pretrained, simulated, tune, caplog, options):
    data = simulated.copy()
    column = data.obs["cell_type"].astype(str).to_numpy()
    column[data.obs.groupby("cell_type", observed=True).cumcount() >= 4] = "?"
    data.obs["cell_type"] = pd.Categorical(column)
    options = {
        "labels_key": "cell_type",
        "unlabeled_category": "?",
        "early_stopping_patience": 1,
        "max_epochs": 4,
    } | options
    with caplog.at_level(logging.INFO, logger="epivi"):
        tuned = tune(pretrained, "annotation", data, **options)
    assert "labelled validation cells are too few to stop early by (20 are needed)" in caplog.text
    assert (len(tuned.train_indices), len(tuned.validation_indices)) == (60, 0)
    assert len(tuned.history["train_loss"]) == 4
    assert "validation_loss" not in tuned.history
    assert float(tuned.module.temperature) == 1.0


@pytest.mark.parametrize(
    "options",
    [{"train_size": 0.9}, {"validation_size": 0.1}, {"early_stopping": True}, {"plan_kwargs": {"train_size": 0.9}}],
)
def test_a_split_that_was_asked_for_is_made(pretrained, simulated, tune, options):
    tuned = tune(pretrained, "annotation", simulated.copy(), labels_key="cell_type", **options)
    assert len(tuned.validation_indices) == 6


def test_enough_labels_are_split(pretrained, simulated, tune, monkeypatch):
    monkeypatch.setattr(labels, "MIN_CELLS", 6)
    tuned = tune(pretrained, "annotation", simulated.copy(), labels_key="cell_type")
    assert len(tuned.validation_indices) == 6
    monkeypatch.setattr(labels, "MIN_CELLS", 7)
    tuned = tune(pretrained, "annotation", simulated.copy(), labels_key="cell_type")
    assert len(tuned.validation_indices) == 0


def test_a_model_trained_on_all_cells_has_no_temperature(pretrained, simulated, tune):
    tuned = tune(pretrained, "annotation", simulated.copy(), labels_key="cell_type", train_size=1.0)
    assert float(tuned.module.temperature) == 1.0


def test_labels_do_not_depend_on_chunks_order_or_kind_of_data(annotated, simulated):
    table = annotated.predict_labels(soft=True)
    order = np.random.default_rng(0).permutation(60)
    other = annotated.predict_labels(indices=order, batch_size=7, soft=True)
    pd.testing.assert_frame_equal(other, table.iloc[order], rtol=1e-4)
    query = simulated["atac"].copy()
    del query.obs["cell_type"]
    pd.testing.assert_frame_equal(annotated.predict_labels(query, soft=True), table, rtol=1e-4)


def test_the_temperature_is_saved(annotated, simulated, tmp_path):
    annotated.save(tmp_path / "model")
    loaded = type(annotated).load(tmp_path / "model", adata=False)
    pd.testing.assert_frame_equal(
        loaded.predict_labels(simulated.copy(), soft=True), annotated.predict_labels(soft=True)
    )


def test_other_models_predict_no_labels(pretrained, expressive):
    for model, task in ((pretrained, "pretraining"), (expressive, "expression")):
        with pytest.raises(ConfigError, match=rf"A model for {task} predicts no labels: tuned = model.finetune"):
            model.predict_labels()


@pytest.mark.parametrize("threshold", [-0.1, 1.5, np.nan])
def test_thresholds_are_shares(annotated, threshold):
    with pytest.raises(ConfigError, match="threshold"):
        annotated.predict_labels(threshold=threshold)


def test_log_probabilities_stay_finite_for_large_logits(annotated, copy_of):
    cold = copy_of(annotated)
    cold.module.temperature.fill_(1e-4)
    table = cold.predict_labels(soft=True)
    assert np.isfinite(table).all(axis=None)
    logits = annotated._logits(annotated.adata, np.arange(60), None)
    np.testing.assert_allclose(table[annotated.classes], np.exp(log_softmax(logits / 1e-4, axis=1)), atol=1e-3)
