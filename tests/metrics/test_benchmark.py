"""The benchmark against scib-metrics called directly, on planted embeddings, and where metrics are not defined."""

import logging
import random
import warnings

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from mudata import MuData
from scipy.sparse.linalg import ArpackNoConvergence

from epivi._errors import ConfigError, DataError
from epivi.metrics import _scib, benchmark, confounder_information, scib_convnet, scib_default

N = 300
KEYS = ["X_pca", "perfect", "random", "batch_only"]
SHARED = {
    "isolated_labels": ("bio", "isolated_labels"),
    "nmi_ari_cluster_labels_leiden_nmi": ("bio", "nmi_leiden"),
    "nmi_ari_cluster_labels_leiden_ari": ("bio", "ari_leiden"),
    "silhouette_label": ("bio", "silhouette_label"),
    "clisi_knn": ("bio", "clisi"),
    "bras": ("batch", "bras"),
    "ilisi_knn": ("batch", "ilisi"),
    "graph_connectivity": ("batch", "graph_connectivity"),
    "pcr_comparison": ("batch", "pcr_comparison"),
}


@pytest.fixture(scope="module")
def adata():
    """Three types, the largest first by name, in two batches; an embedding with both, one with types alone, ..."""
    rng = np.random.default_rng(0)
    y, b = np.repeat([0, 1, 2], [130, 100, 70]), rng.integers(2, size=N)
    obs = pd.DataFrame({"type": np.array(["A", "B", "C"])[y], "batch": np.array(["s1", "s2"])[b]})
    obs.index = obs.index.astype(str)
    obs["depth"] = rng.lognormal(8, 0.5, size=N)
    adata = AnnData(np.zeros((N, 1), dtype=np.float32), obs=obs)
    noise = rng.normal(size=(4, N, 5))
    types, shift = np.eye(5)[y], np.eye(5)[3] * b[:, None]
    adata.obsm["X_pca"] = 5 * types + 4 * shift + noise[0]
    adata.obsm["perfect"] = 10 * types + 0.5 * noise[1]
    adata.obsm["random"] = noise[2]
    adata.obsm["batch_only"] = 8 * shift + noise[3]
    adata.obsm["perfect"][:, 4] = np.log(adata.obs["depth"])
    return adata[rng.permutation(N)].copy()


@pytest.fixture(scope="module")
def table(adata):
    return benchmark(adata, KEYS, "batch", "type", confounders=["depth"])


def neighbors(X, k):
    from scib_metrics.nearest_neighbors import NeighborsResults
    from scipy.spatial.distance import cdist

    distances = cdist(X, X)  # exactly 0 on the diagonal
    indices = np.argsort(distances, axis=1, kind="stable")[:, :k]
    return NeighborsResults(indices, np.take_along_axis(distances, indices, axis=1).astype(np.float32))


def test_equals_the_benchmarker_of_scib_metrics(adata, table):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from scib_metrics.benchmark import BatchCorrection, Benchmarker, BioConservation

        ordered = adata[np.lexsort(adata.obsm["perfect"].T[::-1])].copy()
        bio = BioConservation(nmi_ari_cluster_labels_leiden=True, nmi_ari_cluster_labels_kmeans=False)
        batch = BatchCorrection(kbet_per_label=False)  # see test_scib.py
        runner = Benchmarker(ordered, "batch", "type", ["perfect"], bio, batch, "X_pca", progress_bar=False)
        runner.prepare(neighbor_computer=neighbors)
        runner.benchmark()
        expected = runner.get_results(clean_names=False).loc["perfect"].astype(float)
    row = table.loc["perfect"]
    for name, column in SHARED.items():
        assert row[column] == pytest.approx(expected[name], abs=2e-5), name
    assert row["aggregate", "bio"] == pytest.approx(expected["Bio conservation"], abs=2e-5)
    batch_mean = (4 * expected["Batch correction"] + row["batch", "kbet"]) / 5
    assert row["aggregate", "batch"] == pytest.approx(batch_mean, abs=2e-5)
    total = expected["Total"] + 0.4 * (batch_mean - expected["Batch correction"])
    assert row["aggregate", "total_scib"] == pytest.approx(total, abs=2e-5)


def test_silhouettes_equal_scib_metrics_in_the_order_given(adata, table):
    from scib_metrics import silhouette_batch, silhouette_label

    y, b = adata.obs["type"].to_numpy().astype(str), adata.obs["batch"].to_numpy().astype(str)
    for key in KEYS:
        Z = adata.obsm[key]
        assert table.loc[key, ("bio", "silhouette_label")] == pytest.approx(silhouette_label(Z, y), abs=1e-5)
        assert table.loc[key, ("batch", "silhouette_batch")] == pytest.approx(silhouette_batch(Z, y, b), abs=1e-5)


