"""The torch module of SAILERX: that of SAILER and the alignment to the reference.

Legend of shapes: b cells of the batch, d latent dimensions, r dimensions of the reference.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from scvi.module.base import LossOutput, auto_move_data
from torch import nn
from torch.distributions import Normal

from epivi._errors import DataError
from epivi._keys import BATCH_ALIGN_WEIGHT, BATCH_HAS_REFERENCE, BATCH_REFERENCE
from epivi.models.sailer.module import SailerModule
from epivi.nn.experts import product_of_experts
from epivi.nn.mlp import ReferenceExpert
from epivi.objectives.alignment import alignment_loss

if TYPE_CHECKING:
    from torch import Tensor

KEEP_REFERENCE = 0.5


class SailerxModule(SailerModule):
    """SAILER whose posterior means keep the similarities of a reference embedding.

    Parameters
    ----------
    n_reference
        Dimensions of the reference; needed if ``config.fuse_reference``.
    args, kwargs
        As in :class:`~epivi.models.sailer.module.SailerModule`.
    """

    def __init__(self, *args: Any, n_reference: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.align_scale = self.config.align_weight * self.blocks.n_peaks
        self.expert: nn.Module | None = None
        self.n_reference = n_reference
        if self.config.fuse_reference:
            self.expert = ReferenceExpert(n_reference, self.config.n_latent)

    def _get_inference_input(self, tensors: dict[str, Tensor], **kwargs: Any) -> dict[str, Any]:
        inputs = super()._get_inference_input(tensors, **kwargs)
        if self.expert is not None:
            self._check_width(tensors[BATCH_REFERENCE].shape[1])
            inputs |= {"reference_br": tensors[BATCH_REFERENCE], "has_b": tensors[BATCH_HAS_REFERENCE][:, 0]}
        return inputs

    def _check_width(self, found: int) -> None:
        """Refuse another reference than that on which the expert was trained."""
        if found != self.n_reference:
            message = (
                f"The reference has {found} dimensions, and fuse_reference=True needs that of training, with "
                f"{self.n_reference}. Compute it as for the training data, or remove it: the cells are then embedded "
                "by their ATAC alone."
            )
            raise DataError(message)

    @auto_move_data
    def inference(
        self,
        indptr: Tensor,
        indices: Tensor,
        reference_br: Tensor | None = None,
        has_b: Tensor | None = None,
        counts: Tensor | None = None,
        *,
        deterministic: bool = False,
    ) -> dict[str, Any]:
        """Return the posterior; with ``fuse_reference`` that of cells with a reference is a product of two experts.

        In training each reference is hidden with probability 1/2, so that the ATAC expert learns to stand alone.
        """
        outputs = super().inference(indptr, indices, counts, deterministic=deterministic)
        if self.expert is None or reference_br is None or has_b is None:
            return outputs
        if self.training:
            has_b = has_b * (torch.rand_like(has_b) < KEEP_REFERENCE)
        expert_mean_bd, expert_logvar_bd = self.expert(reference_br)
        mean_bd, logvar_bd = product_of_experts(
            torch.stack([outputs["mean_bd"], expert_mean_bd], dim=1),
            torch.stack([outputs["logvar_bd"], expert_logvar_bd], dim=1),
            torch.stack([torch.ones_like(has_b), has_b], dim=1),
            prior=False,
        )
        sd_bd = (0.5 * logvar_bd).exp()
        z_bd = mean_bd if deterministic else mean_bd + sd_bd * torch.randn_like(mean_bd)
        qz = Normal(mean_bd, sd_bd, validate_args=False)
        return outputs | {"z": z_bd, "qz": qz, "mean_bd": mean_bd, "logvar_bd": logvar_bd}

    def loss(
        self,
        tensors: dict[str, Tensor],
        inference_outputs: dict[str, Any],
        generative_outputs: dict[str, Tensor],
        *,
        kl_weight: float = 1.0,
    ) -> LossOutput:
        """Return the loss of SAILER plus A L_align (equation 3.5), A = ``align_weight`` × number of peaks."""
        output = super().loss(tensors, inference_outputs, generative_outputs, kl_weight=kl_weight)
        align_loss = alignment_loss(
            inference_outputs["mean_bd"],
            tensors[BATCH_REFERENCE],
            tensors[BATCH_ALIGN_WEIGHT][:, 0],
            tensors[BATCH_HAS_REFERENCE].sum(),
        )
        return LossOutput(
            loss=output.loss + self.align_scale * align_loss,
            reconstruction_loss=output.reconstruction_loss,
            kl_local=output.kl_local,
            extra_metrics=output.extra_metrics | {"align_loss": align_loss.detach()},
            n_obs_minibatch=output.n_obs_minibatch,
        )
