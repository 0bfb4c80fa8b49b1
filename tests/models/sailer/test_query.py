from __future__ import annotations

import copy
import logging

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch

import epivi
from epivi._errors import ConfigError, DataError


@pytest.fixture(scope="module")
def query(simulated):
    """Cells of a batch that the reference has not seen."""
    data = simulated[simulated.obs["batch"] == "batch_0"].copy()
    data.obs["batch"] = pd.Categorical(["new"] * data.n_obs)
    return data


@pytest.fixture
def reference(make, fit):
    return fit(make())


def weights(model):
    return {key: value.clone() for key, value in model.module.state_dict().items()}


def test_a_query_model_embeds_the_cells_of_the_reference_bitwise_as_before(reference, query, simulated, fit):
    expected = reference.get_latent_representation()
    model = epivi.SAILER.load_query_data(query.copy(), reference)
    rows = np.flatnonzero(simulated.obs["batch"] == "batch_0")
    assert np.array_equal(model.get_latent_representation(), reference.get_latent_representation(indices=rows))
    fit(model, 4, plan_kwargs={"lr": 0.1, "n_epochs_kl_cycle": 0})
    assert np.array_equal(model.get_latent_representation(simulated.copy()), expected)
    assert np.array_equal(reference.get_latent_representation(), expected)


@pytest.mark.parametrize("encoder", ["chromosome", "dense", "linear"])
@pytest.mark.parametrize("plan", [{}, {"weight_decay": 0.1}, {"weight_decay": 0.1, "optimizer": "AdamW"}])
def test_training_changes_the_columns_of_the_new_batch_alone(make, query, fit, encoder, plan):
    model = epivi.SAILER.load_query_data(query.copy(), fit(make(encoder=encoder)))
    before = weights(model)
    fit(model, 3, plan_kwargs=plan)
    after = weights(model)
    column = next(k for k, p in model.module.named_parameters() if p is model.module.decoder.condition_layer.weight)
    for key in before:
        if key == column:
            assert torch.equal(before[key][:, :-1], after[key][:, :-1])
            assert (before[key][:, -1] == 0).all()
            assert (after[key][:, -1] != 0).any()
        else:
            assert torch.equal(before[key], after[key]), key


def test_predictions_for_known_batches_stay(reference, query, simulated):
    model = epivi.SAILER.load_query_data(query.copy(), reference)
    for batch in ("batch_0", "batch_1"):
        expected = reference.get_normalized_accessibility(simulated.copy(), transform_batch=batch)
        found = model.get_normalized_accessibility(simulated.copy(), transform_batch=batch)
        pd.testing.assert_frame_equal(found, expected)


def test_new_categories_of_covariates_keep_the_old_columns_in_their_places(simulated, fit):
    data = simulated.copy()
    data.obs["donor"] = pd.Categorical(np.where(np.arange(data.n_obs) % 2, "d1", "d2"))
    keys = {"batch_key": "batch", "categorical_covariate_keys": ["donor"]}
    epivi.SAILER.setup_anndata(data, **keys)
    reference = fit(epivi.SAILER(data, n_latent=3, n_hidden=(8, 6), seed=0))
    unseen = data[:40].copy()
    unseen.obs["donor"] = pd.Categorical(["d3"] * 40)
    unseen.obs["batch"] = pd.Categorical(["new"] * 40)
    model = epivi.SAILER.load_query_data(unseen, reference)
    old, new = (m.module.decoder.condition_layer.weight for m in (reference, model))
    # latent 0-2, depth 3, donors 4-6 (d3 last), batches 7-9 (new last)
    assert torch.equal(new[:, [0, 1, 2, 3, 4, 5, 7, 8]], old)
    assert (new[:, [6, 9]] == 0).all()
    before = new.detach().clone()
    fit(model, 2)
    changed = (model.module.decoder.condition_layer.weight != before).any(0)
    assert changed.nonzero().ravel().tolist() == [6, 9]
    known = data[:40].copy()
    expected = reference.get_normalized_accessibility(known.copy(), transform_batch="observed")
    pd.testing.assert_frame_equal(model.get_normalized_accessibility(known, transform_batch="observed"), expected)


