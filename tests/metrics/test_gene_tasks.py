"""Gene tasks on planted structure, against scikit-learn, and against what they must not be fooled by."""

import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_matrix
from sklearn.decomposition import PCA

from epivi._errors import ConfigError, DataError
from epivi.metrics import gene_baselines, gene_classification_task, gene_pair_task, gene_regression_task

DATA = Path(os.environ.get("EPIVI_TEST_DATA", "../shared/data"))
N = 80


@pytest.fixture(scope="module")
def planted():
    """Genes in four modules, an embedding that shows them, one that does not, and all pairs (in a module or not)."""
    rng = np.random.default_rng(0)
    genes = [f"gene{i:02d}" for i in range(N)]
    module = rng.integers(4, size=N)
    knows = pd.DataFrame(3 * np.eye(4)[module] + 0.5 * rng.normal(size=(N, 4)), index=genes)
    noise = pd.DataFrame(rng.normal(size=(N, 4)), index=genes)
    a, b = np.triu_indices(N, k=1)
    pairs = pd.DataFrame({"gene_a": np.take(genes, a), "gene_b": np.take(genes, b), "label": module[a] == module[b]})
    return {"knows": knows, "noise": noise}, pairs


@pytest.fixture(scope="module")
def by_gene(planted):
    return gene_pair_task(*planted)


def mean(table, features, score, model="logistic"):
    return table.loc[(features, model, "mean"), score]


def test_modules_are_found_and_noise_is_at_chance(by_gene):
    assert mean(by_gene, "knows", "auroc") > 0.95
    assert abs(mean(by_gene, "noise", "auroc") - 0.5) < 0.1
    assert mean(by_gene, "gene_degree", "auroc", "none") == 0.5
    assert mean(by_gene, "knows", "auprc") > mean(by_gene, "noise", "auprc") + 0.4
    assert by_gene.attrs["n_genes"] == N
    assert by_gene.attrs["n_pairs"] == N * (N - 1) / 2


def test_table_has_mean_and_spread_over_splits(by_gene):
    assert by_gene.index.names == ["features", "model", "split"]
    rows = by_gene.loc[("knows", "logistic")]
    assert rows.index.tolist() == ["0", "1", "2", "3", "4", "mean", "sd"]
    folds = rows.loc[["0", "1", "2", "3", "4"]]
    pd.testing.assert_series_equal(rows.loc["mean"], folds.mean(), check_names=False)
    pd.testing.assert_series_equal(rows.loc["sd"], folds.std(ddof=1), check_names=False)
    # 16 genes a fold: pairs within it are tested, pairs within the other 64 trained on
    assert (folds["n_test"] == 16 * 15 / 2).all()
    assert (folds["n_train"] == 64 * 63 / 2).all()
    for features in ("noise", "gene_degree"):
        assert by_gene.xs(features, level="features")["n_test"].tolist() == rows["n_test"].tolist()


def test_random_pairs_reward_knowing_the_degree_of_a_gene_and_disjoint_genes_do_not():
    rng = np.random.default_rng(1)
    genes = [f"g{i}" for i in range(100)]
    hub = rng.random(100)
    a, b = np.triu_indices(100, k=1)
    label = rng.random(len(a)) < 0.8 * np.maximum(hub[a], hub[b]) ** 2
    pairs = pd.DataFrame({"gene_a": np.take(genes, a), "gene_b": np.take(genes, b), "label": label})
    identity = pd.DataFrame(rng.normal(size=(100, 60)), index=genes)  # says who a gene is and nothing about it
    by_pair = gene_pair_task(identity, pairs, split="pair", features="concatenated")
    by_gene = gene_pair_task(identity, pairs, split="gene", features="concatenated")
    assert mean(by_pair, "gene_degree", "auroc", "none") > 0.7
    assert mean(by_pair, "embedding", "auroc") > 0.65
    assert mean(by_gene, "gene_degree", "auroc", "none") == 0.5
    assert abs(mean(by_gene, "embedding", "auroc") - 0.5) < 0.06
    assert by_pair.loc[("embedding", "logistic")].loc[["0", "1", "2", "3", "4"], "n_test"].sum() == len(pairs)


@pytest.mark.parametrize("features", ["symmetric", "concatenated"])
def test_order_of_pairs_of_genes_and_within_pairs_does_not_matter(planted, features):
    frames, pairs = planted
    rng = np.random.default_rng(0)
    swap = rng.random(len(pairs)) < 0.5
    swapped = pairs.assign(
        gene_a=np.where(swap, pairs["gene_b"], pairs["gene_a"]), gene_b=np.where(swap, pairs["gene_a"], pairs["gene_b"])
    ).sample(frac=1.0, random_state=0)
    frame = frames["knows"]
    first = gene_pair_task(frame, pairs, n_splits=2, features=features)
    second = gene_pair_task(frame.sample(frac=1.0, random_state=1), swapped, n_splits=2, features=features)
    pd.testing.assert_frame_equal(first, second)
    other = gene_pair_task(frame, pairs, n_splits=2, features=features, seed=1)
    assert not first.equals(other)


