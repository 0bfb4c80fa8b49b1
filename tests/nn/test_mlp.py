from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from epivi.nn.linear import PeakBlocks
from epivi.nn.mlp import (
    ChromosomeDecoder,
    ChromosomeEncoder,
    DenseDecoder,
    DenseEncoder,
    GaussianHeads,
    GroupedLinear,
    GroupedNorm,
    LinearDecoder,
    LinearEncoder,
    dense_block,
)
from epivi.objectives.likelihoods import weighted_bernoulli

PAIRS = {
    "dense": (DenseEncoder, DenseDecoder),
    "chromosome": (ChromosomeEncoder, ChromosomeDecoder),
    "linear": (LinearEncoder, LinearDecoder),
}
BLOCKS = np.array([1, 0, 2, 1, 0, 2, 1, 1, 0, 2, 2, 0])


def count(*modules):
    return sum(p.numel() for module in modules for p in module.parameters())


def build(kind, blocks, *, hidden=(4, 3), n_latent=2, n_covariates=1, **options):
    encoder, decoder = PAIRS[kind]
    return encoder(blocks, hidden, n_latent, **options), decoder(blocks, hidden, n_latent, n_covariates, **options)


def blocks_of(kind, block_of_peak=BLOCKS):
    return PeakBlocks(block_of_peak) if kind == "chromosome" else PeakBlocks.tiles(block_of_peak.size, width=5)


def compress(x_bp):
    rows, columns = torch.nonzero(x_bp, as_tuple=True)
    return torch.nn.functional.pad(torch.bincount(rows, minlength=x_bp.shape[0]).cumsum(0), (1, 0)), columns


def random_cells(n_cells=7, n_peaks=BLOCKS.size):
    return torch.from_numpy(np.random.default_rng(3).integers(0, 2, (n_cells, n_peaks))).double()


def randomise(*modules):
    """Give every parameter and running statistic a value of its own, so that no term is hidden by a zero or a one."""
    generator = torch.Generator().manual_seed(5)
    for module in modules:
        for name, tensor in (*module.named_parameters(), *module.named_buffers()):
            if tensor.is_floating_point():
                drawn = torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype)
                tensor.data.copy_(drawn + 0.5 if "running_var" in name else drawn - 0.3)


def loss_of(encoder, decoder, blocks, x_bp, covariates_bk):
    batch = blocks.split(*compress(x_bp))
    mean_bd, logvar_bd = encoder(batch)
    hidden = decoder(mean_bd, covariates_bk)
    loss_b = sum(
        weighted_bernoulli(logits_bp, batch.flat(j), batch.rows[j], 5.0)
        for j, logits_bp in enumerate(decoder.logits(hidden))
    )
    return loss_b, mean_bd, logvar_bd


@pytest.mark.parametrize(
    ("n_peaks", "hidden", "n_covariates", "in_encoder", "total"),
    [
        (90_635, (1000, 100), 1, 90_740_320, 181_570_355),
        (50_562, (1000, 100), 1, 50_667_320, 101_384_282),
        (50_562, (1000, 100), 3, 50_667_320, 101_384_482),
        (2_000, (1000, 100), 1, None, 4_211_720),
        (2_000, (1000, 100), 3, None, 4_211_920),
        (4_000, (256, 64), 1, None, 2_088_692),
    ],
)
def test_dense_networks_have_the_published_number_of_parameters(n_peaks, hidden, n_covariates, in_encoder, total):
    blocks = PeakBlocks.tiles(n_peaks)
    with torch.device("meta"):
        encoder, decoder = build("dense", blocks, hidden=hidden, n_latent=10, n_covariates=n_covariates)
    assert count(encoder, decoder) == total
    assert in_encoder in (None, count(encoder))


