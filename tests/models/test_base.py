from __future__ import annotations

import logging

import numpy as np
import pytest
import torch
from scvi import settings

import epivi
from epivi._errors import ConfigError, DataError
from epivi.models import base
from epivi.models.base import check_indices, model_seed, seeded_module
from epivi.train.config import TrainingConfig


@pytest.mark.parametrize(
    ("indices", "expected"),
    [
        (None, [0, 1, 2, 3]),
        ([], []),
        ([3, 0, 3], [3, 0, 3]),
        ([-1, -4], [3, 0]),
        (np.array([False, True, True, False]), [1, 2]),
        (range(1, 3), [1, 2]),
    ],
)
def test_indices_are_rows_of_the_data(indices, expected):
    assert check_indices(indices, 4).tolist() == expected


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([True, False], r"mask in indices has shape \(2,\); the data have 4 cells"),
        ([0.0, 1.0], "must be row numbers or a boolean mask, found float64"),
        ([0, 4], r"holds 4; the data have 4 cells \(0 to 3\)"),
        ([-5], "holds -5"),
    ],
)
def test_wrong_indices_are_named(indices, message):
    with pytest.raises(ConfigError, match=message):
        check_indices(indices, 4)


def test_the_seed_is_the_given_one_else_that_of_scvi_else_zero(monkeypatch):
    assert model_seed(7) == 7
    monkeypatch.setattr(settings, "_seed", None, raising=False)
    assert model_seed(None) == 0
    monkeypatch.setattr(settings, "_seed", 11, raising=False)
    assert model_seed(None) == 11
    with pytest.raises(ConfigError, match="seed"):
        model_seed(-1)


def test_weights_depend_on_the_seed_alone(global_state):
    before = global_state()
    first = seeded_module(1, lambda: torch.nn.Linear(3, 2))
    torch.manual_seed(99)
    second, other = (seeded_module(seed, lambda: torch.nn.Linear(3, 2)) for seed in (1, 2))
    assert torch.equal(first.weight, second.weight)
    assert not torch.equal(first.weight, other.weight)
    torch.set_rng_state(torch.frombuffer(bytearray(before[0]), dtype=torch.uint8))
    seeded_module(1, lambda: torch.nn.Linear(3, 2))
    assert global_state() == before


def test_a_model_without_data_is_refused():
    with pytest.raises(ConfigError, match="SAILER needs data"):
        epivi.SAILER()


def test_a_mudata_is_refused_where_an_anndata_is_needed(mdata):
    with pytest.raises(DataError, match=r"SAILER.setup_anndata|SAILER takes an AnnData|AnnData is needed"):
        epivi.SAILER(mdata)


def test_data_that_were_not_set_up_are_set_up_with_the_defaults_and_it_is_said(adata, caplog):
    with caplog.at_level(logging.WARNING, logger="epivi"):
        model = epivi.SAILER(adata, n_latent=3)
    assert "SAILER.setup_anndata is called with its defaults" in caplog.text
    assert model.summary_stats.n_batch == 1
    assert model.feature_names.tolist() == adata.var_names.tolist()


def test_choices_of_the_user_win_over_those_of_the_model(mdata, make, monkeypatch):
    chosen = []
    monkeypatch.setattr(base, "run_training", lambda model, config, **kwargs: chosen.append(config))
    epivi.SAILERX.setup_mudata(mdata)
    sailerx = epivi.SAILERX(mdata, n_latent=3, seed=4)
    sailerx.train()
    sailerx.train(plan_kwargs={"batch_size": 50, "lr": 0.5, "seed": 9})
    sailerx.train(batch_size=60, lr=0.25, seed=8, plan_kwargs={"batch_size": 50, "lr": 0.5, "weight_decay": 0.0})
    assert [c.batch_size for c in chosen] == [200, 50, 60]
    assert [c.lr for c in chosen] == [1e-3, 0.5, 0.25]
    assert [c.seed for c in chosen] == [4, 9, 8]
    assert chosen[2].weight_decay == 0.0
    make(seed=6).train()
    assert (chosen[3].batch_size, chosen[3].max_epochs, chosen[3].seed) == (128, 400, 6)


def test_an_unknown_training_argument_is_refused_with_the_nearest(make):
    with pytest.raises(ConfigError, match=r"'n_epochs_kl_cycles'.*'n_epochs_kl_cycle'"):
        make().train(plan_kwargs={"n_epochs_kl_cycles": 3})


def test_a_fingerprint_tells_data_choices_and_arguments_apart(make, simulated):
    config = TrainingConfig(max_epochs=3)
    own = make().fingerprint(config)
    assert make(simulated.copy()).fingerprint(config) == own
    assert make(simulated.copy()).fingerprint(TrainingConfig(max_epochs=4)) != own
    assert make(simulated.copy(), open_weight=3.0).fingerprint(config) != own
    changed = simulated.copy()
    changed.X = changed.X[:, np.r_[1, 0, 2 : changed.n_vars]]
    assert make(changed).fingerprint(config)["data"] != own["data"]
    assert make(simulated[:, ::-1].copy()).fingerprint(config)["data"] != own["data"]


def test_an_unknown_batch_size_of_inference_is_refused(make):
    model = make()
    model.is_trained_ = True
    with pytest.raises(ConfigError, match="batch_size"):
        model.get_elbo(batch_size=0)
