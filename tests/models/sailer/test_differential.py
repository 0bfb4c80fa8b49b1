from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import sparse

import epivi
from epivi._errors import ConfigError, DataError
from epivi.models.sailer.differential import COLUMNS, expected_fdr_calls

N_CELLS, N_PEAKS, UP, DOWN = 160, 240, slice(0, 30), slice(30, 60)


@pytest.fixture(scope="module")
def planted(fit):
    """Peaks 0 to 29 are more open in group b, peaks 30 to 59 less open, the rest alike."""
    rng = np.random.default_rng(0)
    group = np.arange(N_CELLS) % 2 == 1
    p = np.full((N_CELLS, N_PEAKS), 0.3)
    p[:, UP] = np.where(group, 0.7, 0.1)[:, None]
    p[:, DOWN] = np.where(group, 0.1, 0.7)[:, None]
    obs = pd.DataFrame({"group": np.where(group, "b", "a"), "third": ["x", "y", "y", "z"] * 40, "one": "o"})
    obs.index = [f"c{i}" for i in range(N_CELLS)]
    var = pd.DataFrame(index=[f"p{i}" for i in range(N_PEAKS)])
    adata = ad.AnnData(sparse.csr_matrix((rng.random(p.shape) < p).astype(np.float32)), obs=obs, var=var)
    epivi.SAILER.setup_anndata(adata)
    model = epivi.SAILER(adata, n_latent=3, n_hidden=(16, 8), encoder="dense", seed=0)
    plan = {"n_epochs_warmup_reconstruction": 5, "n_epochs_kl_cycle": 10, "lr": 1e-2}
    return fit(model, 40, batch_size=32, train_size=1.0, plan_kwargs=plan)


@pytest.fixture(scope="module")
def table(planted):
    return planted.differential_accessibility(groupby="group", group1="a", group2="b", n_samples=300)


def test_positive_effects_mean_more_open_in_group_2(table, planted):
    table = table.loc[planted.feature_names]
    for part, sign in ((UP, 1), (DOWN, -1)):
        rows = table.iloc[part]
        assert (sign * rows["effect_size"] > 0.2).all()
        assert (sign * rows["emp_effect"] > 0.2).all()
        assert rows["is_da_fdr"].all()
        assert (rows["prob_da"] > 0.9).all()
    assert table.iloc[60:]["effect_size"].abs().mean() < 0.1
    strict = planted.differential_accessibility(groupby="group", group1="a", group2="b", n_samples=300, delta=0.15)
    calls = strict.loc[planted.feature_names, "is_da_fdr"].to_numpy()
    assert calls[:60].all()
    assert calls[60:].mean() < 0.05


def test_columns_and_what_they_hold(table, planted):
    assert table.columns.tolist() == [*COLUMNS, "comparison", "group1", "group2"]
    assert set(table["comparison"]) == {"a vs b"}
    assert (table["group1"] == "a").all()
    assert (table["group2"] == "b").all()
    assert (np.diff(table["prob_da"]) <= 0).all()
    np.testing.assert_allclose(table["effect_size"], table["est_prob2"] - table["est_prob1"])
    np.testing.assert_allclose(table["emp_effect"], table["emp_prob2"] - table["emp_prob1"])
    p = table["prob_da"]
    np.testing.assert_allclose(table["bayes_factor"], np.log(p + 1e-8) - np.log(1 - p + 1e-8))
    x = (planted.adata.X > 0).toarray()
    b = (planted.adata.obs["group"] == "b").to_numpy()
    shares = pd.DataFrame({"emp_prob1": x[~b].mean(0), "emp_prob2": x[b].mean(0)}, index=planted.feature_names)
    pd.testing.assert_frame_equal(table[["emp_prob1", "emp_prob2"]], shares.loc[table.index])
    np.testing.assert_array_equal(table["is_da_fdr"], expected_fdr_calls(p.to_numpy(), 0.05))


def test_groups_may_be_given_by_rows_or_masks(planted, table):
    b = (planted.adata.obs["group"] == "b").to_numpy()
    expected = table.drop(columns=["comparison", "group1", "group2"])
    for idx1, idx2 in ((~b, b), (np.flatnonzero(~b), np.flatnonzero(b)), (~b, None)):
        found = planted.differential_accessibility(idx1=idx1, idx2=idx2, n_samples=300)
        pd.testing.assert_frame_equal(found, expected)


