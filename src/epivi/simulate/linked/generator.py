"""Simulated multiome in which every gene follows the accessibility of the peaks beside it."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd
from scipy import sparse

from epivi._errors import ConfigError
from epivi._keys import MOD_ATAC, MOD_RNA, UNS_SIMULATION
from epivi.simulate._rna import DEPTH_CORRELATION
from epivi.simulate.linked._places import lay_out, link_table
from epivi.simulate.linked._setting import LinkedSetting

if TYPE_CHECKING:
    from mudata import MuData

# With batch_effect=1 a cell keeps this share of its reads, and this share of the peaks is lost, and gained.
KEPT_SHARE: Final = 0.4
CHANGED_SHARE: Final = 0.05

SLOPE, PEAK_CENTRE, GENE_CENTRE = 6.0, 0.4, 0.5  # states act through sigmoid(6 (state - centre))
FLOOR: Final = 0.005  # of the rate of a gene whose state is low, relative to a high one
LEVEL_SD: Final = 0.5
GAINED: Final = 0.9  # accessibility of a gained peak in every cell

_MAX_SCALE = 1e4  # beyond it, counts of open peaks would be absurd
_ROWS = 1024  # rows at once, to bound the dense block
_CELLS, _TYPES, _STATES, _LEVELS, _DEPTHS, _BATCHES, _PEAKS, _GENES = range(1, 9)  # 0: places


def linked_multiome(  # noqa: PLR0913
    n_cells: int = 1000,
    *,
    n_types: int = 8,
    n_peaks: int = 500,
    n_genes: int = 200,
    peaks_per_gene: int = 3,
    n_batches: int = 1,
    batch_effect: float = 0.0,
    thinned_share: float = 1.0,
    mean_open: float = 0.35,
    mean_counts: float = 3.0,
    within_sd: float = 1.0,
    n_programs: int = 0,
    depth_sd: float = 0.3,
    binary: bool = True,
    seed: int = 0,
) -> MuData:
    r"""Simulate a multiome in which every gene follows the peaks beside it.

    Gene g has in cell n of type t the state :math:`s_{ng} = \mu_{tg} + \omega \epsilon_{ng}`, with
    :math:`\mu, \epsilon \sim \mathrm{Normal}(0, 1)`. A peak linked to the genes G(p) has the state
    :math:`s_{np} = \sum_{g \in G(p)} s_{ng} / \sqrt{|G(p)|}`, a type-specific peak :math:`\mu_{tp}`, a background peak
    0. Depths :math:`d` are log-normal with mean 1. Then

    .. math::

        \lambda_{np} &= c\, d_n\, \mathrm{sigmoid}(b_p + 6 (s_{np} - 0.4)), &
        x_{np} &\sim \mathrm{Poisson}(\lambda_{np}), &
        P(\text{open}) &= 1 - e^{-\lambda_{np}} \\
        \rho_{ng} &= c'\, d'_n e^{a_g} (0.005 + \mathrm{sigmoid}(6 (s_{ng} - 0.5))), &
        y_{ng} &\sim \mathrm{Poisson}(\rho_{ng})

    with :math:`a, b \sim \mathrm{Normal}(0, 0.5)` and constants c and c' that give the means asked for.

    Parameters
    ----------
    n_cells, n_types, n_batches
        Numbers of cells, types and batches. Types and batches are of equal size and independent of each other.
    n_peaks, n_genes, peaks_per_gene
        Size of the genome. Links take up to 90 % of the peaks; if they need more, neighbouring genes share peaks. Of
        the other peaks half are type-specific and half background.
    batch_effect
        Strength e, 0 to 1, of the effect on the accessibility of every batch but the first: cells keep 1 - 0.6 e of
        their reads, 5 e % of the peaks are lost and as many are open everywhere. Expression has no batch effect.
    thinned_share
        Share of the cells of those batches that lose reads.
    mean_open, mean_counts
        Mean share of the peaks that are open, and mean count of a gene, before the batch effect.
    within_sd
        Standard deviation omega of the state within a type; 0 if the type is to say all.
    n_programs
        Number of programs, each moving all genes, that make up the variation within types; 0 if it is independent for
        every gene.
    depth_sd
        Standard deviation of the logarithm of the depth; the depths of the two modalities have correlation 0.5 in
        their logarithms.
    binary
        Accessibility as 0 and 1 instead of counts.
    seed
        Seed of everything.

    Returns
    -------
    MuData with cell_type and batch (categorical) in ``obs`` and in that of both modalities, and

    - ``mod["atac"]`` csr_matrix of int32; ``obs["thinned"]``; ``var`` chrom, start, end, kind ("linked", "type",
      "background"), sorted along the genome;
    - ``mod["rna"]`` csr_matrix of int32 counts; ``var`` chrom, start, end, strand;
    - ``uns["simulation"]`` the arguments and: links (table of gene, peak, gene_index, peak_index and distance in bp
      from the start of the gene to the centre of the peak), chrom_sizes (bp), cells (the names in the order of the
      arrays that follow), open_probability (cells, peaks), rate (cells, genes: mean count), state (cells, genes),
      type_state (types, genes), atac_depth and rna_depth (cells,), peak_effect (batches, peaks: -1 lost, 1 gained).

    Raises
    ------
    ConfigError
        If an argument is out of its range, there are fewer cells than types or batches, fewer peaks than
        ``peaks_per_gene``, more than 46 peaks a gene, which do not fit within 50 kb, or ``mean_open`` is out of reach.

    Notes
    -----
    The true open probability, rate and state take 4 n (p + 2 g) bytes. A cell may have no open peak if
    ``mean_open`` is small.

    Examples
    --------
    >>> mdata = linked_multiome(50, n_types=2, n_peaks=60, n_genes=20)
    >>> mdata["atac"].shape, mdata["rna"].shape
    ((50, 60), (50, 20))
    >>> links = mdata.uns["simulation"]["links"]
    >>> len(links), bool((links["distance"] <= 50_000).all())
    (60, True)
    """
    s = LinkedSetting.checked(dict(locals()))
    peaks, genes, link_gk, sizes = lay_out(s)
    type_n = s.rng(_CELLS, 0).permutation(np.arange(s.n_cells) % s.n_types)
    batch_n = s.rng(_CELLS, 1).permutation(np.arange(s.n_cells) % s.n_batches)
    type_state_tg = s.rng(_TYPES, 0).normal(size=(s.n_types, s.n_genes))
    state_ng = type_state_tg[type_n] + s.within_sd * _variation(s)
    atac_depth_n, rna_depth_n = _depths(s)
    rate_ng = _expression(s, state_ng, rna_depth_n)
    accessible_np = _accessibility(s, state_ng, type_n, peaks["kind"].to_numpy(), link_gk)
    kept_n, effect_bp = _batch_effect(s, batch_n)
    intensity_np = _intensity(s, accessible_np, atac_depth_n, kept_n, effect_bp[batch_n])
    x_np, y_ng = _poisson(intensity_np, s.rng(_PEAKS)), _poisson(rate_ng, s.rng(_GENES))
    if s.binary:
        x_np.data[:] = 1
    obs = pd.DataFrame({"cell_type": _category("type", type_n), "batch": _category("batch", batch_n)})
    obs.index = pd.Index([f"cell_{n}" for n in range(s.n_cells)])
    record = {
        "simulator": "linked_multiome",
        **vars(s),
        "links": link_table(peaks, genes, link_gk),
        "chrom_sizes": sizes,
        "cells": obs.index.to_numpy(),
        "open_probability": -np.expm1(-intensity_np),
        "rate": rate_ng.astype(np.float32),
        "state": state_ng.astype(np.float32),
        "type_state": type_state_tg,
        "atac_depth": atac_depth_n,
        "rna_depth": rna_depth_n,
        "peak_effect": effect_bp,
    }
    return _join((x_np, obs.assign(thinned=kept_n < 1), peaks), (y_ng, obs, genes), record)


def _variation(s: LinkedSetting) -> np.ndarray:
    """Draw the variation within types, of variance one, shape (cells, genes)."""
    rng = s.rng(_STATES)
    if s.n_programs == 0:
        return rng.normal(size=(s.n_cells, s.n_genes))
    loading_kg = rng.normal(size=(s.n_programs, s.n_genes))
    return rng.normal(size=(s.n_cells, s.n_programs)) @ (loading_kg / np.linalg.norm(loading_kg, axis=0))


def _depths(s: LinkedSetting) -> tuple[np.ndarray, np.ndarray]:
    """Draw the relative depths of the two modalities: log-normal, mean one."""
    first_n, own_n = s.rng(_DEPTHS).normal(size=(2, s.n_cells))
    second_n = DEPTH_CORRELATION * first_n + np.sqrt(1 - DEPTH_CORRELATION**2) * own_n
    atac_n, rna_n = (np.exp(s.depth_sd * z_n - s.depth_sd**2 / 2) for z_n in (first_n, second_n))
    return atac_n, rna_n


def _expression(s: LinkedSetting, state_ng: np.ndarray, depth_n: np.ndarray) -> np.ndarray:
    """Return the rate of every gene, shape (cells, genes), with the mean ``mean_counts``."""
    from scipy.special import expit

    level_g = s.rng(_LEVELS, 0).normal(0.0, LEVEL_SD, s.n_genes)
    rate_ng = depth_n[:, None] * np.exp(level_g) * (FLOOR + expit(SLOPE * (state_ng - GENE_CENTRE)))
    return rate_ng * (s.mean_counts / rate_ng.mean())


def _accessibility(
    s: LinkedSetting, state_ng: np.ndarray, type_n: np.ndarray, kind_p: np.ndarray, link_gk: np.ndarray
) -> np.ndarray:
    """Return the accessibility of every peak, between 0 and 1, float32, shape (cells, peaks)."""
    from scipy.special import expit

    indptr = np.arange(s.n_genes + 1) * s.peaks_per_gene
    shape = (s.n_genes, s.n_peaks)
    linked_gp = sparse.csr_matrix((np.ones(link_gk.size), link_gk.ravel(), indptr), shape=shape)
    state_np = state_ng @ linked_gp / np.sqrt(np.maximum(linked_gp.sum(axis=0).A1, 1.0))
    own_p = kind_p == "type"
    state_np[:, own_p] = s.rng(_TYPES, 1).normal(size=(s.n_types, s.n_peaks))[:, own_p][type_n]
    level_p = s.rng(_LEVELS, 1).normal(0.0, LEVEL_SD, s.n_peaks)
    return expit(level_p + SLOPE * (state_np - PEAK_CENTRE)).astype(np.float32)


def _intensity(
    s: LinkedSetting, accessible_np: np.ndarray, depth_n: np.ndarray, kept_n: np.ndarray, effect_np: np.ndarray
) -> np.ndarray:
    """Return the expected fragments of every peak after the batch effect, float32, shape (cells, peaks)."""
    scale = _scale(depth_n[:_ROWS, None] * accessible_np[:_ROWS], s.mean_open)
    accessible_np = np.where(effect_np > 0, np.float32(GAINED), accessible_np * (effect_np >= 0))
    return accessible_np * (scale * kept_n * depth_n).astype(np.float32)[:, None]


def _scale(accessible_np: np.ndarray, mean_open: float) -> float:
    """Return the factor c at which the mean of 1 - exp(-c accessible) is ``mean_open``."""
    from scipy.optimize import brentq

    def excess(log_c: float) -> float:
        return float(-np.expm1(-np.exp(log_c) * accessible_np).mean() - mean_open)

    highest = float(np.log(_MAX_SCALE))
    if excess(highest) < 0:
        message = (
            f"mean_open={mean_open:g} is out of reach: at most {mean_open + excess(highest):.3g} of these peaks can "
            "be open. Give a smaller value, or more peaks and types."
        )
        raise ConfigError(message)
    return float(np.exp(brentq(excess, -20.0, highest)))


def _batch_effect(s: LinkedSetting, batch_n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the share of reads that a cell keeps, and the peaks lost (-1) and gained (1), shape (batches, peaks)."""
    thinned_n = (s.rng(_BATCHES).random(s.n_cells) < s.thinned_share) & (batch_n > 0) & (s.batch_effect > 0)
    kept_n = np.where(thinned_n, 1 - (1 - KEPT_SHARE) * s.batch_effect, 1.0)
    effect_bp = np.zeros((s.n_batches, s.n_peaks), dtype=np.int8)
    n_changed = round(CHANGED_SHARE * s.batch_effect * s.n_peaks)
    for b in range(1, s.n_batches):
        changed = s.rng(_BATCHES, b).permutation(s.n_peaks)[: 2 * n_changed]
        effect_bp[b, changed[:n_changed]] = -1
        effect_bp[b, changed[n_changed:]] = 1
    return kept_n, effect_bp


