"""Checks of bulk experiments, values block by block: each refusal says what was found, where and what to do."""

from __future__ import annotations

import logging
from itertools import pairwise, product
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
from scipy import sparse

from epivi import _validate
from epivi._errors import DataError
from epivi._validate import _some

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from epivi.data.windows.regions import Runs

logger = logging.getLogger(__name__)

BLOCK_VALUES: Final = 1 << 22


class Block(NamedTuple):
    """A part of an array (biosamples, assays, bins) in memory, and where it begins."""

    row: int
    assay: int
    bin: int
    values_bal: np.ndarray


def in_memory(part: Any) -> np.ndarray:
    """Return a part of a numpy, zarr, h5py or dask array as a numpy array.

    Examples
    --------
    >>> in_memory(np.arange(3)).tolist()
    [0, 1, 2]
    """
    # one thread: threads of dask do not survive the fork of a loader's worker
    return np.asarray(part.compute(scheduler="synchronous") if hasattr(part, "compute") else part)


def extents(array: Any) -> list[np.ndarray]:
    """Return the edges of the blocks in which an array is best read, one array for each axis.

    Examples
    --------
    >>> [edges.tolist() for edges in extents(np.zeros((2, 1, 3)))]
    [[0, 1, 2], [0, 1], [0, 3]]
    """
    chunks = getattr(array, "shards", None) or getattr(array, "chunks", None) or (1,) * (array.ndim - 1) + (1 << 16,)
    edges = []
    for axis, size in enumerate(chunks):
        if isinstance(size, int):
            edges.append(np.append(np.arange(0, array.shape[axis], size), array.shape[axis]))
        else:
            edges.append(np.concatenate([[0], np.cumsum(size)]))
    # few large blocks along the bins instead of many small ones
    others = int(np.prod([np.diff(part).max(initial=1) for part in edges[:-1]]))
    last = edges[-1]
    keep = [0]
    for at in range(1, last.size - 1):
        if (last[at + 1] - last[keep[-1]]) * others > BLOCK_VALUES:
            keep.append(at)
    edges[-1] = last[[*keep, last.size - 1]]
    return edges


def blocks(array: Any, wanted_ba: np.ndarray) -> Iterator[Block]:
    """Yield the parts of an array (biosamples, assays, bins) that hold wanted experiments, one at a time.

    Parameters
    ----------
    array
        numpy, zarr, h5py or dask.
    wanted_ba
        Which experiments matter, bool; blocks without any of them are not read.

    Examples
    --------
    >>> [block.row for block in blocks(np.zeros((3, 1, 2)), np.array([[True], [False], [True]]))]
    [0, 2]
    """
    rows, assays, bins = (list(pairwise(edges)) for edges in extents(array))
    for (b0, b1), (a0, a1), (l0, l1) in product(rows, assays, bins):
        if wanted_ba[b0:b1, a0:a1].any():
            yield Block(int(b0), int(a0), int(l0), in_memory(array[b0:b1, a0:a1, l0:l1]))


def check_values_array(array: Any, *, where: str, shape: tuple[int, int, int], is_counts: bool) -> None:
    """Check kind, dtype and shape of an array of all experiments, without reading values.

    Raises
    ------
    DataError
        If it is sparse, a table or no array; has no numbers; or has another shape, with both shapes and their axes.

    Examples
    --------
    >>> check_values_array(np.zeros((2, 1, 3)), where="obsm", shape=(2, 1, 3), is_counts=True)
    """
    kind = f"{type(array).__module__}.{type(array).__qualname__}"
    message = ""
    if sparse.issparse(array) or hasattr(array, "columns") or not all(hasattr(array, k) for k in ("shape", "dtype")):
        message = f"has type {kind}. Give a numpy, zarr or dask array of shape (biosamples, assays, bins)"
    elif isinstance(array, np.ma.MaskedArray):
        message = "is a masked array. Fill it, and say in the availability which experiments exist"
    elif np.dtype(array.dtype).kind not in "iuf":
        message = f"has dtype {array.dtype}, numbers are needed. Convert it with .astype('{'uint16' * is_counts}')"
        message = message.replace("''", "'float32'")
    elif tuple(array.shape) != shape:
        message = (
            f"has the shape {tuple(array.shape)}, needed is {shape} = (biosamples, assays, bins): {shape[0]} rows of "
            f"obs, {shape[1]} assays of var, {shape[2]} rows of the table of bins. Correct the array or the table"
        )
    if message:
        message = f"{where} {message}."
        raise DataError(message)


