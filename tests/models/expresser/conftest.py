from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import epivi

QUIET = {"enable_progress_bar": False, "accelerator": "cpu", "logger": False}


def build_counts(n_cells=40, n_genes=60, seed=0, rate=0.8):
    rng = np.random.default_rng(seed)
    level = rng.gamma(1.0, 1.0, n_genes)
    counts = sparse.csr_matrix(rng.poisson(rate * level, (n_cells, n_genes)).astype(np.float32))
    obs = pd.DataFrame(
        {"batch": rng.choice(["a", "b", "c"], n_cells), "kind": rng.choice(["x", "y"], n_cells)},
        index=[f"cell{i}" for i in range(n_cells)],
    )
    return ad.AnnData(counts, obs=obs, var=pd.DataFrame(index=[f"g{i}" for i in range(n_genes)]))


@pytest.fixture
def counts():
    """Cells × 60 genes, not set up."""
    return build_counts()


@pytest.fixture(scope="session")
def build():
    return build_counts


@pytest.fixture(scope="session")
def make():
    """Set up data and build a small model of them."""

    def made(adata, setup=None, **kwargs):
        epivi.Expresser.setup_anndata(adata, **(setup or {}))
        model = epivi.Expresser(adata, **({"size": "test", "seed": 1} | kwargs))
        model.is_trained_ = True  # random weights will do
        return model

    return made


@pytest.fixture(scope="session")
def fit():
    def train(model, max_epochs=2, **kwargs):
        model.train(max_epochs=max_epochs, batch_size=16, **(QUIET | kwargs))
        return model

    return train


@pytest.fixture(scope="session")
def trained(make, fit):
    """A model that no test changes."""
    return fit(make(build_counts(), {"batch_key": "batch"}), lr=3e-3)


@pytest.fixture(scope="session")
def full(make, fit):
    """A model with all heads; no test changes it."""
    return fit(make(build_counts(), likelihood="gaussian", detection=True, baseline="additive"))
