"""Registry fields: what epivi asks of AnnData and MuData beyond the fields of scvi-tools."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import sparse
from scvi.data.fields import (
    CategoricalJointObsField,
    CategoricalObsField,
    LayerField,
    MuDataWrapper,
    NumericalObsField,
)

from epivi import _validate
from epivi._errors import DataError, nearest
from epivi._keys import OBS_DEPTH, OBS_N_OPEN

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData

    from epivi._validate import CountSummary

logger = logging.getLogger(__name__)

INDEXER = "feature_indexer"
DENSITY = "density"
OPEN_PER_PEAK = "open_per_peak"
CHROMOSOMES = "chromosomes"
MEAN, SD = "mean", "sd"


class PeaksField(LayerField):
    """Counts of peaks (cells × peaks), checked value by value, matched to the trained peaks by name on transfer.

    Parameters
    ----------
    registry_key
        Key in the registry and in the batch.
    layer
        Layer that holds the counts; ``None`` stands for X.
    chromosomes
        Chromosome of each peak, kept with the registry; ``None`` if unknown.
    where
        How messages call the object, for example ``mdata['atac']``.
    """

    def __init__(
        self,
        registry_key: str,
        layer: str | None,
        *,
        chromosomes: np.ndarray | None = None,
        where: str = "adata",
    ) -> None:
        super().__init__(registry_key, layer, is_count_data=False, correct_data_format=False)
        self.where = f"{where}.X" if layer is None else f"{where}.layers['{layer}']"
        self.chromosomes = chromosomes

    def _checked(self, adata: AnnData) -> CountSummary:
        """Check the counts, say what is unusual, and return their summary."""
        others = {name: adata.layers[name] for name in adata.layers if name not in (None, self.attr_key)}
        summary = _validate.check_counts(
            self.get_field_data(adata), where=self.where, obs_names=adata.obs_names, alternatives=others
        )
        if n_empty := int((summary.n_open == 0).sum()):
            logger.warning(
                "%d of %d cells of %s have no open peak; their depth counts as 1. "
                "epivi.pp.filter_cells(adata, min_peaks=1) removes them.",
                n_empty,
                adata.n_obs,
                self.where,
            )
        if n_closed := int((summary.col_open == 0).sum()):
            logger.warning("%d of %d peaks of %s are open in no cell.", n_closed, adata.n_vars, self.where)
        return summary

    def register_field(self, adata: AnnData) -> dict:
        """Register peaks, their names and chromosomes, and the share of open entries; store the open peaks of cells."""
        summary = self._checked(adata)
        state = super().register_field(adata)
        adata.obs[OBS_N_OPEN] = summary.n_open.astype(np.float64)
        density = summary.nnz / (adata.n_obs * adata.n_vars)
        more = {DENSITY: density, OPEN_PER_PEAK: summary.nnz / adata.n_vars}
        return state | more | {CHROMOSOMES: self.chromosomes, INDEXER: None}

    def transfer_field(self, state_registry: dict, adata_target: AnnData, **kwargs: Any) -> dict:  # noqa: ARG002
        """Match the peaks of another object by name: permuted ones are reordered, missing ones are an error."""
        summary = self._checked(adata_target)
        trained = np.asarray(state_registry[self.COLUMN_NAMES_KEY])
        indexer = _validate.check_same_features(trained, adata_target.var_names, where=self.where)
        n_open = summary.n_open
        if indexer is not None:
            logger.info("Peaks of %s are not in the order of training: they are matched by name.", self.where)
            if indexer.size < adata_target.n_vars:
                n_open = open_peaks(self.get_field_data(adata_target), indexer)
        adata_target.obs[OBS_N_OPEN] = n_open.astype(np.float64)
        keys = (self.N_VARS_KEY, self.COLUMN_NAMES_KEY, DENSITY, OPEN_PER_PEAK, CHROMOSOMES)
        kept = {key: state_registry[key] for key in keys}
        return kept | {self.N_OBS_KEY: adata_target.n_obs, INDEXER: indexer}


def open_peaks(matrix: Any, columns: np.ndarray, chunk_rows: int = 4096) -> np.ndarray:
    """Return the number of non-zero entries of each row within some columns, shape (n,).

    Examples
    --------
    >>> open_peaks(np.array([[1, 0, 2], [0, 0, 3]]), np.array([0, 1])).tolist()
    [1, 0]
    """
    parts = [
        sparse.csr_matrix(matrix[start : start + chunk_rows] != 0)[:, columns]
        for start in range(0, matrix.shape[0], chunk_rows)
    ]
    return np.concatenate([np.asarray(part.sum(axis=1)).ravel() for part in parts])


class DepthField(NumericalObsField):
    """Depth of each cell; mean and standard deviation of its logarithm stay those of the training data.

    Parameters
    ----------
    registry_key
        Key in the registry and in the batch.
    depth_key
        The user's column of positive numbers; ``None`` takes the number of open peaks, or of whatever ``source`` holds.
    stored_key
        Column of obs in which the depth is stored.
    source_key
        Column to read if there is no ``depth_key``.
    where
        How messages call obs.
    """

    def __init__(
        self,
        registry_key: str,
        depth_key: str | None,
        *,
        stored_key: str = OBS_DEPTH,
        source_key: str = OBS_N_OPEN,
        where: str = "adata.obs",
    ) -> None:
        super().__init__(registry_key, stored_key)
        self.depth_key = depth_key
        self.source_key = source_key
        self.where = where

    def _store(self, adata: AnnData) -> np.ndarray:
        if self.depth_key is not None:
            _validate.check_continuous(adata.obs, self.depth_key, where=self.where, positive=True)
        values = adata.obs[self.depth_key or self.source_key].to_numpy(dtype=np.float64)
        adata.obs[self.attr_key] = values
        return values

    def register_field(self, adata: AnnData) -> dict:
        """Store the depth and register the moments of its logarithm (values below one count as one)."""
        logs = np.log(np.maximum(self._store(adata), 1.0))
        return {MEAN: float(logs.mean()), SD: float(logs.std()) or 1.0}

    def transfer_field(self, state_registry: dict, adata_target: AnnData, **kwargs: Any) -> dict:  # noqa: ARG002
        """Store the depth of another object; the moments stay those of training."""
        self._store(adata_target)
        return dict(state_registry)


class CategoryField(CategoricalObsField):
    """A categorical obs column; a category unknown to the trained model is named together with the remedy."""

    def transfer_field(
        self, state_registry: dict, adata_target: AnnData, *, extend_categories: bool = False, **kwargs: Any
    ) -> dict:
        """Match categories with those of training; ``extend_categories`` admits new ones (query mapping)."""
        known = [str(c) for c in state_registry[self.CATEGORICAL_MAPPING_KEY]]
        if not self.is_default and not extend_categories:
            column: pd.Series = adata_target.obs[self._original_attr_key]
            if unknown := sorted(set(column.astype(str)) - set(known)):
                message = (
                    f"obs['{self._original_attr_key}'] holds {unknown[:5]}, unknown to the trained model. "
                    f"{nearest(unknown[0], known)} New batches are mapped with load_query_data()."
                )
                raise DataError(message)
        return super().transfer_field(state_registry, adata_target, extend_categories=extend_categories, **kwargs)


class JointCategoryField(CategoricalJointObsField):
    """Further categorical obs columns; a category unknown to the trained model is named with those that it knows."""

    def transfer_field(
        self, state_registry: dict, adata_target: AnnData, *, extend_categories: bool = False, **kwargs: Any
    ) -> dict:
        """Match categories with those of training; ``extend_categories`` admits new ones (query mapping)."""
        for key in self.attr_keys:
            _validate.check_key(adata_target.obs, key, where="obs")
            known = np.asarray(state_registry[self.MAPPINGS_KEY][key]).tolist()
            found = adata_target.obs[key].unique().tolist()
            # 1 and "1" are different categories here
            unknown = [] if extend_categories else sorted(set(found) - set(known), key=str)
            if unknown:
                message = (
                    f"obs['{key}'] holds {unknown[:5]}, unknown to the trained model, which has {known[:10]}"
                    f"{f' and {len(known) - 10} more' if len(known) > 10 else ''}. "
                    "New categories are mapped with load_query_data()."
                )
                raise DataError(message)
        return super().transfer_field(state_registry, adata_target, extend_categories=extend_categories, **kwargs)


MuDataPeaksField = MuDataWrapper(PeaksField)
MuDataDepthField = MuDataWrapper(DepthField)
MuDataCategoryField = MuDataWrapper(CategoryField)
MuDataJointCategoryField = MuDataWrapper(JointCategoryField)
