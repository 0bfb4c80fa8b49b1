"""Likelihoods of counts along the genome, several modalities side by side (ConvNet-VAE, Gao and Welch 2025).

Counts come as non-zeros of the batch: cell, column and value. The columns of all modalities stand side by side,
``lengths`` bins each; where all have l bins, column = modality x l + bin.
Legend of shapes: b cells of the batch, c modalities, f columns of all modalities together, o non-zeros.
"""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch.nn.functional import softplus

from epivi._errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

CHUNK = 2**19


class _Counts(NamedTuple):
    """Non-zeros with their place: group = cell x c + modality, flat = cell x f + column."""

    group_o: Tensor
    flat_o: Tensor
    columns_o: Tensor
    values_o: Tensor
    lengths: tuple[int, ...]


def channels_of(columns_o: Tensor, lengths: Sequence[int]) -> Tensor:
    """Return the modality of each column, shape (o,), int64.

    Parameters
    ----------
    columns_o
        Columns, the modalities side by side.
    lengths
        Bins of each modality.

    Examples
    --------
    >>> channels_of(torch.tensor([0, 2, 3]), (3, 2)).tolist()
    [0, 0, 1]
    """
    if len(set(lengths)) == 1:
        return columns_o.long() // lengths[0]
    ends = torch.tensor(list(accumulate(lengths)), device=columns_o.device)
    return torch.bucketize(columns_o, ends, right=True)


def _groups(rows_o: Tensor, columns_o: Tensor, lengths: Sequence[int], channels_o: Tensor | None) -> Tensor:
    """Return cell x c + modality of each non-zero."""
    channels_o = channels_of(columns_o, lengths) if channels_o is None else channels_o
    return rows_o.long() * len(lengths) + channels_o


def _counts(
    logits_bf: Tensor,
    rows_o: Tensor,
    columns_o: Tensor,
    values_o: Tensor,
    lengths: Sequence[int],
    channels_o: Tensor | None,
) -> _Counts:
    if logits_bf.shape[1] != sum(lengths):
        message = (
            f"There are {logits_bf.shape[1]} logits a cell and {sum(lengths)} bins in the modalities, "
            f"{' + '.join(map(str, lengths))}. The lengths must add up to the logits."
        )
        raise ConfigError(message)
    flat_o = rows_o.long() * logits_bf.shape[1] + columns_o
    group_o = _groups(rows_o, columns_o, lengths, channels_o)
    return _Counts(group_o, flat_o, columns_o.long(), values_o.to(logits_bf.dtype), tuple(lengths))


def _wide(x: Tensor) -> Tensor:
    """Return half precision as float32: sums of counts would saturate."""
    return x.float() if x.dtype in {torch.float16, torch.bfloat16} else x


def _add_up(values_o: Tensor, group_o: Tensor, n_rows: int, n_channels: int) -> Tensor:
    """Sum over the non-zeros of each cell and modality, shape (b, c)."""
    return values_o.new_zeros(n_rows * n_channels).index_add_(0, group_o, values_o).view(n_rows, n_channels)


def library_of(
    rows_o: Tensor,
    columns_o: Tensor,
    values_o: Tensor,
    lengths: Sequence[int],
    n_rows: int,
    *,
    channels_o: Tensor | None = None,
) -> Tensor:
    """Return the library of each cell and modality: the sum of its counts, shape (b, c).

    Parameters
    ----------
    rows_o, columns_o, values_o
        Cell, column and count of each non-zero.
    lengths
        Bins of each modality.
    n_rows
        Cells of the batch.
    channels_o
        What :func:`channels_of` returns for the columns, where it is known; it saves time.

    Examples
    --------
    >>> library_of(torch.tensor([0, 0]), torch.tensor([1, 4]), torch.tensor([2.0, 3.0]), (3, 2), 1).tolist()
    [[2.0, 3.0]]
    """
    return _add_up(values_o, _groups(rows_o, columns_o, lengths, channels_o), n_rows, len(lengths))


