"""SAILERX: alignment to a reference, what it gives, what it leaves alone, and cells without RNA.

    OMP_NUM_THREADS=1 uv run python benchmarks/claims/sailerx_alignment.py

Simulated multiomes of 750 cells, 2,000 regions and five types of two sub-types each. "weights": shallow ATAC, where the
reference has something to give, and the alignment weight from 0 to 2. "shuffled": good ATAC and a reference of other
cells. "ATAC-only split": the reference does not see the sub-types. "shallow": shallow ATAC, and 300 cells without RNA
at half that depth. Weight 0 is SAILER in the same network. The network is that of SAILERX with 20 latent dimensions and
a learning rate three times the default, so that 80 epochs suffice.
"""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from _common import Claim, Scores, at_least, at_most, clusters, finish, fit, metric, parse, run_seeds

if TYPE_CHECKING:
    from collections.abc import Callable

    from mudata import MuData

WEIGHTS = (0.0, 0.05, 0.2, 0.457, 2.0)
DEFAULT = 0.457
N_TYPES = 5
N_LATENT = 20
LEARNING_RATE = 3e-3
DEEP: dict[str, Any] = {"median": 400, "clip": (80, 2000)}
SHALLOW: dict[str, Any] = {"median": 100, "clip": (25, 600)}
ALONE, TOGETHER, ALIGNED = "SAILER, ATAC-only cells alone", "SAILER, all cells", "SAILERX, all cells"


class Trial:
    """Sizes and length of training of the full or of the quick form."""

    def __init__(self, *, quick: bool) -> None:
        self.n_cells = [40 if quick else 150] * N_TYPES
        self.n_atac_only = 60 if quick else 300
        self.epochs = 10 if quick else 80

    def simulate(self, seed: int, atac: dict[str, Any] = DEEP, **options: Any) -> MuData:
        """Return a multiome on 2,000 regions."""
        import epivi

        kwargs = {"n_fg": 1000, "n_bg": 1000, **atac}
        return epivi.simulate.multiome(self.n_cells, seed=seed, atac_kwargs=kwargs, n_genes=100, **options)

    def sailerx(self, mdata: MuData, seed: int, **options: Any) -> Any:
        """Train SAILERX."""
        import epivi

        epivi.SAILERX.setup_mudata(mdata, reference_key="X_pca", batch_key="batch")
        return fit(epivi.SAILERX(mdata, seed=seed, n_latent=N_LATENT, **options), self.epochs, lr=LEARNING_RATE)


def labels_of(mdata: MuData, key: str = "cell_type") -> np.ndarray:
    """Return a column of labels as text."""
    return mdata.obs[key].astype(str).to_numpy()


def depth_information(values: np.ndarray, mdata: MuData, seed: int) -> float:
    """Return I(z, depth)."""
    from epivi.metrics import confounder_information

    depth = mdata["atac"].obs.loc[mdata.obs_names, "depth"].to_numpy(dtype=float)
    return confounder_information(values, depth, discrete=False, seed=seed).mean


def aligned_scores(model: Any, mdata: MuData, seed: int) -> Scores:
    """Return alignment on validation and training cells, information about depth, and agreement with the types."""
    values = model.get_latent_representation()
    return {
        "alignment, validation": model.get_alignment_loss(indices=model.validation_indices),
        "alignment, training": model.get_alignment_loss(indices=model.train_indices),
        "I(z,depth)": depth_information(values, mdata, seed),
        **clusters(values, labels_of(mdata), seed),
    }


def run_weights(trial: Trial, seed: int) -> dict[str, Scores]:
    """Return the scores for each weight, where ATAC alone does not give the similarities of the reference."""
    mdata = trial.simulate(seed, SHALLOW)
    return {
        f"weight {weight:g}": aligned_scores(trial.sailerx(mdata, seed, align_weight=weight), mdata, seed)
        for weight in WEIGHTS
    }


