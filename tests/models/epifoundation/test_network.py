from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import cross_entropy, layer_norm, linear

from epivi.models.epifoundation.config import EpiFoundationConfig
from epivi.models.epifoundation.network import BatchAdversary, GeneTable, LabelDecoder, PeakEncoder, Places

N_PEAKS, LENGTHS = 6, (1000, 500)


def size_of(module):
    return sum(parameter.numel() for parameter in module.parameters())


def encoder_of(**choices):
    config = EpiFoundationConfig.chosen({"dropout_rate": 0.0} | choices, size="test")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        encoder = PeakEncoder(config, N_PEAKS, LENGTHS).eval()
        for parameter in encoder.parameters():
            # weights as drawn give attention that is almost even
            parameter.data.add_(0.3 * torch.randn_like(parameter))
    return encoder


@pytest.fixture(scope="module")
def encoder():
    return encoder_of()


TOKENS = torch.tensor([[1, 2, 5, 7, 4], [1, 3, 6, 0, 0]])
LENGTH = torch.tensor([5, 3])
CHROM = torch.tensor([[-1, 1, 2, 0, 1], [-1, 2, 1, -1, -1]])


def normed(x, norm):
    return layer_norm(x, (x.shape[-1],), norm.weight, norm.bias, norm.eps)


def by_loops(encoder, tokens, chrom):
    """One cell without pads, equations (2)-(6), softmax attention by loops over heads and positions."""
    table, places = encoder.peaks, encoder.places.chromosomes
    rows = [n if n > 0 else (0 if n < 0 else places.table.num_embeddings - 1) for n in chrom]
    x = [
        normed(normed(table.table.weight[t], table.norm) + normed(places.table.weight[r], places.norm), encoder.norm)
        for t, r in zip(tokens, rows, strict=True)
    ]
    for layer in encoder.transformer.layers:
        attention = layer.attention
        n_heads, width = attention.n_heads, x[0].numel()
        e = width // n_heads
        query, key, value = zip(
            *(linear(v, attention.project.weight, attention.project.bias).split(width) for v in x), strict=True
        )
        attended = []
        for i in range(len(x)):
            parts = []
            for h in range(n_heads):
                at = slice(h * e, (h + 1) * e)
                score = [math.exp(float(query[i][at] @ key[j][at]) / math.sqrt(e)) for j in range(len(x))]
                parts.append(sum(s / sum(score) * value[j][at] for j, s in enumerate(score)))
            attended.append(linear(torch.cat(parts), attention.out.weight, attention.out.bias))
        x = [normed(v + a, layer.attention_norm) for v, a in zip(x, attended, strict=True)]
        hidden = [linear(v, layer.hidden.weight, layer.hidden.bias).clamp_min(0) for v in x]
        x = [
            normed(v + linear(h, layer.project.weight, layer.project.bias), layer.norm)
            for v, h in zip(x, hidden, strict=True)
        ]
    return normed(x[0], encoder.transformer.norm)


@torch.no_grad()
def test_the_encoder_against_attention_by_loops(encoder):
    z = encoder(TOKENS, LENGTH, CHROM)
    for cell, n in enumerate(LENGTH.tolist()):
        expected = by_loops(encoder, TOKENS[cell, :n].tolist(), CHROM[cell, :n].tolist())
        torch.testing.assert_close(z[cell], expected, rtol=1e-5, atol=1e-5)
    assert (z[0] - z[1]).abs().max() > 0.1


@torch.no_grad()
@pytest.mark.parametrize("positions", ["chromosome", "genome", "none"])
def test_the_order_of_peaks_does_not_matter(positions):
    encoder = encoder_of(positions=positions, count_levels=True)
    position, level = torch.tensor([[0, 10, 400, 80, 950]]), torch.tensor([[0, 1, 3, 2, 1]])
    inputs = [TOKENS[:1], CHROM[:1], position, level]
    order = torch.tensor([0, 3, 1, 4, 2])
    z, permuted = (encoder(parts[0], LENGTH[:1], *parts[1:]) for parts in (inputs, [part[:, order] for part in inputs]))
    torch.testing.assert_close(z, permuted, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 2e-6), (torch.float64, 1e-13)])
