"""``epivi fit``: train a model from a file, and go on with a run that was stopped."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from epivi._errors import ConfigError, DataError
from epivi._keys import MOD_ATAC, MOD_RNA
from epivi.cli_files import modality, read, replace
from epivi.train._atomic import check_folder
from epivi.train.config import TrainingConfig

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping

    from anndata import AnnData
    from mudata import MuData

    from epivi.models.convnetvae import FCVAE, ConvNetVAE
    from epivi.models.sailer import SAILER


class _Options(NamedTuple):
    """Options that only some models have: those of the setup, and those of the constructor."""

    setup: tuple[str, ...]
    init: tuple[str, ...]


_OF_TRACKS = ("tracks_key", "modalities", "layer", "mask_key")
_OPTIONS = {
    "sailer": _Options(("layer", "atac"), ("encoder", "n_latent")),
    "sailerx": _Options(("layer", "atac", "rna", "reference_key"), ("encoder", "n_latent")),
    "convnetvae": _Options(_OF_TRACKS, ("n_latent", "n_layers", "kernel_size", "stride", "likelihood")),
    "fcvae": _Options(_OF_TRACKS, ("n_latent", "n_layers", "likelihood")),
}
_TEXTS = {
    "layer": "layer of the counts; X by default",
    "batch-key": "obs column with batches",
    "labels-key": "obs column with cell types",
    "atac": "name of the ATAC modality",
    "rna": "name of the RNA modality",
    "reference-key": "obsm key of the RNA modality with the reference embedding",
    "tracks-key": "obsm key of the tracks of an .h5ad; tracks by default",
    "mask-key": "obsm key with the measured modalities of each cell",
    "encoder": "chromosome, dense, linear or auto, which is the default",
    "likelihood": "poisson or nb",
}
_NUMBERS = {
    "n-latent": "latent dimensions",
    "n-layers": "layers of the network",
    "kernel-size": "bins of a kernel",
    "stride": "bins from a kernel to the next",
    "max-epochs": "passes over the training cells",
    "batch-size": "cells of a step",
    "save-every-n-steps": "save the state of the run inside epochs too",
}
_TRAINING = ("max_epochs", "batch_size", "lr", "save_every_n_steps")


def add_fit(parser: argparse.ArgumentParser) -> None:
    """Give a parser the arguments of ``epivi fit``, and :func:`fit` as what it runs.

    Parameters
    ----------
    parser
        Parser of the command.

    Examples
    --------
    >>> import argparse
    >>> parser = argparse.ArgumentParser()
    >>> add_fit(parser)
    >>> parser.parse_args(["sailer", "x.h5ad", "--out", "y"]).seed
    0
    """
    parser.add_argument("model", choices=list(_OPTIONS))
    parser.add_argument("file", type=Path, help=".h5ad (sailer, convnetvae, fcvae) or .h5mu (all; sailer reads --atac)")
    parser.add_argument("--out", type=Path, required=True, help="folder of the run, the model and the latent")
    for name, text in _TEXTS.items():
        parser.add_argument(f"--{name}", help=text + _whose(name))
    parser.add_argument(
        "--modalities", nargs="+", help="modalities of an .h5mu to read; all by default" + _whose("modalities")
    )
    for name, text in _NUMBERS.items():
        parser.add_argument(f"--{name}", type=int, help=text + _whose(name))
    parser.add_argument("--lr", type=float, help="learning rate")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--accelerator", default="auto")
    parser.add_argument("--progress", action="store_true", help="show a progress bar")
    parser.set_defaults(run=fit)


def _whose(name: str) -> str:
    """Say which models have an option, if not all have it."""
    key = name.replace("-", "_")
    models = [model for model, options in _OPTIONS.items() if key in options.setup + options.init]
    return f" ({', '.join(models)})" if 0 < len(models) < len(_OPTIONS) else ""


def fit(chosen: argparse.Namespace) -> None:
    """Train a model from a file, resuming an unfinished run of the same folder.

    Parameters
    ----------
    chosen
        Arguments of the command line.

    Raises
    ------
    ConfigError
        If an argument cannot be used, or something else lies where the model goes.
    DataError
        If the file cannot be read, or the model cannot use what it holds.
    KeyboardInterrupt
        If the training was interrupted; the message tells how to go on.
    """
    check_folder(chosen.out, "--out")
    init, setup = _check_options(chosen)
    training = {key: getattr(chosen, key) for key in _TRAINING}
    _check_training(chosen, training)
    from epivi.train.checkpoint import is_checkpoint

    data = read(chosen.file)
    target = chosen.out / "model"
    if is_checkpoint(target):
        print(f"{target} is finished; choose another --out to train anew.")
        return
    if target.exists():
        message = f"{target} exists and is no model of epivi. Move it, or choose another --out."
        raise ConfigError(message)
    build = _set_up_tracks if chosen.model in ("convnetvae", "fcvae") else _set_up_peaks
    kind, data = build(chosen, data, setup)
    model = kind(data, seed=chosen.seed, **init)
    model.train(
        **training,
        run_dir=chosen.out / "run",
        accelerator=chosen.accelerator,
        enable_progress_bar=chosen.progress,
        **_distributed(),
    )
    if model.is_interrupted_:
        message = f"The run is kept in {chosen.out / 'run'}: the same command goes on with it."
        raise KeyboardInterrupt(message)
    if int(os.environ.get("RANK", "0")) == 0:
        _write(chosen.out, model, data)


def _check_options(chosen: argparse.Namespace) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what constructor and setup were given, after refusing what the model does not have."""
    own = _OPTIONS[chosen.model]
    for key in dict.fromkeys(key for options in _OPTIONS.values() for key in options.setup + options.init):
        if getattr(chosen, key) is not None and key not in own.setup + own.init:
            names = ", ".join(f"--{name.replace('_', '-')}" for name in own.setup + own.init)
            message = f"--{key.replace('_', '-')} is no option of {chosen.model}, which has {names}."
            raise ConfigError(message)
    init, setup = (
        {key: value for key in keys if (value := getattr(chosen, key)) is not None}
        for keys in (own.init, (*own.setup, "batch_key", "labels_key"))
    )
    if "encoder" in own.init:
        from epivi.models.sailer.config import SailerConfig

        init = {"encoder": "auto"} | init
        SailerConfig.chosen(init, has_chromosomes=True, open_per_peak=0.0)
    else:
        from epivi.models.convnetvae.config import ConvNetVaeConfig, FcvaeConfig

        (ConvNetVaeConfig if chosen.model == "convnetvae" else FcvaeConfig).chosen(init, is_missing=False)
    return init, setup


