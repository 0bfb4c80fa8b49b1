from __future__ import annotations

import logging

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch

import epivi
from epivi._errors import CheckpointError, ConfigError, DataError

MODALITIES = ["H3K27ac", "ATAC", "H3K27me3"]
BINS = 120
STORAGES = ["csr", "csr int64", "dense uint16", "dense float64", "mudata"]


def stored(adata, storage, as_mudata):
    """The same tracks, stored in another way."""
    if storage == "mudata":
        return as_mudata(adata)
    tracks = adata.obsm["tracks"]
    if storage == "csr int64":
        adata.obsm["tracks"] = tracks.astype(np.int64)
    elif storage != "csr":
        adata.obsm["tracks"] = tracks.toarray().reshape(adata.n_obs, 3, -1).astype(storage.split()[1])
    return adata


def test_the_storage_changes_no_bit(kind, simulated, make, fit, as_mudata, same_weights):
    models = [fit(make(kind, stored(simulated.copy(), storage, as_mudata)), 1) for storage in STORAGES]
    for model in models[1:]:
        assert same_weights(models[0], model)
        assert model.history["train_loss"].equals(models[0].history["train_loss"])
        assert model.history["elbo_validation"].equals(models[0].history["elbo_validation"])
        assert np.array_equal(model.get_latent_representation(), models[0].get_latent_representation())
        assert model.get_elbo() == models[0].get_elbo()


def test_cells_that_a_modality_lacks_are_cells_that_are_masked(kind, incomplete, make, fit, as_mudata, same_weights):
    drop = ~incomplete.obsm["tracks_mask"]
    first = fit(make(kind, as_mudata(incomplete, drop)), 1)
    second = fit(make(kind, incomplete.copy()), 1)
    assert second.config.modality_dropout_rate == 0.3
    assert same_weights(first, second)
    assert np.array_equal(first.get_latent_representation(), second.get_latent_representation())


@pytest.mark.parametrize("form", ["anndata", "mudata"])
def test_data_that_were_never_set_up_work_with_the_defaults(kind, adata, fit, as_mudata, caplog, form):
    data = adata if form == "anndata" else as_mudata(adata)
    with caplog.at_level(logging.WARNING, logger="epivi"):
        model = fit(getattr(epivi, kind)(data), 1)
    assert f"{kind}.setup_{form} is called with its defaults" in caplog.text
    assert model.get_latent_representation().shape == (60, 30)
    described = f"{kind} with channels: ['H3K27ac', 'ATAC', 'H3K27me3'], bins: [120], n_latent: 30, likelihood: poisson"
    assert model._model_summary_string.startswith(described)


def test_a_model_needs_data(kind):
    with pytest.raises(ConfigError, match=f"{kind} needs data"):
        getattr(epivi, kind)()


def test_one_seed_gives_bitwise_one_model(kind, simulated, make, fit, same_weights, global_state):
    before = global_state()
    first, second = (fit(make(kind, simulated.copy(), modality_dropout_rate=0.3)) for _ in range(2))
    assert same_weights(first, second)
    assert global_state() == before
    other = make(kind, simulated.copy(), seed=2)
    assert not same_weights(make(kind, simulated.copy()), other)


def test_training_lowers_the_loss_and_tells_the_types_apart(trained, simulated):
    losses = trained.history["elbo_validation"]["elbo_validation"]
    assert losses.iloc[-1] < losses.iloc[0] - 10
    latent = trained.get_latent_representation()
    is_first = (simulated.obs["cell_type"] == "type_0").to_numpy()
    axis = latent[is_first].mean(0) - latent[~is_first].mean(0)
    middle = (latent[is_first].mean(0) + latent[~is_first].mean(0)) / 2
    assert (((latent - middle) @ axis > 0) == is_first).mean() > 0.8


