"""Expresser on real human blood cells: imputation of dropped values, and vectors of genes.

    uv run python benchmarks/quality.py expresser --seeds 5
    uv run python benchmarks/quality.py expresser --sets worm bladder --seeds 5

Blood: PBMC 3k, Kang (control and stimulated) and the bone marrow starter are joined (``pp.union_genes``) and trained on
together. Worm neurons and mouse bladder are sets of their own. A fifth of the cells is held out. "Imputation": 10 % of
the non-zero entries of held-out cells are dropped and predicted, against predictors without a network that are told the
same entries; the truth is normalised by the observed entries, so that no method sees what was dropped. "Genes" (blood
alone): pairs that interact, tolerance of loss of function, and dosage-sensitive transcription factors, from the vectors
of genes, against loadings on principal components and mean with detection rate. Each seed and method is run once and
kept as JSON under ``results/quality/expresser``, of the other sets in folders beside it. The data are found through
EPIVI_TEST_DATA (default ../shared/data).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import anndata as ad
import numpy as np
import pandas as pd
from _common import QUIET, quiet
from quality import DATA, markdown
from scipy import sparse

BLOOD = "blood"
SETS = {
    BLOOD: {"pbmc3k": "pbmc3k_rna", "kang": "kang2018_pbmc_ifnb_rna", "bmmc": "bmmc_multiome_starter_rna_only"},
    "worm": {"worm": "worm_neuron_rna"},
    "bladder": {"bladder": "mouse_bladder_rna"},
}
DROPPED, TEST_SHARE, SCALE = 0.1, 0.2, 1e4
MIN_SHARE_OF_CELLS = 0.01
N_NEIGHBORS = 15
NETWORK = {"size": "tutorial", "n_layers": 1, "width": 48, "max_genes": 96, "mask_rate": 0.3}
TRAINING = {"batch_size": 16, "lr": 6e-3}
FORMS: dict[str, dict[str, Any]] = {
    "Expresser": {},
    "Expresser, without decoder": {"decoder": "encoder"},
    "Expresser, random start": {"gene_init": "random"},
}
PAIRS_AT_MOST = 20_000


class Fold(NamedTuple):
    """Joined data, training and test cells, and which entries of the test cells are dropped."""

    adata: ad.AnnData
    train: np.ndarray
    test: np.ndarray
    dropped: sparse.csr_matrix
    seed: int


def read(n_cells: int, seed: int, name: str = BLOOD) -> Fold:
    """Read, join, split, and drop."""
    import epivi

    rng = np.random.default_rng(seed)
    parts = {}
    for key, file in SETS[name].items():
        part = ad.read_h5ad(DATA / f"{file}.h5ad")
        part.var_names_make_unique()
        part = part[np.sort(rng.permutation(part.n_obs)[:n_cells])].copy()
        share_g = np.asarray((part.X > 0).mean(0)).ravel()
        parts[key] = part[:, share_g >= MIN_SHARE_OF_CELLS].copy()
    adata = epivi.pp.union_genes(parts)
    order = rng.permutation(adata.n_obs)
    cut = round(TEST_SHARE * adata.n_obs)
    test = np.sort(order[:cut])
    counts = sparse.csr_matrix(adata.X[test])
    dropped = counts.copy()
    dropped.data = (rng.random(counts.nnz) < DROPPED).astype(np.float32)
    dropped.eliminate_zeros()
    return Fold(adata, np.sort(order[cut:]), test, dropped, seed)


def observed(fold: Fold) -> sparse.csr_matrix:
    """Return the counts of the test cells without the dropped ones."""
    counts = sparse.csr_matrix(fold.adata.X[fold.test], dtype=np.float64)
    kept = counts - counts.multiply(fold.dropped)
    kept.eliminate_zeros()
    return sparse.csr_matrix(kept)


def normal(counts: Any, total_n: np.ndarray) -> sparse.csr_matrix:
    """Return log(1 + 1e4 x / total)."""
    values = sparse.diags(SCALE / np.maximum(total_n, 1.0)) @ sparse.csr_matrix(counts, dtype=np.float64)
    values = sparse.csr_matrix(values)
    values.data = np.log1p(values.data)
    return values


def truth(fold: Fold) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return cell, gene and value of the dropped entries."""
    total_n = np.asarray(observed(fold).sum(1)).ravel()
    full = normal(fold.adata.X[fold.test], total_n)
    at = fold.dropped.tocoo()
    return at.row, at.col, np.asarray(full[at.row, at.col]).ravel()


