"""The torch module of EpiFoundation: an encoder of open peaks, and the decoders of one task.

Legend of shapes: b cells, t tokens, g genes scored in a cell, n genes of the vocabulary, h hidden peaks, d width,
k classes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch
from scvi import REGISTRY_KEYS
from scvi.module.base import LossOutput, auto_move_data
from torch import nn
from torch.nn.functional import cross_entropy

from epivi import _keys as keys
from epivi.models.base_module import EpiModule
from epivi.models.epifoundation.config import EXPRESSION, LABEL_TASKS, PRETRAINING
from epivi.models.epifoundation.heads.local import Links, LocalReadout
from epivi.models.epifoundation.network import BatchAdversary, GatedDecoder, GeneTable, LabelDecoder, PeakEncoder
from epivi.nn.tokens import TokenTable
from epivi.objectives.peak_to_gene import (
    balanced_accuracy,
    frequency_logit,
    gene_cross_entropy,
    masked_mean,
    open_peak_loss,
)

if TYPE_CHECKING:
    from torch import Tensor

    from epivi.models.epifoundation.config import EpiFoundationConfig

N_LEVELS_PRETRAINING = 2


class Vocabulary(NamedTuple):
    """What the module knows of peaks, genes, batches and classes.

    Attributes
    ----------
    n_peaks
        Peaks.
    chrom_lengths_bp
        Length of each chromosome.
    gene_chrom, gene_position
        Code (1 and above, 0 unknown) and position (-1 unknown) of each gene, shape (n,).
    gene_log_odds
        Logit of the share of cells that express each gene, shape (n,).
    n_batch, n_classes
        Batches and classes.
    links
        Pairs of a gene and a peak near it, of which expression is read directly; ``None`` for none.
    """

    n_peaks: int
    chrom_lengths_bp: tuple[int, ...]
    gene_chrom: Tensor
    gene_position: Tensor
    gene_log_odds: Tensor
    n_batch: int
    n_classes: int
    links: Links | None = None


class EpiFoundationModule(EpiModule):
    """Encoder of open peaks with the decoders of one task.

    Parameters
    ----------
    config
        Choices of the model.
    vocabulary
        Sizes and places.
    """

    has_elbo = False
    cell_mean: Tensor
    cell_sd: Tensor
    gene_log_odds: Tensor
    gene_mean: Tensor
    gene_sd: Tensor
    temperature: Tensor

    def __init__(self, config: EpiFoundationConfig, vocabulary: Vocabulary) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.n_genes = vocabulary.gene_chrom.numel()
        self.encoder = PeakEncoder(config, vocabulary.n_peaks, vocabulary.chrom_lengths_bp)
        self.genes: GeneTable | None = None
        self.batches: TokenTable | None = None
        self.decoder: nn.Module | None = None
        self.peak_readout: nn.Linear | None = None
        self.adversary: BatchAdversary | None = None
        self.readout: nn.Linear | None = None
        self.local: LocalReadout | None = None
        predicts_genes = config.task in (PRETRAINING, EXPRESSION) and self.n_genes > 0
        if predicts_genes:
            self.genes = GeneTable(width, vocabulary.gene_chrom, vocabulary.gene_position)
            n_input, n_out = width, 1
            if config.task == PRETRAINING:
                n_out = N_LEVELS_PRETRAINING
                if vocabulary.n_batch > 1:
                    # the batch enters the decoder alone (equation 7)
                    self.batches = TokenTable(vocabulary.n_batch, width, n_special=0)
                    n_input = 2 * width
            self.decoder = GatedDecoder(n_input, width, config.n_gate, n_out)
            # expression is predicted by how many standard deviations a cell differs from the mean of the training cells
            self.register_buffer("gene_mean", torch.zeros(self.n_genes))
            self.register_buffer("gene_sd", torch.ones(self.n_genes))
            if config.linear_readout:
                self.readout = nn.Linear(width, self.n_genes, bias=False)
                nn.init.zeros_(self.readout.weight)
            if config.task == EXPRESSION and vocabulary.links is not None:
                self.local = LocalReadout(vocabulary.links, vocabulary.n_peaks, self.n_genes)
            if self.readout is not None or self.local is not None:
                # nothing is added to the least-squares fit before training
                nn.init.zeros_(self.decoder.out.weight)
                nn.init.zeros_(self.decoder.out.bias)
        if config.task in LABEL_TASKS:
            self.decoder = LabelDecoder(width, vocabulary.n_classes)
            self.register_buffer("temperature", torch.ones(()))
        if config.task == PRETRAINING and config.masked_peak_weight > 0:
            self.peak_readout = nn.Linear(width, width)
            # all peaks are as likely at first: the loss starts at that of chance, ln 2
            nn.init.zeros_(self.peak_readout.weight)
            nn.init.zeros_(self.peak_readout.bias)
            self.peak_bias = nn.Embedding(vocabulary.n_peaks + 2, 1)
            nn.init.zeros_(self.peak_bias.weight)
        if config.batch_adversary > 0 and vocabulary.n_batch > 1:
            self.adversary = BatchAdversary(width, vocabulary.n_batch, config.batch_adversary)
        # decoders read the cell vector in units of its spread over the cells when training began
        self.register_buffer("cell_mean", torch.zeros(width))
        self.register_buffer("cell_sd", torch.ones(width))
        self.register_buffer("gene_log_odds", vocabulary.gene_log_odds.float(), persistent=False)

    def train(self, mode: bool = True) -> Self:  # noqa: FBT001, FBT002
        """Set the mode; a frozen encoder drops nothing."""
        super().train(mode)
        if not any(parameter.requires_grad for parameter in self.encoder.parameters()):
            self.encoder.eval()
        return self

    def _get_inference_input(self, tensors: dict[str, Tensor], **kwargs: Any) -> dict[str, Any]:  # noqa: ARG002
        return {
            "tokens": tensors[keys.BATCH_TOKENS],
            "length": tensors[keys.BATCH_LENGTH],
            "chrom": tensors[keys.BATCH_TOKEN_CHROM],
            "position": tensors.get(keys.BATCH_TOKEN_POSITION),
            "level": tensors.get(keys.BATCH_TOKEN_LEVEL),
        }

    @auto_move_data
    def inference(
        self,
        tokens: Tensor,
        length: Tensor,
        chrom: Tensor,
        position: Tensor | None = None,
        level: Tensor | None = None,
        *,
        deterministic: bool = False,  # noqa: ARG002
    ) -> dict[str, Any]:
        """Return the vector of each cell under ``"z"``, shape (b, d); dropout in training is the only noise."""
        return {"z": self.encoder(tokens, length, chrom, position, level)}

    def _get_generative_input(
        self,
        tensors: dict[str, Tensor],
        inference_outputs: dict[str, Any],
        **kwargs: Any,  # noqa: ARG002
    ) -> dict[str, Any]:
        genes = tensors.get(keys.BATCH_GENES)
        if genes is not None and genes.shape[1] == self.n_genes and self.config.task == EXPRESSION:
            genes = None  # all genes of the vocabulary, in order
        return {
            "z": inference_outputs["z"],
            "genes": genes,
            "batch": tensors.get(REGISTRY_KEYS.BATCH_KEY),
            "tokens": tensors[keys.BATCH_TOKENS],
            "absent": tensors.get(keys.BATCH_ABSENT_PEAKS),
        }

    @auto_move_data
    def generative(
        self,
        z: Tensor,
        genes: Tensor | None = None,
        batch: Tensor | None = None,
        tokens: Tensor | None = None,
        absent: Tensor | None = None,
    ) -> dict[str, Any]:
        """Return what the task predicts of each cell.

        ``"genes"`` of shape (b, g, outputs), for the genes asked for or all; ``"classes"``, logits of shape (b, k).
        Without ``batch`` the mean of the vectors of all batches is read. The local readout needs ``tokens``, and is
        told which peaks the data do not have by ``absent``.
        """
        outputs: dict[str, Any] = {}
        z = self.standardised(z)
        if isinstance(self.decoder, LabelDecoder):
            outputs["classes"] = self.decoder(z)
        elif self.genes is not None and self.decoder is not None:
            table_nd = self.genes(self.encoder.places)
            outputs["genes"] = self.decoder(self._with_batch(z, batch), table_nd, genes)
            if self.readout is not None:
                outputs["genes"] = outputs["genes"] + self._linear(z, genes)
            if self.local is not None:
                if tokens is None:
                    message = "The local readout needs the open peaks of the cells: pass tokens=..."
                    raise RuntimeError(message)
                outputs["genes"] = outputs["genes"] + _chosen(self.local(tokens, absent), genes)[:, :, None]
            if self.config.task == EXPRESSION:
                mean_g, sd_g = (_of_genes(values_n, genes) for values_n in (self.gene_mean, self.gene_sd))
                outputs["genes"] = mean_g[..., None] + sd_g[..., None] * outputs["genes"]
        return outputs

    def _linear(self, z_bd: Tensor, genes_bg: Tensor | None) -> Tensor:
        """Return what the linear readout adds to the outputs of the genes, shape (b, g, outputs)."""
        linear_bg = _chosen(self.readout(z_bd), genes_bg)  # type: ignore[misc]
        if self.config.task == EXPRESSION:
            return linear_bg[:, :, None]
        # logits start at those of the gene's frequency
        logit_bg = linear_bg + _of_genes(self.gene_log_odds - self.gene_log_odds.mean(), genes_bg)
        return torch.stack([torch.zeros_like(logit_bg), logit_bg], dim=2)

    def standardised(self, z_bd: Tensor) -> Tensor:
        """Return cell vectors in units of their spread over the cells when training began.

        At the start the vectors of all cells are nearly alike: most of each is the vector of [CLS].
        """
        return (z_bd - self.cell_mean) / self.cell_sd

    def _with_batch(self, z_bd: Tensor, batch_b1: Tensor | None) -> Tensor:
        """Return the cell vectors, followed by those of their batches where the decoder reads them (equation 7)."""
        if self.batches is None:
            return z_bd
        if batch_b1 is None:
            ids = torch.arange(self.batches.table.num_embeddings, device=z_bd.device)
            batch_bd = self.batches(ids).mean(0).expand_as(z_bd)
        else:
            batch_bd = self.batches(batch_b1[:, 0])
        return torch.cat([z_bd, batch_bd], dim=1)

    def peak_logits(self, z_bd: Tensor, peaks_bh: Tensor) -> Tensor:
        """Return the logits that peaks (rows of the peak table) are open, shape (b, h)."""
        if self.peak_readout is None:
            message = "This model has no masked-peak objective."
            raise RuntimeError(message)
        table = self.encoder.peaks
        vectors_bhd = table(peaks_bh)
        scale = vectors_bhd.shape[2] ** -0.5
        return (vectors_bhd @ self.peak_readout(self.standardised(z_bd))[:, :, None])[:, :, 0] * scale + self.peak_bias(
            peaks_bh
        )[:, :, 0]

    def loss(
        self,
        tensors: dict[str, Tensor],
        inference_outputs: dict[str, Any],
        generative_outputs: dict[str, Any],
        *,
        kl_weight: float = 1.0,  # noqa: ARG002
    ) -> LossOutput:
        """Return the loss of the task, with its metrics."""
        z_bd = inference_outputs["z"]
        terms: dict[str, Tensor] = {}
        metrics: dict[str, Tensor] = {}
        if "genes" in generative_outputs and keys.BATCH_GENES in tensors:
            self._gene_loss(tensors, generative_outputs["genes"], terms, metrics)
        if self.peak_readout is not None:
            peaks_bh = tensors[keys.BATCH_HIDDEN_PEAKS]
            logit_bh = self.peak_logits(z_bd, peaks_bh.clamp_min(0))
            # pads are -1; peaks that the vocabulary lacks are 0, and have no vector to be told by
            loss = open_peak_loss(logit_bh, tensors[keys.BATCH_HIDDEN_IS_OPEN], peaks_bh > 0)
            terms["peaks"] = self.config.masked_peak_weight * loss
            metrics["peak_loss"] = loss.detach()
        if "classes" in generative_outputs:
            self._label_loss(tensors, generative_outputs["classes"], terms, metrics)
        if self.adversary is not None:
            batch_b = tensors[REGISTRY_KEYS.BATCH_KEY][:, 0]
            terms["adversary"] = cross_entropy(self.adversary(self.standardised(z_bd)), batch_b)
            metrics["adversary_loss"] = terms["adversary"].detach()
        # a minibatch with nothing to score (cells without RNA) still has a graph
        total = torch.stack([*terms.values(), 0.0 * z_bd.sum()]).sum()
        n = z_bd.shape[0]
        return LossOutput(
            loss=total,
            reconstruction_loss=total.detach().expand(n),
            kl_local=torch.zeros(n, device=total.device),
            extra_metrics=metrics,
            n_obs_minibatch=n,
        )

    def _gene_loss(
        self, tensors: dict[str, Tensor], outputs_bgo: Tensor, terms: dict[str, Tensor], metrics: dict[str, Tensor]
    ) -> None:
        genes_bg, target_bg = tensors[keys.BATCH_GENES], tensors[keys.BATCH_GENE_TARGET]
        mask_bg = genes_bg >= 0
        if self.config.task == EXPRESSION:
            error_bg = outputs_bgo[:, :, 0] - target_bg
            # each gene in units of its own standard deviation, so that weakly expressed ones are learnt too
            terms["genes"] = masked_mean((error_bg / self.gene_sd[genes_bg.clamp_min(0)]).square(), mask_bg)
            metrics["expression_mse"] = masked_mean(error_bg.square(), mask_bg).detach()
            return
        terms["genes"] = gene_cross_entropy(outputs_bgo, target_bg, mask_bg)
        with torch.no_grad():
            logit_bg = outputs_bgo[:, :, 1] - outputs_bgo[:, :, 0]
            metrics["gene_loss"] = terms["genes"].detach()
            metrics["balanced_accuracy"] = balanced_accuracy(logit_bg, target_bg, mask_bg)
            odds_bg = self.gene_log_odds[genes_bg.clamp_min(0)]
            baseline_bg = frequency_logit(odds_bg, tensors[keys.BATCH_N_EXPRESSED], self.n_genes)
            pair_bg2 = torch.stack([torch.zeros_like(baseline_bg), baseline_bg], dim=2)
            metrics["gene_frequency_loss"] = gene_cross_entropy(pair_bg2, target_bg, mask_bg)

    def _label_loss(
        self, tensors: dict[str, Tensor], logits_bk: Tensor, terms: dict[str, Tensor], metrics: dict[str, Tensor]
    ) -> None:
        mask_b = tensors[keys.BATCH_CLASS] >= 0
        label_b = tensors[keys.BATCH_CLASS].clamp_min(0)
        terms["labels"] = masked_mean(cross_entropy(logits_bk, label_b, reduction="none"), mask_b)
        is_right_b = (logits_bk.argmax(1) == label_b).float()
        metrics["accuracy"] = masked_mean(is_right_b, mask_b).detach()


def _chosen(values_bn: Tensor, genes_bg: Tensor | None) -> Tensor:
    """Return the columns of the genes asked for in each cell, or all."""
    return values_bn if genes_bg is None else values_bn.gather(1, genes_bg.clamp_min(0))


def _of_genes(values_n: Tensor, genes_bg: Tensor | None) -> Tensor:
    """Return the values of the genes asked for, or of all."""
    return values_n if genes_bg is None else values_n[genes_bg.clamp_min(0)]