def test_the_latent_of_a_cell_does_not_depend_on_the_others(trained):
    expected = trained.get_latent_representation()
    for size in (1, 7, 60):
        np.testing.assert_allclose(trained.get_latent_representation(batch_size=size), expected, atol=1e-6)
    order = np.random.default_rng(0).permutation(60)
    np.testing.assert_allclose(trained.get_latent_representation(indices=order), expected[order], atol=1e-6)
    permuted = trained.adata[order].copy()
    np.testing.assert_allclose(trained.get_latent_representation(permuted), expected[order], atol=1e-6)
    found = trained.get_normalized_expression(permuted, return_numpy=True)
    np.testing.assert_allclose(found, trained.get_normalized_expression(return_numpy=True)[order], atol=1e-6)


def test_channels_are_matched_by_name(trained, counts):
    """Another order, and a channel that the model does not know."""
    data = trained.adata.copy()
    dense = counts(data)
    data.obsm["tracks"] = np.stack([dense[:, 2], dense[:, 0] * 0 + 5, dense[:, 0], dense[:, 1]], axis=1)
    data.uns["tracks"] = data.uns["tracks"] | {"channels": np.array(["H3K27me3", "new", "H3K27ac", "ATAC"])}
    assert np.array_equal(trained.get_latent_representation(data), trained.get_latent_representation())


def test_data_without_a_modality_are_those_that_read_the_others(trained, counts):
    data = trained.adata.copy()
    data.obsm["tracks"] = counts(data)[:, [2, 0]]
    data.uns["tracks"] = data.uns["tracks"] | {"channels": np.array(["H3K27me3", "H3K27ac"])}
    expected = trained.get_latent_representation(modality=["H3K27ac", "H3K27me3"])
    assert np.array_equal(trained.get_latent_representation(data), expected)
    assert not np.array_equal(expected, trained.get_latent_representation())


def test_other_bins_are_refused(trained):
    data = trained.adata.copy()
    bins = data.uns["tracks"]["bins"].copy()
    bins.loc[bins.index[5], "end"] -= 1
    data.uns["tracks"] = data.uns["tracks"] | {"bins": bins}
    with pytest.raises(DataError, match=r"The bins of channel 'H3K27ac' .* are not those of the trained model"):
        trained.get_latent_representation(data)


def test_one_chromosome_without_gaps_is_the_network_of_the_paper(make, fit, same_weights):
    """Boundaries change nothing where there are none: same weights, bitwise the same outputs."""
    models = []
    for boundaries in ("auto", "none", "chromosome", "gap"):
        data = epivi.simulate.tracks(40, 96, n_types=2, depth=40)
        models.append(fit(make("ConvNetVAE", data, setup={}, boundaries=boundaries), 1))
        assert same_weights(models[0], models[-1])
        assert np.array_equal(models[0].get_latent_representation(), models[-1].get_latent_representation())
    two = epivi.simulate.tracks(40, chrom_sizes=[48, 48], n_types=2, depth=40)
    model = make("ConvNetVAE", two, setup={}, boundaries="auto")
    assert model.geometry.segments == (48, 48)
    assert make("ConvNetVAE", two, setup={}, boundaries="none").geometry.segments == (96,)


def test_scattered_bins_keep_only_chromosomes_apart(adata, make, fit, caplog):
    kept = np.random.default_rng(0).random(120) < 0.5
    tracks = adata.uns["tracks"]
    adata.obsm["tracks"] = adata.obsm["tracks"][:, np.tile(kept, 3)].tocsr()
    adata.uns["tracks"] = dict(tracks) | {"bins": tracks["bins"][kept]}
    with caplog.at_level(logging.WARNING, logger="epivi.models.convnetvae"):
        model = fit(make("ConvNetVAE", adata), 1)
    assert f"The {kept.sum()} bins lie in" in caplog.text
    assert model.geometry.segments == (kept[:72].sum(), kept[72:].sum())


