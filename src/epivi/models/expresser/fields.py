"""The registry field of Expresser: counts of genes, their names and aliases, and which data set measures which gene."""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
from scvi import REGISTRY_KEYS
from scvi.data.fields import LayerField

from epivi import _validate
from epivi._errors import DataError
from epivi._keys import OBS_DATASET, OBS_N_EXPRESSED, VARM_MEASURED
from epivi.data.sparse import SparseReader
from epivi.models.expresser.encoding import SCALE, column_map, relative_bins

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from anndata import AnnData
    from scipy import sparse

logger = logging.getLogger(__name__)

NAMES, ALIASES = "column_names", "aliases"
# positions of the known columns of the data, and their rows of the gene table
KNOWN, ROWS = "known_columns", "gene_rows"
DATASETS, MEASURED = "datasets", "measured"
KIND = "input_kind"
COUNTS, LOGNORM = "counts", "lognorm"
LEAST_SHARE = 0.5
SUM_TOLERANCE = 0.01
CHUNK = 4096
# cells that the report on bins looks at
N_REPORTED = 2000
_VERSION = re.compile(r"^(ENS[A-Z]*G\d{11})\.\d+")


def without_version(names: Iterable[str]) -> list[str]:
    """Return Ensembl gene identifiers without their version; other names are as they were.

    Examples
    --------
    >>> without_version(["ENSG00000141510.18", "ENSG00000002586.20_PAR_Y", "RP11-34P13.7", "HLA.A"])
    ['ENSG00000141510', 'ENSG00000002586_PAR_Y', 'RP11-34P13.7', 'HLA.A']
    """
    return [_VERSION.sub(r"\1", str(name)) for name in names]


def gene_names(adata: AnnData, gene_key: str | None, *, where: str = "adata") -> np.ndarray:
    """Return the names of the genes, of var_names or a column of var, Ensembl versions cut off.

    Raises
    ------
    DataError
        If the column is missing or has missing values, or a name occurs twice.
    """
    place = f"{where}.var_names" if gene_key is None else f"{where}.var['{gene_key}']"
    if gene_key is None:
        given = pd.Series(adata.var_names.to_numpy())
    else:
        _validate.check_key(adata.var, gene_key, where=f"{where}.var")
        given = pd.Series(adata.var[gene_key].to_numpy())
    if (n_missing := int(given.isna().sum())) > 0:
        message = f"{place} has {n_missing} missing values: every gene needs a name."
        raise DataError(message)
    names = pd.Index(without_version(given.astype(str)))
    if not names.is_unique:
        twice = names[names.duplicated()].unique()[:5].tolist()
        message = (
            f"{place} holds genes twice: {twice} (Ensembl versions are cut off). "
            "epivi.pp.collapse_genes(adata) sums their counts."
        )
        raise DataError(message)
    return names.to_numpy(dtype=np.str_)


class Matched(NamedTuple):
    """Columns of the data that are genes of the vocabulary."""

    known: np.ndarray
    rows: np.ndarray


def matched(vocabulary: np.ndarray, aliases: np.ndarray, adata: AnnData, gene_key: str | None) -> Matched:
    """Match genes by name: those of the declared column or of var_names, with the names or aliases of the vocabulary.

    Of the combinations the one that finds most genes is taken, the declared one where they are equal.
    """
    sources = [gene_key, None] if gene_key is not None and gene_key in adata.var else [None]
    best = Matched(np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64))
    for source in sources:
        names = pd.Index(gene_names(adata, source))
        for known_names in (vocabulary, aliases):
            index = pd.Index(known_names)
            if not index.size or not index.is_unique:
                continue
            rows = index.get_indexer(names)
            if (rows >= 0).sum() > best.known.size:
                best = Matched(np.flatnonzero(rows >= 0), rows[rows >= 0] + 1)
    return best


