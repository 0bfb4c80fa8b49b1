"""Learned vectors of tokens and of positions in a genome, each followed by layer normalisation.

Legend of shapes: d width, c chromosomes, s scales; ``...`` stands for the shape of the codes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.functional import embedding_bag

from epivi._errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

INIT_SD = 0.02
SCALES_BP = (10_000_000, 1_000_000, 100_000)


class TokenTable(nn.Module):
    """One learned vector a token, normalised; row 0 is the vector 0 before the normalisation where there are specials.

    Rows are drawn from N(0, 0.02). The factorised form is of rank ``dim``, n x dim + dim x d numbers instead of n x d.

    Parameters
    ----------
    n_tokens
        Number of tokens beside the special ones.
    width
        Width d.
    n_special
        Rows for other purposes; row 0, the pad, is one of them. With 0 there is no pad, and row 0 is a token.
    dim
        Rank of the factorised form; no factorisation if ``None``.
    norm
        Normalise the vectors.

    Raises
    ------
    ConfigError
        If a number is below 1 (``n_special``: below 0).

    Examples
    --------
    >>> table = TokenTable(10, 4, n_special=2)
    >>> table(torch.tensor([[0, 1, 11]])).shape
    torch.Size([1, 3, 4])
    """

    def __init__(self, n_tokens: int, width: int, *, n_special: int, dim: int | None = None, norm: bool = True) -> None:
        super().__init__()
        if min(n_tokens, width, 1 if dim is None else dim) < 1 or n_special < 0:
            message = (
                f"A table of tokens needs at least one token and one column; found n_tokens={n_tokens}, "
                f"width={width}, n_special={n_special}, dim={dim}."
            )
            raise ConfigError(message)
        self.table = nn.Embedding(n_tokens + n_special, dim or width, padding_idx=0 if n_special else None)
        # without bias, so that the pad stays 0
        self.expand = nn.Identity() if dim is None else nn.Linear(dim, width, bias=False)
        self.norm = nn.LayerNorm(width) if norm else nn.Identity()
        with torch.no_grad():
            # the rows are N(0, 1), and the pad 0, already: the table of a million peaks is drawn once
            self.table.weight.mul_(INIT_SD)
        if isinstance(self.expand, nn.Linear):
            nn.init.normal_(self.expand.weight, std=self.expand.in_features**-0.5)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the vectors of the ids, shape (..., d)."""
        return self.norm(self.expand(self.table(ids)))


class PositionTable(nn.Module):
    r"""Learned vector of a place in the genome: a sum over bins of several sizes, normalised.

    .. math::
        \mathrm{LN}\Big(\sum_s E^s_{c, \lfloor x / w_s \rfloor}\Big)

    Rows are drawn from N(0, 0.02). Places in one bin of the smallest size, if it divides the others, share a vector.

    Parameters
    ----------
    lengths_bp
        Length of each chromosome.
    width
        Width d.
    scales_bp
        Bin sizes w.

    Raises
    ------
    ConfigError
        If there is no chromosome or no scale, or a length, scale or width is below 1.

    Examples
    --------
    >>> table = PositionTable([1_000, 500], 4, scales_bp=(500, 100))
    >>> table(torch.tensor([0, 1, -1]), torch.tensor([999, 0, 0])).shape
    torch.Size([3, 4])
    """

    length_c: Tensor
    scale_s: Tensor
    first_cs: Tensor

    def __init__(self, lengths_bp: Sequence[int], width: int, *, scales_bp: Sequence[int] = SCALES_BP) -> None:
        super().__init__()
        lengths, scales = [int(n) for n in lengths_bp], [int(n) for n in scales_bp]
        if min([width, *lengths]) < 1 or min(scales, default=0) < 1 or not lengths:
            message = (
                f"A table of positions needs chromosomes, bin sizes and a width of at least 1; found {len(lengths)} "
                f"chromosomes (shortest {min(lengths, default=0)} bp), scales_bp={scales}, width={width}."
            )
            raise ConfigError(message)
        length_c, scale_s = torch.tensor(lengths), torch.tensor(scales)
        n_bins_cs = -(-length_c[:, None] // scale_s)
        first_cs = (n_bins_cs.flatten().cumsum(0) - n_bins_cs.flatten()).view_as(n_bins_cs)
        self.table = nn.Parameter(INIT_SD * torch.randn(int(n_bins_cs.sum()), width))
        self.unknown = nn.Parameter(INIT_SD * torch.randn(width))
        self.norm = nn.LayerNorm(width)
        # they follow from the arguments, so they are no part of the state
        self.register_buffer("length_c", length_c, persistent=False)
        self.register_buffer("scale_s", scale_s, persistent=False)
        self.register_buffer("first_cs", first_cs, persistent=False)

    def forward(self, chrom: Tensor, position_bp: Tensor) -> Tensor:
        """Return the vectors of the places, shape (..., d).

        Parameters
        ----------
        chrom
            Code of the chromosome; below 0 for a contig that is not known, which has a vector of its own.
        position_bp
            0-based position; beyond the end of the chromosome it counts as the end.
        """
        known_n = (chrom >= 0).flatten()
        code_n = chrom.flatten().long().clamp_min(0)
        last_n = self.length_c[code_n] - 1
        place_n = torch.minimum(position_bp.flatten().long().clamp_min(0), last_n)
        row_ns = self.first_cs[code_n] + place_n[:, None] // self.scale_s
        vector_nd = embedding_bag(row_ns, self.table, mode="sum")
        vector_nd = torch.where(known_n[:, None], vector_nd, self.unknown)
        return self.norm(vector_nd).view(*chrom.shape, -1)
