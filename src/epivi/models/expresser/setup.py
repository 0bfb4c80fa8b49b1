"""What Expresser reads of an AnnData of genes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from scvi import REGISTRY_KEYS
from scvi.data.fields import NumericalObsField

from epivi import _validate
from epivi._errors import DataError
from epivi.models.base_setup import ObsKeys, check_transfer, register
from epivi.models.expresser.fields import COUNTS, LOGNORM, ExpressionField, default_dataset_key

if TYPE_CHECKING:
    from anndata import AnnData

INPUT_KINDS = (COUNTS, LOGNORM)
EMPTY_CELLS = ("keep", "raise")


class SetupMixin:
    """Setup of expression counts."""

    @classmethod
    def setup_anndata(  # noqa: PLR0913, PLR0917
        cls,
        adata: AnnData,
        layer: str | None = None,
        gene_key: str | None = None,
        batch_key: str | None = None,
        labels_key: str | None = None,
        size_factor_key: str | None = None,
        input_kind: str = COUNTS,
        dataset_key: str | None = None,
        empty_cells: str = "keep",
        **kwargs: Any,
    ) -> None:
        """Check an AnnData of genes and register what the model reads.

        Parameters
        ----------
        adata
            Cells × genes, in memory or backed. Several data sets with different genes are joined by
            :func:`epivi.pp.union_genes`.
        layer
            Layer of the counts; X by default.
        gene_key
            Column of var that names the genes, such as ``"gene_ids"``; var_names by default. Versions of Ensembl
            identifiers are cut off. With it, var_names are kept as other names by which query data may be matched.
        batch_key, labels_key
            Columns of obs, for splits and reports; the model does not read them.
        size_factor_key
            Column of obs with the sum that each cell is normalised by, in place of that of its observed genes.
        input_kind
            ``"counts"``, or ``"lognorm"`` for values normalised to one sum and log1p.
        dataset_key
            Column of obs that tells the data sets apart, where ``varm["measured"]`` (genes × data sets) tells which
            genes each measures. By default ``"dataset"`` if that table is there.
        empty_cells
            ``"keep"`` cells without expressed gene: they add no loss and their representation is NaN; or ``"raise"``.
        kwargs
            Used by scvi-tools to transfer a setup.

        Raises
        ------
        DataError
            If the data cannot be used; the message says what was found, where, and what to do.
        ConfigError
            If an argument is not valid.
        """
        setup_method_args = cls._get_setup_method_args(**locals())  # type: ignore[attr-defined]
        check_transfer(cls.setup_anndata, kwargs)
        _validate.check_choice(input_kind, "input_kind", INPUT_KINDS)
        _validate.check_choice(empty_cells, "empty_cells", EMPTY_CELLS)
        _check_genes(adata, layer)
        if not kwargs.get("source_registry"):
            ObsKeys.of(setup_method_args).check(adata.obs, where="adata.obs")
        dataset_key = default_dataset_key(adata, dataset_key)
        if size_factor_key is not None:
            _validate.check_continuous(adata.obs, size_factor_key, where="adata.obs", positive=True)
        field = ExpressionField(
            layer, gene_key=gene_key, dataset_key=dataset_key, kind=input_kind, empty_cells=empty_cells
        )
        factor = NumericalObsField(REGISTRY_KEYS.SIZE_FACTOR_KEY, size_factor_key, required=False)
        register(cls, adata, [field, factor], setup_method_args, kwargs)


def _check_genes(adata: AnnData, layer: str | None) -> None:
    """Check that an object is an AnnData with the layer, and no view; genes are checked by their names later."""
    from anndata import AnnData

    if isinstance(adata, AnnData) and not adata.var_names.is_unique:
        twice = adata.var_names[adata.var_names.duplicated()].unique()[:5].tolist()
        message = f"adata.var_names holds genes twice: {twice}. epivi.pp.collapse_genes(adata) sums their counts."
        raise DataError(message)
    _validate.check_anndata(adata)
    if layer is not None:
        _validate.check_key(adata.layers, layer, where="adata.layers")
    if adata.is_view:
        message = "adata is a view of another AnnData: call .copy() on it first."
        raise DataError(message)