def test_totals_are_weighted_means_of_their_sets(table):
    seven = table["bio"][["silhouette_label", "nmi_leiden", "clisi"]].mean(axis=1) * 0.6
    seven += 0.4 * table["batch"][["silhouette_batch", "graph_connectivity", "ilisi", "kbet"]].mean(axis=1)
    pd.testing.assert_series_equal(table["aggregate", "total_convnet"], seven, check_names=False)
    scib = 0.6 * table["bio"].mean(axis=1) + 0.4 * table["batch"].drop(columns="silhouette_batch").mean(axis=1)
    pd.testing.assert_series_equal(table["aggregate", "total_scib"], scib, check_names=False)
    assert table.attrs["aggregates"]["total_convnet"]["batch"] == [
        "silhouette_batch",
        "graph_connectivity",
        "ilisi",
        "kbet",
    ]
    assert table.attrs["aggregates"]["total_scib"]["batch"][0] == "bras"
    assert table.attrs["absent"] == {}
    assert table.notna().all().all()


def test_planted_embeddings_are_ranked(table):
    bio, batch = table["aggregate", "bio"], table["aggregate", "batch"]
    assert bio["perfect"] > 0.9
    assert batch["perfect"] > 0.8
    assert table["aggregate", "total_scib"].idxmax() == table["aggregate", "total_convnet"].idxmax() == "perfect"
    assert table["aggregate", "total_scib"]["batch_only"] < table["aggregate", "total_scib"]["X_pca"]
    assert batch["batch_only"] < batch["random"]
    assert table.loc["X_pca", ("batch", "pcr_comparison")] == pytest.approx(0.0, abs=1e-5)
    assert table.loc["batch_only", ("batch", "pcr_comparison")] == 0.0  # worse than before is not below 0


def test_random_embeddings_score_as_chance(table):
    random_row = table.loc["random"]
    assert abs(random_row["bio", "ari_leiden"]) < 0.05
    assert random_row["bio", "nmi_leiden"] < 0.1
    assert random_row["bio", "silhouette_label"] == pytest.approx(0.5, abs=0.05)
    assert random_row["bio", "isolated_labels"] == pytest.approx(0.5, abs=0.05)
    assert random_row["bio", "clisi"] < 0.5
    assert random_row["batch", "bras"] > 0.85
    assert random_row["batch", "ilisi"] > 0.85
    assert random_row["batch", "kbet"] > 0.85  # 0.95 but for neighbourhoods that overlap
    assert random_row["batch", "pcr_comparison"] > 0.9
    assert random_row["confounder", "I(z,depth)"] < 0.1


def test_information_is_that_of_confounder_information(adata, table):
    for key in KEYS:
        batch = confounder_information(adata.obsm[key], adata.obs["batch"])
        depth = confounder_information(adata.obsm[key], adata.obs["depth"])
        assert table.loc[key, ("confounder", "I(z,batch)")] == batch.mean
        assert table.loc[key, ("confounder", "max I(z,depth)")] == depth.max
    assert table["confounder", "max I(z,depth)"].idxmax() == "perfect"
    assert table["confounder", "I(z,batch)"].idxmax() == "batch_only"


def test_order_of_cells_and_names_of_labels_do_not_matter(adata, table):
    rows = np.random.default_rng(1).permutation(N)
    permuted = adata[rows].copy()
    permuted.obs["type"] = permuted.obs["type"].map({"A": "z", "B": "y", "C": "x"})
    again = benchmark(permuted, KEYS[:2], "batch", "type", confounders=["depth"])
    expected = table.loc[KEYS[:2]]
    for group in ("bio", "batch", "aggregate"):
        pd.testing.assert_frame_equal(again[group], expected[group], rtol=1e-5)
    np.testing.assert_allclose(again["confounder"], expected["confounder"], atol=1e-6)


def test_settings_are_part_of_the_result(table):
    assert table.index.tolist() == KEYS
    assert table.columns.get_level_values(0).unique().tolist() == ["bio", "batch", "confounder", "aggregate"]
    attrs = table.attrs
    assert attrs["unintegrated_key"] == "X_pca"
    assert (attrs["n_cells"], attrs["n_labels"], attrs["n_batches"], attrs["seed"]) == (N, 3, 2, 0)
    assert attrs["n_neighbors"] == {"lisi": 90, "kbet": 50, "graph": 15}
    assert attrs["n_dimensions"] == dict.fromkeys(KEYS, 5)
    assert attrs["skipped_labels"] == {"silhouette_batch": [], "kbet": []}
    assert attrs["scib_metrics_version"].startswith("0.")


