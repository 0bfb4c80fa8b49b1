"""Quality on real data: agreement with cell types, information about depth, and cells whose RNA was hidden.

    uv run python benchmarks/quality.py snareseq_mouse_cortex --seeds 3
    uv run python benchmarks/quality.py preissl2018_forebrain_atac --seeds 5
    uv run python benchmarks/quality.py candi --seeds 3
    uv run python benchmarks/quality.py epifoundation --seeds 5
    uv run python benchmarks/quality.py expresser --seeds 3

Each method and seed is run once and kept as JSON under ``results/quality``; delete a file to run it again.
The data are found through EPIVI_TEST_DATA (default ../shared/data).
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from collections.abc import Callable

warnings.filterwarnings("ignore")
DATA = Path(os.environ.get("EPIVI_TEST_DATA", "../shared/data")) / "sc"
MULTIOMES = {
    "snareseq_mouse_cortex": ("atac", "cell_type", "batch"),
    "scicar_mouse_kidney": ("atac", "cell_type", None),
    "scicar_a549": ("atac", "time_h", None),
    "pairedtag_mouse_brain_h3k27me3": ("h3k27me3", "cell_type", "sample"),
}
ACCESSIBILITY = {"preissl2018_forebrain_atac": "cell_type"}
HELD_OUT = 0.2
QUIET = {"enable_progress_bar": False}
DEEP = {"max_epochs": 100}


def scores(values: np.ndarray, labels: np.ndarray, depth: np.ndarray) -> dict[str, float]:
    """ARI, NMI at as many clusters as labels, silhouette of the labels, and I(z, depth)."""
    from epivi.metrics import cluster_agreement, confounder_information

    agreement = cluster_agreement(values, labels)
    return {
        "ari": agreement.ari,
        "nmi": agreement.nmi,
        "clusters": agreement.n_clusters,
        "silhouette": agreement.silhouette_labels,
        "information_depth": confounder_information(values, depth, discrete=False).mean,
    }


def held_out_scores(values: np.ndarray, labels: np.ndarray, held: np.ndarray, depth: np.ndarray) -> dict[str, float]:
    """Scores of training and held-out cells apart, and labels of held-out cells by 15 nearest training cells."""
    from epivi.metrics import knn_accuracy

    apart = {
        f"{name}_{key}": value
        for name, part in (("train", ~held), ("held_out", held))
        for key, value in scores(values[part], labels[part], depth[part]).items()
        if key in ("ari", "nmi")
    }
    return apart | {"held_out_knn": knn_accuracy(values[~held], labels[~held], values[held], labels[held])}


class Multiome:
    """A multiome, its labels, and the methods to compare on it."""

    def __init__(self, name: str) -> None:
        import mudata

        import epivi

        self.name = name
        self.atac, self.labels_key, self.batch_key = MULTIOMES[name]
        self.mdata = mudata.read_h5mu(DATA / f"{name}.h5mu")
        self.labels = self.mdata.obs[self.labels_key].astype(str).to_numpy()
        self.depth = np.asarray((self.mdata[self.atac].X > 0).sum(1)).ravel()
        rna = self.mdata["rna"]
        epivi.pp.rna_reference(rna)
        if not (has := np.asarray(rna.obsm["X_pca"]).any(axis=1)).all():
            rna.obsm["X_pca"][~has] = np.nan
        rng = np.random.default_rng(0)
        self.held = np.zeros(self.mdata.n_obs, dtype=bool)
        self.held[rng.permutation(self.mdata.n_obs)[: int(HELD_OUT * self.mdata.n_obs)]] = True

    def reference(self) -> np.ndarray:
        """The RNA reference, cells without counts at the origin."""
        return np.nan_to_num(np.asarray(self.mdata["rna"].obsm["X_pca"]))

    def _hidden(self) -> Any:
        """The same multiome, the RNA of the held-out cells taken away."""
        import mudata

        rna = self.mdata["rna"][~self.held].copy()
        hidden = mudata.MuData({self.atac: self.mdata[self.atac].copy(), "rna": rna})
        hidden = hidden[self.mdata.obs_names].copy()
        for key in (self.labels_key, self.batch_key):
            if key is not None:
                hidden.obs[key] = self.mdata.obs[key].to_numpy()
        return hidden

    def lsi(self, seed: int) -> dict[str, float]:
        import epivi

        part = epivi.pp.lsi(self.mdata[self.atac], n_comps=10, seed=seed, copy=True)
        values = np.asarray(part.obsm["X_lsi"])
        return scores(values, self.labels, self.depth) | held_out_scores(values, self.labels, self.held, self.depth)

    def rna(self, seed: int) -> dict[str, float]:  # noqa: ARG002
        values = self.reference()
        return scores(values, self.labels, self.depth) | held_out_scores(values, self.labels, self.held, self.depth)

    def multivi(self, seed: int) -> dict[str, float]:
        import scvi

        scvi.settings.seed = seed
        mdata = self.mdata.copy()
        scvi.model.MULTIVI.setup_mudata(
            mdata,
            batch_key=self.batch_key,
            modalities={"rna_layer": "rna", "atac_layer": self.atac} | ({"batch_key": None} if self.batch_key else {}),
        )
        model = scvi.model.MULTIVI(mdata, n_genes=mdata["rna"].n_vars, n_regions=mdata[self.atac].n_vars)
        model.train(max_epochs=40, **QUIET)
        return scores(model.get_latent_representation(), self.labels, self.depth)

    def sailer(self, seed: int, **options: Any) -> dict[str, float]:
        import epivi

        adata = self.mdata[self.atac].copy()
        if self.batch_key:
            adata.obs[self.batch_key] = self.mdata.obs[self.batch_key].to_numpy()
        epivi.SAILER.setup_anndata(adata, batch_key=self.batch_key)
        train = options.pop("train", {})
        model = epivi.SAILER(adata, n_latent=50, seed=seed, **options)
        model.train(**{"batch_size": 200} | train | QUIET)
        values = model.get_latent_representation()
        return scores(values, self.labels, self.depth) | held_out_scores(values, self.labels, self.held, self.depth)

    def sailerx(self, seed: int, **options: Any) -> dict[str, float]:
        train = options.pop("train", {})
        result: dict[str, float] = {}
        for hides in (False, True):
            import epivi

            mdata = self._hidden() if hides else self.mdata.copy()
            epivi.SAILERX.setup_mudata(
                mdata,
                modalities={"atac": self.atac, "rna": "rna"},
                reference_key="X_pca",
                batch_key=self.batch_key,
            )
            model = epivi.SAILERX(mdata, seed=seed, **options)
            start = time.perf_counter()
            model.train(**train | QUIET)
            values = model.get_latent_representation()
            if hides:
                result |= held_out_scores(values, self.labels, self.held, self.depth)
            else:
                result |= scores(values, self.labels, self.depth)
                result |= {"seconds": time.perf_counter() - start, "align_loss": model.get_alignment_loss()}
        return result

    def methods(self) -> dict[str, Callable[[int], dict[str, float]]]:
        """Methods by name; the first ones take no part of the paper's idea."""
        return {
            "LSI of ATAC": self.lsi,
            "PCA of RNA (reference)": self.rna,
            "MULTIVI, 40 epochs": self.multivi,
            "SAILER, ATAC alone": lambda seed: self.sailer(seed, encoder="auto"),
            "SAILERX": lambda seed: self.sailerx(seed, encoder="auto"),
            "SAILERX, weight 4.57": lambda seed: self.sailerx(seed, encoder="auto", align_weight=4.57),
            "SAILERX, neighbour minibatches": lambda seed: self.sailerx(seed, encoder="auto", sampler="neighbors"),
            "SAILERX, fused posterior": lambda seed: self.sailerx(seed, encoder="auto", fuse_reference=True),
            "SAILERX, chromosome encoder, published weight": lambda seed: self.sailerx(seed, train=DEEP),
            "SAILERX, chromosome encoder, weight 45.7": lambda seed: self.sailerx(seed, align_weight=45.7, train=DEEP),
        }


