"""SAILER, Sim2: nine types in shallow data.

    OMP_NUM_THREADS=1 uv run python benchmarks/claims/sailer_many_types.py

Setting S2: nine types of 200 cells, a median of 300 fragments over 4,000 regions. "S2, similar types": as many cells,
with smaller differences between types (standard deviation of the log weights 1.0 in place of 1.6); there only the
information about depth is judged, the agreement with the types is reported beside that of LSI. The learning rate is
three times the default, so that 50 epochs suffice.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from _common import (
    FORMS,
    LSI,
    LSI_REST,
    SAILER,
    WITHOUT,
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

SETTINGS: dict[str, dict[str, Any]] = {"S2": {}, "S2, similar types": {"effect_sd": 1.0}}
EPOCHS = 50
LEARNING_RATE = 3e-3


def run(adata: AnnData, seed: int, epochs: int) -> dict[str, Scores]:
    """Return the scores of all methods on one simulation."""
    import epivi

    result = {
        LSI: embedding_scores(lsi(adata, seed=seed), adata, seed),
        LSI_REST: embedding_scores(lsi(adata, drop_first=True, seed=seed), adata, seed),
    }
    epivi.SAILER.setup_anndata(adata)
    for name, options in FORMS.items():
        model = fit(epivi.SAILER(adata, seed=seed, **options), epochs, lr=LEARNING_RATE)
        result[name] = embedding_scores(model.get_latent_representation(), adata, seed)
    return result


def claims(setting: str, runs: list[dict[str, Scores]]) -> list[Claim]:
    """Return the claims on one setting."""

    def of(method: str, name: str) -> Any:
        return metric(runs, method, name)

    information, ari = "I(z,depth)", "ARI (mixture)"
    result = [
        at_most(f"{setting}: I(z,depth), SAILER / LSI", of(SAILER, information) / of(LSI, information), 0.3),
        at_most(f"{setting}: I(z,depth), SAILER / {WITHOUT}", of(SAILER, information) / of(WITHOUT, information), 0.5),
    ]
    if setting == "S2":
        gap = of(SAILER, "ARI") - of(LSI, "ARI")
        result += [
            at_least(f"{setting}: ARI (mixture), SAILER - LSI", of(SAILER, ari) - of(LSI, ari), 0.1),
            at_least(f"{setting}: ARI (Leiden), SAILER - LSI", gap, -0.02, note="LSI is close to 1"),
        ]
    return result


def main() -> int:
    """Run the settings and write the results."""
    chosen = parse(__doc__)
    import epivi

    scale = 0.25 if chosen.quick else 1.0
    settings = {
        name: run_seeds(
            name,
            chosen.seeds,
            lambda seed, options=options: run(
                epivi.simulate.standard("S2", seed, scale=scale, **options), seed, 15 if chosen.quick else EPOCHS
            ),
        )
        for name, options in SETTINGS.items()
    }
    return finish(
        "sailer_many_types",
        "SAILER with nine types in shallow data",
        settings,
        [claim for name, runs in settings.items() for claim in claims(name, runs)],
        chosen,
    )


if __name__ == "__main__":
    raise SystemExit(main())
