"""Accessibility profiles of simulated cell types, and the open probability that follows from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from epivi._errors import DataError
from epivi.simulate._arguments import check_integer, check_number, stream

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

# First key of the random streams of the profiles; cells use 1, the RNA of a multiome 2.
_STREAM = 0
_BASE, _BACKGROUND, _LAYOUT, _TYPE, _SUBTYPE = range(5)


def layout_stream(seed: int) -> np.random.Generator:
    """Return the stream that decides which regions are foreground."""
    return stream(seed, _STREAM, _LAYOUT)


def synthetic_profiles(
    names: Sequence[str], *, n_fg: int, specificity: float, effect_sd: float, seed: int
) -> dict[str, np.ndarray]:
    """Draw the foreground weights of cell types that share a base profile.

    Base weight Gamma(1, 1) a region; in every type a random share ``specificity`` of the regions is multiplied by
    exp(Normal(0, ``effect_sd``)); weights of a type sum to one.

    Parameters
    ----------
    names
        Names of the types.
    n_fg
        Number of foreground regions.
    specificity
        Share of regions changed in a type, 0 to 1.
    effect_sd
        Standard deviation of the change of the log weight.
    seed
        Seed of the profiles. A type's profile depends on its rank, not on the number of types.

    Returns
    -------
    Weights by type, shape (regions,).

    Raises
    ------
    ConfigError
        If a number is out of its range.

    Examples
    --------
    >>> profiles = synthetic_profiles(["a", "b"], n_fg=50, specificity=0.2, effect_sd=1.0, seed=0)
    >>> round(float(profiles["a"].sum()), 6)
    1.0
    """
    n_fg = check_integer("n_fg", n_fg, low=1)
    base_p = stream(seed, _STREAM, _BASE).gamma(1.0, 1.0, n_fg)
    return {
        name: changed_profile(
            base_p, share=specificity, effect_sd=effect_sd, name="specificity", rng=stream(seed, _STREAM, _TYPE, rank)
        )
        for rank, name in enumerate(names)
    }


def subtype_profile(
    weights_p: np.ndarray, *, share: float, effect_sd: float, seed: int, rank: tuple[int, int]
) -> np.ndarray:
    """Change a share of a type's foreground weights; ``rank`` is (type, sub-type)."""
    rng = stream(seed, _STREAM, _SUBTYPE, *rank)
    return changed_profile(weights_p, share=share, effect_sd=effect_sd, name="subtype_share", rng=rng)


def changed_profile(
    weights_p: np.ndarray, *, share: float, effect_sd: float, name: str, rng: np.random.Generator
) -> np.ndarray:
    """Multiply a random share of the weights by exp(Normal(0, effect_sd)) and normalise.

    Raises
    ------
    ConfigError
        If the share (called ``name`` in the message) is not between 0 and 1, or ``effect_sd`` is negative.
    """
    share = check_number(name, share, high=1.0)
    effect_sd = check_number("effect_sd", effect_sd)
    changed_p = np.array(weights_p, dtype=float)
    at = rng.choice(changed_p.size, size=round(share * changed_p.size), replace=False)
    changed_p[at] *= np.exp(rng.normal(0.0, effect_sd, at.size))
    return changed_p / changed_p.sum()


def background_weights(n_bg: int, *, seed: int) -> np.ndarray:
    """Draw the background weights, Gamma(2, 1) a region, common to all types; they sum to one.

    Examples
    --------
    >>> background_weights(5, seed=0).shape
    (5,)
    """
    weights_p = stream(seed, _STREAM, _BACKGROUND).gamma(2.0, 1.0, n_bg)
    return weights_p / weights_p.sum() if n_bg else weights_p


