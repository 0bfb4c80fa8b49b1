"""Sparse peaks, and their products with weights, as functions of autograd.

They take CPU tensors of single precision. Legend of shapes: b cells of the batch, p peaks, o non-zeros, c blocks of
peaks, h hidden units.
"""

from __future__ import annotations

import sys
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch.autograd.function import once_differentiable

from epivi._errors import DataError
from epivi.nn.kernels._threads import run_all

if TYPE_CHECKING:
    from torch import Tensor

    from epivi.nn.linear import PeakBlocks

MAX_KEPT = 4  # gradients whose memory is remembered
NO_VALUES = np.empty(0, dtype=np.float32)
_NO_RANK = np.empty(0, dtype=np.int64)
_LOG_FACTORIALS = np.cumsum(np.log(np.maximum(np.arange(256.0), 1.0)))


def has_half_precision() -> bool:
    """Whether the processor multiplies bfloat16 in hardware (AVX-512 BF16)."""
    from epivi.nn.kernels._vectors import HAS_BF16

    return HAS_BF16


class GradientBuffer:
    """Memory of gradients, used again for others of the same shape as soon as nothing refers to it.

    New memory of many megabytes costs as much time as the product that fills it. Layers whose gradients follow one
    another may share it.

    Examples
    --------
    >>> buffer = GradientBuffer()
    >>> first, second = buffer.take((2, 3)), buffer.take((2, 3))
    >>> first.data_ptr() == second.data_ptr()
    False
    >>> place = second.data_ptr()
    >>> del second
    >>> buffer.take((2, 3)).data_ptr() == place
    True
    """

    def __init__(self) -> None:
        self.release()

    def release(self) -> None:
        """Let go of the memory."""
        self.arrays: list[np.ndarray] = []
        self.n_own = 0  # references to an array that nothing else refers to

    def _references(self, number: int) -> int:
        return sys.getrefcount(self.arrays[number])

    def take(self, shape: tuple[int, ...]) -> Tensor:
        """Return memory of a shape, holding anything; a tensor, or a view of it, keeps it from being used again."""
        for number in range(len(self.arrays)):
            if self.arrays[number].shape == tuple(shape) and self._references(number) == self.n_own:
                return torch.from_numpy(self.arrays[number])
        if len(self.arrays) == MAX_KEPT:  # gradients that someone keeps are theirs
            del self.arrays[0]
        self.arrays.append(np.empty(shape, dtype=np.float32))
        self.n_own = self._references(-1)
        return torch.from_numpy(self.arrays[-1])


class PeakLists(NamedTuple):
    """The non-zeros of a batch, peak by peak in block order.

    Attributes
    ----------
    n_rows
        Cells of the batch.
    starts, cells
        Shapes (p + 1,) and (o,): where the entries of each peak start, and their cells.
    values, counts
        Shape (o,): what the encoder reads (empty where every entry is one), and counts (empty where there are none).
    totals
        Shape (2, b): sum of the counts of each cell, and of the logs of their factorials.
    blocks
        The blocks of peaks.
    """

    n_rows: int
    starts: np.ndarray
    cells: np.ndarray
    values: np.ndarray
    counts: np.ndarray
    totals: np.ndarray
    blocks: PeakBlocks


def list_by_peak(
    blocks: PeakBlocks, indptr: Tensor, indices: Tensor, values: Tensor | None = None, counts: Tensor | None = None
) -> PeakLists:
    """List the non-zeros of compressed rows peak by peak.

    Parameters
    ----------
    blocks
        The blocks of peaks.
    indptr, indices
        Compressed rows, shapes (b + 1,) and (o,), int64.
    values, counts
        Of the entries, shape (o,); ``None`` where every entry is one.

    Raises
    ------
    DataError
        If the number of a peak is outside the blocks.

    Examples
    --------
    >>> from epivi.nn.linear import PeakBlocks
    >>> lists = list_by_peak(PeakBlocks.tiles(3), torch.tensor([0, 2, 3]), torch.tensor([0, 2, 2]))
    >>> lists.starts.tolist(), lists.cells.tolist()
    ([0, 1, 1, 3], [0, 0, 1])
    """
    from epivi.nn.kernels import _sparse

    n = indices.numel()
    columns = [NO_VALUES if column is None else column.float().numpy() for column in (values, counts)]
    written = [np.empty(column.size, dtype=np.float32) for column in columns]
    starts, cells = np.empty(blocks.n_peaks + 1, dtype=np.int64), np.empty(n, dtype=np.int32)
    rank = _NO_RANK if blocks.is_ordered else blocks.rank.numpy()
    lists = (starts, cells, written[0], written[1], np.zeros((2, indptr.numel() - 1)))
    if not _sparse.list_by_peak(indptr.numpy(), indices.numpy(), rank, columns[0], columns[1], _LOG_FACTORIALS, lists):
        found = f"{int(indices.min())} to {int(indices.max())}"
        message = f"The batch holds peaks {found}, and the layers know 0 to {blocks.n_peaks - 1}."
        raise DataError(message)
    return PeakLists(indptr.numel() - 1, *lists, blocks)


