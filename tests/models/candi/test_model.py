from __future__ import annotations

import logging
import signal as signals

import numpy as np
import pandas as pd
import pytest
import torch

import epivi
from epivi._errors import CheckpointError, ConfigError, TrainingError
from epivi.models.candi.config import CandiConfig
from epivi.train.plan import TrainingPlan

TERMS = ["counts_imputation", "counts_upsampling", "signal_imputation", "signal_upsampling"]


def test_data_that_were_never_set_up_work_with_the_defaults(adata, learn, caplog):
    with caplog.at_level(logging.WARNING, logger="epivi"):
        model = epivi.CANDI(adata)
    assert "CANDI.setup_anndata is called with its defaults" in caplog.text
    assert model.config.n_bins == 240
    assert model.genome_split.validation.chromosomes == ["chr3"]
    described = (
        "CANDI with assays: 4, training biosamples: 5, predicts: counts and signal, DNA: False, window: 240 bins"
    )
    assert model._model_summary_string.startswith(described)
    learn(model, 1)
    assert model.denoise("chr3").shape == (12, 240)


def test_a_model_needs_data():
    with pytest.raises(ConfigError, match="CANDI needs data"):
        epivi.CANDI()


@pytest.mark.parametrize(
    ("choice", "match"),
    [
        ({"size": "tutorail"}, "'tutorial'"),
        ({"head": "papers"}, "head"),
        ({"dispersion": "bin"}, "dispersion"),
        ({"n_bins": 162}, "n_bins=162 is not a multiple"),
        ({"n_heads": 5}, "n_heads=5 does not divide the width 16"),
        ({"thinning": ()}, "thinning must be one factor or more"),
        ({"thinning": 2}, "thinning must be one factor or more"),
        ({"thinning": (0,)}, "thinning=0 is out of range"),
        ({"loss_weighting": "mean"}, "loss_weighting"),
        ({"hide_all_rate": 2.0}, "hide_all_rate=2.0 is out of range"),
        ({"hide_all_rate": 0.1}, "neither DNA nor a prior to predict from"),
        ({"locus_prior": "yes"}, "locus_prior"),
        ({"head": "paper", "locus_prior": True}, "head='paper' normalises"),
        ({"seed": -1}, "seed=-1"),
        ({"max_distance": 0}, "max_distance"),
    ],
)
def test_choices_that_are_not_valid_are_refused(adata, make, choice, match):
    with pytest.raises(ConfigError, match=match):
        make(adata, **choice)


def test_an_unknown_choice_is_an_unexpected_argument(adata, make):
    with pytest.raises(TypeError, match="n_bin"):
        make(adata, n_bin=160)


def test_sizes_and_choices_meet_in_the_configuration(adata, make):
    model = make(adata, n_layers=2, thinning=[1, 3], dispersion="assay-bin")
    expected = CandiConfig.chosen({"n_layers": 2, "thinning": (1, 3), "dispersion": "assay-bin"}, size="test")
    assert model.config == expected
    assert len(model.module.network.transformer.layers) == 2


def test_one_seed_gives_bitwise_one_model(simulated, make, learn, same_weights, global_state):
    before = global_state()
    first, second = (learn(make(simulated.copy())) for _ in range(2))
    assert same_weights(first, second)
    assert first.history["train_loss"].equals(second.history["train_loss"])
    assert global_state() == before
    assert not same_weights(first, learn(make(simulated.copy()), seed=5))


def test_the_number_of_workers_changes_nothing(simulated, make, learn, same_weights):
    first = learn(make(simulated.copy()), 1)
    assert same_weights(first, learn(make(simulated.copy()), 1, num_workers=1))


@pytest.mark.parametrize("at", [5, 8])
def test_an_interrupted_run_goes_on_where_it_was(simulated, make, learn, same_weights, tmp_path, monkeypatch, at):
    options = {"windows_per_epoch": 24, "save_every_n_steps": 1, "early_stopping": False}
    whole = learn(make(simulated.copy()), 2, **options)
    with monkeypatch.context() as patch:
        before = TrainingPlan.training_step

        def press(plan, *args):
            if plan.step == at:
                signals.raise_signal(signals.SIGINT)
            return before(plan, *args)

        patch.setattr(TrainingPlan, "training_step", press)
        learn(make(simulated.copy()), 2, run_dir=tmp_path / "run", **options)
    resumed = learn(make(simulated.copy()), 2, run_dir=tmp_path / "run", **options)
    assert same_weights(whole, resumed)
    assert resumed.history["train_loss"].equals(whole.history["train_loss"])