def legacy_state():
    return np.random.get_state()[1].tolist()  # noqa: NPY002  the state that must not change


def test_data_and_global_state_are_left_alone(adata):
    import igraph

    before, keys = adata.obsm["X_pca"].copy(), set(adata.obsm)
    states = [legacy_state(), logging.getLogger().handlers[:], warnings.filters[:]]
    benchmark(adata, ["X_pca"], label_key="type")
    assert [legacy_state(), logging.getLogger().handlers[:], warnings.filters[:]] == states
    np.testing.assert_array_equal(adata.obsm["X_pca"], before)
    assert set(adata.obsm) == keys
    assert list(adata.uns) == []
    graphs = []
    for _ in range(2):
        random.seed(3)
        graphs.append(igraph.Graph.Erdos_Renyi(n=20, p=0.3).get_edgelist())
    assert graphs[0] == graphs[1]  # igraph draws from `random` again


def test_labels_alone_and_batches_alone(adata, table):
    labels = benchmark(adata, ["perfect"], label_key="type")
    present = ["isolated_labels", "nmi_leiden", "ari_leiden", "silhouette_label", "clisi"][1:]
    pd.testing.assert_series_equal(labels["bio"].loc["perfect", present], table["bio"].loc["perfect", present])
    assert labels["aggregate", "bio"].item() == pytest.approx(labels["bio"].loc["perfect", present].mean())
    assert labels["aggregate", "batch"].item() == table.loc["perfect", ("batch", "graph_connectivity")]
    assert labels.attrs["absent"]["isolated_labels"] == "no batch_key was given"
    assert "confounder" not in labels.columns.get_level_values(0)

    batches = benchmark(adata, ["perfect"], "batch")
    assert batches["batch"].notna().loc["perfect"].to_dict() == {
        "bras": False,
        "silhouette_batch": False,
        "ilisi": True,
        "kbet": False,
        "graph_connectivity": False,
        "pcr_comparison": True,
    }
    assert np.isnan(batches["aggregate", "total_scib"].item())
    assert batches.attrs["absent"]["total_scib"] == "there is no metric of bio"
    assert batches.attrs["absent"]["bio"] == "all its metrics are absent"


def test_one_batch_is_no_crash(adata):
    single = adata.copy()
    single.obs["batch"] = "s1"
    table = benchmark(single, ["perfect"], "batch", "type")
    assert table["bio"].notna().loc["perfect"].sum() == 4
    assert table.attrs["absent"]["ilisi"] == "there is 1 batch"
    assert table.attrs["absent"]["I(z,batch)"] == "obs['batch'] takes one value"
    missing = table.columns[table.isna().all()].get_level_values(1)
    assert set(missing) <= set(table.attrs["absent"])


def test_no_unintegrated_embedding_leaves_the_comparison_out(adata, table):
    bare = adata.copy()
    del bare.obsm["X_pca"]
    found = benchmark(bare, ["perfect"], "batch")
    assert "give unintegrated_key" in found.attrs["absent"]["pcr_comparison"]
    assert found["aggregate", "batch"].item() == table.loc["perfect", ("batch", "ilisi")]
    named = benchmark(bare, ["perfect"], "batch", unintegrated_key="batch_only")
    assert named.loc["perfect", ("batch", "pcr_comparison")] > 0.9
    assert named.attrs["unintegrated_key"] == "batch_only"


def test_a_metric_that_fails_for_one_embedding_takes_its_totals(adata, table, monkeypatch):
    calls = []

    def fails_first(*arguments, seed):
        calls.append(arguments)
        if len(calls) == 1:
            raise ArpackNoConvergence("no", np.empty(0), np.empty((0, 0)))
        return {0: 0.5}

    monkeypatch.setattr(_scib, "kbet_by_label", fails_first)
    found = benchmark(adata, ["perfect", "random"], "batch", "type")
    assert found["batch", "kbet"].isna().tolist() == [True, False]
    assert found["aggregate", "total_scib"].isna().tolist() == [True, False]
    assert found["aggregate", "bio"].notna().all()
    assert found.attrs["absent"] == {"perfect: kbet": "the diffusion map of a label did not converge"}


