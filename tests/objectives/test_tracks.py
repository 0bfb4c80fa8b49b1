from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import nbinom
from torch.distributions import Multinomial, Poisson

from epivi._errors import ConfigError
from epivi.objectives.tracks import (
    channels_of,
    library_of,
    multinomial_tracks,
    negative_binomial_tracks,
    poisson_constant,
)

LENGTHS = [(6, 6, 6), (3, 7, 1), (5,), (1, 1)]


def random_case(lengths, seed=0, b=4, *, rate=0.8, dtype=torch.float64):
    """Dense counts with one empty modality (first cell, first modality), logits and the non-zeros."""
    rng = np.random.default_rng(seed)
    x_bf = torch.from_numpy(rng.poisson(rate, (b, sum(lengths)))).to(dtype)
    x_bf[0, : lengths[0]] = 0.0
    logits_bf = torch.from_numpy(rng.normal(0, 2, x_bf.shape)).to(dtype)
    return x_bf, logits_bf, nonzeros(x_bf)


def nonzeros(x_bf):
    rows_o, columns_o = torch.nonzero(x_bf, as_tuple=True)
    return rows_o, columns_o, x_bf[rows_o, columns_o]


def by_modality(x_bf, lengths):
    return x_bf.split(list(lengths), dim=1)


def dense_multinomial(x_bf, logits_bf, lengths):
    pairs = zip(by_modality(x_bf, lengths), by_modality(logits_bf, lengths), strict=True)
    return torch.stack([-(x * a.log_softmax(1)).sum(1) for x, a in pairs], dim=1)


def dense_negative_binomial(x_bf, logits_bf, log_theta_f, library_bc, lengths):
    """From the formula in log Gamma, dense."""
    parts = zip(*(by_modality(t, lengths) for t in (x_bf, logits_bf, log_theta_f[None])), library_bc.t(), strict=True)
    total = []
    for x, a, log_theta, library_b in parts:
        mu, theta = library_b[:, None] * a.softmax(1), log_theta.exp()
        log_p = torch.lgamma(x + theta) - torch.lgamma(theta) - torch.lgamma(x + 1)
        log_p = log_p + theta * (theta / (theta + mu)).log() + torch.xlogy(x, mu / (theta + mu))
        total.append(-log_p.sum(1))
    return torch.stack(total, dim=1)


@pytest.mark.parametrize("lengths", LENGTHS)
def test_the_channel_of_a_column_is_computed_once_or_each_time(lengths):
    columns_o = torch.arange(sum(lengths))
    channels_o = channels_of(columns_o, lengths)
    assert channels_o.tolist() == np.repeat(np.arange(len(lengths)), lengths).tolist()
    assert channels_o.dtype == torch.int64
    _, logits_bf, entries = random_case(lengths)
    known = {"channels_o": channels_of(entries[1], lengths)}
    library_bc = library_of(*entries, lengths, 4)
    assert torch.equal(library_of(*entries, lengths, 4, **known), library_bc)
    assert torch.equal(poisson_constant(*entries, lengths, 4, **known), poisson_constant(*entries, lengths, 4))
    assert torch.equal(
        multinomial_tracks(logits_bf, *entries, lengths, **known), multinomial_tracks(logits_bf, *entries, lengths)
    )
    nb = (logits_bf, torch.zeros(sum(lengths)).double(), *entries, library_bc, lengths)
    assert torch.equal(negative_binomial_tracks(*nb, **known), negative_binomial_tracks(*nb))


@pytest.mark.parametrize("lengths", LENGTHS)
def test_library_is_the_sum_of_each_modality(lengths):
    x_bf, _, entries = random_case(lengths)
    expected_bc = torch.stack([x.sum(1) for x in by_modality(x_bf, lengths)], dim=1)
    assert torch.equal(library_of(*entries, lengths, 4), expected_bc)
    assert library_of(*(e[:0] for e in entries), lengths, 2).tolist() == [[0.0] * len(lengths)] * 2


