"""All tables of quality in one command: a process a data set, so many at a time, and the summary at the end."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from _cells import ACCESSIBILITY, EXPRESSION, MULTIOMES
from _common import environment, say
from _runs import DATA
from _summary import summary

if TYPE_CHECKING:
    from collections.abc import Sequence

HERE = Path(__file__).resolve().parent
TRACKS = ("pairedtag_mouse_brain_H3K27ac", "pairedtag_mouse_brain_h3k27me3")
EPIFOUNDATION = "preissl2018_forebrain_atac"
NOTICE = "*Quick form: small samples and a few epochs. It checks the scripts; its figures are no evidence.*\n"
WAIT_S = 0.5


class Job(NamedTuple):
    """One process: its name and its command line after the interpreter."""

    name: str
    command: list[str]


def jobs(out: Path, seeds: int | None, *, quick: bool) -> list[Job]:
    """Return the processes, those that take longest first."""

    def of(default: int) -> list[str]:
        return ["--seeds", str(1 if quick else seeds or default)]

    def script(name: str) -> str:
        return str(HERE / name)

    form = ["--quick"] if quick else []
    place = ["--out", str(out)]
    quality = script("quality.py")
    epifoundation = [quality, "epifoundation", *of(5), "--results", str(out / "epifoundation")]
    expresser = [quality, "expresser", *of(5), "--results", str(out / "expresser")]
    if quick:
        expresser += [
            "--sets",
            "blood",
            "--cells",
            "500",
            "--epochs",
            "1",
            "--methods",
            "gene mean",
            "gene mean and cell shift",
        ]
        expresser += ["15 neighbours, non-zeros", "Expresser"]
        found = [
            Job("epifoundation, cell types", [*epifoundation, "--tasks", EPIFOUNDATION, "--methods", *QUICK_LABELS]),
            Job(
                "epifoundation, expression",
                [*epifoundation, "--tasks", "snareseq_mouse_cortex", "--methods", *QUICK_GENES],
            ),
        ]
    else:
        found = [Job("epifoundation", epifoundation)]
    found.append(Job("candi", [quality, "candi", *of(3), *form, *place]))
    found += [Job(name, [quality, name, *of(3), *form, *place]) for name in MULTIOMES]
    found += [Job(f"{name}, tracks", [script("quality_tracks.py"), name, *of(5), *form, *place]) for name in TRACKS]
    found += [Job(name, [quality, name, *of(3), *form, *place]) for name in EXPRESSION]
    found += [Job(name, [quality, name, *of(5), *form, *place]) for name in ACCESSIBILITY]
    found.append(Job("expresser", expresser))
    return found


QUICK_LABELS = ("kNN on LSI", "logistic regression on LSI", "EpiFoundation, LSI start, masked peaks")
QUICK_GENES = ("gene activity", "ridge on LSI", "EpiFoundation, not pretrained")


def run_all(out: Path, *, quick: bool, seeds: int | None, n_jobs: int) -> int:
    """Run what is missing of every table and write the summary; returns 1 if a process failed."""
    if not DATA.is_dir():
        print(f"test data not found: set EPIVI_TEST_DATA (missing {DATA})", file=sys.stderr)
        return 2
    out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    failed = run_jobs(jobs(out, seeds, quick=quick), out / "logs", n_jobs)
    minutes = (time.perf_counter() - start) / 60
    text = report(out, minutes, failed, quick=quick)
    (out / "summary.md").write_text(text)
    print(text, flush=True)
    return 1 if failed else 0


def report(out: Path, minutes: float, failed: Sequence[str], *, quick: bool) -> str:
    """Return the summary with what it was made with."""
    around = environment(1)
    versions = ", ".join(f"{package} {version}" for package, version in around["packages"].items())
    parts = ["# Quality: all models, all data sets\n", NOTICE if quick else "", summary(out)]
    parts += [f"\nFailed: {name} (see `logs/`).\n" for name in failed]
    parts.append(f"\n{minutes:.1f} minutes in this call, {around['date']}, Python {around['python']}. {versions}.\n")
    return "\n".join(parts)


def run_jobs(todo: Sequence[Job], logs: Path, n_jobs: int) -> list[str]:
    """Run processes, so many at a time, and return the names of those that failed."""
    logs.mkdir(parents=True, exist_ok=True)
    waiting, running, failed = list(todo), {}, []
    variables = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    try:
        while waiting or running:
            while waiting and len(running) < n_jobs:
                job = waiting.pop(0)
                log = (logs / f"{job.name.replace(', ', '_').replace(' ', '_')}.log").open("w", encoding="utf-8")
                process = subprocess.Popen(
                    [sys.executable, *job.command], stdout=log, stderr=subprocess.STDOUT, env=variables
                )
                running[process] = (job, log, time.perf_counter())
            time.sleep(WAIT_S)
            for process in [process for process in running if process.poll() is not None]:
                job, log, began = running.pop(process)
                log.close()
                say(f"{job.name}: {time.perf_counter() - began:.0f} s" + (", FAILED" if process.returncode else ""))
                if process.returncode:
                    failed.append(job.name)
    finally:
        for process, (_, log, _) in running.items():
            process.terminate()
            log.close()
    return failed
