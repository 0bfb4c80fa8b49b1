"""Modalities on shared bins to tracks.

Legend of shapes: n cells, c channels (modalities), l bins.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import scipy.sparse as sp

from epivi._errors import ConfigError, DataError
from epivi._keys import OBSM_TRACKS, UNS_FRAGMENTS, VAR_CHROM, VAR_END, VAR_START
from epivi._validate import _some, check_anndata, check_counts, check_key
from epivi.pp.features import peak_coordinates

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd
    from anndata import AnnData
    from mudata import MuData

_POSITION = [VAR_CHROM, VAR_START, VAR_END]


class _Channel(NamedTuple):
    """One modality, checked: counts (its cells x l), bins, and its row of each of the n cells (-1 where none)."""

    counts: sp.csr_matrix
    bins: pd.DataFrame
    rows_n: np.ndarray
    genome: str


def stack_tracks(
    mdata: MuData,
    modalities: Sequence[str] | None = None,
    *,
    key: str = OBSM_TRACKS,
    dense: bool = False,
    layer: str | None = None,
) -> AnnData:
    """Put modalities that share their bins into one array of cells by channels by bins.

    Parameters
    ----------
    mdata
        Counts of each modality, cells by bins, in ``X`` or `layer`.
    modalities
        The modalities, in the order of the channels. All if None.
    key
        Name of the result in ``obsm`` and ``uns``.
    dense
        Store an array of shape (n, c, l) in the smallest unsigned integer type that holds the counts, instead of a
        csr_matrix of shape (n, c l), channel after channel, in int32.
    layer
        Layer with the counts instead of X.

    Returns
    -------
    An AnnData with all cells and ``obs`` of `mdata`, without ``X`` and features, with

    - ``obsm["tracks"]`` the counts;
    - ``obsm["tracks_mask"]`` (n, c) Boolean: whether the modality was measured in the cell. A measured cell may have
      no counts; the counts of a cell that was not measured are zero;
    - ``uns["tracks"]`` channels (names), bins (table of chrom, start, end in bp, 0-based, half-open), genome (""
      if unknown) and bin_size_bp (0 if the widths differ, ends of chromosomes aside).

    Raises
    ------
    ConfigError
        If a modality is named twice, or none is given.
    DataError
        If `mdata` is no MuData or does not share cells; if a modality is missing, has no positions, no counts, or
        counts that are Boolean, negative, not whole or missing; if its bins occur twice, are not sorted by start
        within chromosomes, or its chromosomes are interleaved (the first such bin is named); if bins or genomes
        differ between modalities; if a cell has none of the modalities.

    Examples
    --------
    >>> import numpy as np, pandas as pd
    >>> from anndata import AnnData
    >>> from mudata import MuData
    >>> bins = {"chrom": ["chr1", "chr1"], "start": [0, 100], "end": [100, 200]}
    >>> parts = {
    ...     name: AnnData(
    ...         np.eye(2), obs=pd.DataFrame(index=cells), var=pd.DataFrame(bins, index=[name + "1", name + "2"])
    ...     )
    ...     for name, cells in {"k27ac": ["a", "b"], "k27me3": ["b", "c"]}.items()
    ... }
    >>> adata = stack_tracks(MuData(parts), dense=True)
    >>> adata.obsm["tracks"].shape, adata.obsm["tracks_mask"].sum(axis=0).tolist()
    ((3, 2, 2), [2, 2])
    """
    from anndata import AnnData

    names = _modality_names(mdata, modalities)
    channels = {name: _channel(mdata, name, layer) for name in names}
    first = channels[names[0]]
    for name, channel in channels.items():
        _check_same_bins(first.bins, channel.bins, names[0], name)
    mask_nc = np.column_stack([channel.rows_n >= 0 for channel in channels.values()])
    empty = ~mask_nc.any(axis=1)
    if empty.any():
        message = (
            f"{int(empty.sum())} cells have none of the modalities {_some(names)}: {_some(mdata.obs_names[empty])}. "
            "Remove them from mdata first."
        )
        raise DataError(message)
    stack = _dense if dense else _sparse
    bins = first.bins.reset_index(drop=True)
    tracks = {
        "channels": np.array(names, dtype=object),
        "bins": bins,
        "genome": _genome(channels),
        "bin_size_bp": _bin_size(bins),
    }
    obsm = {key: stack(list(channels.values()), len(bins)), f"{key}_mask": mask_nc}
    return AnnData(obs=mdata.obs.copy(), obsm=obsm, uns={key: tracks})


def _modality_names(mdata: Any, modalities: Sequence[str] | None) -> list[str]:
    """Check the container and return the names of the modalities."""
    if type(mdata).__name__ != "MuData":
        kind = f"{type(mdata).__module__}.{type(mdata).__qualname__}"
        message = f"mdata is a {kind}, a MuData is needed. A single modality can be wrapped: MuData({{'name': adata}})."
        raise DataError(message)
    if mdata.axis != 0:
        message = (
            f"The modalities of mdata share features (axis={mdata.axis}), not cells. Build the MuData with axis=0."
        )
        raise DataError(message)
    if isinstance(modalities, str):
        message = f"modalities must be a list of names, found the string {modalities!r}. Write [{modalities!r}]."
        raise ConfigError(message)
    names = list(mdata.mod) if modalities is None else list(modalities)
    if not names or len(set(names)) < len(names):
        message = f"modalities={names} names {'one of them twice' if names else 'none'}. Name each channel once."
        raise ConfigError(message)
    for name in names:
        check_key(mdata.mod, name, where="mdata")
    return names


def _channel(mdata: MuData, name: str, layer: str | None) -> _Channel:
    """Check one modality."""
    part = mdata.mod[name]
    bins = _bins(part, f"mdata['{name}']")
    counts = _matrix(part, layer, f"mdata['{name}']")
    rows_n = part.obs_names.get_indexer(mdata.obs_names)
    if (rows_n >= 0).sum() < part.n_obs:
        message = f"mdata['{name}'] has cells that mdata has not. Call mdata.update() first."
        raise DataError(message)
    genome = str(part.uns.get(UNS_FRAGMENTS, {}).get("genome", ""))
    return _Channel(counts, bins, rows_n, genome)


def _bins(adata: AnnData, where: str) -> pd.DataFrame:
    """Return the positions of the features, which must follow one another along the genome."""
    check_anndata(adata, where=where)
    try:
        bins = peak_coordinates(adata)
    except DataError as error:
        message = f"{where}: {error}"
        raise DataError(message) from error
    if bins is None:
        message = (
            f"{where} has no positions: add the columns chrom, start and end to its var, or leave this modality out "
            "with modalities=[...]."
        )
        raise DataError(message)
    _check_order(bins, where)
    return bins


def _check_order(bins: pd.DataFrame, where: str) -> None:
    """Refuse bins that occur twice or stand before their place."""
    chrom, start = bins[VAR_CHROM].to_numpy(dtype=object), bins[VAR_START].to_numpy()
    is_first = np.concatenate([[True], chrom[1:] != chrom[:-1]])
    again = np.zeros(len(bins), dtype=bool)
    at_first = np.flatnonzero(is_first)
    again[at_first] = bins[VAR_CHROM].iloc[at_first].duplicated().to_numpy()
    back = np.concatenate([[False], start[1:] <= start[:-1]]) & ~is_first
    for bad, cause in (
        (bins[_POSITION].duplicated().to_numpy(), "occurs twice"),
        (again, "comes back to a chromosome that the bins had left"),
        (back, "does not start after the bin before it"),
    ):
        if bad.any():
            at = int(np.flatnonzero(bad)[0])
            region = f"{chrom[at]}:{start[at]}-{bins[VAR_END].iloc[at]}"
            message = (
                f"{where}: bin {region} (number {at}) {cause}; {int(bad.sum())} such bins. Bins must be sorted by "
                "start within each chromosome: remove duplicates, and call epivi.pp.order_by_chromosome."
            )
            raise DataError(message)


def _matrix(adata: AnnData, layer: str | None, where: str) -> sp.csr_matrix:
    """Return the counts, checked, as int32 CSR without duplicates and zeros; the user's matrix stays as it is."""
    if layer is not None:
        check_key(adata.layers, layer, where=f"{where}.layers")
    matrix: Any = adata.X if layer is None else adata.layers[layer]
    where = f"{where}.X" if layer is None else f"{where}.layers['{layer}']"
    check_counts(matrix, where=where, obs_names=adata.obs_names)
    if matrix.dtype.kind == "b":
        message = f"{where} is Boolean, counts are needed. If open or closed is all there is: .astype('int32')."
        raise DataError(message)
    if hasattr(matrix, "to_memory"):
        matrix = matrix.to_memory()
    counts = sp.csr_matrix(matrix if sp.issparse(matrix) else np.asarray(matrix))
    counts = counts.astype(np.int32, copy=not counts.has_canonical_format or not counts.data.all())
    if not counts.has_canonical_format:
        counts.sum_duplicates()
    counts.eliminate_zeros()
    return counts


