"""The inputs, splits, features and small models of the gene tasks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from epivi._errors import ConfigError, DataError, nearest
from epivi.metrics._inputs import check_choice, check_finite

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import pandas as pd
    from numpy.typing import ArrayLike, NDArray

_COLUMNS = ("gene_a", "gene_b", "label")
_MAX_ITERATIONS = 2_000


def as_models(model: str | Sequence[str], valid: tuple[str, ...]) -> tuple[str, ...]:
    """Return the names of the models, each one of `valid`.

    Raises
    ------
    ConfigError
        If there is none or one is unknown.
    """
    names = (model,) if isinstance(model, str) else tuple(dict.fromkeys(model))
    if not names:
        msg = f"model is empty. {nearest('', valid)}"
        raise ConfigError(msg)
    return tuple(check_choice(name, valid, name="model") for name in names)


def as_embeddings(
    embeddings: pd.DataFrame | Mapping[str, pd.DataFrame],
) -> tuple[dict[str, pd.DataFrame], dict[str, int]]:
    """Return the frames cut to their common genes, sorted by name, and how many genes each has beyond these.

    Raises
    ------
    DataError
        If there is no frame, an entry is no finite numeric frame with distinct genes, or no gene is in all.
    """
    import pandas as pd

    given = {"embedding": embeddings} if isinstance(embeddings, pd.DataFrame) else dict(embeddings)
    if not given:
        msg = "embeddings is empty: give a DataFrame of genes by features, or several by name."
        raise DataError(msg)
    for name, frame in given.items():
        if not isinstance(frame, pd.DataFrame) or 0 in frame.shape:
            found = f"of shape {frame.shape}" if isinstance(frame, pd.DataFrame) else f"a {type(frame).__name__}"
            msg = f"The embedding '{name}' is {found}, expected a DataFrame with one row a gene, indexed by its name."
            raise DataError(msg)
        if frame.index.has_duplicates:
            repeated = frame.index[frame.index.duplicated()]
            msg = f"The embedding '{name}' repeats {len(repeated)} genes, the first is '{repeated[0]}'. Keep one row."
            raise DataError(msg)
        if not all(pd.api.types.is_numeric_dtype(dtype) for dtype in frame.dtypes):
            msg = f"The embedding '{name}' has columns that are not numeric. Keep the features only."
            raise DataError(msg)
        check_finite(frame.to_numpy(dtype=np.float64), name=f"The embedding '{name}'")
    common = set.intersection(*(set(frame.index) for frame in given.values()))
    if not common:
        msg = f"No gene is in all of the embeddings {', '.join(map(repr, given))}. Do they use the same kind of names?"
        raise DataError(msg)
    genes = sorted(common, key=str)
    frames = {str(name): frame.loc[genes].astype(np.float64) for name, frame in given.items()}
    return frames, {str(name): len(frame) - len(genes) for name, frame in given.items()}


def as_pairs(pairs: pd.DataFrame, frames: dict[str, pd.DataFrame]) -> tuple[pd.DataFrame, dict[str, int]]:
    """Return the usable pairs with genes in sorted order and a `row` of origin, and how many were left out and why.

    A pair that comes twice, in either order, would be in training and test at once: it is kept once, and not at all
    if its labels contradict each other.

    Raises
    ------
    DataError
        If columns are missing, labels are not 0 and 1, or the usable pairs have one class.
    """
    import pandas as pd

    if absent := [name for name in _COLUMNS if name not in pairs.columns]:
        msg = (
            f"pairs has no column '{absent[0]}', expected gene_a, gene_b and label. {nearest(absent[0], pairs.columns)}"
        )
        raise DataError(msg)
    label = _as_binary(pairs["label"], "The column 'label' of pairs")
    a, b = (pairs[name].to_numpy(dtype=object) for name in _COLUMNS[:2])
    genes = next(iter(frames.values())).index
    code_a, code_b = genes.get_indexer(pd.Index(a)), genes.get_indexer(pd.Index(b))
    known = (code_a >= 0) & (code_b >= 0)
    table = pd.DataFrame(
        {"a": np.minimum(code_a, code_b), "b": np.maximum(code_a, code_b), "label": label, "row": np.arange(len(pairs))}
    )
    left_out = {"gene without embedding": int((~known).sum())}
    selfed = known & (code_a == code_b)
    left_out["gene with itself"] = int(selfed.sum())
    table = table[known & ~selfed]
    contradicting = table.groupby(["a", "b"])["label"].transform("nunique") > 1
    left_out["contradicting labels"] = int(contradicting.sum())
    table = table[~contradicting]
    repeated = table.duplicated(["a", "b"])
    left_out["repeated"] = int(repeated.sum())
    # sorted, so that neither the order of the pairs nor that within them changes a split
    table = table[~repeated].sort_values(["a", "b"], ignore_index=True)
    if table["label"].nunique() < 2:
        msg = f"Of {len(pairs)} pairs {len(table)} can be used, with {table['label'].nunique()} of the two classes "
        msg += f"(left out: {left_out}). Do the pairs and the embeddings use the same kind of names?"
        raise DataError(msg)
    return table, left_out


def pair_splits(
    table: pd.DataFrame, split: str | ArrayLike, n_splits: int, seed: int, *, n_given: int
) -> tuple[list[tuple[NDArray[np.intp], NDArray[np.intp]]], list[str]]:
    """Return training and test rows of each split of the pairs, and the names of the splits.

    `n_given` pairs came before the unusable ones were left out: a given split has one entry for each of them.

    Raises
    ------
    DataError
        If a split has no test pair, or training pairs of fewer than two classes.
    ConfigError
        If `split` is unknown or has the wrong length, or `n_splits` is not an integer of at least 2.
    """
    if not isinstance(split, str):
        given = np.asarray(split).astype(str)
        if given.shape != (n_given,):
            msg = f"split has shape {given.shape}, expected 'train' or 'test' for each of the {n_given} rows of pairs."
            raise ConfigError(msg)
        part = given[table["row"].to_numpy()]
        splits = [(np.flatnonzero(part == "train"), np.flatnonzero(part == "test"))]
    else:
        check_choice(split, ("gene", "pair"), name="split")
        check_splits(n_splits)
        rng = np.random.default_rng(seed)
        if split == "pair":
            fold = rng.permutation(len(table)) % n_splits
            splits = [(np.flatnonzero(fold != f), np.flatnonzero(fold == f)) for f in range(n_splits)]
        else:
            genes = np.unique(table[["a", "b"]])
            fold_of = np.zeros(genes.max() + 1, dtype=np.intp)
            fold_of[genes] = rng.permutation(len(genes)) % n_splits
            a, b = fold_of[table["a"]], fold_of[table["b"]]
            splits = [
                (np.flatnonzero((a != f) & (b != f)), np.flatnonzero((a == f) & (b == f))) for f in range(n_splits)
            ]
    y = table["label"].to_numpy()
    for number, (train, test) in enumerate(splits):
        if len(test) == 0 or len(np.unique(y[train])) < 2:
            msg = (
                f"Split {number} has {len(train)} training pairs of {len(np.unique(y[train]))} classes and {len(test)}"
            )
            msg += f" test pairs, of {len(table)} usable pairs. Use fewer splits, more pairs, or another kind of split."
            raise DataError(msg)
    return splits, [str(number) for number in range(len(splits))]


def pair_features(
    frame: pd.DataFrame, train: pd.DataFrame, test: pd.DataFrame, features: str
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the features of training and test pairs, twice the rows if the two orders differ.

    The vectors are standardised by the genes of the training pairs first: a product of values far from 0 would say
    little but their sum.
    """
    x_gd = frame.to_numpy()
    seen = np.unique(train[["a", "b"]])
    spread = x_gd[seen].std(axis=0)
    x_gd = (x_gd - x_gd[seen].mean(axis=0)) / np.where(spread > 0, spread, 1.0)
    found = []
    for table in (train, test):
        a, b = x_gd[table["a"]], x_gd[table["b"]]
        if features == "symmetric":
            found.append(np.hstack([a * b, np.abs(a - b)]))
        else:
            found.append(np.vstack([np.hstack([a, b]), np.hstack([b, a])]))
    return found[0], found[1]


