"""One set of peaks on another: the cells of a query on the peaks of a model, by overlap along the genome.

Legend of shapes: n cells, p peaks of the query, t target peaks, m pairs of overlapping peaks.
"""

from __future__ import annotations

import logging
import numbers
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import scipy.sparse as sp

from epivi._errors import DataError
from epivi._keys import UNS_PROJECTION, VAR_CHROM, VAR_END, VAR_START
from epivi._validate import _some, check_choice, check_key, check_number
from epivi._validate_counts import _check_container
from epivi.pp.counts import _cells, _csr, _name, _sum_columns
from epivi.pp.features import _needed_coordinates, _needed_of_table
from epivi.pp.genome.pairs import chance_share, overlap_pairs
from epivi.pp.genome.regions import chrom_sizes, peak_names

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import pandas as pd
    from anndata import AnnData

logger = logging.getLogger(__name__)

# By default so many query peaks must find a target: this share, or twice what chance gives. The second is capped,
# since targets that cover most of the genome are reached by chance as well as by right.
_MIN_SHARE, _MIN_SHARE_CAP = 0.05, 0.25


class _Match(NamedTuple):
    """Pairs that are used: query peak and target peak; and how many query peaks had a choice."""

    query_m: np.ndarray
    target_m: np.ndarray
    n_ambiguous: int


def project_peaks(
    adata: AnnData,
    peaks: AnnData | pd.DataFrame,
    *,
    min_overlap: float = 1,
    how: str = "any",
    reduce: str = "max",
    layer: str | None = None,
    genome: str | Path | Mapping[str, int] | None = None,
    min_share: float | None = None,
) -> AnnData:
    """Bring cells onto another set of peaks, by overlap along the genome.

    Positions are read from the columns chrom, start, end or from the names of the peaks, see `peak_coordinates`. Both
    sets must be of one assembly.

    Parameters
    ----------
    adata
        The query: cells by peaks, counts, open or closed, or other finite values of at least zero.
    peaks
        The target: an AnnData whose ``var`` has the peaks, or a table of peaks, such as that of a model.
    min_overlap
        Least overlap of two peaks. An integer counts bp. A float above 0 and up to 1 is the reciprocal overlap: the bp
        shared, divided by the length of the longer peak. So 1 is one bp, and 1.0 asks for the same interval.
    how
        - "any": a query peak opens all target peaks that it overlaps enough;
        - "reciprocal": it opens the one of these with the largest reciprocal overlap; where equal, the one that starts
          first, then ends first, then has the first name.
    reduce
        Value of a target peak opened by several query peaks: "max" (open stays open, binary stays binary) or "sum".
    layer
        Layer of the query to use instead of X.
    genome
        "hg38", "hg19", "mm10", a file or a mapping with lengths of chromosomes, see `chrom_sizes`: no peak may end
        beyond. Chromosomes without a length are not checked.
    min_share
        Least share of the query peaks that must find a target. By default 0.05, or twice what chance gives if that is
        more, but at most 0.25; below 0.25 the log warns. 0 accepts everything.

    Returns
    -------
    Cells of the query by target peaks, with the ``var`` of the target in its order and ``obs``, ``obsm`` and ``obsp``
    of the query. X is CSR; "max" keeps the dtype. ``uns["projection"]`` reports, and the log says:

    - n_query_peaks, n_target_peaks; share_peaks_used, of the query peaks; share_targets_hit, of the target peaks;
    - share_entries_kept: of the values above zero, those in used peaks (NaN if there are none);
    - n_ambiguous: query peaks that overlap several targets enough;
    - n_contigs_unknown: chromosomes of the query that the target does not know;
    - share_by_chance: of query peaks that would overlap a target, had they been placed at random;
    - how, reduce, min_overlap as given.

    Raises
    ------
    ConfigError
        If an argument is not valid.
    DataError
        If the positions of either set are missing or not valid, target names occur twice, or a value is negative,
        infinite or NaN; if the sets seem to be of different assemblies: no chromosome has the same name, a peak ends
        beyond its chromosome, or fewer query peaks than `min_share` find a target.

    Examples
    --------
    >>> import numpy as np, pandas as pd
    >>> from anndata import AnnData
    >>> names = ["chr1:0-9", "chr1:20-30", "chr2:5-9"]
    >>> query = AnnData(np.array([[1, 0, 1], [0, 2, 0]]), var=pd.DataFrame(index=names))
    >>> model = pd.DataFrame(index=["chr1-5-25", "chr1-40-50", "chr2-0-9"])
    >>> projected = project_peaks(query, model)
    >>> projected.X.toarray().tolist()
    [[1, 0, 1], [2, 0, 0]]
    >>> projected.uns["projection"]["n_ambiguous"]
    0
    """
    from anndata import AnnData

    _check_arguments(min_overlap, how, reduce, min_share)
    query_p = _needed_coordinates(adata)
    var, target_t = _target(peaks)
    unknown = _check_chromosomes(query_p, target_t)
    sizes = None if genome is None else chrom_sizes(genome)
    for regions, whose in ((query_p, "query"), (target_t, "target")):
        _check_lengths(regions, sizes or {}, whose)
    match = _match(query_p, target_t, min_overlap, how)
    used_p = np.bincount(match.query_m, minlength=len(query_p)) > 0
    by_chance = chance_share(query_p, target_t, sizes)
    _check_share(float(used_p.mean()), by_chance, min_share, len(query_p))
    x_np = _values(adata, layer)
    combine = _sum_columns if reduce == "sum" else _max_columns
    x_nt = combine(x_np, match.query_m, match.target_m, len(target_t))
    report = {
        "n_query_peaks": len(query_p),
        "n_target_peaks": len(target_t),
        "share_peaks_used": float(used_p.mean()),
        "share_entries_kept": float(used_p[x_np.indices].mean()) if x_np.nnz else float("nan"),
        "share_targets_hit": np.unique(match.target_m).size / len(target_t),
        "n_ambiguous": match.n_ambiguous,
        "n_contigs_unknown": len(unknown),
        "share_by_chance": by_chance,
        "how": how,
        "reduce": reduce,
        "min_overlap": min_overlap,
    }
    _log(report, unknown)
    return AnnData(x_nt, var=var, uns={UNS_PROJECTION: report}, **_cells(adata))


