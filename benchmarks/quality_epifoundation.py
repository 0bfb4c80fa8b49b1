"""EpiFoundation on real data: cell types of snATAC-seq, and expression from accessibility in two multiomes.

    uv run python benchmarks/quality.py epifoundation --seeds 5

Annotation: ``preissl2018_forebrain_atac``, 80 % of the cells to train on, stratified, against k nearest neighbours and
logistic regression on LSI. Expression: ``snareseq_mouse_cortex`` (cells of at least 100 peak counts) and
``scicar_a549``, 80 % of the cells, against gene activity and ridge regression on LSI; values are log-normalised counts.
Everything, LSI too, is fitted on the training cells alone. A seed is a split and the seed of the model. Each method and
seed is run once and kept as JSON under ``results/quality/epifoundation``; delete a file to run it again. The data are
found through EPIVI_TEST_DATA (default ../shared/data).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import anndata as ad
import mudata as md
import numpy as np
import pandas as pd
from _common import QUIET, quiet
from quality import DATA, markdown
from scipy import sparse

if TYPE_CHECKING:
    from collections.abc import Callable

ANNOTATION = "preissl2018_forebrain_atac"
EXPRESSION = ("snareseq_mouse_cortex", "scicar_a549")
MIN_COUNTS = {"snareseq_mouse_cortex": 100}
TEST_SHARE = 0.2
NETWORK = {
    "size": "tutorial",
    "width": 64,
    "n_layers": 1,
    "n_heads": 2,
    "n_hidden": 64,
    "max_genes": 2000,
    "max_peaks": 512,
}
PRETRAINING_EPOCHS = 10
LABELS = {"max_epochs": 20}
GENES = {"max_epochs": 10, "lr": 1e-4}
N_COMPONENTS = (10, 50)
RIDGE_PENALTY = 1000.0


class Fold(NamedTuple):
    """Training and test cells of one split."""

    data: Any
    train: np.ndarray
    test: np.ndarray
    seed: int


def lsi_features(matrix: Any, train: np.ndarray, n_comps: int) -> np.ndarray:
    """Return LSI coordinates fitted on the training cells, standardised over them, shape (n, n_comps)."""
    from sklearn.utils.extmath import randomized_svd

    open_np = sparse.csr_matrix(matrix > 0, dtype=np.float64)
    share_np = sparse.diags(1.0 / np.maximum(np.asarray(open_np.sum(1)).ravel(), 1.0)) @ open_np
    idf_p = train.size / np.maximum(np.asarray(open_np[train].sum(0)).ravel(), 1.0)
    tfidf_np = (share_np @ sparse.diags(idf_p)).tocsr()
    tfidf_np.data = np.log1p(1e4 * tfidf_np.data)
    _, _, loadings = randomized_svd(tfidf_np[train], n_comps, random_state=0)
    z_nd = tfidf_np @ loadings.T
    return (z_nd - z_nd[train].mean(0)) / z_nd[train].std(0)


def lognormal(counts: Any) -> np.ndarray:
    """Return log(1 + 1e4 x / sum x), shape (n, genes)."""
    counts = sparse.csr_matrix(counts, dtype=np.float64)
    total_n = np.maximum(np.asarray(counts.sum(1)).ravel(), 1.0)
    return np.log1p((sparse.diags(1e4 / total_n) @ counts).toarray())


# ---------------------------------------------------------------------------------------------------------------------
# annotation


def read_annotation(seed: int) -> Fold:
    """Read the cells and split them, cell types in proportion."""
    from sklearn.model_selection import StratifiedShuffleSplit

    adata = ad.read_h5ad(DATA / f"{ANNOTATION}.h5ad")
    adata.obs["cell_type"] = adata.obs["cell_type"].astype(str)
    split = StratifiedShuffleSplit(1, test_size=TEST_SHARE, random_state=seed)
    train, test = next(split.split(adata.obs, adata.obs["cell_type"]))
    return Fold(adata, np.sort(train), np.sort(test), seed)


def label_scores(fold: Fold, probability_nk: Any, classes: Any) -> dict[str, float]:
    """Accuracy, F1, ROC-AUC and calibration on the test cells."""
    from epivi.metrics import annotation_scores

    truth = fold.data.obs["cell_type"].to_numpy()[fold.test]
    found = annotation_scores(truth, np.asarray(probability_nk), classes=list(classes))
    return {name: float(found[name]) for name in ("accuracy", "f1_macro", "f1_micro", "roc_auc_macro", "ece")}


def classifier(fold: Fold, z_nd: np.ndarray, model: Any) -> dict[str, float]:
    """Fit a classifier of scikit-learn on vectors."""
    labels = fold.data.obs["cell_type"].to_numpy()
    model.fit(z_nd[fold.train], labels[fold.train])
    return label_scores(fold, model.predict_proba(z_nd[fold.test]), model.classes_)


def knn_on_lsi(fold: Fold) -> dict[str, float]:
    """15 nearest neighbours in 20 components, the best number for them."""
    from sklearn.neighbors import KNeighborsClassifier

    return classifier(fold, lsi_features(fold.data.X, fold.train, 20), KNeighborsClassifier(15))


def regression_on_lsi(fold: Fold) -> dict[str, float]:
    """Logistic regression on 50 components."""
    from sklearn.linear_model import LogisticRegression

    return classifier(fold, lsi_features(fold.data.X, fold.train, 50), LogisticRegression(max_iter=5000))


def pretrained_on_peaks(fold: Fold, *, masked: bool, **options: Any) -> Any:
    """Return a model of the training cells that saw no labels."""
    import epivi

    train = fold.data[fold.train].copy()
    epivi.EpiFoundation.setup_anndata(train)
    model = epivi.EpiFoundation(train, seed=fold.seed, **NETWORK | options)
    if masked:
        model.train(max_epochs=PRETRAINING_EPOCHS, **QUIET)
    return model


def label_free(fold: Fold, *, masked: bool, **options: Any) -> dict[str, float]:
    """Logistic regression on the label-free vectors."""
    from sklearn.linear_model import LogisticRegression

    z_nd = pretrained_on_peaks(fold, masked=masked, **options).get_latent_representation(fold.data.copy())
    z_nd = (z_nd - z_nd[fold.train].mean(0)) / z_nd[fold.train].std(0)
    return classifier(fold, z_nd, LogisticRegression(max_iter=5000, C=0.1))


def fine_tuned(fold: Fold, *, masked: bool, **options: Any) -> dict[str, float]:
    """Fine-tune all weights on the labels of the training cells."""
    base = pretrained_on_peaks(fold, masked=masked, **options)
    train = fold.data[fold.train].copy()
    model = base.finetune("annotation", train, labels_key="cell_type", **LABELS, **QUIET)
    table = model.predict_labels(fold.data[fold.test].copy(), soft=True).drop(columns="entropy")
    return label_scores(fold, table, table.columns)


ANNOTATION_METHODS: dict[str, Callable[[Fold], dict[str, float]]] = {
    "kNN on LSI": knn_on_lsi,
    "logistic regression on LSI": regression_on_lsi,
    "EpiFoundation, random start": lambda fold: fine_tuned(fold, masked=False, peak_init="random"),
    "EpiFoundation, random start, masked peaks": lambda fold: fine_tuned(fold, masked=True, peak_init="random"),
    "EpiFoundation, LSI start": lambda fold: fine_tuned(fold, masked=False),
    "EpiFoundation, LSI start, masked peaks": lambda fold: fine_tuned(fold, masked=True),
    "logistic regression on label-free vectors": lambda fold: label_free(fold, masked=False),
    "logistic regression on label-free vectors, masked peaks": lambda fold: label_free(fold, masked=True),
}

# ---------------------------------------------------------------------------------------------------------------------
# expression


def read_expression(name: str, seed: int) -> Fold:
    """Read the cells and split them."""
    mdata = md.read_h5mu(DATA / f"{name}.h5mu")
    counts_n = np.asarray(mdata["atac"].X.sum(1)).ravel()
    mdata = mdata[counts_n >= MIN_COUNTS.get(name, 1)].copy()
    places = gene_places(mdata)
    for column in ("chrom", "start", "end"):
        mdata["rna"].var[column] = places[column].reindex(mdata["rna"].var_names).to_numpy()
    order = np.random.default_rng(seed).permutation(mdata.n_obs)
    n_test = round(TEST_SHARE * mdata.n_obs)
    return Fold(mdata, np.sort(order[n_test:]), np.sort(order[:n_test]), seed)


def gene_scores(fold: Fold, predicted_ng: np.ndarray) -> dict[str, float]:
    """Mean over genes of the correlations over test cells, and the mean squared error."""
    from epivi.metrics import expression_scores

    found = expression_scores(lognormal(fold.data["rna"].X[fold.test]), predicted_ng).summary
    return {name: float(found[name]) for name in ("pearson", "spearman", "mse", "n_undefined")}


def gene_activity(fold: Fold) -> dict[str, float]:
    """Peaks summed on the linked gene, or on gene body and 2 kb upstream, scaled gene by gene to the training cells."""
    import epivi

    genes = fold.data["rna"].var_names
    if "linked_gene" in fold.data["atac"].var:
        activity = epivi.tl.gene_activity(fold.data["atac"], linked_key="linked_gene")
    else:
        activity = epivi.tl.gene_activity(fold.data["atac"], hg19_genes(genes))
    found = np.zeros((fold.data.n_obs, genes.size))
    at = activity.var_names.get_indexer(genes)
    found[:, at >= 0] = (
        activity[:, at[at >= 0]].X.toarray() if sparse.issparse(activity.X) else activity[:, at[at >= 0]].X
    )
    truth = lognormal(fold.data["rna"].X)
    # a least-squares line a gene, so that its error can be compared; correlations keep their size
    x, y = found[fold.train], truth[fold.train]
    spread = np.square(x - x.mean(0)).sum(0)
    slope = np.maximum(((x - x.mean(0)) * (y - y.mean(0))).sum(0) / np.maximum(spread, 1e-12), 1e-6)
    return gene_scores(fold, y.mean(0) + slope * (found[fold.test] - x.mean(0)))


def gene_places(mdata: Any) -> pd.DataFrame:
    """Return where genes lie: the span of the peaks that the data link to them, or by symbol; NaN if unknown."""
    peaks = mdata["atac"].var
    if "linked_gene" not in peaks:
        return hg19_genes(mdata["rna"].var_names).set_index("name")
    grouped = peaks.assign(chrom=peaks["chrom"].astype(str)).groupby(peaks["linked_gene"].astype(str))
    return grouped.agg(chrom=("chrom", "first"), start=("start", "min"), end=("end", "max"))


def hg19_genes(names: pd.Index) -> pd.DataFrame:
    """Return positions of genes by symbol; strands are not known, so that 2 kb are added on both sides."""
    table = pd.read_csv(DATA.parent / "gene/gnomad_v2_constraint_train_valid.tsv.gz", sep="\t")
    table = table[table["gene"].isin(names)].drop_duplicates("gene")
    return pd.DataFrame(
        {
            "chrom": "chr" + table["chromosome"].astype(str),
            "start": np.maximum(table["start_position"] - 1 - 2000, 0),
            "end": table["end_position"],
            "name": table["gene"],
            "strand": "+",
        }
    )


def ridge_on_lsi(fold: Fold, n_comps: int) -> dict[str, float]:
    """Ridge regression on LSI."""
    from sklearn.linear_model import Ridge

    z_nd = lsi_features(fold.data["atac"].X, fold.train, n_comps)
    truth = lognormal(fold.data["rna"].X[fold.train])
    return gene_scores(fold, Ridge(RIDGE_PENALTY).fit(z_nd[fold.train], truth).predict(z_nd[fold.test]))


def epifoundation(
    fold: Fold, *, epochs: int = PRETRAINING_EPOCHS, tune: dict[str, Any] | None = None, **options: Any
) -> dict[str, float]:
    """Pretrain on the genes of the training cells, fine-tune for their expression."""
    import epivi

    train = fold.data[fold.train].copy()
    epivi.EpiFoundation.setup_mudata(train)
    model = epivi.EpiFoundation(train, seed=fold.seed, **NETWORK | options)
    if epochs:
        model.train(max_epochs=epochs, **QUIET)
    tuned = model.finetune("expression", **GENES | (tune or {}), **QUIET)
    return gene_scores(fold, tuned.get_normalized_expression(fold.data["atac"][fold.test].copy(), return_numpy=True))


PAPER = {"peak_init": "random", "linear_readout": False}


def expression_methods() -> dict[str, Callable[[Fold], dict[str, float]]]:
    """Return the methods by name."""
    ridges = {f"ridge on LSI, {n} components": lambda fold, n=n: ridge_on_lsi(fold, n) for n in N_COMPONENTS}
    return {
        "gene activity": gene_activity,
        **ridges,
        "EpiFoundation": epifoundation,
        "EpiFoundation, not pretrained": lambda fold: epifoundation(fold, epochs=0),
        "EpiFoundation, without local readout": lambda fold: epifoundation(fold, local_readout_bp=0),
        "EpiFoundation, gated decoder alone, random start": lambda fold: epifoundation(
            fold, epochs=20, tune={"max_epochs": 20, "lr": 1e-3}, **PAPER
        ),
    }


# ---------------------------------------------------------------------------------------------------------------------
# runs


def run(folder: Path, task: str, method: str, seed: int, fit: Callable[[Fold], dict[str, float]]) -> dict[str, Any]:
    """Run a method on a split, or read what it gave."""
    path = folder / f"{task}.{method.replace(' ', '_').replace(',', '')}.{seed}.json"
    if path.is_file():
        return json.loads(path.read_text())
    fold = read_annotation(seed) if task == ANNOTATION else read_expression(task, seed)
    start = time.process_time()
    row = {"task": task, "method": method, "seed": seed, **fit(fold), "seconds": time.process_time() - start}
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(row, indent=1))
    print(json.dumps(row), flush=True)
    return row


def is_wanted(name: str, asked: list[str] | None, every: list[str]) -> bool:
    """Tell whether a method is asked for, by its name or by a part of it that is no method's name."""
    return asked is None or any(part == name or (part not in every and part in name) for part in asked)


def main() -> int:
    """Run all methods on all splits and write a table of each task."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", default="epifoundation")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tasks", nargs="+", default=[ANNOTATION, *EXPRESSION])
    parser.add_argument("--methods", nargs="+", default=None, help="names, or parts of names; all by default")
    parser.add_argument("--results", type=Path, default=Path("results/quality/epifoundation"))
    chosen = parser.parse_args()
    quiet(chosen.threads)
    for task in chosen.tasks:
        methods = ANNOTATION_METHODS if task == ANNOTATION else expression_methods()
        wanted = {name: fit for name, fit in methods.items() if is_wanted(name, chosen.methods, list(methods))}
        rows = [
            run(chosen.results, task, name, seed, fit) for seed in range(chosen.seeds) for name, fit in wanted.items()
        ]
        table = pd.DataFrame(rows).drop(columns=["task", "seed"]).groupby("method", sort=False).agg(["mean", "std"])
        (chosen.results / f"{task}.md").write_text(markdown(table))
        print(markdown(table), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
