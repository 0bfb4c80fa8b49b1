"""The torch module of CANDI: masks and thinning, four loss terms, prediction for given masks and covariates.

Legend of shapes: b windows of the batch, a assays, l bins, t latent positions, d width, k covariates, g bp.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from scvi.module.base import LossOutput, auto_move_data

from epivi import _keys as keys
from epivi.data.masking import (
    draw_thinning,
    drop_covariates,
    hide_assays,
    mix_pairs,
    partners,
    swap_assays,
)
from epivi.models.base_module import EpiModule
from epivi.objectives.experiments import gaussian_nll, masked_mean, negative_binomial_nll, thin

if TYPE_CHECKING:
    from torch import Tensor

    from epivi.models.candi.config import CandiConfig
    from epivi.models.candi.network import CandiNetwork, CandiOutputs


N_KNOTS = 129


class CovariateScales(NamedTuple):
    """How continuous covariates are standardised.

    Attributes
    ----------
    mean, sd
        Of the training experiments, shape (k,).
    depth, coverage
        Which covariate is log2 depth, and which is coverage; ``None`` where there is none.
    """

    mean: Tensor
    sd: Tensor
    depth: int | None
    coverage: int | None


class CandiModule(EpiModule):
    """Encoder of masked experiments, decoder at wanted covariates, negative binomial and Gaussian likelihoods.

    Parameters
    ----------
    config
        Choices of network and loss.
    network
        The network.
    scales
        How covariates are standardised.
    """

    has_elbo = False

    covariate_mean: Tensor
    covariate_sd: Tensor
    recalibration_knots: Tensor
    recalibration: Tensor
    is_recalibrated: Tensor

    def __init__(self, config: CandiConfig, network: CandiNetwork, scales: CovariateScales) -> None:
        super().__init__()
        self.config = config
        self.network = network
        self.depth_index, self.coverage_index = scales.depth, scales.coverage
        self.register_buffer("covariate_mean", scales.mean.float())
        self.register_buffer("covariate_sd", scales.sd.float())
        # correction of the laws' probabilities: at which predicted probability each calibrated one lies
        knots = torch.sin(torch.linspace(0.0, torch.pi / 2, N_KNOTS, dtype=torch.float64)) ** 2
        self.register_buffer("recalibration_knots", knots)
        self.register_buffer("recalibration", knots.repeat(len(network.heads), network.n_assays, 1))
        self.register_buffer("is_recalibrated", torch.tensor(data=False))

    @property
    def input_kind(self) -> str:
        """What the encoder reads: ``"counts"`` or ``"signal"``."""
        return self.config.input

    def standardised(self, continuous_bak: Tensor) -> Tensor:
        """Return continuous covariates in units of the training data's standard deviation; NaN stays NaN."""
        return (continuous_bak - self.covariate_mean) / self.covariate_sd

    def transformed(self, values_bla: Tensor) -> Tensor:
        """Return what the encoder reads of counts, log(1 + x), or of the signal, as it is."""
        return values_bla.log1p() if self.input_kind == "counts" else values_bla

    def thinned_covariates(self, continuous_bak: Tensor, factor_ba: Tensor) -> Tensor:
        """Return raw covariates of thinned experiments: log2 depth falls by log2 of the factor, coverage is unknown."""
        if (factor_ba == 1).all():
            return continuous_bak
        continuous_bak = continuous_bak.clone()
        if self.depth_index is not None:
            continuous_bak[:, :, self.depth_index] -= factor_ba.log2()
        if self.coverage_index is not None:
            coverage_ba = continuous_bak[:, :, self.coverage_index]
            coverage_ba[factor_ba > 1] = torch.nan
        return continuous_bak

    def forward(self, tensors: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        """Return what scvi-tools expects of a step; in training, biosamples are mixed first if the model is to."""
        if self.training and self.config.mixup:
            tensors = mix_pairs(tensors, self.config.mixup, depth=self.depth_index, coverage=self.coverage_index)
        return super().forward(tensors, *args, **kwargs)

    def _get_inference_input(self, tensors: dict[str, Tensor], **kwargs: Any) -> dict[str, Any]:  # noqa: ARG002
        available_ba = tensors[f"available_{self.input_kind}"]
        values_bla = tensors[self.input_kind]
        hidden_ba = hide_assays(available_ba)
        if self.config.hide_all_rate:
            is_blind_b1 = (torch.rand(available_ba.shape[0], 1) < self.config.hide_all_rate).to(available_ba.device)
            hidden_ba = torch.where(is_blind_b1, available_ba, hidden_ba)
        continuous_bak = tensors[keys.BATCH_CONTINUOUS]
        if self.input_kind == "counts":
            shape = available_ba.shape if self.config.thin_each_assay else (available_ba.shape[0], 1)
            factor_ba = draw_thinning(shape, self.config.thinning, available_ba.device).expand_as(available_ba)
            values_bla = thin(values_bla, (1.0 / factor_ba)[:, None, :].expand_as(values_bla))
            continuous_bak = self.thinned_covariates(continuous_bak, factor_ba)
        shown_ba = available_ba * (1.0 - hidden_ba)
        inputs = {
            "values": values_bla,
            "mask": shown_ba,
            "continuous": continuous_bak,
            "categorical": tensors[keys.BATCH_CATEGORICAL],
            "bin_mask": tensors[keys.BATCH_BIN_MASK],
            "dna": tensors.get(keys.BATCH_DNA),
            "prior": tensors.get(keys.BATCH_PRIOR),
            "has_prior": tensors.get(keys.BATCH_HAS_PRIOR),
        }
        if self.training and (rate := self.config.swap_rate):
            partner_b = partners(tensors[keys.BATCH_WINDOW])
            swapped_ba = swap_assays(shown_ba, available_ba, partner_b, rate)
            for name in ("values", "continuous", "categorical"):
                own: Any = inputs[name]
                is_swapped = swapped_ba[:, None] if name == "values" else swapped_ba[:, :, None]
                inputs[name] = torch.where(is_swapped, own[partner_b], own)
        return inputs

    @auto_move_data
    def inference(  # noqa: PLR0913
        self,
        values: Tensor,
        mask: Tensor,
        continuous: Tensor,
        categorical: Tensor,
        bin_mask: Tensor,
        dna: Tensor | None = None,
        prior: Tensor | None = None,
        has_prior: Tensor | None = None,
        *,
        deterministic: bool = False,  # noqa: ARG002
    ) -> dict[str, Any]:
        """Return the latent of the windows, shape (b, t, d), what the encoder was shown, and its input.

        Dropout of the transformer is the only noise; the latent itself is not drawn.
        """
        values_bla = self.transformed(values)
        inputs_blc = self.network.inputs(values_bla, mask, prior, has_prior)
        mask_bl = None if bool(bin_mask.all()) else bin_mask
        z_btd = self.network.encode(
            values_bla,
            mask,
            self.standardised(continuous),
            categorical,
            dna,
            prior,
            has_prior,
            inputs_blc=inputs_blc,
            bin_mask_bl=mask_bl,
        )
        # they enter again before the heads
        kept = inputs_blc if self.config.skip else None
        return {"z": z_btd, "mask": mask, "bin_mask": mask_bl, "inputs": kept}

    def _get_generative_input(
        self,
        tensors: dict[str, Tensor],
        inference_outputs: dict[str, Any],
        **kwargs: Any,  # noqa: ARG002
    ) -> dict[str, Any]:
        continuous_bak, categorical_bak = tensors[keys.BATCH_CONTINUOUS], tensors[keys.BATCH_CATEGORICAL]
        if self.training and (rate := self.config.covariate_dropout_rate):
            # what is unknown of an assay to impute must have been seen unknown
            continuous_bak, categorical_bak = drop_covariates(continuous_bak, categorical_bak, rate)
        return {
            **{name: inference_outputs[name] for name in ("z", "inputs", "bin_mask")},
            "continuous": continuous_bak,
            "categorical": categorical_bak,
            "log_depth_ratio": tensors[keys.BATCH_LOG_DEPTH_RATIO],
            "prior": tensors.get(keys.BATCH_PRIOR),
            "has_prior": tensors.get(keys.BATCH_HAS_PRIOR),
        }

    @auto_move_data
    def generative(
        self,
        z: Tensor,
        continuous: Tensor,
        categorical: Tensor,
        log_depth_ratio: Tensor,
        prior: Tensor | None = None,
        has_prior: Tensor | None = None,
        inputs: Tensor | None = None,
        bin_mask: Tensor | None = None,
    ) -> dict[str, Any]:
        """Return the parameters of the predicted laws at the wanted covariates, under ``"outputs"``.

        The mean of counts is multiplied by depth over the reference depth (C8); the published head has no such factor.
        """
        outputs: CandiOutputs = self.network.decode(
            z,
            self.standardised(continuous),
            categorical,
            prior,
            has_prior,
            inputs_blc=inputs,
            bin_mask_bl=bin_mask,
        )
        if outputs.log_mean_bla is not None and self.config.has_depth_offset:
            outputs = outputs._replace(log_mean_bla=outputs.log_mean_bla + log_depth_ratio[:, None, :])
        return {"outputs": outputs}

    def nll(self, tensors: dict[str, Tensor], outputs: CandiOutputs, kind: str) -> Tensor:
        """Return the negative log-likelihood of the counts or of the signal in nats, shape (b, l, a)."""
        parameters: Any = outputs
        if kind == "counts":
            return negative_binomial_nll(tensors["counts"], parameters.log_mean_bla, parameters.log_theta_bla)
        return gaussian_nll(tensors["signal"], parameters.mean_bla, parameters.variance_bla)

    def loss(
        self,
        tensors: dict[str, Tensor],
        inference_outputs: dict[str, Any],
        generative_outputs: dict[str, Any],
        *,
        kl_weight: float = 1.0,  # noqa: ARG002
    ) -> LossOutput:
        """Return the sum (C7) of up to four terms, each the mean over its entries.

        Imputation terms are over assays that were hidden, upsampling terms over those that the encoder was shown. The
        target is always the sample's own track, of assays shown of another biosample too.
        """
        shown_ba = inference_outputs["mask"]
        terms: dict[str, Tensor] = {}
        for kind in self.network.heads:
            available_ba = tensors[f"available_{kind}"]
            nll_bla = self.nll(tensors, generative_outputs["outputs"], kind)
            for task, of_task_ba in (("imputation", 1.0 - shown_ba), ("upsampling", shown_ba)):
                mask_bla = (available_ba * of_task_ba)[:, None, :] * tensors[keys.BATCH_BIN_MASK][:, :, None]
                terms[f"{kind}_{task}"] = masked_mean(nll_bla, mask_bla)
        weights = self._weights(shown_ba, tensors[f"available_{self.input_kind}"])
        total = torch.stack([weights[name.split("_")[1]] * value for name, value in terms.items()]).sum()
        n = shown_ba.shape[0]
        return LossOutput(
            loss=total,
            reconstruction_loss=total.detach().expand(n),
            kl_local=torch.zeros(n, device=total.device),
            extra_metrics={name: value.detach() for name, value in terms.items()},
            n_obs_minibatch=n,
        )

    def _weights(self, shown_ba: Tensor, available_ba: Tensor) -> dict[str, Tensor | float]:
        """Return the weights of the tasks: 1, or the shares of hidden and shown assays among the available ones."""
        if self.config.loss_weighting == "equal":
            return {"imputation": 1.0, "upsampling": 1.0}
        share = 1.0 - shown_ba.sum() / available_ba.sum().clamp_min(1.0)
        return {"imputation": share, "upsampling": 1.0 - share}