def test_a_chromosome_does_not_reach_the_features_of_another(adata, make, entries):
    """In inference; without boundaries the window at the joint reads both."""
    other = adata.copy()
    dense = other.obsm["tracks"].toarray().reshape(60, 3, 120)
    dense[:, :, :72] = dense[:, :, 71::-1]
    other.obsm["tracks"] = dense
    for boundaries, is_apart in (("chromosome", True), ("none", False)):
        models = [make("ConvNetVAE", data.copy(), boundaries=boundaries, stride=4) for data in (adata, other)]
        features = []
        for model in models:
            tensors = entries(model)
            group = model.module.groups(*(tensors[key] for key in ("x_indptr", "x_indices", "x_values")))[0]
            features.append(model.module.encoder.forward_sparse(group.rows, group.columns, group.values, 60))
        # the last 48 bins are 12 windows
        assert torch.equal(features[0][..., -12:], features[1][..., -12:]) == is_apart


def test_a_saved_model_comes_back(kind, simulated, make, fit, same_weights, tmp_path):
    model = fit(make(kind, simulated.copy(), likelihood="nb", n_layers=2, **two_filters(kind)))
    model.save(tmp_path / "model")
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [
        "manifest.json",
        "metadata.json",
        "weights.safetensors",
    ]
    loaded = getattr(epivi, kind).load(tmp_path / "model", simulated.copy())
    assert same_weights(loaded, model)
    assert loaded.config == model.config or loaded.config.summary() | {"n_filters": None} == model.config.summary() | {
        "n_filters": None
    }
    assert np.array_equal(loaded.get_latent_representation(), model.get_latent_representation())
    assert loaded.get_marginal_ll(n_mc_samples=3) == model.get_marginal_ll(n_mc_samples=3)
    assert loaded.history["train_loss"].equals(model.history["train_loss"])
    without = getattr(epivi, kind).load(tmp_path / "model", adata=False)
    with pytest.raises(ConfigError, match="loaded without data: pass adata="):
        without.get_latent_representation()
    latent = without.get_latent_representation(simulated.copy())
    assert np.array_equal(latent, model.get_latent_representation())
    other = "FCVAE" if kind == "ConvNetVAE" else "ConvNetVAE"
    with pytest.raises(CheckpointError, match=f"holds a {kind}, not a {other}"):
        getattr(epivi, other).load(tmp_path / "model")


def two_filters(kind):
    return {"n_filters": (4, 5)} if kind == "ConvNetVAE" else {}


@pytest.mark.parametrize("fewer", [True, False])
def test_a_model_of_incomplete_cells_loads_with_other_data(kind, incomplete, make, fit, tmp_path, same_weights, fewer):
    """Whether modalities are hidden was decided by the training data, not by those that are attached."""
    model = fit(make(kind, incomplete), 1)
    model.save(tmp_path / "model")
    if fewer:
        other = incomplete[incomplete.obsm["tracks_mask"].all(1)].copy()
    else:
        other = ad.concat([incomplete, incomplete], uns_merge="same", index_unique="-")
        other.uns["tracks"] = incomplete.uns["tracks"]
    loaded = getattr(epivi, kind).load(tmp_path / "model", other)
    assert same_weights(loaded, model)
    assert loaded.config.modality_dropout_rate == 0.3
    rows = np.flatnonzero(incomplete.obsm["tracks_mask"].all(1)) if fewer else np.tile(np.arange(60), 2)
    np.testing.assert_allclose(loaded.get_latent_representation(), model.get_latent_representation()[rows], atol=1e-6)


def test_a_model_of_complete_cells_embeds_more_and_incomplete_ones(trained, simulated_missing, tmp_path):
    trained.save(tmp_path / "model", overwrite=True)
    more = epivi.simulate.tracks(90, n_types=2, n_batches=2, batch_shift=0.5, depth=60, chrom_sizes=[72, 48], seed=4)
    loaded = type(trained).load(tmp_path / "model", more)
    assert loaded.config.modality_dropout_rate == 0.0
    assert loaded.get_latent_representation().shape == (90, 4)
    latent = trained.get_latent_representation(simulated_missing.copy())
    assert np.isfinite(latent).all()


