"""Time and memory of `epivi.pp.fragments` on a million simulated fragments, on one core, beside snapatac2 where given.

    OMP_NUM_THREADS=1 uv run python benchmarks/fragments.py
    OMP_NUM_THREADS=1 uv run python benchmarks/fragments.py --snapatac2-python PATH/bin/python
    OMP_NUM_THREADS=1 uv run python benchmarks/fragments.py --quick

The file is bgzip with 3,000 barcodes over hg38 in 10-kb bins, unpacking included. Each tool runs in a process of its
own on one core; imports are timed apart. Processor time decides, since others may use the core; wall-clock time stands
beside it. "Cold" is the first call with an empty cache of compiled code, so that it holds
the import of numba and the compilation of the parser; "cached" the first call of a new process after that; "warm" any
later call. Peak memory is that of the process less what it held after the imports.

snapatac2 is no dependency: give a python that has it. It reads with ``import_fragments`` (no index, unsorted barcodes)
and counts with ``add_tile_matrix`` (insertions, every bin), one job; both tools must find the same counts.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from _common import EXIT_FAILED, at_most, claims_table, markdown_table, parse, say, spread, write

WIDTH_BP = 10_000
GOAL_S, COLD_GOAL_S = 5.0, 20.0
MIB = 1024.0**2

TIMING = """
import json, sys, time
START = time.process_time()
def memory(entry):
    # getrusage would count the process that started this one
    lines = dict(line.split(":") for line in open("/proc/self/status"))
    return int(lines[entry].split()[0]) * 1024
def report(**entries):
    print(json.dumps({"peak": memory("VmHWM") - base, **entries}))
def now():
    return time.process_time(), time.perf_counter()
def since(start):
    return [after - before for before, after in zip(start, now())]
def sums(x):
    return {"total": int(x.sum()), "nnz": int(x.nnz), "squares": int((x.data.astype("int64") ** 2).sum())}
"""
OURS = """
import epivi
epivi.pp.fragments
import anndata, pandas
imports, base, seconds = time.process_time() - START, memory("VmRSS"), []
for _ in range(int(sys.argv[2])):
    start = now()
    adata = epivi.pp.fragments(sys.argv[1], "hg38", bin_size_bp=int(sys.argv[3]), count=sys.argv[4])
    seconds.append(since(start))
report(imports=imports, seconds=seconds, counts=sums(adata.X))
"""
THEIRS = """
import snapatac2 as snap
sizes = json.loads(sys.argv[4])
imports, base, reading, counting = time.process_time() - START, memory("VmRSS"), [], []
for _ in range(int(sys.argv[2])):
    start = now()
    adata = snap.pp.import_fragments(
        sys.argv[1], chrom_sizes=sizes, min_num_fragments=0, sorted_by_barcode=False, n_jobs=1, tempdir=sys.argv[5]
    )
    reading.append(since(start))
    start = now()
    snap.pp.add_tile_matrix(
        adata, bin_size=int(sys.argv[3]), exclude_chroms=None, counting_strategy="insertion", n_jobs=1
    )
    counting.append(since(start))