def check_weights(weights: ArrayLike, *, name: str, n_regions: int | None = None) -> np.ndarray:
    """Return weights as a float vector that sums to one.

    Raises
    ------
    DataError
        If they are not numbers, have the wrong shape, are negative or not finite, or are all zero.

    Examples
    --------
    >>> check_weights([1, 3], name="background")
    array([0.25, 0.75])
    """
    try:
        weights_p = np.asarray(weights, dtype=float)
    except (TypeError, ValueError) as error:
        message = f"{name} holds entries that are no numbers: give one weight a region."
        raise DataError(message) from error
    if weights_p.ndim != 1 or weights_p.size == 0 or (n_regions is not None and weights_p.size != n_regions):
        wanted = "a vector of weights" if n_regions is None else f"{n_regions} weights"
        message = f"{name} has shape {weights_p.shape}: give {wanted}, or change the number of regions."
        raise DataError(message)
    bad = np.flatnonzero(~(np.isfinite(weights_p) & (weights_p >= 0)))
    if bad.size:
        message = f"{name} holds {weights_p[bad[0]]} at region {bad[0]}: weights must be finite and not negative."
        raise DataError(message)
    if not weights_p.any():
        message = f"{name} holds only zeros: at least one region needs a positive weight."
        raise DataError(message)
    weights_p = weights_p / weights_p.max()  # two steps, so that the sum of very large weights stays finite
    return weights_p / weights_p.sum()


def check_profiles(profiles: object, *, n_types: int, n_fg: int) -> dict[str, np.ndarray]:
    """Return the user's profiles as normalised vectors by type.

    Raises
    ------
    DataError
        If the argument is no mapping, has the wrong number of types, or a profile is not valid.
    """
    if not isinstance(profiles, Mapping):
        message = f"profiles is a {type(profiles).__name__}: give a mapping from type names to weights."
        raise DataError(message)
    if len(profiles) != n_types:
        message = f"profiles holds {len(profiles)} types and n_cells {n_types}: give one profile for every type."
        raise DataError(message)
    return {str(k): check_weights(v, name=f"profiles['{k}']", n_regions=n_fg) for k, v in profiles.items()}


def inclusion_probability(weights: ArrayLike, m: float, *, copies: int = 2) -> np.ndarray:
    r"""Compute how likely each region is open after weighted draws without replacement.

    The inclusion probability of one draw of ``m`` regions is approximated by :math:`\pi_r = 1 - \exp(-W_r \tau)` with
    :math:`\tau` solved from :math:`\sum_r \pi_r = m`; with :math:`c` independent copies the region is open with
    probability :math:`1 - (1 - \pi_r)^c`. The error falls with the number of regions (below 0.01 from about 100 on).

    Parameters
    ----------
    weights
        Weight of every region, shape (regions,); any scale.
    m
        Regions drawn for one copy, that is half the fragments of a cell in foreground (or background). Values above the
        number of regions of positive weight are capped, as in the simulator.
    copies
        Number of chromosome copies.

    Returns
    -------
    Open probability of every region, shape (regions,).

    Raises
    ------
    DataError
        If a weight is negative or not finite, or all are zero.
    ConfigError
        If ``m`` is negative or not finite, or ``copies`` is no positive whole number.

    References
    ----------
    Rosén, Asymptotic theory for successive sampling with varying probabilities without replacement, Ann. Math. Stat. 43
    (1972).

    Examples
    --------
    >>> inclusion_probability([1.0, 1.0, 1.0, 1.0, 0.0], 2)
    array([0.75, 0.75, 0.75, 0.75, 0.  ])
    """
    from scipy.optimize import brentq

    weights_p = check_weights(weights, name="weights")
    m = check_number("m", m)
    copies = check_integer("copies", copies, low=1)
    positive = weights_p > 0
    if m == 0:
        return np.zeros_like(weights_p)
    if m >= positive.sum():
        return positive.astype(float)

    def surplus(tau: float) -> float:
        return float(-np.expm1(-weights_p * tau).sum() - m)

    high = float(m)  # weights sum to one, so that surplus(m) <= 0
    while surplus(high) < 0:
        high *= 2.0
    tau = brentq(surplus, 0.0, high, xtol=1e-12 * high, rtol=1e-12)
    return -np.expm1(-copies * weights_p * tau)
