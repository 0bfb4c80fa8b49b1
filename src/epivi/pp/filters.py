"""Which peaks and cells are kept: blacklist, shares of open cells, depth, quality of a multiome."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from epivi._errors import ConfigError, DataError, nearest
from epivi._keys import MOD_ATAC, MOD_RNA, OBS_NUCLEOSOME_SIGNAL, OBS_TSS_ENRICHMENT
from epivi._validate import check_anndata, check_continuous, check_counts, check_key, check_number
from epivi.pp.counts import _counts, _subset
from epivi.pp.features import _needed_coordinates
from epivi.pp.genome.regions import overlaps, read_blacklist

if TYPE_CHECKING:
    from collections.abc import Mapping

    import pandas as pd
    from anndata import AnnData
    from mudata import MuData

    Bounds = tuple[float | None, float | None] | None

logger = logging.getLogger(__name__)


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


def filter_multiome(  # noqa: PLR0913 - one rule of quality each, and where to find what it needs
    mdata: MuData,
    *,
    rna_counts: Bounds = (1000, 25_000),
    atac_counts: Bounds = (1000, 100_000),
    nucleosome_signal: float | None = 2.0,
    tss_enrichment: float | None = 1.0,
    nucleosome_key: str | None = None,
    tss_key: str | None = None,
    modalities: Mapping[str, str] | None = None,
    layers: Mapping[str, str] | None = None,
    copy: bool = False,
) -> MuData | None:
    """Keep the cells of a multiome which pass the rules of quality of the EpiFoundation paper.

    A cell is kept if it passes every rule; a rule which is None is left out, and so is a side of bounds that is None.
    A cell without one of the modalities is not judged by the rules of that modality.

    Parameters
    ----------
    mdata
        Counts of RNA and of peaks.
    rna_counts, atac_counts
        Least and largest sum of counts of a cell; both ends are kept.
    nucleosome_signal
        The nucleosome signal must be below, as in the paper.
    tss_enrichment
        The enrichment at transcription start sites must be above, as in the paper.
    nucleosome_key, tss_key
        Columns of ``obs`` of the ATAC modality, or else of the MuData. By default "nucleosome_signal" and
        "tss_enrichment" (or "tss_score", as muon names it); the rule is left out, and the log says so, where there is
        no such column. A cell whose value is missing does not pass.
    modalities
        Names of the modalities by "atac" and "rna", the same by default.
    layers
        Layers with the counts by "atac" and "rna", X by default.
    copy
        Return a new object and leave `mdata` as it is.

    Returns
    -------
    None, or the new object with `copy`. The log says how many cells each rule removed; a cell may fail several.

    Raises
    ------
    ConfigError
        If a bound is not valid, or `modalities` or `layers` has an unknown entry.
    DataError
        If `mdata` is no MuData of shared cells, is on disk, or a view and `copy` is not set; if it lacks a modality, a
        layer or a column that was named; if a matrix holds no counts, a column no numbers; if no cell is left.

    Examples
    --------
    >>> import numpy as np, pandas as pd
    >>> from anndata import AnnData
    >>> from mudata import MuData
    >>> counts = {"rna": [[900], [1000], [30000]], "atac": [[5000], [5000], [5000]]}
    >>> parts = {name: AnnData(np.array(x), var=pd.DataFrame(index=[name + "0"])) for name, x in counts.items()}
    >>> filter_multiome(MuData(parts), copy=True).obs_names.tolist()
    ['1']
    """
    _check_bounds(rna_counts, "rna_counts")
    _check_bounds(atac_counts, "atac_counts")
    for name, value in (("nucleosome_signal", nucleosome_signal), ("tss_enrichment", tss_enrichment)):
        if value is not None:
            check_number(value, name, low=0)
    names = _by_modality(modalities, "modalities")
    used = _by_modality(layers, "layers")
    _check_multiome(mdata, names, copy=copy)
    failed: dict[str, np.ndarray] = {}
    for key, bounds in ((MOD_RNA, rna_counts), (MOD_ATAC, atac_counts)):
        if bounds is not None:
            name = names.get(key, key)
            sums_n = _depths(mdata, name, used.get(key))
            failed[f"{key}_counts in [{bounds[0]}, {bounds[1]}]"] = _outside(sums_n, bounds)
    atac = names.get(MOD_ATAC, MOD_ATAC)
    has_atac_n = np.asarray(mdata.obs_names.isin(mdata.mod[atac].obs_names))
    if nucleosome_signal is not None:
        values_n = _quality(mdata, atac, nucleosome_key, (OBS_NUCLEOSOME_SIGNAL,))
        if values_n is not None:
            failed[f"nucleosome_signal < {nucleosome_signal:g}"] = has_atac_n & ~(values_n < nucleosome_signal)
    if tss_enrichment is not None:
        values_n = _quality(mdata, atac, tss_key, (OBS_TSS_ENRICHMENT, "tss_score"))
        if values_n is not None:
            failed[f"tss_enrichment > {tss_enrichment:g}"] = has_atac_n & ~(values_n > tss_enrichment)
    return _keep_cells(mdata, failed, copy=copy)


def _check_bounds(bounds: Any, name: str) -> None:
    """Check a pair of bounds, each a number or None."""
    if bounds is None:
        return
    if not isinstance(bounds, tuple | list) or len(bounds) != 2:
        message = f"{name}={bounds!r} is not valid: a pair (least, largest) is needed, or None for no rule."
        raise ConfigError(message)
    for bound in bounds:
        if bound is not None:
            check_number(bound, name, low=0)
    if None not in bounds and bounds[0] > bounds[1]:
        message = f"{name}={bounds!r} is not valid: the least is above the largest."
        raise ConfigError(message)


def _outside(sums_n: np.ndarray, bounds: tuple[float | None, float | None]) -> np.ndarray:
    """Say which sums are beyond the bounds; NaN, where a cell lacks the modality, is not."""
    low, high = bounds
    below_n = np.zeros(sums_n.shape, dtype=bool) if low is None else sums_n < low
    return below_n if high is None else below_n | (sums_n > high)


def _by_modality(given: Mapping[str, str] | None, argument: str) -> dict[str, str]:
    """Check a mapping by "atac" and "rna"."""
    if given is not None and not hasattr(given, "items"):
        message = f"{argument}={given!r} is not valid: a dict such as {{'atac': ..., 'rna': ...}} is needed."
        raise ConfigError(message)
    entries = dict(given or {})
    for key in entries:
        if key not in (MOD_ATAC, MOD_RNA):
            message = f"{argument} holds the unknown entry '{key}'. {nearest(key, (MOD_ATAC, MOD_RNA))}"
            raise ConfigError(message)
    return entries


def _check_multiome(mdata: Any, names: dict[str, str], *, copy: bool) -> None:
    """Refuse what is no MuData of RNA and ATAC over the same cells, or cannot be changed."""
    if type(mdata).__name__ != "MuData":
        message = f"filter_multiome takes a MuData, found {type(mdata).__name__}. For peaks alone use filter_cells."
        raise DataError(message)
    if mdata.axis != 0:
        message = f"The modalities of mdata share their features (axis={mdata.axis}); they must share cells, axis=0."
        raise DataError(message)
    for key in (MOD_RNA, MOD_ATAC):
        name = names.get(key, key)
        if name not in mdata.mod:
            message = (
                f"mdata has no modality '{name}' for '{key}'. {nearest(name, mdata.mod)} Name it with "
                f"modalities={{'{key}': ...}}."
            )
            raise DataError(message)
        check_anndata(mdata.mod[name], where=f"mdata['{name}']")
    if mdata.isbacked:
        message = "mdata is on disk (backed), and MuData cannot be brought into memory. Read the file without backed."
        raise DataError(message)
    if mdata.is_view and not copy:
        message = "mdata is a view and cannot be changed in place. Set copy=True."
        raise DataError(message)


def _depths(mdata: MuData, name: str, layer: str | None) -> np.ndarray:
    """Return the sum of counts of each cell of the MuData, NaN for cells without the modality."""
    part = mdata.mod[name]
    if layer is not None:
        check_key(part.layers, layer, where=f"mdata['{name}'].layers")
    matrix, where = (part.X, "X") if layer is None else (part.layers[layer], f"layers['{layer}']")
    sums = check_counts(matrix, where=f"mdata['{name}'].{where}", obs_names=part.obs_names).row_sums
    return _on_cells(mdata, part.obs_names, sums)


def _quality(mdata: MuData, name: str, key: str | None, usual: tuple[str, ...]) -> np.ndarray | None:
    """Return a measure of quality by cell of the MuData; None, and a line in the log, where there is none."""
    from pandas.api.types import is_bool_dtype, is_numeric_dtype

    part = mdata.mod[name]
    tables = {f"mdata['{name}'].obs": part.obs, "mdata.obs": mdata.obs}
    for where, frame in tables.items():
        for candidate in usual if key is None else (key,):
            if candidate in frame:
                column = frame[candidate]
                if not is_numeric_dtype(column) or is_bool_dtype(column):
                    check_continuous(frame, candidate, where=where)  # says what it is instead
                logger.info("The values of %s['%s'] are judged.", where, candidate)
                # infinite where a cell has no free fragment, missing where it has none at all: neither passes
                return _on_cells(mdata, frame.index, column.to_numpy(dtype=float, na_value=np.nan))
    if key is not None:
        message = f"Neither {' nor '.join(tables)} has a column '{key}'. {nearest(key, part.obs.columns)}"
        raise DataError(message)
    logger.warning("There is no column '%s': this rule is left out.", "' or '".join(usual))
    return None


def _on_cells(mdata: MuData, names: pd.Index, values: np.ndarray) -> np.ndarray:
    """Bring values of some cells onto all cells of the MuData."""
    at = names.get_indexer(mdata.obs_names)
    return np.where(at >= 0, np.asarray(values, dtype=float)[at], np.nan)


def _keep_cells(mdata: MuData, failed: dict[str, np.ndarray], *, copy: bool) -> MuData | None:
    """Remove the cells which failed a rule, from all modalities."""
    keep_n = np.ones(mdata.n_obs, dtype=bool)
    for rule, failed_n in failed.items():
        logger.info("%s: %d of %d cells fail.", rule, int(failed_n.sum()), mdata.n_obs)
        keep_n &= ~failed_n
    counts = ", ".join(f"{rule}: {int(failed_n.sum())}" for rule, failed_n in failed.items())
    if not keep_n.any():
        message = f"No cell is left of {mdata.n_obs}. Cells that fail a rule: {counts}. Widen the bounds."
        raise DataError(message)
    logger.info("%d of %d cells are kept.", int(keep_n.sum()), mdata.n_obs)
    kept = mdata.obs_names[keep_n]
    # not mdata[keep_n]: it would bring the cells of each modality into another order
    target = mdata.copy() if copy else mdata
    for part in target.mod.values():
        part._inplace_subset_obs(np.asarray(part.obs_names.isin(kept)))
    target.update()
    return target if copy else None
