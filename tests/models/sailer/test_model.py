from __future__ import annotations

import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import epivi
from epivi._errors import ConfigError, DataError
from epivi._keys import OBS_DEPTH


def binary(n_obs, n_vars, *, n_batch=1, seed=0, chromosomes=None):
    rng = np.random.default_rng(seed)
    obs = pd.DataFrame({"batch": pd.Categorical([f"b{i % n_batch}" for i in range(n_obs)])})
    obs.index = [f"c{i}" for i in range(n_obs)]
    var = pd.DataFrame(index=[f"p{i}" for i in range(n_vars)])
    if chromosomes is not None:
        var["chrom"] = np.repeat([f"chr{j + 1}" for j in range(len(chromosomes))], chromosomes)
    return ad.AnnData(sparse.csr_matrix((rng.random((n_obs, n_vars)) < 0.2).astype(np.float32)), obs=obs, var=var)


def n_parameters(model):
    return sum(p.numel() for p in model.module.parameters())


@pytest.mark.parametrize(("n_batch", "expected"), [(1, 4_211_720), (2, 4_211_920)])
def test_the_dense_network_has_the_papers_parameters(n_batch, expected):
    adata = binary(8, 2000, n_batch=n_batch)
    epivi.SAILER.setup_anndata(adata, batch_key="batch")
    model = epivi.SAILER(adata)
    assert model.config.encoder == "dense"
    assert n_parameters(model) == expected
    assert f"parameters: {expected:,}" in model._model_summary_string


@pytest.mark.parametrize(("n_batch", "expected"), [(1, 167_129), (2, 167_385)])
def test_the_network_by_chromosome_has_the_papers_parameters(n_batch, expected):
    adata = binary(8, 1000, n_batch=n_batch, chromosomes=[400, 300, 200, 100])
    epivi.SAILER.setup_anndata(adata, batch_key="batch")
    model = epivi.SAILER(adata, n_latent=50)
    assert model.config.encoder == "chromosome"
    assert n_parameters(model) == expected


def test_every_covariate_widens_the_decoder_by_its_columns(adata):
    adata.obs["donor"] = pd.Categorical(np.arange(adata.n_obs) % 3)
    adata.obs["age"] = np.linspace(0, 1, adata.n_obs)
    epivi.SAILER.setup_anndata(
        adata, batch_key="batch", categorical_covariate_keys=["donor"], continuous_covariate_keys=["age"]
    )
    model = epivi.SAILER(adata, n_latent=4, n_hidden=(6, 5))
    # latent, depth, age, three donors, two batches
    assert model.module.decoder.condition_layer.weight.shape[1] == 4 + 1 + 1 + 3 + 2


def test_the_automatic_weight_is_that_of_the_density_of_the_data(make, simulated):
    density = (simulated.X > 0).mean()
    assert float(make().module.open_weight) == pytest.approx((1 - density) / density)


def test_defaults_of_the_linear_encoder(make):
    config = make(encoder="linear").config
    assert (config.input_transform, config.input_dropout_rate, config.open_weight) == ("tfidf", 0.75, 1.0)
    config = make(encoder="linear", input_transform="binary", open_weight="auto").config
    assert (config.input_transform, config.input_dropout_rate, config.open_weight) == ("binary", 0.75, "auto")


def test_a_wrong_argument_is_refused_before_the_data_are_touched(adata):
    with pytest.raises(ConfigError, match="encoder='chromosomes'"):
        epivi.SAILER(adata, encoder="chromosomes")
    assert OBS_DEPTH not in adata.obs
    with pytest.raises(ConfigError, match="n_latent"):
        epivi.SAILER(adata, n_latent=0)


def test_an_encoder_by_chromosome_needs_chromosomes():
    adata = binary(6, 40)
    epivi.SAILER.setup_anndata(adata)
    with pytest.raises(DataError, match=r"needs the chromosome of each peak"):
        epivi.SAILER(adata, encoder="chromosome")


@pytest.mark.parametrize("encoder", ["chromosome", "dense", "linear"])
def test_permuted_cells_give_permuted_latents(make, fit, simulated, encoder):
    model = fit(make(encoder=encoder), 1)
    order = np.random.default_rng(1).permutation(simulated.n_obs)
    found = model.get_latent_representation(simulated[order].copy())
    np.testing.assert_allclose(found, model.get_latent_representation()[order], rtol=0, atol=1e-5)


def test_latents_do_not_depend_on_the_batches_they_are_computed_in(make, fit, simulated):
    model = fit(make(), 1)
    expected = model.get_latent_representation()
    for batch_size in (1, 3, 64, 1000):
        np.testing.assert_allclose(model.get_latent_representation(batch_size=batch_size), expected, rtol=0, atol=1e-5)
    chosen = [5, 100, 5, 17]
    np.testing.assert_allclose(model.get_latent_representation(indices=chosen), expected[chosen], rtol=0, atol=1e-5)
    mask = np.arange(simulated.n_obs) % 3 == 0
    np.testing.assert_allclose(model.get_latent_representation(indices=mask), expected[mask], rtol=0, atol=1e-5)
    assert model.get_latent_representation(indices=[]).shape == (0, 4)


