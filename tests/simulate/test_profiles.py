from __future__ import annotations

import numpy as np
import pytest

from epivi._errors import ConfigError, DataError
from epivi.simulate import inclusion_probability
from epivi.simulate.profiles import (
    background_weights,
    changed_profile,
    check_profiles,
    check_weights,
    subtype_profile,
    synthetic_profiles,
)
from epivi.simulate.scatac import WeightedSampler


def test_profiles_follow_the_stated_distribution():
    n = 40_000
    profiles = synthetic_profiles(["a", "b", "c"], n_fg=n, specificity=0.0, effect_sd=1.0, seed=3)
    np.testing.assert_array_equal(profiles["a"], profiles["b"])
    # Gamma(1, 1) has mean 1 and variance 1
    assert abs((profiles["a"] * n).var() - 1.0) < 0.05
    assert abs((background_weights(n, seed=0) * n).var() - 0.5) < 0.03  # Gamma(2, 1) over its mean


def test_exactly_the_stated_share_of_regions_is_changed():
    weights = np.full(1000, 1e-3)
    changed = changed_profile(weights, share=0.25, effect_sd=1.6, name="s", rng=np.random.default_rng(0))
    ratio = changed / np.median(changed)
    moved = ~np.isclose(ratio, 1.0)
    assert moved.sum() == 250
    assert abs(np.log(ratio[moved]).std() - 1.6) < 0.2
    assert changed.sum() == pytest.approx(1.0)


def test_a_type_does_not_depend_on_how_many_there_are():
    few = synthetic_profiles(["a"], n_fg=50, specificity=0.5, effect_sd=1.0, seed=1)
    many = synthetic_profiles(["a", "b"], n_fg=50, specificity=0.5, effect_sd=1.0, seed=1)
    np.testing.assert_array_equal(few["a"], many["a"])
    assert not np.allclose(many["a"], many["b"])


def test_subtypes_differ_from_each_other_and_from_their_type():
    weights = np.full(200, 1 / 200)
    first, second = (subtype_profile(weights, share=0.08, effect_sd=1.0, seed=0, rank=(0, k)) for k in (0, 1))
    assert not np.allclose(first, second)
    assert (~np.isclose(first, np.median(first))).sum() == 16


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ([1.0, -2.0], "w holds -2.0 at region 1"),
        ([1.0, np.nan], "w holds nan at region 1"),
        ([np.inf, 1.0], "w holds inf at region 0"),
        ([0.0, 0.0], "w holds only zeros"),
        ([1.0, 2.0, 3.0], r"w has shape \(3,\): give 2 weights"),
        ([[1.0, 2.0]], r"w has shape \(1, 2\)"),
        (["a", "b"], "w holds entries that are no numbers"),
    ],
)
def test_bad_weights_are_named(weights, words):
    with pytest.raises(DataError, match=words):
        check_weights(weights, name="w", n_regions=2)


def test_huge_weights_stay_finite():
    np.testing.assert_allclose(check_weights([1e308, 1e308], name="w"), [0.5, 0.5])


@pytest.mark.parametrize(
    ("profiles", "words"),
    [
        ([1, 2], "profiles is a list: give a mapping"),
        ({"a": [1, 1]}, "profiles holds 1 types and n_cells 2"),
        ({"a": [1, 1], "b": [1, -1]}, r"profiles\['b'\] holds -1.0 at region 1"),
        ({"a": [1, 1], "b": [1]}, r"profiles\['b'\] has shape \(1,\): give 2 weights"),
    ],
)
def test_bad_profiles_are_named(profiles, words):
    with pytest.raises(DataError, match=words):
        check_profiles(profiles, n_types=2, n_fg=2)


def test_bad_shares_are_named():
    with pytest.raises(ConfigError, match=r"specificity=1.5 is not valid.*between 0 and 1"):
        synthetic_profiles(["a"], n_fg=5, specificity=1.5, effect_sd=1.0, seed=0)
    with pytest.raises(ConfigError, match="effect_sd=-1"):
        synthetic_profiles(["a"], n_fg=5, specificity=0.5, effect_sd=-1, seed=0)
    with pytest.raises(ConfigError, match="n_fg=0"):
        synthetic_profiles(["a"], n_fg=0, specificity=0.5, effect_sd=1, seed=0)


def test_inclusion_probability_agrees_with_draws():
    rng = np.random.default_rng(0)
    weights = rng.gamma(1.0, 1.0, 300)
    weights[:5] = 0.0
    m, n = 80, 40_000
    hits = np.zeros(300)
    sampler = WeightedSampler(weights, np.arange(300))
    for _ in range(n):
        hits[sampler.draw(m, rng)] += 1
    one = inclusion_probability(weights, m, copies=1)
    assert np.abs(hits / n - one).max() < 0.01
    assert one.sum() == pytest.approx(m)
    np.testing.assert_allclose(inclusion_probability(weights, m), 1 - (1 - one) ** 2)


def test_inclusion_probability_is_exact_where_a_closed_form_exists():
    equal = inclusion_probability(np.full(10, 7.0), 4)
    np.testing.assert_allclose(equal, 1 - (1 - 0.4) ** 2)
    np.testing.assert_array_equal(inclusion_probability([1.0, 0.0, 2.0], 2), [1.0, 0.0, 1.0])
    np.testing.assert_array_equal(inclusion_probability([1.0, 0.0, 2.0], 9), [1.0, 0.0, 1.0])
    np.testing.assert_array_equal(inclusion_probability([1.0, 0.0, 2.0], 0), [0.0, 0.0, 0.0])


def test_inclusion_probability_holds_for_very_unequal_weights():
    weights = np.geomspace(1e-12, 1.0, 50)
    one = inclusion_probability(weights, 49.5, copies=1)
    assert one.sum() == pytest.approx(49.5)
    assert (np.diff(one) >= 0).all()
    np.testing.assert_allclose(inclusion_probability(weights * 1e6, 20), inclusion_probability(weights, 20), rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"weights": [1, -1], "m": 1}, DataError, "weights holds -1.0 at region 1"),
        ({"weights": [1, 1], "m": -1}, ConfigError, "m=-1 is not valid"),
        ({"weights": [1, 1], "m": np.nan}, ConfigError, "m=nan is not valid"),
        ({"weights": [1, 1], "m": 1, "copies": 0}, ConfigError, "copies=0 is not valid"),
    ],
)
def test_inclusion_probability_names_what_it_refuses(arguments, error, words):
    with pytest.raises(error, match=words):
        inclusion_probability(**arguments)
