"""Embeddings of other packages, each with the settings of its own documentation; all functions return (n, d)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from _runs import QUIET

if TYPE_CHECKING:
    from anndata import AnnData
    from mudata import MuData

FIT = {"accelerator": "cpu", "enable_model_summary": False, "logger": False} | QUIET
# share of the cells whose label scANVI is told: it is scored on all, and its row says so
LABELLED = 0.5
UNKNOWN = "unknown"
INSTALL = "install it with `uv sync --group benchmark`"


def needs(name: str) -> Any:
    """Import a rival's package, or say how to get it."""
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        message = f"{name} is not installed ({INSTALL})"
        raise ImportError(message) from error


def lsi(adata: AnnData, n_comps: int, seed: int) -> np.ndarray:
    """LSI of epivi, the first component kept."""
    import epivi

    part = epivi.pp.lsi(adata, n_comps=n_comps, seed=seed, copy=True)
    return np.asarray(part.obsm["X_lsi"])


def pca(adata: AnnData, n_comps: int, seed: int) -> np.ndarray:
    """Principal components of log-normalised counts of 2,000 variable genes."""
    import scanpy as sc

    part = adata.copy()
    sc.pp.normalize_total(part, target_sum=1e4)
    sc.pp.log1p(part)
    if part.n_vars > 2000:
        sc.pp.highly_variable_genes(part, n_top_genes=2000)
        part = part[:, part.var["highly_variable"]].copy()
    n_comps = min(n_comps, part.n_vars - 1, part.n_obs - 1)
    sc.pp.pca(part, n_comps=n_comps, random_state=seed)
    return np.asarray(part.obsm["X_pca"])


def harmony(values: np.ndarray, batch: np.ndarray, seed: int) -> np.ndarray:
    """Harmony on an embedding, with the defaults of harmonypy."""
    import logging

    import pandas as pd

    harmonypy = needs("harmonypy")
    logging.getLogger("harmonypy").setLevel(logging.ERROR)
    obs = pd.DataFrame({"batch": np.asarray(batch, dtype=str)})
    found = harmonypy.run_harmony(values, obs, "batch", random_state=seed, verbose=False, ncores=1)
    corrected = np.asarray(found.Z_corr)  # of older versions dimensions come first
    return corrected if corrected.shape[0] == len(values) else corrected.T


def scvi_latent(adata: AnnData, batch_key: str | None, epochs: int | None, seed: int) -> np.ndarray:
    """SCVI with its defaults."""
    return _scvi(adata, batch_key, epochs, seed).get_latent_representation()


def _scvi(adata: AnnData, batch_key: str | None, epochs: int | None, seed: int, labels_key: str | None = None) -> Any:
    import scvi

    scvi.settings.seed = seed
    adata = adata.copy()
    scvi.model.SCVI.setup_anndata(adata, batch_key=batch_key, labels_key=labels_key)
    model = scvi.model.SCVI(adata)
    model.train(max_epochs=epochs, **FIT)
    return model


def scanvi_latent(
    adata: AnnData, labels: np.ndarray, batch_key: str | None, epochs: int | None, seed: int
) -> np.ndarray:
    """Train scANVI from SCVI, with the labels of half of the cells."""
    import scvi

    adata = adata.copy()
    told = np.random.default_rng(seed).random(adata.n_obs) < LABELLED
    adata.obs["told"] = np.where(told, labels, UNKNOWN)
    base = _scvi(adata, batch_key, epochs, seed, labels_key="told")
    model = scvi.model.SCANVI.from_scvi_model(base, unlabeled_category=UNKNOWN)
    model.train(max_epochs=None if epochs is None else max(epochs // 2, 1), **FIT)
    return model.get_latent_representation()


def peakvi(adata: AnnData, batch_key: str | None, epochs: int | None, seed: int) -> np.ndarray:
    """PEAKVI with its defaults."""
    import scvi

    scvi.settings.seed = seed
    adata = adata.copy()
    scvi.model.PEAKVI.setup_anndata(adata, batch_key=batch_key)
    model = scvi.model.PEAKVI(adata)
    model.train(max_epochs=epochs, **FIT)
    return model.get_latent_representation()


def poissonvi(adata: AnnData, batch_key: str | None, epochs: int | None, seed: int) -> np.ndarray:
    """POISSONVI with its defaults."""
    import scvi

    scvi.settings.seed = seed
    adata = adata.copy()
    scvi.external.POISSONVI.setup_anndata(adata, batch_key=batch_key)
    model = scvi.external.POISSONVI(adata)
    model.train(max_epochs=epochs, **FIT)
    return model.get_latent_representation()


def multivi(mdata: MuData, atac: str, batch_key: str | None, epochs: int | None, seed: int) -> np.ndarray:
    """MULTIVI with its defaults."""
    import scvi

    scvi.settings.seed = seed
    mdata = mdata.copy()
    modalities = {"rna_layer": "rna", "atac_layer": atac} | ({"batch_key": None} if batch_key else {})
    scvi.model.MULTIVI.setup_mudata(mdata, batch_key=batch_key, modalities=modalities)
    model = scvi.model.MULTIVI(mdata, n_genes=mdata["rna"].n_vars, n_regions=mdata[atac].n_vars)
    model.train(max_epochs=epochs, **FIT)
    return model.get_latent_representation()


def mofa(mdata: MuData, atac: str, *, n_factors: int, iterations: int, seed: int) -> np.ndarray:
    """MOFA+ through muon: log-normalised RNA and TF-IDF of the peaks, 2,000 features of largest variance each.

    Factors that explain nothing are dropped by MOFA+ itself.
    """
    import contextlib
    import io
    import tempfile
    from pathlib import Path

    import anndata
    import mudata
    import muon
    import scanpy as sc

    needs("mofapy2")
    parts: dict[str, Any] = {}
    for key in ("rna", atac):
        part = anndata.AnnData(mdata[key].X.astype(np.float32), obs=mdata[key].obs[[]], var=mdata[key].var[[]])
        if key == "rna":
            sc.pp.normalize_total(part, target_sum=1e4)
            sc.pp.log1p(part)
        else:
            part.X.data[:] = 1.0
            muon.atac.pp.tfidf(part)
        mean, square = np.asarray(part.X.mean(0)).ravel(), np.asarray(part.X.power(2).mean(0)).ravel()
        top = np.sort(np.argsort(-(square - mean**2))[:2000])
        parts[key] = part[:, top].copy()
        parts[key].X = parts[key].X.toarray()
    small = mudata.MuData(parts)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        muon.tl.mofa(
            small,
            n_factors=n_factors,
            n_iterations=iterations,
            seed=seed,
            outfile=str(Path(folder) / "mofa.hdf5"),
            use_var=None,
            center_groups=True,
            quiet=True,
        )
    values = np.asarray(small.obsm["X_mofa"])
    return values[:, values.std(0) > 0]