def test_given_split_and_boosting(planted):
    frames, pairs = planted
    number = pairs[["gene_a", "gene_b"]].apply(lambda names: names.str[4:].astype(int))
    part = np.where((number < 60).all(axis=1), "train", np.where((number >= 60).all(axis=1), "test", "neither"))
    table = gene_pair_task(frames["knows"], pairs, split=part, model=["logistic", "boosting"])
    assert table.index.get_level_values("split").tolist() == ["0", "mean", "sd"] * 3
    assert table.loc[("embedding", "boosting", "0"), "n_test"] == 20 * 19 / 2
    assert table.loc[("embedding", "logistic", "0"), "n_train"] == 60 * 59 / 2
    assert mean(table, "embedding", "auroc", "boosting") > 0.9
    assert table.xs("sd", level="split").isna().all().all()
    assert table.attrs["split"] == "given"


def test_unusable_pairs_are_left_out_and_counted(planted, by_gene):
    frames, pairs = planted
    extra = pd.DataFrame(
        {
            "gene_a": ["gene00", "gene01", "gene02", "gene03", "unknown"],
            "gene_b": ["gene00", "gene00", "gene03", "gene02", "gene00"],
            "label": [1, pairs.loc[0, "label"], 1, 0, 1],
        }
    )
    table = gene_pair_task(frames, pd.concat([pairs, extra], ignore_index=True))
    assert table.attrs["n_pairs_left_out"] == {
        "gene without embedding": 1,
        "gene with itself": 1,
        "contradicting labels": 3,
        "repeated": 1,
    }
    assert table.attrs["n_pairs"] == len(pairs) - 1


def test_only_common_genes_are_scored(planted):
    frames, pairs = planted
    table = gene_pair_task({"knows": frames["knows"].iloc[:60], "noise": frames["noise"].iloc[10:]}, pairs, n_splits=2)
    assert table.attrs["n_genes"] == 50
    assert table.attrs["n_genes_left_out"] == {"knows": 10, "noise": 20}
    assert table.attrs["n_pairs"] == 50 * 49 / 2


def test_regression_finds_a_linear_target_and_not_noise(planted):
    frames, _ = planted
    rng = np.random.default_rng(0)
    target = frames["knows"] @ [1.0, -1.0, 2.0, 0.0] + 0.1 * rng.normal(size=N)
    table = gene_regression_task(frames, target, model=("ridge", "boosting", "linear"))
    assert mean(table, "knows", "pearson", "ridge") > 0.98
    assert mean(table, "knows", "r2", "linear") > 0.95
    assert mean(table, "knows", "spearman", "boosting") > 0.7
    assert mean(table, "noise", "pearson", "ridge") < 0.35
    assert mean(table, "noise", "r2", "ridge") < 0.1
    folds = table.loc[("knows", "ridge")].drop(["mean", "sd"])
    assert folds["n_test"].sum() == N
    assert (folds["n_train"] + folds["n_test"] == N).all()


def test_linear_model_equals_least_squares(planted):
    frames, _ = planted
    frame, target = frames["noise"], frames["knows"][0]
    table = gene_regression_task(frame, target, model="linear", n_splits=2, seed=3)
    from sklearn.model_selection import KFold

    for split, (train, test) in enumerate(KFold(2, shuffle=True, random_state=3).split(target)):
        x = np.column_stack([np.ones(N), frame])
        beta = np.linalg.lstsq(x[train], target.to_numpy()[train], rcond=None)[0]
        expected = np.corrcoef(x[test] @ beta, target.to_numpy()[test])[0, 1]
        assert table.loc[("embedding", "linear", str(split)), "pearson"] == pytest.approx(expected)


def test_order_and_missing_genes_of_a_target(planted):
    frames, _ = planted
    target = frames["knows"][0]
    first = gene_regression_task(frames["noise"], target, model="ridge")
    more = pd.concat([target.sample(frac=1.0, random_state=0), pd.Series({"other": 1.0, "none": np.nan})])
    second = gene_regression_task(frames["noise"], more, model="ridge")
    pd.testing.assert_frame_equal(first, second)
    assert second.attrs["n_genes_left_out"] == {"embedding": 0, "without a value": 1, "without an embedding": 1}
    assert second.attrs["n_genes"] == N


