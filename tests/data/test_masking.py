from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from epivi._errors import ConfigError
from epivi.data.masking import draw_thinning, hide_assays


@given(st.integers(0, 2**31 - 1), st.integers(1, 6), st.integers(1, 7), st.one_of(st.none(), st.integers(1, 8)))
def test_each_sample_hides_what_was_asked_and_keeps_one(seed, n_samples, n_assays, n_hidden):
    torch.manual_seed(seed)
    available_ba = (torch.rand(n_samples, n_assays) < 0.6).float()
    hidden_ba = hide_assays(available_ba, n_hidden)
    assert bool((hidden_ba <= available_ba).all())
    n_hidden_b, n_available_b = hidden_ba.sum(1), available_ba.sum(1)
    assert bool((n_hidden_b[n_available_b > 0] < n_available_b[n_available_b > 0]).all())
    if n_hidden is not None:
        assert torch.equal(n_hidden_b, (n_available_b - 1).clamp(min=0, max=n_hidden))


def test_numbers_and_assays_are_uniform():
    torch.manual_seed(0)
    n, counts, per_assay = 4000, torch.zeros(5), torch.zeros(4)
    for _ in range(n):
        hidden_a = hide_assays(torch.ones(1, 4))[0]
        counts[int(hidden_a.sum())] += 1
        per_assay += hidden_a
    assert counts[0] == 0
    assert counts[4] == 0
    # k ~ U{1, 2, 3}; an assay is hidden with probability E[k] / 4 = 1/2
    assert torch.allclose(counts[1:4] / n, torch.full((3,), 1 / 3), atol=0.03)
    assert torch.allclose(per_assay / n, torch.full((4,), 0.5), atol=0.03)


def test_one_number_holds_for_the_whole_minibatch():
    torch.manual_seed(1)
    for _ in range(20):
        assert hide_assays(torch.ones(8, 6)).sum(1).unique().numel() == 1


def test_thinning_factors_are_drawn_evenly():
    torch.manual_seed(0)
    drawn = draw_thinning((6000, 1), (1, 2, 4), torch.device("cpu"))
    values, counts = drawn.unique(return_counts=True)
    assert values.tolist() == [1.0, 2.0, 4.0]
    assert torch.allclose(counts / 6000, torch.full((3,), 1 / 3), atol=0.03)


@pytest.mark.parametrize("bad", [0, 1.5, -2])
def test_bad_thinning_factors_are_refused(bad):
    with pytest.raises(ConfigError, match="thinning factor"):
        draw_thinning((1,), (1, bad), torch.device("cpu"))
