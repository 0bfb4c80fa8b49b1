"""SAILER, Sim3: two batches of unequal depth and background, each with a rare type of its own.

    OMP_NUM_THREADS=1 uv run python benchmarks/claims/sailer_batches.py

Setting S3: 2,100 cells of five types; batch A has a median of 300 fragments, batch B of 600 and less background; one
type of 50 cells is in A only, another in B only. Imputed accessibility is at the mean depth and in one batch for all
cells. It is compared with the raw data and with the mean raw accessibility of the 15 nearest neighbours in LSI.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from _common import (
    DEPTH_NOTES,
    FORMS,
    LSI,
    LSI_REST,
    RAW,
    SAILER,
    WITHOUT,
    Claim,
    Scores,
    at_least,
    at_most,
    depth_correlation,
    dice_scores,
    embedding_scores,
    finish,
    fit,
    lsi,
    metric,
    parse,
    raw_dice,
    run_seeds,
    smoothed,
)

if TYPE_CHECKING:
    from anndata import AnnData

EPOCHS = 50
LEARNING_RATE = 3e-3


def run(adata: AnnData, seed: int, epochs: int) -> dict[str, Scores]:
    """Return the scores of all methods on one simulation."""
    import epivi

    result = {RAW: raw_dice(adata)}
    for name, drop_first in ((LSI, False), (LSI_REST, True)):
        values = lsi(adata, drop_first=drop_first, seed=seed)
        result[name] = embedding_scores(values, adata, seed, with_batch=True)
        result[name] |= dice_scores(smoothed(adata, values), adata)
    epivi.SAILER.setup_anndata(adata, batch_key="batch")
    for name, options in FORMS.items():
        model = fit(epivi.SAILER(adata, seed=seed, **options), epochs, lr=LEARNING_RATE)
        imputed = model.get_normalized_accessibility(return_numpy=True)
        result[name] = embedding_scores(model.get_latent_representation(), adata, seed, with_batch=True)
        result[name] |= dice_scores(imputed, adata)
        result[name] |= depth_correlation(imputed, adata)
    return result


def claims(runs: list[dict[str, Scores]]) -> list[Claim]:
    """Return the claims."""

    def of(method: str, name: str) -> np.ndarray:
        return metric(runs, method, name)

    purity = [of(SAILER, name) for name in runs[0][SAILER] if name.startswith("purity")]
    specific = "Dice (specific)"
    return [
        at_most(
            "I(z,batch), SAILER / VAE without covariates", of(SAILER, "I(z,batch)") / of(WITHOUT, "I(z,batch)"), 0.4
        ),
        at_most("I(z,depth), SAILER / LSI", of(SAILER, "I(z,depth)") / of(LSI, "I(z,depth)"), 0.3),
        at_least("purity of the rare types, the lower of the two", np.min(purity, axis=0), 0.85),
        at_least("Dice on the foreground, SAILER - raw", of(SAILER, "Dice") - of(RAW, "Dice"), 0.3),
        at_least("type-specific Dice, SAILER - LSI neighbours", of(SAILER, specific) - of(LSI, specific), 0.0),
    ]


def main() -> int:
    """Run the setting and write the results."""
    chosen = parse(__doc__)
    import epivi

    scale, epochs = (0.25, 15) if chosen.quick else (1.0, EPOCHS)
    runs = run_seeds(
        "S3", chosen.seeds, lambda seed: run(epivi.simulate.standard("S3", seed, scale=scale), seed, epochs)
    )
    return finish(
        "sailer_batches",
        "SAILER with two batches",
        {"S3": runs},
        claims(runs),
        chosen,
        notes=[
            "Dice in the rows of LSI: mean raw accessibility of the 15 nearest neighbours in that embedding.",
            *DEPTH_NOTES,
        ],
    )


if __name__ == "__main__":
    raise SystemExit(main())