def claims_weights(runs: list[dict[str, Scores]]) -> list[Claim]:
    """Return the claims about the alignment weight."""
    loss = {w: metric(runs, f"weight {w:g}", "alignment, validation") for w in WEIGHTS}
    steps = np.array([loss[b] / loss[a] for a, b in pairwise(WEIGHTS)])
    reached = (loss[0.0] - loss[DEFAULT]) / (loss[0.0] - loss[WEIGHTS[-1]])
    return [
        at_most("validation alignment, largest ratio from a weight to the next", steps.max(axis=0), 1.05),
        at_most(f"validation alignment, weight {DEFAULT} / weight 0", loss[DEFAULT] / loss[0.0], 0.5),
        at_least(f"plateau: share of the whole fall reached at weight {DEFAULT}", reached, 0.8),
    ]


def run_shuffled(trial: Trial, seed: int) -> dict[str, Scores]:
    """Return the scores of good ATAC with its reference shuffled, and without alignment."""
    mdata = trial.simulate(seed, shuffle_reference=True)
    return {
        name: aligned_scores(trial.sailerx(mdata, seed, align_weight=weight), mdata, seed)
        for name, weight in (("SAILER", 0.0), ("SAILERX, shuffled reference", DEFAULT))
    }


def claims_shuffled(runs: list[dict[str, Scores]]) -> list[Claim]:
    """Return the claim about a shuffled reference."""
    gap = metric(runs, "SAILERX, shuffled reference", "ARI") - metric(runs, "SAILER", "ARI")
    return [at_least("shuffled reference: ARI, SAILERX - SAILER", gap, -0.15)]


def split_scores(values: np.ndarray, mdata: MuData, seed: int) -> Scores:
    """Return how well types and sub-types are found.

    Purity of the split: of the 10 nearest neighbours within the type, the share of the cell's sub-type; chance is 0.5.
    """
    from epivi.metrics import label_purity

    types, subtypes = labels_of(mdata), labels_of(mdata, "subtype")
    purity = [label_purity(values[types == t], subtypes[types == t])["purity"].mean() for t in np.unique(types)]
    over_types = clusters(values, types, seed)
    over_subtypes = clusters(values, subtypes, seed)
    return {
        "purity of the split": float(np.mean(purity)),
        "ARI, sub-types": over_subtypes["ARI"],
        "ARI, sub-types (mixture)": over_subtypes["ARI (mixture)"],
        "ARI, types": over_types["ARI"],
    }


def run_split(trial: Trial, seed: int) -> dict[str, Scores]:
    """Return the scores where the reference does not see the sub-types."""
    mdata = trial.simulate(seed, subtype_only_in="atac", subtype_share=0.2)
    result = {"reference": split_scores(np.asarray(mdata["rna"].obsm["X_pca"]), mdata, seed)}
    for name, weight in (("SAILER", 0.0), ("SAILERX", DEFAULT)):
        model = trial.sailerx(mdata, seed, align_weight=weight)
        result[name] = split_scores(model.get_latent_representation(), mdata, seed)
    return result


def claims_split(runs: list[dict[str, Scores]]) -> list[Claim]:
    """Return the claims about sub-types that the reference does not see."""

    def of(method: str, name: str) -> np.ndarray:
        return metric(runs, method, name)

    purity, ari = "purity of the split", "ARI, sub-types"
    return [
        at_least("ATAC-only split: purity, SAILERX / SAILER", of("SAILERX", purity) / of("SAILER", purity), 0.8),
        at_least(
            "ATAC-only split: ARI of sub-types, SAILERX - reference", of("SAILERX", ari) - of("reference", ari), 0
        ),
    ]


