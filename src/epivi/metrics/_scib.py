"""The metrics of scib-metrics on one embedding: neighbours found once, cells in an order of their own."""

from __future__ import annotations

import logging
import random
import warnings
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from epivi.metrics._inputs import draw
from epivi.metrics.embedding._graph import nearest_neighbors
from epivi.metrics.embedding.silhouettes import silhouette_samples

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

N_NEIGHBORS = {"lisi": 90, "kbet": 50, "graph": 15}
SILHOUETTE_MAX = 50_000  # the silhouette is quadratic in cells
KBET_MIN_CELLS = 10
_KBET_ALPHA = 0.05
_DENSE_BELOW = 1_000  # up to here all eigenvectors are found as quickly as some

BIO = ("isolated_labels", "nmi_leiden", "ari_leiden", "silhouette_label", "clisi")
BATCH = ("bras", "silhouette_batch", "ilisi", "kbet", "graph_connectivity", "pcr_comparison")


class Cells(NamedTuple):
    """What is known of the cells beside their embedding: codes of labels and batches, the unintegrated embedding."""

    labels: NDArray[np.intp] | None
    batches: NDArray[np.intp] | None
    pre_nd: NDArray[np.float64] | None

    def take(self, rows: NDArray[np.intp]) -> Cells:
        """Return some cells, or all in another order."""
        return Cells(
            None if self.labels is None else self.labels[rows],
            None if self.batches is None else self.batches[rows],
            None if self.pre_nd is None else self.pre_nd[rows],
        )


def absent_metrics(cells: Cells) -> dict[str, str]:
    """Return the metrics that these cells do not allow, whatever the embedding, each with the reason."""
    absent: dict[str, str] = {}
    n_labels, n_batches = (0 if entry is None else len(np.unique(entry)) for entry in cells[:2])
    labels_say = "no label_key was given" if cells.labels is None else f"there is {n_labels} label"
    batches_say = "no batch_key was given" if cells.batches is None else f"there is {n_batches} batch"
    if n_labels < 2:
        absent |= dict.fromkeys(
            ("isolated_labels", "nmi_leiden", "ari_leiden", "silhouette_label", "clisi"), labels_say
        )
    if n_labels < 1:
        absent |= dict.fromkeys(("bras", "silhouette_batch", "kbet", "graph_connectivity"), labels_say)
    if n_batches < 2:
        names = ("isolated_labels", "bras", "silhouette_batch", "ilisi", "kbet", "pcr_comparison")
        absent |= dict.fromkeys(names, batches_say)
    elif cells.pre_nd is None:
        absent["pcr_comparison"] = "no unintegrated embedding: give unintegrated_key, or X_pca or X_lsi in obsm"
    if cells.labels is not None and n_batches > 1:
        skipped = skipped_labels(cells)
        if len(skipped["silhouette_batch"]) == n_labels:
            absent |= dict.fromkeys(("bras", "silhouette_batch"), "no label has cells in two batches and repeats one")
        if len(skipped["kbet"]) == n_labels:
            absent["kbet"] = f"no label has {KBET_MIN_CELLS} cells and two batches"
    return absent


def skipped_labels(cells: Cells) -> dict[str, list[int]]:
    """Return the codes of the labels that the metrics by label leave out: too few cells, or one batch."""
    skipped: dict[str, list[int]] = {"silhouette_batch": [], "kbet": []}
    if cells.labels is None or cells.batches is None:
        return skipped
    for label in np.unique(cells.labels).tolist():
        own = cells.batches[cells.labels == label]
        n_batches = len(np.unique(own))
        if n_batches in {1, len(own)}:
            skipped["silhouette_batch"].append(label)
        if n_batches == 1 or len(own) < KBET_MIN_CELLS:
            skipped["kbet"].append(label)
    return skipped


def embedding_metrics(
    z_nd: NDArray[np.float64], cells: Cells, absent: dict[str, str], *, n_jobs: int, seed: int
) -> tuple[dict[str, float], dict[str, str]]:
    """Return the value of every metric, NaN where it is absent, and the reasons of those that failed here alone.

    The cells are sorted by their coordinates first: neighbour search and Leiden depend on the order of the cells, and
    the order in which they came must not matter.
    """
    values = dict.fromkeys((*BIO, *BATCH), float("nan"))
    if set(values) <= set(absent):
        return values, {}
    order = np.lexsort(z_nd.T[::-1])
    with _quiet():
        scores = _Scores(np.ascontiguousarray(z_nd[order]), cells.take(order), n_jobs=n_jobs, seed=seed)
        for names, call in scores.calls():
            if wanted := [name for name in names if name not in absent]:
                found = call()
                values |= {name: float(found[name]) for name in wanted}
    failed: dict[str, str] = {}
    for name, value in values.items():
        if name not in absent and not np.isfinite(value):
            values[name] = float("nan")
            failed[name] = _FAILURES.get(name, "scib-metrics returned no number")
    return values, failed


_FAILURES = {
    "kbet": "the diffusion map of a label did not converge",
    "pcr_comparison": "the batch explains nothing of the unintegrated embedding",
}