def test_a_run_with_other_loci_or_data_is_not_resumed(simulated, make, learn, tmp_path):
    starts = 25 * np.arange(0, 400, 2)
    loci = pd.DataFrame({"chrom": "chr1", "start": starts, "end": starts + 25})
    options = {"windows_per_epoch": 8, "run_dir": tmp_path / "run"}
    learn(make(simulated.copy()), 1, loci=loci, **options)
    moved = loci.copy()
    # in the middle, which a printed table leaves out
    moved.loc[100, "end"] += 25
    with pytest.raises(CheckpointError, match="loci"):
        learn(make(simulated.copy()), 2, loci=moved, **options)
    data = simulated.copy()
    data.obsm["counts"][1, 0] += 1
    with pytest.raises(CheckpointError, match="data"):
        learn(make(data), 2, loci=loci, **options)


def test_training_lowers_the_loss_of_all_terms(simulated, make, learn):
    model = learn(make(simulated.copy()), 12, lr=1e-2, early_stopping=False)
    for name in TERMS:
        for part in ("train", "validation"):
            values = model.history[f"{name}_{part}"].to_numpy()
            assert np.isfinite(values).all()
            assert values[-1] < values[0]
    total = sum(model.history[f"{name}_train"].to_numpy() for name in TERMS)
    np.testing.assert_allclose(model.history["train_loss"].to_numpy(), total, rtol=1e-6)
    assert model.history["validation_loss"].to_numpy()[-1] < 0.97 * model.history["validation_loss"].to_numpy()[0]


@pytest.mark.parametrize("kind", ["counts", "signal"])
def test_one_kind_has_two_terms(adata, make, learn, kind):
    other = "signal" if kind == "counts" else "counts"
    model = learn(make(adata, setup={f"{other}_key": None}), 1)
    named = {name for name in model.history if name.split("_")[0] in ("counts", "signal")}
    assert named == {
        f"{kind}_{task}_{part}" for task in ("imputation", "upsampling") for part in ("train", "validation")
    }
    found = model.denoise("chr3")
    assert [name for name in found.layers if name] == ["mean", "median", "var", "lower", "upper"]


def windows_of(model, **asked):
    model._sampling = model._sampling._replace(**asked)
    config = epivi.models.base.TrainingConfig.merged({"seed": 1}, model.config.training_defaults(5), None, {})
    data = model.training_data(config, 1)
    return data, np.concatenate(list(data.make_sampler(0, 1))), np.concatenate(data.validation)


def test_what_trains_and_what_validates_lies_apart(adata, make):
    adata.obs["split"] = ["train", "test", "train", "validation", "train"]
    model = make(adata, setup={"split_key": "split"})
    data, trained, held = windows_of(model)
    assert set(trained[:, 0]) == {0, 2, 4}
    assert set(held[:, 0]) == {3}
    assert (trained[:, 1] + 160 <= 480).all()
    assert ((held[:, 1] >= 480) & (held[:, 1] + 160 <= 800)).all()
    assert [rows.tolist() for rows in data.splits.values()] == [[0, 2, 4], [3], [1]]


def test_validation_without_biosamples_of_its_own_is_on_the_training_ones(adata, make):
    model = make(adata)
    _, _, held = windows_of(model)
    assert held.tolist() == [[row, start] for start in (480, 640) for row in range(5)]
    _, _, few = windows_of(model, max_validation_windows=3)
    assert len(few) == 3


def test_no_chromosome_for_validation_is_no_validation(adata, make, learn):
    model = learn(make(adata, setup={"validation_chroms": []}), 1)
    assert not any("validation" in name for name in model.history)


