from __future__ import annotations

import pytest
import torch

from epivi.nn.gene_decoder import GatedDecoder

B, G, I, D, Q, O = 4, 6, 5, 3, 7, 2  # noqa: E741 - the letters of the shapes


@pytest.fixture
def decoder():
    torch.manual_seed(0)
    found = GatedDecoder(I, D, Q, O)
    torch.nn.init.constant_(found.activation.weight, -0.4)
    return found


def concatenated(decoder, z_bi, gene_nd, index_bg=None):
    """The formula of the docstring with [z; g] written out for each pair."""
    gate_nq = decoder.gate(gene_nd).sigmoid()
    gate_bgq = gate_nq.expand(len(z_bi), -1, -1) if index_bg is None else gate_nq[index_bg]
    pair_bgj = torch.cat([z_bi[:, None].expand(-1, gate_bgq.shape[1], -1), gate_bgq], dim=2)
    hidden = decoder.hidden(pair_bgj)
    hidden = torch.where(hidden > 0, hidden, decoder.activation.weight * hidden)
    return decoder.out(hidden)


@pytest.mark.parametrize("sampled", [False, True])
def test_the_split_layer_equals_the_concatenated_form_with_its_gradients(decoder, sampled):
    index_bg = torch.randint(0, G, (B, 9)) if sampled else None
    z_bi, gene_nd = torch.randn(B, I), torch.randn(G, D)
    found = []
    for form in (decoder, lambda *given: concatenated(decoder, *given)):
        z, gene = z_bi.clone().requires_grad_(), gene_nd.clone().requires_grad_()
        out = form(z, gene, index_bg)
        decoder.zero_grad()
        out.square().mean().backward()
        found.append([out, z.grad, gene.grad, *(p.grad for p in decoder.parameters())])
    assert found[0][0].shape == (B, 9 if sampled else G, O)
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-6)


def test_samples_are_columns_of_the_whole_and_pads_take_row_0(decoder):
    z_bi, gene_nd = torch.randn(B, I), torch.randn(G, D)
    whole_bgo = decoder(z_bi, gene_nd)
    index_bg = torch.tensor([[1, 4], [0, -1], [5, 5], [-1, 2]])
    expected = torch.stack([whole_bgo[b, row.clamp_min(0)] for b, row in enumerate(index_bg)])
    torch.testing.assert_close(decoder(z_bi, gene_nd, index_bg), expected, rtol=0, atol=1e-6)


def test_cells_and_genes_do_not_see_each_other(decoder):
    z_bi, gene_nd = torch.randn(B, I), torch.randn(G, D)
    whole_bgo = decoder(z_bi, gene_nd)
    part_bgo = decoder(z_bi[[2, 0]], gene_nd[[5, 1, 3]])
    torch.testing.assert_close(part_bgo, whole_bgo[[2, 0]][:, [5, 1, 3]], rtol=0, atol=1e-6)


def test_no_gene_gives_no_output(decoder):
    assert decoder(torch.randn(B, I), torch.randn(G, D), torch.zeros(B, 0, dtype=torch.int64)).shape == (B, 0, O)


@pytest.mark.parametrize(
    ("sizes", "golden"),
    [
        ((1024, 512, 128, 2), 213_507),
        ((256, 128, 64, 2), 28_931),
        ((64, 32, 32, 2), 4_227),
        ((512, 512, 128, 1), 147_842),
        ((128, 128, 64, 1), 20_674),
        ((32, 32, 32, 1), 3_170),
    ],
)
def test_the_number_of_parameters_is_the_published_one(sizes, golden):
    assert sum(p.numel() for p in GatedDecoder(*sizes).parameters()) == golden
