"""Decoder of pairs of a cell and a gene.

Legend of shapes: b cells, g genes asked for in a cell, n genes with a vector, i inputs from a cell, d width of a gene,
q hidden units, o outputs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn
from torch.nn.functional import embedding, linear

if TYPE_CHECKING:
    from torch import Tensor


class GatedDecoder(nn.Module):
    r"""Outputs for each pair of a cell and a gene, from the gene's gate and the cell's vector.

    .. math::
        g = \sigma(W_1 e + b_1), \qquad \hat y = W_3\, \mathrm{PReLU}(W_2 [z; g] + b_2) + b_3

    With :math:`W_2 [z; g] = W_z z + W_g g` the first product is computed once a cell and the second once a gene, never
    once a pair.

    Parameters
    ----------
    n_input
        Width i of a cell's vector z.
    width
        Width d of a gene's vector e.
    n_hidden
        Hidden units q, of the gate too.
    n_out
        Outputs o of a pair.

    Examples
    --------
    >>> import torch
    >>> decoder = GatedDecoder(6, 4, 3, 2)
    >>> decoder(torch.zeros(5, 6), torch.zeros(7, 4)).shape
    torch.Size([5, 7, 2])
    """

    def __init__(self, n_input: int, width: int, n_hidden: int, n_out: int) -> None:
        super().__init__()
        self.n_input = n_input
        self.gate = nn.Linear(width, n_hidden)
        self.hidden = nn.Linear(n_input + n_hidden, n_hidden)
        self.activation = nn.PReLU()
        self.out = nn.Linear(n_hidden, n_out)

    def forward(self, z_bi: Tensor, gene_nd: Tensor, index_bg: Tensor | None = None) -> Tensor:
        """Return the outputs, shape (b, g, o).

        Parameters
        ----------
        z_bi
            Vector of each cell.
        gene_nd
            Vector of each gene.
        index_bg
            Genes asked for in each cell, as rows of ``gene_nd``; all of them for every cell if ``None``. Negative
            numbers are pads: they give the output of row 0, which the caller masks.
        """
        weight_qi, weight_qq = self.hidden.weight.tensor_split([self.n_input], dim=1)
        cell_bq = linear(z_bi, weight_qi, self.hidden.bias)
        gene_nq = linear(self.gate(gene_nd).sigmoid(), weight_qq)
        gene_bgq = gene_nq[None] if index_bg is None else embedding(index_bg.clamp_min(0), gene_nq)
        return self.out(self.activation(cell_bq[:, None] + gene_bgq))
