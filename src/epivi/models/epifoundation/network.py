"""The networks of EpiFoundation: the encoder of a cell's open peaks, the table of genes, and the decoders.

Legend of shapes: b cells, t tokens, g genes asked for, n genes of the vocabulary, d width, k classes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from epivi.nn.attention import SelfAttention, Transformer, TransformerLayer
from epivi.nn.gene_decoder import GatedDecoder
from epivi.nn.tokens import PositionTable, TokenTable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from epivi.models.epifoundation.config import EpiFoundationConfig

N_COUNT_LEVELS = 3


class Places(nn.Module):
    """Vectors of where peaks and genes lie, shared by both.

    Parameters
    ----------
    config
        Choices of the model; ``positions="none"`` gives no vector.
    chrom_lengths_bp
        Length of each chromosome.
    """

    def __init__(self, config: EpiFoundationConfig, chrom_lengths_bp: Sequence[int]) -> None:
        super().__init__()
        n_chrom = len(chrom_lengths_bp)
        self.n_chrom = n_chrom
        self.chromosomes: TokenTable | None = None
        self.bins: PositionTable | None = None
        if config.positions != "none":
            # row 0 for [CLS] and pads, the last one for contigs that are not known
            self.chromosomes = TokenTable(max(n_chrom, 1), config.width, n_special=2)
        if config.positions == "genome":
            self.bins = PositionTable(chrom_lengths_bp, config.width)

    def forward(self, code: Tensor, position: Tensor | None) -> Tensor | float:
        """Return the vectors, shape (..., d), or 0 if places are not told.

        Parameters
        ----------
        code
            -1 for [CLS] and pads, 0 for unknown contigs, 1 and above for chromosomes.
        position
            Position in bp, where bins of the genome are told; below 0 where it is not known.
        """
        if self.chromosomes is None:
            return 0.0
        row = torch.where(code > 0, code, torch.where(code < 0, 0, self.chromosomes.table.num_embeddings - 1))
        vector = self.chromosomes(row)
        if self.bins is not None and position is not None:
            is_told = ((code >= 0) & (position >= 0)).unsqueeze(-1)
            vector = vector + self.bins((code - 1).clamp_min(-1), position) * is_told
        return vector


class PeakEncoder(nn.Module):
    """A transformer over the open peaks of a cell, without order (equations 2-6); the vector of [CLS] is the cell's.

    Parameters
    ----------
    config
        Choices of the model.
    n_peaks
        Peaks of the vocabulary.
    chrom_lengths_bp
        Length of each chromosome.
    """

    def __init__(self, config: EpiFoundationConfig, n_peaks: int, chrom_lengths_bp: Sequence[int]) -> None:
        super().__init__()
        width = config.width
        # without identities the two special rows are left: pad, and [CLS]
        self.has_identity = config.peak_identity
        self.peaks = TokenTable(n_peaks if config.peak_identity else 1, width, n_special=2, dim=config.peak_dim)
        self.places = Places(config, chrom_lengths_bp)
        self.levels = TokenTable(N_COUNT_LEVELS, width, n_special=1) if config.count_levels else None
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(config.dropout_rate)
        layers = [
            TransformerLayer(SelfAttention(width, config.n_heads), config.n_hidden, dropout_rate=config.dropout_rate)
            for _ in range(config.n_layers)
        ]
        self.transformer = Transformer(layers, final_norm=True, checkpoint=config.checkpoint)

    def embed(self, token: Tensor, chrom: Tensor, position: Tensor | None, level: Tensor | None) -> Tensor:
        """Return the vectors of tokens before the transformer, shape (..., d) (equation 5)."""
        if not self.has_identity:
            token = token.clamp_max(1) * (token == 1)
        x = self.peaks(token) + self.places(chrom, position)
        if self.levels is not None and level is not None:
            x = x + self.levels(level)
        return self.norm(x)

    def forward(
        self,
        tokens_bt: Tensor,
        length_b: Tensor,
        chrom_bt: Tensor,
        position_bt: Tensor | None = None,
        level_bt: Tensor | None = None,
    ) -> Tensor:
        """Return the vector of each cell, shape (b, d).

        Parameters
        ----------
        tokens_bt
            [CLS] and the open peaks, in any order, padded on the right.
        length_b
            Tokens of each cell.
        chrom_bt, position_bt, level_bt
            Place and level of each token.
        """
        x_btd = self.dropout(self.embed(tokens_bt, chrom_bt, position_bt, level_bt))
        n = tokens_bt.shape[1]
        mask_bt = torch.arange(n, device=tokens_bt.device) < length_b[:, None]
        return self.transformer(x_btd, mask_bt)[:, 0]


class GeneTable(nn.Module):
    """Vectors of the genes: identity and place, each normalised, their sum normalised (equation 8).

    Parameters
    ----------
    width
        Width d.
    chrom_g, position_g
        Code (as in :class:`Places`) and position of each gene.
    """

    chrom: Tensor
    position: Tensor

    def __init__(self, width: int, chrom_g: Tensor, position_g: Tensor) -> None:
        super().__init__()
        self.genes = TokenTable(chrom_g.numel(), width, n_special=1)
        self.norm = nn.LayerNorm(width)
        self.register_buffer("chrom", chrom_g, persistent=False)
        self.register_buffer("position", position_g, persistent=False)

    def forward(self, places: Places) -> Tensor:
        """Return the vectors of all genes, shape (n, d)."""
        ids = torch.arange(1, self.chrom.numel() + 1, device=self.chrom.device)
        return self.norm(self.genes(ids) + places(self.chrom, self.position))


class LabelDecoder(nn.Sequential):
    """Logits of the classes of a cell: two hidden layers with ReLU and layer normalisation (equation 11).

    Parameters
    ----------
    width
        Width d.
    n_classes
        Classes k.
    """

    def __init__(self, width: int, n_classes: int) -> None:
        hidden = [part for _ in range(2) for part in (nn.Linear(width, width), nn.ReLU(), nn.LayerNorm(width))]
        super().__init__(*hidden, nn.Linear(width, n_classes))


class _Reverse(torch.autograd.Function):
    """The identity, whose gradient is negated and scaled."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, x: Tensor, weight: float) -> Tensor:
        ctx.weight = weight  # type: ignore[attr-defined]
        return x.view_as(x)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> tuple[Tensor, None]:
        return -ctx.weight * grads[0], None  # type: ignore[attr-defined]


class BatchAdversary(nn.Module):
    """Reads the batch off the cell vector; what it learns is unlearnt by the encoder (Ganin 2015).

    Parameters
    ----------
    width
        Width d.
    n_batch
        Batches.
    weight
        Weight of the reversed gradient.
    """

    def __init__(self, width: int, n_batch: int, weight: float) -> None:
        super().__init__()
        self.weight = weight
        self.network = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, n_batch))

    def forward(self, z_bd: Tensor) -> Tensor:
        """Return the logits of the batches."""
        return self.network(_Reverse.apply(z_bd, self.weight))


__all__ = ["BatchAdversary", "GatedDecoder", "GeneTable", "LabelDecoder", "PeakEncoder", "Places"]
