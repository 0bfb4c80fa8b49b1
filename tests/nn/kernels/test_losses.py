from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import binary_cross_entropy_with_logits

from epivi.nn.kernels import (
    bernoulli_loss,
    has_half_precision,
    layer_outputs,
    list_by_peak,
    multinomial_loss,
    sparse_product,
)
from epivi.nn.linear import PeakBlocks


def leaves(*tensors, dtype):
    return [tensor.detach().to(dtype).requires_grad_() for tensor in tensors]


def dense_logits(blocks, hidden, weight, bias):
    if hidden.ndim == 2:
        return hidden @ weight.t() + bias
    parts = [hidden[:, j] @ w.t() for j, w in enumerate(weight.split(blocks.sizes))]
    return torch.cat(parts, 1) + bias


def relative(found, expected):
    return ((found.detach().double() - expected).abs().max() / expected.abs().max()).item()


def bernoulli_reference(blocks, dense, layer, weight, closed, shift):
    logits = dense_logits(blocks, *layer) - shift
    x_bp = (dense > 0).double()
    entry = torch.where(x_bp > 0, weight, closed).double()
    return binary_cross_entropy_with_logits(logits, x_bp, weight=entry, reduction="none").sum(1)


def multinomial_reference(blocks, dense, layer):
    logits = dense_logits(blocks, *layer)
    return dense.sum(1) * logits.logsumexp(1) - (dense * logits).sum(1)


def both(kind, blocks, lists, dense, layer, **options):
    """Loss of the compiled and of the dense form."""
    single, double = leaves(*layer, dtype=torch.float32), leaves(*layer, dtype=torch.float64)
    if kind == "bernoulli":
        weights = {"weight": 7.5, "closed_weight": 0.5, "shift": 0.25}
        found = bernoulli_loss(*single, lists, **weights, **options)
        return found, bernoulli_reference(blocks, dense, double, 7.5, 0.5, 0.25), single, double
    found = multinomial_loss(*single, lists, **options)
    return found, multinomial_reference(blocks, dense, double), single, double


@pytest.mark.parametrize("kind", ["bernoulli", "multinomial"])
@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize(("n_cells", "n_hidden"), [(9, 3), (64, 20), (70, 64), (5, 130)])
def test_losses_and_gradients_equal_the_dense_computation(case, kind, diagonal, n_cells, n_hidden):
    blocks, rows, counts, dense, layer = case(n_cells=n_cells, n_hidden=n_hidden, diagonal=diagonal)
    lists = list_by_peak(blocks, *rows, None, counts)
    found, expected, single, double = both(kind, blocks, lists, dense, layer)
    torch.testing.assert_close(found.double(), expected, rtol=2e-6, atol=1e-4)
    upstream = torch.rand(n_cells) + 0.1  # another one for each cell: computed again
    got = torch.autograd.grad(found, single, upstream)
    right = torch.autograd.grad(expected, double, upstream.double())
    for a, b in zip(got, right, strict=True):
        assert relative(a, b) < 3e-6


@pytest.mark.parametrize("kind", ["bernoulli", "multinomial"])
@pytest.mark.parametrize("expected_gradient", [1.0, 0.3])
def test_expected_gradients_are_those_of_any_gradient(case, kind, expected_gradient):
    blocks, rows, counts, dense, layer = case()
    lists = list_by_peak(blocks, *rows, None, counts)
    found, expected, single, double = both(kind, blocks, lists, dense, layer, expected=expected_gradient)
    right = torch.autograd.grad(0.3 * expected.sum(), double)
    for again in (False, True):  # the second time nothing is kept
        got = torch.autograd.grad(0.3 * found.sum(), single, retain_graph=not again)
        for a, b in zip(got, right, strict=True):
            assert relative(a, b) < 3e-6


@pytest.mark.skipif(not has_half_precision(), reason="the processor does not multiply bfloat16")
@pytest.mark.parametrize("kind", ["bernoulli", "multinomial"])
@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize(("n_cells", "n_hidden"), [(9, 3), (70, 64), (5, 131)])
def test_bfloat16_stays_within_its_rounding(case, kind, diagonal, n_cells, n_hidden):
    blocks, rows, counts, dense, layer = case(n_cells=n_cells, n_hidden=n_hidden, diagonal=diagonal)
    lists = list_by_peak(blocks, *rows, None, counts)
    found, expected, single, double = both(kind, blocks, lists, dense, layer, half=True)
    torch.testing.assert_close(found.double(), expected, rtol=2e-3, atol=1e-2)
    got, right = torch.autograd.grad(found.sum(), single), torch.autograd.grad(expected.sum(), double)
    for a, b in zip(got, right, strict=True):
        assert relative(a, b) < 1.5e-2


@pytest.mark.skipif(not has_half_precision(), reason="the processor does not multiply bfloat16")
def test_numbers_that_bfloat16_holds_are_multiplied_exactly(case):
    blocks, rows, _, dense, (hidden, weight, bias) = case(n_hidden=33)
    layer = [x.bfloat16().float() for x in (hidden, weight)] + [bias]
    lists = list_by_peak(blocks, *rows)
    expected = bernoulli_reference(blocks, dense, [x.double() for x in layer], 1.0, 1.0, 0.0)
    torch.testing.assert_close(bernoulli_loss(*layer, lists, half=True).double(), expected, rtol=2e-6, atol=1e-5)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10_000), st.integers(1, 9), st.integers(4, 30), st.integers(1, 40), st.booleans())