def test_no_batch_effect_to_begin_with_leaves_no_comparison(adata, monkeypatch):
    import scib_metrics

    def explains_nothing(*_, categorical):
        return 0.0 if not categorical else 1 / 0

    monkeypatch.setattr(scib_metrics, "pcr_comparison", explains_nothing)
    found = benchmark(adata, ["perfect"], "batch")
    assert np.isnan(found["batch", "pcr_comparison"].item())
    reason = "the batch explains nothing of the unintegrated embedding"
    assert found.attrs["absent"]["perfect: pcr_comparison"] == reason
    assert found["aggregate", "batch"].item() == found["batch", "ilisi"].item()


def test_mudata_is_read_like_anndata(adata, table):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mdata = MuData({"rna": AnnData(np.zeros((N, 1), dtype=np.float32), obs=adata.obs[[]])})
        mdata.obs["batch"] = adata.obs["batch"]
    mdata.obsm["X_pca"], mdata.obsm["perfect"] = adata.obsm["X_pca"], adata.obsm["perfect"]
    found = benchmark(mdata, ["perfect"], "batch")
    assert found.loc["perfect", ("batch", "ilisi")] == table.loc["perfect", ("batch", "ilisi")]


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        (([],), {}, ConfigError, r"embeddings is \[\]: give one or more different keys of obsm"),
        ((["X_pca", "X_pca"],), {}, ConfigError, "different keys"),
        ((["X_pc"],), {}, ConfigError, "obsm has no embedding 'X_pc'. Did you mean 'X_pca'"),
        ((["X_pca"], "bach"), {}, ConfigError, "obs has no column 'bach'. Did you mean 'batch'"),
        ((["X_pca"], None, "typ"), {}, ConfigError, "obs has no column 'typ'. Did you mean 'type'"),
        ((["X_pca"],), {"confounders": ["dept"]}, ConfigError, "obs has no column 'dept'. Did you mean 'depth'"),
        ((["X_pca"],), {"unintegrated_key": "X_lsi"}, ConfigError, "unintegrated_key is 'X_lsi', which is not in obsm"),
    ],
)
def test_unknown_keys_are_refused(adata, arguments, options, error, message):
    with pytest.raises(error, match=message):
        benchmark(adata, *arguments, **options)


def test_bad_data_are_refused(adata):
    broken = adata.copy()
    broken.obsm["bad"] = np.full((N, 2), np.nan)
    broken.obs["some"] = broken.obs["type"].where(broken.obs["type"] != "A")
    broken.obs["unknown_depth"] = broken.obs["depth"].where(broken.obs["depth"] > 3000)
    with pytest.raises(DataError, match=r"obsm\['bad'\] holds 600 NaN"):
        benchmark(broken, ["bad"])
    with pytest.raises(DataError, match=r"obs\['some'\] has 130 missing entries"):
        benchmark(broken, ["X_pca"], label_key="some")
    with pytest.raises(DataError, match=r"obs\['unknown_depth'\] cannot be used as a confounder: c holds"):
        benchmark(broken, ["X_pca"], confounders=["unknown_depth"])
    with pytest.raises(DataError, match="There are 20 cells"):
        benchmark(adata[:20].copy(), ["X_pca"])


def test_the_two_sets_are_those_of_the_benchmark(adata, table):
    for call, total in ((scib_convnet, "total_convnet"), (scib_default, "total_scib")):
        found = call(adata, ["perfect", "random"], "batch", "type")
        flat = table.droplevel("group", axis=1)
        np.testing.assert_allclose(found["overall"], flat.loc[["perfect", "random"], total])
        bio, batch = table.attrs["aggregates"][total].values()
        assert list(found) == [*bio, *batch, "bio", "batch", "overall"]
        np.testing.assert_allclose(found["bio"], flat.loc[["perfect", "random"], bio].mean(axis=1))
        np.testing.assert_allclose(found["batch"], flat.loc[["perfect", "random"], batch].mean(axis=1))
        assert found.attrs["n_cells"] == N


def test_the_two_sets_refuse_what_is_not_defined(adata, monkeypatch):
    single = adata.copy()
    single.obs["batch"] = "s1"
    with pytest.raises(DataError, match=r"'silhouette_batch' is not defined: there is 1 batch\. `benchmark`"):
        scib_convnet(single, ["perfect"], "batch", "type")
    bare = adata.copy()
    del bare.obsm["X_pca"]
    with pytest.raises(DataError, match="'pcr_comparison' is not defined: no unintegrated embedding"):
        scib_default(bare, ["perfect"], "batch", "type")
    monkeypatch.setattr(_scib, "kbet_by_label", lambda *_, seed: {0: np.nan})
    with pytest.warns(RuntimeWarning), pytest.raises(DataError, match="'kbet' is not defined: the diffusion map"):
        scib_convnet(adata, ["perfect"], "batch", "type")
