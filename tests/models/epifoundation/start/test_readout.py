from __future__ import annotations

import numpy as np
import pytest

from epivi.models.epifoundation.start.readout import PENALTIES, RANKS, Moments, reduced_rank_ridge


@pytest.fixture
def rng():
    return np.random.default_rng(3)


def moments(z, y):
    return Moments.of([(z, y)])


def test_moments_are_sums_over_minibatches(rng):
    z, y = rng.normal(size=(30, 4)), rng.normal(size=(30, 6))
    found = Moments.of((z[at : at + 7], y[at : at + 7]) for at in range(0, 30, 7))
    assert found.n == 30
    np.testing.assert_allclose(found.zz_dd, z.T @ z)
    np.testing.assert_allclose(found.zy_dn, z.T @ y)
    assert found.yy == pytest.approx((y**2).sum())
    weight = rng.normal(size=(4, 6))
    assert found.error(weight) == pytest.approx(((y - z @ weight) ** 2).sum() / 30)


def by_hand(z, y, held_z, held_y):
    """All candidates, from the data and not from their moments."""
    from sklearn.linear_model import Ridge

    best, least, choice = np.zeros((z.shape[1], y.shape[1])), ((held_y) ** 2).sum(), (np.inf, 0)
    for penalty in PENALTIES:
        weight = Ridge(alpha=penalty * len(z), fit_intercept=False).fit(z, y).coef_.T
        right = np.linalg.svd(z @ weight, full_matrices=False)[2]
        most = min(weight.shape)
        for rank in [*(r for r in RANKS if r < most), most]:
            reduced = weight @ right[:rank].T @ right[:rank]
            error = ((held_y - held_z @ reduced) ** 2).sum()
            if error < least:
                best, least, choice = reduced, error, (penalty, rank)
    return best, choice, 1 - least / (held_y**2).sum()


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_the_fit_against_a_ridge_regression_of_each_rank(rng, rank):
    z = rng.normal(size=(120, 6))
    signal = rng.normal(size=(6, rank)) @ rng.normal(size=(rank, 10))
    y = z @ signal + 2.0 * rng.normal(size=(120, 10))
    z, y = z - z.mean(0), y - y.mean(0)
    expected, choice, gain = by_hand(z[:80], y[:80], z[80:], y[80:])
    found, chosen = reduced_rank_ridge(moments(z[:80], y[:80]), moments(z[80:], y[80:]))
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-9)
    assert (chosen["penalty"], chosen["rank"]) == choice
    assert chosen["gain"] == pytest.approx(gain)
    assert np.linalg.matrix_rank(found, tol=1e-9) == chosen["rank"]


def test_of_noise_the_mean_is_chosen(rng):
    train = moments(rng.normal(size=(30, 8)), rng.normal(size=(30, 5)))
    z = rng.normal(size=(2000, 8))
    # what is held out has the opposite sign
    held = moments(z, -z @ train.zy_dn / 30)
    found, chosen = reduced_rank_ridge(train, held)
    assert not found.any()
    assert chosen == {"penalty": np.inf, "rank": 0.0, "gain": 0.0}
