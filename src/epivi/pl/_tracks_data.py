"""What a picture of tracks shows: pseudobulks of a region, by modality and group of cells.

Legend of shapes: n cells, m cells of a reconstruction, c channels (modalities), l bins, g groups, r bins of the region.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from scipy import sparse

from epivi._errors import ConfigError, DataError, nearest
from epivi._keys import VAR_CHROM, VAR_END, VAR_START
from epivi._validate import _some, check_key

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd
    from anndata import AnnData

    from epivi._validate_regions import Region

CHANNEL = "channel"
LIBRARY, CELL = "library", "cell"


class Signal(NamedTuple):
    """Values of bins along a region, NaN where bins are left out between them; ``edges`` has one entry more."""

    edges: np.ndarray
    values: np.ndarray


class StoredTracks(NamedTuple):
    """Tracks of an AnnData, checked: counts, names of channels, bins, and which channels were measured, (n, c)."""

    counts: Any
    channels: list[str]
    bins: pd.DataFrame
    measured_nc: np.ndarray

    def channel(self, name: str) -> tuple[Any, np.ndarray]:
        """Return counts of a channel, (n, l), and in which cells it was measured, (n,)."""
        m, n_bins = self.channels.index(name), len(self.bins)
        is_sparse = sparse.issparse(self.counts)
        x_nl = self.counts[:, m * n_bins : (m + 1) * n_bins] if is_sparse else self.counts[:, m]
        return x_nl, self.measured_nc[:, m]


def stored_tracks(adata: AnnData, key: str, mask_key: str | None) -> StoredTracks:
    """Read the tracks of an AnnData; ``mask_key`` is ``<key>_mask`` by default, where there is such a mask.

    Raises
    ------
    DataError
        If obsm, uns or the mask is missing, or their shapes do not fit.
    """
    if not hasattr(adata, "obsm") or hasattr(adata, "mod"):
        message = (
            f"adata is a {type(adata).__name__}: an AnnData with tracks in obsm is needed. epivi.pp.stack_tracks makes "
            "one from a MuData."
        )
        raise DataError(message)
    check_key(adata.obsm, key, where="adata.obsm")
    check_key(adata.uns, key, where="adata.uns")
    for entry in ("channels", "bins"):
        check_key(adata.uns[key], entry, where=f"adata.uns['{key}']")
    bins, counts = adata.uns[key]["bins"], adata.obsm[key]
    for column in (VAR_CHROM, VAR_START, VAR_END):
        check_key(bins, column, where=f"adata.uns['{key}']['bins']")
    channels = [str(name) for name in np.atleast_1d(np.asarray(adata.uns[key]["channels"]))]
    n, c, n_bins = adata.n_obs, len(channels), len(bins)
    wanted = (n, c * n_bins) if sparse.issparse(counts) else (n, c, n_bins)
    if np.shape(counts) != wanted:
        message = (
            f"adata.obsm['{key}'] has shape {np.shape(counts)}, needed is {wanted}: {n} cells, {c} channels and "
            f"{n_bins} bins as described in adata.uns['{key}']. Correct the description or the counts."
        )
        raise DataError(message)
    if sparse.issparse(counts):
        counts = sparse.csr_matrix(counts)
    return StoredTracks(counts, channels, bins, _measured(adata, key, mask_key, channels))


def _measured(adata: AnnData, key: str, mask_key: str | None, channels: list[str]) -> np.ndarray:
    """Return the mask of measured channels, shape (n, c)."""
    shape = (adata.n_obs, len(channels))
    if mask_key is None:
        mask_key = f"{key}_mask"
        if mask_key not in adata.obsm:
            return np.ones(shape, dtype=bool)
    check_key(adata.obsm, mask_key, where="adata.obsm")
    mask = adata.obsm[mask_key]
    if hasattr(mask, "columns"):
        for name in channels:
            check_key(mask, name, where=f"adata.obsm['{mask_key}']")
        mask = mask[channels]
    mask = np.asarray(mask)
    if mask.shape != shape or mask.dtype != bool:
        message = (
            f"adata.obsm['{mask_key}'] has shape {mask.shape} and dtype {mask.dtype}, needed is a Boolean array of "
            f"shape {shape}: True where a channel was measured in a cell."
        )
        raise DataError(message)
    return mask


def cells_of_groups(
    adata: AnnData, groupby: str | None, groups: Sequence[Any] | str | None
) -> tuple[list[str], np.ndarray]:
    """Return the names of the groups and to which of them each cell belongs, (n,), -1 where to none.

    Raises
    ------
    ConfigError
        If the column or a group is unknown, the column is empty, or groups are given without a column or twice.
    """
    import pandas as pd

    if groupby is None:
        if groups is not None:
            message = f"groups={groups!r} needs groupby=, the column of obs that it is taken from."
            raise ConfigError(message)
        return [""], np.zeros(adata.n_obs, dtype=np.intp)
    if groupby not in adata.obs:
        message = f"obs has no column '{groupby}'. {nearest(groupby, adata.obs.columns)}"
        raise ConfigError(message)
    column = adata.obs[groupby]
    kinds = pd.Categorical(column).remove_unused_categories()
    codes_n = np.asarray(kinds.codes, dtype=np.intp)
    names = [str(name) for name in kinds.categories]
    if not names:
        message = f"obs['{groupby}'] has no value in any cell: choose a column that names groups."
        raise ConfigError(message)
    if groups is None:
        return names, codes_n
    chosen = _chosen(groups, names, argument="groups", kind="group", where=f"obs['{groupby}']")
    # the extra entry at the end is taken by cells without a group, whose code is -1
    number = np.full(len(names) + 1, -1, dtype=np.intp)
    number[[names.index(name) for name in chosen]] = np.arange(len(chosen))
    return chosen, number[codes_n]


def channel_names(modality: str | Sequence[str] | None, channels: Sequence[str]) -> list[str]:
    """Return the chosen channels.

    Raises
    ------
    ConfigError
        If one is unknown, none is named, or one is named twice.
    """
    if modality is None:
        return list(channels)
    return _chosen(modality, channels, argument="modality", kind="channel", where="adata")


def _chosen(wanted: Sequence[Any] | str, valid: Sequence[str], *, argument: str, kind: str, where: str) -> list[str]:
    """Return the names that were asked for, one or several, each of them known and named once."""
    names = [wanted] if isinstance(wanted, str) else [str(name) for name in wanted]
    for name in names:
        if name not in valid:
            message = f"{argument} names the {kind} '{name}', which {where} does not have. {nearest(name, valid)}"
            raise ConfigError(message)
    if not names or len(set(names)) < len(names):
        message = f"{argument}={wanted!r} must name at least one {kind}, each once."
        raise ConfigError(message)
    return names


def widened(region: Region, bin_size_bp: int | None) -> Region:
    """Return the region from the first to the last wider bin that it touches."""
    if bin_size_bp is None:
        return region
    return region._replace(
        start=region.start // bin_size_bp * bin_size_bp, end=-(-region.end // bin_size_bp) * bin_size_bp
    )


def bins_in_region(bins: pd.DataFrame, region: Region) -> np.ndarray:
    """Return the numbers of the bins that overlap a region, by their start, shape (r,)."""
    start, end = bins[VAR_START].to_numpy(), bins[VAR_END].to_numpy()
    is_in = (bins[VAR_CHROM].astype(str).to_numpy() == region.chrom) & (start < region.end) & (end > region.start)
    found_r = np.flatnonzero(is_in)
    return found_r[np.argsort(start[found_r], kind="stable")]


def pseudobulk(tracks: StoredTracks, name: str, group_n: np.ndarray, n_groups: int, normalize: str) -> np.ndarray:
    """Return the signal of a channel in each group, shape (g, l), NaN where it was measured in no cell.

    ``"library"``: counts of a bin over all counts of the channel, summed over the cells of the group; ``"cell"``: mean
    counts of a cell. Cells in which the channel was not measured do not count.

    Raises
    ------
    DataError
        If a count is NaN or infinite.
    """
    x_nl, measured_n = tracks.channel(name)
    total_gl, n_cells_g = _sums(x_nl, np.where(measured_n, group_n, -1), n_groups)
    if not np.isfinite(total_gl).all():
        message = f"The counts of channel '{name}' hold NaN or infinite values. Pass the raw counts."
        raise DataError(message)
    by_g = n_cells_g if normalize == CELL else total_gl.sum(axis=1)
    signal_gl = total_gl / np.where(by_g > 0, by_g, 1)[:, None]
    signal_gl[n_cells_g == 0] = np.nan
    return signal_gl


def _sums(x_nl: Any, group_n: np.ndarray, n_groups: int) -> tuple[np.ndarray, np.ndarray]:
    """Return sums over the cells of each group, (g, l), and their numbers, (g,)."""
    rows = np.flatnonzero(group_n >= 0)
    member_gn = sparse.csr_matrix((np.ones(rows.size), (group_n[rows], rows)), shape=(n_groups, group_n.size))
    total_gl = member_gn @ x_nl
    return np.asarray(total_gl.todense() if sparse.issparse(total_gl) else total_gl), np.diff(member_gn.indptr)


class Reconstruction(NamedTuple):
    """Reconstructed tracks, matched to the cells of the observed ones."""

    adata: AnnData
    rows_m: np.ndarray

    def signal(
        self, name: str, region: Region, group_n: np.ndarray, measured_n: np.ndarray, n_groups: int
    ) -> tuple[pd.DataFrame, np.ndarray] | None:
        """Return bins of a channel and their means over the cells of each group, (g, r); ``None`` if it has no bin.

        The cells are those in which the channel was measured, so that they are the cells of the observed signal; all
        of the group where the reconstruction has no such cell.
        """
        var = self.adata.var
        of_channel = np.flatnonzero(var[CHANNEL].astype(str).to_numpy() == name)
        columns = of_channel[bins_in_region(var.iloc[of_channel], region)]
        if columns.size == 0:
            return None
        group_m, measured_m = group_n[self.rows_m], measured_n[self.rows_m]
        has_measured_g = np.bincount(group_m[measured_m & (group_m >= 0)], minlength=n_groups) > 0
        counts_m = measured_m | ~has_measured_g[group_m]
        total_gr, n_cells_g = _sums(self.adata.X[:, columns], np.where(counts_m, group_m, -1), n_groups)
        mean_gr = total_gr / np.maximum(n_cells_g, 1)[:, None]
        mean_gr[n_cells_g == 0] = np.nan
        return var.iloc[columns], mean_gr


def matched(reconstructed: Any, adata: AnnData) -> Reconstruction:
    """Check reconstructed tracks and find their cells among those of the data.

    Raises
    ------
    DataError
        If it is no AnnData of bins with channel, chrom, start and end, or a cell is unknown or stands twice.
    """
    if not hasattr(reconstructed, "var") or not hasattr(reconstructed, "obs_names") or reconstructed.X is None:
        message = (
            f"reconstructed is a {type(reconstructed).__name__}: an AnnData of cells by bins is needed, as "
            "model.get_normalized_expression returns it."
        )
        raise DataError(message)
    for column in (CHANNEL, VAR_CHROM, VAR_START, VAR_END):
        check_key(reconstructed.var, column, where="reconstructed.var")
    for names, where in ((adata.obs_names, "adata"), (reconstructed.obs_names, "reconstructed")):
        if not names.is_unique:
            message = (
                f"{where}.obs_names are not unique, so that cells cannot be matched. Call .obs_names_make_unique()."
            )
            raise DataError(message)
    rows_m = adata.obs_names.get_indexer(reconstructed.obs_names)
    if (unknown_m := rows_m < 0).any():
        message = (
            f"{int(unknown_m.sum())} of {rows_m.size} cells of reconstructed are not in adata: "
            f"{_some(reconstructed.obs_names[unknown_m])}. Reconstruct the cells of adata."
        )
        raise DataError(message)
    return Reconstruction(reconstructed, rows_m)


def along_region(bins: pd.DataFrame, values_r: np.ndarray, bin_size_bp: int | None) -> Signal:
    """Lay values of bins along the genome, summed in wider bins if asked; what lies between bins is NaN.

    Raises
    ------
    ConfigError
        If a bin does not lie inside one wider bin.
    DataError
        If bins overlap.
    """
    start, end = bins[VAR_START].to_numpy(dtype=np.int64), bins[VAR_END].to_numpy(dtype=np.int64)
    if (bad := start[1:] < end[:-1]).any():
        at = int(np.argmax(bad))
        message = (
            f"The bins {start[at]}-{end[at]} and {start[at + 1]}-{end[at + 1]} overlap. Tracks need bins that do not."
        )
        raise DataError(message)
    if bin_size_bp is not None:
        wide = start // bin_size_bp
        if (bad := (end - 1) // bin_size_bp != wide).any():
            at = int(np.argmax(bad))
            message = (
                f"bin_size_bp={bin_size_bp} cuts the bin {start[at]}-{end[at]}. Give a multiple of the width of bins."
            )
            raise ConfigError(message)
        wide, first = np.unique(wide, return_index=True)
        values_r = np.add.reduceat(values_r, first)
        start, end = wide * bin_size_bp, (wide + 1) * bin_size_bp
    has_gap = np.flatnonzero(start[1:] != end[:-1]) + 1
    edges = np.append(start, end[-1])
    return Signal(np.insert(edges, has_gap, end[has_gap - 1]), np.insert(values_r.astype(float), has_gap, np.nan))
