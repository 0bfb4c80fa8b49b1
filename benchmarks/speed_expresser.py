"""Speed and memory of Expresser against a matrix product of the same run.

    OMP_NUM_THREADS=1 uv run python benchmarks/speed_expresser.py
    OMP_NUM_THREADS=1 uv run python benchmarks/speed_expresser.py --part genes

- ``network``: cells a second in training (forward, backward, AdamW) at the sizes "tutorial" (64 cells of 256 genes) and
  "paper" (1 cell of 1,100 genes); operations by arithmetic against a product of matrices of 2,048 x 2,048.
- ``genes``: a training step on cells of 100, 200, 400 and 800 expressed genes, size "tutorial"; of the attention kernel
  alone, which is quadratic, and of the rest; and on a vocabulary ten times as large.
- ``disk``: cells a second read and encoded from a zarr store, by loader="rows" and by loader="annbatch", if annbatch is
  there.
- ``imputation``: seconds, and peak memory above model and data, of ``impute(mode="all")`` on 10,000 cells (``--cells``)
  x 2,000 genes; a tensor of cells x genes x width would have 4.8 GiB.
"""

from __future__ import annotations

import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from _common import Claim, at_least, at_most, claims_table, markdown_table, parse, say, write
from _measure import peak, reset_peak, settle
from speed_candi import fastest, gemm

if TYPE_CHECKING:
    from anndata import AnnData

PARTS = ("network", "genes", "disk", "imputation")
N_GENES = 2_000
SHARE_GOAL, SLOPE_GOAL, VOCABULARY_GOAL, READING_GOAL = 0.2, 1.35, 1.5, 3.0
LENGTHS = (100, 200, 400, 800)
BYTES = 4


def cells(n_cells: int, n_expressed: int, n_genes: int = N_GENES) -> AnnData:
    """Return cells with so many random expressed genes each."""
    import anndata
    import pandas as pd
    from scipy import sparse

    rng = np.random.default_rng(0)
    indices = np.argpartition(rng.random((n_cells, n_genes), dtype=np.float32), n_expressed - 1)[:, :n_expressed]
    values = rng.geometric(0.6, n_cells * n_expressed).astype(np.float32)
    triple = (values, np.sort(indices, 1).ravel(), np.arange(n_cells + 1) * n_expressed)
    names = pd.DataFrame(index=[f"cell_{i}" for i in range(n_cells)])
    var = pd.DataFrame(index=[f"gene_{i}" for i in range(n_genes)])
    return anndata.AnnData(sparse.csr_matrix(triple, shape=(n_cells, n_genes)), obs=names, var=var)


def build(adata: AnnData, **options: Any) -> Any:
    """Return a model of the cells with random weights."""
    import epivi

    epivi.Expresser.setup_anndata(adata)
    model = epivi.Expresser(adata, seed=0, gene_init="random", **options)
    model.is_trained_ = True
    return model


def stepper(n_cells: int, n_expressed: int, n_genes: int = N_GENES, **options: Any) -> tuple[Any, Any]:
    """Return a model, and a function that does one training step on so many cells."""
    import torch

    adata = cells(max(n_cells, 2), n_expressed, n_genes)
    model = build(adata, **options)
    batch = model._encoding(adata)(model.adata_manager.create_torch_dataset()[np.arange(n_cells)])
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
    d, n_hidden = config.width, round(config.mask_rate * n_tokens)
    encoder = config.n_layers * n_tokens * (4 * d**2 + 2 * d * config.n_hidden + 2 * n_tokens * d)
    decoder = n_tokens * d**2 + n_hidden * (2 * d**2 + 2 * n_tokens * d)
    head = n_hidden * (d + 2) * d
    return 6.0 * n_cells * (encoder + decoder + head)