@pytest.mark.parametrize(
    ("sizes", "n_covariates", "in_encoder", "total"),
    [
        ([5_971] * 21 + [5_973], 1, 8_529_232, 17_155_211),
        ([100] * 21 + [129_264], 1, 8_529_232, 17_155_211),
        ([131_364], 1, None, 16_955_564),
        ([400, 300, 200, 100], 1, None, 167_129),
        ([400, 300, 200, 100], 3, None, 167_385),
    ],
)
def test_chromosome_networks_have_the_published_number_of_parameters(sizes, n_covariates, in_encoder, total):
    blocks = PeakBlocks(np.repeat(np.arange(len(sizes)), sizes))
    with torch.device("meta"):
        encoder, decoder = build("chromosome", blocks, hidden=(64, 32), n_latent=50, n_covariates=n_covariates)
    assert count(encoder, decoder) == total
    assert in_encoder in (None, count(encoder))


def test_other_networks_named_in_the_comparison_have_their_number_of_parameters():
    blocks = PeakBlocks.tiles(131_364)
    with torch.device("meta"):
        wide = build("dense", blocks, hidden=(1600, 320), n_latent=50)
        linear = build("linear", blocks, n_latent=10, n_covariates=3)
    assert count(*wide) == 421_580_104
    assert count(*linear) == 131_364 * 20 + 20 + 131_364 * 13 + 131_364


@pytest.mark.parametrize("is_training", [False, True])
def test_dense_networks_equal_plain_torch_layers(is_training):
    blocks, x_bp = PeakBlocks.tiles(12, width=5), random_cells()
    encoder, decoder = (module.double().train(is_training) for module in build("dense", blocks))
    randomise(encoder, decoder)
    first = nn.Linear(12, 4).double()
    first.weight.data, first.bias.data = encoder.first.weight.data.t(), encoder.first.bias.data
    bn_1, bn_2, second = encoder.first_norm[0], encoder.second[1], encoder.second[0]
    assert [type(layer) for layer in encoder.second] == [nn.Linear, nn.BatchNorm1d, nn.LeakyReLU, nn.Dropout]

    def norm(bn, h):
        mean, var = (h.mean(0), h.var(0, unbiased=False)) if is_training else (bn.running_mean, bn.running_var)
        h = (h - mean) / (var + 1e-5).sqrt() * bn.weight + bn.bias
        return torch.where(h > 0, h, 0.2 * h)

    with torch.no_grad():
        hidden_bh = norm(bn_2, second(norm(bn_1, first(x_bp))))
        expected = encoder.heads.mean(hidden_bh), encoder.heads.logvar(hidden_bh)
        torch.testing.assert_close(encoder(blocks.split(*compress(x_bp))), expected)

        z_bd, c_bk = torch.randn(7, 2).double(), torch.randn(7, 1).double()
        hidden_bh = norm(decoder.first[1], decoder.first[0](torch.cat([z_bd, c_bk], 1)))
        hidden_bh = norm(decoder.second[1], decoder.second[0](hidden_bh))
        torch.testing.assert_close(decoder(z_bd, c_bk), hidden_bh)
        logits_bp = hidden_bh @ decoder.logits.weight.t() + decoder.logits.bias
        torch.testing.assert_close(torch.cat(list(decoder.logits(hidden_bh)), 1), logits_bp)


def test_chromosome_networks_equal_one_small_network_a_chromosome():
    blocks, x_bp = PeakBlocks(BLOCKS), random_cells()
    encoder, decoder = (module.double().eval() for module in build("chromosome", blocks))
    randomise(encoder, decoder)

    def norm(grouped, h, j):
        n = h.shape[1]
        at = slice(j * n, (j + 1) * n)
        bn, slope = grouped.norm, grouped.activation.weight[j]
        h = (h - bn.running_mean[at]) / (bn.running_var[at] + 1e-5).sqrt() * bn.weight[at] + bn.bias[at]
        return torch.where(h > 0, h, slope * h)

    with torch.no_grad():
        weight_ph = encoder.first.weight[blocks.rank]
        outputs = []
        for j in range(3):
            h = x_bp[:, np.equal(BLOCKS, j)] @ weight_ph[np.equal(BLOCKS, j)] + encoder.first.bias[j]
            h = norm(encoder.first_norm, h, j) @ encoder.second.weight[j] + encoder.second.bias[j]
            outputs.append(norm(encoder.second_norm, h, j))
        hidden_bh = torch.cat(outputs, 1)
        expected = encoder.heads.mean(hidden_bh), encoder.heads.logvar(hidden_bh)
        torch.testing.assert_close(encoder(blocks.split(*compress(x_bp))), expected)

        z_bd, c_bk = torch.randn(7, 2).double(), torch.randn(7, 1).double()
        hidden_bh = decoder.first_norm(decoder.first(torch.cat([z_bd, c_bk], 1)))
        got = decoder(z_bd, c_bk)
        for j in range(3):
            h = hidden_bh[:, 3 * j : 3 * j + 3] @ decoder.second.weight[j] + decoder.second.bias[j]
            torch.testing.assert_close(got[:, j], norm(decoder.second_norm, h, j))


