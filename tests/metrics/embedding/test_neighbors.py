"""Mixing, purity and prediction from neighbours against their definitions."""

import json

import numpy as np
import pytest
from scipy.spatial.distance import cdist
from sklearn.metrics import balanced_accuracy_score
from sklearn.neighbors import KNeighborsClassifier

from epivi._errors import ConfigError, DataError
from epivi.metrics import knn_accuracy, label_purity, neighbor_mixing, rare_type_purity


def near(Z, k):
    return np.argsort(cdist(Z, Z) + np.diag(np.full(len(Z), np.inf)), axis=1)[:, :k]


def test_random_batches_of_unequal_size_mix():
    rng = np.random.default_rng(0)
    batch = rng.permutation(np.repeat(["a", "b"], [500, 1500]))
    mixing = neighbor_mixing(rng.normal(size=(2000, 5)), batch)
    np.testing.assert_allclose(mixing.mean_p, 0.5, atol=0.03)
    assert mixing.mean_entropy > 0.95


def test_distant_batches_do_not_mix():
    rng = np.random.default_rng(1)
    batch = np.repeat(["a", "b", "c"], 100)
    Z = rng.normal(size=(300, 2)) + 1000.0 * np.repeat([0, 1, 2], 100)[:, None]
    mixing = neighbor_mixing(Z, batch)
    assert not mixing.entropy.any()
    np.testing.assert_array_equal(mixing.p, np.repeat(np.eye(3), 100, axis=0))


def test_equals_the_definition():
    rng = np.random.default_rng(2)
    Z, batch = rng.normal(size=(90, 3)), rng.choice(3, p=[0.2, 0.3, 0.5], size=90)
    mixing = neighbor_mixing(Z, batch, n_neighbors=12)
    size = np.bincount(batch)
    for i, around in enumerate(near(Z, 12)):
        share = np.bincount(batch[around], minlength=3) / size
        p = share / share.sum()
        np.testing.assert_allclose(mixing.p[i], p)
        entropy = -sum(v * np.log(v) for v in p if v > 0) / np.log(3)
        assert mixing.entropy[i] == pytest.approx(entropy)
    assert mixing.mean_entropy == pytest.approx(mixing.entropy.mean())
    assert (mixing.batches, mixing.n_neighbors) == (("0", "1", "2"), 12)


def test_permuting_cells_permutes_the_result():
    rng = np.random.default_rng(3)
    Z, batch = rng.normal(size=(100, 3)), rng.integers(2, size=100)
    order = rng.permutation(100)
    first, second = (neighbor_mixing(z, b, n_neighbors=10) for z, b in ((Z, batch), (Z[order], batch[order])))
    np.testing.assert_allclose(first.p[order], second.p)


def test_types_of_one_batch_are_left_out_of_the_summary_and_listed():
    rng = np.random.default_rng(4)
    kind = np.repeat(["shared", "alone"], [400, 100])
    batch = np.r_[np.tile(["a", "b"], 200), np.repeat("a", 100)]
    Z = rng.normal(size=(500, 2)) + 1000.0 * (kind == "alone")[:, None]
    every = neighbor_mixing(Z, batch, labels=kind)
    shared = neighbor_mixing(Z, batch, labels=kind, types="shared")
    assert shared.n_summary == 400
    assert shared.mean_entropy == pytest.approx(every.entropy[:400].mean())
    assert every.mean_entropy == pytest.approx(every.entropy.mean())
    table = shared.by_type
    assert table["shared"].to_dict() == {"alone": False, "shared": True}
    assert table["purity"].to_dict() == {"alone": 1.0, "shared": 1.0}
    assert table.loc["alone", ["n", "n_batches", "entropy"]].tolist() == [100, 1, 0.0]


def test_mixing_to_dict_is_plain():
    mixing = neighbor_mixing(np.random.default_rng(0).normal(size=(60, 2)), [True, False] * 30, n_neighbors=5)
    entry = mixing.to_dict()
    assert json.loads(json.dumps(entry)) == entry
    assert sum(entry["mean_p"].values()) == pytest.approx(1.0)


def test_purity_equals_the_definition():
    rng = np.random.default_rng(5)
    Z, y = rng.normal(size=(100, 2)), rng.choice(["A", "B", "C"], p=[0.1, 0.3, 0.6], size=100)
    Z[y == "A"] += 1.0
    table = label_purity(Z, y, 7)
    same = (y[near(Z, 7)] == y[:, None]).mean(axis=1)
    for kind in "ABC":
        assert table.loc[kind, "purity"] == pytest.approx(same[y == kind].mean())
        assert table.loc[kind, "n"] == (y == kind).sum()


