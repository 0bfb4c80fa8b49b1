"""Shared by the benchmarks: arguments, quiet training, scores of an embedding, claims, results as JSON and Markdown."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import logging
import math
import os
import platform
import time
import warnings
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from anndata import AnnData

Scores = dict[str, float]
Settings = dict[str, list[dict[str, Scores]]]  # setting -> one entry a seed -> method -> metric -> value

PACKAGES = ("epivi", "torch", "scvi-tools", "lightning", "anndata", "scanpy", "scikit-learn", "leidenalg", "numpy")
QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
EXIT_FAILED = 1

RAW, LSI, LSI_REST = "raw data", "LSI", "LSI without its first component"
WITHOUT, CONDITIONAL, SAILER = "VAE without covariates", "conditional VAE", "SAILER"
DEPTH_NOTES = (
    "Depth correlation: absolute Spearman correlation of imputed row sums with depth within types, mean over types.",
    "Spread of row sums: their coefficient of variation within types, over that of depth.",
)
FORMS: dict[str, dict[str, Any]] = {
    WITHOUT: {"use_covariates": False, "invariance_weight": 0.0, "open_weight": 1.0},
    CONDITIONAL: {"invariance_weight": 0.0, "open_weight": 1.0},
    SAILER: {},
}


def parse(description: str | None, *, seeds: int = 3, **extra: dict[str, Any]) -> argparse.Namespace:
    """Read the command line and fix the number of threads before anything is computed.

    Parameters
    ----------
    description
        Docstring of the script.
    seeds
        Default of ``--seeds``.
    extra
        Further options: name (without dashes) to the arguments of ``add_argument``.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=seeds, help="number of seeds, counted from 0")
    parser.add_argument("--out", type=Path, default=Path("results"), help="folder of the results")
    parser.add_argument("--quick", action="store_true", help="a small form that checks the script, not the claims")
    parser.add_argument("--threads", type=int, default=int(os.environ.get("OMP_NUM_THREADS", "1")))
    for name, options in extra.items():
        parser.add_argument(f"--{name.replace('_', '-')}", **options)
    chosen = parser.parse_args()
    if chosen.seeds < 1 or chosen.threads < 1:
        parser.error("--seeds and --threads must be at least 1")
    quiet(chosen.threads)
    return chosen


def quiet(threads: int) -> None:
    """Set the threads of torch, silence warnings and the notices of the trainer."""
    warnings.filterwarnings("ignore")
    import torch

    torch.set_num_threads(threads)
    for name in ("epivi", "lightning", "lightning.pytorch", "lightning.pytorch.utilities.rank_zero", "scvi"):
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("KMP_WARNINGS", "0")