def test_linear_networks_are_linear_maps():
    blocks, x_bp = PeakBlocks.tiles(12, width=5), random_cells()
    encoder, decoder = (module.double() for module in build("linear", blocks))
    randomise(encoder, decoder)
    out_bd = x_bp @ encoder.first.weight + encoder.first.bias
    torch.testing.assert_close(encoder(blocks.split(*compress(x_bp))), (out_bd[:, :2], out_bd[:, 2:]))
    z_bd, c_bk = torch.randn(7, 2).double(), torch.randn(7, 1).double()
    expected = torch.cat([z_bd, c_bk], 1) @ decoder.logits.weight.t() + decoder.logits.bias
    torch.testing.assert_close(torch.cat(list(decoder.logits(decoder(z_bd, c_bk))), 1), expected)


@pytest.mark.parametrize("kind", PAIRS)
@pytest.mark.parametrize("is_training", [False, True])
def test_permuting_peaks_with_their_chromosomes_changes_nothing(kind, is_training):
    order = np.random.default_rng(8).permutation(BLOCKS.size)
    old, new = blocks_of(kind), blocks_of(kind, BLOCKS[order])
    networks = [build(kind, blocks) for blocks in (old, new)]
    for pair in networks:
        for module in pair:
            module.double().train(is_training)
    randomise(*networks[0])
    with torch.no_grad():
        for before, after in zip(*networks, strict=True):
            after.load_state_dict(before.state_dict())
            layer, source = (getattr(m, "logits", None) or m.first for m in (after, before))
            layer.weight[new.rank] = source.weight[old.rank[order]]
            if after is networks[1][1]:
                layer.bias[new.rank] = source.bias[old.rank[order]]
    x_bp, c_bk = random_cells(), torch.randn(7, 1).double()
    expected = loss_of(*networks[0], old, x_bp, c_bk)
    torch.testing.assert_close(loss_of(*networks[1], new, x_bp[:, order], c_bk), expected)


@pytest.mark.parametrize("kind", PAIRS)
def test_permuting_cells_permutes_outputs_and_inference_ignores_the_other_cells(kind):
    blocks = blocks_of(kind)
    encoder, decoder = (module.double().eval() for module in build(kind, blocks))
    randomise(encoder, decoder)
    x_bp, c_bk, order = random_cells(), torch.randn(7, 1).double(), torch.randperm(7)
    loss_b, mean_bd, logvar_bd = loss_of(encoder, decoder, blocks, x_bp, c_bk)
    permuted = loss_of(encoder, decoder, blocks, x_bp[order], c_bk[order])
    torch.testing.assert_close(permuted, (loss_b[order], mean_bd[order], logvar_bd[order]))
    alone = loss_of(encoder, decoder, blocks, x_bp[2:3], c_bk[2:3])
    torch.testing.assert_close(alone, (loss_b[2:3], mean_bd[2:3], logvar_bd[2:3]))


@pytest.mark.parametrize("kind", PAIRS)
def test_log_variances_are_clamped(kind):
    blocks = blocks_of(kind)
    encoder, _ = build(kind, blocks)
    with torch.no_grad():
        bias = encoder.first.bias if kind == "linear" else encoder.heads.logvar.bias
        bias[-1], bias[-2] = 1e6, -1e6
    encoder.eval()
    _, logvar_bd = encoder(blocks.split(*compress(random_cells())))
    assert logvar_bd[:, -1].tolist() == [8.0] * 7
    assert logvar_bd[:, -2].tolist() == [-8.0] * 7


