"""The start of the local readout: against dense regressions, and against links that are known."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import sparse

from epivi.models.epifoundation.heads.local import Links
from epivi.models.epifoundation.start import near
from epivi.models.epifoundation.start.near import PENALTIES, Backfit, Cells, ridges

N_PEAKS, N_GENES, N_LINKS = 12, 6, 3


@pytest.fixture
def rng():
    return np.random.default_rng(5)


@pytest.fixture
def links():
    # each gene has three peaks, all but the last share some; gene 5 has none
    pairs = [(peak, gene) for gene in range(N_GENES - 1) for peak in range(2 * gene, 2 * gene + N_LINKS)]
    return Links(*(np.array(part) for part in zip(*sorted(pairs), strict=True)))


def cells_of(z, is_open, y, mean, sd):
    return Cells(z, sparse.csc_array(is_open.astype(np.float32)), sparse.csc_array(y), mean, sd)


def draw(rng, links, n, *, local=1.0, linear=0.0, noise=0.5):
    z = rng.normal(size=(n, 4))
    is_open = rng.random((n, N_PEAKS)) < rng.uniform(0.1, 0.6, N_PEAKS)
    true_pn = np.zeros((N_PEAKS, N_GENES))
    # the second peak of each gene drives it, the others are beside it
    true_pn[[2 * gene + 1 for gene in range(N_GENES - 1)], range(N_GENES - 1)] = local
    y = is_open @ true_pn + linear * z[:, :1] + noise * rng.normal(size=(n, N_GENES))
    return z, is_open, y, true_pn


def split(z, is_open, y, at):
    mean, sd = y[:at].mean(0), y[:at].std(0)
    return [cells_of(z[part], is_open[part], y[part], mean, sd) for part in (slice(at), slice(at, None))]


def by_hand(train, validation, links):
    """All penalties, by dense solves of the centred columns."""
    peaks, held = (part.open_cp.toarray().astype(float) for part in (train, validation))
    mean = peaks.mean(0)
    unit = len(peaks) * (mean * (1 - mean))[links.peak_l].mean()
    units, held_units = ((part.y_cn.toarray() - part.mean_n) / part.sd_n for part in (train, validation))
    weights, errors = [], []
    for penalty in PENALTIES:
        weight = np.zeros((N_PEAKS, N_GENES))
        for gene in range(N_GENES):
            own = links.peak_l[links.gene_l == gene]
            x = peaks[:, own] - mean[own]
            gram = x.T @ x + penalty * unit * np.eye(own.size)
            weight[own, gene] = np.linalg.solve(gram, x.T @ units[:, gene])
        weights.append(weight[links.peak_l, links.gene_l])
        errors.append(((held_units - (held - mean) @ weight) ** 2).sum())
    return np.array(weights), np.array(errors), (held_units**2).sum()


@pytest.mark.parametrize("block", [2**22, 150])
def test_the_fit_is_the_ridge_regression_of_each_gene_on_its_peaks(rng, links, monkeypatch, block):
    monkeypatch.setattr(near, "BLOCK", block)
    train, validation = split(*draw(rng, links, 150, noise=2.0)[:3], 90)
    fit = Backfit(train, validation, links, is_linear=False).run()
    weights, errors, total = by_hand(train, validation, links)
    best = errors.argmin()
    assert errors[best] < total
    assert 0 < best < len(PENALTIES) - 1
    assert fit.penalty == PENALTIES[best]
    np.testing.assert_allclose(fit.local_l, weights[best], rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(fit.mean_l, train.open_cp.toarray().mean(0)[links.peak_l], rtol=1e-6)
    assert fit.gain == pytest.approx(1 - errors[best] / total, rel=1e-6)
    assert fit.gain_linear == 0.0
    assert not fit.linear_dn.any()


def test_of_noise_nothing_is_read(rng, links):
    z, is_open, y, _ = draw(rng, links, 200, local=0.0, noise=1.0)
    y[120:] = -(is_open[120:, :N_GENES] - 0.5)
    y[:120, :] = is_open[:120, :N_GENES] - 0.5
    fit = Backfit(*split(z, is_open, y, 120), links, is_linear=False).run()
    assert fit.penalty == np.inf
    assert not fit.local_l.any()
    assert (fit.gain, fit.gain_linear) == (0.0, 0.0)


def test_turns_come_to_what_both_say_together(rng, links):
    z, is_open, y, _ = draw(rng, links, 1200, linear=1.0, noise=0.3)
    # the vectors know some of the peaks, so that one part speaks for the other
    z[:, 1] += 2.0 * is_open[:, 1]
    z = (z - z[:800].mean(0)) / z[:800].std(0)
    train, validation = split(z, is_open, y, 800)
    fit = Backfit(train, validation, links).run()
    gains = []
    for gene in range(N_GENES - 1):
        own = links.peak_l[links.gene_l == gene]
        x = np.hstack([z, is_open[:, own] - is_open[:800, own].mean(0)])
        units = (y[:, gene] - y[:800, gene].mean()) / y[:800, gene].std()
        weight = np.linalg.lstsq(x[:800], units[:800], rcond=None)[0]
        gains.append(1 - ((units[800:] - x[800:] @ weight) ** 2).mean() / (units[800:] ** 2).mean())
    assert fit.gain == pytest.approx(np.mean([*gains, fit_of_last(z, y)]), abs=0.02)
    assert fit.gain > fit.gain_linear + 0.08


def fit_of_last(z, y):
    units = (y[:, -1] - y[:800, -1].mean()) / y[:800, -1].std()
    weight = np.linalg.lstsq(z[:800], units[:800], rcond=None)[0]
    return 1 - ((units[800:] - z[800:] @ weight) ** 2).mean() / (units[800:] ** 2).mean()


def test_true_links_weigh_more_than_others_beside_them(rng, links):
    z, is_open, y, true_pn = draw(rng, links, 600, noise=0.5)
    fit = Backfit(*split(z, is_open, y, 400), links).run()
    is_true = true_pn[links.peak_l, links.gene_l] > 0
    assert fit.local_l[is_true].min() > 3 * np.abs(fit.local_l[~is_true]).max()


def test_rare_peaks_shrink_more():
    gram, cross = np.diag([10.0, 1.0]), np.array([10.0, 1.0])
    for weight, penalty in zip(ridges(gram, cross, np.array([0.1, 1.0, 10.0])), (0.1, 1.0, 10.0), strict=True):
        np.testing.assert_allclose(weight, [10 / (10 + penalty), 1 / (1 + penalty)])


def test_ridges_against_solves(rng):
    x = rng.normal(size=(30, 5))
    # a column that is a sum of others is no trouble
    x[:, 4] = x[:, 0] + x[:, 1]
    cross, penalties = rng.normal(size=5), np.array([1e-3, 1.0, 50.0])
    for weight, penalty in zip(ridges(x.T @ x, cross, penalties), penalties, strict=True):
        np.testing.assert_allclose(weight, np.linalg.solve(x.T @ x + penalty * np.eye(5), cross), rtol=1e-6)
