"""Lengths, paddings and positions of strided convolutions over runs of bins.

A track of l bins is cut into segments (chromosomes, or runs without a gap); every segment is convolved as if alone.
Legend of shapes: b cells of the batch, c channels, l bins, o output channels, s stride, t positions after striding.
"""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import nn

from epivi._errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

# copying run by run is several times faster than gathering one by one, until the runs are short and many
MAX_COPIED_RUNS = 64


def check_convolution(
    segments: Sequence[int],
    kernel_size: int,
    stride: int,
    widths: Sequence[int] = (1,),
    dropout_rate: float = 0.0,
) -> None:
    """Refuse sizes for which the convolution is not defined.

    Raises
    ------
    ConfigError
        If the stride is below one, the kernel is smaller than the stride (bins would be skipped), there is no
        segment or an empty one, there is no layer or one without channels, or the dropout rate is not in [0, 1).

    Examples
    --------
    >>> check_convolution((10, 7), kernel_size=5, stride=3)
    """
    if stride < 1:
        message = f"The stride is {stride}; it must be at least 1."
        raise ConfigError(message)
    if kernel_size < stride:
        message = (
            f"The kernel covers {kernel_size} bins and moves by {stride}: bins between two windows would be skipped. "
            f"Set kernel_size to {stride} or more."
        )
        raise ConfigError(message)
    if not segments or min(segments) < 1:
        message = f"Every segment needs at least one bin; the lengths are {tuple(segments)[:10]}."
        raise ConfigError(message)
    if not widths or min(widths) < 1:
        message = f"Every layer needs at least one channel; the widths are {tuple(widths)}."
        raise ConfigError(message)
    if not 0.0 <= dropout_rate < 1.0:
        message = f"The dropout rate is {dropout_rate}; it must be at least 0 and below 1."
        raise ConfigError(message)


