from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scvi import settings

import epivi
from epivi._errors import CheckpointError, ConfigError, DataError
from epivi.models.base_saving import data_folder, plain


@pytest.fixture
def trained(make, fit):
    return fit(make())


def saved(model, tmp_path, **kwargs):
    path = tmp_path / "model"
    model.save(path, **kwargs)
    return path


def test_a_model_comes_back_bitwise(trained, simulated, tmp_path, same_weights):
    path = saved(trained, tmp_path)
    loaded = epivi.SAILER.load(path, simulated.copy())
    assert same_weights(trained, loaded)
    assert np.array_equal(loaded.get_latent_representation(), trained.get_latent_representation())
    assert np.array_equal(
        loaded.get_normalized_accessibility(return_numpy=True), trained.get_normalized_accessibility(return_numpy=True)
    )
    assert loaded.is_trained_
    assert loaded.config == trained.config
    for name in ("train_indices", "validation_indices", "test_indices"):
        assert np.array_equal(getattr(loaded, name), getattr(trained, name))


def test_the_history_survives(trained, simulated, tmp_path):
    loaded = epivi.SAILER.load(saved(trained, tmp_path), simulated.copy())
    assert list(loaded.history) == list(trained.history)
    for key, table in trained.history.items():
        pd.testing.assert_frame_equal(loaded.history[key], table, check_index_type=False)


def test_peaks_in_another_order_do_no_harm(trained, simulated, tmp_path):
    path = saved(trained, tmp_path)
    order = np.random.default_rng(0).permutation(simulated.n_vars)
    loaded = epivi.SAILER.load(path, simulated[:, order].copy())
    assert np.array_equal(loaded.get_latent_representation(), trained.get_latent_representation())
    assert loaded.feature_names.tolist() == trained.feature_names.tolist()


def test_a_model_without_data_embeds_data_given_later(trained, simulated, tmp_path):
    path = saved(trained, tmp_path)
    loaded = epivi.SAILER.load(path, adata=False)
    with pytest.raises(ConfigError, match=r"loaded without data: pass adata="):
        loaded.get_latent_representation()
    with pytest.raises(ConfigError, match="load it with adata="):
        loaded.train()
    with pytest.raises(CheckpointError, match="holds no data"):
        loaded.save(tmp_path / "again", save_anndata=True)
    later = simulated[10:40, ::-1].copy()
    assert np.array_equal(loaded.get_latent_representation(later), trained.get_latent_representation()[10:40])
    found = loaded.get_normalized_accessibility(later, transform_batch="batch_1")
    expected = trained.get_normalized_accessibility(indices=range(10, 40), transform_batch="batch_1")
    pd.testing.assert_frame_equal(found, expected)


def test_the_data_can_be_saved_beside_the_model(trained, tmp_path):
    path = saved(trained, tmp_path, save_anndata=True)
    assert (tmp_path / "model.data" / "adata.h5ad").is_file()
    loaded = epivi.SAILER.load(path)
    assert loaded.adata.obs_names.tolist() == trained.adata.obs_names.tolist()
    assert np.array_equal(loaded.get_latent_representation(), trained.get_latent_representation())


def test_a_mudata_can_be_saved_beside_the_model(mdata, fit, tmp_path):
    epivi.SAILERX.setup_mudata(mdata)
    model = fit(epivi.SAILERX(mdata, n_latent=3, n_hidden=(8, 4)), 1, plan_kwargs={"n_epochs_kl_cycle": 0})
    loaded = epivi.SAILERX.load(saved(model, tmp_path, save_anndata=True))
    assert np.array_equal(loaded.get_latent_representation(), model.get_latent_representation())
    assert np.array_equal(loaded.get_alignment_weights(), model.get_alignment_weights())


def test_another_class_is_refused(trained, tmp_path):
    path = saved(trained, tmp_path)
    with pytest.raises(CheckpointError, match=r"holds a SAILER, not a SAILERX: use SAILER.load\(\)"):
        epivi.SAILERX.load(path)


def test_missing_peaks_are_named(trained, simulated, tmp_path):
    with pytest.raises(DataError, match=r"lacks 1 of the 320 features.*" + simulated.var_names[0]):
        epivi.SAILER.load(saved(trained, tmp_path), simulated[:, 1:].copy())


def test_an_existing_folder_is_kept_unless_told(trained, simulated, tmp_path, same_weights):
    path = saved(trained, tmp_path)
    with pytest.raises(CheckpointError, match="overwrite"):
        trained.save(path)
    with torch.no_grad():
        trained.module.encoder.heads.mean.bias += 1.0
    trained.save(path, overwrite=True)
    assert same_weights(epivi.SAILER.load(path, simulated.copy()), trained)


def test_a_loaded_model_trains_on_as_the_one_in_memory(trained, simulated, tmp_path, fit, same_weights, monkeypatch):
    path = saved(trained, tmp_path)
    loaded = epivi.SAILER.load(path, simulated.copy())
    assert same_weights(fit(trained), fit(loaded))


def test_the_seed_is_saved_even_if_it_came_from_scvi(adata, simulated, fit, tmp_path, monkeypatch):
    monkeypatch.setattr(settings, "_seed", 21, raising=False)
    epivi.SAILER.setup_anndata(adata)
    model = epivi.SAILER(adata, n_latent=3, n_hidden=(8, 4))
    model.save(tmp_path / "model")
    monkeypatch.setattr(settings, "_seed", 22, raising=False)
    assert epivi.SAILER.load(tmp_path / "model", simulated.copy()).seed == 21


def test_an_untrained_model_is_loaded_as_untrained(make, simulated, tmp_path):
    loaded = epivi.SAILER.load(saved(make(), tmp_path), simulated.copy())
    assert not loaded.is_trained_
    with pytest.raises(RuntimeError, match="train"):
        loaded.differential_accessibility(groupby="cell_type")


def test_data_folder_lies_beside_the_model():
    assert data_folder(Path("a/b.model")) == Path("a/b.model.data")


def test_plain_turns_nested_values_into_plain_ones():
    value = plain({1: (np.array(["a"], dtype=object), torch.ones(2)), "x": defaultdict(int, b=3), "n": None})
    assert list(value) == ["1", "x", "n"]
    assert value["1"][0].dtype.kind == "U"
    assert isinstance(value["1"][1], np.ndarray)
    assert type(value["x"]) is dict
    assert value["x"] == {"b": 3}
    assert value["n"] is None
