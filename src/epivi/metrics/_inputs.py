"""The one gate for what the metrics are given: embeddings, labels, numbers of neighbours."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from epivi._errors import ConfigError, DataError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray


class Labels(NamedTuple):
    """Integer codes of a labelling (one a cell) and the name of each code."""

    codes: NDArray[np.intp]
    names: tuple[str, ...]


def package_version() -> str:
    """Return the version of epivi, which is part of every reported number."""
    try:
        return version("epivi")
    except PackageNotFoundError:  # a source tree that was never installed
        return "unknown"


def as_embedding(Z: ArrayLike, *, name: str = "Z") -> NDArray[np.float64]:
    """Return an embedding of shape (n, z) in double precision, refused unless finite and not constant.

    Raises
    ------
    DataError
        If `Z` is sparse, not numeric, not two-dimensional, has fewer than two cells or no dimension, holds NaN or
        infinite values, or if all its cells are equal.
    """
    if hasattr(Z, "tocsr"):
        msg = f"{name} is a sparse matrix: a metric needs a dense embedding of shape (cells, dimensions)."
        raise DataError(msg)
    try:
        z_nd = np.asarray(Z, dtype=np.float64)
    except (TypeError, ValueError) as error:
        msg = f"{name} cannot be read as numbers: {error}. Give an array of shape (cells, dimensions)."
        raise DataError(msg) from error
    if z_nd.ndim != 2 or z_nd.shape[0] < 2 or z_nd.shape[1] < 1:
        msg = f"{name} has shape {z_nd.shape}, expected (cells, dimensions) with at least 2 cells and 1 dimension."
        raise DataError(msg)
    check_finite(z_nd, name=name)
    if bool(np.all(z_nd == z_nd[:1])):
        msg = f"{name} is constant: all {z_nd.shape[0]} cells have the same {z_nd.shape[1]} values, nothing to score."
        raise DataError(msg)
    return z_nd


def check_finite(values: NDArray[Any], *, name: str) -> None:
    """Refuse NaN and infinite values with their count and the first row that holds one.

    Raises
    ------
    DataError
        If a value is NaN or infinite.
    """
    bad = ~np.isfinite(values)
    if bad.any():
        count_nan = int(np.isnan(values).sum())
        row = int(np.argwhere(bad)[0, 0])
        msg = (
            f"{name} holds {count_nan} NaN and {int(bad.sum()) - count_nan} infinite values, the first in row {row}. "
            "Remove these cells or repair the values."
        )
        raise DataError(msg)


def as_labels(labels: ArrayLike, n: int, *, name: str = "labels", min_values: int = 2) -> Labels:
    """Return the codes and names of `n` labels, sorted by name (categories keep their order, unused ones are dropped).

    Raises
    ------
    DataError
        If the labels are not one-dimensional or not `n`, if some are missing, or if they take fewer than `min_values`
        different values.
    """
    import pandas as pd

    values = labels if isinstance(labels, (pd.Series, pd.Categorical, pd.Index)) else np.asarray(labels)
    if values.ndim != 1 or len(values) != n:
        found = f"shape {values.shape}" if values.ndim != 1 else f"{len(values)} entries"
        msg = f"{name} has {found}, expected one entry for each of the {n} cells."
        raise DataError(msg)
    if missing := int(pd.isna(values).sum()):
        msg = f"{name} has {missing} missing entries among {n} cells. Remove these cells or name the group."
        raise DataError(msg)
    if isinstance(values.dtype, pd.CategoricalDtype):
        values = pd.Categorical(values).remove_unused_categories()
        codes, names = np.asarray(values.codes, dtype=np.intp), list(values.categories)
    else:
        array = np.asarray(values)
        codes, uniques = pd.factorize(array.astype(str) if array.dtype == object else array, sort=True)
        names = list(uniques)
    if len(names) < min_values:
        msg = (
            f"{name} takes {len(names)} value(s) over {n} cells ({', '.join(map(str, names))}), at least {min_values} "
            "different values are needed."
        )
        raise DataError(msg)
    return Labels(np.asarray(codes, dtype=np.intp), tuple(str(entry) for entry in names))


def check_neighbors(n_neighbors: int, n: int, *, name: str = "n_neighbors") -> int:
    """Return a number of neighbours that `n` cells can have.

    Raises
    ------
    ConfigError
        If it is not an integer from 1 to `n` - 1.
    """
    if isinstance(n_neighbors, bool) or not isinstance(n_neighbors, (int, np.integer)) or n_neighbors < 1:
        msg = f"{name} is {n_neighbors!r}, expected a positive integer."
        raise ConfigError(msg)
    if n_neighbors >= n:
        msg = f"{name} is {n_neighbors}, but {n} cells have at most {n - 1} neighbours each. Lower it."
        raise ConfigError(msg)
    return int(n_neighbors)


def check_choice(value: str, valid: tuple[str, ...], *, name: str) -> str:
    """Return an option that is one of `valid`.

    Raises
    ------
    ConfigError
        If it is none of them.
    """
    from epivi._errors import nearest

    if value not in valid:
        msg = f"{name} is {value!r}. {nearest(str(value), valid)}"
        raise ConfigError(msg)
    return value


def draw(n: int, n_max: int, seed: int) -> NDArray[np.intp]:
    """Return all of `n` rows or a seeded, sorted sample of `n_max` of them."""
    if n <= n_max:
        return np.arange(n)
    return np.sort(np.random.default_rng(seed).choice(n, size=n_max, replace=False))
