from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import layer_norm

from epivi._errors import ConfigError
from epivi.nn.tokens import PositionTable, TokenTable


def count(table):
    return sum(p.numel() for p in table.parameters())


@pytest.mark.parametrize(
    ("n_tokens", "width", "options", "golden"),
    [
        # peaks, chromosomes, genes and batches of EpiFoundation: paper, tutorial and test size
        (1_000_000, 512, {"n_special": 2}, 512_002_048),
        (25_734, 128, {"n_special": 2}, 3_294_464),
        (500, 32, {"n_special": 2}, 16_128),
        (24, 512, {"n_special": 2}, 14_336),
        (21, 128, {"n_special": 2}, 3_200),
        (24, 32, {"n_special": 2}, 896),
        (20_000, 512, {"n_special": 1}, 10_241_536),
        (1_677, 128, {"n_special": 1}, 215_040),
        (200, 32, {"n_special": 1}, 6_496),
        (13, 512, {"n_special": 0}, 7_680),
        (12, 128, {"n_special": 0}, 1_792),
        # genes and bins of Expresser
        (2_000, 64, {"n_special": 1, "norm": False}, 128_064),
        (50, 64, {"n_special": 1, "norm": False}, 3_264),
        # factorised: n x dim, dim x width, and the normalisation
        (25_734, 128, {"n_special": 2, "dim": 64}, 25_736 * 64 + 64 * 128 + 256),
    ],
)
def test_the_number_of_parameters_is_the_published_one(n_tokens, width, options, golden):
    with torch.device("meta"):
        assert count(TokenTable(n_tokens, width, **options)) == golden


@pytest.mark.parametrize("dim", [None, 3])
def test_vectors_are_normalised_rows_and_the_pad_is_zero_before_it(dim):
    table = TokenTable(6, 4, n_special=2, dim=dim)
    torch.nn.init.normal_(table.norm.bias)
    ids = torch.tensor([[0, 1, 7], [3, 0, 3]])
    row_nd = table.table.weight if dim is None else table.table.weight @ table.expand.weight.T
    found = table(ids)
    torch.testing.assert_close(found, layer_norm(row_nd[ids], [4], table.norm.weight, table.norm.bias))
    torch.testing.assert_close(found[0, 0], table.norm.bias)
    assert torch.equal(found[1, 1], found[0, 0])
    assert torch.equal(found[0, 0], table(torch.tensor(0)))
    found.square().sum().backward()
    assert table.table.weight.grad[[1, 3, 7]].ne(0).any(1).all()
    assert not table.table.weight.grad[[0, 2, 4, 5, 6]].any()


@pytest.mark.parametrize("dim", [None, 64])
def test_rows_are_drawn_with_the_published_scale(dim):
    torch.manual_seed(0)
    table = TokenTable(20_000, 32, n_special=1, dim=dim, norm=False)
    vector_nd = table(torch.arange(1, 20_001)).detach()
    assert vector_nd.mean().abs() < 1e-3
    assert vector_nd.std().item() == pytest.approx(0.02, rel=0.05)


def test_without_specials_row_0_is_a_token():
    table = TokenTable(3, 4, n_special=0)
    assert table.table.weight[0].any()
    (table(torch.tensor([0])) * torch.arange(4)).sum().backward()
    assert table.table.weight.grad[0].any()


@pytest.mark.parametrize("change", [{"n_tokens": 0}, {"width": 0}, {"n_special": -1}, {"dim": 0}])
def test_bad_sizes_of_a_token_table_are_refused(change):
    name, value = next(iter(change.items()))
    with pytest.raises(ConfigError, match=f"{name}={value}"):
        TokenTable(**({"n_tokens": 3, "width": 4, "n_special": 1} | change))


LENGTHS, SCALES = (2_500, 100, 1_000), (1_000, 500, 100)


@pytest.fixture(scope="module")
def places():
    torch.manual_seed(0)
    table = PositionTable(LENGTHS, 4, scales_bp=SCALES)
    torch.nn.init.normal_(table.table)
    torch.nn.init.normal_(table.unknown)
    return table


def explicit(table, chrom, position_bp):
    """Rows counted by hand: chromosome after chromosome, in each all scales."""
    if chrom < 0:
        total = table.unknown
    else:
        total, first = 0, 0
        for c, length in enumerate(LENGTHS):
            for scale in SCALES:
                if c == chrom:
                    total = total + table.table[first + min(max(position_bp, 0), length - 1) // scale]
                first += -(-length // scale)
    return layer_norm(total, [4], table.norm.weight, table.norm.bias)


@given(place=st.lists(st.tuples(st.integers(-2, 2), st.integers(-5, 4_000_000_000)), min_size=1, max_size=5))
def test_a_place_is_the_sum_of_its_bins(places, place):
    chrom, position = (torch.tensor(x) for x in zip(*place, strict=True))
    expected = torch.stack([explicit(places, c, p) for c, p in place])
    torch.testing.assert_close(places(chrom, position), expected)


def test_equal_bins_share_a_vector_others_do_not_and_ends_are_clipped(places):
    def vector(chrom, position):
        return places(torch.tensor([[chrom]]), torch.tensor([[position]]))[0, 0]

    assert torch.equal(vector(0, 100), vector(0, 199))
    assert not torch.allclose(vector(0, 99), vector(0, 100))
    assert not torch.allclose(vector(0, 50), vector(1, 50))
    assert torch.equal(vector(0, 2_499), vector(0, 10**9))
    assert torch.equal(vector(2, 0), vector(2, -3))
    assert torch.equal(vector(-1, 5), vector(-1, 10**9))
    assert not torch.allclose(vector(-1, 5), vector(0, 5))


def test_only_the_rows_of_a_place_learn(places):
    places.zero_grad()
    (places(torch.tensor([0, -1]), torch.tensor([2_499, 7])) * torch.arange(4)).sum().backward()
    # chromosome 0 has 3 + 5 + 25 bins; the last of each size
    assert places.table.grad.any(1).nonzero().flatten().tolist() == [2, 7, 32]
    assert places.unknown.grad.any()
    places.zero_grad()
    places(torch.tensor([0]), torch.tensor([0])).sum().backward()
    assert not places.unknown.grad.any()


def test_the_table_has_a_row_for_each_bin_and_no_state_but_what_is_learnt():
    table = PositionTable([248_956_422, 57_227_415], 8)
    n_rows = (25 + 249 + 2_490) + (6 + 58 + 573)
    assert table.table.shape == (n_rows, 8)
    assert count(table) == (n_rows + 1) * 8 + 16
    assert set(table.state_dict()) == {"table", "unknown", "norm.weight", "norm.bias"}
    assert table.table.std().item() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize(
    ("lengths_bp", "width", "scales_bp", "message"),
    [
        ([], 4, [10], "found 0 chromosomes"),
        ([10, 0], 4, [10], r"2 chromosomes \(shortest 0 bp\)"),
        ([10], 4, [], r"scales_bp=\[\]"),
        ([10], 4, [10, 0], r"scales_bp=\[10, 0\]"),
        ([10], 0, [10], "width=0"),
    ],
)
def test_bad_sizes_of_a_position_table_are_refused(lengths_bp, width, scales_bp, message):
    with pytest.raises(ConfigError, match=message):
        PositionTable(lengths_bp, width, scales_bp=scales_bp)
