"""Where the bins of every channel lie for the convolutions: common grid, runs of bins, finer bins inside it."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from epivi._errors import DataError
from epivi.data.tracks.grids import nested, segments
from epivi.nn.conv.layout import layer_lengths

if TYPE_CHECKING:
    from epivi.data.tracks.grids import TrackGrid, TrackLayout

logger = logging.getLogger(__name__)

# runs of bins between gaps may lengthen the layers by this factor before only chromosomes are kept apart
MAX_LENGTHENING = 1.25


@dataclass(frozen=True, eq=False)
class ConvGeometry:
    """Bins of each channel on the common grid, the coarsest one.

    Attributes
    ----------
    lengths
        Bins of each channel.
    ratios
        Bins of each channel in one common bin.
    segments
        Runs of common bins that are convolved apart.
    input_sizes
        Bins of each channel if every common bin were whole.
    input_positions, output_positions
        Place of each feature among ``input_sizes``, and among the outputs of the decoder (channel, place inside the
        common bin, common bin), shapes (f,).
    boundaries
        Where runs end: "none", "chromosome" or "gap".
    is_common
        Whether all channels have the bins of the common grid.
    """

    lengths: tuple[int, ...]
    ratios: tuple[int, ...]
    segments: tuple[int, ...]
    input_sizes: tuple[int, ...]
    input_positions: np.ndarray
    output_positions: np.ndarray
    boundaries: str
    is_common: bool

    @classmethod
    def of(cls, layout: TrackLayout, boundaries: str, stride: int, n_layers: int = 1) -> ConvGeometry:
        """Return the geometry of a layout of tracks.

        Parameters
        ----------
        layout
            Channels and their grids.
        boundaries
            "none", "chromosome", "gap", or "auto": gaps, unless the selected bins lie so far apart that the layers
            would become longer by more than a quarter; then chromosomes.
        stride, n_layers
            Stride and number of the layers.

        Raises
        ------
        DataError
            If the bins of a channel do not lie inside those of the coarsest one.
        """
        common = max(layout.grids, key=lambda grid: (grid.bin_size_bp, grid.n_bins))
        ratios: list[int] = []
        sizes: list[int] = []
        inputs, outputs = [], []
        row = 0
        for m, name in enumerate(layout.channels):
            grid = layout.grid(m)
            ratio, parent, slot = _places(common, grid, name)
            inputs.append(sum(sizes) + parent * ratio + slot)
            outputs.append((row + slot) * common.n_bins + parent)
            row += ratio
            ratios.append(ratio)
            sizes.append(common.n_bins * ratio)
        chosen = _boundaries(common, boundaries, stride, n_layers)
        return cls(
            tuple(layout.n_bins),
            tuple(ratios),
            tuple(segments(common, chosen)),
            tuple(sizes),
            np.concatenate(inputs),
            np.concatenate(outputs),
            chosen,
            len(layout.grids) == 1,
        )


def _places(common: TrackGrid, grid: TrackGrid, name: str) -> tuple[int, np.ndarray, np.ndarray]:
    """Bins of a channel in one common bin, and the common bin and place of each of them."""
    if grid.first_difference(common) is None:
        return 1, np.arange(grid.n_bins), np.zeros(grid.n_bins, dtype=np.int64)
    try:
        parent, slot, ratio = nested(common, grid)
    except DataError as error:
        message = (
            f"ConvNetVAE joins all modalities on one grid, and the bins of '{name}' do not fit: {error} "
            "FCVAE takes modalities with any bins."
        )
        raise DataError(message) from error
    return ratio, parent, slot


def _boundaries(grid: TrackGrid, boundaries: str, stride: int, n_layers: int) -> str:
    """Resolve "auto", and say what was chosen where gaps cannot be kept apart."""
    if boundaries != "auto":
        return boundaries
    windows = {
        kind: sum(layer_lengths(n, stride, n_layers)[-1] for n in segments(grid, kind))
        for kind in ("chromosome", "gap")
    }
    if windows["gap"] <= MAX_LENGTHENING * windows["chromosome"]:
        return "gap"
    logger.warning(
        "The %d bins lie in %d runs between gaps; kept apart they would lengthen the last layer from %d to %d "
        "positions, so that only chromosomes are kept apart and kernels cross gaps. Bins selected in contiguous "
        "windows (epivi.pp.select_bins(..., by='windows')) avoid this; boundaries='gap' keeps gaps apart at that "
        "price.",
        grid.n_bins,
        len(segments(grid, "gap")),
        windows["chromosome"],
        windows["gap"],
    )
    return "chromosome"
