"""Shared by the benchmarks of models of tracks: simulation, training, scores of the validation cells."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from _common import QUIET, Scores

if TYPE_CHECKING:
    from anndata import AnnData

CELLS, VALIDATION = 900, 200
EPOCHS = 25
FC = "FC-VAE"
FIXED = {"early_stopping": False, "accelerator": "cpu", "devices": 1}


def conv_name(kernel: int) -> str:
    """Return how tables call a one-layer ConvNet-VAE with K = S."""
    return f"ConvNet-VAE K{kernel} S{kernel}"


def simulate(seed: int, *, quick: bool = False, **options: Any) -> AnnData:
    """Simulate 900 cells of six types in 2,000 bins (a fifth of both if ``quick``)."""
    import epivi

    size = {"n": CELLS // 5, "n_bins": 600} if quick else {"n": CELLS, "n_bins": 2000}
    return epivi.simulate.tracks(**size | {"seed": seed} | options)


def fit(
    adata: AnnData,
    seed: int,
    *,
    kernel: int | None,
    batch_key: str | None = None,
    epochs: int | None = EPOCHS,
    **options: Any,
) -> Any:
    """Train a ConvNet-VAE with K = S = ``kernel``, or an FC-VAE where it is ``None``, with 10 latent dimensions.

    For a fixed number of epochs, or with ``None`` as the models do by default: until the validation ELBO does not
    improve for 50 epochs, at most 300.
    """
    import epivi

    cls = epivi.FCVAE if kernel is None else epivi.ConvNetVAE
    sizes = {} if kernel is None else {"kernel_size": kernel, "stride": kernel}
    cls.setup_anndata(adata, batch_key=batch_key)
    model = cls(adata, n_latent=10, seed=seed, **sizes | options)
    more = FIXED if epochs is not None else FIXED | {"early_stopping": True}
    model.train(max_epochs=epochs, train_size=1 - VALIDATION / CELLS, **QUIET | more)
    return model


def kmeans_ari(values: np.ndarray, labels: np.ndarray, seed: int = 0) -> float:
    """Return the ARI of k-means clusters, as many as labels."""
    from sklearn.cluster import KMeans
    from sklearn.metrics import adjusted_rand_score

    found = KMeans(len(np.unique(labels)), n_init=10, random_state=seed).fit_predict(values)
    return float(adjusted_rand_score(labels, found))


def scores(model: Any) -> Scores:
    """Return ARI and -ELBO of the validation cells, and the ARI of all cells."""
    labels = model.adata.obs["cell_type"].astype(str).to_numpy()
    rows = np.asarray(model.validation_indices)
    values = model.get_latent_representation()
    return {
        "ARI": kmeans_ari(values[rows], labels[rows]),
        "ARI, all cells": kmeans_ari(values, labels),
        "-ELBO": -model.get_elbo(indices=rows),
    }
