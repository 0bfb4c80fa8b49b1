"""I(z, c) against closed forms, scikit-learn and the invariances of mutual information."""

import json
import logging
import random

import numpy as np
import pandas as pd
import pytest
from scipy.stats import norm
from sklearn.feature_selection import mutual_info_classif, mutual_info_regression

from epivi._errors import ConfigError, DataError
from epivi.metrics import confounder_information


def correlated(n, r, seed=0):
    """Depth (log-normal) and a latent whose correlation with standardised log depth is r."""
    rng = np.random.default_rng(seed)
    log_depth = rng.normal(size=n)
    return r * log_depth + np.sqrt(1 - r**2) * rng.normal(size=n), np.exp(8 + 0.5 * log_depth)


def test_independent_is_near_zero():
    rng = np.random.default_rng(0)
    result = confounder_information(rng.normal(size=(2000, 10)), rng.lognormal(8, 0.5, size=2000))
    assert result.mean < 0.02
    assert (result.per_dimension >= 0).all()


@pytest.mark.parametrize("r", [0.5, 0.9])
def test_gaussian_closed_form(r):
    z, depth = correlated(2000, r)
    result = confounder_information(z[:, None], depth)
    assert not result.discrete
    assert result.normalised is None
    assert abs(result.mean + 0.5 * np.log(1 - r**2)) < 0.05


def test_separated_batches_reach_their_entropy():
    rng = np.random.default_rng(1)
    batch = np.repeat(["a", "b"], 1000)
    z = rng.normal(size=(2000, 1)) + 100.0 * (batch == "b")[:, None]
    result = confounder_information(z, batch)
    assert result.discrete
    assert abs(result.mean - np.log(2)) < 0.02
    assert result.entropy == pytest.approx(np.log(2))
    assert result.normalised == pytest.approx(result.mean / np.log(2))


def test_unequal_batches_have_a_lower_ceiling():
    batch = np.repeat([0, 1], [500, 1500])
    z = np.random.default_rng(2).normal(size=(2000, 1)) + 50.0 * batch[:, None]
    result = confounder_information(z, batch)
    assert result.entropy == pytest.approx(-(0.25 * np.log(0.25) + 0.75 * np.log(0.75)))
    assert result.normalised == pytest.approx(1.0, abs=0.03)


def test_monotone_transform_of_the_confounder():
    z, depth = correlated(2000, 0.7)
    raw, logged = (confounder_information(z[:, None], c).mean for c in (depth, np.log(depth)))
    assert abs(raw - logged) < 0.03


def test_scale_and_shift_of_the_embedding_change_nothing():
    z, depth = correlated(500, 0.7)
    Z = np.column_stack([z, z**3])
    one, other = confounder_information(Z, depth), confounder_information(Z * [1e-4, 1e4] + [5.0, -7.0], depth)
    np.testing.assert_allclose(one.per_dimension, other.per_dimension, atol=1e-6)


def test_equals_sklearn_on_standardised_dimensions():
    rng = np.random.default_rng(3)
    Z = rng.normal(size=(400, 3)) * [1, 10, 0.1]
    c = Z[:, 0] + rng.normal(size=400)
    b = (c > 0).astype(int)
    standard = (Z - Z.mean(0)) / Z.std(0)
    continuous = confounder_information(Z, c, n_neighbors=5, seed=7)
    discrete = confounder_information(Z, b, n_neighbors=5, seed=7)
    np.testing.assert_array_equal(
        continuous.per_dimension, mutual_info_regression(standard, c, n_neighbors=5, random_state=7)
    )
    np.testing.assert_array_equal(
        discrete.per_dimension, mutual_info_classif(standard, b, n_neighbors=5, random_state=7)
    )
    assert continuous.max == continuous.per_dimension.max()
    assert (continuous.n, continuous.n_neighbors, continuous.seed) == (400, 5, 7)


