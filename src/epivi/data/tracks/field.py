"""Registry fields of binned tracks: one array of all channels in obsm, or one modality of a MuData for each channel."""

from __future__ import annotations

import logging
from abc import abstractmethod
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
from mudata import MuData
from scvi.data.fields import BaseAnnDataField

from epivi import _validate
from epivi._errors import DataError, nearest
from epivi._keys import OBSM_TRACKS_MASK, OBSM_TRACKS_MEASURED
from epivi.data.sparse import SparseReader, modality_rows
from epivi.data.tracks._checks import (
    channel_modalities,
    check_holder,
    check_mask,
    check_modality,
    check_stacked,
    counting,
    described_layout,
    first_bad_count,
    match_channels,
)
from epivi.data.tracks.grids import TrackGrid, TrackLayout
from epivi.data.tracks.reader import ModalitiesSource, RowSource, StackedSource, TracksReader, channel_bounds

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from anndata import AnnData
    from scipy import sparse

logger = logging.getLogger(__name__)

CHANNEL_INDEXER: Final = "channel_indexer"
TOTAL_COUNTS: Final = "total_counts"
N_MEASURED: Final = "n_measured"
DENSITY: Final = "density"
N_OBS: Final = "n_obs"
IS_INCOMPLETE: Final = "is_incomplete"
EMPTY: Final = ("observed", "mask")

_ROWS_AT_ONCE = 512


class _Found(NamedTuple):
    """What an object holds: its channels, and which of them were measured in which cell, (n, stored channels)."""

    layout: TrackLayout
    measured_nc: np.ndarray


