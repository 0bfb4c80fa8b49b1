"""Agreement of Leiden clusters with labels."""

import json
import random

import numpy as np
import pytest

from epivi._errors import ConfigError, DataError
from epivi.metrics import cluster_agreement, cluster_scores, subsample_scores


def gaussians(n_each=60, k=5, distance=20.0, seed=0):
    rng = np.random.default_rng(seed)
    y = np.repeat(np.arange(k), n_each)
    return rng.normal(size=(len(y), k)) + distance * np.eye(k)[y], np.array([f"type {i}" for i in range(k)])[y]


def test_separated_gaussians_are_found():
    Z, y = gaussians()
    result = cluster_agreement(Z, y)
    assert (result.ari, result.n_clusters, result.n_labels) == (1.0, 5, 5)
    assert result.nmi == pytest.approx(1.0)
    assert result.ami == pytest.approx(1.0)
    assert result.silhouette_clusters == pytest.approx(result.silhouette_labels)
    assert result.sweep is None


def test_permuted_names_of_labels_change_nothing():
    Z, y = gaussians(distance=3.0)
    renamed = np.array([{"type 0": "z", "type 1": "y"}.get(name, name) for name in y])
    first, second = cluster_agreement(Z, y), cluster_agreement(Z, renamed)
    assert (first.ari, first.nmi) == pytest.approx((second.ari, second.nmi), abs=1e-12)


def test_the_order_of_cells_changes_nothing():
    Z, y = gaussians(distance=1.5)  # hard enough that Leiden itself would depend on it
    order = np.random.default_rng(1).permutation(len(Z))
    first, second = cluster_agreement(Z, y), cluster_agreement(Z[order], y[order])
    np.testing.assert_array_equal(first.clusters[order], second.clusters)
    keys = ("ari", "nmi", "ami", "silhouette_clusters", "silhouette_labels")
    assert [getattr(first, key) for key in keys] == pytest.approx([getattr(second, key) for key in keys], abs=1e-9)


def test_random_embeddings_agree_by_chance():
    Z, y = gaussians(n_each=400)
    noise = np.random.default_rng(1).normal(size=Z.shape)
    agreement = cluster_agreement(noise, y)
    assert abs(agreement.ari) < 0.02
    assert agreement.nmi < 0.02
    assert abs(agreement.silhouette_labels) < 0.02


def test_random_labels_do_not_agree():
    Z, _ = gaussians(n_each=400)
    y = np.random.default_rng(1).integers(5, size=len(Z))
    assert abs(cluster_agreement(Z, y).ari) < 0.02


def test_scores_are_those_of_the_partition_and_best_of_the_sweep_comes_second():
    Z, y = gaussians(distance=3.0)
    result = cluster_agreement(Z, y, resolutions=[0.05, 0.5, 4.0])
    scores = cluster_scores(result.clusters, y, Z)
    for key in ("ari", "nmi", "ami", "silhouette_clusters", "silhouette_labels"):
        assert getattr(result, key) == pytest.approx(scores[key], abs=1e-12)
    assert result.sweep["resolution"].tolist() == [0.05, 0.5, 4.0]
    assert result.best["ari"] == result.sweep["ari"].max()


def test_to_dict_is_plain_and_complete():
    Z, y = gaussians(n_each=20)
    entry = cluster_agreement(Z, y, resolutions=[1.0], n_clusters=4, n_neighbors=10, seed=2).to_dict()
    assert json.loads(json.dumps(entry)) == entry
    expected = {"n_clusters_target": 4, "n": 100, "n_neighbors": 10, "seed": 2, "weighting": "connectivities"}
    assert expected.items() <= entry.items()


