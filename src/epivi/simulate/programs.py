"""Simulated expression counts with gene modules: what a gene tells of another, with the best possible imputation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd
from scipy import sparse

from epivi._errors import ConfigError
from epivi._keys import UNS_SIMULATION
from epivi.simulate._arguments import check_integer, check_number, stream

if TYPE_CHECKING:
    from collections.abc import Mapping

    from anndata import AnnData

GROUP_SHARE: Final = 0.5  # of the variance of an activity, in the modules that differ between groups

_LOADINGS = (0.5, 1.5)
_LEVEL_SD = 0.7
_NODES = 64  # of the quadrature over an activity
_STREAM = 7
_CELLS, _MODULES, _LEVELS, _GROUPS, _ACTIVITIES, _DEPTHS, _COUNTS = range(7)


def gene_programs(  # noqa: PLR0913
    n_cells: int = 1000,
    *,
    n_genes: int = 200,
    n_modules: int = 10,
    n_groups: int = 4,
    strength: float = 1.0,
    mean_counts: float = 2.0,
    dispersion: float = 0.0,
    depth_sd: float = 0.3,
    seed: int = 0,
) -> AnnData:
    r"""Simulate counts of genes that belong to modules.

    The activity of module m in cell n of group k is :math:`z_{nm} \sim \mathrm{Normal}(\mu_{km}, \tau_m^2)`. In the
    first half of the modules (rounded down) the group means have mean 0 and variance 0.5 over the groups and
    :math:`\tau^2 = 0.5`; in the others, and with one group, :math:`\mu = 0, \tau = 1`. With the loading
    :math:`l_g \sim \mathrm{Uniform}(0.5, 1.5)`, the strength s, log-normal levels :math:`\beta_g` and depths
    :math:`d_n` of mean 1,

    .. math::

        \rho_{ng} &= d_n \beta_g \exp(s l_g z_{n m(g)} - s^2 l_g^2 / 2) \\
        x_{ng} &\sim \mathrm{NB}(\text{mean } \rho_{ng}, \text{variance } \rho_{ng} + \phi \rho_{ng}^2)

    Parameters
    ----------
    n_cells, n_groups
        Numbers of cells and of groups, of equal size.
    n_genes, n_modules
        Numbers of genes and of modules, of equal size, to which the genes belong in random order.
    strength
        Strength s of the modules; with 0 the genes are independent given the depth.
    mean_counts
        Mean over the genes of the level, and so, about, of the counts.
    dispersion
        Dispersion phi; with 0 the counts are Poisson.
    depth_sd
        Standard deviation of the logarithm of the depth.
    seed
        Seed of everything.

    Returns
    -------
    AnnData with

    - ``X`` csr_matrix of int32 counts; ``obs`` group, ``var`` module (both categorical);
    - ``uns["simulation"]`` the arguments and: cells (the names in the order of the arrays that follow), module
      (genes,), loading and level (genes,), depth (cells,), activity (cells, modules), group_activity (groups, modules),
      activity_sd (modules,), rate (cells, genes) and conditional (cells, genes), both float32.

    Raises
    ------
    ConfigError
        If an argument is out of its range, there are more modules than genes or more groups than cells.

    Notes
    -----
    Two errors bound what imputation can reach. ``rate`` is the mean of a count given the hidden activity, which no
    model sees. ``conditional`` is its mean given all other genes of the cell, its depth and group and every
    parameter: no model that imputes a gene from the others has a smaller expected squared error. It is

    .. math::

        E[x_{ng} \mid x_{n,-g}] = \frac{\int \rho_{ng}(z)\, p(z) \prod_{h} p(x_{nh} \mid z)\, dz}
                                       {\int p(z) \prod_{h} p(x_{nh} \mid z)\, dz},

    with h over the other genes of the module, by the trapezoidal rule at 64 points within 6 standard deviations.

    Examples
    --------
    >>> adata = gene_programs(60, n_genes=20, n_modules=4, n_groups=2)
    >>> adata.shape, adata.var["module"].value_counts().tolist()
    ((60, 20), [5, 5, 5, 5])
    >>> truth, x = adata.uns["simulation"], adata.X.toarray()
    >>> bool(((truth["rate"] - x) ** 2).mean() < ((x.mean(axis=0) - x) ** 2).mean())
    True
    """
    a = _checked(dict(locals()))
    n_cells, n_genes, n_modules, n_groups, seed = (
        a[key] for key in ("n_cells", "n_genes", "n_modules", "n_groups", "seed")
    )
    group_n = stream(seed, _STREAM, _CELLS).permutation(np.arange(n_cells) % n_groups)
    rng = stream(seed, _STREAM, _MODULES)
    module_g = rng.permutation(np.arange(n_genes) % n_modules)
    loading_g = rng.uniform(*_LOADINGS, n_genes)
    level_g = np.exp(stream(seed, _STREAM, _LEVELS).normal(0.0, _LEVEL_SD, n_genes))
    level_g *= a["mean_counts"] / level_g.mean()
    mean_km, sd_m = _group_activities(n_groups, n_modules, seed)
    activity_nm = mean_km[group_n] + sd_m * stream(seed, _STREAM, _ACTIVITIES).normal(size=(n_cells, n_modules))
    depth_n = np.exp(stream(seed, _STREAM, _DEPTHS).normal(-(a["depth_sd"] ** 2) / 2, a["depth_sd"], n_cells))
    slope_g = a["strength"] * loading_g
    base_ng = depth_n[:, None] * level_g * np.exp(-(slope_g**2) / 2)
    rate_ng = base_ng * np.exp(slope_g * activity_nm[:, module_g])
    x_ng = _counts(rate_ng, a["dispersion"], stream(seed, _STREAM, _COUNTS))
    conditional_ng = np.empty((n_cells, n_genes), dtype=np.float32)
    for m in range(n_modules):
        at = module_g == m
        conditional_ng[:, at] = conditional_means(
            x_ng[:, at],
            base_ng[:, at],
            slope_g[at],
            mean_n=mean_km[group_n, m],
            sd=float(sd_m[m]),
            dispersion=a["dispersion"],
        )
    obs = pd.DataFrame({"group": _category("group", group_n)}, index=[f"cell_{n}" for n in range(n_cells)])
    var = pd.DataFrame({"module": _category("module", module_g)}, index=[f"gene_{g}" for g in range(n_genes)])
    record = {
        "simulator": "gene_programs",
        **a,
        "cells": obs.index.to_numpy(),
        "module": module_g,
        "loading": loading_g,
        "level": level_g,
        "depth": depth_n,
        "activity": activity_nm,
        "group_activity": mean_km,
        "activity_sd": sd_m,
        "rate": rate_ng.astype(np.float32),
        "conditional": conditional_ng,
    }
    return _assemble(x_ng, obs, var, record)


def conditional_means(
    x_ng: np.ndarray,
    base_ng: np.ndarray,
    slope_g: np.ndarray,
    *,
    mean_n: np.ndarray,
    sd: float,
    dispersion: float,
) -> np.ndarray:
    r"""Return the mean of every count given the other genes of its module.

    Parameters
    ----------
    x_ng, base_ng
        Counts, and their means at activity 0, shape (cells, genes of the module).
    slope_g
        Change of the log mean per unit of activity, shape (genes,).
    mean_n, sd
        Mean, shape (cells,), and standard deviation of the activity.
    dispersion
        Dispersion of the counts; 0 for Poisson.

    Returns
    -------
    Array of shape (cells, genes).

    Examples
    --------
    >>> one = np.ones((1, 1))
    >>> alone = conditional_means(one, one, np.ones(1), mean_n=np.zeros(1), sd=1.0, dispersion=0.0)
    >>> round(float(alone[0, 0]), 4)  # no other gene: the mean exp(1 / 2) of a log-normal
    1.6487
    """
    node_q = np.linspace(-6.0, 6.0, _NODES)
    z_nq = mean_n[:, None] + sd * node_q
    prior_q = -(node_q**2) / 2
    log_nq = np.broadcast_to(prior_q, z_nq.shape).copy()
    for x_n, base_n, slope in zip(x_ng.T, base_ng.T, slope_g, strict=True):
        log_nq += _log_mass(x_n, base_n, slope, z_nq, dispersion)
    mean_ng = np.empty(x_ng.shape)
    for g, (x_n, base_n, slope) in enumerate(zip(x_ng.T, base_ng.T, slope_g, strict=True)):
        others_nq = log_nq - _log_mass(x_n, base_n, slope, z_nq, dispersion)
        weight_nq = np.exp(others_nq - others_nq.max(axis=1, keepdims=True))
        rate_nq = base_n[:, None] * np.exp(slope * z_nq)
        mean_ng[:, g] = (weight_nq * rate_nq).sum(axis=1) / weight_nq.sum(axis=1)
    return mean_ng


def _log_mass(x_n: np.ndarray, base_n: np.ndarray, slope: float, z_nq: np.ndarray, dispersion: float) -> np.ndarray:
    """Return the log probability of a gene's counts at every activity, up to a term that does not depend on it."""
    log_rate_nq = np.log(base_n)[:, None] + slope * z_nq
    rate_nq = np.exp(log_rate_nq)
    if dispersion == 0:
        return x_n[:, None] * log_rate_nq - rate_nq
    return x_n[:, None] * log_rate_nq - (x_n[:, None] + 1 / dispersion) * np.log1p(dispersion * rate_nq)


