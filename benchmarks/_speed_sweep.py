"""How the time of an epoch and the memory grow with cells, peaks and the size of minibatches."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any

import numpy as np
from _common import markdown_table, say
from _measure import peak, reset_peak, settle
from _speed_models import BATCH_SIZE, PAIRS, build_ours, small_data, train

if TYPE_CHECKING:
    from anndata import AnnData

DENSITY = 0.074
CELLS = (1_000, 3_000, 10_000, 30_000, 100_000)
PEAKS = (10_000, 30_000, 100_000, 300_000, 500_000)
BATCHES = (32, 64, 128, 256, 512)
# of the axis that is gone along, all others stay there
N_CELLS, N_PEAKS = 2_048, 20_000
LEAST_STEPS = 16
ROWS_AT_ONCE = 4_096
BYTES_OF_ENTRY = 8  # value and column of a non-zero, stored once


def random_cells(n_cells: int, n_peaks: int, seed: int = 0) -> AnnData:
    """Return cells with random open peaks over 22 chromosomes of equal size: their places do not change the time."""
    import anndata
    import pandas as pd
    from scipy import sparse

    rng = np.random.default_rng(seed)
    parts = []
    for start in range(0, n_cells, ROWS_AT_ONCE):
        n = min(ROWS_AT_ONCE, n_cells - start)
        counts = np.clip(rng.lognormal(np.log(DENSITY * n_peaks), 0.4, n), 1, n_peaks // 2).astype(np.int64)
        rows, columns = np.repeat(np.arange(n, dtype=np.int32), counts), rng.integers(n_peaks, size=counts.sum())
        part = sparse.csr_matrix((np.ones(columns.size, np.float32), (rows, columns)), shape=(n, n_peaks))
        part.sum_duplicates()
        part.data[:] = 1.0
        parts.append(part)
    var = pd.DataFrame(
        {"chrom": [f"chr{1 + 22 * i // n_peaks}" for i in range(n_peaks)]},
        index=[f"peak{i}" for i in range(n_peaks)],
    )
    obs = pd.DataFrame(index=[f"cell{i}" for i in range(n_cells)])
    return anndata.AnnData(sparse.vstack(parts, format="csr"), obs=obs, var=var)


def measure_point(n_cells: int, n_peaks: int, batch_size: int, rounds: int) -> dict[str, float]:
    """Return the seconds of an epoch, medians of the rounds, and the memory above the data in MiB.

    Few cells are gone over more than once; of many, every minibatch of one epoch is timed.
    """
    adata = random_cells(n_cells, n_peaks)
    data, nnz = settle(), float(adata.X.nnz)
    reset_peak()
    model = build_ours(PAIRS["chromosome"], adata)
    steps = max(n_cells // batch_size, LEAST_STEPS)
    found = [train(model, 2, steps, batch_size=batch_size) for _ in range(rounds)]
    copy = (adata.X.data.nbytes + adata.X.indices.nbytes + adata.X.indptr.nbytes) / 1024**2
    per_epoch = n_cells / batch_size
    del model, adata
    result = {
        "cells": n_cells,
        "peaks": n_peaks,
        "batch_size": batch_size,
        "non_zeros": nnz,
        "cpu": per_epoch * float(np.median([f["cpu"] for f in found])),
        "wall": per_epoch * float(np.median([f["wall"] for f in found])),
        "memory_mib": peak() - data - copy,
        "data_mib": copy,
    }
    gc.collect()
    say(
        f"{n_cells:,} cells x {n_peaks:,} peaks, batch {batch_size}: {result['cpu']:.2f} s of processor time an epoch "
        f"({result['wall']:.2f} s), {result['memory_mib']:,.0f} MiB"
    )
    return result


def slope(points: list[dict[str, float]], along: str) -> float:
    """Return the slope of the logarithm of the processor time of an epoch in that of a size."""
    x, y = (np.log([point[key] for point in points]) for key in (along, "cpu"))
    return float(np.polyfit(x, y, 1)[0])


def points_of(largest_mib: float) -> dict[str, list[tuple[int, int, int]]]:
    """Return the points (cells, peaks, batch size) of each axis whose data, held twice, take no more memory."""
    axes = {
        "cells": [(n, N_PEAKS, BATCH_SIZE) for n in CELLS],
        "peaks": [(N_CELLS, n, BATCH_SIZE) for n in PEAKS],
        "batch_size": [(N_CELLS, 100_000, n) for n in BATCHES],
    }
    # building the cells takes a third copy for a while
    return {
        axis: [p for p in points if 3 * p[0] * p[1] * DENSITY * BYTES_OF_ENTRY / 1024**2 <= largest_mib]
        for axis, points in axes.items()
    }


def summary(found: dict[str, list[dict[str, float]]]) -> dict[str, float]:
    """Return the slopes, along cells, along non-zeros at fixed cells, and of the larger half of the latter."""
    peaks = found["peaks"]
    return {
        "cells": slope(found["cells"], "cells"),
        "non-zeros": slope(peaks, "non_zeros"),
        "non-zeros, from 100,000 peaks on": slope([p for p in peaks if p["peaks"] >= 100_000], "non_zeros"),
    }


def sweep_text(found: dict[str, list[dict[str, float]]]) -> str:
    """Return the tables in Markdown."""
    header = [
        "cells",
        "peaks",
        "batch",
        "non-zeros",
        "s an epoch (processor)",
        "s an epoch",
        "cells/s",
        "MiB above data",
    ]
    parts = ["# Time of an epoch and memory of SAILER, chromosome encoder\n"]
    for axis, points in found.items():
        rows = [
            [
                f"{p['cells']:,}",
                f"{p['peaks']:,}",
                str(p["batch_size"]),
                f"{p['non_zeros']:,.0f}",
                f"{p['cpu']:.2f}",
                f"{p['wall']:.2f}",
                f"{p['cells'] / p['cpu']:,.0f}",
                f"{p['memory_mib']:,.0f}",
            ]
            for p in points
        ]
        parts += [f"## Along {axis.replace('_', ' ')}\n", markdown_table(header, rows), ""]
    slopes = ", ".join(f"{name} {value:.2f}" for name, value in summary(found).items())
    parts.append(f"Slopes of the logarithm of processor time an epoch: {slopes}. Cells a second of processor time.")
    return "\n".join(parts)


def run_sweep(folder: Any, rounds: int, largest_mib: float, kept: Any) -> dict[str, Any]:
    """Measure all points, each kept at once, and return them by axis."""
    train(build_ours(PAIRS["chromosome"], small_data()), 1, 1)  # loads compiled functions, which are no one's data
    return {
        axis: [
            kept(folder, f"sweep_{n}x{p}_{b}", {"rounds": rounds}, lambda n=n, p=p, b=b: measure_point(n, p, b, rounds))
            for n, p, b in points
        ]
        for axis, points in points_of(largest_mib).items()
    }