def check_availability(mask: Any, *, where: str, obs_names: Any, assays: Sequence[str]) -> np.ndarray:
    """Check a mask of available experiments and return it as Boolean array (biosamples, assays).

    Raises
    ------
    DataError
        If it is no table of True and False, or of 0 and 1, with a row for each biosample and a column for each assay.

    Examples
    --------
    >>> check_availability(np.array([[1, 0]]), where="obsm", obs_names=["K562"], assays=["a", "b"]).tolist()
    [[True, False]]
    """
    if hasattr(mask, "columns"):
        if sorted(map(str, mask.columns)) != sorted(assays):
            message = f"{where} has the columns {_some(mask.columns)}, needed are the assays {_some(assays)}."
            raise DataError(message)
        mask = mask.rename(columns=str)[list(assays)].to_numpy()
    values = in_memory(mask)
    if values.shape != (shape := (len(obs_names), len(assays))):
        message = f"{where} has the shape {values.shape}, needed is {shape} = (biosamples, assays)."
        raise DataError(message)
    if values.dtype.kind not in "biuf" or not np.isin(values, (0, 1)).all():
        message = f"{where} ({values.dtype}) holds other values than True and False: True where the experiment exists."
        raise DataError(message)
    return values.astype(bool)


def check_some_available(available_ba: np.ndarray, obs_names: Any, *, where: str) -> None:
    """Refuse biosamples without any experiment, and mention those with a single one.

    Raises
    ------
    DataError
        If a biosample has no available assay; all are named.

    Examples
    --------
    >>> check_some_available(np.array([[True, True]]), np.array(["K562"]), where="adata")
    """
    n = available_ba.sum(axis=1)
    if (n == 0).any():
        names = _some(np.asarray(obs_names)[n == 0], n_shown=10)
        message = (
            f"{int((n == 0).sum())} of {n.size} biosamples of {where} have no available assay: {names}. Remove them, "
            "or correct the availability."
        )
        raise DataError(message)
    if (n == 1).any():
        logger.warning(
            "%d biosamples of %s have one available assay: %s. They are trained on without a hidden assay to predict.",
            int((n == 1).sum()),
            where,
            _some(np.asarray(obs_names)[n == 1]),
        )


def check_numbers(values: Any, available_ba: np.ndarray, *, where: str, names: tuple[Any, Any]) -> np.ndarray:
    """Check a covariate of numbers and return it as float64 (biosamples, assays), NaN where nothing is available.

    Raises
    ------
    DataError
        If it has another shape, holds no numbers, or is infinite for an available experiment.

    Examples
    --------
    >>> check_numbers(np.array([[2.0, 3.0]]), np.array([[True, False]]), where="", names=(["K562"], ["a", "b"]))
    array([[ 2., nan]])
    """
    values = in_memory(values.to_numpy() if hasattr(values, "columns") else values)
    if values.shape != available_ba.shape:
        message = f"{where} has the shape {values.shape}, needed is {available_ba.shape} = (biosamples, assays)."
        raise DataError(message)
    if values.dtype.kind not in "biuf":
        message = f"{where} has dtype {values.dtype}: give numbers, NaN where unknown."
        raise DataError(message)
    found = np.where(available_ba, values.astype(np.float64), np.nan)
    _refuse(np.isinf(found), found, where=where, names=names, remedy="Give a number, or NaN where unknown")
    return found


def check_depth(depth_ba: np.ndarray, *, where: str, names: tuple[Any, Any]) -> None:
    """Check that sequencing depths are above zero where they are known.

    Raises
    ------
    DataError
        If one is not; biosample and assay are named.

    Examples
    --------
    >>> check_depth(np.array([[1e6, np.nan]]), where="obsm['depth']", names=(["K562"], ["a", "b"]))
    """
    remedy = "A depth is a number of reads above zero; give NaN where unknown, and no logarithm"
    _refuse(depth_ba <= 0, depth_ba, where=where, names=names, remedy=remedy)


def check_codes(
    values: Any, available_ba: np.ndarray, n_levels: int, *, where: str, names: tuple[Any, Any]
) -> np.ndarray:
    """Check codes of categories and return them as int64 (biosamples, assays), -1 where nothing is available.

    Raises
    ------
    DataError
        If they have another shape, are no whole numbers, or are no code of a category.

    Examples
    --------
    >>> check_codes(np.array([[1, 7]]), np.array([[True, False]]), 2, where="", names=(["K562"], ["a", "b"])).tolist()
    [[1, -1]]
    """
    values = in_memory(values.to_numpy() if hasattr(values, "columns") else values)
    if values.shape != available_ba.shape:
        message = f"{where} has the shape {values.shape}, needed is {available_ba.shape} = (biosamples, assays)."
        raise DataError(message)
    if values.dtype.kind not in "iu":
        message = f"{where} has dtype {values.dtype}: give the codes of the categories as integers, -1 where unknown."
        raise DataError(message)
    found = np.where(available_ba, values.astype(np.int64), -1)
    remedy = f"Codes go from 0 to {n_levels - 1}, as in uns['categories'], and -1 stands for unknown"
    _refuse((found < -1) | (found >= n_levels), found, where=where, names=names, remedy=remedy)
    return found


