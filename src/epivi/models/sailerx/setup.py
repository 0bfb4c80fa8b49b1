"""What SAILERX asks of a MuData: which modality is which, and which table holds the columns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mudata import MuData

from epivi._errors import ConfigError, DataError, nearest
from epivi._keys import MOD_ATAC, MOD_RNA


def modality_names(mdata: Any, modalities: Mapping[str, str] | None, *, needs_rna: bool) -> tuple[str, str]:
    """Resolve and check the names of the two modalities.

    Parameters
    ----------
    mdata
        The user's object.
    modalities
        Names by ``"atac"`` and ``"rna"``, the same by default.
    needs_rna
        Whether the RNA must be there; a query may come without.

    Raises
    ------
    DataError
        If the object is no MuData, or lacks a modality.
    ConfigError
        If ``modalities`` is no dict, holds an unknown entry, or names one modality twice.

    Examples
    --------
    >>> import numpy as np, pandas as pd
    >>> from anndata import AnnData
    >>> one = {name: AnnData(np.ones((2, 1)), var=pd.DataFrame(index=[name])) for name in ("peaks", "rna")}
    >>> mdata = MuData(one)
    >>> modality_names(mdata, {"atac": "peaks"}, needs_rna=True)
    ('peaks', 'rna')
    """
    if not isinstance(mdata, MuData):
        message = f"setup_mudata takes a MuData, found {type(mdata).__name__}. For an AnnData use setup_anndata."
        raise DataError(message)
    if not isinstance(modalities, Mapping | None):
        message = (
            f"modalities must be a dict such as {{'atac': ..., 'rna': ...}}, found {modalities!r} "
            f"({type(modalities).__name__})."
        )
        raise ConfigError(message)
    names = {MOD_ATAC: MOD_ATAC, MOD_RNA: MOD_RNA}
    for key, name in (modalities or {}).items():
        if key not in names:
            message = f"modalities holds the unknown entry '{key}'. {nearest(key, names)}"
            raise ConfigError(message)
        names[key] = name
    if names[MOD_ATAC] == names[MOD_RNA]:
        message = f"modalities names '{names[MOD_ATAC]}' twice: ATAC and RNA must be two modalities."
        raise ConfigError(message)
    for key, name in names.items():
        if name not in mdata.mod and (key == MOD_ATAC or needs_rna):
            message = (
                f"The MuData has no modality '{name}' for '{key}'. {nearest(name, mdata.mod)} "
                f"Name it with modalities={{'{key}': ...}}."
            )
            raise DataError(message)
    return names[MOD_ATAC], names[MOD_RNA]
