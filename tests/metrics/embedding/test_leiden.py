"""Leiden at a number of clusters and over a sweep."""

import numpy as np
import pytest

from epivi._errors import ConfigError, DataError
from epivi.metrics import cluster_scores, leiden_fixed_k, leiden_sweep


def gaussians(n_each=60, k=5, distance=20.0, seed=0):
    rng = np.random.default_rng(seed)
    y = np.repeat(np.arange(k), n_each)
    centre = distance * np.eye(k)
    return rng.normal(size=(len(y), k)) + centre[y], np.array([f"type {i}" for i in range(k)])[y]


def test_sweep_row_at_the_fixed_k_resolution_is_the_fixed_k_result():
    Z, y = gaussians(distance=3.0)
    fixed = leiden_fixed_k(Z, y, seed=3)
    row = leiden_sweep(Z, y, [fixed.resolution], seed=3).iloc[0]
    scores = cluster_scores(fixed.clusters, y, Z)
    assert row["n_clusters"] == fixed.n_clusters
    for key in ("ari", "nmi", "ami", "silhouette_clusters", "silhouette_labels"):
        assert row[key] == pytest.approx(scores[key], abs=1e-12)


def test_the_number_of_clusters_is_reached_and_ordered_by_size():
    Z, _ = gaussians()
    for target in (5, 7):
        result = leiden_fixed_k(Z, n_clusters=target)
        assert (result.n_clusters, result.n_target, result.n) == (target, target, 300)
        sizes = np.bincount(result.clusters)
        assert len(sizes) == target
        assert (np.diff(sizes) <= 0).all()


def test_the_nearest_number_is_reported_where_the_target_cannot_be_reached():
    Z, _ = gaussians(n_each=30)  # five components that a low resolution cannot join
    result = leiden_fixed_k(Z, n_clusters=2, n_neighbors=10)
    assert (result.n_clusters, result.n_target) == (5, 2)


def test_the_same_seed_gives_the_same_clusters():
    Z = np.random.default_rng(0).normal(size=(300, 6))
    first, again = (leiden_fixed_k(Z, n_clusters=6, seed=4) for _ in range(2))
    np.testing.assert_array_equal(first.clusters, again.clusters)
    assert (first.resolution, first.quality) == (again.resolution, again.quality)


def test_sweep_has_a_row_for_each_resolution_and_neighbour_count():
    Z, y = gaussians(n_each=30)
    table = leiden_sweep(Z, y, [0.1, 3.0], n_neighbors=(10, 20), weighting="jaccard")
    assert table[["n_neighbors", "resolution"]].to_numpy().tolist() == [[10, 0.1], [10, 3.0], [20, 0.1], [20, 3.0]]
    assert (table.groupby("n_neighbors")["n_clusters"].diff().dropna() >= 0).all()
    assert (table["n_labels"] == 5).all()
    assert table["ari"].max() == 1.0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs a target: give labels or n_clusters"),
        ({"n_clusters": 0}, "n_clusters is 0, expected a positive integer"),
        ({"n_clusters": 1000}, "n_clusters is 1000, but there are only 100 cells"),
        ({"n_clusters": 3, "n_starts": 0}, "n_starts is 0, expected a positive integer"),
        ({"n_clusters": 3, "weighting": "umap"}, "Valid are: 'connectivities', 'jaccard'"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        leiden_fixed_k(gaussians(n_each=20)[0], **options)


@pytest.mark.parametrize("resolutions", [[], [0.5, -1.0], [np.nan]])
def test_bad_resolutions_are_refused(resolutions):
    Z, y = gaussians(n_each=20)
    with pytest.raises(ConfigError, match=r"resolutions is .*expected one or more positive numbers"):
        leiden_sweep(Z, y, resolutions)


def test_labels_of_the_wrong_length_are_refused():
    Z, y = gaussians(n_each=20)
    with pytest.raises(DataError, match="labels has 99 entries, expected one entry for each of the 100 cells"):
        leiden_fixed_k(Z, y[:99])