@pytest.mark.parametrize("lengths", LENGTHS)
def test_value_and_gradient_equal_the_dense_computation(lengths):
    x_bf, logits_bf, entries = random_case(lengths, 1)
    logits_bf.requires_grad_()
    expected_bc = dense_multinomial(x_bf, logits_bf, lengths)
    got_bc = multinomial_tracks(logits_bf, *entries, lengths)
    torch.testing.assert_close(got_bc, expected_bc)
    upstream = torch.randn_like(got_bc)
    got = torch.autograd.grad(got_bc, logits_bf, upstream)
    torch.testing.assert_close(got, torch.autograd.grad(expected_bc, logits_bf, upstream))


def test_gradient_is_library_times_share_less_counts():
    lengths = (4, 9)
    x_bf, logits_bf, entries = random_case(lengths, 2)
    logits_bf.requires_grad_()
    multinomial_tracks(logits_bf, *entries, lengths).sum().backward()
    share_bf = torch.cat([a.softmax(1) for a in by_modality(logits_bf, lengths)], dim=1)
    library_bf = library_of(*entries, lengths, 4).repeat_interleave(torch.tensor(lengths), dim=1)
    torch.testing.assert_close(logits_bf.grad, library_bf * share_bf - x_bf)


@pytest.mark.parametrize("lengths", LENGTHS)
def test_with_its_constant_it_is_the_poisson_likelihood(lengths):
    x_bf, logits_bf, entries = random_case(lengths, 3)
    x_bf[0, 0] = 2.0  # torch's Poisson has no rate zero
    entries = nonzeros(x_bf)
    library_bc = library_of(*entries, lengths, 4).clamp_min(0)
    expected = []
    for x, a, library_b in zip(
        by_modality(x_bf, lengths), by_modality(logits_bf, lengths), library_bc.t(), strict=True
    ):
        rate = library_b[:, None] * a.softmax(1)
        expected.append(torch.where(library_b > 0, -Poisson(rate.clamp_min(1e-300)).log_prob(x).sum(1), 0.0))
    got_bc = multinomial_tracks(logits_bf, *entries, lengths) + poisson_constant(*entries, lengths, 4)
    torch.testing.assert_close(got_bc, torch.stack(expected, dim=1))


def test_poisson_is_multinomial_times_poisson_of_the_library():
    x_bf, logits_bf, _ = random_case((8,), 4, b=1)
    x_bf[0, 2:5] = torch.tensor([1.0, 3.0, 2.0])
    entries = nonzeros(x_bf)
    library = x_bf.sum()
    log_p = Multinomial(int(library), logits=logits_bf[0]).log_prob(x_bf[0]) + Poisson(library).log_prob(library)
    got = multinomial_tracks(logits_bf, *entries, (8,)) + poisson_constant(*entries, (8,), 1)
    torch.testing.assert_close(-got[0, 0], log_p)


@pytest.mark.parametrize("lengths", [(3, 3), (2, 4)])
def test_gradcheck(lengths):
    _, logits_bf, entries = random_case(lengths, 5, 3)
    library_bc = library_of(*entries, lengths, 3)
    log_theta_f = torch.randn(sum(lengths), dtype=torch.float64).requires_grad_()
    logits_bf.requires_grad_()
    assert torch.autograd.gradcheck(lambda a: multinomial_tracks(a, *entries, lengths), logits_bf)
    assert torch.autograd.gradcheck(
        lambda a, t: negative_binomial_tracks(a, t, *entries, library_bc, lengths), (logits_bf, log_theta_f)
    )


