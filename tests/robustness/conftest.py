from __future__ import annotations

import multiprocessing
from pathlib import Path

import anndata as ad
import mudata as md
import numpy as np
import pandas as pd
import pytest
import torch
from scipy import sparse

N_CELLS, N_PEAKS, N_GENES = 40, 96, 12
QUIET = {"enable_progress_bar": False, "accelerator": "cpu"}
# no warm-up and no cycle: every epoch counts for the best weights
FLAT = {"n_epochs_warmup_reconstruction": 0, "n_epochs_kl_cycle": 0}


def peaks(n_cells: int = N_CELLS, n_peaks: int = N_PEAKS, seed: int = 0) -> ad.AnnData:
    """Counts of peaks on three chromosomes, with batches, covariates, a depth and a reference embedding."""
    rng = np.random.default_rng(seed)
    counts = (rng.random((n_cells, n_peaks)) < 0.3) * rng.integers(1, 4, (n_cells, n_peaks))
    counts[:, 0] = 1
    names = [f"c{i}" for i in range(n_cells)]
    even = np.arange(n_cells) % 2 == 0
    obs = {
        "batch": np.where(even, "b0", "b1"),
        "cell_type": np.where(np.arange(n_cells) % 3 == 0, "x", "y"),
        "donor": np.where(np.arange(n_cells) % 4 < 2, "d0", "d1"),
        "age": rng.normal(size=n_cells),
        "depth": rng.integers(5, 90, n_cells).astype(float),
    }
    var = pd.DataFrame(index=[f"chr{1 + 3 * i // n_peaks}:{1000 * i}-{1000 * i + 500}" for i in range(n_peaks)])
    adata = ad.AnnData(sparse.csr_matrix(counts.astype(np.float32)), obs=pd.DataFrame(obs, index=names), var=var)
    adata.obsm["X_ref"] = rng.normal(size=(n_cells, 5))
    return adata


def multiome(n_cells: int = N_CELLS, n_rna: int | None = None, seed: int = 0) -> md.MuData:
    """Peaks of all cells; gene counts and their embedding of the first three quarters, in another order."""
    atac = peaks(n_cells, seed=seed)
    rng = np.random.default_rng(seed + 1)
    n_rna = 3 * n_cells // 4 if n_rna is None else n_rna
    genes = sparse.csr_matrix(rng.poisson(2.0, (n_rna, N_GENES)).astype(np.float32))
    rna = ad.AnnData(genes, obs=pd.DataFrame(index=[f"c{i}" for i in range(n_rna)][::-1]))
    rna.var_names = [f"g{i}" for i in range(N_GENES)]
    rna.obsm["X_pca"] = rng.normal(size=(n_rna, 5))
    rna.obs["rna_depth"] = rng.integers(20, 60, n_rna).astype(float)
    mdata = md.MuData({"atac": atac, "rna": rna})
    for key in ("batch", "cell_type", "donor", "age"):
        mdata.obs[key] = atac.obs[key].reindex(mdata.obs_names)
    return mdata


