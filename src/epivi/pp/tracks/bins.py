"""The choice of bins: by rank, by sum, contiguous windows, or all.

Legend of shapes: n cells, c channels (modalities), l bins.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp

from epivi._errors import ConfigError, DataError
from epivi._keys import OBSM_TRACKS
from epivi._validate import check_choice, check_key, check_number
from epivi.pp.tracks.stack import _POSITION, _bins, _check_same_bins, _matrix, _modality_names

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd
    from anndata import AnnData
    from mudata import MuData

logger = logging.getLogger(__name__)


def select_bins(
    data: Any,
    n_bins: int = 25_000,
    *,
    by: str = "rank",
    window: int = 100,
    modalities: Sequence[str] | None = None,
    layer: str | None = None,
    key: str = OBSM_TRACKS,
) -> Any:
    """Keep the best covered bins, in their order along the genome.

    Parameters
    ----------
    data
        A MuData whose modalities share their bins, an AnnData of one modality, or an AnnData of tracks (see
        `stack_tracks`), which is known by ``obsm[key]``.
    n_bins
        Number of bins to keep. All are kept if there are not more.
    by
        - "rank": bins are ranked by their counts within each modality (equal counts share the best of their ranks),
          and the best of these ranks decides; where it is equal, the mean rank, then the position;
        - "sum": the counts summed over all modalities, where equal the position;
        - "windows": windows of `window` bins that follow one another without a gap on one chromosome, taken one by one,
          the best covered first, so that no two overlap and no more than `n_bins` bins are kept. Coverage is
          the share of the counts of a modality, summed over modalities, so that a deep one does not outweigh others;
        - "all": every bin.
    window
        Number of bins of a window.
    modalities
        Modalities of a MuData that share the bins. All if None; others stay as they are.
    layer
        Layer with the counts instead of X.
    key
        Name of the tracks.

    Returns
    -------
    A new object of the same kind; `data` stays as it is.

    Raises
    ------
    ConfigError
        If an argument is not valid, or `window` exceeds `n_bins`.
    DataError
        As `stack_tracks`; and if by="windows" and no window of this width has a count.

    Examples
    --------
    >>> import numpy as np, pandas as pd
    >>> from anndata import AnnData
    >>> bins = pd.DataFrame(index=["chr1:0-10", "chr1:10-20", "chr1:20-30"])
    >>> select_bins(AnnData(np.array([[1, 0, 2], [1, 0, 0]]), var=bins), 2).var_names.tolist()
    ['chr1:0-10', 'chr1:20-30']
    """
    check_number(n_bins, "n_bins", low=1, integer=True)
    check_number(window, "window", low=1, integer=True)
    check_choice(by, "by", ["rank", "sum", "windows", "all"])
    if type(data).__name__ == "MuData":
        names = _modality_names(data, modalities)
        parts = {name: _bins(data.mod[name], f"mdata['{name}']") for name in names}
        bins = parts[names[0]]
        for name, others in parts.items():
            _check_same_bins(bins, others, names[0], name)
        sums_cl = np.stack([_sums(data.mod[name], layer, f"mdata['{name}']") for name in names])
        return _subset_mudata(data, names, _chosen(sums_cl, bins, n_bins, by, window))
    if hasattr(data, "obsm") and key in data.obsm:
        tracks, n_channels = _description(data, key)
        sums_cl = _track_sums(data.obsm[key], data.obsm.get(f"{key}_mask"), n_channels, len(tracks["bins"]))
        return _subset_tracks(data, key, _chosen(sums_cl, tracks["bins"], n_bins, by, window))
    bins = _bins(data, "adata")
    return data[:, _chosen(_sums(data, layer, "adata")[None], bins, n_bins, by, window)].copy()


def _sums(adata: AnnData, layer: str | None, where: str) -> np.ndarray:
    return np.asarray(_matrix(adata, layer, where).sum(axis=0)).ravel()


def _chosen(sums_cl: np.ndarray, bins: pd.DataFrame, n_bins: int, by: str, window: int) -> np.ndarray:
    """Return the numbers of the bins to keep, ascending."""
    n_all = sums_cl.shape[1]
    if by != "windows" and n_bins >= n_all:
        if by != "all":
            logger.info("There are %d bins, not more than n_bins=%d: all are kept.", n_all, n_bins)
        return np.arange(n_all)
    if by == "all":
        return np.arange(n_all)
    if by == "windows":
        return _windows(sums_cl, bins, n_bins, window)
    if by == "sum":
        order = np.argsort(-sums_cl.sum(axis=0), kind="stable")
    else:
        from scipy.stats import rankdata

        rank_cl = rankdata(-sums_cl, method="min", axis=1)
        order = np.lexsort((rank_cl.mean(axis=0), rank_cl.min(axis=0)))
    return np.sort(order[:n_bins])


def _windows(sums_cl: np.ndarray, bins: pd.DataFrame, n_bins: int, window: int) -> np.ndarray:
    """Take windows one by one, the best covered first, where they do not overlap one taken before."""
    if window > n_bins:
        message = f"window={window} exceeds n_bins={n_bins}: no window could be kept. Use smaller windows."
        raise ConfigError(message)
    chrom, start, end = (bins[name].to_numpy() for name in _POSITION)
    is_gap = np.concatenate([[True], (chrom[1:] != chrom[:-1]) | (start[1:] != end[:-1])])
    run = np.cumsum(is_gap)
    share_l = (sums_cl / np.maximum(sums_cl.sum(axis=1, keepdims=True), 1)).sum(axis=0)
    total = np.concatenate([[0.0], np.cumsum(share_l)])
    n_first = max(run.size - window + 1, 0)
    first = np.flatnonzero(run[:n_first] == run[run.size - n_first :])
    cover = np.round(total[first + window] - total[first], 12)
    taken = np.zeros(run.size, dtype=bool)
    n_left = n_bins // window
    for at in first[np.argsort(-cover, kind="stable")]:
        if n_left == 0 or total[at + window] == total[at]:
            break
        if not taken[at] and not taken[at + window - 1]:
            taken[at : at + window] = True
            n_left -= 1
    if not taken.any():
        message = (
            f"No {window} bins that follow one another without a gap have counts; the longest stretch has "
            f"{np.bincount(run).max()} bins. Use smaller windows."
        )
        raise DataError(message)
    if n_left:
        logger.info("%d of %d windows of %d bins were found.", n_bins // window - n_left, n_bins // window, window)
    return np.flatnonzero(taken)


def _subset_mudata(mdata: MuData, names: list[str], keep: np.ndarray) -> MuData:
    """Keep bins of some modalities, and all else as it is."""
    from mudata import MuData

    parts = {name: part[:, keep].copy() if name in names else part.copy() for name, part in mdata.mod.items()}
    result = MuData(parts)
    if list(result.obs_names) != list(mdata.obs_names):
        result = result[list(mdata.obs_names)].copy()
    result.obs = mdata.obs.copy()
    result.uns = dict(mdata.uns)
    for key, value in mdata.obsm.items():
        if key not in mdata.mod:
            result.obsm[key] = value.copy()
    return result


def _description(adata: AnnData, key: str) -> tuple[dict[str, Any], int]:
    """Check that obsm and uns fit; return the description and the number of channels."""
    check_key(adata.uns, key, where="adata.uns")
    tracks = adata.uns[key]
    for entry in ("channels", "bins"):
        check_key(tracks, entry, where=f"adata.uns['{key}']")
    n_channels, n_bins = len(tracks["channels"]), len(tracks["bins"])
    shape = adata.obsm[key].shape
    wanted = [(adata.n_obs, n_channels, n_bins)] if len(shape) == 3 else [(adata.n_obs, n_channels * n_bins)]
    if shape not in wanted or (len(shape) == 3) == sp.issparse(adata.obsm[key]):
        message = (
            f"adata.obsm['{key}'] of shape {shape} does not fit the {n_channels} channels and {n_bins} bins of "
            f"adata.uns['{key}']: a dense array (cells, channels, bins) or a CSR matrix (cells, channels x bins) is "
            "needed. Build it with epivi.pp.stack_tracks."
        )
        raise DataError(message)
    return tracks, n_channels


def _track_sums(x: Any, mask_nc: Any, n_channels: int, n_bins: int) -> np.ndarray:
    """Return the counts (c, l) summed over the cells in which a channel was measured."""
    mask = np.ones((x.shape[0], n_channels), dtype=bool) if mask_nc is None else np.asarray(mask_nc, dtype=bool)
    if not sp.issparse(x):
        return np.stack([x[:, c].sum(axis=0, where=mask[:, c, None], dtype=np.int64) for c in range(n_channels)])
    csr = sp.csr_matrix(x)
    rows = np.repeat(np.arange(csr.shape[0]), np.diff(csr.indptr))
    values = np.where(mask[rows, csr.indices // n_bins], csr.data, 0)
    return np.bincount(csr.indices, weights=values, minlength=n_channels * n_bins).reshape(n_channels, n_bins)


def _subset_tracks(adata: AnnData, key: str, keep: np.ndarray) -> AnnData:
    """Keep bins of the tracks."""
    result = adata.copy()
    tracks, x = result.uns[key], result.obsm[key]
    n_channels, n_bins = len(tracks["channels"]), len(tracks["bins"])
    if sp.issparse(x):
        columns = (np.arange(n_channels)[:, None] * n_bins + keep).ravel()
        result.obsm[key] = sp.csr_matrix(sp.csr_matrix(x)[:, columns])
    else:
        result.obsm[key] = np.ascontiguousarray(x[:, :, keep])
    bins = tracks["bins"].iloc[keep].reset_index(drop=True)
    result.uns[key] = {**tracks, "bins": bins}
    return result
