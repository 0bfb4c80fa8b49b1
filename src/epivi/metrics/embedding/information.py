"""How much an embedding knows of a confounder: mutual information I(z, c) by nearest neighbours."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from epivi._errors import ConfigError, DataError
from epivi.metrics._inputs import as_embedding, as_labels, check_finite, check_neighbors, draw, package_version

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

logger = logging.getLogger(__name__)

_MAX_INTEGER_CLASSES = 50
_MIN_GROUP = 50


@dataclass(frozen=True, eq=False)
class ConfounderInformation:
    """Mutual information of each latent dimension with a confounder, in nats.

    Attributes
    ----------
    mean, max
        Mean and maximum of `per_dimension`.
    per_dimension
        I(z_j; c) of each dimension, shape (z,); 0 for collapsed dimensions.
    collapsed
        Indices of the dimensions that are constant over the cells.
    discrete
        Whether `c` was taken as discrete.
    estimator
        Name of the estimator.
    entropy
        H(c) in nats of a discrete `c` (given the groups of `within`), the ceiling of I; None if continuous.
    normalised
        `mean` / `entropy`; None for a continuous `c`.
    n, n_total
        Cells used and cells given.
    n_neighbors, seed
        The k of the estimator and the seed of its tie-breaking noise and of the subsample.
    skipped
        Groups of `within` that have fewer than 50 cells.
    """

    mean: float
    max: float
    per_dimension: NDArray[np.float64]
    collapsed: tuple[int, ...]
    discrete: bool
    estimator: str
    entropy: float | None
    normalised: float | None
    n: int
    n_total: int
    n_neighbors: int
    seed: int
    skipped: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return plain Python values, ready for JSON or `uns`, with the version of epivi.

        Examples
        --------
        >>> import numpy as np
        >>> z = np.random.default_rng(0).normal(size=(200, 2))
        >>> confounder_information(z, z[:, 0]).to_dict()["n"]
        200
        """
        return {
            "mean": self.mean,
            "max": self.max,
            "per_dimension": self.per_dimension.tolist(),
            "collapsed": list(self.collapsed),
            "discrete": self.discrete,
            "estimator": self.estimator,
            "entropy": self.entropy,
            "normalised": self.normalised,
            "n": self.n,
            "n_total": self.n_total,
            "n_neighbors": self.n_neighbors,
            "seed": self.seed,
            "skipped": list(self.skipped),
            "epivi_version": package_version(),
        }


def confounder_information(
    Z: ArrayLike,
    c: ArrayLike,
    *,
    discrete: bool | None = None,
    n_neighbors: int = 3,
    within: ArrayLike | None = None,
    n_max: int = 20_000,
    seed: int = 0,
) -> ConfounderInformation:
    """Estimate the mutual information I(z_j; c) of every latent dimension with a confounder, in nats.

    The mean over dimensions is the I(z,c) of SAILER (section 2.2.5): Kraskov's nearest-neighbour estimator for a
    continuous confounder such as depth, Ross's for a discrete one such as the batch.

    Parameters
    ----------
    Z
        Embedding, shape (n, z). Each dimension is standardised first.
    c
        Confounder, length n: depth on its raw scale, or labels.
    discrete
        Whether `c` is discrete. By default it is for booleans, strings, categories, and integers with at most 50
        different values.
    n_neighbors
        k of the estimator.
    within
        Labels, length n. I is then estimated within each group and averaged, weighted by size: a depth that differs
        between cell types is not an artefact. Groups of fewer than 50 cells are skipped and reported.
    n_max
        More cells than this are subsampled (`n` of the result says so).
    seed
        Seed of the subsample and of the noise that breaks ties.

    Returns
    -------
    The estimates and everything needed to repeat them.

    Raises
    ------
    DataError
        If `Z` is not a finite matrix or is constant, if `c` or `within` has the wrong length or missing values, if
        `c` takes a single value, if a discrete `c` has more classes than half the cells, or if no group of `within`
        is large enough.
    ConfigError
        If `n_neighbors` or `n_max` is not a positive integer or too large.

    Notes
    -----
    Values are comparable neither across numbers of dimensions nor between continuous and discrete confounders. The
    released SAILER code applies the continuous estimator to 0/1 batch labels; the discrete one is used here.

    References
    ----------
    Kraskov et al., Phys. Rev. E 69, 066138 (2004), eq. 8; Ross, PLoS ONE 9, e87357 (2014).

    Examples
    --------
    >>> import numpy as np
    >>> rng = np.random.default_rng(0)
    >>> z = rng.normal(size=(1000, 2))
    >>> batch = np.repeat(["a", "b"], 500)
    >>> z[:500, 0] += 100.0
    >>> result = confounder_information(z, batch)
    >>> bool(abs(result.max - np.log(2)) < 0.02)
    True
    """
    z_nd = as_embedding(Z)
    n_total = z_nd.shape[0]
    target, is_discrete = _as_target(c, n_total, discrete)
    if isinstance(n_max, bool) or not isinstance(n_max, (int, np.integer)) or n_max < 2:
        msg = f"n_max is {n_max!r}, expected an integer of at least 2."
        raise ConfigError(msg)
    rows = draw(n_total, int(n_max), seed)
    if len(rows) < n_total:
        logger.info("I(z, c) is estimated on %d of %d cells (seed %d).", len(rows), n_total, seed)
    z_nd, target = z_nd[rows], target[rows]
    check_neighbors(n_neighbors, len(rows))
    collapsed = _collapsed(z_nd)

    codes, kept, sizes, skipped = _groups(within, n_total, rows)
    weights = sizes[kept] / sizes[kept].sum()
    info_d = np.zeros(z_nd.shape[1])
    entropy = 0.0
    for group, weight in zip(kept, weights, strict=True):
        member = codes == group
        info_d += weight * _information(z_nd[member], target[member], is_discrete, n_neighbors, seed)
        if is_discrete:
            entropy += weight * _entropy(target[member])
    info_d[list(collapsed)] = 0.0
    mean = float(info_d.mean())
    return ConfounderInformation(
        mean=mean,
        max=float(info_d.max()),
        per_dimension=info_d,
        collapsed=collapsed,
        discrete=is_discrete,
        estimator="Ross (mutual_info_classif)" if is_discrete else "Kraskov (mutual_info_regression)",
        entropy=float(entropy) if is_discrete else None,
        normalised=(mean / float(entropy) if entropy > 0 else 0.0) if is_discrete else None,
        n=int(sizes[kept].sum()),
        n_total=n_total,
        n_neighbors=int(n_neighbors),
        seed=int(seed),
        skipped=skipped,
    )


