"""Arguments of the simulated tracks: checked, with the defaults that depend on others filled in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from epivi._errors import ConfigError
from epivi.simulate._arguments import check_clip, check_integer, check_number

# names of the channels: an active, an open and a repressive mark
MARKS: Final = ("H3K27ac", "ATAC", "H3K27me3")
# share of domains that differ between types in each modality, where the signal is low
LOW_SIGNAL_OWN: Final = (0.0, 0.06, 0.12)


@dataclass(frozen=True)
class TracksSetting:
    """Checked arguments: numbers of things, and how profiles and libraries are drawn."""

    n_types: int
    n_batches: int
    names: tuple[str, ...]
    bins_of_chrom: dict[str, int]
    domain: int
    bin_size_bp: int
    signs: np.ndarray
    shared: float
    own: np.ndarray
    effect_sd: float
    batch_shift: float
    depth: float
    log_sd: float
    clip: np.ndarray
    boundary_signal: bool
    seed: int
    profile_seed: int

    @property
    def domains_of_chrom(self) -> np.ndarray:
        """Number of domains of each chromosome."""
        return np.array(list(self.bins_of_chrom.values())) // self.domain


def tracks_setting(arguments: Mapping[str, Any]) -> TracksSetting:
    """Check the arguments of :func:`epivi.simulate.tracks` and fill in what depends on others.

    Raises
    ------
    ConfigError
        If an argument is out of its range or has the wrong length, a chromosome has no whole domain, or
        ``boundary_signal`` has fewer than two chromosomes or two domains on one of them.
    """
    given = dict(arguments)
    for key in ("ordered", "low_signal", "boundary_signal", "allow_empty", "dense", "as_mudata"):
        if not isinstance(given[key], bool | np.bool_):
            message = f"{key}={given[key]!r} is not valid: give True or False."
            raise ConfigError(message)
    low = bool(given["low_signal"])
    n_modalities = check_integer("n_modalities", given["n_modalities"], low=1)
    depth = check_number("depth", (60 if low else 150) if given["depth"] is None else given["depth"], low=1.0)
    clip = ((20, 2000) if low else (0.2 * depth, 13 * depth)) if given["clip"] is None else given["clip"]
    shift = check_number("batch_shift", given["batch_shift"])
    seed, batches = check_integer("seed", given["seed"]), given["n_batches"]
    setting = TracksSetting(
        n_types=check_integer("n_types", given["n_types"], low=1),
        n_batches=check_integer("n_batches", (2 if shift else 1) if batches is None else batches, low=1),
        names=tuple(MARKS[m] if m < len(MARKS) else f"mark_{m}" for m in range(n_modalities)),
        domain=check_integer("domain", given["domain"], low=1),
        bins_of_chrom=_chromosomes(given["chrom_sizes"], given["n_bins"], given["domain"]),
        bin_size_bp=check_integer("bin_size_bp", given["bin_size_bp"], low=1),
        signs=_signs(given["signs"], n_modalities),
        shared=check_number("shared", (0 if low else 0.15) if given["shared"] is None else given["shared"], high=1),
        own=_own(given["own"], n_modalities, low_signal=low),
        effect_sd=check_number("effect_sd", given["effect_sd"]),
        batch_shift=shift,
        depth=depth,
        log_sd=check_number("log_sd", given["log_sd"]),
        clip=check_clip(clip, 1, allow_empty=True)[0],
        boundary_signal=bool(given["boundary_signal"]),
        seed=seed,
        profile_seed=seed if given["profile_seed"] is None else check_integer("profile_seed", given["profile_seed"]),
    )
    if setting.boundary_signal and (len(setting.bins_of_chrom) < 2 or setting.domains_of_chrom.min() < 2):
        message = (
            f"boundary_signal=True needs two chromosomes of two domains ({2 * setting.domain} bins) each, found "
            f"{setting.bins_of_chrom}: give larger chrom_sizes."
        )
        raise ConfigError(message)
    return setting


def _chromosomes(chrom_sizes: Any, n_bins: Any, domain: Any) -> dict[str, int]:
    """Return the bins of each chromosome, whole domains only."""
    domain = check_integer("domain", domain, low=1)
    if chrom_sizes is None:
        chrom_sizes = {"chr1": check_integer("n_bins", n_bins, low=1)}
    elif isinstance(chrom_sizes, Sequence | np.ndarray) and not isinstance(chrom_sizes, str):
        chrom_sizes = {f"chr{k + 1}": size for k, size in enumerate(chrom_sizes)}
    if not isinstance(chrom_sizes, Mapping) or not chrom_sizes:
        message = f"chrom_sizes={chrom_sizes!r} is not valid: give the bins of each chromosome, by name or as a list."
        raise ConfigError(message)
    sizes = {str(k): check_integer(f"chrom_sizes['{k}']", v, low=1) for k, v in chrom_sizes.items()}
    for name, size in sizes.items():
        if size < domain:
            message = f"Chromosome '{name}' has {size} bins, a domain {domain}: give more bins or smaller domains."
            raise ConfigError(message)
    return {name: size // domain * domain for name, size in sizes.items()}


def _signs(signs: Any, n_modalities: int) -> np.ndarray:
    """Return the sign of each modality."""
    if not isinstance(signs, Sequence | np.ndarray) or isinstance(signs, str) or len(signs) == 0:
        message = f"signs={signs!r} is not valid: give a number for each modality, such as (1, 1, -1)."
        raise ConfigError(message)
    values = [check_number(f"signs[{m}]", sign, low=-np.inf) for m, sign in enumerate(signs)]
    return np.array([values[m % len(values)] for m in range(n_modalities)])


def _own(own: Any, n_modalities: int, *, low_signal: bool) -> np.ndarray:
    """Return the probability of an effect of its own for each modality."""
    if own is None:
        if low_signal and n_modalities > len(LOW_SIGNAL_OWN):
            message = f"low_signal=True is for at most 3 modalities, found {n_modalities}: give own= for each of them."
            raise ConfigError(message)
        own = LOW_SIGNAL_OWN[:n_modalities] if low_signal else 0.15
    if not isinstance(own, Sequence | np.ndarray) or isinstance(own, str):
        own = [own] * n_modalities
    if len(own) != n_modalities:
        message = f"own has {len(own)} entries for {n_modalities} modalities: give one number, or one a modality."
        raise ConfigError(message)
    return np.array([check_number(f"own[{m}]", share, high=1.0) for m, share in enumerate(own)])