def test_constant_features_predict_the_mean(planted):
    frames, _ = planted
    flat = pd.DataFrame({"one": 1.0}, index=frames["noise"].index)
    table = gene_regression_task(flat, frames["knows"][0])
    assert table["pearson"].isna().all()
    assert (table.xs("mean", level="split")["r2"] <= 0).all()
    assert mean(gene_classification_task(flat, frames["knows"][0] > 1), "embedding", "auroc") == 0.5


def test_classification_and_its_note_on_leakage(planted, caplog):
    frames, _ = planted
    sensitive = frames["knows"][0] > 1
    leaking = pd.DataFrame({"pLI": sensitive.astype(float)}, index=sensitive.index)
    table = gene_classification_task({**frames, "constraint": leaking}, sensitive)
    for model in ("logistic", "boosting"):
        assert mean(table, "knows", "auroc", model) > 0.9
        assert abs(mean(table, "noise", "auroc", model) - 0.5) < 0.25
    assert mean(table, "constraint", "auroc") == 1.0
    assert table["share_positive"].drop("sd", level="split").sub(sensitive.mean()).abs().max() < 0.05
    assert "pLI alone reaches" in table.attrs["note"]
    assert table.attrs["leaking"] == {"constraint": ["pLI"]}
    assert "Features that leak dosage labels: {'constraint': ['pLI']}" in caplog.text
    other = gene_classification_task(frames, sensitive, task="other", model="logistic")
    assert "note" not in other.attrs
    assert other.attrs["task"] == "other"


def counts(n=120, g=30):
    rng = np.random.default_rng(0)
    program = rng.random((n, 2)) @ rng.gamma(0.5, 4.0, size=(2, g))
    x = rng.poisson(program)
    x[3] = 0
    return x


def test_baselines_equal_numpy_and_sklearn():
    x = counts()
    names = [f"g{i}" for i in range(30)]
    frames = gene_baselines(csr_matrix(x), names, n_components=4)
    depth = np.where(x.sum(axis=1) > 0, x.sum(axis=1), 1)
    normalised = 1e4 * x / depth[:, None]
    np.testing.assert_allclose(frames["mean_detection"]["detection"], (x > 0).mean(axis=0))
    np.testing.assert_allclose(frames["mean_detection"]["log_mean"], np.log1p(normalised.mean(axis=0)))
    pca = PCA(4, svd_solver="full").fit(np.log1p(normalised))
    expected = pca.components_.T * np.sqrt(pca.explained_variance_)
    found = frames["pca_loadings"].to_numpy()
    np.testing.assert_allclose(np.abs(found), np.abs(expected), atol=1e-8)
    dense = gene_baselines(x, names, n_components=4)
    pd.testing.assert_frame_equal(frames["pca_loadings"], dense["pca_loadings"])
    assert frames["pca_loadings"].index.tolist() == names


def test_all_loadings_give_the_covariance():
    x = counts(400, 6)
    loadings = gene_baselines(x, list("abcdef"), n_components=5)["pca_loadings"].to_numpy()
    depth = np.where(x.sum(axis=1) > 0, x.sum(axis=1), 1)
    covariance = np.cov(np.log1p(1e4 * x / depth[:, None]).T)
    values = np.linalg.eigvalsh(covariance)
    np.testing.assert_allclose(np.linalg.norm(loadings @ loadings.T - covariance), values[0], rtol=1e-6)


def test_counts_are_not_modified():
    x = csr_matrix(counts().astype(np.float64))
    before = x.copy()
    gene_baselines(x, [str(i) for i in range(30)], n_components=2)
    assert (x != before).nnz == 0


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"embeddings": {}}, DataError, "embeddings is empty"),
        ({"embeddings": {"x": [[1.0]]}}, DataError, "The embedding 'x' is a list, expected a DataFrame"),
        ({"embeddings": pd.DataFrame()}, DataError, r"The embedding 'embedding' is of shape \(0, 0\)"),
        ({"embeddings": pd.DataFrame({"v": [1.0, 2.0]}, index=["a", "a"])}, DataError, "repeats 1 genes, the first"),
        ({"embeddings": pd.DataFrame({"v": ["x"]}, index=["a"])}, DataError, "columns that are not numeric"),
        (
            {"embeddings": pd.DataFrame({"v": [np.nan]}, index=["a"])},
            DataError,
            "The embedding 'embedding' holds 1 NaN",
        ),
        (
            {
                "embeddings": {
                    "x": pd.DataFrame({"v": [1.0]}, index=["a"]),
                    "y": pd.DataFrame({"v": [1.0]}, index=["b"]),
                }
            },
            DataError,
            "No gene is in all of the embeddings 'x', 'y'",
        ),
        ({"features": "sum"}, ConfigError, "features is 'sum'"),
        ({"model": "svm"}, ConfigError, "model is 'svm'"),
        ({"model": ()}, ConfigError, "model is empty"),
        ({"split": "genes"}, ConfigError, "split is 'genes'. Did you mean 'gene'"),
        ({"split": ["train"]}, ConfigError, r"split has shape \(1,\), expected 'train' or 'test' for each of the 3160"),
        ({"n_splits": 1}, ConfigError, "n_splits is 1, expected an integer of at least 2"),
        ({"n_splits": 60}, DataError, "Split .* has .* training pairs of 2 classes and 0 test pairs"),
    ],
)
def test_bad_pair_tasks_are_refused(planted, change, error, message):
    arguments = {"embeddings": planted[0], "pairs": planted[1], **change}
    with pytest.raises(error, match=message):
        gene_pair_task(**arguments)