def _as_target(c: ArrayLike, n: int, discrete: bool | None) -> tuple[NDArray[Any], bool]:  # noqa: FBT001
    """Return the confounder as codes or doubles, and whether it is discrete."""
    import pandas as pd

    values = c if isinstance(c, (pd.Series, pd.Categorical, pd.Index)) else np.asarray(c)
    if discrete is None:
        discrete = _looks_discrete(values)
    if discrete:
        labels = as_labels(values, n, name="c")
        if len(labels.names) > n / 2:
            msg = f"c is taken as discrete but has {len(labels.names)} classes for {n} cells. Pass discrete=False?"
            raise DataError(msg)
        return labels.codes, True
    if values.ndim != 1 or len(values) != n:
        msg = f"c has shape {values.shape}, expected one value for each of the {n} cells."
        raise DataError(msg)
    try:
        numbers = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        msg = f"c is taken as continuous but cannot be read as numbers: {error}. Pass discrete=True."
        raise DataError(msg) from error
    check_finite(numbers, name="c")
    if bool(np.all(numbers == numbers[0])):
        msg = f"c takes 1 value ({numbers[0]:g}) over {n} cells: its information with anything is 0 by definition."
        raise DataError(msg)
    return numbers, False


def _looks_discrete(values: Any) -> bool:
    """Tell discrete from continuous by dtype, integers by their number of different values."""
    import pandas as pd

    dtype = values.dtype
    if pd.api.types.is_bool_dtype(dtype) or not pd.api.types.is_numeric_dtype(dtype):
        return True
    n_unique = len(pd.unique(np.asarray(values).ravel()))
    if pd.api.types.is_integer_dtype(dtype):
        return n_unique <= _MAX_INTEGER_CLASSES
    if n_unique <= 10:
        logger.warning("c holds floats with %d different values: if these are labels, pass discrete=True.", n_unique)
    return False


def _groups(
    within: ArrayLike | None, n: int, rows: NDArray[np.intp]
) -> tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.intp], tuple[str, ...]]:
    """Return the group of each row, the groups that are large enough, all sizes, and the names of the others."""
    if within is None:
        return np.zeros(len(rows), dtype=np.intp), np.array([0]), np.array([len(rows)]), ()
    groups = as_labels(within, n, name="within", min_values=1)
    codes = groups.codes[rows]
    sizes = np.bincount(codes, minlength=len(groups.names))
    kept = np.flatnonzero(sizes >= _MIN_GROUP)
    skipped = tuple(groups.names[group] for group in np.flatnonzero(sizes < _MIN_GROUP))
    if len(kept) == 0:
        msg = f"within has no group of at least {_MIN_GROUP} cells (largest: {int(sizes.max())}). Use wider groups."
        raise DataError(msg)
    if skipped:
        logger.warning("Groups of fewer than %d cells are skipped: %s.", _MIN_GROUP, ", ".join(skipped))
    return codes, kept, sizes, skipped


def _collapsed(z_nd: NDArray[np.float64]) -> tuple[int, ...]:
    """Return the dimensions that are constant, up to the rounding of a mean in double precision."""
    return tuple(int(j) for j in np.flatnonzero(z_nd.std(axis=0) <= 1e-12 * np.abs(z_nd.mean(axis=0))))


def _information(
    z_nd: NDArray[np.float64],
    target: NDArray[Any],
    discrete: bool,  # noqa: FBT001
    n_neighbors: int,
    seed: int,
) -> NDArray[np.float64]:
    """Return I(z_j; target) of each dimension; 0 where either side is constant."""
    from sklearn.feature_selection import mutual_info_classif, mutual_info_regression

    info_d = np.zeros(z_nd.shape[1])
    varying = np.setdiff1d(np.arange(z_nd.shape[1]), _collapsed(z_nd))
    if len(varying) == 0 or len(np.unique(target)) < 2:
        return info_d
    z_nv = z_nd[:, varying]
    z_nv = (z_nv - z_nv.mean(axis=0)) / z_nv.std(axis=0)
    estimate = mutual_info_classif if discrete else mutual_info_regression
    info_d[varying] = estimate(z_nv, target, discrete_features=False, n_neighbors=n_neighbors, random_state=seed)
    return info_d


def _entropy(codes: NDArray[np.intp]) -> float:
    """Return the plug-in entropy of a labelling in nats."""
    share_k = np.bincount(codes) / len(codes)
    share_k = share_k[share_k > 0]
    return float(-(share_k * np.log(share_k)).sum())
