"""Linear layers between sparse peaks and hidden units.

Legend of shapes: b cells of the batch, p peaks, o non-zeros of the batch, c chromosomes (blocks of peaks),
h hidden units. A batch of peaks is compressed sparse row: ``indptr`` (b + 1), ``indices`` (o) and, where entries are
weighted, ``values`` (o); without values every stored entry counts one.

Peaks are cut into blocks: one block a chromosome for the block-diagonal layers, tiles of equal width for dense ones.
The plain form of the layers makes one block of the batch dense at a time, on any device and in any precision; a batch
listed peak by peak goes through the compiled form of :mod:`epivi.nn.kernels`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple, Self

import numpy as np
import torch
from torch import nn

from epivi.nn.kernels import GradientBuffer, PeakLists, sparse_product

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

TILE_PEAKS = 8192


class PeakBlocks(nn.Module):
    """How the peaks are cut into blocks, and the way between the user's order and block order.

    Parameters
    ----------
    block_of_peak
        Shape (p,): number of the block of each peak, in the user's order, 0 to c - 1, none empty.

    Examples
    --------
    >>> blocks = PeakBlocks(np.array([1, 0, 1]))
    >>> blocks.sizes, blocks.rank.tolist()
    ((1, 2), [1, 0, 2])
    """

    rank: Tensor
    block: Tensor

    def __init__(self, block_of_peak: np.ndarray) -> None:
        super().__init__()
        block_of_peak = np.asarray(block_of_peak)
        order = np.argsort(block_of_peak, kind="stable")
        rank = np.empty_like(order)
        rank[order] = np.arange(order.size)
        self.sizes: tuple[int, ...] = tuple(np.bincount(block_of_peak).tolist())
        self.starts: tuple[int, ...] = tuple(np.concatenate([[0], np.cumsum(self.sizes)]).tolist())
        self.is_ordered = bool((np.diff(order) == 1).all())
        kind = np.uint8 if len(self.sizes) <= 256 else np.int16 if len(self.sizes) < 2**15 else np.int32
        self.register_buffer("rank", torch.from_numpy(rank), persistent=False)
        self.register_buffer("block", torch.from_numpy(block_of_peak.astype(kind)), persistent=False)

    @classmethod
    def tiles(cls, n_peaks: int, width: int = TILE_PEAKS) -> PeakBlocks:
        """Cut peaks into tiles of ``width`` in the user's order."""
        return cls(np.arange(n_peaks) // width)

    @property
    def n_peaks(self) -> int:
        """Number of peaks."""
        return self.starts[-1]

    def split(
        self, indptr: Tensor, indices: Tensor, values: Tensor | None = None, counts: Tensor | None = None
    ) -> BlockedRows:
        """Sort the non-zeros of a batch by block.

        Parameters
        ----------
        indptr, indices
            Compressed rows, shapes (b + 1,) and (o,), integers.
        values
            Value of each entry as the encoder reads it, shape (o,); ``None`` stands for ones.
        counts
            Count of each entry, shape (o,), for likelihoods of counts.
        """
        n_rows = indptr.numel() - 1
        rows_o = torch.repeat_interleave(torch.arange(n_rows, device=indices.device), indptr.diff())
        block_o = self.block[indices]
        if block_o.device.type == "cpu":
            # numpy sorts small integers by radix, several times faster than torch
            order_o = torch.from_numpy(np.argsort(block_o.numpy(), kind="stable"))
        else:
            order_o = torch.argsort(block_o, stable=True)
        sizes = torch.bincount(block_o.long(), minlength=len(self.sizes)).tolist()
        columns_o = indices if self.is_ordered else self.rank[indices]
        values_c, counts_c = (None if x is None else x[order_o].split(sizes) for x in (values, counts))
        rows_c, columns_c = rows_o[order_o].split(sizes), columns_o[order_o].split(sizes)
        return BlockedRows(n_rows, rows_c, columns_c, values_c, self, counts_c)


class BlockedRows(NamedTuple):
    """The non-zeros of a batch, block by block: one tensor of rows, columns and values for each block.

    Columns count in block order over all peaks; ``values`` is ``None`` where every entry is one, ``counts`` where the
    likelihood needs none.
    """

    n_rows: int
    rows: Sequence[Tensor]
    columns: Sequence[Tensor]
    values: Sequence[Tensor] | None
    blocks: PeakBlocks
    counts: Sequence[Tensor] | None = None

    def flat(self, block: int) -> Tensor:
        """Positions of the block's non-zeros in its dense, row-major form."""
        start, size = self.blocks.starts[block], self.blocks.sizes[block]
        return self.rows[block] * size + (self.columns[block] - start)

    def dense(self, block: int, dtype: torch.dtype) -> Tensor:
        """Return one block of the batch as a dense matrix, shape (b, size of the block)."""
        size = self.blocks.sizes[block]
        x_bp = torch.zeros(self.n_rows * size, dtype=dtype, device=self.rows[block].device)
        x_bp[self.flat(block)] = 1.0 if self.values is None else self.values[block].to(dtype)
        return x_bp.view(self.n_rows, size)


class _BlockMatmul(torch.autograd.Function):
    """Product of sparse rows with a weight, summed over blocks or one result a block."""

    @staticmethod
    def forward(ctx, weight_ph: Tensor, batch: BlockedRows, diagonal: bool) -> Tensor:  # noqa: FBT001
        ctx.batch, ctx.diagonal, ctx.shape = batch, diagonal, weight_ph.shape
        starts, n_hidden = batch.blocks.starts, weight_ph.shape[1]
        n_blocks = len(batch.blocks.sizes)
        out_bch = weight_ph.new_zeros(batch.n_rows, n_blocks if diagonal else 1, n_hidden)
        for j in range(n_blocks):
            x_bp = batch.dense(j, weight_ph.dtype)
            out_bch[:, j if diagonal else 0] += x_bp @ weight_ph[starts[j] : starts[j + 1]]
        return out_bch if diagonal else out_bch[:, 0]

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None, None]:
        grad_out, batch = grads[0], ctx.batch
        starts = batch.blocks.starts
        grad_ph = grad_out.new_empty(ctx.shape)
        for j in range(len(batch.blocks.sizes)):
            grad_bh = grad_out[:, j] if ctx.diagonal else grad_out
            torch.mm(batch.dense(j, grad_out.dtype).t(), grad_bh, out=grad_ph[starts[j] : starts[j + 1]])
        return grad_ph, None, None


