"""Who the neighbours of a cell are: batches (mixing), types (purity), and what they predict (accuracy)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from epivi._errors import ConfigError, DataError
from epivi.metrics._inputs import (
    Labels,
    as_embedding,
    as_labels,
    check_choice,
    check_finite,
    check_neighbors,
    package_version,
)
from epivi.metrics.embedding._graph import nearest_neighbors

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import ArrayLike, NDArray


@dataclass(frozen=True, eq=False)
class NeighborMixing:
    """Batch composition of the neighbourhood of each cell, normalised for batch size.

    Attributes
    ----------
    p
        Share of each batch among the neighbours, shape (n, batches); each row sums to 1.
    batches
        Names of the batches, in the order of the columns of `p`.
    entropy
        Entropy of each row of `p` over log(number of batches), shape (n,): 0 one batch, 1 perfectly mixed.
    mean_p, mean_entropy
        Means over the cells of the summary (all cells, or those of shared types).
    n_summary
        Cells of the summary.
    by_type
        Given labels, one row a type: `n`, `n_batches`, `shared` (present in all batches), `entropy`, `purity`.
    n_neighbors, seed
        Settings.
    """

    p: NDArray[np.float64]
    batches: tuple[str, ...]
    entropy: NDArray[np.float64]
    mean_p: NDArray[np.float64]
    mean_entropy: float
    n_summary: int
    by_type: pd.DataFrame | None
    n_neighbors: int
    seed: int

    def to_dict(self) -> dict[str, Any]:
        """Return the summary as plain Python values, ready for JSON or `uns`.

        Examples
        --------
        >>> import numpy as np
        >>> z = np.random.default_rng(0).normal(size=(60, 2))
        >>> neighbor_mixing(z, np.tile(["a", "b"], 30), n_neighbors=20).to_dict()["n"]
        60
        """
        return {
            "mean_p": dict(zip(self.batches, self.mean_p.tolist(), strict=True)),
            "mean_entropy": self.mean_entropy,
            "n": len(self.entropy),
            "n_summary": self.n_summary,
            "n_neighbors": self.n_neighbors,
            "seed": self.seed,
            "epivi_version": package_version(),
        }


def neighbor_mixing(
    Z: ArrayLike,
    batch: ArrayLike,
    *,
    n_neighbors: int = 50,
    labels: ArrayLike | None = None,
    types: str = "all",
    seed: int = 0,
) -> NeighborMixing:
    """Measure how batches mix in the neighbourhood of every cell (SAILER, section 2.5.3).

    With n_b(i) neighbours of cell i in batch b and N_b cells of batch b,
    ``p_b(i) = (n_b(i) / N_b) / sum_b' (n_b'(i) / N_b')``. Two batches mix well where p is near 0.5; for more, the
    entropy of p over the log of the number of batches is near 1.

    Parameters
    ----------
    Z
        Embedding, shape (n, z).
    batch
        Batch of each cell, length n.
    n_neighbors
        Neighbours of a cell, the cell itself excluded.
    labels
        Cell types, length n, for the table by type.
    types
        ``"shared"`` restricts the summary to types present in all batches: only they are expected to mix. It needs
        `labels`.
    seed
        Seed of the approximate search above 8,192 cells.

    Returns
    -------
    Composition and entropy of each cell, their means, and the table by type.

    Raises
    ------
    DataError
        If `Z` is not a finite matrix or is constant, if `batch` or `labels` has the wrong length or missing entries,
        if there is one batch, or if no type is shared by all batches.
    ConfigError
        If `n_neighbors` or `types` is not valid, or ``types="shared"`` comes without labels.

    Examples
    --------
    >>> import numpy as np
    >>> z = np.random.default_rng(0).normal(size=(400, 2))
    >>> mixing = neighbor_mixing(z, np.tile(["a", "b"], 200))
    >>> bool(mixing.mean_entropy > 0.9)
    True
    """
    check_choice(types, ("all", "shared"), name="types")
    z_nd = as_embedding(Z)
    n = z_nd.shape[0]
    batches = as_labels(batch, n, name="batch")
    if types == "shared" and labels is None:
        msg = 'types="shared" needs labels to know which types are in all batches.'
        raise ConfigError(msg)
    kinds = None if labels is None else as_labels(labels, n, min_values=1)
    indices, _ = nearest_neighbors(z_nd, n_neighbors, seed=seed)
    n_batches = len(batches.names)
    neighbor_batch = batches.codes[indices]
    p_nb = np.stack([(neighbor_batch == b).sum(axis=1) for b in range(n_batches)], axis=1).astype(np.float64)
    p_nb /= np.bincount(batches.codes, minlength=n_batches)
    p_nb /= p_nb.sum(axis=1, keepdims=True)
    log_nb = np.log(p_nb, out=np.zeros_like(p_nb), where=p_nb > 0)
    entropy_n = np.abs(p_nb * log_nb).sum(axis=1) / np.log(n_batches)

    by_type, chosen = None, np.ones(n, dtype=bool)
    if kinds is not None:
        by_type = _type_table(indices, kinds, batches, entropy_n)
        if types == "shared":
            chosen = by_type["shared"].to_numpy()[kinds.codes]
            if not chosen.any():
                msg = f"None of the {len(kinds.names)} types is present in all {n_batches} batches."
                raise DataError(msg)
    return NeighborMixing(
        p=p_nb,
        batches=batches.names,
        entropy=entropy_n,
        mean_p=p_nb[chosen].mean(axis=0),
        mean_entropy=float(entropy_n[chosen].mean()),
        n_summary=int(chosen.sum()),
        by_type=by_type,
        n_neighbors=int(n_neighbors),
        seed=int(seed),
    )


def label_purity(Z: ArrayLike, labels: ArrayLike, n_neighbors: int = 10, *, seed: int = 0) -> pd.DataFrame:
    """Measure for each type the mean share of neighbours that have the same type.

    Parameters
    ----------
    Z
        Embedding, shape (n, z).
    labels
        Type of each cell, length n.
    n_neighbors
        Neighbours of a cell, the cell itself excluded.
    seed
        Seed of the approximate search above 8,192 cells.

    Returns
    -------
    One row a type: `n` cells, their `fraction`, `purity`, and the `ceiling` min(1, (n - 1) / k) that purity can reach.

    Raises
    ------
    DataError
        If `Z` is not a finite matrix or is constant, or if `labels` has the wrong length, missing entries or a single
        value.
    ConfigError
        If `n_neighbors` is not a positive integer below the number of cells.

    Examples
    --------
    >>> import numpy as np
    >>> z = np.concatenate([np.zeros((20, 1)), np.ones((20, 1))])
    >>> label_purity(z, np.repeat(["B", "T"], 20))["purity"].tolist()
    [1.0, 1.0]
    """
    z_nd = as_embedding(Z)
    kinds = as_labels(labels, z_nd.shape[0])
    indices, _ = nearest_neighbors(z_nd, n_neighbors, seed=seed)
    return _purity_table(indices, kinds)


def rare_type_purity(
    Z: ArrayLike, labels: ArrayLike, *, max_fraction: float = 0.05, n_neighbors: int = 10, seed: int = 0
) -> pd.DataFrame:
    """Measure the neighbour purity of rare types, which over-correction dissolves first.

    Parameters
    ----------
    Z, labels
        Embedding of shape (n, z) and type of each cell.
    max_fraction
        Types below this share of the cells are rare.
    n_neighbors, seed
        As in `label_purity`.

    Returns
    -------
    The rows of `label_purity` for rare types; no row if there is none.

    Raises
    ------
    DataError
        As `label_purity`.
    ConfigError
        If `max_fraction` is not in (0, 1], or as `label_purity`.

    Examples
    --------
    >>> import numpy as np
    >>> z = np.concatenate([np.zeros((12, 1)), np.ones((488, 1))])
    >>> rare_type_purity(z, np.repeat(["rare", "common"], [12, 488]))["purity"].to_dict()
    {'rare': 1.0}
    """
    if not 0 < max_fraction <= 1:
        msg = f"max_fraction is {max_fraction}, expected a share of the cells in (0, 1]."
        raise ConfigError(msg)
    table = label_purity(Z, labels, n_neighbors, seed=seed)
    return table[table["fraction"] < max_fraction]


def knn_accuracy(
    Z_train: ArrayLike, y_train: ArrayLike, Z_test: ArrayLike, y_test: ArrayLike, n_neighbors: int = 15
) -> float:
    """Predict the labels of test cells from their nearest training cells and return the balanced accuracy.

    Parameters
    ----------
    Z_train, Z_test
        Embeddings, shapes (n_train, z) and (n_test, z).
    y_train, y_test
        Labels. A test label that no training cell has counts as never found.
    n_neighbors
        Voting training cells, equal votes; ties go to the label that sorts first.

    Returns
    -------
    Mean over the test labels of the share of cells predicted right, 0 to 1.

    Raises
    ------
    DataError
        If an embedding is not a finite matrix, the training one is constant, the dimensions differ, labels have the
        wrong length or missing entries, or the training labels take a single value.
    ConfigError
        If `n_neighbors` is not a positive integer of at most the number of training cells.

    Examples
    --------
    >>> knn_accuracy([[0.0], [1.0], [9.0], [8.0]], ["a", "a", "b", "b"], [[0.5], [8.5]], ["a", "b"], n_neighbors=2)
    1.0
    """
    from sklearn.neighbors import KNeighborsClassifier

    train_nd = as_embedding(Z_train, name="Z_train")
    test_nd = np.asarray(Z_test, dtype=np.float64)
    if test_nd.ndim != 2 or test_nd.shape[0] < 1 or test_nd.shape[1] != train_nd.shape[1]:
        msg = f"Z_test has shape {test_nd.shape}, expected (cells, {train_nd.shape[1]}) as Z_train."
        raise DataError(msg)
    check_finite(test_nd, name="Z_test")
    train = as_labels(y_train, train_nd.shape[0], name="y_train")
    test = as_labels(y_test, test_nd.shape[0], name="y_test", min_values=1)
    check_neighbors(n_neighbors, train_nd.shape[0] + 1)
    search = KNeighborsClassifier(n_neighbors=n_neighbors).fit(train_nd, train.codes)
    right = np.asarray(train.names)[search.predict(test_nd)] == np.asarray(test.names)[test.codes]
    return float(np.mean([right[test.codes == label].mean() for label in range(len(test.names))]))


def _type_table(
    indices: NDArray[np.intp], kinds: Labels, batches: Labels, entropy_n: NDArray[np.float64]
) -> pd.DataFrame:
    """Return size, batches, mean entropy and purity of each type."""
    import pandas as pd

    present = np.zeros((len(kinds.names), len(batches.names)), dtype=bool)
    present[kinds.codes, batches.codes] = True
    table = _purity_table(indices, kinds)
    table["n_batches"] = present.sum(axis=1)
    table["shared"] = present.all(axis=1)
    table["entropy"] = pd.Series(entropy_n).groupby(kinds.codes).mean().to_numpy()
    return table[["n", "n_batches", "shared", "entropy", "purity"]]


def _purity_table(indices: NDArray[np.intp], kinds: Labels) -> pd.DataFrame:
    """Return purity, size, share and reachable purity of each type."""
    import pandas as pd

    n, k = indices.shape
    size = np.bincount(kinds.codes, minlength=len(kinds.names))
    same_n = (kinds.codes[indices] == kinds.codes[:, None]).mean(axis=1)
    return pd.DataFrame(
        {
            "n": size,
            "fraction": size / n,
            "purity": np.bincount(kinds.codes, weights=same_n, minlength=len(size)) / size,
            "ceiling": np.minimum(1.0, (size - 1) / k),
        },
        index=pd.Index(kinds.names, name="type"),
    )
