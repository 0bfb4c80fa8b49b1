"""The latents of tracks go into scanpy like any embedding; the examples of the models run."""

from __future__ import annotations

import doctest
import warnings

import numpy as np
import pytest
import torch
from sklearn.metrics import adjusted_rand_score

import epivi
from epivi._keys import VAR_CHROM, VAR_END, VAR_START

THREADS = torch.get_num_threads()
MODELS = ["ConvNetVAE", "FCVAE"]


@pytest.fixture(scope="module", params=MODELS)
def embedded(request):
    torch.set_num_threads(THREADS)  # numba may have set them to all cores
    adata = epivi.simulate.tracks(90, 144, n_types=3, depth=150, effect_sd=1.5, seed=2)
    cls = getattr(epivi, request.param)
    cls.setup_anndata(adata)
    options = {"kernel_size": 11, "stride": 11} if request.param == "ConvNetVAE" else {}
    model = cls(adata, n_latent=5, n_hidden=32, seed=0, **options)
    model.train(30, batch_size=32, lr=5e-3, train_size=1.0, enable_progress_bar=False, accelerator="cpu", logger=False)
    key = f"X_{request.param.lower()}"
    adata.obsm[key] = model.get_latent_representation()
    return model, adata, key


def test_scanpy_finds_the_cell_types_in_the_latent(embedded):
    import scanpy as sc

    _, adata, key = embedded
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of numba and umap
        sc.pp.neighbors(adata, use_rep=key, n_neighbors=10)
        sc.tl.leiden(adata, resolution=0.3, flavor="igraph", n_iterations=2, directed=False, random_state=0)
        sc.tl.umap(adata, n_components=2, random_state=0)
    assert adata.obsm["X_umap"].shape == (90, 2)
    assert np.isfinite(adata.obsm["X_umap"]).all()
    assert adjusted_rand_score(adata.obs["cell_type"], adata.obs["leiden"]) > 0.8


def test_reconstructed_tracks_go_on_as_an_anndata(embedded):
    import scanpy as sc

    model, adata, _ = embedded
    tracks = model.get_normalized_expression(library_size=1e4, threshold=1.0, modality=["ATAC", "H3K27ac"])
    tracks.obs["cell_type"] = adata.obs["cell_type"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sc.pp.log1p(tracks)
        sc.pp.pca(tracks, n_comps=3)
        sc.tl.rank_genes_groups(tracks, "cell_type", method="t-test", n_genes=3)
    assert tracks.obsm["X_pca"].shape == (90, 3)
    assert {*tracks.uns["rank_genes_groups"]["names"].dtype.names} == {"type_0", "type_1", "type_2"}
    assert {VAR_CHROM, VAR_START, VAR_END, "channel"} <= {*tracks.var}


@pytest.mark.parametrize("name", MODELS)
def test_the_examples_of_the_models_run(name, capsys):
    cls = getattr(epivi, name)
    tests = [test for test in doctest.DocTestFinder(recurse=False).find(cls, name) if test.examples]
    assert len(tests) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        results = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(tests[0])
    assert results.attempted >= 5
    assert results.failed == 0, capsys.readouterr().out