class _Scores:
    """The calls into scib-metrics for one embedding, on the same neighbours."""

    def __init__(self, z_nd: NDArray[np.float64], cells: Cells, *, n_jobs: int, seed: int):
        from scib_metrics.nearest_neighbors import NeighborsResults

        self.z_nd, self.cells, self.n_jobs, self.seed = z_nd.astype(np.float32), cells, n_jobs, seed
        self.few = draw(len(z_nd), SILHOUETTE_MAX, seed)
        # scib-metrics counts the cell itself as its first neighbour
        indices, distances = nearest_neighbors(z_nd, min(N_NEIGHBORS["lisi"], len(z_nd)) - 1, seed=seed)
        self.neighbors = NeighborsResults(
            indices=np.column_stack([np.arange(len(z_nd)), indices]),
            distances=np.column_stack([np.zeros(len(z_nd)), distances]).astype(np.float32),
        )

    def calls(self) -> list[tuple[tuple[str, ...], Callable[[], dict[str, float]]]]:
        """Return the calls, each with the metrics that it computes."""
        return [
            (("silhouette_label",), self.silhouette_label),
            (("isolated_labels",), self.isolated_labels),
            (("nmi_leiden", "ari_leiden"), self.leiden),
            (("clisi",), self.clisi),
            (("bras", "silhouette_batch"), self.silhouette_batch),
            (("ilisi",), self.ilisi),
            (("kbet",), self.kbet),
            (("graph_connectivity",), self.graph_connectivity),
            (("pcr_comparison",), self.pcr_comparison),
        ]

    def nearest(self, use: str) -> Any:
        """Return the neighbours cut to as many as a metric takes, the cell itself among them."""
        return self.neighbors.subset_neighbors(min(N_NEIGHBORS[use], self.neighbors.n_neighbors))

    @cached_property
    def silhouettes(self) -> NDArray[np.float64]:
        """Return the silhouette of each cell of the sample on the labels, rescaled to [0, 1]."""
        return (silhouette_samples(self.z_nd[self.few], self._labels[self.few]) + 1) / 2

    @property
    def _labels(self) -> Any:
        return self.cells.labels

    @property
    def _batches(self) -> Any:
        return self.cells.batches

    def silhouette_label(self) -> dict[str, float]:
        return {"silhouette_label": self.silhouettes.mean(dtype=np.float64)}

    def isolated_labels(self) -> dict[str, float]:
        # `scib_metrics.isolated_labels` would compute the silhouettes again and set up the root logger
        labels = self._labels
        batches_of = {label: len(np.unique(self._batches[labels == label])) for label in np.unique(labels)}
        isolated = [label for label, count in batches_of.items() if count == min(batches_of.values())]
        sampled = labels[self.few]
        means = [self.silhouettes[sampled == label].mean(dtype=np.float64) for label in isolated if label in sampled]
        return {"isolated_labels": float(np.mean(means)) if means else float("nan")}

    def leiden(self) -> dict[str, float]:
        import igraph
        from scib_metrics import nmi_ari_cluster_labels_leiden

        try:
            found = nmi_ari_cluster_labels_leiden(self.nearest("graph"), self._labels, n_jobs=self.n_jobs)
        finally:
            igraph.set_random_number_generator(random)  # scib-metrics leaves its own, seeded one
        return {"nmi_leiden": found["nmi"], "ari_leiden": found["ari"]}

    def clisi(self) -> dict[str, float]:
        from scib_metrics import clisi_knn

        return {"clisi": clisi_knn(self.nearest("lisi"), self._labels)}

    def ilisi(self) -> dict[str, float]:
        from scib_metrics import ilisi_knn

        return {"ilisi": ilisi_knn(self.nearest("lisi"), self._batches)}

    def silhouette_batch(self) -> dict[str, float]:
        z_nd, labels, batches = self.z_nd[self.few], self._labels[self.few], self._batches[self.few]
        return {
            "bras": silhouette_by_label(z_nd, labels, batches, metric="cosine", between="mean_other"),
            "silhouette_batch": silhouette_by_label(z_nd, labels, batches),
        }

    def kbet(self) -> dict[str, float]:
        from scipy.sparse.linalg import ArpackError

        graph = self.nearest("kbet").knn_graph_connectivities
        try:
            scores = kbet_by_label(graph.tocsr(), self._labels, self._batches, seed=self.seed)
        except ArpackError:
            return {"kbet": float("nan")}
        return {"kbet": float(np.nanmean(list(scores.values())))}

    def graph_connectivity(self) -> dict[str, float]:
        from scib_metrics import graph_connectivity

        return {"graph_connectivity": graph_connectivity(self.nearest("graph"), self._labels)}

    def pcr_comparison(self) -> dict[str, float]:
        from scib_metrics import pcr_comparison

        pre_nd: Any = self.cells.pre_nd
        try:
            return {"pcr_comparison": pcr_comparison(pre_nd, self.z_nd, self._batches, categorical=True)}
        except ZeroDivisionError:  # the variance that the batch explains before is the denominator
            return {"pcr_comparison": float("nan")}


