"""ConvNet-VAE and FC-VAE with cells that lack modalities: training on them against leaving them out, and imputation.

    OMP_NUM_THREADS=1 uv run python benchmarks/claims/convnetvae_missing.py

900 simulated cells of six types, three modalities of 150 fragments, each missing in 30 % of the cells. "all cells"
trains on every cell; "complete cells" on those that have all three, about a third, with the same modality dropout and
the same number of steps. Scores are of all cells, of whom the second model embeds the incomplete ones as queries. "one
hidden" embeds complete data of which one modality is not read. Imputation is the mean over types and modalities of the
correlation of the imputed track, averaged over the cells that lack it, with the true profile of the type.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from _common import Claim, Scores, at_least, metric, run_one_setting
from _tracks import FC, conv_name, fit, kmeans_ari, simulate

if TYPE_CHECKING:
    from anndata import AnnData

EPOCHS = 60
SHARE = 0.3
DROPOUT = 0.3
METHODS: dict[str, int | None] = {conv_name(11): 11, FC: None}


def imputation(model: Any, adata: AnnData) -> float:
    """Return the correlation of imputed tracks with the true profiles, mean over types and modalities."""
    profile_tml = np.asarray(adata.uns["truth"]["profiles"])
    types = list(adata.uns["truth"]["types"])
    labels = adata.obs["cell_type"].astype(str)
    found = []
    for m, name in enumerate(model.layout.channels):
        imputed = model.impute_modality(name, adata)
        of_cell = labels[imputed.obs_names].to_numpy()
        for t, label in enumerate(types):
            if (of_cell == label).any():
                found.append(np.corrcoef(imputed.X[of_cell == label].mean(0), profile_tml[t, m])[0, 1])
    return float(np.mean(found))


def run(seed: int, *, quick: bool) -> dict[str, Scores]:
    """Return the scores of both models and both ways of training."""
    adata = simulate(seed, quick=quick, missing=dict.fromkeys(range(3), SHARE))
    whole = simulate(seed, quick=quick)
    labels = adata.obs["cell_type"].astype(str).to_numpy()
    is_complete = np.asarray(adata.obsm["tracks_mask"]).all(axis=1)
    complete = adata[is_complete].copy()
    epochs = 5 if quick else EPOCHS
    result = {}
    for name, kernel in METHODS.items():
        for form, data, factor in (("all cells", adata, 1.0), ("complete cells", complete, 1 / is_complete.mean())):
            model = fit(data, seed, kernel=kernel, epochs=round(epochs * factor), modality_dropout_rate=DROPOUT)
            values = model.get_latent_representation(adata)
            hidden = [
                kmeans_ari(model.get_latent_representation(whole, modality=_others(model, m)), labels)
                for m in range(model.layout.n_channels)
            ]
            result[f"{name}, {form}"] = {
                "ARI": kmeans_ari(values, labels),
                "ARI, incomplete cells": kmeans_ari(values[~is_complete], labels[~is_complete]),
                "ARI, nothing hidden": kmeans_ari(model.get_latent_representation(whole), labels),
                "ARI, one hidden": float(np.mean(hidden)),
                "imputation": imputation(model, adata),
                "-ELBO": -model.get_elbo(adata),
            }
    return result


def _others(model: Any, channel: int) -> list[str]:
    return [name for m, name in enumerate(model.layout.channels) if m != channel]


def claims(runs: list[dict[str, Scores]]) -> list[Claim]:
    """Return the claims."""
    result = []
    for name in METHODS:

        def of(form: str, key: str, name: str = name) -> np.ndarray:
            return metric(runs, f"{name}, {form}", key)

        share = of("all cells", "ARI, one hidden") / of("all cells", "ARI, nothing hidden")
        gain = of("all cells", "ARI") - of("complete cells", "ARI")
        fall = of("complete cells", "-ELBO") - of("all cells", "-ELBO")
        result += [
            at_least(f"{name}: ARI with one modality hidden / nothing hidden", share, 0.8),
            at_least(f"{name}: correlation of imputed tracks with the truth", of("all cells", "imputation"), 0.5),
            at_least(f"{name}: ARI, trained on all - on complete cells", gain, 0.0),
            at_least(f"{name}: -ELBO, trained on complete - on all cells", fall, 0.0),
        ]
    return result


def main() -> int:
    """Run the setting and write the results."""
    return run_one_setting(
        "convnetvae_missing", "Cells that lack modalities", "missing modalities", run, claims, description=__doc__
    )


if __name__ == "__main__":
    raise SystemExit(main())
