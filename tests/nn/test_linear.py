from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from epivi.nn.linear import BlockLogits, PeakBlocks, SparseLinear

# blocks in mixed order, of unequal size
BLOCKS = np.array([2, 0, 1, 1, 2, 0, 3, 1, 2, 1, 0])


def random_batch(seed=0, n_cells=6, n_peaks=BLOCKS.size, *, weighted=False, empty=((0,), (6,))):
    """A dense double matrix with empty rows and columns, and the same as compressed rows."""
    rng = np.random.default_rng(seed)
    x_bp = (rng.random((n_cells, n_peaks)) < 0.4) * (rng.uniform(0.5, 3.0, (n_cells, n_peaks)) if weighted else 1.0)
    x_bp[list(empty[0])] = 0.0
    x_bp[:, list(empty[1])] = 0.0
    return torch.from_numpy(x_bp), *compress(x_bp, weighted=weighted)


def compress(x_bp, *, weighted):
    x_bp = np.asarray(x_bp)
    indptr = torch.from_numpy(np.concatenate([[0], np.cumsum((x_bp != 0).sum(1))]))
    rows, columns = np.nonzero(x_bp)
    return indptr, torch.from_numpy(columns), torch.from_numpy(x_bp[rows, columns]) if weighted else None


def dense_product(layer, x_bp, block_of_peak):
    """The same layer with dense matrices in the user's order."""
    weight_ph = layer.weight[layer.blocks.rank]
    if not layer.diagonal:
        return x_bp @ weight_ph + layer.bias
    parts = [x_bp[:, block_of_peak == j] @ weight_ph[block_of_peak == j] for j in range(block_of_peak.max() + 1)]
    return torch.stack(parts, dim=1) + layer.bias


def dense_logits(layer, hidden, block_of_peak):
    weight_ph, bias_p = layer.weight[layer.blocks.rank], layer.bias[layer.blocks.rank]
    if not layer.diagonal:
        return hidden @ weight_ph.t() + bias_p
    per_peak_bph = hidden[:, torch.from_numpy(block_of_peak)]
    return (per_peak_bph * weight_ph).sum(-1) + bias_p


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=30))
def test_block_order_groups_peaks_and_keeps_their_order_within_a_block(numbers):
    block_of_peak = np.unique(numbers, return_inverse=True)[1]
    blocks = PeakBlocks(block_of_peak)
    order = np.argsort(blocks.rank.numpy())  # user's peak at each position
    assert sorted(order.tolist()) == list(range(block_of_peak.size))
    assert sorted(zip(block_of_peak, range(block_of_peak.size), strict=True)) == [
        (block_of_peak[i], i) for i in order.tolist()
    ]
    assert blocks.sizes == tuple(np.bincount(block_of_peak))
    assert blocks.starts == (0, *np.cumsum(blocks.sizes))
    assert blocks.n_peaks == block_of_peak.size
    assert blocks.is_ordered == bool((np.diff(block_of_peak) >= 0).all())


def test_tiles_keep_the_users_order():
    blocks = PeakBlocks.tiles(10, width=4)
    assert blocks.sizes == (4, 4, 2)
    assert blocks.is_ordered
    assert blocks.rank.tolist() == list(range(10))
    assert PeakBlocks.tiles(3).sizes == (3,)


@pytest.mark.parametrize("weighted", [False, True])
def test_blocks_of_a_batch_put_together_are_the_batch(weighted):
    x_bp, indptr, indices, values = random_batch(weighted=weighted)
    batch = PeakBlocks(BLOCKS).split(indptr, indices, values)
    dense = torch.cat([batch.dense(j, torch.float64) for j in range(4)], dim=1)[:, batch.blocks.rank]
    torch.testing.assert_close(dense, x_bp, rtol=0, atol=0)
    for j in range(4):
        flat = torch.zeros(6, batch.blocks.sizes[j])
        flat.view(-1)[batch.flat(j)] = 1.0
        torch.testing.assert_close(flat, (x_bp[:, np.equal(BLOCKS, j)] != 0).float())