def _check_arguments(min_overlap: Any, how: str, reduce: str, min_share: Any) -> None:
    check_choice(how, "how", ["any", "reciprocal"])
    check_choice(reduce, "reduce", ["max", "sum"])
    if isinstance(min_overlap, numbers.Integral):
        check_number(min_overlap, "min_overlap", low=1, integer=True)
    else:
        check_number(min_overlap, "min_overlap (a float, so a share)", low=0, high=1, low_inclusive=False)
    if min_share is not None:
        check_number(min_share, "min_share", low=0, high=1)


def _target(peaks: Any) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return the table of the target peaks and their positions."""
    import pandas as pd

    where = "peaks" if isinstance(peaks, pd.DataFrame) else "peaks.var"
    var: Any = peaks if isinstance(peaks, pd.DataFrame) else getattr(peaks, "var", None)
    if not isinstance(var, pd.DataFrame) or type(peaks).__name__ == "MuData":
        message = (
            f"peaks is a {type(peaks).__name__}; an AnnData or a pandas DataFrame with the target peaks is needed."
        )
        raise DataError(message)
    if not len(var):
        message = f"{where} has no peaks. Give the target peaks."
        raise DataError(message)
    var = var.copy()
    target = _needed_of_table(var, where=where)
    if not pd.api.types.is_string_dtype(var.index):  # rows of a file, numbered: the positions are better names
        var.index = target.index = peak_names(target)
    if not var.index.is_unique:
        twice = var.index[var.index.duplicated()].unique()
        message = f"{where}: {len(twice)} names occur more than once, {_some(twice)}. Remove the duplicates."
        raise DataError(message)
    return var, target


def _check_chromosomes(query: pd.DataFrame, target: pd.DataFrame) -> list[str]:
    """Refuse sets without a common chromosome; return the chromosomes that only the query has."""
    ours, theirs = set(query[VAR_CHROM]), set(target[VAR_CHROM])
    if not ours & theirs:
        message = f"No chromosome has the same name in the query ({_some(sorted(ours))}) and in the target "
        message += f"({_some(sorted(theirs))}). "
        if {name.removeprefix("chr") for name in ours} & {name.removeprefix("chr") for name in theirs}:
            message += "They fit after the prefix 'chr' is added or removed: rename the chromosomes of the query."
        else:
            message += "Check the assemblies; names with and without the prefix 'chr' count as different."
        raise DataError(message)
    return sorted(ours - theirs)


def _check_lengths(regions: pd.DataFrame, sizes: Mapping[str, int], whose: str) -> None:
    """Refuse peaks that end beyond their chromosome."""
    length = regions[VAR_CHROM].map(sizes).to_numpy(dtype=float, na_value=np.inf)
    beyond = regions[VAR_END].to_numpy() > np.where(np.isnan(length), np.inf, length)
    if beyond.any():
        at = int(np.flatnonzero(beyond)[0])
        message = (
            f"{int(beyond.sum())} of {len(regions)} {whose} peaks end beyond their chromosome, the first is "
            f"'{regions.index[at]}': {regions[VAR_CHROM].iloc[at]} has {int(length[at])} bp. The {whose} is of another "
            "assembly than genome: use peaks of one assembly, or lift them over."
        )
        raise DataError(message)


def _match(query: pd.DataFrame, target: pd.DataFrame, min_overlap: float, how: str) -> _Match:
    """Choose the pairs of peaks."""
    query_m, target_m, shared_bp_m = overlap_pairs(query, target)
    longer_m = np.maximum(_width(query)[query_m], _width(target)[target_m])
    share_m = shared_bp_m / longer_m
    keep_m = (shared_bp_m if isinstance(min_overlap, numbers.Integral) else share_m) >= min_overlap
    query_m, target_m, share_m = query_m[keep_m], target_m[keep_m], share_m[keep_m]
    n_ambiguous = int((np.bincount(query_m, minlength=len(query)) > 1).sum())
    if how == "reciprocal":
        # equal quotients of whole numbers are equal floats, so ties are seen; the rank does not depend on the order
        # in which the target lists its peaks
        order = np.lexsort((_rank(target)[target_m], -share_m, query_m))
        query_m, target_m = query_m[order], target_m[order]
        first_m = np.flatnonzero(np.diff(query_m, prepend=-1))
        query_m, target_m = query_m[first_m], target_m[first_m]
    return _Match(query_m, target_m, n_ambiguous)


def _width(regions: pd.DataFrame) -> np.ndarray:
    return (regions[VAR_END] - regions[VAR_START]).to_numpy(np.int64)


def _rank(regions: pd.DataFrame) -> np.ndarray:
    """Rank peaks by start, end and name; only peaks of one chromosome are ever compared."""
    names = regions.index.to_numpy(dtype=object)
    order = np.lexsort((names, regions[VAR_END].to_numpy(), regions[VAR_START].to_numpy()))
    rank = np.empty(len(order), dtype=np.int64)
    rank[order] = np.arange(len(order))
    return rank


def _check_share(share: float, by_chance: float, min_share: float | None, n_peaks: int) -> None:
    """Refuse a match that is as poor as one of another assembly."""
    needed = max(_MIN_SHARE, min(2 * by_chance, _MIN_SHARE_CAP)) if min_share is None else min_share
    if share < needed:
        message = (
            f"Only {share:.2%} of the {n_peaks} query peaks overlap a target peak enough, at least {needed:.2%} are "
            f"needed; {by_chance:.2%} would overlap one by chance. The assemblies probably differ: use peaks of one "
            "assembly, or lift them over. If the sets are of one assembly and differ this much, lower min_share."
        )
        raise DataError(message)


def _values(adata: AnnData, layer: str | None) -> sp.csr_matrix:
    """Return the matrix of the query in memory; a value above zero means open."""
    if layer is not None:
        check_key(adata.layers, layer, where="adata.layers")
    matrix: Any = adata.X if layer is None else adata.layers[layer]
    _check_container(matrix, _name(layer))
    x_np = _csr(matrix)
    bad = ~np.isfinite(x_np.data) | (x_np.data < 0)
    if bad.any():
        at = int(np.flatnonzero(bad)[0])
        row = int(np.searchsorted(x_np.indptr, at, side="right")) - 1
        message = (
            f"{_name(layer)}: cell '{adata.obs_names[row]}', peak '{adata.var_names[x_np.indices[at]]}' is "
            f"{x_np.data[at]}; finite values of at least zero are needed, {int(bad.sum())} are not. Pass the raw "
            "counts, for example with layer='counts'."
        )
        raise DataError(message)
    return x_np


def _max_columns(x_np: sp.csr_matrix, from_m: np.ndarray, to_m: np.ndarray, n_columns: int) -> sp.csr_matrix:
    """Give column to_m[j] of the result (n, n_columns) the largest of its columns from_m[j]."""
    x_nm = sp.csr_matrix(x_np[:, from_m])  # one column a pair
    x_nt = sp.csr_matrix((x_nm.data, to_m[x_nm.indices], x_nm.indptr), shape=(x_np.shape[0], n_columns))
    x_nt.sort_indices()
    if not x_nt.nnz:
        return x_nt
    rows = np.repeat(np.arange(x_nt.shape[0]), np.diff(x_nt.indptr))
    is_first = np.ones(x_nt.nnz, dtype=bool)
    is_first[1:] = (x_nt.indices[1:] != x_nt.indices[:-1]) | (rows[1:] != rows[:-1])
    first = np.flatnonzero(is_first)
    indptr = np.concatenate([[0], np.cumsum(np.bincount(rows[first], minlength=x_nt.shape[0]))])
    largest = np.maximum.reduceat(x_nt.data, first)
    return sp.csr_matrix((largest, x_nt.indices[first], indptr), shape=x_nt.shape)


def _log(report: dict[str, Any], unknown: list[str]) -> None:
    """Say what the report says."""
    logger.info(
        "%.1f %% of %d query peaks and %.1f %% of the open entries are used, %.1f %% of %d target peaks are hit; %d "
        "query peaks overlap several targets; by chance %.1f %% would overlap one.",
        100 * report["share_peaks_used"],
        report["n_query_peaks"],
        100 * report["share_entries_kept"],
        100 * report["share_targets_hit"],
        report["n_target_peaks"],
        report["n_ambiguous"],
        100 * report["share_by_chance"],
    )
    if report["share_peaks_used"] < _MIN_SHARE_CAP:
        logger.warning(
            "Only %.2f %% of the query peaks are used: check that both sets are of one assembly.",
            100 * report["share_peaks_used"],
        )
    if unknown:
        logger.info("%d chromosomes of the query are not in the target: %s.", len(unknown), _some(unknown))
