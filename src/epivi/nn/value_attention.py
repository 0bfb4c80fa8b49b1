"""Cross-attention whose values are apart from queries and keys: values pass through the attention weights only.

Legend of shapes: b samples, q queries, k keys, d width, h heads, e width of a head, v rows of a table of values.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.functional import embedding, scaled_dot_product_attention

from epivi._errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor


class ValueAttention(nn.Module):
    r"""Multi-head cross-attention without residual connection (Cao, thesis, chapter 4, equations 4.2 and 4.3).

    .. math::
        P = \big[\mathrm{softmax}(Q W_Q^h (K W_K^h)^T / \sqrt e)\, V W_V^h\big]_h W_O

    Parameters
    ----------
    width
        Width d of queries, keys, values and output.
    n_heads
        Heads h; they divide the width.

    Raises
    ------
    ConfigError
        If the heads do not divide the width.

    Notes
    -----
    Where the values are rows of a table, there are three forms of the same result. :meth:`forward_from_table` is the
    fastest; :meth:`forward_by_bin` shows the attention mass of each row, and takes two to three times as long, because
    the fused kernel never writes the scores out.

    Examples
    --------
    >>> attention = ValueAttention(8, 2)
    >>> attention(torch.zeros(3, 2, 8), torch.zeros(3, 5, 8), torch.zeros(3, 5, 8)).shape
    torch.Size([3, 2, 8])
    """

    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        if n_heads < 1 or width % n_heads:
            message = f"A width of {width} cannot be split into {n_heads} heads; the heads must divide the width."
            raise ConfigError(message)
        self.n_heads = n_heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(
        self, query_bqd: Tensor, key_bkd: Tensor, value_bkd: Tensor, key_mask_bk: Tensor | None = None
    ) -> Tensor:
        """Return the mixed values of each query, shape (b, q, d).

        Parameters
        ----------
        query_bqd, key_bkd, value_bkd
            Queries, and keys with their values.
        key_mask_bk
            True for keys that may be attended to. A sample without any gets the bias of the last layer.
        """
        return self._attend(query_bqd, key_bkd, self.value(value_bkd), key_mask_bk)

    def forward_from_table(
        self,
        query_bqd: Tensor,
        key_bkd: Tensor,
        bin_bk: Tensor,
        table_vd: Tensor,
        key_mask_bk: Tensor | None = None,
    ) -> Tensor:
        """Return what :meth:`forward` returns for the values ``table_vd[bin_bk]``; W_V is applied once a row.

        Parameters
        ----------
        query_bqd, key_bkd, key_mask_bk
            As in :meth:`forward`.
        bin_bk
            Row of the table of each key.
        table_vd
            Values.
        """
        return self._attend(query_bqd, key_bkd, embedding(bin_bk, self.value(table_vd)), key_mask_bk)

    def forward_by_bin(
        self,
        query_bqd: Tensor,
        key_bkd: Tensor,
        bin_bk: Tensor,
        table_vd: Tensor,
        key_mask_bk: Tensor | None = None,
    ) -> Tensor:
        r"""Return what :meth:`forward` returns for the values ``table_vd[bin_bk]``, through :meth:`bin_mass`.

        .. math::
            P = \Big[\sum_v a_{hqv}\, (e_v W_V^h)\Big]_h W_O

        Parameters
        ----------
        query_bqd, key_bkd, bin_bk, table_vd, key_mask_bk
            As in :meth:`forward_from_table`.
        """
        mass_bhqv = self.bin_mass(query_bqd, key_bkd, bin_bk, table_vd.shape[0], key_mask_bk)
        value_hve = self.value(table_vd).unflatten(1, (self.n_heads, -1)).transpose(0, 1)
        return self.out((mass_bhqv @ value_hve).transpose(1, 2).flatten(2))

    def bin_mass(
        self, query_bqd: Tensor, key_bkd: Tensor, bin_bk: Tensor, n_bins: int, key_mask_bk: Tensor | None = None
    ) -> Tensor:
        """Return the attention of each query to all keys of a bin, shape (b, h, q, v); rows sum to 1.

        Parameters
        ----------
        query_bqd, key_bkd, key_mask_bk
            As in :meth:`forward`; rows of a sample without any key are 0.
        bin_bk
            Bin of each key, from 0 to ``n_bins - 1``.
        n_bins
            Number of bins v.
        """
        query_bhqe, key_bhke = self._heads(self.query(query_bqd)), self._heads(self.key(key_bkd))
        weight_bhqk = _softmax_weights(query_bhqe, key_bhke, key_mask_bk)
        mass_bhqv = weight_bhqk.new_zeros(*weight_bhqk.shape[:3], n_bins)
        return mass_bhqv.scatter_add(3, bin_bk[:, None, None].expand_as(weight_bhqk), weight_bhqk)

    def weights(self, query_bqd: Tensor, key_bkd: Tensor, key_mask_bk: Tensor | None = None) -> Tensor:
        """Return the attention weights averaged over the heads, shape (b, q, k); rows sum to 1.

        Parameters
        ----------
        query_bqd, key_bkd, key_mask_bk
            As in :meth:`forward`; rows of a sample without any key are 0.
        """
        query_bhqe, key_bhke = self._heads(self.query(query_bqd)), self._heads(self.key(key_bkd))
        # head after head, so that the memory is that of one head
        total_bqk: Tensor | None = None
        for head in range(self.n_heads):
            part_bhqk = _softmax_weights(query_bhqe[:, head, None], key_bhke[:, head, None], key_mask_bk)
            total_bqk = part_bhqk[:, 0] if total_bqk is None else total_bqk + part_bhqk[:, 0]
        return torch.as_tensor(total_bqk) / self.n_heads

    def _attend(self, query_bqd: Tensor, key_bkd: Tensor, value_bkd: Tensor, key_mask_bk: Tensor | None) -> Tensor:
        """Return the output for projected values; the Boolean mask keeps the fused kernel."""
        z_bhqe = scaled_dot_product_attention(
            self._heads(self.query(query_bqd)),
            self._heads(self.key(key_bkd)),
            self._heads(value_bkd),
            attn_mask=None if key_mask_bk is None else key_mask_bk.bool()[:, None, None],
        )
        return self.out(z_bhqe.transpose(1, 2).flatten(2))

    def _heads(self, x_btd: Tensor) -> Tensor:
        return x_btd.unflatten(2, (self.n_heads, -1)).transpose(1, 2)


def _softmax_weights(query_bhqe: Tensor, key_bhke: Tensor, key_mask_bk: Tensor | None) -> Tensor:
    """Return softmax weights, shape (b, h, q, k), 0 at masked keys."""
    score_bhqk = (query_bhqe * query_bhqe.shape[3] ** -0.5) @ key_bhke.transpose(2, 3)
    if key_mask_bk is None:
        return score_bhqk.softmax(3)
    masked = ~key_mask_bk.bool()[:, None, None]
    # a finite number, so that a row without any key stays finite
    weight_bhqk = score_bhqk.masked_fill(masked, torch.finfo(score_bhqk.dtype).min).softmax(3)
    return weight_bhqk.masked_fill(masked, 0.0)