def scores(fold: Fold, predicted_o: np.ndarray) -> dict[str, float]:
    """MAE, Pearson, and the means of the correlations within cells and within genes (of 10 entries or more)."""
    cell_o, gene_o, true_o = truth(fold)
    table = pd.DataFrame({"cell": cell_o, "gene": gene_o, "truth": true_o, "predicted": predicted_o})

    def within(key: str) -> float:
        found = [g["truth"].corr(g["predicted"]) for _, g in table.groupby(key) if len(g) >= 10]
        return float(np.nanmean(found))

    return {
        "MAE": float(np.abs(true_o - predicted_o).mean()),
        "Pearson": float(np.corrcoef(true_o, predicted_o)[0, 1]),
        "within cell": within("cell"),
        "within gene": within("gene"),
    }


def gene_means(fold: Fold) -> tuple[sparse.csr_matrix, np.ndarray]:
    """Return the normalised training cells and each gene's mean over its non-zero values."""
    counts = sparse.csr_matrix(fold.adata.X[fold.train])
    values = normal(counts, np.asarray(counts.sum(1)).ravel())
    sums, n = np.asarray(values.sum(0)).ravel(), np.bincount(values.indices, minlength=values.shape[1])
    return values, np.where(n > 0, sums / np.maximum(n, 1), sums.sum() / max(n.sum(), 1))


def additive(fold: Fold, *, shift: bool) -> np.ndarray:
    """Gene mean, plus the mean difference of the cell's observed values from it."""
    cell_o, gene_o, _ = truth(fold)
    _, mean_g = gene_means(fold)
    if not shift:
        return mean_g[gene_o]
    counts = observed(fold)
    seen = normal(counts, np.asarray(counts.sum(1)).ravel()).tocoo()
    difference = np.bincount(seen.row, seen.data - mean_g[seen.col], minlength=counts.shape[0])
    n = np.bincount(seen.row, minlength=counts.shape[0])
    return mean_g[gene_o] + (difference / np.maximum(n, 1))[cell_o]


def neighbours(fold: Fold, *, zeros: bool) -> np.ndarray:
    """Mean over the 15 nearest training cells by principal components, over non-zero values or with zeros."""
    from sklearn.decomposition import TruncatedSVD
    from sklearn.neighbors import NearestNeighbors

    values, mean_g = gene_means(fold)
    counts = observed(fold)
    seen = normal(counts, np.asarray(counts.sum(1)).ravel())
    svd = TruncatedSVD(30, random_state=fold.seed).fit(values)
    index = NearestNeighbors(n_neighbors=N_NEIGHBORS).fit(svd.transform(values))
    near = index.kneighbors(svd.transform(seen), return_distance=False)
    n = near.shape[0]
    weights = sparse.csr_matrix(
        (np.ones(near.size), near.ravel(), np.arange(n + 1) * N_NEIGHBORS), shape=(n, values.shape[0])
    )
    cell_o, gene_o, _ = truth(fold)
    sums_o = np.asarray((weights @ values)[cell_o, gene_o]).ravel()
    if zeros:
        return sums_o / N_NEIGHBORS
    n_o = np.asarray((weights @ (values > 0).astype(float))[cell_o, gene_o]).ravel()
    return np.where(n_o > 0, sums_o / np.maximum(n_o, 1), mean_g[gene_o])


def scvi_means(fold: Fold) -> np.ndarray:
    """Means of scVI at the observed library size, fitted on the training cells."""
    import scvi

    train = fold.adata[fold.train].copy()
    scvi.settings.seed = fold.seed
    scvi.model.SCVI.setup_anndata(train, batch_key="dataset")
    model = scvi.model.SCVI(train)
    model.train(max_epochs=30, accelerator="cpu", **QUIET)
    query = fold.adata[fold.test].copy()
    query.X = observed(fold).astype(np.float32)
    means = model.get_normalized_expression(query, library_size=SCALE, return_numpy=True)
    cell_o, gene_o, _ = truth(fold)
    return np.log1p(means[cell_o, gene_o])


def expresser(fold: Fold, epochs: int, **options: Any) -> tuple[np.ndarray, pd.DataFrame]:
    """Return predictions of the dropped entries, and the static vectors of the genes."""
    import epivi

    train = fold.adata[fold.train].copy()
    epivi.Expresser.setup_anndata(train)
    model = epivi.Expresser(train, seed=fold.seed, **NETWORK | options)
    model.train(max_epochs=epochs, **TRAINING, **QUIET)
    query = fold.adata[fold.test].copy()
    imputed = model.impute(query, mask=fold.dropped.astype(bool))
    cell_o, gene_o, _ = truth(fold)
    at = imputed.var_names.get_indexer(fold.adata.var_names)
    return np.asarray(imputed.X[cell_o, at[gene_o]]).ravel(), model.get_gene_embeddings()


