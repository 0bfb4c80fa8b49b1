from __future__ import annotations

import warnings

import anndata as ad
import mudata as md
import numpy as np
import pandas as pd
import pytest
import torch

import epivi
from epivi.data.tracks.grids import TrackGrid, TrackLayout

N, BINS = 60, 120
MODALITIES = ["H3K27ac", "ATAC", "H3K27me3"]
SMALL = {"n_latent": 4, "n_hidden": 16, "seed": 1}
CONV = {"kernel_size": 5, "stride": 5, "n_filters": (4,)}


@pytest.fixture(params=["ConvNetVAE", "FCVAE"])
def kind(request):
    return request.param


@pytest.fixture(scope="session")
def simulated():
    """60 cells x 3 marks x 120 bins on two chromosomes; two types, two batches that differ."""
    return epivi.simulate.tracks(
        N, n_types=2, n_batches=2, batch_shift=0.5, depth=60, chrom_sizes={"chr1": 72, "chr2": 48}, seed=3
    )


@pytest.fixture(scope="session")
def simulated_missing():
    """As above; 40 % of the cells lack ATAC."""
    return epivi.simulate.tracks(
        N, n_types=2, depth=60, chrom_sizes={"chr1": 72, "chr2": 48}, seed=3, missing={"ATAC": 0.4}
    )


@pytest.fixture
def adata(simulated):
    """A fresh copy, not set up."""
    return simulated.copy()


@pytest.fixture
def incomplete(simulated_missing):
    return simulated_missing.copy()


@pytest.fixture(scope="session")
def make():
    """Build a small model on data, set up with batches unless told otherwise."""

    def build(kind, data, *, setup=None, **kwargs):
        cls = getattr(epivi, kind)
        setup = {"batch_key": "batch"} if setup is None else setup
        (cls.setup_mudata if isinstance(data, md.MuData) else cls.setup_anndata)(data, **setup)
        return cls(data, **(SMALL | (CONV if kind == "ConvNetVAE" else {}) | kwargs))

    return build


@pytest.fixture(scope="session")
def entries():
    """All (or some) cells of a model as one minibatch."""

    def read(model, rows=None):
        return next(model._batches(None, rows, 10_000)[2])

    return read


@pytest.fixture(scope="session")
def forward():
    """Posterior, hidden units and loss of a minibatch, the latent being the mean."""

    def run(module, tensors):
        outputs = module.inference(**module._get_inference_input(tensors), deterministic=True)
        hidden = module.generative(**module._get_generative_input(tensors, outputs))
        return outputs, hidden["hidden"], module.loss(tensors, outputs, hidden)

    return run


@pytest.fixture(scope="session")
def trained_models(simulated, fit):
    """One trained model of each kind; tests do not change them."""
    models = {}
    for kind in ("ConvNetVAE", "FCVAE"):
        cls, data = getattr(epivi, kind), simulated.copy()
        cls.setup_anndata(data, batch_key="batch")
        models[kind] = fit(cls(data, **(SMALL | (CONV if kind == "ConvNetVAE" else {}))), 20, batch_size=16, lr=1e-2)
    return models


@pytest.fixture
def trained(trained_models, kind):
    return trained_models[kind]


@pytest.fixture(scope="session")
def counts():
    """The counts of an AnnData, dense, cells x channels x bins."""

    def dense(adata):
        return adata.obsm["tracks"].toarray().reshape(adata.n_obs, len(adata.uns["tracks"]["channels"]), -1)

    return dense


@pytest.fixture(scope="session")
def grid():
    """A grid of bins of one width: (chromosome, first bin, number of bins), and the end of its last bin."""

    def build(*runs, size=10, ends=None):
        rows = [(chrom, at * size, (at + 1) * size) for chrom, first, n in runs for at in range(first, first + n)]
        frame = pd.DataFrame(rows, columns=["chrom", "start", "end"])
        for chrom, end in (ends or {}).items():
            frame.loc[frame.index[frame["chrom"] == chrom][-1], "end"] = end
        return TrackGrid.from_frame(frame, where="bins", bin_size_bp=size)

    return build


