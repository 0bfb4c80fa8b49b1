"""Scores of predicted expression by gene and by cell, and of the prediction which genes are expressed at all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from epivi._errors import DataError
from epivi.metrics._inputs import check_finite, package_version

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import pandas as pd
    from numpy.typing import ArrayLike, NDArray

_CHUNK_VALUES = 4_000_000


@dataclass(frozen=True, eq=False)
class ExpressionScores:
    """Scores of predicted expression.

    Attributes
    ----------
    genes
        One row a gene: `pearson` and `spearman` over cells, NaN where the truth or the prediction is constant; `mse`;
        `n_expressed` cells with a truth above 0; `constant_truth` and `constant_prediction`.
    cells
        If asked for, one row a cell: `pearson`, `spearman` and `mse` over genes, `n_expressed` genes; else None.
    summary
        Means of the columns over genes with a defined correlation (`mse` over all genes), and over cells as
        ``<name>_within_cell``; `n_cells`, `n_genes`, `n_undefined` genes without a correlation, of which
        `n_constant_prediction` because the prediction alone is constant, and `epivi_version`.
    """

    genes: pd.DataFrame
    cells: pd.DataFrame | None
    summary: dict[str, Any]


def expression_scores(
    truth_ng: Any, predicted_ng: Any, *, genes: Sequence[str] | None = None, per_cell: bool = False
) -> ExpressionScores:
    """Compare predicted with measured expression: Pearson, Spearman and mean squared error of every gene over cells.

    Parameters
    ----------
    truth_ng, predicted_ng
        Measured and predicted values on the same scale, shape (cells, genes), dense or sparse; a sparse matrix is
        never made dense as a whole. Give only cells and genes that were held out.
    genes
        Names of the genes; by default the columns of a DataFrame, or numbers.
    per_cell
        Whether to compare over genes within each cell too. A prediction of the mean of each gene does well there,
        and has no correlation at all within genes.

    Returns
    -------
    Tables by gene and by cell, and their summary.

    Raises
    ------
    DataError
        If the shapes differ or are not (cells, genes) with at least two cells and one gene, values are not numbers,
        NaN or infinite, or `genes` has the wrong length.

    Notes
    -----
    Genes without a correlation leave the means. A model that predicts a constant for hard genes would gain by that:
    `n_constant_prediction` tells.

    Examples
    --------
    >>> scores = expression_scores([[0, 1], [2, 1], [4, 1]], [[0, 1], [1, 2], [2, 3]], genes=["CD4", "ACTB"])
    >>> scores.genes["pearson"].round(3).to_dict()
    {'CD4': 1.0, 'ACTB': nan}
    >>> scores.summary["n_undefined"]
    1
    """
    import pandas as pd

    names = genes if genes is not None else getattr(truth_ng, "columns", None)
    truth, predicted = _as_matrix(truth_ng, "truth_ng"), _as_matrix(predicted_ng, "predicted_ng")
    n, g = truth.shape
    if predicted.shape != (n, g):
        msg = f"truth_ng has shape {truth.shape}, predicted_ng {predicted.shape}: give the same cells and genes."
        raise DataError(msg)
    if n < 2:
        msg = f"truth_ng has {n} cell(s): a correlation over cells needs at least 2."
        raise DataError(msg)
    if names is not None and len(names) != g:
        msg = f"genes has {len(names)} names, expected one for each of the {g} columns."
        raise DataError(msg)
    by_gene = _compare_rows(truth.T, predicted.T)
    by_gene.index = pd.RangeIndex(g, name="gene") if names is None else pd.Index(list(names), name="gene")
    undefined = by_gene["pearson"].isna()
    summary = {
        "pearson": _mean(by_gene["pearson"]),
        "spearman": _mean(by_gene["spearman"]),
        "mse": float(by_gene["mse"].mean()),
        "n_cells": n,
        "n_genes": g,
        "n_undefined": int(undefined.sum()),
        "n_constant_prediction": int((by_gene["constant_prediction"] & ~by_gene["constant_truth"]).sum()),
    }
    by_cell = None
    if per_cell:
        by_cell = _compare_rows(truth, predicted).drop(columns=["constant_truth", "constant_prediction"])
        by_cell.index.name = "cell"
        summary |= {f"{name}_within_cell": _mean(by_cell[name]) for name in ("pearson", "spearman")}
    return ExpressionScores(by_gene, by_cell, summary | {"epivi_version": package_version()})


def open_gene_scores(is_expressed: Any, probability: ArrayLike) -> dict[str, Any]:
    """Score the prediction which genes a cell expresses, expressed and silent genes of a cell weighing the same.

    Parameters
    ----------
    is_expressed
        Whether each cell expresses each gene, shape (cells, genes): Booleans, or counts, where above 0 is expressed;
        dense or sparse.
    probability
        Predicted probability, shape (cells, genes), or (genes,) for one that is the same in all cells, such as the
        share of training cells that express the gene, the baseline that every model has to beat.

    Returns
    -------
    - ``auroc``: mean over cells of the chance that an expressed gene of the cell is ranked above a silent one;
    - ``balanced_accuracy`` at probability 0.5 and ``balanced_log_loss`` in nats, where expressed and silent genes of
      a cell weigh the same (chance: 0.5 and log 2), means over cells;
    - ``auroc_within_gene``: the same chance for an expressing above a silent cell, mean over genes; 0.5 for a
      prediction that is the same in all cells;
    - ``n_cells``, ``n_undefined`` cells that express all or no genes and are left out, ``n_genes``,
      ``n_undefined_genes`` left out of ``auroc_within_gene``. Scores over nothing are NaN.

    Raises
    ------
    DataError
        If the shapes differ, values are not numbers, NaN or infinite, or a probability is not in [0, 1].

    Examples
    --------
    >>> scores = open_gene_scores([[1, 0, 0], [0, 1, 0]], [0.6, 0.4, 0.1])
    >>> scores["auroc"], scores["auroc_within_gene"]
    (0.75, 0.5)
    """
    expressed = _as_matrix(is_expressed, "is_expressed")
    given: Any = np.asarray(probability) if not hasattr(probability, "tocsr") else probability
    if given.ndim == 1 and given.shape == (expressed.shape[1],):
        given = np.broadcast_to(given, expressed.shape)
    p = _as_matrix(given, "probability")
    if p.shape != expressed.shape:
        msg = f"is_expressed has shape {expressed.shape}, probability {p.shape}: give the same cells and genes."
        raise DataError(msg)
    values = p.data if hasattr(p, "tocsr") else p
    if values.size and (values.min() < 0 or values.max() > 1):
        msg = f"probability runs from {values.min():g} to {values.max():g}, expected values from 0 to 1."
        raise DataError(msg)
    parts = [
        (_auroc(y, q), *_balanced(y, q)) for y, q in ((x_rl > 0, q_rl) for x_rl, q_rl in _row_chunks(expressed, p))
    ]
    auroc_n, accuracy_n, loss_n = (np.concatenate(column) for column in zip(*parts, strict=True))
    within_g = np.concatenate([_auroc(x_rl > 0, q_rl) for x_rl, q_rl in _row_chunks(expressed.T, p.T)])
    return {
        "auroc": _mean(auroc_n),
        "balanced_accuracy": _mean(accuracy_n),
        "balanced_log_loss": _mean(loss_n),
        "auroc_within_gene": _mean(within_g),
        "n_cells": expressed.shape[0],
        "n_undefined": int(np.isnan(auroc_n).sum()),
        "n_genes": expressed.shape[1],
        "n_undefined_genes": int(np.isnan(within_g).sum()),
        "epivi_version": package_version(),
    }


def _compare_rows(truth: Any, predicted: Any) -> pd.DataFrame:
    """Return the scores of every row of two matrices."""
    import pandas as pd
    from scipy.stats import rankdata

    parts: list[dict[str, NDArray[Any]]] = []
    for x_rl, y_rl in _row_chunks(truth, predicted):
        constant_x, constant_y = _is_constant(x_rl), _is_constant(y_rl)
        defined = ~(constant_x | constant_y)
        part = {
            "pearson": np.full(len(x_rl), np.nan),
            "spearman": np.full(len(x_rl), np.nan),
            "mse": ((x_rl - y_rl) ** 2).mean(axis=1),
            "n_expressed": (x_rl > 0).sum(axis=1),
            "constant_truth": constant_x,
            "constant_prediction": constant_y,
        }
        if defined.any():
            x_rl, y_rl = x_rl[defined], y_rl[defined]  # noqa: PLW2901  the rest has no correlation
            part["pearson"][defined] = _correlate(x_rl, y_rl)
            part["spearman"][defined] = _correlate(rankdata(x_rl, axis=1), rankdata(y_rl, axis=1))
        parts.append(part)
    return pd.DataFrame({name: np.concatenate([part[name] for part in parts]) for name in parts[0]})


def _correlate(x_rl: NDArray[np.float64], y_rl: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return Pearson's r of each pair of rows, none of them constant."""
    a, b = (v - v.mean(axis=1, keepdims=True) for v in (x_rl, y_rl))
    # scaled first, so that squares neither overflow nor vanish
    a, b = (v / np.abs(v).max(axis=1, keepdims=True) for v in (a, b))
    scale = np.sqrt(np.einsum("rl,rl->r", a, a) * np.einsum("rl,rl->r", b, b))
    return np.clip(np.einsum("rl,rl->r", a, b) / scale, -1.0, 1.0)


