from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from epivi._errors import ConfigError
from epivi.train.config import MONITORS, TrainingConfig


def test_defaults_are_those_of_the_specification():
    config = TrainingConfig()
    assert (config.max_epochs, config.batch_size, config.train_size) == (400, 128, 0.9)
    assert (config.optimizer, config.lr, config.weight_decay, config.lr_gamma) == ("Adam", 1e-3, 1e-6, 0.995)
    assert (config.n_epochs_warmup_reconstruction, config.n_epochs_kl_cycle, config.kl_cycle_ratio) == (10, 100, 0.5)
    assert config.early_stopping_monitor == "reconstruction_loss_validation"


def test_later_sources_win_and_none_does_not_count():
    config = TrainingConfig.merged(
        {"seed": 3, "lr": 0.1, "max_epochs": 5},
        None,
        {"lr": 0.2, "max_epochs": None},
        {},
        {"lr": None, "batch_size": 64},
    )
    assert (config.seed, config.lr, config.max_epochs, config.batch_size) == (3, 0.2, 5, 64)
    assert config.weight_decay == TrainingConfig().weight_decay
    assert TrainingConfig.merged() == TrainingConfig()


def test_false_and_zero_count_as_chosen():
    config = TrainingConfig.merged(
        {"early_stopping": True, "weight_decay": 0.1}, {"early_stopping": False, "weight_decay": 0}
    )
    assert config.early_stopping is False
    assert config.weight_decay == 0


@pytest.mark.parametrize(
    ("key", "ending"),
    [("lr_gama", "Did you mean 'lr_gamma'?"), ("max_epoch", "Did you mean 'max_epochs'?"), ("zzzz", "Valid are:")],
)
@pytest.mark.parametrize("value", [1, None])
def test_an_unknown_argument_is_refused_with_the_nearest(key, ending, value):
    with pytest.raises(ConfigError, match=f"Unknown training argument '{key}'") as caught:
        TrainingConfig.merged({"lr": 0.1}, {key: value})
    assert ending in str(caught.value)


@pytest.mark.parametrize(
    ("key", "bad"),
    [
        ("max_epochs", (0, -1, 1.5, "3", True, np.nan)),
        ("batch_size", (1, 0, 2.5, None)),
        ("train_size", (0.0, -0.1, 1.1, np.nan, "0.9")),
        ("validation_size", (-0.1, 1.0, np.inf, "0.1")),
        ("early_stopping", ("yes", 1, None)),
        ("early_stopping_patience", (0, 1.5)),
        ("early_stopping_min_delta", (-1e-9, np.nan)),
        ("lr", (0.0, -1e-3, np.nan, np.inf, "fast")),
        ("weight_decay", (-1e-6, np.nan)),
        ("eps", (0.0, -1.0)),
        ("lr_gamma", (0.0, 1.01, -1)),
        ("lr_schedule", ("linear", None)),
        ("lr_warmup_share", (-0.1, 1.0)),
        ("gradient_clip_norm", (-1.0, float("nan"))),
        ("n_epochs_warmup_reconstruction", (-1, 0.5)),
        ("n_epochs_kl_cycle", (-1, 0.5)),
        ("kl_cycle_ratio", (-0.1, 1.1)),
        ("seed", (-1, 0.5, None)),
        ("optimizer", ("SGD", "adam", None)),
        ("early_stopping_monitor", ("elbo_train", 3)),
    ],
)
def test_values_outside_their_range_are_refused_by_name(key, bad):
    for value in bad:
        with pytest.raises(ConfigError, match=rf"^{key}\b") as caught:
            TrainingConfig(**{key: value})
        assert repr(value) in str(caught.value) or str(value) in str(caught.value)


@pytest.mark.parametrize(
    ("key", "good"),
    [
        ("max_epochs", (1, np.int64(7))),
        ("batch_size", (2,)),
        ("train_size", (1.0, 1, 1e-3)),
        ("validation_size", (None, 0.0, 0.05)),
        ("early_stopping", (True, False, np.True_)),
        ("lr_gamma", (1.0,)),
        ("lr_schedule", ("exponential", "cosine")),
        ("lr_warmup_share", (0.0, 0.5)),
        ("gradient_clip_norm", (0.0, 1.0)),
        ("n_epochs_warmup_reconstruction", (0,)),
        ("n_epochs_kl_cycle", (0,)),
        ("kl_cycle_ratio", (0.0, 1.0)),
        ("optimizer", ("Adam", "AdamW")),
        ("early_stopping_monitor", MONITORS),
    ],
)
def test_values_at_the_ends_of_their_range_are_taken(key, good):
    for value in good:
        assert getattr(TrainingConfig(**{key: value}), key) == value


def test_shares_that_exceed_one_are_refused():
    with pytest.raises(ConfigError, match=r"train_size \(0.9\) \+ validation_size \(0.2\) exceed 1: lower one of them"):
        TrainingConfig(validation_size=0.2)


def test_the_configuration_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainingConfig().lr = 1.0