def test_windows_may_lie_at_loci_of_one_locus_a_minibatch_and_off_the_blacklist(adata, make):
    model = make(adata)
    loci = pd.DataFrame({"chrom": ["chr1", "chr1"], "start": [2000, 9000], "end": [2100, 9050]})
    _, found, _ = windows_of(model, loci=loci)
    assert set(found[:, 0]) == set(range(5))
    for start in found[:, 1]:
        assert start <= 80 < 84 <= start + 160 or start <= 360 < 362 <= start + 160
    data, _, _ = windows_of(model, same_locus=True)
    for items in data.make_sampler(0, 1):
        assert items[:, 0].tolist() == [0, 1, 2, 3, 4]
        assert len(set(items[:, 1])) == 1
    bad = pd.DataFrame({"chrom": ["chr1"], "start": [0], "end": [25 * 100]})
    _, found, _ = windows_of(model, same_locus=False, blacklist=bad, loci="uniform")
    assert (np.maximum(100 - found[:, 1], 0) <= 16).all()


@pytest.mark.parametrize(
    ("asked", "match"),
    [
        ({"loci": "tss"}, "loci='tss' is not valid"),
        ({"windows_per_epoch": 0}, "windows_per_epoch=0"),
        ({"max_validation_windows": 0}, "max_windows=0"),
        ({"batchsize": 3}, "Unknown training argument 'batchsize'"),
    ],
)
def test_unfit_training_arguments_are_refused(adata, make, learn, asked, match):
    with pytest.raises(ConfigError, match=match):
        learn(make(adata), 1, **asked)


def test_a_loss_that_is_not_finite_stops_and_names_the_biosamples(adata, make, learn):
    model = make(adata)
    with torch.no_grad():
        model.module.network.heads["counts"].mean.linear.bias[0] = torch.nan
    with pytest.raises(TrainingError, match=r"loss of step 0 .*not finite.*'biosample_\d'.*are restored"):
        learn(model, 1)


def test_a_biosample_with_one_assay_trains(adata, make, learn):
    adata.obsm["availability"][:] = False
    adata.obsm["availability"][:, 2] = True
    adata.obsm["run_type"][:, 2] = np.maximum(adata.obsm["run_type"][:, 2], 0)
    model = learn(make(adata), 2)
    assert (model.history["counts_imputation_train"].to_numpy() == 0).all()
    assert (model.history["counts_upsampling_train"].to_numpy() > 0).all()
    assert model.denoise("chr3").obs["assay"].tolist() == ["H3K4me3"] * 5
    assert model.impute("chr3").shape == (15, 240)


@pytest.mark.parametrize("choices", [{"locus_prior": True, "skip": True}, {"head": "paper"}, {"max_distance": 3}])
def test_a_saved_model_comes_back(simulated, make, learn, same_weights, assert_same_tracks, tmp_path, choices):
    model = learn(make(simulated.copy(), thin_each_assay=True, **choices), 1)
    model.save(tmp_path / "model", save_anndata=True)
    loaded = epivi.CANDI.load(tmp_path / "model")
    assert same_weights(loaded, model)
    assert loaded.config == model.config
    assert isinstance(loaded.config, CandiConfig)
    assert loaded.history["train_loss"].equals(model.history["train_loss"])
    assert_same_tracks(loaded.impute("chr2"), model.impute("chr2"), atol=0)
    assert_same_tracks(loaded.get_normalized_expression("chr3"), model.get_normalized_expression("chr3"), atol=0)


def test_a_loaded_model_with_other_bins_does_not_train_on_them(trained, adata, on_bins, learn, tmp_path):
    trained.save(tmp_path / "model")
    other = on_bins(adata, np.arange(1040) >= 400)
    loaded = epivi.CANDI.load(tmp_path / "model", other)
    with pytest.raises(ConfigError, match="The data have other bins than those that the model was set up with"):
        learn(loaded, 1)
    assert loaded.denoise("chr1").shape == (12, 80)


def test_a_loaded_model_goes_on_training(trained, adata, learn, same_weights, tmp_path):
    trained.save(tmp_path / "model")
    loaded = epivi.CANDI.load(tmp_path / "model", adata)
    learn(loaded, 1)
    assert not same_weights(loaded, trained)


def test_half_precision_trains_with_clipped_gradients(adata, make, learn):
    model = make(adata)
    learn(model, 1, precision="bf16-mixed")
    assert np.isfinite(model.history["train_loss"].to_numpy(dtype=float)).all()


def test_a_misspelled_argument_of_the_training_is_named(adata, make):
    with pytest.raises(ConfigError, match="Did you mean 'batch_size'"):
        make(adata).train(1, batchsize=4)