def degree_scores(train: pd.DataFrame, test: pd.DataFrame) -> NDArray[np.float64]:
    """Return for each test pair the mean share of positives among the training pairs of its genes.

    The share is drawn to that of all training pairs by one pair's weight, and equals it for unseen genes.
    """
    size = int(max(train[["a", "b"]].to_numpy().max(), test[["a", "b"]].to_numpy().max())) + 1
    prior = float(train["label"].mean())
    positive, total = np.full(size, prior), np.ones(size)
    for column in ("a", "b"):
        positive += np.bincount(train[column], weights=train["label"], minlength=size)
        total += np.bincount(train[column], minlength=size)
    share = positive / total
    return (share[test["a"]] + share[test["b"]]) / 2


def as_target(
    target: pd.Series, frames: dict[str, pd.DataFrame], n_splits: int, *, classes: bool
) -> tuple[pd.Series, dict[str, int]]:
    """Return the target of the genes that have one and an embedding, in the order of the frames, and what was left out.

    Raises
    ------
    DataError
        If the target is no numeric series of distinct genes, infinite, constant or, for classes, not 0 and 1, or if
        too few genes are left for the splits.
    """
    import pandas as pd

    check_splits(n_splits)
    name = "labels" if classes else "target"
    if not isinstance(target, pd.Series):
        msg = f"{name} is a {type(target).__name__}, expected a pandas Series indexed by gene."
        raise DataError(msg)
    if target.index.has_duplicates:
        repeated = target.index[target.index.duplicated()]
        msg = f"{name} repeats {len(repeated)} genes, the first is '{repeated[0]}'. Average them or keep one."
        raise DataError(msg)
    present = target.dropna()
    genes = next(iter(frames.values())).index
    kept = present.loc[[gene for gene in genes if gene in present.index]]
    if classes:
        y = pd.Series(_as_binary(kept, name), index=kept.index)
        fewest = int(min((y == 0).sum(), (y == 1).sum()))
        if fewest < n_splits:
            msg = f"labels has {fewest} genes of the rarer class with an embedding, fewer than the {n_splits} splits."
            raise DataError(msg)
    else:
        if not pd.api.types.is_numeric_dtype(kept):
            msg = f"target holds values of type {kept.dtype}, expected numbers."
            raise DataError(msg)
        y = kept.astype(np.float64)
        check_finite(y.to_numpy(), name="target")
        if len(y) < 2 * n_splits or y.nunique() < 2:
            msg = f"target has {len(y)} genes with an embedding and {y.nunique()} different values, too few for "
            msg += f"{n_splits} splits. Do the target and the embeddings use the same kind of names?"
            raise DataError(msg)
    return y, {"without a value": int(target.isna().sum()), "without an embedding": len(present) - len(kept)}


