from __future__ import annotations

import math

import pytest

from epivi._errors import ConfigError
from epivi.models.epifoundation.config import SIZES, EpiFoundationConfig

# d, N, h, f, q, max_peaks, max_genes, dropout, start of the peaks, linear readout, local readout
GOLDEN = {
    "paper": (512, 6, 8, 1024, 128, 12_000, 8_000, 0.15, "random", False, 0),
    "tutorial": (128, 3, 4, 256, 64, 1_024, 512, 0.0, "lsi", True, 50_000),
    "test": (32, 2, 4, 64, 32, 64, 32, 0.0, "random", False, 0),
}
NAMES = ("width", "n_layers", "n_heads", "n_hidden", "n_gate", "max_peaks", "max_genes", "dropout_rate")
NAMES += ("peak_init", "linear_readout", "local_readout_bp")


@pytest.mark.parametrize("size", GOLDEN)
def test_named_sizes_are_the_published_ones(size):
    config = EpiFoundationConfig.chosen({}, size=size)
    assert tuple(getattr(config, name) for name in NAMES) == GOLDEN[size]


def test_the_default_is_the_tutorial():
    assert EpiFoundationConfig() == EpiFoundationConfig.chosen({}, size="tutorial")
    assert set(SIZES) == set(GOLDEN)


def test_choices_replace_those_of_the_size_and_none_leaves_them():
    config = EpiFoundationConfig.chosen({"n_layers": 5, "width": None, "peak_dim": 16}, size="test")
    assert (config.n_layers, config.width, config.peak_dim) == (5, 32, 16)


@pytest.mark.parametrize(
    ("choice", "match"),
    [
        ({"task": "anotation"}, "'annotation'"),
        ({"width": 0}, "width=0"),
        ({"n_layers": 1.5}, "n_layers=1.5"),
        ({"n_heads": 3}, "n_heads=3 does not divide width=32"),
        ({"n_hidden": 0}, "n_hidden=0"),
        ({"n_gate": -1}, "n_gate=-1"),
        ({"max_peaks": 0}, "max_peaks=0"),
        ({"max_genes": 1}, "max_genes=1"),
        ({"dropout_rate": 1.0}, "dropout_rate=1.0"),
        ({"peak_dim": 0}, "peak_dim=0"),
        ({"positions": "chromosomes"}, "'chromosome'"),
        ({"peak_init": "pca"}, "peak_init"),
        ({"masked_peak_weight": -0.5}, "masked_peak_weight=-0.5"),
        ({"masked_peak_rate": 1.0}, "masked_peak_rate=1.0"),
        ({"batch_adversary": math.nan}, "batch_adversary=nan"),
        ({"count_levels": "yes"}, "count_levels"),
        ({"checkpoint": 2}, "checkpoint"),
        ({"linear_readout": "yes"}, "linear_readout"),
        ({"local_readout_bp": -1}, "local_readout_bp=-1"),
        ({"local_readout_bp": 1e4}, "local_readout_bp=10000.0"),
        ({"local_readout_bp": True}, "local_readout_bp=True"),
        ({"peak_identity": False, "positions": "genome", "local_readout_bp": 9}, "local_readout_bp=9 are about single"),
        ({"expression_target": "levels"}, "'level'"),
        ({"n_levels": 1}, "n_levels=1"),
        ({"peak_identity": False}, "take positions='genome'"),
        ({"peak_identity": False, "positions": "genome", "masked_peak_weight": 1.0}, "masked_peak_weight=1, "),
        (
            {"peak_identity": False, "positions": "genome", "peak_init": "lsi"},
            "peak_init='lsi' and local_readout_bp=0 are about",
        ),
        ({"n_layer": 2}, "no choice 'n_layer'. Did you mean 'n_layers'"),
    ],
)
def test_choices_that_are_not_valid_are_refused(choice, match):
    with pytest.raises(ConfigError, match=match):
        EpiFoundationConfig.chosen(choice, size="test")


def test_without_identity_there_are_no_rows_to_start():
    config = EpiFoundationConfig.chosen({"peak_identity": False, "positions": "genome"}, size="tutorial")
    assert config.peak_init == "random"
    assert config.local_readout_bp == 0


def test_unknown_sizes_are_refused_with_the_nearest():
    with pytest.raises(ConfigError, match="'tutorial'"):
        EpiFoundationConfig.chosen({}, size="tutorail")


def test_a_summary_gives_the_choices_back():
    config = EpiFoundationConfig.chosen({"positions": "genome", "peak_identity": False, "n_levels": 4}, size="test")
    assert EpiFoundationConfig(**config.summary()) == config


def test_another_task_keeps_the_network():
    config = EpiFoundationConfig.chosen({}, size="test")
    other = config.for_task("expression", expression_target="level")
    assert (other.task, other.expression_target) == ("expression", "level")
    assert other.for_task("pretraining", expression_target="lognorm") == config


@pytest.mark.parametrize(("size", "lr"), [("paper", 1e-4), ("tutorial", 4e-4), ("test", 1.6e-3)])
def test_the_rate_is_the_published_one_at_the_published_width(size, lr):
    defaults = EpiFoundationConfig.chosen({}, size=size).training_defaults(1000)
    assert defaults["lr"] == pytest.approx(lr, rel=1e-12)
    assert defaults["lr_warmup_share"] == 0.05
    assert defaults["lr_schedule"] == "cosine"
    assert defaults["gradient_clip_norm"] == 1.0
    assert defaults["early_stopping_monitor"] == "validation_loss"
