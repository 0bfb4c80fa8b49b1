"""Expression read off the open peaks around each gene, beside the vector of the cell.

Legend of shapes: b cells, t tokens, o open peaks of the minibatch, n genes, p peaks of the vocabulary, l links of a
peak and a gene, k links of open peaks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import nn

from epivi._keys import VAR_CHROM, VAR_END, VAR_START
from epivi.models.epifoundation.encoding import N_SPECIAL
from epivi.models.epifoundation.fields import CHROM_CODES, CHROM_NAMES, POSITIONS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor


class Links(NamedTuple):
    """Pairs of a gene and a peak near it, sorted by peak and then by gene.

    Attributes
    ----------
    peak_l, gene_l
        Rows of peaks and genes in their vocabularies.
    """

    peak_l: np.ndarray
    gene_l: np.ndarray


def near_links(
    peak_chrom: np.ndarray,
    peak_middle: np.ndarray,
    gene_chrom: np.ndarray,
    gene_start: np.ndarray,
    gene_end: np.ndarray,
    *,
    window_bp: int,
) -> Links:
    """Link each gene with the peaks whose midpoints lie in its body or at most ``window_bp`` from it.

    Parameters
    ----------
    peak_chrom, gene_chrom
        Codes of the chromosomes, negative where unknown: such peaks and genes have no links.
    peak_middle
        Midpoints of the peaks in bp.
    gene_start, gene_end
        Bodies of the genes in bp.
    window_bp
        Largest distance from the body.

    Examples
    --------
    >>> one = np.zeros(3, dtype=int)
    >>> links = near_links(one, np.array([40, 95, 500]), one[:1], np.array([100]), np.array([200]), window_bp=50)
    >>> links.peak_l.tolist(), links.gene_l.tolist()
    ([1], [0])
    """
    peaks, genes = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
    for code in np.unique(gene_chrom[gene_chrom >= 0]):
        peak_c, gene_c = np.flatnonzero(peak_chrom == code), np.flatnonzero(gene_chrom == code)
        peak_c = peak_c[np.argsort(peak_middle[peak_c], kind="stable")]
        middle_c = peak_middle[peak_c]
        first = np.searchsorted(middle_c, gene_start[gene_c] - window_bp, side="left")
        n_near = np.searchsorted(middle_c, gene_end[gene_c] + window_bp, side="right") - first
        at = np.arange(n_near.sum()) - np.repeat(n_near.cumsum() - n_near, n_near)
        peaks.append(peak_c[np.repeat(first, n_near) + at])
        genes.append(np.repeat(gene_c, n_near))
    peak_l, gene_l = np.concatenate(peaks), np.concatenate(genes)
    order = np.lexsort((gene_l, peak_l))
    return Links(peak_l[order], gene_l[order])


def registered_links(peaks: Mapping[str, Any], genes: Mapping[str, Any], window_bp: int) -> Links | None:
    """Return the links of registered peaks and genes; ``None`` where either have no positions.

    Parameters
    ----------
    peaks, genes
        What the fields of peaks and genes registered.
    window_bp
        As in :func:`near_links`.

    Examples
    --------
    >>> registered_links({"chrom_names": []}, {}, 10) is None
    True
    """
    if not len(peaks[CHROM_NAMES]) or VAR_START not in genes:
        return None
    code = {str(name): number for number, name in enumerate(peaks[CHROM_NAMES])}
    start_n, end_n = (np.asarray(genes[key], dtype=np.int64) for key in (VAR_START, VAR_END))
    chrom_n = np.array([code.get(str(name), -1) for name in genes[VAR_CHROM]], dtype=np.int64)
    chrom_n[start_n < 0] = -1
    codes, middle = (np.asarray(peaks[key], dtype=np.int64) for key in (CHROM_CODES, POSITIONS))
    return near_links(codes, middle, chrom_n, start_n, end_n, window_bp=window_bp)


class LocalReadout(nn.Module):
    r"""A linear map from the open peaks near each gene to its expression.

    .. math:: u_{in} = \sum_{l : n(l) = n} w_l (x_{i p(l)} - m_l)

    with links l of a peak p(l) and a gene n(l), x whether the peak is open, and m the share of the training cells where
    it is. Beyond the paper. The cost is in proportion to the links of the open peaks.

    Parameters
    ----------
    links
        Pairs of peaks and genes.
    n_peaks, n_genes
        Sizes of the vocabularies.

    Examples
    --------
    >>> readout = LocalReadout(Links(np.array([0, 1]), np.array([0, 0])), 2, 1)
    >>> _ = nn.init.ones_(readout.weight)
    >>> readout(torch.tensor([[1, 2, 3], [1, 3, 0]])).tolist()
    [[2.0], [1.0]]
    """

    first: Tensor
    peak: Tensor
    gene: Tensor
    mean: Tensor
    is_used: Tensor

    def __init__(self, links: Links, n_peaks: int, n_genes: int) -> None:
        super().__init__()
        n_links = links.peak_l.size
        self.n_genes = n_genes
        self.weight = nn.Parameter(torch.zeros(n_links))
        self.register_buffer("mean", torch.zeros(n_links))
        # 0 where the validation cells are told best without: the weights then stay at zero, in later trainings too
        self.register_buffer("is_used", torch.ones(()))
        # they follow from the vocabulary, so they are no part of the state
        first = np.searchsorted(links.peak_l, np.arange(n_peaks + 1))
        self.register_buffer("first", torch.from_numpy(first), persistent=False)
        self.register_buffer("peak", torch.from_numpy(links.peak_l), persistent=False)
        self.register_buffer("gene", torch.from_numpy(links.gene_l), persistent=False)

    def forward(self, tokens_bt: Tensor, absent_a: Tensor | None = None) -> Tensor:
        """Return what is added to the expression of each gene, in its standard deviations, shape (b, n).

        Parameters
        ----------
        tokens_bt
            Rows of the peak table; pads, [CLS] and peaks outside the vocabulary are below 2 and add nothing.
        absent_a
            Peaks of the vocabulary that the data do not have: they are neither open nor closed, and add nothing.
        """
        cell_o, at_o = (tokens_bt >= N_SPECIAL).nonzero(as_tuple=True)
        peak_o = tokens_bt[cell_o, at_o] - N_SPECIAL
        first_o = self.first[peak_o]
        n_o = self.first[peak_o + 1] - first_o
        cell_k = cell_o.repeat_interleave(n_o)
        link_k = torch.arange(cell_k.numel(), device=n_o.device) + (first_o - n_o.cumsum(0) + n_o).repeat_interleave(
            n_o
        )
        flat = self.weight.new_zeros(len(tokens_bt) * self.n_genes)
        open_bn = flat.index_add(0, cell_k * self.n_genes + self.gene[link_k], self.weight[link_k])
        return self.is_used * (open_bn.view(-1, self.n_genes) - self._offset(absent_a))

    def _offset(self, absent_a: Tensor | None) -> Tensor:
        """Return what a cell with the mean of all peaks would add up to, shape (n,)."""
        mean_l = self.weight * self.mean
        if absent_a is not None:
            is_there_p = torch.ones(len(self.first) - 1, device=mean_l.device).index_fill(0, absent_a, 0.0)
            mean_l = mean_l * is_there_p[self.peak]
        return mean_l.new_zeros(self.n_genes).index_add(0, self.gene, mean_l)

    def of_gene(self, tokens_bt: Tensor, gene: int) -> Tensor:
        """Return what each open peak adds to a gene, shape (b, t): gradient × input of whether it is open."""
        own_l = self.gene == gene
        weight_p = self.weight.new_zeros(len(self.first) + N_SPECIAL - 1)
        weight_p = weight_p.index_add(0, self.peak[own_l] + N_SPECIAL, self.weight[own_l])
        return self.is_used * weight_p[tokens_bt]

    def start(self, weight_l: np.ndarray, mean_l: np.ndarray, *, is_used: bool) -> None:
        """Set the weights before training.

        Parameters
        ----------
        weight_l, mean_l
            Weights, and shares of the training cells where the peak is open.
        is_used
            Whether the readout adds anything.
        """
        with torch.no_grad():
            self.weight.copy_(torch.from_numpy(weight_l))
        self.mean.copy_(torch.from_numpy(mean_l))
        self.is_used.fill_(float(is_used))


__all__ = ["Links", "LocalReadout", "near_links", "registered_links"]
