from __future__ import annotations

import inspect

import numpy as np
import pytest

from epivi._errors import ConfigError
from epivi.simulate import linked_multiome
from epivi.simulate.linked._setting import LinkedSetting

DEFAULTS = {key: p.default for key, p in inspect.signature(linked_multiome).parameters.items()}


def test_setting_keeps_the_arguments_in_plain_types():
    given = {**DEFAULTS, "n_cells": np.int64(30), "mean_open": np.float32(0.25), "batch_effect": 0}
    setting = LinkedSetting.checked(given)
    assert vars(setting) == given
    assert type(setting.n_cells) is int
    assert type(setting.mean_open) is type(setting.batch_effect) is float


def test_streams_follow_seed_and_key():
    first, other = (LinkedSetting.checked({**DEFAULTS, "seed": seed}) for seed in (0, 1))
    assert first.rng(1).random() == first.rng(1).random()
    assert len({first.rng(1).random(), first.rng(2).random(), other.rng(1).random()}) == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_cells": 0}, "n_cells=0 is not valid: give a whole number of at least 1"),
        ({"n_types": 2.5}, "n_types=2.5 is not valid"),
        ({"n_peaks": True}, "n_peaks=True is not valid"),
        ({"n_genes": -1}, "n_genes=-1 is not valid"),
        ({"peaks_per_gene": 0}, "peaks_per_gene=0 is not valid"),
        ({"n_batches": 0}, "n_batches=0 is not valid"),
        ({"n_programs": -1}, "n_programs=-1 is not valid"),
        ({"seed": "a"}, "seed='a' is not valid"),
        ({"batch_effect": 1.5}, "batch_effect=1.5 is not valid: give a finite number between 0 and 1"),
        ({"thinned_share": -0.1}, "thinned_share=-0.1 is not valid"),
        ({"mean_open": 0}, "mean_open=0 is not valid"),
        ({"mean_open": 0.95}, "mean_open=0.95 is not valid"),
        ({"mean_counts": float("nan")}, "mean_counts=nan is not valid"),
        ({"within_sd": -1}, "within_sd=-1 is not valid"),
        ({"depth_sd": 4}, "depth_sd=4 is not valid"),
        ({"binary": 1}, "binary=1 is not valid: give True or False"),
        ({"n_types": 1001}, "n_types=1001 is more than n_cells=1000"),
        ({"n_batches": 1001}, "n_batches=1001 is more than n_cells=1000"),
        ({"batch_effect": 0.5}, "batch_effect=0.5 needs a second batch"),
        ({"n_peaks": 2}, "peaks_per_gene=3 is more than n_peaks=2"),
        ({"peaks_per_gene": 47}, "than the 46 peaks that fit within 50000 bp"),
    ],
)
def test_bad_arguments_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        linked_multiome(**{**DEFAULTS, **changes})
