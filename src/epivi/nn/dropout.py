"""ReLU and dropout in one step, without a stored mask."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import dropout

if TYPE_CHECKING:
    from torch import Tensor

LEVELS = 2**16
CHUNK = 2**18


def _drop(x: Tensor, rate: float) -> float:
    """Drop values of a flat tensor in place, scale the others and return the factor.

    One random 64-bit number decides over four values, so the share dropped is a multiple of 1 / 65,536; a few values at
    a time, so that the random numbers stay in the cache.
    """
    dropped = round(rate * LEVELS)
    scale = LEVELS / (LEVELS - dropped)
    words = torch.empty(CHUNK // 4, dtype=torch.int64)
    for part in x.split(CHUNK):
        noise = words[: -(-part.numel() // 4)].random_(-(2**63), None).view(torch.int16)[: part.numel()]
        part.mul_((noise >= dropped - LEVELS // 2).to(x.dtype).mul_(scale))
    return scale


class _ReluDropout(torch.autograd.Function):
    """The output tells which values passed: those above zero."""

    @staticmethod
    def forward(ctx, x: Tensor, rate: float) -> Tensor:
        ctx.mark_dirty(x)
        out = x.relu_()
        if x.device.type == "cpu":
            ctx.scale = _drop(out.view(-1), rate)
        else:
            ctx.scale = 1.0 / (1.0 - rate)
            dropout(out, rate, training=True, inplace=True)
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None]:
        (out,) = ctx.saved_tensors
        return torch.ops.aten.threshold_backward(grads[0], out, 0).mul_(ctx.scale), None


def relu_dropout_(x: Tensor, rate: float, *, training: bool) -> Tensor:
    """Return dropout(relu(x)), any shape, written over x.

    Values are dropped independently with probability ``rate`` and the others scaled by 1 / (1 - rate). Only the output
    is kept for the gradient. On CPU the rate is rounded to a multiple of 1 / 65,536, and scaled by accordingly.

    Parameters
    ----------
    x
        Any values, contiguous.
    rate
        Share dropped in training, at least 0 and below 1.
    training
        Whether anything is dropped.

    Examples
    --------
    >>> relu_dropout_(torch.tensor([-1.0, 2.0]), 0.2, training=False).tolist()
    [0.0, 2.0]
    """
    return _ReluDropout.apply(x, rate) if training and rate > 0 else x.relu_()
