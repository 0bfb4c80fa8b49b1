"""Which metrics cells allow, which labels are left out, and kBET by hand."""

import warnings

import numpy as np
import pytest
from scipy.sparse import csr_matrix
from scipy.spatial.distance import cdist
from scipy.stats import chi2

from epivi.metrics import _scib
from epivi.metrics._scib import (
    BATCH,
    BIO,
    Cells,
    absent_metrics,
    embedding_metrics,
    kbet_by_label,
    skipped_labels,
)

LABELS, BATCHES, PRE = np.repeat([0, 1], 20), np.tile([0, 1], 20), np.ones((40, 2))


def test_everything_is_allowed_by_labels_batches_and_an_unintegrated_embedding():
    assert absent_metrics(Cells(LABELS, BATCHES, PRE)) == {}


def test_reasons_of_what_is_absent():
    both = {"isolated_labels", "bras", "silhouette_batch", "kbet"}
    of_labels = {"nmi_leiden", "ari_leiden", "silhouette_label", "clisi"}
    without_batch = absent_metrics(Cells(LABELS, None, PRE))
    assert set(without_batch) == both | {"ilisi", "pcr_comparison"}
    assert set(without_batch.values()) == {"no batch_key was given"}
    one_batch = absent_metrics(Cells(LABELS, np.zeros_like(BATCHES), PRE))
    assert set(one_batch) == set(without_batch)
    assert set(one_batch.values()) == {"there is 1 batch"}
    without_labels = absent_metrics(Cells(None, BATCHES, PRE))
    assert set(without_labels) == both | of_labels | {"graph_connectivity"}
    assert set(without_labels.values()) == {"no label_key was given"}
    one_label = absent_metrics(Cells(np.zeros_like(LABELS), BATCHES, PRE))
    assert set(one_label) == of_labels | {"isolated_labels"}
    assert set(one_label.values()) == {"there is 1 label"}
    assert set(absent_metrics(Cells(None, None, None))) == {*BIO, *BATCH}
    no_pre = absent_metrics(Cells(LABELS, BATCHES, None))
    assert list(no_pre) == ["pcr_comparison"]
    assert "give unintegrated_key" in no_pre["pcr_comparison"]


def test_batches_nested_in_labels_cannot_be_scored_by_label():
    nested = absent_metrics(Cells(LABELS, LABELS, PRE))
    assert set(nested) == {"bras", "silhouette_batch", "kbet"}
    assert nested["kbet"] == "no label has 10 cells and two batches"
    assert skipped_labels(Cells(LABELS, LABELS, None)) == {"silhouette_batch": [0, 1], "kbet": [0, 1]}


def test_small_labels_are_left_out():
    labels = np.repeat([0, 1, 2], [29, 9, 2])
    # the last label has as many batches as cells
    assert skipped_labels(Cells(labels, BATCHES, None)) == {"silhouette_batch": [2], "kbet": [1, 2]}
    assert skipped_labels(Cells(labels, None, None)) == {"silhouette_batch": [], "kbet": []}


def test_cells_are_taken_together():
    taken = Cells(LABELS, None, np.arange(80.0).reshape(40, 2)).take(np.array([39, 0]))
    assert taken.labels.tolist() == [1, 0]
    assert taken.batches is None
    assert taken.pre_nd.tolist() == [[78.0, 79.0], [0.0, 1.0]]


def test_nothing_is_computed_where_all_is_absent():
    cells = Cells(None, None, None)
    values, failed = embedding_metrics(np.eye(40), cells, absent_metrics(cells), n_jobs=1, seed=0)
    assert failed == {}
    assert set(values) == {*BIO, *BATCH}
    assert np.isnan(list(values.values())).all()


def graph_of(Z, k=30):
    """Return a symmetric weighted graph of the nearest neighbours."""
    distance = cdist(Z, Z)
    weight = np.exp(-((distance / np.sort(distance, axis=1)[:, [k]]) ** 2)) * (distance > 0)
    weight[distance > np.sort(distance, axis=1)[:, [k]]] = 0
    return csr_matrix((weight + weight.T) / 2)


def kbet_by_hand(graph, batch, k):
    """Return the acceptance rate of one connected label, step by step and in dense matrices."""
    W = graph.toarray()
    q = W.sum(axis=1)
    K = W / np.outer(q, q)
    T = K / np.sqrt(np.outer(K.sum(axis=1), K.sum(axis=1)))
    values, vectors = np.linalg.eigh(T)
    keep = np.argsort(-np.abs(values))[: min(100, len(W) - 1)]
    scale = np.array([1.0 if e > 1 - 1e-7 else e / (1 - e) for e in values[keep]])
    distance = cdist(vectors[:, keep] * scale, vectors[:, keep] * scale)
    accepted = []
    share = np.bincount(batch) / len(batch)
    for i in range(len(W)):
        observed = np.bincount(batch[np.argsort(distance[i], kind="stable")[: k + 1]], minlength=len(share))
        statistic = ((observed - (k + 1) * share) ** 2 / ((k + 1) * share)).sum()
        accepted.append(chi2.sf(statistic, len(share) - 1) >= 0.05)
    return np.mean(accepted)


