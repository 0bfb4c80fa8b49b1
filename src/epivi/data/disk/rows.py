"""Rows of sparse matrices in zarr stores, one below the other, read through annbatch."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from anndata.abc import CSRDataset
from scipy import sparse

from epivi._errors import ConfigError, DataError, MissingDependencyError, require

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from types import ModuleType

# rows that are asked of annbatch at once
ROWS_AT_ONCE = 2048
# rows nearer to each other than this are read with what lies between them: a chunk of a store is decoded once
GAP = 8


def annbatch_or_refuse() -> ModuleType:
    """Return the module annbatch.

    Raises
    ------
    ConfigError
        If it is not installed.
    """
    try:
        return require("annbatch", "large")
    except MissingDependencyError as error:
        message = (
            "Reading zarr stores through annbatch needs the extra 'large': pip install epivi[large]. Without it, "
            "anndata.read_h5ad(path, backed='r') with loader='rows' trains from disk too."
        )
        raise ConfigError(message) from error


class DiskRows(CSRDataset):
    """Sparse matrices of zarr stores, one below the other, as the X or a layer of an AnnData; rows are read when asked.

    Parameters
    ----------
    parts
        Row-compressed matrices in zarr stores, as of ``anndata.io.sparse_dataset``, with the same columns.

    Raises
    ------
    ConfigError
        If annbatch is not installed.
    DataError
        If there are no parts, one is not a row-compressed matrix in a zarr store, or they differ in columns.

    Notes
    -----
    The row pointers of all parts are held in memory, 8 bytes a row. Values and columns are read on demand, and those of
    one block of rows are kept between calls of :meth:`hold`.
    """

    backend = "zarr"

    def __init__(self, parts: Sequence[CSRDataset]) -> None:
        annbatch = annbatch_or_refuse()
        self.parts = list(parts)
        for number, part in enumerate(self.parts):
            if not isinstance(part, CSRDataset) or part.backend != "zarr":
                kind = f"{type(part).__name__}, {getattr(part, 'backend', 'not on disk')}"
                message = (
                    f"Part {number} is no row-compressed matrix in a zarr store ({kind}), which annbatch reads. Write "
                    "the data with adata.write_zarr, X as scipy csr, or as an annbatch.DatasetCollection."
                )
                raise DataError(message)
        widths = {part.shape[1] for part in self.parts}
        if len(widths) != 1:
            message = f"{len(self.parts)} parts have {sorted(widths)} columns; one number of columns is needed."
            raise DataError(message)
        self.shape = (sum(part.shape[0] for part in self.parts), widths.pop())
        self.dtype = np.result_type(*[part.dtype for part in self.parts])
        self._request = _sampler_of(annbatch)
        self._loader = annbatch.Loader(batch_sampler=self._request, preload_to_gpu=False)
        self._loader.add_datasets(self.parts)
        self._held_rows = np.zeros(0, dtype=np.int64)
        self._held: sparse.csr_matrix | None = None

    @property
    def n_held(self) -> int:
        """Rows that are in memory."""
        return self._held_rows.size

    def hold(self, rows: np.ndarray) -> None:
        """Keep some rows in memory, in place of those kept before, until others are held.

        Parameters
        ----------
        rows
            Increasing row numbers, each once.
        """
        if np.array_equal(rows, self._held_rows):
            return
        # those before are let go first: never two blocks at a time
        self._held, self._held_rows = None, np.zeros(0, dtype=np.int64)
        self._held, self._held_rows = self._read(rows), np.asarray(rows)

    def __getitem__(self, index: Any) -> sparse.csr_matrix:
        """Return rows as a csr matrix; of a pair, the columns of the rows."""
        wanted, columns = index if isinstance(index, tuple) else (index, slice(None))
        rows = np.arange(self.shape[0])[wanted].reshape(-1)
        found = self._of_held(rows)
        if found is None:
            unique, inverse = np.unique(rows, return_inverse=True)
            found = self._read(unique)
            if not np.array_equal(unique, rows):
                found = found[inverse]
        return found if isinstance(columns, slice) and columns == slice(None) else found[:, columns]

    def to_memory(self) -> sparse.csr_matrix:
        """Return the whole matrix in memory."""
        return self[:]

    def _of_held(self, rows: np.ndarray) -> sparse.csr_matrix | None:
        """Return rows of those in memory, or ``None`` if one is not."""
        if self._held is None or not rows.size:
            return None
        place = np.minimum(np.searchsorted(self._held_rows, rows), self._held_rows.size - 1)
        return self._held[place] if np.array_equal(self._held_rows[place], rows) else None

    def _read(self, rows: np.ndarray) -> sparse.csr_matrix:
        """Return increasing rows from the stores, some at a time, so that little more than them is held."""
        read = []
        for start in range(0, rows.size, ROWS_AT_ONCE):
            part = rows[start : start + ROWS_AT_ONCE]
            self._request.rows = _covering(part)
            (batch,) = list(self._loader)
            read.append(batch["X"][np.searchsorted(self._request.rows, part)])
        if not read:
            return sparse.csr_matrix((0, self.shape[1]), dtype=self.dtype)
        return sparse.csr_matrix(read[0] if len(read) == 1 else sparse.vstack(read, format="csr"))


def rows_on_disk(matrix: Any) -> DiskRows:
    """Return a matrix of an AnnData as :class:`DiskRows`.

    Raises
    ------
    ConfigError
        If it is in memory or in another kind of file, or annbatch is not installed.
    """
    annbatch_or_refuse()
    if isinstance(matrix, DiskRows):
        return matrix
    if not isinstance(matrix, CSRDataset) or matrix.backend != "zarr":
        where = f"in a file of kind {matrix.backend}" if hasattr(matrix, "backend") else "in memory"
        message = (
            f"loader='annbatch' reads row-compressed matrices in zarr stores; the counts are {where} "
            f"({type(matrix).__name__}). Open a store with epivi.data.disk.open_collection, or take loader='rows'."
        )
        raise ConfigError(message)
    return DiskRows([matrix])


def _covering(rows: np.ndarray) -> np.ndarray:
    """Return increasing rows with the small gaps between them filled.

    Examples
    --------
    >>> _covering(np.array([1, 3, 50])).tolist()
    [1, 2, 3, 50]
    """
    ends = np.concatenate([[0], np.flatnonzero(np.diff(rows) > GAP) + 1, [rows.size]])
    return np.concatenate([np.arange(rows[a], rows[b - 1] + 1) for a, b in pairwise(ends.tolist())])


def _sampler_of(annbatch: ModuleType) -> Any:
    """Return a sampler of annbatch that asks for the rows in its attribute ``rows``, in one minibatch."""

    class Request(annbatch.abc.Sampler):  # type: ignore[name-defined]
        """One minibatch, of rows that are set from outside."""

        batch_size = None
        shuffle = False
        rows = np.zeros(0, dtype=np.int64)

        def n_batches(self, n_obs: int) -> int:  # noqa: ARG002
            return 1

        def validate(self, n_obs: int) -> None:
            """Rows lie within the data: they were taken from a range of their size."""

        def _sample(self, n_obs: int) -> Iterator[dict[str, Any]]:  # noqa: ARG002
            yield {"requests": self.rows, "splits": [np.arange(self.rows.size)]}

    return Request()
