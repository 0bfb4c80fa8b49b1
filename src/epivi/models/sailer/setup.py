"""What SAILER asks of its data: checks, depth, and the blocks of peaks."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import numpy as np

from epivi import _validate
from epivi._errors import ConfigError, DataError, nearest
from epivi._keys import VAR_CHROM, VAR_END, VAR_START
from epivi.nn.linear import PeakBlocks
from epivi.pp.features import peak_coordinates

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    import pandas as pd
    from anndata import AnnData

MIN_PEAKS_OF_CHROMOSOME = 32
OTHER_CHROMOSOMES = "other"
TRANSFER = ("source_registry", "extend_categories", "allow_missing_labels")


def check_transfer(setup: Callable[..., None], transfer: Mapping[str, Any]) -> None:
    """Check that what a setup got beyond its arguments is what scvi-tools hands on to transfer a setup.

    Raises
    ------
    ConfigError
        If it holds anything else; the nearest argument is given.
    """
    for key in transfer:
        if key not in TRANSFER:
            known = inspect.signature(setup).parameters
            message = f"Unknown argument '{key}' of {setup.__name__}. {nearest(key, known)}"
            raise ConfigError(message)


def check_obs(
    obs: pd.DataFrame,
    *,
    where: str,
    batch_key: str | None,
    labels_key: str | None,
    categorical_keys: Sequence[str] | None,
    continuous_keys: Sequence[str] | None,
) -> None:
    """Check all columns of obs that a model reads.

    Raises
    ------
    DataError
        If a key is missing, or a column holds missing or unfit values.
    ConfigError
        If a key is named twice.
    """
    _validate.check_keys_distinct(batch_key, categorical_keys, continuous_keys)
    for key in (batch_key, labels_key, *(categorical_keys or ())):
        if key is not None:
            _validate.check_categorical(obs, key, where=where)
    for key in continuous_keys or ():
        _validate.check_continuous(obs, key, where=where)


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
