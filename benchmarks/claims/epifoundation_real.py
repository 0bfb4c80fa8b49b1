"""EpiFoundation on two real multiomes: what pretraining learns, batches that are there and that are not, other peaks.

    OMP_NUM_THREADS=1 uv run python benchmarks/claims/epifoundation_real.py

SNARE-seq mouse cortex (cells of at least 100 peak counts, coarse types, "Mis" left out) and sci-CAR A549 (hours of
dexamethasone). 80 % of the cells are trained on without labels; LSI is fitted on them alone; types are told by 15
neighbours among them. "cortex": which genes held-out cells express, types by the angle between centred vectors (those
of cells with few reads are short, and alike by distance), and libraries that do not differ. "lost reads": a third of
the cells keeps 40 % of its reads and loses 5 % of the peaks. The data are found through EPIVI_TEST_DATA (default
../shared/data).
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from _common import QUIET, Claim, Scores, at_least, at_most, finish, metric, parse, run_seeds
from quality_epifoundation import LABELS, NETWORK, PRETRAINING_EPOCHS, Fold, lsi_features, read_expression
from scipy import sparse

if TYPE_CHECKING:
    from anndata import AnnData

CORTEX, CELL_LINE = "snareseq_mouse_cortex", "scicar_a549"
UNASSIGNED = "Mis"
MASKED = "EpiFoundation, masked peaks too"
LSI, OWN, KEYED, ADVERSARY = "LSI", "EpiFoundation", "EpiFoundation, batch key", "EpiFoundation, key and adversary"
N_LSI, N_NEIGHBORS = 20, 15
LEAST_CELLS = 5
ADVERSARY_WEIGHT = 0.2
KEPT_READS, LOST_PEAKS, CHANGED_CELLS = 0.4, 0.05, 1 / 3


def balanced_knn(
    z_nd: np.ndarray, labels: np.ndarray, train: np.ndarray, test: np.ndarray, *, by_angle: bool = False
) -> float:
    """Return the balanced accuracy of 15 nearest training cells, by distance of standardised vectors or by angle."""
    from sklearn.metrics import balanced_accuracy_score
    from sklearn.neighbors import KNeighborsClassifier

    z_nd = z_nd - z_nd[train].mean(0)
    if by_angle:
        z_nd = z_nd / np.maximum(np.linalg.norm(z_nd, axis=1, keepdims=True), 1e-12)
    else:
        z_nd = z_nd / np.maximum(z_nd[train].std(0), 1e-12)
    classifier = KNeighborsClassifier(N_NEIGHBORS).fit(z_nd[train], labels[train])
    return float(balanced_accuracy_score(labels[test], classifier.predict(z_nd[test])))


def read_cortex(seed: int) -> Fold:
    """Read SNARE-seq without unassigned cells, and split it."""
    fold = read_expression(CORTEX, seed)
    keep = fold.data.obs["cell_type_coarse"].astype(str).to_numpy() != UNASSIGNED
    new = np.cumsum(keep) - 1
    train, test = (np.sort(new[rows[keep[rows]]]) for rows in (fold.train, fold.test))
    return Fold(fold.data[keep].copy(), train, test, seed)


def pretrained(fold: Fold, epochs: int, *, batch_key: str | None = None, **options: Any) -> Any:
    """Train on the genes of the training cells."""
    import epivi

    train = fold.data[fold.train].copy()
    epivi.EpiFoundation.setup_mudata(train, batch_key=batch_key)
    model = epivi.EpiFoundation(train, seed=fold.seed, **NETWORK | options)
    model.train(max_epochs=epochs, **QUIET)
    return model


def run_cortex(seed: int, epochs: int) -> dict[str, Scores]:
    """Return alignment and representation on SNARE-seq, and mixing of its libraries with and without the key."""
    from sklearn.linear_model import Ridge
    from sklearn.metrics import roc_auc_score

    fold = read_cortex(seed)
    atac, train, test = fold.data["atac"].copy(), fold.train, fold.test
    types, libraries = (fold.data.obs[key].astype(str).to_numpy() for key in ("cell_type_coarse", "batch"))
    z_nd = lsi_features(atac.X, train, N_LSI)
    model = pretrained(fold, epochs)
    vectors = {
        LSI: z_nd,
        OWN: model.get_latent_representation(atac),
        MASKED: pretrained(fold, epochs, masked_peak_weight=1.0).get_latent_representation(atac),
        KEYED: pretrained(fold, epochs, batch_key="batch").get_latent_representation(atac),
    }
    result: dict[str, Scores] = {
        name: {
            "type kNN": balanced_knn(values, types, train, test, by_angle=True),
            "type kNN by distance": balanced_knn(values, types, train, test),
            "library kNN": balanced_knn(values, libraries, train, test),
        }
        for name, values in vectors.items()
    }
    expressed = sparse.csr_matrix(fold.data["rna"].X > 0, dtype=np.float64)
    genes = np.flatnonzero(np.asarray(expressed[train].sum(0)).ravel() > 0)
    truth = expressed[test][:, genes].toarray()
    known = expressed[train][:, genes].toarray()
    ridge = Ridge(1000.0).fit(z_nd[train], known)
    told = model.get_normalized_expression(atac[test].copy(), return_numpy=True)[:, genes]
    scores = {"gene frequency": np.broadcast_to(known.mean(0), truth.shape), LSI: ridge.predict(z_nd[test]), OWN: told}
    varies = np.flatnonzero((truth.sum(0) > 0) & (truth.sum(0) < len(truth)))
    for name, score in scores.items():
        within = [roc_auc_score(truth[:, g], score[:, g]) for g in varies]
        result.setdefault(name, {})["AUROC of expressed genes"] = float(roc_auc_score(truth.ravel(), score.ravel()))
        result[name]["AUROC within genes"] = float(np.mean(within))
    result |= {"projected": projected(model, atac[test].copy(), seed)}
    return result


def projected(model: Any, atac: AnnData, seed: int) -> Scores:
    """Return the likeness of vectors when the cells come with shifted and merged peaks."""
    import epivi

    other = model.project_peaks(epivi.simulate.shifted_peaks(atac, shift=100, seed=seed))
    own, mapped = model.get_latent_representation(atac), model.get_latent_representation(other)
    cosine = (own * mapped).sum(1) / (np.linalg.norm(own, axis=1) * np.linalg.norm(mapped, axis=1))
    mapped, own = mapped - own.mean(0), own - own.mean(0)
    centred = (own * mapped).sum(1) / (np.linalg.norm(own, axis=1) * np.linalg.norm(mapped, axis=1))
    return {"cosine": float(cosine.mean()), "cosine of centred vectors": float(centred.mean())}


def claims_cortex(runs: list[dict[str, Scores]]) -> list[Claim]:
    """Return the claims about SNARE-seq."""

    def gap(name: str, other: str, key: str) -> Any:
        return metric(runs, name, key) - metric(runs, other, key)

    chance = 1 / 8
    return [
        at_least(
            "expressed genes, AUROC over gene frequency", gap(OWN, "gene frequency", "AUROC of expressed genes"), 0.0
        ),
        at_least("expressed genes, AUROC over ridge on LSI", gap(OWN, LSI, "AUROC of expressed genes"), 0.0),
        at_least("the same within genes, over ridge on LSI", gap(OWN, LSI, "AUROC within genes"), 0.0),
        at_least("coarse types, label-free kNN over that of LSI", gap(OWN, LSI, "type kNN"), 0.0),
        at_least("the same, with masked peaks too", gap(MASKED, LSI, "type kNN"), 0.0),
        at_most(
            "libraries with the key: distance of kNN from chance",
            np.abs(metric(runs, KEYED, "library kNN") - chance),
            0.03,
            "8 libraries that do not differ",
        ),
        at_least("coarse types, kNN with the library key over without", gap(KEYED, OWN, "type kNN"), -0.02),
        at_least("shifted and merged peaks, projected: cosine", metric(runs, "projected", "cosine"), 0.9),
    ]


def lose_reads(atac: AnnData, seed: int) -> np.ndarray:
    """Thin a third of the cells and take peaks from them, in place; return which cells."""
    rng = np.random.default_rng([seed, 0xBA])
    changed_n = rng.random(atac.n_obs) < CHANGED_CELLS
    lost_p = rng.random(atac.n_vars) < LOST_PEAKS
    x_np = sparse.csr_matrix(atac.X, copy=True)
    in_changed = np.repeat(changed_n, np.diff(x_np.indptr))
    x_np.data[in_changed] = rng.binomial(x_np.data[in_changed].astype(np.int64), KEPT_READS)
    x_np.data[in_changed & lost_p[x_np.indices]] = 0
    x_np.eliminate_zeros()
    atac.X = x_np
    return changed_n


def run_lost_reads(seed: int, epochs: int) -> dict[str, Scores]:
    """Return mixing and types with a planted batch."""
    from sklearn.metrics import silhouette_score

    fold = read_cortex(seed)
    planted = np.where(lose_reads(fold.data["atac"], seed), "lost", "whole")
    fold.data.obs["planted"] = planted
    full = np.asarray((fold.data["atac"].X > 0).sum(1)).ravel() > 0
    rows = np.flatnonzero(full)
    new = np.cumsum(full) - 1
    data = fold.data[rows].copy()
    fold = Fold(data, *(new[part[full[part]]] for part in (fold.train, fold.test)), seed)
    atac, types, planted = data["atac"].copy(), data.obs["cell_type_coarse"].astype(str).to_numpy(), planted[rows]
    vectors = {LSI: lsi_features(atac.X, fold.train, N_LSI)}
    for name, options in (
        (OWN, {}),
        (KEYED, {"batch_key": "planted"}),
        (ADVERSARY, {"batch_key": "planted", "batch_adversary": ADVERSARY_WEIGHT}),
    ):
        vectors[name] = pretrained(fold, epochs, **options).get_latent_representation(atac)
    result = {}
    for name, z_nd in vectors.items():
        held, own_types = fold.test, types[fold.test]
        sizes = {t: np.unique(planted[held][own_types == t], return_counts=True)[1] for t in np.unique(own_types)}
        common = [t for t, size in sizes.items() if len(size) == 2 and size.min() >= LEAST_CELLS]
        within = [silhouette_score(z_nd[held][own_types == t], planted[held][own_types == t]) for t in common]
        result[name] = {
            "batch kNN": balanced_knn(z_nd, planted, fold.train, fold.test),
            "batch silhouette within types": float(np.mean(np.abs(within))),
            "type kNN": balanced_knn(z_nd, types, fold.train, fold.test),
        }
    return result


def claims_lost_reads(runs: list[dict[str, Scores]]) -> list[Claim]:
    """Return the claims about a planted batch."""
    own, keyed, adverse = (
        {key: metric(runs, name, key) for key in ("batch kNN", "batch silhouette within types", "type kNN")}
        for name in (OWN, KEYED, ADVERSARY)
    )
    key = "batch silhouette within types"
    return [
        at_most("planted batch: silhouette within types, key / no key", keyed[key] / own[key], 0.8),
        at_most("planted batch: silhouette within types, key and adversary / no key", adverse[key] / own[key], 0.8),
        at_most(
            "planted batch: kNN of the batch, key and adversary - no key", adverse["batch kNN"] - own["batch kNN"], 0.0
        ),
        at_least("planted batch: type kNN, key - no key", keyed["type kNN"] - own["type kNN"], -0.02),
        at_least("planted batch: type kNN, key and adversary - no key", adverse["type kNN"] - own["type kNN"], -0.02),
    ]


def run_cell_line(seed: int, epochs: int) -> dict[str, Scores]:
    """Return how well hours of treatment are told, label-free and label-tuned."""
    fold = read_expression(CELL_LINE, seed)
    atac, train, test = fold.data["atac"].copy(), fold.train, fold.test
    atac.obs["time"] = fold.data.obs["time_h"].astype(str).to_numpy()
    hours = atac.obs["time"].to_numpy()
    model = pretrained(fold, epochs)
    tuned = model.finetune("annotation", atac[train].copy(), labels_key="time", **LABELS, **QUIET)
    found = tuned.predict_labels(atac[test].copy()).astype(str).to_numpy()
    recall = [float((found[hours[test] == hour] == hour).mean()) for hour in np.unique(hours)]
    return {
        LSI: {"time kNN": balanced_knn(lsi_features(atac.X, train, N_LSI), hours, train, test)},
        OWN: {"time kNN": balanced_knn(model.get_latent_representation(atac), hours, train, test)},
        "EpiFoundation, label-tuned": {"balanced accuracy": float(np.mean(recall))},
    }


def claims_cell_line(runs: list[dict[str, Scores]]) -> list[Claim]:
    """Return the claims about A549."""
    free, tuned = metric(runs, OWN, "time kNN"), metric(runs, "EpiFoundation, label-tuned", "balanced accuracy")
    return [
        at_least("hours of treatment, label-free kNN over that of LSI", free - metric(runs, LSI, "time kNN"), 0.0),
        at_least("hours of treatment, label-tuned over LSI", tuned - metric(runs, LSI, "time kNN"), 0.0),
        at_least("hours of treatment, label-tuned over label-free", tuned - free, 0.0),
    ]


PARTS = {
    "cortex": (run_cortex, claims_cortex),
    "lost reads": (run_lost_reads, claims_lost_reads),
    "cell line": (run_cell_line, claims_cell_line),
}


def main() -> int:
    """Run all parts and write the results."""
    chosen = parse(__doc__, part={"choices": list(PARTS), "help": "only this part"})
    epochs = 1 if chosen.quick else PRETRAINING_EPOCHS
    settings: dict[str, list[dict[str, Scores]]] = {}
    claims: list[Claim] = []
    for name, (run, judge) in PARTS.items():
        if chosen.part in (None, name):
            settings[name] = run_seeds(name, chosen.seeds, lambda seed, run=run: run(seed, epochs))
            claims += judge(settings[name])
    suffix = "" if chosen.part is None else f"_{chosen.part.replace(' ', '_')}"
    title = "EpiFoundation on SNARE-seq mouse cortex and sci-CAR A549"
    return finish(f"epifoundation_real{suffix}", title, settings, claims, chosen)


if __name__ == "__main__":
    raise SystemExit(main())