def tracks(n_cells: int = N_CELLS, n_bins: int = 48, seed: int = 0) -> ad.AnnData:
    """Counts of three marks in bins of two chromosomes, with a mask, batches and covariates."""
    rng = np.random.default_rng(seed)
    counts = rng.poisson(0.4, (n_cells, 3, n_bins)).astype(np.float32)
    counts[:, :, 0] = 1
    starts = np.concatenate([np.arange(n_bins // 2), np.arange(n_bins - n_bins // 2)]) * 100
    chrom = np.repeat(["chr1", "chr2"], [n_bins // 2, n_bins - n_bins // 2]).astype(object)
    bins = pd.DataFrame({"chrom": chrom, "start": starts, "end": starts + 100})
    bins.index = [f"{c}:{a}-{a + 100}" for c, a in zip(chrom, starts, strict=True)]
    index = np.arange(n_cells)
    obs = {
        "batch": np.where(index % 2 == 0, "b0", "b1"),
        "cell_type": np.where(index % 3 == 0, "x", "y"),
        "donor": np.where(index % 4 < 2, "d0", "d1"),
        "age": rng.normal(size=n_cells),
    }
    adata = ad.AnnData(obs=pd.DataFrame(obs, index=[f"c{i}" for i in index]))
    adata.obsm["tracks"] = sparse.csr_matrix(counts.reshape(n_cells, -1))
    adata.uns["tracks"] = {"channels": np.array(["ac", "atac", "me3"]), "bins": bins, "bin_size_bp": 100}
    return adata


def tracks_mudata(n_cells: int = N_CELLS, n_bins: int = 48, seed: int = 0) -> md.MuData:
    """The same tracks, a modality for each mark."""
    adata = tracks(n_cells, n_bins, seed)
    parts = {}
    for m, name in enumerate(adata.uns["tracks"]["channels"].tolist()):
        var = adata.uns["tracks"]["bins"].copy()
        var.index = f"{name}:" + var.index
        counts = adata.obsm["tracks"][:, m * n_bins : (m + 1) * n_bins]
        parts[name] = ad.AnnData(counts, obs=pd.DataFrame(index=adata.obs_names), var=var)
    mdata = md.MuData(parts)
    for key in adata.obs:
        mdata.obs[key] = adata.obs[key]
    return mdata


def entries(data) -> dict[str, tuple]:
    """Everything of X and the layers, in bits."""
    found = {}
    for name, part in data.mod.items() if hasattr(data, "mod") else [("", data)]:
        for key, matrix in {"X": part.X, **part.layers}.items():
            arrays = [matrix.data, matrix.indices, matrix.indptr] if sparse.issparse(matrix) else [np.asarray(matrix)]
            bits = [array.tolist() if array.dtype == object else array.tobytes() for array in arrays]
            found[f"{name}.{key}"] = (type(matrix), arrays[0].dtype, bits)
    return found


@pytest.fixture(scope="session")
def make_peaks():
    return peaks


@pytest.fixture(scope="session")
def make_multiome():
    return multiome


@pytest.fixture(scope="session")
def make_tracks():
    return tracks


@pytest.fixture(scope="session")
def make_tracks_mudata():
    return tracks_mudata


@pytest.fixture(scope="session")
def entries_of():
    return entries


@pytest.fixture(scope="session")
def quiet():
    return dict(QUIET)


@pytest.fixture(scope="session")
def flat():
    return dict(FLAT)


@pytest.fixture
def no_training(monkeypatch):
    """Fail the test if training starts."""
    monkeypatch.setattr("epivi.models.base_training._fit", lambda *args: pytest.fail("training started"))


@pytest.fixture
def one_thread():
    """Sums of floats in one order, here as in child processes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def same_weights():
    def compare(first, second):
        return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)

    return compare


CHILD = """
import os, runpy, sys, torch
sys.stdout = sys.stderr = open(log, "a", buffering=1)
os.dup2(sys.stderr.fileno(), 2)
torch.set_num_threads(1)
os.environ.update(environment)
runpy.run_path(file, run_name="child")[function](*arguments)
"""


class Child:
    """A process that runs a function of a test file; it starts fast, as a fork of a server which has imported epivi."""

    def __init__(self, function, arguments, log, environment):
        context = multiprocessing.get_context("forkserver")
        values = {"file": function.__code__.co_filename, "function": function.__name__, "arguments": arguments}
        values |= {"log": str(log), "environment": environment or {}}
        self.log = Path(log)
        self.process = context.Process(target=exec, args=(CHILD, values))
        self.process.start()

    @property
    def pid(self) -> int:
        return self.process.pid

    def wait(self, timeout: float = 120.0) -> int:
        """Return the exit code: 0, or minus the signal."""
        self.process.join(timeout)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
            pytest.fail(f"The child did not end in {timeout} s:\n{self.text}")
        return self.process.exitcode

    @property
    def text(self) -> str:
        return self.log.read_text() if self.log.exists() else ""


@pytest.fixture(scope="session")
def preload():
    """What the server of child processes imports, once."""
    modules = [
        "pytest",
        "epivi.cli",
        "epivi.models.sailerx",
        "epivi.models.convnetvae",
        "mudata",
        "torch.distributed.launcher.api",
    ]
    multiprocessing.get_context("forkserver").set_forkserver_preload(modules)


@pytest.fixture
def child(tmp_path, preload):
    """Start functions in child processes; none outlives the test."""
    started = []

    def start(function, *arguments, environment=None):
        started.append(Child(function, arguments, tmp_path / f"child{len(started)}.log", environment))
        return started[-1]

    yield start
    for entry in started:
        if entry.process.is_alive():
            entry.process.kill()
        entry.process.join()
        entry.process.close()