class ExpressionField(LayerField):
    """Expression of genes (cells × genes), as counts or log-normalised, in memory or on disk.

    Parameters
    ----------
    layer
        Layer; ``None`` stands for X.
    gene_key
        Column of var that names the genes; ``None`` stands for var_names.
    dataset_key
        Column of obs that tells the data sets apart, where ``varm["measured"]`` tells which genes each measures.
    kind
        ``"counts"`` or ``"lognorm"``.
    empty_cells
        ``"keep"`` or ``"raise"``.
    """

    def __init__(
        self,
        layer: str | None,
        *,
        gene_key: str | None = None,
        dataset_key: str | None = None,
        kind: str = COUNTS,
        empty_cells: str = "keep",
    ) -> None:
        super().__init__(REGISTRY_KEYS.X_KEY, layer, is_count_data=False, correct_data_format=False)
        self.where = "adata.X" if layer is None else f"adata.layers['{layer}']"
        self.gene_key = gene_key
        self.dataset_key = dataset_key
        self.kind = kind
        self.empty_cells = empty_cells

    def register_field(self, adata: AnnData) -> dict:
        """Register the genes and what measures them; store the number of expressed genes of each cell."""
        names = gene_names(adata, self.gene_key)
        if names.size < 2:
            message = f"adata has {names.size} genes; at least 2 are needed."
            raise DataError(message)
        self._check_values(adata)
        state = super().register_field(adata)
        aliases = np.array([], dtype=np.str_)
        if self.gene_key is not None:
            aliases = np.asarray(without_version(adata.var_names), dtype=np.str_)
        columns = np.arange(1, names.size + 1)
        state |= {NAMES: names, ALIASES: aliases, KIND: self.kind, KNOWN: columns - 1, ROWS: columns}
        state |= self._measured(adata, names.size, Matched(columns - 1, columns))
        n_expressed = self._count(adata, columns)[0]
        self._store(adata, n_expressed)
        return state

    def transfer_field(self, state_registry: dict, adata_target: AnnData, **kwargs: Any) -> dict:  # noqa: ARG002
        """Match the genes of other data to the vocabulary: unknown ones are left out, missing ones are not expressed.

        Raises
        ------
        DataError
            If less than half of the counts lie on known genes, or as at the registration.
        """
        self._check_values(adata_target)
        vocabulary, aliases = (np.asarray(state_registry[key], dtype=np.str_) for key in (NAMES, ALIASES))
        found = matched(vocabulary, aliases, adata_target, self.gene_key)
        n_expressed, share = self._count(adata_target, column_map(adata_target.n_vars, found.known, found.rows))
        if share < LEAST_SHARE:
            own = gene_names(adata_target, self.gene_key if self.gene_key in adata_target.var else None)[:3].tolist()
            message = (
                f"{share:.0%} of the counts of {self.where} lie on the {found.known.size} of {vocabulary.size} genes "
                f"that the model knows; at least {LEAST_SHARE:.0%} are needed. The data's names look like {own}, the "
                f"model's like {vocabulary[:3].tolist()}: name the genes alike, in var_names or a column of var."
            )
            raise DataError(message)
        if found.known.size < max(vocabulary.size, adata_target.n_vars):
            logger.info(
                "%d of the %d genes of the model are in the data, with %.1f%% of their counts; %d genes of the data "
                "are unknown and left out.",
                found.known.size,
                vocabulary.size,
                100 * share,
                adata_target.n_vars - found.known.size,
            )
        self._store(adata_target, n_expressed)
        kept = {key: state_registry[key] for key in (self.N_VARS_KEY, NAMES, ALIASES, KIND)}
        kept |= {self.N_OBS_KEY: adata_target.n_obs, KNOWN: found.known, ROWS: found.rows}
        tells_sets = self.dataset_key in adata_target.obs and VARM_MEASURED in adata_target.varm
        # data without that table are one data set, which measures the genes that it has
        return kept | self._measured(adata_target, vocabulary.size, found, is_one=not tells_sets)

    def make_reader(self, adata: AnnData, state: Mapping[str, Any]) -> SparseReader:  # noqa: ARG002
        """Return the reader of the rows, in the columns of the data; rows on disk are read when they are asked for."""
        return SparseReader(self.get_field_data(adata))

    def _check_values(self, adata: AnnData) -> None:
        matrix = self.get_field_data(adata)
        if self.kind == COUNTS:
            others = {name: adata.layers[name] for name in adata.layers if name not in (None, self.attr_key)}
            start = 0
            # of several stores each is checked by itself
            for part in getattr(matrix, "parts", [matrix]):
                names = adata.obs_names[start : start + part.shape[0]]
                _validate.check_counts(part, where=self.where, obs_names=names, alternatives=others)
                start += part.shape[0]
            return
        sums = []
        for start, rows in _slabs(matrix):
            bad = ~np.isfinite(rows.data) | (rows.data < 0)
            if bad.any():
                at = int(np.flatnonzero(bad)[0])
                cell = int(np.searchsorted(rows.indptr, at, side="right")) - 1
                message = (
                    f"{self.where}: cell '{adata.obs_names[start + cell]}', gene '{adata.var_names[rows.indices[at]]}' "
                    f"holds {rows.data[at]:g}. Log-normalised values are finite and at least 0; counts need "
                    "input_kind='counts'."
                )
                raise DataError(message)
            rows.data = np.expm1(rows.data.astype(np.float64))
            sums.append(np.asarray(rows.sum(1)).ravel())
        sums_n = np.concatenate(sums)
        sums_n = sums_n[sums_n > 0]
        if not sums_n.size or np.ptp(sums_n) > SUM_TOLERANCE * np.median(sums_n):
            span = "nothing" if not sums_n.size else f"between {sums_n.min():.4g} and {sums_n.max():.4g}"
            message = (
                f"{self.where} is not log-normalised: expm1 of its values sums to {span} in a cell, where one sum is "
                "expected for all. Give raw counts (input_kind='counts'), or normalise before genes are selected."
            )
            raise DataError(message)

    def _count(self, adata: AnnData, columns: np.ndarray) -> tuple[np.ndarray, float]:
        """Return the expressed known genes of each cell, and the share of all counts that lies on known genes."""
        n_expressed, known_sum, total = [], 0.0, 0.0
        for _, rows in _slabs(self.get_field_data(adata)):
            is_known_o = columns[rows.indices] > 0
            n_known = np.concatenate([[0], np.cumsum(is_known_o)])[rows.indptr]
            n_expressed.append(np.diff(n_known))
            known_sum += float(rows.data[is_known_o].sum())
            total += float(rows.data.sum())
        return np.concatenate(n_expressed), known_sum / max(total, 1e-12)

    def _store(self, adata: AnnData, n_expressed: np.ndarray) -> None:
        empty = np.flatnonzero(n_expressed == 0)
        if empty.size and self.empty_cells == "raise":
            message = (
                f"{empty.size} of {adata.n_obs} cells of {self.where} express no gene of the vocabulary (first: "
                f"{adata.obs_names[empty[:3]].tolist()}). Remove them, or keep them with empty_cells='keep': their "
                "representation is NaN."
            )
            raise DataError(message)
        if few := int((n_expressed < 2).sum()):
            logger.warning(
                "%d of %d cells express fewer than two genes: nothing of them can be hidden and predicted.",
                few,
                adata.n_obs,
            )
        adata.obs[OBS_N_EXPRESSED] = n_expressed.astype(np.int64)

    def _measured(self, adata: AnnData, n_genes: int, found: Matched, *, is_one: bool = False) -> dict[str, Any]:
        """Return the data sets and which genes of the vocabulary each measures, (c, m)."""
        if is_one or self.dataset_key is None:
            measured = np.zeros((1, n_genes), dtype=bool)
            measured[0, found.rows - 1] = True
            return {DATASETS: np.array([], dtype=np.str_), MEASURED: measured}
        if VARM_MEASURED not in adata.varm:
            message = (
                f"dataset_key='{self.dataset_key}' needs varm['{VARM_MEASURED}'], which genes each data set measures: "
                "epivi.pp.union_genes(...) writes it."
            )
            raise DataError(message)
        _validate.check_categorical(adata.obs, self.dataset_key, where="adata.obs")
        table = pd.DataFrame(adata.varm[VARM_MEASURED]).astype(bool)
        found_sets = pd.unique(adata.obs[self.dataset_key].astype(str)).tolist()
        if lacking := sorted(set(found_sets) - set(table.columns.astype(str))):
            message = (
                f"varm['{VARM_MEASURED}'] has no column for the data sets {lacking[:3]} of obs['{self.dataset_key}']."
            )
            raise DataError(message)
        measured = np.zeros((table.shape[1], n_genes), dtype=bool)
        measured[:, found.rows - 1] = table.to_numpy()[found.known].T
        return {DATASETS: table.columns.astype(str).to_numpy(dtype=np.str_), MEASURED: measured}