def test_swapped_groups_swap_the_sign(planted, table):
    swapped = planted.differential_accessibility(groupby="group", group1="b", group2="a", n_samples=300)
    up = planted.feature_names[UP]
    assert (swapped.loc[up, "effect_size"] < -0.2).all()
    np.testing.assert_allclose(swapped.loc[up, "emp_effect"], -table.loc[up, "emp_effect"])


def test_without_groups_each_is_compared_with_the_rest(planted):
    found = planted.differential_accessibility(groupby="third", n_samples=20)
    assert found["comparison"].unique().tolist() == ["x vs rest", "y vs rest", "z vs rest"]
    assert len(found) == 3 * N_PEAKS
    x = (planted.adata.X > 0).toarray()
    mask = (planted.adata.obs["third"] == "y").to_numpy()
    y = found[found["group1"] == "y"].loc[planted.feature_names]
    np.testing.assert_allclose(y["emp_prob1"], x[mask].mean(0))
    np.testing.assert_allclose(y["emp_prob2"], x[~mask].mean(0))
    against_y = planted.differential_accessibility(groupby="third", group2="y", n_samples=20)
    assert against_y["comparison"].unique().tolist() == ["x vs y", "z vs y"]
    some = planted.differential_accessibility(groupby="third", group1=["z", "x"], n_samples=20)
    assert some["comparison"].unique().tolist() == ["z vs rest", "x vs rest"]


def test_a_larger_delta_and_a_smaller_target_call_less(planted):
    calls = [
        planted.differential_accessibility(
            groupby="group", group1="a", group2="b", n_samples=200, delta=delta, fdr_target=target
        )["is_da_fdr"].sum()
        for delta, target in ((0.0, 0.2), (0.05, 0.05), (0.9, 0.05))
    ]
    assert calls[0] >= calls[1] > calls[2] == 0


def test_other_data_in_another_order_give_the_same(planted, table):
    adata = planted.adata[:, ::-1].copy()
    found = planted.differential_accessibility(adata, groupby="group", group1="a", group2="b", n_samples=300)
    pd.testing.assert_frame_equal(found, table)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ConfigError, "either groupby= .* or idx1="),
        ({"groupby": "group", "idx1": [0]}, ConfigError, "either groupby="),
        ({"groupby": "groups"}, DataError, r"'groups'.*'group'"),
        ({"groupby": "group", "group1": "c"}, ConfigError, r"group of obs\['group'\]='c'"),
        ({"groupby": "group", "group2": "c"}, ConfigError, "'c'"),
        ({"groupby": "one"}, DataError, r"single group \('o'\)"),
        ({"idx1": []}, DataError, "has no cells"),
        ({"idx1": np.ones(N_CELLS, dtype=bool)}, DataError, r"\(160 and 0\)"),
        ({"idx1": [N_CELLS]}, ConfigError, "indices holds 160"),
        ({"groupby": "group", "delta": -0.1}, ConfigError, "delta"),
        ({"groupby": "group", "fdr_target": 2.0}, ConfigError, "fdr_target"),
        ({"groupby": "group", "n_samples": 0}, ConfigError, "n_samples"),
        ({"groupby": "group", "transform_batch": "b"}, ConfigError, "'b' is no batch"),
    ],
)
def test_arguments_that_cannot_be_used_are_named(planted, arguments, error, message):
    with pytest.raises(error, match=message):
        planted.differential_accessibility(**arguments)


@given(st.lists(st.floats(0, 1), min_size=1, max_size=30), st.floats(0, 1))
def test_called_features_keep_the_expected_share_of_errors(probabilities, target):
    p = np.array(probabilities)
    calls = expected_fdr_calls(p, target)
    if calls.any():
        assert (1 - p[calls]).mean() <= target + 1e-9
        assert p[calls].min() >= p[~calls].max(initial=0) - 1e-12
    if not calls.all():  # one more would exceed the target
        more = np.sort(p)[::-1][: calls.sum() + 1]
        assert (1 - more).mean() > target - 1e-9
