"""Chromatin states along the genome, what assays see of them, and the motifs that go with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from epivi.simulate._arguments import stream
from epivi.simulate.bulk._setting import MOTIF_BP

if TYPE_CHECKING:
    from epivi.simulate.bulk._setting import BulkSetting

STREAM = 4
_BREAKS, _MOTIFS, _SHARED, _OWN, _STEEPNESS, _NOISE, _MOTIF, _BACKGROUND = range(8)
# how strongly the two assays of the pair see the factor that no other one sees
_PAIR_LOADING = 0.9
# the pair lies in the middle of the range of steepness
_STEEPNESS_RANGE = (0.7, 1.5)


@dataclass(frozen=True)
class Genome:
    """What all biosamples share: domains, the shared part of the states, and which domains have motifs."""

    domain_kl: np.ndarray
    motif_kl: np.ndarray
    shared_kl: np.ndarray


def draw_genome(s: BulkSetting) -> Genome:
    """Draw domains of geometric length that break at every gap, motifs, and shared states of mean 0 and variance 1."""
    starts = np.cumsum([0] + [size for _, _, size in s.runs])[:-1]
    domain_kl, motif_kl, shared_kl = [], [], []
    for k in range(s.n_factors):
        domain_l = _domains(stream(s.profile_seed, STREAM, _BREAKS, k), s, starts)
        n_domains = domain_l[-1] + 1
        motif_d = stream(s.profile_seed, STREAM, _MOTIFS, k).random(n_domains) < 0.5
        rest_d = stream(s.profile_seed, STREAM, _SHARED, k).normal(size=n_domains)
        shared_d = np.sqrt(s.motif_share) * (2.0 * motif_d - 1.0) + np.sqrt(1.0 - s.motif_share) * rest_d
        domain_kl.append(domain_l)
        motif_kl.append(motif_d[domain_l])
        shared_kl.append(shared_d[domain_l])
    return Genome(np.stack(domain_kl), np.stack(motif_kl), np.stack(shared_kl))


def draw_states(s: BulkSetting, genome: Genome, biosample: int) -> np.ndarray:
    """Return the states of one biosample, (k, l): the shared part and, in the same domains, a part of its own."""
    states = []
    for k, domain_l in enumerate(genome.domain_kl):
        own_d = stream(s.seed, STREAM, _OWN, biosample, k).normal(size=domain_l[-1] + 1)
        states.append(np.sqrt(1.0 - s.own) * genome.shared_kl[k] + np.sqrt(s.own) * own_d[domain_l])
    return np.stack(states)


def log_rates(s: BulkSetting, state_kl: np.ndarray, biosample: int) -> np.ndarray:
    """Return the log mean counts of all assays at the reference depth, (a, l)."""
    seen_al = loadings(len(s.assays), s.n_factors) @ state_kl
    rate_al = np.log(s.level)[:, None] + s.gain * np.tanh(steepness(s)[:, None] * seen_al)
    starts = np.cumsum([0] + [size for _, _, size in s.runs])[:-1]
    for a in range(len(s.assays)):
        rng = stream(s.seed, STREAM, _NOISE, biosample, a)
        domain_l = _domains(rng, s, starts)
        rate_al[a] += s.noise * rng.normal(size=domain_l[-1] + 1)[domain_l]
    return rate_al


def loadings(n_assays: int, n_factors: int) -> np.ndarray:
    """Return what each assay sees of each factor, (a, k), rows of length 1.

    The first factor is seen by the first two assays alone, so that each is by far the best predictor of the other.
    The other assays see two neighbouring ones of the other factors, in directions spread over half a circle.

    Examples
    --------
    >>> loadings(4, 3).round(2)
    array([[ 0.9 ,  0.44,  0.  ],
           [ 0.9 ,  0.  ,  0.44],
           [ 0.  ,  0.71,  0.71],
           [ 0.  , -0.71,  0.71]])
    """
    weight_ak = np.zeros((n_assays, n_factors))
    weight_ak[:2, 0] = _PAIR_LOADING
    weight_ak[[0, 1], [1, 2]] = np.sqrt(1 - _PAIR_LOADING**2)
    # neighbouring factors span planes; with two factors there is one plane only
    n_planes = n_factors - 1 if n_factors > 3 else 1
    n_angles = -(-(n_assays - 2) // n_planes)
    for j in range(n_assays - 2):
        plane, angle = j % n_planes, np.pi * (j // n_planes + 0.5) / n_angles
        weight_ak[2 + j, [1 + plane, 1 + (plane + 1) % (n_factors - 1)]] = np.cos(angle), np.sin(angle)
    return weight_ak


def steepness(s: BulkSetting) -> np.ndarray:
    """Return how steep the response of each assay is, (a,): small is nearly linear, large nearly on or off."""
    drawn = [stream(s.profile_seed, STREAM, _STEEPNESS, a).uniform(*_STEEPNESS_RANGE) for a in range(len(s.assays))]
    return np.array(drawn)


def motifs(s: BulkSetting) -> np.ndarray:
    """Return the motif of each factor as codes 0 to 3, (k, bp)."""
    return np.stack(
        [stream(s.profile_seed, STREAM, _MOTIF, k).integers(4, size=MOTIF_BP) for k in range(s.n_factors)]
    ).astype(np.uint8)


def draw_dna(s: BulkSetting, genome: Genome) -> np.ndarray:
    """Return the DNA as codes, (bins * bp,): random letters, with the motif of a factor in each bin that has it."""
    rng = stream(s.profile_seed, STREAM, _BACKGROUND)
    dna_lr = rng.integers(4, size=(s.n_bins, s.bin_size_bp), dtype=np.uint8)
    slot = s.bin_size_bp // s.n_factors
    for k, motif in enumerate(motifs(s)):
        # each factor has a part of the bin to itself, so that no motif is overwritten
        bins = np.flatnonzero(genome.motif_kl[k])
        first = k * slot + rng.integers(slot - MOTIF_BP + 1, size=bins.size)
        dna_lr[bins[:, None], first[:, None] + np.arange(MOTIF_BP)] = motif
    return dna_lr.ravel()


def _domains(rng: np.random.Generator, s: BulkSetting, starts: np.ndarray) -> np.ndarray:
    """Return the number of the domain of each bin; a domain ends with probability 1 / mean length after each bin."""
    breaks_l = rng.random(s.n_bins) < 1.0 / s.domain
    breaks_l[starts] = True
    return np.cumsum(breaks_l) - 1
