"""One table over all data sets: each model of epivi against the best rival of its kind, from the runs kept as JSON."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from _common import markdown_table
from _runs import ABSENT

if TYPE_CHECKING:
    from pathlib import Path

TRACKS = r"_tracks$"
CELLS = r"^(snareseq|scicar|pairedtag|preissl)(?!.*_tracks$)"
GENES = r"_rna(_only)?$"


@dataclass(frozen=True)
class Comparison:
    """A model, its rivals and the figures that decide.

    Parameters
    ----------
    model
        How the table calls it.
    ours, rivals
        Regular expressions of methods, as files name them: without commas.
    sets
        Regular expression of the data sets.
    metrics
        Figures; those with a minus are better when lower.
    """

    model: str
    ours: str
    rivals: str
    sets: str
    metrics: tuple[str, ...] = ("nmi", "ari", "scib_bio", "scib_total")


COMPARISONS = (
    Comparison("SAILER, accessibility alone", r"^SAILER (ATAC alone|encoder auto)", r"^(LSI|PEAKVI|POISSONVI)", CELLS),
    Comparison("EpiFoundation, peaks alone", r"^EpiFoundation peaks$", r"^(LSI|PEAKVI|POISSONVI)", CELLS),
    Comparison("SAILERX, multiome", r"^SAILERX$", r"^(MULTIVI|MOFA)", CELLS),
    Comparison("SAILERX, against its reference", r"^SAILERX$", r"^PCA of RNA", CELLS),
    Comparison("EpiFoundation, peaks and genes", r"^EpiFoundation peaks and genes", r"^(MULTIVI|MOFA)", CELLS),
    Comparison("ConvNetVAE, tracks", r"^ConvNetVAE K31", r"^(LSI|POISSONVI)", TRACKS),
    Comparison("FCVAE, tracks", r"^FCVAE", r"^(LSI|POISSONVI)", TRACKS),
    Comparison("Expresser, vectors of cells", r"^Expresser$", r"^(PCA|SCVI|Harmony)", GENES),
    Comparison("CANDI", r"^CANDI$", r"^(linear on marks|plain network)$", r"^candi$", ("pearson", "spearman", "-mse")),
    Comparison(
        "CANDI, prior",
        r"^CANDI prior$",
        r"^(average|linear on both|plain network prior)$",
        r"^candi$",
        ("pearson", "spearman", "-mse"),
    ),
    Comparison(
        "EpiFoundation, cell types",
        r"^EpiFoundation LSI start masked peaks",
        r"^(kNN|logistic regression) on LSI$",
        r"^annotation",
        ("accuracy", "f1_macro", "-ece"),
    ),
    Comparison(
        "EpiFoundation, expression",
        r"^EpiFoundation( not pretrained)?$",
        r"^(gene activity|ridge)",
        r"^expression",
        ("pearson", "spearman", "-mse"),
    ),
    Comparison(
        "Expresser, imputation",
        r"^Expresser$",
        r"^(gene mean|15 neighbours|scVI)",
        r"^imputation",
        ("within gene", "within cell", "-MAE"),
    ),
)


def read_all(out: Path) -> pd.DataFrame:
    """Return all runs under a folder of results: set, method, seed and every figure."""
    rows: list[dict[str, Any]] = []
    for folder in sorted(path for path in out.iterdir() if path.is_dir()):
        # of Expresser there is one folder a set: expresser, expresser_worm, ...
        readers = {"candi": _candi, "epifoundation": _epifoundation, "expresser": _expresser}
        reader = readers.get(folder.name.split("_")[0], _set)
        rows += reader(folder)
    return pd.DataFrame(rows)


def _entry(data: str, method: str, seed: int, found: dict[str, Any]) -> dict[str, Any]:
    numbers = {k: v for k, v in found.items() if isinstance(v, int | float) and k != "seed"}
    return {"set": data, "method": method.replace(",", ""), "seed": seed, **numbers}


def _set(folder: Path) -> list[dict[str, Any]]:
    """Read the runs of ``run_table``."""
    rows = []
    for path in sorted(folder.glob("*-*.json")):
        method, seed = path.stem.rsplit("-", 1)
        rows.append(_entry(folder.name, method.replace("_", " "), int(seed), json.loads(path.read_text())))
    return rows


def _candi(folder: Path) -> list[dict[str, Any]]:
    """Read the targets of all folds as one data set: means over cell types and marks."""
    parts = []
    for path in sorted(folder.glob("*-*-*.json")):
        method, _, seed = path.stem.rsplit("-", 2)
        parts.append(pd.DataFrame(json.loads(path.read_text())).assign(method=method.replace("_", " "), seed=int(seed)))
    if not parts:
        return []
    means = pd.concat(parts).drop(columns="mark").groupby(["method", "seed"], sort=False).mean()
    return [_entry("candi", method, seed, row) for (method, seed), row in means.to_dict("index").items()]


def _epifoundation(folder: Path) -> list[dict[str, Any]]:
    rows = []
    for path in sorted(folder.glob("*.*.json")):
        found = json.loads(path.read_text())
        if {"task", "method", "seed"} <= set(found):
            task = "annotation" if "accuracy" in found else "expression"
            rows.append(_entry(f"{task} {found['task']}", found["method"], found["seed"], found))
    return rows


def _expresser(folder: Path) -> list[dict[str, Any]]:
    found = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    name = f"imputation {folder.name.partition('_')[2] or 'blood'}"
    return [_entry(name, row["method"], row["seed"], row) for row in found if "method" in row]


def differences(runs: pd.DataFrame, chosen: Comparison) -> pd.DataFrame:
    """Return, for each metric and set, the model's mean less that of the best rival, and the spread of the two.

    The best rival is the one with the best mean over the seeds; the spread is the root of the summed variances over
    seeds of both, NaN where neither has two seeds.
    """
    rows = []
    for data, part in runs.groupby("set", sort=False):
        if not re.search(chosen.sets, data):
            continue
        for metric in chosen.metrics:
            name, sign = metric.removeprefix("-"), -1.0 if metric.startswith("-") else 1.0
            if name not in part:
                continue
            by_method = (sign * part.set_index("method")[name]).dropna().groupby(level=0, sort=False)
            means, sds = by_method.mean(), by_method.std()
            ours = [method for method in means.index if re.search(chosen.ours, method)]
            rivals = [method for method in means.index if re.search(chosen.rivals, method)]
            if not ours or not rivals:
                continue
            best, own = means[rivals].idxmax(), means[ours].idxmax() if len(ours) > 1 else ours[0]
            pair = sds[[best, own]]
            rows.append(
                {
                    "set": data,
                    "metric": metric,
                    "rival": best,
                    "ours": sign * means[own],
                    "theirs": sign * means[best],
                    "difference": means[own] - means[best],
                    "spread": np.nan if pair.isna().all() else float(np.sqrt(np.square(pair).sum())),
                }
            )
    return pd.DataFrame(rows)


NOTE = """
Differences are means over data sets of the model's mean over seeds less that of the best rival there; of errors (lower
is better) with the sign turned, so that positive is better everywhere. Spread: over data sets, the root of the mean of
the summed variances over seeds; empty with one seed. scANVI is told labels and is no rival; SAILERX is compared with
its reference in a row of its own.
"""


def summary(out: Path) -> str:
    """Return the summary in Markdown, with the table of all runs after it."""
    runs = read_all(out)
    if runs.empty:
        return "No runs yet.\n"
    header = ["model", "figure", "sets", "model - best rival", "spread", "lowest", "below by more than the spread"]
    lines, details = [], []
    for chosen in COMPARISONS:
        found = differences(runs, chosen)
        if found.empty:
            lines.append([chosen.model, "", "0", "no runs of it and a rival on the same set", "", "", ""])
            continue
        for metric, part in found.groupby("metric", sort=False):
            lines.append([chosen.model, _figure(metric), str(len(part)), *_judged(part)])
        details += [_detail(chosen.model, row) for row in found.to_dict("records")]
    text = [
        "## Each model against the best rival of its kind\n",
        markdown_table(header, lines),
        NOTE,
        "\n### By data set\n",
        markdown_table(["model", "data", "figure", "model's", "best rival", "rival's", "difference"], details),
        "\n## All runs\n",
        all_runs(runs),
        absent(out),
    ]
    return "\n".join(text) + "\n"


def _figure(metric: str) -> str:
    return f"{metric[1:]} (lower is better)" if metric.startswith("-") else metric


def _judged(part: pd.DataFrame) -> list[str]:
    mean = float(part["difference"].mean())
    spread = float(np.sqrt(np.square(part["spread"]).mean())) if part["spread"].notna().any() else float("nan")
    lowest = part.loc[part["difference"].idxmin()]
    is_below = mean < 0 if np.isnan(spread) else mean < -spread
    shown = "" if np.isnan(spread) else f"{spread:.3f}"
    return [f"{mean:+.3f}", shown, f"{lowest['difference']:+.3f} ({lowest['set']})", "**yes**" if is_below else "no"]


def _detail(model: str, row: dict[str, Any]) -> list[str]:
    numbers = (f"{row['ours']:.3f}", row["rival"], f"{row['theirs']:.3f}", f"{row['difference']:+.3f}")
    return [model, row["set"], _figure(row["metric"]), *numbers]


SHOWN = ("seconds", "peak_mib", "nmi", "ari", "scib_bio", "scib_batch", "scib_total", "scib_convnet")
SHOWN += ("information_depth", "information_batch", "accuracy", "pearson", "spearman", "mse", "MAE", "within gene")


def all_runs(runs: pd.DataFrame) -> str:
    """Return mean and standard deviation over seeds of every method on every set."""
    keys = [key for key in SHOWN if key in runs]
    rows = []
    for (data, method), part in runs.groupby(["set", "method"], sort=False):
        cells = []
        for key in keys:
            values = part[key].dropna()
            digits = 0 if key in ("seconds", "peak_mib") else 3
            sd = f" ± {values.std():.{digits}f}" if len(values) > 1 else ""
            cells.append(f"{values.mean():.{digits}f}{sd}" if len(values) else "")
        rows.append([data, method, str(part["seed"].nunique()), *cells])
    return markdown_table(["data", "method", "seeds", *keys], rows)


def absent(out: Path) -> str:
    """Return which methods could not be run, and why."""
    lines = [
        f"- {path.parent.name}, {method}: absent, {reason}"
        for path in sorted(out.glob(f"*/{ABSENT}.json"))
        for method, reason in json.loads(path.read_text()).items()
    ]
    return "\n" + "\n".join(lines) if lines else ""