class Accessibility:
    """A single ATAC data set and the methods to compare on it."""

    def __init__(self, name: str) -> None:
        import anndata

        self.name = name
        self.adata = anndata.read_h5ad(DATA / f"{name}.h5ad")
        self.labels = self.adata.obs[ACCESSIBILITY[name]].astype(str).to_numpy()
        self.depth = np.asarray((self.adata.X > 0).sum(1)).ravel()

    def lsi(self, seed: int, n_comps: int = 10) -> dict[str, float]:
        import epivi

        part = epivi.pp.lsi(self.adata, n_comps=n_comps, seed=seed, copy=True)
        return scores(np.asarray(part.obsm["X_lsi"]), self.labels, self.depth)

    def peakvi(self, seed: int) -> dict[str, float]:
        import scvi

        scvi.settings.seed = seed
        adata = self.adata.copy()
        scvi.model.PEAKVI.setup_anndata(adata)
        model = scvi.model.PEAKVI(adata)
        model.train(max_epochs=200, **QUIET)
        return scores(model.get_latent_representation(), self.labels, self.depth)

    def sailer(self, seed: int, **options: Any) -> dict[str, float]:
        import epivi

        adata = self.adata.copy()
        epivi.SAILER.setup_anndata(adata)
        train = options.pop("train", {})
        model = epivi.SAILER(adata, seed=seed, **options)
        start = time.perf_counter()
        model.train(**train | QUIET)
        result = scores(model.get_latent_representation(), self.labels, self.depth)
        return result | {"elbo": model.get_elbo(), "seconds": time.perf_counter() - start}

    def methods(self) -> dict[str, Callable[[int], dict[str, float]]]:
        """Methods by name."""
        return {
            "LSI, 10 components": self.lsi,
            "LSI, 30 components": lambda seed: self.lsi(seed, 30),
            "PEAKVI, 200 epochs": self.peakvi,
            "SAILER, encoder auto (linear)": lambda seed: self.sailer(seed, encoder="auto"),
            "SAILER, dense (thesis)": lambda seed: self.sailer(seed, encoder="dense"),
        }