def silhouette_by_label(
    z_nd: NDArray[Any], labels: NDArray[np.intp], batches: NDArray[np.intp], **options: str
) -> float:
    """Return one minus the mean absolute silhouette of the batches within each label, mean over the labels.

    Labels of one batch, or of as many batches as cells, are left out; NaN if none is left. `options` are those of
    `silhouette_samples`. The definition is that of `scib_metrics.silhouette_batch`, which compiles its code anew for
    every label of another size.
    """
    means = []
    for label in np.unique(labels):
        own = labels == label
        if 1 < len(np.unique(batches[own])) < own.sum():
            means.append(1 - np.abs(silhouette_samples(z_nd[own], batches[own], **options)).mean())
    return float(np.mean(means)) if means else float("nan")


def kbet_by_label(
    graph: Any, labels: NDArray[np.intp], batches: NDArray[np.intp], *, seed: int = 0
) -> dict[int, float]:
    """Return the kBET acceptance rate of each label on neighbours in a diffusion map of its cells.

    The definition is that of `scib_metrics.kbet_per_label`: components of the label's graph below three
    neighbourhoods are left out, and the score is 0 if they hold more than a quarter of its cells. That function
    searches by pynndescent, starts its eigenvectors at random, and gives every label after a small one fewer of them,
    so that the score depends on the names of the labels; here the search is exact for labels below 8,192 cells, the
    start is seeded, and each label has up to 100 components of its own. NaN for labels of one batch or below 10 cells.
    """
    from scipy.sparse.csgraph import connected_components

    scores: dict[int, float] = {}
    for label in np.unique(labels).tolist():
        own = np.flatnonzero(labels == label)
        _, batch = np.unique(batches[own], return_inverse=True)
        sizes = np.bincount(batch)
        if len(own) < KBET_MIN_CELLS or len(sizes) == 1:
            scores[label] = float("nan")
            continue
        k = min(70, max(10, int(sizes.mean() / 4)), len(own) - 1)
        part = graph[own][:, own]
        n_components, component = connected_components(part, directed=False)
        kept = np.ones(len(own), dtype=bool)
        if n_components > 1:
            kept = np.bincount(component)[component] >= 3 * k
        if kept.mean() < 0.75 or len(np.unique(batch[kept])) == 1:
            scores[label] = 0.0
            continue
        map_nd = _diffusion_map(part[kept][:, kept], seed=seed)
        indices, _ = nearest_neighbors(map_nd, k, seed=seed)
        indices = np.column_stack([np.arange(len(map_nd)), indices])
        scores[label] = _acceptance(indices, np.unique(batch[kept], return_inverse=True)[1])
    return scores


def _acceptance(indices: NDArray[np.intp], batch: NDArray[np.intp]) -> float:
    """Return the share of neighbourhoods whose batches agree with those of all cells, chi-square test at 5 %."""
    from scipy.special import chdtrc

    share_b = np.bincount(batch) / len(batch)
    expected_b = share_b * indices.shape[1]
    observed_nb = np.stack([(batch[indices] == b).sum(axis=1) for b in range(len(share_b))], axis=1)
    statistic_n = ((observed_nb - expected_b) ** 2 / expected_b).sum(axis=1)
    return float((chdtrc(len(share_b) - 1, statistic_n) >= _KBET_ALPHA).mean())


def _diffusion_map(graph: Any, *, n_components: int = 100, seed: int = 0) -> NDArray[np.float64]:
    """Return the diffusion map of a connected graph, all numbers of steps summed, shape (n, components).

    With W the weights and q their row sums, K = W / (q q'), T = K / sqrt(z z') with z the row sums of K; the
    eigenvectors of T are scaled by e / (1 - e), and left as they are where e is 1 (Haghverdi et al., Nat. Methods 13,
    845, 2016).
    """
    from scipy.sparse import diags_array
    from scipy.sparse.linalg import eigsh

    transition = graph.astype(np.float64)
    for power in (1.0, 0.5):
        scale = diags_array(np.asarray(transition.sum(axis=0)).ravel() ** -power)
        transition = scale @ transition @ scale
    n = transition.shape[0]
    count = min(n_components, n - 1)
    if n <= _DENSE_BELOW:
        values, vectors = np.linalg.eigh(transition.toarray())
        largest = np.argsort(-np.abs(values), kind="stable")[:count]
        values, vectors = values[largest], vectors[:, largest]
    else:
        values, vectors = eigsh(transition, k=count, v0=np.random.default_rng(seed).random(n))
    single = values > 1 - 1e-7  # what single precision takes for 1
    return vectors * np.where(single, 1.0, values / np.where(single, 1.0, 1 - values))


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep warnings and messages of third parties back that say nothing of the result."""
    with warnings.catch_warnings():
        # of umap, for want of tensorflow
        warnings.filterwarnings("ignore", category=ImportWarning)
        # the score is then 0, by definition
        warnings.filterwarnings("ignore", message="PCR comparison score is negative")
        import scib_metrics  # noqa: F401  its import sets the level of the logger

        logger = logging.getLogger("scib_metrics")
        level = logger.level
        logger.setLevel(logging.WARNING)
        try:
            yield
        finally:
            logger.setLevel(level)