@pytest.mark.parametrize("lengths", [(4, 4), (4, 3)])
def test_an_empty_modality_costs_nothing_and_has_gradient_zero(lengths):
    _, logits_bf, entries = random_case(lengths, 6)
    logits_bf[0, 0] = 800.0  # shares of the others underflow
    log_theta_f = torch.zeros(sum(lengths), dtype=torch.float64, requires_grad=True)
    logits_bf.requires_grad_()
    library_bc = library_of(*entries, lengths, 4)
    assert library_bc[0, 0] == 0
    assert poisson_constant(*entries, lengths, 4)[0, 0] == 0
    for loss_bc in (
        multinomial_tracks(logits_bf, *entries, lengths),
        negative_binomial_tracks(logits_bf, log_theta_f, *entries, library_bc, lengths),
    ):
        assert loss_bc[0, 0] == 0
        assert torch.isfinite(loss_bc).all()
        (grad_bf,) = torch.autograd.grad(loss_bc.sum(), logits_bf, retain_graph=True)
        assert torch.isfinite(grad_bf).all()
        assert (grad_bf[0, : lengths[0]] == 0).all()
        (empty_bf,) = torch.autograd.grad(loss_bc[0, 0], logits_bf, retain_graph=True)
        assert (empty_bf == 0).all()
    assert torch.isfinite(torch.autograd.grad(loss_bc.sum(), log_theta_f)[0]).all()


def test_underflow_of_a_share_keeps_counts_finite():
    logits_bf = torch.tensor([[200.0, -200.0, 0.0]], requires_grad=True)
    at = torch.tensor([0]), torch.tensor([1]), torch.tensor([3.0])
    loss_bc = multinomial_tracks(logits_bf, *at, (3,))
    assert loss_bc.item() == 1200.0
    loss_bc.sum().backward()
    assert logits_bf.grad.tolist() == [[3.0, -3.0, 0.0]]


def test_a_batch_without_any_count():
    logits_bf = torch.randn(2, 6, requires_grad=True)
    none = torch.zeros(0, dtype=torch.int64)
    loss_bc = multinomial_tracks(logits_bf, none, none, torch.zeros(0), (3, 3))
    assert loss_bc.tolist() == [[0.0, 0.0]] * 2
    loss_bc.sum().backward()
    assert (logits_bf.grad == 0).all()


@pytest.mark.parametrize("lengths", LENGTHS)
def test_negative_binomial_equals_scipy(lengths):
    x_bf, logits_bf, entries = random_case(lengths, 7, rate=1.5)
    log_theta_f = torch.from_numpy(np.random.default_rng(0).normal(0, 1.5, sum(lengths)))
    library_bc = library_of(*entries, lengths, 4) * 1.3 + 0.5  # a given size factor
    expected = []
    for x, a, log_theta, library_b in zip(
        *(by_modality(t, lengths) for t in (x_bf, logits_bf, log_theta_f[None])), library_bc.t(), strict=True
    ):
        mu, theta = (library_b[:, None] * a.softmax(1)).numpy(), log_theta.exp().numpy()
        expected.append(-nbinom.logpmf(x.numpy(), theta, theta / (theta + mu)).sum(1))
    got_bc = negative_binomial_tracks(logits_bf, log_theta_f, *entries, library_bc, lengths)
    np.testing.assert_allclose(got_bc.numpy(), np.stack(expected, axis=1), rtol=1e-8)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10_000), st.lists(st.integers(1, 5), min_size=1, max_size=3))
def test_negative_binomial_values_and_gradients_equal_the_dense_formula(seed, lengths):
    x_bf, logits_bf, entries = random_case(lengths, seed, 3)
    log_theta_f = torch.from_numpy(np.random.default_rng(seed).normal(0, 2, sum(lengths)))
    library_bc = library_of(*entries, lengths, 3) + 0.7
    inputs = (logits_bf.requires_grad_(), log_theta_f.requires_grad_())
    expected_bc = dense_negative_binomial(x_bf, *inputs, library_bc, lengths)
    got_bc = negative_binomial_tracks(*inputs, *entries, library_bc, lengths)
    torch.testing.assert_close(got_bc, expected_bc, rtol=1e-7, atol=1e-8)
    upstream = torch.randn_like(got_bc)
    got = torch.autograd.grad(got_bc, inputs, upstream)
    torch.testing.assert_close(got, torch.autograd.grad(expected_bc, inputs, upstream), rtol=1e-6, atol=1e-7)


