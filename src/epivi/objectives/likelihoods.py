"""Likelihoods of sparse accessibility, and the calibration of weighted ones.

Legend of shapes: b cells of the batch, p peaks, o non-zeros.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn.functional import softplus

from epivi.nn.kernels import PeakLists, bernoulli_loss, count_totals, multinomial_loss

if TYPE_CHECKING:
    from torch import Tensor

    from epivi.nn.linear import BlockedRows, BlockLogits


class _WeightedBernoulli(torch.autograd.Function):
    """Dense pass as if every peak were closed, then a correction at the open ones."""

    @staticmethod
    def forward(ctx, logits_bp: Tensor, open_o: Tensor, rows_o: Tensor, weight: float, closed_weight: float) -> Tensor:
        logits_o = logits_bp.reshape(-1)[open_o]
        loss_b = softplus(logits_bp).sum(1)
        if closed_weight != 1.0:
            loss_b = loss_b * closed_weight
        correction_o = (weight - closed_weight) * softplus(logits_o) - weight * logits_o
        ctx.save_for_backward(logits_bp, open_o)
        ctx.weight, ctx.closed_weight = weight, closed_weight
        return loss_b.index_add_(0, rows_o, correction_o)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        logits_bp, open_o = ctx.saved_tensors
        grad_bp = torch.sigmoid(logits_bp)
        if ctx.closed_weight != 1.0:
            grad_bp *= ctx.closed_weight
        flat = grad_bp.view(-1)
        flat[open_o] = ctx.weight * (torch.sigmoid(logits_bp.reshape(-1)[open_o]) - 1.0)
        grad_bp *= grads[0].unsqueeze(1)
        return grad_bp, None, None, None, None


def weighted_bernoulli(
    logits_bp: Tensor, open_o: Tensor, rows_o: Tensor, weight: float = 1.0, *, closed_weight: float = 1.0
) -> Tensor:
    r"""Return the weighted negative log-likelihood of binary accessibility, one value a cell.

    .. math::
        R_i = -\sum_g \left[\omega\, x_{ig} \log \hat x_{ig} + \omega_0 (1 - x_{ig}) \log(1 - \hat x_{ig})\right],
        \qquad \hat x = \mathrm{sigmoid}(a)

    evaluated as :math:`\sum_g \omega_0\,\mathrm{softplus}(a_{ig})` over all peaks plus
    :math:`(\omega - \omega_0)\,\mathrm{softplus}(a_{ig}) - \omega a_{ig}` over the open ones, so that a dense x is
    never needed (SAILER, Cao 2021, the reconstruction term of equation 2.14).

    Parameters
    ----------
    logits_bp
        Logits a, shape (b, p), contiguous.
    open_o
        Shape (o,): row-major positions of the open peaks, row x p + column, each once.
    rows_o
        Shape (o,): rows of the open peaks.
    weight
        Weight omega of the open entries.
    closed_weight
        Weight omega_0 of the closed entries.

    Returns
    -------
    Shape (b,), in nats.

    Examples
    --------
    >>> logits = torch.zeros(1, 4)
    >>> round(weighted_bernoulli(logits, torch.tensor([1]), torch.tensor([0])).item(), 4)
    2.7726
    """
    return _WeightedBernoulli.apply(logits_bp, open_o, rows_o, weight, closed_weight)


def layer_bernoulli(
    layer: BlockLogits,
    hidden: Tensor,
    batch: BlockedRows | PeakLists,
    *,
    weight: float = 1.0,
    closed_weight: float = 1.0,
    shift: float = 0.0,
    half: bool = False,
    expected: float = 1.0,
) -> Tensor:
    """Return the loss of :func:`weighted_bernoulli` over all peaks of a logit layer, one value a cell.

    Parameters
    ----------
    layer, hidden
        The layer and its input.
    batch
        Open peaks, in blocks (the plain form) or listed peak by peak (the compiled form).
    weight, closed_weight, shift
        Weights of open and of closed entries; what is taken from each logit.
    half, expected
        Of the compiled form; see :func:`epivi.nn.kernels.bernoulli_loss`.

    Returns
    -------
    Shape (b,), in nats.

    Examples
    --------
    >>> from epivi.nn.linear import BlockLogits, PeakBlocks
    >>> layer = BlockLogits(PeakBlocks.tiles(4), 2, diagonal=False)
    >>> _ = torch.nn.init.zeros_(layer.weight), torch.nn.init.zeros_(layer.bias)
    >>> batch = layer.blocks.split(torch.tensor([0, 1]), torch.tensor([1]))
    >>> round(layer_bernoulli(layer, torch.ones(1, 2), batch).item(), 4)
    2.7726
    """
    if isinstance(batch, PeakLists):
        return bernoulli_loss(
            hidden,
            layer.weight,
            layer.bias,
            batch,
            weight=weight,
            closed_weight=closed_weight,
            shift=shift,
            half=half,
            expected=expected,
            buffer=layer.buffer,
        )
    loss_b = hidden.new_zeros(hidden.shape[0])
    for j, block_bp in enumerate(layer(hidden)):
        logits_bp = block_bp - shift if shift else block_bp
        loss_b = loss_b + weighted_bernoulli(
            logits_bp, batch.flat(j), batch.rows[j], weight, closed_weight=closed_weight
        )
    return loss_b


def layer_poisson(
    layer: BlockLogits, hidden: Tensor, batch: BlockedRows | PeakLists, *, half: bool = False, expected: float = 1.0
) -> Tensor:
    r"""Return the negative log-likelihood of Poisson counts whose rates add up to the count of the cell.

    With :math:`\rho = \mathrm{softmax}(a)` over all peaks and :math:`n_i = \sum_g x_{ig}`, the rates
    :math:`n_i \rho_{ig}` make it

    .. math:: R_i = n_i - n_i \log n_i + \sum_g \log x_{ig}!
        + n_i \log \sum_g e^{a_{ig}} - \sum_g x_{ig} a_{ig}

    whose gradient in the logits, :math:`n_i \rho_{ig} - x_{ig}`, is that of the multinomial (the likelihood of
    POISSONVI, Martens et al., Nature Methods 2023, with the observed count as library size).

    Parameters
    ----------
    layer, hidden, half, expected
        As in :func:`layer_bernoulli`.
    batch
        Counts, in blocks (the plain form) or listed peak by peak (the compiled form).

    Returns
    -------
    Shape (b,), in nats.

    Examples
    --------
    >>> from epivi.nn.linear import BlockLogits, PeakBlocks
    >>> layer = BlockLogits(PeakBlocks.tiles(4), 2, diagonal=False)
    >>> _ = torch.nn.init.zeros_(layer.weight), torch.nn.init.zeros_(layer.bias)
    >>> batch = layer.blocks.split(torch.tensor([0, 1]), torch.tensor([1]), None, torch.tensor([3.0]))
    >>> rate = torch.full((4,), 0.75)
    >>> poisson = -torch.distributions.Poisson(rate).log_prob(torch.tensor([0.0, 3.0, 0.0, 0.0])).sum()
    >>> bool(torch.isclose(layer_poisson(layer, torch.ones(1, 2), batch)[0], poisson))
    True
    """
    if isinstance(batch, PeakLists):
        total_b, factorials_b = count_totals(batch)
        loss_b = multinomial_loss(
            hidden,
            layer.weight,
            layer.bias,
            batch,
            total_b=total_b,
            half=half,
            expected=expected,
            buffer=layer.buffer,
        )
        return loss_b + _poisson_constant(total_b, factorials_b).to(hidden.dtype)
    total_b, factorials_b, dot_b = (hidden.new_zeros(hidden.shape[0]) for _ in range(3))
    log_sums = []
    for j, logits_bp in enumerate(layer(hidden)):
        rows_o, counts_o = batch.rows[j], batch.counts[j].to(hidden.dtype)  # type: ignore[index]
        log_sums.append(torch.logsumexp(logits_bp, dim=1))
        dot_b = dot_b.index_add(0, rows_o, counts_o * logits_bp.reshape(-1)[batch.flat(j)])
        total_b = total_b.index_add(0, rows_o, counts_o)
        factorials_b = factorials_b.index_add(0, rows_o, torch.lgamma(counts_o + 1.0))
    log_sum_b = torch.logsumexp(torch.stack(log_sums), dim=0)
    return total_b * log_sum_b - dot_b + _poisson_constant(total_b, factorials_b)


def _poisson_constant(total_b: Tensor, factorials_b: Tensor) -> Tensor:
    """What the Poisson likelihood adds to that of the multinomial: n - n log n + sum of log x!."""
    return total_b - torch.xlogy(total_b, total_b) + factorials_b


def calibrate(probability: Tensor, weight: float) -> Tensor:
    r"""Turn the output of a weighted cross-entropy into a probability.

    The cross-entropy with weight :math:`\omega` on the open entries is smallest at
    :math:`p' = \omega p / (1 + (\omega - 1) p)`; this is the inverse, :math:`p = p' / (\omega - (\omega - 1) p')`.

    Parameters
    ----------
    probability
        Output p' of the sigmoid, any shape.
    weight
        Weight omega that was used in training.

    Examples
    --------
    >>> round(calibrate(torch.tensor(0.9), 9.0).item(), 4)
    0.5
    """
    return probability / (weight - (weight - 1.0) * probability)
