"""The torch module of SAILER.

Legend of shapes: b cells of the batch, p peaks, o non-zeros, d latent dimensions, k covariates.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from scvi import REGISTRY_KEYS
from scvi.module.base import LossOutput, auto_move_data
from torch.distributions import Normal

from epivi._keys import BATCH_DEPTH, BATCH_INDICES, BATCH_INDPTR, BATCH_VALUES
from epivi.models.base_module import EpiModule
from epivi.nn.kernels import has_half_precision, layer_outputs, list_by_peak, multinomial_loss
from epivi.nn.mlp import ChromosomeDecoder, ChromosomeEncoder, DenseDecoder, DenseEncoder, LinearDecoder, LinearEncoder
from epivi.objectives.invariance import kl_standard_normal, mixture_information, pairwise_kl
from epivi.objectives.likelihoods import layer_bernoulli, layer_poisson

if TYPE_CHECKING:
    from torch import Tensor

    from epivi.models.sailer.config import SailerConfig
    from epivi.nn.covariates import DecoderCovariates
    from epivi.nn.kernels import PeakLists
    from epivi.nn.linear import BlockedRows, PeakBlocks

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
    counts_per_depth
        Mean count of a cell over mean depth, of the Poisson likelihood: the rates of a cell add up to depth times it.
    """

    encoder: Any
    decoder: Any
    config: Any
    open_weight: Tensor
    input_norm: Tensor
    counts_per_depth: Tensor
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
        counts_per_depth: float = 1.0,
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
        self.encoder.first.buffer = self.decoder.logits.buffer  # in a step that needs one gradient at a time
        self.register_buffer("open_weight", torch.tensor(float(open_weight)))
        self.register_buffer("input_norm", torch.tensor(float(mean_open)).sqrt())
        self.register_buffer("feature_weight", torch.ones(blocks.n_peaks))
        if self.is_poisson:
            self.register_buffer("counts_per_depth", torch.tensor(float(counts_per_depth)))
        if frequency is not None:
            self._start_from(frequency)

    @property
    def is_poisson(self) -> bool:
        """Whether entries are counts."""
        return self.config.likelihood == "poisson"

    @torch.no_grad()
    def _start_from(self, frequency_p: Tensor) -> None:
        """Logits begin at the log odds that minimise the weighted loss of a model without latent, or near them."""
        p = frequency_p.clamp(1e-5, 1 - 1e-5)
        odds = p if self.is_poisson else float(self._weights()[0]) / self._weights()[1] * p / (1 - p)
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
        counts = {"counts": tensors[BATCH_VALUES]} if self.is_poisson else {}
        return {"indptr": tensors[BATCH_INDPTR], "indices": tensors[BATCH_INDICES], **counts}

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

    @property
    def uses_kernels(self) -> bool:
        """Whether the compiled layers serve: they know the CPU and single precision."""
        weight = self.decoder.logits.weight
        return self.config.kernels != "plain" and weight.device.type == "cpu" and weight.dtype == torch.float32

    @property
    def uses_half(self) -> bool:
        """Whether the products of a training step are in bfloat16."""
        return self.config.kernels == "auto" and self.training and torch.is_grad_enabled() and has_half_precision()

    def _blocked(self, indptr: Tensor, indices: Tensor, counts: Tensor | None) -> BlockedRows | PeakLists:
        """Return the batch as the layers read it."""
        values_o = self._values(indptr, indices)
        if self.uses_kernels:
            return list_by_peak(self.blocks, indptr, indices, values_o, counts)
        return self.blocks.split(indptr, indices, values_o, counts)

    @auto_move_data
    def inference(
        self, indptr: Tensor, indices: Tensor, counts: Tensor | None = None, *, deterministic: bool = False
    ) -> dict[str, Any]:
        """Return the posterior ``qz``, a sample ``z`` (the mean if ``deterministic``) and the batch in blocks."""
        batch = self._blocked(indptr, indices, counts)
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

    def reconstruction(self, hidden: Tensor, blocked: Any, *, weighted: bool = True, expected: float = 1.0) -> Tensor:
        """Return the (weighted) negative log-likelihood of each cell, shape (b,).

        ``expected`` is what the gradient of each of them is likely to be.
        """
        if self.is_poisson:
            return layer_poisson(self.decoder.logits, hidden, blocked, half=self.uses_half, expected=expected)
        weight, closed_weight = self._weights() if weighted else (1.0, 1.0)
        return layer_bernoulli(
            self.decoder.logits,
            hidden,
            blocked,
            weight=weight,
            closed_weight=closed_weight,
            shift=0.0 if weighted else self.open_weight_shift,
            half=self.uses_half,
            expected=expected,
        )

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
        lam = self.config.invariance_weight
        hidden, blocked = generative_outputs["hidden"], inference_outputs["blocked"]
        expected = (1.0 + lam) / hidden.shape[0] / (float(self.open_weight) if self.is_released else 1.0)
        reconstruction_b = self.reconstruction(hidden, blocked, expected=expected)
        information = self._information(mean_bd, logvar_bd)
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
    def log_scale(self, hidden: Tensor, depth_b: Tensor | float) -> Tensor | None:
        """Return what Poisson rates need beside the logits, shape (b,): log of depth and counts over the softmax's sum.

        ``None`` where entries are open or closed.
        """
        if not self.is_poisson:
            return None
        log_sum_b = self._log_sum(hidden)
        return torch.as_tensor(depth_b, dtype=hidden.dtype, device=hidden.device).log() + (
            self.counts_per_depth.log() - log_sum_b
        )

    def _log_sum(self, hidden: Tensor) -> Tensor:
        """Return the log of the sum of the exponentials of all logits, shape (b,)."""
        layer, n_rows = self.decoder.logits, hidden.shape[0]
        if not self.uses_kernels:
            return torch.logsumexp(torch.stack([torch.logsumexp(part, dim=1) for part in layer(hidden)]), dim=0)
        # the multinomial loss of one count without its logit
        nothing = torch.zeros(n_rows + 1, dtype=torch.int64), torch.zeros(0, dtype=torch.int64)
        one_b = torch.ones(n_rows, dtype=torch.float64)
        return multinomial_loss(hidden, layer.weight, layer.bias, list_by_peak(self.blocks, *nothing), total_b=one_b)

    @torch.inference_mode()
    def probabilities(
        self,
        hidden: Tensor,
        peaks: Tensor | None,
        *,
        calibrated: bool = True,
        log_scale_b: Tensor | None = None,
        out_bp: Tensor | None = None,
    ) -> Tensor:
        r"""Return accessibility of all or of chosen peaks in the user's order, shape (b, p).

        Under the Poisson likelihood it is the probability of any count, :math:`1 - e^{-r}` with the rate r.

        Parameters
        ----------
        hidden
            Output of :meth:`generative`.
        peaks
            Numbers of the peaks; all if ``None``.
        calibrated
            Undo the weight of the open entries.
        log_scale_b
            Output of :meth:`log_scale`.
        out_bp
            Memory of all peaks on the CPU that may be written to; what is returned need not lie there.
        """
        # calibration takes the log of the weight from the logit
        shift = self.open_weight_shift if calibrated else 0.0
        if peaks is None:
            found_bp = self._outputs(hidden, None if self.is_poisson else shift, out_bp)
            if not self.blocks.is_ordered:
                found_bp = found_bp[:, self.blocks.rank]
        else:
            found_bp = self.decoder.logits.columns(hidden, peaks)
            if not self.is_poisson:
                found_bp = torch.sigmoid(found_bp - shift)
        if log_scale_b is None:
            return found_bp
        return found_bp.add_(log_scale_b.unsqueeze(1)).exp_().neg_().expm1_().neg_()

    def _outputs(self, hidden: Tensor, shift: float | None, out_bp: Tensor | None = None) -> Tensor:
        """Return all logits in block order, or with a shift probabilities."""
        layer = self.decoder.logits
        if self.uses_kernels:
            return layer_outputs(hidden, layer.weight, layer.bias, self.blocks, shift=shift, out_bp=out_bp)
        logits_bp = torch.cat(list(layer(hidden)), dim=1)
        return logits_bp if shift is None else torch.sigmoid(logits_bp - shift)