def test_any_shape_equals_the_dense_computation(case, seed, n_cells, n_peaks, n_hidden, diagonal):
    rng = np.random.default_rng(seed)
    block_of_peak = np.unique(rng.integers(0, 4, n_peaks), return_inverse=True)[1]
    blocks, rows, counts, dense, layer = case(
        block_of_peak, n_cells=n_cells, n_hidden=n_hidden, diagonal=diagonal, seed=seed
    )
    lists = list_by_peak(blocks, *rows, None, counts)
    for kind in ("bernoulli", "multinomial"):
        found, expected, *_ = both(kind, blocks, lists, dense, layer)
        torch.testing.assert_close(found.double(), expected, rtol=3e-6, atol=3e-5)


@pytest.mark.parametrize("size", [30.0, 100.0, 1e4, 1e8])
def test_extreme_logits_cost_what_they_should(size):
    lists = list_by_peak(PeakBlocks.tiles(4), torch.tensor([0, 2]), torch.tensor([0, 1]))
    bias = torch.tensor([size, -size, size, -size], requires_grad=True)
    loss_b = bernoulli_loss(torch.zeros(1, 2), torch.zeros(4, 2), bias, lists, weight=20.0)
    assert loss_b.item() == pytest.approx(21 * size, rel=1e-5)
    loss_b.sum().backward()
    torch.testing.assert_close(bias.grad, torch.tensor([0.0, -20.0, 1.0, 0.0]), atol=1e-10, rtol=1e-6)


@pytest.mark.parametrize("kind", ["bernoulli", "multinomial"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_logit_that_is_not_finite_shows_in_the_loss_of_its_cell_alone(case, kind, bad):
    blocks, rows, counts, dense, (hidden, weight, bias) = case(n_hidden=4)
    lists = list_by_peak(blocks, *rows, None, counts)
    hidden[2, 1, 0] = bad
    found, *_ = both(kind, blocks, lists, dense, (hidden, weight, bias))
    assert (torch.isfinite(found) == (torch.arange(9) != 2)).all()


def test_losses_far_from_zero_are_summed_without_loss():
    # the sum of 2e6 equal terms is exact in double and would drift in single precision
    n = 200_000
    lists = list_by_peak(PeakBlocks.tiles(n), torch.zeros(2, dtype=torch.long), torch.zeros(0, dtype=torch.long))
    loss_b = bernoulli_loss(torch.zeros(1, 1), torch.zeros(n, 1), torch.full((n,), 0.1), lists)
    assert loss_b.item() == pytest.approx(n * np.logaddexp(0, np.float64(np.float32(0.1))), rel=3e-7)


def test_only_what_needs_a_gradient_gets_one(case):
    blocks, rows, _, _, (hidden, weight, bias) = case()
    loss_b = bernoulli_loss(hidden.requires_grad_(), weight, bias, list_by_peak(blocks, *rows))
    loss_b.sum().backward()
    assert hidden.grad is not None
    assert weight.grad is None
    with torch.no_grad():
        assert not bernoulli_loss(hidden, weight, bias, list_by_peak(blocks, *rows)).requires_grad


def test_no_cells_give_no_losses():
    lists = list_by_peak(PeakBlocks.tiles(4), torch.zeros(1, dtype=torch.long), torch.zeros(0, dtype=torch.long))
    weight = torch.ones(4, 2, requires_grad=True)
    assert sparse_product(weight, lists, diagonal=True).shape == (0, 1, 2)
    assert bernoulli_loss(torch.zeros(0, 2), weight, torch.zeros(4), lists).shape == (0,)


@pytest.mark.parametrize("kind", ["bernoulli", "multinomial"])
def test_the_number_of_threads_changes_nothing(case, kind):
    blocks, rows, counts, dense, layer = case(diagonal=False, n_hidden=100)
    lists = list_by_peak(blocks, *rows, None, counts)
    results = []
    before = torch.get_num_threads()
    try:
        for n_threads in (1, 3):
            torch.set_num_threads(n_threads)
            found, _, single, _ = both(kind, blocks, lists, dense, layer)
            product = sparse_product(single[1], lists, diagonal=False)
            results.append([found, product, *torch.autograd.grad(found.sum() + product.sum(), single)])
    finally:
        torch.set_num_threads(before)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ["bernoulli", "multinomial"])
def test_inputs_are_left_as_they_are(case, kind):
    blocks, rows, counts, dense, layer = case()
    lists = list_by_peak(blocks, *rows, None, counts)
    before = [x.clone() for x in layer]
    found, _, single, _ = both(kind, blocks, lists, dense, layer, half=has_half_precision())
    found.sum().backward()
    for a, b, c in zip(before, layer, single, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize(("n_cells", "n_hidden"), [(1, 3), (70, 64)])
def test_outputs_of_a_layer_are_its_logits_or_probabilities(case, diagonal, n_cells, n_hidden):
    blocks, _, _, _, layer = case(n_cells=n_cells, n_hidden=n_hidden, diagonal=diagonal)
    logits = dense_logits(blocks, *(x.double() for x in layer))
    torch.testing.assert_close(layer_outputs(*layer, blocks).double(), logits, rtol=1e-5, atol=1e-5)
    found = layer_outputs(*layer, blocks, shift=1.5)
    torch.testing.assert_close(found.double(), torch.sigmoid(logits - 1.5), rtol=1e-5, atol=1e-7)