def _strips(n_hidden: int) -> list[tuple[int, int]]:
    """Cut hidden units into strips as wide as a kernel goes over at a time; the last one may overlap."""
    from epivi.nn.kernels._sparse import NARROW, WIDE

    width = WIDE if n_hidden >= WIDE else NARROW if n_hidden >= NARROW else n_hidden
    firsts = [*range(0, n_hidden - width, width), n_hidden - width]
    return [(first, first + width) for first in firsts]


def count_totals(batch: PeakLists) -> tuple[Tensor, Tensor]:
    """Return the total count and the sum of the logs of the factorials of each cell, both of shape (b,), float64.

    Examples
    --------
    >>> from epivi.nn.linear import PeakBlocks
    >>> x = torch.tensor([0, 2]), torch.tensor([0, 1]), None, torch.tensor([2.0, 1.0])
    >>> [round(total.item(), 4) for total in count_totals(list_by_peak(PeakBlocks.tiles(3), *x))]
    [3.0, 0.6931]
    """
    return torch.from_numpy(batch.totals[0]), torch.from_numpy(batch.totals[1])


class _SparseProduct(torch.autograd.Function):
    """Product of sparse rows with a weight, summed over blocks or one result a block."""

    @staticmethod
    def forward(ctx: Any, weight_ph: Tensor, batch: PeakLists, diagonal: bool, buffer: GradientBuffer) -> Tensor:  # noqa: FBT001
        from epivi.nn.kernels import _sparse

        ctx.buffer = buffer
        ctx.batch, ctx.diagonal, ctx.shape = batch, diagonal, weight_ph.shape
        starts, n_hidden = batch.blocks.starts, weight_ph.shape[1]
        peaks = list(pairwise(starts)) if diagonal else [(0, starts[-1])]
        out_bch = torch.empty(batch.n_rows, len(peaks), n_hidden)
        lists = (batch.starts, batch.cells, batch.values)
        weight, out = weight_ph.detach().numpy(), out_bch.numpy()
        run_all(
            _sparse.rows_times_matrix,
            [(part, lists, weight, strip, out, j) for j, part in enumerate(peaks) for strip in _strips(n_hidden)],
        )
        return out_bch if diagonal else out_bch[:, 0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        from epivi.nn.kernels import _sparse

        batch, starts = ctx.batch, ctx.batch.blocks.starts
        grad_bch = (grads[0] if ctx.diagonal else grads[0].unsqueeze(1)).contiguous().numpy()
        grad_ph = ctx.buffer.take(ctx.shape)
        lists, out = (batch.starts, batch.cells, batch.values), grad_ph.numpy()
        jobs = [
            (part, lists, grad_bch, j if ctx.diagonal else 0, strip, out)
            for j, part in enumerate(pairwise(starts))
            for strip in _strips(ctx.shape[1])
        ]
        run_all(_sparse.columns_times_matrix, jobs)
        return grad_ph, None, None, None


def sparse_product(
    weight_ph: Tensor, batch: PeakLists, *, diagonal: bool, buffer: GradientBuffer | None = None
) -> Tensor:
    """Return x W: shape (b, c, h) with one result a block if ``diagonal``, else (b, h).

    Parameters
    ----------
    weight_ph
        Shape (p, h), peaks in block order.
    batch
        The sparse rows x.
    diagonal
        Whether each block is multiplied by itself.
    buffer
        Memory of the gradient.

    Examples
    --------
    >>> from epivi.nn.linear import PeakBlocks
    >>> lists = list_by_peak(PeakBlocks.tiles(3), torch.tensor([0, 2, 3]), torch.tensor([0, 2, 2]))
    >>> sparse_product(torch.tensor([[1.0], [2.0], [4.0]]), lists, diagonal=False).tolist()
    [[5.0], [4.0]]
    """
    return _SparseProduct.apply(weight_ph, batch, diagonal, buffer or GradientBuffer())
