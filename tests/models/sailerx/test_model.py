from __future__ import annotations

import logging

import mudata as md
import numpy as np
import pandas as pd
import pytest
import torch

import epivi
from epivi._errors import ConfigError, DataError
from epivi._keys import BATCH_HAS_REFERENCE, OBS_ALIGN_WEIGHT, OBS_HAS_REFERENCE, OBSM_REFERENCE
from epivi.data.splits import EpochSampler, NeighborSampler, StratifiedSampler
from epivi.models.sailerx.model import reference_neighbors
from epivi.train.config import TrainingConfig


def test_default_data_are_set_up_and_it_is_said(mdata, caplog, fit):
    with caplog.at_level(logging.INFO, logger="epivi"):
        model = epivi.SAILERX(mdata, n_latent=3, n_hidden=(6, 5))
    assert "SAILERX.setup_mudata is called with its defaults" in caplog.text
    assert "The reference embedding is mdata['rna'].obsm['X_pca']" in caplog.text
    assert model.summary_stats.n_batch == 1
    assert fit(model, 1).get_latent_representation().shape == (100, 3)


def test_cells_without_rna_are_embedded_in_the_order_of_the_mudata(make_x, fit, simulated_multiome):
    model = fit(make_x(setup={"batch_key": "batch"}))
    latent = model.get_latent_representation()
    assert latent.shape == (simulated_multiome.n_obs, 4)
    assert model.adata.obs[OBS_HAS_REFERENCE].sum() == 70
    shuffled = simulated_multiome.copy()
    order = np.random.default_rng(0).permutation(shuffled.n_obs)
    # the modality alone is reordered: rows of the result follow mdata.obs_names
    reordered = md.MuData({"atac": shuffled["atac"][order].copy(), "rna": shuffled["rna"][::-1].copy()})
    reordered = reordered[shuffled.obs_names].copy()
    for key in ("batch", "cell_type"):
        reordered.obs[key] = shuffled.obs[key]
    reordered.mod["atac"] = shuffled["atac"][order].copy()
    assert reordered["atac"].obs_names.tolist() != reordered.obs_names.tolist()
    assert reordered.obs_names.tolist() == shuffled.obs_names.tolist()
    np.testing.assert_array_equal(model.get_latent_representation(reordered), latent)
    np.testing.assert_array_equal(reordered.obsm[OBSM_REFERENCE], model.adata.obsm[OBSM_REFERENCE])
    np.testing.assert_allclose(reordered.obs[OBS_ALIGN_WEIGHT], model.adata.obs[OBS_ALIGN_WEIGHT])
    frame = model.get_normalized_accessibility(reordered, region_list=list(model.feature_names[:5]))
    assert frame.index.tolist() == shuffled.obs_names.tolist()


def test_a_model_set_up_on_a_reordered_modality_is_the_same(make_x, fit, simulated_multiome, same_weights):
    first = fit(make_x())
    reordered = simulated_multiome.copy()
    order = np.random.default_rng(1).permutation(reordered.n_obs)
    reordered.mod["atac"] = simulated_multiome["atac"][order].copy()
    assert reordered.obs_names.tolist() == simulated_multiome.obs_names.tolist()
    second = fit(make_x(reordered))
    assert same_weights(first, second)
    np.testing.assert_array_equal(second.get_latent_representation(), first.get_latent_representation())


def test_modalities_may_have_any_name(make_x, fit, simulated_multiome, same_weights):
    renamed = md.MuData({"peaks": simulated_multiome["atac"].copy(), "gex": simulated_multiome["rna"].copy()})
    second = make_x(renamed, setup={"modalities": {"atac": "peaks", "rna": "gex"}})
    assert same_weights(fit(make_x()), fit(second))


@pytest.mark.parametrize(
    ("modalities", "error", "message"),
    [
        ({"atac": "atca"}, DataError, r"no modality 'atca' for 'atac'. Did you mean 'atac'"),
        ({"rna": "gex"}, DataError, r"no modality 'gex' for 'rna'.*modalities=\{'rna': ...\}"),
        ({"peaks": "atac"}, ConfigError, "unknown entry 'peaks'"),
        ({"rna": "atac"}, ConfigError, "names 'atac' twice"),
    ],
)
def test_wrong_modalities_are_named(mdata, modalities, error, message):
    with pytest.raises(error, match=message):
        epivi.SAILERX.setup_mudata(mdata, modalities=modalities)