def test_pads_and_other_cells_change_nothing(dtype, atol):
    encoder = encoder_of().to(dtype)
    whole = encoder(TOKENS, LENGTH, CHROM)
    for cell, n in enumerate(LENGTH.tolist()):
        alone = encoder(TOKENS[cell : cell + 1, :n], LENGTH[cell : cell + 1], CHROM[cell : cell + 1, :n])
        torch.testing.assert_close(whole[cell : cell + 1], alone, rtol=0, atol=atol)
    # what stands in the pads is not read
    other, chrom = TOKENS.clone(), CHROM.clone()
    other[1, 3:], chrom[1, 3:] = 5, 2
    torch.testing.assert_close(encoder(other, LENGTH, chrom)[1], whole[1], rtol=0, atol=atol)


@torch.no_grad()
def test_a_cell_without_peaks_is_the_vector_of_cls_alone(encoder):
    z = encoder(torch.tensor([[1, 0, 0], [1, 2, 3]]), torch.tensor([1, 3]), torch.tensor([[-1, -1, -1], [-1, 1, 2]]))
    torch.testing.assert_close(z[0], by_loops(encoder, [1], [-1]), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_every_input_is_read(encoder):
    z = encoder(TOKENS, LENGTH, CHROM)
    tokens, chrom = TOKENS.clone(), CHROM.clone()
    tokens[0, 1], chrom[1, 1] = 3, 1
    assert (encoder(tokens, LENGTH, CHROM)[0] - z[0]).abs().max() > 1e-3
    assert (encoder(TOKENS, LENGTH, chrom)[1] - z[1]).abs().max() > 1e-3


@torch.no_grad()
def test_without_identity_peaks_are_known_by_their_place():
    encoder = encoder_of(positions="genome", peak_identity=False)
    position = torch.tensor([[0, 10, 400, 80, 950]])
    z = encoder(TOKENS[:1], LENGTH[:1], CHROM[:1], position)
    other = torch.tensor([[1, 6, 3, 2, 2]])
    torch.testing.assert_close(encoder(other, LENGTH[:1], CHROM[:1], position), z, rtol=0, atol=0)
    chrom = CHROM[:1].clone()
    chrom[0, 1] = 2
    assert (encoder(TOKENS[:1], LENGTH[:1], chrom, position) - z).abs().max() > 1e-3
    # of the table only pad, [CLS] and a row that is not read are left
    assert encoder.peaks.table.num_embeddings == 3


@torch.no_grad()
def test_positions_of_the_genome_are_told_where_they_are_asked_for():
    encoder = encoder_of(positions="genome")
    bins = encoder.places.bins
    position = torch.tensor([[0, 10, 400, 80, 950]])
    code = CHROM[:1]
    found = encoder.places(code, position)
    chromosome = encoder.places.chromosomes(torch.tensor([[0, 1, 2, 3, 1]]))
    expected = chromosome + bins((code - 1).clamp_min(-1), position) * (code >= 0)[:, :, None]
    torch.testing.assert_close(found, expected)
    # [CLS] and pads have no place
    torch.testing.assert_close(found[0, 0], chromosome[0, 0])


def test_chromosomes_have_a_row_each_with_one_for_no_place_and_one_for_other_contigs():
    places = Places(EpiFoundationConfig.chosen({}, size="test"), LENGTHS)
    rows = places.chromosomes(torch.arange(4))
    torch.testing.assert_close(places(torch.tensor([-1, 1, 2, 0]), None), rows)


def test_what_has_a_chromosome_and_no_position_is_told_by_the_chromosome_alone():
    encoder = encoder_of(positions="genome")
    code, position = torch.tensor([1, 2, 1, 0]), torch.tensor([-1, -1, 0, -1])
    found = encoder.places(code, position)
    alone = encoder.places(code, None)
    torch.testing.assert_close(found[[0, 1, 3]], alone[[0, 1, 3]], rtol=0, atol=0)
    # bin 0 is a place of its own
    assert (found[2] - alone[2]).abs().max() > 1e-3


def test_without_positions_nothing_is_added():
    places = Places(EpiFoundationConfig.chosen({"positions": "none"}, size="test"), ())
    assert places(torch.tensor([-1, 0]), None) == 0.0
    assert size_of(places) == 0


def test_genes_are_told_by_identity_and_place():
    places = Places(EpiFoundationConfig.chosen({}, size="test"), LENGTHS)
    table = GeneTable(32, torch.tensor([1, 2, 0]), torch.zeros(3, dtype=torch.long))
    found = table(places)
    expected = [
        normed(table.genes(torch.tensor(g + 1)) + places.chromosomes(torch.tensor(row)), table.norm)
        for g, row in enumerate((1, 2, 3))
    ]
    torch.testing.assert_close(found, torch.stack(expected))
    # places follow from the data, not from the weights
    assert set(table.state_dict()) == {
        "genes.table.weight",
        "genes.norm.weight",
        "genes.norm.bias",
        "norm.weight",
        "norm.bias",
    }


# peaks, chromosomes, genes; then d, N, and parameters of the parts
GOLDEN = {
    "paper": ((1_000_000, 24, 20_000), (512_002_048, 14_336, 10_241_536, 12_617_728), 2_102_784),
    "tutorial": ((25_734, 21, 1_677), (3_294_464, 3_200, 215_040, 397_696), 132_480),
    "test": ((500, 24, 200), (16_128, 896, 6_496, 17_152), 8_544),
}


@pytest.mark.parametrize("size", GOLDEN)
def test_the_number_of_parameters_of_each_part_is_the_published_one(size):
    (n_peaks, n_chrom, n_genes), parts, block = GOLDEN[size]
    config = EpiFoundationConfig.chosen({}, size=size)
    with torch.device("meta"):
        encoder = PeakEncoder(config, n_peaks, (1000,) * n_chrom)
        genes = GeneTable(config.width, torch.zeros(n_genes, dtype=torch.long), torch.zeros(n_genes, dtype=torch.long))
    # the norm of the input and that of the genes' sum stand beside the tables
    found = (size_of(encoder.peaks), size_of(encoder.places), size_of(genes.genes), size_of(encoder.transformer))
    assert found == parts
    assert size_of(encoder.norm) + size_of(genes.norm) == 4 * config.width
    assert size_of(encoder.transformer.layers[0]) == block


@pytest.mark.parametrize(
    ("width", "n_classes", "golden"),
    [(512, 7, 527_360 + 513 * 7), (128, 3, 33_536 + 129 * 3), (32, 5, 2_240 + 33 * 5)],
)
def test_the_number_of_parameters_of_the_label_decoder_is_the_published_one(width, n_classes, golden):
    assert size_of(LabelDecoder(width, n_classes)) == golden


def test_the_label_decoder_against_its_formula():
    decoder = LabelDecoder(4, 3)
    z = torch.randn(5, 4)
    first, second, last = (layer for layer in decoder if isinstance(layer, torch.nn.Linear))
    norms = [layer for layer in decoder if isinstance(layer, torch.nn.LayerNorm)]
    x = normed(first(z).relu(), norms[0])
    x = normed(second(x).relu(), norms[1])
    torch.testing.assert_close(decoder(z), last(x))


def test_the_adversary_learns_what_the_cell_vector_unlearns():
    adversary = BatchAdversary(4, 3, 0.25)
    z, batch = torch.randn(6, 4, requires_grad=True), torch.tensor([0, 1, 2, 0, 1, 2])
    reversed_z = torch.autograd.grad(cross_entropy(adversary(z), batch), [z, *adversary.parameters()])
    plain_z = torch.autograd.grad(cross_entropy(adversary.network(z), batch), [z, *adversary.parameters()])
    torch.testing.assert_close(reversed_z[0], -0.25 * plain_z[0])
    for one, other in zip(reversed_z[1:], plain_z[1:], strict=True):
        torch.testing.assert_close(one, other)
