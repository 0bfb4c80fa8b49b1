"""Registry fields of EpiFoundation: peaks with their places, genes of the same cells, labels that a query may lack."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy import sparse
from scvi.data.fields import BaseAnnDataField, MuDataWrapper

from epivi import _validate
from epivi._errors import DataError
from epivi._keys import BATCH_RNA, OBS_N_OPEN, VAR_CHROM, VAR_END, VAR_START
from epivi.data.fields import INDEXER, CategoryField, PeaksField
from epivi.data.sparse import SparseReader, modality_rows
from epivi.pp.features import peak_coordinates
from epivi.pp.genome.regions import natural_chromosome_order

if TYPE_CHECKING:
    from collections.abc import Mapping

    from anndata import AnnData
    from mudata import MuData

    from epivi._validate import CountSummary

logger = logging.getLogger(__name__)

CHROM_CODES = "chrom_codes"
CHROM_NAMES = "chrom_names"
CHROM_LENGTHS = "chrom_lengths"
POSITIONS = "positions"
FREQUENCY = "frequency"
MEAN = "mean"
NAMES = "column_names"
UNKNOWN = -1
NO_POSITION = 0


def places(regions: pd.DataFrame | None, n: int, chromosomes: Mapping[str, int]) -> tuple[np.ndarray, np.ndarray]:
    """Return chromosome codes (-1 unknown) and midpoints in bp of features, each of shape (n,).

    Examples
    --------
    >>> frame = pd.DataFrame({"chrom": ["chr2", "chrX"], "start": [10, 0], "end": [20, 4]})
    >>> [values.tolist() for values in places(frame, 2, {"chr2": 0})]
    [[0, -1], [15, 2]]
    """
    if regions is None:
        return np.full(n, UNKNOWN), np.full(n, NO_POSITION)
    codes = np.array([chromosomes.get(name, UNKNOWN) for name in regions[VAR_CHROM].astype(str)], dtype=np.int64)
    middle = (regions[VAR_START].to_numpy() + regions[VAR_END].to_numpy()) // 2
    return codes, middle.astype(np.int64)


def gene_places(var: pd.DataFrame) -> dict[str, np.ndarray]:
    """Return chromosomes, bodies and midpoints of genes as far as a table tells them; -1 for a body that it lacks.

    Examples
    --------
    >>> table = gene_places(pd.DataFrame({"chrom": ["chr1", "chr1"], "start": [10, None], "end": [30, 40]}))
    >>> table["start"].tolist(), table["positions"].tolist()
    ([10, -1], [20, -1])
    """
    if VAR_CHROM not in var:
        return {VAR_CHROM: np.array([], dtype=np.str_), POSITIONS: np.array([], dtype=np.int64)}
    found = {VAR_CHROM: var[VAR_CHROM].astype(str).to_numpy().astype(np.str_), POSITIONS: np.array([], dtype=np.int64)}
    if {VAR_START, VAR_END} <= set(var.columns):
        start, end = (
            pd.to_numeric(var[key]).to_numpy(dtype=np.float64, na_value=np.nan) for key in (VAR_START, VAR_END)
        )
        told = np.isfinite(start) & np.isfinite(end)
        start, end = (np.where(told, value, -1).astype(np.int64) for value in (start, end))
        found |= {VAR_START: start, VAR_END: end, POSITIONS: np.where(told, (start + end) // 2, -1)}
    return found


class PeakTokensField(PeaksField):
    """Peaks with their places; matched to a trained vocabulary by name.

    Parameters
    ----------
    registry_key, layer, where
        As in :class:`epivi.data.fields.PeaksField`.
    vocabulary
        What a trained model registered: the peaks are matched to it instead of being registered anew.
    empty_cells
        ``"raise"`` refuses cells without open peak; ``"zero"`` keeps them.
    new_peaks
        ``"raise"`` refuses peaks that the vocabulary lacks or has beside them; ``"position"`` reads any peaks, those
        without a name in the vocabulary by their position alone.
    """

    def __init__(
        self,
        registry_key: str,
        layer: str | None,
        *,
        where: str = "adata",
        vocabulary: Mapping[str, Any] | None = None,
        empty_cells: str = "raise",
        new_peaks: str = "raise",
    ) -> None:
        super().__init__(registry_key, layer, where=where)
        self.holder = where
        self.vocabulary = vocabulary
        self.empty_cells = empty_cells
        self.new_peaks = new_peaks

    def _checked(self, adata: AnnData) -> CountSummary:
        summary = super()._checked(adata)
        self._refuse_empty(adata, summary.n_open, "open peak")
        return summary

    def _refuse_empty(self, adata: AnnData, n_open: np.ndarray, what: str) -> None:
        """Refuse cells without token, unless they were asked for."""
        empty = np.flatnonzero(n_open == 0)
        if empty.size and self.empty_cells == "raise":
            message = (
                f"{empty.size} of {adata.n_obs} cells of {self.where} have no {what} (first: "
                f"{adata.obs_names[empty[:3]].tolist()}). Remove them (epivi.pp.filter_cells does, by the peaks of the "
                "data), or keep them with empty_cells='zero': they are then represented alike."
            )
            raise DataError(message)

    def register_field(self, adata: AnnData) -> dict:
        """Register the peaks, or match them to the vocabulary."""
        if self.vocabulary is not None:
            return self.transfer_field(dict(self.vocabulary), adata)
        if not adata.var_names.is_unique:
            twice = adata.var_names[adata.var_names.duplicated()][:3].tolist()
            message = f"{self.holder}.var_names holds peaks twice: {twice}. Merge or rename them."
            raise DataError(message)
        state = super().register_field(adata)
        regions = peak_coordinates(adata)
        names = [] if regions is None else natural_chromosome_order(regions[VAR_CHROM].astype(str).unique())
        codes, middle = places(regions, adata.n_vars, {name: code for code, name in enumerate(names)})
        ends = [int(regions[VAR_END][regions[VAR_CHROM].astype(str) == name].max()) for name in names]  # type: ignore[index]
        more = {CHROM_NAMES: np.array(names, dtype=np.str_), CHROM_LENGTHS: np.array(ends, dtype=np.int64)}
        if regions is not None:
            more |= {key: regions[key].to_numpy() for key in (VAR_START, VAR_END)}
        return state | more | {CHROM_CODES: codes, POSITIONS: middle}

    def transfer_field(self, state_registry: dict, adata_target: AnnData, **kwargs: Any) -> dict:
        """Match other data to the trained peaks, by name or, where that was asked for, by position."""
        kept = {key: state_registry[key] for key in (CHROM_NAMES, CHROM_LENGTHS, CHROM_CODES, POSITIONS)}
        kept |= {key: state_registry[key] for key in (VAR_START, VAR_END) if key in state_registry}
        trained = pd.Index(np.asarray(state_registry[self.COLUMN_NAMES_KEY], dtype=str))
        if self.new_peaks == "position":
            return kept | self._by_position(state_registry, trained, adata_target)
        known = adata_target.var_names.isin(trained).sum()
        if known < len(trained):
            message = (
                f"{self.holder} has {known} of the {len(trained)} peaks that the model reads (its own: "
                f"{adata_target.var_names[:2].tolist()}, the model's: {trained[:2].tolist()}). Map the cells onto the "
                "model's peaks by genomic overlap first: adata = model.project_peaks(adata)."
            )
            raise DataError(message)
        matched = super().transfer_field(state_registry, adata_target, **kwargs)
        self._refuse_empty(adata_target, adata_target.obs[OBS_N_OPEN].to_numpy(), "open peak among those of the model")
        return kept | matched

    def _by_position(self, state: dict, trained: pd.Index, adata: AnnData) -> dict:
        """Register peaks as they are, each with the row of its name in the vocabulary, -1 without."""
        summary = self._checked(adata)
        adata.obs[OBS_N_OPEN] = summary.n_open.astype(np.float64)
        regions = peak_coordinates(adata)
        if regions is None:
            message = (
                f"{self.holder} has peaks without positions (columns chrom, start, end, or names like chr1:100-200)."
            )
            raise DataError(message)
        names = {str(name): code for code, name in enumerate(state[CHROM_NAMES])}
        codes, middle = places(regions, adata.n_vars, names)
        if (codes == UNKNOWN).all():
            found = regions[VAR_CHROM].astype(str).unique()[:3].tolist()
            message = (
                f"No chromosome of {self.holder} ({found}, ...) is one of the model's ({list(names)[:3]}, ...): "
                "is it the same genome, and are the names written alike?"
            )
            raise DataError(message)
        query = {"query_rows": trained.get_indexer(adata.var_names), "query_chrom": codes, "query_position": middle}
        kept = {key: value for key, value in state.items() if not key.startswith("query_")}
        return kept | query | {self.N_OBS_KEY: adata.n_obs, INDEXER: None}


class GenesField(BaseAnnDataField):
    """Expression of the same cells (cells × genes) in another modality; cells may lack it, and so may all of the data.

    Parameters
    ----------
    modality
        Modality of a MuData that holds it; ``None`` for data without expression.
    layer
        Layer; ``None`` stands for X.
    kind
        ``"counts"``, or ``"lognorm"`` for log-normalised values.
    vocabulary
        What a trained model registered: genes are matched to it.
    """

    def __init__(
        self,
        modality: str | None,
        layer: str | None,
        *,
        kind: str = "counts",
        vocabulary: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.modality = modality
        self.layer = layer
        self.kind = kind
        self.vocabulary = vocabulary

    @property
    def registry_key(self) -> str:
        """Key in the registry."""
        return BATCH_RNA

    @property
    def attr_name(self) -> str:
        """Attribute that holds the values."""
        return "X" if self.layer is None else "layers"

    @property
    def attr_key(self) -> str | None:
        """Layer that holds the values."""
        return self.layer

    @property
    def mod_key(self) -> str | None:
        """Modality that holds the values."""
        return self.modality

    @property
    def is_empty(self) -> bool:
        """Never empty for scvi-tools, which would forget the genes of the vocabulary."""
        return False

    def get_data_registry(self) -> dict:
        """Return where the values are; nothing if there are none."""
        return {} if self.modality is None else super().get_data_registry()

    @property
    def where(self) -> str:
        """How messages call the values."""
        held = f"mdata['{self.modality}']"
        return f"{held}.X" if self.layer is None else f"{held}.layers['{self.layer}']"

    def _matrix(self, data: MuData) -> Any:
        holder = data.mod[str(self.modality)]
        if self.layer is None:
            return holder.X
        _validate.check_key(holder.layers, self.layer, where=f"mdata['{self.modality}'].layers")
        return holder.layers[self.layer]

    def validate_field(self, adata: Any) -> None:
        """Check that modality and layer are there."""
        if self.modality is not None:
            self._matrix(adata)

    def _check_values(self, data: MuData) -> None:
        matrix = self._matrix(data)
        holder = data.mod[str(self.modality)]
        if self.kind == "counts":
            _validate.check_counts(matrix, where=self.where, obs_names=holder.obs_names)
            return
        values = matrix.data if sparse.issparse(matrix) else np.asarray(matrix)
        bad = ~np.isfinite(values) | (values < 0)
        if bad.any():
            message = (
                f"{self.where} holds {int(bad.sum())} values that are negative or not finite (first: "
                f"{values[bad].ravel()[0]}). Log-normalised values are finite and at least 0; for counts take "
                "rna_kind='counts'."
            )
            raise DataError(message)

    def register_field(self, adata: Any) -> dict:
        """Register the genes, their places and in which share of the cells each is expressed."""
        if self.vocabulary is not None:
            return self.transfer_field(dict(self.vocabulary), adata)
        if self.modality is None:
            return {NAMES: np.array([], dtype=np.str_)}
        self._check_values(adata)
        holder = adata.mod[self.modality]
        if holder.n_vars < 2:
            message = f"mdata['{self.modality}'] has {holder.n_vars} genes; at least 2 are needed."
            raise DataError(message)
        if not holder.var_names.is_unique:
            twice = holder.var_names[holder.var_names.duplicated()][:3].tolist()
            message = (
                f"mdata['{self.modality}'].var_names holds genes twice: {twice}. epivi.pp.collapse_genes sums them."
            )
            raise DataError(message)
        matrix = sparse.csr_matrix(self._matrix(adata), copy=True)
        matrix.sum_duplicates()
        matrix.eliminate_zeros()
        expressed = np.bincount(matrix.indices, minlength=holder.n_vars)
        frequency = (expressed + 0.5) / (max(int((np.diff(matrix.indptr) > 0).sum()), 1) + 1.0)
        return {
            NAMES: np.asarray(holder.var_names, dtype=np.str_),
            "kind": self.kind,
            FREQUENCY: frequency,
            INDEXER: None,
        } | gene_places(holder.var)

    def transfer_field(self, state_registry: dict, adata_target: Any, **kwargs: Any) -> dict:  # noqa: ARG002
        """Match the genes of other data to those of training, by name; data without expression are taken."""
        state = dict(state_registry)
        if self.modality is None:
            return state
        names = np.asarray(state[NAMES])
        if not names.size:
            return GenesField(self.modality, self.layer, kind=self.kind).register_field(adata_target)
        self._check_values(adata_target)
        holder = adata_target.mod[self.modality]
        state[INDEXER] = _validate.check_same_features(names, holder.var_names, where=f"mdata['{self.modality}']")
        return state

    def get_summary_stats(self, state_registry: dict) -> dict:
        """Return the number of genes."""
        return {"n_genes": len(state_registry[NAMES])}

    def view_state_registry(self, state_registry: dict) -> None:
        """Show nothing: the genes have no state worth a table."""

    def make_reader(self, data: MuData, state: Mapping[str, Any]) -> SparseReader:
        """Return the reader of the rows; cells without expression read as empty."""
        indexer = state[INDEXER]
        return SparseReader(
            self._matrix(data),
            indexer=None if indexer is None else np.asarray(indexer),
            row_map=modality_rows(data, str(self.modality)),
            prefix=BATCH_RNA,
        )


class QueryCategoryField(CategoryField):
    """A categorical obs column that data read by a trained model may lack, or have with further categories.

    Neither the batch nor the label of a cell enters its representation, so that both may be unknown there.
    """

    def transfer_field(self, state_registry: dict, adata_target: AnnData, **kwargs: Any) -> dict:
        """Match categories with those of training; new ones are appended, a missing column takes the first of them."""
        known = [str(c) for c in state_registry[self.CATEGORICAL_MAPPING_KEY]]
        key = self._original_attr_key
        kwargs.setdefault("extend_categories", True)
        if not self.is_default and key not in adata_target.obs:
            logger.info("The data have no column '%s'; it is not needed to read them.", key)
            adata_target.obs[key] = pd.Categorical([known[0]] * adata_target.n_obs)
            try:
                return super().transfer_field(state_registry, adata_target, **kwargs)
            finally:
                del adata_target.obs[key]
        return super().transfer_field(state_registry, adata_target, **kwargs)


MuDataPeakTokensField = MuDataWrapper(PeakTokensField)
MuDataQueryCategoryField = MuDataWrapper(QueryCategoryField)
