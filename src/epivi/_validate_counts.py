"""Checks of count matrices, for dense, sparse and file-backed ones alike; `epivi._validate` re-exports them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import scipy.sparse as sp

from epivi._errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import pandas as pd

    Names = Sequence[str] | pd.Index | np.ndarray

# Entries looked at together: bounds the memory beside the matrix to about 20 MB, however wide the rows are.
_MAX_ENTRIES = 1 << 19

_RAW = "Pass the raw counts, for example with layer='counts'"


@dataclass(frozen=True)
class CountSummary:
    """What one pass over a count matrix of n cells and p features found.

    Attributes
    ----------
    row_sums
        (n,) float64, the sum of counts of each cell.
    n_open
        (n,) int64, features with a count above zero in each cell; explicitly stored zeros do not count.
    col_open
        (p,) int64, cells in which a feature has a count above zero.
    max_value
        The largest count.
    is_binary
        Whether every non-zero count is 1.
    nnz
        Number of counts above zero in the whole matrix.
    """

    row_sums: np.ndarray
    n_open: np.ndarray
    col_open: np.ndarray
    max_value: float
    is_binary: bool
    nnz: int


class _Block(NamedTuple):
    """The non-zero entries of one slab of whole rows or whole columns, indices relative to its corner."""

    row_start: int
    n_rows: int
    col_start: int
    n_cols: int
    rows: np.ndarray
    cols: np.ndarray
    values: np.ndarray


class _BadEntry(NamedTuple):
    row: int
    col: int
    value: float


def check_counts(
    matrix: Any,
    *,
    where: str,
    obs_names: Names | None = None,
    chunk_rows: int = 4096,
    alternatives: Mapping[str, Any] | None = None,
) -> CountSummary:
    """Check that a matrix holds counts and summarise it in one pass.

    Accepted are numpy arrays, scipy csr and csc (matrix or array), and what a backed AnnData holds on disk (csr, csc
    and dense datasets of HDF5 or zarr), which is read in slabs. Values may be of any Boolean, integer or float kind,
    as long as they are whole numbers of at least zero. A cell without counts is valid.

    Parameters
    ----------
    matrix
        Matrix of shape (n cells, p features).
    where
        How the message names the matrix, for example ``"adata.X"``.
    obs_names
        The n cell names for the message.
    chunk_rows
        Rows read at once at most; fewer are read where rows are wide.
    alternatives
        Other matrices by name, searched for counts if this one has none, so that the message can name them.

    Returns
    -------
    Sums and numbers of open features by cell, open cells by feature, largest value.

    Raises
    ------
    DataError
        If the type, the dtype or the number of axes cannot hold counts; if a value is NaN, infinite, negative or not
        whole (the first such cell in row order is named); if the matrix is empty or has no non-zero; if a sparse
        matrix is damaged; if `obs_names` has another length.

    Examples
    --------
    >>> import numpy as np
    >>> summary = check_counts(np.array([[0, 2, 1], [0, 0, 0]]), where="adata.X")
    >>> summary.n_open.tolist(), summary.col_open.tolist(), summary.is_binary
    ([2, 0], [0, 1, 1], False)
    """
    _check_container(matrix, where)
    n, p = matrix.shape
    if obs_names is not None and len(obs_names) != n:
        message = f"{where} has {n} rows and there are {len(obs_names)} cell names. Give one name a row."
        raise DataError(message)
    row_sums = np.zeros(n)
    n_open = np.zeros(n, dtype=np.int64)
    col_open = np.zeros(p, dtype=np.int64)
    largest, smallest = 0.0, np.inf
    first: _BadEntry | None = None
    for block in _blocks(matrix, where, chunk_rows):
        bad = _first_bad(block)
        if bad is not None and (first is None or bad[:2] < first[:2]):
            first = bad
        if first is not None:
            if block.n_cols == p:  # blocks of whole rows come in row order: nothing earlier can follow
                break
            continue
        rows = slice(block.row_start, block.row_start + block.n_rows)
        cols = slice(block.col_start, block.col_start + block.n_cols)
        row_sums[rows] += np.bincount(block.rows, weights=block.values, minlength=block.n_rows)
        n_open[rows] += np.bincount(block.rows, minlength=block.n_rows)
        col_open[cols] += np.bincount(block.cols, minlength=block.n_cols)
        if block.values.size:
            largest = max(largest, float(block.values.max()))
            smallest = min(smallest, float(block.values.min()))
    if first is not None:
        raise DataError(_describe(first, where, obs_names) + _name_alternatives(alternatives, chunk_rows))
    nnz = int(n_open.sum())
    if nnz == 0:
        message = f"{where} ({n} x {p}) has no value above zero. {_RAW}." + _name_alternatives(alternatives, chunk_rows)
        raise DataError(message)
    return CountSummary(row_sums, n_open, col_open, largest, largest == smallest == 1.0, nnz)


def _check_container(matrix: Any, where: str) -> None:
    """Refuse what is not a two-dimensional numeric matrix of a known type."""
    kind = f"{type(matrix).__module__}.{type(matrix).__qualname__}"
    root = kind.split(".", maxsplit=1)[0]
    message = ""
    if matrix is None:
        message = "is empty (None). Give a matrix of counts"
    elif root == "dask":
        message = f"is a dask array ({kind}). Load it with .compute(), or read the file with backed='r'"
    elif root == "pandas":
        message = f"is a pandas {type(matrix).__name__}. Pass its values: .to_numpy()"
    elif isinstance(matrix, np.ma.MaskedArray):
        message = "is a masked array. Fill the masked values first: .filled(0)"
    elif not (isinstance(matrix, np.ndarray) or sp.issparse(matrix) or root in {"h5py", "zarr", "anndata"}):
        message = f"has type {kind}. Convert it to a numpy array or to a scipy csr_matrix"
    elif getattr(matrix, "shape", None) is None or not hasattr(matrix, "dtype"):
        message = f"has type {kind}, which is no matrix. Convert it to a numpy array or to a scipy csr_matrix"
    elif len(matrix.shape) != 2:
        message = f"has {len(matrix.shape)} axes, shape {tuple(matrix.shape)}. Counts need two: cells x features"
    elif matrix.dtype.kind not in "biuf":
        message = (
            f"has dtype {matrix.dtype}, which cannot hold counts. Convert it to numbers: .astype('float32'), "
            "after a look at what it holds"
        )
    elif 0 in matrix.shape:
        axis = "cells" if matrix.shape[0] == 0 else "features"
        message = f"has shape {tuple(matrix.shape)}: zero {axis}. Check how it was filtered or read"
    elif getattr(matrix, "format", "csr") not in {"csr", "csc"}:
        message = f"is sparse in the format '{matrix.format}'. Convert it with .tocsr()"
    if message:
        message = f"{where} {message}."
        raise DataError(message)


def _blocks(matrix: Any, where: str, chunk_rows: int) -> Iterator[_Block]:
    """Yield the non-zeros slab by slab: rows of dense and csr, columns of csc."""
    n, p = matrix.shape
    if getattr(matrix, "format", None) is None:
        step = min(chunk_rows, max(1, _MAX_ENTRIES // p))
        for start in range(0, n, step):
            dense = np.asarray(matrix[start : start + step])
            rows, cols = np.nonzero(dense)
            yield _Block(start, dense.shape[0], 0, p, rows, cols, dense[rows, cols])
        return
    by_rows = matrix.format == "csr"
    for start, slab in _slabs(matrix, where, chunk_rows):
        major, minor, values = _entries(slab, where)
        if by_rows:
            yield _Block(start, slab.shape[0], 0, p, major, minor, values)
        else:
            yield _Block(0, n, start, slab.shape[0], minor, major, values)


def _slabs(matrix: Any, where: str, chunk_rows: int) -> Iterator[tuple[int, sp.csr_array]]:
    """Yield (start, slab) along the compressed axis; a csc matrix is read as the csr form of its transpose."""
    by_rows = matrix.format == "csr"
    n_major, n_minor = matrix.shape if by_rows else matrix.shape[::-1]
    if not sp.issparse(matrix):  # on disk: slices come into memory as scipy matrices
        n_stored = int(matrix.group["data"].shape[0])
        step = min(chunk_rows, max(1, _MAX_ENTRIES * n_major // max(n_stored, 1)))
        for start in range(0, n_major, step):
            slab = matrix[start : start + step] if by_rows else matrix[:, start : start + step].T
            yield start, sp.csr_array(slab)
        return
    indptr = np.asarray(matrix.indptr)
    if indptr.size != n_major + 1 or indptr[0] != 0 or (np.diff(indptr) < 0).any() or indptr[-1] > matrix.data.size:
        message = f"{where} is a damaged sparse matrix: its indptr does not fit its data. Build the matrix anew."
        raise DataError(message)
    start = 0
    while start < n_major:
        stop = int(np.searchsorted(indptr, indptr[start] + _MAX_ENTRIES, side="right")) - 1
        stop = min(max(stop, start + 1), start + chunk_rows, n_major)
        part = slice(indptr[start], indptr[stop])
        triple = (matrix.data[part], matrix.indices[part], indptr[start : stop + 1] - indptr[start])
        yield start, sp.csr_array(triple, shape=(stop - start, n_minor))
        start = stop


def _entries(slab: sp.csr_array, where: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (major, minor, value) of the entries that are not zero; entries stored twice are summed as scipy does."""
    if slab.indices.size and (slab.indices.min() < 0 or slab.indices.max() >= slab.shape[1]):
        message = f"{where} is a damaged sparse matrix: an index lies outside its shape. Build the matrix anew."
        raise DataError(message)
    if not slab.has_canonical_format:
        slab = slab.copy()  # the arrays are views of the user's matrix
        slab.sum_duplicates()
    major = np.repeat(np.arange(slab.shape[0]), np.diff(slab.indptr))
    keep = slab.data != 0
    if keep.all():
        return major, slab.indices, slab.data
    return major[keep], slab.indices[keep], slab.data[keep]