report(imports=imports, reading=reading, counting=counting, counts=sums(adata.X[:]), version=snap.__version__)
"""


def simulate(path: Path, n_fragments: int, n_barcodes: int) -> None:
    """Write sorted fragments: positions uniform over the chromosomes but chrM, barcodes with gamma weights."""
    import epivi

    rng = np.random.default_rng(0)
    sizes = {name: size for name, size in epivi.pp.chrom_sizes("hg38").items() if name != "chrM"}
    names, size = list(sizes), np.array(list(sizes.values()), dtype=float)
    chrom = np.sort(rng.choice(len(names), n_fragments, p=size / size.sum()))
    start = (rng.random(n_fragments) * (size[chrom] - 1000)).astype(np.int64)
    order = np.lexsort((start, chrom))
    end = start[order] + rng.integers(30, 800, n_fragments)
    weights = rng.gamma(1.0, 1.0, n_barcodes)
    barcodes = ["".join(letters) + "-1" for letters in rng.choice(list("ACGT"), (n_barcodes, 16))]
    of = rng.choice(n_barcodes, n_fragments, p=weights / weights.sum())
    rows = zip(chrom[order], start[order], end, of, rng.geometric(0.4, n_fragments), strict=True)
    text = "\n".join(f"{names[c]}\t{s}\t{e}\t{barcodes[b]}\t{n}" for c, s, e, b, n in rows) + "\n"
    data = text.encode()
    with path.open("wb") as file:
        for at in [*range(0, len(data), 0xFF00), len(data)]:  # the last block is empty and ends the file
            file.write(bgzip_block(data[at : at + 0xFF00]))


def bgzip_block(part: bytes) -> bytes:
    """Pack one block (SAM specification, 4.1)."""
    deflate = zlib.compressobj(6, zlib.DEFLATED, -15)
    body = deflate.compress(part) + deflate.flush()
    head = bytes.fromhex("1f8b08040000000000ff060042430200") + struct.pack("<H", len(body) + 25)
    return head + body + struct.pack("<II", zlib.crc32(part), len(part))


def run(python: str, code: str, *arguments: str, cache: str = "") -> dict[str, Any]:
    """Run a script in a new process on one core and return what it reports."""
    one_thread = ("OMP_NUM_THREADS", "NUMBA_NUM_THREADS", "RAYON_NUM_THREADS", "POLARS_MAX_THREADS")
    environment = os.environ | dict.fromkeys(one_thread, "1") | ({"NUMBA_CACHE_DIR": cache} if cache else {})
    pin = ""
    if hasattr(os, "sched_setaffinity"):
        pin = f"import os\nos.sched_setaffinity(0, {{{max(os.sched_getaffinity(0))}}})\n"
    command = [python, "-W", "ignore", "-c", pin + TIMING + code, *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        message = f"{python} failed:\n{result.stderr[-2000:]}"
        raise SystemExit(message)
    return json.loads(result.stdout.splitlines()[-1])


def measure(path: Path, folder: str, chosen: Any) -> dict[str, Any]:
    """Run both tools on the file."""
    import epivi

    cache, rounds = f"{folder}/cache", str(chosen.rounds)
    result: dict[str, Any] = {}
    for rule in ("fragments", "insertions"):
        for name, calls in (("cold", "1"), ("warm", str(chosen.rounds + 1))):
            if (rule, name) != ("insertions", "cold"):
                say(f"epivi, {rule}, {name}")
                result[f"{rule}, {name}"] = run(
                    sys.executable, OURS, str(path), calls, str(WIDTH_BP), rule, cache=cache
                )
    if chosen.snapatac2_python:
        say("snapatac2")
        sizes = json.dumps(epivi.pp.chrom_sizes("hg38"))
        theirs = run(chosen.snapatac2_python, THEIRS, str(path), rounds, str(WIDTH_BP), sizes, folder)
        result["snapatac2"] = theirs
        if theirs["counts"] != result["insertions, warm"]["counts"]:
            message = f"The counts differ: {theirs['counts']} and {result['insertions, warm']['counts']}."
            raise SystemExit(message)
    return result


def processor(calls: list[list[float]]) -> list[float]:
    """Return the processor seconds of each call."""
    return [cpu for cpu, _ in calls]


def row(name: str, calls: list[list[float]], peak: float | None = None) -> list[str]:
    """Return a row of the table."""
    wall = [seconds for _, seconds in calls]
    return [name, spread(processor(calls), 2), spread(wall, 2), "" if peak is None else f"{peak / MIB:.0f}"]


def both(theirs: dict[str, Any]) -> list[list[float]]:
    """Return the seconds of reading and counting together."""
    return np.add(theirs["reading"], theirs["counting"]).tolist()


def table(result: dict[str, Any]) -> str:
    """Return seconds and memory."""
    cold, warm, other = (result[name] for name in ("fragments, cold", "fragments, warm", "insertions, warm"))
    rows = [
        row("epivi, fragments, cold", cold["seconds"], cold["peak"]),
        row("epivi, fragments, cached", warm["seconds"][:1]),
        row("epivi, fragments, warm", warm["seconds"][1:], warm["peak"]),
        row("epivi, insertions, warm", other["seconds"][1:], other["peak"]),
    ]
    if theirs := result.get("snapatac2"):
        rows.append(row(f"snapatac2 {theirs['version']}, import_fragments", theirs["reading"]))
        rows.append(row("snapatac2, add_tile_matrix", theirs["counting"]))
        rows.append(row("snapatac2, both", both(theirs), theirs["peak"]))
    return markdown_table(["", "processor seconds", "wall-clock seconds", "peak MiB"], rows)


def main() -> int:
    chosen = parse(
        __doc__,
        snapatac2_python={"default": "", "help": "python of an environment with snapatac2"},
        rounds={"type": int, "default": 5, "help": "warm calls"},
    )
    n_fragments, n_barcodes = (20_000, 100) if chosen.quick else (1_000_000, 3_000)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "fragments.tsv.gz"
        say(f"simulating {n_fragments:,} fragments")
        simulate(path, n_fragments, n_barcodes)
        size = path.stat().st_size / MIB
        result = measure(path, folder, chosen)
    warm, cold = result["fragments, warm"]["seconds"][1:], result["fragments, cold"]["seconds"]
    claims = [
        at_most("processor seconds, warm", processor(warm), GOAL_S),
        at_most("processor seconds, cold", processor(cold), COLD_GOAL_S, "import of numba and compilation included"),
    ]
    text = [f"# Fragments to bins: {n_fragments:,} fragments, {n_barcodes:,} barcodes, {size:.1f} MiB packed\n"]
    if chosen.quick:
        text.append("*Quick form: it checks the script; its figures are no evidence.*\n")
    text += [claims_table(claims), "", table(result)]
    if theirs := result.get("snapatac2"):
        ours = np.array(result["insertions, warm"]["seconds"][1:])
        ratios = np.mean(both(theirs), axis=0) / ours.mean(axis=0)
        result["ratio"] = ratios.tolist()
        text.append(
            f"\nsnapatac2 takes {ratios[0]:.1f} times the processor time ({ratios[1]:.1f} of wall-clock time) of epivi "
            "for insertions, warm. The counts are equal."
        )
    write(chosen.out, "fragments", "\n".join(text) + "\n", {"quick": chosen.quick, **result}, threads=chosen.threads)
    return 0 if all(claim.holds for claim in claims) else EXIT_FAILED


if __name__ == "__main__":
    sys.exit(main())
