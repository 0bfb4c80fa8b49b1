"""SAILER: seconds an epoch grow linearly with the number of cells, up to a million.

    OMP_NUM_THREADS=1 uv run python benchmarks/claims/sailer_runtime.py
    OMP_NUM_THREADS=1 uv run python benchmarks/claims/sailer_runtime.py --most 1048576

Cells of the setting S1 (4,000 regions), repeated as often as needed: what an epoch takes does not depend on whether two
cells are alike. Network of the thesis without chromosomes ("dense"), minibatches of 200, no validation; the second and
third epoch of each size are timed. The slope is that of log seconds of processor time over log cells. Sizes run to
``--most`` cells; beyond, the time of a million is extrapolated from the largest size, and the table says so.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from _common import QUIET, Scores, at_least, at_most, finish, metric, parse, run_seeds
from _measure import peak, reset_peak, settle

if TYPE_CHECKING:
    from anndata import AnnData

SMALLEST, FACTOR = 4_096, 4
MOST, MOST_QUICK = 262_144, 4_096
MILLION = 1_000_000
EPOCHS, BATCH = 3, 200
EPOCHS_OF_PAPER = 400


def cells(n: int, seed: int) -> AnnData:
    """Return so many cells of S1, repeated where there are not enough."""
    import epivi

    adata = epivi.simulate.standard("S1", seed, scale=0.25, region_scale=1.0)
    rows = np.arange(n) % adata.n_obs
    repeated = adata[rows].copy()
    repeated.obs_names = [str(i) for i in range(n)]
    return repeated


def timed_epochs(model: Any) -> Scores:
    """Train and return the times of an epoch after the first one."""
    from lightning.pytorch.callbacks import Callback

    class EpochClock(Callback):
        """Takes the time at the end of each epoch."""

        def __init__(self) -> None:
            self.times: list[tuple[float, float]] = []

        def on_train_epoch_end(self, *args: Any, **kwargs: Any) -> None:  # noqa: ARG002
            self.times.append((time.perf_counter(), time.process_time()))

    clock = EpochClock()
    before = settle()
    reset_peak()
    fixed = {"early_stopping": False, "train_size": 1.0, "validation_size": 0.0, "accelerator": "cpu", "devices": 1}
    model.train(max_epochs=EPOCHS, batch_size=BATCH, callbacks=[clock], **QUIET | fixed)
    (wall_0, cpu_0), (wall_1, cpu_1) = clock.times[0], clock.times[-1]
    n = len(clock.times) - 1
    return {"s an epoch": (wall_1 - wall_0) / n, "processor s": (cpu_1 - cpu_0) / n, "peak MiB": peak() - before}


def sizes(most: int) -> list[int]:
    """Return the numbers of cells, the largest at most ``most``."""
    start = min(SMALLEST, most // FACTOR**2)
    return [start * FACTOR**i for i in range(20) if start * FACTOR**i <= most]


def run(seed: int, most: int) -> dict[str, Scores]:
    """Return the times of all sizes, and what follows from them."""
    import epivi

    result: dict[str, Scores] = {}
    for n in sizes(most):
        adata = cells(n, seed)
        epivi.SAILER.setup_anndata(adata)
        result[f"{n:,} cells"] = {"cells": float(n), **timed_epochs(epivi.SAILER(adata, seed=seed, encoder="dense"))}
    n_k = np.array([entry["cells"] for entry in result.values()])
    s_k = np.array([entry["processor s"] for entry in result.values()])
    million = float(s_k[-1] * MILLION / n_k[-1])
    result["all"] = {
        "slope": float(np.polyfit(np.log(n_k), np.log(s_k), 1)[0]),
        "processor s, a million cells": million,
        "processor h, a million cells, 400 epochs": million * EPOCHS_OF_PAPER / 3600,
    }
    return result


def main() -> int:
    """Run all sizes and write the result."""
    chosen = parse(__doc__, seeds=1, most={"type": int, "default": None, "help": "largest number of cells"})
    most = chosen.most or (MOST_QUICK if chosen.quick else MOST)
    runs = run_seeds("S1, repeated", chosen.seeds, lambda seed: run(seed, most))
    slopes = metric(runs, "all", "slope")
    how = "measured" if sizes(most)[-1] >= MILLION else f"extrapolated from {sizes(most)[-1]:,} cells"
    return finish(
        "sailer_runtime",
        "SAILER: time of an epoch against the number of cells",
        {"S1, repeated": runs},
        [
            at_most("slope of log seconds over log cells", slopes, 1.1),
            at_least("slope of log seconds over log cells", slopes, 0.9),
        ],
        chosen,
        notes=[f"The time of a million cells is {how}, in proportion.", "Peak above the data and the model."],
    )


if __name__ == "__main__":
    raise SystemExit(main())
