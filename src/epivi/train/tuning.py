"""What the search of scvi.autotune asks of a model: its flag in the constructor, and embeddings to score."""

from __future__ import annotations

from functools import wraps
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from scvi import REGISTRY_KEYS

from epivi._errors import ConfigError
from epivi.train.keeping import copy_weights

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from epivi.train.plan import TrainingPlan

# given by scvi.autotune to the constructor where it will ask for embeddings
FLAG = "extra_payload_autotune"


def takes_flag(start: Callable[..., None]) -> Callable[..., None]:
    """Return a constructor that lets the flag of scvi.autotune pass: models of epivi need not be told.

    Parameters
    ----------
    start
        The ``__init__`` of a model.

    Examples
    --------
    >>> class Model:
    ...     @takes_flag
    ...     def __init__(self, width):
    ...         self.width = width
    >>> Model(3, extra_payload_autotune=True).width
    3
    """

    @wraps(start)
    def started(self: Any, *args: Any, **kwargs: Any) -> None:
        kwargs.pop(FLAG, None)
        start(self, *args, **kwargs)

    return started


def embeddings_to_score(model: Any, plan: TrainingPlan, stage: str, *, restore_best: bool) -> dict[str, Tensor]:
    """Return latents, batches and labels of the cells of a stage, as scvi.autotune passes them to scib-metrics.

    scvi-tools gathers the sampled latents of every step of every epoch; here they are posterior means under the weights
    that the training will return.

    Parameters
    ----------
    model
        The model in training.
    plan
        Its plan; at the end of the training the best weights are used if they will be kept.
    stage
        ``"training"`` or ``"validation"``: whose cells.
    restore_best
        Whether the training ends with its best weights.

    Returns
    -------
    ``z``, shape (n, d), ``batch`` and ``labels``, shape (n,).

    Raises
    ------
    ConfigError
        If the setup has no labels, or the model no latent of cells.
    """
    rows = model.train_indices if stage == "training" else model.validation_indices
    labels = _codes(model, REGISTRY_KEYS.LABELS_KEY)
    if labels is None or len(np.unique(labels)) < 2:
        message = f"Metrics of scIB need cell types: give labels_key to the setup of {type(model).__name__}."
        raise ConfigError(message)
    batch = _codes(model, REGISTRY_KEYS.BATCH_KEY)
    z_nd = _latent(model, plan, rows, use_best=restore_best and stage == "training")
    return {
        "z": torch.as_tensor(z_nd),
        "batch": torch.as_tensor(np.zeros_like(labels) if batch is None else batch)[rows],
        "labels": torch.as_tensor(labels)[rows],
    }


def _codes(model: Any, key: str) -> np.ndarray | None:
    """Return the codes of a column of the setup, None where the model registers none."""
    if key not in model.registry["field_registries"]:
        return None
    return model._registered(key)


def _latent(model: Any, plan: TrainingPlan, rows: np.ndarray, *, use_best: bool) -> np.ndarray:
    """Return the latent of some cells under the current or the best weights, and put everything back."""
    best = plan.keeper.best_weights if use_best and plan.keeper is not None else None
    current = copy_weights(model.module) if best is not None else None
    was_training, was_trained = model.module.training, model.is_trained_
    try:
        if best is not None:
            model.module.load_state_dict(best)
        model.module.eval()
        model.is_trained_ = True
        return np.asarray(model.get_latent_representation(indices=rows))
    finally:
        if current is not None:
            model.module.load_state_dict(current)
        model.module.train(was_training)
        model.is_trained_ = was_trained
