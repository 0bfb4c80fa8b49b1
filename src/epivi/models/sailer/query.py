"""Mapping query data with new batches onto a trained model."""

from __future__ import annotations

import copy
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import pandas as pd
import torch
from scipy import sparse

from epivi._errors import ConfigError, DataError
from epivi.models.base import EpiModel
from epivi.models.base_saving import plain
from epivi.train.plan import IS_PARTLY_FROZEN

if TYPE_CHECKING:
    from anndata import AnnData
    from mudata import MuData
    from torch import Tensor

    from epivi.models.sailer.module import SailerModule

logger = logging.getLogger(__name__)

MIN_SHARE = 0.8


class QueryMixin(EpiModel):
    """Query mapping in the manner of scArches: only the weights of the new batches are trained."""

    @classmethod
    def load_query_data(
        cls,
        adata: AnnData | MuData,
        reference_model: Self | str | Path,
        *,
        unfrozen: bool = False,
    ) -> Self:
        """Return a model for query data, whose batches may be new.

        Parameters
        ----------
        adata
            Query data with the same peaks (see :meth:`prepare_query_anndata`) and the same obs columns.
        reference_model
            A trained model, or the folder of a saved one; it stays as it is.
        unfrozen
            Train all weights. By default the encoder is frozen with its statistics, so that latents of reference cells
            do not change, and only the decoder's weights of new batches are trained.

        Returns
        -------
        A model on the query data; call ``train`` to fit the new batches (for latents alone this is not needed).

        Raises
        ------
        DataError
            If peaks of the reference are missing in the query.
        """
        if isinstance(reference_model, str | Path):
            reference_model = cls.load(reference_model, adata=False)
        if not isinstance(reference_model, cls):
            message = f"reference_model must be a {cls.__name__} or its folder, found {type(reference_model).__name__}."
            raise ConfigError(message)
        registry = copy.deepcopy(plain(reference_model.registry))
        model = cls._from_registry(registry, reference_model.init_arguments, adata, extend_categories=True)
        state = {key: value.clone() for key, value in reference_model.module.state_dict().items()}
        weight = model.module.decoder.condition_layer.weight
        key = next(k for k, v in model.module.named_parameters() if v is weight)
        is_new_k = _new_columns(model.module, reference_model.module)
        widened = torch.zeros_like(weight, device=state[key].device)
        widened[:, ~is_new_k] = state[key]
        state[key] = widened
        model.module.load_state_dict(state)
        if not unfrozen:
            _freeze(model.module, key, is_new_k)
        model.is_trained_ = True
        model.module.eval()
        return model

    @classmethod
    def prepare_query_anndata(cls, adata: AnnData, reference_model: Self | str | Path) -> AnnData:
        """Return query data with exactly the peaks of the model: reordered by name, absent ones padded with zeros.

        Parameters
        ----------
        adata
            Query data of peaks.
        reference_model
            A trained model, or the folder of a saved one.

        Raises
        ------
        DataError
            If the query shares no peak with the model.
        """
        import anndata

        if isinstance(reference_model, str | Path):
            reference_model = cls.load(reference_model, adata=False)
        names = pd.Index(reference_model.feature_names)
        positions = adata.var_names.get_indexer(names)
        found = positions >= 0
        if not found.any():
            message = (
                f"The query shares none of its {adata.n_vars} peaks with the {names.size} of the model. Peak sets must "
                "be counted on the same regions: count the query's fragments in the peaks of the reference."
            )
            raise DataError(message)
        if found.mean() < MIN_SHARE:
            logger.warning("Only %.0f %% of the model's peaks are in the query; the rest is zero.", 100 * found.mean())
        select = sparse.csr_matrix(
            (np.ones(found.sum(), dtype=np.float32), (positions[found], np.flatnonzero(found))),
            shape=(adata.n_vars, names.size),
        )
        layers = {key: sparse.csr_matrix(adata.layers[key]) @ select for key in adata.layers if key is not None}
        matrix = sparse.csr_matrix(adata.X) @ select if adata.X is not None else None
        return anndata.AnnData(matrix, obs=adata.obs.copy(), var=pd.DataFrame(index=names), layers=layers)


def _new_columns(module: SailerModule, reference: SailerModule) -> Tensor:
    """Mask of the columns of the condition layer that the reference lacks: new batches and other new categories."""
    is_new_k = torch.zeros(module.decoder.condition_layer.weight.shape[1], dtype=torch.bool)
    if module.config.use_covariates:
        is_new_k[module.config.n_latent :] = True
        kept = torch.tensor(module.covariates.columns_of(reference.covariates))
        is_new_k[module.config.n_latent + kept] = False
    return is_new_k


def _freeze(module: SailerModule, key: str, is_new_k: Tensor) -> None:
    """Freeze everything but the new columns of one weight, and the statistics of all batch normalisations."""
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name == key)
    module.is_norm_frozen = True
    weight: Any = dict(module.named_parameters())[key]
    setattr(weight, IS_PARTLY_FROZEN, True)
    weight.register_hook(lambda grad: grad * is_new_k.to(grad))