@pytest.mark.parametrize("dense_below", [1_000, 10])
def test_kbet_equals_a_computation_by_hand(dense_below, monkeypatch):
    monkeypatch.setattr(_scib, "_DENSE_BELOW", dense_below)
    rng = np.random.default_rng(0)
    Z, batch = rng.normal(size=(200, 3)), rng.integers(3, size=200)
    Z[:, 0] += 1.7 * (batch == 1)  # some effect
    labels = np.repeat([0, 1], [120, 80])
    Z[labels == 1] += 50
    graph = graph_of(Z)
    scores = kbet_by_label(graph, labels, batch)
    for label, n in ((0, 120), (1, 80)):
        own = labels == label
        expected = kbet_by_hand(graph[own][:, own], batch[own], max(10, int(n / 3 / 4)))
        assert scores[label] == pytest.approx(expected, abs=1e-9)
    assert 0.05 < scores[0] < 0.95


def test_acceptance_equals_scib_metrics():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from scib_metrics import kbet
        from scib_metrics.nearest_neighbors import NeighborsResults

    rng = np.random.default_rng(0)
    indices, batch = rng.integers(60, size=(60, 21)), rng.integers(3, size=60)
    batch[:25] = 0
    expected = kbet(NeighborsResults(indices, np.ones((60, 21))), batch)[0]
    assert _scib._acceptance(indices, batch) == pytest.approx(expected, abs=1e-9)


def test_kbet_of_mixed_and_of_separate_batches():
    rng = np.random.default_rng(0)
    Z, batch = rng.normal(size=(300, 3)), rng.integers(2, size=300)
    one = np.zeros(300, dtype=int)
    assert kbet_by_label(graph_of(Z), one, batch)[0] > 0.85
    Z[:, 0] += 6 * batch
    assert kbet_by_label(graph_of(Z), one, batch)[0] == 0.0


def test_kbet_of_parts_that_do_not_connect():
    rng = np.random.default_rng(0)
    Z, batch = rng.normal(size=(300, 3)), rng.integers(2, size=300)
    one = np.zeros(300, dtype=int)
    Z[:40] += 100  # an eighth of the cells, below three neighbourhoods: left out
    mixed = kbet_by_label(graph_of(Z), one, batch)[0]
    assert mixed == pytest.approx(kbet_by_label(graph_of(Z)[40:][:, 40:], one[40:], batch[40:])[0], abs=0.05)
    Z[40:80] -= 100  # more than a quarter: nothing can be said for the batches
    assert kbet_by_label(graph_of(Z), one, batch)[0] == 0.0


def test_kbet_leaves_out_labels_and_does_not_depend_on_their_names():
    rng = np.random.default_rng(0)
    Z, batch = rng.normal(size=(240, 3)), rng.integers(2, size=240)
    labels = np.repeat([0, 1, 2, 3], [9, 12, 20, 199])
    batch[labels == 2] = 0
    graph = graph_of(Z, 60)
    scores = kbet_by_label(graph, labels, batch)
    assert np.isnan([scores[0], scores[2]]).all()
    renamed = kbet_by_label(graph, 3 - labels, batch)
    assert [renamed[3 - label] for label in (1, 3)] == [scores[1], scores[3]]


@pytest.mark.slow
def test_kbet_is_near_that_of_scib_metrics():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from scib_metrics import kbet_per_label
        from scib_metrics.nearest_neighbors import NeighborsResults

        rng = np.random.default_rng(0)
        labels = np.repeat([0, 1, 2], [400, 250, 150])
        Z, batch = rng.normal(size=(800, 5)) + 8 * np.eye(5)[labels], rng.integers(2, size=800)
        for effect in (0.0, 0.6, 1.2, 4.0):
            moved = Z + effect * batch[:, None] * np.eye(5)[3]
            distance = cdist(moved, moved)
            indices = np.argsort(distance, axis=1)[:, :50]
            found = NeighborsResults(indices, np.take_along_axis(distance, indices, axis=1).astype(np.float32))
            expected = kbet_per_label(found, batch, labels)
            ours = kbet_by_label(found.knn_graph_connectivities.tocsr(), labels, batch)
            assert np.mean(list(ours.values())) == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize("bras", [True, False])
def test_batch_silhouettes_equal_scib_metrics(bras):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import scib_metrics

    rng = np.random.default_rng(0)
    labels, batches = np.repeat([0, 1, 2, 3], [90, 60, 30, 2]), rng.integers(3, size=182)
    batches[labels == 2] = 1  # one batch: left out
    batches[labels == 3] = [0, 1]  # as many batches as cells: left out
    Z = rng.normal(size=(182, 4)) + 2 * np.eye(4)[labels] + 0.5 * np.eye(4)[batches]
    options = {"metric": "cosine", "between": "mean_other"} if bras else {}
    expected = (scib_metrics.bras if bras else scib_metrics.silhouette_batch)(Z.astype(np.float32), labels, batches)
    assert _scib.silhouette_by_label(Z, labels, batches, **options) == pytest.approx(expected, abs=1e-5)
    assert np.isnan(_scib.silhouette_by_label(Z, labels, labels))