def gene_tasks(fold: Fold, vectors: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """Return the scores of the three tasks for all sets of features, on the same genes and splits."""
    from epivi.metrics import gene_baselines, gene_classification_task, gene_pair_task, gene_regression_task

    width = next(iter(vectors.values())).shape[1]
    train = sparse.csr_matrix(fold.adata.X[fold.train])
    features = gene_baselines(train, list(fold.adata.var_names), n_components=width) | vectors
    folder = DATA.parent / "gene"
    pairs = pd.read_csv(
        folder / "gene2vec_ggipnn_train.txt.gz",
        sep=r"\s+",
        header=None,
        keep_default_na=False,
        names=["gene_a", "gene_b", "label"],
    )
    known = set(fold.adata.var_names)
    pairs = pairs[pairs["gene_a"].isin(known) & pairs["gene_b"].isin(known)]
    pairs = pairs.sample(min(len(pairs), PAIRS_AT_MOST), random_state=fold.seed)
    constraint = pd.read_csv(folder / "gnomad_v2_constraint_train_valid.tsv.gz", sep="\t").drop_duplicates("gene")
    lof = constraint.set_index("gene")["lof_z"].dropna()
    dosage = pd.read_csv(folder / "dosage_sens_tf_labels.csv.gz").drop_duplicates("gene_name").set_index("gene_name")
    labels = (dosage["dosage_sensitive"] == "Yes").astype(int)
    tables = {
        "pairs": gene_pair_task(features, pairs, seed=fold.seed),
        "LoF": gene_regression_task(features, lof, model="ridge", seed=fold.seed),
        "dosage": gene_classification_task(features, labels, model="logistic", seed=fold.seed),
    }
    return pd.concat(tables, names=["task"])


def genes_table(tables: list[pd.DataFrame]) -> str:
    """Mean and standard deviation over seeds of the means over splits, a row a task and set of features."""
    every = pd.concat(tables)
    every = every[every["split"].astype(str) == "mean"]
    score = every["auroc"].fillna(every["pearson"])
    rows = every.assign(method=every["task"] + ": " + every["features"], score=score)[["method", "score"]]
    return markdown(rows.groupby("method", sort=False).agg(["mean", "std"]))


def methods(fold: Fold, epochs: int, folder: Path, wanted: list[str] | None) -> None:
    """Run the methods of a fold that have not been run."""
    plain = {
        "gene mean": lambda: additive(fold, shift=False),
        "gene mean and cell shift": lambda: additive(fold, shift=True),
        "15 neighbours, non-zeros": lambda: neighbours(fold, zeros=False),
        "15 neighbours, with zeros": lambda: neighbours(fold, zeros=True),
        "scVI": lambda: scvi_means(fold),
    }
    vectors: dict[str, pd.DataFrame] = {}
    for name in [*plain, *FORMS]:
        path = folder / f"{name.replace(' ', '_').replace(',', '')}.{fold.seed}.json"
        if path.is_file() or (wanted is not None and name not in wanted):
            continue
        start = time.process_time()
        if name in plain:
            predicted_o = plain[name]()
        else:
            predicted_o, vectors[name] = expresser(fold, epochs, **FORMS[name])
            vectors[name].to_csv(folder / f"vectors.{name.replace(' ', '_').replace(',', '')}.{fold.seed}.csv.gz")
        row = {"method": name, "seed": fold.seed, **scores(fold, predicted_o), "seconds": time.process_time() - start}
        path.write_text(json.dumps(row, indent=1))
        print(json.dumps(row), flush=True)
    path = folder / f"genes.{fold.seed}.csv"
    if "Expresser" in vectors and fold.adata.obs["dataset"].cat.categories.size > 1:
        gene_tasks(fold, vectors).to_csv(path)


def main() -> int:
    """Run all methods on all seeds and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", default="expresser")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--sets", nargs="+", choices=list(SETS), default=list(SETS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--cells", type=int, default=2700, help="most cells of each data set")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--methods", nargs="+", default=None)
    parser.add_argument("--results", type=Path, default=Path("results/quality/expresser"))
    chosen = parser.parse_args()
    quiet(chosen.threads)
    for name in chosen.sets:
        folder = chosen.results if name == BLOOD else chosen.results.with_name(f"{chosen.results.name}_{name}")
        folder.mkdir(parents=True, exist_ok=True)
        for seed in range(chosen.seeds):
            methods(read(chosen.cells, seed, name), chosen.epochs, folder, chosen.methods)
        rows = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
        table = pd.DataFrame(rows).drop(columns="seed").groupby("method", sort=False).agg(["mean", "std"])
        (folder / "imputation.md").write_text(markdown(table))
        print(name, markdown(table), sep="\n", flush=True)
        if genes := [pd.read_csv(path) for path in sorted(folder.glob("genes.*.csv"))]:
            (folder / "genes.md").write_text(genes_table(genes))
            print(genes_table(genes), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
