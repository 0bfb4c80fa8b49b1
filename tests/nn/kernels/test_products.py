from __future__ import annotations

import numpy as np
import pytest
import torch

from epivi._errors import DataError
from epivi.nn.kernels import GradientBuffer, count_totals, list_by_peak, sparse_product
from epivi.nn.linear import PeakBlocks

MIXED = np.array([2, 0, 1, 1, 2, 0, 3, 1, 2, 1, 0])


def leaves(*tensors, dtype):
    return [tensor.detach().to(dtype).requires_grad_() for tensor in tensors]


def relative(found, expected):
    return ((found.detach().double() - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("block_of_peak", [MIXED, np.sort(MIXED)], ids=["mixed", "sorted"])
def test_lists_hold_the_entries_of_each_peak_in_order_of_the_cells(case, block_of_peak):
    blocks, rows, counts, dense, _ = case(block_of_peak)
    values = counts * 0.5
    lists = list_by_peak(blocks, *rows, values, counts)
    found = torch.zeros_like(dense)
    for p in range(blocks.n_peaks):
        cells = lists.cells[lists.starts[p] : lists.starts[p + 1]]
        assert (np.diff(cells) > 0).all()
        found[cells, p] = torch.from_numpy(lists.counts[lists.starts[p] : lists.starts[p + 1]]).double()
    assert torch.equal(found, dense)
    np.testing.assert_array_equal(lists.values, lists.counts * 0.5)
    assert list_by_peak(blocks, *rows).values.size == list_by_peak(blocks, *rows).counts.size == 0


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("n_hidden", [1, 5, 16, 40, 64, 100])
def test_sparse_product_equals_the_dense_one_in_value_and_gradient(case, diagonal, weighted, n_hidden):
    blocks, rows, counts, dense, (_, weight, _) = case(n_hidden=n_hidden)
    lists = list_by_peak(blocks, *rows, counts if weighted else None)
    x_bp = dense if weighted else (dense > 0).double()
    (single,), (double,) = leaves(weight, dtype=torch.float32), leaves(weight, dtype=torch.float64)
    out = sparse_product(single, lists, diagonal=diagonal)
    parts = [x @ w for x, w in zip(x_bp.split(blocks.sizes, 1), double.split(blocks.sizes), strict=True)]
    expected = torch.stack(parts, 1) if diagonal else sum(parts)
    assert out.shape == expected.shape
    assert relative(out, expected.detach()) < 1e-6
    upstream = torch.randn_like(expected)
    (got,) = torch.autograd.grad(out, single, upstream.float())
    (right,) = torch.autograd.grad(expected, double, upstream)
    assert relative(got, right) < 1e-6


def test_totals_of_counts(case):
    blocks, rows, counts, dense, _ = case()
    total_b, factorials_b = count_totals(list_by_peak(blocks, *rows, None, counts))
    torch.testing.assert_close(total_b, dense.sum(1))
    torch.testing.assert_close(factorials_b, torch.lgamma(dense + 1).sum(1))


def test_memory_of_a_gradient_is_used_again_once_it_is_free():
    buffer = GradientBuffer()
    first = buffer.take((3, 4))
    place, view = first.data_ptr(), first[1:]
    del first
    assert buffer.take((3, 4)).data_ptr() != place  # a view is left
    place = buffer.take((3, 4)).data_ptr()
    assert buffer.take((3, 4)).data_ptr() == place
    assert buffer.take((4, 3)).shape == (4, 3)
    buffer.release()
    assert not buffer.arrays
    assert view.shape == (2, 4)


def test_memory_of_gradients_is_shared_by_those_of_one_shape_and_bounded():
    buffer = GradientBuffer()
    kept = [buffer.take((3, 4)) for _ in range(2)]
    assert kept[0].data_ptr() != kept[1].data_ptr()
    places = {tensor.data_ptr() for tensor in kept}
    del kept
    again = [buffer.take((3, 4)) for _ in range(2)]
    assert {tensor.data_ptr() for tensor in again} == places
    many = [buffer.take((3, 4)) for _ in range(9)]
    assert len({tensor.data_ptr() for tensor in (*again, *many)}) == 11
    assert len(buffer.arrays) == 4


def test_gradients_that_are_kept_are_not_written_over(case):
    blocks, rows, _, _, (_, weight, _) = case()
    lists, buffer = list_by_peak(blocks, *rows), GradientBuffer()
    weight = torch.nn.Parameter(weight)
    sparse_product(weight, lists, diagonal=True, buffer=buffer).sum().backward()
    once = weight.grad.clone()
    sparse_product(weight, lists, diagonal=True, buffer=buffer).sum().backward()
    assert torch.equal(weight.grad, 2 * once)  # accumulated
    kept, weight.grad = weight.grad, None
    sparse_product(weight, lists, diagonal=True, buffer=buffer).sum().backward()
    assert torch.equal(weight.grad, once)
    assert torch.equal(kept, 2 * once)


@pytest.mark.parametrize("bad", [-1, 3])
def test_peaks_that_no_layer_knows_are_refused(bad):
    with pytest.raises(DataError, match=rf"The batch holds peaks {min(bad, 1)} to {max(bad, 1)}, and the layers know"):
        list_by_peak(PeakBlocks.tiles(3), torch.tensor([0, 2]), torch.tensor([1, bad]))


def test_logs_of_factorials_of_any_count():
    counts = torch.tensor([1.0, 2.0, 2.5, 255.0, 256.0, 1000.0])
    rows = torch.tensor([0, 6]), torch.arange(6), None, counts
    total_b, factorials_b = count_totals(list_by_peak(PeakBlocks.tiles(6), *rows))
    assert total_b.item() == counts.double().sum().item()
    assert factorials_b.item() == pytest.approx(torch.lgamma(counts.double() + 1).sum().item(), rel=1e-12)
