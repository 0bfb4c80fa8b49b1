"""From registered rows to what the network reads of a cell: its open peaks as tokens, and what a step scores.

Legend of shapes: n cells, b cells of the minibatch, o open peaks of the minibatch, t tokens, g genes, h hidden peaks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from scvi import REGISTRY_KEYS

from epivi import _keys as keys
from epivi.data.tokens import balanced_sample, keep_limited, name_keys, pad_rows, rank_levels, take, token_hash
from epivi.models.epifoundation.config import EXPRESSION, LABEL_TASKS, PRETRAINING
from epivi.models.epifoundation.fields import CHROM_CODES, POSITIONS

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import Tensor

    from epivi.models.epifoundation.config import EpiFoundationConfig

CLS, N_SPECIAL = 1, 2
SCALE = 1e4
HIGHEST_LEVEL = 3
KEPT = (keys.BATCH_ROWS, REGISTRY_KEYS.BATCH_KEY, REGISTRY_KEYS.LABELS_KEY)
# streams of the hash, so that what is hidden does not follow from what is read
HIDDEN_STREAM, CLOSED_STREAM = 1 << 20, 1 << 21


class PeakColumns(NamedTuple):
    """What each column of the peaks is to the network.

    Attributes
    ----------
    token
        Row of the peak table: 2 and above for peaks of the vocabulary, 0 for others, which have a place alone.
    chrom
        Code of the chromosome, -1 unknown.
    position
        Midpoint in bp.
    absent
        Peaks of the vocabulary that no column stands for; ``None`` if there are none.
    """

    token: np.ndarray
    chrom: np.ndarray
    position: np.ndarray
    absent: np.ndarray | None = None

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> PeakColumns:
        """Return the columns from what the field of the peaks registered."""
        if "query_rows" in state:
            rows = np.asarray(state["query_rows"])
            token = np.where(rows >= 0, rows + N_SPECIAL, 0)
            absent = np.setdiff1d(np.arange(len(state["column_names"])), rows)
            chrom, position = (np.asarray(state[key]) for key in ("query_chrom", "query_position"))
            return cls(token, chrom, position, absent if absent.size else None)
        n = len(state["column_names"])
        return cls(np.arange(n) + N_SPECIAL, np.asarray(state[CHROM_CODES]), np.asarray(state[POSITIONS]))


class Targets(NamedTuple):
    """What a training step scores.

    Attributes
    ----------
    n_genes
        Genes of the vocabulary.
    rna_kind
        ``"counts"`` or ``"lognorm"``.
    class_of_code
        Class of each code of the labels, -1 for cells without label.
    """

    n_genes: int
    rna_kind: str
    class_of_code: np.ndarray


class CellEncoding:
    """Turns a minibatch of registered rows into tokens and targets.

    What is drawn of a cell (peaks above the limit, genes, hidden peaks) is a hash of its name, the seed and the number
    of the draw: it depends neither on the other cells of the minibatch nor on any order. Only where the task
    "expression" has more genes than ``max_genes``, a minibatch scores one random set of them.

    Parameters
    ----------
    names
        Names of all cells.
    columns
        What the columns of the peaks are.
    config
        Choices of the model.
    seed
        Seed of the draws.
    targets
        What a training step scores; ``None`` to read cells alone.
    """

    def __init__(
        self,
        names: Iterable[str],
        columns: PeakColumns,
        config: EpiFoundationConfig,
        *,
        seed: int,
        targets: Targets | None = None,
    ) -> None:
        self.keys_n = name_keys(names)
        self.columns = columns
        self.config = config
        self.seed = seed
        self.targets = targets

    def __call__(self, batch: Mapping[str, Tensor], draw: int = 0) -> dict[str, Tensor]:
        """Return tokens ``tokens``, ``token_chrom``, ``token_position`` (b, t), ``length`` (b), and the targets."""
        encoded: dict[str, Any] = {key: batch[key] for key in KEPT if key in batch}
        keys_b = self.keys_n[batch[keys.BATCH_ROWS].numpy().reshape(-1)]
        indptr = batch[keys.BATCH_INDPTR].numpy()
        indices = batch[keys.BATCH_INDICES].numpy()
        values = batch[keys.BATCH_VALUES].numpy()
        hides = self.targets is not None and self.config.task == PRETRAINING and self.config.masked_peak_weight > 0
        if hides:
            is_hidden_o = self._hidden(indptr, indices, keys_b, draw)
            encoded |= self._hidden_targets(indptr, indices, is_hidden_o, keys_b, draw)
            indptr, indices, values = take(indptr, ~is_hidden_o, indices, values)
        kept_o = keep_limited(indptr, indices, keys_b, self.config.max_peaks, seed=self.seed, draw=draw)
        indptr, indices, values = take(indptr, kept_o, indices, values)
        encoded |= self._tokens(indptr, indices, values)
        if self.columns.absent is not None:
            encoded[keys.BATCH_ABSENT_PEAKS] = self.columns.absent
        if self.targets is not None:
            encoded |= self._gene_targets(batch, keys_b, draw)
            if self.config.task in LABEL_TASKS:
                code_b = batch[REGISTRY_KEYS.LABELS_KEY].numpy()[:, 0]
                encoded[keys.BATCH_CLASS] = self.targets.class_of_code[code_b]
        return {key: value if torch.is_tensor(value) else torch.from_numpy(value) for key, value in encoded.items()}

    def _tokens(self, indptr: np.ndarray, indices: np.ndarray, values: np.ndarray) -> dict[str, np.ndarray]:
        columns = self.columns
        tokens_bt, length_b = pad_rows(indptr, columns.token[indices], lead=CLS)
        padded = {keys.BATCH_TOKENS: tokens_bt, keys.BATCH_LENGTH: length_b}
        # codes of chromosomes start at 1: 0 is for [CLS] and pads
        padded[keys.BATCH_TOKEN_CHROM], _ = pad_rows(indptr, columns.chrom[indices] + 1, fill=-1, lead=-1)
        if self.config.positions == "genome":
            padded[keys.BATCH_TOKEN_POSITION], _ = pad_rows(indptr, columns.position[indices], lead=0)
        if self.config.count_levels:
            level_o = np.minimum(values, HIGHEST_LEVEL).astype(np.int64)
            padded[keys.BATCH_TOKEN_LEVEL], _ = pad_rows(indptr, level_o, lead=0)
        return padded

    def _hidden(self, indptr: np.ndarray, indices: np.ndarray, keys_b: np.ndarray, draw: int) -> np.ndarray:
        """Return which open peaks are hidden, shape (o,); a cell with one peak keeps it."""
        counts_b = np.diff(indptr)
        keys_o = np.repeat(keys_b, counts_b)
        hash_o = token_hash(keys_o, indices, seed=self.seed + HIDDEN_STREAM, draw=draw)
        is_hidden_o = hash_o < np.uint64(self.config.masked_peak_rate * 2.0**64)
        shown_b = counts_b - np.add.reduceat(np.append(is_hidden_o, 0), indptr[:-1])[: counts_b.size] * (counts_b > 0)
        is_hidden_o[np.repeat(shown_b == 0, counts_b)] = False
        return is_hidden_o

    def _hidden_targets(
        self, indptr: np.ndarray, indices: np.ndarray, is_hidden_o: np.ndarray, keys_b: np.ndarray, draw: int
    ) -> dict[str, np.ndarray]:
        """Return hidden open peaks and as many closed ones of each cell, as tokens, -1 for pads, and which are open."""
        hidden_indptr, hidden = take(indptr, is_hidden_o, indices)
        n_peaks = self.columns.token.size
        counts_b = np.diff(hidden_indptr)
        keys_o = np.repeat(keys_b, counts_b)
        drawn_o = token_hash(keys_o, hidden, seed=self.seed + CLOSED_STREAM, draw=draw)
        drawn_o = (drawn_o % np.uint64(n_peaks)).astype(np.int64)
        # what was drawn and is open is no negative
        row_o = np.repeat(np.arange(counts_b.size), counts_b)
        all_o = np.repeat(np.arange(counts_b.size), np.diff(indptr)) * n_peaks + indices
        closed_o = np.where(np.isin(row_o * n_peaks + drawn_o, all_o), -1, self.columns.token[drawn_o])
        open_bh, _ = pad_rows(hidden_indptr, self.columns.token[hidden], fill=-1)
        closed_bh, _ = pad_rows(hidden_indptr, closed_o, fill=-1)
        is_open = np.concatenate([np.ones_like(open_bh), np.zeros_like(closed_bh)], axis=1)
        return {
            keys.BATCH_HIDDEN_PEAKS: np.concatenate([open_bh, closed_bh], axis=1),
            keys.BATCH_HIDDEN_IS_OPEN: is_open.astype(np.float32),
        }

    def _gene_targets(self, batch: Mapping[str, Tensor], keys_b: np.ndarray, draw: int) -> dict[str, np.ndarray]:
        """Return genes (b, g), -1 for pads, and their targets."""
        if f"{keys.BATCH_RNA}_indptr" not in batch or self.targets is None:
            return {}
        indptr = batch[f"{keys.BATCH_RNA}_indptr"].numpy()
        indices = batch[f"{keys.BATCH_RNA}_indices"].numpy()
        n_genes = self.targets.n_genes
        if self.config.task == PRETRAINING:
            genes_bg, is_expressed_bg = balanced_sample(
                indptr, indices, n_genes, keys_b, self.config.max_genes, seed=self.seed, draw=draw
            )
            return {
                keys.BATCH_GENES: genes_bg,
                keys.BATCH_GENE_TARGET: is_expressed_bg.astype(np.float32),
                keys.BATCH_N_EXPRESSED: np.diff(indptr)[:, None],
            }
        if self.config.task != EXPRESSION:
            return {}
        target_o = self.expression(indptr, batch[f"{keys.BATCH_RNA}_values"].numpy())
        n_cells = keys_b.size
        target_bn = np.zeros((n_cells, n_genes), dtype=np.float32)
        target_bn[np.repeat(np.arange(n_cells), np.diff(indptr)), indices] = target_o
        gene_g = np.arange(n_genes)
        if n_genes > self.config.max_genes:
            rng = np.random.default_rng([self.seed, draw, int(keys_b.min() % 2**63)])
            gene_g = np.sort(rng.choice(n_genes, self.config.max_genes, replace=False))
        has_rna_b1 = (np.diff(indptr) > 0)[:, None]
        return {
            keys.BATCH_GENES: np.where(has_rna_b1, gene_g[None], -1),
            keys.BATCH_GENE_TARGET: target_bn[:, gene_g],
        }

    def gene_values(self, indptr: np.ndarray, values_o: np.ndarray) -> np.ndarray:
        """Return what the task predicts of the non-zero values: whether a gene is expressed, or how much."""
        return np.ones_like(values_o) if self.config.task == PRETRAINING else self.expression(indptr, values_o)

    def expression(self, indptr: np.ndarray, values_o: np.ndarray) -> np.ndarray:
        """Return what the task "expression" predicts of the non-zero values: log-normalised values, or levels."""
        counts_b = np.diff(indptr)
        if self.targets is not None and self.targets.rna_kind == "counts":
            total_b = np.bincount(np.repeat(np.arange(counts_b.size), counts_b), values_o, minlength=counts_b.size)
            values_o = np.log1p(SCALE * values_o / np.repeat(np.maximum(total_b, 1.0), counts_b))
        if self.config.expression_target == "level":
            return rank_levels(indptr, values_o, self.config.n_levels)
        return values_o
