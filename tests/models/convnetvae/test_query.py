from __future__ import annotations

import numpy as np
import pytest
import torch

import epivi
from epivi._errors import ConfigError, DataError

READERS = {
    "ConvNetVAE": {"join.0.weight", "expand.weight"},
    "FCVAE": {"first_covariates.weight", "expand.weight"},
}
PLANS = [{}, {"weight_decay": 0.1, "optimizer": "AdamW"}]


@pytest.fixture
def query(simulated):
    """Cells of a batch that the reference has not seen, more of them than it has."""
    data = epivi.simulate.tracks(
        80, n_types=2, n_batches=2, batch_shift=0.5, depth=60, chrom_sizes={"chr1": 72, "chr2": 48}, seed=9
    )
    data.obs["batch"] = "new"
    return data


def weights(model):
    return {key: value.clone() for key, value in model.module.state_dict().items()}


@pytest.mark.parametrize("plan", PLANS)
def test_only_the_columns_of_the_new_batch_train(trained, kind, query, simulated, fit, plan):
    expected = trained.get_latent_representation()
    model = type(trained).load_query_data(query, trained)
    before = weights(model)
    assert np.array_equal(model.get_latent_representation(simulated.copy()), expected)
    fit(model, 3, plan_kwargs=plan, lr=0.05)
    after = weights(model)
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    assert changed == READERS[kind] == set(model.module.condition_weights)
    for key in changed:
        assert torch.equal(before[key][:, :-1], after[key][:, :-1])
        assert (before[key][:, -1] == 0).all()
        assert (after[key][:, -1] != 0).any()
    assert np.array_equal(model.get_latent_representation(simulated.copy()), expected)
    assert np.array_equal(trained.get_latent_representation(), expected)
    for batch in ("batch_0", "batch_1"):
        found, before = (
            m.get_normalized_expression(simulated.copy(), transform_batch=batch, return_numpy=True)
            for m in (model, trained)
        )
        assert np.array_equal(found, before)


def test_a_reference_with_one_batch_takes_a_second(kind, simulated, make, fit):
    one = simulated[simulated.obs["batch"] == "batch_0"].copy()
    reference = fit(make(kind, one.copy()), 3, lr=0.01)
    expected = reference.get_latent_representation()
    tracks = reference.get_normalized_expression(return_numpy=True)
    query = simulated[simulated.obs["batch"] == "batch_1"].copy()
    model = getattr(epivi, kind).load_query_data(query, reference)
    np.testing.assert_allclose(model.get_latent_representation(one.copy()), expected, atol=1e-6)
    before = weights(model)
    fit(model, 3, lr=0.05)
    np.testing.assert_allclose(model.get_latent_representation(one.copy()), expected, atol=1e-6)
    found = model.get_normalized_expression(one.copy(), return_numpy=True)
    np.testing.assert_allclose(found, tracks, rtol=1e-4, atol=1e-7)
    changed = {key for key, value in weights(model).items() if not torch.equal(value, before[key])}
    assert changed == READERS[kind]
    for key in changed:
        columns = (weights(model)[key] != before[key]).any(0).nonzero().ravel().tolist()
        assert columns == [before[key].shape[1] - 1]


def test_training_fits_the_new_batch(trained, query, fit):
    model = type(trained).load_query_data(query, trained)
    before = model.get_elbo()
    fit(model, 10, batch_size=16, train_size=1.0, lr=0.05)
    assert model.get_elbo() > before + 2


def test_unfrozen_all_weights_train(trained, query, fit):
    model = type(trained).load_query_data(query, trained, unfrozen=True)
    before = weights(model)
    fit(model)
    after = weights(model)
    assert all(not torch.equal(before[k], after[k]) for k, p in model.module.named_parameters() if p.ndim > 1)


def test_a_query_model_comes_back_from_disk_frozen(trained, kind, query, fit, tmp_path, same_weights):
    trained.save(tmp_path / "reference")
    model = fit(type(trained).load_query_data(query, tmp_path / "reference"))
    model.save(tmp_path / "query")
    loaded = type(trained).load(tmp_path / "query", query.copy())
    assert same_weights(model, loaded)
    assert loaded.batch_categories == ["batch_0", "batch_1", "new"]
    before = weights(loaded)
    fit(loaded, 1)
    assert {key for key, value in weights(loaded).items() if not torch.equal(value, before[key])} == READERS[kind]


def test_new_categories_of_covariates_append_columns(kind, simulated, make, fit):
    data = simulated.copy()
    data.obs["donor"] = np.where(np.arange(60) % 2, "d1", "d2")
    reference = fit(make(kind, data, setup={"batch_key": "batch", "categorical_covariate_keys": ["donor"]}))
    query = simulated.copy()
    query.obs["donor"], query.obs["batch"] = "d3", "new"
    model = getattr(epivi, kind).load_query_data(query, reference)
    start = model.module.condition_weights["expand.weight"]
    old, new = (m.module.expand.weight[:, start:] for m in (reference, model))
    # donors d1, d2, d3, then the two batches and the new one
    assert torch.equal(new[:, [0, 1, 3, 4]], old)
    assert (new[:, [2, 5]] == 0).all()
    known = data.copy()
    del known.uns["_scvi_uuid"]
    assert np.array_equal(model.get_latent_representation(known), reference.get_latent_representation())


def test_a_query_may_lack_a_modality(trained, query, counts, fit):
    query.obsm["tracks"] = counts(query)[:, :2]
    query.uns["tracks"] = dict(query.uns["tracks"]) | {"channels": np.array(["H3K27ac", "ATAC"])}
    model = fit(type(trained).load_query_data(query, trained), 1)
    assert np.isfinite(model.get_latent_representation()).all()
    tracks = model.get_normalized_expression(library_size="observed")
    totals = tracks.to_df().T.groupby(tracks.var["channel"]).sum()
    assert (totals.loc["H3K27me3"] == 0).all()
    assert (totals.loc["ATAC"] > 0).all()


def test_what_is_no_reference_is_refused(trained, kind, query):
    with pytest.raises(ConfigError, match=f"must be a {kind} or its folder, found int"):
        type(trained).load_query_data(query, 3)
    with pytest.raises(DataError, match=r"\['new'\], unknown to the trained model.*load_query_data"):
        trained.get_latent_representation(query)


def test_a_query_with_nothing_to_train_says_so(kind, simulated, make, fit):
    reference = fit(make(kind, simulated.copy(), setup={}), 1)
    model = getattr(epivi, kind).load_query_data(simulated.copy(), reference)
    assert np.array_equal(model.get_latent_representation(), reference.get_latent_representation())
    with pytest.raises(ConfigError, match="All weights are frozen"):
        model.train(max_epochs=1)
