"""SAILER: how little the weight of the information term and the number of latent dimensions matter.

    OMP_NUM_THREADS=1 uv run python benchmarks/claims/sailer_robustness.py

Setting S1 (1,600 cells x 4,000 regions, five types), 60 epochs at three times the default learning rate, as in
``sailer_depth.py``. The thesis varies lambda from 0 to 50 and z from 2 to 20 on the mouse atlas (its Tables 2.1 and
2.2): from lambda 0.01 on the ARI stays within 0.06 and I(z,depth) within 0.013, from z = 5 on within 0.02 and 0.021.
The bounds allow twice that for the ARI. Clusters are those of a Gaussian mixture, since Leiden leaves no room on S1.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from _common import (
    LSI,
    Claim,
    Scores,
    at_least,
    at_most,
    embedding_scores,
    finish,
    fit,
    lsi,
    metric,
    parse,
    run_seeds,
)

if TYPE_CHECKING:
    from anndata import AnnData

LAMBDAS = (0.0, 0.01, 0.1, 1.0, 10.0, 50.0)
SIZES = (2, 5, 10, 15, 20)
DEFAULT_LAMBDA, DEFAULT_SIZE = 1.0, 10
EPOCHS = 60
LEARNING_RATE = 3e-3
PARTS = ("lambda", "latent dimensions")
ARI, INFORMATION = "ARI (mixture)", "I(z,depth)"


def run(adata: AnnData, seed: int, part: str, epochs: int) -> dict[str, Scores]:
    """Return the scores of LSI and of SAILER for each value."""
    import epivi

    epivi.SAILER.setup_anndata(adata)
    result = {LSI: embedding_scores(lsi(adata, seed=seed), adata, seed)}
    for value in LAMBDAS if part == "lambda" else SIZES:
        options = {"invariance_weight": value} if part == "lambda" else {"n_latent": value}
        model = fit(epivi.SAILER(adata, seed=seed, **options), epochs, lr=LEARNING_RATE)
        result[f"{part} {value:g}"] = embedding_scores(model.get_latent_representation(), adata, seed)
    return result


def claims(part: str, runs: list[dict[str, Scores]]) -> list[Claim]:
    """Return the claims about one part."""

    def of(value: float, name: str) -> np.ndarray:
        return metric(runs, f"{part} {value:g}", name)

    if part == "lambda":
        used, default = LAMBDAS[1:], DEFAULT_LAMBDA
        rest = [at_most("I(z,depth), lambda 1 / lambda 0", of(1.0, INFORMATION) / of(0.0, INFORMATION), 1.0)]
    else:
        used, default = SIZES[1:], DEFAULT_SIZE
        rest = [at_most("ARI, two latent dimensions - ten", of(2, ARI) - of(10, ARI), 0.0)]
    lowest = np.min([of(value, ARI) for value in used], axis=0)
    highest = np.max([of(value, INFORMATION) for value in used], axis=0)
    where = f"{part} from {used[0]:g} to {used[-1]:g}"
    return [
        at_least(f"{where}: lowest ARI - that at {default:g}", lowest - of(default, ARI), -0.12),
        at_most(f"{where}: highest I(z,depth) / LSI", highest / metric(runs, LSI, INFORMATION), 0.3),
        *rest,
    ]


def main() -> int:
    """Run both parts and write the results."""
    chosen = parse(__doc__, part={"choices": list(PARTS), "help": "only this part"})
    import epivi

    scale, epochs = (0.25, 10) if chosen.quick else (1.0, EPOCHS)
    settings = {
        part: run_seeds(
            part,
            chosen.seeds,
            lambda seed, part=part: run(
                epivi.simulate.standard("S1", seed, scale=scale, region_scale=1.0), seed, part, epochs
            ),
        )
        for part in PARTS
        if chosen.part in (None, part)
    }
    return finish(
        "sailer_robustness",
        "SAILER: weight of the information term, latent dimensions",
        settings,
        [claim for part, runs in settings.items() for claim in claims(part, runs)],
        chosen,
        notes=["lambda 0 is a conditional VAE with weighted open entries."],
    )


if __name__ == "__main__":
    raise SystemExit(main())
