from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from epivi.nn.covariates import Covariates, DecoderCovariates


def test_columns_are_depth_continuous_categorical_and_batch_last():
    covariates = DecoderCovariates(math.log(100.0), 0.5, n_batch=2, n_cats_per_cov=(3, 1), n_continuous=2)
    out_bk = covariates(
        torch.tensor([100.0, 100.0 * math.e]),
        torch.tensor([1, 0]),
        torch.tensor([[2, 0], [0, 0]]),
        torch.tensor([[0.1, -7.0], [0.2, 9.0]]),
    )
    expected = torch.tensor([[0.0, 0.1, -7.0, 0, 0, 1, 0, 1], [2.0, 0.2, 9.0, 1, 0, 0, 1, 0]])
    torch.testing.assert_close(out_bk, expected, rtol=1e-5, atol=1e-5)
    assert covariates.n_columns == 8


def test_a_new_batch_appends_a_column_at_the_end():
    depth, batch, cats = torch.tensor([3.0, 50.0]), torch.tensor([1, 0]), torch.tensor([[1], [0]])
    trained = DecoderCovariates(1.0, 2.0, n_batch=2, n_cats_per_cov=(2,))
    query = DecoderCovariates(1.0, 2.0, n_batch=3, n_cats_per_cov=(2,))
    out_bk = query(depth, batch, cats)
    torch.testing.assert_close(out_bk[:, :-1], trained(depth, batch, cats))
    assert not out_bk[:, -1].any()


def test_standardised_depth_is_the_closed_form_clamped_to_five():
    covariates = DecoderCovariates(2.0, 0.5)
    depth = torch.tensor([0.0, 1.0, math.exp(2.0), math.exp(3.0), 1e12, 0.3])
    torch.testing.assert_close(covariates.standardise(depth), torch.tensor([-4.0, -4.0, 0.0, 2.0, 5.0, -4.0]))
    torch.testing.assert_close(DecoderCovariates(2.0, 0.1).standardise(torch.tensor([0.0])), torch.tensor([-5.0]))


def test_a_single_batch_leaves_depth_alone():
    out_bk = DecoderCovariates(0.0, 1.0)(torch.tensor([math.e]), torch.tensor([0]))
    torch.testing.assert_close(out_bk, torch.tensor([[1.0]]))


def test_the_standardisation_is_saved_with_the_weights():
    trained, fresh = DecoderCovariates(3.0, 0.25), DecoderCovariates(0.0, 1.0)
    fresh.load_state_dict(trained.state_dict())
    torch.testing.assert_close(fresh.standardise(torch.tensor([30.0])), trained.standardise(torch.tensor([30.0])))
    assert set(trained.state_dict()) == {"log_depth_mean", "log_depth_sd"}


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 4), st.lists(st.integers(1, 4), max_size=3), st.integers(0, 3), st.integers(1, 5))
def test_number_of_columns_is_the_width_of_the_output(n_batch, n_cats, n_continuous, n_cells):
    covariates = DecoderCovariates(0.0, 1.0, n_batch=n_batch, n_cats_per_cov=n_cats, n_continuous=n_continuous)
    codes = torch.stack([torch.arange(n_cells) % n for n in n_cats], 1) if n_cats else None
    values = torch.randn(n_cells, n_continuous) if n_continuous else None
    out_bk = covariates(torch.full((n_cells,), 5.0), torch.arange(n_cells) % n_batch, codes, values)
    assert out_bk.shape == (n_cells, covariates.n_columns)
    # depth and continuous columns aside, each covariate with categories adds exactly one 1
    n_hot = sum(n > 1 for n in (*n_cats, n_batch))
    assert out_bk[:, 1 + n_continuous :].sum(1).tolist() == [n_hot] * n_cells


def test_a_batch_outside_the_trained_ones_is_refused():
    with pytest.raises(RuntimeError, match="Class values"):
        DecoderCovariates(0.0, 1.0, n_batch=2)(torch.tensor([1.0]), torch.tensor([2]))


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.integers(1, 3), st.integers(0, 2)), min_size=1, max_size=3), st.integers(0, 2))
def test_columns_of_fewer_categories_are_found_among_those_of_more(sizes, n_continuous):
    cats, batches = sizes[:-1], sizes[-1]  # each (trained, appended by the query)
    old, new = (
        DecoderCovariates(
            0.0,
            1.0,
            n_batch=batches[0] + extra * batches[1],
            n_cats_per_cov=[n + extra * more for n, more in cats],
            n_continuous=n_continuous,
        )
        for extra in (0, 1)
    )
    cells = torch.arange(6)
    inputs = (
        1.0 + cells.float(),
        cells % batches[0],
        torch.stack([cells % n for n, _ in cats], 1) if cats else None,
        torch.randn(6, n_continuous) if n_continuous else None,
    )
    torch.testing.assert_close(new(*inputs)[:, new.columns_of(old)], old(*inputs))


def test_columns_of_known_categories_include_those_without_a_column_before():
    old = Covariates(n_batch=1, n_cats_per_cov=[2, 1], n_continuous=1)
    new = Covariates(n_batch=3, n_cats_per_cov=[3, 1], n_continuous=1)
    assert new.columns_of(old) == [0, 1, 2]
    assert new.known_columns(old) == [0, 1, 2, 4]
