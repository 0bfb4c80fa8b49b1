"""A linear readout of expression from the cell vectors, fitted in closed form before training.

Legend of shapes: b cells, d width, n genes, r rank.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable

PENALTIES = (3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
RANKS = (1, 2, 3, 5, 8, 12, 20, 32, 64)


class Moments(NamedTuple):
    """Sums over cells that a least-squares fit needs.

    Attributes
    ----------
    n
        Cells.
    zz_dd, zy_dn, yy
        Sums of z z', z y' and of the squares of y.
    """

    n: int
    zz_dd: np.ndarray
    zy_dn: np.ndarray
    yy: float

    @classmethod
    def of(cls, pairs: Iterable[tuple[np.ndarray, np.ndarray]]) -> Moments:
        """Sum over minibatches of vectors (b, d) and values (b, n).

        Examples
        --------
        >>> Moments.of([(np.ones((2, 1)), np.ones((2, 3)))]).zy_dn.tolist()
        [[2.0, 2.0, 2.0]]
        """
        n, zz_dd, zy_dn, yy = 0, 0.0, 0.0, 0.0
        for z_bd, y_bn in pairs:
            n += len(z_bd)
            zz_dd = zz_dd + z_bd.T @ z_bd
            zy_dn = zy_dn + z_bd.T @ y_bn
            yy += float(np.square(y_bn).sum())
        return cls(n, np.asarray(zz_dd), np.asarray(zy_dn), yy)

    def error(self, weight_dn: np.ndarray) -> float:
        """Return the mean over cells of the squared error of z' W, summed over genes."""
        explained = 2.0 * float((weight_dn * self.zy_dn).sum()) - float((weight_dn * (self.zz_dd @ weight_dn)).sum())
        return (self.yy - explained) / max(self.n, 1)


def reduced_rank_ridge(train: Moments, validation: Moments) -> tuple[np.ndarray, dict[str, float]]:
    r"""Return the weights of a ridge regression of reduced rank whose penalty and rank fit validation cells best.

    .. math:: B = (Z'Z + \lambda n I)^{-1} Z'Y, \qquad B_r = B V_r V_r'

    with the first r right singular vectors V of the fitted values Z B (Mukherjee and Zhu, 2011). Rank 0, which
    predicts the mean, is among the candidates.

    Parameters
    ----------
    train, validation
        Sums over the cells to fit and to choose by; z and y are centred, z has a standard deviation of about 1.

    Returns
    -------
    Shape (d, n), and what was chosen: ``penalty``, ``rank`` and ``gain``, the share of the squared error of the mean
    that is saved on validation cells.

    Examples
    --------
    >>> rng = np.random.default_rng(0)
    >>> z = rng.normal(size=(200, 4))
    >>> y = z[:, :1] @ np.ones((1, 3)) + 0.1 * rng.normal(size=(200, 3))
    >>> weight, chosen = reduced_rank_ridge(Moments.of([(z[:100], y[:100])]), Moments.of([(z[100:], y[100:])]))
    >>> chosen["gain"] > 0.9
    True
    """
    width, n_genes = train.zy_dn.shape
    best = np.zeros((width, n_genes))
    least = mean_error = validation.error(best)
    chosen = {"penalty": np.inf, "rank": 0.0, "gain": 0.0}
    values, vectors = np.linalg.eigh(train.zz_dd)
    root_dd = (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T
    for penalty in PENALTIES:
        weight_dn = vectors @ ((vectors.T @ train.zy_dn) / (values + penalty * train.n)[:, None])
        _, _, right_rn = np.linalg.svd(root_dd @ weight_dn, full_matrices=False)
        for rank in [r for r in RANKS if r < min(width, n_genes)] + [min(width, n_genes)]:
            reduced_dn = (weight_dn @ right_rn[:rank].T) @ right_rn[:rank]
            error = validation.error(reduced_dn)
            if error < least:
                best, least = reduced_dn, error
                chosen = {"penalty": penalty, "rank": float(rank), "gain": 1.0 - error / mean_error}
    return best, chosen
