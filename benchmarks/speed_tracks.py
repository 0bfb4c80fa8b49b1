"""Speed and memory of ConvNetVAE against the straightforward form of the same network, in one process.

    OMP_NUM_THREADS=1 uv run python benchmarks/speed_tracks.py
    OMP_NUM_THREADS=1 uv run python benchmarks/speed_tracks.py --all-bins

The straightforward form convolves dense batches, upsamples in the decoder before it convolves, multiplies shares by
libraries and takes torch's Poisson likelihood of all bins. It has the same parameters, starts from the same weights and
trains in the same loop. 10,000 cells, three channels of 25,000 bins, 1,000 counts a channel, one layer with K = S = 31
and two layers with K = 11, S = 3, batch 128, defaults otherwise.

Each round runs one form and then the other; the ratio is taken within rounds. Memory is measured in a process of its
own for each form: the peak resident memory from set-up to the last step, less that after the data were read.

``--all-bins`` trains on 4,434 cells and the 245,220 bins of a genome, and on 25,000 bins of the same cells, and prints
time and memory of both.
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
SPEED_GOAL, MEMORY_GOAL = 4.0, 0.5
FORMS = ("straightforward", "epivi")
NETWORKS: dict[str, dict[str, Any]] = {
    "K31 S31": {"kernel_size": 31, "stride": 31},
    "K11 S3, 2 layers": {"kernel_size": 11, "stride": 3, "n_layers": 2},
}
BINS, ALL_BINS = 25_000, 245_220
GIB_GOAL = 16.0


def data_file(n_cells: int, n_bins: int) -> Path:
    """Simulate tracks over 20 chromosomes of equal length, once, and return the file."""
    import epivi

    path = Path(tempfile.gettempdir()) / f"epivi_tracks_{n_cells}x3x{n_bins}_v1.h5ad"
    if not path.is_file():
        say(f"simulating {n_cells:,} cells x 3 channels x {n_bins:,} bins")
        adata = epivi.simulate.tracks(
            n_cells, domain=5, depth=n_bins / 25, chrom_sizes=[n_bins // 20] * 20, n_types=9, seed=0
        )
        adata.uns = {"tracks": adata.uns["tracks"]}
        partial = path.with_suffix(f".{os.getpid()}.part")
        adata.write_h5ad(partial)
        partial.replace(path)
    return path


def straightforward(model: Any) -> Any:
    """Turn a model into the straightforward form: dense counts, upsampling decoder, torch's Poisson likelihood."""
    import torch

    module = model.module
    module.decoder.form = "upsample"
    shape = (module.n_channels, module.lengths[0])

    class Form(type(module)):
        """The module with plain encode and likelihood."""

        def _dense(self, group: Any, n_rows: int) -> Any:
            x_bcl = torch.zeros(n_rows, shape[0] * shape[1])
            x_bcl[group.rows, group.columns] = group.values
            return x_bcl.view(n_rows, *shape)

        def encode(self, groups: Any, seen_bc: Any, covariates_bk: Any) -> Any:
            features_bft = self.encoder(self._dense(groups[0], seen_bc.shape[0]))
            return self.heads(self.join(torch.cat([features_bft.flatten(1), covariates_bk], dim=1)))

        def negative_log_likelihood(self, hidden: Any, groups: Any, mask_bc: Any) -> Any:
            x_bcl = self._dense(groups[0], mask_bc.shape[0])
            rate_bcl = torch.softmax(self.decoder(hidden), dim=-1) * x_bcl.sum(-1, keepdim=True)
            return -torch.distributions.Poisson(rate_bcl + 1e-12).log_prob(x_bcl).sum(-1)

    module.__class__ = Form
    return model


def build(form: str, network: str, adata: AnnData) -> Any:
    """Return a model in one of the forms."""
    import epivi

    epivi.ConvNetVAE.setup_anndata(adata)
    model = epivi.ConvNetVAE(adata, seed=0, boundaries="none", **NETWORKS[network])
    return straightforward(model) if form == FORMS[0] else model


