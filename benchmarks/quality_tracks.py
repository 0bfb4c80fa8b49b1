"""Quality of models of tracks on real histone data: Paired-Tag of mouse brain, H3K27ac, and H3K27me3 beside RNA.

    uv run python benchmarks/quality_tracks.py pairedtag_mouse_brain_H3K27ac --seeds 5
    uv run python benchmarks/quality_tracks.py pairedtag_mouse_brain_h3k27me3 --seeds 5

One modality each: H3K27ac in 5,000 bins of 200 kb (2,000 cells, 22 types) and H3K27me3 in 10,000 bins of 5 kb (4,307
cells, 20 types named from their RNA; 11 counts a cell). ConvNetVAE and FCVAE at their defaults, POISSONVI at those of
scvi-tools.
Each method and seed is run once and kept as JSON under ``results/quality``; delete a file to run it again. The data are
found through EPIVI_TEST_DATA (default ../shared/data).
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import _rivals as rivals
import numpy as np
from _cells import FULL, QUICK, Size
from _common import quiet
from _runs import DATA, QUIET, run_table, scores

if TYPE_CHECKING:
    from collections.abc import Callable

    from anndata import AnnData

TASKS = {
    "pairedtag_mouse_brain_H3K27ac": (None, "H3K27ac", 199_994),
    "pairedtag_mouse_brain_h3k27me3": ("h3k27me3", "H3K27me3", 5_000),
}


class Tracks:
    """One histone mark with labels, and the methods to compare on it."""

    def __init__(self, name: str, size: Size = FULL) -> None:
        modality, channel, bin_size = TASKS[name]
        adata = self._read(name, modality)
        self.size = size
        self.adata = adata if size is FULL else adata[size.rows(adata.n_obs)].copy()
        self.labels = self.adata.obs["cell_type"].astype(str).to_numpy()
        self.depth = np.asarray(self.adata.X.sum(1)).ravel()
        bins = self.adata.var[["chrom", "start", "end"]].copy()
        self.adata.obsm["tracks"] = self.adata.X.tocsr().astype(np.int32)
        self.adata.uns["tracks"] = {"channels": np.array([channel]), "bins": bins, "bin_size_bp": bin_size}

    @staticmethod
    def _read(name: str, modality: str | None) -> AnnData:
        """Read the counts, bins in the order of the genome."""
        import anndata
        import mudata

        import epivi

        if modality is None:
            return anndata.read_h5ad(DATA / f"{name}.h5ad")
        mdata = mudata.read_h5mu(DATA / f"{name}.h5mu")
        adata = mdata[modality].copy()
        adata.obs["cell_type"] = mdata.obs["cell_type"].to_numpy()
        return epivi.pp.order_by_chromosome(adata, copy=True)

    def judge(self, values: np.ndarray) -> dict[str, float]:
        """Score an embedding."""
        return scores(values, self.labels, self.depth)

    def lsi(self, seed: int, n_comps: int) -> dict[str, float]:
        return self.judge(rivals.lsi(self.adata, n_comps, seed))

    def poissonvi(self, seed: int) -> dict[str, float]:
        return self.judge(rivals.poissonvi(self.adata, None, self.size.epochs, seed))

    def tracks(self, seed: int, kind: str, **options: Any) -> dict[str, float]:
        import epivi

        cls = getattr(epivi, kind)
        cls.setup_anndata(self.adata)
        model = cls(self.adata, seed=seed, **options)
        start = time.perf_counter()
        model.train(**self.size.train | QUIET)
        result = self.judge(model.get_latent_representation())
        epochs = len(model.history["train_loss"])
        held = -model.get_elbo(indices=model.validation_indices)
        return result | {"-ELBO": held, "epochs": epochs, "seconds": time.perf_counter() - start}

    def methods(self) -> dict[str, Callable[[int], dict[str, float]]]:
        """Methods by name."""
        conv = {k: {"kernel_size": k, "stride": k} for k in (11, 31)}
        return {
            "LSI, 10 components": lambda seed: self.lsi(seed, 10),
            "LSI, 30 components": lambda seed: self.lsi(seed, 30),
            "POISSONVI": self.poissonvi,
            "FCVAE": lambda seed: self.tracks(seed, "FCVAE"),
            "ConvNetVAE K11 S11": lambda seed: self.tracks(seed, "ConvNetVAE", **conv[11]),
            "ConvNetVAE K31 S31": lambda seed: self.tracks(seed, "ConvNetVAE", **conv[31]),
        }


def main() -> int:
    """Run what is missing, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=list(TASKS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--methods", help="only methods whose name this regular expression finds")
    parser.add_argument("--out", type=Path, default=Path("results/quality"))
    parser.add_argument("--quick", action="store_true", help="a thousand cells and a few epochs: checks the script")
    chosen = parser.parse_args()
    quiet(1)
    if not any(DATA.glob(f"{chosen.name}.*")):
        print(f"test data not found: set EPIVI_TEST_DATA (missing sc/{chosen.name})", file=sys.stderr)
        return 2
    run_table(Tracks(chosen.name, QUICK if chosen.quick else FULL).methods(), f"{chosen.name}_tracks", chosen)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