def _blocks(x_bf: Tensor, lengths: tuple[int, ...]) -> Iterator[tuple[slice, Tensor]]:
    """Yield modalities and their logits, shape (b, modalities, bins): all at once if they have the same bins."""
    if len(set(lengths)) == 1:
        yield slice(0, len(lengths)), x_bf.unflatten(1, (len(lengths), lengths[0]))
        return
    for m, part_bl in enumerate(x_bf.split(lengths, dim=1)):
        yield slice(m, m + 1), part_bl.unsqueeze(1)


def _log_sums(logits_bf: Tensor, lengths: tuple[int, ...]) -> Tensor:
    """Return the logsumexp over the bins of each modality, shape (b, c)."""
    # a few rows at a time: the temporary values stay in the cache
    rows = max(1, CHUNK // logits_bf.shape[1]) if logits_bf.device.type == "cpu" else len(logits_bf)
    lse_bc = logits_bf.new_empty(len(logits_bf), len(lengths))
    for lse_part, part_bf in zip(lse_bc.split(rows), logits_bf.split(rows), strict=True):
        for channels, part_bcl in _blocks(part_bf, lengths):
            lse_part[:, channels] = torch.logsumexp(part_bcl, dim=2)
    return lse_bc


class _Multinomial(torch.autograd.Function):
    """Value at the non-zeros only; the gradient is one softmax, scaled by the library, less the counts."""

    @staticmethod
    def forward(ctx, logits_bf: Tensor, counts: _Counts) -> Tensor:
        n_rows, n_channels = logits_bf.shape[0], len(counts.lengths)
        cost_o = _log_sums(logits_bf, counts.lengths).view(-1)[counts.group_o] - logits_bf.view(-1)[counts.flat_o]
        ctx.save_for_backward(logits_bf)
        ctx.counts = counts
        return _add_up(counts.values_o * cost_o, counts.group_o, n_rows, n_channels)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, None]:
        (logits_bf,), counts, grad_bc = ctx.saved_tensors, ctx.counts, grads[0]
        scale_bc = grad_bc * _add_up(counts.values_o, counts.group_o, *grad_bc.shape)
        grad_bf = torch.empty_like(logits_bf)
        parts = zip(_blocks(logits_bf, counts.lengths), _blocks(grad_bf, counts.lengths), strict=True)
        for (channels, part_bcl), (_, out_bcl) in parts:
            torch.softmax(part_bcl, dim=2, out=out_bcl)
            out_bcl.mul_(scale_bc[:, channels, None])
        grad_o = grad_bc.reshape(-1)[counts.group_o] * counts.values_o
        grad_bf.view(-1).index_add_(0, counts.flat_o, grad_o, alpha=-1)
        return grad_bf, None


def multinomial_tracks(
    logits_bf: Tensor,
    rows_o: Tensor,
    columns_o: Tensor,
    values_o: Tensor,
    lengths: Sequence[int],
    *,
    channels_o: Tensor | None = None,
) -> Tensor:
    r"""Return the negative log-likelihood of where the counts of each modality fall.

    .. math::
        -\sum_g x_{mg} \log w_{mg}, \qquad w_m = \mathrm{softmax}(a_m)

    over the bins g of modality m. Since the Poisson rates :math:`w_{mg} l_m` add up to the library, this is the
    Poisson negative log-likelihood of equation 1 but for :func:`poisson_constant`. The gradient is
    :math:`l_m w_m - x_m`; no rate is ever formed, so an empty modality costs 0 and has gradient 0.

    Parameters
    ----------
    logits_bf
        Logits a, the modalities side by side.
    rows_o, columns_o, values_o
        Cell, column and count of each non-zero; no gradient flows to the counts.
    lengths
        Bins of each modality; they add up to f.
    channels_o
        As in :func:`library_of`.

    Returns
    -------
    Shape (b, c), in nats, without the multinomial coefficient.

    Raises
    ------
    ConfigError
        If the lengths do not add up to the logits.

    Examples
    --------
    >>> zero = torch.tensor([0])
    >>> loss = multinomial_tracks(torch.zeros(1, 6), zero, zero, torch.tensor([2.0]), (4, 2))
    >>> [round(x, 4) for x in loss[0].tolist()]
    [2.7726, 0.0]
    """
    logits_bf = _wide(logits_bf).contiguous()
    return _Multinomial.apply(logits_bf, _counts(logits_bf, rows_o, columns_o, values_o, lengths, channels_o))


