from __future__ import annotations

import pytest

from epivi._errors import ConfigError
from epivi.models.sailerx.config import SailerxConfig


def test_defaults_are_those_of_the_specification():
    config = SailerxConfig()
    assert config.n_latent == 50
    assert config.align_weight == 0.457
    assert config.min_reference_per_batch == 32
    assert config.hidden == (64, 32)
    assert config.sampler == "shuffle"
    assert config.fuse_reference is False


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("align_weight", -0.1),
        ("align_weight", "auto"),
        ("align_weight", float("nan")),
        ("min_reference_per_batch", 1),
        ("min_reference_per_batch", 2.5),
        ("sampler", "neighbours"),
        ("fuse_reference", 1),
        ("encoder", "conv"),
        ("n_latent", 0),
    ],
)
def test_a_value_that_cannot_be_used_is_named(name, value):
    with pytest.raises(ConfigError, match=name):
        SailerxConfig(**{name: value})


def test_the_configuration_rebuilds_from_its_summary():
    config = SailerxConfig(align_weight=2.0, sampler="neighbors", n_hidden=(5, 4))
    assert SailerxConfig(**config.summary()) == config
