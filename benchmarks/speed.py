"""Speed and memory of SAILER (chromosome encoder) against PEAKVI of scvi-tools, in one process and on the same cells.

    OMP_NUM_THREADS=1 uv run python benchmarks/speed.py
    OMP_NUM_THREADS=1 uv run python benchmarks/speed.py --quick

Both models run their own training loop, ``model.train()``: loader, forward, backward, optimiser and the trainer around
them, at the defaults of each and a batch size of 128, without validation and logging. A callback takes the time from
the end of the last warm-up step to the end of the last step; what ``train()`` does before and after is not counted.
Each round runs one model and then the other, so that a busy machine slows both; the ratio is taken within rounds.
Wall-clock time decides, processor time is printed beside it: where threads wait for a busy core they differ.

Memory is measured in a process of its own for each model: the peak resident memory from set-up to the last step, less
the resident memory after the data were read (and both packages imported).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from _common import EXIT_FAILED, QUIET, at_least, at_most, claims_table, markdown_table, parse, say, spread, write
from _measure import peak, reset_peak, settle, timed

if TYPE_CHECKING:
    from anndata import AnnData

BATCH_SIZE = 128
N_TYPES = 9
SPEED_GOAL = 4.0
MEMORY_GOAL = 1.0 / 3.0
MODELS = ("PEAKVI", "SAILER")
SIZES = {False: (10_000, 100_000), True: (1_000, 10_000)}


def data_file(n_cells: int, n_peaks: int) -> Path:
    """Simulate cells with about 7 % open peaks over 22 chromosomes, once, and return the file."""
    import epivi

    path = Path(tempfile.gettempdir()) / f"epivi_speed_{n_cells}x{n_peaks}_v1.h5ad"
    if path.is_file():
        return path
    say(f"simulating {n_cells:,} cells x {n_peaks:,} peaks")
    share = n_peaks / 100_000
    adata = epivi.simulate.accessibility(
        [n_cells // N_TYPES + (t < n_cells % N_TYPES) for t in range(N_TYPES)],
        n_fg=n_peaks // 2,
        n_bg=n_peaks - n_peaks // 2,
        median=7_300 * share,
        log_sd=0.4,
        clip=(1_000 * share, 30_000 * share),
        rho=0.4,
        chrom_sizes="hg38",
        seed=0,
    )
    rows = np.random.default_rng(0).permutation(adata.n_obs)
    adata = adata[rows].copy()
    adata.X = adata.X.astype(np.float32)
    adata.uns.clear()
    del adata.varm["bulk"]
    partial = path.with_suffix(f".{os.getpid()}.part")
    adata.write_h5ad(partial)
    partial.replace(path)
    return path


def build(name: str, adata: AnnData) -> Any:
    """Set the data up for a model and return the model, at its defaults."""
    if name == "PEAKVI":
        import scvi

        scvi.model.PEAKVI.setup_anndata(adata)
        return scvi.model.PEAKVI(adata)
    import epivi

    epivi.SAILER.setup_anndata(adata)
    return epivi.SAILER(adata, encoder="chromosome")


def train(model: Any, warm_up: int, steps: int) -> dict[str, float]:
    """Run a training of ``warm_up + steps`` steps and return seconds a step, wall-clock and processor time."""
    per_epoch = model.adata.n_obs // BATCH_SIZE
    options = {"train_size": 1.0, "early_stopping": False, "accelerator": "cpu", "devices": 1}
    total = warm_up + steps

    def run(clock: Any) -> None:
        more = {"max_steps": total, "batch_size": BATCH_SIZE, "callbacks": [clock]}
        model.train(max_epochs=-(-total // per_epoch) + 1, **QUIET | options | more)

    return timed(run, warm_up, steps)


def measure_speed(adata: AnnData, rounds: int, warm_up: int, steps: int) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """Return seconds a step of both models for each round, and their numbers of parameters."""
    models = {name: build(name, adata.copy() if name == "PEAKVI" else adata) for name in MODELS}
    parameters = {name: sum(p.numel() for p in model.module.parameters()) for name, model in models.items()}
    records = []
    for number in range(rounds):
        order = MODELS if number % 2 == 0 else MODELS[::-1]
        taken = {name: train(models[name], warm_up, steps) for name in order}
        record = {"round": number, **taken}
        for clock in ("wall", "cpu"):
            record[f"ratio_{clock}"] = taken["PEAKVI"][clock] / taken["SAILER"][clock]
        records.append(record)
        figures = ", ".join(f"{name} {taken[name]['wall'] * 1e3:.1f} ms a step" for name in MODELS)
        say(f"round {number}: {figures}, ratio {record['ratio_wall']:.2f} (processor time {record['ratio_cpu']:.2f})")
    return records, parameters


# ---------------------------------------------------------------------------------------------------------------------
# memory, in child processes


def memory_child(name: str, path: Path, steps: int) -> None:
    """Print as JSON what set-up and training of a model need above the data."""
    import anndata
    import scvi.model

    import epivi.models.sailer

    del epivi, scvi
    adata = anndata.read_h5ad(path)
    data = settle()
    resets = reset_peak()
    model = build(name, adata)
    set_up = peak() - data
    after_set_up = settle() - data
    train(model, 1, steps - 1)
    overall = peak() - data
    print(
        json.dumps(
            {
                "data": data,
                "set_up_peak": set_up,
                "after_set_up": after_set_up,
                "peak": overall,
                "peak_reset": resets,
            }
        )
    )


def measure_memory(path: Path, steps: int, threads: int) -> dict[str, dict[str, float]]:
    """Return the memory of both models in MiB, each measured in a process of its own."""
    result = {}
    for name in MODELS:
        command = [sys.executable, __file__, "--memory-of", name, "--data", str(path), "--steps", str(steps)]
        command += ["--threads", str(threads)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            message = f"The measurement of the memory of {name} failed:\n{done.stderr[-3000:]}"
            raise RuntimeError(message)
        result[name] = json.loads(done.stdout.strip().splitlines()[-1])
        say(f"{name}: {result[name]['peak']:,.0f} MiB above the data ({result[name]['data']:,.0f} MiB)")
    return result


# ---------------------------------------------------------------------------------------------------------------------


def main() -> int:
    """Measure, print and write; exit code 1 if a goal is missed."""
    chosen = parse(
        __doc__,
        rounds={"type": int, "default": 5, "help": "paired rounds"},
        steps={"type": int, "default": 20, "help": "timed steps of a round, and steps of the memory measurement"},
        warm_up={"type": int, "default": 3, "help": "steps of a round before the clock starts"},
        memory_of={"choices": MODELS, "help": argparse.SUPPRESS},
        data={"type": Path, "help": argparse.SUPPRESS},
    )
    if chosen.memory_of is not None:
        memory_child(chosen.memory_of, chosen.data, chosen.steps)
        return 0
    import anndata

    start = time.perf_counter()
    path = data_file(*SIZES[chosen.quick])
    memory = measure_memory(path, chosen.steps, chosen.threads)
    adata = anndata.read_h5ad(path)
    shape = {
        "cells": adata.n_obs,
        "peaks": adata.n_vars,
        "open peaks a cell": adata.X.nnz / adata.n_obs,
        "share of ones": float((adata.X.data == 1).mean()),
    }
    say(", ".join(f"{key} {value:,.2f}" for key, value in shape.items()))
    records, parameters = measure_speed(adata, chosen.rounds, chosen.warm_up, chosen.steps)
    median = {key: float(np.median([record[key] for record in records])) for key in ("ratio_wall", "ratio_cpu")}
    claims = [
        at_least("training steps per second, SAILER / PEAKVI, median of rounds", [median["ratio_wall"]], SPEED_GOAL),
        at_most(
            "peak memory above the data, SAILER / PEAKVI",
            [memory["SAILER"]["peak"] / memory["PEAKVI"]["peak"]],
            MEMORY_GOAL,
        ),
    ]
    rows = []
    for name in MODELS:
        wall, cpu = ([1e3 * record[name][clock] for record in records] for clock in ("wall", "cpu"))
        rows.append(
            [
                name,
                f"{parameters[name]:,}",
                f"{np.median(wall):.1f}",
                f"{min(wall):.1f} to {max(wall):.1f}",
                f"{np.median(cpu):.1f}",
                f"{1e3 / np.median(wall):.2f}",
                f"{memory[name]['peak']:,.0f}",
                f"{memory[name]['set_up_peak']:,.0f}",
            ]
        )
    header = ["model", "parameters", "ms a step", "range", "processor ms", "steps a second", "peak MiB", "set-up MiB"]
    ratios = [[f"{r['round']}", f"{r['ratio_wall']:.2f}", f"{r['ratio_cpu']:.2f}"] for r in records]
    described = (
        f"{adata.n_obs:,} cells x {adata.n_vars:,} peaks (CSR), {shape['open peaks a cell']:,.0f} open peaks a cell; "
        f"batch size {BATCH_SIZE}, float32, {chosen.rounds} paired rounds of {chosen.steps} steps in one process; "
        "memory above the data, each model in its own process.\n"
    )
    summed_up = (
        f"Ratio: median {median['ratio_wall']:.2f}, {spread([r['ratio_wall'] for r in records], 2)} (processor time "
        f"{median['ratio_cpu']:.2f}). {time.perf_counter() - start:.0f} s in all."
    )
    parts = [
        "# Speed and memory of SAILER against PEAKVI\n",
        *(["*Quick form: small data, the figures are no evidence.*\n"] if chosen.quick else []),
        described,
        claims_table(claims),
        "",
        markdown_table(header, rows),
        "",
        markdown_table(["round", "ratio of wall-clock time", "ratio of processor time"], ratios),
        "",
        summed_up,
    ]
    result = {
        "quick": chosen.quick,
        "data": shape,
        "batch_size": BATCH_SIZE,
        "steps": chosen.steps,
        "warm_up": chosen.warm_up,
        "parameters": parameters,
        "rounds": records,
        "median": median,
        "memory_mib": memory,
        "claims": [claim.to_dict() for claim in claims],
    }
    write(chosen.out, "speed", "\n".join(parts), result, threads=chosen.threads)
    return 0 if all(claim.holds for claim in claims) else EXIT_FAILED


if __name__ == "__main__":
    raise SystemExit(main())
