"""From registered rows to what the network reads of a cell: expressed genes as tokens, values of the observed ones.

Legend of shapes: n cells, b cells of the minibatch, o expressed genes of the minibatch, t tokens, q hidden genes,
m genes of the vocabulary, c data sets.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from scvi import REGISTRY_KEYS

from epivi import _keys as keys
from epivi.data.tokens import keep_limited, name_keys, pad_rows, take, token_hash

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import Tensor

    from epivi.models.expresser.config import ExpresserConfig

SCALE = 1e4
# log-normalised values lie within so much of the additive baseline, but for a few
RESIDUAL_SPAN = 2.5
# streams of the hash, so that what is hidden does not follow from what is read
HIDDEN_STREAM, FOLD_STREAM, ZERO_STREAM = 1 << 20, 1 << 21, 1 << 22
# an end of an interval belongs to the bin below it, whatever the last bit of a quotient is
_TOLERANCE = 1e-9


class Cells(NamedTuple):
    """The expressed genes of a minibatch, as ragged rows.

    Attributes
    ----------
    indptr
        Ends of the rows, shape (b + 1,).
    token_o
        Row of the gene table of each expressed gene, from 1.
    count_o
        Counts, or what they are proportional to.
    keys_b
        Key of each cell's name.
    row_b
        Row numbers of the cells.
    factor_b
        Sum to normalise by, where the user gave one.
    """

    indptr: np.ndarray
    token_o: np.ndarray
    count_o: np.ndarray
    keys_b: np.ndarray
    row_b: np.ndarray
    factor_b: np.ndarray | None = None

    @property
    def n_b(self) -> np.ndarray:
        """Expressed genes of each cell."""
        return np.diff(self.indptr)

    @property
    def cell_o(self) -> np.ndarray:
        """Cell of each expressed gene."""
        return np.repeat(np.arange(self.keys_b.size), self.n_b)

    def restricted(self, keep_o: np.ndarray) -> Cells:
        """Return the cells with some of their genes."""
        indptr, token_o, count_o = take(self.indptr, keep_o, self.token_o, self.count_o)
        return self._replace(indptr=indptr, token_o=token_o, count_o=count_o)


class Normalised(NamedTuple):
    """Log-normalised values of a minibatch.

    Attributes
    ----------
    value_o
        log(1 + 1e4 x / s) with the cell's sum s.
    factor_b, maximum_b
        Sum s and largest value L of the entries that may be seen.
    """

    value_o: np.ndarray
    factor_b: np.ndarray
    maximum_b: np.ndarray


def hidden_number(n_b: np.ndarray, rate: float) -> np.ndarray:
    """Return how many of n expressed genes are hidden: q = clip(round(rate n), 1, n - 1), 0 for n below 2.

    Examples
    --------
    >>> hidden_number(np.array([0, 1, 2, 3, 20]), 0.15).tolist()
    [0, 0, 1, 1, 3]
    """
    return np.where(n_b < 2, 0, np.clip(np.round(rate * n_b), 1, np.maximum(n_b - 1, 1))).astype(np.int64)


def smallest_of_rows(indptr: np.ndarray, hash_o: np.ndarray, n_b: np.ndarray) -> np.ndarray:
    """Choose the n entries with the smallest hash of each row, n by row: boolean (o,).

    Examples
    --------
    >>> smallest_of_rows(np.array([0, 3, 4]), np.array([7, 2, 9, 1]), np.array([2, 0])).tolist()
    [True, True, False, False]
    """
    row_o = np.repeat(np.arange(n_b.size), np.diff(indptr))
    order = np.lexsort((hash_o, row_o))
    chosen_o = np.zeros(hash_o.size, dtype=bool)
    chosen_o[order] = np.arange(hash_o.size) - indptr[row_o] < n_b[row_o]
    return chosen_o


def relative_bins(value_o: np.ndarray, maximum_o: np.ndarray, n_bins: int) -> np.ndarray:
    """Return the interval of each value among k equal ones up to the cell's maximum: clip(ceil(k X / L), 1, k).

    Examples
    --------
    >>> relative_bins(np.array([2.0, 0.5, 0.51, 1e-9]), np.full(4, 2.0), 4).tolist()
    [4, 1, 2, 1]
    """
    ratio_o = value_o / np.where(maximum_o > 0, maximum_o, 1.0)
    return np.clip(np.ceil(n_bins * ratio_o - _TOLERANCE), 1, n_bins).astype(np.int64)


def residual_bins(residual_o: np.ndarray, n_bins: int) -> np.ndarray:
    """Return the interval of what is left of a value, among k equal ones from -2.5 to 2.5, ends included.

    Examples
    --------
    >>> residual_bins(np.array([-9.0, -0.1, 0.1, 9.0]), 10).tolist()
    [1, 5, 6, 10]
    """
    share_o = (residual_o / RESIDUAL_SPAN + 1.0) / 2.0
    return np.clip(np.floor(n_bins * share_o) + 1, 1, n_bins).astype(np.int64)


class CellEncoding:
    """Turns a minibatch of registered rows into tokens, bins of the observed genes and targets of the hidden ones.

    What is drawn of a cell (genes above the limit, hidden genes, zeros) is a hash of its name, the seed and the number
    of the draw: it depends neither on the other cells of the minibatch nor on any order.

    Parameters
    ----------
    names
        Names of all cells.
    columns
        Row of the gene table of each column of the data, 0 for genes that are not in the vocabulary.
    config
        Choices of the model.
    seed
        Seed of the draws.
    is_lognorm
        Whether the values are log-normalised; they are then taken back to the scale of counts.
    gene_mean
        Mean of each gene where it is expressed, by row of the gene table, for the additive baseline.
    measured
        Which genes each data set measures, (c, m), and the data set of each cell, (n,).
    """

    def __init__(
        self,
        names: Iterable[str],
        columns: np.ndarray,
        config: ExpresserConfig,
        *,
        seed: int,
        is_lognorm: bool = False,
        gene_mean: np.ndarray | None = None,
        measured: tuple[np.ndarray, np.ndarray] | None = None,
    ) -> None:
        self.keys_n = name_keys(names)
        self.columns = np.asarray(columns)
        self.config = config
        self.seed = seed
        self.is_lognorm = is_lognorm
        self.gene_mean = gene_mean
        self.measured = measured

    def __call__(self, batch: Mapping[str, Tensor], draw: int = 0) -> dict[str, Tensor]:
        """Return a training minibatch: at most ``max_genes`` genes of each cell, some of them hidden."""
        cells = self.read(batch)
        kept_o = keep_limited(
            cells.indptr, cells.token_o, cells.keys_b, self.config.max_genes, seed=self.seed, draw=draw
        )
        hidden_o = np.zeros(cells.token_o.size, dtype=bool)
        hidden_o[kept_o] = self.hidden(cells.restricted(kept_o), draw)
        encoded = self.encoded(cells, hidden_o, kept_o)
        if self.config.detection:
            encoded[keys.BATCH_ZEROS] = torch.from_numpy(self.zeros(cells, encoded, draw))
        return encoded

    def read(self, batch: Mapping[str, Tensor]) -> Cells:
        """Return the expressed genes of the vocabulary of a minibatch of registered rows."""
        row_b = batch[keys.BATCH_ROWS].numpy().reshape(-1)
        token_o = self.columns[batch[keys.BATCH_INDICES].numpy()]
        count_o = batch[keys.BATCH_VALUES].numpy().astype(np.float64)
        if self.is_lognorm:
            count_o = np.expm1(count_o)
        factor = batch.get(REGISTRY_KEYS.SIZE_FACTOR_KEY)
        factor_b = None if factor is None else factor.numpy().reshape(-1).astype(np.float64)
        cells = Cells(batch[keys.BATCH_INDPTR].numpy(), token_o, count_o, self.keys_n[row_b], row_b, factor_b)
        return cells if (token_o > 0).all() else cells.restricted(token_o > 0)

    def hidden(self, cells: Cells, draw: int) -> np.ndarray:
        """Return which genes are hidden in a draw, boolean (o,)."""
        hash_o = token_hash(cells.keys_b[cells.cell_o], cells.token_o, seed=self.seed + HIDDEN_STREAM, draw=draw)
        return smallest_of_rows(cells.indptr, hash_o, hidden_number(cells.n_b, self.config.mask_rate))

    def folds(self, cells: Cells) -> np.ndarray:
        """Return the fold of each gene, (o,): as even as the cell's genes allow; -1 in cells of one gene.

        Folds are a hash of the cell's name and the gene; each is hidden once and predicted from the others.
        """
        hash_o = token_hash(cells.keys_b[cells.cell_o], cells.token_o, seed=FOLD_STREAM, draw=0)
        order = np.lexsort((hash_o, cells.cell_o))
        rank_o = np.empty(hash_o.size, dtype=np.int64)
        rank_o[order] = np.arange(hash_o.size) - cells.indptr[cells.cell_o]
        return np.where(cells.n_b[cells.cell_o] < 2, -1, rank_o % self.config.n_folds)

    def zeros(self, cells: Cells, encoded: Mapping[str, Tensor], draw: int) -> np.ndarray:
        """Return genes that are measured and not expressed, as many as are hidden, as tokens, 0 for pads: (b, q)."""
        n_genes = int(self.columns.max())
        n_b = encoded[keys.BATCH_QUERY_LENGTH].numpy()
        zeros_bq = np.zeros((n_b.size, int(n_b.max(initial=0))), dtype=np.int64)
        gene_m = np.arange(1, n_genes + 1)
        for cell in np.flatnonzero(n_b).tolist():
            is_zero_m = self.measured_of(cells.row_b[cell], n_genes).copy()
            is_zero_m[cells.token_o[cells.indptr[cell] : cells.indptr[cell + 1]] - 1] = False
            zero = gene_m[is_zero_m]
            hash_z = token_hash(cells.keys_b[cell : cell + 1], zero, seed=self.seed + ZERO_STREAM, draw=draw)
            n = min(int(n_b[cell]), zero.size)
            zeros_bq[cell, :n] = zero[np.argsort(hash_z)[:n]]
        return zeros_bq

    def measured_of(self, row: int, n_genes: int) -> np.ndarray:
        """Return which genes the data set of a cell measures, boolean (m,)."""
        if self.measured is None:
            return np.ones(n_genes, dtype=bool)
        return self.measured[0][self.measured[1][row]][:n_genes]

    def normalised(self, cells: Cells, hidden_o: np.ndarray) -> Normalised:
        """Return log-normalised values, with sum and maximum of the entries that are not hidden.

        All entries are on this one scale, the hidden ones too: they are what the network predicts.
        """
        cell_o, n_cells = cells.cell_o, cells.keys_b.size
        seen_o = np.ones_like(hidden_o) if self.config.leaky_normalization else ~hidden_o
        factor_b = cells.factor_b
        if factor_b is None:
            factor_b = np.bincount(cell_o[seen_o], cells.count_o[seen_o], minlength=n_cells)
        factor_b = np.where(factor_b > 0, factor_b, 1.0)
        value_o = np.log1p(SCALE * cells.count_o / factor_b[cell_o])
        maximum_b = np.zeros(n_cells)
        np.maximum.at(maximum_b, cell_o[seen_o], value_o[seen_o])
        return Normalised(value_o, factor_b, maximum_b)

    def encoded(self, cells: Cells, hidden_o: np.ndarray, kept_o: np.ndarray | None = None) -> dict[str, Tensor]:
        """Return what the network reads of cells of which some genes are hidden.

        Returns
        -------
        ``tokens`` (b, t), ``length`` (b,), ``bin`` (b, t), 0 for hidden genes and pads, ``query`` (b, q): positions of
        the hidden genes among the tokens, ``query_length`` (b,), ``value`` (b, t): targets, ``maximum`` (b,), ``shift``
        (b,): of the additive baseline, and ``rows`` (b,).
        """
        value_o, _, maximum_b = self.normalised(cells, hidden_o)
        cell_o = cells.cell_o
        shift_b = self._shift(cells, value_o, hidden_o)
        if self.config.binning == "count":
            bin_o = np.clip(np.round(cells.count_o), 1, self.config.n_bins).astype(np.int64)
        elif self.config.binning == "residual" and self.gene_mean is not None:
            bin_o = residual_bins(value_o - self.gene_mean[cells.token_o] - shift_b[cell_o], self.config.n_bins)
        else:
            bin_o = relative_bins(value_o, maximum_b[cell_o], self.config.n_bins)
        bin_o = np.where(hidden_o, 0, bin_o)
        entries = (cells.token_o, bin_o, value_o.astype(np.float32), hidden_o)
        indptr = cells.indptr
        if kept_o is not None:
            indptr, *entries = take(indptr, kept_o, *entries)  # type: ignore[assignment]
        tokens_bt, length_b = pad_rows(indptr, entries[0])
        position_o = np.arange(entries[0].size) - np.repeat(indptr[:-1], np.diff(indptr))
        query_indptr, query = take(indptr, entries[3], position_o)
        query_bq, query_length_b = pad_rows(query_indptr, query)
        arrays: dict[str, np.ndarray] = {
            keys.BATCH_ROWS: cells.row_b,
            keys.BATCH_TOKENS: _at_least_one(tokens_bt),
            keys.BATCH_LENGTH: length_b,
            keys.BATCH_BIN: _at_least_one(pad_rows(indptr, entries[1])[0]),
            keys.BATCH_VALUE: _at_least_one(pad_rows(indptr, entries[2])[0]),
            keys.BATCH_QUERY: query_bq.astype(np.int64),
            keys.BATCH_QUERY_LENGTH: query_length_b,
            keys.BATCH_MAXIMUM: maximum_b.astype(np.float32),
            keys.BATCH_SHIFT: shift_b.astype(np.float32),
        }
        return {key: torch.from_numpy(array) for key, array in arrays.items()}

    def _shift(self, cells: Cells, value_o: np.ndarray, hidden_o: np.ndarray) -> np.ndarray:
        """Return the mean over the observed genes of value minus the gene's mean, (b,)."""
        n_cells = cells.keys_b.size
        if self.gene_mean is None:
            return np.zeros(n_cells)
        cell_o = cells.cell_o[~hidden_o]
        left_o = (value_o - self.gene_mean[cells.token_o])[~hidden_o]
        n_seen_b = np.bincount(cell_o, minlength=n_cells)
        return np.bincount(cell_o, left_o, minlength=n_cells) / np.maximum(n_seen_b, 1)


def _at_least_one(padded_bt: np.ndarray) -> np.ndarray:
    """Return padded rows with at least one column, so that a minibatch of empty cells has a shape."""
    return padded_bt if padded_bt.shape[1] else np.zeros((padded_bt.shape[0], 1), dtype=padded_bt.dtype)


def column_map(n_columns: int, known: Any, rows: Any) -> np.ndarray:
    """Return the row of the gene table of each column, 0 for columns that are not known.

    Examples
    --------
    >>> column_map(3, [2, 0], [1, 5]).tolist()
    [5, 0, 1]
    """
    columns = np.zeros(n_columns, dtype=np.int64)
    columns[np.asarray(known, dtype=np.int64)] = np.asarray(rows, dtype=np.int64)
    return columns
