"""A network of genes: which genes the decoder attends to when it predicts another."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from scipy import sparse

from epivi import _keys as keys
from epivi import _validate
from epivi._errors import ConfigError
from epivi.models.expresser.network import gather_rows
from epivi.models.expresser.outputs.reading import CellsMixin

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData

SCORES = ("lift", "mass")
MOST_PAIRS = 2e8


class NetworkMixin(CellsMixin):
    """Attention between genes."""

    @torch.inference_mode()
    def get_gene_network(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        batch_size: int | None = None,
        *,
        genes: Sequence[str] | None = None,
        top: int = 20,
        score: str = "lift",
        min_cells: int = 3,
        return_sparse: bool = False,
    ) -> pd.DataFrame | sparse.csr_matrix:
        """Return the genes that the decoder attends to most for each gene.

        Every expressed gene of a cell is hidden once, and the attention from it to the observed genes is averaged over
        heads and cells.

        Parameters
        ----------
        adata, indices, batch_size
            Cells.
        genes
            Genes to find others for; all by default.
        top
            Most genes for each.
        score
            ``"lift"``: attention times the number of observed genes, averaged over the cells that express both: 1 is
            what even attention gives. ``"mass"``: attention averaged over all cells that express the gene; it sums to
            1 over the genes attended to, and favours genes that many cells express.
        min_cells
            Fewest cells that express both.
        return_sparse
            Return a sparse matrix (genes × genes) in the order of :attr:`feature_names`, for
            ``adata.varp["attention"]``.

        Returns
        -------
        A table (gene, attends_to, score, n_cells), the best first for each gene; or the matrix.

        Raises
        ------
        ConfigError
            If a choice is not valid, a gene is unknown, the model has no decoder, or there are too many pairs.
        """
        _validate.check_choice(score, "score", SCORES)
        _validate.check_number(top, "top", low=1, integer=True)
        _validate.check_number(min_cells, "min_cells", low=1, integer=True)
        rows = self._gene_rows(genes)
        n = len(self.feature_names)
        if self.config.decoder == "encoder":
            message = "A model with decoder='encoder' has no attention from hidden to observed genes alone."
            raise ConfigError(message)
        if rows.size * n > MOST_PAIRS:
            message = f"{rows.size} x {n} pairs of genes are too many: name at most {int(MOST_PAIRS // n)} in genes=."
            raise ConfigError(message)
        self._check_if_trained(warn=True)
        score_qg, n_qg = self._attention(adata, indices, batch_size, rows, score)
        score_qg[n_qg < min_cells] = 0.0
        best_qk = np.argsort(-score_qg, axis=1, kind="stable")[:, :top]
        best_score_qk = np.take_along_axis(score_qg, best_qk, 1)
        query_o, rank_o = np.nonzero(best_score_qk > 0)
        target_o, score_o = best_qk[query_o, rank_o], best_score_qk[query_o, rank_o]
        if return_sparse:
            return sparse.csr_matrix((score_o, (rows[query_o], target_o)), shape=(n, n))
        names = self.feature_names
        columns = {"gene": names[rows[query_o]], "attends_to": names[target_o], "score": score_o}
        return pd.DataFrame(columns | {"n_cells": n_qg[query_o, target_o]})

    def _attention(
        self,
        adata: AnnData | None,
        indices: Sequence[int] | None,
        batch_size: int | None,
        rows: np.ndarray,
        score: str,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return scores and numbers of cells with both genes, shapes (genes asked for, genes)."""
        n = len(self.feature_names)
        sum_qg = np.zeros((rows.size, n), dtype=np.float32)
        n_qg = np.zeros((rows.size, n), dtype=np.int32)
        n_q = np.zeros(rows.size)
        # place of each token among the genes asked for
        place = np.full(n + 1, -1)
        place[rows + 1] = np.arange(rows.size)
        attention = self.module.network.attention
        reading = self._read(adata, indices, batch_size)
        for _, cells in reading.batches:
            for _, batch, context_btd in self._folds(reading.encoding, cells):
                bin_bt, query_bq = batch[keys.BATCH_BIN], batch[keys.BATCH_QUERY]
                weight_bqt = attention.weights(gather_rows(context_btd, query_bq), context_btd, bin_bt > 0)  # type: ignore[union-attr]
                asked_bq = batch[keys.BATCH_TOKENS].gather(1, query_bq).cpu().numpy()
                n_asked_b = batch[keys.BATCH_QUERY_LENGTH].tolist()
                tokens_bt, is_seen_bt = batch[keys.BATCH_TOKENS].cpu().numpy(), (bin_bt > 0).cpu().numpy()
                for cell, weight_qt in enumerate(weight_bqt.cpu().numpy()):
                    place_q = place[asked_bq[cell, : n_asked_b[cell]]]
                    seen_t = is_seen_bt[cell]
                    if (place_q < 0).all() or not seen_t.any():
                        continue
                    of_interest = place_q >= 0
                    part_qt = weight_qt[: n_asked_b[cell]][of_interest][:, seen_t]
                    at = np.ix_(place_q[of_interest], tokens_bt[cell, seen_t] - 1)
                    sum_qg[at] += part_qt * (seen_t.sum() if score == "lift" else 1.0)
                    n_qg[at] += 1
                    n_q[place_q[of_interest]] += 1
        divisor = n_qg if score == "lift" else n_q[:, None]
        return sum_qg / np.maximum(divisor, 1), n_qg
