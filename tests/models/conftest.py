from __future__ import annotations

import numpy as np
import pytest
import torch

import epivi

QUIET = {"enable_progress_bar": False, "accelerator": "cpu", "logger": False}
ATAC = {"n_fg": 200, "n_bg": 120, "median": 80, "clip": (20, 300), "log_sd": 0.5}


@pytest.fixture(autouse=True)
def threads_of_torch():
    """One thread: small arrays gain nothing from more, and a busy machine loses much.

    The first parallel kernel of numba sets the threads of OpenMP, those of torch with them, to all cores.
    """
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def simulated():
    """Two batches that differ in depth and background; cells × 320 peaks on four chromosomes."""
    return epivi.simulate.accessibility(
        ((30, 30, 10), (30, 10, 30)), **(ATAC | {"median": (50, 100), "rho": (0.3, 0.7)}), seed=3
    )


@pytest.fixture
def adata(simulated):
    """A fresh copy, not set up."""
    return simulated.copy()


@pytest.fixture(scope="session")
def simulated_multiome():
    return epivi.simulate.multiome([35, 35], n_atac_only=30, n_genes=40, rna_dims=6, atac_kwargs=ATAC, seed=5)


@pytest.fixture
def mdata(simulated_multiome):
    return simulated_multiome.copy()


@pytest.fixture
def make(adata):
    """Build a small SAILER on data of its own, or on those given."""

    def build(data=None, *, batch_key="batch", setup=None, **kwargs):
        data = adata if data is None else data
        epivi.SAILER.setup_anndata(data, **({"batch_key": batch_key} | (setup or {})))
        return epivi.SAILER(data, **({"n_latent": 4, "n_hidden": (12, 8), "seed": 1} | kwargs))

    return build


@pytest.fixture(scope="session")
def fit():
    def train(model, max_epochs=2, **kwargs):
        model.train(max_epochs=max_epochs, **({"batch_size": 64} | QUIET | kwargs))
        return model

    return train


@pytest.fixture(scope="session")
def same_weights():
    def compare(first, second):
        a, b = first.module.state_dict(), second.module.state_dict()
        return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)

    return compare


@pytest.fixture
def global_state():
    """State of the global generators of torch and numpy, as comparable bytes."""

    def read():
        return torch.get_rng_state().numpy().tobytes(), np.random.get_state()[1].tobytes()  # noqa: NPY002

    return read
