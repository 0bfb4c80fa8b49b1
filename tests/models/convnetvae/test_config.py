from __future__ import annotations

import pytest

from epivi._errors import ConfigError
from epivi.models.convnetvae.config import ConvNetVaeConfig, FcvaeConfig, TracksConfig

CONFIGS = [ConvNetVaeConfig, FcvaeConfig]
BAD = {
    "n_latent": (0, "n_latent=0"),
    "n_hidden": (2.5, "n_hidden=2.5"),
    "n_layers": (4, "n_layers=4"),
    "dropout_rate": (1.0, "below 1"),
    "modality_dropout_rate": (-0.1, "at least 0"),
    "likelihood": ("poison", "Did you mean 'poisson'"),
    "kl_scale": (-1.0, "at least 0"),
    "batch_norm_momentum": (0.0, "above 0"),
    "batch_norm_eps": (0.0, "above 0"),
}
BAD_CONV = {
    "kernel_size": (0, "kernel_size=0"),
    "stride": (1.5, "stride=1.5"),
    "boundaries": ("gaps", "Did you mean 'gap'"),
    "mask_channels": (2, "mask_channels=2"),
    "n_filters": ((0,), "n_filters=0"),
}


@pytest.mark.parametrize("config", CONFIGS)
def test_the_defaults_are_those_of_the_paper(config):
    found = config()
    assert (found.n_latent, found.n_hidden, found.dropout_rate, found.likelihood) == (30, 128, 0.2, "poisson")
    training = found.training_defaults(100)
    assert (training["lr"], training["batch_size"], training["weight_decay"], training["lr_gamma"]) == (
        1e-3,
        128,
        0.0,
        1.0,
    )
    assert training["max_epochs"] == 300
    assert training["n_epochs_kl_cycle"] == training["n_epochs_warmup_reconstruction"] == 0
    assert ConvNetVaeConfig(n_layers=3).filters == (32, 64, 128)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", BAD)
def test_values_outside_their_range_are_named(config, name):
    value, match = BAD[name]
    with pytest.raises(ConfigError, match=match):
        config(**{name: value})


@pytest.mark.parametrize("name", BAD_CONV)
def test_values_of_the_convolutions_are_checked(name):
    value, match = BAD_CONV[name]
    with pytest.raises(ConfigError, match=match):
        ConvNetVaeConfig(**({"kernel_size": 5, "stride": 1} | {name: value}))


def test_a_kernel_smaller_than_the_stride_would_skip_bins():
    with pytest.raises(ConfigError, match=r"kernel_size \(3\) is smaller than stride \(5\): bins would be skipped"):
        ConvNetVaeConfig(kernel_size=3, stride=5)


@pytest.mark.parametrize("filters", [(4, 4), (), 8, "32"])
def test_filters_are_one_a_layer(filters):
    with pytest.raises(ConfigError, match="n_filters must be 1 numbers, one a layer, as in"):
        ConvNetVaeConfig(n_filters=filters)
    assert ConvNetVaeConfig(n_layers=2, n_filters=[4, 8]).filters == (4, 8)


@pytest.mark.parametrize(
    ("is_missing", "given", "rate", "mask"),
    [
        (False, {}, 0.0, False),
        (True, {}, 0.3, True),
        (True, {"modality_dropout_rate": 0.1}, 0.1, True),
        (True, {"modality_dropout_rate": 0.0}, 0.0, True),
        (False, {"modality_dropout_rate": 0.2}, 0.2, True),
        (False, {"mask_channels": True}, 0.0, True),
        (True, {"modality_dropout_rate": 0.0, "mask_channels": False}, 0.0, False),
    ],
)
def test_missing_modalities_decide_what_is_left_open(is_missing, given, rate, mask):
    config = ConvNetVaeConfig.chosen(
        {"modality_dropout_rate": None, "mask_channels": None} | given, is_missing=is_missing
    )
    assert (config.modality_dropout_rate, config.mask_channels) == (rate, mask)
    if "mask_channels" not in given:
        assert FcvaeConfig.chosen(given, is_missing=is_missing).modality_dropout_rate == rate


@pytest.mark.parametrize(("is_missing", "rate"), [(True, None), (False, 0.2)])
def test_hidden_modalities_need_mask_channels(is_missing, rate):
    with pytest.raises(ConfigError, match="could not tell an absent modality from one without counts"):
        ConvNetVaeConfig.chosen({"mask_channels": False, "modality_dropout_rate": rate}, is_missing=is_missing)


def test_a_summary_gives_the_same_configuration():
    config = ConvNetVaeConfig(n_layers=2, kernel_size=11, stride=3, n_filters=(4, 8))
    assert ConvNetVaeConfig(**config.summary()) == config
    assert config.norm_options == {"dropout_rate": 0.2, "momentum": 0.1, "eps": 1e-5}
    assert TracksConfig.chosen({"n_latent": None}, is_missing=False).n_latent == 30