def test_a_saved_mudata_model_comes_back_with_its_data(kind, adata, make, fit, as_mudata, tmp_path):
    model = fit(make(kind, as_mudata(adata), setup={"modalities": {"ac": "H3K27ac", "me3": "H3K27me3"}}), 1)
    assert model.layout.channels == ("ac", "me3")
    model.save(tmp_path / "model", save_anndata=True)
    loaded = getattr(epivi, kind).load(tmp_path / "model")
    assert np.array_equal(loaded.get_latent_representation(), model.get_latent_representation())


def test_finer_bins_train_and_come_back_in_their_columns(kind, two_widths, fit):
    mdata = two_widths()
    model = getattr(epivi, kind)(mdata, **({"kernel_size": 3, "stride": 3} if kind == "ConvNetVAE" else {}))
    fit(model, 30, batch_size=20, lr=2e-2)
    tracks = model.get_normalized_expression(library_size="observed")
    channels = {name: tracks[:, tracks.var["channel"] == name] for name in ("wide", "narrow")}
    assert {name: part.n_vars for name, part in channels.items()} == {"wide": 14, "narrow": 135}
    for name, bins in (("wide", [3, 12]), ("narrow", [57, 100])):
        part = channels[name]
        assert [*part.var["chrom"]] == [*mdata[name].var["chrom"]]
        assert part.var[["start", "end"]].to_numpy().tolist() == mdata[name].var[["start", "end"]].to_numpy().tolist()
        np.testing.assert_allclose(part.X.sum(1), mdata[name].X.sum(1), rtol=1e-4)
        mean = part.X.mean(0)
        assert set(np.argsort(mean)[-2:]) == set(bins)
        assert (mean[bins] > 3 * np.delete(mean, bins).max()).all()


def test_finer_bins_are_read_and_written_where_they_lie(two_widths, entries, forward):
    """The stem sees each fine bin in its common bin; logits of fine bins are phases of their common bin."""
    model = epivi.ConvNetVAE(two_widths(1.0), kernel_size=3, stride=3, modality_dropout_rate=0.2, seed=0)
    module, tensors = model.module, entries(model)
    seen = []
    module.stem.convs["1"].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    _, hidden, _ = forward(module, tensors)
    counts = model.adata["narrow"].X
    inputs = seen[0].numpy()
    assert inputs.shape == (40, 2, 140)
    # the last five places of chromosome 1 hold no bin
    np.testing.assert_allclose(inputs[:, 0, :95], np.log1p(counts[:, :95]), rtol=1e-6)
    assert (inputs[:, 0, 95:100] == 0).all()
    np.testing.assert_allclose(inputs[:, 0, 100:], np.log1p(counts[:, 95:]), rtol=1e-6)
    assert (inputs[:, 1] == 1).all()
    phases = module.decoder(hidden)
    assert phases.shape == (40, 11, 14)
    logits = module.logits(hidden)[0]
    assert torch.equal(logits[:, :14], phases[:, 0])
    for fine, (slot, common) in {0: (0, 0), 57: (7, 5), 94: (4, 9), 95: (0, 10), 134: (9, 13)}.items():
        assert torch.equal(logits[:, 14 + fine], phases[:, 1 + slot, common])


def test_bins_that_do_not_nest_are_for_the_other_model(two_widths, fit):
    mdata = two_widths()
    narrow = mdata["narrow"]
    narrow.var["start"] += 300
    narrow.var["end"] += 300
    narrow.var_names = [f"narrow:{i}" for i in range(narrow.n_vars)]
    with pytest.raises(DataError, match=r"the bins of 'narrow' do not fit.*FCVAE takes modalities with any bins"):
        epivi.ConvNetVAE(mdata)
    assert fit(epivi.FCVAE(mdata), 1).get_latent_representation().shape == (40, 30)