def run_shallow(trial: Trial, seed: int) -> dict[str, Scores]:
    """Return the scores of cells with and without RNA in a shallow data set."""
    import epivi
    from epivi.metrics import confounder_information, knn_accuracy

    mdata = trial.simulate(seed, n_atac_only=trial.n_atac_only, atac=SHALLOW)
    labels, has = labels_of(mdata), mdata.obs["has_reference"].to_numpy(dtype=bool)
    batch = labels_of(mdata, "batch")
    result: dict[str, Scores] = {
        "reference": {"ARI, cells with RNA": clusters(mdata.obsm["reference"][has], labels[has], seed)["ARI"]}
    }
    for name, weight in ((TOGETHER, 0.0), (ALIGNED, DEFAULT)):
        values = trial.sailerx(mdata, seed, align_weight=weight).get_latent_representation()
        result[name] = {
            "ARI, cells with RNA": clusters(values[has], labels[has], seed)["ARI"],
            **without_rna(values[~has], labels[~has], seed),
            "labels from cells with RNA": knn_accuracy(values[has], labels[has], values[~has], labels[~has]),
            "I(z,data set)": confounder_information(values, batch, discrete=True, seed=seed).mean,
        }
    alone = mdata["atac"][mdata.obs_names[~has]].copy()
    epivi.SAILER.setup_anndata(alone)
    # as many steps as with all cells
    epochs = round(trial.epochs * mdata.n_obs / alone.n_obs)
    model = epivi.SAILER(alone, seed=seed, n_latent=N_LATENT)
    values = fit(model, epochs, batch_size=200, lr=LEARNING_RATE).get_latent_representation()
    result[ALONE] = without_rna(values, labels[~has], seed)
    return result


def without_rna(values: np.ndarray, labels: np.ndarray, seed: int) -> Scores:
    """Return agreement with the types of cells without RNA: clusters, and neighbours among themselves."""
    from epivi.metrics import label_purity

    return {
        "ARI, cells without RNA": clusters(values, labels, seed)["ARI"],
        "purity, cells without RNA": float(label_purity(values, labels)["purity"].mean()),
    }


def claims_shallow(runs: list[dict[str, Scores]]) -> list[Claim]:
    """Return the claims about shallow data and cells without RNA."""

    def of(method: str, name: str) -> np.ndarray:
        return metric(runs, method, name)

    with_rna, ari, purity = "ARI, cells with RNA", "ARI, cells without RNA", "purity, cells without RNA"
    return [
        at_least("shallow ATAC: ARI, SAILERX - SAILER", of(ALIGNED, with_rna) - of(TOGETHER, with_rna), 0.05),
        at_least("cells without RNA: ARI, with multiome cells - alone", of(ALIGNED, ari) - of(ALONE, ari), 0.05),
        at_least(
            "cells without RNA: purity, with multiome cells - alone", of(ALIGNED, purity) - of(ALONE, purity), 0.05
        ),
        at_most("hybrid mixing: I(z,data set)", of(ALIGNED, "I(z,data set)"), 0.05),
    ]


PARTS: dict[str, tuple[Callable[[Trial, int], dict[str, Scores]], Callable[[list[dict[str, Scores]]], list[Claim]]]] = {
    "weights": (run_weights, claims_weights),
    "shuffled": (run_shuffled, claims_shuffled),
    "ATAC-only split": (run_split, claims_split),
    "shallow": (run_shallow, claims_shallow),
}


def main() -> int:
    """Run all parts and write the results."""
    chosen = parse(__doc__, part={"choices": list(PARTS), "help": "only this part"})
    trial = Trial(quick=chosen.quick)
    settings, claims = {}, []
    for name, (run, judge) in PARTS.items():
        if chosen.part in (None, name):
            settings[name] = run_seeds(name, chosen.seeds, lambda seed, run=run: run(trial, seed))
            claims += judge(settings[name])
    return finish(
        "sailerx_alignment",
        "SAILERX and its reference",
        settings,
        claims,
        chosen,
        notes=[
            "Weight 0, and SAILER where it is not said to be alone, is SAILERX without alignment.",
            "'SAILER, ATAC-only cells alone' is trained for as many steps as the others.",
        ],
    )


if __name__ == "__main__":
    raise SystemExit(main())