@pytest.mark.parametrize("n_blocks", [256, 257, 33_000])
def test_many_blocks_do_not_overflow_their_numbers(n_blocks):
    rng = np.random.default_rng(1)
    block_of_peak = rng.permutation(n_blocks)
    indices = torch.from_numpy(rng.choice(n_blocks, 50, replace=False))
    batch = PeakBlocks(block_of_peak).split(torch.tensor([0, 20, 20, 50]), indices)
    found = {
        (int(r), int(c))
        for rows, cols in zip(batch.rows, batch.columns, strict=True)
        for r, c in zip(rows, cols, strict=True)
    }
    # every block holds one peak, so that the block-order column is the number of the block
    expected = {(0 if i < 20 else 2, int(block_of_peak[peak])) for i, peak in enumerate(indices.tolist())}
    assert found == expected
    filled = [j for j, rows in enumerate(batch.rows) if rows.numel()]
    assert filled == sorted(block_of_peak[indices.numpy()].tolist())


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    "block_of_peak", [BLOCKS, np.sort(BLOCKS), np.zeros_like(BLOCKS)], ids=["mixed", "sorted", "one"]
)
def test_sparse_product_equals_dense_product_in_value_and_gradient(diagonal, weighted, block_of_peak):
    torch.manual_seed(0)
    x_bp, indptr, indices, values = random_batch(weighted=weighted)
    layer = SparseLinear(PeakBlocks(block_of_peak), 3, diagonal=diagonal).double()
    with torch.no_grad():
        layer.bias.normal_()
    out = layer(layer.blocks.split(indptr, indices, values))
    expected = dense_product(layer, x_bp, block_of_peak)
    torch.testing.assert_close(out, expected)
    upstream = torch.randn_like(out)
    got = torch.autograd.grad(out, [layer.weight, layer.bias], upstream)
    torch.testing.assert_close(got, torch.autograd.grad(expected, [layer.weight, layer.bias], upstream))


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_sparse_product_passes_gradcheck(diagonal, weighted):
    _, indptr, indices, values = random_batch(weighted=weighted)
    layer = SparseLinear(PeakBlocks(BLOCKS), 2, diagonal=diagonal).double()
    batch = layer.blocks.split(indptr, indices, values)

    def product(weight, bias):
        return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (batch,))

    assert torch.autograd.gradcheck(product, (layer.weight, layer.bias))


@pytest.mark.parametrize("diagonal", [False, True])
def test_cells_and_blocks_without_open_peaks_give_the_bias(diagonal):
    layer = SparseLinear(PeakBlocks(BLOCKS), 3, diagonal=diagonal).double()
    nothing = layer.blocks.split(torch.zeros(4, dtype=torch.long), torch.zeros(0, dtype=torch.long))
    out = layer(nothing)
    torch.testing.assert_close(out, layer.bias.expand_as(out), rtol=0, atol=0)
    out.sum().backward()
    assert not layer.weight.grad.any()
    # block 3 is the single peak 6, open in no cell of this batch; cell 0 is empty
    _, indptr, indices, _ = random_batch()
    out = layer(layer.blocks.split(indptr, indices))
    torch.testing.assert_close(out[0], layer.bias, rtol=0, atol=0)
    if diagonal:
        torch.testing.assert_close(out[:, 3], layer.bias[3].expand(6, 3), rtol=0, atol=0)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(1, 12), st.booleans())
