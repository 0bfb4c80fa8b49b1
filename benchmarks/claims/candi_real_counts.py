"""CANDI on real counts: K562 histone marks and DNase, and ATAC of yeast predicted from DNA.

    OMP_NUM_THREADS=1 uv run python benchmarks/claims/candi_real_counts.py

K562: reads per 200 bp of eight assays and the input control in three regions. There is one cell type, so nothing is
said about new cell types: each region is held out in turn and its tracks are predicted by a model of the other two
regions of the same cell type, each track from the others. "Poisson": the Poisson law with the means of CANDI, with
these means scaled to the total of the held-out track (which favours it), and a Poisson regression on log1p of the other
tracks, fitted to the same two regions. "NLL": nats a bin, mean over tracks and regions. Thinned: a quarter of the reads
of every track, drawn at random; the model is asked for the full depth. Depth is the total of a track over the three
regions, as the depth of the experiments is not known. The thinned reads are part of the full counts, so both are also
compared with the reads that were left out. Correlations are within a region (mean over regions) or over the three
regions joined, each predicted by the model that did not see it; one of them (chr10) is all but empty.

Yeast: Tn5 cuts (both ends of each fragment) of one ATAC experiment per bin, the whole genome without chrM and without
the ribosomal DNA (chrXII:450,000-492,000). The only assay is hidden, in all training samples and in the tests, so that
the DNA is all there is. "DNA off": the same network with N for every base, which can learn but one law for all bins and
is trained for fewer epochs. Baselines: the best such law by maximum likelihood; least squares on the GC content at four
scales, and on counts of 4-mers with their reverse complements. Scores are correlations of log1p
on held-out chromosomes; "inner": without 20 kb at both ends of chromosomes, whose sequence other chromosomes share.

The data are found through EPIVI_TEST_DATA (default ../shared/data).
"""

from __future__ import annotations

import gzip
import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pandas as pd
from _common import QUIET, Claim, Scores, at_least, at_most, finish, metric, parse, run_seeds

NETWORK = {"n_features": 4, "pre_norm": True, "skip": True}
TRAIN = {"accelerator": "cpu", **QUIET}
K562, YEAST = "K562, each region held out in turn", "yeast ATAC from DNA, chromosomes held out"
CANDI, POISSON, SCALED, REGRESSION = "CANDI", "Poisson, same means", "Poisson, means scaled", "Poisson regression"
THINNED, SMOOTHED, FULL = "a quarter of the reads", "a quarter, smoothed", "all reads"
Tracks = dict[tuple[str, str], np.ndarray]  # of one region, by method and track
DNA_ON, DNA_OFF, ONE_LAW, GC, KMERS = "CANDI, DNA on", "CANDI, DNA off", "one law", "GC content", "4-mers"
K562_EPOCHS, K562_RATE, SIGMA_BINS = 150, 3e-3, 1.5
KEPT = 0.25

YEAST_TESTS = ("chrV", "chrX", "chrXVI")
RIBOSOMAL = ("chrXII", 450_000, 492_000)
BIN_BP, END_BP = 50, 20_000
SHAPE = {"n_bins": 160, "n_stages": 2, "expansion": 8, "n_heads": 4, "n_layers": 1}
DNA_NETWORK = {**SHAPE, "n_features": 12, "pre_norm": True, "hide_all_rate": 1.0, "thinning": (1,)}
YEAST_EPOCHS, YEAST_RATE = {DNA_ON: 10, DNA_OFF: 4}, 3e-3


