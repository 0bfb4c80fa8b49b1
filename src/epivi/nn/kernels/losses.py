"""Likelihoods of the layer between hidden units and all peaks, as functions of autograd, without its logits.

They take CPU tensors of single precision. Legend of shapes: b cells of the batch, p peaks, c blocks of peaks, h hidden
units.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.autograd.function import once_differentiable

from epivi.nn.kernels._threads import run_all
from epivi.nn.kernels.products import NO_VALUES, GradientBuffer, PeakLists, count_totals

if TYPE_CHECKING:
    from torch import Tensor

    from epivi.nn.linear import PeakBlocks


class _Pass:
    """Passes over all blocks of a logit layer, with what they need in arrays."""

    def __init__(
        self,
        hidden: Tensor,
        weight_ph: Tensor,
        bias_p: Tensor,
        batch: PeakLists,
        *,
        half: bool,
        buffer: GradientBuffer | None = None,
    ) -> None:
        from epivi.nn.kernels import _decoder

        self.buffer = buffer or GradientBuffer()
        self.kernels, self.batch, self.half = _decoder, batch, half
        self.diagonal = hidden.ndim == 3
        hidden = hidden.detach() if self.diagonal else hidden.detach().unsqueeze(1)
        self.hidden = hidden.contiguous()
        self.weight, self.bias = weight_ph.detach().contiguous(), bias_p.detach().contiguous()
        self.n_cells = _decoder.padded(batch.n_rows)
        self.n_hidden = _decoder.padded(self.hidden.shape[2])
        self.factors = np.array([1.0, 1.0, 0.0], dtype=np.float32)
        # rows of n_cells, one for each block: the blocks do not wait for each other
        n_blocks = len(batch.blocks.sizes)
        self.loss_cb = np.zeros((n_blocks, batch.n_rows))
        self.states = np.zeros((n_blocks, 2, self.n_cells), dtype=np.float32)
        self.scale = np.zeros(self.n_cells, dtype=np.float32)
        self.gradients: tuple[Tensor, Tensor] | None = None
        self.grad_chb = np.zeros((1, 1, 1), dtype=np.float32)

    def run(self, kind: int, *, scale: Tensor | float = 1.0, wanted: bool = False) -> None:
        """Go over all blocks; with ``wanted`` gradients are left in ``gradients`` and ``grad_chb``."""
        n_blocks = len(self.states)
        self.scale[: self.batch.n_rows] = scale.numpy() if isinstance(scale, torch.Tensor) else scale
        grad_weight, grad_bias = np.zeros((1, 1), dtype=np.float32), NO_VALUES
        self.grad_chb = np.zeros((n_blocks, self.n_hidden, self.n_cells) if wanted else (n_blocks, 1, 1), np.float32)
        if wanted:
            self.gradients = self.buffer.take(self.weight.shape), torch.empty_like(self.bias)
            grad_weight, grad_bias = (gradient.numpy() for gradient in self.gradients)
        lists = (self.batch.starts, self.batch.cells, self.batch.counts)
        hidden, weight, bias = self.hidden.numpy(), self.weight.numpy(), self.bias.numpy()
        starts = self.batch.blocks.starts
        jobs = [
            (
                kind,
                hidden,
                j if self.diagonal else 0,
                weight,
                bias,
                (starts[j], starts[j + 1]),
                lists,
                self.factors,
                self.scale,
                self.states[j],
                self.loss_cb[j],
                (wanted, self.grad_chb[j], grad_weight, grad_bias),
                self.half,
            )
            for j in range(n_blocks)
        ]
        run_all(self.kernels.decode_block, jobs)

    def take_gradients(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of hidden units, weight and bias, and let go of them."""
        if self.gradients is None:
            message = "no gradients were computed"
            raise RuntimeError(message)
        weight_ph, bias_p = self.gradients
        self.gradients = None
        grad_chb = torch.from_numpy(self.grad_chb)[:, : self.hidden.shape[2], : self.batch.n_rows]
        hidden = grad_chb.permute(2, 0, 1).contiguous() if self.diagonal else grad_chb.sum(0).t().contiguous()
        self.grad_chb = np.zeros((1, 1, 1), dtype=np.float32)
        return hidden, weight_ph, bias_p


