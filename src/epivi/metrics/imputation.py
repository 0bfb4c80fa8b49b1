"""Scores of imputed tracks against observed ones: genome-wide, in genes and promoters, and where signal is highest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from epivi._errors import ConfigError, DataError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

_SCORES = ("mse", "pearson", "spearman")


def imputation_scores(
    observed: ArrayLike,
    predicted: ArrayLike,
    *,
    genes: ArrayLike | None = None,
    promoters: ArrayLike | None = None,
    top_share: float = 0.01,
) -> dict[str, Any]:
    """Compare imputed with observed tracks: MSE, Pearson and Spearman correlation by region, and overlap of the tops.

    Parameters
    ----------
    observed, predicted
        One track, shape (bins,), or several, shape (tracks, bins), on the same scale. Give only bins that are to be
        scored, and only tracks that were measured.
    genes, promoters
        Which bins lie in gene bodies and in promoters, Boolean, shape (bins,).
    top_share
        Share of the bins that are the top, above 0 and at most 1; at least one bin.

    Returns
    -------
    Numbers for one track, arrays of shape (tracks,) for several (``pandas.DataFrame(scores)`` is a table):

    - ``mse``, ``pearson``, ``spearman`` over all bins;
    - the same with ``_genes`` and ``_promoters``, where they are given;
    - the same with ``_top_observed`` and ``_top_predicted``: in the bins at least as high as the k-th highest observed
      or predicted one, k = ``top_share`` of the bins. Ties may make these more than k: ``n_top_observed`` and
      ``n_top_predicted`` say how many;
    - ``overlap_top``: share of the top k of the one that is in the top k of the other, expected over random order of
      ties, so that two constant tracks overlap in ``top_share`` and not in everything.

    A correlation is NaN where one of the two is constant or there are fewer than two bins; all scores of a region
    without any bin are NaN.

    Raises
    ------
    DataError
        If the tracks are not numbers, differ in shape, have no bin, or hold NaN or infinite values, or if a mask is not
        Boolean or has not one value a bin.
    ConfigError
        If `top_share` is not a number above 0 and at most 1.

    References
    ----------
    Schreiber et al., Genome Biol. 24, 79 (2023), for the measures of the ENCODE imputation challenge.

    Examples
    --------
    >>> scores = imputation_scores([0.0, 1.0, 2.0, 5.0], [0.0, 2.0, 1.0, 4.0], top_share=0.25)
    >>> scores["mse"], round(scores["spearman"], 3), scores["overlap_top"]
    (0.75, 0.8, 1.0)
    """
    observed_tl, predicted_tl = _as_tracks(observed, "observed"), _as_tracks(predicted, "predicted")
    if np.shape(observed) != np.shape(predicted):
        message = f"observed has shape {np.shape(observed)}, predicted {np.shape(predicted)}: give the same bins."
        raise DataError(message)
    n_bins = observed_tl.shape[1]
    number = isinstance(top_share, int | float | np.integer | np.floating) and not isinstance(top_share, bool)
    if not number or not 0 < top_share <= 1:
        message = f"top_share is {top_share!r}, expected a number above 0 and at most 1."
        raise ConfigError(message)
    masks = {"genes": genes, "promoters": promoters}
    regions = {f"_{name}": _as_mask(mask, n_bins, name) for name, mask in masks.items() if mask is not None}
    n_top = max(1, round(float(top_share) * n_bins))
    rows = [_scores(x, y, regions, n_top) for x, y in zip(observed_tl, predicted_tl, strict=True)]
    if np.ndim(observed) == 1:
        return rows[0]
    return {key: np.array([row[key] for row in rows]) for key in rows[0]}


def _scores(
    x_l: NDArray[np.float64], y_l: NDArray[np.float64], regions: dict[str, NDArray[np.bool_]], n_top: int
) -> dict[str, float | int]:
    """Return all scores of one track."""
    top_x, weight_x = _top(x_l, n_top)
    top_y, weight_y = _top(y_l, n_top)
    scores: dict[str, float | int] = _compare(x_l, y_l, "")
    for name, mask in {**regions, "_top_observed": top_x, "_top_predicted": top_y}.items():
        scores |= _compare(x_l[mask], y_l[mask], name)
    overlap = float(weight_x @ weight_y) / n_top
    return scores | {
        "n_top_observed": int(top_x.sum()),
        "n_top_predicted": int(top_y.sum()),
        # the weights of ties are fractions: their sum may pass 1 by rounding
        "overlap_top": min(overlap, 1.0),
    }


def _compare(x: NDArray[np.float64], y: NDArray[np.float64], suffix: str) -> dict[str, float | int]:
    """Return the three scores of a set of bins."""
    if x.size == 0:
        return dict.fromkeys((name + suffix for name in _SCORES), float("nan"))
    from scipy.stats import rankdata

    values = (float(np.mean((x - y) ** 2)), _correlation(x, y), _correlation(rankdata(x), rankdata(y)))
    return dict(zip((name + suffix for name in _SCORES), values, strict=True))


def _correlation(x: NDArray[np.float64], y: NDArray[np.float64]) -> float:
    """Return Pearson's r; NaN if one of the two is constant."""
    if x.size < 2 or x.min() == x.max() or y.min() == y.max():
        return float("nan")
    # scaled first, so that squares neither overflow nor vanish
    a, b = x - x.mean(), y - y.mean()
    a, b = a / np.abs(a).max(), b / np.abs(b).max()
    return float(np.clip((a @ b) / np.sqrt((a @ a) * (b @ b)), -1.0, 1.0))


def _top(values: NDArray[np.float64], n_top: int) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
    """Return which bins are at least as high as the n-th highest, and with which chance each is among the top n."""
    threshold = np.partition(values, values.size - n_top)[values.size - n_top]
    above, tied = values > threshold, values == threshold
    return above | tied, above + tied * ((n_top - above.sum()) / tied.sum())


def _as_tracks(values: ArrayLike, name: str) -> NDArray[np.float64]:
    """Return finite tracks of shape (tracks, bins)."""
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        message = f"{name} cannot be read as numbers: {error}."
        raise DataError(message) from error
    if array.ndim not in (1, 2) or array.size == 0:
        message = f"{name} has shape {array.shape}, expected (bins,) or (tracks, bins) with at least one bin."
        raise DataError(message)
    if (bad := ~np.isfinite(array)).any():
        at = np.argwhere(bad)[0]
        where = f"bin {at[-1]}" + (f" of track {at[0]}" if array.ndim == 2 else "")
        n_nan = int(np.isnan(array).sum())
        message = (
            f"{name} holds {n_nan} NaN and {int(bad.sum()) - n_nan} infinite values, the first in {where}. "
            "Leave out bins and tracks that are not available."
        )
        raise DataError(message)
    return np.atleast_2d(array)


def _as_mask(mask: ArrayLike, n_bins: int, name: str) -> NDArray[np.bool_]:
    """Return a Boolean mask of the bins."""
    array = np.asarray(mask)
    if array.dtype != bool or array.shape != (n_bins,):
        message = f"{name} is {array.dtype} of shape {array.shape}, expected a Boolean for each of the {n_bins} bins."
        raise DataError(message)
    return array