class _TracksFieldBase(BaseAnnDataField):
    """What both forms of tracks share: matching of channels and bins, masks, statistics, the state."""

    is_mask_optional = False

    def __init__(self, registry_key: str, *, mask_key: str | None, empty: str, where: str) -> None:
        super().__init__()
        _validate.check_choice(empty, "empty", EMPTY)
        self._registry_key = registry_key
        self.mask_key = mask_key
        self.empty = empty
        self.where = where

    @property
    def registry_key(self) -> str:
        """Key in the registry."""
        return self._registry_key

    @property
    def attr_name(self) -> str:
        """Attribute that holds the registered array."""
        return "obsm"

    @property
    def attr_key(self) -> str:
        """Key of the registered array."""
        return OBSM_TRACKS_MEASURED

    @property
    def is_empty(self) -> bool:
        """Never empty: tracks are needed."""
        return False

    @property
    def counts_where(self) -> str:
        """How messages call the counts."""
        return self.where

    def validate_field(self, adata: Any) -> None:
        """Check the object and find its channels, bins and mask, without reading counts."""
        self._find(adata)

    def register_field(self, adata: Any) -> dict:
        """Check all counts, store which channels were measured, and return channels, bins and statistics."""
        check_holder(adata, where=self.where)
        found = self._find(adata)
        indexer = np.arange(found.layout.n_channels)
        statistics = self._enter(adata, found.layout, indexer, found.measured_nc)
        for name, n in zip(found.layout.channels, statistics[N_MEASURED], strict=True):
            if n == 0:
                message = f"Channel '{name}' of {self.where} is measured in no cell. Leave it out or correct its mask."
                raise DataError(message)
        if not any(statistics[TOTAL_COUNTS]):
            message = f"{self.counts_where} has no measured count above zero. Pass the raw counts and check the mask."
            raise DataError(message)
        incomplete = any(n < adata.n_obs for n in statistics[N_MEASURED])
        more = {CHANNEL_INDEXER: indexer, N_OBS: adata.n_obs, IS_INCOMPLETE: incomplete}
        return found.layout.state() | statistics | more

    def transfer_field(self, state_registry: dict, adata_target: Any, **kwargs: Any) -> dict:  # noqa: ARG002
        """Match channels by name and bins one by one; channels that are missing count as not measured."""
        check_holder(adata_target, where=self.where, minimum=1)
        trained = TrackLayout.from_state(state_registry)
        found = self._find(adata_target, trained.channels)
        indexer = match_channels(trained.channels, found.layout.channels, where=self.where)
        for channel, at in enumerate(indexer):
            if at >= 0:
                self._check_bins(trained, found.layout, channel, int(at))
        if trained.genome and found.layout.genome and trained.genome != found.layout.genome:
            logger.warning(
                "%s is of genome '%s', the trained model of '%s'.", self.where, found.layout.genome, trained.genome
            )
        measured_nc = np.zeros((adata_target.n_obs, trained.n_channels), dtype=bool)
        measured_nc[:, indexer >= 0] = found.measured_nc[:, indexer[indexer >= 0]]
        self._enter(adata_target, trained, indexer, measured_nc)
        return dict(state_registry) | {CHANNEL_INDEXER: indexer, N_OBS: adata_target.n_obs}

    def _check_bins(self, trained: TrackLayout, found: TrackLayout, channel: int, at: int) -> None:
        ours, theirs = trained.grid(channel), found.grid(at)
        if (bin_at := ours.first_difference(theirs)) is None:
            return
        want, have = (grid.name(bin_at) if bin_at < grid.n_bins else "no further bin" for grid in (ours, theirs))
        message = (
            f"The bins of channel '{trained.channels[channel]}' of {self.where} ({theirs.n_bins}) are not those of the "
            f"trained model ({ours.n_bins}): bin {bin_at} is {have}, the model has {want}. Count the data in the bins "
            "of the model."
        )
        raise DataError(message)

    def _enter(self, data: Any, layout: TrackLayout, indexer: np.ndarray, measured_nc: np.ndarray) -> dict[str, Any]:
        """Check the counts, store the mask of measured channels and return statistics."""
        reader = TracksReader(self._source(data, layout, indexer), layout.offsets, measured_nc)
        totals_nc, n_nonzero = sum_counts(reader, layout, where=self.counts_where, obs_names=data.obs_names)
        empty_nc = measured_nc & (totals_nc == 0)
        for channel, name in enumerate(layout.channels):
            if n_empty := int(empty_nc[:, channel].sum()):
                logger.warning(
                    "%d of %d cells have channel '%s' of %s measured and without any count; %s.",
                    n_empty,
                    data.n_obs,
                    name,
                    self.where,
                    "they count as not measured" if self.empty == "mask" else "empty='mask' takes them as not measured",
                )
        if self.empty == "mask":
            measured_nc = measured_nc & ~empty_nc
        self._check_some_measured(data, measured_nc)
        data.obsm[OBSM_TRACKS_MEASURED] = measured_nc
        n_measured = measured_nc.sum(axis=0)
        return {
            TOTAL_COUNTS: [float(total) for total in totals_nc.sum(axis=0)],
            N_MEASURED: [int(n) for n in n_measured],
            DENSITY: n_nonzero / max(int(n_measured @ np.array(layout.n_bins)), 1),
        }

    def _check_some_measured(self, data: Any, measured_nc: np.ndarray) -> None:
        bad = np.flatnonzero(~measured_nc.any(axis=1))
        if bad.size:
            message = (
                f"{bad.size} of {data.n_obs} cells of {self.where} have no measured channel, the first is "
                f"'{data.obs_names[bad[0]]}' (row {bad[0]}). Remove these cells or correct the mask."
            )
            raise DataError(message)

    def make_reader(self, data: Any, state: Mapping[str, Any]) -> TracksReader:
        """Return the reader of data that were registered.

        Parameters
        ----------
        data
            The registered object.
        state
            What :meth:`register_field` or :meth:`transfer_field` returned.
        """
        layout = TrackLayout.from_state(state)
        source = self._source(data, layout, np.asarray(state[CHANNEL_INDEXER]))
        return TracksReader(source, layout.offsets, data.obsm[OBSM_TRACKS_MEASURED])

    def get_summary_stats(self, state_registry: dict) -> dict:
        """Return the numbers of cells, of concatenated bins and of channels."""
        n_bins = state_registry["n_bins"]
        return {"n_cells": state_registry[N_OBS], "n_vars": sum(n_bins), "n_channels": len(n_bins)}

    def view_state_registry(self, state_registry: dict) -> None:  # noqa: ARG002
        """Show nothing: there are too many bins."""
        return

    @abstractmethod
    def _find(self, data: Any, trained: Sequence[str] | None = None) -> _Found:
        """Check the object and return its layout and mask; ``trained`` names the channels of the model of a query."""

    @abstractmethod
    def _source(self, data: Any, layout: TrackLayout, indexer: np.ndarray) -> RowSource:
        """Return where the counts of the trained channels come from."""

    def _mask(self, data: Any, channels: Sequence[str]) -> np.ndarray:
        """Return the user's mask of measured channels, shape (n, c); all if there is none."""
        if self.mask_key is None:
            if OBSM_TRACKS_MASK in data.obsm:
                logger.warning(
                    "%s.obsm['%s'] is not used: name it with mask_key= if it tells which channels were measured.",
                    self.where,
                    OBSM_TRACKS_MASK,
                )
            return np.ones((data.n_obs, len(channels)), dtype=bool)
        if self.is_mask_optional and self.mask_key not in data.obsm:
            return np.ones((data.n_obs, len(channels)), dtype=bool)
        _validate.check_key(data.obsm, self.mask_key, where=f"{self.where}.obsm")
        where = f"{self.where}.obsm['{self.mask_key}']"
        return check_mask(data.obsm[self.mask_key], where=where, n_obs=data.n_obs, channels=channels)


