"""What SAILER asks of its data: checks, depth, and the blocks of peaks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from scvi import REGISTRY_KEYS

from epivi import _validate
from epivi._errors import DataError
from epivi._keys import BATCH_DEPTH, VAR_CHROM, VAR_END, VAR_START
from epivi.data.fields import DepthField, PeaksField
from epivi.nn.linear import PeakBlocks
from epivi.pp.features import peak_coordinates

if TYPE_CHECKING:
    from anndata import AnnData

    from epivi.models.base_setup import ObsKeys

MIN_PEAKS_OF_CHROMOSOME = 32
OTHER_CHROMOSOMES = "other"


def check_atac(adata: AnnData, *, where: str, layer: str | None) -> None:
    """Check that an object is an AnnData of peaks that can be set up; its counts are checked by their field.

    Raises
    ------
    DataError
        If the object or its names cannot be used, the layer is missing, or the object is a view.
    """
    _validate.check_anndata(adata, where=where)
    if layer is not None:
        _validate.check_key(adata.layers, layer, where=f"{where}.layers")
    if adata.is_view:
        message = f"{where} is a view of another AnnData: call .copy() on it first."
        raise DataError(message)


def accessibility_fields(
    adata: AnnData, layer: str | None, depth_key: str | None, keys: ObsKeys, chrom_key: str
) -> list[Any]:
    """Check an AnnData of peaks and return the fields that SAILER reads."""
    check_atac(adata, where="adata", layer=layer)
    keys.check(adata.obs, where="adata.obs")
    return [
        PeaksField(REGISTRY_KEYS.X_KEY, layer, chromosomes=chromosome_of_peak(adata, chrom_key)),
        DepthField(BATCH_DEPTH, depth_key),
        *keys.fields(),
    ]


def chromosome_of_peak(adata: AnnData, chrom_key: str) -> np.ndarray | None:
    """Return the chromosome of each peak as text, from var or from the names; ``None`` if they carry none.

    Chromosomes with fewer than 32 peaks are merged into one group called "other".
    """
    if chrom_key in adata.var and not {VAR_START, VAR_END} <= set(adata.var):
        _validate.check_categorical(adata.var, chrom_key, where="adata.var")
        chromosomes = adata.var[chrom_key].astype(str).to_numpy().astype(str)
    else:
        frame = peak_coordinates(adata, chrom_key=chrom_key)
        if frame is None:
            return None
        chromosomes = frame[VAR_CHROM].to_numpy().astype(str)
    names, inverse, counts = np.unique(chromosomes, return_inverse=True, return_counts=True)
    small = counts[inverse] < MIN_PEAKS_OF_CHROMOSOME
    if small.any() and not small.all() and names.size > 1:
        chromosomes = np.where(small, OTHER_CHROMOSOMES, chromosomes)
    return chromosomes


def peak_blocks(encoder: str, n_peaks: int, chromosomes: np.ndarray | None) -> PeakBlocks:
    """Return the blocks of peaks of an encoder.

    Raises
    ------
    DataError
        If ``encoder="chromosome"`` and the peaks carry no chromosomes.
    """
    if encoder != "chromosome":
        return PeakBlocks.tiles(n_peaks)
    if chromosomes is None:
        message = (
            "encoder='chromosome' needs the chromosome of each peak, and neither var['chrom'] nor names such as "
            "'chr1:100-200' give it. Add var['chrom'], or use encoder='dense' (or 'linear' for few cells)."
        )
        raise DataError(message)
    # chromosomes in the order in which they first appear: ordered peaks stay where they are
    _, first, inverse = np.unique(chromosomes, return_index=True, return_inverse=True)
    rank = np.argsort(np.argsort(first))
    return PeakBlocks(rank[inverse])