@pytest.mark.parametrize("form", ["csc_matrix", "csr_array", "dense", "int8", "counts", "float64", "zeros"])
def test_the_storage_of_the_counts_changes_nothing(make, fit, simulated, form):
    model = fit(make(), 1)
    adata = simulated.copy()
    x = adata.X
    if form == "dense":
        adata.X = x.toarray()
    elif form == "counts":  # only open or closed is read
        adata.X = x * 3
    elif form == "zeros":  # stored zeros are closed
        padded = sparse.csr_matrix(np.ones(x.shape, dtype=x.dtype))
        padded.data[:] = x.toarray().ravel()
        adata.X = padded
    else:
        adata.X = getattr(sparse, form)(x) if hasattr(sparse, form) else x.astype(form)
    assert np.array_equal(model.get_latent_representation(adata), model.get_latent_representation())
    first, second = (fit(make(data), 1) for data in (simulated.copy(), adata))
    assert float(first.module.open_weight) == float(second.module.open_weight)
    assert np.array_equal(first.get_latent_representation(), second.get_latent_representation())


@pytest.mark.parametrize("as_dense", [False, True])
def test_backed_data_give_the_same(make, simulated, fit, same_weights, tmp_path, as_dense):
    stored = simulated.copy()
    if as_dense:
        stored.X = stored.X.toarray()
    stored.write_h5ad(tmp_path / "x.h5ad")
    backed = ad.read_h5ad(tmp_path / "x.h5ad", backed="r")
    first, second = fit(make()), fit(make(backed))
    assert same_weights(first, second)
    assert np.array_equal(first.get_latent_representation(), second.get_latent_representation())
    backed.file.close()


def test_a_layer_is_read_in_place_of_x(make, fit, simulated):
    adata = simulated.copy()
    adata.layers["counts"] = adata.X.copy()
    adata.X = sparse.csr_matrix(adata.shape, dtype=np.float32)
    found = fit(make(adata, setup={"layer": "counts"}), 1).get_latent_representation()
    assert np.array_equal(found, fit(make(simulated.copy()), 1).get_latent_representation())


def test_permuted_peaks_are_matched_by_name_and_extra_ones_dropped(make, fit, simulated):
    model = fit(make(), 1)
    expected, depth = model.get_latent_representation(), model.get_library_size_factors()
    order = np.random.default_rng(2).permutation(simulated.n_vars)
    assert np.array_equal(model.get_latent_representation(simulated[:, order].copy()), expected)
    extra = ad.AnnData(sparse.csr_matrix(np.ones((simulated.n_obs, 7), dtype=np.int32)), obs=simulated.obs.copy())
    extra.var_names = [f"chrZ:{i}-{i + 1}" for i in range(7)]
    wide = ad.concat([extra, simulated], axis=1, merge="first")
    assert wide.n_vars == simulated.n_vars + 7
    assert np.array_equal(model.get_latent_representation(wide), expected)
    assert np.array_equal(model.get_library_size_factors(wide), depth)


def test_missing_peaks_are_named(make, fit, simulated):
    model = fit(make(), 1)
    first = simulated.var_names[4]
    with pytest.raises(DataError, match=rf"adata.X lacks 1 of the 320 features of the trained model: '{first}'"):
        model.get_latent_representation(simulated[:, np.arange(320) != 4].copy())


def test_own_depths_are_used_and_standardised_by_the_training_data(make, fit, simulated):
    adata = simulated.copy()
    adata.obs["n"] = np.linspace(10, 1000, adata.n_obs)
    model = make(adata, setup={"depth_key": "n"})
    np.testing.assert_allclose(model.get_library_size_factors(), adata.obs["n"], rtol=1e-6)
    logs = np.log(adata.obs["n"])
    assert float(model.module.covariates.log_depth_mean) == pytest.approx(logs.mean(), rel=1e-6)
    assert float(model.module.covariates.log_depth_sd) == pytest.approx(logs.std(ddof=0), rel=1e-6)


def test_two_models_on_one_object_keep_their_own_setup(simulated, fit):
    adata = simulated.copy()
    epivi.SAILER.setup_anndata(adata, batch_key="batch")
    first = epivi.SAILER(adata, n_latent=3, n_hidden=(6, 5))
    epivi.SAILER.setup_anndata(adata)
    second = epivi.SAILER(adata, n_latent=3, n_hidden=(6, 5))
    assert (first.summary_stats.n_batch, second.summary_stats.n_batch) == (2, 1)