def default_dataset_key(adata: AnnData, dataset_key: str | None) -> str | None:
    """Return the column of the data sets: the one given, or that of :func:`epivi.pp.union_genes` if it is there."""
    if dataset_key is None and VARM_MEASURED in adata.varm and OBS_DATASET in adata.obs:
        logger.info("varm['%s'] is there: obs['%s'] tells the data sets apart.", VARM_MEASURED, OBS_DATASET)
        return OBS_DATASET
    return dataset_key


def _slabs(matrix: Any) -> Iterator[tuple[int, sparse.csr_matrix]]:
    """Yield the first row and the compressed rows of slabs of a matrix, without stored zeros."""
    reader = SparseReader(matrix)
    for start in range(0, matrix.shape[0], CHUNK):
        yield start, reader.rows(np.arange(start, min(start + CHUNK, matrix.shape[0])))


def bin_occupancy(counts: sparse.csr_matrix, n_bins: int) -> dict[str, float]:
    """Return how the non-zero values of cells fall into the bins relative to each cell's maximum.

    Parameters
    ----------
    counts
        Counts, cells × genes.
    n_bins
        Bins k.

    Returns
    -------
    ``n_occupied``: bins that occur; ``n_effective``: exponential of their entropy; ``single_counts``: share of the
    values that are a count of 1.

    Examples
    --------
    >>> from scipy import sparse
    >>> bin_occupancy(sparse.csr_matrix([[1, 1, 0], [3, 1, 0]]), 10)["n_occupied"]
    2.0
    """
    n_cells = counts.shape[0]
    cell_o = np.repeat(np.arange(n_cells), np.diff(counts.indptr))
    total_b = np.bincount(cell_o, counts.data, minlength=n_cells)
    value_o = np.log1p(SCALE * counts.data / total_b[cell_o])
    maximum_b = np.zeros(n_cells)
    np.maximum.at(maximum_b, cell_o, value_o)
    share = np.bincount(relative_bins(value_o, maximum_b[cell_o], n_bins)) / max(value_o.size, 1)
    share = share[share > 0]
    return {
        "n_occupied": float(share.size),
        "n_effective": float(np.exp(-(share * np.log(share)).sum())),
        "single_counts": float((counts.data == 1).mean()) if counts.data.size else 0.0,
    }
