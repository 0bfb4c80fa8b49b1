"""Peaks and cells of an AnnData: coordinates, order, filters, reads to fragments."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp

from epivi._errors import ConfigError, DataError
from epivi._keys import VAR_CHROM, VAR_END, VAR_START
from epivi._validate import check_anndata, check_counts, check_key, check_number
from epivi.pp.genome.regions import _genome_order, _region_frame, overlaps, read_blacklist

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

    from epivi._validate import CountSummary

logger = logging.getLogger(__name__)

# chr1:100-200, chr1-100-200, chr1_100_200; the chromosome itself may hold any of the three signs
_PEAK_NAME = re.compile(r"(.+)(?::([0-9]+)-([0-9]+)|-([0-9]+)-([0-9]+)|_([0-9]+)_([0-9]+))", flags=re.DOTALL)


def peak_coordinates(
    adata: AnnData, *, chrom_key: str = VAR_CHROM, start_key: str = VAR_START, end_key: str = VAR_END
) -> pd.DataFrame | None:
    """Return where the features lie, from the columns of ``adata.var`` or else from their names.

    Names are read as ``chr1:100-200``, ``chr1-100-200`` or ``chr1_100_200``, 0-based and half-open.

    Returns
    -------
    Columns chrom (str), start, end (int64, bp), index ``adata.var_names``; None if there are neither columns nor
    names of this form (for example genes).

    Raises
    ------
    DataError
        If a column which was named is missing, a chromosome is missing, a position is not a whole number or is
        negative, a start is not below its end, or only a part of the names has the form. The first such feature is
        named.

    Examples
    --------
    >>> import numpy as np, pandas as pd
    >>> from anndata import AnnData
    >>> adata = AnnData(np.ones((2, 1)), var=pd.DataFrame(index=["chr1_100_200"]))
    >>> peak_coordinates(adata)["start"].tolist()
    [100]
    """
    check_anndata(adata)
    var: Any = adata.var
    keys = (chrom_key, start_key, end_key)
    for key, default in zip(keys, (VAR_CHROM, VAR_START, VAR_END), strict=True):
        if key != default:  # asked for by name, so it must be there
            check_key(var, key, where="adata.var")
    present = [key for key in keys if key in var]
    if len(present) == len(keys):
        return _from_columns(var, keys)
    regions = _from_names(adata.var_names)
    if regions is None and present:
        missing = [key for key in keys if key not in present]
        logger.warning("adata.var has %s but not %s: the features are taken to have no position.", present, missing)
    return regions


def _from_columns(var: pd.DataFrame, keys: tuple[str, str, str]) -> pd.DataFrame:
    """Check the three columns and return them under their usual names."""
    import pandas as pd

    for key in keys:
        check_key(var, key, where="adata.var")
    missing = var[keys[0]].isna().to_numpy()
    if missing.any():
        message = f"adata.var['{keys[0]}'] has no chromosome for '{var.index[missing][0]}'. Fill or remove such peaks."
        raise DataError(message)
    positions = []
    for key in keys[1:]:
        values = pd.to_numeric(var[key].astype(object), errors="coerce").to_numpy(dtype=float, na_value=np.nan)
        # float64 holds every whole number up to 2**53, far beyond any genome
        bad = ~np.isfinite(values) | (values != np.floor(values)) | (np.abs(values) > 2**53)
        if bad.any():
            at = int(np.flatnonzero(bad)[0])
            message = (
                f"adata.var['{key}'] of '{var.index[at]}' is {var[key].iloc[at]!r}; a whole number of bp is needed."
            )
            raise DataError(message)
        positions.append(values.astype(np.int64))
    chrom = var[keys[0]].astype(str).to_numpy(dtype=object)
    return _checked(_region_frame(chrom, positions[0], positions[1], index=var.index))


def _from_names(names: pd.Index) -> pd.DataFrame | None:
    """Read the positions off the names, or return None if no name has any."""
    matches = [_PEAK_NAME.fullmatch(str(name)) for name in names]
    if not any(matches):
        return None
    chroms, starts, ends = [], [], []
    for name, match in zip(names, matches, strict=True):
        groups = [] if match is None else [group for group in match.groups() if group is not None]
        if len(groups) != 3 or max(len(groups[1]), len(groups[2])) > 15:
            n_read = sum(match is not None for match in matches)
            message = (
                f"{n_read} of {len(matches)} feature names can be read as positions, '{name}' cannot. Rename it like "
                "chr1:100-200, remove it, or give the columns chrom, start and end in adata.var."
            )
            raise DataError(message)
        chroms.append(groups[0])
        starts.append(int(groups[1]))
        ends.append(int(groups[2]))
    return _checked(_region_frame(np.array(chroms, dtype=object), starts, ends, index=names))


def _checked(regions: pd.DataFrame) -> pd.DataFrame:
    """Refuse negative and empty intervals."""
    start, end = regions[VAR_START].to_numpy(), regions[VAR_END].to_numpy()
    for bad, cause in ((start < 0, "has a negative start"), (start >= end, "has a start which is not below its end")):
        if bad.any():
            at = int(np.flatnonzero(bad)[0])
            message = (
                f"The peak '{regions.index[at]}' {cause}: [{start[at]}, {end[at]}). Positions are 0-based and "
                f"half-open; {int(bad.sum())} peaks are affected. Correct or remove them."
            )
            raise DataError(message)
    return regions


def _needed_coordinates(adata: AnnData) -> pd.DataFrame:
    """Return `peak_coordinates`, which must be there."""
    regions = peak_coordinates(adata)
    if regions is None:
        message = (
            f"The features have no position: adata.var has no columns chrom, start, end, and names such as "
            f"'{adata.var_names[0]}' do not tell. Add the columns or rename the features like chr1:100-200."
        )
        raise DataError(message)
    return regions


def order_by_chromosome(adata: AnnData, *, copy: bool = False) -> AnnData | None:
    """Sort the peaks by chromosome (1 to 22, X, Y, M, then others), start and end.

    The columns chrom, start and end are added to ``adata.var`` where they were read off the names.

    Parameters
    ----------
    adata
        Peaks with coordinates, see `peak_coordinates`.
    copy
        Return a new object and leave `adata` as it is.

    Raises
    ------
    DataError
        If the peaks have no or no valid coordinates; if `adata` is on disk and `copy` is not set.

    Examples
    --------
    >>> import numpy as np, pandas as pd
    >>> from anndata import AnnData
    >>> adata = AnnData(np.ones((2, 3)), var=pd.DataFrame(index=["chr10:1-2", "chr2:5-6", "chr2:1-2"]))
    >>> order_by_chromosome(adata)
    >>> adata.var_names.tolist()
    ['chr2:1-2', 'chr2:5-6', 'chr10:1-2']
    """
    regions = _needed_coordinates(adata)
    order = _genome_order(regions)
    result = _subset(adata, order, axis=1, copy=copy)
    target = adata if result is None else result
    for key in (VAR_CHROM, VAR_START, VAR_END):
        if key not in target.var:
            target.var[key] = regions[key].to_numpy()[order]
    return result


def drop_blacklisted(adata: AnnData, blacklist: pd.DataFrame | str | Path, *, copy: bool = False) -> AnnData | None:
    """Remove the peaks which overlap a blacklist.

    Parameters
    ----------
    adata
        Peaks with coordinates, see `peak_coordinates`.
    blacklist
        Table with chrom, start, end, or a BED file.
    copy
        Return a new object and leave `adata` as it is.

    Raises
    ------
    DataError
        If the peaks have no coordinates, the names of chromosomes do not fit, or no peak is left.

    Examples
    --------
    >>> import numpy as np, pandas as pd
    >>> from anndata import AnnData
    >>> adata = AnnData(np.ones((2, 2)), var=pd.DataFrame(index=["chr1:0-10", "chr1:90-99"]))
    >>> drop_blacklisted(adata, pd.DataFrame({"chrom": ["chr1"], "start": [5], "end": [6]}))
    >>> adata.var_names.tolist()
    ['chr1:90-99']
    """
    regions = _needed_coordinates(adata)
    if isinstance(blacklist, str | Path):
        blacklist = read_blacklist(blacklist)
    keep = ~overlaps(regions, blacklist)
    if not keep.any():
        message = f"All {len(keep)} peaks overlap the blacklist. Check that both are of the same genome."
        raise DataError(message)
    return _subset(adata, keep, axis=1, copy=copy)


def filter_peaks(
    adata: AnnData,
    *,
    min_cells: int | None = None,
    min_fraction: float | None = None,
    max_fraction: float | None = None,
    layer: str | None = None,
    copy: bool = False,
) -> AnnData | None:
    """Keep the peaks which are open in enough and in not too many cells; the bounds themselves are kept.

    The mouse atlas of the SAILER paper was filtered with ``min_fraction=0.01, max_fraction=0.9``.

    Parameters
    ----------
    adata
        Counts, cells by peaks.
    min_cells, min_fraction, max_fraction
        Bounds on the number and on the share of cells with a count above zero.
    layer
        Layer with the counts instead of X.
    copy
        Return a new object and leave `adata` as it is.

    Raises
    ------
    ConfigError
        If no bound is given, or one is out of range.
    DataError
        If the matrix holds no counts, no peak is left, or `adata` is on disk and `copy` is not set.

    Examples
    --------
    >>> import numpy as np
    >>> from anndata import AnnData
    >>> adata = AnnData(np.array([[1, 0, 1], [1, 0, 0]]))
    >>> filter_peaks(adata, min_cells=1)
    >>> adata.var_names.tolist()
    ['0', '2']
    """
    if min_cells is None and min_fraction is None and max_fraction is None:
        message = "filter_peaks needs a bound: min_cells, min_fraction or max_fraction."
        raise ConfigError(message)
    if min_cells is not None:
        check_number(min_cells, "min_cells", low=0, integer=True)
    for name, value in (("min_fraction", min_fraction), ("max_fraction", max_fraction)):
        if value is not None:
            check_number(value, name, low=0, high=1)
    n_cells_p = _counts(adata, layer)[1].col_open
    keep_p = np.ones(n_cells_p.size, dtype=bool)
    if min_cells is not None:
        keep_p &= n_cells_p >= min_cells
    if min_fraction is not None:
        keep_p &= n_cells_p / adata.n_obs >= min_fraction
    if max_fraction is not None:
        keep_p &= n_cells_p / adata.n_obs <= max_fraction
    if not keep_p.any():
        message = (
            f"No peak is left: of {keep_p.size} peaks each is open in {n_cells_p.min()} to {n_cells_p.max()} of "
            f"{adata.n_obs} cells. Widen the bounds."
        )
        raise DataError(message)
    return _subset(adata, keep_p, axis=1, copy=copy)


def filter_cells(adata: AnnData, *, min_peaks: int = 1, layer: str | None = None, copy: bool = False) -> AnnData | None:
    """Keep the cells with at least `min_peaks` open peaks.

    Parameters
    ----------
    adata
        Counts, cells by peaks.
    min_peaks
        Least number of peaks with a count above zero.
    layer
        Layer with the counts instead of X.
    copy
        Return a new object and leave `adata` as it is.

    Raises
    ------
    ConfigError
        If `min_peaks` is not an integer of at least zero.
    DataError
        If the matrix holds no counts, no cell is left, or `adata` is on disk and `copy` is not set.

    Examples
    --------
    >>> import numpy as np
    >>> from anndata import AnnData
    >>> adata = AnnData(np.array([[1, 0], [0, 0], [1, 1]]))
    >>> filter_cells(adata, min_peaks=2)
    >>> adata.obs_names.tolist()
    ['2']
    """
    check_number(min_peaks, "min_peaks", low=0, integer=True)
    n_open_n = _counts(adata, layer)[1].n_open
    keep_n = n_open_n >= min_peaks
    if not keep_n.any():
        message = (
            f"No cell is left: the {keep_n.size} cells have at most {n_open_n.max()} open peaks, min_peaks is "
            f"{min_peaks}. Lower it."
        )
        raise DataError(message)
    return _subset(adata, keep_n, axis=0, copy=copy)


def reads_to_fragments(
    adata: AnnData,
    *,
    layer: str | None = None,
    key_added: str = "fragments",
    force: bool = False,
    copy: bool = False,
) -> AnnData | None:
    """Estimate fragment counts from read counts and store them as a layer: fragments = (reads + 1) // 2.

    A paired-end fragment has two ends, each counted as a read, so that even counts are in excess (Martens et al.,
    Modeling fragment counts improves single-cell ATAC-seq analysis, Nature Methods 2023, PoissonVI). Counts that
    have no such excess already are fragments, binary, or come from another rule of counting: if ones are more
    frequent than twos the matrix is refused, unless `force` is set.

    Parameters
    ----------
    adata
        Read counts, cells by peaks.
    layer
        Layer with the reads instead of X.
    key_added
        Layer for the result; same sparsity, container and dtype as the reads.
    force
        Convert even if the matrix does not look like reads.
    copy
        Return a new object and leave `adata` as it is.

    Raises
    ------
    ConfigError
        If `key_added` is the layer with the reads.
    DataError
        If the matrix holds no counts or has more ones than twos; if `adata` is on disk and `copy` is not set.

    Examples
    --------
    >>> import numpy as np
    >>> from anndata import AnnData
    >>> adata = AnnData(np.array([[2, 0, 4], [2, 3, 0]]))
    >>> reads_to_fragments(adata)
    >>> adata.layers["fragments"].tolist()
    [[1, 0, 2], [1, 2, 0]]
    """
    if key_added == layer:
        message = f"key_added and layer are both '{layer}': the reads would be lost. Choose another key_added."
        raise ConfigError(message)
    _counts(adata, layer)
    target = _writable(adata, copy=copy)
    reads: Any = target.X if layer is None else target.layers[layer]
    if sp.issparse(reads):
        reads = reads.copy()
        reads.sum_duplicates()
        values: Any = reads.data
    else:
        values = np.asarray(reads)
    n_ones, n_twos = int((values == 1).sum()), int((values == 2).sum())
    if n_ones > n_twos and not force:
        message = (
            f"{_name(layer)} does not look like reads: {n_ones} counts are 1 and {n_twos} are 2, while reads come in "
            "pairs. If these are fragments, use them as they are; to convert all the same, set force=True."
        )
        raise DataError(message)
    # (x + 1) // 2, written so that the largest value of a narrow integer dtype does not overflow
    half = values.copy() if values.dtype.kind == "b" else (values // 2 + values % 2).astype(values.dtype)
    if sp.issparse(reads):
        reads.data = half
    target.layers[key_added] = reads if sp.issparse(reads) else half
    return target if copy else None


def _name(layer: str | None) -> str:
    return "adata.X" if layer is None else f"adata.layers['{layer}']"


def _counts(adata: AnnData, layer: str | None) -> tuple[Any, CountSummary]:
    """Check the counts; return the matrix as it is stored, and its summary."""
    check_anndata(adata)
    layers: Any = adata.layers
    if layer is not None:
        check_key(layers, layer, where="adata.layers")
    others = {key: value for key, value in layers.items() if isinstance(key, str) and key != layer}
    matrix = adata.X if layer is None else layers[layer]
    return matrix, check_counts(matrix, where=_name(layer), obs_names=adata.obs_names, alternatives=others)


def _writable(adata: AnnData, *, copy: bool) -> AnnData:
    """Return the object to change: itself, or a copy in memory."""
    if copy:
        return adata.to_memory() if adata.isbacked else adata.copy()
    if adata.isbacked:
        message = "adata is on disk (backed) and cannot be changed in place. Set copy=True, or call adata.to_memory()."
        raise DataError(message)
    return adata


def _subset(adata: AnnData, index: Any, *, axis: int, copy: bool) -> AnnData | None:
    """Keep or reorder cells (axis 0) or features (axis 1) by mask or position, in place or as a copy in memory."""
    if copy:
        part = adata[index] if axis == 0 else adata[:, index]
        return part.to_memory() if adata.isbacked else part.copy()
    _writable(adata, copy=False)
    if axis == 0:
        adata._inplace_subset_obs(index)
    else:
        adata._inplace_subset_var(index)
    return None
