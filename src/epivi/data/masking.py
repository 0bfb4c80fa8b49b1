"""What a training step makes of samples: assays are hidden, reads thinned, biosamples mixed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from epivi import _keys as keys
from epivi._errors import ConfigError
from epivi._validate import check_number
from epivi.objectives.experiments import thin

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


def hide_assays(available_ba: Tensor, n_hidden: int | None = None) -> Tensor:
    """Choose assays to hide from each sample, at random among those it has.

    One number k ~ U{1, ..., a - 1} is drawn for all samples; a sample hides min(k, available - 1) assays, so that each
    keeps at least one (CANDI, section 4.3).

    Parameters
    ----------
    available_ba
        1 where a sample has an assay, else 0, shape (b, a).
    n_hidden
        The number k; drawn if ``None``.

    Returns
    -------
    1 where an assay is hidden, else 0, shape (b, a). Draws come from the global generator of torch.

    Examples
    --------
    >>> hidden = hide_assays(torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]]), n_hidden=2)
    >>> hidden.sum(1).tolist()
    [2.0, 0.0]
    """
    n_assays = available_ba.shape[1]
    if n_hidden is None:
        n_hidden = int(torch.randint(1, max(n_assays, 2), ()))
    draw_ba = torch.rand(available_ba.shape).to(available_ba.device)
    # unavailable assays come last
    rank_ba = (draw_ba + 2.0 * (available_ba <= 0)).argsort(dim=1).argsort(dim=1)
    n_b1 = (available_ba > 0).sum(1, keepdim=True).sub(1).clamp(min=0, max=n_hidden)
    return ((rank_ba < n_b1) & (available_ba > 0)).to(available_ba.dtype)


def draw_thinning(shape: Sequence[int], factors: Sequence[int], device: torch.device) -> Tensor:
    """Draw the factor by which reads are thinned, one of ``factors`` with equal chance.

    Parameters
    ----------
    shape
        Shape of the result.
    factors
        Whole numbers from 1 on: a read is kept with probability 1 / factor.
    device
        Device of the result; draws are made on the CPU, so that devices agree.

    Raises
    ------
    ConfigError
        If a factor is not a whole number from 1 on.

    Examples
    --------
    >>> draw_thinning((2, 1), (4,), torch.device("cpu")).tolist()
    [[4.0], [4.0]]
    """
    for factor in factors:
        check_number(factor, "thinning factor", low=1, integer=True)
    choice = torch.randint(len(factors), tuple(shape))
    return torch.tensor(factors, dtype=torch.float32)[choice].to(device)


def partners(window_b: Tensor) -> Tensor:
    """Return the other sample of each pair (2i, 2i + 1) of a minibatch, itself for a last one without a partner.

    Parameters
    ----------
    window_b
        First bin of each window, shape (b,).

    Raises
    ------
    ConfigError
        If the two samples of a pair are of different loci.

    Examples
    --------
    >>> partners(torch.tensor([5, 5, 8])).tolist()
    [1, 0, 2]
    """
    n = window_b.shape[0] // 2 * 2
    partner_b = torch.arange(window_b.shape[0], device=window_b.device)
    partner_b[:n] = partner_b[:n] ^ 1
    if not torch.equal(window_b[partner_b], window_b):
        message = "Samples 2i and 2i + 1 must be windows at one locus: draw them in pairs."
        raise ConfigError(message)
    return partner_b


def swap_assays(shown_ba: Tensor, available_ba: Tensor, partner_b: Tensor, rate: float) -> Tensor:
    """Choose assays that the encoder is shown of another biosample in place of the sample's own.

    Parameters
    ----------
    shown_ba, available_ba
        1 for assays that are shown, and that a sample has, shape (b, a).
    partner_b
        Sample of the other biosample, see :func:`partners`.
    rate
        Chance of each assay that is shown and that the partner has.

    Returns
    -------
    Boolean, shape (b, a). Draws come from the global generator of torch.

    Examples
    --------
    >>> ones = torch.ones(2, 3)
    >>> swap_assays(ones, ones, torch.tensor([1, 0]), 1.0).all().item()
    True
    """
    is_drawn_ba = (torch.rand(shown_ba.shape) < rate).to(shown_ba.device)
    is_other_b1 = (partner_b != torch.arange(partner_b.shape[0], device=partner_b.device))[:, None]
    return is_drawn_ba & is_other_b1 & (shown_ba > 0) & (available_ba[partner_b] > 0)


def drop_covariates(continuous_bak: Tensor, categorical_bak: Tensor, rate: float) -> tuple[Tensor, Tensor]:
    """Make covariates unknown: each with a chance, and all of an experiment with the same chance.

    Parameters
    ----------
    continuous_bak, categorical_bak
        Covariates, shape (b, a, k).
    rate
        The chance.

    Returns
    -------
    New covariates, NaN and -1 where unknown. Draws come from the global generator of torch.

    Examples
    --------
    >>> drop_covariates(torch.zeros(1, 2, 1), torch.zeros(1, 2, 1), 1.0)[1].tolist()
    [[[-1.0], [-1.0]]]
    """
    all_ba1 = torch.rand(*continuous_bak.shape[:2], 1) < rate
    parts = []
    for values_bak, unknown in ((continuous_bak, torch.nan), (categorical_bak, -1)):
        dropped_bak = (torch.rand(values_bak.shape) < rate) | all_ba1
        parts.append(torch.where(dropped_bak.to(values_bak.device), unknown, values_bak))
    return parts[0], parts[1]


def mix_pairs(
    batch: dict[str, Tensor], alpha: float, *, depth: int | None = None, coverage: int | None = None
) -> dict[str, Tensor]:
    r"""Mix the samples 2i and 2i + 1 of a minibatch, windows of two biosamples at one locus.

    With a weight drawn from Beta(alpha, alpha), of which the larger part is the sample's own (Zhang et al. 2018),

    .. math:: x' = \lambda x + (1 - \lambda) \tilde x, \qquad
        y' = \mathrm{Binomial}(y, \lambda) + \mathrm{Binomial}(\tilde y, 1 - \lambda)

    for the signal and for counts, in assays that both have; other assays stay as they are.

    Parameters
    ----------
    batch
        Entries of :class:`epivi.data.windows.WindowDataset`.
    alpha
        Parameter of the Beta law.
    depth, coverage
        Numbers of these covariates; ``None`` where there are none. Depths add up; coverage, which does not, becomes
        unknown. Other numbers are averaged; levels that differ become unknown.

    Returns
    -------
    A new batch. A last sample without a partner stays as it is. Draws come from the global generator of torch.

    Raises
    ------
    ConfigError
        If the two samples of a pair are of different loci.

    Examples
    --------
    >>> batch = {"window": torch.tensor([5, 5]), "signal": torch.tensor([[[0.0]], [[2.0]]])}
    >>> batch |= {"available_signal": torch.ones(2, 1), "continuous": torch.zeros(2, 1, 0)}
    >>> batch |= {"categorical": torch.zeros(2, 1, 0), "log_depth_ratio": torch.zeros(2, 1)}
    >>> float(mix_pairs(batch, 1.0)["signal"].mean())
    1.0
    """
    window_b = batch[keys.BATCH_WINDOW]
    partner_b = partners(window_b)
    n = window_b.shape[0] // 2 * 2
    drawn = torch.distributions.Beta(alpha, alpha).sample((max((n + 1) // 2, 1),)).to(window_b.device)
    weight_b = torch.ones(window_b.shape[0], device=window_b.device)
    weight_b[:n] = torch.maximum(drawn, 1.0 - drawn).repeat_interleave(2)[:n]
    mixed = dict(batch)
    kinds = [kind for kind in (keys.BATCH_COUNTS, keys.BATCH_SIGNAL) if kind in batch]
    has_ba = torch.stack([batch[f"available_{kind}"] > 0 for kind in kinds]).all(0)
    weight_ba = torch.where(has_ba & has_ba[partner_b], weight_b[:, None], 1.0)
    own_b1a = weight_ba[:, None]
    for kind in kinds:
        own_bla, other_bla = batch[kind], batch[kind][partner_b]
        if kind == keys.BATCH_COUNTS:
            mixed[kind] = thin(own_bla, own_b1a) + thin(other_bla, 1.0 - own_b1a)
        else:
            mixed[kind] = own_b1a * own_bla + (1.0 - own_b1a) * other_bla
    if keys.BATCH_PRIOR in batch:
        has_ba = batch[keys.BATCH_HAS_PRIOR] * torch.where(weight_ba < 1, batch[keys.BATCH_HAS_PRIOR][partner_b], 1.0)
        prior_bla = batch[keys.BATCH_PRIOR]
        mixed[keys.BATCH_PRIOR] = (own_b1a * prior_bla + (1 - own_b1a) * prior_bla[partner_b]) * has_ba[:, None]
        mixed[keys.BATCH_HAS_PRIOR] = has_ba
    return mixed | _covariates(batch, partner_b, weight_ba, depth, coverage)


def _covariates(
    batch: dict[str, Tensor], partner_b: Tensor, weight_ba: Tensor, depth: int | None, coverage: int | None
) -> dict[str, Tensor]:
    """Return the covariates of the mixtures."""
    is_mixed_ba = weight_ba < 1
    own_bak = batch[keys.BATCH_CONTINUOUS]
    other_bak = own_bak[partner_b]
    weight_ba1 = weight_ba[:, :, None]
    numbers_bak = weight_ba1 * own_bak + (1 - weight_ba1) * other_bak
    if depth is not None:
        reads_ba = weight_ba * own_bak[:, :, depth].exp2() + (1 - weight_ba) * other_bak[:, :, depth].exp2()
        numbers_bak[:, :, depth] = reads_ba.log2()
    if coverage is not None:
        numbers_bak[:, :, coverage] = torch.nan
    codes_bak = batch[keys.BATCH_CATEGORICAL]
    differs_bak = is_mixed_ba[:, :, None] & (codes_bak != codes_bak[partner_b])
    ratio_ba = batch[keys.BATCH_LOG_DEPTH_RATIO]
    mixed_ratio_ba = (weight_ba * ratio_ba.exp() + (1 - weight_ba) * ratio_ba[partner_b].exp()).log()
    return {
        keys.BATCH_CONTINUOUS: torch.where(is_mixed_ba[:, :, None], numbers_bak, own_bak),
        keys.BATCH_CATEGORICAL: torch.where(differs_bak, -1, codes_bak),
        keys.BATCH_LOG_DEPTH_RATIO: torch.where(is_mixed_ba, mixed_ratio_ba, ratio_ba),
    }