def poisson_constant(
    rows_o: Tensor,
    columns_o: Tensor,
    values_o: Tensor,
    lengths: Sequence[int],
    n_rows: int,
    *,
    channels_o: Tensor | None = None,
) -> Tensor:
    r"""Return what turns :func:`multinomial_tracks` into the Poisson negative log-likelihood.

    .. math::
        l_m - \sum_g \left[x_{mg} \log l_m - \log x_{mg}!\right]

    with :math:`l_m` the sum of the counts (section "Multinomial identity": Multinomial(x | l, w) times Poisson(l | l)).

    Parameters
    ----------
    rows_o, columns_o, values_o, lengths, n_rows, channels_o
        As in :func:`library_of`.

    Returns
    -------
    Shape (b, c), in nats; 0 for a modality without counts.

    Examples
    --------
    >>> zero = torch.tensor([0])
    >>> round(poisson_constant(zero, zero, torch.tensor([2.0]), (4,), 1).item(), 4)
    1.3069
    """
    group_o = _groups(rows_o, columns_o, lengths, channels_o)
    library_bc = _add_up(values_o, group_o, n_rows, len(lengths))
    factorial_bc = _add_up(torch.lgamma(values_o + 1.0), group_o, n_rows, len(lengths))
    return library_bc - torch.xlogy(library_bc, library_bc) + factorial_bc