def layer_lengths(length: int, stride: int, n_layers: int) -> tuple[int, ...]:
    r"""Return the length of one segment before and after each layer: :math:`L_i = \lceil L_{i-1} / S \rceil`.

    Examples
    --------
    >>> layer_lengths(25_000, 3, 3)
    (25000, 8334, 2778, 926)
    """
    return tuple(accumulate(range(n_layers), lambda n, _: -(-n // stride), initial=length))


def encoder_padding(length: int, kernel_size: int, stride: int) -> int:
    r"""Return the zeros left of a segment before a layer: :math:`P_i = (L_i - 1) S - L_{i-1} + K`.

    The last window then ends at the last bin.

    Examples
    --------
    >>> encoder_padding(25_000, 31, 31)
    17
    """
    return (-(-length // stride) - 1) * stride - length + kernel_size


def decoder_padding(length: int, kernel_size: int, stride: int) -> int:
    r"""Return the zeros left of an upsampled segment: :math:`p_i = L_{i-1} - S L_i + K - 1`.

    Parameters
    ----------
    length
        Length after the layer, :math:`L_{i-1}`.
    kernel_size, stride
        K and S.

    Examples
    --------
    >>> decoder_padding(25_000, 31, 31)
    13
    """
    return length + stride * (-length // stride) + kernel_size - 1


def receptive_field(kernel_size: int, stride: int, n_layers: int) -> int:
    r"""Return the bins seen by one position after the layers: :math:`1 + (K - 1)(1 + S + S^2 + \dots)`.

    Examples
    --------
    >>> receptive_field(11, 3, 2)
    41
    """
    return 1 + (kernel_size - 1) * sum(stride**i for i in range(n_layers))


class Runs(nn.Module):
    """Where runs of positions lie in a longer axis: ``place`` puts them there, ``pick`` takes them out.

    Parameters
    ----------
    starts, sizes
        Start and length of each run in the longer axis, in order and without overlap.
    total
        Length of the longer axis.

    Examples
    --------
    >>> runs = Runs([1, 4], [2, 1], 6)
    >>> runs.place(torch.tensor([5.0, 6.0, 7.0])).tolist()
    [0.0, 5.0, 6.0, 0.0, 7.0, 0.0]
    >>> runs.pick(torch.arange(6)).tolist()
    [1, 2, 4]
    """

    index: Tensor

    def __init__(self, starts: Sequence[int], sizes: Sequence[int], total: int) -> None:
        super().__init__()
        self.total = int(total)
        self.slices = tuple(zip(starts, sizes, strict=True))
        positions = [torch.arange(start, start + size) for start, size in self.slices]
        self.register_buffer("index", torch.cat(positions), persistent=False)

    @property
    def is_identity(self) -> bool:
        """Whether the runs fill the axis."""
        return self.index.numel() == self.total

    def place(self, x: Tensor) -> Tensor:
        """Put the last axis into the longer one, zeros elsewhere."""
        return x if self.is_identity else _Place.apply(x, self)

    def pick(self, x: Tensor) -> Tensor:
        """Take the runs out of the last axis."""
        return x if self.is_identity else _Pick.apply(x, self)

    def copied(self, x: Tensor) -> bool:
        """Whether the runs are copied one by one: on a GPU one gather is faster."""
        return len(self.slices) == 1 or (len(self.slices) <= MAX_COPIED_RUNS and x.device.type == "cpu")


def _place(x: Tensor, runs: Runs) -> Tensor:
    out = x.new_zeros(*x.shape[:-1], runs.total)
    if not runs.copied(x):
        return out.index_copy_(-1, runs.index, x)
    at = 0
    for start, size in runs.slices:
        out.narrow(-1, start, size).copy_(x.narrow(-1, at, size))
        at += size
    return out


def _pick(x: Tensor, runs: Runs) -> Tensor:
    if not runs.copied(x):
        return x.index_select(-1, runs.index)
    out = x.new_empty(*x.shape[:-1], runs.index.numel())
    at = 0
    for start, size in runs.slices:
        out.narrow(-1, at, size).copy_(x.narrow(-1, start, size))
        at += size
    return out


class _Place(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, runs: Runs) -> Tensor:
        ctx.runs = runs
        return _place(x, runs)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None]:
        return _pick(grads[0], ctx.runs), None


class _Pick(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, runs: Runs) -> Tensor:
        ctx.runs = runs
        return _pick(x, runs)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None]:
        return _place(grads[0], ctx.runs), None


class _Interleave(torch.autograd.Function):
    """Phases to positions: out[s t + r] = y[r, t] + base[t], the first outputs of each segment dropped."""

    @staticmethod
    def forward(ctx, y_bost: Tensor, base_bot: Tensor, segments: tuple[int, ...]) -> Tensor:
        ctx.segments = segments
        out_bol = y_bost.new_empty(*y_bost.shape[:2], sum(segments))
        for out_bo, y_bo, base_bo in _matched(out_bol, y_bost, base_bot, segments):
            torch.add(y_bo, base_bo, out=out_bo)
        # the gradient takes the memory order of y
        ctx.like = torch.empty_like(y_bost, device="meta")
        return out_bol

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        grad_bost = torch.empty_like(ctx.like, device=grads[0].device, dtype=grads[0].dtype)
        base_bot = grad_bost[:, :, 0]
        grad_out = grads[0].contiguous()
        stride, t = grad_bost.shape[2], 0
        for length in ctx.segments:
            grad_bost[:, :, : -length % stride, t] = 0.0
            t += -(-length // stride)
        for out_bo, y_bo, _ in _matched(grad_out, grad_bost, base_bot, ctx.segments):
            y_bo.copy_(out_bo)
        return grad_bost, grad_bost.sum(2) if ctx.needs_input_grad[1] else None, None


def _matched(out_bol: Tensor, y_bost: Tensor, base_bot: Tensor, segments: tuple[int, ...]):
    """Yield views of output, phases and base that hold the same positions: first window, then the others."""
    stride, at, t = y_bost.shape[2], 0, 0
    for length in segments:
        drop, n = -length % stride, -(-length // stride)
        if drop:
            yield out_bol[:, :, at : at + stride - drop], y_bost[:, :, drop:, t], base_bot[:, :, t : t + 1]
            at, t, n = at + stride - drop, t + 1, n - 1
        if n:
            whole = out_bol[:, :, at : at + n * stride].unflatten(2, (n, stride))
            yield whole, y_bost[:, :, :, t : t + n].transpose(2, 3), base_bot[:, :, t : t + n, None]
            at, t = at + n * stride, t + n


class Interleave(nn.Module):
    """Bring phases of low-resolution positions into the order of the bins, segment by segment.

    Parameters
    ----------
    segments
        Lengths of the segments after the layer.
    stride
        Phases of a position.

    Examples
    --------
    >>> y = torch.arange(6.0).view(1, 1, 2, 3)  # two phases of three positions
    >>> Interleave((3, 2), 2)(y, torch.zeros(1, 1, 3)).tolist()
    [[[3.0, 1.0, 4.0, 2.0, 5.0]]]
    """

    def __init__(self, segments: Sequence[int], stride: int) -> None:
        super().__init__()
        self.segments = tuple(segments)
        windows = [-(-n // stride) for n in segments]
        ends = [stride * end for end in accumulate(windows)]
        self.runs = Runs([end - n for end, n in zip(ends, segments, strict=True)], segments, ends[-1])

    def forward(self, y_bost: Tensor, base_bot: Tensor) -> Tensor:
        """Return the bins, shape (b, o, l), from phases (b, o, s, t) and what all phases share (b, o, t)."""
        if self.runs.copied(y_bost):
            return _Interleave.apply(y_bost, base_bot, self.segments)
        return self.runs.pick((y_bost + base_bot.unsqueeze(2)).transpose(2, 3).flatten(2))
