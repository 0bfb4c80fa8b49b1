"""Intervals of imputed values hold as many of the values as they say."""

import numpy as np
import pytest

import epivi

QUIET = {"enable_progress_bar": False, "accelerator": "cpu", "logger": False, "batch_size": 24}


def test_coverage_of_intervals_is_near_the_nominal_one(make) -> None:
    adata = epivi.simulate.gene_programs(300, n_genes=40, n_modules=4, mean_counts=6.0, seed=0)
    x = adata.X.toarray()
    mask = (x > 0) & (np.random.default_rng(0).random(x.shape) < 0.15)
    test = np.arange(200, 300)
    choices = {"n_bins": 20, "mask_rate": 0.3, "baseline": "additive", "binning": "residual"}
    model = make(adata[:200].copy(), likelihood="gaussian", **choices)
    model.train(15, lr=6e-3, **QUIET)
    query, at = adata[test].copy(), mask[test]
    seen = np.where(at, 0, x[test])
    truth = np.log1p(1e4 * x[test] / seen.sum(1, keepdims=True))[at]
    assert at.sum() > 400
    for nominal in (0.5, 0.9):
        told = model.impute(query, mask=at, interval=nominal)
        lower, upper = (told.layers[name].toarray()[at] for name in ("lower", "upper"))
        assert ((truth >= lower) & (truth <= upper)).mean() == pytest.approx(nominal, abs=0.05)
