from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest

from epivi._errors import ConfigError
from epivi.models.sailer.config import SailerConfig


def test_defaults_are_those_of_the_specification():
    config = SailerConfig()
    assert config.n_latent == 10
    assert config.dropout_rate == 0.0
    assert config.invariance_weight == 1.0
    assert config.open_weight == "auto"
    assert config.information_bound == "pairwise"
    assert (config.batch_norm_momentum, config.batch_norm_eps) == (0.1, 1e-5)


@pytest.mark.parametrize(
    ("encoder", "expected"), [("dense", (1000, 100)), ("chromosome", (64, 32)), ("linear", (1000, 100))]
)
def test_hidden_units_of_the_papers_unless_given(encoder, expected):
    assert SailerConfig(encoder=encoder).hidden == expected
    assert SailerConfig(encoder=encoder, n_hidden=[7, 5]).hidden == (7, 5)


@pytest.mark.parametrize(
    ("density", "expected"), [(0.2, 4.0), (0.5, 1.0), (0.9, 1.0), (0.01, 30.0), (1 / 31, 30.0), (0.05, 19.0)]
)
def test_the_automatic_weight_is_the_ratio_of_closed_to_open_capped_at_30(density, expected):
    assert SailerConfig().resolve_open_weight(density) == pytest.approx(expected)
    assert SailerConfig(open_weight=7).resolve_open_weight(density) == 7.0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("encoder", "Dense"),
        ("encoder", None),
        ("input_transform", "tf-idf"),
        ("information_bound", "pair"),
        ("information_bound", None),
        ("loss_preset", "paper"),
        ("n_latent", 0),
        ("n_latent", 2.5),
        ("n_latent", True),
        ("dropout_rate", 1.0),
        ("dropout_rate", -0.1),
        ("input_dropout_rate", 1.0),
        ("invariance_weight", -1.0),
        ("invariance_weight", float("nan")),
        ("batch_norm_momentum", 0.0),
        ("batch_norm_eps", 0.0),
        ("use_covariates", 1),
        ("likelihood", "gaussian"),
        ("kernels", "fast"),
        ("open_weight", "Auto"),
        ("open_weight", 0.0),
        ("open_weight", float("inf")),
        ("n_hidden", 100),
        ("n_hidden", (100,)),
        ("n_hidden", (100, 0)),
        ("n_hidden", (100, 1.5)),
    ],
)
def test_a_value_that_cannot_be_used_is_named(name, value):
    with pytest.raises(ConfigError, match=name):
        SailerConfig(**{name: value})


def test_the_configuration_is_frozen_and_rebuilds_from_its_summary():
    config = SailerConfig(n_latent=3, n_hidden=(5, 4), open_weight=2.0)
    assert SailerConfig(**config.summary()) == config
    with pytest.raises(FrozenInstanceError):
        config.n_latent = 4
