"""What a trained model of tracks returns: latents, normalised tracks, imputed modalities."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from scipy import sparse

from epivi import _validate
from epivi._errors import ConfigError, DataError, nearest
from epivi._keys import BATCH_MASK, OBSM_TRACKS_MEASURED
from epivi._validate_regions import parse_region
from epivi.data.tracks.grids import TrackGrid
from epivi.models.base_latent import OBSERVED
from epivi.models.convnetvae.evidence import EvidenceMixin

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from anndata import AnnData
    from mudata import MuData

logger = logging.getLogger(__name__)

CHANNEL = "channel"
MEAN_LIBRARY = "mean"
CELLS = ("missing", "all")


class TracksOutputsMixin(EvidenceMixin):
    """Outputs of models of multi-channel tracks."""

    @torch.inference_mode()
    def get_latent_representation(
        self,
        adata: AnnData | MuData | None = None,
        indices: Sequence[int] | None = None,
        batch_size: int | None = None,
        *,
        modality: str | Sequence[str] | None = None,
        return_dist: bool = False,
    ) -> np.ndarray | tuple[np.ndarray, np.ndarray]:
        """Return the posterior means, one row a cell in the order of the data (or of ``indices``).

        Parameters
        ----------
        adata
            Data to embed; the trained data by default. Modalities are matched by name.
        indices
            Row numbers or a mask.
        batch_size
            Cells read at once; the result does not depend on it.
        modality
            The modalities that are read, as if no other had been measured; all by default.
        return_dist
            Return means and variances.

        Returns
        -------
        Shape (n, d), float32; with ``return_dist`` a pair of such arrays.

        Raises
        ------
        ConfigError
            If a modality is unknown.
        DataError
            If a cell has none of the chosen modalities.
        """
        data, rows, batches = self._trained_batches(adata, indices, batch_size)
        if modality is not None:
            if self.config.modality_dropout_rate == 0:
                logger.warning(
                    "The model was trained without hidden modalities: latents from some of them are of cells such as "
                    "it has not seen. Train it with modality_dropout_rate=0.3."
                )
            batches = self._reading(batches, self._channels(modality), data.obs_names[rows])
        return self._latents(batches, return_dist=return_dist)

    def _reading(
        self, batches: Iterator[dict[str, torch.Tensor]], channels: Sequence[int], names: pd.Index
    ) -> Iterator[dict[str, torch.Tensor]]:
        """Yield batches in which only some channels count as measured."""
        keep_c = torch.zeros(self.layout.n_channels, device=self.device)
        keep_c[list(channels)] = 1.0
        start = 0
        for batch in batches:
            mask_bc = batch[BATCH_MASK] * keep_c
            without = torch.nonzero(mask_bc.sum(1) == 0)[:, 0].tolist()
            if without:
                message = (
                    f"Cell '{names[start + without[0]]}' has none of the modalities "
                    f"{[self.layout.channels[m] for m in channels]}. Choose cells that have one (indices=...)."
                )
                raise DataError(message)
            start += mask_bc.shape[0]
            yield batch | {BATCH_MASK: mask_bc}

    @torch.inference_mode()
    def get_normalized_expression(  # noqa: PLR0913
        self,
        adata: AnnData | MuData | None = None,
        indices: Sequence[int] | None = None,
        *,
        modality: str | Sequence[str] | None = None,
        region_list: str | Sequence[str] | None = None,
        transform_batch: str | None = None,
        library_size: float | str = 1.0,
        threshold: float | None = None,
        use_z_mean: bool = True,
        return_numpy: bool = False,
        batch_size: int | None = None,
    ) -> AnnData | np.ndarray | sparse.csr_matrix:
        """Return the reconstructed tracks: the share of each bin in its modality, times a library size.

        Parameters
        ----------
        adata, indices, batch_size
            As in :meth:`get_latent_representation`.
        modality
            Modalities to return; all by default.
        region_list
            Regions such as ``"chr1:1,000,000-2,000,000"``, 0-based and half-open; bins that overlap one are returned.
        transform_batch
            Batch that the decoder is told; each cell's own by default.
        library_size
            Total of a modality in a cell: a number; ``"mean"``, that of the training cells; or ``"observed"``, the
            cell's own, 0 where the modality was not measured.
        threshold
            Set values below it to zero and return a sparse result, built batch by batch.
        use_z_mean
            Decode the posterior mean; otherwise a sample, drawn with the model's seed and the row of the cell.
        return_numpy
            Return an array, or with ``threshold`` a csr matrix.

        Returns
        -------
        AnnData of cells × bins whose ``var`` holds ``channel``, ``chrom``, ``start`` and ``end``.

        Raises
        ------
        ConfigError
            If a modality, region or batch is unknown, or a value outside its range.
        """
        data, rows, batches = self._trained_batches(adata, indices, batch_size)
        columns, var = self._features(modality, region_list)
        blocks = self._tracks(
            batches,
            columns,
            batch=self._named_batch(transform_batch),
            library_size=self._library_size(library_size),
            use_z_mean=use_z_mean,
        )
        return _collected(blocks, data.obs_names[rows], var, threshold=threshold, return_numpy=return_numpy)

    def get_normalized_accessibility(self, *args: Any, **kwargs: Any) -> Any:
        """Return :meth:`get_normalized_expression`; the name by which models of accessibility call it."""
        return self.get_normalized_expression(*args, **kwargs)

    @torch.inference_mode()
    def impute_modality(  # noqa: PLR0913
        self,
        modality: str,
        adata: AnnData | MuData | None = None,
        indices: Sequence[int] | None = None,
        *,
        cells: str = "missing",
        region_list: str | Sequence[str] | None = None,
        transform_batch: str | None = None,
        library_size: float | str = "mean",
        threshold: float | None = None,
        return_numpy: bool = False,
        batch_size: int | None = None,
    ) -> AnnData | np.ndarray | sparse.csr_matrix:
        """Return the expected counts of a modality from the other modalities of the same cells.

        Parameters
        ----------
        modality
            The modality to predict; it is never read, even where it was measured.
        adata, indices, batch_size
            As in :meth:`get_latent_representation`.
        cells
            ``"missing"``: the cells that lack the modality; ``"all"``: all cells that have another one.
        region_list, transform_batch, threshold, return_numpy
            As in :meth:`get_normalized_expression`.
        library_size
            Total of the modality in a cell: ``"mean"``, that of the training cells, or a number.

        Returns
        -------
        As :meth:`get_normalized_expression`, for the chosen cells in their order.

        Raises
        ------
        ConfigError
            If an argument is unknown, the model has one modality only, or it was trained without hidden modalities.
        DataError
            If no cell lacks the modality and ``cells="missing"``, or a chosen cell has no other modality.
        """
        _validate.check_choice(cells, "cells", CELLS)
        if not isinstance(modality, str):
            message = f"modality={modality!r} is no name. Give the name of one modality, of {self.layout.channels}."
            raise ConfigError(message)
        target = self._channels(modality)[0]
        others = [m for m in range(self.layout.n_channels) if m != target]
        if not others:
            message = f"The model has one modality, '{modality}': there is nothing to predict it from."
            raise ConfigError(message)
        if isinstance(library_size, str) and library_size == OBSERVED:
            message = "library_size='observed' does not exist for an absent modality. Use 'mean' or a number."
            raise ConfigError(message)
        if self.config.modality_dropout_rate == 0:
            message = (
                "The model was trained with modality_dropout_rate=0, so that its encoder has not learnt to do without "
                "a modality. Train it with modality_dropout_rate=0.3 to impute modalities."
            )
            raise ConfigError(message)
        data, rows, batches = self._trained_batches(adata, indices, batch_size)
        if cells == "missing" and rows.size:
            # the mask alone: the counts are read once, of the cells that are predicted
            lacks = ~np.asarray(data.obsm[OBSM_TRACKS_MEASURED], dtype=bool)[rows, target]
            if not lacks.any():
                message = f"All {rows.size} cells have '{modality}'. Use cells='all' to predict it all the same."
                raise DataError(message)
            data, rows, batches = self._batches(data, rows[lacks], batch_size)
        columns, var = self._features(modality, region_list)
        blocks = self._tracks(
            self._reading(batches, others, data.obs_names[rows]),
            columns,
            batch=self._named_batch(transform_batch),
            library_size=self._library_size(library_size),
            use_z_mean=True,
        )
        return _collected(blocks, data.obs_names[rows], var, threshold=threshold, return_numpy=return_numpy)

    def _tracks(
        self,
        batches: Iterator[dict[str, torch.Tensor]],
        columns: torch.Tensor | None,
        *,
        batch: int | None,
        library_size: torch.Tensor | None,
        use_z_mean: bool,
    ) -> Iterator[np.ndarray]:
        """Yield reconstructed tracks batch by batch, shape (b, chosen features)."""
        lengths = torch.tensor(self.layout.n_bins, device=self.device)
        channel_f = torch.repeat_interleave(torch.arange(lengths.numel(), device=self.device), lengths)
        channel_f = channel_f if columns is None else channel_f[columns]
        for entries in batches:
            outputs = self.module.inference(**self.module._get_inference_input(entries), deterministic=True)
            if not use_z_mean:
                outputs["z"] = self._sample(entries, outputs["qz"])
            inputs = self.module._get_generative_input(entries, outputs, batch=batch, use_z_mean=use_z_mean)
            shares_bf = self.module.shares(self.module.generative(**inputs)["hidden"], columns)
            if library_size is None:
                shares_bf *= self.module.observed_library(outputs["groups"], outputs["mask_bc"])[:, channel_f]
            else:
                shares_bf *= library_size[channel_f]
            yield shares_bf.cpu().numpy()

    def _channels(self, modality: str | Sequence[str]) -> list[int]:
        """Return the numbers of named modalities."""
        if not isinstance(modality, str | Iterable):
            modality = [modality]
        names = [modality] if isinstance(modality, str) else list(modality)
        if not all(isinstance(name, str) for name in names):
            message = f"modality={modality!r} must be a name or a list of names, of {self.layout.channels}."
            raise ConfigError(message)
        for name in names:
            if name not in self.layout.channels:
                message = f"modality='{name}' is no modality of the model. {nearest(name, self.layout.channels)}"
                raise ConfigError(message)
        if not names or len(set(names)) < len(names):
            message = f"modality={modality!r} must name at least one modality, each once."
            raise ConfigError(message)
        return [self.layout.channels.index(name) for name in names]

    def _features(
        self, modality: str | Sequence[str] | None, region_list: str | Sequence[str] | None
    ) -> tuple[torch.Tensor | None, pd.DataFrame]:
        """Return the numbers of the chosen features, ``None`` for all, and their table."""
        channels = range(self.layout.n_channels) if modality is None else self._channels(modality)
        regions = [region_list] if isinstance(region_list, str) else region_list
        columns, frames = [], []
        for m in channels:
            grid = self.layout.grid(m)
            at = np.arange(grid.n_bins) if regions is None else np.flatnonzero(_overlapping(grid, regions))
            # names are built of the chosen bins alone: there may be a few of many
            chosen = TrackGrid(grid.chrom[at], grid.start[at], grid.end[at], grid.bin_size_bp)
            frame = chosen.frame()
            frame.index = pd.Index([f"{self.layout.channels[m]}|{name}" for name in frame.index], dtype=str)
            frame.insert(0, CHANNEL, self.layout.channels[m])
            frames.append(frame)
            columns.append(at + self.layout.offsets[m])
        var = pd.concat(frames)
        if var.empty:
            message = f"region_list={regions} overlaps no bin of the model."
            raise ConfigError(message)
        if modality is None and regions is None:
            return None, var
        return torch.from_numpy(np.concatenate(columns)).to(self.device), var

    def _library_size(self, library_size: float | str) -> torch.Tensor | None:
        """Return the library of each channel, shape (c,), or ``None`` for the observed ones."""
        if isinstance(library_size, str):
            if library_size == OBSERVED:
                return None
            if library_size == MEAN_LIBRARY:
                return self.module.library
            message = f"library_size must be 'mean', 'observed' or a positive number, found '{library_size}'."
            raise ConfigError(message)
        _validate.check_number(library_size, "library_size", low=0.0, low_inclusive=False)
        return torch.full_like(self.module.library, library_size)


def _overlapping(grid: TrackGrid, regions: Sequence[str]) -> np.ndarray:
    """Return which bins overlap one of the regions."""
    is_in = np.zeros(grid.n_bins, dtype=bool)
    for region in regions:
        chrom, start, end = parse_region(region)
        is_in |= (grid.chrom == chrom) & (grid.start < end) & (grid.end > start)
    return is_in


def _collected(
    blocks: Iterator[np.ndarray],
    obs_names: pd.Index,
    var: pd.DataFrame,
    *,
    threshold: float | None,
    return_numpy: bool,
) -> AnnData | np.ndarray | sparse.csr_matrix:
    """Put blocks of rows together, sparse where there is a threshold."""
    import anndata

    if threshold is not None:
        _validate.check_number(threshold, "threshold", low=0.0)
    if threshold is None:
        matrix = np.empty((len(obs_names), len(var)), dtype=np.float32)
        start = 0
        for block_bf in blocks:
            matrix[start : start + len(block_bf)] = block_bf
            start += len(block_bf)
    else:
        parts = []
        for block_bf in blocks:
            block_bf[block_bf < threshold] = 0.0
            parts.append(sparse.csr_matrix(block_bf))
        matrix = sparse.vstack(parts, format="csr")
    return matrix if return_numpy else anndata.AnnData(matrix, obs=pd.DataFrame(index=obs_names), var=var)
