"""Convolutional towers between the bins of a window and its latent positions (CANDI).

All features are channels last, the layout in which layer normalisation and convolution both run without a copy.

Legend of shapes: b windows of the batch, t positions (of any scale), c channels, g base pairs.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, cast

import torch
from torch import nn
from torch.nn.functional import conv2d, embedding, gelu, linear, pad

from epivi._errors import ConfigError, nearest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

UPSAMPLINGS = ("nearest", "transposed")
N_CODES = 5  # A, C, G, T and anything else


def convolve(x_btc: Tensor, conv: nn.Conv1d) -> Tensor:
    """Apply a one-dimensional convolution to features with channels last, length kept.

    Examples
    --------
    >>> convolve(torch.zeros(2, 7, 4), nn.Conv1d(4, 6, 3, groups=2)).shape
    torch.Size([2, 7, 6])
    """
    weight = conv.weight.unsqueeze(2)
    y = conv2d(
        x_btc.transpose(1, 2).unsqueeze(2), weight, conv.bias, padding=(0, weight.shape[3] // 2), groups=conv.groups
    )
    return y.squeeze(2).transpose(1, 2)


class SqueezeExcitation(nn.Module):
    """Scale each channel by a gate computed from the means of all channels over the window; no biases.

    The gate depends on the length of the window and on everything in it.

    Parameters
    ----------
    n_channels
        Channels c.
    reduction
        The hidden layer has c / reduction units, at least one.

    Examples
    --------
    >>> SqueezeExcitation(16)(torch.ones(2, 5, 16)).shape
    torch.Size([2, 5, 16])
    """

    def __init__(self, n_channels: int, *, reduction: int = 8) -> None:
        super().__init__()
        n_hidden = max(1, n_channels // reduction)
        self.squeeze = nn.Linear(n_channels, n_hidden, bias=False)
        self.excite = nn.Linear(n_hidden, n_channels, bias=False)

    def forward(self, x_btc: Tensor) -> Tensor:
        """Return the scaled features."""
        gate_bc = self.excite(self.squeeze(x_btc.mean(1)).relu()).sigmoid()
        return x_btc * gate_bc[:, None]


class ResidualStage(nn.Module):
    r"""Convolve with a shortcut: :math:`\mathrm{GELU}(\mathrm{LN}(\mathrm{Conv}_3 x)) + \mathrm{Conv}_1 x`.

    The normalisation runs over all channels of a position, those of other groups included.

    Parameters
    ----------
    n_in, n_out
        Channels before and after.
    groups
        Groups of both convolutions.
    squeeze_excitation
        Whether the sum is scaled by :class:`SqueezeExcitation`.

    Examples
    --------
    >>> ResidualStage(4, 6, groups=2)(torch.zeros(2, 7, 4)).shape
    torch.Size([2, 7, 6])
    """

    def __init__(self, n_in: int, n_out: int, *, groups: int = 1, squeeze_excitation: bool = False) -> None:
        super().__init__()
        self.conv = nn.Conv1d(n_in, n_out, 3, padding=1, groups=groups)
        self.norm = nn.LayerNorm(n_out)
        self.shortcut = nn.Conv1d(n_in, n_out, 1, groups=groups)
        self.gate = SqueezeExcitation(n_out) if squeeze_excitation else None

    def forward(self, x_btc: Tensor) -> Tensor:
        """Return the new features, shape (b, t, n_out)."""
        y_btc = gelu(self.norm(convolve(x_btc, self.conv))) + convolve(x_btc, self.shortcut)
        return y_btc if self.gate is None else self.gate(y_btc)


class _Tower(nn.Module):
    """Stages, each followed by a pool over neighbouring positions."""

    def __init__(
        self, channels: Sequence[int], pools: Sequence[int], *, groups: int = 1, squeeze_excitation: bool = False
    ) -> None:
        super().__init__()
        if len(channels) != len(pools) + 1 or not pools:
            message = f"A tower needs one pool a stage; found channels {tuple(channels)} and pools {tuple(pools)}."
            raise ConfigError(message)
        self.pools = tuple(pools)
        self.stages = nn.ModuleList(
            ResidualStage(n_in, n_out, groups=groups, squeeze_excitation=squeeze_excitation)
            for n_in, n_out in pairwise(channels)
        )

    @property
    def context(self) -> int:
        """Positions of the input on either side of a pooled block that its output depends on.

        Each convolution reaches one position further at its own scale: with pools of 2 in n stages, 2^n - 1. With
        squeeze-excitation the output depends on the whole window.
        """
        reach, scale = 0, 1
        for pool in self.pools:
            reach, scale = reach + scale, scale * pool
        return reach

    def _stages(self, x_btc: Tensor, mask_bt: Tensor | None, first: int, kind: str) -> Tensor:
        """Run the stages from ``first`` on; masked positions are set to 0 before each, as if the window ended there."""
        for stage, pool in zip(self.stages[first:], self.pools[first:], strict=True):
            if mask_bt is not None:
                x_btc = x_btc * mask_bt[:, :, None]
            x_btc = stage(x_btc)
            if pool > 1:
                blocks = x_btc.unflatten(1, (-1, pool))
                x_btc = blocks.mean(2) if kind == "mean" else blocks.amax(2)
                mask_bt = None if mask_bt is None else pool_mask(mask_bt, pool)
        return x_btc


def pool_mask(mask_bt: Tensor, pool: int) -> Tensor:
    """Return which pooled positions hold anything real, shape (b, t / pool).

    Examples
    --------
    >>> pool_mask(torch.tensor([[True, True, True, False, False, False]]), 2).tolist()
    [[True, True, False]]
    """
    return mask_bt.bool().unflatten(1, (-1, pool)).any(2)


class SignalTower(_Tower):
    """Grouped stages over tracks; each halves the positions by their mean. A group holds the channels of one assay.

    Parameters
    ----------
    channels
        Channels before the first and after each stage, multiples of the groups; those of an assay lie side by side.
    groups
        Assays.
    squeeze_excitation
        As in :class:`ResidualStage`.

    Raises
    ------
    ConfigError
        If there is no stage.

    Examples
    --------
    >>> tower = SignalTower((6, 12, 24), groups=3)
    >>> tower(torch.zeros(2, 40, 6)).shape, tower.context
    (torch.Size([2, 10, 24]), 3)
    """

    def __init__(self, channels: Sequence[int], *, groups: int, squeeze_excitation: bool = False) -> None:
        pools = (2,) * (len(channels) - 1)
        super().__init__(channels, pools, groups=groups, squeeze_excitation=squeeze_excitation)

    def forward(self, x_btc: Tensor, mask_bt: Tensor | None = None) -> Tensor:
        """Return the pooled features; positions whose mask is False count as beyond the end of the window."""
        return self._stages(x_btc, mask_bt, 0, "mean")


class DnaTower(_Tower):
    """Stages over a sequence, each followed by a maximum over neighbouring positions.

    If the first pool is 2, what it returns depends on four letters only. It is then computed once for all 625 words
    and looked up, which is exact and saves the one stage that runs at the resolution of base pairs.

    Parameters
    ----------
    channels
        Channels before the first stage, 4, and after each.
    pools
        Positions that each stage merges.
    squeeze_excitation
        As in :class:`ResidualStage`; nothing is looked up then.

    Raises
    ------
    ConfigError
        If pools and stages do not match, or the first channels are not 4.

    Examples
    --------
    >>> tower = DnaTower((4, 6, 8), (2, 5))
    >>> tower(torch.zeros(2, 40, dtype=torch.uint8)).shape
    torch.Size([2, 4, 8])
    """

    one_hot: Tensor
    words: Tensor

    def __init__(self, channels: Sequence[int], pools: Sequence[int], *, squeeze_excitation: bool = False) -> None:
        super().__init__(channels, pools, squeeze_excitation=squeeze_excitation)
        if channels[0] != 4:
            message = f"The tower of the DNA starts from 4 channels, one a letter; found {channels[0]}."
            raise ConfigError(message)
        self.is_looked_up = pools[0] == 2 and not squeeze_excitation
        # the last code is all zeros, like the padding of a convolution
        self.register_buffer("one_hot", torch.eye(N_CODES, 4), persistent=False)
        letters = torch.arange(N_CODES)
        self.register_buffer("words", torch.cartesian_prod(letters, letters, letters, letters), persistent=False)

    def forward(self, dna_bg: Tensor, mask_bg: Tensor | None = None) -> Tensor:
        """Return the pooled features of codes 0-3 (ACGT) and 4 (anything else).

        Positions whose mask is False count as beyond the end of the window.
        """
        code_bg = dna_bg.long()
        if mask_bg is not None:
            code_bg = code_bg.masked_fill(~mask_bg.bool(), N_CODES - 1)
        if not self.is_looked_up:
            return self._stages(embedding(code_bg, self.one_hot), mask_bg, 0, "max")
        padded_bg = pad(code_bg, (1, 1), value=N_CODES - 1)
        word_bt = padded_bg[:, :-3:2]
        for start in (1, 2, 3):
            word_bt = word_bt * N_CODES + padded_bg[:, start : padded_bg.shape[1] - 3 + start : 2]
        x_btc = embedding(word_bt, self._word_features())
        return self._stages(x_btc, None if mask_bg is None else pool_mask(mask_bg, 2), 1, "max")

    def _word_features(self) -> Tensor:
        """Return the output of the first stage and its pool for each word of four letters."""
        x_w4c = self.stages[0](embedding(self.words, self.one_hot))
        return x_w4c[:, 1:3].amax(1)


class UpStage(nn.Module):
    r"""Double the positions: GELU(LN(Conv3(up x))) + Conv1(up x).

    Where ``up`` repeats every position, the upsampled features are never formed: with taps :math:`W_0, W_1, W_2`,

    .. math::
        y_{2t} = W_0 x_{t-1} + (W_1 + W_2) x_t, \qquad y_{2t+1} = (W_0 + W_1) x_t + W_2 x_{t+1}.

    Parameters
    ----------
    n_in, n_out
        Channels before and after.
    upsampling
        "nearest" as above, or "transposed": transposed convolutions with stride 2 in place of ``up`` and convolution;
        their shortcut of one tap gives odd positions its bias only.

    Raises
    ------
    ConfigError
        If the upsampling is unknown.

    Examples
    --------
    >>> UpStage(8, 4)(torch.zeros(2, 5, 8)).shape
    torch.Size([2, 10, 4])
    """

    def __init__(self, n_in: int, n_out: int, *, upsampling: str = "nearest") -> None:
        super().__init__()
        if upsampling not in UPSAMPLINGS:
            message = f"upsampling='{upsampling}' is not known. {nearest(upsampling, UPSAMPLINGS)}"
            raise ConfigError(message)
        self.is_transposed = upsampling == "transposed"
        if self.is_transposed:
            self.conv: nn.Module = nn.ConvTranspose1d(n_in, n_out, 3, stride=2, padding=1, output_padding=1)
            self.shortcut: nn.Module = nn.ConvTranspose1d(n_in, n_out, 1, stride=2, output_padding=1)
        else:
            self.conv = nn.Conv1d(n_in, n_out, 3, padding=1)
            self.shortcut = nn.Conv1d(n_in, n_out, 1)
        self.norm = nn.LayerNorm(n_out)

    def forward(self, x_btc: Tensor) -> Tensor:
        """Return the new features, shape (b, 2 t, n_out)."""
        if self.is_transposed:
            x_bct = x_btc.transpose(1, 2)
            return gelu(self.norm(self.conv(x_bct).transpose(1, 2))) + self.shortcut(x_bct).transpose(1, 2)
        shortcut_btc = convolve(x_btc, cast("nn.Conv1d", self.shortcut))
        return gelu(self.norm(self._both_phases(x_btc))) + shortcut_btc.repeat_interleave(2, dim=1)

    def _both_phases(self, x_btc: Tensor) -> Tensor:
        """Convolve the repeated positions: one product with pairs of neighbours for even and odd outputs."""
        conv = cast("nn.Conv1d", self.conv)
        first, middle, last = conv.weight.unbind(2)
        weight = torch.cat([torch.cat([first, middle + last], 1), torch.cat([first + middle, last], 1)])
        bias = conv.bias if conv.bias is None else conv.bias.repeat(2)
        padded_btc = pad(x_btc, (0, 0, 1, 1))
        pairs_btc = torch.cat([padded_btc[:, :-1], padded_btc[:, 1:]], dim=2)
        even_btc, odd_btc = linear(pairs_btc, weight, bias).chunk(2, dim=2)
        return torch.stack([even_btc[:, :-1], odd_btc[:, 1:]], dim=2).flatten(1, 2)


class UpTower(nn.Module):
    """Stages that double the positions, the mirror of :class:`SignalTower` without groups.

    Parameters
    ----------
    channels
        Channels before the first and after each stage.
    upsampling
        As in :class:`UpStage`.

    Raises
    ------
    ConfigError
        If the upsampling is unknown.

    Examples
    --------
    >>> UpTower((24, 12, 6))(torch.zeros(2, 10, 24)).shape
    torch.Size([2, 40, 6])
    """

    def __init__(self, channels: Sequence[int], *, upsampling: str = "nearest") -> None:
        super().__init__()
        self.stages = nn.ModuleList(UpStage(n_in, n_out, upsampling=upsampling) for n_in, n_out in pairwise(channels))

    def forward(self, x_btc: Tensor, masks: Sequence[Tensor] | None = None) -> Tensor:
        """Return the features at full resolution.

        Parameters
        ----------
        x_btc
            Features of the latent positions.
        masks
            Real positions before each stage (more may follow); the others count as beyond the end of the window.
        """
        for i, stage in enumerate(self.stages):
            if masks is not None:
                x_btc = x_btc * masks[i][:, :, None]
            x_btc = stage(x_btc)
        return x_btc