def _checked(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments, each within its range."""
    a = dict(arguments)
    for key in ("n_cells", "n_genes", "n_modules", "n_groups"):
        a[key] = check_integer(key, a[key], low=1)
    a["seed"] = check_integer("seed", a["seed"])
    a["mean_counts"] = check_number("mean_counts", a["mean_counts"], low=1e-4, high=1e4)
    a["dispersion"] = check_number("dispersion", a["dispersion"], high=100.0)
    a |= {key: check_number(key, a[key], high=3.0) for key in ("strength", "depth_sd")}
    for many, few in (("n_modules", "n_genes"), ("n_groups", "n_cells")):
        if a[many] > a[few]:
            message = f"{many}={a[many]} is more than {few}={a[few]}: give at least one for each."
            raise ConfigError(message)
    return a


def _group_activities(n_groups: int, n_modules: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the mean activities of the groups, shape (groups, modules), and the standard deviations about them."""
    mean_km = stream(seed, _STREAM, _GROUPS).normal(size=(n_groups, n_modules))
    by_group_m = (np.arange(n_modules) < n_modules // 2) & (n_groups > 1)
    mean_km -= mean_km.mean(axis=0)
    spread_m = mean_km.std(axis=0)
    mean_km *= np.where(by_group_m, np.sqrt(GROUP_SHARE) / np.maximum(spread_m, 1e-12), 0.0)
    return mean_km, np.where(by_group_m, np.sqrt(1 - GROUP_SHARE), 1.0)


def _counts(rate_ng: np.ndarray, dispersion: float, rng: np.random.Generator) -> np.ndarray:
    """Draw Poisson counts, or negative binomial ones as Poisson with a Gamma rate."""
    if dispersion > 0:
        rate_ng = rate_ng * rng.gamma(1 / dispersion, dispersion, rate_ng.shape)
    return rng.poisson(rate_ng)


def _category(name: str, code_n: np.ndarray) -> pd.Categorical[str]:
    """Return numbers as categories ``name_0``, ``name_1`` and on."""
    names = pd.Index([f"{name}_{rank}" for rank in range(code_n.max() + 1)])
    return pd.Categorical.from_codes(code_n, categories=names)


def _assemble(x_ng: np.ndarray, obs: pd.DataFrame, var: pd.DataFrame, record: dict[str, Any]) -> AnnData:
    """Put counts, tables and truth into one AnnData."""
    from anndata import AnnData

    return AnnData(sparse.csr_matrix(x_ng.astype(np.int32)), obs=obs, var=var, uns={UNS_SIMULATION: record})