def train(model: Any, warm_up: int, steps: int) -> dict[str, float]:
    """Return seconds a step."""
    per_epoch = model.adata.n_obs // BATCH_SIZE
    total = warm_up + steps
    options = {"train_size": 1.0, "early_stopping": False, "accelerator": "cpu", "devices": 1, "max_steps": total}

    def run(clock: Any) -> None:
        more = {"batch_size": BATCH_SIZE, "callbacks": [clock]}
        model.train(max_epochs=-(-total // per_epoch) + 1, **QUIET | options | more)

    return timed(run, warm_up, steps)


def rounds_of(network: str, adata: AnnData, chosen: argparse.Namespace) -> list[dict[str, Any]]:
    """Return seconds a step of both forms for each round, and how far their losses differ."""
    records = []
    for number in range(chosen.rounds):
        order = FORMS if number % 2 == 0 else FORMS[::-1]
        taken = {form: train(build(form, network, adata), chosen.warm_up, chosen.steps) for form in order}
        record: dict[str, Any] = {"round": number, **taken}
        for clock in ("wall", "cpu"):
            record[f"ratio_{clock}"] = taken[FORMS[0]][clock] / taken[FORMS[1]][clock]
        records.append(record)
        figures = ", ".join(f"{form} {taken[form]['wall'] * 1e3:.0f} ms a step" for form in FORMS)
        say(f"{network}, round {number}: {figures}, ratio {record['ratio_wall']:.2f}")
    return records


def memory_child(form: str, network: str, path: Path, steps: int) -> None:
    """Print as JSON the seconds a step and the peak memory above the data of one form."""
    import anndata

    import epivi.models.convnetvae

    del epivi
    adata = anndata.read_h5ad(path)
    data = settle()
    reset_peak()
    taken = train(build(form, network, adata), 2, steps)
    print(json.dumps({"data": data, "peak": peak() - data, "wall": taken["wall"], "cpu": taken["cpu"]}))


def in_child(form: str, network: str, path: Path, chosen: argparse.Namespace) -> dict[str, float]:
    """Run :func:`memory_child` in a process of its own."""
    command = [sys.executable, __file__, "--child", form, "--network", network, "--data", str(path)]
    command += ["--steps", str(chosen.steps), "--threads", str(chosen.threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        message = f"The measurement of {form}, {network} failed:\n{done.stderr[-3000:]}"
        raise RuntimeError(message)
    result = json.loads(done.stdout.strip().splitlines()[-1])
    say(f"{form}, {network}: {result['peak']:,.0f} MiB above the data, {result['wall'] * 1e3:.0f} ms a step")
    return result


def all_bins(chosen: argparse.Namespace) -> int:
    """Compare 245,220 bins with 25,000 bins of as many cells."""
    cells = 500 if chosen.quick else 4_434
    network = "K31 S31"
    found = {n: in_child("epivi", network, data_file(cells, n), chosen) for n in (BINS, ALL_BINS)}
    ratio = {key: found[ALL_BINS][key] / found[BINS][key] for key in ("wall", "peak")}
    total = (found[ALL_BINS]["peak"] + found[ALL_BINS]["data"]) / 1024
    claims = [
        at_most("peak memory with all bins, data included, GiB", [total], GIB_GOAL),
        at_most("time of all bins / 25,000 bins (paper: 10)", [ratio["wall"]], 10.0),
        at_most("memory of all bins / 25,000 bins (paper: 4)", [ratio["peak"]], 4.0),
    ]
    steps = -(-cells // BATCH_SIZE)
    rows = [
        [f"{n:,}", f"{value['wall'] * 1e3:.0f}", f"{value['wall'] * steps:.1f}", f"{value['peak']:,.0f}"]
        for n, value in found.items()
    ]
    header = ["bins", "ms a step", "seconds an epoch", "peak MiB above the data"]
    parts = [
        "# ConvNetVAE on all bins of a genome\n",
        f"{cells:,} cells x 3 channels, {network}, batch {BATCH_SIZE}.\n",
        claims_table(claims),
        "",
        markdown_table(header, rows),
    ]
    result = {"quick": chosen.quick, "cells": cells, "found": found, "claims": [c.to_dict() for c in claims]}
    write(chosen.out, "speed_tracks_all_bins", "\n".join(parts), result, threads=chosen.threads)
    return 0 if all(claim.holds for claim in claims) else EXIT_FAILED


def main() -> int:
    """Measure, print and write; exit code 1 if a goal is missed."""
    chosen = parse(
        __doc__,
        rounds={"type": int, "default": 5, "help": "paired rounds"},
        steps={"type": int, "default": 10, "help": "timed steps"},
        warm_up={"type": int, "default": 2, "help": "steps of a round before the clock starts"},
        all_bins={"action": "store_true", "help": "measure all bins of a genome"},
        child={"choices": FORMS, "help": argparse.SUPPRESS},
        network={"choices": list(NETWORKS), "help": argparse.SUPPRESS},
        data={"type": Path, "help": argparse.SUPPRESS},
    )
    if chosen.child is not None:
        memory_child(chosen.child, chosen.network, chosen.data, chosen.steps)
        return 0
    if chosen.all_bins:
        return all_bins(chosen)
    import anndata

    start = time.perf_counter()
    path = data_file(1_000 if chosen.quick else 10_000, BINS)
    memory = {(f, n): in_child(f, n, path, chosen) for n in NETWORKS for f in FORMS}
    adata = anndata.read_h5ad(path)
    records = {network: rounds_of(network, adata, chosen) for network in NETWORKS}
    claims, rows = [], []
    steps = -(-adata.n_obs // BATCH_SIZE)
    for network in NETWORKS:
        ratios = [record["ratio_wall"] for record in records[network]]
        share = memory[FORMS[1], network]["peak"] / memory[FORMS[0], network]["peak"]
        claims += [
            at_least(f"{network}: steps per second, epivi / straightforward", [float(np.median(ratios))], SPEED_GOAL),
            at_most(f"{network}: peak memory above the data, epivi / straightforward", [share], MEMORY_GOAL),
        ]
        for form in FORMS:
            wall = [record[form]["wall"] for record in records[network]]
            rows.append(
                [
                    f"{network}, {form}",
                    f"{np.median(wall) * 1e3:.0f}",
                    spread([1e3 * value for value in wall], 0),
                    f"{np.median(wall) * steps:.0f}",
                    f"{memory[form, network]['peak']:,.0f}",
                ]
            )
    header = ["form", "ms a step, median", "mean", "seconds an epoch", "peak MiB"]
    described = (
        f"{adata.n_obs:,} cells x 3 channels x {BINS:,} bins, {adata.obsm['tracks'].nnz / adata.n_obs:,.0f} non-zeros "
        f"a cell, batch {BATCH_SIZE}, float32, {chosen.rounds} paired rounds of {chosen.steps} steps.\n"
    )
    parts = [
        "# Speed and memory of ConvNetVAE against the straightforward form\n",
        *(["*Quick form: small data, the figures are no evidence.*\n"] if chosen.quick else []),
        described,
        claims_table(claims),
        "",
        markdown_table(header, rows),
        f"\n{time.perf_counter() - start:.0f} s in all.",
    ]
    result = {
        "quick": chosen.quick,
        "rounds": records,
        "memory_mib": {f"{network}, {form}": value for (form, network), value in memory.items()},
        "claims": [claim.to_dict() for claim in claims],
    }
    write(chosen.out, "speed_tracks", "\n".join(parts), result, threads=chosen.threads)
    return 0 if all(claim.holds for claim in claims) else EXIT_FAILED


if __name__ == "__main__":
    raise SystemExit(main())
