"""What torch modules of all models share: covariates, and the freezing of all but some columns of some weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

from scvi.module.base import BaseModuleClass
from torch import nn

from epivi.train.plan import IS_PARTLY_FROZEN

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from epivi.nn.covariates import Covariates


class EpiModule(BaseModuleClass):
    """Base of the torch modules: knows which weights read the covariates, and can be frozen but for new columns."""

    covariates: Covariates
    # whether the loss has a KL term, which the history of a training then tells
    has_elbo: bool = True

    def __init__(self) -> None:
        super().__init__()
        self.trainable_columns: dict[str, Tensor] | None = None

    @property
    def condition_weights(self) -> dict[str, int]:
        """Names of the weights that read the covariates, and the column at which the covariates start in each."""
        return {}

    @property
    def is_norm_frozen(self) -> bool:
        """Whether the batch normalisations keep their statistics in training."""
        return self.trainable_columns is not None

    def train(self, mode: bool = True) -> Self:  # noqa: FBT001, FBT002
        """Set the mode; frozen batch normalisations keep their statistics.

        Statistics of the minibatch would cancel the column of a query's only batch, which is constant over its cells.
        """
        super().train(mode)
        if self.is_norm_frozen:
            for part in self.modules():
                if isinstance(part, nn.BatchNorm1d):
                    part.eval()
        return self

    def freeze_but(self, columns: Mapping[str, Tensor]) -> None:
        """Freeze everything but some columns of some weights, and the statistics of all batch normalisations.

        Parameters
        ----------
        columns
            Mask of the columns to train, by name of the weight.
        """
        self.trainable_columns = dict(columns)
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(name in columns)
        weights: dict[str, Any] = dict(self.named_parameters())
        for name, is_new_k in columns.items():
            setattr(weights[name], IS_PARTLY_FROZEN, True)
            weights[name].register_hook(lambda grad, is_new_k=is_new_k: grad * is_new_k.to(grad))
