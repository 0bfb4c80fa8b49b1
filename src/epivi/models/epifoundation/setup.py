"""What EpiFoundation reads of an AnnData of peaks, or of a MuData of peaks and genes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from scvi import REGISTRY_KEYS

from epivi import _validate
from epivi._errors import ConfigError, DataError, nearest
from epivi._keys import BATCH_RNA
from epivi.data.sparse import modality_rows
from epivi.models.base_setup import ObsKeys, check_transfer, modality_names, register
from epivi.models.epifoundation.fields import (
    GenesField,
    MuDataPeakTokensField,
    MuDataQueryCategoryField,
    PeakTokensField,
    QueryCategoryField,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from anndata import AnnData
    from mudata import MuData

RNA_KINDS = ("counts", "lognorm")
EMPTY_CELLS = ("raise", "zero")
NEW_PEAKS = ("raise", "position")
VOCABULARY = "vocabulary"


class SetupMixin:
    """Setup of peaks, and of the expression of the same cells."""

    @classmethod
    def setup_anndata(
        cls,
        adata: AnnData,
        layer: str | None = None,
        batch_key: str | None = None,
        labels_key: str | None = None,
        unlabeled_category: str | None = None,
        empty_cells: str = "raise",
        new_peaks: str = "raise",
        **kwargs: Any,
    ) -> None:
        """Check an AnnData of peaks and register what the model reads.

        Parameters
        ----------
        adata
            Cells × peaks, binary or counts: a peak is open where its entry is above 0. Positions are columns chrom,
            start and end of var, or names like ``chr1:100-200``; without them peaks have no chromosome.
        layer
            Layer of the counts; X by default.
        batch_key, labels_key
            Columns of obs.
        unlabeled_category
            Label of cells whose type is not known.
        empty_cells
            ``"raise"`` refuses cells without open peak; ``"zero"`` keeps them, all with one representation.
        new_peaks
            Of data read by a trained model: ``"raise"`` refuses peaks that are not the model's; ``"position"`` reads
            any peaks, which needs a model with ``positions="genome"``.
        kwargs
            Used to transfer a setup.

        Raises
        ------
        DataError
            If the data cannot be used; the message says what was found, where, and what to do.
        ConfigError
            If an argument is not valid.
        """
        vocabulary = kwargs.pop(VOCABULARY, None)
        setup_method_args = cls._get_setup_method_args(**locals())  # type: ignore[attr-defined]
        setup_method_args["setup_args"].pop(VOCABULARY)
        check_transfer(cls.setup_anndata, kwargs)
        options = _options(empty_cells, new_peaks, vocabulary)
        _check_peaks(adata, "adata", layer)
        keys = ObsKeys.of(setup_method_args)
        if not kwargs.get("source_registry"):
            keys.check(adata.obs, where="adata.obs")
            _check_unlabeled(adata.obs, labels_key, unlabeled_category)
        fields = [
            PeakTokensField(REGISTRY_KEYS.X_KEY, layer, **options),
            GenesField(None, None, vocabulary=_of(vocabulary, BATCH_RNA)),
            QueryCategoryField(REGISTRY_KEYS.BATCH_KEY, batch_key),
            QueryCategoryField(REGISTRY_KEYS.LABELS_KEY, labels_key),
        ]
        register(cls, adata, fields, setup_method_args, kwargs)

    @classmethod
    def setup_mudata(  # noqa: PLR0913, PLR0917
        cls,
        mdata: MuData,
        modalities: Mapping[str, str] | None = None,
        atac_layer: str | None = None,
        rna_layer: str | None = None,
        batch_key: str | None = None,
        labels_key: str | None = None,
        unlabeled_category: str | None = None,
        rna_kind: str = "counts",
        empty_cells: str = "raise",
        new_peaks: str = "raise",
        **kwargs: Any,
    ) -> None:
        """Check a MuData of peaks and genes and register what the model reads.

        Parameters
        ----------
        mdata
            MuData; every cell has ATAC, RNA may be missing for some.
        modalities
            Names of the modalities, by default ``{"atac": "atac", "rna": "rna"}``.
        atac_layer, rna_layer
            Layers; X by default.
        batch_key, labels_key
            Columns of ``mdata.obs``, or of the ATAC modality's obs.
        unlabeled_category
            Label of cells whose type is not known.
        rna_kind
            ``"counts"``, or ``"lognorm"`` for log-normalised values.
        empty_cells, new_peaks, kwargs
            As in :meth:`setup_anndata`.

        Raises
        ------
        DataError
            If the data cannot be used; the message says what was found, where, and what to do.
        ConfigError
            If an argument is not valid.
        """
        vocabulary = kwargs.pop(VOCABULARY, None)
        setup_method_args = cls._get_setup_method_args(**locals())  # type: ignore[attr-defined]
        setup_method_args["setup_args"].pop(VOCABULARY)
        check_transfer(cls.setup_mudata, kwargs)
        options = _options(empty_cells, new_peaks, vocabulary)
        _validate.check_choice(rna_kind, "rna_kind", RNA_KINDS)
        atac, named = modality_names(mdata, modalities, needs_rna=not kwargs.get("source_registry"))
        rna = named if named in mdata.mod else None
        where = f"mdata['{atac}']"
        _check_peaks(mdata.mod[atac], where, atac_layer)
        _check_cells(mdata, atac)
        keys = ObsKeys.of(setup_method_args)
        mod_key = None
        if not kwargs.get("source_registry"):
            mod_key = keys.check_mudata(mdata, atac)
            _check_unlabeled((mdata if mod_key is None else mdata.mod[mod_key]).obs, labels_key, unlabeled_category)
        elif any(key not in mdata.obs for key in keys.used):
            mod_key = atac
        fields = [
            MuDataPeakTokensField(
                REGISTRY_KEYS.X_KEY, atac_layer, mod_key=atac, mod_required=True, where=where, **options
            ),
            GenesField(rna, rna_layer, kind=rna_kind, vocabulary=_of(vocabulary, BATCH_RNA)),
            MuDataQueryCategoryField(REGISTRY_KEYS.BATCH_KEY, batch_key, mod_key=mod_key),
            MuDataQueryCategoryField(REGISTRY_KEYS.LABELS_KEY, labels_key, mod_key=mod_key),
        ]
        register(cls, mdata, fields, setup_method_args, kwargs)


def _options(empty_cells: str, new_peaks: str, vocabulary: Mapping[str, Any] | None) -> dict[str, Any]:
    """Check and gather what the field of the peaks is told."""
    _validate.check_choice(empty_cells, "empty_cells", EMPTY_CELLS)
    _validate.check_choice(new_peaks, "new_peaks", NEW_PEAKS)
    return {
        "empty_cells": empty_cells,
        "new_peaks": new_peaks,
        "vocabulary": _of(vocabulary, REGISTRY_KEYS.X_KEY),
    }


def _of(vocabulary: Mapping[str, Any] | None, key: str) -> Mapping[str, Any] | None:
    """Return what a trained model registered under a key."""
    return None if vocabulary is None else vocabulary[key]


def _check_peaks(adata: AnnData, where: str, layer: str | None) -> None:
    """Check that an object is an AnnData with the layer, and no view."""
    _validate.check_anndata(adata, where=where)
    if layer is not None:
        _validate.check_key(adata.layers, layer, where=f"{where}.layers")
    if adata.is_view:
        message = f"{where} is a view of another AnnData: call .copy() on it first."
        raise DataError(message)


def _check_cells(mdata: MuData, atac: str) -> None:
    """Check that every cell has peaks."""
    rows = modality_rows(mdata, atac)
    if rows is not None and (rows < 0).any():
        first = mdata.obs_names[rows < 0][:3].tolist()
        message = (
            f"{int((rows < 0).sum())} of {mdata.n_obs} cells have no '{atac}' (first: {first}), and cells are read by "
            f"their peaks. Keep the others: mdata = mdata[mdata['{atac}'].obs_names].copy()."
        )
        raise DataError(message)


def _check_unlabeled(obs: Any, labels_key: str | None, unlabeled_category: str | None) -> None:
    """Check that the category of unlabeled cells is one of the column's."""
    if unlabeled_category is None:
        return
    if labels_key is None:
        message = "unlabeled_category needs labels_key."
        raise ConfigError(message)
    known = [str(value) for value in np.unique(obs[labels_key].astype(str))]
    if str(unlabeled_category) not in known:
        message = (
            f"unlabeled_category='{unlabeled_category}' is no value of obs['{labels_key}']. "
            f"{nearest(unlabeled_category, known)}"
        )
        raise ConfigError(message)
