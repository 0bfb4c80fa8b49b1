"""The torch module of SAILER.

Legend of shapes: b cells of the batch, p peaks, o non-zeros, d latent dimensions, k covariates.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from scvi import REGISTRY_KEYS
from scvi.module.base import LossOutput, auto_move_data
from torch.distributions import Normal

from epivi._keys import BATCH_DEPTH, BATCH_INDICES, BATCH_INDPTR
from epivi.models.base_module import EpiModule
from epivi.nn.mlp import ChromosomeDecoder, ChromosomeEncoder, DenseDecoder, DenseEncoder, LinearDecoder, LinearEncoder
from epivi.objectives.invariance import kl_standard_normal, mixture_information, pairwise_kl
from epivi.objectives.likelihoods import calibrate, weighted_bernoulli

if TYPE_CHECKING:
    from torch import Tensor

    from epivi.models.sailer.config import SailerConfig
    from epivi.nn.covariates import DecoderCovariates
    from epivi.nn.linear import PeakBlocks

NETWORKS = {
    "chromosome": (ChromosomeEncoder, ChromosomeDecoder),
    "dense": (DenseEncoder, DenseDecoder),
    "linear": (LinearEncoder, LinearDecoder),
}


class SailerModule(EpiModule):
    """Encoder of open peaks, decoder of latent and confounders, weighted Bernoulli likelihood, invariance term.

    Parameters
    ----------
    config
        Choices of network and loss.
    blocks
        Chromosomes or tiles of the peaks.
    covariates
        Encoder of depth, batch and further covariates for the decoder.
    open_weight
        Weight omega of open entries.
    frequency
        Shape (p,): share of cells in which each peak is open; starts the biases of the logits and gives the inverse
        document frequencies. ``None`` where weights are loaded afterwards.
    mean_open
        Mean number of open peaks of a cell.
    """

    encoder: Any
    decoder: Any
    config: Any
    open_weight: Tensor
    input_norm: Tensor
    feature_weight: Tensor

    def __init__(
        self,
        config: SailerConfig,
        blocks: PeakBlocks,
        covariates: DecoderCovariates,
        *,
        open_weight: float,
        frequency: Tensor | None = None,
        mean_open: float = 1.0,
    ) -> None:
        super().__init__()
        self.config = config
        self.blocks = blocks
        self.covariates = covariates
        encoder, decoder = NETWORKS[config.encoder]
        options = {
            "dropout_rate": config.dropout_rate,
            "momentum": config.batch_norm_momentum,
            "eps": config.batch_norm_eps,
        }
        n_covariates = covariates.n_columns if config.use_covariates else 0
        self.encoder = encoder(blocks, config.hidden, config.n_latent, **options)
        self.decoder = decoder(blocks, config.hidden, config.n_latent, n_covariates, **options)
        self.register_buffer("open_weight", torch.tensor(float(open_weight)))
        self.register_buffer("input_norm", torch.tensor(float(mean_open)).sqrt())
        self.register_buffer("feature_weight", torch.ones(blocks.n_peaks))
        if frequency is not None:
            self._start_from(frequency)

    @torch.no_grad()
    def _start_from(self, frequency_p: Tensor) -> None:
        """Logits begin at the log odds that minimise the weighted loss of a model without latent."""
        p = frequency_p.clamp(1e-5, 1 - 1e-5)
        odds = float(self._weights()[0]) / self._weights()[1] * p / (1 - p)
        self.decoder.logits.bias[self.blocks.rank] = odds.log().to(self.decoder.logits.bias.dtype)
        self.feature_weight.copy_(torch.log1p(1.0 / p))

    @property
    def condition_weights(self) -> dict[str, int]:
        """The one weight of the decoder that reads the covariates, after the latent."""
        if not self.config.use_covariates:
            return {}
        weight = self.decoder.condition_layer.weight
        return {next(name for name, value in self.named_parameters() if value is weight): self.config.n_latent}

    @property
    def is_released(self) -> bool:
        """Whether the loss is weighted as in the released code."""
        return self.config.loss_preset == "released_code"

    def _weights(self) -> tuple[float, float]:
        """Weights of open and closed entries in the likelihood."""
        weight = float(self.open_weight)
        return (weight, weight) if self.is_released else (weight, 1.0)

    def _get_inference_input(self, tensors: dict[str, Tensor], **kwargs: Any) -> dict[str, Any]:  # noqa: ARG002
        return {"indptr": tensors[BATCH_INDPTR], "indices": tensors[BATCH_INDICES]}

    def _get_generative_input(
        self,
        tensors: dict[str, Tensor],
        inference_outputs: dict[str, Any],
        *,
        depth: float | None = None,
        batch: int | None = None,
        use_z_mean: bool = False,
        **kwargs: Any,  # noqa: ARG002
    ) -> dict[str, Any]:
        depth_b = tensors[BATCH_DEPTH][:, 0]
        batch_b = tensors[REGISTRY_KEYS.BATCH_KEY][:, 0]
        if depth is not None:
            depth_b = torch.full_like(depth_b, depth)
        if batch is not None:
            batch_b = torch.full_like(batch_b, batch)
        return {
            "z": inference_outputs["qz"].loc if use_z_mean else inference_outputs["z"],
            "depth_b": depth_b,
            "batch_b": batch_b,
            "categorical_bi": tensors.get(REGISTRY_KEYS.CAT_COVS_KEY),
            "continuous_bi": tensors.get(REGISTRY_KEYS.CONT_COVS_KEY),
        }

    def _values(self, indptr: Tensor, indices: Tensor) -> Tensor | None:
        """Values of the non-zeros as the encoder sees them: ones, or TF-IDF scaled to rows of equal length."""
        values_o = None
        if self.config.input_transform == "tfidf":
            n_rows = indptr.numel() - 1
            rows_o = torch.repeat_interleave(torch.arange(n_rows, device=indices.device), indptr.diff())
            values_o = self.feature_weight[indices]
            norm_b = values_o.new_zeros(n_rows).index_add_(0, rows_o, values_o.square()).sqrt().clamp_min(1e-6)
            values_o = values_o / norm_b[rows_o] * self.input_norm
        rate = self.config.input_dropout_rate
        if self.training and rate > 0:
            kept_o = (torch.rand(indices.shape, device=indices.device) >= rate) / (1.0 - rate)
            values_o = kept_o if values_o is None else values_o * kept_o
        return values_o

    @auto_move_data
    def inference(self, indptr: Tensor, indices: Tensor, *, deterministic: bool = False) -> dict[str, Any]:
        """Return the posterior ``qz``, a sample ``z`` (the mean if ``deterministic``) and the batch in blocks."""
        batch = self.blocks.split(indptr, indices, self._values(indptr, indices))
        mean_bd, logvar_bd = self.encoder(batch)
        sd_bd = (0.5 * logvar_bd).exp()
        noise_sd_bd = logvar_bd.exp() if self.is_released else sd_bd
        z_bd = mean_bd if deterministic else mean_bd + noise_sd_bd * torch.randn_like(mean_bd)
        qz = Normal(mean_bd, sd_bd, validate_args=False)
        return {"z": z_bd, "qz": qz, "mean_bd": mean_bd, "logvar_bd": logvar_bd, "blocked": batch}

    @auto_move_data
    def generative(
        self,
        z: Tensor,
        depth_b: Tensor,
        batch_b: Tensor,
        categorical_bi: Tensor | None = None,
        continuous_bi: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Return the hidden units before the logits; the logits are taken block by block where they are needed."""
        covariates_bk = self.covariates(depth_b, batch_b, categorical_bi, continuous_bi).to(z.dtype)
        return {"hidden": self.decoder(z, covariates_bk if self.config.use_covariates else covariates_bk[:, :0])}

    def reconstruction(self, hidden: Tensor, blocked: Any, *, weighted: bool = True) -> Tensor:
        """Return the (weighted) negative log-likelihood of each cell, shape (b,)."""
        weight, closed_weight = self._weights() if weighted else (1.0, 1.0)
        loss_b = hidden.new_zeros(hidden.shape[0])
        shift = 0.0 if weighted else self.open_weight_shift
        for j, block_bp in enumerate(self.decoder.logits(hidden)):
            logits_bp = block_bp - shift if shift else block_bp
            loss_b = loss_b + weighted_bernoulli(
                logits_bp, blocked.flat(j), blocked.rows[j], weight, closed_weight=closed_weight
            )
        return loss_b

    @property
    def open_weight_shift(self) -> float:
        """What calibration takes from a logit: the log of the weight of open over that of closed entries."""
        weight, closed_weight = self._weights()
        return float(torch.tensor(weight / closed_weight).log())

    def loss(
        self,
        tensors: dict[str, Tensor],  # noqa: ARG002
        inference_outputs: dict[str, Any],
        generative_outputs: dict[str, Tensor],
        *,
        kl_weight: float = 1.0,
    ) -> LossOutput:
        """Return < kl_w KL + (1 + lambda) R > + lambda kl_w PKL (equations 2.5-2.6 and 2.14)."""
        kl_weight = kl_weight * self.config.kl_scale
        mean_bd, logvar_bd = inference_outputs["mean_bd"], inference_outputs["logvar_bd"]
        reconstruction_b = self.reconstruction(generative_outputs["hidden"], inference_outputs["blocked"])
        information = self._information(mean_bd, logvar_bd)
        lam = self.config.invariance_weight
        if self.is_released:
            # effective weights of the released code: KL with the standard deviation in place of the variance,
            # 1 / (2 omega) in front of KL and of the pairwise term
            kl_b = kl_standard_normal(mean_bd, 0.5 * logvar_bd)
            scale = 1.0 / (2.0 * float(self.open_weight))
            loss = ((1.0 + lam) * reconstruction_b / float(self.open_weight)).mean()
            loss = loss + kl_weight * scale * (kl_b.mean() + lam * information / mean_bd.shape[0])
        else:
            kl_b = kl_standard_normal(mean_bd, logvar_bd)
            loss = (kl_weight * kl_b + (1.0 + lam) * reconstruction_b).mean() + lam * kl_weight * information
        return LossOutput(
            loss=loss,
            reconstruction_loss=reconstruction_b,
            kl_local=kl_b,
            extra_metrics={"information": information.detach()},
            n_obs_minibatch=mean_bd.shape[0],
        )

    def _information(self, mean_bd: Tensor, logvar_bd: Tensor) -> Tensor:
        """The term weighted by lambda: pairwise bound, mixture estimate or nothing."""
        if self.config.information_bound == "none":
            return mean_bd.new_zeros(())
        bound = pairwise_kl if self.config.information_bound == "pairwise" else mixture_information
        return bound(mean_bd, logvar_bd)

    @torch.inference_mode()
    def probabilities(self, hidden: Tensor, peaks: Tensor | None, *, calibrated: bool = True) -> Tensor:
        """Return accessibility of all or of chosen peaks in the user's order, shape (b, p).

        Parameters
        ----------
        hidden
            Output of :meth:`generative`.
        peaks
            Numbers of the peaks; all if ``None``.
        calibrated
            Undo the weight of the open entries.
        """
        if peaks is None:
            logits_bp = torch.cat(list(self.decoder.logits(hidden)), dim=1)
            if not self.blocks.is_ordered:
                logits_bp = logits_bp[:, self.blocks.rank]
        else:
            logits_bp = self.decoder.logits.columns(hidden, peaks)
        weight, closed_weight = self._weights()
        probability_bp = torch.sigmoid(logits_bp)
        return calibrate(probability_bp, weight / closed_weight) if calibrated else probability_bp