def say(text: str) -> None:
    """Print a line of progress at once."""
    print(f"[{datetime.now(tz=UTC):%H:%M:%S}] {text}", flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# methods


def lsi(adata: AnnData, n_comps: int = 10, *, drop_first: bool = False, seed: int = 0) -> np.ndarray:
    """Return the LSI embedding, shape (n, n_comps); the data stay as they are."""
    import epivi

    part = epivi.pp.lsi(adata, n_comps=n_comps, drop_first=drop_first, seed=seed, copy=True)
    return np.asarray(part.obsm["X_lsi"])


def fit(model: Any, epochs: int, **train: Any) -> Any:
    """Train a model for a fixed number of epochs, without early stopping, and return it.

    After ten epochs of warm-up the KL weight rises over half of what is left, then stays at one.
    """
    fixed = {"early_stopping": False, "accelerator": "cpu", "devices": 1}
    model.train(max_epochs=epochs, plan_kwargs={"n_epochs_kl_cycle": epochs}, **QUIET | fixed | train)
    return model


# ---------------------------------------------------------------------------------------------------------------------
# scores


def clusters(values: np.ndarray, labels: np.ndarray, seed: int) -> Scores:
    """Return the ARI of Leiden clusters and of a Gaussian mixture, both at the number of labels."""
    from sklearn.metrics import adjusted_rand_score
    from sklearn.mixture import GaussianMixture

    from epivi.metrics import cluster_agreement

    agreement = cluster_agreement(values, labels, n_starts=3, seed=seed)
    mixture = GaussianMixture(len(np.unique(labels)), n_init=3, reg_covar=1e-5, random_state=seed)
    assigned = mixture.fit_predict(np.asarray(values, dtype=np.float64))
    return {
        "ARI": agreement.ari,
        "ARI (mixture)": float(adjusted_rand_score(labels, assigned)),
        "NMI": agreement.nmi,
        "clusters": float(agreement.n_clusters),
    }


def embedding_scores(values: np.ndarray, adata: AnnData, seed: int, *, with_batch: bool = False) -> Scores:
    """Return information about depth (and batch), agreement with the types, and the purity of rare types."""
    from epivi.metrics import confounder_information, label_purity

    labels = adata.obs["cell_type"].astype(str).to_numpy()
    depth = adata.obs["depth"].to_numpy(dtype=float)
    result = {"I(z,depth)": confounder_information(values, depth, discrete=False, seed=seed).mean}
    if with_batch:
        batch = adata.obs["batch"].astype(str).to_numpy()
        result["I(z,batch)"] = confounder_information(values, batch, discrete=True, seed=seed).mean
    result |= clusters(values, labels, seed)
    purity = label_purity(values, labels, seed=seed)["purity"]
    rare = adata.obs.loc[adata.obs["rare"], "cell_type"].astype(str).unique()
    return result | {f"purity {name}": float(purity[name]) for name in sorted(rare)}


def raw_dice(adata: AnnData) -> Scores:
    """Return both Dice coefficients of the raw data on the foreground."""
    return dice_scores((adata.X > 0).astype(np.float32), adata, binarize=0.0)


def dice_scores(imputed: Any, adata: AnnData, *, binarize: str | float = "quantile") -> Scores:
    """Return the Dice coefficient against the bulk of the type on the foreground, and its type-specific form."""
    from epivi.metrics import dice

    labels = adata.obs["cell_type"].astype(str).to_numpy()
    regions = adata.var["foreground"].to_numpy()
    forms = {"Dice": False, "Dice (specific)": True}
    return {
        name: dice(imputed, adata.varm["bulk"].T, labels, binarize=binarize, regions=regions, specific=specific).score
        for name, specific in forms.items()
    }


def depth_correlation(imputed: np.ndarray, adata: AnnData) -> Scores:
    """Return the absolute Spearman correlation of imputed row sums with depth within types.

    Mean over types, weighted by size; types of fewer than 30 cells are left out. A rank correlation does not tell how
    far row sums vary: "spread of row sums" is their coefficient of variation within types, over that of depth.
    """
    from scipy.stats import spearmanr

    sums, depth = np.asarray(imputed.sum(axis=1)).ravel(), adata.obs["depth"].to_numpy(dtype=float)
    groups = [rows for rows in adata.obs.groupby("cell_type", observed=True).indices.values() if len(rows) >= 30]
    values = [abs(float(spearmanr(sums[rows], depth[rows]).statistic)) for rows in groups]
    spreads = [(sums[rows].std() / sums[rows].mean()) / (depth[rows].std() / depth[rows].mean()) for rows in groups]
    sizes = [len(rows) for rows in groups]
    return {
        "depth correlation": float(np.average(values, weights=sizes)),
        "spread of row sums": float(np.average(spreads, weights=sizes)),
    }


def smoothed(adata: AnnData, values: np.ndarray, k: int = 15) -> Any:
    """Return the mean raw accessibility of the k nearest neighbours of each cell, the cell itself left out, as CSR."""
    from scipy.sparse import csr_matrix
    from sklearn.neighbors import NearestNeighbors

    index = NearestNeighbors(n_neighbors=k + 1).fit(values).kneighbors(return_distance=False)[:, 1:]
    n = len(values)
    weights = csr_matrix((np.full(n * k, 1.0 / k), index.ravel(), np.arange(0, n * k + 1, k)), shape=(n, n))
    return csr_matrix(weights @ (adata.X > 0).astype(np.float64))


# ---------------------------------------------------------------------------------------------------------------------
# claims and results


@dataclass(frozen=True)
class Claim:
    """A claim about one figure: it holds if the mean over the seeds is within the bound.

    Parameters
    ----------
    text
        What is claimed.
    values
        The figure, one entry a seed.
    bound
        The limit.
    at_most
        Whether the bound is an upper one.
    note
        What else a reader needs.
    """

    text: str
    values: tuple[float, ...]
    bound: float
    at_most: bool
    note: str = ""

    def _within(self, value: float) -> bool:
        return math.isfinite(value) and (value <= self.bound if self.at_most else value >= self.bound)

    @property
    def holds(self) -> bool:
        """Whether the mean over the seeds is within the bound."""
        return self._within(float(np.mean(self.values)))

    @property
    def n_hold(self) -> int:
        """Number of seeds within the bound."""
        return sum(self._within(value) for value in self.values)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "claim": self.text,
            "bound": ("<= " if self.at_most else ">= ") + f"{self.bound:g}",
            "values": list(self.values),
            "mean": float(np.mean(self.values)),
            "holds": self.holds,
            "seeds_that_hold": self.n_hold,
            "note": self.note,
        }


def at_most(text: str, values: Sequence[float], bound: float, note: str = "") -> Claim:
    """Return a claim with an upper bound."""
    return Claim(text, tuple(float(value) for value in values), bound, at_most=True, note=note)


def at_least(text: str, values: Sequence[float], bound: float, note: str = "") -> Claim:
    """Return a claim with a lower bound."""
    return Claim(text, tuple(float(value) for value in values), bound, at_most=False, note=note)


