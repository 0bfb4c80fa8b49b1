"""The same cells on another set of peaks: peaks moved, and merged where they then overlap."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import sparse

from epivi._errors import ConfigError, DataError
from epivi._keys import UNS_SIMULATION, VAR_CHROM, VAR_END, VAR_START
from epivi._validate import check_anndata, check_key
from epivi.simulate._arguments import check_integer, stream
from epivi.simulate.linked._places import region_names

if TYPE_CHECKING:
    from anndata import AnnData

_STREAM = 6


def shifted_peaks(adata: AnnData, *, shift: int = 100, merge: bool = True, seed: int = 0) -> AnnData:
    """Return the same cells on another set of peaks: each moved by up to ``shift`` bp, overlapping ones merged.

    Parameters
    ----------
    adata
        Cells by peaks, with chrom, start and end in ``var``.
    shift
        Greatest distance in bp by which a peak moves, to either side; every distance is equally likely. A peak keeps
        its width and does not move beyond the start of its chromosome.
    merge
        Join peaks that share at least one bp afterwards. Their counts are added; a matrix of zeros and ones stays one
        and tells whether any of them was open.
    seed
        Seed of the distances.

    Returns
    -------
    AnnData with a csr_matrix of the dtype of ``adata.X``, a copy of ``adata.obs``, and peaks sorted by chromosome (in
    the order of first appearance) and start, named ``chrom:start-end``; ``var["n_merged"]`` the number of peaks joined;
    ``uns["simulation"]`` the arguments and column, the place of every peak of ``adata`` in the new set.

    Raises
    ------
    ConfigError
        If ``shift`` or ``seed`` is no whole number of at least 0 or ``merge`` is no bool.
    DataError
        If ``adata`` is no AnnData of at least two cells and one peak with unique names, has no X, chrom, start or end
        is missing (the column or a chromosome), a position is no whole number or is negative, a start is not below its
        end, or two peaks come to lie at the same place and ``merge`` is off.

    Examples
    --------
    >>> import numpy as np
    >>> from anndata import AnnData
    >>> var = pd.DataFrame({"chrom": ["chr1"] * 2, "start": [0, 90], "end": [100, 200]}, index=["a", "b"])
    >>> shifted_peaks(AnnData(np.eye(2), var=var), shift=0).var_names.tolist()
    ['chr1:0-200']
    """
    shift, seed = check_integer("shift", shift), check_integer("seed", seed)
    if not isinstance(merge, bool):
        message = f"merge={merge!r} is not valid: give True or False."
        raise ConfigError(message)
    chrom_p, start_p, end_p = _coordinates(adata)
    move_p = np.maximum(stream(seed, _STREAM).integers(-shift, shift + 1, len(start_p)), -start_p)
    codes, chroms = pd.factorize(chrom_p)
    start_p, end_p = start_p + move_p, end_p + move_p
    order = np.lexsort((end_p, start_p, codes))
    codes, start_p, end_p = codes[order], start_p[order], end_p[order]
    first = _begins_peak(codes, start_p, end_p) if merge else np.ones(len(order), dtype=bool)
    group = np.cumsum(first) - 1
    at = np.flatnonzero(first)
    var = pd.DataFrame(
        {
            VAR_CHROM: pd.Categorical.from_codes(codes[at], categories=pd.Index(chroms)),
            VAR_START: start_p[at],
            VAR_END: np.maximum.reduceat(end_p, at),
            "n_merged": np.diff(np.append(at, len(order))),
        }
    )
    var.index = pd.Index(region_names(var))
    if (again := var.index.duplicated()).any():
        message = (
            f"After a shift of up to {shift} bp two peaks lie at {var.index[again][0]}: set merge=True or give another "
            "seed."
        )
        raise DataError(message)
    column_p = np.empty(len(order), dtype=np.int64)
    column_p[order] = group
    return _on_new_peaks(adata, var, column_p, {"shift": shift, "merge": merge, "seed": seed})


def _on_new_peaks(adata: AnnData, var: pd.DataFrame, column_p: np.ndarray, record: dict[str, Any]) -> AnnData:
    """Collect the counts of the old peaks in the columns of the new ones."""
    from anndata import AnnData

    x_np = sparse.csr_matrix(adata.X, copy=True)
    x_np.sum_duplicates()
    is_binary = bool(np.isin(x_np.data, (0, 1)).all())
    collect = sparse.csr_matrix((np.ones(len(column_p), x_np.dtype), column_p, np.arange(len(column_p) + 1)))
    merged = sparse.csr_matrix(x_np @ collect)
    merged.eliminate_zeros()
    if is_binary:
        merged.data[:] = 1
    merged.sort_indices()
    record = {"simulator": "shifted_peaks", **record, "column": column_p}
    return AnnData(merged, obs=adata.obs.copy(), var=var, uns={UNS_SIMULATION: record})


def _coordinates(adata: AnnData) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return chrom, start and end of the peaks after checking them."""
    check_anndata(adata)
    if adata.X is None:
        message = "adata.X is missing, and layers are not read here: put the counts into adata.X."
        raise DataError(message)
    for key in (VAR_CHROM, VAR_START, VAR_END):
        check_key(adata.var, key, where="adata.var")
    if (missing := np.flatnonzero(adata.var[VAR_CHROM].isna())).size:
        message = f"Peak '{adata.var_names[missing[0]]}' has no chromosome in adata.var['chrom']: give one."
        raise DataError(message)
    start_p, end_p = (adata.var[key].to_numpy() for key in (VAR_START, VAR_END))
    if not all(np.issubdtype(value.dtype, np.integer) for value in (start_p, end_p)):
        message = (
            f"adata.var['start'] and ['end'] are {start_p.dtype} and {end_p.dtype}: give whole numbers of base pairs."
        )
        raise DataError(message)
    if (bad := np.flatnonzero((start_p < 0) | (end_p <= start_p))).size:
        message = (
            f"Peak '{adata.var_names[bad[0]]}' runs from {start_p[bad[0]]} to {end_p[bad[0]]}: give "
            "0 <= start < end for every peak."
        )
        raise DataError(message)
    return adata.var[VAR_CHROM].astype(str).to_numpy(), start_p.astype(np.int64), end_p.astype(np.int64)


def _begins_peak(codes: np.ndarray, start_p: np.ndarray, end_p: np.ndarray) -> np.ndarray:
    """Tell which of the sorted peaks do not overlap any before them."""
    # chromosomes laid end to end, so that one running maximum serves all
    shift_p = codes * end_p.max()
    reach_p = np.maximum.accumulate(end_p + shift_p)
    return np.concatenate([[True], (start_p + shift_p)[1:] >= reach_p[:-1]])
