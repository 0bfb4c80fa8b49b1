"""The silhouette of each cell, as scikit-learn and scib-metrics define it, without compiling anything."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from epivi.metrics._inputs import check_choice

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

_CHUNK = 1024
METRICS = ("euclidean", "cosine")
BETWEEN = ("nearest", "mean_other")


def summed_distances(
    z_nd: NDArray[np.float64], onehot_nk: NDArray[np.float64], *, metric: str = "euclidean"
) -> Iterator[tuple[NDArray[np.intp], NDArray[np.float64]]]:
    """Yield rows of cells and the sums of their distances to the cells of each group, shape (b, k).

    Parameters
    ----------
    z_nd
        Embedding, shape (n, d).
    onehot_nk
        Whether each cell is in each group, shape (n, k).
    metric
        ``"euclidean"``, or ``"cosine"``: one minus the cosine, 1 to a cell at the origin.
    """
    n = z_nd.shape[0]
    if metric == "cosine":
        length_n = np.linalg.norm(z_nd, axis=1, keepdims=True)
        x_nd = z_nd / np.where(length_n > 0, length_n, 1.0)
    else:
        x_nd = z_nd - z_nd.mean(axis=0)  # keeps the subtraction below from cancelling
    square_n = np.einsum("nd,nd->n", x_nd, x_nd)
    for start in range(0, n, _CHUNK):
        rows = np.arange(start, min(start + _CHUNK, n))
        distance_bn = x_nd[rows] @ x_nd.T
        if metric == "cosine":
            np.clip(1 - distance_bn, 0.0, 2.0, out=distance_bn)
        else:
            distance_bn *= -2
            distance_bn += square_n
            distance_bn += square_n[rows, None]
            np.sqrt(np.maximum(distance_bn, 0, out=distance_bn), out=distance_bn)
        distance_bn[np.arange(len(rows)), rows] = 0.0
        yield rows, distance_bn @ onehot_nk


def silhouette_samples(
    z_nd: NDArray[np.floating], labels: NDArray[np.intp], *, metric: str = "euclidean", between: str = "nearest"
) -> NDArray[np.float64]:
    """Return the silhouette (b - a) / max(a, b) of each cell, 0 for a cell alone in its cluster, shape (n,).

    Parameters
    ----------
    z_nd
        Embedding, shape (n, d).
    labels
        Cluster of each cell, shape (n,); two clusters or more.
    metric
        ``"euclidean"`` or ``"cosine"``.
    between
        What b is: ``"nearest"``, the mean distance to the nearest other cluster (Rousseeuw, J. Comput. Appl. Math. 20,
        53, 1987); ``"mean_other"``, that to all cells of other clusters, as BRAS has it (Rautenstrauch and Ohler, Nat.
        Biotechnol., 2025).

    Raises
    ------
    ConfigError
        If `metric` or `between` is unknown.
    """
    check_choice(metric, METRICS, name="metric")
    check_choice(between, BETWEEN, name="between")
    n = z_nd.shape[0]
    _, codes = np.unique(labels, return_inverse=True)
    size_k = np.bincount(codes)
    onehot_nk = np.zeros((n, len(size_k)))
    onehot_nk[np.arange(n), codes] = 1.0
    values_n = np.zeros(n)
    for rows, sums_bk in summed_distances(np.asarray(z_nd, dtype=np.float64), onehot_nk, metric=metric):
        values_n[rows] = silhouette_values(sums_bk, codes[rows], size_k, between)
    return values_n


def silhouette_values(
    sums_bk: NDArray[np.float64], own_b: NDArray[np.intp], size_k: NDArray[np.intp], between: str = "nearest"
) -> NDArray[np.float64]:
    """Return the silhouettes of a chunk of cells from their summed distances to each cluster."""
    row = np.arange(len(own_b))
    own_size_b = size_k[own_b]
    inner_b = sums_bk[row, own_b] / np.maximum(own_size_b - 1, 1)
    if between == "nearest":
        mean_bk = sums_bk / size_k
        mean_bk[row, own_b] = np.inf
        outer_b = mean_bk.min(axis=1)
    else:
        outer_b = (sums_bk.sum(axis=1) - sums_bk[row, own_b]) / (size_k.sum() - own_size_b)
    scale_b = np.maximum(inner_b, outer_b)
    defined = (own_size_b > 1) & (scale_b > 0)
    values_b = np.zeros(len(own_b))
    values_b[defined] = (outer_b - inner_b)[defined] / scale_b[defined]
    return values_b
