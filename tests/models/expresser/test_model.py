"""Training: determinism, splits, saving and loading, resuming, arguments that are refused."""

import anndata as ad
import numpy as np
import pytest
import torch

import epivi
from epivi._errors import ConfigError

QUIET = {"enable_progress_bar": False, "accelerator": "cpu", "logger": False, "batch_size": 16}


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.module.parameters()])


def test_one_seed_gives_one_model_and_another_another(build, make, fit) -> None:
    one, two, other = (fit(make(build(), seed=seed), max_epochs=1) for seed in (1, 1, 2))
    assert torch.equal(weights(one), weights(two))
    assert not torch.equal(weights(one), weights(other))


def test_training_lowers_the_error_and_the_mean_of_genes_is_learned(build, make, fit) -> None:
    model = fit(make(build()), max_epochs=8, lr=3e-3)
    error = model.history["mse_validation"].to_numpy().ravel()
    assert error[-1] < 0.7 * error[0]
    baseline = fit(make(build(), baseline="additive"), max_epochs=1)
    data = baseline.adata[baseline.train_indices]
    x = data.X.toarray()
    values = np.log1p(1e4 * x / x.sum(1, keepdims=True))
    expected = values.sum(0) / np.maximum((x > 0).sum(0), 1)
    expected[(x > 0).sum(0) == 0] = values[x > 0].mean()
    assert np.allclose(baseline.module.gene_mean[1:].numpy(), expected, atol=1e-4)


def test_whole_batches_are_held_out(build, make) -> None:
    model = make(build(), {"batch_key": "batch"})
    model.train(1, split_by="batch", train_size=0.6, **QUIET)
    of = model.adata.obs["batch"].to_numpy()
    assert not set(of[model.train_indices]) & set(of[model.validation_indices])
    assert len(model.train_indices) + len(model.validation_indices) == 40
    with pytest.raises(ConfigError, match="two batches or more"):
        make(build()).train(1, split_by="batch", **QUIET)
    with pytest.raises(ConfigError, match="split_by='batches'"):
        make(build()).train(1, split_by="batches", **QUIET)


def test_a_saved_model_is_the_same_with_and_without_data(trained, tmp_path) -> None:
    trained.save(tmp_path / "model")
    data = ad.AnnData(trained.adata.X, obs=trained.adata.obs[["batch"]], var=trained.adata.var)
    with_data = epivi.Expresser.load(tmp_path / "model", data, accelerator="cpu")
    without = epivi.Expresser.load(tmp_path / "model", adata=False, accelerator="cpu")
    with pytest.raises(ConfigError, match="loaded without data"):
        without.get_latent_representation()
    with pytest.raises(ConfigError, match="loaded without data"):
        without.train(1)
    expected = trained.get_latent_representation(pool="decoder")
    assert np.array_equal(with_data.get_latent_representation(pool="decoder"), expected)
    assert np.array_equal(without.get_latent_representation(data.copy(), pool="decoder"), expected)
    assert without.get_gene_embeddings().equals(trained.get_gene_embeddings())


def test_training_goes_on_where_it_was_stopped(build, make, tmp_path) -> None:
    whole = make(build())
    whole.train(3, **QUIET)
    for _ in range(2):
        model = make(build())
        model.train(3, run_dir=tmp_path / "run", **QUIET)
    assert torch.equal(weights(whole), weights(model))


def test_bad_arguments_are_refused_before_the_data_are_read(counts) -> None:
    with pytest.raises(ConfigError, match="size='papr'"):
        epivi.Expresser(counts, size="papr")
    with pytest.raises(ConfigError, match="mask_rate"):
        epivi.Expresser(counts, mask_rate=2.0)


def test_use_of_the_bins_is_reported(counts, make, caplog) -> None:
    import logging

    with caplog.at_level(logging.INFO, logger="epivi"):
        make(counts)
    share = (counts.X.data == 1).mean()
    assert "of 10 bins" in caplog.text
    assert f"{100 * share:.0f}% are counts of 1" in caplog.text


def test_data_that_were_not_set_up_are_set_up_with_defaults(counts, caplog) -> None:
    model = epivi.Expresser(counts, size="test")
    assert len(model.feature_names) == 60
    assert "Expresser.setup_anndata is called with its defaults" in caplog.text
    assert "genes: 60" in model._model_summary_string


def test_long_cells_are_sampled_in_training_and_read_whole_after_it(build, make, fit) -> None:
    model = fit(make(build(n_genes=120, rate=3.0), max_genes=16), max_epochs=1)
    data = model.training_data(_config(model), 1)
    batch = data.dataset[next(iter(data.make_sampler(0, 1)))]
    assert batch["tokens"].shape[1] == 16
    assert model.impute(mode="all").X.nnz == model.adata.n_obs * 120


def _config(model):
    from epivi.train.config import TrainingConfig

    return TrainingConfig.merged(model.config.training_defaults(10), {"seed": 0, "batch_size": 16})


def test_modules_of_genes_are_found_and_beat_the_additive_prediction(fit, make) -> None:
    adata = epivi.simulate.gene_programs(300, n_genes=40, n_modules=4, mean_counts=6.0, seed=0)
    x = adata.X.toarray()
    mask = (x > 0) & (np.random.default_rng(0).random(x.shape) < 0.1)
    test = np.arange(240, 300)
    model = make(adata[:240].copy(), n_bins=20, mask_rate=0.3, baseline="additive", binning="residual")
    model.train(30, lr=8e-3, **(QUIET | {"batch_size": 24}))
    query = adata[test].copy()
    seen = np.where(mask[test], 0, x[test])
    truth = np.log1p(1e4 * x[test] / seen.sum(1, keepdims=True))
    mean = model.module.gene_mean[1:].numpy()
    shift = np.array([(row[s > 0] - mean[s > 0]).mean() for row, s in zip(truth, seen, strict=True)])
    at = mask[test]
    got = model.impute(query, mask=at).X.toarray()[at]
    additive = (mean + shift[:, None])[at]
    assert ((got - truth[at]) ** 2).mean() < 0.8 * ((additive - truth[at]) ** 2).mean()
    table = model.get_gene_network(top=5)
    module = adata.var["module"]
    same = module.loc[table["gene"]].to_numpy() == module.loc[table["attends_to"]].to_numpy()
    assert same.mean() > 0.6