def test_same_seed_same_value_and_cell_order_is_irrelevant():
    z, depth = correlated(600, 0.6)
    Z = np.column_stack([z, -z])
    order = np.random.default_rng(0).permutation(600)
    first, again = confounder_information(Z, depth), confounder_information(Z, depth)
    np.testing.assert_array_equal(first.per_dimension, again.per_dimension)
    np.testing.assert_allclose(
        first.per_dimension, confounder_information(Z[order], depth[order]).per_dimension, atol=1e-6
    )


def test_collapsed_dimensions_count_as_zero_and_are_listed():
    z, depth = correlated(500, 0.9)
    Z = np.column_stack([np.full(500, 0.1, dtype=np.float32), z, np.full(500, 3.0)])
    result = confounder_information(Z, depth)
    assert result.collapsed == (0, 2)
    assert result.per_dimension[[0, 2]].tolist() == [0, 0]
    assert result.mean == pytest.approx(result.per_dimension[1] / 3)


def test_within_removes_what_the_type_explains():
    rng = np.random.default_rng(4)
    kind = np.repeat(["A", "B"], [400, 800])
    depth = np.exp(8 + 2.0 * (kind == "B") + 0.1 * rng.normal(size=1200))
    Z = (3.0 * (kind == "B") + rng.normal(size=1200))[:, None]
    across, within = confounder_information(Z, depth), confounder_information(Z, depth, within=kind)
    assert across.mean > 0.3
    assert within.mean < 0.05
    parts = [confounder_information(Z[kind == k], depth[kind == k]).mean for k in "AB"]
    assert within.mean == pytest.approx((parts[0] * 400 + parts[1] * 800) / 1200)


def test_within_skips_small_groups_and_says_so(caplog):
    z, depth = correlated(549, 0.5)
    kind = np.repeat(["A", "rare"], [500, 49])
    with caplog.at_level(logging.WARNING):
        result = confounder_information(z[:, None], depth, within=kind)
    assert result.skipped == ("rare",)
    assert (result.n, result.n_total) == (500, 549)
    assert "rare" in caplog.text


def test_within_a_group_of_one_batch_adds_nothing_to_i_or_to_its_ceiling():
    rng = np.random.default_rng(5)
    kind = np.repeat(["shared", "alone"], 400)
    batch = np.r_[np.tile(["a", "b"], 200), np.repeat("a", 400)]
    Z = rng.normal(size=(800, 1)) + 100.0 * (batch == "b")[:, None]
    result = confounder_information(Z, batch, within=kind)
    assert result.entropy == pytest.approx(np.log(2) / 2)
    assert result.mean == pytest.approx(np.log(2) / 2, abs=0.02)


def test_subsample_is_seeded_and_reported(caplog):
    z, depth = correlated(1000, 0.5)
    with caplog.at_level(logging.INFO):
        result = confounder_information(z[:, None], depth, n_max=300, seed=3)
    assert (result.n, result.n_total) == (300, 1000)
    assert "300 of 1000" in caplog.text
    assert result.mean == confounder_information(z[:, None], depth, n_max=300, seed=3).mean
    assert result.mean != confounder_information(z[:, None], depth, n_max=300, seed=4).mean


@pytest.mark.parametrize(
    ("c", "discrete"),
    [
        (np.tile([True, False], 60), True),
        (np.tile(["a", "b"], 60), True),
        (np.tile(np.array(["a", "b"], dtype=object), 60), True),
        (pd.Series(["a", "b"] * 60, dtype="category"), True),
        (pd.Categorical([0.5, 1.5] * 60), True),
        (np.arange(120) % 50, True),
        (np.arange(120) % 51, False),
        (np.arange(120.0) % 50, False),
    ],
)
def test_kind_of_confounder_is_inferred(c, discrete):
    Z = np.random.default_rng(0).normal(size=(120, 1))
    assert confounder_information(Z, c).discrete is discrete


