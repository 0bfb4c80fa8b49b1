"""Parts of the speed benchmark that need a process of their own, and parts that are kept between runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from _common import say
from _measure import peak, reset_peak, settle
from _speed_models import PAIRS, build_ours, build_rival, small_data, train

if TYPE_CHECKING:
    from collections.abc import Callable

FORMS = ("rival", "ours", "ours, step in backward")
FIRST = "first step"
SCRIPT = Path(__file__).with_name("speed.py")


def kept(folder: Path, name: str, settings: dict[str, Any], measure: Callable[[], Any]) -> Any:
    """Return a part of the results: that of a former run at the same settings, or a new one, written at once."""
    path = folder / "speed_parts" / f"{name}.json"
    if path.is_file():
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["settings"] == settings:
            say(f"{name}: taken from {path}")
            return found["result"]
    result = measure()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"settings": settings, "result": result}, indent=1, default=float) + "\n", "utf-8")
    return result


def run_child(arguments: list[str], **environment: str) -> dict[str, Any]:
    """Run a part in a process of its own and return what it prints last, as JSON."""
    command = [sys.executable, str(SCRIPT), *arguments]
    around = {**os.environ, **environment}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=around)
    if done.returncode != 0:
        message = f"{' '.join(arguments)} failed:\n{done.stderr[-3000:]}"
        raise RuntimeError(message)
    return json.loads(done.stdout.strip().splitlines()[-1])


def memory_child(form: str, name: str, path: Path, steps: int) -> dict[str, Any]:
    """Return in MiB what set-up and training of a model need above the data.

    A small model is trained before the data are read, so that packages and compiled functions, which are loaded on
    first use and do not grow with the data, count as what they are: neither data nor model.
    """
    import anndata
    import scvi.model

    import epivi.models.sailer

    del epivi, scvi
    plan = {"step_in_backward": True} if form == FORMS[2] else None
    build = build_rival if form == FORMS[0] else build_ours
    before = settle()
    train(build(PAIRS[name], small_data()), 1, 1, plan=plan)
    loaded = settle()
    adata = anndata.read_h5ad(path)
    data = settle()
    resets = reset_peak()
    model = build(PAIRS[name], adata)
    # the copy of the data that both set up belongs to the data
    data += (adata.X.data.nbytes + adata.X.indices.nbytes + adata.X.indptr.nbytes) / 1024**2
    set_up = peak() - data
    train(model, 1, steps - 1, plan=plan)
    code = loaded - before
    return {"data": data, "code": code, "set_up_peak": set_up, "peak": peak() - data, "peak_reset": resets}


def measure_memory(name: str, path: Path, threads: int) -> dict[str, dict[str, float]]:
    """Return the memory of the models in MiB, each measured in a process of its own."""
    result = {}
    for form in FORMS:
        result[form] = run_child(
            ["--child", form, "--pairs", name, "--data", str(path), "--threads", str(threads)],
        )
        found = result[form]
        say(f"{form}: {found['peak']:,.0f} MiB above data ({found['data']:,.0f}) and code ({found['code']:,.0f})")
    return result


def first_child(name: str) -> dict[str, float]:
    """Return the seconds of a training of two steps on few cells, the first of this process and the next one."""
    model = build_ours(PAIRS[name], small_data())
    found = {}
    for label in ("first", "second"):
        wall, cpu = time.perf_counter(), time.process_time()
        train(model, 1, 1)
        found |= {f"{label}_wall": time.perf_counter() - wall, f"{label}_cpu": time.process_time() - cpu}
    return found


def measure_first_step(name: str, threads: int) -> dict[str, dict[str, float]]:
    """Return the seconds of the first steps without compiled functions, and with those that the former run kept."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["--child", FIRST, "--pairs", name, "--threads", str(threads)]
        found = {label: run_child(arguments, NUMBA_CACHE_DIR=folder) for label in ("compiled", "kept")}
    for label, seconds in found.items():
        say(f"first steps, {label}: {seconds['first_wall']:.1f} s ({seconds['first_cpu']:.1f} s of processor time)")
    return found
