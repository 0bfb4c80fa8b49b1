"""The reference embedding of the cells: where it comes from, which cells have one, how much each leans on it."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np
from scvi.data.fields import MuDataWrapper, NumericalObsField, ObsmField

from epivi import _validate
from epivi._errors import DataError
from epivi._keys import OBS_ALIGN_WEIGHT, OBS_DEPTH, OBS_HAS_REFERENCE, OBS_RNA_DEPTH, OBSM_PCA, OBSM_REFERENCE
from epivi.data.sparse import modality_rows
from epivi.pp.reference import rna_reference

if TYPE_CHECKING:
    from anndata import AnnData
    from mudata import MuData

logger = logging.getLogger(__name__)

LOW, HIGH = "ratio_low", "ratio_high"
QUANTILES = (0.01, 0.99)
MIN_REFERENCED = 2
MIN_SPAN = 1e-9


class ReferenceSource:
    """Finds the reference embedding and the RNA depth of every cell of a MuData or AnnData.

    Parameters
    ----------
    modality
        RNA modality of a MuData; ``None`` for an AnnData that carries the reference itself.
    layer
        Layer of the RNA counts.
    reference_key
        Key of obsm that holds the embedding; ``None`` takes ``X_pca`` or computes it.
    rna_depth_key
        Column of obs with the RNA depth; ``None`` takes the sum of the RNA counts.
    atac
        ATAC modality of a MuData.
    """

    def __init__(
        self,
        modality: str | None,
        *,
        layer: str | None,
        reference_key: str | None,
        rna_depth_key: str | None,
        atac: str | None,
    ) -> None:
        self.modality = modality
        self.layer = layer
        self.reference_key = reference_key
        self.rna_depth_key = rna_depth_key
        self.atac = atac

    @property
    def where(self) -> str:
        """How messages call the object that carries the embedding."""
        return "adata" if self.modality is None else f"mdata['{self.modality}']"

    def is_in(self, data: AnnData | MuData) -> bool:
        """Whether the data carry a reference at all; a query may come without."""
        if self.modality is not None:
            return self.modality in data.mod and data.mod[self.modality].n_obs > 0
        return self.reference_key in data.obsm

    def check_keys(self, data: AnnData | MuData) -> None:
        """Check the names of embedding, layer and depth, before the counts are read.

        Raises
        ------
        DataError
            If one of them is missing; the nearest name is given.
        """
        if not self.is_in(data) and self.modality is not None:
            return
        holder = data if self.modality is None else data.mod[self.modality]
        for table, key in (("obsm", self.reference_key), ("layers", self.layer), ("obs", self.rna_depth_key)):
            if key is not None:
                _validate.check_key(getattr(holder, table), key, where=f"{self.where}.{table}")

    def store(self, data: AnnData | MuData, n_dimensions: int | None = None) -> None:
        """Write embedding, mask and RNA depth of every cell into ``data``, zeros where there is none.

        Parameters
        ----------
        data
            MuData or AnnData.
        n_dimensions
            Width to write if the data carry no reference.
        """
        if n_dimensions is not None and not self.is_in(data):
            data.obsm[OBSM_REFERENCE] = np.zeros((data.n_obs, n_dimensions), dtype=np.float32)
            data.obs[OBS_HAS_REFERENCE] = False
            data.obs[OBS_RNA_DEPTH] = 1.0
            return
        holder = data if self.modality is None else data.mod[self.modality]
        depth = self._depth(holder)
        values = self._embedding(holder)
        minimum = MIN_REFERENCED if n_dimensions is None else 0
        has = _validate.check_reference(
            values, where=f"{self.where} reference", obs_names=holder.obs_names, minimum=minimum
        )
        values = np.where(has[:, None], np.asarray(values, dtype=np.float32), np.float32(0.0))
        rows = None if self.modality is None else modality_rows(data, self.modality)
        if rows is not None:
            present = rows >= 0
            values = np.where(present[:, None], values[rows], np.float32(0.0))
            has, depth = has[rows] & present, np.where(present, depth[rows], 1.0)
        data.obsm[OBSM_REFERENCE] = np.ascontiguousarray(values)
        data.obs[OBS_HAS_REFERENCE] = has
        data.obs[OBS_RNA_DEPTH] = depth

    def _embedding(self, holder: AnnData) -> Any:
        """Return the embedding of the holder's cells as it was found, or computed principal components."""
        if self.reference_key is not None:
            _validate.check_key(holder.obsm, self.reference_key, where=f"{self.where}.obsm")
            return holder.obsm[self.reference_key]
        if OBSM_PCA in holder.obsm:
            logger.info("The reference embedding is %s.obsm['%s'].", self.where, OBSM_PCA)
            return holder.obsm[OBSM_PCA]
        if self.rna_depth_key is not None:
            self._counts(holder)  # with the RNA depth they were checked already
        logger.warning(
            "No reference embedding was given: 50 principal components of %s are computed by epivi.pp.rna_reference.",
            self.where,
        )
        computed: Any = rna_reference(holder, layer=self.layer, copy=True)
        values = np.asarray(computed.obsm[OBSM_PCA], dtype=np.float64)
        values[~values.any(axis=1)] = np.nan
        return values

    def _depth(self, holder: AnnData) -> np.ndarray:
        """RNA depth of each cell of the holder; cells without RNA counts count as one."""
        if self.rna_depth_key is not None:
            _validate.check_continuous(holder.obs, self.rna_depth_key, where=f"{self.where}.obs", positive=True)
            return holder.obs[self.rna_depth_key].to_numpy(dtype=np.float64)
        if self.modality is None:
            return np.full(holder.n_obs, np.nan)
        row_sums = self._counts(holder)
        if n_empty := int((row_sums == 0).sum()):
            logger.warning("%d cells of %s have no RNA count; their RNA depth counts as 1.", n_empty, self.where)
        return row_sums

    def _counts(self, holder: AnnData) -> np.ndarray:
        """Check the RNA counts and return their sum in each cell."""
        if self.layer is not None:
            _validate.check_key(holder.layers, self.layer, where=f"{self.where}.layers")
        matrix = holder.X if self.layer is None else holder.layers[self.layer]
        name = f"{self.where}.X" if self.layer is None else f"{self.where}.layers['{self.layer}']"
        if matrix is None or holder.n_vars == 0:
            message = f"{name} holds no counts: name the RNA depth of the cells with rna_depth_key=."
            raise DataError(message)
        others = {key: holder.layers[key] for key in holder.layers if key != self.layer}
        summary = _validate.check_counts(matrix, where=name, obs_names=holder.obs_names, alternatives=others)
        return np.asarray(summary.row_sums, dtype=np.float64)

    def log_ratio(self, data: AnnData | MuData) -> np.ndarray:
        """Return log(RNA depth / ATAC depth) of every cell, depths below one counting as one, NaN if unknown."""
        atac = data if self.atac is None else data.mod[self.atac]
        depth = atac.obs[OBS_DEPTH].to_numpy(dtype=np.float64)
        rows = None if self.atac is None else modality_rows(data, self.atac)
        depth = depth if rows is None else depth[rows]
        rna = data.obs[OBS_RNA_DEPTH].to_numpy(dtype=np.float64)
        return np.log(np.maximum(rna, 1.0)) - np.log(np.maximum(depth, 1.0))


