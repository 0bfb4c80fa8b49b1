"""SAILERX: what it gives with different references, on a real multiome.

    OMP_NUM_THREADS=1 uv run python benchmarks/claims/sailerx_references.py --data snareseq_mouse_cortex

References: principal components of the RNA (50 and 10), SCVI of the RNA, LSI of the ATAC itself, and the principal
components of other cells (shuffled). Without alignment the model is SAILER in the same network. The chapter says that
any embedding may serve and that a better one gives better latents. Labels come from the RNA, so that its references are
favoured. The data are found through EPIVI_TEST_DATA (default ../shared/data).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import _rivals as rivals
from _cells import FULL, MULTIOMES, QUICK, Multiome
from _common import Claim, Scores, at_least, finish, fit, metric, parse, run_seeds
from _runs import DATA

NONE, SHUFFLED, PCA = "no alignment", "PCA of other cells", "PCA of RNA, 50"
EPOCHS = 60
SCVI_EPOCHS = 100


def references(task: Multiome, seed: int, *, quick: bool) -> dict[str, np.ndarray]:
    """Return the references by name, one row a cell."""
    pca_nd = task.reference()
    rng = np.random.default_rng(seed)
    return {
        PCA: pca_nd,
        "PCA of RNA, 10": pca_nd[:, :10],
        "SCVI of RNA": rivals.scvi_latent(task.part("rna"), task.batch_key, 3 if quick else SCVI_EPOCHS, seed),
        "LSI of ATAC": rivals.lsi(task.mdata[task.atac], 10, seed),
        SHUFFLED: pca_nd[rng.permutation(len(pca_nd))],
    }


def scores(values: np.ndarray, labels: np.ndarray, seed: int) -> Scores:
    """Return ARI and NMI of Leiden clusters, as many as labels."""
    from epivi.metrics import cluster_agreement

    found = cluster_agreement(values, labels, seed=seed)
    return {"ARI": found.ari, "NMI": found.nmi}


def run(task: Multiome, seed: int, *, quick: bool) -> dict[str, Scores]:
    """Return the scores of each reference and of SAILERX with it."""
    import epivi

    found = references(task, seed, quick=quick)
    result: dict[str, Scores] = {}
    for name, reference in {**found, NONE: found[PCA]}.items():
        mdata = task.mdata.copy()
        mdata["rna"].obsm["reference"] = reference
        keys: dict[str, Any] = {"modalities": {"atac": task.atac, "rna": "rna"}, "reference_key": "reference"}
        epivi.SAILERX.setup_mudata(mdata, batch_key=task.batch_key, **keys)
        options: dict[str, Any] = {} if name != NONE else {"align_weight": 0.0}
        model = fit(epivi.SAILERX(mdata, seed=seed, encoder="auto", **options), 3 if quick else EPOCHS)
        own = scores(model.get_latent_representation(), task.labels, seed)
        alone = {} if name == NONE else scores(reference, task.labels, seed)
        result[name] = own | {f"{key} of the reference": value for key, value in alone.items()}
    return result


def claims(runs: list[dict[str, Scores]]) -> list[Claim]:
    """Return the claims."""
    from scipy.stats import spearmanr

    names = [name for name in runs[0] if name not in (NONE, SHUFFLED)]
    own, alone = (np.array([metric(runs, name, key) for name in names]) for key in ("NMI", "NMI of the reference"))
    order = [round(float(spearmanr(own[:, i], alone[:, i]).statistic), 6) for i in range(len(runs))]
    base = metric(runs, NONE, "NMI")
    return [
        at_least("NMI, PCA of RNA - no alignment", metric(runs, PCA, "NMI") - base, 0.05),
        at_least("rank correlation of NMI with that of the reference, four references", order, 0.8),
        at_least("NMI, PCA of other cells - no alignment", metric(runs, SHUFFLED, "NMI") - base, -0.05),
    ]


def main() -> int:
    """Run all references and write the result."""
    chosen = parse(__doc__, data={"choices": list(MULTIOMES), "default": "snareseq_mouse_cortex"})
    if not (DATA / f"{chosen.data}.h5mu").is_file():
        print(f"test data not found: set EPIVI_TEST_DATA (missing sc/{chosen.data}.h5mu)", file=sys.stderr)
        return 2
    task = Multiome(chosen.data, QUICK if chosen.quick else FULL)
    runs = run_seeds(chosen.data, chosen.seeds, lambda seed: run(task, seed, quick=chosen.quick))
    return finish(
        "sailerx_references", "SAILERX and the choice of its reference", {chosen.data: runs}, claims(runs), chosen
    )


if __name__ == "__main__":
    raise SystemExit(main())
