from __future__ import annotations

import numpy as np
import pytest

import epivi
from epivi.models.base_training import history

NO_CYCLE = {"n_epochs_kl_cycle": 0, "n_epochs_warmup_reconstruction": 0}
METRICS = ["elbo", "information", "kl_local", "reconstruction_loss"]


@pytest.mark.parametrize("encoder", ["chromosome", "dense", "linear"])
def test_one_seed_gives_bitwise_the_same_weights(make, simulated, fit, same_weights, encoder):
    first = fit(make(encoder=encoder, dropout_rate=0.1))
    second = fit(make(simulated.copy(), encoder=encoder, dropout_rate=0.1))
    assert same_weights(first, second)
    assert np.array_equal(first.history["train_loss"], second.history["train_loss"])
    assert not same_weights(first, fit(make(simulated.copy(), encoder=encoder, dropout_rate=0.1), seed=5))


def test_the_number_of_workers_changes_nothing(make, simulated, fit, same_weights):
    assert same_weights(fit(make()), fit(make(simulated.copy()), num_workers=1))


def test_global_generators_are_left_alone(make, fit, global_state):
    before = global_state()
    model = make(dropout_rate=0.1)
    assert global_state() == before
    fit(model)
    assert global_state() == before
    model.get_latent_representation()
    model.get_normalized_accessibility(use_z_mean=False)
    model.get_elbo()
    model.differential_accessibility(groupby="cell_type", n_samples=10)
    model.confounder_report()
    assert global_state() == before


def test_results_do_not_depend_on_the_global_generators(make, simulated, fit, same_weights):
    import torch

    first = fit(make(dropout_rate=0.1))
    torch.manual_seed(1234)
    np.random.seed(1234)  # noqa: NPY002
    assert same_weights(first, fit(make(simulated.copy(), dropout_rate=0.1)))


def test_history_has_one_table_a_metric(make, fit):
    model = fit(make(), 3)
    expected = {f"{name}_{mode}" for name in METRICS for mode in ("train", "validation")}
    assert set(model.history) == expected | {"train_loss", "validation_loss", "kl_weight"}
    for key, table in model.history.items():
        assert table.columns.tolist() == [key]
        assert table.index.tolist() == [0, 1, 2]
        assert table.index.name == "epoch"
    loss, information = model.history["elbo_train"], model.history["information_train"]
    parts = model.history["reconstruction_loss_train"].to_numpy() + model.history["kl_local_train"].to_numpy()
    np.testing.assert_allclose(loss, parts, rtol=1e-6)
    assert (information.to_numpy() > 0).all()


def test_the_validation_loss_is_that_of_equation_2_14_at_full_weight(make, fit):
    model = fit(make(invariance_weight=3.0), 2)
    h = {key: table.to_numpy() for key, table in model.history.items()}
    expected = 4 * h["reconstruction_loss_validation"] + h["kl_local_validation"] + 3 * h["information_validation"]
    np.testing.assert_allclose(h["validation_loss"], expected, rtol=1e-5)


def test_history_leaves_out_epochs_without_a_value():
    tables = history([{"epoch": 0.0, "a": 1.0}, {"epoch": 1.0, "a": 2.0, "b": 3.0}])
    assert tables["a"].to_dict() == {"a": {0: 1.0, 1: 2.0}}
    assert tables["b"].to_dict() == {"b": {1: 3.0}}
    assert history([]) == {}


def test_the_warm_up_has_no_kl_weight_and_the_last_epoch_a_full_one(make, fit):
    model = fit(make(), 8, plan_kwargs={"n_epochs_warmup_reconstruction": 3, "n_epochs_kl_cycle": 5})
    weights = model.history["kl_weight"].to_numpy().ravel()
    assert (weights[:3] == 0).all()
    assert weights[-1] == 1.0
    assert (np.diff(weights) >= 0).all()


def test_training_lowers_the_loss_and_ends_in_evaluation_mode(make, fit):
    model = fit(make(), 8, plan_kwargs=NO_CYCLE | {"lr": 1e-2})
    for key in ("train_loss", "reconstruction_loss_validation"):
        values = model.history[key].to_numpy().ravel()
        assert values[-1] < 0.98 * values[0]
    assert not model.module.training
    assert model.is_trained_


def test_splits_are_a_partition_that_depends_on_the_seed(make, fit):
    model = fit(make(), 1, train_size=0.6, validation_size=0.3, plan_kwargs=NO_CYCLE)
    parts = [model.train_indices, model.validation_indices, model.test_indices]
    assert [part.size for part in parts] == [84, 42, 14]
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(140))
    first = model.train_indices
    assert not np.array_equal(first, fit(model, 1, train_size=0.6, seed=7, plan_kwargs=NO_CYCLE).train_indices)


def test_all_cells_can_be_trained_on(make, fit):
    model = fit(make(), 2, train_size=1.0)
    assert model.train_indices.size == 140
    assert model.validation_indices.size == 0
    assert not any("validation" in key for key in model.history)


def test_early_stopping_stops_and_restores_the_best_weights(make, simulated, fit, same_weights):
    options = {"lr": 0.05, "plan_kwargs": NO_CYCLE, "train_size": 0.5}
    model = fit(make(), 200, early_stopping_patience=3, **options)
    values = model.history["reconstruction_loss_validation"].to_numpy().ravel()
    best = int(values.argmin())
    assert len(values) == best + 1 + 3
    until_best = fit(make(simulated.copy()), best + 1, early_stopping=False, **options)
    assert same_weights(model, until_best)


def test_without_early_stopping_the_last_weights_stay(make, simulated, fit, same_weights):
    options = {"lr": 0.3, "plan_kwargs": NO_CYCLE, "train_size": 0.5, "early_stopping": False}
    model = fit(make(), 6, **options)
    values = model.history["reconstruction_loss_validation"].to_numpy().ravel()
    assert len(values) == 6
    assert values.argmin() < 5
    best = fit(make(simulated.copy()), int(values.argmin()) + 1, **options)
    assert not same_weights(model, best)


def test_cells_of_the_validation_set_train_nothing(make, simulated, fit, same_weights):
    first = fit(make(), train_size=0.7, early_stopping=False)
    changed = simulated.copy()
    dense = changed.X.toarray()
    rows = first.validation_indices
    dense[rows] = dense[rows][:, ::-1]
    changed.X = type(changed.X)(dense)
    second = make(changed, open_weight=float(first.module.open_weight))
    # all that is taken from the whole data: depth moments and frequencies
    second.module.load_state_dict(make(simulated.copy()).module.state_dict())
    fit(second, train_size=0.7, early_stopping=False)
    assert same_weights(first, second)


def test_the_history_of_sailerx_has_the_alignment(mdata, fit):
    epivi.SAILERX.setup_mudata(mdata)
    model = fit(epivi.SAILERX(mdata, n_latent=3, n_hidden=(8, 4)), 2)
    assert {"align_loss_train", "align_loss_validation"} <= set(model.history)
    h = {key: table.to_numpy() for key, table in model.history.items()}
    expected = (
        2 * h["reconstruction_loss_validation"]
        + h["kl_local_validation"]
        + h["information_validation"]
        + 0.457 * 320 * h["align_loss_validation"]
    )
    np.testing.assert_allclose(h["validation_loss"], expected, rtol=1e-5)
