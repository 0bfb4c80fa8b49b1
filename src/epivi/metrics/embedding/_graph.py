"""Nearest neighbours of an embedding, the weighted cell graph, and Leiden partitions of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from epivi._errors import ConfigError
from epivi.metrics._inputs import check_choice, check_neighbors

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from scipy.sparse import csr_matrix

EXACT_BELOW = 8_192  # scanpy's own limit: below it brute force is faster than compiling the approximate search
WEIGHTINGS = ("connectivities", "jaccard")
RESOLUTION_RANGE = (1e-3, 10.0)
MAX_STEPS = 30
_JACCARD_CUT = 1 / 15
_ORDER = "order"  # attribute of a graph: the cell of each vertex


class Partition(NamedTuple):
    """A partition of the cells: cluster of each cell, Leiden resolution, quality and modularity."""

    clusters: NDArray[np.intp]
    resolution: float
    quality: float
    modularity: float

    @property
    def n_clusters(self) -> int:
        """Number of clusters."""
        return int(self.clusters.max()) + 1


def nearest_neighbors(
    z_nd: NDArray[np.float64], n_neighbors: int, *, seed: int = 0
) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """Return indices and Euclidean distances, (n, k) each, of the nearest cells, the cell itself excluded.

    Exact below 8,192 cells, by pynndescent above.

    Raises
    ------
    ConfigError
        If `n_neighbors` is not an integer from 1 to n - 1.
    """
    n = z_nd.shape[0]
    k = check_neighbors(n_neighbors, n)
    if n < EXACT_BELOW:
        from sklearn.neighbors import NearestNeighbors

        # no query: every cell is then left out of its own neighbours, duplicates included
        distances, indices = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(z_nd).kneighbors()
        return indices.astype(np.intp), distances.astype(np.float64)
    from pynndescent import NNDescent

    search = NNDescent(z_nd.astype(np.float32), n_neighbors=k + 1, metric="euclidean", random_state=seed)
    indices, distances = search.neighbor_graph
    # a cell need not come first, or at all, among its own neighbours: it is sorted to the end and cut off
    order = np.argsort(np.where(indices == np.arange(n)[:, None], np.inf, distances), axis=1, kind="stable")[:, :k]
    return (
        np.take_along_axis(indices, order, axis=1).astype(np.intp),
        np.take_along_axis(distances, order, axis=1).astype(np.float64),
    )


class _Precomputed:
    """Neighbours found before, in the form that `scanpy.pp.neighbors` takes as a transformer."""

    def __init__(self, indices: NDArray[np.intp], distances: NDArray[np.float64]):
        self._indices, self._distances = indices, distances

    def get_params(self, *, deep: bool = True) -> dict[str, int]:  # noqa: ARG002  the interface of scikit-learn
        return {"n_neighbors": self._indices.shape[1] + 1}

    def fit_transform(self, X: Any) -> csr_matrix:  # noqa: ARG002
        from scipy.sparse import csr_matrix

        n, k = self._indices.shape
        indices = np.column_stack([np.arange(n), self._indices])
        distances = np.column_stack([np.zeros(n), self._distances])
        return csr_matrix((distances.ravel(), indices.ravel(), np.arange(n + 1) * (k + 1)), shape=(n, n))


def cell_graph(z_nd: NDArray[np.float64], n_neighbors: int, *, weighting: str, seed: int) -> Any:
    """Return an undirected weighted igraph of the cells; `n_neighbors` counts the cell itself, as scanpy does.

    Raises
    ------
    ConfigError
        If `weighting` is unknown or `n_neighbors` is below 2 or not below the number of cells.
    """
    import igraph
    from scipy.sparse import triu

    check_choice(weighting, WEIGHTINGS, name="weighting")
    if check_neighbors(n_neighbors, z_nd.shape[0]) < 2:
        msg = f"n_neighbors is {n_neighbors}: it counts the cell itself here, so at least 2 are needed for a graph."
        raise ConfigError(msg)
    indices, distances = nearest_neighbors(z_nd, n_neighbors - 1, seed=seed)
    weigh = _jaccard if weighting == "jaccard" else _connectivities
    upper = triu(weigh(indices, distances, seed), k=1).tocoo()
    graph = igraph.Graph(n=z_nd.shape[0], edges=np.column_stack([upper.row, upper.col]), directed=False)
    graph.es["weight"] = upper.data.astype(np.float64)
    return graph


def ordered_graph(z_nd: NDArray[np.float64], n_neighbors: int, *, weighting: str, seed: int) -> Any:
    """Return the graph of `cell_graph` on the cells sorted by their coordinates; `leiden` puts them back.

    Leiden visits the vertices in an order that follows their numbers: without this its clusters, and the scores of
    them, would depend on the order in which the cells came.
    """
    order = np.lexsort(z_nd.T[::-1])
    graph = cell_graph(z_nd[order], n_neighbors, weighting=weighting, seed=seed)
    graph[_ORDER] = order
    return graph


def _connectivities(indices: NDArray[np.intp], distances: NDArray[np.float64], seed: int) -> Any:
    """Return scanpy's (UMAP's) connectivities of given neighbours, a symmetric sparse matrix."""
    import scanpy
    from anndata import AnnData

    # the embedding itself is not needed any more: a column of zeros stands in for it
    adata = AnnData(np.zeros((len(indices), 1), dtype=np.float32))
    scanpy.pp.neighbors(adata, use_rep="X", transformer=_Precomputed(indices, distances), random_state=seed)
    return adata.obsp["connectivities"]


def _jaccard(indices: NDArray[np.intp], distances: NDArray[np.float64], seed: int) -> Any:  # noqa: ARG001
    """Return shared-neighbour weights s / (2k - s), s shared neighbours of k, the cell itself among them."""
    from scipy.sparse import csr_matrix

    n, k = indices.shape[0], indices.shape[1] + 1
    member = np.column_stack([np.arange(n), indices])
    adjacency = csr_matrix((np.ones(n * k), member.ravel(), np.arange(n + 1) * k), shape=(n, n))
    shared = (adjacency @ adjacency.T).tocsr()
    shared.data = shared.data / (2 * k - shared.data)
    shared.data[shared.data < _JACCARD_CUT] = 0.0
    shared.eliminate_zeros()
    return shared


def leiden(graph: Any, resolution: float, *, n_starts: int, seed: int) -> Partition:
    """Return the Leiden partition of best quality over seeded starts, largest cluster first."""
    import leidenalg

    best: Any = None
    for start in range(n_starts):
        found = leidenalg.find_partition(
            graph,
            leidenalg.RBConfigurationVertexPartition,
            weights="weight",
            n_iterations=2,
            seed=seed + start,
            resolution_parameter=resolution,
        )
        if best is None or found.quality() > best.quality():
            best = found
    clusters = np.asarray(best.membership, dtype=np.intp)
    if _ORDER in graph.attributes():
        clusters[graph[_ORDER]] = clusters.copy()
    return Partition(clusters, resolution, best.quality(), graph.modularity(best.membership, weights="weight"))


def bisect(graph: Any, n_clusters: int, *, n_starts: int, seed: int) -> Partition:
    """Return the partition nearest to `n_clusters`, by bisection on the logarithm of the resolution.

    Once both ends were visited, the interval is cut where a straight line between their log counts meets the target,
    at least a fifth away from the ends: this saves about a third of the runs. The count is not strictly monotone, so
    the visited partition closest to the target is kept. Ties are decided by modularity: the quality itself is not
    comparable between resolutions.
    """
    low, high = np.log(RESOLUTION_RANGE)
    fewer = more = 0  # clusters at the ends, 0 until visited
    best = None
    for _ in range(MAX_STEPS):
        cut = 0.5
        if fewer and more:
            cut = float(np.clip(np.log(n_clusters / fewer) / np.log(more / fewer), 0.2, 0.8))
        middle = low + cut * (high - low)
        found = leiden(graph, float(np.exp(middle)), n_starts=n_starts, seed=seed)
        rank = (-abs(found.n_clusters - n_clusters), found.modularity)
        if best is None or rank > (-abs(best.n_clusters - n_clusters), best.modularity):
            best = found
        if found.n_clusters == n_clusters or high - low < 1e-5:
            break
        if found.n_clusters < n_clusters:
            low, fewer = middle, found.n_clusters
        else:
            high, more = middle, found.n_clusters
    return best  # type: ignore[return-value]  # the loop runs at least once