def _first_bad(block: _Block) -> _BadEntry | None:
    """Return the first entry in row order that is not a whole number above zero."""
    values = block.values
    if values.dtype.kind in "bu":
        return None
    bad = values < 0
    if values.dtype.kind == "f":
        bad |= ~np.isfinite(values) | (values != np.floor(values))
    where_bad = np.flatnonzero(bad)
    if where_bad.size == 0:
        return None
    at = where_bad[np.lexsort((block.cols[where_bad], block.rows[where_bad]))[0]]
    return _BadEntry(int(block.rows[at]) + block.row_start, int(block.cols[at]) + block.col_start, float(values[at]))


def _describe(bad: _BadEntry, where: str, obs_names: Names | None) -> str:
    """Say what is wrong with one entry and what to do."""
    cell = f"row {bad.row}" if obs_names is None else f"cell '{obs_names[bad.row]}' (row {bad.row})"
    if np.isnan(bad.value):
        cause = "NaN, a missing value. Counts have none: set it to 0 or remove the cell"
    elif np.isinf(bad.value):
        cause = f"{bad.value}, an infinite value. {_RAW}"
    elif bad.value < 0:
        cause = f"{bad.value:g}, a negative value: the matrix looks scaled or centred. {_RAW}"
    else:
        cause = f"{bad.value:g}, not a whole number: the matrix looks normalised or log-normalised. {_RAW}"
    return f"{where}: {cell}, column {bad.col} holds {cause}."


def _name_alternatives(alternatives: Mapping[str, Any] | None, chunk_rows: int) -> str:
    """Return a sentence that names the matrices which do hold counts."""
    good = []
    for name, matrix in (alternatives or {}).items():
        try:
            check_counts(matrix, where=str(name), chunk_rows=chunk_rows)
        except DataError:
            continue
        good.append(f"'{name}'")
    return f" Whole numbers are in: {', '.join(good)}." if good else ""