def test_data_of_the_other_kind_are_refused_with_the_remedy(mdata):
    with pytest.raises(DataError, match=r"found AnnData\. For an AnnData use setup_anndata"):
        epivi.SAILERX.setup_mudata(mdata["atac"].copy())
    with pytest.raises(ConfigError, match="needs reference_key="):
        epivi.SAILERX.setup_anndata(mdata["atac"].copy())
    with pytest.raises(DataError, match=r"adata.obsm has no entry 'X'"):
        epivi.SAILERX.setup_anndata(mdata["atac"].copy(), "X")


def test_cells_without_atac_are_refused_with_the_remedy(simulated_multiome):
    partial = md.MuData({"atac": simulated_multiome["atac"][10:].copy(), "rna": simulated_multiome["rna"].copy()})
    with pytest.raises(DataError, match=r"10 of 100 cells have no 'atac'.*obs_names\]\.copy\(\)"):
        epivi.SAILERX.setup_mudata(partial)


def test_columns_of_obs_may_stand_in_either_place(make_x, fit, simulated_multiome, same_weights):
    inner = simulated_multiome.copy()
    inner.obs = inner.obs.drop(columns=[c for c in inner.obs if c.endswith("batch")])
    outer = simulated_multiome.copy()
    assert "batch" in outer.obs
    first, second = (fit(make_x(data, setup={"batch_key": "batch"})) for data in (inner, outer))
    assert first.summary_stats.n_batch == second.summary_stats.n_batch == 2
    assert same_weights(first, second)


def test_without_references_it_is_sailer_bitwise(make_x, simulated_multiome, small, fit, same_weights):
    model = make_x()
    model.adata.obs[OBS_HAS_REFERENCE] = False
    model.adata.obs[OBS_ALIGN_WEIGHT] = 0.0
    adata = simulated_multiome["atac"].copy()
    epivi.SAILER.setup_anndata(adata)
    plain = epivi.SAILER(adata, **{k: v for k, v in small.items() if k != "min_reference_per_batch"})
    fit(model, 3)
    fit(plain, 3)
    assert same_weights(model, plain)
    assert (model.history["align_loss_train"] == 0).all(axis=None)
    np.testing.assert_array_equal(model.history["train_loss"], plain.history["train_loss"])
    assert np.array_equal(model.get_latent_representation(), plain.get_latent_representation())


def test_a_is_the_weight_per_peak_times_the_peaks(make_x):
    assert make_x(align_weight=0.25).module.align_scale == 0.25 * 320


def test_alignment_lowers_the_distance_of_the_similarities(make_x, simulated_multiome, fit):
    options = {"plan_kwargs": {"lr": 5e-3}, "batch_size": 32}
    aligned = fit(make_x(), 15, **options)
    free = fit(make_x(simulated_multiome.copy(), align_weight=0.0), 15, **options)
    assert aligned.get_alignment_loss() < 0.8 * free.get_alignment_loss()


def test_the_alignment_loss_is_the_mean_over_pairs(make_x, fit):
    model = fit(make_x())
    has = model.adata.obs[OBS_HAS_REFERENCE].to_numpy(dtype=bool)

    def cosines(x):
        unit = x / np.linalg.norm(x, axis=1, keepdims=True)
        return unit @ unit.T

    weight = model.get_alignment_weights()[has]
    difference = cosines(model.adata.obsm[OBSM_REFERENCE][has]) - cosines(model.get_latent_representation()[has])
    pairs = weight[:, None] * weight * difference**2 / has.sum() ** 2
    assert model.get_alignment_loss() == pytest.approx(pairs.sum(), rel=1e-4)
    shares = model.get_alignment_loss(return_per_cell=True)
    np.testing.assert_allclose(shares[has], pairs.sum(1), rtol=1e-3, atol=1e-9)
    assert np.isnan(shares[~has]).all()
    some = model.get_alignment_loss(indices=np.flatnonzero(has)[:20])
    part = slice(0, 20)
    w = weight[part]
    assert some == pytest.approx((w[:, None] * w * difference[part, part] ** 2).sum() / 400, rel=1e-3)
    assert model.get_alignment_loss(indices=~has) == 0.0


