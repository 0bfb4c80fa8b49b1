"""Arguments that cannot be used, of constructors, of training and of getters: refused before anything starts."""

from __future__ import annotations

import numpy as np
import pytest
from lightning.pytorch.strategies import DDPStrategy

import epivi
from epivi._errors import ConfigError, DataError, EpiviError

COMMON = {
    "encoder": [("chromosom", "Did you mean 'chromosome'"), ("dens", "'dense'"), (3, "encoder=3"), ([], "encoder")],
    "n_latent": [(0, "at least 1"), (-3, "-3"), (2.5, "2.5 (float)"), ("10", "str"), (True, "bool")],
    "n_hidden": [
        (64, "two numbers"),
        ((64,), "two numbers"),
        ((1, 2, 3), "two"),
        ((0, 5), "n_hidden=0"),
        ("ab", "'ab'"),
    ],
    "dropout_rate": [(1.0, "below 1"), (-0.1, "at least 0"), (np.nan, "finite"), ("0.1", "str")],
    "input_dropout_rate": [(1.0, "below 1"), (-0.1, "at least 0"), (np.inf, "finite")],
    "input_transform": [("tf-idf", "Did you mean 'tfidf'"), ("binarize", "'binary'")],
    "open_weight": [
        (0.0, "above 0"),
        (-1, "above 0"),
        ("atuo", "Did you mean 'auto'"),
        (np.nan, "finite"),
        ([2], "list"),
    ],
    "invariance_weight": [(-0.1, "at least 0"), (np.inf, "finite"), ("1", "str")],
    "information_bound": [("pairwize", "Did you mean 'pairwise'")],
    "loss_preset": [("released", "Did you mean 'released_code'"), ("paper", "'epivi', 'released_code'")],
    "use_covariates": [("yes", "True or False"), (1, "True or False")],
    "batch_norm_momentum": [(0.0, "above 0"), (1.5, "at most 1")],
    "batch_norm_eps": [(0.0, "above 0"), (-1e-5, "above 0")],
    "seed": [(-1, "at least 0"), (1.5, "float"), ("0", "str")],
}
ALIGNMENT = {
    "align_weight": [(-0.1, "at least 0"), (np.nan, "finite"), ("auto", "str")],
    "min_reference_per_batch": [(1, "at least 2"), (2.5, "float")],
    "sampler": [("neighbours", "Did you mean 'neighbors'"), ("random", "'shuffle', 'neighbors'")],
    "fuse_reference": [("yes", "'yes'"), (1, "fuse_reference=1")],
}
TRACKS = {
    "n_latent": COMMON["n_latent"],
    "n_hidden": [(0, "at least 1"), ((4, 3), "tuple"), (2.5, "float"), ("ab", "str")],
    "n_layers": [(0, "at least 1"), (4, "at most 3"), (1.5, "float")],
    "dropout_rate": COMMON["dropout_rate"],
    "likelihood": [("poison", "Did you mean 'poisson'"), ("normal", "'poisson', 'nb'"), (3, "likelihood=3")],
    "modality_dropout_rate": [(1.0, "below 1"), (-0.1, "at least 0"), (np.nan, "finite"), ("0.3", "str")],
    "kl_scale": [(-1, "at least 0"), (np.inf, "finite"), ("1", "str")],
    "batch_norm_momentum": COMMON["batch_norm_momentum"],
    "batch_norm_eps": COMMON["batch_norm_eps"],
    "seed": COMMON["seed"],
}
CONVOLUTIONS = {
    "kernel_size": [(0, "at least 1"), (3, "smaller than stride"), (5.5, "float"), ("31", "str")],
    "stride": [(0, "at least 1"), (32, "smaller than stride"), (True, "bool")],
    "n_filters": [((), "one a layer"), ((4, 4), "one a layer"), (8, "one a layer"), ((0,), "at least 1"), ("4", "'4'")],
    "boundaries": [("gaps", "Did you mean 'gap'"), ("chromosomes", "'chromosome'"), (1, "boundaries=1")],
    "mask_channels": [("yes", "'True', 'False'"), (3, "mask_channels=3")],
}
CONSTRUCTOR = [("SAILER", n, v, w) for n, rows in COMMON.items() for v, w in rows]
CONSTRUCTOR += [("SAILERX", n, v, w) for n, rows in (COMMON | ALIGNMENT).items() for v, w in rows]
CONSTRUCTOR += [("FCVAE", n, v, w) for n, rows in TRACKS.items() for v, w in rows]
CONSTRUCTOR += [("ConvNetVAE", n, v, w) for n, rows in (TRACKS | CONVOLUTIONS).items() for v, w in rows]
KINDS = ["SAILER", "SAILERX", "ConvNetVAE", "FCVAE"]
TRAINING = {
    "max_epochs": [(0, "at least 1"), (-1, "at least 1"), (1.5, "float"), ("10", "str"), (True, "bool")],
    "lr": [(0.0, "above 0"), (-1e-3, "above 0"), (np.nan, "finite"), ("fast", "str")],
    "batch_size": [(1, "at least 2"), (0, "at least 2"), (-8, "at least 2"), (2.5, "float")],
    "train_size": [(0.0, "above 0"), (1.5, "at most 1"), (-0.5, "above 0"), (0.01, "at least 2"), ("all", "str")],
    "validation_size": [(-0.1, "at least 0"), (1.0, "below 1"), (0.5, "exceed 1")],
    "early_stopping": [("yes", "'True', 'False'"), (1, "early_stopping=1")],
    "early_stopping_patience": [(0, "at least 1"), (-1, "at least 1"), (2.5, "float")],
    "seed": [(-1, "at least 0"), (0.5, "float")],
    "plan_kwargs": [
        ({"weight_decay": -1}, "weight_decay=-1"),
        ({"weigth_decay": 0.1}, "Did you mean 'weight_decay'"),
        ({"eps": 0.0}, "eps=0.0"),
        ({"lr_gamma": 1.5}, "lr_gamma=1.5"),
        ({"optimizer": "adamw"}, "Did you mean 'Adam'"),
        ({"kl_cycle_ratio": 2}, "kl_cycle_ratio=2"),
        ({"n_epochs_kl_cycle": -1}, "n_epochs_kl_cycle=-1"),
        ({"n_epochs_warmup_reconstruction": 0.5}, "n_epochs_warmup_reconstruction=0.5"),
        ({"early_stopping_monitor": "loss"}, "'validation_loss'"),
        ({"early_stopping_min_delta": -1}, "early_stopping_min_delta=-1"),
        ({"kl_weight": 1}, "Unknown training argument 'kl_weight'"),
        ([("lr", 1)], "must be a dict"),
        (3, "must be a dict"),
    ],
    "accelerator": [("gpuu", "accelerator='gpuu'"), (3, "accelerator=3")],
    "devices": [(0, "devices=0"), ("x", "devices='x'"), (-3, "devices=-3"), (3, "3 processes without a strategy")],
    "run_dir": [(3, "run_dir=3"), ("FILE", "is a file"), ("FILE/below", "is a file"), ("a\0b", "no path")],
    "save_every_n_steps": [(0, "at least 1"), (-1, "at least 1"), ("a", "str"), (1.5, "float")],
    "num_workers": [(-1, "at least 0"), ("two", "str"), (0.5, "float")],
    "strategy": [
        ("ddpp", "strategy='ddpp'"),
        ("ddp_spawn", "under torchrun with strategy='ddp_find_unused_parameters_true'"),
        ("ddp_fork_find_unused_parameters_true", "starts its processes by 'ddp_fork_find_unused_parameters_true'"),
        ("ddp_notebook", "strategy='ddp_notebook' cannot be used"),
        (
            DDPStrategy(start_method="spawn"),
            "strategy='DDPStrategy' cannot be used: it starts its processes by 'spawn'",
        ),
    ],
    "precision": [("33", "'33'")],
    "limit_train_batches": [(2, "'limit_train_batches' is not valid")],
    "max_epoch": [(3, "Unknown training argument 'max_epoch'. Did you mean 'max_epochs'")],
    "early_stoping": [(True, "Did you mean 'early_stopping'")],
    "verbose": [(True, "Unknown training argument 'verbose'")],
}
BAD_TRAINING = [(name, value, words) for name, rows in TRAINING.items() for value, words in rows]
BAD_GETTERS = {
    "region": (
        lambda m: m.get_normalized_accessibility(region_list=["chr1:0-50"]),
        "'chr1:0-50'.*Did you mean 'chr1:0-500'",
    ),
    "batch": (
        lambda m: m.get_normalized_accessibility(transform_batch="b9"),
        "'b9' is no batch.*Valid are: 'b0', 'b1'",
    ),
    "depth": (lambda m: m.get_normalized_accessibility(library_size="deep"), "found 'deep'"),
    "no depth": (lambda m: m.get_normalized_accessibility(library_size=0), "library_size=0"),
    "threshold": (lambda m: m.get_normalized_accessibility(threshold=2), "threshold=2"),
    "row": (lambda m: m.get_latent_representation(indices=[99]), "holds 99; the data have 40 cells"),
    "mask": (lambda m: m.get_latent_representation(indices=[True]), "mask in indices has shape"),
    "batch size": (lambda m: m.get_latent_representation(batch_size=0), "batch_size=0"),
    "no groups": (lambda m: m.differential_accessibility(), "groupby="),
    "group": (lambda m: m.differential_accessibility(groupby="cell_type", group1="z"), "'z'.*Valid are: 'x', 'y'"),
    "column": (lambda m: m.differential_accessibility(groupby="celltype"), "no entry 'celltype'.*'cell_type'"),
    "no cells": (lambda m: m.differential_accessibility(idx1=[], idx2=[1]), "no cells"),
    "delta": (lambda m: m.differential_accessibility(idx1=[0], delta=2), "delta=2"),
    "samples": (lambda m: m.differential_accessibility(idx1=[0], n_samples=0), "n_samples=0"),
}