@pytest.fixture(scope="session")
def layout():
    """A layout of channels on grids; without grids, c channels of l bins on one chromosome."""

    def build(n_channels, n_bins=None, grids=None, of_channel=None):
        if grids is None:
            start = np.arange(n_bins) * 10
            grids = [TrackGrid(np.repeat("chr1", n_bins), start, start + 10, 10)]
        of_channel = (0,) * n_channels if of_channel is None else of_channel
        return TrackLayout(tuple(f"m{i}" for i in range(n_channels)), tuple(grids), tuple(of_channel))

    return build


def _modality(grid, counts, names, prefix):
    frame = grid.frame()
    frame.index = prefix + ":" + frame.index
    return ad.AnnData(counts.astype(np.float32), obs=pd.DataFrame(index=names), var=frame)


@pytest.fixture(scope="session")
def two_widths(grid):
    """MuData of 40 cells: 10 kb bins, and 1 kb bins inside them; chromosome 1 ends inside its last bin of 10 kb.

    In half of the cells most counts lie in the fine bins 57 and 100, in the others in the coarse bins 3 and 12.
    """

    def build(prominent=30.0):
        rng = np.random.default_rng(0)
        coarse = grid(("chr1", 0, 10), ("chr2", 0, 4), size=10_000, ends={"chr1": 95_000})
        fine = grid(("chr1", 0, 95), ("chr2", 0, 40), size=1000)
        names = [f"c{i}" for i in range(40)]
        rates = {"wide": np.full((40, 14), 0.5), "narrow": np.full((40, 135), 0.2)}
        rates["wide"][:, [3, 12]] = prominent
        rates["narrow"][:, [57, 100]] = prominent
        parts = {
            name: _modality(part, rng.poisson(rates[name]), names, name)
            for name, part in (("wide", coarse), ("narrow", fine))
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            return md.MuData(parts)

    return build


@pytest.fixture(scope="session")
def as_mudata():
    """The same tracks as a MuData, a modality for each channel."""

    def build(adata, drop=None):
        layout = adata.uns["tracks"]
        dense = adata.obsm["tracks"].toarray().reshape(adata.n_obs, len(layout["channels"]), -1)
        grid = TrackGrid.from_frame(layout["bins"], where="bins")
        parts = {}
        for m, name in enumerate(map(str, layout["channels"])):
            part = _modality(grid, dense[:, m], adata.obs_names, name)
            parts[name] = part if drop is None else part[~drop[:, m]].copy()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            mdata = md.MuData(parts)
        mdata = mdata[adata.obs_names].copy()
        for key in ("batch", "cell_type"):
            mdata.obs[key] = adata.obs[key]
        return mdata

    return build


@pytest.fixture(scope="session")
def n_parameters():
    def count(module):
        return sum(parameter.numel() for parameter in module.parameters())

    return count


@pytest.fixture
def no_dropout():
    return {"dropout_rate": 0.0}


@pytest.fixture(scope="session")
def dense_log_prob():
    """log p(x | z) of each cell and modality by torch.distributions, from logits, counts and masks, float64."""

    def compute(module, hidden, dense_bcl, mask_bc):
        logits = torch.cat(list(module.logits(hidden)), dim=1).double().view(len(hidden), *dense_bcl.shape[1:])
        library = dense_bcl.sum(2, keepdim=True)
        rate = torch.softmax(logits, dim=2) * library
        if module.config.likelihood == "nb":
            theta = module.log_dispersion.double().exp().view(dense_bcl.shape[1:])
            # probability of torch's form: mean = theta p / (1 - p)
            law = torch.distributions.NegativeBinomial(theta.expand_as(rate), logits=rate.log() - theta.log())
        else:
            law = torch.distributions.Poisson(rate, validate_args=False)
        found = law.log_prob(dense_bcl).sum(2)
        return torch.where((mask_bc > 0) & (library[..., 0] > 0), found, 0.0)

    return compute
