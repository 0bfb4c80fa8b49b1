"""Experimental covariates: numbers and categories of each experiment, (biosamples, assays)."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np

from epivi import _validate
from epivi._errors import DataError, nearest
from epivi._keys import UNS_CATEGORIES
from epivi._validate import _some
from epivi.data.windows._checks import check_codes, check_depth, check_numbers

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData

logger = logging.getLogger(__name__)

LOG2_OF: Final = "depth"


@dataclass(frozen=True, eq=False)
class Levels:
    """Codes of a categorical covariate, int64 (biosamples, assays), -1 unknown, and the names of the levels."""

    codes: np.ndarray
    names: list[str]

    def used(self, rows_b: np.ndarray) -> list[str]:
        """Return the names of the levels that some biosamples, given as a mask, have.

        Examples
        --------
        >>> Levels(np.array([[1], [0]]), ["a", "b"]).used(np.array([True, False]))
        ['b']
        """
        return [name for code, name in enumerate(self.names) if (self.codes[rows_b] == code).any()]

    def commonest(self, rows_b: np.ndarray) -> str:
        """Return the level that most experiments of some biosamples have, the first of them where several do.

        Examples
        --------
        >>> Levels(np.array([[1, 1], [0, -1]]), ["a", "b"]).commonest(np.array([True, True]))
        'b'
        """
        codes = self.codes[rows_b]
        counts = np.bincount(codes[codes >= 0].ravel(), minlength=max(len(self.names), 1))
        return self.names[int(counts.argmax())]


def read_numbers(
    adata: AnnData, names: Sequence[str], available_ba: np.ndarray, *, where: str
) -> dict[str, np.ndarray]:
    """Return covariates of numbers, float64 (biosamples, assays), NaN unknown; log2 of the one named depth.

    Raises
    ------
    DataError
        If an entry of obsm is missing or not valid; a depth must be above zero.

    Examples
    --------
    >>> from anndata import AnnData
    >>> adata = AnnData(np.ones((1, 1)), obsm={"depth": np.array([[8.0]])})
    >>> read_numbers(adata, ["depth"], np.array([[True]]), where="adata")
    {'depth': array([[3.]])}
    """
    found = {}
    for name in names:
        _validate.check_key(adata.obsm, name, where=f"{where}.obsm")
        key, axes = f"{where}.obsm['{name}']", (adata.obs_names, adata.var_names)
        values_ba = check_numbers(adata.obsm[name], available_ba, where=key, names=axes)
        if name == LOG2_OF:
            check_depth(values_ba, where=key, names=axes)
            values_ba = np.log2(values_ba)
        found[name] = values_ba
    return found


def read_depth(adata: AnnData, key: str | None, available_ba: np.ndarray, *, where: str) -> np.ndarray:
    """Return sequencing depths in reads, float64 (biosamples, assays), NaN where unknown.

    Raises
    ------
    DataError
        If the entry of obsm is not valid, or a depth is not above zero.

    Examples
    --------
    >>> from anndata import AnnData
    >>> read_depth(AnnData(np.ones((1, 1))), None, np.array([[True]]), where="adata")
    array([[nan]])
    """
    if key is None:
        return np.full(available_ba.shape, np.nan)
    axes = (adata.obs_names, adata.var_names)
    depth_ba = check_numbers(adata.obsm[key], available_ba, where=f"{where}.obsm['{key}']", names=axes)
    check_depth(depth_ba, where=f"{where}.obsm['{key}']", names=axes)
    return depth_ba


def reference_depth(depth_ba: np.ndarray) -> np.ndarray:
    """Return the median of the known depths of each assay, (assays,), NaN where none is known.

    Examples
    --------
    >>> reference_depth(np.array([[2.0, np.nan], [4.0, np.nan]])).tolist()
    [3.0, nan]
    """
    known = [column[~np.isnan(column)] for column in depth_ba.T]
    return np.array([np.median(column) if column.size else np.nan for column in known])


def moments(values_ba: np.ndarray) -> dict[str, float]:
    """Return mean and standard deviation of what is known; 0 and 1 where nothing is, and 1 for a constant.

    Examples
    --------
    >>> moments(np.array([[1.0, np.nan], [3.0, np.nan]]))
    {'mean': 2.0, 'sd': 1.0}
    """
    known = values_ba[~np.isnan(values_ba)].astype(np.float64)
    if not known.size:
        return {"mean": 0.0, "sd": 1.0}
    sd = float(known.std())
    return {"mean": float(known.mean()), "sd": sd if sd > 1e-6 * max(1.0, abs(float(known.mean()))) else 1.0}


def read_levels(adata: AnnData, names: Sequence[str], available_ba: np.ndarray, *, where: str) -> dict[str, Levels]:
    """Return categorical covariates of obsm with the levels that ``uns["categories"]`` names.

    Raises
    ------
    DataError
        If an entry is missing or not valid, or has no levels in uns.

    Examples
    --------
    >>> from anndata import AnnData
    >>> adata = AnnData(np.ones((1, 1)), obsm={"run": np.array([[1]])}, uns={"categories": {"run": ["a", "b"]}})
    >>> read_levels(adata, ["run"], np.array([[True]]), where="adata")["run"].names
    ['a', 'b']
    """
    found: dict[str, Levels] = {}
    if not names:
        return found
    categories = adata.uns.get(UNS_CATEGORIES, {})
    if not isinstance(categories, Mapping):
        message = (
            f"{where}.uns['{UNS_CATEGORIES}'] is a {type(categories).__name__}: a dict of levels by name is needed."
        )
        raise DataError(message)
    for name in names:
        _validate.check_key(adata.obsm, name, where=f"{where}.obsm")
        _validate.check_key(categories, name, where=f"{where}.uns['{UNS_CATEGORIES}']")
        levels = [str(level) for level in np.atleast_1d(np.asarray(categories[name], dtype=object))]
        if not levels or len(set(levels)) < len(levels):
            message = f"{where}.uns['{UNS_CATEGORIES}']['{name}'] is {levels}: each level must be named once."
            raise DataError(message)
        codes = check_codes(
            adata.obsm[name],
            available_ba,
            len(levels),
            where=f"{where}.obsm['{name}']",
            names=(adata.obs_names, adata.var_names),
        )
        found[name] = Levels(codes, levels)
    return found


def match_levels(
    levels: Mapping[str, Levels],
    trained: Mapping[str, Sequence[str]],
    seen: Mapping[str, Sequence[str]],
    *,
    unseen: str,
    where: str,
) -> dict[str, np.ndarray]:
    """Return codes of the trained levels, int64 (biosamples, assays), by covariate.

    Parameters
    ----------
    levels
        What the data hold.
    trained
        All levels of the model.
    seen
        Those that a training experiment has.
    unseen
        What becomes of others: ``"error"``, or ``"unknown"`` for the code -1.
    where
        How messages call the object.

    Raises
    ------
    DataError
        If a level was not seen in training and ``unseen`` is ``"error"``.

    Examples
    --------
    >>> found = {"run": Levels(np.array([[0]]), ["b"])}
    >>> match_levels(found, {"run": ["a", "b"]}, {"run": ["b"]}, unseen="error", where="adata")["run"].tolist()
    [[1]]
    """
    matched = {}
    for name, level in levels.items():
        known = [str(one) for one in trained[name]]
        allowed = {str(one) for one in seen[name]}
        strange = [one for one in level.used(np.ones(len(level.codes), dtype=bool)) if one not in allowed]
        if strange and unseen == "error":
            message = (
                f"{where}.obsm['{name}'] has the categories {_some(strange)}, which no training experiment has. "
                f"{nearest(strange[0], sorted(allowed))} With unseen='unknown' at setup they count as unknown."
            )
            raise DataError(message)
        if strange:
            logger.warning("%s: the categories %s of '%s' count as unknown.", where, _some(strange), name)
        table = [known.index(one) if one in allowed else -1 for one in level.names]
        matched[name] = np.array([*table, -1], dtype=np.int64)[level.codes]
    return matched