def test_rare_types_are_those_below_the_share():
    rng = np.random.default_rng(6)
    y = np.repeat(["common", "five", "rare", "tiny"], [175, 10, 9, 6])
    Z = rng.normal(size=(200, 2)) + 100.0 * np.repeat([0, 1, 2, 3], [175, 10, 9, 6])[:, None]
    table = rare_type_purity(Z, y)
    assert table.index.tolist() == ["rare", "tiny"]  # 5 % is not below 5 %
    assert table["purity"].tolist() == pytest.approx([0.8, 0.5])  # 8 and 5 of 10 neighbours can be of the type
    assert table["ceiling"].tolist() == pytest.approx([0.8, 0.5])
    assert rare_type_purity(Z, y, max_fraction=0.01).empty


def test_accuracy_equals_sklearn():
    rng = np.random.default_rng(7)
    y = np.array(["A", "B", "C"])[rng.integers(3, size=200)]
    Z = rng.normal(size=(200, 4)) + (y == "A")[:, None]
    expected = balanced_accuracy_score(y[120:], KNeighborsClassifier(15).fit(Z[:120], y[:120]).predict(Z[120:]))
    assert knn_accuracy(Z[:120], y[:120], Z[120:], y[120:]) == pytest.approx(expected)


def test_a_type_without_training_cells_counts_as_never_found():
    train, y_train = [[0.0], [1.0], [8.0], [9.0]], ["a", "a", "b", "b"]
    assert knn_accuracy(train, y_train, [[0.5], [8.5]], ["a", "new"], n_neighbors=2) == 0.5


GOOD = np.random.default_rng(0).normal(size=(60, 2))
BATCH = ["a", "b"] * 30


@pytest.mark.parametrize(
    ("error", "call", "message"),
    [
        (DataError, lambda: neighbor_mixing(GOOD, ["a"] * 60), r"batch takes 1 value\(s\) over 60 cells"),
        (DataError, lambda: neighbor_mixing(GOOD, BATCH[:59]), "batch has 59 entries, expected one entry for each"),
        (DataError, lambda: neighbor_mixing(GOOD * np.inf, BATCH), "Z holds 0 NaN and 120 infinite values"),
        (DataError, lambda: neighbor_mixing(GOOD * 0, BATCH), "Z is constant: all 60 cells"),
        (
            DataError,
            lambda: neighbor_mixing(GOOD, BATCH, labels=BATCH, types="shared"),
            "None of the 2 types is present in all 2 batches",
        ),
        (ConfigError, lambda: neighbor_mixing(GOOD, BATCH, types="shared"), 'types="shared" needs labels'),
        (ConfigError, lambda: neighbor_mixing(GOOD, BATCH, types="share"), "Did you mean 'shared'"),
        (ConfigError, lambda: neighbor_mixing(GOOD, BATCH, n_neighbors=60), "60 cells have at most 59 neighbours"),
        (ConfigError, lambda: rare_type_purity(GOOD, BATCH, max_fraction=0), "max_fraction is 0, expected a share"),
        (DataError, lambda: label_purity(GOOD, ["a"] * 60), r"labels takes 1 value\(s\)"),
        (DataError, lambda: knn_accuracy(GOOD, BATCH, GOOD[:, :1], BATCH), r"Z_test has shape \(60, 1\), expected"),
        (DataError, lambda: knn_accuracy(GOOD, BATCH, GOOD * np.nan, BATCH), "Z_test holds 120 NaN"),
        (DataError, lambda: knn_accuracy(GOOD, BATCH, GOOD, BATCH[:9]), "y_test has 9 entries"),
        (DataError, lambda: knn_accuracy(GOOD, ["a"] * 60, GOOD, BATCH), r"y_train takes 1 value\(s\)"),
        (ConfigError, lambda: knn_accuracy(GOOD, BATCH, GOOD, BATCH, n_neighbors=61), "n_neighbors is 61"),
    ],
)
def test_bad_input_is_refused(error, call, message):
    with pytest.raises(error, match=message):
        call()


def test_random_embeddings_score_as_chance():
    rng = np.random.default_rng(0)
    Z, y = rng.normal(size=(2000, 5)), rng.permutation(np.repeat(["a", "b", "c", "d"], 500))
    assert label_purity(Z, y)["purity"].mean() == pytest.approx(0.25, abs=0.03)
    assert knn_accuracy(Z[:1000], y[:1000], Z[1000:], y[1000:]) == pytest.approx(0.25, abs=0.05)