class TracksField(_TracksFieldBase):
    """Tracks in one array of obsm, dense (n, c, l) or CSR (n, c · l), described in uns under the same key.

    ``adata.uns[tracks_key]`` holds ``channels`` (c names), ``bins`` (table of chrom, start and end, l rows) and, if
    known, ``genome`` and ``bin_size_bp``.

    Parameters
    ----------
    registry_key
        Key in the registry.
    tracks_key
        Key of obsm and of uns.
    mask_key
        Key of obsm with the mask (n, c) of measured channels, a Boolean array or a DataFrame whose columns are the
        channels; ``None`` if all were measured in all cells.
    is_mask_optional
        Whether data without that key count as measured in all channels; otherwise they are refused.
    empty
        What a measured channel without any count in a cell stands for: ``"observed"``, a measurement of nothing;
        ``"mask"``, a channel that was not measured.
    where
        How messages call the object.
    """

    def __init__(
        self,
        registry_key: str,
        tracks_key: str,
        *,
        mask_key: str | None = None,
        is_mask_optional: bool = False,
        empty: str = "observed",
        where: str = "adata",
    ) -> None:
        super().__init__(registry_key, mask_key=mask_key, empty=empty, where=where)
        self.is_mask_optional = is_mask_optional
        self.tracks_key = tracks_key

    @property
    def attr_key(self) -> str:
        """Key of the counts in obsm."""
        return self.tracks_key

    @property
    def counts_where(self) -> str:
        """How messages call the counts."""
        return f"{self.where}.obsm['{self.tracks_key}']"

    def _find(self, data: AnnData, trained: Sequence[str] | None = None) -> _Found:  # noqa: ARG002
        _validate.check_key(data.obsm, self.tracks_key, where=f"{self.where}.obsm")
        _validate.check_key(data.uns, self.tracks_key, where=f"{self.where}.uns")
        layout = described_layout(data.uns[self.tracks_key], where=f"{self.where}.uns['{self.tracks_key}']")
        n_bins = layout.grids[0].n_bins
        check_stacked(
            data.obsm[self.tracks_key], where=self.counts_where, shape=(data.n_obs, layout.n_channels, n_bins)
        )
        return _Found(layout, self._mask(data, layout.channels))

    def _source(self, data: AnnData, layout: TrackLayout, indexer: np.ndarray) -> RowSource:
        return StackedSource(data.obsm[self.tracks_key], layout.grids[0].n_bins, indexer)


