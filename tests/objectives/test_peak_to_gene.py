from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.special import expit, log_softmax

from epivi.objectives.peak_to_gene import (
    balanced_accuracy,
    frequency_logit,
    gene_cross_entropy,
    masked_mean,
    open_peak_loss,
)


@pytest.fixture
def rng():
    return np.random.default_rng(4)


def test_masked_means_against_a_loop(rng):
    values, mask = rng.normal(size=(5, 7)), rng.random((5, 7)) < 0.4
    expected = np.mean([v for v, m in zip(values.ravel(), mask.ravel(), strict=True) if m])
    assert float(masked_mean(torch.tensor(values), torch.tensor(mask))) == pytest.approx(expected, rel=1e-12)


def test_an_empty_mask_gives_loss_and_gradient_zero():
    logits = torch.randn(3, 4, 2, requires_grad=True)
    loss = gene_cross_entropy(logits, torch.zeros(3, 4), torch.zeros(3, 4, dtype=torch.bool))
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert not logits.grad.any()


def test_masked_values_that_are_not_finite_do_not_enter():
    values = torch.tensor([2.0, math.nan, math.inf], requires_grad=True)
    mean = masked_mean(values, torch.tensor([True, False, False]))
    mean.backward()
    assert float(mean.detach()) == 2.0
    assert values.grad.tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("n_levels", [2, 3, 10])
def test_constant_logits_have_the_loss_of_chance(n_levels):
    level = torch.arange(12).reshape(2, 6) % n_levels
    loss = gene_cross_entropy(torch.full((2, 6, n_levels), 3.7), level, torch.ones(2, 6, dtype=torch.bool))
    assert float(loss) == pytest.approx(math.log(n_levels), abs=1e-6)


def test_cross_entropy_against_a_loop_counts_true_levels_above_1(rng):
    logits, level = rng.normal(size=(4, 6, 3)), rng.integers(0, 3, (4, 6))
    mask = rng.random((4, 6)) < 0.6
    # level 2 was the pad of the released code: here it is a level as others
    assert (level[mask] == 2).any()
    expected = -np.take_along_axis(log_softmax(logits, axis=2), level[:, :, None], axis=2)[:, :, 0][mask].mean()
    found = gene_cross_entropy(*(torch.tensor(part) for part in (logits, level, mask)))
    assert float(found) == pytest.approx(expected, rel=1e-10)


def test_pads_change_nothing(rng):
    logits, level = rng.normal(size=(2, 3, 2)), rng.integers(0, 2, (2, 3))
    mask = np.ones((2, 3), dtype=bool)
    plain = gene_cross_entropy(*(torch.tensor(part) for part in (logits, level, mask)))
    padded = [np.concatenate([part, part[:, :1]], axis=1) for part in (logits, level)]
    mask = np.concatenate([mask, np.zeros((2, 1), dtype=bool)], axis=1)
    assert float(gene_cross_entropy(*(torch.tensor(part) for part in (*padded, mask)))) == float(plain)


def test_balanced_accuracy_against_sklearn(rng):
    from sklearn.metrics import balanced_accuracy_score

    logit, truth, mask = rng.normal(size=(6, 8)), rng.integers(0, 2, (6, 8)), rng.random((6, 8)) < 0.7
    found = balanced_accuracy(*(torch.tensor(part) for part in (logit, truth, mask)))
    expected = balanced_accuracy_score(truth[mask], (logit > 0)[mask].astype(int))
    assert float(found) == pytest.approx(expected, rel=1e-6)


def test_the_baseline_is_the_posterior_of_the_balanced_sample():
    # 2 of 8 genes are expressed and both are sampled, with 2 of the 6 silent ones: 1 against 1/3
    share = np.array([0.1, 0.5, 0.9])
    log_odds = torch.tensor(np.log(share / (1 - share)))[None]
    found = frequency_logit(log_odds, torch.tensor([[2]]), 8).sigmoid().numpy()[0]
    np.testing.assert_allclose(found, share / (share + (1 - share) / 3), rtol=1e-6)


@pytest.mark.parametrize(("n", "expected"), [(0, math.log(7)), (8, -math.log(7)), (4, 0.0)])
def test_the_baseline_of_cells_with_no_gene_or_all_is_finite(n, expected):
    assert frequency_logit(torch.zeros(1, 1), torch.tensor([[n]]), 8).item() == pytest.approx(expected, abs=1e-6)


def test_hidden_peaks_against_a_loop_with_equal_weight_of_both_kinds(rng):
    logit, is_open = rng.normal(size=(3, 8)), (rng.random((3, 8)) < 0.3).astype(float)
    mask = rng.random((3, 8)) < 0.8
    opened = -np.log(expit(logit))[mask & (is_open > 0)].mean()
    closed = -np.log(expit(-logit))[mask & (is_open == 0)].mean()
    found = open_peak_loss(*(torch.tensor(part) for part in (logit, is_open, mask)))
    assert float(found) == pytest.approx((opened + closed) / 2, rel=1e-10)


def test_no_hidden_peak_gives_loss_0():
    assert float(open_peak_loss(torch.ones(2, 3), torch.ones(2, 3), torch.zeros(2, 3, dtype=torch.bool))) == 0.0
