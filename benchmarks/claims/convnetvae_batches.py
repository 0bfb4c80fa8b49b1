"""ConvNet-VAE: a batch given as a covariate is removed from the latent, and the types stay.

    OMP_NUM_THREADS=1 uv run python benchmarks/claims/convnetvae_batches.py

900 simulated cells of six types in two batches whose log profiles differ by Normal(0, 0.5) in every domain and
modality; three modalities of 150 fragments, 300 epochs. Mixing is the normalised entropy of the batches among 50
nearest neighbours, 1 if they are mixed; I(z, batch) in nats, at most 0.693.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from _common import Claim, Scores, at_least, at_most, metric, run_one_setting
from _tracks import FC, conv_name, fit, scores, simulate

if TYPE_CHECKING:
    import numpy as np

EPOCHS = 300  # the default of the models: after 60 epochs types are found and batches are still apart
SHIFT = 0.5
METHODS: dict[str, int | None] = {conv_name(11): 11, conv_name(31): 31, FC: None}


def batch_scores(model: Any) -> Scores:
    """Return the usual scores, mixing of the batches and information about them."""
    from epivi.metrics import confounder_information, neighbor_mixing

    values = model.get_latent_representation()
    batch = model.adata.obs["batch"].astype(str).to_numpy()
    return scores(model) | {
        "mixing": neighbor_mixing(values, batch).mean_entropy,
        "I(z,batch)": confounder_information(values, batch, discrete=True).mean,
    }


def run(seed: int, *, quick: bool) -> dict[str, Scores]:
    """Return the scores of all methods with and without the batch."""
    adata = simulate(seed, quick=quick, batch_shift=SHIFT)
    return {
        f"{name}, {form}": batch_scores(fit(adata, seed, kernel=kernel, batch_key=key, epochs=5 if quick else EPOCHS))
        for name, kernel in METHODS.items()
        for form, key in (("batch_key", "batch"), ("none", None))
    }


def claims(runs: list[dict[str, Scores]]) -> list[Claim]:
    """Return the claims."""
    result = []
    for name in METHODS:

        def of(form: str, key: str, name: str = name) -> np.ndarray:
            return metric(runs, f"{name}, {form}", key)

        result += [
            at_least(f"{name}: ARI of all cells, with batch_key - without", *_difference(of, "ARI, all cells")),
            at_least(f"{name}: mixing, with batch_key", of("batch_key", "mixing"), 0.5),
            at_least(f"{name}: mixing, with batch_key - without", *_difference(of, "mixing")),
            at_most(
                f"{name}: I(z,batch), with / without", of("batch_key", "I(z,batch)") / of("none", "I(z,batch)"), 0.5
            ),
        ]
    return result


def _difference(of: Any, key: str) -> tuple[np.ndarray, float]:
    return of("batch_key", key) - of("none", key), 0.0


def main() -> int:
    """Run the setting and write the results."""
    return run_one_setting(
        "convnetvae_batches", "ConvNet-VAE with two batches", "two batches", run, claims, description=__doc__
    )


if __name__ == "__main__":
    raise SystemExit(main())
