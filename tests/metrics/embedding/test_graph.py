"""Nearest neighbours and graph weights against brute force and scanpy."""

import numpy as np
import pytest
from scipy.spatial.distance import cdist

from epivi._errors import ConfigError
from epivi.metrics.embedding import _graph
from epivi.metrics.embedding._graph import cell_graph, leiden, nearest_neighbors, ordered_graph


def adjacency(graph, n):
    A = np.zeros((n, n))
    for edge in graph.es:
        A[edge.source, edge.target] = A[edge.target, edge.source] = edge["weight"]
    return A


def test_neighbours_are_exact_and_leave_the_cell_out():
    Z = np.random.default_rng(0).normal(size=(80, 3))
    D = cdist(Z, Z) + np.diag(np.full(80, np.inf))
    indices, distances = nearest_neighbors(Z, 7)
    np.testing.assert_array_equal(indices, np.argsort(D, axis=1)[:, :7])
    np.testing.assert_allclose(distances, np.sort(D, axis=1)[:, :7])


def test_duplicates_are_neighbours_of_each_other_not_of_themselves():
    Z = np.repeat(np.arange(4.0)[:, None], 5, axis=0)
    indices, distances = nearest_neighbors(Z, 4)
    assert not (indices == np.arange(20)[:, None]).any()
    np.testing.assert_array_equal(indices // 5, np.repeat(np.arange(4), 5)[:, None] * np.ones((1, 4)))
    assert not distances.any()


@pytest.mark.slow
def test_approximate_search_agrees_and_is_seeded(monkeypatch):
    Z = np.repeat(np.random.default_rng(0).normal(size=(1000, 5)), 2, axis=0)  # every cell twice
    exact, _ = nearest_neighbors(Z, 15)
    monkeypatch.setattr(_graph, "EXACT_BELOW", 0)
    (first, distances), (again, _) = nearest_neighbors(Z, 15, seed=1), nearest_neighbors(Z, 15, seed=1)
    np.testing.assert_array_equal(first, again)
    assert not (first == np.arange(len(Z))[:, None]).any()
    assert (np.diff(distances, axis=1) >= 0).all()
    recall = np.mean([len(np.intersect1d(a, b)) / 15 for a, b in zip(exact, first, strict=True)])
    assert recall > 0.9


def test_connectivities_are_those_of_scanpy():
    import scanpy
    from anndata import AnnData

    Z = np.random.default_rng(1).normal(size=(120, 4))
    adata = AnnData(Z)
    scanpy.pp.neighbors(adata, n_neighbors=12, use_rep="X")
    ours = adjacency(cell_graph(Z, 12, weighting="connectivities", seed=0), 120)
    np.testing.assert_allclose(ours, adata.obsp["connectivities"].toarray(), atol=1e-6)


def test_jaccard_weights_are_shares_of_neighbours():
    Z = np.random.default_rng(2).normal(size=(60, 3))
    k = 8
    near = np.argsort(cdist(Z, Z), axis=1)[:, :k]  # the cell itself first
    expected = np.zeros((60, 60))
    for i in range(60):
        for j in range(60):
            shared = len(np.intersect1d(near[i], near[j]))
            value = shared / (2 * k - shared)
            expected[i, j] = value if i != j and value >= 1 / 15 else 0
    ours = adjacency(cell_graph(Z, k, weighting="jaccard", seed=0), 60)
    np.testing.assert_allclose(ours, expected, atol=1e-12)
    assert np.count_nonzero(expected) > 0


def test_more_starts_never_lower_the_quality():
    Z = np.random.default_rng(3).normal(size=(200, 4))
    graph = cell_graph(Z, 10, weighting="jaccard", seed=0)
    qualities = [leiden(graph, 1.5, n_starts=n, seed=0).quality for n in (1, 3, 6)]
    assert qualities == sorted(qualities)


@pytest.mark.parametrize(
    ("k", "weighting", "message"),
    [
        (10, "jacard", "Did you mean 'jaccard'"),
        (1, "jaccard", "n_neighbors is 1: it counts the cell itself"),
        (20, "jaccard", "n_neighbors is 20, but 20 cells have at most 19"),
        (True, "jaccard", "n_neighbors is True, expected a positive integer"),
    ],
)
def test_bad_settings_are_refused(k, weighting, message):
    with pytest.raises(ConfigError, match=message):
        cell_graph(np.random.default_rng(0).normal(size=(20, 2)), k, weighting=weighting, seed=0)


def test_clusters_of_an_ordered_graph_come_back_in_the_order_of_the_cells():
    Z = np.repeat([[5.0, 0.0], [0.0, 5.0], [9.0, 9.0]], 30, axis=0) + np.random.default_rng(0).normal(size=(90, 2)) / 9
    order = np.random.default_rng(1).permutation(90)
    graph = ordered_graph(Z[order], 10, weighting="connectivities", seed=0)
    clusters = leiden(graph, 0.1, n_starts=1, seed=0).clusters
    assert all(len(np.unique(clusters[np.repeat([0, 1, 2], 30)[order] == part])) == 1 for part in range(3))
    plain = cell_graph(Z, 10, weighting="connectivities", seed=0)
    assert sorted(graph.es["weight"]) == pytest.approx(sorted(plain.es["weight"]), rel=1e-5)
