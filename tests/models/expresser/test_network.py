"""The network against the printed equations, golden numbers of parameters, one-sided attention."""

import numpy as np
import pytest
import torch

from epivi.models.expresser.config import ExpresserConfig
from epivi.models.expresser.network import ExpresserNetwork, attend_one_sided, gather_rows, token_mask


def size_of(module) -> int:
    return sum(p.numel() for p in module.parameters())


def network(n_genes=30, **choices):
    torch.manual_seed(0)
    config = ExpresserConfig.chosen(choices, size="test")
    net = ExpresserNetwork(config, n_genes).double().eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        # rows of pads are 0 and have no gradient
        net.genes.table.weight[0] = net.bins.table.weight[0] = 0.0
    return net


@pytest.mark.parametrize(
    ("size", "n_genes", "table", "bins", "layer", "decoder", "head", "total"),
    [
        ("paper", 18_483, 3_696_800, 10_200, 482_600, 160_800, 40_601, 9_699_601),
        ("tutorial", 2_000, 128_064, 3_264, 49_984, 16_640, 4_289, 302_209),
        ("test", 200, 6_432, 352, 12_704, 4_224, 1_121, 37_537),
    ],
)
def test_golden_numbers_of_parameters(size, n_genes, table, bins, layer, decoder, head, total) -> None:
    net = ExpresserNetwork(ExpresserConfig.chosen({}, size=size), n_genes)
    parts = (net.genes, net.bins, net.encoder.layers[0], net.attention, net.head)
    assert [size_of(part) for part in parts] == [table, bins, layer, decoder, head]
    assert size_of(net) == total


def test_ablation_has_a_mask_token_in_place_of_the_decoder() -> None:
    net = ExpresserNetwork(ExpresserConfig.chosen({"decoder": "encoder"}, size="test"), 200)
    assert size_of(net) == 37_537 - 4_224 + 32


def test_decoder_is_equations_4_2_to_4_4_by_loops() -> None:
    net = network()
    tokens = torch.tensor([[3, 7, 9, 1, 0]])
    bins = torch.tensor([[4, 0, 10, 1, 0]])
    context = net.encode(tokens, torch.tensor([4]), bins)
    query = gather_rows(context, torch.tensor([[1]]))
    maximum = torch.tensor([5.0], dtype=torch.float64)
    got = net.head(net.mix(query, context, bins), maximum).mean.item()
    weights = {name: p.detach().numpy() for name, p in net.named_parameters()}
    d, h = 32, 4
    e = d // h
    t = context[0].detach().numpy()
    table = net.bins.table.weight.detach().numpy()
    observed = [0, 2, 3]

    def linear(name, x):
        return weights[f"{name}.weight"] @ x + weights[f"{name}.bias"]

    mixed = np.zeros(d)
    for head in range(h):
        part = slice(head * e, (head + 1) * e)
        q = linear("attention.query", t[1])[part]
        scores = np.array([q @ linear("attention.key", t[j])[part] / np.sqrt(e) for j in observed])
        attention = np.exp(scores) / np.exp(scores).sum()
        for a, j in zip(attention, observed, strict=True):
            mixed[part] += a * linear("attention.value", table[bins[0, j]])[part]
    mixed = linear("attention.out", mixed)
    hidden = np.maximum(linear("head.hidden", np.append(mixed, 5.0)), 0)
    expected = np.log1p(np.exp(linear("head.out", hidden)[0]))
    assert got == pytest.approx(expected, rel=1e-6)
    assert got >= 0


def test_attention_mass_of_bins_gives_the_same() -> None:
    net = network()
    tokens = torch.randint(1, 31, (3, 12))
    bins = torch.randint(0, 11, (3, 12))
    context = net.encode(tokens, torch.tensor([12, 12, 12]), bins)
    direct = net.mix(context[:, :4], context, bins)
    by_mass = net.attention.forward_by_bin(context[:, :4], context, bins, net.bins.table.weight, bins > 0)
    assert torch.allclose(direct, by_mass, atol=1e-5)


def test_values_do_not_enter_the_encoder_of_the_faithful_model() -> None:
    tokens, length = torch.randint(1, 31, (2, 6)), torch.tensor([6, 6])
    one, two = torch.randint(1, 11, (2, 2, 6))
    faithful, ablation = network(), network(decoder="encoder")
    assert torch.equal(faithful.encode(tokens, length, one), faithful.encode(tokens, length, two))
    assert not torch.equal(ablation.encode(tokens, length, one), ablation.encode(tokens, length, two))