def _auroc(positive_rl: NDArray[np.bool_], score_rl: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the area under the ROC curve of each row from the sum of ranks; NaN where one class is missing."""
    from scipy.stats import rankdata

    n_positive = positive_rl.sum(axis=1).astype(np.float64)
    n_negative = positive_rl.shape[1] - n_positive
    ranks = np.where(positive_rl, rankdata(score_rl, axis=1), 0.0).sum(axis=1)
    pairs = n_positive * n_negative
    return np.where(pairs > 0, (ranks - n_positive * (n_positive + 1) / 2) / np.where(pairs > 0, pairs, 1), np.nan)


def _balanced(
    positive_rl: NDArray[np.bool_], p_rl: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return accuracy and log loss of each row, both classes weighing half; NaN where one is missing."""
    n_positive = positive_rl.sum(axis=1)
    n_negative = positive_rl.shape[1] - n_positive
    defined = (n_positive > 0) & (n_negative > 0)
    half_rl = np.where(positive_rl, *(0.5 / np.maximum(count, 1)[:, None] for count in (n_positive, n_negative)))
    # a probability of exactly 0.5 says neither
    right_rl = np.where(p_rl == 0.5, 0.5, (p_rl > 0.5) == positive_rl)
    p_true_rl = np.maximum(np.where(positive_rl, p_rl, 1 - p_rl), np.finfo(np.float64).eps)
    accuracy, loss = ((half_rl * value).sum(axis=1) for value in (right_rl, -np.log(p_true_rl)))
    return np.where(defined, accuracy, np.nan), np.where(defined, loss, np.nan)


def _row_chunks(first: Any, second: Any) -> Iterator[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Yield both matrices in dense double precision, some rows at a time."""
    first, second = (m.tocsr() if hasattr(m, "tocsr") else m for m in (first, second))
    step = max(1, _CHUNK_VALUES // first.shape[1])
    for start in range(0, first.shape[0], step):
        parts = (m[start : start + step] for m in (first, second))
        x_rl, y_rl = (np.ascontiguousarray(p.toarray() if hasattr(p, "tocsr") else p, dtype=np.float64) for p in parts)
        yield x_rl, y_rl


def _is_constant(x_rl: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Tell which rows hold one value."""
    return x_rl.min(axis=1) == x_rl.max(axis=1)


def _mean(values: Any) -> float:
    """Return the mean of the defined values, NaN if there are none."""
    defined = np.asarray(values)[~np.isnan(values)]
    return float(defined.mean()) if defined.size else float("nan")


def _as_matrix(values: Any, name: str) -> Any:
    """Return a finite matrix of shape (cells, genes): an array, or CSR if sparse."""
    if hasattr(values, "tocsr"):
        matrix = values.tocsr()
        numbers = matrix.data
    else:
        matrix = numbers = np.asarray(values)
    if matrix.ndim != 2 or 0 in matrix.shape:
        msg = f"{name} has shape {matrix.shape}, expected (cells, genes) with at least one of each."
        raise DataError(msg)
    if not (np.issubdtype(numbers.dtype, np.number) or numbers.dtype == bool):
        msg = f"{name} holds values of type {numbers.dtype}, expected numbers."
        raise DataError(msg)
    if numbers is matrix:
        check_finite(matrix, name=name)
    elif bad := int((~np.isfinite(numbers)).sum()):
        at = matrix.tocoo()
        row = int(at.row[~np.isfinite(at.data)].min())
        msg = f"{name} holds {bad} NaN or infinite values, the first in row {row}. Remove these cells or repair them."
        raise DataError(msg)
    return matrix
