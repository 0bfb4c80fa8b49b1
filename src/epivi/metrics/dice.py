"""Dice coefficient of imputed accessibility against the bulk profile of the cell's type."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from epivi._errors import ConfigError, DataError, nearest
from epivi.metrics._inputs import as_labels, check_choice, check_finite, package_version

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import ArrayLike, NDArray

_CHUNK_VALUES = 4_000_000
_BINARIZE = ("quantile", "mean", "row_column_mean")
_BULK = ("median", "positive")


@dataclass(frozen=True, eq=False)
class DiceScore:
    """Dice coefficients of cells against the bulk profile of their type.

    Attributes
    ----------
    score
        Mean over cells; for the type-specific form, mean over types.
    chance
        The same mean of 2 q_c q_t / (q_c + q_t): what calls of the same sizes, placed at random, would reach.
    per_cell
        Coefficient of each cell, shape (n,); NaN where neither cell nor bulk calls a region.
    by_type
        Mean over the cells of each type.
    n_regions, n_undefined
        Regions compared; cells that are NaN.
    specific, binarize, bulk_binarize
        Settings.
    """

    score: float
    chance: float
    per_cell: NDArray[np.float64]
    by_type: pd.Series
    n_regions: int
    n_undefined: int
    specific: bool
    binarize: str
    bulk_binarize: str

    def to_dict(self) -> dict[str, Any]:
        """Return the scores and settings as plain Python values, ready for JSON or `uns`.

        Examples
        --------
        >>> dice([[0.9, 0.1], [0.2, 0.8]], {"A": [4, 1], "B": [1, 4]}, ["A", "B"]).to_dict()["score"]
        1.0
        """
        return {
            "score": self.score,
            "chance": self.chance,
            "by_type": {str(name): float(value) for name, value in self.by_type.items()},
            "n": len(self.per_cell),
            "n_regions": self.n_regions,
            "n_undefined": self.n_undefined,
            "specific": self.specific,
            "binarize": self.binarize,
            "bulk_binarize": self.bulk_binarize,
            "epivi_version": package_version(),
        }


def dice(
    imputed: Any,
    bulk: pd.DataFrame | Mapping[str, ArrayLike],
    labels: ArrayLike,
    *,
    binarize: str | float = "quantile",
    bulk_binarize: str | float = "median",
    regions: ArrayLike | str | None = None,
    specific: bool = False,
) -> DiceScore:
    """Compare the regions called open in each cell with those called open in the bulk profile of its type.

    ``DSC = 2 TP / (2 TP + FP + FN)``, which equals F1 (SAILER, equation 2.7).

    Parameters
    ----------
    imputed
        Imputed accessibility, shape (n, p), dense or sparse. Raw counts with ``binarize=0`` give the raw baseline.
    bulk
        Bulk weight of each region by type: a table of shape (types, p), or a mapping from type to p values.
    labels
        Type of each cell, length n; each must be in `bulk`.
    binarize
        How a cell is called: ``"quantile"``, its highest values, as many as are open in the bulk of its type (all of
        them where the last ones tie, but not its lowest value, so that the zeros of raw data stay closed); ``"mean"``,
        above the mean of the cell; ``"row_column_mean"``, above the means of cell and region (as SCALE); or a number,
        above that value.
    bulk_binarize
        How bulk is called: ``"median"``, above the median of the type over the compared regions; ``"positive"``; or a
        quantile in (0, 1).
    regions
        Regions compared: a boolean mask of length p, integer indices, ``"all"``, or by default the foreground, the
        regions with a positive weight in some type (background has no truth).
    specific
        Compare only the regions whose bulk call differs between types, and average by type: the harder score.

    Returns
    -------
    Score, chance level, coefficients of cells and types.

    Raises
    ------
    DataError
        If shapes or lengths disagree, values are NaN or infinite, a label has no bulk profile, no region is left, no
        bulk call differs between types, or no cell has a defined coefficient.
    ConfigError
        If `binarize`, `bulk_binarize` or `regions` is not valid.

    Notes
    -----
    Sparse raw data are penalised for their zeros: a gain over raw alone is no evidence of cell-type specificity. Look
    at `chance` and at the type-specific score.

    Examples
    --------
    >>> import numpy as np
    >>> bulk = {"A": [5, 4, 1, 1], "B": [1, 1, 4, 5]}
    >>> imputed = np.array([[0.9, 0.8, 0.1, 0.2], [0.7, 0.1, 0.8, 0.2]])
    >>> result = dice(imputed, bulk, ["A", "B"])
    >>> result.per_cell.tolist(), result.score, result.chance
    ([1.0, 0.5], 0.75, 0.5)
    """
    import pandas as pd

    _check_binarize(binarize, bulk_binarize)
    values_np = imputed.tocsr() if hasattr(imputed, "tocsr") else np.asarray(imputed, dtype=np.float64)
    if values_np.ndim != 2:
        msg = f"imputed has shape {values_np.shape}, expected (cells, regions)."
        raise DataError(msg)
    _check_values(values_np)
    kinds = as_labels(labels, values_np.shape[0], min_values=1)
    bulk_tp = _as_bulk(bulk, kinds.names, values_np.shape[1])
    columns = _as_regions(regions, bulk_tp)
    open_tp = _call_bulk(bulk_tp[:, columns], bulk_binarize)
    if specific:
        differs = open_tp.any(axis=0) & ~open_tp.all(axis=0)
        if not differs.any():
            msg = f"No bulk call differs between the {len(kinds.names)} types: there is no type-specific region."
            raise DataError(msg)
        columns, open_tp = columns[differs], open_tp[:, differs]
    per_cell, chance_n = _dice_of_cells(values_np[:, columns], open_tp, kinds.codes, binarize)
    defined = np.isfinite(per_cell)
    if not defined.any():
        msg = f"None of {len(per_cell)} cells has a coefficient: nothing is called in {len(columns)} regions."
        raise DataError(msg)
    by_type = pd.Series(per_cell).groupby(kinds.codes).mean()
    by_type.index = pd.Index([kinds.names[code] for code in by_type.index], name="type")
    chance_of_type = pd.Series(chance_n).groupby(kinds.codes).mean()
    return DiceScore(
        score=float(by_type.mean() if specific else per_cell[defined].mean()),
        chance=float(chance_of_type.mean() if specific else chance_n[defined].mean()),
        per_cell=per_cell,
        by_type=by_type,
        n_regions=len(columns),
        n_undefined=int((~defined).sum()),
        specific=specific,
        binarize=str(binarize),
        bulk_binarize=str(bulk_binarize),
    )


def dice_specific(
    imputed: Any,
    bulk: pd.DataFrame | Mapping[str, ArrayLike],
    labels: ArrayLike,
    *,
    binarize: str | float = "quantile",
    bulk_binarize: str | float = "median",
    regions: ArrayLike | str | None = None,
) -> DiceScore:
    """Compute the Dice coefficient on the regions whose bulk call differs between types, averaged by type.

    Parameters
    ----------
    imputed, bulk, labels, binarize, bulk_binarize, regions
        As in `dice`.

    Returns
    -------
    As `dice` with ``specific=True``.

    Raises
    ------
    DataError, ConfigError
        As `dice`.

    Examples
    --------
    >>> bulk = {"A": [5, 4, 1, 0.5], "B": [5, 1, 4, 0.5]}
    >>> dice_specific([[0.9, 0.8, 0.1, 0.0], [0.9, 0.8, 0.1, 0.0]], bulk, ["A", "B"]).by_type.to_dict()
    {'A': 1.0, 'B': 0.0}
    """
    return dice(imputed, bulk, labels, binarize=binarize, bulk_binarize=bulk_binarize, regions=regions, specific=True)


def dice_depth_correlation(per_cell: ArrayLike, depth: ArrayLike) -> float:
    """Compute the Spearman correlation of per-cell Dice coefficients with depth; undefined cells are left out.

    Parameters
    ----------
    per_cell
        Coefficients, length n, as `DiceScore.per_cell`.
    depth
        Depth of the cells, length n.

    Returns
    -------
    Spearman's rho, -1 to 1.

    Raises
    ------
    DataError
        If the lengths differ, depth is not finite, fewer than three cells are defined, or either side is constant.

    Examples
    --------
    >>> dice_depth_correlation([0.1, 0.2, 0.4], [100, 200, 300])
    1.0
    """
    from scipy.stats import spearmanr

    score_n, depth_n = np.asarray(per_cell, dtype=np.float64), np.asarray(depth, dtype=np.float64)
    if score_n.ndim != 1 or score_n.shape != depth_n.shape:
        msg = f"per_cell has shape {score_n.shape} and depth {depth_n.shape}, expected one value a cell in both."
        raise DataError(msg)
    check_finite(depth_n, name="depth")
    defined = np.isfinite(score_n)
    score_n, depth_n = score_n[defined], depth_n[defined]
    if len(score_n) < 3 or np.ptp(score_n) == 0 or np.ptp(depth_n) == 0:
        msg = (
            f"A rank correlation needs at least 3 cells that differ in both values, found {len(score_n)} cells with "
            f"{len(np.unique(score_n))} coefficients and {len(np.unique(depth_n))} depths."
        )
        raise DataError(msg)
    return float(spearmanr(score_n, depth_n).statistic)


def _check_binarize(binarize: str | float, bulk_binarize: str | float) -> None:
    """Refuse binarisation rules that do not exist."""
    if isinstance(binarize, str):
        check_choice(binarize, _BINARIZE, name="binarize")
    elif not np.isfinite(binarize):
        msg = f"binarize is {binarize}, expected a finite threshold."
        raise ConfigError(msg)
    if isinstance(bulk_binarize, str):
        check_choice(bulk_binarize, _BULK, name="bulk_binarize")
    elif not 0 < bulk_binarize < 1:
        msg = f"bulk_binarize is {bulk_binarize}, expected a quantile in (0, 1)."
        raise ConfigError(msg)


def _check_values(values_np: Any) -> None:
    """Refuse NaN and infinite values of a dense or CSR matrix."""
    if not hasattr(values_np, "indptr"):
        check_finite(values_np, name="imputed")
    elif (bad := ~np.isfinite(values_np.data)).any():
        row = int(np.searchsorted(values_np.indptr, np.argmax(bad), side="right")) - 1
        msg = f"imputed holds {int(bad.sum())} NaN or infinite values, the first in row {row}. Repair the values."
        raise DataError(msg)


def _as_bulk(bulk: Any, names: tuple[str, ...], n_regions: int) -> NDArray[np.float64]:
    """Return the bulk weights of the named types, shape (types, p)."""
    rows = {str(key): bulk[key] for key in bulk} if isinstance(bulk, Mapping) else None
    if rows is None:
        if not (hasattr(bulk, "index") and hasattr(bulk, "to_numpy")):
            msg = f"bulk is a {type(bulk).__name__}, expected a DataFrame (types, regions) or a mapping type → weights."
            raise DataError(msg)
        rows = dict(zip(map(str, bulk.index), bulk.to_numpy(), strict=True))
    if missing := [name for name in names if name not in rows]:
        msg = f"{len(missing)} label(s) have no bulk profile, the first is '{missing[0]}'. {nearest(missing[0], rows)}"
        raise DataError(msg)
    if wrong := [name for name in names if np.shape(rows[name]) != (n_regions,)]:
        msg = f"The bulk profile of '{wrong[0]}' has shape {np.shape(rows[wrong[0]])}, imputed has {n_regions} regions."
        raise DataError(msg)
    bulk_tp = np.array([np.asarray(rows[name], dtype=np.float64) for name in names])
    check_finite(bulk_tp, name="bulk")
    return bulk_tp


def _as_regions(regions: ArrayLike | str | None, bulk_tp: NDArray[np.float64]) -> NDArray[np.intp]:
    """Return the indices of the compared regions."""
    n_regions = bulk_tp.shape[1]
    if isinstance(regions, str):
        check_choice(regions, ("all", "foreground"), name="regions")
        columns = np.arange(n_regions) if regions == "all" else np.flatnonzero((bulk_tp > 0).any(axis=0))
    elif regions is None:
        columns = np.flatnonzero((bulk_tp > 0).any(axis=0))
    else:
        given = np.asarray(regions)
        if given.dtype == bool and given.shape != (n_regions,):
            msg = f"The mask regions has shape {given.shape}, imputed has {n_regions} regions."
            raise DataError(msg)
        if given.dtype != bool and not (given.ndim == 1 and np.issubdtype(given.dtype, np.integer)):
            msg = (
                f"regions has dtype {given.dtype} and shape {given.shape}, expected a boolean mask or integer indices."
            )
            raise ConfigError(msg)
        columns = np.flatnonzero(given) if given.dtype == bool else given.astype(np.intp)
        if len(columns) and (columns.min() < 0 or columns.max() >= n_regions):
            msg = f"regions holds the index {columns.min()} to {columns.max()}, valid are 0 to {n_regions - 1}."
            raise DataError(msg)
    if len(columns) == 0:
        msg = "No region is left to compare: give regions, or bulk profiles with positive weights."
        raise DataError(msg)
    return columns


def _call_bulk(bulk_tp: NDArray[np.float64], rule: str | float) -> NDArray[np.bool_]:
    """Return which regions the bulk of each type calls open, shape (types, p)."""
    if rule == "positive":
        return bulk_tp > 0
    return bulk_tp > np.quantile(bulk_tp, 0.5 if rule == "median" else float(rule), axis=1, keepdims=True)


def _dice_of_cells(
    values_np: Any, open_tp: NDArray[np.bool_], code_n: NDArray[np.intp], binarize: str | float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return coefficient and chance level of each cell, in chunks of dense rows."""
    n, p = values_np.shape
    column_mean_p = np.asarray(values_np.mean(axis=0)).ravel()
    dice_n, chance_n = np.empty(n), np.empty(n)
    step = max(1, _CHUNK_VALUES // p)
    for start in range(0, n, step):
        rows = slice(start, min(start + step, n))
        block = values_np[rows]
        block = np.asarray(block.toarray() if hasattr(block, "toarray") else block, dtype=np.float64)
        truth_bp = open_tp[code_n[rows]]
        truth_b = truth_bp.sum(axis=1)
        called_bp = _call_cells(block, truth_b, column_mean_p, binarize)
        called_b = called_bp.sum(axis=1)
        both_b = (called_bp & truth_bp).sum(axis=1)
        with np.errstate(invalid="ignore"):  # 0 / 0 is the NaN of a cell where nothing is called
            dice_n[rows] = 2 * both_b / (called_b + truth_b)
            chance_n[rows] = 2 * called_b * truth_b / (called_b + truth_b) / p
    return dice_n, chance_n


def _call_cells(
    block_bp: NDArray[np.float64], truth_b: NDArray[np.intp], column_mean_p: NDArray[np.float64], rule: str | float
) -> NDArray[np.bool_]:
    """Return which regions are called open in each cell of a block."""
    if rule == "mean":
        return block_bp > block_bp.mean(axis=1, keepdims=True)
    if rule == "row_column_mean":
        return (block_bp > block_bp.mean(axis=1, keepdims=True)) & (block_bp > column_mean_p)
    if rule != "quantile":
        return block_bp > float(rule)
    p = block_bp.shape[1]
    ascending_bp = np.sort(block_bp, axis=1)
    # the truth_b-th highest value; where nothing is open in bulk, nothing is called
    threshold_b = ascending_bp[np.arange(len(truth_b)), np.minimum(p - truth_b, p - 1)]
    called_bp = block_bp >= threshold_b[:, None]
    overfull_b = called_bp.sum(axis=1) > truth_b
    called_bp[overfull_b] &= block_bp[overfull_b] > ascending_bp[overfull_b, :1]
    called_bp[truth_b == 0] = False
    return called_bp
