"""Leaving the user's object as it was when a setup is refused."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from anndata import AnnData
from mudata import MuData

if TYPE_CHECKING:
    from collections.abc import Iterator

    import pandas as pd


class _Before(NamedTuple):
    """What fields write to: the columns of obs and the entries of obsm."""

    holder: Any
    obs: pd.DataFrame
    obsm: dict[str, Any]


@contextmanager
def restored_on_error(data: Any) -> Iterator[None]:
    """Put back the columns of obs and the entries of obsm if the block raises, those of all modalities of a MuData.

    Columns and entries that were written anew are removed; those that were replaced are as before. Nothing is copied.

    Parameters
    ----------
    data
        AnnData or MuData; anything else, and views, which are never written to, are left alone.

    Examples
    --------
    >>> import numpy as np
    >>> adata = AnnData(np.ones((2, 1)))
    >>> try:
    ...     with restored_on_error(adata):
    ...         adata.obs["depth"] = 1.0
    ...         adata.obs["missing"]
    ... except KeyError:
    ...     list(adata.obs)
    []
    """
    before = [
        # columns are replaced, never changed in place, so that a shallow copy keeps them
        _Before(holder, holder.obs.copy(deep=False), dict(holder.obsm))
        for holder in (data, *(data.mod.values() if isinstance(data, MuData) else ()))
        if isinstance(holder, AnnData | MuData) and not holder.is_view
    ]
    try:
        yield
    except BaseException:
        for entry in before:
            _restore(entry)
        raise


def _restore(before: _Before) -> None:
    obs, obsm = before.holder.obs, before.holder.obsm
    for key in [key for key in obs if key not in before.obs]:
        del obs[key]
    for key in before.obs:
        if not before.obs[key].equals(obs[key]):
            obs[key] = before.obs[key]
    for key in [key for key in obsm if key not in before.obsm]:
        del obsm[key]
    for key, value in before.obsm.items():
        if obsm[key] is not value:
            obsm[key] = value
