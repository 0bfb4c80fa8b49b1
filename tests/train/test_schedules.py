from __future__ import annotations

import logging

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from epivi.train.schedules import Annealing, LearningRate


def test_golden_weights_of_a_cycle():
    annealing = Annealing(steps_per_epoch=7, max_epochs=400)
    cycle, start = 700, 70
    assert annealing.warmup_steps == start
    assert annealing.cycle_steps == cycle
    for t, weight in ((0, 0.0), (cycle // 4, 0.5), (cycle // 2, 1.0), (cycle - 1, 1.0), (cycle, 0.0)):
        assert annealing.kl_weight(start + t) == weight
        assert annealing.kl_weight(start + t + 2 * cycle) == weight


@pytest.mark.parametrize("ratio", [0.25, 0.5, 1.0])
def test_the_weight_rises_over_the_given_share_of_the_cycle(ratio):
    annealing = Annealing(steps_per_epoch=1, max_epochs=80, n_epochs_warmup=0, n_epochs_cycle=80, ratio=ratio)
    assert [annealing.kl_weight(t) for t in range(80)] == [min(t / (ratio * 80), 1.0) for t in range(80)]


def test_warm_up_has_no_kl_terms_and_no_noise():
    annealing = Annealing(steps_per_epoch=3, max_epochs=400, n_epochs_warmup=10)
    assert [annealing.kl_weight(t) for t in range(30)] == [0.0] * 30
    assert [annealing.is_deterministic(t) for t in (0, 29, 30, 31)] == [True, True, False, False]
    assert annealing.kl_weight(31) > 0


@given(
    steps=st.integers(1, 50),
    max_epochs=st.integers(1, 500),
    warmup=st.integers(0, 30),
    cycle=st.integers(0, 200),
    ratio=st.floats(0, 1),
)
def test_weights_lie_between_zero_and_one_and_rise_within_a_cycle(steps, max_epochs, warmup, cycle, ratio):
    annealing = Annealing(steps, max_epochs, warmup, cycle, ratio)
    start = annealing.warmup_steps
    assert 2 * start <= max_epochs * steps
    length = max(annealing.cycle_steps, 1)
    ts = sorted({0, length // 3, length // 2, length - 1})
    weights = [annealing.kl_weight(start + t) for t in ts]
    assert all(0 <= weight <= 1 for weight in weights)
    assert weights == sorted(weights)
    if annealing.cycle_steps:
        assert weights == [annealing.kl_weight(start + t + length) for t in ts]


@pytest.mark.parametrize(("max_epochs", "left"), [(109, 99), (50, 40), (20, 10), (12, 6), (2, 1)])
def test_a_short_training_shrinks_the_cycle_and_ends_at_one(max_epochs, left, caplog):
    annealing = Annealing(steps_per_epoch=10, max_epochs=max_epochs)
    assert annealing.cycle_steps == left * 10
    assert annealing.kl_weight(annealing.warmup_steps) == 0.0
    assert annealing.kl_weight(annealing.warmup_steps + left * 5) == 1.0
    assert annealing.kl_weight(max_epochs * 10 - 1) == 1.0
    annealing.warn_if_it_ends_low()
    assert not caplog.records


def test_the_warm_up_takes_at_most_half_of_the_training():
    assert Annealing(steps_per_epoch=4, max_epochs=10, n_epochs_warmup=10).warmup_steps == 20
    assert Annealing(steps_per_epoch=4, max_epochs=1, n_epochs_warmup=10).warmup_steps == 0
    assert Annealing(steps_per_epoch=4, max_epochs=30, n_epochs_warmup=10).warmup_steps == 40


@pytest.mark.parametrize("kwargs", [{"n_epochs_cycle": 0}, {"ratio": 0.0}])
def test_without_a_cycle_the_weight_is_one_after_the_warm_up(kwargs):
    annealing = Annealing(steps_per_epoch=2, max_epochs=40, n_epochs_warmup=3, **kwargs)
    assert [annealing.kl_weight(t) for t in (0, 5, 6, 7, 79)] == [0.0, 0.0, 1.0, 1.0, 1.0]


# 10 + 240 epochs end at 0.8 of the third rise, 10 + 200 + 1 at its beginning, and a single step never rises
@pytest.mark.parametrize(("max_epochs", "steps", "weight"), [(250, 10, "0.80"), (211, 10, "0.02"), (1, 1, "0.00")])
def test_a_training_that_ends_inside_a_rise_warns(max_epochs, steps, weight, caplog):
    with caplog.at_level(logging.WARNING, "epivi"):
        Annealing(steps_per_epoch=steps, max_epochs=max_epochs).warn_if_it_ends_low()
    (record,) = caplog.records
    assert f"Training of {max_epochs} epochs ends inside a rise of the KL weight (at {weight})" in record.message
    assert "Choose max_epochs or n_epochs_kl_cycle" in record.message


@pytest.mark.parametrize(
    ("max_epochs", "ratio"), [(400, 0.5), (310, 0.5), (260, 0.5), (400, 0.9), (310, 1.0), (1, 0.5), (400, 0.0)]
)
def test_a_training_that_ends_at_full_weight_or_one_step_before_does_not_warn(max_epochs, ratio, caplog):
    with caplog.at_level(logging.WARNING, "epivi"):
        Annealing(steps_per_epoch=11, max_epochs=max_epochs, ratio=ratio).warn_if_it_ends_low()
    assert not caplog.records


def test_the_learning_rate_rises_in_proportion_and_falls_as_a_half_cosine():
    rate = LearningRate(lr=0.2, steps_per_epoch=10, max_epochs=10, schedule="cosine", warmup_share=0.05)
    assert [rate.at(step) for step in range(5)] == pytest.approx([0.2 * k / 5 for k in range(1, 6)])
    expected = 0.1 * (1 + np.cos(np.pi * (np.arange(5, 100) - 5) / 95))
    np.testing.assert_allclose([rate.at(step) for step in range(5, 100)], expected, rtol=1e-12)
    assert rate.at(100) == pytest.approx(0.0, abs=1e-15)


def test_the_exponential_learning_rate_changes_by_epoch_alone():
    rate = LearningRate(lr=0.1, steps_per_epoch=3, max_epochs=4, gamma=0.5)
    assert [rate.at(step) for step in range(9)] == [0.1] * 3 + [0.05] * 3 + [0.025] * 3
