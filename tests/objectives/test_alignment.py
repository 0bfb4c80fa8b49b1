from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from epivi.objectives.alignment import alignment_loss, alignment_share, unit_rows

# b, d, r: the first two take the form without a b x b matrix (b > 4 max(d, r)), the others the b x b form
SHAPES = [(41, 3, 5), (64, 6, 2), (10, 3, 5), (20, 2, 5)]


def case(n_cells, n_latent, n_reference, seed=0):
    """Means, a reference of which some rows are padding, weights of which some are zero, number of referenced cells."""
    generator = torch.Generator().manual_seed(seed)
    mean_bd = torch.randn(n_cells, n_latent, generator=generator, dtype=torch.float64).requires_grad_()
    reference_br = torch.randn(n_cells, n_reference, generator=generator, dtype=torch.float64)
    has_reference_b = torch.rand(n_cells, generator=generator) < 0.7
    has_reference_b[:3] = True
    reference_br[~has_reference_b] = 0.0
    weight_b = torch.rand(n_cells, generator=generator, dtype=torch.float64) * has_reference_b
    weight_b[1] = 0.0  # a referenced cell of weight zero counts in the denominator
    return mean_bd, reference_br, weight_b, has_reference_b.sum()


def by_definition(mean_bd, reference_br, weight_b, n_referenced):
    """Equation by equation, with torch's own cosine similarity."""
    similarity = torch.nn.functional.cosine_similarity
    g_bb = similarity(reference_br.unsqueeze(1), reference_br.unsqueeze(0), dim=2)
    p_bb = similarity(mean_bd.unsqueeze(1), mean_bd.unsqueeze(0), dim=2)
    return (torch.outer(weight_b, weight_b) * (g_bb - p_bb).square()).sum() / n_referenced**2


def rotation(n, seed=0):
    return torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))[0]


@pytest.mark.parametrize("shape", SHAPES)
def test_loss_and_gradient_equal_the_definition(shape):
    mean_bd, *others = case(*shape)
    loss, expected = alignment_loss(mean_bd, *others), by_definition(mean_bd, *others)
    assert loss.item() > 1e-3
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=0)
    got = torch.autograd.grad(loss, mean_bd)
    torch.testing.assert_close(got, torch.autograd.grad(expected, mean_bd), rtol=1e-8, atol=1e-12)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000), st.integers(3, 40), st.integers(1, 4), st.integers(1, 4))
def test_loss_equals_the_definition_for_random_shapes(seed, n_cells, n_latent, n_reference):
    inputs = case(n_cells, n_latent, n_reference, seed)
    torch.testing.assert_close(alignment_loss(*inputs), by_definition(*inputs), rtol=1e-9, atol=1e-13)