def test_empty_modalities_may_count_as_not_measured(kind, adata, make, entries):
    dense = adata.obsm["tracks"].toarray().reshape(60, 3, 120)
    dense[4, 1] = 0
    adata.obsm["tracks"] = dense
    observed = make(kind, adata.copy())
    masked = make(kind, adata.copy(), setup={"empty": "mask"})
    assert entries(observed)["modality_mask"][4].tolist() == [1, 1, 1]
    assert entries(masked)["modality_mask"][4].tolist() == [1, 0, 1]
    assert (observed.config.modality_dropout_rate, masked.config.modality_dropout_rate) == (0.0, 0.3)


def test_a_mask_in_the_data_is_found(kind, incomplete, make, entries, caplog):
    with caplog.at_level(logging.INFO, logger="epivi"):
        model = make(kind, incomplete)
    assert "read from obsm['tracks_mask']" in caplog.text
    expected = incomplete.obsm["tracks_mask"]
    assert np.array_equal(entries(model)["modality_mask"].numpy() > 0, expected)
    frame = pd.DataFrame(expected, columns=["H3K27ac", "ATAC", "H3K27me3"], index=incomplete.obs_names)
    incomplete.obsm["mine"] = frame[["ATAC", "H3K27me3", "H3K27ac"]]
    model = make(kind, incomplete, setup={"mask_key": "mine"})
    assert np.array_equal(entries(model)["modality_mask"].numpy() > 0, expected)


def test_one_channel_is_enough(kind, fit, make):
    data = epivi.simulate.tracks(40, 96, 1, 2, depth=40)
    model = fit(make(kind, data, setup={}), 1)
    assert model.get_latent_representation().shape == (40, 4)
    assert model.get_normalized_expression().shape == (40, 96)


def test_the_last_training_cells_of_an_epoch_are_never_one(kind, simulated, make, fit):
    """Batch normalisation cannot use a batch of one cell: 57 cells in batches of 8 leave one."""
    model = fit(make(kind, simulated.copy()), 1, batch_size=8, train_size=57 / 60)
    assert np.isfinite(model.history["train_loss"].to_numpy()).all()


def test_the_mask_is_that_of_the_key_of_the_tracks(kind, incomplete, make):
    incomplete.obsm["marks"], incomplete.uns["marks"] = incomplete.obsm.pop("tracks"), incomplete.uns.pop("tracks")
    incomplete.obsm["marks_mask"] = incomplete.obsm["tracks_mask"].copy()
    incomplete.obsm["tracks_mask"][:] = True
    model = make(kind, incomplete, setup={"tracks_key": "marks"})
    np.testing.assert_array_equal(incomplete.obsm["_epivi_tracks_measured"], incomplete.obsm["marks_mask"])
    assert model.config.modality_dropout_rate == 0.3


def test_tracks_of_several_widths_are_taken(kind, adata, make):
    adata.uns["tracks"]["bin_size_bp"] = 0
    assert make(kind, adata).layout.n_bins == [BINS] * 3


def test_a_run_on_other_bins_is_not_resumed(kind, adata, make, fit, tmp_path):
    fit(make(kind, adata), 1, run_dir=tmp_path / "run")
    moved = adata.copy()
    moved.uns["tracks"]["bins"]["start"] += 5
    moved.uns["tracks"]["bins"]["end"] += 5
    with pytest.raises(CheckpointError, match="grids"):
        fit(make(kind, moved), 2, run_dir=tmp_path / "run")


def test_latents_of_some_modalities_warn_where_none_was_hidden_in_training(kind, adata, make, fit, caplog):
    model = fit(make(kind, adata), 1)
    model.get_latent_representation(modality=MODALITIES[0])
    assert "trained without hidden modalities" in caplog.text