def test_bad_pairs_are_refused(planted):
    frames, pairs = planted
    with pytest.raises(DataError, match="pairs has no column 'gene_a'"):
        gene_pair_task(frames, pairs.rename(columns={"gene_a": "gene_1"}))
    with pytest.raises(DataError, match=r"The column 'label' of pairs holds \['yes'\]"):
        gene_pair_task(frames, pairs.assign(label="yes"))
    with pytest.raises(DataError, match="Of 3160 pairs 3160 can be used, with 1 of the two classes"):
        gene_pair_task(frames, pairs.assign(label=1))
    with pytest.raises(DataError, match="Of 3160 pairs 0 can be used"):
        gene_pair_task(frames, pairs.assign(gene_a="unknown"))


def test_bad_targets_are_refused(planted):
    frame = planted[0]["noise"]
    target = frame[0]
    with pytest.raises(DataError, match="target is a list, expected a pandas Series"):
        gene_regression_task(frame, target.tolist())
    with pytest.raises(DataError, match="target repeats 80 genes, the first is 'gene00'"):
        gene_regression_task(frame, pd.concat([target, target]))
    with pytest.raises(DataError, match="target holds values of type"):
        gene_regression_task(frame, target.astype(str))
    with pytest.raises(DataError, match="target holds 0 NaN and 80 infinite values"):
        gene_regression_task(frame, target * np.inf)
    with pytest.raises(DataError, match="target has 3 genes with an embedding and 3 different values, too few for 5"):
        gene_regression_task(frame, target.iloc[:3])
    with pytest.raises(DataError, match=r"labels holds \[.*\], expected 0 and 1 or Booleans"):
        gene_classification_task(frame, target)
    with pytest.raises(DataError, match="labels has 1 genes of the rarer class with an embedding, fewer than the 5"):
        gene_classification_task(frame, target == target.max())
    with pytest.raises(ConfigError, match="task is 'dose'"):
        gene_classification_task(frame, target > 0, task="dose")


def test_bad_counts_are_refused():
    x, names = counts(), [str(i) for i in range(30)]
    with pytest.raises(DataError, match="gene_names has 29 names, 29 of them different, for 30 columns"):
        gene_baselines(x, names[1:])
    with pytest.raises(DataError, match="counts holds negative, NaN or infinite values"):
        gene_baselines(-x, names)
    with pytest.raises(DataError, match="counts is constant: all 120 cells"):
        gene_baselines(np.ones_like(x), names, n_components=2)
    with pytest.raises(ConfigError, match="n_components is 0, expected a positive integer"):
        gene_baselines(x, names, n_components=0)
    with pytest.raises(ConfigError, match="n_components is 30, but 120 cells and 30 genes allow at most 29"):
        gene_baselines(x, names, n_components=30)


@pytest.mark.realdata
def test_constraint_predicts_dosage_labels_almost_perfectly():
    if not (DATA / "gene").is_dir():
        pytest.skip("test data not found: set EPIVI_TEST_DATA (missing gene/)")
    labels = pd.read_csv(DATA / "gene/dosage_sens_tf_labels.csv.gz").drop_duplicates("gene_name")
    labels = labels.set_index("gene_name")
    sensitive = (labels["dosage_sensitive"] == "Yes").astype(int)
    constraint = pd.read_csv(DATA / "gene/gnomad_v2_constraint_train_valid.tsv.gz", sep="\t").drop_duplicates("gene")
    constraint = constraint.set_index("gene").dropna(subset=["pLI", "cds_length", "lof_z"])
    frames = {"pLI": constraint[["pLI"]], "length": np.log(constraint[["cds_length"]])}
    table = gene_classification_task(frames, sensitive, model="logistic")
    assert mean(table, "pLI", "auroc") > 0.97
    assert mean(table, "length", "auroc") < 0.8
    lof = gene_regression_task(frames["length"], constraint["lof_z"], model="boosting")
    assert mean(lof, "embedding", "pearson", "boosting") > 0.5
