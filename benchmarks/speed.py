"""Speed and memory of the accessibility models against those of scvi-tools, in one process and on the same cells.

    OMP_NUM_THREADS=1 uv run python benchmarks/speed.py
    OMP_NUM_THREADS=1 uv run python benchmarks/speed.py --pairs chromosome --cells 2000 --rounds 3 --steps 8
    OMP_NUM_THREADS=1 uv run python benchmarks/speed.py --quick

Pairs: SAILER (chromosome encoder) and SAILER with the layers of PEAKVI, both against PEAKVI; SAILER with the Poisson
likelihood against POISSONVI; SAILERX against MULTIVI. Both models of a pair run their own training loop,
``model.train()``: loader, forward, backward, optimiser and the trainer around them, at a batch size of 128, without
validation and logging. A callback takes the time from the end of the last warm-up step to the end of the last step;
what ``train()`` does before and after is not counted. Each round runs one model and then the other, so that a busy
machine slows both; the ratio is taken within rounds. Wall-clock time decides, processor time is printed beside it:
where threads wait for a busy core they differ. In the same rounds the latents of some cells, and their accessibility,
are computed.

Memory is measured in a process of its own for each model of the first pair: the peak resident memory from set-up to the
last step, less the resident memory after the data were read (and both packages imported). The rates of products and
of memory are measured in the same run and give the least time that a step can take.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from _common import EXIT_FAILED, at_least, at_most, claims_table, markdown_table, parse, say, spread, write
from _measure import peak, reset_peak, settle
from _speed_limits import floor, rates
from _speed_models import BATCH_SIZE, PAIRS, build_ours, build_rival, data_file, n_parameters, train

if TYPE_CHECKING:
    from anndata import AnnData

MEMORY_GOAL = 0.1
INFERENCE_GOAL = 10.0
SIDES = ("rival", "ours")
FORMS = ("rival", "ours", "ours, step in backward")
SIZES = {False: (10_000, 100_000), True: (1_000, 10_000)}
N_EMBEDDED, N_DECODED = 512, 128


def timed_call(function: Any) -> dict[str, float]:
    """Return seconds of a call, wall-clock and processor time."""
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def decode(model: Any, n: int) -> Any:
    """Return the accessibility of the first cells."""
    name = "get_normalized_accessibility"
    if not hasattr(model, name):
        name = "get_accessibility_estimates"
    return getattr(model, name)(indices=np.arange(min(n, model.adata.n_obs)))


def measure(name: str, adata: AnnData, chosen: argparse.Namespace) -> dict[str, Any]:
    """Return seconds a step, and of inference, of both models of a pair for each round."""
    pair = PAIRS[name]
    models = {"rival": build_rival(pair, adata), "ours": build_ours(pair, adata)}
    records = []
    for number in range(chosen.rounds):
        record: dict[str, Any] = {"round": number}
        for side in SIDES if number % 2 == 0 else SIDES[::-1]:
            model = models[side]
            steps = chosen.steps if side == "ours" else max(chosen.steps // 4, 2)
            rows = np.arange(min(N_EMBEDDED, adata.n_obs))
            record[side] = {"step": train(model, chosen.warm_up, steps)}
            record[side]["latent"] = timed_call(lambda m=model, r=rows: m.get_latent_representation(indices=r))
            record[side]["accessibility"] = timed_call(lambda m=model: decode(m, N_DECODED))
        for what in ("step", "latent", "accessibility"):
            for clock in ("wall", "cpu"):
                record[f"{what}_{clock}"] = record["rival"][what][clock] / record["ours"][what][clock]
        records.append(record)
        say(
            f"{name}, round {number}: {pair.rival} {record['rival']['step']['wall'] * 1e3:.0f} ms a step, {pair.ours} "
            f"{record['ours']['step']['wall'] * 1e3:.1f}; ratio {record['step_wall']:.1f} (processor "
            f"{record['step_cpu']:.1f}), latents {record['latent_cpu']:.1f}, accessibility "
            f"{record['accessibility_cpu']:.1f}"
        )
    return {"rounds": records, "parameters": {side: n_parameters(model) for side, model in models.items()}}


def median(found: dict[str, Any], key: str) -> float:
    """Return the median of a ratio over the rounds."""
    return float(np.median([record[key] for record in found["rounds"]]))


# ---------------------------------------------------------------------------------------------------------------------
# memory, in child processes


def memory_child(form: str, name: str, path: Path, steps: int) -> None:
    """Print as JSON what set-up and training of a model need above the data."""
    import anndata
    import scvi.model

    import epivi.models.sailer

    del epivi, scvi
    adata = anndata.read_h5ad(path)
    data = settle()
    resets = reset_peak()
    model = (build_rival if form == "rival" else build_ours)(PAIRS[name], adata)
    # the copy of the data that both set up belongs to the data
    data += (adata.X.data.nbytes + adata.X.indices.nbytes + adata.X.indptr.nbytes) / 1024**2
    set_up = peak() - data
    train(model, 1, steps - 1, plan={"step_in_backward": True} if form == FORMS[2] else None)
    print(json.dumps({"data": data, "set_up_peak": set_up, "peak": peak() - data, "peak_reset": resets}))


def measure_memory(name: str, path: Path, threads: int) -> dict[str, dict[str, float]]:
    """Return the memory of the models in MiB, each measured in a process of its own."""
    result = {}
    for form in FORMS:
        command = [sys.executable, __file__, "--memory-of", form, "--pairs", name, "--data", str(path)]
        command += ["--threads", str(threads)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            message = f"The measurement of the memory of {form} failed:\n{done.stderr[-3000:]}"
            raise RuntimeError(message)
        result[form] = json.loads(done.stdout.strip().splitlines()[-1])
        say(f"{form}: {result[form]['peak']:,.0f} MiB above the data ({result[form]['data']:,.0f} MiB)")
    return result


# ---------------------------------------------------------------------------------------------------------------------


def first_step(name: str, adata: AnnData) -> float:
    """Return the seconds of the first step of our model less those of a later one: loading of compiled functions."""
    model = build_ours(PAIRS[name], adata)
    return timed_call(lambda: train(model, 0 + 1, 1))["wall"]


def rows_of(results: dict[str, Any]) -> list[list[str]]:
    """Return the rows of the table of times."""
    rows = []
    for name, found in results.items():
        for side in SIDES:
            wall, cpu = ([1e3 * r[side]["step"][clock] for r in found["rounds"]] for clock in ("wall", "cpu"))
            title = f"{name}: {getattr(PAIRS[name], side)}"
            rows.append(
                [
                    title,
                    f"{found['parameters'][side]:,}",
                    f"{np.median(wall):.1f}",
                    f"{min(wall):.1f} to {max(wall):.1f}",
                    f"{np.median(cpu):.1f}",
                    f"{1e3 / np.median(wall):.2f}",
                    f"{BATCH_SIZE * 1e3 / np.median(wall):,.0f}",
                ]
            )
    return rows


def main() -> int:
    """Measure, print and write; exit code 1 if a goal is missed."""
    chosen = parse(
        __doc__,
        rounds={"type": int, "default": 5, "help": "paired rounds"},
        steps={"type": int, "default": 20, "help": "timed steps of a round; the slower model runs a quarter"},
        warm_up={"type": int, "default": 2, "help": "steps of a round before the clock starts"},
        pairs={"default": ",".join(PAIRS), "help": "what is compared, separated by commas"},
        cells={"type": int, "help": "number of cells"},
        memory_of={"choices": FORMS, "help": argparse.SUPPRESS},
        data={"type": Path, "help": argparse.SUPPRESS},
    )
    names = chosen.pairs.split(",")
    if chosen.memory_of is not None:
        memory_child(chosen.memory_of, names[0], chosen.data, 6)
        return 0
    import anndata

    start = time.perf_counter()
    n_cells, n_peaks = SIZES[chosen.quick]
    path = chosen.data or data_file(chosen.cells or n_cells, n_peaks)
    memory = measure_memory(names[0], path, chosen.threads)
    adata = anndata.read_h5ad(path)
    shape = {"cells": adata.n_obs, "peaks": adata.n_vars, "open peaks a cell": adata.X.nnz / adata.n_obs}
    first = first_step(names[0], adata)
    results = {name: measure(name, adata, chosen) for name in names}
    found = rates()
    claims = [
        at_least(
            f"{name}: training steps per second, {PAIRS[name].ours} / {PAIRS[name].rival}",
            [median(result, "step_wall")],
            PAIRS[name].goal,
            note=f"processor time {median(result, 'step_cpu'):.1f}",
        )
        for name, result in results.items()
    ]
    for what in ("latent", "accessibility"):
        text = f"{names[0]}: speed of {what}, ours / {PAIRS[names[0]].rival}"
        note = f"processor time {median(results[names[0]], f'{what}_cpu'):.1f}"
        claims.append(at_least(text, [median(results[names[0]], f"{what}_wall")], INFERENCE_GOAL, note=note))
    for form in FORMS[1:]:
        text = f"{names[0]}: peak memory above the data, {form} / {PAIRS[names[0]].rival}"
        claims.append(at_most(text, [memory[form]["peak"] / memory["rival"]["peak"]], MEMORY_GOAL))
    claims.append(at_most("seconds of the first two steps", [first], 10.0))
    least = floor(adata.n_vars, 64, results[names[0]]["parameters"]["ours"], BATCH_SIZE, found)
    header = ["model", "parameters", "ms a step", "range", "processor ms", "steps a second", "cells a second"]
    memory_rows = [[form, f"{m['peak']:,.0f}", f"{m['set_up_peak']:,.0f}"] for form, m in memory.items()]
    ratios = [
        [
            name,
            spread([r["step_wall"] for r in result["rounds"]], 1),
            spread([r["step_cpu"] for r in result["rounds"]], 1),
        ]
        for name, result in results.items()
    ]
    described = (
        f"{adata.n_obs:,} cells x {adata.n_vars:,} peaks (CSR), {shape['open peaks a cell']:,.0f} open peaks a cell; "
        f"batch size {BATCH_SIZE}, {chosen.rounds} paired rounds in one process; medians of the rounds.\n"
    )
    parts = [
        "# Speed and memory of the accessibility models against scvi-tools\n",
        *(["*Quick form: small data, the figures are no evidence.*\n"] if chosen.quick else []),
        described,
        claims_table(claims),
        "",
        markdown_table(header, rows_of(results)),
        "",
        markdown_table(["pair", "ratio of wall-clock time", "ratio of processor time"], ratios),
        "",
        markdown_table(["memory above the data", "peak MiB", "set-up MiB"], memory_rows),
        "",
        markdown_table(["rate on one thread", "GFLOP/s or GB/s"], [[k, f"{v:.0f}"] for k, v in found.items()]),
        "",
        f"Least milliseconds of a step of the {names[0]} model at these rates: "
        + ", ".join(f"{key} {value:.1f}" for key, value in least.items())
        + f". {time.perf_counter() - start:.0f} s in all.",
    ]
    result = {
        "quick": chosen.quick,
        "data": shape,
        "batch_size": BATCH_SIZE,
        "steps": chosen.steps,
        "pairs": results,
        "memory_mib": memory,
        "rates": found,
        "least_ms": least,
        "first_steps_s": first,
        "claims": [claim.to_dict() for claim in claims],
    }
    write(chosen.out, "speed", "\n".join(parts), result, threads=chosen.threads)
    return 0 if all(claim.holds for claim in claims) else EXIT_FAILED


if __name__ == "__main__":
    raise SystemExit(main())
