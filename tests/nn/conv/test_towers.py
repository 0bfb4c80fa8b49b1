from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import avg_pool1d, conv1d, gelu, interpolate, max_pool1d, one_hot

from epivi._errors import ConfigError
from epivi.nn.conv.towers import DnaTower, ResidualStage, SignalTower, SqueezeExcitation, UpStage, UpTower, convolve

SEED = torch.Generator().manual_seed(0)


def randn(*shape):
    return torch.randn(*shape, generator=SEED, dtype=torch.float64)


def plain_stage(stage, x_bct):
    conv, short = stage.conv, stage.shortcut
    y_bct = conv1d(x_bct, conv.weight, conv.bias, padding=1, groups=conv.groups)
    y_bct = gelu(stage.norm(y_bct.transpose(1, 2))).transpose(1, 2)
    y_bct = y_bct + conv1d(x_bct, short.weight, short.bias, groups=short.groups)
    if stage.gate is not None:
        gate = torch.sigmoid(stage.gate.excite(torch.relu(stage.gate.squeeze(y_bct.mean(2)))))
        y_bct = y_bct * gate[:, :, None]
    return y_bct


@pytest.mark.parametrize(("kernel_size", "groups"), [(1, 1), (3, 1), (3, 3), (1, 3)])
def test_convolution_with_channels_last_is_the_usual_one(kernel_size, groups):
    conv = nn.Conv1d(6, 9, kernel_size, padding=kernel_size // 2, groups=groups).double()
    x_btc = randn(2, 11, 6)
    torch.testing.assert_close(convolve(x_btc, conv), conv(x_btc.transpose(1, 2)).transpose(1, 2))


@pytest.mark.parametrize("squeeze", [False, True])
def test_the_signal_tower_is_stages_and_means(squeeze):
    tower = SignalTower((6, 12, 24), groups=3, squeeze_excitation=squeeze).double()
    x_btc = randn(2, 16, 6)
    expected = x_btc.transpose(1, 2)
    for stage in tower.stages:
        expected = avg_pool1d(plain_stage(stage, expected), 2)
    torch.testing.assert_close(tower(x_btc), expected.transpose(1, 2))


@pytest.mark.parametrize("squeeze", [False, True])
def test_the_dna_tower_is_one_hot_stages_and_maxima(squeeze):
    tower = DnaTower((4, 5, 7, 9), (2, 3, 1), squeeze_excitation=squeeze).double()
    assert tower.is_looked_up != squeeze
    dna_bg = torch.randint(0, 5, (3, 36), generator=SEED)
    x_bcg = one_hot(dna_bg, 5)[..., :4].double().transpose(1, 2)
    for stage, pool in zip(tower.stages, tower.pools, strict=True):
        x_bcg = max_pool1d(plain_stage(stage, x_bcg), pool)
    found = tower(dna_bg.to(torch.uint8))
    torch.testing.assert_close(found, x_bcg.transpose(1, 2))
    weights = randn(*found.shape)
    expected = torch.autograd.grad((x_bcg.transpose(1, 2) * weights).sum(), list(tower.parameters()))
    for one, other in zip(
        torch.autograd.grad((found * weights).sum(), list(tower.parameters())), expected, strict=True
    ):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("n_stages", [1, 2, 3])
def test_receptive_field_is_what_context_says(n_stages):
    tower = SignalTower([2 * 2**i for i in range(n_stages + 1)], groups=2).double()
    scale = 2**n_stages
    assert tower.context == scale - 1
    x_btc = randn(1, 8 * scale, 2)
    at = 3  # a latent position in the middle
    reached = []
    for position in range(x_btc.shape[1]):
        other_btc = x_btc.clone()
        other_btc[0, position] += 1.0
        reached.append(not torch.equal(tower(x_btc)[0, at], tower(other_btc)[0, at]))
    expected = [at * scale - tower.context <= i < (at + 1) * scale + tower.context for i in range(8 * scale)]
    assert reached == expected


def test_the_context_of_dna_counts_base_pairs():
    # one bp for the first stage, then 2, 4 and 20 at the scales of the pools
    assert DnaTower((4, 5, 6, 7, 8), (2, 2, 5, 5)).context == 1 + 2 + 4 + 20


@pytest.mark.parametrize("real", [4, 12, 16])
def test_masked_positions_act_as_the_end_of_the_window(real):
    tower = SignalTower((4, 8, 16), groups=2).double()
    x_btc, mask_bt = randn(2, 16, 4), (torch.arange(16) < real).expand(2, 16)
    torch.testing.assert_close(tower(x_btc, mask_bt)[:, : real // 4], tower(x_btc[:, :real]))
    dna = DnaTower((4, 5, 6), (2, 2)).double()
    code_bg = torch.randint(0, 5, (2, 16), generator=SEED)
    torch.testing.assert_close(dna(code_bg, mask_bt)[:, : real // 4], dna(code_bg[:, :real]))
    up = UpTower((4, 4, 2)).double()
    z_btc = randn(2, 4, 4)
    masks = [mask_bt[:, ::4], mask_bt[:, ::2]]
    torch.testing.assert_close(up(z_btc, masks)[:, :real], up(z_btc[:, : real // 4]))


def test_the_nearest_stage_is_repetition_and_convolution():
    stage = UpStage(6, 4).double()
    x_btc = randn(3, 5, 6)
    up_bct = interpolate(x_btc.transpose(1, 2), scale_factor=2, mode="nearest")
    expected = gelu(stage.norm(stage.conv(up_bct).transpose(1, 2))) + stage.shortcut(up_bct).transpose(1, 2)
    torch.testing.assert_close(stage(x_btc), expected)


def test_the_transposed_shortcut_leaves_odd_positions_at_their_bias():
    stage = UpStage(6, 4, upsampling="transposed").double()
    x_btc = randn(3, 5, 6)
    nn.init.zeros_(stage.norm.weight)
    nn.init.zeros_(stage.norm.bias)
    found = stage(x_btc)
    torch.testing.assert_close(found[:, 1::2], stage.shortcut.bias.expand(3, 5, 4))
    torch.testing.assert_close(found[:, ::2], x_btc @ stage.shortcut.weight[:, :, 0] + stage.shortcut.bias)


def test_squeeze_excitation_of_few_channels_keeps_one_unit():
    gate = SqueezeExcitation(5)
    assert gate.squeeze.weight.shape == (1, 5)
    nn.init.zeros_(gate.excite.weight)
    assert torch.equal(gate(torch.ones(1, 2, 5)), torch.full((1, 2, 5), 0.5))
    assert ResidualStage(4, 4).gate is None


def test_bad_towers_are_refused():
    with pytest.raises(ConfigError, match=r"channels \(4, 5\) and pools \(2, 2\)"):
        DnaTower((4, 5), (2, 2))
    with pytest.raises(ConfigError, match="starts from 4 channels, one a letter; found 5"):
        DnaTower((5, 5), (2,))
    with pytest.raises(ConfigError, match=r"channels \(4,\) and pools \(\)"):
        SignalTower((4,), groups=2)
    with pytest.raises(ConfigError, match=r"upsampling='nearst' is not known. Did you mean 'nearest'"):
        UpStage(2, 2, upsampling="nearst")