def _poisson(mean_nf: np.ndarray, rng: np.random.Generator) -> sparse.csr_matrix:
    """Draw counts, a block of rows at a time."""
    blocks = [
        sparse.csr_matrix(rng.poisson(mean_nf[first : first + _ROWS]).astype(np.int32))
        for first in range(0, len(mean_nf), _ROWS)
    ]
    return sparse.csr_matrix(sparse.vstack(blocks))


def _join(
    atac: tuple[sparse.csr_matrix, pd.DataFrame, pd.DataFrame],
    rna: tuple[sparse.csr_matrix, pd.DataFrame, pd.DataFrame],
    record: dict[str, Any],
) -> MuData:
    """Join the two modalities, each given as X, obs and var."""
    from anndata import AnnData
    from mudata import MuData

    modalities = {name: AnnData(x, obs=obs, var=var) for name, (x, obs, var) in ((MOD_ATAC, atac), (MOD_RNA, rna))}
    with warnings.catch_warnings():
        # mudata 0.4 drops columns in place, which pandas 3.1 deprecates
        warnings.filterwarnings("ignore", message="The inplace keyword", category=DeprecationWarning)
        mdata = MuData(modalities)
    for key in rna[1]:
        mdata.obs[key] = rna[1][key]
    mdata.uns[UNS_SIMULATION] = record
    return mdata


def _category(name: str, code_n: np.ndarray) -> pd.Categorical[str]:
    """Return numbers as categories ``name_0``, ``name_1`` and on."""
    names = pd.Index([f"{name}_{rank}" for rank in range(code_n.max() + 1)])
    return pd.Categorical.from_codes(code_n, categories=names)