def test_float_labels_are_pointed_out(caplog):
    Z = np.random.default_rng(0).normal(size=(120, 1))
    with caplog.at_level(logging.WARNING):
        assert not confounder_information(Z, np.tile([0.0, 1.0], 60)).discrete
    assert "discrete=True" in caplog.text


def test_to_dict_is_plain():
    z, depth = correlated(200, 0.5)
    entry = confounder_information(np.column_stack([z, z]), depth).to_dict()
    assert json.loads(json.dumps(entry)) == entry
    assert len(entry["per_dimension"]) == 2
    assert entry["epivi_version"]


def test_inputs_and_global_random_state_are_left_alone():
    z, depth = correlated(200, 0.5)
    Z = np.asfortranarray(np.column_stack([z, np.ones(200)]))
    copies = Z.copy(), depth.copy()
    state, python_state = np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    confounder_information(Z, depth, n_max=100)
    np.testing.assert_array_equal(Z, copies[0])
    np.testing.assert_array_equal(depth, copies[1])
    np.testing.assert_array_equal(np.random.get_state()[1], state)  # noqa: NPY002
    assert random.getstate() == python_state


GOOD = norm.ppf((np.arange(60) + 0.5) / 60)[:, None]
DEPTH = np.arange(60) + 100.5


def spoiled(value):
    Z = GOOD.copy()
    Z[[4, 7], 0] = value
    return Z


@pytest.mark.parametrize(
    ("Z", "c", "options", "message"),
    [
        (spoiled(np.nan), DEPTH, {}, r"Z holds 2 NaN and 0 infinite values, the first in row 4"),
        (spoiled(np.inf), DEPTH, {}, r"Z holds 0 NaN and 2 infinite values"),
        (np.ones((60, 3)), DEPTH, {}, r"Z is constant: all 60 cells have the same 3 values"),
        (GOOD[:, 0], DEPTH, {}, r"Z has shape \(60,\), expected \(cells, dimensions\)"),
        (GOOD[:1], DEPTH, {}, r"at least 2 cells"),
        (np.array([["a"], ["b"]]), DEPTH, {}, r"Z cannot be read as numbers"),
        (GOOD, DEPTH[:59], {}, r"c has shape \(59,\), expected one value for each of the 60 cells"),
        (GOOD, np.r_[DEPTH[:59], np.nan], {}, r"c holds 1 NaN and 0 infinite values, the first in row 59"),
        (GOOD, np.full(60, 2.0), {}, r"c takes 1 value \(2\) over 60 cells"),
        (GOOD, ["a"] * 60, {}, r"c takes 1 value\(s\) over 60 cells \(a\)"),
        (GOOD, ["a"] * 59 + [None], {}, r"c has 1 missing entries among 60 cells"),
        (GOOD, [f"x{i}" for i in range(60)], {}, r"has 60 classes for 60 cells"),
        (GOOD, ["a", "b"] * 30, {"discrete": False}, r"taken as continuous but cannot be read"),
        (GOOD, DEPTH, {"within": ["A"] * 30 + ["B"] * 30}, r"no group of at least 50 cells \(largest: 30\)"),
        (GOOD, DEPTH, {"within": ["A"] * 30}, r"within has 30 entries, expected one entry for each of the 60 cells"),
    ],
)
def test_bad_data_are_refused(Z, c, options, message):
    with pytest.raises(DataError, match=message):
        confounder_information(Z, c, **options)


def test_sparse_embedding_is_refused():
    from scipy.sparse import csr_matrix

    with pytest.raises(DataError, match="Z is a sparse matrix"):
        confounder_information(csr_matrix(GOOD), DEPTH)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_neighbors": 0}, r"n_neighbors is 0, expected a positive integer"),
        ({"n_neighbors": 2.5}, r"n_neighbors is 2.5, expected a positive integer"),
        ({"n_neighbors": 60}, r"n_neighbors is 60, but 60 cells have at most 59"),
        ({"n_max": 1}, r"n_max is 1, expected an integer of at least 2"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        confounder_information(GOOD, DEPTH, **options)
