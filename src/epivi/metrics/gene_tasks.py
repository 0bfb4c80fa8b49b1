"""What gene embeddings know of genes: pairs that interact, tolerance of loss, sensitivity to dosage."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np

from epivi._errors import ConfigError, DataError
from epivi.metrics._gene_models import (
    as_embeddings,
    as_models,
    as_pairs,
    as_target,
    cross_validate,
    degree_scores,
    pair_features,
    pair_splits,
    score_classes,
    score_values,
    tabulate,
)
from epivi.metrics._inputs import check_choice, package_version

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import pandas as pd
    from numpy.typing import ArrayLike

logger = logging.getLogger(__name__)

CONSTRAINT_COLUMNS = frozenset(
    {"pli", "exac_pli", "lof_z", "loeuf", "oe_lof", "oe_lof_upper", "oe_lof_lower", "hipred"}
)
DOSAGE_NOTE = (
    "The published dosage-sensitivity labels of transcription factors were built from ExAC pLI and HIPred: gnomAD pLI "
    "alone reaches an AUROC of 0.99 on them. They are not independent of loss-of-function constraint (pLI, lof_z, "
    "LOEUF): such a score is a leaking ceiling here, not a baseline."
)


def gene_pair_task(
    embeddings: pd.DataFrame | Mapping[str, pd.DataFrame],
    pairs: pd.DataFrame,
    *,
    split: str | ArrayLike = "gene",
    n_splits: int = 5,
    features: str = "symmetric",
    model: str | Sequence[str] = "logistic",
    seed: int = 0,
) -> pd.DataFrame:
    """Predict which pairs of genes belong together from the embeddings of both, on pairs that were held out.

    Parameters
    ----------
    embeddings
        One row a gene, indexed by its name, one column a feature; or several such frames by name. All go through the
        same pairs and splits: only genes that all of them have are scored.
    pairs
        Columns `gene_a`, `gene_b` and `label` (0 or 1, or Boolean).
    split
        ``"gene"`` divides the genes into folds: both genes of a test pair are unseen in training, and pairs across
        folds are left out. ``"pair"`` divides the pairs; a gene is then in both parts, and knowing how often it is in
        a positive pair is enough to score high. Or one entry a pair, ``"train"`` or ``"test"``, others left out.
    n_splits
        Folds of ``"gene"`` and ``"pair"``.
    features
        ``"symmetric"``: product and absolute difference of the two vectors. ``"concatenated"``: one vector after the
        other, trained on both orders, the two predictions averaged. Either way the order within a pair is irrelevant.
    model
        ``"logistic"`` (on standardised features), ``"boosting"`` (histogram gradient boosting), or both.
    seed
        Seed of the folds and of boosting.

    Returns
    -------
    Rows by features, model and split (each split, then ``"mean"`` and ``"sd"`` over splits); columns `auroc`,
    `auprc`, `accuracy` at probability 0.5, `n_train`, `n_test`, `share_positive` of the test pairs. A score that is
    not defined in a split, such as the AUROC of one class, is NaN there and left out of the mean. The rows
    ``"gene_degree"`` use no embedding: they score a pair by the shares of positives among the training pairs of its
    genes, 0.5 where no gene is in both parts. `attrs` holds the settings and what was left out.

    Raises
    ------
    DataError
        If an embedding is no finite frame of distinct genes, if columns are missing, labels are not 0 and 1 or of one
        class, if no pair has both genes in all embeddings, if a split has no training or test pair or training pairs
        of one class.
    ConfigError
        If an option is unknown, `n_splits` is not an integer of at least 2, or `split` has not one entry a pair.

    References
    ----------
    Du et al., BMC Genomics 20, 82 (2019), for the task; the published protocol splits pairs at random.

    Examples
    --------
    >>> import numpy as np, pandas as pd
    >>> rng = np.random.default_rng(0)
    >>> module = np.repeat([0, 1], 30)
    >>> genes = [f"g{i}" for i in range(60)]
    >>> frame = pd.DataFrame(rng.normal(size=(60, 3)) + 4 * module[:, None], index=genes)
    >>> a, b = np.triu_indices(60, k=1)
    >>> pairs = pd.DataFrame(
    ...     {"gene_a": np.take(genes, a), "gene_b": np.take(genes, b), "label": module[a] == module[b]}
    ... )
    >>> table = gene_pair_task({"embedding": frame}, pairs)
    >>> bool(table.loc[("embedding", "logistic", "mean"), "auroc"] > 0.95)
    True
    """
    check_choice(features, ("symmetric", "concatenated"), name="features")
    models = as_models(model, ("logistic", "boosting"))
    frames, missing = as_embeddings(embeddings)
    table, left_out = as_pairs(pairs, frames)
    splits, labels_of_splits = pair_splits(table, split, n_splits, seed, n_given=len(pairs))
    rows: dict[tuple[str, str, str], dict[str, float]] = {}
    y = table["label"].to_numpy()
    for name, (train, test) in zip(labels_of_splits, splits, strict=True):
        size = {"n_train": len(train), "n_test": len(test), "share_positive": float(y[test].mean())}
        for key, frame in frames.items():
            x_train, x_test = pair_features(frame, table.iloc[train], table.iloc[test], features)
            y_train = np.tile(y[train], len(x_train) // len(train))
            for kind in models:
                p = cross_validate(kind, x_train, y_train, x_test, seed)
                p = p.reshape(-1, len(test)).mean(axis=0)  # over both orders, if there are two
                rows[key, kind, name] = score_classes(y[test], p) | size
        p = degree_scores(table.iloc[train], table.iloc[test])
        rows["gene_degree", "none", name] = score_classes(y[test], p) | size
    return tabulate(
        rows,
        {
            "task": "pairs",
            "split": split if isinstance(split, str) else "given",
            "pair_features": features,
            "n_genes": len(np.unique(table[["a", "b"]])),
            "n_genes_left_out": missing,
            "n_pairs": len(table),
            "n_pairs_left_out": left_out,
            "seed": int(seed),
            "epivi_version": package_version(),
        },
    )


def gene_regression_task(
    embeddings: pd.DataFrame | Mapping[str, pd.DataFrame],
    target: pd.Series,
    *,
    n_splits: int = 5,
    model: str | Sequence[str] = ("ridge", "boosting"),
    seed: int = 0,
) -> pd.DataFrame:
    """Predict a number of each gene, such as its tolerance of loss-of-function variants, by cross-validation.

    Parameters
    ----------
    embeddings
        As in `gene_pair_task`.
    target
        The number, indexed by gene; genes without a value are left out.
    n_splits
        Folds of genes.
    model
        ``"ridge"`` (penalty chosen within the training genes), ``"boosting"``, ``"linear"``, or several of them.
    seed
        Seed of the folds and of boosting.

    Returns
    -------
    Rows by features, model and split, as in `gene_pair_task`; columns `pearson`, `spearman`, `r2`, `n_train`,
    `n_test`. A correlation is NaN where the prediction is constant. `attrs` holds the settings and what was left out.

    Raises
    ------
    DataError
        If an embedding is no finite frame of distinct genes, or if `target` is not numeric, repeats genes, is infinite
        or constant, or shares fewer than two genes a fold with the embeddings.
    ConfigError
        If an option is unknown or `n_splits` is not an integer of at least 2.

    Notes
    -----
    The coding length of a gene alone predicts its loss-of-function Z score well: give it as one of the feature sets.

    Examples
    --------
    >>> import numpy as np, pandas as pd
    >>> frame = pd.DataFrame(np.random.default_rng(0).normal(size=(50, 2)), index=[f"g{i}" for i in range(50)])
    >>> table = gene_regression_task(frame, 2 * frame[0] - frame[1], model="ridge")
    >>> table.loc[("embedding", "ridge", "mean"), "pearson"].round(3)
    np.float64(1.0)
    """
    models = as_models(model, ("ridge", "boosting", "linear"))
    frames, missing = as_embeddings(embeddings)
    y, n_without = as_target(target, frames, n_splits, classes=False)
    return _gene_task("regression", frames, y, models, n_splits, seed, {"n_genes_left_out": missing | n_without})


def gene_classification_task(
    embeddings: pd.DataFrame | Mapping[str, pd.DataFrame],
    labels: pd.Series,
    *,
    n_splits: int = 5,
    model: str | Sequence[str] = ("logistic", "boosting"),
    task: str = "dosage",
    seed: int = 0,
) -> pd.DataFrame:
    """Predict a class of each gene, such as sensitivity to dosage, by stratified cross-validation.

    Parameters
    ----------
    embeddings
        As in `gene_pair_task`.
    labels
        0 and 1, or Booleans, indexed by gene; genes without a label are left out.
    n_splits
        Folds of genes, with the same share of positives.
    model
        ``"logistic"``, ``"boosting"`` or both.
    task
        ``"dosage"`` adds ``attrs["note"]`` on the leakage of constraint scores and names in ``attrs["leaking"]`` the
        feature columns that look like one; ``"other"`` does not.
    seed
        Seed of the folds and of boosting.

    Returns
    -------
    Rows by features, model and split, as in `gene_pair_task`; columns `auroc`, `auprc`, `accuracy`, `n_train`,
    `n_test`, `share_positive`. `attrs` holds the settings and what was left out.

    Raises
    ------
    DataError
        If an embedding is no finite frame of distinct genes, or if `labels` are not 0 and 1, repeat genes, or have
        fewer genes of a class in the embeddings than folds.
    ConfigError
        If an option is unknown or `n_splits` is not an integer of at least 2.

    Examples
    --------
    >>> import numpy as np, pandas as pd
    >>> frame = pd.DataFrame(np.random.default_rng(0).normal(size=(60, 2)), index=[f"g{i}" for i in range(60)])
    >>> table = gene_classification_task({"model": frame}, frame[0] > 0, model="logistic")
    >>> bool(table.loc[("model", "logistic", "mean"), "auroc"] > 0.95), "pLI" in table.attrs["note"]
    (True, True)
    """
    check_choice(task, ("dosage", "other"), name="task")
    models = as_models(model, ("logistic", "boosting"))
    frames, missing = as_embeddings(embeddings)
    y, n_without = as_target(labels, frames, n_splits, classes=True)
    attrs: dict[str, Any] = {"n_genes_left_out": missing | n_without}
    if task == "dosage":
        leaking = {
            key: found
            for key, frame in frames.items()
            if (found := [str(column) for column in frame.columns if str(column).lower() in CONSTRAINT_COLUMNS])
        }
        if leaking:
            logger.warning("Features that leak dosage labels: %s. %s", leaking, DOSAGE_NOTE)
        attrs |= {"note": DOSAGE_NOTE, "leaking": leaking}
    return _gene_task(task, frames, y, models, n_splits, seed, attrs)


def gene_baselines(
    counts: Any, gene_names: Sequence[str], *, n_components: int = 50, seed: int = 0
) -> dict[str, pd.DataFrame]:
    """Describe genes without a model: by their mean and detection rate, and by their loadings on principal components.

    Parameters
    ----------
    counts
        Raw counts, shape (cells, genes), sparse or dense.
    gene_names
        Name of each gene, all different.
    n_components
        Principal components of the log-normalised counts (10,000 a cell), the genes centred; a sparse matrix is never
        made dense. Take the width of the embedding to be compared.
    seed
        Seed of the start of the decomposition.

    Returns
    -------
    ``"mean_detection"`` with columns `log_mean` (log of 1 + mean normalised count) and `detection` (share of cells
    with a count), and ``"pca_loadings"``, eigenvectors scaled by the standard deviation along them, so that the inner
    product of two genes is their covariance. Rows are the genes.

    Raises
    ------
    DataError
        If `counts` is not a finite matrix without negative values, is constant, or `gene_names` are not one a column
        and different.
    ConfigError
        If `n_components` is not an integer from 1 to below the numbers of cells and genes.

    Examples
    --------
    >>> import numpy as np
    >>> counts = np.random.default_rng(0).poisson(1.0, size=(30, 4))
    >>> frames = gene_baselines(counts, ["a", "b", "c", "d"], n_components=2)
    >>> {name: frame.shape for name, frame in frames.items()}
    {'mean_detection': (4, 2), 'pca_loadings': (4, 2)}
    """
    import pandas as pd
    from scipy.sparse import csr_matrix
    from sklearn.decomposition import PCA

    names = [str(name) for name in gene_names]
    x_ng = csr_matrix(counts, dtype=np.float64, copy=True)
    x_ng.sum_duplicates()
    n, g = x_ng.shape
    if len(names) != g or len(set(names)) < g:
        msg = f"gene_names has {len(names)} names, {len(set(names))} of them different, for {g} columns of counts."
        raise DataError(msg)
    if x_ng.nnz and not (np.isfinite(x_ng.data).all() and x_ng.data.min() >= 0):
        msg = "counts holds negative, NaN or infinite values: give raw counts."
        raise DataError(msg)
    if isinstance(n_components, bool) or not isinstance(n_components, (int, np.integer)) or n_components < 1:
        msg = f"n_components is {n_components!r}, expected a positive integer."
        raise ConfigError(msg)
    if n_components >= min(n, g):
        msg = f"n_components is {n_components}, but {n} cells and {g} genes allow at most {min(n, g) - 1}."
        raise ConfigError(msg)
    detection = np.asarray((x_ng > 0).sum(axis=0), dtype=np.float64).ravel() / n
    depth = np.asarray(x_ng.sum(axis=1)).ravel()
    scale = np.divide(1e4, depth, out=np.zeros(n), where=depth > 0)
    x_ng.data *= np.repeat(scale, np.diff(x_ng.indptr))
    log_mean = np.log1p(np.asarray(x_ng.mean(axis=0)).ravel())
    x_ng.data = np.log1p(x_ng.data)
    if (x_ng.max(axis=0) != x_ng.min(axis=0)).nnz == 0:
        msg = f"counts is constant: all {n} cells have the same normalised values, there is no component."
        raise DataError(msg)
    # arpack centres a sparse matrix without making it dense
    pca = PCA(n_components=int(n_components), svd_solver="arpack", random_state=seed).fit(x_ng)
    loadings = pca.components_.T * np.sqrt(pca.explained_variance_)
    index = pd.Index(names, name="gene")
    return {
        "mean_detection": pd.DataFrame({"log_mean": log_mean, "detection": detection}, index=index),
        "pca_loadings": pd.DataFrame(loadings, index=index, columns=[f"PC{i + 1}" for i in range(loadings.shape[1])]),
    }


def _gene_task(
    task: str,
    frames: dict[str, pd.DataFrame],
    y: pd.Series,
    models: tuple[str, ...],
    n_splits: int,
    seed: int,
    attrs: dict[str, Any],
) -> pd.DataFrame:
    """Return the table of a task with one target a gene; genes are in the order of their names."""
    from sklearn.model_selection import KFold, StratifiedKFold

    values, regression = y.to_numpy(), task == "regression"
    folds = (KFold if regression else StratifiedKFold)(n_splits, shuffle=True, random_state=seed)
    rows: dict[tuple[str, str, str], dict[str, float]] = {}
    for split, (train, test) in enumerate(folds.split(values, values)):
        size: dict[str, float] = {"n_train": len(train), "n_test": len(test)}
        if not regression:
            size["share_positive"] = float(values[test].mean())
        for key, frame in frames.items():
            x = frame.loc[y.index].to_numpy()
            for kind in models:
                predicted = cross_validate(kind, x[train], values[train], x[test], seed)
                score = score_values if regression else score_classes
                rows[key, kind, str(split)] = score(values[test], predicted) | size
    settings = {"task": task, "n_genes": len(y), "seed": int(seed), "epivi_version": package_version()}
    return tabulate(rows, settings | attrs)
