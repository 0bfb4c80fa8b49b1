"""Where the peaks of an AnnData lie: coordinates and order."""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING, Any

import numpy as np

from epivi._errors import DataError
from epivi._keys import VAR_CHROM, VAR_END, VAR_START
from epivi._validate import check_anndata, check_key
from epivi.pp.counts import _subset
from epivi.pp.genome.regions import _genome_order, _region_frame

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

logger = logging.getLogger(__name__)

_POSITION = (VAR_CHROM, VAR_START, VAR_END)

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
    for key, default in zip(keys, _POSITION, strict=True):
        if key != default:  # asked for by name, so it must be there
            check_key(var, key, where="adata.var")
    return _table_coordinates(var, keys, where="adata.var")


def _table_coordinates(var: pd.DataFrame, keys: tuple[str, str, str] = _POSITION, *, where: str) -> pd.DataFrame | None:
    """Read the positions of a table's rows off its columns, or else off its index."""
    present = [key for key in keys if key in var]
    if len(present) == len(keys):
        return _from_columns(var, keys, where)
    regions = _from_names(var.index)
    if regions is None and present:
        missing = [key for key in keys if key not in present]
        logger.warning("%s has %s but not %s: the features are taken to have no position.", where, present, missing)
    return regions


def _from_columns(var: pd.DataFrame, keys: tuple[str, str, str], where: str) -> pd.DataFrame:
    """Check the three columns and return them under their usual names."""
    import pandas as pd

    for key in keys:
        check_key(var, key, where=where)
    missing = var[keys[0]].isna().to_numpy()
    if missing.any():
        message = f"{where}['{keys[0]}'] has no chromosome for '{var.index[missing][0]}'. Fill or remove such rows."
        raise DataError(message)
    positions = []
    for key in keys[1:]:
        values = pd.to_numeric(var[key].astype(object), errors="coerce").to_numpy(dtype=float, na_value=np.nan)
        # float64 holds every whole number up to 2**53, far beyond any genome
        bad = ~np.isfinite(values) | (values != np.floor(values)) | (np.abs(values) > 2**53)
        if bad.any():
            at = int(np.flatnonzero(bad)[0])
            message = f"{where}['{key}'] of '{var.index[at]}' is {var[key].iloc[at]!r}; a whole number of bp is needed."
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
                f"The interval of '{regions.index[at]}' {cause}: [{start[at]}, {end[at]}). Positions are 0-based and "
                f"half-open; {int(bad.sum())} intervals are affected. Correct or remove them."
            )
            raise DataError(message)
    return regions


def _needed_coordinates(adata: AnnData) -> pd.DataFrame:
    """Return `peak_coordinates`, which must be there."""
    check_anndata(adata)
    return _needed_of_table(adata.var, where="adata.var")


def _needed_of_table(var: pd.DataFrame, *, where: str) -> pd.DataFrame:
    """Return the positions of a table's rows, which must be there."""
    regions = _table_coordinates(var, where=where)
    if regions is None:
        message = (
            f"The features have no position: {where} has no columns chrom, start, end, and names such as "
            f"'{var.index[0]}' do not tell. Add the columns or rename the features like chr1:100-200."
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
