"""Agreement of a given clustering with labels, and the silhouette of any labelling of an embedding."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import numpy as np

from epivi.metrics._inputs import Labels, as_embedding, as_labels, draw
from epivi.metrics.embedding.silhouettes import silhouette_values, summed_distances

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike, NDArray

logger = logging.getLogger(__name__)


def cluster_scores(
    clusters: ArrayLike, labels: ArrayLike, Z: ArrayLike | None = None, *, n_max: int = 20_000, seed: int = 0
) -> dict[str, float | int]:
    """Compare a clustering with labels: ARI, NMI, AMI and, given the embedding, two silhouettes.

    Parameters
    ----------
    clusters
        Cluster of each cell, length n.
    labels
        Label of each cell, length n.
    Z
        Embedding, shape (n, z), for the silhouettes (Euclidean, Z as it is).
    n_max
        The silhouette is quadratic in cells: more than this are subsampled with `seed`.
    seed
        Seed of the subsample.

    Returns
    -------
    `n_clusters`, `n_labels`, `ari`, `nmi` (arithmetic mean), `ami`, and with `Z` also `silhouette_clusters` (on the
    clusters, as SAILERX), `silhouette_labels` (on the labels, independent of the clustering) and `n_silhouette`, the
    cells they were computed on. A silhouette of one cluster, or of single cells alone, is NaN.

    Raises
    ------
    DataError
        If lengths differ, entries are missing, the labels take a single value, or `Z` is not finite or is constant.

    Examples
    --------
    >>> scores = cluster_scores([0, 0, 1, 1], ["B", "B", "A", "A"])
    >>> scores["ari"], scores["n_clusters"]
    (1.0, 2)
    """
    n = np.shape(labels)[0] if np.ndim(labels) else 0
    labelling = as_labels(labels, n)
    clustering = as_labels(clusters, n, name="clusters", min_values=1)
    scores = agreement(clustering.codes, labelling)
    if Z is not None:
        z_nd = as_embedding(Z)
        as_labels(labels, z_nd.shape[0])
        scores |= silhouette_pair(z_nd, [clustering.codes], labelling, n_max=n_max, seed=seed)[0]
    return scores


def agreement(clusters: NDArray[np.intp], labels: Labels) -> dict[str, float | int]:
    """Return ARI, NMI and AMI of clusters with labels, and both counts."""
    from sklearn.metrics import adjusted_mutual_info_score, adjusted_rand_score, normalized_mutual_info_score

    return {
        "n_clusters": len(np.unique(clusters)),
        "n_labels": len(labels.names),
        "ari": float(adjusted_rand_score(labels.codes, clusters)),
        "nmi": float(normalized_mutual_info_score(labels.codes, clusters)),
        "ami": float(adjusted_mutual_info_score(labels.codes, clusters)),
    }


def silhouette_pair(
    z_nd: NDArray[np.float64], clusterings: Sequence[NDArray[np.intp]], labels: Labels, *, n_max: int, seed: int
) -> list[dict[str, float | int]]:
    """Return the silhouettes on clusters and on labels for each clustering, from one pass over the distances."""
    rows = draw(z_nd.shape[0], n_max, seed)
    if len(rows) < z_nd.shape[0]:
        logger.info("Silhouettes are computed on %d of %d cells (seed %d).", len(rows), z_nd.shape[0], seed)
    *of_clusters, of_labels = silhouettes(z_nd[rows], [codes[rows] for codes in [*clusterings, labels.codes]])
    return [
        {"silhouette_clusters": value, "silhouette_labels": of_labels, "n_silhouette": len(rows)}
        for value in of_clusters
    ]


def silhouettes(z_nd: NDArray[np.float64], labelings: Sequence[NDArray[np.intp]]) -> list[float]:
    """Return the mean Euclidean silhouette of several labelings of the same cells.

    With a the mean distance of a cell to its own cluster and b to the nearest other one, the mean of
    (b - a) / max(a, b); 0 for a cluster of one cell, NaN if there is one cluster or nothing but single cells
    (Rousseeuw, J. Comput. Appl. Math. 20, 53, 1987). Distances are computed once, in chunks, for all labelings.
    """
    n = z_nd.shape[0]
    codes = [np.unique(labeling, return_inverse=True)[1] for labeling in labelings]
    sizes = [np.bincount(code) for code in codes]
    usable = [i for i, size in enumerate(sizes) if 1 < len(size) < n]
    totals = np.zeros(len(labelings))
    if usable:
        offsets = np.cumsum([0, *(len(sizes[i]) for i in usable)])
        onehot_nk = np.zeros((n, offsets[-1]))
        for i, offset in zip(usable, offsets, strict=False):
            onehot_nk[np.arange(n), offset + codes[i]] = 1.0
        for rows, sums_bk in summed_distances(z_nd, onehot_nk):
            for i, offset in zip(usable, offsets, strict=False):
                part = sums_bk[:, offset : offset + len(sizes[i])]
                totals[i] += silhouette_values(part, codes[i][rows], sizes[i]).sum()
    return [float(totals[i] / n) if i in usable else float("nan") for i in range(len(labelings))]
