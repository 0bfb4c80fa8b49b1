"""Shared by the scripts of quality: scores of an embedding, runs kept as JSON, tables in Markdown."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import re
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from _measure import peak, reset_peak, settle

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterable, Mapping

DATA = Path(os.environ.get("EPIVI_TEST_DATA", "../shared/data")) / "sc"
QUIET = {"enable_progress_bar": False}
VERSIONS = ("epivi", "torch", "scvi-tools", "scib-metrics", "harmonypy", "mofapy2", "numpy")
# what a run says of itself beside its scores; the rest of an entry are numbers
RECORD = "run"
ABSENT = "absent"
UNINTEGRATED = "before correction"


def scores(
    values: np.ndarray,
    labels: np.ndarray | None,
    depth: np.ndarray,
    batch: np.ndarray | None = None,
    unintegrated: np.ndarray | None = None,
) -> dict[str, float]:
    """Return what an embedding is worth: agreement with labels, mixing of batches, information about depth.

    ARI and NMI are those at as many clusters as labels. The means of scIB and the two totals stand where labels and
    batches allow them: ``scib_bio`` without isolated labels where there is one batch.

    Parameters
    ----------
    values
        Embedding, shape (n, d).
    labels
        Cell types, shape (n,), or ``None``.
    depth
        Open features or counts of each cell, shape (n,).
    batch
        Batches, shape (n,), or ``None``.
    unintegrated
        Embedding before correction, for the PCR comparison.
    """
    from epivi.metrics import cluster_agreement, confounder_information

    mark_fitted()
    found: dict[str, float] = {}
    if labels is not None:
        agreement = cluster_agreement(values, labels)
        found |= {
            "ari": agreement.ari,
            "nmi": agreement.nmi,
            "clusters": agreement.n_clusters,
            "silhouette": agreement.silhouette_labels,
        }
    found["information_depth"] = confounder_information(values, depth, discrete=False).mean
    return found | scib_scores(values, labels, batch, unintegrated)


def scib_scores(
    values: np.ndarray, labels: np.ndarray | None, batch: np.ndarray | None, unintegrated: np.ndarray | None
) -> dict[str, float]:
    """Return the aggregates of ``metrics.benchmark`` that are defined, and I(z,batch)."""
    from anndata import AnnData

    from epivi.metrics import benchmark

    if labels is None and batch is None:
        return {}
    adata = AnnData(np.zeros((len(values), 1), dtype=np.float32), obs=pd.DataFrame(index=_names(len(values))))
    adata.obsm["values"] = values
    keys: dict[str, str] = {}
    for key, column in (("label_key", labels), ("batch_key", batch)):
        if column is not None:
            adata.obs[key] = pd.Categorical(column)
            keys[key] = key
    if unintegrated is not None:
        adata.obsm[UNINTEGRATED] = unintegrated
        keys["unintegrated_key"] = UNINTEGRATED
    table = benchmark(adata, ["values"], **keys)
    row = table["aggregate"].loc["values"]
    found = {f"scib_{name.removeprefix('total_')}": float(row[name]) for name in row.index if math.isfinite(row[name])}
    if batch is None:  # graph connectivity alone is no score of batches
        found.pop("scib_batch", None)
        found.pop("scib_scib", None)
        found.pop("scib_convnet", None)
    if "scib_scib" in found:
        found["scib_total"] = found.pop("scib_scib")
    if batch is not None:
        found["information_batch"] = float(table.loc["values", ("confounder", "I(z,batch_key)")])
    return found


def _names(n: int) -> list[str]:
    return [str(i) for i in range(n)]


def held_out_scores(values: np.ndarray, labels: np.ndarray, held: np.ndarray) -> dict[str, float]:
    """Scores of training and held-out cells apart, and labels of held-out cells by 15 nearest training cells."""
    from epivi.metrics import cluster_agreement, knn_accuracy

    found: dict[str, float] = {}
    for name, part in (("train", ~held), ("held_out", held)):
        agreement = cluster_agreement(values[part], labels[part])
        found |= {f"{name}_ari": agreement.ari, f"{name}_nmi": agreement.nmi}
    return found | {"held_out_knn": knn_accuracy(values[~held], labels[~held], values[held], labels[held])}


# ---------------------------------------------------------------------------------------------------------------------
# runs


def file_name(method: str, seed: int) -> str:
    """Return the name of the file of one run."""
    return f"{method.replace(' ', '_').replace(',', '')}-{seed}.json"


# of the run that is going on: when it began, and what it had taken when its first embedding was scored
_clock: dict[str, float] = {}


def mark_fitted() -> None:
    """Take the time and the peak of the memory of the run that is going on, once: the scores come after it."""
    if "began" in _clock and "seconds" not in _clock:
        _clock["seconds"] = time.perf_counter() - _clock["began"]
        _clock["peak_mib"] = peak() - _clock["before"]


def measured(run: Callable[[int], dict[str, float]], seed: int) -> dict[str, Any]:
    """Run a method and return its scores with seconds and peak memory up to its embedding, seed and versions."""
    _clock.clear()
    _clock["before"] = settle()
    has_peak = reset_peak()
    _clock["began"] = time.perf_counter()
    cpu = time.process_time()
    found: dict[str, Any] = run(seed)
    mark_fitted()
    found.setdefault("seconds", _clock["seconds"])
    if has_peak:
        found["peak_mib"] = _clock["peak_mib"]
    return found | {RECORD: record(seed) | {"processor_seconds": time.process_time() - cpu}}


def record(seed: int) -> dict[str, Any]:
    """Return seed, date and versions."""
    versions = {}
    for name in VERSIONS:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {"seed": seed, "date": f"{datetime.now(tz=UTC):%Y-%m-%d %H:%M} UTC", "versions": versions}


def run_table(methods: Mapping[str, Callable[[int], dict[str, float]]], name: str, chosen: argparse.Namespace) -> None:
    """Run the methods and seeds that have no result yet, print and write the table.

    A method whose library is not there is named as absent, with the reason, and tried again in the next run.

    Parameters
    ----------
    methods
        Functions of the seed by name.
    name
        Folder of the results of single runs, and name of the table.
    chosen
        Arguments of the command line: ``out``, ``seeds`` and ``methods``.
    """
    folder = chosen.out / name
    folder.mkdir(parents=True, exist_ok=True)
    load_libraries()
    absent: dict[str, str] = {}
    for method, run in methods.items():
        for seed in range(chosen.seeds):
            path = folder / file_name(method, seed)
            if path.is_file() or (chosen.methods and not re.search(chosen.methods, method)):
                continue
            try:
                write_json(path, measured(run, seed))
            except ImportError as error:
                absent[method] = str(error)
                break
            show(method, seed, json.loads(path.read_text()))
    write_json(folder / f"{ABSENT}.json", absent)
    text = markdown(table_of(read_runs(folder, methods, chosen.seeds)))
    text += "".join(f"\n{method}: absent, {reason}.\n" for method, reason in absent.items())
    (chosen.out / f"{name}.md").write_text(text)
    print(text, flush=True)


def load_libraries() -> None:
    """Import what methods and scores need, so that the first method is not charged for it."""
    import importlib

    for library in ("scanpy", "muon", "scvi", "scib_metrics", "epivi.models", "epivi.metrics", "epivi.pp"):
        importlib.import_module(library)


def write_json(path: Path, content: Any) -> None:
    """Write a file as a whole or not at all, so that a run that was stopped leaves no half of one."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, default=float))
    part.replace(path)