class _Bernoulli(_Pass):
    """The weighted Bernoulli likelihood in one pass."""

    def compute(self, scale: Tensor | float, *, wanted: bool) -> Tensor:
        """Return the losses, with gradients if they are wanted."""
        self.loss_cb[:] = 0.0
        self.run(self.kernels.BERNOULLI, scale=scale, wanted=wanted)
        return torch.from_numpy(self.loss_cb.sum(0).astype(np.float32))


class _Multinomial(_Pass):
    """The multinomial likelihood: one pass for the sum of the exponentials, one for the gradients."""

    total_b: np.ndarray

    def compute(self, scale: Tensor | float, *, wanted: bool) -> Tensor:
        """Return the losses, with gradients if they are wanted."""
        self.loss_cb[:] = 0.0
        self.states[:, 0], self.states[:, 1] = -np.inf, 0.0
        self.run(self.kernels.LOG_SUM)
        n_rows = self.batch.n_rows
        with np.errstate(invalid="ignore"):  # logits that are not finite make a loss that is not
            largest_b = self.states[:, 0].max(0)
            sum_b = (self.states[:, 1].astype(np.float64) * np.exp(self.states[:, 0] - largest_b)).sum(0)
            log_sum_b = largest_b + np.log(sum_b)
        total_b = self.total_b
        loss_b = self.loss_cb.sum(0) + total_b * log_sum_b[:n_rows]
        if wanted:
            scale_b = scale.numpy() if isinstance(scale, torch.Tensor) else scale
            self.states[:, 0] = log_sum_b
            self.states[:, 1] = 0.0
            self.states[:, 1, :n_rows] = total_b * scale_b
            self.run(self.kernels.MULTINOMIAL, scale=scale, wanted=True)
        return torch.from_numpy(loss_b.astype(np.float32))


