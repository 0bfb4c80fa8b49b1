"""Choices of Expresser are refused by name."""

import pytest

from epivi._errors import ConfigError
from epivi.models.expresser.config import SIZES, ExpresserConfig


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ({"width": 30, "n_heads": 4}, "n_heads=4 does not divide width=30"),
        ({"mask_rate": 0.0}, "mask_rate=0.0 is out of range"),
        ({"mask_rate": 0.6}, "mask_rate=0.6 is out of range"),
        ({"dropout_rate": 1.0}, "dropout_rate"),
        ({"decoder": "none"}, "decoder='none' is not valid"),
        ({"binning": "relativ"}, "Did you mean 'relative'"),
        ({"likelihood": "nb"}, "likelihood='nb'"),
        ({"reduction": "max"}, "reduction='max'"),
        ({"baseline": "gene"}, "baseline='gene'"),
        ({"detection": 1}, "detection=1"),
        ({"binning": "residual"}, "take baseline='additive' with it"),
        ({"max_genes": 1}, "max_genes=1"),
        ({"n_bins": 0}, "n_bins=0"),
        ({"n_layer": 3}, "Did you mean 'n_layers'"),
    ],
)
def test_bad_choices_are_refused(choices, words) -> None:
    with pytest.raises(ConfigError, match=words):
        ExpresserConfig.chosen(choices)


def test_unknown_size_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'paper'"):
        ExpresserConfig.chosen({}, size="papers")


def test_sizes_are_those_of_the_specification() -> None:
    paper = ExpresserConfig.chosen({}, size="paper")
    assert (paper.width, paper.n_layers, paper.n_heads, paper.n_bins, paper.max_genes) == (200, 12, 4, 50, 1100)
    assert ExpresserConfig() == ExpresserConfig.chosen({}, size="tutorial")


@pytest.mark.parametrize(("rate", "n_folds"), [(0.15, 7), (0.5, 2), (0.4, 2), (0.1, 10)])
def test_folds_are_of_the_size_that_training_hides(rate, n_folds) -> None:
    assert ExpresserConfig(mask_rate=rate).n_folds == n_folds


def test_smaller_networks_learn_faster_up_to_a_bound() -> None:
    rates = {size: ExpresserConfig.chosen({}, size=size).training_defaults(10)["lr"] for size in SIZES}
    assert rates["paper"] == pytest.approx(1e-4)
    assert rates["paper"] < rates["tutorial"] < rates["test"] == 5e-3


def test_summary_restores_the_choices() -> None:
    config = ExpresserConfig(decoder="encoder", mask_rate=0.3)
    assert ExpresserConfig(**config.summary()) == config