def folder() -> Path:
    """Return the folder of the bulk data."""
    return Path(os.environ.get("EPIVI_TEST_DATA", "../shared/data")) / "bulk"


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Return the correlation, 0 where one of the two is constant."""
    a, b = np.ravel(a), np.ravel(b)
    return float(np.corrcoef(a, b)[0, 1]) if a.std() > 0 and b.std() > 0 else 0.0


# ---------------------------------------------------------------------------------------------------------------------
# K562


def read_k562() -> Any:
    """Return one biosample with the counts of nine tracks along three regions, each a chromosome."""
    import anndata

    place = folder() / "stan_counts"
    stored = np.load(place / "stan_counts_200bp_E123.npz")
    regions = json.loads((place / "regions.json").read_text())
    number = {name: int(found["chrom"][3:]) for name, found in regions.items()}
    tables, parts = [], []
    for name in sorted(regions, key=number.__getitem__):
        found = regions[name]
        start = found["start_hg19"] + found["binsize"] * np.arange(found["n_bins"])
        tables.append(pd.DataFrame({"chrom": found["chrom"], "start": start, "end": start + found["binsize"]}))
        parts.append(stored[f"E123|{name}"])
    counts_1al = np.concatenate(parts).T[None]
    return anndata.AnnData(
        np.ones(counts_1al.shape[:2], dtype=np.float32),
        obs=pd.DataFrame(index=["K562"]),
        var=pd.DataFrame(index=stored["assays"].astype(str)),
        obsm={
            "counts": np.ascontiguousarray(counts_1al),
            "availability": np.ones(counts_1al.shape[:2], dtype=bool),
            "depth": counts_1al.sum(axis=2, dtype=np.float32),
        },
        uns={"bins": pd.concat(tables, ignore_index=True)},
    )


def thinned(adata: Any, seed: int) -> Any:
    """Return the data with a quarter of the reads of each track."""
    part = adata.copy()
    full = np.asarray(adata.obsm["counts"])
    part.obsm["counts"] = np.random.default_rng(seed).binomial(full, KEPT).astype(full.dtype)
    part.obsm["depth"] = adata.obsm["depth"] * np.float32(KEPT)
    return part


def run_k562(seed: int, *, quick: bool) -> dict[str, Scores]:
    """Return the scores of all methods, mean over tracks and regions."""
    import epivi

    adata = read_k562()
    rows: list[tuple[str, Scores]] = []
    parts: list[Tracks] = []
    for region in adata.uns["bins"]["chrom"].unique():
        data = read_k562()
        epivi.CANDI.setup_anndata(data, validation_chroms=[], test_chroms=[str(region)])
        model = epivi.CANDI(data, size="test", seed=seed, **NETWORK)
        options = {"batch_size": 8, "plan_kwargs": {"lr": K562_RATE}}
        model.train(max_epochs=3 if quick else K562_EPOCHS, **options, **TRAIN)
        rows += left_out(model, data, str(region))
        parts.append(denoised(model, data, str(region), seed))
    for part in parts:
        rows += against_full(part, "")
    rows += against_full({key: np.concatenate([part[key] for part in parts]) for key in parts[0]}, ", joined")
    table = pd.DataFrame([{"method": method, **scores} for method, scores in rows])
    means = table.groupby("method", sort=False).mean()
    return {str(method): {str(k): float(v) for k, v in row.dropna().items()} for method, row in means.iterrows()}


def left_out(model: Any, adata: Any, region: str) -> list[tuple[str, Scores]]:
    """Return the scores of each track predicted from the others."""
    from scipy.stats import poisson
    from sklearn.linear_model import PoissonRegressor

    on = adata.uns["bins"]["chrom"].to_numpy(str) == region
    counts_al = np.asarray(adata.obsm["counts"])[0].astype(float)
    table = model.evaluate(region, levels=[0.9]).set_index("assay")
    found = model.impute(region, leave_one_out=True, interval=None)
    rows = []
    for key, assay in zip(found.obs_names, found.obs["assay"], strict=True):
        a = adata.var_names.get_loc(assay)
        y, mean = counts_al[a, on], np.asarray(found[key].layers["mean"], dtype=float).ravel()
        others = np.log1p(np.delete(counts_al, a, axis=0)).T
        regression = PoissonRegressor(alpha=1e-3, max_iter=1000).fit(others[~on], counts_al[a, ~on])
        means = {POISSON: mean, SCALED: mean * y.sum() / mean.sum(), REGRESSION: regression.predict(others[on])}
        line = table.loc[assay]
        mine = {"NLL": float(line["nll"]), "coverage": float(line["coverage_0.9"])}
        mine |= {"PIT distance": float(line["pit_distance"]), "r": correlation(np.log1p(mean), np.log1p(y))}
        nll = {name: float(-poisson.logpmf(y, m).mean()) for name, m in means.items()}
        mine["tracks below Poisson"] = float(mine["NLL"] < min(nll[POISSON], nll[SCALED]))
        rows.append((CANDI, mine))
        rows += [
            (name, {"NLL": nll[name], "coverage": poisson_coverage(y, m), "r": correlation(np.log1p(m), np.log1p(y))})
            for name, m in means.items()
        ]
    return rows


def poisson_coverage(y: np.ndarray, mean: np.ndarray, level: float = 0.9) -> float:
    """Return the coverage of central intervals of Poisson laws, by the randomised PIT."""
    from scipy.stats import poisson

    from epivi.metrics.calibration import coverage, randomised_pit

    pit = randomised_pit(y, poisson.cdf(y - 1, mean), poisson.cdf(y, mean), seed=np.random.default_rng(0))
    return float(coverage(pit, [level])[0])


def denoised(model: Any, adata: Any, region: str, seed: int) -> Tracks:
    """Return full counts, a quarter of them, these smoothed and these after the model, by method and track."""
    from scipy.ndimage import gaussian_filter1d

    part = thinned(adata, seed)
    on = adata.uns["bins"]["chrom"].to_numpy(str) == region
    asked = dict(zip(adata.var_names.astype(str), map(float, adata.obsm["depth"][0]), strict=True))
    found = model.denoise(region, covariates={"depth": asked}, interval=None, adata=part)
    tracks: Tracks = {}
    for key, assay in zip(found.obs_names, found.obs["assay"].astype(str), strict=True):
        a = adata.var_names.get_loc(assay)
        x, y = (np.asarray(data.obsm["counts"])[0, a, on].astype(float) for data in (part, adata))
        mean = np.asarray(found[key].layers["mean"], dtype=float).ravel()
        tracks |= {(CANDI, assay): mean, (THINNED, assay): x, (FULL, assay): y}
        tracks[SMOOTHED, assay] = gaussian_filter1d(x, SIGMA_BINS)
    return tracks


def against_full(tracks: Tracks, suffix: str) -> list[tuple[str, Scores]]:
    """Return correlations of log1p with the full counts and with the reads that were left out."""
    rows = []
    for (method, assay), values in tracks.items():
        if method != FULL:
            y = tracks[FULL, assay]
            rest = correlation(np.log1p(values), np.log1p(y - tracks[THINNED, assay]))
            full = correlation(np.log1p(values), np.log1p(y))
            rows.append((method, {f"r, full{suffix}": full, f"r, left out{suffix}": rest}))
    return rows


# ---------------------------------------------------------------------------------------------------------------------
# yeast


def read_yeast() -> Any:
    """Return one biosample with the Tn5 cuts of one assay along the genome, and the DNA."""
    import anndata

    from epivi.pp.bulk import read_dna

    fasta = folder() / "yeast" / "sacCer3.fa.gz"
    sizes = {name: size for name, size in sequence_sizes(fasta).items() if name != "chrM"}
    codes = read_dna(fasta, sizes, BIN_BP)
    fragments = pd.read_csv(folder() / "yeast" / "yeast_500k_SRR1822137.bedpe.gz", sep="\t", header=None)
    tables, counts, dna = [], [], []
    for chrom, code in codes.items():
        n_bins = code.size // BIN_BP
        own = fragments[fragments[0] == chrom]
        cuts = np.concatenate([own[1].to_numpy(), own[2].to_numpy() - 1]) // BIN_BP
        start = BIN_BP * np.arange(n_bins)
        keep = (chrom != RIBOSOMAL[0]) | (start + BIN_BP <= RIBOSOMAL[1]) | (start >= RIBOSOMAL[2])
        counts.append(np.bincount(cuts[cuts < n_bins], minlength=n_bins)[keep])
        dna.append(code.reshape(n_bins, BIN_BP)[keep].ravel())
        tables.append(pd.DataFrame({"chrom": chrom, "start": start[keep], "end": start[keep] + BIN_BP}))
    counts_11l = np.concatenate(counts).astype(np.uint16)[None, None]
    return anndata.AnnData(
        np.ones((1, 1), dtype=np.float32),
        obs=pd.DataFrame(index=["yeast"]),
        var=pd.DataFrame(index=["ATAC"]),
        obsm={"counts": counts_11l, "availability": np.ones((1, 1), dtype=bool)},
        uns={"bins": pd.concat(tables, ignore_index=True), "dna": np.concatenate(dna)},
    )


def sequence_sizes(fasta: Path) -> dict[str, int]:
    """Return the lengths of the sequences of a FASTA file."""
    sizes: dict[str, int] = {}
    name = ""
    with gzip.open(fasta, "rt") as handle:
        for line in handle:
            if line.startswith(">"):
                name = line[1:].split()[0]
                sizes[name] = 0
            else:
                sizes[name] += len(line.strip())
    return sizes


def run_yeast(seed: int, *, quick: bool) -> dict[str, Scores]:
    """Return the scores of the model with and without DNA, and of the baselines."""
    import epivi

    adata = read_yeast()
    scores: dict[str, Scores] = {}
    for name in (DNA_ON, DNA_OFF):
        data = adata.copy()
        if name == DNA_OFF:
            data.uns["dna"] = np.full_like(data.uns["dna"], 4)
        epivi.CANDI.setup_anndata(data, validation_chroms=[], test_chroms=list(YEAST_TESTS))
        model = epivi.CANDI(data, seed=seed, **DNA_NETWORK)
        options = {"batch_size": 8, "plan_kwargs": {"lr": YEAST_RATE}}
        model.train(max_epochs=1 if quick else YEAST_EPOCHS[name], **options, **TRAIN)
        table = model.evaluate(list(YEAST_TESTS), levels=[0.9]).iloc[0]
        found = model.impute(list(YEAST_TESTS), leave_one_out=True, interval=None)
        scores[name] = yeast_scores(data, np.asarray(found.layers["mean"], dtype=float).ravel())
        scores[name] |= {"NLL": float(table["nll"]), "coverage": float(table["coverage_0.9"])}
    scores[ONE_LAW] = one_law(adata)
    return scores | baselines(adata)


def tested(adata: Any) -> np.ndarray:
    """Return which bins are on held-out chromosomes."""
    return adata.uns["bins"]["chrom"].isin(YEAST_TESTS).to_numpy()


def yeast_scores(adata: Any, mean: np.ndarray) -> Scores:
    """Return the correlation of log1p of means with log1p of counts on the held-out chromosomes."""
    bins = adata.uns["bins"][tested(adata)]
    y = np.log1p(np.asarray(adata.obsm["counts"])[0, 0, tested(adata)].astype(float))
    x = np.log1p(np.maximum(mean, 0.0))
    length = bins.groupby("chrom", observed=True)["end"].transform("max")
    inner = ((bins["start"] >= END_BP) & (bins["end"] <= length - END_BP)).to_numpy()
    return {"r": correlation(x, y), "r, inner": correlation(x[inner], y[inner])}


def one_law(adata: Any) -> Scores:
    """Return the scores of one negative binomial law for all bins, fitted to the training chromosomes."""
    from scipy.optimize import minimize_scalar
    from scipy.stats import nbinom

    test, y = tested(adata), np.asarray(adata.obsm["counts"])[0, 0]
    mean = float(y[~test].mean())

    def nll(log_theta: float, on: np.ndarray) -> float:
        theta, (values, times) = np.exp(log_theta), np.unique(y[on], return_counts=True)
        return float(-np.average(nbinom.logpmf(values, theta, theta / (theta + mean)), weights=times))

    best = minimize_scalar(nll, bounds=(-5, 10), method="bounded", args=(~test,)).x
    return {"r": 0.0, "r, inner": 0.0, "NLL": nll(best, test)}


def baselines(adata: Any) -> dict[str, Scores]:
    """Return the scores of least squares of log1p on features of the DNA around each bin."""
    from scipy.ndimage import uniform_filter1d

    test = tested(adata)
    y = np.log1p(np.asarray(adata.obsm["counts"])[0, 0].astype(float))
    dna = adata.uns["dna"]
    kmers, gc = kmer_counts(dna), np.isin(dna, (1, 2)).reshape(-1, BIN_BP).mean(axis=1)
    gc_scales = [uniform_filter1d(gc, width) for width in (1, 5, 21, 101)]
    near = [uniform_filter1d(kmers, width, axis=0) for width in (3, 11)]
    features = {GC: np.stack([*gc_scales, *[part**2 for part in gc_scales]], axis=1), KMERS: np.hstack(near)}
    scores = {}
    for name, x in features.items():
        design = np.column_stack([np.ones(len(x)), x])
        weights = np.linalg.lstsq(design[~test], y[~test], rcond=1e-6)[0]
        scores[name] = yeast_scores(adata, np.expm1(design[test] @ weights))
    return scores


def kmer_counts(dna: np.ndarray, k: int = 4) -> np.ndarray:
    """Return how often each k-mer or its reverse complement begins in each bin; k-mers with N are left out."""
    codes = np.append(dna, np.full(k - 1, 4)).astype(np.int64)
    views = np.stack([codes[i : i + dna.size] for i in range(k)])
    powers = 4 ** np.arange(k - 1, -1, -1)
    forward, reverse = powers @ views, powers @ (3 - views[::-1])
    known = (views < 4).all(axis=0)
    names, word = np.unique(np.minimum(forward, reverse)[known], return_inverse=True)
    at = np.repeat(np.arange(dna.size // BIN_BP), BIN_BP)[known]
    n = len(names)
    return np.bincount(at * n + word, minlength=dna.size // BIN_BP * n).reshape(-1, n).astype(np.float32)


# ---------------------------------------------------------------------------------------------------------------------
# claims


def claims(k562: list[dict[str, Scores]], yeast: list[dict[str, Scores]]) -> list[Claim]:
    """Return the claims."""

    def gap(runs: list[dict[str, Scores]], name: str, ours: str, other: str) -> np.ndarray:
        return metric(runs, ours, name) - metric(runs, other, name)

    joined = gap(k562, "r, full, joined", CANDI, THINNED)
    rest = gap(k562, "r, left out", CANDI, THINNED)
    return [
        at_most("K562: NLL, CANDI - Poisson with the same means", gap(k562, "NLL", CANDI, POISSON), 0.0),
        at_most("K562: NLL, CANDI - Poisson with scaled means", gap(k562, "NLL", CANDI, SCALED), 0.0),
        at_most("K562: NLL, CANDI - Poisson regression", gap(k562, "NLL", CANDI, REGRESSION), 0.0),
        at_least("K562: randomised coverage of 90 % intervals", metric(k562, CANDI, "coverage"), 0.85),
        at_most("K562: randomised coverage of 90 % intervals", metric(k562, CANDI, "coverage"), 0.95),
        at_least("K562: r with full counts, denoised - thinned", joined, 0.0, "regions joined"),
        at_least(
            "K562: r with full counts, denoised - thinned", gap(k562, "r, full", CANDI, THINNED), 0.0, "in a region"
        ),
        at_least("K562: r with reads left out, denoised - thinned", rest, 0.0, "in a region"),
        at_least("yeast: r, DNA on - DNA off", gap(yeast, "r", DNA_ON, DNA_OFF), 0.0),
        at_least("yeast: r, DNA on - GC content", gap(yeast, "r", DNA_ON, GC), 0.0),
        at_least("yeast: r on inner bins, DNA on - GC content", gap(yeast, "r, inner", DNA_ON, GC), 0.0),
        at_most("yeast: NLL, DNA on - DNA off", gap(yeast, "NLL", DNA_ON, DNA_OFF), 0.0),
        at_most("yeast: NLL, DNA on - one law", gap(yeast, "NLL", DNA_ON, ONE_LAW), 0.0),
    ]


def main() -> int:
    """Run both settings and write the results."""
    chosen = parse(__doc__)
    for name in ("stan_counts", "yeast"):
        if not (folder() / name).is_dir():
            print(f"test data not found: set EPIVI_TEST_DATA (missing {folder() / name})", file=sys.stderr)
            return 2
    k562 = run_seeds(K562, chosen.seeds, lambda seed: run_k562(seed, quick=chosen.quick))
    yeast = run_seeds(YEAST, chosen.seeds, lambda seed: run_yeast(seed, quick=chosen.quick))
    notes = (
        "K562: one cell type. Regions are held out, not cell types; the figures say nothing about new cell types.",
        "Coverage: of central 90 % intervals, by the randomised PIT.",
        "r: correlation of log1p of means with log1p of counts.",
    )
    return finish(
        "candi_real_counts",
        "CANDI on real counts",
        {K562: k562, YEAST: yeast},
        claims(k562, yeast),
        chosen,
        notes=notes,
    )


if __name__ == "__main__":
    raise SystemExit(main())