def test_a_query_without_rna_is_embedded_as_before(make_x, fit, simulated_multiome, atac_only):
    model = fit(make_x())
    expected = model.get_latent_representation()
    query = atac_only(simulated_multiome, slice(20, 60))
    assert list(query.mod) == ["atac"]
    np.testing.assert_array_equal(model.get_latent_representation(query), expected[20:60])
    assert model.get_alignment_loss(query) == 0.0
    assert not query.obs[OBS_HAS_REFERENCE].any()


def test_a_query_model_without_rna_trains_the_new_batch_alone(make_x, fit, simulated_multiome, atac_only):
    reference = fit(make_x(setup={"batch_key": "batch"}))
    query = atac_only(simulated_multiome, slice(0, 50))
    query["atac"].obs["batch"] = pd.Categorical(["new"] * 50)
    query.update()
    model = epivi.SAILERX.load_query_data(query, reference)
    before = model.module.decoder.condition_layer.weight.detach().clone()
    np.testing.assert_array_equal(model.get_latent_representation(), reference.get_latent_representation()[:50])
    fit(model)
    changed = (model.module.decoder.condition_layer.weight != before).any(0)
    assert changed.nonzero().ravel().tolist() == [before.shape[1] - 1]
    np.testing.assert_array_equal(model.get_latent_representation(), reference.get_latent_representation()[:50])


def test_a_query_with_rna_uses_its_reference(make_x, fit, simulated_multiome):
    model = fit(make_x())
    query = simulated_multiome[:30].copy()
    assert model.get_alignment_loss(query) == pytest.approx(model.get_alignment_loss(indices=range(30)), rel=1e-4)


def test_it_comes_back_from_disk_without_rna(make_x, fit, simulated_multiome, atac_only, tmp_path):
    model = fit(make_x(fuse_reference=True))
    model.save(tmp_path / "model")
    loaded = epivi.SAILERX.load(tmp_path / "model", adata=False)
    query = atac_only(simulated_multiome)
    alone = model.get_latent_representation(query)
    np.testing.assert_array_equal(loaded.get_latent_representation(query.copy()), alone)
    fused = model.get_latent_representation()
    has = model.adata.obs[OBS_HAS_REFERENCE].to_numpy(dtype=bool)
    assert not np.isclose(fused[has], alone[has]).all(axis=1).any()
    np.testing.assert_allclose(fused[~has], alone[~has], rtol=1e-5, atol=1e-6)


def test_another_width_of_the_reference_is_refused_where_it_is_fused_and_taken_elsewhere(
    make_x, fit, simulated_multiome
):
    narrow = simulated_multiome.copy()
    narrow["rna"].obsm["X_pca"] = narrow["rna"].obsm["X_pca"][:, :4]
    fused = fit(make_x(fuse_reference=True), 1)
    with pytest.raises(DataError, match=r"has 4 dimensions.*with 6"):
        fused.get_latent_representation(narrow)
    plain = fit(make_x(simulated_multiome.copy()), 1)
    np.testing.assert_array_equal(plain.get_latent_representation(narrow.copy()), plain.get_latent_representation())


def test_differential_accessibility_finds_the_groups_of_the_mudata(make_x, fit, simulated_multiome):
    found = fit(make_x()).differential_accessibility(groupby="cell_type", n_samples=20)
    names = sorted(simulated_multiome.obs["cell_type"].unique())
    assert found["group1"].unique().tolist() == names
    x = (simulated_multiome["atac"].X > 0).toarray()
    mask = (simulated_multiome.obs["cell_type"] == names[0]).to_numpy()
    first = found[found["group1"] == names[0]].loc[simulated_multiome["atac"].var_names]
    np.testing.assert_allclose(first["emp_effect"], x[~mask].mean(0) - x[mask].mean(0))


def samplers(model, **kwargs):
    config = TrainingConfig(batch_size=20, **kwargs)
    return model.make_sampler(np.arange(model.adata.n_obs), config)


def test_minibatches_hold_enough_referenced_cells(make_x, simulated_multiome):
    mdata = simulated_multiome.copy()
    mdata["rna"].obsm["X_pca"][14:] = np.nan
    model = make_x(mdata, min_reference_per_batch=6)
    sampler = samplers(model)
    assert isinstance(sampler, StratifiedSampler)
    has = model._has_reference()
    assert has.sum() == 14
    counts = [has[rows].sum() for epoch in range(5) for rows in sampler.batches(epoch)]
    assert min(counts) >= 6
    plain = EpochSampler(np.arange(100), 20, 0)
    assert min(has[rows].sum() for epoch in range(5) for rows in plain.batches(epoch)) < 6