def build(name, adata, **arguments):
    kind = getattr(epivi, name)
    kind.setup_anndata(adata, batch_key="batch", **({"reference_key": "X_ref"} if name == "SAILERX" else {}))
    return kind(adata, **({"n_latent": 2, "n_hidden": (4, 3) if name.startswith("SAILER") else 4} | arguments))


@pytest.fixture(scope="module")
def data_of(make_peaks, make_tracks):
    """Makes an AnnData for a kind of model."""
    return lambda name: make_peaks() if name.startswith("SAILER") else make_tracks()


@pytest.fixture(scope="module", params=["SAILER", "SAILERX"])
def trained(request, make_peaks, quiet):
    model = build(request.param, make_peaks())
    model.train(max_epochs=2, **quiet)
    return model


def test_there_are_enough_cases():
    assert min(sum(case[0] == name for case in CONSTRUCTOR) for name in KINDS) >= 30
    assert len(BAD_TRAINING) >= 50


@pytest.mark.parametrize(("model", "name", "value", "words"), CONSTRUCTOR)
def test_arguments_of_the_constructor(data_of, model, name, value, words):
    with pytest.raises(ConfigError) as caught:
        build(model, data_of(model), **{name: value})
    assert name in str(caught.value)
    assert words in str(caught.value)


