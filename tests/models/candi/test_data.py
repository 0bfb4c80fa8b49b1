from __future__ import annotations

import logging

import numpy as np
import pytest

import epivi
from epivi._errors import ConfigError, DataError


def test_the_genome_is_split_by_the_chromosomes_of_the_setup(trained):
    split = trained.genome_split
    assert [part.chromosomes for part in (split.train, split.validation, split.test)] == [["chr1"], ["chr2"], ["chr3"]]
    assert trained.assay_names == ["DNase", "ATAC", "H3K4me3", "H3K27ac"]
    assert trained.runs.total == 1040


def test_by_default_the_smallest_chromosome_is_for_validation(adata, make):
    model = make(adata, setup={"validation_chroms": None, "test_chroms": None})
    assert model.genome_split.validation.chromosomes == ["chr3"]
    assert len(model.genome_split.test) == 0


def means(data, kind):
    """Mean over biosamples, of log1p counts at the median depth of the assay for counts."""
    values, available = data.obsm[kind].astype(np.float64), data.obsm["availability"]
    if kind == "counts":
        depth = np.where(available, data.obsm["depth"], np.nan)
        ratio = np.stack([depth[:, a] / np.median(depth[available[:, a], a]) for a in range(4)], axis=1)
        values = np.log1p(values / np.where(available, ratio, 1.0)[..., None])
    total = np.where(available[..., None], values, 0.0)
    return total, available


@pytest.mark.parametrize("kind", ["counts", "signal"])
def test_the_prior_is_the_mean_of_the_other_training_biosamples(adata, make, kind, caplog):
    setup = {"counts_key": None} if kind == "signal" else {}
    with caplog.at_level(logging.INFO, logger="epivi"):
        model = make(adata, setup=setup, locus_prior=True)
    assert "The mean tracks of 5 training biosamples are stored in varm['locus_prior']" in caplog.text
    total, available = means(adata, kind)
    n = available.sum(0)
    np.testing.assert_allclose(adata.varm["locus_prior"], total.sum(0) / n[:, None], rtol=1e-4, atol=1e-5)
    batch = model.windows(adata)[[[1, 100], [4, 100]]]
    for i, row in enumerate((1, 4)):
        rest = np.delete(total, row, axis=0)[:, :, 100:260].sum(0)
        left = n - available[row]
        assert batch["has_prior"][i].tolist() == (left > 0).tolist()
        np.testing.assert_allclose(batch["prior"][i].T, rest / np.maximum(left, 1)[:, None], rtol=1e-3, atol=1e-4)
    # ATAC was measured in biosample 4 alone: nothing is left for it
    assert batch["has_prior"][1].tolist() == [1, 0, 1, 1]


def test_a_prior_that_is_there_is_taken(adata, make):
    adata.varm["mine"] = np.full((4, 1040), 0.5, dtype=np.float32)
    model = make(adata, setup={"prior_key": "mine"}, locus_prior=True)
    assert "locus_prior" not in adata.varm
    batch = model.windows(adata)[[[0, 0]]]
    # biosample 0 lacks ATAC and H3K27ac: the mean itself
    np.testing.assert_allclose(batch["prior"][0][:, [1, 3]], 0.5)


def test_the_prior_is_of_the_training_biosamples_alone(adata, make):
    adata.obs["split"] = ["train", "train", "train", "validation", "test"]
    make(adata, setup={"split_key": "split"}, locus_prior=True)
    total, available = means(adata, "counts")
    # reference depths are those of the training biosamples too: compare where they cancel
    zero = (np.where(available[..., None], adata.obsm["counts"], 0)[:3].sum(0) == 0) & available[:3].any(0)[:, None]
    assert (adata.varm["locus_prior"][zero] == 0).all()
    assert (adata.varm["locus_prior"][1] == 0).all()
    assert total.shape == (5, 4, 1040)


def test_a_query_without_the_prior_is_told_what_to_do(adata, simulated, make):
    model = make(adata, locus_prior=True)
    model.is_trained_ = True
    query = simulated[:3].copy()
    query.obs_names = ["x", "y", "z"]
    with pytest.raises(DataError, match=r"adata.varm\['locus_prior'\] = trained.varm\['locus_prior'\]"):
        model.impute(adata=query)
    query.varm["locus_prior"] = adata.varm["locus_prior"]
    found = model.impute("chr1", ["ATAC"], adata=query)
    # new biosamples see the mean over all five, so that ATAC of biosample 4 is in it
    assert np.isfinite(found.layers["mean"]).all()
    short = query.copy()
    short.varm["locus_prior"] = adata.varm["locus_prior"][:, :-1]
    with pytest.raises(DataError, match=r"varm\['locus_prior'\] has the shape \(4, 1039\)"):
        model.impute(adata=short)


def test_a_model_without_data_asks_for_them(trained, tmp_path, adata):
    trained.save(tmp_path / "model")
    model = epivi.CANDI.load(tmp_path / "model", adata=False)
    for call in (model.impute, model.denoise, model.evaluate, model.get_latent_representation, model.calibrate):
        with pytest.raises(ConfigError, match="loaded without data: pass adata="):
            call()
    assert model.denoise("chr3", adata=adata).shape == (12, 240)


def test_bins_are_those_of_the_setup_or_not(trained, adata, on_bins):
    assert trained._has_trained_bins(trained.windows(trained.adata))
    other = on_bins(adata, np.arange(1040) < 800)
    trained._validate_anndata(other)
    assert not trained._has_trained_bins(trained.windows(other))
