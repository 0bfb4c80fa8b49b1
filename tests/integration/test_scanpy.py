"""The latent goes into scanpy and scib-metrics like any embedding."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from sklearn.metrics import adjusted_rand_score, silhouette_samples

import epivi
from epivi._keys import OBSM_SAILER

THREADS = torch.get_num_threads()


@pytest.fixture(scope="module")
def embedded():
    torch.set_num_threads(THREADS)  # numba may have set them to all cores
    adata = epivi.simulate.accessibility([40, 40, 40], n_fg=240, n_bg=80, median=120, clip=(60, 300), rho=0.8, seed=2)
    epivi.SAILER.setup_anndata(adata)
    model = epivi.SAILER(adata, n_latent=5, n_hidden=(16, 8), seed=0)
    plan = {"lr": 1e-2, "n_epochs_warmup_reconstruction": 10, "n_epochs_kl_cycle": 30}
    model.train(
        60, batch_size=32, train_size=1.0, plan_kwargs=plan, enable_progress_bar=False, accelerator="cpu", logger=False
    )
    adata.obsm[OBSM_SAILER] = model.get_latent_representation()
    return adata


def test_scanpy_finds_the_cell_types_in_the_latent(embedded):
    import scanpy as sc

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of numba and umap
        sc.pp.neighbors(embedded, use_rep=OBSM_SAILER, n_neighbors=10)
        sc.tl.leiden(embedded, resolution=0.3, flavor="igraph", n_iterations=2, directed=False, random_state=0)
        sc.tl.umap(embedded, n_components=2, random_state=0)
    assert embedded.obsm["X_umap"].shape == (120, 2)
    assert np.isfinite(embedded.obsm["X_umap"]).all()
    assert adjusted_rand_score(embedded.obs["cell_type"], embedded.obs["leiden"]) > 0.8


def test_the_silhouette_of_scib_metrics_is_that_of_sklearn(embedded):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of jax
        from scib_metrics import silhouette_label

        labels = embedded.obs["cell_type"].cat.codes.to_numpy()
        found = silhouette_label(embedded.obsm[OBSM_SAILER], labels, rescale=False)
    expected = silhouette_samples(embedded.obsm[OBSM_SAILER], labels).mean()
    assert found == pytest.approx(expected, rel=1e-3)
    assert found > 0.3


def test_denoised_accessibility_goes_on_as_an_anndata(embedded):
    import scanpy as sc

    model = epivi.SAILER(embedded, n_latent=2, n_hidden=(4, 3))
    model.is_trained_ = True
    denoised = model.get_normalized_accessibility(threshold=0.05)
    denoised.obs = embedded.obs[["cell_type"]].copy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sc.pp.pca(denoised, n_comps=3)
    assert denoised.obsm["X_pca"].shape == (120, 3)
    assert denoised.var_names.tolist() == embedded.var_names.tolist()
