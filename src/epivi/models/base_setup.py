"""What setups of all models share: checks of obs columns and arguments, fields of covariates, registration."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from mudata import MuData
from scvi import REGISTRY_KEYS
from scvi.data._manager import AnnDataManagerValidationCheck
from scvi.data.fields import MuDataNumericalJointObsField, NumericalJointObsField

from epivi import _validate
from epivi._errors import ConfigError, DataError, nearest
from epivi._keys import MOD_ATAC, MOD_RNA
from epivi.data.fields import CategoryField, JointCategoryField, MuDataCategoryField, MuDataJointCategoryField
from epivi.data.sparse import SparseDataManager

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import pandas as pd
    from anndata import AnnData
    from scvi.model.base import BaseModelClass

TRANSFER = ("source_registry", "extend_categories", "allow_missing_labels")


def check_transfer(setup: Callable[..., None], transfer: Mapping[str, Any]) -> None:
    """Check that what a setup got beyond its arguments is what scvi-tools hands on to transfer a setup.

    Raises
    ------
    ConfigError
        If it holds anything else; the nearest argument is given.
    """
    for key in transfer:
        if key not in TRANSFER:
            known = inspect.signature(setup).parameters
            message = f"Unknown argument '{key}' of {setup.__name__}. {nearest(key, known)}"
            raise ConfigError(message)


@dataclass(frozen=True, kw_only=True)
class ObsKeys:
    """The columns of obs that a model reads.

    Parameters
    ----------
    batch_key, labels_key
        Sample and cell type; ``None`` where there are none.
    categorical, continuous
        Further covariates.

    Examples
    --------
    >>> ObsKeys(batch_key="sample", continuous=["age"]).used
    ['sample', 'age']
    """

    batch_key: str | None = None
    labels_key: str | None = None
    categorical: Sequence[str] | None = None
    continuous: Sequence[str] | None = None

    @classmethod
    def of(cls, setup_method_args: Mapping[str, Any]) -> Self:
        """Return the columns among the arguments of a setup, as scvi-tools stores them.

        Examples
        --------
        >>> ObsKeys.of({"setup_args": {"batch_key": "sample", "continuous_covariate_keys": ["age"]}}).used
        ['sample', 'age']
        """
        arguments = setup_method_args["setup_args"]
        return cls(
            batch_key=arguments.get("batch_key"),
            labels_key=arguments.get("labels_key"),
            categorical=arguments.get("categorical_covariate_keys"),
            continuous=arguments.get("continuous_covariate_keys"),
        )

    @property
    def used(self) -> list[str]:
        """All keys that were given."""
        keys = (self.batch_key, self.labels_key, *(self.categorical or ()), *(self.continuous or ()))
        return [key for key in keys if key is not None]

    def check(self, obs: pd.DataFrame, *, where: str) -> None:
        """Check the columns.

        Raises
        ------
        DataError
            If a key is missing, or a column holds missing or unfit values.
        ConfigError
            If a key is named twice.
        """
        _validate.check_keys_distinct(self.batch_key, self.categorical, self.continuous)
        for key in (self.batch_key, self.labels_key, *(self.categorical or ())):
            if key is not None:
                _validate.check_categorical(obs, key, where=where)
        for key in self.continuous or ():
            _validate.check_continuous(obs, key, where=where)

    def check_mudata(self, mdata: MuData, modality: str) -> str | None:
        """Check the columns of ``mdata.obs``, or of a modality's obs where that one holds them.

        Returns
        -------
        The modality whose obs holds all keys, or ``None`` for ``mdata.obs``, which comes first.
        """
        held = not all(key in mdata.obs for key in self.used) and all(
            key in mdata.mod[modality].obs for key in self.used
        )
        self.check(
            mdata.mod[modality].obs if held else mdata.obs, where=f"mdata['{modality}'].obs" if held else "mdata.obs"
        )
        return modality if held else None

    def fields(self) -> list[Any]:
        """Return the fields of an AnnData."""
        return [
            CategoryField(REGISTRY_KEYS.BATCH_KEY, self.batch_key),
            CategoryField(REGISTRY_KEYS.LABELS_KEY, self.labels_key),
            JointCategoryField(REGISTRY_KEYS.CAT_COVS_KEY, self.categorical),
            NumericalJointObsField(REGISTRY_KEYS.CONT_COVS_KEY, self.continuous),
        ]

    def mudata_fields(self, mod_key: str | None) -> list[Any]:
        """Return the fields of a MuData, read from a modality's obs or, with ``None``, from ``mdata.obs``."""
        return [
            MuDataCategoryField(REGISTRY_KEYS.BATCH_KEY, self.batch_key, mod_key=mod_key),
            MuDataCategoryField(REGISTRY_KEYS.LABELS_KEY, self.labels_key, mod_key=mod_key),
            MuDataJointCategoryField(REGISTRY_KEYS.CAT_COVS_KEY, self.categorical, mod_key=mod_key),
            MuDataNumericalJointObsField(REGISTRY_KEYS.CONT_COVS_KEY, self.continuous, mod_key=mod_key),
        ]


def register(
    cls: type[BaseModelClass],
    data: AnnData | MuData,
    fields: Sequence[Any],
    setup_method_args: dict[str, Any],
    transfer: Mapping[str, Any],
) -> None:
    """Register the fields of a setup; modalities need not hold the same cells."""
    manager = SparseDataManager(
        fields=list(fields),
        setup_method_args=setup_method_args,
        validation_checks=AnnDataManagerValidationCheck(check_fully_paired_mudata=False),
    )
    manager.register_fields(data, **transfer)
    cls.register_manager(manager)


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
