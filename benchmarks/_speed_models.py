"""The models that are compared in speed, ours and those of scvi-tools, on the same simulated cells."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from _common import QUIET, say
from _measure import timed

if TYPE_CHECKING:
    from anndata import AnnData

BATCH_SIZE = 128
N_TYPES = 9
N_GENES = 5_000
N_REFERENCE = 50


@dataclass(frozen=True)
class Pair:
    """A model of ours, the one of scvi-tools it is compared with, and the goal.

    Parameters
    ----------
    ours, rival
        Names of classes in epivi, and in scvi.model or scvi.external.
    goal
        Least ratio of training steps per second.
    options
        Arguments of our model.
    """

    ours: str
    rival: str
    goal: float
    options: dict[str, Any] = field(default_factory=dict)


PAIRS = {
    "chromosome": Pair("SAILER", "PEAKVI", 20.0, {"encoder": "chromosome"}),
    # the layers of PEAKVI at 100,000 peaks
    "dense": Pair("SAILER", "PEAKVI", 6.0, {"encoder": "dense", "n_hidden": (316, 316), "n_latent": 17}),
    "poisson": Pair("SAILER", "POISSONVI", 20.0, {"encoder": "chromosome", "likelihood": "poisson"}),
    "multiome": Pair("SAILERX", "MULTIVI", 8.0, {"encoder": "chromosome"}),
}


def data_file(n_cells: int, n_peaks: int) -> Path:
    """Simulate cells with about 7 % open peaks over 22 chromosomes, once, and return the file."""
    import epivi

    path = Path(tempfile.gettempdir()) / f"epivi_speed_{n_cells}x{n_peaks}_v1.h5ad"
    if path.is_file():
        return path
    say(f"simulating {n_cells:,} cells x {n_peaks:,} peaks")
    share = n_peaks / 100_000
    adata = epivi.simulate.accessibility(
        [n_cells // N_TYPES + (t < n_cells % N_TYPES) for t in range(N_TYPES)],
        n_fg=n_peaks // 2,
        n_bg=n_peaks - n_peaks // 2,
        median=7_300 * share,
        log_sd=0.4,
        clip=(1_000 * share, 30_000 * share),
        rho=0.4,
        chrom_sizes="hg38",
        seed=0,
    )
    rows = np.random.default_rng(0).permutation(adata.n_obs)
    adata = adata[rows].copy()
    adata.X = adata.X.astype(np.float32)
    adata.uns.clear()
    del adata.varm["bulk"]
    partial = path.with_suffix(f".{os.getpid()}.part")
    adata.write_h5ad(partial)
    partial.replace(path)
    return path


def small_data() -> AnnData:
    """Return so few cells and peaks that training on them needs little beside the packages themselves."""
    import epivi

    adata = epivi.simulate.accessibility(
        [128, 128], n_fg=300, n_bg=300, median=80, clip=(20, 200), chrom_sizes="hg38", seed=0
    )
    adata.X = adata.X.astype(np.float32)
    return adata


def with_rna(adata: AnnData) -> Any:
    """Return a MuData of the peaks, random counts of genes, and a random reference for SAILERX."""
    import anndata
    import mudata
    import pandas as pd
    from scipy import sparse

    rng = np.random.default_rng(1)
    rna = anndata.AnnData(
        sparse.random(adata.n_obs, N_GENES, density=0.15, format="csr", dtype=np.float32, random_state=rng),
        obs=pd.DataFrame(index=adata.obs_names),
        var=pd.DataFrame(index=[f"gene{i}" for i in range(N_GENES)]),
    )
    rna.X.data = rng.geometric(0.5, rna.X.nnz).astype(np.float32)
    rna.obsm["X_pca"] = rng.normal(size=(adata.n_obs, N_REFERENCE)).astype(np.float32)
    return mudata.MuData({"rna": rna, "atac": adata.copy()})


def build_rival(pair: Pair, adata: AnnData) -> Any:
    """Set the data up for the model of scvi-tools and return it, at its defaults."""
    import scvi.external

    kind = getattr(scvi.model if hasattr(scvi.model, pair.rival) else scvi.external, pair.rival)
    if pair.rival == "MULTIVI":
        mdata = with_rna(adata)
        kind.setup_mudata(mdata, modalities={"rna_layer": "rna", "atac_layer": "atac"})
        return kind(mdata)
    adata = adata.copy()
    kind.setup_anndata(adata)
    return kind(adata)


def build_ours(pair: Pair, adata: AnnData, **options: Any) -> Any:
    """Set the data up for our model and return it."""
    import epivi

    kind = getattr(epivi, pair.ours)
    if pair.ours == "SAILERX":
        mdata = with_rna(adata)
        kind.setup_mudata(mdata, reference_key="X_pca")
        return kind(mdata, **pair.options | options)
    adata = adata.copy()
    kind.setup_anndata(adata)
    return kind(adata, **pair.options | options)


def n_parameters(model: Any) -> int:
    """Return the number of parameters."""
    return sum(p.numel() for p in model.module.parameters())


def train(
    model: Any, warm_up: int, steps: int, *, plan: dict[str, Any] | None = None, batch_size: int = BATCH_SIZE
) -> dict[str, float]:
    """Run a training of ``warm_up + steps`` steps and return seconds a step, wall-clock and processor time."""
    per_epoch = max(model.adata.n_obs // batch_size, 1)
    options = {"train_size": 1.0, "early_stopping": False, "accelerator": "cpu", "devices": 1}
    if type(model).__name__ == "MULTIVI":
        options["adversarial_mixing"] = False  # one batch: nothing to mix
    total = warm_up + steps

    def run(clock: Any) -> None:
        more = {"max_steps": total, "batch_size": batch_size, "callbacks": [clock]}
        if plan:
            more["plan_kwargs"] = plan
        model.train(max_epochs=-(-total // per_epoch) + 1, **QUIET | options | more)

    return timed(run, warm_up, steps)
