"""Speed and memory of the accessibility models against those of scvi-tools, in one process and on the same cells.

    OMP_NUM_THREADS=1 uv run python benchmarks/speed.py
    OMP_NUM_THREADS=1 uv run python benchmarks/speed.py --pairs chromosome --cells 2000 --rounds 3 --steps 8
    OMP_NUM_THREADS=1 uv run python benchmarks/speed.py --sweep
    OMP_NUM_THREADS=1 uv run python benchmarks/speed.py --quick

Pairs: SAILER (chromosome encoder) and SAILER with the layers of PEAKVI, both against PEAKVI; SAILER with the Poisson
likelihood against POISSONVI; SAILERX against MULTIVI. Both models of a pair run their own training loop,
``model.train()``: loader, forward, backward, optimiser and the trainer around them, at a batch size of 128, without
validation and logging. A callback takes the time from the end of the last warm-up step to the end of the last step;
what ``train()`` does before and after is not counted. Each round runs one model and then the other, so that a busy
machine slows both; the ratio is taken within rounds. Wall-clock time decides, processor time is printed beside it:
where threads wait for a busy core they differ. In the same rounds the latents of ``--inference-cells`` cells are
computed, and their accessibility, 512 cells a call.

Memory is measured in a process of its own for each model of the first pair: the peak resident memory from set-up to the
last step, less what was resident after both packages were imported, a small model was trained (which loads compiled
functions) and the data were read. The rates of products and of memory are measured in the same run and give the least
time that a step can take. The first steps of a process are timed without and with compiled functions of a former one.

Each part is kept in ``speed_parts`` of the folder of results as soon as it is measured: a run that was stopped goes on
there, and pairs can be measured one by one. ``--again`` measures anew. ``--sweep`` measures how time and memory grow.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from _common import EXIT_FAILED, Claim, at_least, at_most, claims_table, markdown_table, parse, say, spread, write
from _speed_limits import floor, rates
from _speed_models import BATCH_SIZE, PAIRS, build_ours, build_rival, data_file, n_parameters, train
from _speed_parts import FIRST, FORMS, first_child, kept, measure_first_step, measure_memory, memory_child
from _speed_sweep import run_sweep, summary, sweep_text

if TYPE_CHECKING:
    from anndata import AnnData

MEMORY_GOAL, INFERENCE_GOAL, FIRST_GOAL, SLOPE_TOLERANCE = 0.1, 10.0, 10.0, 0.1
SIDES = ("rival", "ours")
SIZES = {False: (10_000, 100_000), True: (1_000, 10_000)}
DECODED_AT_ONCE = 512
LARGEST_MIB = 16_000.0
# hidden units before the logits, and products of peaks and hidden units in a step
DECODERS = {"chromosome": (64, 3), "dense": (316, 3), "poisson": (64, 4), "multiome": (64, 3)}


def timed_call(function: Any) -> dict[str, float]:
    """Return seconds of a call, wall-clock and processor time."""
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    return {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def decode(model: Any, rows: np.ndarray) -> None:
    """Compute the accessibility of cells, some at once, and let go of it."""
    name = "get_normalized_accessibility"
    if not hasattr(model, name):
        name = "get_accessibility_estimates"
    for start in range(0, rows.size, DECODED_AT_ONCE):
        getattr(model, name)(indices=rows[start : start + DECODED_AT_ONCE])


def measure(name: str, path: Path, chosen: argparse.Namespace) -> dict[str, Any]:
    """Return seconds a step, and of inference, of both models of a pair for each round, and the rates beside them."""
    import anndata

    pair = PAIRS[name]
    adata: AnnData = anndata.read_h5ad(path)
    models = {"rival": build_rival(pair, adata), "ours": build_ours(pair, adata)}
    rows = np.arange(min(chosen.inference_cells, adata.n_obs))
    shape = {"cells": adata.n_obs, "peaks": adata.n_vars, "open": adata.X.nnz / adata.n_obs}
    del adata
    records = []
    for number in range(chosen.rounds):
        record: dict[str, Any] = {"round": number}
        for side in SIDES if number % 2 == 0 else SIDES[::-1]:
            model = models[side]
            steps = chosen.steps if side == "ours" else max(chosen.steps // 4, 2)
            record[side] = {"step": train(model, chosen.warm_up, steps)}
            # before the clock starts: compiled functions, and memory that the machine first has to find
            decode(model, rows[:DECODED_AT_ONCE])
            record[side]["latent"] = timed_call(lambda m=model: m.get_latent_representation(indices=rows))
            record[side]["accessibility"] = timed_call(lambda m=model: decode(m, rows))
            gc.collect()
        for what in ("step", "latent", "accessibility"):
            for clock in ("wall", "cpu"):
                record[f"{what}_{clock}"] = record["rival"][what][clock] / record["ours"][what][clock]
        records.append(record)
        say(
            f"{name}, round {number}: {pair.rival} {record['rival']['step']['wall'] * 1e3:.0f} ms a step, {pair.ours} "
            f"{record['ours']['step']['wall'] * 1e3:.1f}; ratio {record['step_wall']:.1f} (processor "
            f"{record['step_cpu']:.1f}), latents {record['latent_wall']:.1f} ({record['latent_cpu']:.1f}), "
            f"accessibility {record['accessibility_wall']:.1f} ({record['accessibility_cpu']:.1f})"
        )
    parameters = {side: n_parameters(model) for side, model in models.items()}
    found, (n_hidden, n_products) = rates(), DECODERS[name]
    least = floor(shape["peaks"], n_hidden, parameters["ours"], BATCH_SIZE, found, n_products=n_products)
    cpu = 1e3 * float(np.median([record["ours"]["step"]["cpu"] for record in records]))
    return {
        "data": shape,
        "inference_cells": int(rows.size),
        "rounds": records,
        "parameters": parameters,
        "rates": found,
        "least_ms": least,
        "share_of_limit": sum(least.values()) / cpu,
    }


def median(found: dict[str, Any], key: str) -> float:
    """Return the median of a ratio over the rounds."""
    return float(np.median([record[key] for record in found["rounds"]]))


def rows_of(results: dict[str, Any]) -> list[list[str]]:
    """Return the rows of the table of times."""
    rows = []
    for name, found in results.items():
        for side in SIDES:
            wall, cpu = ([1e3 * r[side]["step"][clock] for r in found["rounds"]] for clock in ("wall", "cpu"))
            inference = [
                1e3 * float(np.median([r[side][what]["cpu"] for r in found["rounds"]])) / found["inference_cells"]
                for what in ("latent", "accessibility")
            ]
            rows.append(
                [
                    f"{name}: {getattr(PAIRS[name], side)}",
                    f"{found['parameters'][side]:,}",
                    f"{np.median(wall):.1f}",
                    f"{min(wall):.1f} to {max(wall):.1f}",
                    f"{np.median(cpu):.1f}",
                    f"{BATCH_SIZE * 1e3 / np.median(wall):,.0f}",
                    *(f"{value:.3f}" for value in inference),
                ]
            )
    return rows


def claims_of(results: dict[str, Any], memory: dict[str, Any], first: dict[str, Any], name: str) -> list[Claim]:
    """Return the claims about pairs, memory and first steps."""
    claims = []
    for pair, result in results.items():
        ours, rival = PAIRS[pair].ours, PAIRS[pair].rival
        goals = {"step": PAIRS[pair].goal, "latent": INFERENCE_GOAL, "accessibility": INFERENCE_GOAL}
        names = {"step": "training steps per second", "latent": "speed of latents"}
        for what, goal in goals.items():
            text = f"{pair}: {names.get(what, 'speed of accessibility')}, {ours} / {rival}"
            note = f"processor time {median(result, f'{what}_cpu'):.1f}"
            claims.append(at_least(text, [median(result, f"{what}_wall")], goal, note=note))
    for form in FORMS[1:]:
        text = f"{name}: peak memory above the data, {form} / {PAIRS[name].rival}"
        claims.append(at_most(text, [memory[form]["peak"] / memory["rival"]["peak"]], MEMORY_GOAL))
    for label, found in first.items():
        text = f"processor seconds of the first two steps, functions {label}"
        claims.append(at_most(text, [found["first_cpu"]], FIRST_GOAL, note=f"wall-clock {found['first_wall']:.1f}"))
    return claims


def sweep(chosen: argparse.Namespace) -> int:
    """Measure how time and memory grow, print and write; exit code 1 if a slope is not one."""
    keep = forget if chosen.again else kept
    found = run_sweep(chosen.out, min(chosen.rounds, 3), 400.0 if chosen.quick else LARGEST_MIB, keep)
    slopes = summary(found)
    write(chosen.out, "speed_sweep", sweep_text(found), {"points": found, "slopes": slopes}, threads=chosen.threads)
    return 0 if all(abs(slopes[key] - 1) <= SLOPE_TOLERANCE for key in ("cells", "non-zeros")) else EXIT_FAILED


def forget(folder: Path, name: str, settings: dict[str, Any], run: Any) -> Any:
    """Measure a part anew and keep it."""
    return kept(folder, name, settings | {"again": time.time()}, run)


def report(chosen: argparse.Namespace, results: dict[str, Any], memory: dict[str, Any], first: dict[str, Any]) -> int:
    """Print and write; exit code 1 if a goal is missed."""
    name = next(iter(results))
    claims = claims_of(results, memory, first, name)
    shape = results[name]["data"]
    header = ["model", "parameters", "ms a step", "range", "processor ms", "cells a second", "latent ms", "peaks ms"]
    memory_rows = [[form, *(f"{m[key]:,.0f}" for key in ("peak", "set_up_peak", "code"))] for form, m in memory.items()]
    ratios = [
        [
            pair,
            *(spread([r[f"step_{clock}"] for r in result["rounds"]], 1) for clock in ("wall", "cpu")),
            ", ".join(f"{key} {value:.1f}" for key, value in result["least_ms"].items()),
            f"{result['share_of_limit']:.2f}",
        ]
        for pair, result in results.items()
    ]
    rate_rows = [[k, *(f"{r['rates'][k]:.0f}" for r in results.values())] for k in results[name]["rates"]]
    described = (
        f"{shape['cells']:,} cells x {shape['peaks']:,} peaks (CSR), {shape['open']:,.0f} open peaks a cell; batch "
        f"size {BATCH_SIZE}, {chosen.rounds} paired rounds in one process; medians of the rounds. Latents and "
        "accessibility (peaks) in milliseconds of processor time a cell.\n"
    )
    parts = [
        "# Speed and memory of the accessibility models against scvi-tools\n",
        *(["*Quick form: small data, the figures are no evidence.*\n"] if chosen.quick else []),
        described,
        claims_table(claims),
        "",
        markdown_table(header, rows_of(results)),
        "",
        markdown_table(["pair", "ratio, wall-clock", "ratio, processor", "least ms of a step", "share of it"], ratios),
        "",
        markdown_table(["memory above data and code", "peak MiB", "set-up MiB", "code MiB"], memory_rows),
        "",
        markdown_table(["rate on one thread, GFLOP/s or GB/s", *results], rate_rows),
    ]
    result = {
        "quick": chosen.quick,
        "batch_size": BATCH_SIZE,
        "steps": chosen.steps,
        "pairs": results,
        "memory_mib": memory,
        "first_steps_s": first,
        "claims": [claim.to_dict() for claim in claims],
    }
    write(chosen.out, "speed", "\n".join(parts), result, threads=chosen.threads)
    return 0 if all(claim.holds for claim in claims) else EXIT_FAILED


def main() -> int:
    """Measure what is asked for."""
    chosen = parse(
        __doc__,
        rounds={"type": int, "default": 5, "help": "paired rounds"},
        steps={"type": int, "default": 20, "help": "timed steps of a round; the slower model runs a quarter"},
        warm_up={"type": int, "default": 2, "help": "steps of a round before the clock starts"},
        pairs={"default": ",".join(PAIRS), "help": "what is compared, separated by commas"},
        cells={"type": int, "help": "number of cells"},
        inference_cells={"type": int, "default": 2_048, "help": "cells of latents and accessibility"},
        again={"action": "store_true", "help": "measure anew what a former run has kept"},
        sweep={"action": "store_true", "help": "time and memory by cells, peaks and batch size, without scvi-tools"},
        child={"choices": (*FORMS, FIRST), "help": argparse.SUPPRESS},
        data={"type": Path, "help": argparse.SUPPRESS},
    )
    names = chosen.pairs.split(",")
    if unknown := set(names) - set(PAIRS):
        raise SystemExit(f"--pairs holds {sorted(unknown)}; there are {', '.join(PAIRS)}")
    if chosen.child is not None:
        is_first = chosen.child == FIRST
        print(json.dumps(first_child(names[0]) if is_first else memory_child(chosen.child, names[0], chosen.data, 6)))
        return 0
    if chosen.sweep:
        return sweep(chosen)
    n_cells, n_peaks = SIZES[chosen.quick]
    n_cells = chosen.cells or n_cells
    path = chosen.data or data_file(n_cells, n_peaks)
    keep = forget if chosen.again else kept
    size = {"cells": n_cells, "peaks": n_peaks, "threads": chosen.threads}
    settings = size | {key: getattr(chosen, key) for key in ("rounds", "steps", "warm_up", "inference_cells")}
    first = keep(chosen.out, "first", {"pair": names[0]}, partial(measure_first_step, names[0], chosen.threads))
    memory = keep(
        chosen.out, "memory", size | {"pair": names[0]}, partial(measure_memory, names[0], path, chosen.threads)
    )
    results = {}
    for name in names:
        results[name] = keep(chosen.out, f"pair_{name}", settings, partial(measure, name, path, chosen))
        gc.collect()
    return report(chosen, results, memory, first)


if __name__ == "__main__":
    raise SystemExit(main())