@pytest.mark.parametrize("decoder", ["expression", "encoder"])
def test_values_of_hidden_genes_have_no_gradient(decoder) -> None:
    net = network(decoder=decoder)
    tokens, length = torch.randint(1, 31, (1, 6)), torch.tensor([6])
    bins = torch.tensor([[2, 0, 5, 7, 0, 1]])
    value_btd = net.bins.table.weight.detach()[bins].clone().requires_grad_()
    mask_bt = token_mask(tokens, length)
    if decoder == "expression":
        context = net.encode(tokens, length, bins)
        net.attention(context[:, [1, 4]], context, value_btd, bins > 0).sum().backward()
    else:
        hidden = bins == 0
        x = net.genes(tokens) + value_btd * ~hidden[:, :, None] + hidden[:, :, None] * net.mask_token
        # what the network does itself
        assert torch.allclose(x, net.embed(tokens, bins, hidden))
        net.encoder(x, mask_bt)[:, [1, 4]].sum().backward()
    gradient = value_btd.grad.abs().sum(2)[0]
    assert (gradient[bins[0] == 0] == 0).all()
    assert (gradient[bins[0] > 0] > 0).all()


@pytest.mark.parametrize("decoder", ["expression", "encoder"])
def test_permuting_genes_and_padding_change_nothing(decoder) -> None:
    net = network(decoder=decoder)
    tokens = torch.tensor([[4, 9, 2, 30, 11]])
    bins = torch.tensor([[1, 0, 10, 3, 2]])
    order = torch.tensor([3, 1, 4, 0, 2])
    context = net.encode(tokens, torch.tensor([5]), bins)
    permuted = net.encode(tokens[:, order], torch.tensor([5]), bins[:, order])
    assert torch.allclose(context[:, order], permuted, atol=1e-10)
    padded = net.encode(
        torch.cat([tokens, torch.zeros(1, 3, dtype=torch.long)], 1),
        torch.tensor([5]),
        torch.cat([bins, torch.zeros(1, 3, dtype=torch.long)], 1),
    )
    assert torch.allclose(context, padded[:, :5], atol=1e-10)


def test_one_sided_attention_is_that_of_the_whole_with_a_mask() -> None:
    net = network()
    attention = net.encoder.layers[0].attention
    x = torch.randn(1, 7, 32, dtype=torch.float64)
    one = attend_one_sided(attention, x[:, 5:], x[:, :5], torch.ones(1, 5, dtype=torch.bool))
    for asked in (5, 6):
        rows = [0, 1, 2, 3, 4, asked]
        assert torch.allclose(attention(x[:, rows])[:, -1], one[:, asked - 5], atol=1e-10)


@pytest.mark.parametrize("decoder", ["expression", "encoder"])
def test_asked_genes_do_not_see_each_other_and_change_nothing(decoder) -> None:
    net = network(decoder=decoder)
    tokens, bins, length = torch.tensor([[4, 9, 2, 0]]), torch.tensor([[1, 5, 10, 0]]), torch.tensor([3])
    context, asked = net.encode_asked(tokens, length, bins, torch.tensor([[7, 8, 20]]))
    alone = net.encode_asked(tokens, length, bins, torch.tensor([[8]]))[1]
    assert torch.allclose(asked[:, 1], alone[:, 0], atol=1e-10)
    assert torch.allclose(context, net.encode(tokens, length, bins), atol=1e-10)


def test_predictions_are_at_least_zero_and_start_at_the_baseline() -> None:
    torch.manual_seed(0)
    net = ExpresserNetwork(ExpresserConfig.chosen({"baseline": "additive"}, size="test"), 30)
    baseline = torch.tensor([[0.5, 3.0]])
    start = net.head(torch.randn(1, 2, 32), torch.ones(1), baseline).mean
    assert torch.allclose(start, baseline, atol=1e-4)
    assert (net.head(-100 * torch.ones(1, 2, 32), torch.ones(1)).mean >= 0).all()


def test_bins_start_in_order_on_a_line_and_biases_of_projections_at_zero() -> None:
    torch.manual_seed(0)
    net = ExpresserNetwork(ExpresserConfig.chosen({}, size="tutorial"), 30)
    table = net.bins.table.weight[1:].detach()
    line = table[-1] - table[0]
    place = table @ line / line.square().sum()
    assert (place.diff() > 0).all()
    assert (net.bins.table.weight[0] == 0).all()
    projections = ("project.bias", "out.bias", "query.bias", "key.bias", "value.bias")
    biases = [p for name, p in net.named_parameters() if "attention" in name and name.endswith(projections)]
    assert len(biases) == 2 * 3 + 4
    assert all((p == 0).all() for p in biases)


def test_an_empty_cell_is_finite() -> None:
    net = network()
    context = net.encode(torch.zeros(1, 2, dtype=torch.long), torch.tensor([0]), torch.zeros(1, 2, dtype=torch.long))
    assert torch.isfinite(context).all()