class _Loss(torch.autograd.Function):
    """A likelihood whose gradients are made with it, for an expected gradient of the losses.

    Where the true one is another multiple of ones the gradients are multiplied; else they are computed again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,  # noqa: ARG004
        weight_ph: Tensor,  # noqa: ARG004
        bias_p: Tensor,  # noqa: ARG004
        work: Any,
        expected: float,
        wanted: bool,  # noqa: FBT001
    ) -> Tensor:
        ctx.work, ctx.expected = work, expected
        return work.compute(expected, wanted=wanted)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad_b, work = grads[0], ctx.work
        factor = float(grad_b[0]) / ctx.expected
        is_uniform = bool((grad_b == grad_b[0]).all())
        if work.gradients is None or not is_uniform:
            work.compute(grad_b.contiguous(), wanted=True)
            factor = 1.0
        found = work.take_gradients()
        if factor != 1.0:
            for gradient in found:
                gradient.mul_(factor)
        return (*(g if needed else None for g, needed in zip(found, ctx.needs_input_grad, strict=False)), *[None] * 3)


def layer_outputs(
    hidden: Tensor,
    weight_ph: Tensor,
    bias_p: Tensor,
    blocks: PeakBlocks,
    *,
    shift: float | None = None,
    out_bp: Tensor | None = None,
) -> Tensor:
    r"""Return the logits of a layer, or with a shift s the probabilities :math:`1 / (1 + e^{s - a})`; no gradients.

    Parameters
    ----------
    hidden, weight_ph, bias_p
        As in :func:`bernoulli_loss`.
    blocks
        The blocks of peaks.
    shift
        What is taken from each logit before it becomes a probability.
    out_bp
        Where they are written to, contiguous; new memory if it is not given.

    Returns
    -------
    Shape (b, p), peaks in block order.

    Examples
    --------
    >>> from epivi.nn.linear import PeakBlocks
    >>> arguments = torch.zeros(1, 2), torch.ones(3, 2), torch.ones(3), PeakBlocks.tiles(3)
    >>> layer_outputs(*arguments).tolist(), layer_outputs(*arguments, shift=1.0).tolist()
    ([[1.0, 1.0, 1.0]], [[0.5, 0.5, 0.5]])
    """
    from epivi.nn.kernels import _outputs

    diagonal = hidden.ndim == 3
    hidden_bch = (hidden if diagonal else hidden.unsqueeze(1)).detach().contiguous().numpy()
    out_bp = torch.empty(hidden.shape[0], blocks.n_peaks) if out_bp is None else out_bp
    layer = weight_ph.detach().contiguous().numpy(), bias_p.detach().contiguous().numpy()
    last = np.float32(0.0 if shift is None else shift), shift is not None, out_bp.numpy(), False
    jobs = [(hidden_bch, j if diagonal else 0, *layer, part, *last) for j, part in enumerate(pairwise(blocks.starts))]
    run_all(_outputs.outputs_of_block, jobs)
    return out_bp


def bernoulli_loss(  # noqa: PLR0913
    hidden: Tensor,
    weight_ph: Tensor,
    bias_p: Tensor,
    batch: PeakLists,
    *,
    weight: float = 1.0,
    closed_weight: float = 1.0,
    shift: float = 0.0,
    half: bool = False,
    expected: float = 1.0,
    buffer: GradientBuffer | None = None,
) -> Tensor:
    r"""Return the weighted Bernoulli loss of a logit layer, one value a cell, without the logits.

    The logits are :math:`a = h W^T + b - s`; the loss is that of
    :func:`epivi.objectives.likelihoods.weighted_bernoulli`.

    Parameters
    ----------
    hidden
        Shape (b, c, h) for a block-diagonal layer, else (b, h).
    weight_ph, bias_p
        Of the layer, peaks in block order.
    batch
        The open peaks.
    weight, closed_weight, shift
        Weights of open and of closed entries; what is taken from each logit.
    half
        Multiply in bfloat16, with sums in single precision: relative errors of gradients about 0.003.
    expected
        What the gradient of each loss will be; gradients are made with the loss, and again only if they must.
    buffer
        Memory of the gradient of the weight.

    Returns
    -------
    Shape (b,), in nats.

    Examples
    --------
    >>> from epivi.nn.kernels import list_by_peak
    >>> from epivi.nn.linear import PeakBlocks
    >>> lists = list_by_peak(PeakBlocks.tiles(4), torch.tensor([0, 1]), torch.tensor([1]))
    >>> round(bernoulli_loss(torch.zeros(1, 2), torch.ones(4, 2), torch.zeros(4), lists).item(), 4)
    2.7726
    """
    work = _Bernoulli(hidden, weight_ph, bias_p, batch, half=half, buffer=buffer)
    work.factors[:] = closed_weight, weight, shift
    return _Loss.apply(hidden, weight_ph, bias_p, work, expected, torch.is_grad_enabled())


def multinomial_loss(
    hidden: Tensor,
    weight_ph: Tensor,
    bias_p: Tensor,
    batch: PeakLists,
    *,
    total_b: Tensor | None = None,
    half: bool = False,
    expected: float = 1.0,
    buffer: GradientBuffer | None = None,
) -> Tensor:
    r"""Return :math:`n_i \log\sum_g e^{a_{ig}} - \sum_g x_{ig} a_{ig}` of a logit layer, one value a cell.

    It is the negative log-likelihood of a multinomial, or of Poisson counts whose rates add up to the total count
    :math:`n_i`, but for a constant of the data.

    Parameters
    ----------
    hidden, weight_ph, bias_p, half, expected, buffer
        As in :func:`bernoulli_loss`.
    batch
        The counts x.
    total_b
        Total counts n, as :func:`epivi.nn.kernels.count_totals` gives them; computed if they are not at hand.

    Returns
    -------
    Shape (b,), in nats.

    Examples
    --------
    >>> from epivi.nn.kernels import list_by_peak
    >>> from epivi.nn.linear import PeakBlocks
    >>> x = torch.tensor([0, 1]), torch.tensor([1]), None, torch.tensor([3.0])
    >>> loss = multinomial_loss(
    ...     torch.zeros(1, 2), torch.ones(4, 2), torch.zeros(4), list_by_peak(PeakBlocks.tiles(4), *x)
    ... )
    >>> round(loss.item(), 4)
    4.1589
    """
    work = _Multinomial(hidden, weight_ph, bias_p, batch, half=half, buffer=buffer)
    work.total_b = (count_totals(batch)[0] if total_b is None else total_b).numpy()
    return _Loss.apply(hidden, weight_ph, bias_p, work, expected, torch.is_grad_enabled())
