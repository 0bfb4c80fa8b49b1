"""Clustering agreement: Leiden clusters of an embedding scored against labels, with error bars."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from epivi._errors import ConfigError
from epivi.metrics._inputs import as_embedding, as_labels, package_version
from epivi.metrics.embedding._graph import bisect, leiden, ordered_graph
from epivi.metrics.embedding.leiden import (
    LeidenPartition,
    check_count,
    check_resolutions,
    describe,
    leiden_fixed_k,
    score_rows,
)
from epivi.metrics.embedding.scores import cluster_scores

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd
    from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True, eq=False)
class ClusterAgreement:
    """Agreement of Leiden clusters with labels: at the label count first, best over a sweep second.

    Attributes
    ----------
    ari, nmi, ami, silhouette_clusters, silhouette_labels
        Scores of the partition at the label count.
    partition
        That partition: clusters, their number, the number asked for, settings.
    sweep
        Table of `leiden_sweep`, None unless resolutions were given.
    best
        Row of the sweep with the highest ARI. Optimistic: the labels chose it.
    """

    ari: float
    nmi: float
    ami: float
    silhouette_clusters: float
    silhouette_labels: float
    n_labels: int
    partition: LeidenPartition
    sweep: pd.DataFrame | None = None
    best: dict[str, float] | None = None

    @property
    def clusters(self) -> NDArray[np.intp]:
        """Cluster of each cell at the label count."""
        return self.partition.clusters

    @property
    def n_clusters(self) -> int:
        """Number of clusters reached."""
        return self.partition.n_clusters

    def to_dict(self) -> dict[str, Any]:
        """Return plain Python values without the clusters and the sweep table, ready for JSON or `uns`.

        Examples
        --------
        >>> import numpy as np
        >>> rng = np.random.default_rng(0)
        >>> z = np.concatenate([rng.normal(size=(40, 2)), rng.normal(size=(40, 2)) + 20])
        >>> cluster_agreement(z, np.repeat(["B", "T"], 40)).to_dict()["n_clusters"]
        2
        """
        partition = self.partition
        return {
            "n_clusters": partition.n_clusters,
            "n_clusters_target": partition.n_target,
            "n_labels": self.n_labels,
            "ari": self.ari,
            "nmi": self.nmi,
            "ami": self.ami,
            "silhouette_clusters": self.silhouette_clusters,
            "silhouette_labels": self.silhouette_labels,
            "resolution": partition.resolution,
            "best_over_sweep": self.best,
            "n": partition.n,
            "n_neighbors": partition.n_neighbors,
            "weighting": partition.weighting,
            "clustering": "Leiden (RBConfigurationVertexPartition)",
            "n_starts": partition.n_starts,
            "seed": partition.seed,
            "epivi_version": package_version(),
        }


def cluster_agreement(
    Z: ArrayLike,
    labels: ArrayLike,
    *,
    n_clusters: int | None = None,
    resolutions: Sequence[float] | None = None,
    n_neighbors: int = 15,
    weighting: str = "connectivities",
    n_starts: int = 1,
    seed: int = 0,
) -> ClusterAgreement:
    """Cluster an embedding by Leiden at the number of labels and score the clusters against the labels.

    Parameters
    ----------
    Z
        Embedding, shape (n, z); Euclidean distances.
    labels
        Label of each cell, length n.
    n_clusters
        Clusters to aim at; by default the number of different labels.
    resolutions
        Leiden resolutions of an additional sweep, reported second.
    n_neighbors
        Neighbours of the graph, the cell itself among them (as scanpy counts).
    weighting
        ``"connectivities"`` of scanpy, or ``"jaccard"``: s / (2k - s) with s shared neighbours, values below 1/15
        dropped (used for ConvNet-VAE with k = 20).
    n_starts
        Leiden runs a resolution; the partition of best quality is kept.
    seed
        Seed of graph and Leiden: the same seed gives the same partition.

    Returns
    -------
    Scores at the label count, the partition, and the sweep.

    Raises
    ------
    DataError
        If `Z` is not a finite matrix or is constant, or if `labels` has the wrong length, missing entries or a single
        value.
    ConfigError
        If `n_clusters`, `n_neighbors`, `n_starts`, `weighting` or a resolution is not valid.

    Notes
    -----
    The papers of SAILER, SAILERX and ConvNet-VAE used Louvain; Leiden is its successor.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> z = np.concatenate([rng.normal(size=(40, 2)), rng.normal(size=(40, 2)) + 20])
    >>> result = cluster_agreement(z, np.repeat(["B", "T"], 40))
    >>> result.ari, result.n_clusters
    (1.0, 2)
    """
    z_nd = as_embedding(Z)
    labelling = as_labels(labels, z_nd.shape[0])
    target = check_count(len(labelling.names) if n_clusters is None else n_clusters, z_nd.shape[0])
    check_count(n_starts, None, name="n_starts")
    wanted = [] if resolutions is None else check_resolutions(resolutions)
    graph = ordered_graph(z_nd, n_neighbors, weighting=weighting, seed=seed)
    fixed = bisect(graph, target, n_starts=n_starts, seed=seed)
    swept = [leiden(graph, resolution, n_starts=n_starts, seed=seed) for resolution in wanted]
    rows = score_rows(z_nd, [fixed, *swept], labelling, n_neighbors, seed)
    scores, sweep = rows[0], None
    if resolutions is not None:
        import pandas as pd

        sweep = pd.DataFrame(rows[1:])
    return ClusterAgreement(
        **{key: scores[key] for key in ("ari", "nmi", "ami", "silhouette_clusters", "silhouette_labels")},
        n_labels=len(labelling.names),
        partition=describe(fixed, target, z_nd.shape[0], n_neighbors, weighting, n_starts, seed),
        sweep=sweep,
        best=None if sweep is None else dict(max(rows[1:], key=lambda row: row["ari"])),
    )


def subsample_scores(
    Z: ArrayLike,
    labels: ArrayLike,
    *,
    clusters: ArrayLike | None = None,
    fraction: float = 0.9,
    n: int = 10,
    n_clusters: int | None = None,
    n_neighbors: int = 15,
    seed: int = 0,
) -> pd.DataFrame:
    """Score random subsamples of the cells, for error bars (SAILERX: 90 % of the cells).

    Parameters
    ----------
    Z, labels
        Embedding of shape (n_cells, z) and label of each cell.
    clusters
        A clustering to be scored on each subsample. By default each subsample is clustered anew at the label count, so
        that the spread includes that of the clustering.
    fraction
        Share of the cells in a subsample, drawn without replacement.
    n
        Number of subsamples.
    n_clusters, n_neighbors
        As in `cluster_agreement`; used without `clusters`.
    seed
        Subsample i is drawn by seed + i and clustered with `seed`.

    Returns
    -------
    One row a subsample with the scores of `cluster_scores`, `seed` and `n_cells`.

    Raises
    ------
    DataError
        If `Z`, `labels` or `clusters` cannot be used (see `cluster_agreement`).
    ConfigError
        If `fraction` is not in (0, 1], `n` is not a positive integer, or an option of the clustering is not valid.

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> z = np.concatenate([rng.normal(size=(40, 2)), rng.normal(size=(40, 2)) + 20])
    >>> y = np.repeat(["B", "T"], 40)
    >>> subsample_scores(z, y, clusters=y, n=3)["ari"].tolist()
    [1.0, 1.0, 1.0]
    """
    import pandas as pd

    z_nd = as_embedding(Z)
    labelling = as_labels(labels, z_nd.shape[0])
    given = None if clusters is None else as_labels(clusters, z_nd.shape[0], name="clusters", min_values=1).codes
    if not 0 < fraction <= 1:
        msg = f"fraction is {fraction}, expected a share of the cells in (0, 1]."
        raise ConfigError(msg)
    size = round(fraction * z_nd.shape[0])
    rows = []
    for i in range(check_count(n, None, name="n")):
        cells = np.sort(np.random.default_rng(seed + i).choice(z_nd.shape[0], size=size, replace=False))
        part, truth = z_nd[cells], labelling.codes[cells]
        if given is None:
            found = leiden_fixed_k(part, truth, n_clusters=n_clusters, n_neighbors=n_neighbors, seed=seed).clusters
        else:
            found = given[cells]
        rows.append({**cluster_scores(found, truth, part, seed=seed), "seed": seed + i, "n_cells": size})
    return pd.DataFrame(rows)
