"""Covariates of experiments as inputs of CANDI: depth, read length, run type and the like, each with an unknown.

Legend of shapes: b windows of the batch, a assays, k covariates, w width of a covariate, h outputs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

LITERAL = -1.0  # what stands for an unknown value in the released code


class ExperimentEmbedding(nn.Module):
    """Embed the covariates of all assays of a sample into one vector: Linear, LayerNorm and, if asked for, ReLU.

    Each field has a width of max(4, A // 3). A continuous value is mapped linearly, with weights shared by the assays;
    an unknown one is a learned vector (or the map of -1). A category is looked up; the last row stands for unknown.

    Parameters
    ----------
    n_assays
        Assays A.
    n_continuous
        Continuous covariates.
    categories
        Number of levels of each categorical covariate.
    relu
        Whether a ReLU follows the normalisation.
    missing
        "learned" or "literal".

    Examples
    --------
    >>> embed = ExperimentEmbedding(5, n_continuous=1, categories=(2,))
    >>> embed(torch.zeros(3, 5, 1), torch.zeros(3, 5, 1, dtype=torch.long)).shape
    torch.Size([3, 16])
    """

    def __init__(
        self,
        n_assays: int,
        *,
        n_continuous: int,
        categories: Sequence[int] = (),
        relu: bool = True,
        missing: str = "learned",
    ) -> None:
        super().__init__()
        self.n_assays = n_assays
        self.n_continuous = n_continuous
        self.categories = tuple(int(n) for n in categories)
        n_fields = n_continuous + len(self.categories)
        self.n_outputs = max(n_assays, 16) if n_fields else 0
        if not n_fields:
            return
        width = max(4, n_assays // 3)
        if n_continuous:
            self.weight = nn.Parameter(torch.empty(n_continuous, width).uniform_(-1.0, 1.0))
            self.bias = nn.Parameter(torch.empty(n_continuous, width).uniform_(-1.0, 1.0))
            learned = torch.empty(n_continuous, width).uniform_(-1.0, 1.0) if missing == "learned" else None
            self.missing = None if learned is None else nn.Parameter(learned)
        # the released tables have a row for hidden entries too, which never occurs
        n_more = 1 if missing == "learned" else 2
        self.tables = nn.ModuleList(nn.Embedding(n + n_more, width) for n in self.categories)
        self.project = nn.Linear(n_assays * width * n_fields, self.n_outputs)
        self.norm = nn.LayerNorm(self.n_outputs)
        self.activation = nn.ReLU() if relu else nn.Identity()

    def forward(
        self, continuous_bak: Tensor | None, categorical_bak: Tensor | None, mask_ba: Tensor | None = None
    ) -> Tensor | None:
        """Return the embedding, shape (b, h); ``None`` if there are no covariates.

        Parameters
        ----------
        continuous_bak
            Standardised values, NaN where unknown; not needed if there are none.
        categorical_bak
            Codes, below 0 where unknown; not needed if there are none.
        mask_ba
            Where it is 0, the covariates of the assay are taken as unknown.
        """
        if not self.n_outputs:
            return None
        fields = []
        hidden_ba1 = None if mask_ba is None else (mask_ba <= 0)[:, :, None]
        if self.n_continuous and continuous_bak is not None:
            unknown_bak = continuous_bak.isnan()
            if hidden_ba1 is not None:
                unknown_bak = unknown_bak | hidden_ba1
            fields.append(self._continuous(continuous_bak, unknown_bak).flatten(1))
        if self.categories and categorical_bak is not None:
            unknown_bak = categorical_bak < 0
            if hidden_ba1 is not None:
                unknown_bak = unknown_bak | hidden_ba1
            for i, (table, n) in enumerate(zip(self.tables, self.categories, strict=True)):
                code_ba = categorical_bak[:, :, i].long().masked_fill(unknown_bak[:, :, i], n)
                fields.append(table(code_ba).flatten(1))
        return self.activation(self.norm(self.project(torch.cat(fields, dim=1))))

    def _continuous(self, value_bak: Tensor, unknown_bak: Tensor) -> Tensor:
        """Return the mapped values, shape (b, k, a, w)."""
        # a NaN must not reach the product, or its gradient is NaN too
        value_bka = torch.where(unknown_bak, LITERAL, value_bak).to(self.weight.dtype).transpose(1, 2)
        field_bkaw = value_bka[..., None] * self.weight[:, None] + self.bias[:, None]
        if self.missing is None:
            return field_bkaw
        return torch.where(unknown_bak.transpose(1, 2)[..., None], self.missing[:, None], field_bkaw)