def _check_training(chosen: argparse.Namespace, training: Mapping[str, Any]) -> None:
    """Check what can be checked before a file of many gigabytes is read."""
    from epivi.models.base_arguments import check_run_arguments, parse_devices

    steps = training["save_every_n_steps"]
    others = {key: value for key, value in training.items() if key != "save_every_n_steps"}
    TrainingConfig.merged({"seed": chosen.seed}, others)
    check_run_arguments(chosen.out, steps, 0, {}, ())
    parse_devices(chosen.accelerator, "auto")


def _set_up_peaks(
    chosen: argparse.Namespace, data: AnnData | MuData, setup: dict[str, Any]
) -> tuple[type[SAILER], AnnData | MuData]:
    """Set up ATAC alone, or ATAC and RNA; return the model's class and the data that it reads."""
    from mudata import MuData

    import epivi

    is_multiome = isinstance(data, MuData)
    if chosen.model == "sailerx" and not is_multiome:
        message = f"{chosen.file} holds an AnnData; sailerx needs a MuData with ATAC and RNA (.h5mu)."
        raise DataError(message)
    names = {MOD_ATAC: setup.pop("atac", None), MOD_RNA: setup.pop("rna", None)}
    if is_multiome:
        wanted = names if chosen.model == "sailerx" else (MOD_ATAC,)
        names = {usual: modality(data, names[usual], usual, f"--{usual}") for usual in wanted}
    if chosen.model == "sailer":
        if is_multiome:
            data = data.mod[names[MOD_ATAC]].copy()
        epivi.SAILER.setup_anndata(data, **setup)
        return epivi.SAILER, data
    epivi.SAILERX.setup_mudata(data, modalities=names, atac_layer=setup.pop("layer", None), **setup)
    return epivi.SAILERX, data


def _set_up_tracks(
    chosen: argparse.Namespace, data: AnnData | MuData, setup: dict[str, Any]
) -> tuple[type[ConvNetVAE | FCVAE], AnnData | MuData]:
    """Set up tracks in obsm of an AnnData, or the modalities of a MuData; return the model's class and the data."""
    from mudata import MuData

    import epivi

    kind: type[ConvNetVAE | FCVAE] = epivi.ConvNetVAE if chosen.model == "convnetvae" else epivi.FCVAE
    is_mudata = isinstance(data, MuData)
    for key in ("tracks_key",) if is_mudata else ("modalities", "layer"):
        if key in setup:
            holds = "a MuData (its modalities are read)" if is_mudata else "an AnnData (its obsm is read: --tracks-key)"
            message = f"--{key.replace('_', '-')} cannot be used: {chosen.file} holds {holds}."
            raise ConfigError(message)
    if is_mudata:
        kind.setup_mudata(data, **setup)
    else:
        kind.setup_anndata(data, **setup)
    return kind, data


def _distributed() -> dict[str, Any]:
    """Return the trainer's arguments under torchrun, none otherwise."""
    if int(os.environ.get("WORLD_SIZE", "1")) <= 1:
        return {}
    local = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    nodes = int(os.environ["WORLD_SIZE"]) // local
    return {"strategy": "ddp_find_unused_parameters_true", "devices": local, "num_nodes": nodes}


def _write(out: Path, model: SAILER | ConvNetVAE | FCVAE, data: AnnData | MuData) -> None:
    """Write the model, its latent and its history; then the state of the run is no longer needed."""
    import shutil

    import pandas as pd

    model.save(out / "model")
    latent = pd.DataFrame(model.get_latent_representation(), index=data.obs_names)
    latent.columns = [f"latent_{i}" for i in range(latent.shape[1])]
    replace(out / "latent.csv", latent.to_csv)
    tables = list((model.history or {}).values())
    if tables:
        replace(out / "history.csv", pd.concat(tables, axis=1).to_csv)
    shutil.rmtree(out / "run", ignore_errors=True)
    print(f"Wrote {out / 'model'}, latent.csv and history.csv.")
