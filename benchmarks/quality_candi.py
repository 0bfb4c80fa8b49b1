"""CANDI on real histone marks: four cell types, five marks; one cell type is left out, one mark of it at a time hidden.

    uv run python benchmarks/quality.py candi --seeds 3

The test bins are those of chromosomes 16, 20, 21 and 22. Baselines: the average of the other cell types, least squares
on the other four marks, and on marks and average; a plain dilated convolutional network with as many parameters as
CANDI, trained for as many seconds of processor time. "prior": with the average as an input. Each method, cell type and
seed is run once and kept as JSON under ``results/quality/candi``; delete a file to run it again. The data are found
through EPIVI_TEST_DATA (default ../shared/data).
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from _common import QUIET, quiet
from _pilot import CELLS, MARKS, Fold, folder, read_pilot, scores, train_plain
from _runs import markdown
from scipy.special import ndtri

LINEAR = ("average", "linear on marks", "linear on both")
NETWORK = {"n_features": 4, "pre_norm": True, "skip": True, "mixup": 1.0}
# the prior is itself made of the biosamples that swapping would draw from
SWAP_RATE = {False: 0.3, True: 0.0}
EPOCHS, LEARNING_RATE, WINDOW = 5, 2e-3, 400
LEVEL = 0.9
PARTS = ("mean", "std")
Rows = list[dict[str, Any]]


def candi(
    adata: Any, fold: Fold, seed: int, *, use_prior: bool, size: str = "tutorial", epochs: int = EPOCHS, **options: Any
) -> Rows:
    """Train CANDI without the cell type and score it there."""
    import epivi

    data = adata.copy()
    data.obs["split"] = ["test" if cell == fold.cell else "train" for cell in data.obs_names]
    tests = [str(chrom) for chrom in data.uns["test_chroms"]]
    epivi.CANDI.setup_anndata(data, split_key="split", validation_chroms=[], test_chroms=tests)
    model = epivi.CANDI(
        data,
        size=size,
        n_bins=WINDOW,
        locus_prior=use_prior,
        seed=seed,
        **NETWORK | {"swap_rate": SWAP_RATE[use_prior]} | options,
    )
    start = time.process_time()
    model.train(max_epochs=epochs, plan_kwargs={"lr": LEARNING_RATE}, accelerator="cpu", **QUIET)
    spent = time.process_time() - start
    table = model.evaluate(tests, biosamples=[fold.cell], levels=[LEVEL])
    n_parameters = sum(p.numel() for p in model.module.parameters())
    names = {"assay": "mark", "mse": "mse", "pearson": "pearson", "spearman": "spearman", "coverage_0.9": "coverage"}
    found = table.rename(columns=names)[list(names.values())].to_dict("records")
    return [row | {"seconds": spent, "parameters": n_parameters} for row in found]


def plain(fold: Fold, seed: int, *, use_prior: bool, like: Rows) -> Rows:
    """Train the plain network as long as CANDI was and score it."""
    found = train_plain(
        fold,
        n_parameters=int(like[0]["parameters"]),
        seconds=float(like[0]["seconds"]),
        window=WINDOW,
        use_prior=use_prior,
        seed=seed,
    )
    half = ndtri(0.5 + LEVEL / 2)
    return [
        {"mark": mark, **scores(y, mean), "coverage": float(np.mean(np.abs(y - mean) <= half * sd))}
        | {"seconds": like[0]["seconds"], "parameters": found["parameters"]}
        for mark, y, mean, sd in zip(MARKS, fold.test, found["mean"], found["sd"], strict=True)
    ]


def main(arguments: list[str] | None = None) -> int:
    """Run what is missing, print and write the table; ``arguments`` are those of the command line if ``None``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", help="only methods whose name this regular expression finds")
    parser.add_argument("--cells", nargs="+", default=list(CELLS), choices=list(CELLS))
    parser.add_argument("--out", type=Path, default=Path("results/quality"))
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--quick", action="store_true", help="one cell type and one epoch: checks the script")
    chosen = parser.parse_args(arguments)
    if chosen.quick:
        chosen.cells, chosen.epochs = list(CELLS[:1]), 1
    quiet(1)
    if not folder().is_dir():
        print(f"test data not found: set EPIVI_TEST_DATA (missing {folder()})", file=sys.stderr)
        return 2
    adata = read_pilot()
    place = chosen.out / "candi"
    place.mkdir(parents=True, exist_ok=True)
    rows: Rows = []
    for seed in range(chosen.seeds):
        for cell in chosen.cells:
            rows += run_fold(adata, Fold(adata, cell), seed, place, chosen)
    write(pd.DataFrame(rows), chosen.out)
    return 0


def run_fold(adata: Any, fold: Fold, seed: int, place: Path, chosen: argparse.Namespace) -> Rows:
    """Return the scores of all methods for one cell type and seed, those that are not kept computed anew."""

    def cached(name: str, compute: Any) -> Rows:
        path = place / f"{name.replace(' ', '_').replace(',', '')}-{fold.cell}-{seed}.json"
        if not path.is_file():
            if chosen.methods and not re.search(chosen.methods, name):
                return []
            path.write_text(json.dumps(compute()))
        found = json.loads(path.read_text())
        means = {key: round(float(np.mean([row[key] for row in found])), 4) for key in ("mse", "pearson")}
        print(name, fold.cell, seed, means, flush=True)
        return [{"method": name, "cell": fold.cell, "seed": seed, **row} for row in found]

    rows: Rows = []
    if seed == 0:
        linear: dict[str, np.ndarray] = {}
        for name in LINEAR:

            def score(name: str = name) -> Rows:
                linear.update(linear or fold.linear())
                pairs = zip(MARKS, fold.test, linear[name], strict=True)
                return [{"mark": mark, **scores(y, mean)} for mark, y, mean in pairs]

            rows += cached(name, score)
    for label, use_prior in (("", False), (", prior", True)):
        ours = cached(f"CANDI{label}", lambda p=use_prior: candi(adata, fold, seed, use_prior=p, epochs=chosen.epochs))
        rows += ours
        if ours:
            like = ours
            rows += cached(
                f"plain network{label}", lambda p=use_prior, like=like: plain(fold, seed, use_prior=p, like=like)
            )
    return rows


def write(rows: pd.DataFrame, out: Path) -> None:
    """Write means over all targets, with the spread over seeds, and coverage by mark."""
    numbers = rows.drop(columns=["cell", "mark"])
    by_seed = numbers.groupby(["method", "seed"], sort=False).mean().reset_index("seed", drop=True)
    laws = rows[rows["method"].str.startswith(("CANDI", "plain"))]
    by_mark = laws.pivot_table(index="method", columns="mark", values="coverage", sort=False)
    text = markdown(by_seed.groupby("method", sort=False).agg(["mean", "std"]))
    text += "\n" + markdown(_with_spread(by_mark))
    (out / "candi.md").write_text(text)
    print(text)


def _with_spread(table: pd.DataFrame) -> pd.DataFrame:
    """Return a table in the form that ``markdown`` takes, without spreads."""
    columns = {(key, part): table[key] if part == "mean" else 0.0 * table[key] for key in table for part in PARTS}
    return pd.concat(columns, axis=1)


if __name__ == "__main__":
    raise SystemExit(main())