@torch.no_grad()
def _draw(layer: SparseLinear | BlockLogits, fan_in: int) -> None:
    """Xavier uniform within each block and no bias if block-diagonal, else as torch.nn.Linear does."""
    if layer.diagonal:
        for part_ph in layer.weight.split(layer.blocks.sizes):
            nn.init.xavier_uniform_(part_ph)
        layer.bias.zero_()
    else:
        bound = 1 / math.sqrt(fan_in)
        layer.weight.uniform_(-bound, bound)
        layer.bias.uniform_(-bound, bound)


class _Layer(nn.Module):
    """Base of the layers: memory of the gradient of their weight while they train, used by their compiled forms."""

    def __init__(self) -> None:
        super().__init__()
        self.buffer = GradientBuffer()

    def train(self, mode: bool = True) -> Self:  # noqa: FBT001, FBT002
        """Set the mode; a layer that does not train holds no memory for gradients."""
        if not mode:
            self.buffer.release()
        return super().train(mode)


class SparseLinear(_Layer):
    """First layer on sparse peaks: y = x W + bias, x never dense as a whole.

    Parameters
    ----------
    blocks
        The blocks of peaks.
    n_hidden
        Hidden units, of each block if ``diagonal``.
    diagonal
        If true, each block has hidden units of its own (a block-diagonal weight) and the output has shape
        (b, c, h); else all blocks add to the same units and the output has shape (b, h).
    """

    def __init__(self, blocks: PeakBlocks, n_hidden: int, *, diagonal: bool) -> None:
        super().__init__()
        self.blocks = blocks
        self.diagonal = diagonal
        self.weight = nn.Parameter(torch.empty(blocks.n_peaks, n_hidden))
        self.bias = nn.Parameter(torch.empty(len(blocks.sizes), n_hidden) if diagonal else torch.empty(n_hidden))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights: Xavier uniform within each block if block-diagonal, else as torch.nn.Linear does."""
        _draw(self, fan_in=self.blocks.n_peaks)

    def forward(self, batch: BlockedRows | PeakLists) -> Tensor:
        """Return hidden units, shape (b, c, h) if block-diagonal, else (b, h)."""
        if isinstance(batch, PeakLists):
            return sparse_product(self.weight, batch, diagonal=self.diagonal, buffer=self.buffer) + self.bias
        return _BlockMatmul.apply(self.weight, batch, self.diagonal) + self.bias


class BlockLogits(_Layer):
    """Last layer of a decoder: hidden units to one logit a peak, block by block.

    Parameters
    ----------
    blocks
        The blocks of peaks.
    n_hidden
        Hidden units, of each block if ``diagonal``.
    diagonal
        If true, the input has shape (b, c, h) and each block reads its own units; else it has shape (b, h).
    """

    def __init__(self, blocks: PeakBlocks, n_hidden: int, *, diagonal: bool) -> None:
        super().__init__()
        self.blocks = blocks
        self.diagonal = diagonal
        self.weight = nn.Parameter(torch.empty(blocks.n_peaks, n_hidden))
        self.bias = nn.Parameter(torch.empty(blocks.n_peaks))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights: Xavier uniform within each block if block-diagonal, else as torch.nn.Linear does."""
        _draw(self, fan_in=self.weight.shape[1])

    def forward(self, hidden: Tensor) -> Iterator[Tensor]:
        """Yield the logits of each block, shape (b, size of the block), peaks in block order."""
        # one split node: slicing in the loop would make autograd fill a full-size gradient for each block
        parts = zip(self.weight.split(self.blocks.sizes), self.bias.split(self.blocks.sizes), strict=True)
        hidden_c = hidden.unbind(1) if self.diagonal else (hidden,) * len(self.blocks.sizes)
        for hidden_bh, (weight_ph, bias_p) in zip(hidden_c, parts, strict=True):
            yield torch.addmm(bias_p, hidden_bh, weight_ph.t())

    def columns(self, hidden: Tensor, peaks: Tensor) -> Tensor:
        """Return the logits of chosen peaks only.

        Parameters
        ----------
        hidden
            Shape (b, c, h) if block-diagonal, else (b, h).
        peaks
            Shape (k,): numbers of peaks in the user's order.

        Returns
        -------
        Logits, shape (b, k), columns as in ``peaks``.
        """
        position_k = self.blocks.rank[peaks]
        weight_kh, bias_k = self.weight[position_k], self.bias[position_k]
        if not self.diagonal:
            return torch.addmm(bias_k, hidden, weight_kh.t())
        out_bk = hidden.new_empty(hidden.shape[0], peaks.numel())
        block_k = self.blocks.block[peaks].long()
        for j in block_k.unique().tolist():
            where_k = torch.nonzero(block_k == j)[:, 0]
            out_bk[:, where_k] = torch.addmm(bias_k[where_k], hidden[:, j], weight_kh[where_k].t())
        return out_bk
