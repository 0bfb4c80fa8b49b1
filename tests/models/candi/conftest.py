"""Small bulk data and small trained models; session models are not changed by tests."""

from __future__ import annotations

import copy

import anndata as ad
import numpy as np
import pytest
import torch

import epivi

HELD = {"validation_chroms": ["chr2"], "test_chroms": ["chr3"]}


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Small arrays gain nothing from a second thread, and a busy machine loses much; session fixtures need it too."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def still_one_thread(threads_of_torch):
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def simulated(one_thread):
    """5 biosamples x 4 assays on three chromosomes; ATAC is measured in the last biosample alone."""
    return epivi.simulate.bulk(5, 4, chrom_sizes=[480, 320, 240], signal=True, seed=1, missing=0.3)


@pytest.fixture
def adata(simulated):
    """A fresh copy, not set up."""
    return simulated.copy()


@pytest.fixture(scope="session")
def make():
    """Build a small model on data; chromosome 2 is for validation, 3 for tests, unless told otherwise."""

    def build(data, *, setup=None, **kwargs):
        epivi.CANDI.setup_anndata(data, **(HELD | (setup or {})))
        return epivi.CANDI(data, **({"size": "test", "seed": 1} | kwargs))

    return build


@pytest.fixture(scope="session")
def learn(fit):
    """Train for two epochs of a few steps."""

    def train(model, max_epochs=2, **kwargs):
        return fit(model, max_epochs, **({"batch_size": 4} | kwargs))

    return train


@pytest.fixture(scope="session")
def trained(simulated, make, learn):
    """A model of counts and signal; tests do not change it."""
    return learn(make(simulated.copy()), 4, lr=3e-3)


@pytest.fixture(scope="session")
def offset_only(simulated, make, learn):
    """A model whose only covariate is the read length: the depth enters as the offset alone."""
    return learn(make(simulated.copy(), setup={"covariates_key": ["read_length"], "signal_key": None}))


@pytest.fixture
def own(trained):
    """The trained model, to be changed."""
    model = copy.copy(trained)
    model.module = copy.deepcopy(trained.module)
    return model


@pytest.fixture(scope="session")
def flatten():
    """Make the outputs of a model constants: counts of mean exp(0.7) times the depth ratio, signal N(1, 0.25)."""

    def change(model):
        with torch.no_grad():
            for name, head in model.module.network.heads.items():
                parts = [head.mean.linear] + ([head.variance.linear] if name == "signal" else [])
                biases = [0.7] if name == "counts" else [np.log(np.expm1(1.0)), np.log(np.expm1(0.25 - 1e-3))]
                for part, bias in zip(parts, biases, strict=True):
                    part.weight.zero_()
                    part.bias.fill_(float(bias))
        return model

    return change


@pytest.fixture(scope="session")
def on_bins():
    """The same experiments on some of the bins, and some assays in any order."""

    def take(data, keep_l, assays=None):
        bins = data.uns["bins"].iloc[np.arange(data.uns["bins"].shape[0])[keep_l]].reset_index(drop=True)
        at = data.var_names.get_indexer(list(data.var_names) if assays is None else assays)
        obsm = {key: np.asarray(value)[:, at] for key, value in data.obsm.items() if not key.startswith("_")}
        for key in ("counts", "signal"):
            obsm[key] = obsm[key][:, :, np.asarray(keep_l)]
        uns = {key: value for key, value in data.uns.items() if key in ("categories", "signal_transform", "genome")}
        obs, var = data.obs[[]].copy(), data.var.iloc[at][[]].copy()
        return ad.AnnData(data.X[:, at], obs=obs, var=var, obsm=obsm, uns=uns | {"bins": bins})

    return take


@pytest.fixture(scope="session")
def assert_same_tracks():
    """Results agree in every layer and in their names."""

    def check(first, second, atol=2e-5):
        assert list(first.obs_names) == list(second.obs_names)
        assert list(first.var_names) == list(second.var_names)
        assert set(first.layers) == set(second.layers)
        # None is X
        for name in filter(None, first.layers):
            if "median" in name or "lower" in name or "upper" in name:
                # a quantile of counts may jump where a probability meets a step
                assert np.mean(np.abs(first.layers[name] - second.layers[name]) > 1e-3) < 5e-3
            else:
                np.testing.assert_allclose(first.layers[name], second.layers[name], rtol=2e-4, atol=atol)

    return check