def cross_validate(
    kind: str, x_train: NDArray[np.float64], y_train: NDArray[Any], x_test: NDArray[np.float64], seed: int
) -> NDArray[np.float64]:
    """Fit a small model and return its predictions: probabilities of the positive class, or values."""
    from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
    from sklearn.linear_model import LinearRegression, LogisticRegression, RidgeCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    regression = kind in {"ridge", "linear"} or (kind == "boosting" and y_train.dtype.kind == "f")
    model: Any
    if kind == "boosting":
        # early stopping would hold back genes of large sets alone: the rule would depend on their number
        boosting = HistGradientBoostingRegressor if regression else HistGradientBoostingClassifier
        model = boosting(random_state=seed, early_stopping=False)
    elif kind == "logistic":
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=_MAX_ITERATIONS))
    elif kind == "ridge":
        model = make_pipeline(StandardScaler(), RidgeCV(alphas=np.logspace(-2, 5, 15)))
    else:
        model = make_pipeline(StandardScaler(), LinearRegression())
    model.fit(x_train, y_train)
    return model.predict(x_test) if regression else model.predict_proba(x_test)[:, 1]


def score_classes(y: NDArray[np.intp], p: NDArray[np.float64]) -> dict[str, float]:
    """Return AUROC, average precision and accuracy; the first two are NaN where the test set has one class."""
    from sklearn.metrics import average_precision_score, roc_auc_score

    both = 0 < y.sum() < len(y)
    return {
        "auroc": float(roc_auc_score(y, p)) if both else float("nan"),
        "auprc": float(average_precision_score(y, p)) if both else float("nan"),
        "accuracy": float(((p >= 0.5) == y).mean()),
    }


def score_values(y: NDArray[np.float64], predicted: NDArray[np.float64]) -> dict[str, float]:
    """Return Pearson and Spearman correlation, NaN where one side is constant, and R2."""
    from scipy.stats import pearsonr, spearmanr
    from sklearn.metrics import r2_score

    defined = len(y) > 1 and y.min() < y.max() and predicted.min() < predicted.max()
    return {
        "pearson": float(pearsonr(y, predicted)[0]) if defined else float("nan"),
        "spearman": float(spearmanr(y, predicted)[0]) if defined else float("nan"),
        "r2": float(r2_score(y, predicted)) if len(y) > 1 and y.min() < y.max() else float("nan"),
    }


def tabulate(rows: dict[tuple[str, str, str], dict[str, float]], attrs: dict[str, Any]) -> pd.DataFrame:
    """Return the scores by features, model and split, each model followed by mean and standard deviation."""
    import pandas as pd

    # levels in the order of the rows: the table is then sorted for pandas, and a part is found without a warning
    features, models, splits = (list(dict.fromkeys(column)) for column in zip(*rows, strict=True))
    splits += ["mean", "sd"]
    groups = list(dict.fromkeys(key[:2] for key in rows))
    parts = []
    for group in groups:
        part = pd.DataFrame([row for key, row in rows.items() if key[:2] == group])
        parts += [part, part.mean().to_frame().T, part.std(ddof=1).to_frame().T]
    codes = [
        np.repeat([features.index(name) for name, _ in groups], len(splits)).tolist(),
        np.repeat([models.index(name) for _, name in groups], len(splits)).tolist(),
        list(range(len(splits))) * len(groups),
    ]
    index = pd.MultiIndex(levels=[features, models, splits], codes=codes, names=["features", "model", "split"])
    result = pd.concat(parts).set_axis(index)
    result.attrs.update(attrs)
    return result


def check_splits(n_splits: int) -> None:
    """Refuse a number of splits that is not an integer of at least 2.

    Raises
    ------
    ConfigError
        If it is not.
    """
    if isinstance(n_splits, bool) or not isinstance(n_splits, (int, np.integer)) or n_splits < 2:
        msg = f"n_splits is {n_splits!r}, expected an integer of at least 2."
        raise ConfigError(msg)


def _as_binary(values: pd.Series, name: str) -> NDArray[np.intp]:
    """Return labels as 0 and 1."""
    import pandas as pd

    found = pd.unique(values)
    if pd.isna(found).any() or not set(found.tolist()) <= {0, 1}:
        msg = f"{name} holds {sorted(map(str, found))[:5]}, expected 0 and 1 or Booleans."
        raise DataError(msg)
    return values.to_numpy().astype(np.intp)
