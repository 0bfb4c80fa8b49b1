"""Arguments of the simulated bulk experiments: checked, with the defaults that depend on others filled in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from epivi._errors import ConfigError, nearest
from epivi.simulate._arguments import check_integer, check_number

ASSAYS: Final = ("DNase", "ATAC", "H3K4me3", "H3K27ac", "H3K4me1", "H3K36me3", "H3K27me3", "H3K9me3")
CONTINUOUS: Final = ("depth", "coverage", "read_length")
CATEGORIES: Final = {"run_type": ("single", "paired")}
MOTIF_BP: Final = 8


@dataclass(frozen=True)
class BulkSetting:
    """Checked arguments: numbers of things, and how states, rates and experiments are drawn."""

    n_biosamples: int
    assays: tuple[str, ...]
    bins_of_chrom: dict[str, int]
    gap: int
    bin_size_bp: int
    n_factors: int
    domain: float
    own: float
    motif_share: float
    gain: float
    noise: float
    level: np.ndarray
    dispersion: np.ndarray
    depth: float
    depth_fold: float
    missing: float
    unknown: dict[str, float]
    signal: bool
    dna: bool
    seed: int
    profile_seed: int

    @property
    def runs(self) -> list[tuple[str, int, int]]:
        """Chromosome, first bin and number of bins of each run without a gap."""
        runs = []
        for chrom, n_bins in self.bins_of_chrom.items():
            left = (n_bins + 1) // 2 if self.gap else n_bins
            runs.append((chrom, 0, left))
            if n_bins > left:
                runs.append((chrom, left + self.gap, n_bins - left))
        return runs

    @property
    def n_bins(self) -> int:
        """Number of bins of all chromosomes."""
        return sum(self.bins_of_chrom.values())


def bulk_setting(arguments: Mapping[str, Any]) -> BulkSetting:
    """Check the arguments of :func:`epivi.simulate.bulk` and fill in what depends on others.

    Raises
    ------
    ConfigError
        If an argument is out of its range or has the wrong length, ``unknown`` names no covariate, or bins are too
        narrow for the motifs.
    """
    given = dict(arguments)
    for key in ("signal", "dna"):
        if not isinstance(given[key], bool | np.bool_):
            message = f"{key}={given[key]!r} is not valid: give True or False."
            raise ConfigError(message)
    n_assays = check_integer("n_assays", given["n_assays"], low=3)
    seed = check_integer("seed", given["seed"])
    setting = BulkSetting(
        n_biosamples=check_integer("n_biosamples", given["n_biosamples"], low=1),
        assays=tuple(ASSAYS[a] if a < len(ASSAYS) else f"assay_{a}" for a in range(n_assays)),
        bins_of_chrom=_chromosomes(given["chrom_sizes"]),
        gap=check_integer("gap", given["gap"]),
        bin_size_bp=check_integer("bin_size_bp", given["bin_size_bp"], low=1),
        n_factors=check_integer("n_factors", given["n_factors"], low=3),
        domain=check_number("domain", given["domain"], low=1.0),
        own=check_number("own", given["own"], high=1.0),
        motif_share=check_number("motif_share", given["motif_share"], high=1.0),
        gain=check_number("gain", given["gain"]),
        noise=check_number("noise", given["noise"]),
        level=_per_assay("level", given["level"], n_assays, low=1e-3),
        dispersion=_per_assay("dispersion", given["dispersion"], n_assays, low=1e-3),
        depth=check_number("depth", given["depth"], low=1.0),
        depth_fold=check_number("depth_fold", given["depth_fold"], low=1.0),
        missing=check_number("missing", given["missing"], high=1.0),
        unknown=_unknown(given["unknown"]),
        signal=bool(given["signal"]),
        dna=bool(given["dna"]),
        seed=seed,
        profile_seed=seed if given["profile_seed"] is None else check_integer("profile_seed", given["profile_seed"]),
    )
    if setting.dna and setting.bin_size_bp < MOTIF_BP * setting.n_factors:
        message = (
            f"bin_size_bp={setting.bin_size_bp} is too narrow for the motifs of {setting.n_factors} factors, "
            f"{MOTIF_BP} bp each: give at least {MOTIF_BP * setting.n_factors}, or dna=False."
        )
        raise ConfigError(message)
    return setting


def _chromosomes(chrom_sizes: Any) -> dict[str, int]:
    """Return the bins of each chromosome."""
    sizes = chrom_sizes
    if isinstance(chrom_sizes, Sequence | np.ndarray) and not isinstance(chrom_sizes, str):
        sizes = {f"chr{k + 1}": size for k, size in enumerate(chrom_sizes)}
    if not isinstance(sizes, Mapping) or not sizes:
        message = f"chrom_sizes={chrom_sizes!r} is not valid: give the bins of each chromosome, by name or as a list."
        raise ConfigError(message)
    return {str(name): check_integer(f"chrom_sizes['{name}']", size, low=1) for name, size in sizes.items()}


def _per_assay(name: str, value: Any, n_assays: int, *, low: float) -> np.ndarray:
    """Return one number an assay from a scalar or a list."""
    if not isinstance(value, Sequence | np.ndarray) or isinstance(value, str):
        return np.full(n_assays, check_number(name, value, low=low))
    if len(value) != n_assays:
        message = f"{name} has {len(value)} entries for {n_assays} assays: give one number, or one an assay."
        raise ConfigError(message)
    return np.array([check_number(f"{name}[{a}]", entry, low=low) for a, entry in enumerate(value)])


def _unknown(unknown: Any) -> dict[str, float]:
    """Return the share of unknown entries of each covariate."""
    names = (*CONTINUOUS, *CATEGORIES)
    if not isinstance(unknown, Mapping):
        return dict.fromkeys(names, check_number("unknown", unknown, high=1.0))
    for name in unknown:
        if name not in names:
            message = f"unknown names '{name}', which is no covariate. {nearest(str(name), names)}"
            raise ConfigError(message)
    return {name: check_number(f"unknown['{name}']", unknown.get(name, 0.0), high=1.0) for name in names}