def test_paired_cells_are_shuffled_plainly(make_x, simulated_multiome):
    paired = simulated_multiome[simulated_multiome.obs["has_reference"].to_numpy()].copy()
    sampler = samplers(make_x(paired))
    assert type(sampler) is EpochSampler
    assert np.array_equal(np.sort(np.concatenate(sampler.batches(0))), np.arange(70))


def test_half_of_a_minibatch_are_neighbours_of_the_other_half(make_x, fit):
    model = make_x(sampler="neighbors")
    sampler = samplers(model)
    assert isinstance(sampler, NeighborSampler)
    has = model._has_reference()
    for rows in sampler.batches(0):
        for seed, partner in zip(rows[:10], rows[10:], strict=False):
            if has[seed]:
                assert partner in sampler.neighbors[seed]
    assert (sampler.neighbors[~has] == -1).all()
    fit(model, 2)
    assert np.isfinite(model.history["train_loss"].to_numpy()).all()


def test_neighbours_are_those_of_the_training_cells_of_each_training(make_x):
    model = make_x(sampler="neighbors")
    config = TrainingConfig(batch_size=20)
    first, second = np.arange(0, 60), np.arange(20, 70)
    model.make_sampler(first, config)
    sampler = model.make_sampler(second, config)
    assert (sampler.neighbors[60:70] >= 0).all()


def test_neighbours_are_those_of_the_exhaustive_search():
    rng = np.random.default_rng(0)
    x, has = rng.normal(size=(40, 3)), np.ones(40, dtype=bool)
    has[[3, 8]] = False
    rows = np.arange(30)
    found = reference_neighbors(x, has, rows)
    assert found.shape == (40, 15)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    for cell in range(40):
        if cell >= 30 or not has[cell]:
            assert (found[cell] == -1).all()
            continue
        others = [j for j in rows if has[j] and j != cell]
        expected = sorted(others, key=lambda j: -(unit[cell] @ unit[j]))[:15]
        assert set(found[cell]) == set(expected)
    assert (reference_neighbors(x, has & (np.arange(40) == 0), rows) == -1).all()


def test_one_seed_gives_bitwise_the_same_weights(make_x, simulated_multiome, fit, same_weights):
    for choices in ({}, {"sampler": "neighbors"}, {"fuse_reference": True}):
        first, second = (fit(make_x(simulated_multiome.copy(), **choices)) for _ in range(2))
        assert same_weights(first, second)


def test_permuted_cells_give_permuted_latents(make_x, fit, simulated_multiome):
    model = fit(make_x())
    order = np.random.default_rng(1).permutation(100)
    found = model.get_latent_representation(simulated_multiome[order].copy())
    np.testing.assert_allclose(found, model.get_latent_representation()[order], rtol=0, atol=1e-5)


def test_batches_carry_reference_mask_and_weight(make_x):
    model = make_x()
    batch = model.adata_manager.create_torch_dataset()[np.array([99, 0])]
    assert batch[BATCH_HAS_REFERENCE].ravel().tolist() == [0.0, 1.0]
    assert batch["reference"].dtype == torch.float32
    assert not batch["reference"][0].any()
    np.testing.assert_allclose(batch["align_weight"].ravel(), model.get_alignment_weights()[[99, 0]], rtol=1e-6)


def test_an_anndata_with_a_reference_gives_the_same_as_a_mudata(make_x, fit, simulated_multiome, small, same_weights):
    model = make_x()
    adata = simulated_multiome["atac"].copy()
    adata.obsm["ref"] = np.where(
        model.adata.obs[OBS_HAS_REFERENCE].to_numpy()[:, None], model.adata.obsm[OBSM_REFERENCE], np.nan
    )
    adata.obs["n_rna"] = model.adata.obs["_epivi_rna_depth"].to_numpy()
    epivi.SAILERX.setup_anndata(adata, "ref", rna_depth_key="n_rna")
    second = epivi.SAILERX(adata, **small)
    assert same_weights(fit(model), fit(second))