def test_a_reference_with_one_batch_takes_a_second(make, query, simulated, fit):
    data = simulated[simulated.obs["batch"] == "batch_1"].copy()
    reference = fit(make(data))
    model = epivi.SAILER.load_query_data(query.copy(), reference)
    assert model.module.decoder.condition_layer.weight.shape[1] == 4 + 1 + 2
    assert np.array_equal(
        model.get_latent_representation(data.copy()), reference.get_latent_representation(data.copy())
    )
    expected = reference.get_normalized_accessibility(data.copy())
    found = model.get_normalized_accessibility(data.copy(), transform_batch="batch_1")
    pd.testing.assert_frame_equal(found, expected)


def test_unfrozen_all_weights_train(reference, query, fit):
    model = epivi.SAILER.load_query_data(query.copy(), reference, unfrozen=True)
    before = weights(model)
    fit(model)
    after = weights(model)
    assert all(not torch.equal(before[k], after[k]) for k, p in model.module.named_parameters() if p.ndim > 1)


def test_training_fits_the_new_batch(make, simulated, fit):
    """A batch whose foreground share differs is predicted better once its columns are trained."""
    data = simulated[simulated.obs["batch"] == "batch_0"].copy()
    plan = {"n_epochs_kl_cycle": 0, "n_epochs_warmup_reconstruction": 0, "lr": 0.02}
    reference = fit(make(data), 25, batch_size=16, plan_kwargs=plan)
    query = simulated[simulated.obs["batch"] == "batch_1"].copy()
    model = epivi.SAILER.load_query_data(query, reference)
    before = model.get_elbo()
    fit(model, 25, batch_size=16, train_size=1.0, plan_kwargs=plan)
    assert model.get_elbo() > before + 2


def test_the_reference_may_be_a_folder(reference, query, tmp_path):
    reference.save(tmp_path / "reference")
    model = epivi.SAILER.load_query_data(query.copy(), tmp_path / "reference")
    expected = epivi.SAILER.load_query_data(query.copy(), reference)
    assert np.array_equal(model.get_latent_representation(), expected.get_latent_representation())
    assert "new" in model.registry["field_registries"]["batch"]["state_registry"]["categorical_mapping"]


def test_the_reference_stays_as_it_is(reference, query, fit):
    before, registry = (
        weights(reference),
        copy.deepcopy(list(reference.registry["field_registries"]["batch"]["state_registry"]["categorical_mapping"])),
    )
    fit(epivi.SAILER.load_query_data(query.copy(), reference))
    assert all(torch.equal(value, weights(reference)[key]) for key, value in before.items())
    mapping = reference.registry["field_registries"]["batch"]["state_registry"]["categorical_mapping"]
    assert list(mapping) == registry
    assert all(p.requires_grad for p in reference.module.parameters())


def test_depths_of_a_query_are_standardised_by_the_reference(reference, query):
    model = epivi.SAILER.load_query_data(query.copy(), reference)
    for name in ("log_depth_mean", "log_depth_sd"):
        assert torch.equal(getattr(model.module.covariates, name), getattr(reference.module.covariates, name))


def test_a_query_model_comes_back_from_disk(reference, query, fit, tmp_path, same_weights):
    model = fit(epivi.SAILER.load_query_data(query.copy(), reference))
    model.save(tmp_path / "query")
    assert same_weights(model, epivi.SAILER.load(tmp_path / "query", query.copy()))


def test_something_else_than_a_model_is_refused(query, make):
    with pytest.raises(ConfigError, match="must be a SAILER or its folder, found int"):
        epivi.SAILER.load_query_data(query.copy(), 3)


def test_missing_peaks_of_a_query_are_named_with_the_remedy(reference, query):
    with pytest.raises(DataError, match=r"lacks 20 of the 320.*prepare_query_anndata"):
        epivi.SAILER.load_query_data(query[:, 20:].copy(), reference)