def show(method: str, seed: int, result: Mapping[str, Any]) -> None:
    """Print the numbers of a run."""
    numbers = {key: round(value, 3) for key, value in result.items() if isinstance(value, int | float)}
    print(method, seed, numbers, flush=True)


def read_runs(folder: Path, methods: Iterable[str], seeds: int) -> list[dict[str, Any]]:
    """Return the runs that are there, with ``method`` and ``seed``."""
    rows = []
    for method in methods:
        for seed in range(seeds):
            path = folder / file_name(method, seed)
            if path.is_file():
                rows.append({"method": method, "seed": seed, **json.loads(path.read_text())})
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# tables


def table_of(rows: list[dict[str, Any]]) -> pd.DataFrame:
    """Return mean, standard deviation over seeds, one row a method."""
    if not rows:
        return pd.DataFrame()
    numbers = pd.DataFrame(rows).drop(columns=["seed", RECORD], errors="ignore")
    return numbers.groupby("method", sort=False).agg(["mean", "std"])


def markdown(table: pd.DataFrame) -> str:
    """Mean and standard deviation over the seeds, one row a method."""
    if table.empty:
        return "No runs yet.\n"
    keys = list(dict.fromkeys(key for key, _ in table.columns))
    lines = ["| method | " + " | ".join(keys) + " |", "|---" * (len(keys) + 1) + "|"]
    for method, row in table.iterrows():
        cells = []
        for key in keys:
            mean, sd = row[(key, "mean")], row[(key, "std")]
            spread = "" if np.isnan(sd) or sd == 0 else f" ± {sd:.3f}"
            cells.append("" if np.isnan(mean) else f"{mean:.3f}{spread}")
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
