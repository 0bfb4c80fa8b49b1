"""Checks of what the fields of tracks find in AnnData and MuData: each refusal says what, where and what to do."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import sparse

from epivi import _validate
from epivi._errors import ConfigError, DataError, nearest
from epivi._keys import UNS_FRAGMENTS
from epivi.data.tracks.grids import TrackGrid, TrackLayout
from epivi.pp.features import peak_coordinates

if TYPE_CHECKING:
    from anndata import AnnData

logger = logging.getLogger(__name__)

_RAW = "Pass the raw counts"


def check_holder(data: Any, *, where: str, minimum: int = 2) -> None:
    """Check that an AnnData or MuData is no view and has enough cells with names of their own.

    Raises
    ------
    DataError
        If it is something else, is a view, has fewer than ``minimum`` cells, or names of cells occur twice.

    Examples
    --------
    >>> from anndata import AnnData
    >>> check_holder(AnnData(np.ones((2, 1))), where="adata")
    """
    if not hasattr(data, "obsm") or not hasattr(data, "obs_names"):
        message = f"{where} is a {type(data).__name__}: an AnnData or MuData is needed."
        raise DataError(message)
    if data.is_view:
        message = f"{where} is a view of another object: call .copy() on it first."
        raise DataError(message)
    if data.n_obs < minimum:
        message = f"{where} has {data.n_obs} cells, at least {minimum} are needed. Check how it was filtered or read."
        raise DataError(message)
    if not data.obs_names.is_unique:
        twice = data.obs_names[data.obs_names.duplicated()][0]
        message = f"{where}.obs_names are not unique: '{twice}' occurs more than once. Call .obs_names_make_unique()."
        raise DataError(message)


def check_stacked(array: Any, *, where: str, shape: tuple[int, int, int]) -> None:
    """Check kind, dtype and shape of an array of all channels.

    Parameters
    ----------
    array
        Dense (n, c, l) or CSR (n, c · l).
    where
        How messages name it.
    shape
        The expected (n, c, l).

    Raises
    ------
    DataError
        If it is neither, holds no numbers, or has another shape; or if a CSR matrix is damaged.

    Examples
    --------
    >>> check_stacked(np.zeros((2, 1, 3), dtype=np.uint16), where="obsm", shape=(2, 1, 3))
    """
    n, c, size = shape
    is_sparse = sparse.issparse(array)
    kind = f"{type(array).__module__}.{type(array).__qualname__}"
    message = ""
    if hasattr(array, "columns"):
        message = "is a DataFrame. Store the counts as an array (cells, channels, bins) or as CSR"
    elif is_sparse and array.ndim != 2:
        message = f"is a sparse array with {array.ndim} axes. Use .reshape({n}, {c * size}).tocsr(), channel by channel"
    elif is_sparse and array.format != "csr":
        message = f"is sparse in the format '{array.format}'. Convert it with .tocsr()"
    elif not is_sparse and (not isinstance(array, np.ndarray) or isinstance(array, np.ma.MaskedArray)):
        message = (
            f"has type {kind}, which is not read. Load it into memory as a numpy array (cells, channels, bins) or as "
            "a scipy csr_matrix (cells, channels * bins)"
        )
    elif problem := _bad_dtype(array.dtype):
        message = problem
    elif not is_sparse and array.ndim != 3:
        message = f"has {array.ndim} axes, shape {array.shape}. Reshape it to (cells, channels, bins) = {shape}"
    elif array.shape != (wanted := (n, c * size) if is_sparse else shape):
        message = (
            f"has shape {array.shape}, needed is {wanted}: {n} cells, {c} channels and {size} bins as described in "
            "uns. Correct the description or the counts"
        )
    if message:
        message = f"{where} {message}."
        raise DataError(message)
    if is_sparse:
        _check_intact(array, where)


def check_modality(adata: AnnData, *, layer: str | None, where: str) -> TrackGrid:
    """Check a modality that holds one channel, cells × bins, and return its bins.

    Raises
    ------
    DataError
        If the layer is missing, X is empty, the matrix holds no numbers or is damaged, names of cells occur twice, or
        the bins have no valid positions.

    Examples
    --------
    >>> import pandas as pd
    >>> from anndata import AnnData
    >>> adata = AnnData(np.ones((2, 1)), var=pd.DataFrame(index=["chr1:0-100"]))
    >>> check_modality(adata, layer=None, where="mdata['ATAC']").n_bins
    1
    """
    if layer is not None:
        _validate.check_key(adata.layers, layer, where=f"{where}.layers")
    matrix = adata.X if layer is None else adata.layers[layer]
    name = f"{where}.X" if layer is None else f"{where}.layers['{layer}']"
    root = type(matrix).__module__.split(".", maxsplit=1)[0]
    if not (isinstance(matrix, np.ndarray) or sparse.issparse(matrix) or root in {"h5py", "zarr", "anndata"}):
        kind = "empty" if matrix is None else f"of type {type(matrix).__module__}.{type(matrix).__qualname__}"
        message = f"{name} is {kind}. Give counts as a numpy array or a scipy csr_matrix."
        raise DataError(message)
    if 0 in matrix.shape:
        message = f"{name} has shape {tuple(matrix.shape)}: cells and bins are needed."
        raise DataError(message)
    if problem := _bad_dtype(matrix.dtype):
        message = f"{name} {problem}."
        raise DataError(message)
    if sparse.issparse(matrix) and matrix.format in {"csr", "csc"}:
        _check_intact(matrix, name)
    try:
        bins = peak_coordinates(adata) if adata.n_obs > 1 else peak_coordinates(_twice(adata))
    except DataError as error:
        message = f"{where}: {error}"
        raise DataError(message) from error
    if bins is None:
        message = (
            f"The bins of {where} have no position: var has no columns chrom, start and end, and names such as "
            f"'{adata.var_names[0]}' do not tell. Add the columns or rename the bins like chr1:0-10000."
        )
        raise DataError(message)
    grid = TrackGrid.from_frame(bins, where=f"{where}.var")
    declared: Any = counting(adata).get("bin_size_bp")
    # bins at the ends of chromosomes may be all that was kept, and merged bins are wider than those of the file
    is_size = isinstance(declared, int | np.integer) and declared >= grid.bin_size_bp
    return replace(grid, bin_size_bp=int(declared)) if is_size else grid


def counting(adata: AnnData) -> Mapping[str, Any]:
    """Return how the counts of a modality were made, as :func:`epivi.pp.fragments` notes it; empty if unknown.

    Examples
    --------
    >>> from anndata import AnnData
    >>> dict(counting(AnnData(np.ones((2, 1)), uns={"fragments": {"genome": "hg38"}})))
    {'genome': 'hg38'}
    """
    report = adata.uns.get(UNS_FRAGMENTS, {})
    return report if isinstance(report, Mapping) else {}


def check_mask(mask: Any, *, where: str, n_obs: int, channels: Sequence[str]) -> np.ndarray:
    """Check the mask of measured channels and return a copy, columns in the order of the channels.

    Raises
    ------
    DataError
        If it is no dense Boolean table of shape (cells, channels), or the columns of a DataFrame are not the channels.

    Examples
    --------
    >>> check_mask(np.array([[True, False]]), where="mask", n_obs=1, channels=["a", "b"]).tolist()
    [[True, False]]
    """
    if hasattr(mask, "columns"):
        if sorted(map(str, mask.columns)) != sorted(channels):
            message = f"{where} has the columns {list(mask.columns)}, needed are the channels {list(channels)}."
            raise DataError(message)
        mask = mask.rename(columns=str)[list(channels)]
        if {str(dtype) for dtype in mask.dtypes} != {"bool"}:
            message = f"{where} has columns of dtype {sorted(set(map(str, mask.dtypes)))}: give True where measured."
            raise DataError(message)
        mask = mask.to_numpy(dtype=bool)
    if not isinstance(mask, np.ndarray) or mask.dtype != bool:
        found = f"dtype {mask.dtype}" if isinstance(mask, np.ndarray) else f"type {type(mask).__name__}"
        message = f"{where} has {found}, a Boolean array is needed: True where measured. Convert it with .astype(bool)."
        raise DataError(message)
    if mask.shape != (n_obs, len(channels)):
        message = (
            f"{where} has shape {mask.shape}, needed is ({n_obs}, {len(channels)}): a row for each cell, a column for "
            f"each of the channels {list(channels)}."
        )
        raise DataError(message)
    return mask.copy()


def channel_modalities(modalities: Sequence[str] | Mapping[str, str]) -> dict[str, str]:
    """Return the modality of each channel from a list of modalities or a mapping.

    Raises
    ------
    ConfigError
        If it is neither, is empty, holds other things than names, or names a channel or modality twice.

    Examples
    --------
    >>> channel_modalities(["H3K27ac", "H3K27me3"])
    {'H3K27ac': 'H3K27ac', 'H3K27me3': 'H3K27me3'}
    """
    if isinstance(modalities, str) or not isinstance(modalities, Mapping | Sequence | np.ndarray):
        message = f"modalities={modalities!r} is not valid: give a list of modalities, or a dict from channels to them."
        raise ConfigError(message)
    pairs = list(modalities.items()) if isinstance(modalities, Mapping) else [(name, name) for name in modalities]
    if not pairs or not all(isinstance(name, str) for pair in pairs for name in pair):
        message = f"modalities={modalities!r} is not valid: at least one name is needed, and names are text."
        raise ConfigError(message)
    for names, what in (([c for c, _ in pairs], "channel"), ([m for _, m in pairs], "modality")):
        if twice := [name for name in names if names.count(name) > 1]:
            message = f"modalities names the {what} '{twice[0]}' twice. Name it once."
            raise ConfigError(message)
    return dict(pairs)


def described_layout(description: Any, *, where: str) -> TrackLayout:
    """Read channels and bins from the description of tracks in uns.

    Raises
    ------
    DataError
        If it is no dict, an entry is missing, there is no channel or one name occurs twice, or the bins are not valid.

    Examples
    --------
    >>> import pandas as pd
    >>> bins = pd.DataFrame({"chrom": ["chr1"], "start": [0], "end": [100]})
    >>> described_layout({"channels": ["ATAC"], "bins": bins}, where="uns").n_bins
    [1]
    """
    if not isinstance(description, Mapping):
        message = f"{where} is a {type(description).__name__}: a dict with 'channels' and 'bins' is needed."
        raise DataError(message)
    for key in ("channels", "bins"):
        _validate.check_key(description, key, where=where)
    channels = [str(name) for name in np.atleast_1d(np.asarray(description["channels"]))]
    if not channels:
        message = f"{where}['channels'] is empty: give the name of each channel."
        raise DataError(message)
    if twice := [name for name in channels if channels.count(name) > 1]:
        message = f"{where}['channels'] names '{twice[0]}' {len(twice)} times. Give every channel a name of its own."
        raise DataError(message)
    size = description.get("bin_size_bp") or None  # 0 stands for bins of several widths
    grid = TrackGrid.from_frame(description["bins"], where=f"{where}['bins']", bin_size_bp=size)
    genome = str(description.get("genome") or "") or None
    return TrackLayout(tuple(channels), (grid,), (0,) * len(channels), genome)


def match_channels(trained: Sequence[str], found: Sequence[str], *, where: str) -> np.ndarray:
    """Return the stored channel of each trained one, -1 where it is missing; say what differs.

    Raises
    ------
    DataError
        If no channel is shared.

    Examples
    --------
    >>> match_channels(["a", "b", "c"], ["c", "a"], where="adata").tolist()
    [1, -1, 0]
    """
    indexer = np.array([found.index(name) if name in found else -1 for name in trained], dtype=np.int64)
    missing = [name for name in trained if name not in found]
    extra = [name for name in found if name not in trained]
    if len(missing) == len(trained):
        message = f"{where} has none of the channels of the trained model. {nearest(found[0], trained)}"
        raise DataError(message)
    if missing:
        logger.warning("%s lacks the channels %s: they count as not measured.", where, missing)
    if extra:
        logger.warning("%s has the channels %s, unknown to the trained model: they are ignored.", where, extra)
    if (np.diff(indexer[indexer >= 0]) < 0).any():
        logger.info("Channels of %s are not in the order of training: they are matched by name.", where)
    return indexer


def first_bad_count(part: sparse.csr_matrix) -> tuple[int, int, str] | None:
    """Return row, column and fault of the first entry that is no count, or ``None``.

    Examples
    --------
    >>> first_bad_count(sparse.csr_matrix([[0, 1.0], [0.5, 0]]))[:2]
    (1, 0)
    """
    values = part.data
    if values.dtype.kind == "u":
        return None
    bad = values < 0
    if values.dtype.kind == "f":
        bad |= ~np.isfinite(values) | (values != np.floor(values))
    if not bad.any():
        return None
    at = int(np.argmax(bad))
    row = int(np.searchsorted(part.indptr, at, side="right")) - 1
    value = values[at]
    if np.isnan(value):
        cause = "NaN, a missing value. Set it to 0, or mask the channel in this cell with mask_key."
    elif np.isinf(value):
        cause = f"{value}, an infinite value. {_RAW}."
    elif value < 0:
        cause = f"{value:g}, a negative value: the counts look scaled or centred. {_RAW}."
    else:
        cause = (
            f"{value:g}, not a whole number: the counts look normalised. {_RAW}; halves come from counting reads, "
            "epivi.pp.reads_to_fragments turns reads into fragments."
        )
    return row, int(part.indices[at]), cause


def _bad_dtype(dtype: Any) -> str:
    """Say why a dtype cannot hold counts; nothing if it can."""
    if dtype.kind == "b":
        return "has dtype bool. Counts are needed; if each open bin is to count once, convert it with .astype('uint8')"
    if dtype.kind not in "iuf":
        return f"has dtype {dtype}, which cannot hold counts. Convert it to numbers: .astype('uint16')"
    return ""


def _check_intact(matrix: Any, where: str) -> None:
    """Refuse a compressed matrix whose parts do not fit together."""
    n_major, n_minor = matrix.shape if matrix.format == "csr" else matrix.shape[::-1]
    indptr, indices = np.asarray(matrix.indptr), np.asarray(matrix.indices)
    fits = indptr.size == n_major + 1 and indptr[0] == 0 and (np.diff(indptr) >= 0).all()
    if not fits or indptr[-1] > min(indices.size, matrix.data.size):
        message = f"{where} is a damaged sparse matrix: its indptr does not fit its data. Build the matrix anew."
        raise DataError(message)
    if indices.size and (indices.min() < 0 or indices.max() >= n_minor):
        message = f"{where} is a damaged sparse matrix: an index lies outside its shape. Build the matrix anew."
        raise DataError(message)


def _twice(adata: AnnData) -> Any:
    """Return an object of two empty cells with the features of another, whose positions can be read like any."""
    from anndata import AnnData

    return AnnData(sparse.csr_matrix((2, adata.n_vars)), var=adata.var)
