"""Scores of a given clustering against scikit-learn."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import (
    adjusted_mutual_info_score,
    adjusted_rand_score,
    normalized_mutual_info_score,
    silhouette_score,
)

from epivi._errors import DataError
from epivi.metrics import cluster_scores
from epivi.metrics.embedding.scores import silhouettes


def example(n=300, k=4, seed=0):
    rng = np.random.default_rng(seed)
    y = rng.integers(k, size=n)
    Z = rng.normal(size=(n, 5)) + 3 * rng.normal(size=(k, 5))[y] + 1000.0
    return Z, y, np.where(rng.random(n) < 0.3, rng.integers(k + 2, size=n), y)


def test_equals_sklearn():
    Z, y, clusters = example()
    scores = cluster_scores(clusters, y, Z)
    assert scores["ari"] == pytest.approx(adjusted_rand_score(y, clusters))
    assert scores["nmi"] == pytest.approx(normalized_mutual_info_score(y, clusters, average_method="arithmetic"))
    assert scores["ami"] == pytest.approx(adjusted_mutual_info_score(y, clusters))
    assert scores["silhouette_clusters"] == pytest.approx(silhouette_score(Z, clusters), abs=1e-9)
    assert scores["silhouette_labels"] == pytest.approx(silhouette_score(Z, y), abs=1e-9)
    assert (scores["n_clusters"], scores["n_labels"], scores["n_silhouette"]) == (6, 4, 300)


@given(st.integers(0, 10_000), st.integers(2, 8), st.integers(10, 60))
@settings(max_examples=25, deadline=None)
def test_silhouette_equals_sklearn_with_single_cells_and_ties(seed, k, n):
    rng = np.random.default_rng(seed)
    codes = rng.integers(k, size=n)
    codes[:2] = [k, k + 1]  # a cell alone and two clusters at least
    Z = rng.integers(4, size=(n, 2)).astype(float)
    assert silhouettes(Z, [codes])[0] == pytest.approx(silhouette_score(Z, codes), abs=1e-7)


def test_silhouettes_in_chunks():
    rng = np.random.default_rng(0)
    Z, codes = rng.normal(size=(1500, 3)), rng.integers(3, size=1500)
    assert silhouettes(Z, [codes])[0] == pytest.approx(silhouette_score(Z, codes), abs=1e-9)


def test_undefined_silhouettes_are_nan():
    Z, y, _ = example(50)
    scores = cluster_scores(np.zeros(50, dtype=int), y, Z)
    assert np.isnan(scores["silhouette_clusters"])
    assert scores["silhouette_labels"] == pytest.approx(silhouette_score(Z, y))
    assert np.isnan(silhouettes(Z, [np.arange(50)])[0])


def test_names_of_labels_and_clusters_do_not_matter():
    Z, y, clusters = example()
    first = cluster_scores(clusters, y, Z)
    renamed = cluster_scores([f"c{9 - c}" for c in clusters], np.array(["w", "z", "x", "y"])[y], Z)
    assert renamed == pytest.approx(first)


def test_random_clusters_agree_by_chance():
    rng = np.random.default_rng(0)
    assert abs(cluster_scores(rng.integers(5, size=2000), rng.integers(5, size=2000))["ari"]) < 0.02


def test_more_classes_than_half_the_cells_raise_no_warning():
    assert cluster_scores(np.arange(10), np.arange(10) // 2)["n_clusters"] == 10


def test_silhouette_subsample_is_reported(caplog):
    Z, y, clusters = example()
    with caplog.at_level("INFO"):
        scores = cluster_scores(clusters, y, Z, n_max=100, seed=1)
    assert scores["n_silhouette"] == 100
    assert "100 of 300" in caplog.text
    assert scores == cluster_scores(clusters, y, Z, n_max=100, seed=1)


@pytest.mark.parametrize(
    ("clusters", "labels", "Z", "message"),
    [
        ([0, 1], ["a", "b", "a"], None, r"clusters has 2 entries, expected one entry for each of the 3 cells"),
        ([0, 1, 1], ["a", "a", "a"], None, r"labels takes 1 value\(s\) over 3 cells \(a\)"),
        ([0, 1, 1], ["a", None, "b"], None, r"labels has 1 missing entries among 3 cells"),
        ([0, 1, 1], [["a", "b", "a"]], None, r"labels has shape \(1, 3\)"),
        ([0, 1, 1], ["a", "b", "b"], np.eye(4), r"labels has 3 entries, expected one entry for each of the 4 cells"),
        ([0, 1, 1], ["a", "b", "b"], np.ones((3, 2)), r"Z is constant: all 3 cells"),
    ],
)
def test_bad_data_are_refused(clusters, labels, Z, message):
    with pytest.raises(DataError, match=message):
        cluster_scores(clusters, labels, Z)