def network() -> tuple[str, dict[str, Any], list[Claim]]:
    """Measure cells a second and the share of the limit."""
    rows, shares = [], {}
    for size, n_cells, n_tokens, repeats in (("tutorial", 64, 256, 5), ("paper", 1, 1100, 3)):
        n_genes = 18_483 if size == "paper" else N_GENES
        model, step = stepper(n_cells, n_tokens, n_genes, size=size)
        seconds, limit = fastest(step, repeats), gemm()
        rate = operations(model, n_cells, n_tokens) / seconds
        shares[size] = rate / limit
        figures = (f"{n_cells / seconds:,.2f}", f"{limit * n_cells / operations(model, n_cells, n_tokens):,.2f}")
        rows.append([size, *figures, f"{rate / 1e9:.1f}", f"{limit / 1e9:.1f}", f"{shares[size]:.2f}"])
        say(" | ".join(rows[-1]))
    header = ["size", "cells/s", "cells/s at the limit", "GFLOP/s", "matrix product GFLOP/s", "share"]
    claims = [at_least(f"share of the matrix product, {size}", [share], SHARE_GOAL) for size, share in shares.items()]
    return markdown_table(header, rows), {"shares": shares}, claims


def attention(model: Any, n_cells: int, n_tokens: int) -> Any:
    """Return a function that runs the attention kernels of all layers, forward and backward."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    config = model.config
    shape = (3, n_cells, config.n_heads, n_tokens, config.width // config.n_heads)
    heads = torch.randn(shape, requires_grad=True)
    allowed = torch.ones(n_cells, 1, 1, n_tokens, dtype=torch.bool)

    def run() -> None:
        for _ in range(config.n_layers):
            query, key, value = heads.unbind(0)
            scaled_dot_product_attention(query, key, value, attn_mask=allowed).sum().backward()

    return run


def slope(times: list[float]) -> float:
    """Return the slope of the logarithm of the time on that of the number of genes."""
    return float(np.polyfit(np.log(LENGTHS), np.log(times), 1)[0])


def genes() -> tuple[str, dict[str, Any], list[Claim]]:
    """Measure the time of a step by the number of expressed genes."""
    n_cells, parts = 16, {"step": [], "attention": [], "rest": []}
    for n in LENGTHS:
        model, step = stepper(n_cells, n, size="tutorial", max_genes=max(LENGTHS))
        seconds, kernel = fastest(step, 5), fastest(attention(model, n_cells, n), 5)
        for name, value in (("step", seconds), ("attention", kernel), ("rest", max(seconds - kernel, 1e-9))):
            parts[name].append(1e3 * value / n_cells)
        say(f"{n} genes: " + ", ".join(f"{name} {times[-1]:.2f} ms a cell" for name, times in parts.items()))
    rows = [[str(n), *(f"{parts[name][i]:.2f}" for name in parts)] for i, n in enumerate(LENGTHS)]
    slopes = {name: slope(times) for name, times in parts.items()}
    rows.append(["slope (log-log)", *(f"{slopes[name]:.2f}" for name in parts)])
    small, large = (fastest(stepper(64, 200, n, size="tutorial")[1], 5) for n in (N_GENES, 10 * N_GENES))
    say(f"vocabulary x 10: {large / small:.2f} of the time")
    claims = [
        at_most("log-log slope of a step in the number of expressed genes", [slopes["step"]], SLOPE_GOAL),
        at_most("step on a vocabulary of 20,000 genes / of 2,000", [large / small], VOCABULARY_GOAL),
    ]
    header = ["expressed genes", "step, ms a cell", "attention kernels alone", "rest"]
    return markdown_table(header, rows), {"slopes": slopes, "ms": parts, "vocabulary": large / small}, claims


def write_store(adata: AnnData, path: Path) -> None:
    """Write cells as two shards of a collection."""
    import anndata
    import zarr

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        group, half = zarr.open_group(path, mode="w"), adata.n_obs // 2
        for number, part in enumerate((slice(0, half), slice(half, None))):
            anndata.io.write_elem(group, f"dataset_{number}", adata[part].copy())


def disk(n_cells: int) -> tuple[str, dict[str, Any], list[Claim]]:
    """Measure how many cells a second are read and encoded from a zarr store."""
    from epivi._errors import ConfigError
    from epivi.data.disk import open_collection
    from epivi.train.config import TrainingConfig

    rates, held = {}, 0
    block_size = max(n_cells // 5, 64)
    with tempfile.TemporaryDirectory() as folder:
        adata = cells(n_cells, 200)
        write_store(adata, Path(folder) / "cells.zarr")
        for name in ("memory", "rows", "annbatch"):
            try:
                model = build(adata if name == "memory" else open_collection(Path(folder) / "cells.zarr"))
            except ConfigError as error:
                return f"Not measured: {error}", {}, []
            model._loader, model._block_size = "annbatch" if name == "annbatch" else "rows", block_size
            config = TrainingConfig.merged(model.config.training_defaults(n_cells), {"seed": 0, "train_size": 1.0})
            data = model.training_data(config, 1)
            batches = data.make_sampler(0, 1).batches(0)[: 10 if name == "rows" else None]
            start, n_read = time.perf_counter(), 0
            for drawn in batches:
                n_read += len(data.dataset[drawn]["length"])
            rates[name] = n_read / (time.perf_counter() - start)
            held = model.adata.X.n_held if name == "annbatch" else held
            say(f"{name}: {rates[name]:,.0f} cells a second")
    rows = [[name, f"{rate:,.0f}"] for name, rate in rates.items()]
    claims = [
        at_least(
            "cells a second, loader='annbatch' / loader='rows'", [rates["annbatch"] / rates["rows"]], READING_GOAL
        ),
        at_most("rows in memory / cells of the store", [held / n_cells], 0.25),
    ]
    return markdown_table(["read and encoded from", "cells/s"], rows), {"cells_per_second": rates}, claims


def imputation(n_cells: int) -> tuple[str, dict[str, Any], list[Claim]]:
    """Measure seconds and memory of imputing every gene of every cell."""
    model = build(cells(n_cells, 200), size="tutorial")
    model.impute(indices=np.arange(2), mode="all")
    before, is_reset, start = settle(), reset_peak(), time.perf_counter()
    result = model.impute(mode="all")
    seconds = time.perf_counter() - start
    above = (peak() - before) / 1024 if is_reset else float("nan")
    dense = n_cells * N_GENES * model.config.width * BYTES / 2**30
    output = (result.X.data.nbytes + result.X.indices.nbytes + result.X.indptr.nbytes) / 2**30
    rows = [[f"{n_cells:,} x {N_GENES:,}", f"{seconds:.1f}", f"{n_cells / seconds:,.1f}"]]
    rows[0] += [f"{value:.2f}" for value in (above, output, dense)]
    say(" | ".join(rows[0]))
    header = [
        "cells x genes",
        "seconds",
        "cells/s",
        "GiB above the data",
        "GiB of the result",
        "GiB cells x genes x width",
    ]
    figures = {"cells": n_cells, "seconds": seconds, "GiB": above, "GiB_result": output, "GiB_dense": dense}
    claims = [at_most("peak above the data / tensor of cells x genes x width", [above / dense], 0.5)]
    return markdown_table(header, rows), figures, claims


def main() -> int:
    """Measure and write the tables."""
    options = {"choices": list(PARTS), "help": "only this part"}
    number = {"type": int, "default": 10_000, "help": "cells of the imputation"}
    chosen = parse(__doc__, part=options, cells=number)
    if chosen.quick:
        chosen.cells = min(chosen.cells, 200)
    runs = {
        "network": network,
        "genes": genes,
        "disk": lambda: disk(500 if chosen.quick else 5_000),
        "imputation": lambda: imputation(chosen.cells),
    }
    text, result, claims = ["# Expresser: speed and memory\n"], {}, []
    for name, run in runs.items():
        if chosen.part in (None, name):
            table, figures, held = run()
            text.append(table)
            result[name] = figures
            claims += held
    text.append(claims_table(claims))
    name = "speed_expresser" + ("" if chosen.part is None else f"_{chosen.part}")
    write(chosen.out, name, "\n\n".join(text), result, threads=chosen.threads)
    return 0 if all(claim.holds for claim in claims) else 1


if __name__ == "__main__":
    sys.exit(main())
