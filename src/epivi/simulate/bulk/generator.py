"""Simulated bulk experiments: counts of several assays in several biosamples, driven by states along the genome."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd
from scipy import special

from epivi._keys import (
    OBSM_AVAILABILITY,
    OBSM_COUNTS,
    OBSM_EXPERIMENT_DEPTH,
    OBSM_SIGNAL,
    UNS_BINS,
    UNS_CATEGORIES,
    UNS_DNA,
    UNS_GENOME,
    UNS_SIGNAL_TRANSFORM,
    UNS_SIMULATION,
    UNS_TRUTH,
    VAR_CHROM,
    VAR_END,
    VAR_START,
)
from epivi.simulate._arguments import stream
from epivi.simulate.bulk._setting import CATEGORIES, CONTINUOUS, BulkSetting, bulk_setting
from epivi.simulate.bulk._states import (
    STREAM,
    Genome,
    draw_dna,
    draw_genome,
    draw_states,
    loadings,
    log_rates,
    motifs,
    steepness,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from anndata import AnnData

GENOME: Final = "simulated"
READ_LENGTHS: Final = (36, 50, 76, 101)
# bins summed before the test against the background, and the smallest p-value
SIGNAL_BINS: Final = 5
SMALLEST_P: Final = 1e-300
MIN_ASSAYS: Final = 2

_DEPTH, _COUNTS, _MISSING, _UNKNOWN, _READS = range(100, 105)


def bulk(  # noqa: PLR0913
    n_biosamples: int = 24,
    n_assays: int = 6,
    *,
    chrom_sizes: Mapping[str, int] | Sequence[int] = (3200, 1600),
    gap: int = 0,
    n_factors: int = 3,
    domain: float = 12.0,
    own: float = 0.4,
    motif_share: float = 0.5,
    gain: float = 1.2,
    noise: float = 0.1,
    level: float | Sequence[float] = 1.5,
    dispersion: float | Sequence[float] = 5.0,
    depth: float = 2e7,
    depth_fold: float = 10.0,
    missing: float = 0.2,
    unknown: float | Mapping[str, float] = 0.0,
    signal: bool = False,
    dna: bool = False,
    bin_size_bp: int = 25,
    seed: int = 0,
    profile_seed: int | None = None,
) -> AnnData:
    r"""Simulate read counts of several assays in several biosamples, along chromosomes of equal bins.

    In biosample b and bin l a chromatin state has factors u of mean 0 and variance 1, constant in domains,

    .. math::
        u_{bkl} = \sqrt{1 - \mathrm{own}} \, s_{kl} + \sqrt{\mathrm{own}} \, o_{bkl}, \quad
        s_{kl} = \sqrt{\mathrm{motif\_share}} \, h_{kl} + \sqrt{1 - \mathrm{motif\_share}} \, r_{kl},

    where h is +1 in domains whose DNA has the motif of factor k and -1 in others, and r and o are Normal(0, 1). Assays
    see directions w of the states, up to noise e, Normal(0, 1) and constant in domains of its own, and counts are

    .. math::
        \eta_{bal} = \ln \mathrm{level}_a + \mathrm{gain} \tanh(c_a \, w_a \cdot u_{b \cdot l}) + \mathrm{noise} \,
        e_{bal}, \quad y_{bal} \sim \mathrm{NB}\!\left(\frac{\mathrm{depth}_{ba}}{\mathrm{depth}} \exp \eta_{bal},
        \mathrm{dispersion}_a\right).

    The first factor is seen by the first two assays alone: the other one of this pair is by far the most informative
    assay for each of them. Whatever is predictable of an assay beyond s is in the other assays of the biosample.

    Parameters
    ----------
    n_biosamples, n_assays
        Numbers of biosamples (obs) and of assays (var), the latter at least 3.
    chrom_sizes
        Bins of each chromosome, by name or as a list.
    gap
        Bins left out in the middle of each chromosome: the positions after it are larger, and domains break there.
    n_factors
        Number of factors of a state, at least 3.
    domain
        Mean length of a domain in bins.
    own
        Share of the variance of the states that belongs to the biosample alone.
    motif_share
        Share of the variance of the common part that the motifs determine.
    gain, noise
        Range of the response of the log rate (it moves between -gain and gain), and standard deviation of what no other
        assay knows.
    level, dispersion
        Count at the middle of the response at the reference depth, and dispersion of the counts (variance mean +
        mean² / dispersion); one number, or one an assay.
    depth, depth_fold
        Reference depth in reads, and ratio of the largest to the smallest depth an experiment may have; depths are
        log-uniform around the reference.
    missing
        Chance that an experiment was not done. Every biosample keeps at least two.
    unknown
        Chance that a covariate of an experiment is unknown, for all or by name (depth, coverage, read_length,
        run_type). Counts do not depend on it.
    signal
        Store arcsinh(-log10 p) too: p is that of the sum over 5 bins under a Poisson law with the mean of the
        experiment.
    dna
        Store the DNA, 8 bp of motif for each factor. Counts do not depend on it.
    bin_size_bp
        Width of a bin.
    seed
        Seed of the biosamples and their experiments.
    profile_seed
        Seed of what they share: domains, common states, motifs, DNA, steepness; by default ``seed``.

    Returns
    -------
    AnnData in the form that :func:`epivi.pp.bulk.open_store` gives, in memory:

    - ``X`` float32: 1 where the experiment was done, else 0; the same in ``obsm["availability"]``, bool (b, a);
    - ``obsm["counts"]`` (b, a, l), uint16, or int32 if a count exceeds 65,535; 0 where nothing was done;
    - ``obsm["signal"]`` float32 (b, a, l), with ``uns["signal_transform"]``, if asked for;
    - ``obsm["depth"]`` in reads, ``obsm["coverage"]``, the share of bins with a read, ``obsm["read_length"]`` in bp:
      float32 (b, a), NaN where unknown or not done;
    - ``obsm["run_type"]`` int8 codes of ``uns["categories"]["run_type"]``, -1 where unknown or not done;
    - ``uns["bins"]`` chrom, start, end; ``uns["genome"]``; ``uns["dna"]`` uint8 (l · bp,), if asked for;
    - ``uns["truth"]`` log_rate η (b, a, l), state u (b, k, l), shared s (k, l), motif_bins (k, l), motifs (k, 8),
      domain (k, l), loadings w (a, k), steepness c, level and dispersion (a,), depth (b, a) and counts (b, a, l) of all
      experiments, done or not, depth_ref, and pair, the names of the pair;
    - ``uns["simulation"]`` all arguments.

    Raises
    ------
    ConfigError
        If an argument is out of its range or has the wrong length, ``unknown`` names no covariate, or bins are too
        narrow for the motifs.

    Examples
    --------
    >>> adata = bulk(4, chrom_sizes=[160, 80], seed=1)
    >>> adata.shape, adata.obsm["counts"].shape, adata.uns["truth"]["pair"].tolist()
    ((4, 6), (4, 6, 240), ['DNase', 'ATAC'])
    """
    from anndata import AnnData

    setting = bulk_setting(locals())
    genome = draw_genome(setting)
    truth = _draw(setting, genome)
    available_ba = _available(setting)
    shown_bal = np.where(available_ba[..., None], truth["counts"], truth["counts"].dtype.type(0))
    obsm: dict[str, np.ndarray] = {OBSM_COUNTS: shown_bal, OBSM_AVAILABILITY: available_ba}
    uns: dict[str, Any] = {
        UNS_BINS: _bins(setting),
        UNS_GENOME: {"name": GENOME, "chrom_sizes": _chrom_sizes_bp(setting), "bin_size_bp": setting.bin_size_bp},
        UNS_CATEGORIES: {name: np.array(levels, dtype=str) for name, levels in CATEGORIES.items()},
    }
    obsm |= _covariates(setting, truth, available_ba)
    if setting.signal:
        obsm[OBSM_SIGNAL] = _signal(setting, shown_bal, available_ba)
        uns[UNS_SIGNAL_TRANSFORM] = "arcsinh"
    if setting.dna:
        uns[UNS_DNA] = draw_dna(setting, genome)
    obs = pd.DataFrame(index=pd.Index([f"biosample_{b}" for b in range(setting.n_biosamples)], dtype=str))
    var = pd.DataFrame(index=pd.Index(setting.assays, dtype=str))
    uns |= {UNS_TRUTH: truth, UNS_SIMULATION: _record(setting)}
    return AnnData(available_ba.astype(np.float32), obs=obs, var=var, obsm=obsm, uns=uns)


def _draw(s: BulkSetting, genome: Genome) -> dict[str, Any]:
    """Draw states, rates, depths and counts of all experiments; those of a biosample do not depend on the others."""
    n_assays = len(s.assays)
    half = np.log(s.depth_fold) / 2
    state_bkl = np.stack([draw_states(s, genome, b) for b in range(s.n_biosamples)])
    rate_bal = np.stack([log_rates(s, state_kl, b) for b, state_kl in enumerate(state_bkl)])
    depth_ba = s.depth * np.exp(
        [stream(s.seed, STREAM, _DEPTH, b).uniform(-half, half, n_assays) for b in range(s.n_biosamples)]
    )
    counts_bal = np.empty(rate_bal.shape, dtype=np.int64)
    for b in range(s.n_biosamples):
        for a in range(n_assays):
            mean_l = depth_ba[b, a] / s.depth * np.exp(rate_bal[b, a])
            rng = stream(s.seed, STREAM, _COUNTS, b, a)
            counts_bal[b, a] = rng.negative_binomial(s.dispersion[a], s.dispersion[a] / (s.dispersion[a] + mean_l))
    fits = counts_bal.max() <= np.iinfo(np.uint16).max
    return {
        "log_rate": rate_bal.astype(np.float32),
        "state": state_bkl.astype(np.float32),
        "shared": genome.shared_kl.astype(np.float32),
        "motif_bins": genome.motif_kl,
        "motifs": motifs(s),
        "domain": genome.domain_kl,
        "loadings": loadings(n_assays, s.n_factors),
        "steepness": steepness(s),
        "level": s.level,
        "dispersion": s.dispersion,
        "depth": depth_ba,
        "depth_ref": s.depth,
        "counts": counts_bal.astype(np.uint16 if fits else np.int32),
        "pair": np.array(s.assays[:2], dtype=str),
    }


def _available(s: BulkSetting) -> np.ndarray:
    """Return which experiments were done, (b, a); the least likely ones are left out, but two a biosample are kept."""
    chance_ba = np.stack([stream(s.seed, STREAM, _MISSING, b).random(len(s.assays)) for b in range(s.n_biosamples)])
    rank_ba = np.argsort(np.argsort(-chance_ba, axis=1), axis=1)
    return (chance_ba >= s.missing) | (rank_ba < MIN_ASSAYS)


def _covariates(s: BulkSetting, truth: Mapping[str, Any], available_ba: np.ndarray) -> dict[str, np.ndarray]:
    """Return the covariates, unknown where an experiment was not done or the draw says so."""
    size = (s.n_biosamples, len(s.assays))
    reads = [stream(s.seed, STREAM, _READS, b) for b in range(s.n_biosamples)]
    found: dict[str, np.ndarray] = {
        OBSM_EXPERIMENT_DEPTH: truth["depth"],
        "coverage": (truth["counts"] > 0).mean(axis=-1),
        "read_length": np.stack([rng.choice(READ_LENGTHS, size[1]) for rng in reads]),
        "run_type": np.stack([rng.integers(len(CATEGORIES["run_type"]), size=size[1]) for rng in reads]),
    }
    for i, name in enumerate((*CONTINUOUS, *CATEGORIES)):
        draw_ba = np.stack([stream(s.seed, STREAM, _UNKNOWN, i, b).random(size[1]) for b in range(size[0])])
        known_ba = available_ba & (draw_ba >= s.unknown[name])
        if name in CATEGORIES:
            found[name] = np.where(known_ba, found[name], -1).astype(np.int8)
        else:
            found[name] = np.where(known_ba, found[name], np.nan).astype(np.float32)
    return found


def _signal(s: BulkSetting, counts_bal: np.ndarray, available_ba: np.ndarray) -> np.ndarray:
    """Return arcsinh(-log10 p) of sums over neighbouring bins, fewer at the ends of a run; 0 where nothing was done."""
    signal_bal = np.zeros(counts_bal.shape, dtype=np.float32)
    mean_ba = counts_bal.mean(axis=-1)
    half, first = SIGNAL_BINS // 2, 0
    for _, _, size in s.runs:
        low = np.maximum(np.arange(size) - half, 0)
        high = np.minimum(np.arange(size) + half + 1, size)
        part_bal = counts_bal[..., first : first + size].astype(np.int64)
        total_bal = np.concatenate([np.zeros((*part_bal.shape[:2], 1), np.int64), part_bal.cumsum(axis=-1)], axis=-1)
        sum_bal = total_bal[..., high] - total_bal[..., low]
        expected_bal = np.maximum(mean_ba[..., None] * (high - low), 1e-12)
        # P(Poisson(m) >= x) is the regularised incomplete gamma function of x and m, 1 at x = 0
        p_bal = np.where(sum_bal > 0, special.gammainc(np.maximum(sum_bal, 1), expected_bal), 1.0)
        signal_bal[..., first : first + size] = np.arcsinh(-np.log10(np.maximum(p_bal, SMALLEST_P)))
        first += size
    return np.where(available_ba[..., None], signal_bal, np.float32(0))


def _bins(s: BulkSetting) -> pd.DataFrame:
    """Return chrom (categorical), start and end of each bin."""
    start = np.concatenate([np.arange(first, first + size) for _, first, size in s.runs]) * s.bin_size_bp
    codes = np.repeat(np.arange(len(s.bins_of_chrom)), list(s.bins_of_chrom.values()))
    chrom = pd.Categorical.from_codes(codes, categories=pd.Index(list(s.bins_of_chrom)))
    return pd.DataFrame({VAR_CHROM: chrom, VAR_START: start, VAR_END: start + s.bin_size_bp})


def _chrom_sizes_bp(s: BulkSetting) -> dict[str, int]:
    """Return the length of each chromosome in bp, gaps included."""
    return {chrom: (first + size) * s.bin_size_bp for chrom, first, size in s.runs}


def _record(s: BulkSetting) -> dict[str, Any]:
    """Return the arguments, with defaults filled in, in forms that can be written to a file."""
    fields = {key: getattr(s, key) for key in s.__dataclass_fields__ if key not in ("assays", "bins_of_chrom")}
    more = {"n_assays": len(s.assays), "chrom_sizes": dict(s.bins_of_chrom)}
    versions = {name: version(name) for name in ("epivi", "numpy", "anndata")}
    return {"simulator": "bulk"} | fields | more | {"versions": versions}