def _refuse(bad_ba: np.ndarray, values_ba: np.ndarray, *, where: str, names: tuple[Any, Any], remedy: str) -> None:
    """Name the first bad value of a table of experiments."""
    if bad_ba.any():
        row, assay = np.unravel_index(int(np.argmax(bad_ba)), bad_ba.shape)
        message = (
            f"{where} is {values_ba[row, assay]:g} for biosample '{names[0][row]}', assay '{names[1][assay]}'; "
            f"{int(bad_ba.sum())} such values. {remedy}."
        )
        raise DataError(message)


def scan(
    array: Any, available_ba: np.ndarray, found: Runs, *, where: str, names: tuple[Any, Any], is_counts: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Check all values of available experiments block by block, and return their sums and sums of squares.

    Parameters
    ----------
    array
        (biosamples, assays, bins).
    available_ba
        Which experiments exist; the values of others do not matter.
    found
        Runs of the bins, for messages.
    where
        How messages name the array.
    names
        Names of the biosamples and of the assays.
    is_counts
        Whether the values must be whole numbers of at least zero, or only finite.

    Returns
    -------
    Two float64 arrays (biosamples, assays), 0 where nothing is available.

    Raises
    ------
    DataError
        If a value is not valid; the first biosample, assay and bin are named.

    Examples
    --------
    >>> import pandas as pd
    >>> from epivi.data.windows.regions import runs
    >>> bins = runs(pd.DataFrame({"chrom": ["1", "1"], "start": [0, 10], "end": [10, 20]}))
    >>> counts = np.array([[[1, 2]]])
    >>> scan(counts, np.array([[True]]), bins, where="", names=(["K562"], ["a"]), is_counts=True)[0].tolist()
    [[3.0]]
    """
    sums_ba, squares_ba = np.zeros(available_ba.shape), np.zeros(available_ba.shape)
    for row, assay, first, values_bal in blocks(array, available_ba):
        size_b, size_a, _ = values_bal.shape
        for b, a in np.argwhere(available_ba[row : row + size_b, assay : assay + size_a]):
            part = values_bal[b, a]
            if cause := _fault(part, is_counts=is_counts):
                at, text = cause
                message = (
                    f"{where} is {text} for biosample '{names[0][row + b]}', assay '{names[1][assay + a]}', bin "
                    f"{first + at} ({found.name(first + at)}). {_remedy(part[at], is_counts=is_counts)}"
                )
                raise DataError(message)
            sums_ba[row + b, assay + a] += part.sum(dtype=np.float64)
            wide = part.astype(np.float64)
            squares_ba[row + b, assay + a] += wide @ wide
    return sums_ba, squares_ba


def _fault(values_l: np.ndarray, *, is_counts: bool) -> tuple[int, str] | None:
    """Return position and value of the first value that is not valid."""
    if values_l.dtype.kind == "u" or (values_l.dtype.kind == "i" and not is_counts):
        return None
    bad = ~np.isfinite(values_l)
    if is_counts:
        bad |= values_l < 0
        if values_l.dtype.kind == "f":
            bad |= values_l != np.floor(values_l)
    if not bad.any():
        return None
    at = int(np.argmax(bad))
    return at, f"{values_l[at]:g}"


def _remedy(value: Any, *, is_counts: bool) -> str:
    if np.isnan(value):
        fill = "fill bins without reads with 0" if is_counts else "fill uncovered bins (bigWig: uncovered='zero')"
        return f"Mark the experiment as not available, or {fill}."
    if not is_counts:
        return "Values must be finite: clip them, or mark the experiment as not available."
    return "Whole numbers of reads of at least zero are needed: pass the raw counts."


def check_holder(data: Any, *, where: str) -> None:
    """Check that an AnnData is no view and that biosamples and assays have names of their own.

    Raises
    ------
    DataError
        If it is something else, a view, empty, or a name occurs twice.

    Examples
    --------
    >>> from anndata import AnnData
    >>> check_holder(AnnData(np.ones((1, 2))), where="adata")
    """
    from anndata import AnnData

    if not isinstance(data, AnnData):
        raise DataError(_validate._not_anndata(data, where))
    if data.is_view:
        message = f"{where} is a view of another object: call .copy() on it first."
        raise DataError(message)
    if 0 in data.shape:
        message = f"{where} has the shape {data.shape}: biosamples as obs and assays as var are needed."
        raise DataError(message)
    for axis, names in (("obs_names", data.obs_names), ("var_names", data.var_names)):
        if not names.is_unique:
            twice = names[names.duplicated()][0]
            message = f"{where}.{axis} are not unique: '{twice}' occurs more than once. Rename or remove it."
            raise DataError(message)
