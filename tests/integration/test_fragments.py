"""The whole way from fragment files to a latent and to reconstructed tracks."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import mudata as md
import numpy as np
import pytest
from sklearn.metrics import adjusted_rand_score
from sklearn.mixture import GaussianMixture
from sklearn.model_selection import cross_val_score
from sklearn.neighbors import KNeighborsClassifier

import epivi

DATA = Path(os.environ.get("EPIVI_TEST_DATA", "../shared/data"))
TRAINING = {"early_stopping": False, "enable_progress_bar": False, "accelerator": "cpu", "devices": 1}


def write_fragments(path, counts_nl, bins, cells, rng):
    """Write a fragment for every count, somewhere inside its bin, in no particular order."""
    cell_o, bin_o = (np.repeat(axis, counts_nl[counts_nl > 0]) for axis in np.nonzero(counts_nl))
    start_o = bins["start"].to_numpy()[bin_o] + rng.integers(0, 9_800, size=bin_o.size)
    lines = (
        f"{bins['chrom'].iloc[b]}\t{s}\t{s + 150}\t{cells[c]}\t1\n"
        for c, b, s in zip(cell_o, bin_o, start_o, strict=True)
    )
    with gzip.open(path, "wt") as handle:
        handle.writelines(lines)


def test_from_simulated_fragment_files_to_types(tmp_path):
    truth = epivi.simulate.tracks(120, n_bins=240, n_modalities=2, n_types=3, dense=True, effect_sd=1.5, seed=1)
    bins, rng = truth.uns["tracks"]["bins"], np.random.default_rng(0)
    files = {}
    for m, name in enumerate(truth.uns["tracks"]["channels"]):
        files[str(name)] = tmp_path / f"{name}.tsv.gz"
        write_fragments(files[str(name)], truth.obsm["tracks"][:, m], bins, truth.obs_names, rng)
    sizes = {"chr1": int(bins["end"].max())}
    stacked = epivi.pp.stack_tracks(epivi.pp.fragments(files, sizes, bin_size_bp=10_000), dense=True)
    stacked = stacked[truth.obs_names].copy()
    np.testing.assert_array_equal(stacked.obsm["tracks"], truth.obsm["tracks"])
    epivi.ConvNetVAE.setup_anndata(stacked)
    model = epivi.ConvNetVAE(stacked, n_latent=5, kernel_size=11, stride=11, n_hidden=32, seed=0)
    model.train(max_epochs=60, batch_size=32, **TRAINING)
    found = GaussianMixture(3, random_state=0, n_init=3).fit_predict(model.get_latent_representation())
    assert adjusted_rand_score(truth.obs["cell_type"], found) > 0.8


@pytest.mark.realdata
@pytest.mark.parametrize(
    ("name", "genome", "n_cells", "n_fragments"),
    [("pbmc_small_hg19", "hg19", 150, 29_399), ("heart_multiome_25cells", "hg38", 25, 452_307)],
)
def test_from_real_fragment_files_to_a_latent(name, genome, n_cells, n_fragments):
    path = DATA / "fragments" / f"{name}.fragments.tsv.gz"
    if not path.exists():
        pytest.skip(f"test data not found: set EPIVI_TEST_DATA (missing fragments/{path.name})")
    cells = epivi.pp.fragments(path, genome, bin_size_bp=50_000)
    assert (cells.n_obs, int(cells.X.sum())) == (n_cells, n_fragments)
    stacked = epivi.pp.stack_tracks(md.MuData({"ATAC": cells}))
    selected = epivi.pp.select_bins(stacked, 2_000, by="windows", window=50)
    epivi.ConvNetVAE.setup_anndata(selected)
    model = epivi.ConvNetVAE(selected, n_latent=5, kernel_size=11, stride=11, seed=0)
    assert model.geometry.boundaries == "gap"
    model.train(max_epochs=60, batch_size=32, **TRAINING)
    latent = model.get_latent_representation()
    assert latent.shape == (n_cells, 5)
    assert np.isfinite(latent).all()
    assert model.history["elbo_train"].iloc[-1, 0] < model.history["elbo_train"].iloc[0, 0]
    tracks = model.get_normalized_expression(library_size="observed", return_numpy=True)
    np.testing.assert_allclose(tracks.sum(1), np.asarray(selected.obsm["tracks"].sum(1)).ravel(), rtol=1e-4)
    if name == "pbmc_small_hg19":  # B cells, monocytes and T cells, 50 of each, by the first letter of the barcode
        accuracy = cross_val_score(KNeighborsClassifier(10), latent, selected.obs_names.str[0], cv=5).mean()
        assert accuracy > 0.4
