"""The command line: ``epivi demo``, ``epivi fit`` and ``epivi doctor``.

Bad arguments and broken files end with exit code 2 and one line; nothing is written then. A training that fails ends
with exit code 3, one that is interrupted with 130.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import logging
import os
import platform
import sys
import time
import warnings
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from epivi._errors import ConfigError, DataError, EpiviError, TrainingError
from epivi._keys import MOD_ATAC, MOD_RNA, OBSM_LSI, OBSM_PCA, OBSM_SAILERX
from epivi.cli_files import modality, read, replace
from epivi.cli_fit import add_fit
from epivi.train._atomic import check_folder
from epivi.train.config import TrainingConfig

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import numpy as np
    import pandas as pd
    from mudata import MuData

    from epivi.models.sailer import SAILER

LABELS = ("cell_type", "celltype", "label", "time_h")
BATCHES = ("batch", "sample", "library")
# fewer cells have too few neighbours to be judged
MIN_CELLS = 20
DEMO_CELLS = (350, 300, 250, 150, 50)
PACKAGES = ("epivi", "torch", "scvi-tools", "anndata", "mudata", "scanpy", "muon", "scib-metrics", "numba", "numpy")


class _Parser(argparse.ArgumentParser):
    """A parser whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    0; or, with one line on the error stream, 2 for bad arguments and files, 3 for a training that failed, and 130 for
    one that was interrupted.

    Parameters
    ----------
    arguments
        Words of the command line; those of the process by default.

    Examples
    --------
    >>> main(["fit", "nothing", "x.h5ad", "--out", "y"])
    2
    """
    try:
        chosen = _parser().parse_args(arguments)
        with _console():
            chosen.run(chosen)
    except (EpiviError, OSError) as error:
        return _say(f"epivi: error: {error}", 3 if isinstance(error, TrainingError) else 2)
    except KeyboardInterrupt as error:
        return _say(f"epivi: interrupted. {error}", 130)
    return 0


def _say(message: str, code: int) -> int:
    """Write one line to the error stream and return the exit code."""
    print(" ".join(message.split()), file=sys.stderr)
    return code


@contextmanager
def _console() -> Iterator[None]:
    """Show what epivi logs, hide deprecations of other packages, and leave both as they were."""
    logger, handler = logging.getLogger("epivi"), logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=FutureWarning)
            warnings.filterwarnings("ignore", message=".*(deprecated|inplace keyword).*")
            yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="epivi", description="Deep generative models of epigenomes.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=_Parser)

    demo = commands.add_parser("demo", help="train SAILERX on a multiome and compare it with LSI and PCA")
    demo.add_argument("--data", type=Path, help="multiome as .h5mu; simulated if not given")
    demo.add_argument("--out", type=Path, default=Path("epivi_demo"), help="folder of the results")
    demo.add_argument("--atac", help="name of the ATAC modality")
    demo.add_argument("--rna", help="name of the RNA modality")
    demo.add_argument("--labels-key", help="obs column with cell types")
    demo.add_argument("--batch-key", help="obs column with batches")
    demo.add_argument("--max-epochs", type=int, help="epochs of training")
    demo.add_argument("--seed", type=int, default=0)
    demo.set_defaults(run=_demo)

    add_fit(commands.add_parser("fit", help="train a model from a file; resumes an unfinished run"))

    doctor = commands.add_parser("doctor", help="print versions, devices and extras")
    doctor.set_defaults(run=_doctor)
    return parser


def _column(mdata: MuData, wanted: str | None, usual: tuple[str, ...], flag: str) -> str | None:
    if wanted is not None and wanted not in mdata.obs:
        message = f"{flag} {wanted}: mdata.obs has {list(mdata.obs.columns)}."
        raise ConfigError(message)
    return wanted or next((key for key in usual if key in mdata.obs and len(set(mdata.obs[key])) > 1), None)


def _demo(chosen: argparse.Namespace) -> None:
    """Train SAILERX, compare it with LSI of ATAC and PCA of RNA, write data, table and picture."""
    check_folder(chosen.out, "--out")
    TrainingConfig.merged({"max_epochs": chosen.max_epochs, "seed": chosen.seed})
    import epivi
    from epivi.simulate import multiome

    if chosen.data is None:
        print("Simulating a multiome ...", flush=True)
        mdata = multiome(list(DEMO_CELLS), n_atac_only=200, seed=chosen.seed)
    else:
        mdata = read(chosen.data)
        if not hasattr(mdata, "mod"):
            message = f"{chosen.data} holds an AnnData; the demo needs a MuData with ATAC and RNA (.h5mu)."
            raise DataError(message)
    atac = modality(mdata, chosen.atac, MOD_ATAC, "--atac")
    rna = modality(mdata, chosen.rna, MOD_RNA, "--rna")
    labels_key = _column(mdata, chosen.labels_key, LABELS, "--labels-key")
    batch_key = _column(mdata, chosen.batch_key, BATCHES, "--batch-key")
    if labels_key is None:
        message = (
            f"No column of cell types was found in mdata.obs {list(mdata.obs.columns)}: name it with --labels-key."
        )
        raise ConfigError(message)
    n_types, n_rna = mdata.obs[labels_key].nunique(), mdata.mod[rna].n_obs
    if n_types < 2 or n_rna < MIN_CELLS:
        message = (
            f"The demo needs two cell types and {MIN_CELLS} cells with RNA: mdata.obs['{labels_key}'] has {n_types} "
            f"types, mdata['{rna}'] has {n_rna} cells."
        )
        raise DataError(message)

    if OBSM_PCA not in mdata.mod[rna].obsm:
        epivi.pp.rna_reference(mdata.mod[rna], seed=chosen.seed)
    epivi.pp.lsi(mdata.mod[atac], seed=chosen.seed)
    epivi.SAILERX.setup_mudata(
        mdata, modalities={"atac": atac, "rna": rna}, reference_key=OBSM_PCA, batch_key=batch_key, labels_key=labels_key
    )
    model = epivi.SAILERX(mdata, encoder="auto", seed=chosen.seed)
    print(f"Training SAILERX on {mdata.n_obs} cells and {mdata.mod[atac].n_vars} peaks ...", flush=True)
    start = time.perf_counter()
    model.train(max_epochs=chosen.max_epochs)
    seconds = time.perf_counter() - start
    mdata.obsm[OBSM_SAILERX] = model.get_latent_representation()
    table = demo_table(model, mdata, atac, rna, labels_key)
    table.loc["SAILERX", "seconds"] = round(seconds, 1)
    _write_demo(chosen.out, mdata, table, labels_key)
    print(table.to_string(float_format="{:.3f}".format, na_rep=""))
    print(f"Wrote {chosen.out / 'demo.h5mu'}, metrics.csv, metrics.md and umap.png ({seconds:.0f} s of training).")


def demo_table(model: SAILER, mdata: MuData, atac: str, rna: str, labels_key: str) -> pd.DataFrame:
    """Return agreement with the labels and information about depth of LSI, PCA and SAILERX.

    Parameters
    ----------
    model
        Trained model.
    mdata
        Its data, with the latent in obsm.
    atac, rna
        Names of the modalities.
    labels_key
        Column of ``mdata.obs`` with the cell types.
    """
    import numpy as np
    import pandas as pd

    from epivi.data.sparse import modality_rows
    from epivi.metrics import cluster_agreement, confounder_information

    labels = mdata.obs[labels_key].astype(str).to_numpy()
    depth = model.get_library_size_factors()
    rows_atac, rows_rna = (modality_rows(mdata, name) for name in (atac, rna))
    everyone = np.arange(mdata.n_obs)
    with_rna = everyone if rows_rna is None else np.flatnonzero(rows_rna >= 0)

    def part(modality: str, rows: Any, cells: np.ndarray, key: str) -> np.ndarray:
        return np.asarray(mdata.mod[modality].obsm[key])[cells if rows is None else rows[cells]]

    embeddings = {
        "LSI of ATAC": (part(atac, rows_atac, everyone, OBSM_LSI), everyone),
        "PCA of RNA": (part(rna, rows_rna, with_rna, OBSM_PCA), with_rna),
        "SAILERX": (np.asarray(mdata.obsm[OBSM_SAILERX]), everyone),
    }
    hidden = np.setdiff1d(everyone, with_rna)
    if hidden.size >= MIN_CELLS:
        embeddings["SAILERX, cells with RNA"] = (mdata.obsm[OBSM_SAILERX][with_rna], with_rna)
        embeddings["SAILERX, cells without RNA"] = (mdata.obsm[OBSM_SAILERX][hidden], hidden)
    table = {}
    for name, (values, cells) in embeddings.items():
        agreement = cluster_agreement(values, labels[cells])
        information = confounder_information(values, depth[cells], discrete=False)
        table[name] = {
            "cells": cells.size,
            "clusters": agreement.n_clusters,
            "ari": agreement.ari,
            "nmi": agreement.nmi,
            "silhouette": agreement.silhouette_labels,
            "information_depth": information.mean,
        }
    return pd.DataFrame.from_dict(table, orient="index")


def _write_demo(out: Path, mdata: MuData, table: pd.DataFrame, labels_key: str) -> None:
    """Write data, table and picture, each whole or not at all."""
    import scanpy as sc
    from anndata import AnnData
    from matplotlib.figure import Figure

    from epivi.pl import embedding

    latents = {"LSI of ATAC": mdata.mod, "SAILERX": None}
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    axes = figure.subplots(1, 2)
    for axis, name in zip(axes, latents, strict=True):
        if name == "SAILERX":
            values = mdata.obsm[OBSM_SAILERX]
        else:
            holder = next(entry for entry in mdata.mod.values() if OBSM_LSI in entry.obsm)
            values = holder[mdata.obs_names].obsm[OBSM_LSI]
        view = AnnData(values, obs=mdata.obs[[labels_key]].astype(str).astype("category"))
        sc.pp.neighbors(view, use_rep="X", random_state=0)
        sc.tl.umap(view, random_state=0)
        if name == "SAILERX":
            mdata.obsm["X_umap"] = view.obsm["X_umap"]
        embedding(view, basis="X_umap", color=labels_key, ax=axis)
        axis.set_title(name)
        if axis is axes[0] and axis.get_legend() is not None:
            axis.get_legend().remove()
    out.mkdir(parents=True, exist_ok=True)
    replace(out / "umap.png", lambda path: figure.savefig(path, dpi=120))
    replace(out / "metrics.csv", table.to_csv)
    header = "| | " + " | ".join(table.columns) + " |\n|" + "---|" * (table.shape[1] + 1) + "\n"
    rows = "".join(
        f"| {name} | " + " | ".join("" if value != value else f"{value:.3g}" for value in row) + " |\n"
        for name, row in zip(table.index, table.to_numpy(), strict=True)
    )
    replace(out / "metrics.md", lambda path: path.write_text(header + rows))
    replace(out / "demo.h5mu", mdata.write)


def _doctor(chosen: argparse.Namespace) -> None:  # noqa: ARG001
    """Print versions, devices and extras."""
    import torch

    print(f"python {platform.python_version()} on {platform.system()} {platform.machine()}")
    for name in PACKAGES:
        try:
            print(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            print(f"{name} not installed")
    print(f"CPU threads {torch.get_num_threads()}, {torch.backends.cpu.get_cpu_capability()}")
    print(f"CUDA devices {torch.cuda.device_count()}")
