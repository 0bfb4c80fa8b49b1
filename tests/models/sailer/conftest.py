from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import sparse

from epivi._keys import BATCH_DEPTH, BATCH_INDICES, BATCH_INDPTR
from epivi.models.sailer.config import SailerConfig
from epivi.models.sailer.module import SailerModule
from epivi.nn.covariates import DecoderCovariates
from epivi.nn.linear import PeakBlocks

N_CELLS, LATENT, HIDDEN = 7, 3, (6, 4)
CHROMOSOMES = np.array([1, 0, 2, 1, 0, 0, 2, 1, 2, 0, 1, 1])
LOG_MEAN, LOG_SD = 1.25, 0.75


@pytest.fixture
def x_np():
    """Open peaks; the first cell has none, the second a single one."""
    x_np = (np.random.default_rng(4).random((N_CELLS, CHROMOSOMES.size)) < 0.4).astype(float)
    x_np[0] = 0
    x_np[1] = np.arange(CHROMOSOMES.size) == 5
    return x_np


@pytest.fixture
def tensors():
    """Turn open peaks into a batch of two batches, in double precision."""

    def build(x_np):
        rows = sparse.csr_matrix(x_np)
        n = x_np.shape[0]
        return {
            BATCH_INDPTR: torch.from_numpy(rows.indptr.astype(np.int64)),
            BATCH_INDICES: torch.from_numpy(rows.indices.astype(np.int64)),
            BATCH_DEPTH: torch.from_numpy(x_np.sum(1)).unsqueeze(1),
            "batch": (torch.arange(n) % 2).unsqueeze(1),
        }

    return build


@pytest.fixture
def small_module():
    """A module on 12 peaks of three interleaved chromosomes, in double precision."""

    def build(encoder="chromosome", *, open_weight=5.0, frequency=None, mean_open=1.0, n_batch=2, **kwargs):
        config = SailerConfig(encoder=encoder, n_latent=LATENT, n_hidden=HIDDEN, **kwargs)
        blocks = PeakBlocks(CHROMOSOMES) if encoder == "chromosome" else PeakBlocks.tiles(CHROMOSOMES.size, 5)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(8)
            module = SailerModule(
                config,
                blocks,
                DecoderCovariates(LOG_MEAN, LOG_SD, n_batch=n_batch),
                open_weight=open_weight,
                frequency=frequency,
                mean_open=mean_open,
            ).double()
            with torch.no_grad():
                for name, parameter in module.named_parameters():
                    if parameter.ndim == 1 or "bias" in name:
                        parameter.copy_(torch.randn_like(parameter) * 0.3 + ("norm.weight" in name))
        return module

    return build


def _norm(h, norm, *, training):
    mean, var = (h.mean(0), h.var(0, unbiased=False)) if training else (norm.running_mean, norm.running_var)
    return (h - mean) / (var + norm.eps).sqrt() * norm.weight + norm.bias


def _leaky(h):
    return torch.where(h > 0, h, 0.2 * h)


def _prelu(h, slopes):
    return torch.where(h > 0, h, slopes * h)


def _grouped(h, part, n_units, *, training):
    """Batch normalisation and one slope a chromosome."""
    return _prelu(_norm(h, part.norm, training=training), part.activation.weight.repeat_interleave(n_units))


def _encode_chromosomes(net, x_np, *, training):
    order = [np.flatnonzero(j == CHROMOSOMES) for j in range(3)]
    starts = np.cumsum([0, *(part.size for part in order)])
    first = [
        torch.from_numpy(x_np[:, part]) @ net.first.weight[starts[j] : starts[j + 1]] + net.first.bias[j]
        for j, part in enumerate(order)
    ]
    h = _grouped(torch.cat(first, 1), net.first_norm, HIDDEN[0], training=training)
    second = [h[:, j * 6 : (j + 1) * 6] @ net.second.weight[j] + net.second.bias[j, 0] for j in range(3)]
    return _grouped(torch.cat(second, 1), net.second_norm, HIDDEN[1], training=training)