def test_an_unknown_batch_is_named_with_the_remedy(reference, query):
    with pytest.raises(DataError, match=r"\['new'\], unknown to the trained model.*load_query_data"):
        reference.get_latent_representation(query.copy())


def test_a_prepared_query_has_the_peaks_of_the_model_in_their_order(reference, query, caplog):
    order = np.random.default_rng(0).permutation(query.n_vars)[:200]
    partial = query[:, order].copy()
    partial.layers["counts"] = partial.X.copy()
    with caplog.at_level(logging.WARNING, logger="epivi"):
        prepared = epivi.SAILER.prepare_query_anndata(partial, reference)
    assert "Only 62 % of the model's peaks are in the query" in caplog.text
    assert prepared.var_names.tolist() == reference.feature_names.tolist()
    assert prepared.obs_names.tolist() == query.obs_names.tolist()
    expected = query.X.toarray()
    expected[:, np.setdiff1d(np.arange(query.n_vars), order)] = 0
    np.testing.assert_array_equal(prepared.X.toarray(), expected)
    np.testing.assert_array_equal(prepared.layers["counts"].toarray(), expected)
    assert epivi.SAILER.load_query_data(prepared, reference).get_latent_representation().shape == (query.n_obs, 4)


def test_a_prepared_query_with_all_peaks_changes_no_latent(reference, query, simulated, tmp_path):
    reference.save(tmp_path / "reference")
    rows = np.flatnonzero(simulated.obs["batch"] == "batch_0")
    prepared = epivi.SAILER.prepare_query_anndata(query[:, ::-1].copy(), tmp_path / "reference")
    found = epivi.SAILER.load_query_data(prepared, reference).get_latent_representation()
    assert np.array_equal(found, reference.get_latent_representation(indices=rows))


def test_a_query_without_common_peaks_is_refused(reference, query):
    foreign = query.copy()
    foreign.var_names = [f"x{i}" for i in range(foreign.n_vars)]
    with pytest.raises(DataError, match="shares none of its 320 peaks with the 320 of the model"):
        epivi.SAILER.prepare_query_anndata(foreign, reference)


def test_a_frozen_query_model_comes_back_frozen(reference, query, fit, tmp_path):
    model = epivi.SAILER.load_query_data(query.copy(), reference)
    model.save(tmp_path / "query")
    loaded = epivi.SAILER.load(tmp_path / "query", query.copy())
    before = weights(loaded)
    fit(loaded, 2)
    changed = {key for key, value in weights(loaded).items() if not torch.equal(value, before[key])}
    assert changed == set(loaded.module.condition_weights)


def test_a_query_with_nothing_to_train_says_so(simulated, make, fit):
    reference = fit(make(use_covariates=False))
    model = epivi.SAILER.load_query_data(simulated.copy(), reference)
    assert model.get_latent_representation().shape[0] == simulated.n_obs
    with pytest.raises(ConfigError, match="All weights are frozen"):
        model.train(max_epochs=1)


def test_cells_of_the_only_batch_of_the_reference_keep_their_outputs(simulated, query, fit):
    data = simulated[simulated.obs["batch"] == "batch_1"].copy()
    data.obs["batch"] = pd.Categorical(["old"] * data.n_obs)
    epivi.SAILER.setup_anndata(data, batch_key="batch")
    reference = fit(epivi.SAILER(data, n_latent=3, n_hidden=(8, 6), seed=0))
    expected = reference.get_normalized_accessibility(return_numpy=True)
    both = ad.concat([data, query])
    both.var = data.var
    model = epivi.SAILER.load_query_data(both, reference)
    fit(model, 3, plan_kwargs={"lr": 0.1, "n_epochs_kl_cycle": 0})
    found = model.get_normalized_accessibility(data.copy(), transform_batch="old", return_numpy=True)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert not np.allclose(
        model.get_normalized_accessibility(data.copy(), transform_batch="new", return_numpy=True), expected
    )


def test_a_query_without_new_batches_has_nothing_to_train(reference, simulated):
    model = epivi.SAILER.load_query_data(simulated.copy(), reference)
    with pytest.raises(ConfigError, match="All weights are frozen"):
        model.train(max_epochs=1)