def test_both_forms_agree_in_single_precision():
    mean_bd, reference_br, weight_b, n = case(500, 8, 10)
    double = alignment_loss(mean_bd, reference_br, weight_b, n)
    single = alignment_loss(mean_bd.float(), reference_br.float(), weight_b.float(), n)
    assert single.dtype == torch.float32
    assert single.item() == pytest.approx(double.item(), rel=1e-5)
    share_b = alignment_share(mean_bd.float(), reference_br.float(), weight_b.float(), n)  # always b x b
    assert share_b.sum().item() == pytest.approx(double.item(), rel=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_gradcheck(shape):
    mean_bd, *others = case(*shape)
    assert torch.autograd.gradcheck(lambda x: alignment_loss(x, *others), mean_bd)


@pytest.mark.parametrize("n_cells", [6, 50])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_loss_and_gradient_vanish_where_the_means_are_the_reference(n_cells, dtype):
    _, reference_br, weight_b, n = (x.to(dtype) if x.is_floating_point() else x for x in case(n_cells, 4, 4))
    mean_bd = (2.0 * reference_br @ rotation(4).to(dtype)).requires_grad_()
    loss = alignment_loss(mean_bd, reference_br, weight_b, n)
    assert loss.item() == pytest.approx(0.0, abs=1e-12 if dtype == torch.float32 else 1e-15)
    assert torch.autograd.grad(loss, mean_bd)[0].abs().max().item() < 1e-6
    same = alignment_loss(reference_br.clone(), reference_br, weight_b, n)
    assert same.item() == pytest.approx(0.0, abs=1e-16)


@pytest.mark.parametrize("shape", SHAPES)
def test_rotation_and_positive_scaling_change_nothing(shape):
    mean_bd, reference_br, weight_b, n = case(*shape)
    expected = alignment_loss(mean_bd, reference_br, weight_b, n)
    scale_b1 = torch.linspace(0.1, 9.0, shape[0], dtype=torch.float64).unsqueeze(1)  # each row may have its own
    for means, reference in (
        (mean_bd @ rotation(shape[1]), reference_br),
        (mean_bd, reference_br @ rotation(shape[2])),
        (mean_bd * scale_b1, reference_br),
        (mean_bd, reference_br * scale_b1),
    ):
        torch.testing.assert_close(alignment_loss(means, reference, weight_b, n), expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("n_cells", [6, 50])
def test_permuting_cells_changes_nothing_and_permutes_shares(n_cells):
    mean_bd, reference_br, weight_b, n = case(n_cells, 3, 4)
    order = torch.randperm(n_cells)
    permuted = (mean_bd[order], reference_br[order], weight_b[order], n)
    torch.testing.assert_close(alignment_loss(*permuted), alignment_loss(mean_bd, reference_br, weight_b, n))
    torch.testing.assert_close(alignment_share(*permuted), alignment_share(mean_bd, reference_br, weight_b, n)[order])


@pytest.mark.parametrize("n_cells", [6, 50])
def test_cells_without_reference_add_nothing(n_cells):
    mean_bd, reference_br, weight_b, n = case(n_cells, 3, 4)
    expected = alignment_loss(mean_bd, reference_br, weight_b, n)
    has_weight_b = weight_b > 0
    changed = torch.where(has_weight_b.unsqueeze(1), reference_br, 1e3)
    torch.testing.assert_close(alignment_loss(mean_bd, changed, weight_b, n), expected)
    alone = (mean_bd[has_weight_b], reference_br[has_weight_b], weight_b[has_weight_b], n)
    torch.testing.assert_close(alignment_loss(*alone), expected)
    assert not torch.autograd.grad(expected, mean_bd)[0][~has_weight_b].any()


@pytest.mark.parametrize("n_cells", [6, 50])
@pytest.mark.parametrize("n_referenced", [0, 1])
def test_fewer_than_two_referenced_cells_give_exactly_zero(n_cells, n_referenced):
    mean_bd, reference_br, weight_b, _ = case(n_cells, 3, 4)
    weight_b = torch.zeros_like(weight_b)
    weight_b[:n_referenced] = 1.0
    loss = alignment_loss(mean_bd, reference_br, weight_b, torch.tensor(n_referenced))
    assert loss.item() == 0.0
    assert not torch.autograd.grad(loss, mean_bd)[0].any()
    assert not alignment_share(mean_bd, reference_br, weight_b, torch.tensor(n_referenced)).any()


@pytest.mark.parametrize("n_cells", [6, 50])
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-8])
def test_means_near_zero_have_finite_gradients(n_cells, size):
    mean_bd, reference_br, weight_b, n = case(n_cells, 3, 4)
    weight_b = weight_b.detach() + 0.1
    mean_bd = mean_bd.detach().float()
    mean_bd[::2] *= size
    mean_bd.requires_grad_()
    loss = alignment_loss(mean_bd, reference_br.float(), weight_b.float(), n)
    gradient = torch.autograd.grad(loss, mean_bd)[0]
    assert torch.isfinite(loss)
    assert torch.isfinite(gradient).all()
    # a row shorter than eps is divided by eps = 1e-4: its gradient is at most that of a unit row times 1e4
    assert gradient.abs().max().item() < 1e4


def test_gradients_flow_through_the_means_only():
    mean_bd, reference_br, weight_b, n = case(6, 3, 4)
    reference_br.requires_grad_()
    loss = alignment_loss(mean_bd, reference_br, weight_b, n)
    assert torch.autograd.grad(loss, reference_br, allow_unused=True) == (None,)


@pytest.mark.parametrize("shape", SHAPES)
def test_shares_add_up_to_the_loss_and_are_not_negative(shape):
    inputs = case(*shape)
    share_b = alignment_share(*inputs)
    assert share_b.shape == (shape[0],)
    assert (share_b >= 0).all()
    torch.testing.assert_close(share_b.sum(), alignment_loss(*inputs), rtol=1e-10, atol=0)


def test_the_loss_does_not_grow_with_the_minibatch():
    mean_bd, reference_br, weight_b, n = case(50, 3, 4)
    twice = [torch.cat([x, x]) for x in (mean_bd, reference_br, weight_b)]
    # each pair occurs four times in four times as many pairs
    torch.testing.assert_close(alignment_loss(*twice, 2 * n), alignment_loss(mean_bd, reference_br, weight_b, n))


def test_two_cells_by_hand():
    mean_bd = torch.tensor([[1.0, 0.0], [0.0, 2.0]])  # cosine 0
    reference_br = torch.tensor([[3.0], [1.0]])  # cosine 1
    loss = alignment_loss(mean_bd, reference_br, torch.tensor([1.0, 0.5]), torch.tensor(2))
    assert loss.item() == pytest.approx(2 * 0.5 / 4)


def test_unit_rows_have_length_one_unless_they_are_short():
    x_bd = torch.tensor([[3.0, 4.0], [0.0, 0.0], [3e-5, 4e-5]])
    torch.testing.assert_close(unit_rows(x_bd), torch.tensor([[0.6, 0.8], [0.0, 0.0], [0.3, 0.4]]))