def main() -> int:
    """Run what is missing, print and write the table."""
    if sys.argv[1:2] == ["epifoundation"]:
        from quality_epifoundation import main as epifoundation

        return epifoundation()
    if sys.argv[1:2] == ["expresser"]:
        from quality_expresser import main as expresser

        return expresser()
    if sys.argv[1:2] == ["candi"]:
        # other data, other scores: a script of its own, here under the same command
        from quality_candi import main as candi

        return candi(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=[*MULTIOMES, *ACCESSIBILITY])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", help="only methods whose name this regular expression finds")
    parser.add_argument("--out", type=Path, default=Path("results/quality"))
    chosen = parser.parse_args()
    logging.getLogger("epivi").setLevel(logging.ERROR)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    if not any(DATA.glob(f"{chosen.name}.*")):
        print(f"test data not found: set EPIVI_TEST_DATA (missing sc/{chosen.name})", file=sys.stderr)
        return 2
    task = Multiome(chosen.name) if chosen.name in MULTIOMES else Accessibility(chosen.name)
    run_table(task.methods(), chosen.name, chosen)
    return 0


def run_table(methods: dict[str, Callable[[int], dict[str, float]]], name: str, chosen: argparse.Namespace) -> None:
    """Run the methods and seeds that have no result yet, print and write the table.

    Parameters
    ----------
    methods
        Functions of the seed by name.
    name
        Folder of the results of single runs, and name of the table.
    chosen
        Arguments of the command line: ``out``, ``seeds`` and ``methods``.
    """
    folder = chosen.out / name
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for method, run in methods.items():
        for seed in range(chosen.seeds):
            path = folder / f"{method.replace(' ', '_').replace(',', '')}-{seed}.json"
            if not path.is_file():
                if chosen.methods and not re.search(chosen.methods, method):
                    continue
                path.write_text(json.dumps(run(seed)))
            result = json.loads(path.read_text())
            print(method, seed, {key: round(value, 3) for key, value in result.items()}, flush=True)
            rows.append({"method": method, **result})
    table = pd.DataFrame(rows).groupby("method", sort=False).agg(["mean", "std"])
    text = markdown(table)
    (chosen.out / f"{name}.md").write_text(text)
    print(text)


def markdown(table: pd.DataFrame) -> str:
    """Mean and standard deviation over the seeds, one row a method."""
    keys = list(dict.fromkeys(key for key, _ in table.columns))
    lines = ["| method | " + " | ".join(keys) + " |", "|---" * (len(keys) + 1) + "|"]
    for method, row in table.iterrows():
        cells = []
        for key in keys:
            mean, sd = row[(key, "mean")], row[(key, "std")]
            spread = "" if np.isnan(sd) or sd == 0 else f" ± {sd:.3f}"
            cells.append("" if np.isnan(mean) else f"{mean:.3f}{spread}")
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