def _decode_chromosomes(net, zc, *, training):
    h = zc @ net.first.weight.t() + net.first.bias
    h = _prelu(_norm(h, net.first_norm[0], training=training), net.first_norm[1].weight)
    second = [h[:, j * 4 : (j + 1) * 4] @ net.second.weight[j] + net.second.bias[j, 0] for j in range(3)]
    h = _grouped(torch.cat(second, 1), net.second_norm, HIDDEN[0], training=training)
    order = [np.flatnonzero(j == CHROMOSOMES) for j in range(3)]
    starts = np.cumsum([0, *(part.size for part in order)])
    logits = h.new_empty(h.shape[0], CHROMOSOMES.size)
    for j, part in enumerate(order):
        rows = slice(starts[j], starts[j + 1])
        logits[:, part] = h[:, j * 6 : (j + 1) * 6] @ net.logits.weight[rows].t() + net.logits.bias[rows]
    return logits


def _dense(h, block, *, training):
    return _leaky(_norm(h @ block[0].weight.t() + block[0].bias, block[1], training=training))


def _encode(module, x_np, *, training):
    net = module.encoder
    if module.config.encoder == "linear":
        out = torch.from_numpy(x_np) @ net.first.weight + net.first.bias
        return out[:, :LATENT], out[:, LATENT:].clamp(-8, 8)
    if module.config.encoder == "dense":
        h = torch.from_numpy(x_np) @ net.first.weight + net.first.bias
        h = _dense(_leaky(_norm(h, net.first_norm[0], training=training)), net.second, training=training)
    else:
        h = _encode_chromosomes(net, x_np, training=training)
    mean, logvar = net.heads.mean, net.heads.logvar
    return h @ mean.weight.t() + mean.bias, (h @ logvar.weight.t() + logvar.bias).clamp(-8, 8)


def _decode(module, zc, *, training):
    net = module.decoder
    if module.config.encoder == "linear":
        return zc @ net.logits.weight.t() + net.logits.bias
    if module.config.encoder == "dense":
        h = _dense(_dense(zc, net.first, training=training), net.second, training=training)
        return h @ net.logits.weight.t() + net.logits.bias
    return _decode_chromosomes(net, zc, training=training)


@pytest.fixture
def dense_forward():
    """The network written out with dense matrices: means, log variances, the latent and the logits."""

    def forward(module, x_np, depth_b, batch_b, noise_bd, *, encoder_input=None, noise_by_variance=False):
        training = module.training
        mean, logvar = _encode(module, x_np if encoder_input is None else encoder_input, training=training)
        z = mean + (logvar.exp() if noise_by_variance else (logvar / 2).exp()) * noise_bd
        depth = ((depth_b.clamp_min(1.0).log() - LOG_MEAN) / LOG_SD).clamp(-5, 5).unsqueeze(1)
        columns = [depth] if module.covariates.n_batch == 1 else [depth, torch.eye(2, dtype=torch.double)[batch_b]]
        covariates = torch.cat(columns, 1)[:, : None if module.config.use_covariates else 0]
        return mean, logvar, z, _decode(module, torch.cat([z, covariates], 1), training=training)

    return forward


@pytest.fixture(scope="session")
def trained(simulated, fit):
    """A small SAILER trained long enough to have learnt depth, batch and types; tests do not change it."""
    import epivi

    data = simulated.copy()
    epivi.SAILER.setup_anndata(data, batch_key="batch")
    model = epivi.SAILER(data, n_latent=4, n_hidden=(16, 8), seed=1)
    plan_kwargs = {"n_epochs_warmup_reconstruction": 10, "n_epochs_kl_cycle": 30, "lr": 1e-2}
    return fit(model, 80, batch_size=32, train_size=1.0, plan_kwargs=plan_kwargs)
