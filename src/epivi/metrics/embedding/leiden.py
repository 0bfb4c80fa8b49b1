"""Leiden partitions of an embedding: at a given number of clusters, or swept over resolutions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from epivi._errors import ConfigError
from epivi.metrics._inputs import Labels, as_embedding, as_labels
from epivi.metrics.embedding._graph import Partition, bisect, leiden, ordered_graph
from epivi.metrics.embedding.scores import agreement, silhouette_pair

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd
    from numpy.typing import ArrayLike, NDArray

SILHOUETTE_MAX = 20_000


@dataclass(frozen=True, eq=False)
class LeidenPartition:
    """A Leiden partition and how it was found.

    Attributes
    ----------
    clusters
        Cluster of each cell, shape (n,), 0 the largest.
    n_clusters, n_target
        Clusters found and asked for.
    resolution, quality
        Resolution of the partition and its quality at that resolution.
    n, n_neighbors, weighting, n_starts, seed
        Cells and settings; `n_neighbors` counts the cell itself.
    """

    clusters: NDArray[np.intp]
    n_clusters: int
    n_target: int
    resolution: float
    quality: float
    n: int
    n_neighbors: int
    weighting: str
    n_starts: int
    seed: int


def leiden_fixed_k(
    Z: ArrayLike,
    labels: ArrayLike | None = None,
    *,
    n_clusters: int | None = None,
    n_neighbors: int = 15,
    weighting: str = "connectivities",
    n_starts: int = 1,
    seed: int = 0,
) -> LeidenPartition:
    """Cluster an embedding by Leiden into a given number of clusters, or the nearest number that is reached.

    Bisection on the logarithm of the resolution in [1e-3, 10], at most 30 steps. The visited partition closest to
    the target is kept, ties decided by modularity.

    Parameters
    ----------
    Z
        Embedding, shape (n, z).
    labels
        Labels, length n, whose number is the target unless `n_clusters` is given.
    n_clusters
        The target.
    n_neighbors, weighting, n_starts, seed
        As in `cluster_agreement`.

    Returns
    -------
    The partition, with `n_clusters` reached beside `n_target`.

    Raises
    ------
    DataError
        If `Z` or `labels` cannot be used (see `cluster_agreement`).
    ConfigError
        If neither `labels` nor `n_clusters` is given, or an option is not valid.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> z = np.concatenate([rng.normal(size=(40, 2)), rng.normal(size=(40, 2)) + 20])
    >>> leiden_fixed_k(z, n_clusters=2).n_clusters
    2
    """
    z_nd = as_embedding(Z)
    if n_clusters is None:
        if labels is None:
            msg = "leiden_fixed_k needs a target: give labels or n_clusters."
            raise ConfigError(msg)
        n_clusters = len(as_labels(labels, z_nd.shape[0]).names)
    target = check_count(n_clusters, z_nd.shape[0])
    check_count(n_starts, None, name="n_starts")
    graph = ordered_graph(z_nd, n_neighbors, weighting=weighting, seed=seed)
    found = bisect(graph, target, n_starts=n_starts, seed=seed)
    return describe(found, target, z_nd.shape[0], n_neighbors, weighting, n_starts, seed)


def leiden_sweep(
    Z: ArrayLike,
    labels: ArrayLike,
    resolutions: Sequence[float] = (0.2, 0.4, 0.6, 0.8, 1.0, 1.2, 1.4),
    *,
    n_neighbors: int | Sequence[int] = 15,
    weighting: str = "connectivities",
    n_starts: int = 1,
    seed: int = 0,
) -> pd.DataFrame:
    """Cluster an embedding by Leiden over resolutions and neighbour counts, and score every partition.

    Parameters
    ----------
    Z, labels
        Embedding of shape (n, z) and label of each cell.
    resolutions
        Leiden resolutions. ConvNet-VAE: 0.6 to 1.5 by 0.1 at 20 neighbours with ``weighting="jaccard"``.
    n_neighbors
        One or several neighbour counts, the cell itself among them.
    weighting, n_starts, seed
        As in `cluster_agreement`.

    Returns
    -------
    One row a resolution and neighbour count: `n_neighbors`, `resolution`, `n_clusters`, `n_labels`, `ari`, `nmi`,
    `ami`, `silhouette_clusters`, `silhouette_labels`, `n_silhouette`. The best row is optimistic.

    Raises
    ------
    DataError
        If `Z` or `labels` cannot be used (see `cluster_agreement`).
    ConfigError
        If an option is not valid.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> z = np.concatenate([rng.normal(size=(40, 2)), rng.normal(size=(40, 2)) + 20])
    >>> table = leiden_sweep(z, np.repeat(["B", "T"], 40), [0.01, 2.0])
    >>> table["n_clusters"].is_monotonic_increasing
    True
    """
    import pandas as pd

    z_nd = as_embedding(Z)
    labelling = as_labels(labels, z_nd.shape[0])
    wanted = check_resolutions(resolutions)
    check_count(n_starts, None, name="n_starts")
    rows: list[dict[str, Any]] = []
    for k in [n_neighbors] if isinstance(n_neighbors, (int, np.integer)) else list(n_neighbors):
        graph = ordered_graph(z_nd, int(k), weighting=weighting, seed=seed)
        found = [leiden(graph, resolution, n_starts=n_starts, seed=seed) for resolution in wanted]
        rows += score_rows(z_nd, found, labelling, int(k), seed)
    return pd.DataFrame(rows)


def score_rows(
    z_nd: NDArray[np.float64], partitions: Sequence[Partition], labels: Labels, n_neighbors: int, seed: int
) -> list[dict[str, Any]]:
    """Return a row of scores for each partition."""
    silhouette = silhouette_pair(z_nd, [p.clusters for p in partitions], labels, n_max=SILHOUETTE_MAX, seed=seed)
    return [
        {"n_neighbors": n_neighbors, "resolution": p.resolution, **agreement(p.clusters, labels), **widths}
        for p, widths in zip(partitions, silhouette, strict=True)
    ]


def describe(
    found: Partition, target: int, n: int, n_neighbors: int, weighting: str, n_starts: int, seed: int
) -> LeidenPartition:
    """Return a partition together with the settings that made it."""
    return LeidenPartition(
        clusters=found.clusters,
        n_clusters=found.n_clusters,
        n_target=target,
        resolution=found.resolution,
        quality=found.quality,
        n=n,
        n_neighbors=n_neighbors,
        weighting=weighting,
        n_starts=n_starts,
        seed=seed,
    )


def check_count(value: int, most: int | None, *, name: str = "n_clusters") -> int:
    """Return a positive integer of at most `most`."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 1:
        msg = f"{name} is {value!r}, expected a positive integer."
        raise ConfigError(msg)
    if most is not None and value > most:
        msg = f"{name} is {value}, but there are only {most} cells."
        raise ConfigError(msg)
    return int(value)


def check_resolutions(resolutions: Sequence[float]) -> list[float]:
    """Return the resolutions as positive floats."""
    values = [float(value) for value in resolutions]
    if not values or any(not (np.isfinite(value) and value > 0) for value in values):
        msg = f"resolutions is {values}, expected one or more positive numbers."
        raise ConfigError(msg)
    return values
