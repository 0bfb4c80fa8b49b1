"""ConvNet-VAE: shuffling the bins hurts convolutions, more so with larger kernels, and leaves FC-VAE as it is.

    OMP_NUM_THREADS=1 uv run python benchmarks/claims/convnetvae_shuffle.py

900 simulated cells (700 train) of six types, 1,992 bins in domains of 12, two and three modalities of 150 fragments;
the same counts with one random permutation of the bins. 25 epochs, 10 latent dimensions. ARI is that of k-means on the
validation cells.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from _common import Claim, Scores, at_least, at_most, finish, metric, parse, run_seeds
from _tracks import EPOCHS, FC, conv_name, fit, scores, simulate

KERNELS = (11, 31, 51)
MODALITIES = (2, 3)
METHODS: dict[str, int | None] = {conv_name(k): k for k in KERNELS} | {FC: None}


def run(seed: int, n_modalities: int, *, quick: bool) -> dict[str, Scores]:
    """Return the scores of all methods on ordered and shuffled bins."""
    result = {}
    for order, ordered in (("ordered", True), ("shuffled", False)):
        adata = simulate(seed, quick=quick, n_modalities=n_modalities, ordered=ordered)
        for name, kernel in METHODS.items():
            result[f"{name}, {order}"] = scores(fit(adata, seed, kernel=kernel, epochs=5 if quick else EPOCHS))
    return result


def claims(runs: list[dict[str, Scores]], n_modalities: int) -> list[Claim]:
    """Return the claims for one number of modalities."""

    def drop(name: str) -> np.ndarray:
        return metric(runs, f"{name}, ordered", "ARI") - metric(runs, f"{name}, shuffled", "ARI")

    def rise(name: str) -> np.ndarray:
        return metric(runs, f"{name}, shuffled", "-ELBO") / metric(runs, f"{name}, ordered", "-ELBO") - 1

    c = f"c={n_modalities}"
    rises = [rise(conv_name(k)) for k in KERNELS]
    result = []
    for k in KERNELS:
        result += [
            at_least(f"{c}, {conv_name(k)}: ARI, ordered - shuffled", drop(conv_name(k)), 0.1),
            at_least(f"{c}, {conv_name(k)}: relative rise of -ELBO", rise(conv_name(k)), 0.03),
        ]
    return [
        *result,
        at_most(f"{c}, {FC}: change of ARI", np.abs(drop(FC)), 0.02),
        at_most(f"{c}, {FC}: relative change of -ELBO", np.abs(rise(FC)), 0.005),
        at_least(f"{c}: rise of -ELBO, K31 - K11", rises[1] - rises[0], 0.0),
        at_least(f"{c}: rise of -ELBO, K51 - K31", rises[2] - rises[1], 0.0),
    ]


def main() -> int:
    """Run both numbers of modalities and write the results."""
    chosen = parse(__doc__, seeds=5)
    settings = {
        f"{c} modalities": run_seeds(f"{c} modalities", chosen.seeds, partial(run, n_modalities=c, quick=chosen.quick))
        for c in MODALITIES
    }
    found = [claim for c, runs in zip(MODALITIES, settings.values(), strict=True) for claim in claims(runs, c)]
    return finish("convnetvae_shuffle", "ConvNet-VAE and the order of bins", settings, found, chosen)


if __name__ == "__main__":
    raise SystemExit(main())
