"""Registry fields: what epivi asks of AnnData and MuData beyond the fields of scvi-tools."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np
from scvi.data.fields import CategoricalObsField, LayerField, MuDataWrapper, NumericalObsField, ObsmField

from epivi import _validate
from epivi._errors import DataError, nearest

if TYPE_CHECKING:
    import pandas as pd
    from anndata import AnnData
    from mudata import MuData

    from epivi._validate import CountSummary

logger = logging.getLogger(__name__)

INDEXER = "feature_indexer"
DENSITY = "density"
MEAN, SD = "mean", "sd"


class PeaksField(LayerField):
    """Counts of peaks (cells × peaks), checked value by value, matched to the trained peaks by name on transfer.

    Parameters
    ----------
    registry_key
        Key in the registry and in the batch.
    layer
        Layer that holds the counts; ``None`` stands for X.
    where
        How messages call the object, for example ``mdata['atac']``.
    """

    def __init__(self, registry_key: str, layer: str | None, *, where: str = "adata") -> None:
        super().__init__(registry_key, layer, is_count_data=False, correct_data_format=False)
        self.where = where if layer is None else f"{where}.layers['{layer}']"
        if layer is None:
            self.where = f"{where}.X"

    def counts(self, adata: AnnData) -> CountSummary:
        """Check the counts and return their summary."""
        others = {name: adata.layers[name] for name in adata.layers if name != self.attr_key}
        return _validate.check_counts(
            self.get_field_data(adata), where=self.where, obs_names=adata.obs_names, alternatives=others
        )

    def register_field(self, adata: AnnData) -> dict:
        """Register peaks, their names and the share of open entries."""
        summary = self.counts(adata)
        state = super().register_field(adata)
        return state | {DENSITY: summary.nnz / (adata.n_obs * adata.n_vars), INDEXER: None}

    def transfer_field(self, state_registry: dict, adata_target: AnnData, **kwargs: Any) -> dict:  # noqa: ARG002
        """Match the peaks of another object by name: permuted ones are reordered, missing ones are an error."""
        self.counts(adata_target)
        trained = np.asarray(state_registry[self.COLUMN_NAMES_KEY])
        indexer = _validate.check_same_features(trained, adata_target.var_names, where=self.where)
        if indexer is not None:
            logger.info("Peaks of %s are in another order than in training: they are reordered by name.", self.where)
        kept = {key: state_registry[key] for key in (self.N_VARS_KEY, self.COLUMN_NAMES_KEY, DENSITY)}
        return kept | {self.N_OBS_KEY: adata_target.n_obs, INDEXER: indexer}


class LogMomentsField(NumericalObsField):
    """A positive obs column; mean and standard deviation of its logarithm stay those of the training data."""

    def register_field(self, adata: AnnData) -> dict:
        """Register the column and the moments of its logarithm (values below one count as one)."""
        super().register_field(adata)
        values = np.log(np.maximum(adata.obs[self.attr_key].to_numpy(dtype=np.float64), 1.0))
        return {MEAN: float(values.mean()), SD: float(values.std()) or 1.0}

    def transfer_field(self, state_registry: dict, adata_target: AnnData, **kwargs: Any) -> dict:  # noqa: ARG002
        """Keep the moments of the training data."""
        self.validate_field(adata_target)
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


class ReferenceField(ObsmField):
    """Reference embedding of the cells (cells × dimensions); it may be absent in a query."""

    def register_field(self, adata: MuData | AnnData) -> dict:
        """Register the embedding as a float array."""
        return {self.COLUMN_NAMES_KEY: np.arange(adata.obsm[self.attr_key].shape[1])}

    def transfer_field(self, state_registry: dict, adata_target: MuData | AnnData, **kwargs: Any) -> dict:  # noqa: ARG002
        """Accept a query whose embedding has other dimensions: similarities are compared, not coordinates."""
        return self.register_field(adata_target) | {"trained": len(state_registry[self.COLUMN_NAMES_KEY])}


MuDataPeaksField = MuDataWrapper(PeaksField)
MuDataLogMomentsField = MuDataWrapper(LogMomentsField)
MuDataCategoryField = MuDataWrapper(CategoryField)
MuDataReferenceField = MuDataWrapper(ReferenceField)