class MuDataTracksField(_TracksFieldBase):
    """Tracks of a MuData: each channel is a modality (cells × bins); cells that a modality lacks were not measured.

    Modalities may have bins of different widths. Where ``var`` has no columns chrom, start and end, they are read off
    names such as ``chr1:0-10000``.

    Parameters
    ----------
    registry_key
        Key in the registry.
    modalities
        Modalities to read; or a mapping from names of channels to modalities. All modalities if ``None``.
    layer
        Layer of the counts in every modality; ``None`` stands for X.
    mask_key
        Key of ``mdata.obsm`` with a mask (n, c) beyond the membership of cells, as in :class:`TracksField`.
    empty
        As in :class:`TracksField`.
    where
        How messages call the object.

    Raises
    ------
    ConfigError
        If ``modalities`` is no list or mapping, is empty, or names a channel or modality twice.
    """

    def __init__(
        self,
        registry_key: str,
        modalities: Sequence[str] | Mapping[str, str] | None = None,
        *,
        layer: str | None = None,
        mask_key: str | None = None,
        empty: str = "observed",
        where: str = "mdata",
    ) -> None:
        super().__init__(registry_key, mask_key=mask_key, empty=empty, where=where)
        self.modalities = None if modalities is None else channel_modalities(modalities)
        self.layer = layer

    def _find(self, data: MuData, trained: Sequence[str] | None = None) -> _Found:
        """Modalities that a query lacks are left out; in training data they are an error."""
        if not isinstance(data, MuData):  # a table has a method of the name mod
            message = f"{self.where} is a {type(data).__name__}, a MuData is needed. For an AnnData use setup_anndata."
            raise DataError(message)
        modalities = self._present(data, trained)
        grids: list[TrackGrid] = []
        numbers, genomes = [], set()
        for channel, name in modalities.items():
            if name not in data.mod:
                message = f"{self.where} has no modality '{name}' for channel '{channel}'. {nearest(name, data.mod)}"
                raise DataError(message)
            grid = check_modality(data.mod[name], layer=self.layer, where=f"{self.where}['{name}']")
            same = [i for i, other in enumerate(grids) if grid.first_difference(other) is None]
            numbers.append(same[0] if same else len(grids))
            grids += [] if same else [grid]
            if genome := counting(data.mod[name]).get("genome"):
                genomes.add(str(genome))
        genome = genomes.pop() if len(genomes) == 1 else None
        layout = TrackLayout(tuple(modalities), tuple(grids), tuple(numbers), genome)
        measured_nc = self._mask(data, layout.channels)
        for at, name in enumerate(modalities.values()):
            measured_nc[:, at] &= data.obs_names.isin(data.mod[name].obs_names)
        return _Found(layout, measured_nc)

    def _present(self, data: MuData, trained: Sequence[str] | None) -> dict[str, str]:
        """Return the modality of each channel; of a query, those that it has."""
        if self.modalities is None:
            modalities = {name: name for name in data.mod if trained is None or name in trained}
            if extra := [name for name in data.mod if name not in modalities]:
                logger.warning(
                    "%s has the modalities %s, unknown to the trained model: they are ignored.", self.where, extra
                )
        elif trained is None:
            modalities = self.modalities
        else:
            modalities = {channel: name for channel, name in self.modalities.items() if name in data.mod}
        if not modalities:
            wanted = list(trained or ()) if self.modalities is None else list(self.modalities.values())
            message = f"{self.where} has none of the modalities {wanted}. {nearest('', data.mod)}"
            raise DataError(message)
        return modalities

    def _source(self, data: MuData, layout: TrackLayout, indexer: np.ndarray) -> RowSource:
        readers: list[SparseReader | None] = []
        for channel, at in zip(layout.channels, indexer, strict=True):
            name = channel if self.modalities is None else self.modalities[channel]
            if at < 0:
                readers.append(None)
                continue
            holder = data.mod[name]
            matrix = holder.X if self.layer is None else holder.layers[self.layer]
            readers.append(SparseReader(matrix, row_map=modality_rows(data, name)))
        return ModalitiesSource(readers, layout.n_bins)


def sum_counts(
    reader: TracksReader, layout: TrackLayout, *, where: str, obs_names: Any, chunk_rows: int = _ROWS_AT_ONCE
) -> tuple[np.ndarray, int]:
    """Check every measured count in one pass and add up those of each cell and channel.

    Returns
    -------
    Sums, shape (n, c), and the number of counts above zero.

    Raises
    ------
    DataError
        If a count is NaN, infinite, negative or not whole; cell, channel and bin of the first are named.
    """
    n_obs = reader.measured_nc.shape[0]
    totals_nc = np.zeros((n_obs, layout.n_channels))
    n_nonzero = 0
    for start in range(0, n_obs, chunk_rows):
        rows = np.arange(start, min(start + chunk_rows, n_obs))
        part: sparse.csr_matrix = reader.rows(rows)
        if (bad := first_bad_count(part)) is not None:
            row, column, cause = bad
            channel = int(np.searchsorted(layout.offsets, column, side="right")) - 1
            name = layout.grid(channel).name(column - layout.offsets[channel])
            message = (
                f"{where}: cell '{obs_names[start + row]}' (row {start + row}), channel '{layout.channels[channel]}', "
                f"bin {name} holds {cause}"
            )
            raise DataError(message)
        sums = np.concatenate([[0.0], np.cumsum(part.data, dtype=np.float64)])
        totals_nc[rows] = np.diff(sums[channel_bounds(part, layout.offsets)], axis=1)
        n_nonzero += part.nnz
    return totals_nc, n_nonzero