class _NegativeBinomial(torch.autograd.Function):
    """Dense pass as if every count were zero, then a correction at the others; one modality at a time.

    With mean mu, inverse dispersion theta and u = log mu - log theta, a zero costs theta softplus(u), and a count x
    costs x softplus(-u) + log Gamma(theta) - log Gamma(x + theta) + log x! more. ``shift_bc`` is log mu less the logit.
    """

    @staticmethod
    def forward(ctx, logits_bf: Tensor, log_theta_f: Tensor, shift_bc: Tensor, counts: _Counts) -> Tensor:
        theta_f = log_theta_f.exp()
        zero_c = [softplus(u_bl) @ theta_f[at] for u_bl, at in _log_ratios(logits_bf, log_theta_f, shift_bc, counts)]
        x_o, theta_o = counts.values_o, theta_f[counts.columns_o]
        cost_o = x_o * softplus(-_log_ratio_o(logits_bf, log_theta_f, shift_bc, counts))
        # log Gamma of large theta cancels
        x_double_o, theta_double_o = x_o.double(), theta_o.double()
        gamma_o = torch.lgamma(theta_double_o) - torch.lgamma(x_double_o + theta_double_o)
        cost_o += (gamma_o + torch.lgamma(x_double_o + 1.0)).to(cost_o.dtype)
        ctx.save_for_backward(logits_bf, log_theta_f, shift_bc)
        ctx.counts = counts
        return torch.stack(zero_c, dim=1) + _add_up(cost_o, counts.group_o, *shift_bc.shape)

    @staticmethod
    def backward(ctx, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (logits_bf, log_theta_f, shift_bc), counts, grad_bc = ctx.saved_tensors, ctx.counts, grads[0].contiguous()
        theta_f = log_theta_f.exp()
        grad_bf, grad_theta_f = torch.empty_like(logits_bf), torch.empty_like(log_theta_f)
        # with respect to log mu: theta sigmoid(u), and less x sigmoid(-u) where there are counts
        for m, (u_bl, at) in enumerate(_log_ratios(logits_bf, log_theta_f, shift_bc, counts)):
            out_bl = grad_bf[:, at]
            torch.mul(torch.sigmoid(u_bl), theta_f[at], out=out_bl)
            out_bl *= grad_bc[:, m, None]
            grad_theta_f[at] = theta_f[at] * (grad_bc[:, m] @ softplus(u_bl)) - out_bl.sum(0)
        x_o, theta_o = counts.values_o, theta_f[counts.columns_o]
        scale_o = grad_bc.view(-1)[counts.group_o]
        part_o = x_o * torch.sigmoid(-_log_ratio_o(logits_bf, log_theta_f, shift_bc, counts))
        grad_bf.view(-1).index_add_(0, counts.flat_o, scale_o * part_o, alpha=-1)
        theta_double_o = theta_o.double()
        gamma_o = torch.digamma(theta_double_o) - torch.digamma(x_o.double() + theta_double_o)
        grad_theta_f.index_add_(0, counts.columns_o, scale_o * (part_o + theta_o * gamma_o.to(theta_o.dtype)))
        # from log mu to logits through the softmax
        for (_, part_bcl), (_, out_bcl) in zip(
            _blocks(logits_bf, counts.lengths), _blocks(grad_bf, counts.lengths), strict=True
        ):
            out_bcl.addcmul_(torch.softmax(part_bcl, dim=2), out_bcl.sum(2, keepdim=True), value=-1.0)
        return grad_bf, grad_theta_f, None, None


def _log_ratios(
    logits_bf: Tensor, log_theta_f: Tensor, shift_bc: Tensor, counts: _Counts
) -> Iterator[tuple[Tensor, slice]]:
    """Yield u = log mu - log theta of each modality, shape (b, l), and its columns."""
    for m, (start, end) in enumerate(pairwise(accumulate(counts.lengths, initial=0))):
        u_bl = logits_bf[:, start:end] + shift_bc[:, m, None]
        u_bl -= log_theta_f[start:end]
        yield u_bl, slice(start, end)


def _log_ratio_o(logits_bf: Tensor, log_theta_f: Tensor, shift_bc: Tensor, counts: _Counts) -> Tensor:
    """Return u of each non-zero; 0 where the library is 0."""
    u_o = logits_bf.view(-1)[counts.flat_o] + shift_bc.view(-1)[counts.group_o] - log_theta_f[counts.columns_o]
    return u_o.masked_fill_(u_o.isneginf(), 0.0)


def negative_binomial_tracks(
    logits_bf: Tensor,
    log_dispersion_f: Tensor,
    rows_o: Tensor,
    columns_o: Tensor,
    values_o: Tensor,
    library_bc: Tensor,
    lengths: Sequence[int],
    *,
    channels_o: Tensor | None = None,
) -> Tensor:
    r"""Return the negative binomial negative log-likelihood of each cell and modality, all constants included.

    Mean :math:`\mu_{mg} = l_m \mathrm{softmax}(a_m)_g` and variance :math:`\mu + \mu^2/\theta_{mg}`, with an inverse
    dispersion for each modality and bin. Evaluated as if every count were zero, with a correction at the others.

    Parameters
    ----------
    logits_bf
        Logits a, the modalities side by side.
    log_dispersion_f
        Logarithm of the inverse dispersion theta, shape (f,).
    rows_o, columns_o, values_o
        Cell, column and count of each non-zero.
    library_bc
        Library of each cell and modality, observed or given; no gradient flows to it. A modality with library 0 costs
        0 and has gradient 0, whatever its counts.
    lengths
        Bins of each modality; they add up to f.
    channels_o
        As in :func:`library_of`.

    Returns
    -------
    Shape (b, c), in nats.

    Raises
    ------
    ConfigError
        If the lengths do not add up to the logits.

    Examples
    --------
    >>> at, one = torch.tensor([0]), torch.ones(1)
    >>> loss = negative_binomial_tracks(torch.zeros(1, 1), torch.zeros(1), at, at, one, torch.ones(1, 1), (1,))
    >>> round(loss.exp().item(), 4)
    4.0
    """
    logits_bf, log_dispersion_f = _wide(logits_bf).contiguous(), _wide(log_dispersion_f)
    counts = _counts(logits_bf, rows_o, columns_o, values_o, lengths, channels_o)
    library_bc = library_bc.detach().to(logits_bf.dtype)
    in_library_o = library_bc.reshape(-1)[counts.group_o] > 0
    counts = counts._replace(values_o=counts.values_o * in_library_o)
    shift_bc = library_bc.log() - _log_sums(logits_bf.detach(), counts.lengths)
    return _NegativeBinomial.apply(logits_bf, log_dispersion_f, shift_bc, counts)
