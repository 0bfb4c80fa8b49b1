"""Where the vectors of genes start: at the loadings of the genes on the components of their correlations.

Legend of shapes: n cells, m genes, c data sets, r components.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import sparse
from scipy.sparse.linalg import LinearOperator, svds

LEAST_SD = 1e-3


def correlation_loadings(
    values_nm: Any,
    n_comps: int,
    *,
    measured: tuple[np.ndarray, np.ndarray] | None = None,
    seed: int = 0,
) -> np.ndarray:
    r"""Return the loadings of genes on the leading components of their correlations, so that L L' approximates these.

    .. math:: Z = U S V', \qquad L = V S / \sqrt n

    with Z the values of each gene in units of its standard deviation about its mean. In cells of a data set that does
    not measure a gene it stands at its mean, so that not to be measured is no likeness. Z is never made dense.

    Parameters
    ----------
    values_nm
        Log-normalised values, sparse, shape (n, m).
    n_comps
        Components r asked for; fewer where cells or genes are fewer.
    measured
        Which genes each data set measures, shape (c, m), and the data set of each cell, shape (n,).
    seed
        Seed of the start vector of the decomposition.

    Returns
    -------
    Shape (m, r), float64, largest component first; 0 for genes without variance.

    Examples
    --------
    >>> x = np.random.default_rng(0).normal(size=(50, 1)) @ [[1.0, 1.0, -1.0, -1.0]]
    >>> np.round(np.abs(correlation_loadings(sparse.csr_matrix(x), 1)).ravel(), 3).tolist()
    [1.0, 1.0, 1.0, 1.0]
    """
    x_nm = sparse.csr_matrix(values_nm, dtype=np.float64)
    n, n_genes = x_nm.shape
    measured_cm, code_n = measured if measured is not None else (np.ones((1, n_genes), bool), np.zeros(n, np.int64))
    size_c = np.bincount(code_n, minlength=len(measured_cm))
    n_m = np.maximum(size_c @ measured_cm, 1)
    mean_m = np.asarray(x_nm.sum(0)).ravel() / n_m
    square_m = np.asarray(x_nm.multiply(x_nm).sum(0)).ravel() / n_m
    sd_m = np.sqrt(np.maximum(square_m - mean_m**2, 0.0))
    scale_m = np.where(sd_m > LEAST_SD, 1.0 / np.maximum(sd_m, LEAST_SD), 0.0)
    scaled_nm = sparse.csr_matrix(x_nm @ sparse.diags(scale_m))
    centre_cm = measured_cm * (mean_m * scale_m)
    indicator_nc = sparse.csr_matrix((np.ones(n), (np.arange(n), code_n)), shape=(n, len(measured_cm)))

    def forward(v_m: np.ndarray) -> np.ndarray:
        return scaled_nm @ v_m - indicator_nc @ (centre_cm @ v_m)

    def backward(u_n: np.ndarray) -> np.ndarray:
        return scaled_nm.T @ u_n - centre_cm.T @ (indicator_nc.T @ u_n)

    n_used = min(n_comps, min(n, n_genes) - 1)
    if n_used < 1 or not scale_m.any():
        return np.zeros((n_genes, max(n_used, 0)))
    # fewer components than asked for where the operator has no more
    operator = LinearOperator((n, n_genes), matvec=forward, rmatvec=backward, dtype=np.float64)
    start = np.random.default_rng(seed).normal(size=min(n, n_genes))
    _, s_r, vt_rm = svds(operator, k=n_used, v0=start)
    order = np.argsort(-s_r)
    loadings_mr = vt_rm[order].T * (s_r[order] / np.sqrt(n))
    # the sign of a component is arbitrary: its largest loading is positive
    largest_r = np.abs(loadings_mr).argmax(0)
    return loadings_mr * np.where(loadings_mr[largest_r, np.arange(n_used)] < 0, -1.0, 1.0)