def test_inputs_and_global_random_state_are_left_alone():
    Z, y = gaussians(n_each=20)
    Z = Z.astype(np.float32)
    copies = Z.copy(), y.copy()
    state, python_state = np.random.get_state()[1].copy(), random.getstate()  # noqa: NPY002
    cluster_agreement(Z, y)
    np.testing.assert_array_equal(Z, copies[0])
    np.testing.assert_array_equal(y, copies[1])
    np.testing.assert_array_equal(np.random.get_state()[1], state)  # noqa: NPY002
    assert random.getstate() == python_state


def test_float32_and_float64_agree():
    Z, y = gaussians(distance=3.0)
    Z = Z.astype(np.float32)
    first, second = cluster_agreement(Z, y), cluster_agreement(Z.astype(np.float64), y)
    np.testing.assert_array_equal(first.clusters, second.clusters)


def test_subsamples_of_a_given_clustering():
    Z, y = gaussians(n_each=20, distance=3.0)
    clusters = np.random.default_rng(0).integers(5, size=100)
    table = subsample_scores(Z, y, clusters=clusters, n=4, fraction=0.9, seed=5)
    assert table["n_cells"].tolist() == [90] * 4
    assert table["seed"].tolist() == [5, 6, 7, 8]
    cells = np.sort(np.random.default_rng(6).choice(100, 90, replace=False))
    assert table["ari"][1] == pytest.approx(cluster_scores(clusters[cells], y[cells])["ari"])
    whole = subsample_scores(Z, y, clusters=clusters, n=1, fraction=1.0)
    assert whole["silhouette_labels"][0] == pytest.approx(cluster_scores(clusters, y, Z)["silhouette_labels"])


def test_subsamples_are_clustered_anew_by_default():
    Z, y = gaussians(n_each=30)
    table = subsample_scores(Z, y, n=3, n_neighbors=10)
    assert table["ari"].tolist() == [1.0] * 3
    assert table["n_clusters"].tolist() == [5] * 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fraction": 0.0}, r"fraction is 0.0, expected a share of the cells in \(0, 1\]"),
        ({"fraction": 1.5}, "fraction is 1.5"),
        ({"n": 0}, "n is 0, expected a positive integer"),
    ],
)
def test_bad_subsample_options_are_refused(options, message):
    Z, y = gaussians(n_each=10)
    with pytest.raises(ConfigError, match=message):
        subsample_scores(Z, y, **options)


def test_bad_data_are_refused():
    Z, y = gaussians(n_each=10)
    holed = Z.copy()
    holed[3, 1] = np.nan
    for values, labels, message in [
        (holed, y, "Z holds 1 NaN and 0 infinite values, the first in row 3"),
        (np.zeros_like(Z), y, "Z is constant: all 50 cells"),
        (Z, ["T"] * 50, r"labels takes 1 value\(s\) over 50 cells \(T\)"),
        (Z, y[:49], "labels has 49 entries, expected one entry for each of the 50 cells"),
    ]:
        with pytest.raises(DataError, match=message):
            cluster_agreement(values, labels)
        with pytest.raises(DataError, match=message):
            subsample_scores(values, labels)


@pytest.mark.realdata
@pytest.mark.filterwarnings("ignore::pandas.errors.Pandas4Warning")  # anndata and mudata read by old pandas calls
def test_rna_of_mouse_cortex_agrees_with_its_labels():
    import os
    from pathlib import Path

    data = Path(os.environ.get("EPIVI_TEST_DATA", "../shared/data")) / "sc" / "snareseq_mouse_cortex.h5mu"
    if not data.exists():
        pytest.skip(f"{data} is missing (set EPIVI_TEST_DATA)")
    import mudata
    import scanpy

    rna = mudata.read_h5mu(data)["rna"]
    scanpy.pp.normalize_total(rna, target_sum=1e4)
    scanpy.pp.log1p(rna)
    scanpy.pp.pca(rna, n_comps=50)
    result = cluster_agreement(rna.obsm["X_pca"], rna.obs["cell_type"])
    assert result.n_clusters == rna.obs["cell_type"].nunique()
    assert result.nmi > 0.4