def metric(runs: Sequence[Mapping[str, Scores]], method: str, name: str) -> np.ndarray:
    """Return a metric of a method, one entry a seed."""
    return np.array([run[method][name] for run in runs])


def run_seeds(setting: str, seeds: int, run: Callable[[int], dict[str, Scores]]) -> list[dict[str, Scores]]:
    """Run one setting for the seeds 0, 1, ... and say how long each took."""
    results = []
    for seed in range(seeds):
        wall, cpu = time.perf_counter(), time.process_time()
        results.append(run(seed))
        taken = f"{time.perf_counter() - wall:.0f} s, {time.process_time() - cpu:.0f} s of processor time"
        say(f"{setting}, seed {seed}: {taken}")
    return results


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Return mean ± standard deviation over the seeds, without the spread where there is one seed.

    Examples
    --------
    >>> spread([1.0, 2.0, 3.0])
    '2.000 ± 1.000'
    """
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return ""
    sd = f" ± {np.std(finite, ddof=1):.{digits}f}" if len(finite) > 1 else ""
    return f"{np.mean(finite):.{digits}f}{sd}"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def settings_table(runs: Sequence[Mapping[str, Scores]]) -> str:
    """Return the table of one setting: a row a method, mean ± standard deviation over the seeds."""
    methods = list(dict.fromkeys(method for run in runs for method in run))
    metrics = list(dict.fromkeys(name for run in runs for scores in run.values() for name in scores))
    rows = [
        [method, *(spread([run[method].get(name, math.nan) for run in runs if method in run]) for name in metrics)]
        for method in methods
    ]
    return markdown_table(["method", *metrics], rows)


def claims_table(claims: Sequence[Claim]) -> str:
    """Return the table of claims with their bounds and figures."""
    rows = []
    for claim in claims:
        sign = "≤" if claim.at_most else "≥"
        seeds = f"{claim.n_hold} of {len(claim.values)}"
        verdict = "yes" if claim.holds else "**no**"
        text = claim.text + (f" ({claim.note})" if claim.note else "")
        rows.append([text, f"{sign} {claim.bound:g}", spread(claim.values), seeds, verdict])
    return markdown_table(["claim", "bound", "measured", "seeds", "holds"], rows)


def environment(threads: int) -> dict[str, Any]:
    """Return date, machine and package versions."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "date": f"{datetime.now(tz=UTC):%Y-%m-%d %H:%M} UTC",
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": threads,
        "packages": versions,
    }


def write(folder: Path, name: str, text: str, result: Mapping[str, Any], *, threads: int) -> None:
    """Write ``name.json`` and ``name.md`` and print the Markdown."""
    around = environment(threads)
    versions = ", ".join(f"{package} {version}" for package, version in around["packages"].items())
    footer = f"\n{around['date']}, Python {around['python']}, {threads} thread(s). {versions}.\n"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.md").write_text(text + footer, encoding="utf-8")
    document = json.dumps({"benchmark": name, "environment": around, **result}, indent=1, default=float)
    (folder / f"{name}.json").write_text(document + "\n", encoding="utf-8")
    print(text + footer, flush=True)


def finish(
    name: str,
    title: str,
    settings: Settings,
    claims: Sequence[Claim],
    chosen: argparse.Namespace,
    *,
    notes: Sequence[str] = (),
) -> int:
    """Write the results of a script of claims and return its exit code: 0 if all hold, else 1."""
    failed = [claim.text for claim in claims if not claim.holds]
    seconds = time.process_time()
    parts = [f"# {title}\n"]
    if chosen.quick:
        parts.append("*Quick form: it checks the script; its figures are no evidence.*\n")
    parts += [claims_table(claims), ""]
    for setting, runs in settings.items():
        parts += [f"## {setting}\n", settings_table(runs), ""]
    parts += [f"- {note}" for note in notes]
    parts.append(f"\nMean ± standard deviation over {chosen.seeds} seed(s); {seconds:.0f} s of processor time.")
    result = {
        "quick": chosen.quick,
        "seeds": list(range(chosen.seeds)),
        "processor_seconds": seconds,
        "claims": [claim.to_dict() for claim in claims],
        "settings": settings,
        "notes": list(notes),
    }
    write(chosen.out, name, "\n".join(parts), result, threads=chosen.threads)
    print(f"{len(claims) - len(failed)} of {len(claims)} claims hold.", flush=True)
    return EXIT_FAILED if failed else 0


def run_one_setting(
    name: str,
    title: str,
    setting: str,
    run: Callable[..., dict[str, Scores]],
    claims: Callable[[list[dict[str, Scores]]], Sequence[Claim]],
    *,
    description: str | None,
    seeds: int = 5,
) -> int:
    """Run a script of claims about one setting; ``run`` takes the seed and ``quick``. Returns the exit code."""
    chosen = parse(description, seeds=seeds)
    runs = run_seeds(setting, chosen.seeds, lambda seed: run(seed, quick=chosen.quick))
    return finish(name, title, {setting: runs}, claims(runs), chosen)
