"""Vectors of cells, pooled from those of their genes."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import numpy as np
import torch

from epivi import _keys as keys
from epivi import _validate
from epivi.models.expresser.module import query_mask
from epivi.models.expresser.outputs.reading import CellsMixin

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData

    from epivi.models.expresser.encoding import CellEncoding, Cells

logger = logging.getLogger(__name__)

POOLS = ("mean", "expression", "decoder")


class LatentMixin(CellsMixin):
    """Vectors of cells."""

    @torch.inference_mode()
    def get_latent_representation(
        self,
        adata: AnnData | None = None,
        indices: Sequence[int] | None = None,
        batch_size: int | None = None,
        *,
        pool: str = "mean",
    ) -> np.ndarray:
        """Return one vector a cell, in the order of the data (or of ``indices``).

        Parameters
        ----------
        adata
            Data to embed; the trained data by default. Genes are matched by name.
        indices
            Row numbers or a mask.
        batch_size
            Most cells read at once; the result does not depend on it.
        pool
            ``"mean"``: mean of the genes in context T'; it depends on which genes are expressed and not on how highly,
            because the encoder sees no values. ``"expression"``: the mean weighted by log-normalised expression.
            ``"decoder"``: mean of what the decoder mixes for each gene from the values of the others, P.

        Returns
        -------
        Shape (n, d), float32. Cells without expressed gene are NaN; with ``"decoder"``, those with one too.

        Raises
        ------
        ConfigError
            If the pool is not known, or the model was loaded without data and none are given.
        """
        _validate.check_choice(pool, "pool", POOLS)
        self._check_if_trained(warn=True)
        reading = self._read(adata, indices, batch_size)
        latent_nd = np.full((reading.rows.size, self.config.width), np.nan, dtype=np.float32)
        for positions, cells in reading.batches:
            latent_nd[positions] = self._pooled(reading.encoding, cells, pool)
        if n_lost := int(np.isnan(latent_nd[:, 0]).sum()):
            logger.warning(
                "%d of %d cells have too few expressed genes: their vectors are NaN.", n_lost, len(latent_nd)
            )
        return latent_nd

    def _pooled(self, encoding: CellEncoding, cells: Cells, pool: str) -> np.ndarray:
        """Return the vectors of a minibatch of cells, shape (b, d), NaN where there is nothing to pool."""
        if pool == "decoder":
            sum_bd = torch.zeros(cells.keys_b.size, self.config.width, device=self.device)
            n_b = torch.zeros(cells.keys_b.size, device=self.device)
            for _, batch, context_btd in self._folds(encoding, cells):
                mixed_bqd = self._generated(batch, context_btd)["mixed"]
                mask_bq = query_mask(batch[keys.BATCH_QUERY], batch[keys.BATCH_QUERY_LENGTH]).to(mixed_bqd)
                sum_bd += (mixed_bqd * mask_bq[:, :, None]).sum(1)
                n_b += mask_bq.sum(1)
            return (sum_bd / n_b[:, None]).cpu().numpy()
        batch = self._to_device(encoding.encoded(cells, np.zeros(cells.token_o.size, dtype=bool)))
        context_btd = self._context(batch)
        weight_bt = (batch[keys.BATCH_TOKENS] > 0).to(context_btd)
        if pool == "expression":
            weight_bt = weight_bt * batch[keys.BATCH_VALUE]
        return (torch.einsum("btd,bt->bd", context_btd, weight_bt) / weight_bt.sum(1, keepdim=True)).cpu().numpy()
