"""ConvNet-VAE: kernels that stop at the ends of chromosomes against kernels that cross them.

    OMP_NUM_THREADS=1 uv run python benchmarks/claims/convnetvae_boundaries.py

900 simulated cells of six types on 20 chromosomes of 108 bins, two modalities of 150 fragments; the domains on both
sides of every chromosome end have opposite effects. "Error at ends": mean squared error of the reconstructed tracks of
the validation cells against the true profile, relative to the mean square of the profile, over the bins whose window
of the decoder reaches across an end; "elsewhere": over the other bins.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
from _common import Claim, Scores, at_most, metric, run_one_setting
from _tracks import conv_name, fit, scores, simulate

if TYPE_CHECKING:
    from anndata import AnnData

KERNELS = (11, 31)
EPOCHS = 60
CHROMOSOMES = [108] * 20


def end_errors(model: Any, adata: AnnData, kernel: int) -> Scores:
    """Return the relative squared error of reconstructed tracks near the ends of chromosomes and elsewhere."""
    profile_tml = np.asarray(adata.uns["truth"]["profiles"])
    types = list(adata.uns["truth"]["types"])
    rows = np.asarray(model.validation_indices)
    found = model.get_normalized_expression(indices=rows, return_numpy=True)
    truth = np.stack([profile_tml[types.index(t)] for t in adata.obs["cell_type"].astype(str).iloc[rows]])
    error = (found.reshape(truth.shape) - truth) ** 2
    chrom = adata.uns["tracks"]["bins"]["chrom"].to_numpy()
    # bins of the first window of a chromosome: the decoder's kernel reads one position to the left
    place = np.concatenate([np.arange((chrom == c).sum()) for c in dict.fromkeys(chrom)])
    is_end = (place < kernel) & (np.arange(chrom.size) >= kernel)
    scale = (truth**2).mean(axis=(0, 1))
    return {
        "error at ends": float(error[:, :, is_end].mean() / scale[is_end].mean()),
        "error elsewhere": float(error[:, :, ~is_end].mean() / scale[~is_end].mean()),
    }


def run(seed: int, *, quick: bool) -> dict[str, Scores]:
    """Return the scores with kernels that stop at ends and with those that cross them."""
    adata = simulate(seed, quick=quick, n_modalities=2, chrom_sizes=CHROMOSOMES, boundary_signal=True)
    result = {}
    for kernel in KERNELS:
        for boundaries in ("chromosome", "none"):
            model = fit(adata, seed, kernel=kernel, epochs=5 if quick else EPOCHS, boundaries=boundaries)
            result[f"{conv_name(kernel)}, {boundaries}"] = scores(model) | end_errors(model, adata, kernel)
    return result


def claims(runs: list[dict[str, Scores]]) -> list[Claim]:
    """Return the claims."""
    result = []
    for kernel in KERNELS:
        on, off = (f"{conv_name(kernel)}, {boundaries}" for boundaries in ("chromosome", "none"))
        ratio = metric(runs, on, "error at ends") / metric(runs, off, "error at ends")
        elbo = metric(runs, on, "-ELBO") / metric(runs, off, "-ELBO") - 1
        result += [
            at_most(f"{conv_name(kernel)}: error at ends, stopped / crossing", ratio, 1.0),
            at_most(f"{conv_name(kernel)}: relative change of -ELBO, stopped - crossing", elbo, 0.005),
        ]
    return result


def main() -> int:
    """Run the setting and write the results."""
    return run_one_setting(
        "convnetvae_boundaries", "Kernels and chromosome ends", "20 chromosomes", run, claims, description=__doc__
    )


if __name__ == "__main__":
    raise SystemExit(main())
