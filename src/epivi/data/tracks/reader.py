"""Tracks in batches: rows of all channels as compressed sparse rows, with what was not measured left out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from scipy import sparse

from epivi._keys import BATCH_MASK
from epivi.data.sparse import SparseReader, row_tensors

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

# rows of a dense array that are searched for counts together
_DENSE_ROWS = 32


class RowSource(Protocol):
    """Gives rows of concatenated channels."""

    def rows(self, rows: np.ndarray) -> sparse.csr_matrix:
        """Return the rows, columns sorted, without stored zeros."""


class StackedSource:
    """Channels that share one grid and lie in one array.

    Parameters
    ----------
    array
        Dense (n, c, l), or CSR (n, c · l), channel by channel.
    n_bins
        Number l of bins.
    indexer
        Stored channel of each trained channel, -1 where there is none, shape (c,).

    Examples
    --------
    >>> source = StackedSource(np.array([[[0, 1], [2, 3]]]), 2, np.array([1, -1, 0]))
    >>> source.rows(np.array([0])).toarray().tolist()
    [[2, 3, 0, 0, 0, 1]]
    """

    def __init__(self, array: np.ndarray | sparse.csr_matrix, n_bins: int, indexer: np.ndarray) -> None:
        self.array = array
        self.n_bins = n_bins
        self.indexer = np.asarray(indexer)
        self.sparse = SparseReader(array) if sparse.issparse(array) else None
        n_stored = array.shape[1] // n_bins if sparse.issparse(array) else array.shape[1]
        self.as_stored = np.array_equal(self.indexer, np.arange(n_stored))

    def rows(self, rows: np.ndarray) -> sparse.csr_matrix:
        """Return the rows of the trained channels, shape (b, c · l)."""
        part = dense_rows(self.array, rows) if self.sparse is None else self.sparse.rows(rows)
        if self.as_stored:
            return part
        size = self.n_bins
        absent = sparse.csr_matrix((rows.size, size), dtype=part.dtype)
        return _stack([part[:, at * size : (at + 1) * size] if at >= 0 else absent for at in self.indexer])


class ModalitiesSource:
    """Channels that are modalities of a MuData.

    Parameters
    ----------
    readers
        Reader of each trained channel, ``None`` where the modality is absent.
    n_bins
        Number of bins of each trained channel.
    """

    def __init__(self, readers: Sequence[SparseReader | None], n_bins: Sequence[int]) -> None:
        self.readers = list(readers)
        self.n_bins = list(n_bins)

    def rows(self, rows: np.ndarray) -> sparse.csr_matrix:
        """Return the rows of the trained channels, side by side."""
        return _stack(
            [
                sparse.csr_matrix((rows.size, size), dtype=np.uint8) if reader is None else reader.rows(rows)
                for reader, size in zip(self.readers, self.n_bins, strict=True)
            ]
        )


class TracksReader:
    """Rows of tracks as ``x_indptr``, ``x_indices``, ``x_values``, and which channels were measured.

    Parameters
    ----------
    source
        Where the counts come from.
    offsets
        Where each channel begins among the concatenated bins, and their total, shape (c + 1,).
    measured_nc
        Which channels were measured in which cell, bool. Counts stored under the others are never returned.
    """

    def __init__(self, source: RowSource, offsets: np.ndarray, measured_nc: np.ndarray) -> None:
        self.source = source
        self.offsets = np.asarray(offsets)
        self.measured_nc = np.asarray(measured_nc, dtype=bool)

    def rows(self, rows: np.ndarray) -> sparse.csr_matrix:
        """Return the measured counts of the rows as csr, columns ``offsets[channel] + bin``, in the stored dtype."""
        part = self.source.rows(rows)
        measured_bc = self.measured_nc[rows]
        if measured_bc.all():
            return part
        lengths_bc = np.diff(channel_bounds(part, self.offsets), axis=1)
        keep = np.repeat(measured_bc.ravel(), lengths_bc.ravel())
        indptr = np.concatenate([[0], np.cumsum((lengths_bc * measured_bc).sum(axis=1))])
        return sparse.csr_matrix((part.data[keep], part.indices[keep], indptr), shape=part.shape)

    def read(self, rows: np.ndarray) -> dict[str, Tensor]:
        """Return ``x_indptr`` (b + 1), ``x_indices`` (o), ``x_values`` (o) and ``modality_mask`` (b, c)."""
        mask_bc = torch.from_numpy(self.measured_nc[rows].astype(np.float32))
        return row_tensors(self.rows(rows)) | {BATCH_MASK: mask_bc}


def channel_bounds(part: sparse.csr_matrix, offsets: np.ndarray) -> np.ndarray:
    """Return where the entries of each row and channel begin and end in ``part.data``, shape (b, c + 1).

    Examples
    --------
    >>> channel_bounds(sparse.csr_matrix([[1, 0, 2, 3], [0, 0, 0, 4]]), np.array([0, 2, 4])).tolist()
    [[0, 1, 3], [3, 3, 4]]
    """
    offsets = offsets.astype(part.indices.dtype)  # or every search would convert the indices
    bounds = np.empty((part.shape[0], offsets.size), dtype=np.int64)
    for row in range(part.shape[0]):
        start, stop = part.indptr[row], part.indptr[row + 1]
        bounds[row] = start + part.indices[start:stop].searchsorted(offsets)
    return bounds


def dense_rows(array_ncl: np.ndarray, rows: np.ndarray) -> sparse.csr_matrix:
    """Return rows of a dense array as csr, the later axes flattened, a few rows at a time.

    Examples
    --------
    >>> dense_rows(np.array([[[0, 1], [2, 0]]]), np.array([0, 0])).toarray().tolist()
    [[0, 1, 2, 0], [0, 1, 2, 0]]
    """
    width = int(np.prod(array_ncl.shape[1:]))
    indices, values, counts = [], [], []
    for start in range(0, rows.size, _DENSE_ROWS):
        block = array_ncl[rows[start : start + _DENSE_ROWS]].reshape(-1)
        # a Boolean array is searched faster than one of counts
        at = np.flatnonzero(block != 0)
        edges = np.searchsorted(at, np.arange(block.size // width + 1) * width)
        counts.append(np.diff(edges))
        values.append(block[at])
        indices.append(at - np.repeat(np.arange(counts[-1].size) * width, counts[-1]))
    shape = (rows.size, width)
    dtype = np.float32 if array_ncl.dtype == np.float16 else array_ncl.dtype  # scipy has no sparse half precision
    if not values:
        return sparse.csr_matrix(shape, dtype=dtype)
    indptr = np.concatenate([[0], np.cumsum(np.concatenate(counts))])
    data = np.concatenate(values).astype(dtype, copy=False)
    return sparse.csr_matrix((data, np.concatenate(indices), indptr), shape=shape)


def _stack(parts: Sequence[sparse.csr_matrix]) -> sparse.csr_matrix:
    """Put channels side by side."""
    return parts[0] if len(parts) == 1 else sparse.hstack(parts, format="csr")
