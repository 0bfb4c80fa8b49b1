"""Scores of imputed tracks against SciPy, with ties, masks and constants."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from epivi._errors import ConfigError, DataError
from epivi.metrics import imputation_scores


def example(n=2000, seed=0):
    rng = np.random.default_rng(seed)
    truth = rng.normal(size=n)
    return rng.poisson(np.exp(truth)).astype(float), np.exp(truth + 0.5 * rng.normal(size=n))


def expected(x, y):
    return {
        "mse": np.mean((x - y) ** 2),
        "pearson": stats.pearsonr(x, y).statistic,
        "spearman": stats.spearmanr(x, y).statistic,
    }


def test_every_region_equals_scipy():
    x, y = example()
    rng = np.random.default_rng(1)
    genes, promoters = rng.random(2000) < 0.4, rng.random(2000) < 0.05
    scores = imputation_scores(x, y, genes=genes, promoters=promoters, top_share=0.02)
    top = {"_top_observed": x >= np.sort(x)[-40], "_top_predicted": y >= np.sort(y)[-40]}
    regions = {"": np.ones(2000, bool), "_genes": genes, "_promoters": promoters, **top}
    for suffix, mask in regions.items():
        for name, value in expected(x[mask], y[mask]).items():
            assert scores[name + suffix] == pytest.approx(value, abs=1e-12)
    assert scores["n_top_observed"] == top["_top_observed"].sum() >= 40
    assert scores["n_top_predicted"] == 40
    assert len(scores) == 3 * 5 + 3


def test_overlap_without_ties_is_the_share_of_common_bins():
    rng = np.random.default_rng(2)
    x, y = rng.normal(size=(2, 1000))
    y += x
    common = set(np.argsort(x)[-50:]) & set(np.argsort(y)[-50:])
    assert imputation_scores(x, y, top_share=0.05)["overlap_top"] == pytest.approx(len(common) / 50)
    assert imputation_scores(x, x, top_share=0.05)["overlap_top"] == pytest.approx(1.0)
    assert imputation_scores(x, -x, top_share=0.05)["overlap_top"] == 0.0


def test_overlap_with_ties_is_the_mean_over_their_orders():
    rng = np.random.default_rng(3)
    x, y = rng.integers(4, size=(2, 40)).astype(float)
    orders = []
    for _ in range(6000):
        chosen = [set(np.lexsort((rng.random(40), values))[-5:]) for values in (x, y)]
        orders.append(len(chosen[0] & chosen[1]) / 5)
    assert imputation_scores(x, y, top_share=5 / 40)["overlap_top"] == pytest.approx(np.mean(orders), abs=0.015)
    assert imputation_scores(np.ones(50), np.zeros(50), top_share=0.1)["overlap_top"] == pytest.approx(0.1)


@given(st.integers(0, 10_000), st.integers(2, 60), st.floats(0.01, 1.0))
@settings(max_examples=60, deadline=None)
def test_scores_do_not_depend_on_the_order_of_bins(seed, n, share):
    rng = np.random.default_rng(seed)
    x, y = rng.integers(5, size=(2, n)).astype(float)
    order = rng.permutation(n)
    first, second = (imputation_scores(a, b, top_share=share) for a, b in ((x, y), (x[order], y[order])))
    assert second == pytest.approx(first, nan_ok=True, abs=1e-9)
    assert 0 <= first["overlap_top"] <= 1
    swapped = imputation_scores(y, x, top_share=share)
    assert swapped["overlap_top"] == pytest.approx(first["overlap_top"])
    assert swapped["mse_top_observed"] == pytest.approx(first["mse_top_predicted"])


def test_rows_are_scored_one_by_one():
    pairs = [example(300, seed) for seed in range(3)]
    genes = np.arange(300) < 100
    table = imputation_scores(*(np.stack(part) for part in zip(*pairs, strict=True)), genes=genes)
    assert pd.DataFrame(table).shape == (3, 15)
    for row, (x, y) in enumerate(pairs):
        single = imputation_scores(x, y, genes=genes)
        assert {key: value[row] for key, value in table.items()} == pytest.approx(single)


def test_what_is_undefined_is_nan():
    x, _ = example(100)
    flat = imputation_scores(x, np.ones(100), genes=np.zeros(100, bool), promoters=np.arange(100) == 3)
    assert flat["mse"] == pytest.approx(np.mean((x - 1) ** 2))
    for key in ("pearson", "spearman", "mse_genes", "pearson_genes", "spearman_genes", "pearson_promoters"):
        assert np.isnan(flat[key])
    assert flat["mse_promoters"] == (x[3] - 1) ** 2
    one = imputation_scores([2.0], [3.0])
    assert (one["mse"], one["overlap_top"]) == (1.0, 1.0)
    assert np.isnan(one["pearson"])


def test_very_large_and_very_small_values_are_correlated_too():
    x, y = example(200)
    for scale in (1e-200, 1e150):
        scores = imputation_scores(scale * x, y)
        assert scores["pearson"] == pytest.approx(stats.pearsonr(x, y).statistic)


@pytest.mark.parametrize(
    ("x", "y", "options", "error", "message"),
    [
        ([1, 2], [1, 2, 3], {}, DataError, r"observed has shape \(2,\), predicted \(3,\)"),
        ([[1, 2]], [1, 2], {}, DataError, r"observed has shape \(1, 2\), predicted \(2,\)"),
        ([], [], {}, DataError, r"observed has shape \(0,\), expected \(bins,\) or \(tracks, bins\)"),
        (["a"], [1], {}, DataError, "observed cannot be read as numbers"),
        ([1, np.nan], [1, 2], {}, DataError, "observed holds 1 NaN and 0 infinite values, the first in bin 1. Leave"),
        ([[1, 2]], [[np.inf, 2]], {}, DataError, "predicted holds 0 NaN and 1 infinite .* in bin 0 of track 0"),
        ([1, 2], [1, 2], {"genes": [1, 0]}, DataError, r"genes is int64 of shape \(2,\), expected a Boolean"),
        ([1, 2], [1, 2], {"promoters": [True]}, DataError, r"promoters is bool of shape \(1,\), .* 2 bins"),
        ([1, 2], [1, 2], {"top_share": 0}, ConfigError, "top_share is 0, expected a number above 0"),
        ([1, 2], [1, 2], {"top_share": True}, ConfigError, "top_share is True"),
        ([1, 2], [1, 2], {"top_share": np.nan}, ConfigError, "top_share is nan"),
    ],
)
def test_bad_input_is_refused(x, y, options, error, message):
    with pytest.raises(error, match=message):
        imputation_scores(x, y, **options)