def _check_same_bins(bins: pd.DataFrame, others: pd.DataFrame, name: str, other: str) -> None:
    """Refuse two modalities that differ in a bin."""
    remedy = "Count all modalities in the same bins, or name those that share them: modalities=[...]."
    if len(bins) != len(others):
        message = f"'{name}' has {len(bins)} bins and '{other}' has {len(others)}. {remedy}"
        raise DataError(message)
    differs = (bins[_POSITION].to_numpy(dtype=object) != others[_POSITION].to_numpy(dtype=object)).any(axis=1)
    if differs.any():
        at = int(np.flatnonzero(differs)[0])
        found = ["{}:{}-{}".format(*frame[_POSITION].iloc[at]) for frame in (bins, others)]
        message = f"Bin number {at} is {found[0]} in '{name}' and {found[1]} in '{other}'. {remedy}"
        raise DataError(message)


def _genome(channels: dict[str, _Channel]) -> str:
    """Return the genome that the modalities name; "" if none does."""
    named = {name: channel.genome for name, channel in channels.items() if channel.genome}
    if len(set(named.values())) > 1:
        message = f"The modalities are of different genomes: {named}. Stack those of one genome."
        raise DataError(message)
    return next(iter(named.values()), "")


def _bin_size(bins: pd.DataFrame) -> int:
    """Return the common width in bp; the last bin of a chromosome may be shorter. 0 if the widths differ."""
    chrom, width = bins[VAR_CHROM].to_numpy(dtype=object), (bins[VAR_END] - bins[VAR_START]).to_numpy()
    is_last = np.concatenate([chrom[1:] != chrom[:-1], [True]])
    return int(width.max()) if (is_last | (width == width.max())).all() else 0


def _sparse(channels: list[_Channel], n_bins: int) -> sp.csr_matrix:
    """Return (n, c l), channel after channel."""
    blocks = []
    for channel in channels:
        has = channel.rows_n >= 0
        part = channel.counts[channel.rows_n[has]]
        indptr = np.zeros(has.size + 1, dtype=part.indptr.dtype)
        indptr[1:][has] = np.diff(part.indptr)
        blocks.append(sp.csr_matrix((part.data, part.indices, np.cumsum(indptr)), shape=(has.size, n_bins)))
    return sp.csr_matrix(sp.hstack(blocks, format="csr"))


def _dense(channels: list[_Channel], n_bins: int) -> np.ndarray:
    """Return (n, c, l)."""
    largest = max(int(channel.counts.data.max(initial=0)) for channel in channels)
    x_ncl = np.zeros((channels[0].rows_n.size, len(channels), n_bins), dtype=np.min_scalar_type(largest))
    for c, channel in enumerate(channels):
        has = np.flatnonzero(channel.rows_n >= 0)
        part = channel.counts[channel.rows_n[has]].tocoo()
        x_ncl[has[part.row], c, part.col] = part.data
    return x_ncl
