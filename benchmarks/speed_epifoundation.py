"""Speed and memory of EpiFoundation against a matrix product of the same run.

    OMP_NUM_THREADS=1 uv run python benchmarks/speed_epifoundation.py
    OMP_NUM_THREADS=1 uv run python benchmarks/speed_epifoundation.py --part lengths

- ``network``: tokens a second in training (forward, backward, AdamW), pretraining, cells of 1,000 open peaks;
  floating point operations by arithmetic (6 times the parameters of the encoder's linear maps and 12 t d a layer for
  attention, each token), against a product of matrices of 2,048 x 2,048.
- ``lengths``: a training step on cells of 1,000 peaks against one on as many cells of 12,000, size "tutorial".
- ``memory``: peak memory above the weights (so with gradients and the moments of the optimiser) of a training step on
  one cell of 12,000 peaks at the paper's size, with activations computed again.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import numpy as np
from _common import at_least, at_most, claims_table, markdown_table, parse, say, write
from _measure import peak, reset_peak, settle
from speed_candi import fastest, gemm

if TYPE_CHECKING:
    from anndata import AnnData

PARTS = ("network", "lengths", "memory")
N_PEAKS = 30_000
RATIO_GOAL, MEMORY_GOAL_GIB, SHARE_GOAL = 0.1, 2.0, 0.2
PAPER_MAX = 12_000


def cells(n_cells: int, n_open: int) -> AnnData:
    """Return cells with so many random open peaks each."""
    import anndata
    import pandas as pd
    from scipy import sparse

    rng = np.random.default_rng(0)
    indices = np.concatenate([np.sort(rng.choice(N_PEAKS, n_open, replace=False)) for _ in range(n_cells)])
    matrix = sparse.csr_matrix(
        (np.ones(indices.size, dtype=np.float32), indices, np.arange(n_cells + 1) * n_open), shape=(n_cells, N_PEAKS)
    )
    start = 1000 * np.arange(N_PEAKS)
    var = pd.DataFrame(
        {"chrom": "chr1", "start": start, "end": start + 500}, index=[f"peak_{i}" for i in range(N_PEAKS)]
    )
    return anndata.AnnData(matrix, obs=pd.DataFrame(index=[f"cell_{i}" for i in range(n_cells)]), var=var)


def stepper(n_cells: int, n_open: int, **options: Any) -> tuple[Any, Any]:
    """Return a model, and a function that does one training step on so many cells."""
    import torch

    import epivi

    adata = cells(max(n_cells, 2), n_open)  # a model is not set up with one cell
    epivi.EpiFoundation.setup_anndata(adata)
    model = epivi.EpiFoundation(adata, peak_init="random", seed=0, **options)
    batch = model._encoding(adata, targets=True)(model.adata_manager.create_torch_dataset()[np.arange(n_cells)])
    module = model.module.train()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        optimizer.zero_grad()
        module(batch)[2].loss.backward()
        optimizer.step()

    return model, step


def operations(model: Any, n_cells: int, n_tokens: int) -> float:
    """Return the operations of a training step by arithmetic."""
    config = model.config
    linear = config.n_layers * (4 * config.width**2 + 2 * config.width * config.n_hidden)
    attention = config.n_layers * 2 * n_tokens * config.width
    return 6.0 * n_cells * n_tokens * (linear + attention)


def network() -> tuple[list[list[str]], dict[str, float]]:
    """Return tokens a second and the share of the limit."""
    rows, shares = [], {}
    for size, n_cells, repeats in (("tutorial", 16, 5), ("paper", 1, 3)):
        model, step = stepper(n_cells, 1000, size=size, dropout_rate=0.0, max_peaks=PAPER_MAX)
        n_tokens = 1 + round(1000 * (1 - model.config.masked_peak_rate))
        seconds, limit = fastest(step, repeats), gemm()
        rate = operations(model, n_cells, n_tokens) / seconds
        shares[size] = rate / limit
        figures = (f"{n_cells * n_tokens / seconds:,.0f}", f"{rate / 1e9:.1f}", f"{limit / 1e9:.1f}")
        rows.append([size, *figures, f"{rate / limit:.2f}"])
        say(" | ".join(rows[-1]))
    return rows, shares


def lengths() -> float:
    """Return the time of a step on short cells over that on long ones."""
    taken = {}
    for n_open in (1000, PAPER_MAX):
        _, step = stepper(2, n_open, size="tutorial", max_peaks=PAPER_MAX)
        taken[n_open] = fastest(step, 2)
        say(f"{n_open} peaks: {taken[n_open]:.2f} s")
    return taken[1000] / taken[PAPER_MAX]


def memory() -> float:
    """Return the peak memory above the model, in GiB, of a step on a cell of 12,000 peaks."""
    _, step = stepper(1, PAPER_MAX, size="paper", checkpoint=True, masked_peak_rate=0.01)
    before = settle()
    is_reset = reset_peak()
    step()
    return (peak() - before) / 1024 if is_reset else float("nan")


def main() -> int:
    """Measure and write the tables."""
    chosen = parse(__doc__, part={"choices": list(PARTS), "help": "only this part"})
    text, result, claims = ["# EpiFoundation: speed and memory\n"], {}, []
    if chosen.part in (None, "network"):
        rows, shares = network()
        header = ["size", "tokens/s", "GFLOP/s", "matrix product GFLOP/s", "share"]
        text.append(markdown_table(header, rows))
        result["shares"] = shares
        claims += [
            at_least(f"share of the matrix product, {size}", [share], SHARE_GOAL) for size, share in shares.items()
        ]
    if chosen.part in (None, "lengths"):
        result["ratio"] = lengths()
        claims.append(at_most("step on 1,000 peaks / step on 12,000", [result["ratio"]], RATIO_GOAL))
    if chosen.part in (None, "memory"):
        result["GiB"] = memory()
        claims.append(at_most("GiB above the model, one cell of 12,000 peaks", [result["GiB"]], MEMORY_GOAL_GIB))
    text.append(claims_table(claims))
    name = "speed_epifoundation" + ("" if chosen.part is None else f"_{chosen.part}")
    write(chosen.out, name, "\n\n".join(text), result, threads=chosen.threads)
    return 0 if all(claim.holds for claim in claims) else 1


if __name__ == "__main__":
    sys.exit(main())