class ReferenceField(ObsmField):
    """Reference embedding (cells × dimensions), zeros for cells without; a query may come without any.

    Parameters
    ----------
    registry_key
        Key in the registry and in the batch.
    source
        Where the embedding comes from.
    """

    def __init__(self, registry_key: str, source: ReferenceSource) -> None:
        super().__init__(registry_key, OBSM_REFERENCE)
        self.source = source

    def register_field(self, adata: Any) -> dict:
        """Store and register the embedding."""
        self.source.store(adata)
        return {self.COLUMN_NAMES_KEY: np.arange(adata.obsm[OBSM_REFERENCE].shape[1])}

    def transfer_field(self, state_registry: dict, adata_target: Any, **kwargs: Any) -> dict:  # noqa: ARG002
        """Store the embedding of other data; its width may differ, since only similarities are compared."""
        self.source.store(adata_target, n_dimensions=len(state_registry[self.COLUMN_NAMES_KEY]))
        return dict(state_registry)


class HasReferenceField(NumericalObsField):
    """Mask of the cells that have a reference, written by :class:`ReferenceField`."""

    def __init__(self, registry_key: str) -> None:
        super().__init__(registry_key, OBS_HAS_REFERENCE)


class AlignWeightField(NumericalObsField):
    r"""Alignment weight gamma of each cell: cells with poor ATAC relative to RNA lean on the reference more.

    :math:`\gamma_i = \mathrm{MinMax}[\log(\mathrm{depth}^{RNA}_i / \mathrm{depth}^{ATAC}_i)]`, the limits being the 1 %
    and 99 % quantiles over the referenced cells of the training data; queries use the same limits and are clamped.
    Cells without reference have weight 0. Where the RNA depth is not known, every referenced cell has weight 1.

    Parameters
    ----------
    registry_key
        Key in the registry and in the batch.
    source
        Where the depths come from.
    """

    def __init__(self, registry_key: str, source: ReferenceSource) -> None:
        super().__init__(registry_key, OBS_ALIGN_WEIGHT)
        self.source = source

    def register_field(self, adata: Any) -> dict:
        """Store the weights and register their limits."""
        ratio = self.source.log_ratio(adata)[adata.obs[OBS_HAS_REFERENCE].to_numpy(dtype=bool)]
        low, high = np.quantile(ratio, QUANTILES) if np.isfinite(ratio).all() else (np.nan, np.nan)
        state = {LOW: float(low), HIGH: float(high)}
        self._store(adata, state)
        return state

    def transfer_field(self, state_registry: dict, adata_target: Any, **kwargs: Any) -> dict:  # noqa: ARG002
        """Store the weights of other data by the limits of training."""
        self._store(adata_target, state_registry)
        return dict(state_registry)

    def _store(self, data: Any, state: dict) -> None:
        has = data.obs[OBS_HAS_REFERENCE].to_numpy(dtype=bool)
        weight = min_max(self.source.log_ratio(data), state[LOW], state[HIGH])
        data.obs[OBS_ALIGN_WEIGHT] = np.where(has, weight, 0.0)


def min_max(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Map [low, high] to [0, 1], clamped; one everywhere if the limits are equal or unknown.

    Examples
    --------
    >>> min_max(np.array([0.0, 1.0, 4.0]), 0.0, 2.0).tolist()
    [0.0, 0.5, 1.0]
    """
    if not high - low > MIN_SPAN:  # below it lies rounding alone
        return np.ones_like(values)
    return np.clip((values - low) / (high - low), 0.0, 1.0)


MuDataReferenceField = MuDataWrapper(ReferenceField)
MuDataHasReferenceField = MuDataWrapper(HasReferenceField)
MuDataAlignWeightField = MuDataWrapper(AlignWeightField)