@pytest.fixture(scope="module", params=KINDS)
def untrained(request, data_of):
    return build(request.param, data_of(request.param))


@pytest.mark.parametrize(("name", "value", "words"), BAD_TRAINING)
def test_arguments_of_the_training(untrained, name, value, words, quiet, no_training, tmp_path):
    (tmp_path / "file").touch()
    if isinstance(value, str) and value.startswith("FILE"):
        value = str(tmp_path / value.replace("FILE", "file"))
    with pytest.raises(ConfigError) as caught:
        untrained.train(**({"max_epochs": 2} | quiet | {name: value}))
    assert words in str(caught.value)
    assert name in str(caught.value) or name == "plan_kwargs"
    assert not untrained.is_trained
    assert not untrained.history
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_encoder_by_chromosome_needs_chromosomes(make_peaks, make_multiome):
    adata = make_peaks()
    adata.var_names = [f"peak{i}" for i in range(adata.n_vars)]
    epivi.SAILER.setup_anndata(adata)
    with pytest.raises(DataError, match=r"encoder='chromosome'.*var\['chrom'\].*encoder='dense'"):
        epivi.SAILER(adata, encoder="chromosome")
    mdata = make_multiome()
    mdata.mod["atac"].var_names = adata.var_names
    epivi.SAILERX.setup_mudata(mdata)
    with pytest.raises(DataError, match="encoder='chromosome'"):
        epivi.SAILERX(mdata, encoder="chromosome")


def test_a_model_needs_data():
    for kind in (getattr(epivi, name) for name in KINDS):
        with pytest.raises(ConfigError, match="needs data"):
            kind()


@pytest.mark.parametrize("name", BAD_GETTERS)
def test_arguments_of_getters(trained, name):
    get, match = BAD_GETTERS[name]
    with pytest.raises(EpiviError, match=match):
        get(trained)


def test_queries_that_cannot_be_used_are_refused(make_peaks, quiet):
    model = build("SAILER", make_peaks())
    model.train(max_epochs=2, **quiet)
    fewer = make_peaks()[:, 3:].copy()
    with pytest.raises(DataError, match=r"lacks 3 of the 96 features.*'chr1:0-500'.*prepare_query_anndata"):
        epivi.SAILER.load_query_data(fewer, model)
    with pytest.raises(DataError, match="lacks 3 of the 96 features"):
        model.get_latent_representation(fewer)
    other = make_peaks()
    other.obs["batch"] = "b7"
    with pytest.raises(DataError, match=r"\['b7'\], unknown to the trained model.*load_query_data"):
        model.get_latent_representation(other)
    genes = make_peaks()
    genes.var_names = [f"g{i}" for i in range(genes.n_vars)]
    with pytest.raises(DataError, match="shares none of its 96 peaks"):
        epivi.SAILER.prepare_query_anndata(genes, model)
    with pytest.raises(ConfigError, match="must be a SAILER or its folder, found int"):
        epivi.SAILER.load_query_data(make_peaks(), 3)
    broken = make_peaks()
    broken.X.data[5] = np.nan
    with pytest.raises(DataError, match=r"adata.X: cell 'c0' \(row 0\), column \d+ holds NaN"):
        model.get_latent_representation(broken)
