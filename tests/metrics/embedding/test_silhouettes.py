"""Silhouettes of single cells against scikit-learn and scib-metrics."""

import warnings

import numpy as np
import pytest
import sklearn.metrics
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial.distance import cdist

from epivi._errors import ConfigError
from epivi.metrics.embedding.silhouettes import silhouette_samples, silhouette_values, summed_distances


def example(n=300, k=4, seed=0):
    rng = np.random.default_rng(seed)
    codes = rng.integers(k, size=n)
    return rng.normal(size=(n, 5)) + 2 * rng.normal(size=(k, 5))[codes] + 1.0, codes


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_nearest_equals_sklearn(metric):
    Z, codes = example(1500)
    expected = sklearn.metrics.silhouette_samples(Z, codes, metric=metric)
    np.testing.assert_allclose(silhouette_samples(Z, codes, metric=metric), expected, atol=1e-9)


@given(st.integers(0, 10_000), st.integers(2, 8), st.integers(10, 60))
@settings(max_examples=25, deadline=None)
def test_single_cells_and_ties(seed, k, n):
    rng = np.random.default_rng(seed)
    codes = rng.integers(k, size=n)
    codes[:2] = [k, k + 1]  # each a cell alone
    Z = rng.integers(4, size=(n, 2)).astype(float)
    found = silhouette_samples(Z, codes)
    np.testing.assert_allclose(found, sklearn.metrics.silhouette_samples(Z, codes), atol=1e-7)
    assert found[:2].tolist() == [0, 0]


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_mean_other_by_hand_and_by_scib_metrics(metric):
    Z, codes = example(120)
    D = cdist(Z, Z, metric=metric)
    expected = []
    for i in range(120):
        a = D[i, (codes == codes[i]) & (np.arange(120) != i)].mean()
        b = D[i, codes != codes[i]].mean()
        expected.append((b - a) / max(a, b))
    found = silhouette_samples(Z, codes, metric=metric, between="mean_other")
    np.testing.assert_allclose(found, expected, atol=1e-9)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from scib_metrics.utils import silhouette_samples as theirs

        scib = theirs(Z.astype(np.float32), codes, metric=metric, between_cluster_distances="mean_other")
    np.testing.assert_allclose(found, scib, atol=1e-4)


def test_sums_of_distances_come_in_chunks():
    Z, codes = example(1100)
    parts = list(summed_distances(Z, np.eye(4)[codes]))
    assert [len(rows) for rows, _ in parts] == [1024, 76]
    np.testing.assert_allclose(np.vstack([sums for _, sums in parts]), cdist(Z, Z) @ np.eye(4)[codes], atol=1e-6)


def test_a_cell_at_the_origin_has_cosine_distance_one():
    Z = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
    sums = next(summed_distances(Z, np.ones((3, 1)), metric="cosine"))[1]
    np.testing.assert_allclose(sums[:, 0], [2, 2, 2])


def test_values_of_a_chunk():
    # distances of one cell to clusters of 3 (its own) and 2
    value = silhouette_values(np.array([[2.0, 8.0]]), np.array([0]), np.array([3, 2]))
    assert value.tolist() == [(4 - 1) / 4]


@pytest.mark.parametrize(
    ("options", "message"),
    [({"metric": "cosin"}, "metric is 'cosin'.*cosine"), ({"between": "near"}, "between is 'near'.*nearest")],
)
def test_unknown_choices_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        silhouette_samples(*example(20), **options)
