"""Small linked multiomes and small trained models; session models are not changed by tests."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from scipy import sparse

import epivi
from epivi.models.epifoundation.config import EpiFoundationConfig
from epivi.models.epifoundation.module import EpiFoundationModule, Vocabulary


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Small arrays gain nothing from a second thread, and a busy machine loses much; session fixtures need it too."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def still_one_thread(threads_of_torch):
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def simulated(one_thread):
    """60 cells of 3 types in 2 batches; 80 peaks with counts on four chromosomes, 20 genes."""
    return epivi.simulate.linked_multiome(
        60, n_types=3, n_peaks=80, n_genes=20, n_batches=2, mean_open=0.3, binary=False, seed=0
    )


@pytest.fixture
def mdata(simulated):
    """A fresh copy, not set up."""
    return simulated.copy()


@pytest.fixture
def peaks(simulated):
    """The peaks alone, not set up."""
    return simulated["atac"].copy()


@pytest.fixture(scope="session")
def make():
    """Build a small model on data, with batches and cell types unless told otherwise."""

    def build(data, *, setup=None, **kwargs):
        cls = epivi.EpiFoundation
        method = cls.setup_mudata if hasattr(data, "mod") else cls.setup_anndata
        method(data, **({"batch_key": "batch", "labels_key": "cell_type"} | (setup or {})))
        return cls(data, **({"size": "test", "seed": 1, "dropout_rate": 0.1} | kwargs))

    return build


@pytest.fixture(scope="session")
def learn(fit):
    """Train for an epoch of a few steps."""

    def train(model, max_epochs=1, **kwargs):
        return fit(model, max_epochs, **({"batch_size": 16} | kwargs))

    return train


@pytest.fixture(scope="session")
def tune(fit):
    """Fine-tune for an epoch of a few steps."""

    def run(model, task, *args, **kwargs):
        quiet = {"enable_progress_bar": False, "accelerator": "cpu", "logger": False, "batch_size": 16}
        return model.finetune(task, *args, **({"max_epochs": 1} | quiet | kwargs))

    return run


@pytest.fixture(scope="session")
def pretrained(simulated, make, learn):
    """A pretrained model; tests do not change it."""
    return learn(make(simulated.copy()), 2)


@pytest.fixture(scope="session")
def annotated(pretrained, simulated, tune):
    """Fine-tuned on cell types, with 30 cells to calibrate on; tests do not change it."""
    return tune(pretrained, "annotation", simulated.copy(), labels_key="cell_type", train_size=0.5, max_epochs=3)


@pytest.fixture(scope="session")
def expressive(pretrained, simulated, tune):
    """Fine-tuned on expression; tests do not change it."""
    return tune(pretrained, "expression", simulated.copy())


@pytest.fixture(scope="session")
def near(pretrained, simulated, tune):
    """Fine-tuned on expression with a local readout of random weights; tests do not change it."""
    options = {"linear_readout": True, "local_readout_bp": 50_000}
    model = tune(pretrained, "expression", simulated.copy(), model_kwargs=options)
    local, rng = model.module.local, np.random.default_rng(0)
    local.start(rng.normal(size=local.mean.numel()), rng.random(local.mean.numel()), is_used=True)
    return model


@pytest.fixture
def own(pretrained):
    """The pretrained model, to be changed."""
    return own_copy(pretrained)


@pytest.fixture(scope="session")
def copy_of():
    return own_copy


def own_copy(model):
    model = copy.copy(model)
    model.module = copy.deepcopy(model.module)
    return model


@pytest.fixture(scope="session")
def with_row():
    """Change the open peaks of one cell; the rest stays."""

    def change(matrix, row, columns):
        values = matrix.toarray()
        values[row] = 0
        values[row, columns] = 1
        return sparse.csr_matrix(values)

    return change


@pytest.fixture(scope="session")
def build_module():
    """Build a module of any sizes, by default 6 peaks on two chromosomes and 4 genes."""

    def build(*, n_peaks=6, n_genes=4, n_chrom=2, n_batch=1, n_classes=0, size="test", seed=0, links=None, **choices):
        config = EpiFoundationConfig.chosen({"dropout_rate": 0.0} | choices, size=size)
        vocabulary = Vocabulary(
            n_peaks,
            (1000,) * n_chrom,
            torch.arange(n_genes) % (n_chrom + 1),
            100 * torch.arange(n_genes),
            torch.linspace(-1.0, 1.0, n_genes),
            n_batch,
            n_classes,
            links,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return EpiFoundationModule(config, vocabulary).eval()

    return build


@pytest.fixture(scope="session")
def messy():
    """The same counts as a CSR matrix with stored zeros, duplicates, and columns out of order."""

    def change(matrix):
        rng = np.random.default_rng(0)
        parts = []
        for row in sparse.csr_matrix(matrix, dtype=np.float32):
            zeros = rng.integers(0, row.shape[1], 3)
            split = row.data - 1
            indices = np.concatenate([row.indices, row.indices, zeros])
            values = np.concatenate([split, np.ones(row.nnz), np.zeros(3)])
            order = rng.permutation(indices.size)
            parts.append((indices[order], values[order]))
        indptr = np.concatenate([[0], np.cumsum([len(indices) for indices, _ in parts])])
        indices = np.concatenate([indices for indices, _ in parts])
        values = np.concatenate([values for _, values in parts]).astype(np.float32)
        return sparse.csr_matrix((values, indices, indptr), shape=matrix.shape)

    return change