def test_large_inverse_dispersion_is_poisson_in_single_precision():
    lengths = (5, 4)
    _, logits_bf, entries = random_case(lengths, 8, dtype=torch.float32)
    library_bc = library_of(*entries, lengths, 4)
    poisson_bc = multinomial_tracks(logits_bf, *entries, lengths) + poisson_constant(*entries, lengths, 4)
    got_bc = negative_binomial_tracks(logits_bf, torch.full((9,), 14.0), *entries, library_bc, lengths)
    torch.testing.assert_close(got_bc, poisson_bc, rtol=1e-4, atol=1e-3)


def test_counts_without_library_are_left_out():
    logits_bf = torch.zeros(1, 4, requires_grad=True)
    at = torch.tensor([0]), torch.tensor([1]), torch.tensor([3.0])
    loss_bc = negative_binomial_tracks(logits_bf, torch.zeros(4), *at, torch.zeros(1, 2), (2, 2))
    assert loss_bc.tolist() == [[0.0, 0.0]]
    loss_bc.sum().backward()
    assert (logits_bf.grad == 0).all()


def test_cells_do_not_depend_on_each_other():
    lengths = (4, 6)
    x_bf, logits_bf, entries = random_case(lengths, 9, dtype=torch.float32)
    order = torch.tensor([3, 1, 0, 2])
    all_bc = multinomial_tracks(logits_bf, *entries, lengths)
    torch.testing.assert_close(
        multinomial_tracks(logits_bf[order], *nonzeros(x_bf[order]), lengths), all_bc[order], rtol=0, atol=0
    )
    one = multinomial_tracks(logits_bf[:1], *nonzeros(x_bf[:1]), lengths)
    torch.testing.assert_close(one, all_bc[:1], rtol=0, atol=0)


def test_logits_of_another_memory_order_and_narrow_integers():
    lengths = (4, 4)
    x_bf, logits_bf, (rows_o, columns_o, values_o) = random_case(lengths, 10)
    turned_bf = logits_bf.t().contiguous().t()
    got_bc = multinomial_tracks(turned_bf, rows_o.int(), columns_o.int(), values_o.to(torch.uint16), lengths)
    torch.testing.assert_close(got_bc, dense_multinomial(x_bf, logits_bf, lengths))


def test_lengths_that_do_not_add_up_are_refused():
    _, logits_bf, entries = random_case((3, 3))
    with pytest.raises(ConfigError, match=r"6 logits a cell and 7 bins in the modalities, 3 \+ 4\. The lengths must"):
        multinomial_tracks(logits_bf, *entries, (3, 4))
    with pytest.raises(ConfigError, match="6 logits a cell and 3 bins"):
        negative_binomial_tracks(logits_bf, torch.zeros(6), *entries, torch.ones(4, 1), (3,))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(dtype):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 600, generator=generator).to(dtype)
    rows, columns = torch.arange(2).repeat_interleave(600), torch.arange(600).repeat(2)
    values = torch.full((1200,), 3.0)
    lengths = (400, 200)
    wide = logits.float().requires_grad_()
    narrow = logits.clone().requires_grad_()
    library = library_of(rows, columns, values, lengths, 2)
    for cost in (
        lambda x: multinomial_tracks(x, rows, columns, values, lengths),
        lambda x: negative_binomial_tracks(x, torch.zeros(600), rows, columns, values, library, lengths),
    ):
        expected, found = cost(wide), cost(narrow)
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
        (gradient,) = torch.autograd.grad(found.sum(), narrow)
        (reference,) = torch.autograd.grad(expected.sum(), wide)
        torch.testing.assert_close(gradient.float(), reference, rtol=1e-2, atol=1e-2)