@pytest.mark.parametrize("kind", PAIRS)
def test_covariates_and_latent_reach_the_logits(kind):
    _, decoder = build(kind, blocks_of(kind), n_covariates=2)
    decoder.double().eval()
    randomise(decoder)
    z_bd, c_bk = torch.randn(3, 2).double(), torch.randn(3, 2).double()
    jacobian = torch.autograd.functional.jacobian(
        lambda z, c: torch.cat(list(decoder.logits(decoder(z, c))), 1).sum(0), (z_bd, c_bk)
    )
    for part in jacobian:  # peaks x cells x inputs
        assert (part.abs().amax(0) > 0).all()


@pytest.mark.parametrize(("kind", "n_units"), [("dense", 3), ("chromosome", 9)])
def test_the_condition_layer_reads_latent_and_covariates(kind, n_units):
    _, decoder = build(kind, blocks_of(kind), n_latent=2, n_covariates=5)
    assert decoder.condition_layer.weight.shape == (n_units, 7)


@pytest.mark.parametrize("kind", ["dense", "chromosome"])
def test_options_reach_every_layer(kind):
    networks = build(kind, blocks_of(kind), dropout_rate=0.25, momentum=0.01, eps=1e-3)
    modules = [module for network in networks for module in network.modules()]
    norms = [module for module in modules if isinstance(module, nn.BatchNorm1d)]
    assert [(norm.momentum, norm.eps) for norm in norms] == [(0.01, 1e-3)] * 4
    assert [module.p for module in modules if isinstance(module, nn.Dropout)] == [0.25] * 4


def test_dropout_acts_in_training_only():
    torch.manual_seed(0)
    block = dense_block(3, 50, dropout_rate=0.5, momentum=0.1, eps=1e-5)
    x = torch.randn(8, 3)
    assert (block(x) == 0).float().mean().item() == pytest.approx(0.5, abs=0.1)
    assert (block.eval()(x) == 0).sum().item() == 0


@pytest.mark.parametrize(
    ("activation", "expected"), [(None, nn.LeakyReLU), (nn.ReLU, nn.ReLU), (nn.Identity, nn.Identity)]
)
def test_the_activation_of_a_dense_block_is_chosen(activation, expected):
    block = dense_block(3, 2, dropout_rate=0.1, momentum=0.1, eps=1e-5, activation=activation)
    assert [type(part) for part in block] == [nn.Linear, nn.BatchNorm1d, expected, nn.Dropout]
    if activation is None:
        assert block[2].negative_slope == 0.2
    # keys of saved weights
    assert {key.partition(".")[0] for key in block.state_dict()} == {"0", "1"}


def test_grouped_linear_equals_a_loop_and_is_xavier_uniform_within_each_group():
    torch.manual_seed(0)
    layer = GroupedLinear(3, 64, 32)
    x_bch = torch.randn(5, 3, 64)
    layer.bias.data.normal_()
    looped = torch.stack([x_bch[:, j] @ layer.weight[j] + layer.bias[j] for j in range(3)], 1)
    torch.testing.assert_close(layer(x_bch), looped)
    bound = math.sqrt(6 / (64 + 32))
    for part_io in layer.weight:
        assert 0.99 * bound < part_io.abs().max().item() <= bound


def test_grouped_norm_has_one_slope_a_chromosome():
    norm = GroupedNorm(2, 3, dropout_rate=0.0, momentum=0.1, eps=1e-5).eval()
    norm.activation.weight.data = torch.tensor([0.5, 0.0])
    out_bch = norm(torch.full((4, 2, 3), -1.0))
    assert out_bch[:, 0].mean().item() == pytest.approx(-0.5, rel=1e-4)
    assert not out_bch[:, 1].any()
    assert count(norm) == 2 * 6 + 2


def test_xavier_heads_have_no_bias_at_the_start():
    heads = GaussianHeads(40, 10, xavier=True)
    for head in (heads.mean, heads.logvar):
        assert not head.bias.any()
        assert head.weight.abs().max().item() <= math.sqrt(6 / 50)
        assert head.weight.abs().max().item() > 1 / math.sqrt(40)  # the bound of a plain linear layer
