"""The start of the local readout: a ridge regression of each gene on the peaks near it, beside that on cell vectors.

Legend of shapes: c cells, d width, p peaks, n genes, g genes of a block, l links of a peak and a gene, k links of a
gene.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from scipy import sparse

from epivi.models.epifoundation.start.readout import Moments, reduced_rank_ridge

if TYPE_CHECKING:
    from collections.abc import Iterator

    from epivi.models.epifoundation.heads.local import Links

# in units of cells times the mean variance of the linked peaks
PENALTIES = tuple(10.0 ** (exponent / 2) for exponent in range(-4, 7))
# rounds, and the share of the validation error that one must save for another to follow, and the links to be used at
# all: on data where peaks near genes tell nothing, the best of eleven penalties saves 0.01 to 0.04 % by chance
ROUNDS, LEAST_GAIN = 6, 2e-3
# numbers of a dense block of cells × genes
BLOCK = 2**22


class Cells(NamedTuple):
    """What the fit reads of cells.

    Attributes
    ----------
    z_cd
        Vectors.
    open_cp
        Which peaks are open, 0 or 1.
    y_cn
        Expression, zeros not stored.
    mean_n, sd_n
        What expression is centred by, and the unit in which it is told.
    """

    z_cd: np.ndarray
    open_cp: sparse.csc_array
    y_cn: sparse.csc_array
    mean_n: np.ndarray
    sd_n: np.ndarray

    def units(self, gene_g: np.ndarray) -> np.ndarray:
        """Return the expression of genes, centred and in units, shape (c, g)."""
        return (self.y_cn[:, gene_g].toarray().astype(np.float64) - self.mean_n[gene_g]) / self.sd_n[gene_g]


class Fit(NamedTuple):
    """Weights of a fit.

    Attributes
    ----------
    linear_dn
        Of the cell vectors.
    local_l, mean_l
        Of the links, and the share of training cells where their peak is open.
    penalty
        Penalty of the links, in units of cells times the mean variance of the linked peaks; infinite if none is used.
    gain_linear, gain
        Share of the squared error of the mean that the vectors save of validation cells when they are fitted first,
        and that both save.
    """

    linear_dn: np.ndarray
    local_l: np.ndarray
    mean_l: np.ndarray
    penalty: float
    gain_linear: float
    gain: float


class Backfit:
    r"""Fits expression by a map of the cell vectors and, for each gene, one of the peaks near it, in turns.

    .. math:: y_{cn} \approx z_c' B_n + \sum_{l : n(l) = n} w_l (x_{c p(l)} - m_l)

    In each round B is a ridge regression of reduced rank of what the links leave
    (:func:`~epivi.models.epifoundation.start.readout.reduced_rank_ridge`), and w one of what B leaves,

    .. math:: w_n = (X_n'X_n + \lambda C \bar v I)^{-1} X_n' r_n

    with the centred columns X of the peaks near the gene, C cells, and the mean variance v of the linked peaks: peaks
    that are rarely open shrink more. The penalty is one for all genes, chosen by the squared error of validation cells
    summed over genes; the links are left out where they save less than 0.2 % of it. Rounds end when that error falls by
    less than that, or rises.

    Parameters
    ----------
    train, validation
        Cells to fit and to choose by.
    links
        Pairs of peaks and genes.
    is_linear
        Whether the cell vectors are read.
    """

    def __init__(self, train: Cells, validation: Cells, links: Links, *, is_linear: bool = True) -> None:
        self.train, self.validation = train, validation
        self.is_linear = is_linear
        self.peak_l, self.gene_l = links
        n_cells, n_peaks = train.open_cp.shape
        self.n_genes = train.y_cn.shape[1]
        self.mean_p = np.asarray(train.open_cp.sum(0), dtype=np.float64).ravel() / max(n_cells, 1)
        self.shape_pn = (n_peaks, self.n_genes)
        # the links of each gene, in the order of the links
        self.by_gene = np.argsort(self.gene_l, kind="stable")
        self.first_n = np.searchsorted(self.gene_l[self.by_gene], np.arange(self.n_genes + 1))
        share_l = self.mean_p[self.peak_l]
        self.unit = max(n_cells * float((share_l * (1.0 - share_l)).mean()), np.finfo(float).tiny)

    def run(self) -> Fit:
        """Return the fit of the round with the lowest validation error."""
        linear_dn, local_l = np.zeros((self.train.z_cd.shape[1], self.n_genes)), np.zeros(self.peak_l.size)
        total = max(self._moments(self.validation, local_l).yy, np.finfo(float).tiny)
        penalty, alone, least = np.inf, np.inf, np.inf
        for number in range(ROUNDS):
            new_dn = linear_dn
            if self.is_linear:
                new_dn, _ = reduced_rank_ridge(*(self._moments(c, local_l) for c in (self.train, self.validation)))
            new_l, chosen, error, without = self._near(new_dn)
            if number == 0:
                alone = without
            if error >= least:
                break
            is_last = error > (1.0 - LEAST_GAIN) * least or not np.isfinite(chosen)
            linear_dn, local_l, penalty, least = new_dn, new_l, chosen, error
            if is_last:
                break
        return Fit(linear_dn, local_l, self.mean_p[self.peak_l], penalty, 1.0 - alone / total, 1.0 - least / total)

    def _blocks(self) -> Iterator[np.ndarray]:
        """Yield rows of genes, so many that a dense block of them is small."""
        size = max(1, BLOCK // max(len(self.train.z_cd), len(self.validation.z_cd), 1))
        for start in range(0, self.n_genes, size):
            yield np.arange(start, min(start + size, self.n_genes))

    def _moments(self, cells: Cells, local_l: np.ndarray) -> Moments:
        """Return the sums over cells of vectors and of what the links leave of the expression."""
        weight_pn = sparse.csc_array((local_l, (self.peak_l, self.gene_l)), shape=self.shape_pn)
        zy_dn, yy = np.zeros((cells.z_cd.shape[1], self.n_genes)), 0.0
        for gene_g in self._blocks():
            near_pg = weight_pn[:, gene_g]
            rest_cg = cells.units(gene_g) - (cells.open_cp @ near_pg).toarray() + self.mean_p @ near_pg
            zy_dn[:, gene_g] = cells.z_cd.T @ rest_cg
            yy += float(np.square(rest_cg).sum())
        return Moments(len(cells.z_cd), cells.z_cd.T @ cells.z_cd, zy_dn, yy)

    def _near(self, linear_dn: np.ndarray) -> tuple[np.ndarray, float, float, float]:
        """Return the weights of the links, their penalty, the squared validation error, and that without links."""
        penalty_a = np.array(PENALTIES) * self.unit
        weight_al = np.zeros((penalty_a.size, self.peak_l.size))
        error_a, without = np.zeros(penalty_a.size), 0.0
        for gene_g in self._blocks():
            rest_cg, held_cg = (
                cells.units(gene_g) - cells.z_cd @ linear_dn[:, gene_g] for cells in (self.train, self.validation)
            )
            for gene, rest_c, held_c in zip(gene_g, rest_cg.T, held_cg.T, strict=True):
                own_k = self.by_gene[self.first_n[gene] : self.first_n[gene + 1]]
                left = float(np.square(held_c).sum())
                without += left
                error_a += left
                if own_k.size:
                    gram_kk, cross_k = self._products(self.train, own_k, rest_c)
                    weight_ak = ridges(gram_kk, cross_k, penalty_a)
                    weight_al[:, own_k] = weight_ak
                    gram_kk, cross_k = self._products(self.validation, own_k, held_c)
                    error_a += ((weight_ak @ gram_kk - 2.0 * cross_k) * weight_ak).sum(1)
        best = int(error_a.argmin())
        if error_a[best] >= (1.0 - LEAST_GAIN) * without:
            return np.zeros(self.peak_l.size), np.inf, without, without
        return weight_al[best], PENALTIES[best], float(error_a[best]), without

    def _products(self, cells: Cells, own_k: np.ndarray, rest_c: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return X'X and X'r of the peaks near a gene, centred by their means over the training cells."""
        peak_k = self.peak_l[own_k]
        open_ck, mean_k = cells.open_cp[:, peak_k], self.mean_p[peak_k]
        shift_kk = np.outer(mean_k, open_ck.sum(0) - 0.5 * len(rest_c) * mean_k)
        return (open_ck.T @ open_ck).toarray() - shift_kk - shift_kk.T, open_ck.T @ rest_c - mean_k * rest_c.sum()


def ridges(gram_kk: np.ndarray, cross_k: np.ndarray, penalty_a: np.ndarray) -> np.ndarray:
    r"""Return the weights :math:`(X'X + \lambda I)^{-1} X'r` for each of several penalties, shape (a, k).

    Parameters
    ----------
    gram_kk, cross_k
        X'X and X'r.
    penalty_a
        Penalties above 0.

    Examples
    --------
    >>> ridges(np.array([[3.0]]), np.array([8.0]), np.array([1.0, 5.0])).tolist()
    [[2.0], [1.0]]
    """
    values_k, vectors_kk = np.linalg.eigh(gram_kk)
    return ((vectors_kk.T @ cross_k) / (np.maximum(values_k, 0.0) + penalty_a[:, None])) @ vectors_kk.T


__all__ = ["Backfit", "Cells", "Fit", "ridges"]
