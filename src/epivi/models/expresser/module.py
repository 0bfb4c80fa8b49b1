"""The torch module of Expresser: hide genes after the encoder, predict their values from those of the others.

Legend of shapes: b cells, t tokens, q hidden genes, u genes asked for, d width, m genes of the vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from scvi.module.base import LossOutput, auto_move_data
from torch.nn.functional import binary_cross_entropy_with_logits

from epivi import _keys as keys
from epivi.models.base_module import EpiModule
from epivi.models.expresser.network import ExpresserNetwork, Observed, Prediction, gather_rows
from epivi.objectives.expression import masked_cell_mean

if TYPE_CHECKING:
    from torch import Tensor

    from epivi.models.expresser.config import ExpresserConfig


class ExpresserModule(EpiModule):
    """Encoder of expressed genes, decoder of hidden values, loss (thesis, equations 4.1-4.5).

    Parameters
    ----------
    config
        Choices of network and loss.
    n_genes
        Genes of the vocabulary.
    """

    gene_mean: Tensor
    has_elbo = False

    def __init__(self, config: ExpresserConfig, n_genes: int) -> None:
        super().__init__()
        self.config = config
        self.network = ExpresserNetwork(config, n_genes)
        # mean of each gene where it is expressed, in the training cells; row 0 is the pad
        self.register_buffer("gene_mean", torch.zeros(n_genes + 1))

    def _get_inference_input(self, tensors: dict[str, Tensor], **kwargs: Any) -> dict[str, Any]:  # noqa: ARG002
        return {
            "tokens": tensors[keys.BATCH_TOKENS],
            "length": tensors[keys.BATCH_LENGTH],
            "bin": tensors[keys.BATCH_BIN],
        }

    @auto_move_data
    def inference(
        self,
        tokens: Tensor,
        length: Tensor,
        bin: Tensor,
        *,
        deterministic: bool = False,  # noqa: ARG002
    ) -> dict[str, Any]:
        """Return the genes of each cell in context T', under ``"context"``, shape (b, t, d)."""
        return {"context": self.network.encode(tokens, length, bin)}

    def _get_generative_input(
        self,
        tensors: dict[str, Tensor],
        inference_outputs: dict[str, Any],
        **kwargs: Any,  # noqa: ARG002
    ) -> dict[str, Any]:
        return {
            "context": inference_outputs["context"],
            "tokens": tensors[keys.BATCH_TOKENS],
            "bin": tensors[keys.BATCH_BIN],
            "query": tensors[keys.BATCH_QUERY],
            "maximum": tensors[keys.BATCH_MAXIMUM],
            "shift": tensors[keys.BATCH_SHIFT],
        }

    @auto_move_data
    def generative(
        self,
        context: Tensor,
        tokens: Tensor,
        bin: Tensor,
        query: Tensor,
        maximum: Tensor,
        shift: Tensor,
    ) -> dict[str, Any]:
        """Return ``"prediction"`` of the hidden genes, parts of shape (b, q), and ``"mixed"`` P, (b, q, d)."""
        mixed_bqd = self.network.mix(gather_rows(context, query), context, bin)
        baseline_bq = self.baseline(tokens.gather(1, query), shift)
        return {"prediction": self.network.head(mixed_bqd, maximum, baseline_bq), "mixed": mixed_bqd}

    def baseline(self, gene_bq: Tensor, shift_b: Tensor) -> Tensor | None:
        """Return mean of the gene plus shift of the cell, shape (b, q), where the network starts from it."""
        if self.config.baseline == "none":
            return None
        return self.gene_mean[gene_bq] + shift_b[:, None]

    @auto_move_data
    def ask(
        self,
        tokens: Tensor,
        length: Tensor,
        bin: Tensor,
        maximum: Tensor,
        shift: Tensor,
        asked: Tensor,
        observed: Observed | None = None,
    ) -> tuple[Prediction, Tensor | None]:
        """Return the prediction of genes asked for, parts of shape (b, u), and the logits that they are expressed.

        ``observed`` is that of :meth:`ExpresserNetwork.observe`, where more genes are asked of the same cells.
        """
        context_btd, gene_bud = self.network.encode_asked(tokens, length, bin, asked, observed)
        mixed_bud = self.network.mix(gene_bud, context_btd, bin)
        prediction = self.network.head(mixed_bud, maximum, self.baseline(asked, shift))
        if self.network.detection is None:
            return prediction, None
        return prediction, self.network.detection(gene_bud, mixed_bud, maximum, length)

    def error(self, prediction: Prediction, target_bq: Tensor) -> Tensor:
        """Return the squared error, or the Gaussian negative log-likelihood without its constant, shape (b, q)."""
        square_bq = (target_bq - prediction.mean).square()
        if prediction.log_variance is None:
            return square_bq
        return 0.5 * (prediction.log_variance + square_bq * (-prediction.log_variance).exp())

    def loss(
        self,
        tensors: dict[str, Tensor],
        inference_outputs: dict[str, Any],  # noqa: ARG002
        generative_outputs: dict[str, Any],
        *,
        kl_weight: float = 1.0,  # noqa: ARG002
    ) -> LossOutput:
        """Return the mean over cells of the mean error over their hidden genes (4.5), plus that of the detection."""
        query_bq = tensors[keys.BATCH_QUERY]
        target_bq = tensors[keys.BATCH_VALUE].gather(1, query_bq)
        mask_bq = query_mask(query_bq, tensors[keys.BATCH_QUERY_LENGTH])
        prediction: Prediction = generative_outputs["prediction"]
        error_bq = self.error(prediction, target_bq)
        loss, cell_b = masked_cell_mean(error_bq, mask_bq, reduction=self.config.reduction)
        with torch.no_grad():
            metrics = {"mse": masked_cell_mean((target_bq - prediction.mean).square(), mask_bq)[0]}
        if self.network.detection is not None:
            detection = self._detection_loss(tensors, query_bq, mask_bq)
            loss = loss + detection
            metrics["detection"] = detection.detach()
        n = query_bq.shape[0]
        return LossOutput(
            loss=loss,
            reconstruction_loss=cell_b.detach(),
            kl_local=torch.zeros(n, device=loss.device),
            extra_metrics=metrics,
            n_obs_minibatch=n,
        )

    def _detection_loss(self, tensors: dict[str, Tensor], query_bq: Tensor, mask_bq: Tensor) -> Tensor:
        """Return the cross-entropy of hidden genes against genes that are not expressed, from the observed ones."""
        tokens_bt, bin_bt = tensors[keys.BATCH_TOKENS], tensors[keys.BATCH_BIN]
        # the observed genes alone: that a hidden gene stands among the tokens would tell that it is expressed
        order_bt = (bin_bt == 0).long().argsort(dim=1, stable=True)
        n_seen_b = (bin_bt > 0).sum(1)
        n_t = max(int(n_seen_b.max()), 1)
        seen_bt, seen_bin_bt = (x.gather(1, order_bt)[:, :n_t] for x in (tokens_bt, bin_bt))
        seen_bt = seen_bt * (seen_bin_bt > 0)
        zeros_bz = tensors[keys.BATCH_ZEROS]
        asked_bu = torch.cat([tokens_bt.gather(1, query_bq) * mask_bq, zeros_bz], 1)
        maximum_b, shift_b = tensors[keys.BATCH_MAXIMUM], tensors[keys.BATCH_SHIFT]
        logit_bu = self.ask(seen_bt, n_seen_b, seen_bin_bt, maximum_b, shift_b, asked_bu)[1]
        is_expressed_bu = torch.cat([torch.ones_like(query_bq), torch.zeros_like(zeros_bz)], 1).float()
        error_bu = binary_cross_entropy_with_logits(torch.as_tensor(logit_bu), is_expressed_bu, reduction="none")
        return masked_cell_mean(error_bu, asked_bu > 0)[0]


def query_mask(query_bq: Tensor, length_b: Tensor) -> Tensor:
    """Return True for hidden genes, False for pads.

    Examples
    --------
    >>> query_mask(torch.zeros(2, 2), torch.tensor([0, 1])).tolist()
    [[False, False], [True, False]]
    """
    return torch.arange(query_bq.shape[1], device=query_bq.device) < length_b[:, None]
