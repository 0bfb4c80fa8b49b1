"""Defaults that depend on the data and the encoder."""

import logging

import numpy as np
import pytest
import torch

import epivi
from epivi.models.sailer.config import LINEAR_BELOW, SailerConfig
from epivi.models.sailerx.config import SailerxConfig


@pytest.mark.parametrize(
    ("encoder", "has_chromosomes", "open_per_peak", "expected"),
    [
        (None, True, 5.0, "chromosome"),
        (None, False, 5.0, "dense"),
        ("auto", True, LINEAR_BELOW - 1, "linear"),
        ("auto", True, LINEAR_BELOW, "chromosome"),
        ("auto", False, LINEAR_BELOW, "dense"),
        ("dense", True, 5.0, "dense"),
    ],
)
def test_encoder_by_data(encoder, has_chromosomes, open_per_peak, expected) -> None:
    config = SailerConfig.chosen({"encoder": encoder}, has_chromosomes=has_chromosomes, open_per_peak=open_per_peak)
    assert config.encoder == expected


def test_values_of_the_user_win_over_those_of_the_encoder() -> None:
    chosen = {"encoder": "linear", "n_latent": 7, "kl_scale": None, "open_weight": 2.0}
    config = SailerConfig.chosen(chosen, has_chromosomes=True, open_per_peak=1.0)
    assert (config.n_latent, config.kl_scale, config.open_weight, config.input_transform) == (7, 0.1, 2.0, "tfidf")


def test_sailerx_defaults_of_the_linear_encoder() -> None:
    config = SailerxConfig.chosen({"encoder": "linear"}, has_chromosomes=True, open_per_peak=1.0)
    assert (config.n_latent, config.kl_scale, config.align_weight) == (50, 1.0, 2000.0)
    assert config.training_defaults(500)["batch_size"] == 200
    assert SailerxConfig().align_weight == 0.457


def test_sparse_data_are_hinted_at(caplog) -> None:
    adata = epivi.simulate.accessibility([40, 40], n_fg=200, n_bg=200, median=60, clip=(20, 100))
    epivi.SAILER.setup_anndata(adata)
    with caplog.at_level(logging.INFO, logger="epivi"):
        assert epivi.SAILER(adata).config.encoder == "chromosome"
    assert "fewer than the 128 weights a peak" in caplog.text
    model = epivi.SAILER(adata, encoder="auto")
    assert model.config.encoder == "linear"
    assert model.module.config.n_latent == 20


def test_kl_scale_weights_both_kl_terms() -> None:
    adata = epivi.simulate.accessibility([20, 20], n_fg=100, n_bg=100, median=60, clip=(20, 100))
    epivi.SAILER.setup_anndata(adata)
    losses = {}
    for scale in (0.0, 1.0, 2.0):
        module = epivi.SAILER(adata, encoder="dense", n_hidden=(8, 4), kl_scale=scale, seed=3).module
        batch = adata_batch(adata)
        output = module(batch, inference_kwargs={"deterministic": True})[2]
        losses[scale] = (output.loss.item(), output.kl_local["kl_local"].mean().item(), output.extra_metrics)
    kl = losses[1.0][1] + float(losses[1.0][2]["information"])
    assert np.isclose(losses[2.0][0] - losses[1.0][0], kl, rtol=1e-3, atol=1e-3)
    assert np.isclose(losses[1.0][0] - losses[0.0][0], kl, rtol=1e-3, atol=1e-3)


def adata_batch(adata) -> dict[str, torch.Tensor]:
    """All cells as one batch."""
    model = epivi.SAILER(adata, encoder="dense", n_hidden=(8, 4))
    return model.adata_manager.create_torch_dataset()[np.arange(adata.n_obs)]
