"""Mapping query data with new batches onto a trained model."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Self

import torch

from epivi.models.base import EpiModel
from epivi.models.base_saving import plain

if TYPE_CHECKING:
    from pathlib import Path

    from anndata import AnnData
    from mudata import MuData
    from torch import Tensor

    from epivi.models.base_module import EpiModule


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
            Query data with the same features and the same obs columns.
        reference_model
            A trained model, or the folder of a saved one; it stays as it is.
        unfrozen
            Train all weights. By default the encoder is frozen with its statistics, so that latents of reference cells
            do not change, and only the weights that read new batches are trained.

        Returns
        -------
        A model on the query data; call ``train`` to fit the new batches (for latents alone this is not needed).

        Raises
        ------
        DataError
            If features of the reference are missing in the query.
        ConfigError
            If ``reference_model`` is no model of this class.
        """
        reference_model = cls._reference(reference_model)
        registry = copy.deepcopy(plain(reference_model.registry))
        model = cls._from_registry(registry, reference_model.init_arguments, adata, extend_categories=True)
        state, new = _widened(model.module, reference_model.module)
        model.module.load_state_dict(state)
        if not unfrozen:
            model.module.freeze_but(new)
        model.is_trained_ = True
        model.module.eval()
        return model


def _widened(module: EpiModule, reference: EpiModule) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the state of a reference with zeros for new columns, and the columns of new categories of each weight.

    The only category of a covariate has no column in the reference; here it gets one of zeros that stays, so that its
    cells keep their outputs.
    """
    state = {key: value.clone() for key, value in reference.state_dict().items()}
    kept = torch.tensor(module.covariates.columns_of(reference.covariates), dtype=torch.long)
    known = torch.tensor(module.covariates.known_columns(reference.covariates), dtype=torch.long)
    weights = dict(module.named_parameters())
    new = {}
    for key, start in module.condition_weights.items():
        is_new_k = torch.zeros(weights[key].shape[1], dtype=torch.bool)
        is_new_k[start : start + module.covariates.n_columns] = True
        is_new_k[start + kept] = False
        widened = torch.zeros_like(weights[key], device=state[key].device)
        widened[:, ~is_new_k] = state[key]
        state[key] = widened
        is_new_k[start + known] = False
        if is_new_k.any():
            new[key] = is_new_k
    return state, new