def test_sparse_product_equals_dense_product_for_random_shapes(seed, n_cells, n_peaks, diagonal):
    rng = np.random.default_rng(seed)
    block_of_peak = np.unique(rng.integers(0, 4, n_peaks), return_inverse=True)[1]
    x_bp, indptr, indices, values = random_batch(seed, n_cells, n_peaks, weighted=True, empty=((), ()))
    layer = SparseLinear(PeakBlocks(block_of_peak), 2, diagonal=diagonal).double()
    out = layer(layer.blocks.split(indptr, indices, values))
    torch.testing.assert_close(out, dense_product(layer, x_bp, block_of_peak))


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("block_of_peak", [BLOCKS, np.sort(BLOCKS)], ids=["mixed", "sorted"])
def test_logits_equal_dense_logits_in_value_and_gradient(diagonal, block_of_peak):
    torch.manual_seed(1)
    layer = BlockLogits(PeakBlocks(block_of_peak), 3, diagonal=diagonal).double()
    with torch.no_grad():
        layer.bias.normal_()
    hidden = torch.randn(*((5, 4, 3) if diagonal else (5, 3)), dtype=torch.float64, requires_grad=True)
    parts = list(layer(hidden))
    assert [part.shape for part in parts] == [(5, size) for size in layer.blocks.sizes]
    logits_bp = torch.cat(parts, dim=1)[:, layer.blocks.rank]
    expected = dense_logits(layer, hidden, block_of_peak)
    torch.testing.assert_close(logits_bp, expected)
    leaves, upstream = [hidden, layer.weight, layer.bias], torch.randn_like(expected)
    got = torch.autograd.grad(logits_bp, leaves, upstream)
    torch.testing.assert_close(got, torch.autograd.grad(expected, leaves, upstream))


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("peaks", [[], [6], [10, 0, 3], [4, 4, 1], list(range(BLOCKS.size))])
def test_chosen_columns_are_those_of_all_logits_in_the_users_order(diagonal, peaks):
    layer = BlockLogits(PeakBlocks(BLOCKS), 3, diagonal=diagonal).double()
    with torch.no_grad():
        layer.bias.normal_()
    hidden = torch.randn(*((5, 4, 3) if diagonal else (5, 3)), dtype=torch.float64)
    all_bp = torch.cat(list(layer(hidden)), dim=1)[:, layer.blocks.rank]
    peaks = torch.tensor(peaks, dtype=torch.long)
    torch.testing.assert_close(layer.columns(hidden, peaks), all_bp[:, peaks])


@pytest.mark.parametrize("kind", [SparseLinear, BlockLogits])
def test_block_diagonal_weights_are_xavier_uniform_within_each_block(kind):
    torch.manual_seed(0)
    sizes = (400, 50)
    layer = kind(PeakBlocks(np.repeat([0, 1], sizes)), 64, diagonal=True)
    assert not layer.bias.any()
    for part_ph, size in zip(layer.weight.split(sizes), sizes, strict=True):
        bound = math.sqrt(6 / (size + 64))
        assert 0.99 * bound < part_ph.abs().max().item() <= bound
        assert part_ph.var().item() == pytest.approx(bound**2 / 3, rel=0.05)


@pytest.mark.parametrize(("kind", "fan_in"), [(SparseLinear, 450), (BlockLogits, 64)])
def test_other_weights_are_drawn_as_in_a_linear_layer(kind, fan_in):
    torch.manual_seed(0)
    layer = kind(PeakBlocks.tiles(450, width=100), 64, diagonal=False)
    bound = 1 / math.sqrt(fan_in)
    for drawn in (layer.weight, layer.bias):
        assert 0.9 * bound < drawn.abs().max().item() <= bound


def test_blocks_are_no_part_of_the_saved_state():
    layer = SparseLinear(PeakBlocks(BLOCKS), 2, diagonal=True)
    assert set(layer.state_dict()) == {"weight", "bias"}


@pytest.mark.gpu
@pytest.mark.parametrize("diagonal", [False, True])
def test_gpu_agrees_with_cpu(diagonal):
    x_bp, indptr, indices, _ = random_batch(n_cells=50)
    layer = SparseLinear(PeakBlocks(BLOCKS), 3, diagonal=diagonal).double()
    on_cpu = layer(layer.blocks.split(indptr, indices))
    layer = layer.to("cuda")
    on_gpu = layer(layer.blocks.split(indptr.to("cuda"), indices.to("cuda")))
    torch.testing.assert_close(on_gpu.cpu(), on_cpu)
    on_gpu.square().sum().backward()
    expected = torch.autograd.grad(dense_product(layer, x_bp.to("cuda"), BLOCKS).square().sum(), layer.weight)[0]
    torch.testing.assert_close(layer.weight.grad, expected)
