"""Simulated single-cell accessibility with known cell types, depth and background (rule of SCAN-ATAC-Sim)."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Final, cast

import numpy as np
import pandas as pd
from scipy import sparse

from epivi._errors import ConfigError
from epivi._keys import UNS_SIMULATION
from epivi.simulate._arguments import cell_table, check_clip, check_integer, check_number, per_batch, stream
from epivi.simulate.profiles import (
    background_weights,
    check_profiles,
    check_weights,
    layout_stream,
    synthetic_profiles,
)
from epivi.simulate.regions import place_regions, resolve_chrom_sizes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from anndata import AnnData
    from numpy.typing import ArrayLike

    from epivi.simulate._arguments import CellCounts

# A type is called rare in a batch if its share of the batch's cells is below this.
RARE_SHARE: Final = 0.05

_STREAM = 1
_FRAGMENTS, _DRAWS = range(2)


@dataclass(frozen=True)
class _Depth:
    """How many fragments the cells of a simulation have; one entry a batch (limits: two), factors one a type."""

    median: np.ndarray
    log_sd: np.ndarray
    clip: np.ndarray
    rho: np.ndarray
    factor: np.ndarray

    def fragments(self, n: int, *, batch: int, cell_type: int, seed: int) -> np.ndarray:
        """Draw the number of fragments of n cells: exp(Normal(ln F, sigma)), clipped."""
        low, high = self.clip[batch]
        centre = np.log(self.median[batch] * self.factor[cell_type])
        log_f = stream(seed, _STREAM, batch, cell_type, _FRAGMENTS).normal(centre, self.log_sd[batch], n)
        # limited before exp, which overflows for a very wide spread
        return np.rint(np.clip(np.exp(np.minimum(log_f, np.log(max(high, 1.0)))), low, high)).astype(np.int64)


class WeightedSampler:
    """Weighted sampling without replacement among regions, by exponential keys.

    Region r gets the key Exp(1) / weight_r; the m smallest keys are the sample. This is the order of first arrivals of
    independent Poisson processes, so it equals drawing one region after the other in proportion to the weights.

    Parameters
    ----------
    weights
        Weights, shape (regions,). Regions of weight 0 are never drawn.
    columns
        Numbers under which the regions are returned, shape (regions,).

    Examples
    --------
    >>> sampler = WeightedSampler(np.array([0.0, 1.0, 2.0]), np.arange(3))
    >>> sorted(sampler.draw(5, np.random.default_rng(0)).tolist())
    [1, 2]
    """

    def __init__(self, weights: np.ndarray, columns: np.ndarray) -> None:
        positive = weights > 0
        self._columns = columns[positive]
        self._scale = weights[positive].max(initial=0.0) / weights[positive]
        self._keys = np.empty(self._columns.size)

    def draw(self, m: int, rng: np.random.Generator) -> np.ndarray:
        """Return the columns of m regions, or of all regions of positive weight if there are fewer."""
        if m >= self._columns.size:
            return self._columns
        if m == 0:
            return self._columns[:0]
        rng.standard_exponential(out=self._keys)
        np.multiply(self._keys, self._scale, out=self._keys)
        return self._columns[np.argpartition(self._keys, m - 1)[:m]]


def accessibility(  # noqa: PLR0913
    n_cells: CellCounts,
    *,
    n_fg: int = 2000,
    n_bg: int = 2000,
    specificity: float = 0.25,
    effect_sd: float = 1.6,
    median: float | Sequence[float] = 600,
    log_sd: float | Sequence[float] = 0.8,
    clip: Sequence = (100, 4000),
    rho: float | Sequence[float] = 0.4,
    chrom_sizes: Mapping[str, int] | str | None = None,
    profiles: Mapping[str, ArrayLike] | None = None,
    background: ArrayLike | None = None,
    depth_by_type: Sequence[float] | None = None,
    allow_empty: bool = False,
    seed: int = 0,
    profile_seed: int | None = None,
) -> AnnData:
    r"""Simulate single-cell accessibility counts with known cell types.

    A cell of type t has :math:`f \sim \exp(\mathrm{Normal}(\ln F, \sigma))` fragments, clipped; round(f rho) of them
    fall into foreground regions (weights of the type) and the rest into background regions (weights common to all
    types). For each of the two chromosome copies, half of either kind is a weighted draw without replacement. The count
    of a region is the number of copies that hit it: 0, 1 or 2.

    Parameters
    ----------
    n_cells
        Cells of each type; or one such list a batch, with 0 where a type is absent from a batch.
    n_fg, n_bg
        Numbers of foreground and background regions. ``profiles`` and ``background`` must have these lengths.
    specificity, effect_sd
        Share of foreground regions changed in a type, and standard deviation of the change of their log weight.
    median, log_sd, clip, rho
        Median F of the fragments, spread sigma of their logarithm, limits (low, high) of the fragments, and share of
        fragments in foreground. One value, or one a batch. ``log_sd=0`` gives every cell F fragments.
    chrom_sizes
        Lengths of chromosomes in base pairs, over which regions are spread in proportion; ``"hg38"`` for the 22
        autosomes of GRCh38; by default four chromosomes with 40, 30, 20 and 10 % of the regions.
    profiles
        Foreground weights by type, shape (n_fg,) each, for example from bulk data. They replace the synthetic ones;
        their keys name the types.
    background
        Background weights, shape (n_bg,); by default Gamma(2, 1).
    depth_by_type
        Factor on the median of each type. Depth and identity are then correlated.
    allow_empty
        Give the last cell of every batch no fragment, and permit a lower limit of 0 in ``clip``.
    seed
        Seed of the cells. A batch does not depend on the size of the others, nor a type on that of other types.
    profile_seed
        Seed of profiles, background and layout of the regions; by default ``seed``. All batches share the profiles.

    Returns
    -------
    AnnData with

    - ``X`` csr_matrix of int32 counts, cells by regions, regions sorted along the genome;
    - ``obs`` cell_type and batch (categorical), fragments (f), depth (open regions), rare (bool: less than 5 % of the
      cells of the batch are of this type);
    - ``var`` chrom, start, end (0-based, half-open), foreground (bool);
    - ``varm["bulk"]`` weight of every region by type; the weights of each kind sum to one;
    - ``uns["simulation"]`` all arguments and the versions used.

    Raises
    ------
    ConfigError
        If an argument is out of its range or has the wrong length, for example a negative number of cells, ``rho``
        outside 0 to 1, a reversed ``clip``, or ``n_bg=0`` with ``rho < 1``.
    DataError
        If ``profiles`` or ``background`` have the wrong shape or invalid weights.

    Notes
    -----
    The released run script of SCAN-ATAC-Sim gives every cell F fragments; here f is drawn unless ``log_sd=0``.
    A draw is capped at the number of regions of positive weight, then the row sum is below f.
    Regions are independent given the type; there are no doublets and no ambient fragments.

    References
    ----------
    Chen et al., SCAN-ATAC-Sim: a scalable and efficient method for simulating single-cell ATAC-seq data from
    bulk-tissue experiments, Bioinformatics 37 (2021).

    Examples
    --------
    >>> adata = accessibility([30, 20], n_fg=100, n_bg=100, median=40, clip=(10, 80), seed=1)
    >>> adata.shape, int(adata.X.max())
    ((50, 200), 2)
    >>> bool((adata.X.sum(1).A1 == adata.obs["fragments"]).all())
    True
    """
    arguments = dict(locals())
    table = cell_table(n_cells)
    n_batches, n_types = table.shape
    seed = check_integer("seed", seed)
    profile_seed = seed if profile_seed is None else check_integer("profile_seed", profile_seed)
    depth = _Depth(
        median=per_batch("median", median, n_batches, low=np.finfo(float).tiny),
        log_sd=per_batch("log_sd", log_sd, n_batches),
        clip=check_clip(clip, n_batches, allow_empty=allow_empty),
        rho=per_batch("rho", rho, n_batches, high=1.0),
        factor=_depth_factors(depth_by_type, n_types),
    )
    fg_by_type, bg_p = _weights(
        profiles, background, n_types=n_types, n_fg=n_fg, n_bg=n_bg, rho=depth.rho, profile_seed=profile_seed,
        specificity=specificity, effect_sd=effect_sd,
    )  # fmt: skip
    sizes = resolve_chrom_sizes(chrom_sizes)
    var = place_regions(n_fg, n_bg, chrom_sizes=sizes, rng=layout_stream(profile_seed))
    obs = _cells(table, list(fg_by_type), depth, seed=seed, allow_empty=allow_empty)
    counts = _draw_counts(obs, var["foreground"].to_numpy(), fg_by_type, bg_p, rho=depth.rho, seed=seed)
    record = _record(arguments, table=table, depth=depth, sizes=sizes, profile_seed=profile_seed)
    return _assemble(counts, obs, var, fg_by_type, bg_p, record)


def _weights(  # noqa: PLR0913
    profiles: Mapping[str, ArrayLike] | None,
    background: ArrayLike | None,
    *,
    n_types: int,
    n_fg: int,
    n_bg: int,
    rho: np.ndarray,
    profile_seed: int,
    specificity: float,
    effect_sd: float,
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Return foreground weights by type and the common background weights, given or synthetic."""
    n_fg = check_integer("n_fg", n_fg, low=1)
    if check_integer("n_bg", n_bg) == 0 and (rho < 1).any():
        message = f"rho={rho.min():g} sends fragments to the background and n_bg=0: set rho=1 or give regions."
        raise ConfigError(message)
    if profiles is None:
        names = [f"type_{rank}" for rank in range(n_types)]
        fg_by_type = synthetic_profiles(
            names, n_fg=n_fg, specificity=specificity, effect_sd=effect_sd, seed=profile_seed
        )
    else:
        fg_by_type = check_profiles(profiles, n_types=n_types, n_fg=n_fg)
    if background is None:
        return fg_by_type, background_weights(n_bg, seed=profile_seed)
    return fg_by_type, check_weights(background, name="background", n_regions=n_bg)


def _depth_factors(depth_by_type: Sequence[float] | None, n_types: int) -> np.ndarray:
    """Return the factor on the median of each type."""
    if depth_by_type is None:
        return np.ones(n_types)
    if len(depth_by_type) != n_types:
        message = f"depth_by_type has {len(depth_by_type)} entries for {n_types} types: give one factor a type."
        raise ConfigError(message)
    tiny = float(np.finfo(float).tiny)
    return np.array([check_number(f"depth_by_type[{t}]", x, low=tiny) for t, x in enumerate(depth_by_type)])


def rare_types(table: np.ndarray) -> np.ndarray:
    """Tell which types are rare in which batch (below 5 % of its cells), shape (batches, types).

    Examples
    --------
    >>> rare_types(np.array([[96, 4], [50, 50]]))
    array([[False,  True],
           [False, False]])
    """
    return (table > 0) & (table < RARE_SHARE * table.sum(axis=1, keepdims=True))


def _cells(table: np.ndarray, names: list[str], depth: _Depth, *, seed: int, allow_empty: bool) -> pd.DataFrame:
    """Return the cells' table, ordered by batch and type; the columns _batch and _type hold ranks."""
    rare_bt = rare_types(table)
    parts = []
    for batch, row in enumerate(table):
        for cell_type, n in enumerate(row):
            fragments = depth.fragments(n, batch=batch, cell_type=cell_type, seed=seed)
            index = [f"batch_{batch}:{names[cell_type]}:{i}" for i in range(n)]
            part = pd.DataFrame({"_batch": batch, "_type": cell_type, "fragments": fragments}, index=index)
            parts.append(part.assign(rare=rare_bt[batch, cell_type]))
        if allow_empty and row.any():
            last = np.flatnonzero(row)[-1] - table.shape[1]  # counted from the end of the list of parts
            parts[last].iloc[-1, parts[last].columns.get_loc("fragments")] = 0
    cells = pd.concat([part for part in parts if len(part)])
    present_t, present_b = np.flatnonzero(table.any(axis=0)), np.flatnonzero(table.any(axis=1))
    cells["cell_type"] = pd.Categorical([names[t] for t in cells["_type"]], categories=[names[t] for t in present_t])
    cells["batch"] = pd.Categorical([f"batch_{b}" for b in cells["_batch"]], [f"batch_{b}" for b in present_b])
    return cells


def _draw_counts(
    obs: pd.DataFrame,
    foreground_p: np.ndarray,
    fg_by_type: Mapping[str, np.ndarray],
    bg_p: np.ndarray,
    *,
    rho: np.ndarray,
    seed: int,
) -> sparse.csr_matrix:
    """Draw the regions of every cell, one cell at a time, so that memory beyond the result stays at a few vectors."""
    fg_columns, bg_columns = (np.flatnonzero(kind).astype(np.int32) for kind in (foreground_p, ~foreground_p))
    background = WeightedSampler(bg_p, bg_columns)
    profiles = list(fg_by_type.values())
    hits_p = np.zeros(foreground_p.size, dtype=np.int8)
    indices, values = [], []
    for group, f_n in obs.groupby(["_batch", "_type"], sort=False)["fragments"]:
        batch, cell_type = cast("tuple[int, int]", group)
        rng = stream(seed, _STREAM, batch, cell_type, _DRAWS)
        foreground = WeightedSampler(profiles[cell_type], fg_columns)
        for fragments in f_n.tolist():
            in_fg = round(fragments * rho[batch])
            for sampler, n in ((foreground, in_fg), (background, fragments - in_fg)):
                # the two chromosome copies; a copy holds a region at most once, so that += counts right
                hits_p[sampler.draw(n // 2, rng)] += 1
                hits_p[sampler.draw(n - n // 2, rng)] += 1
            open_regions = np.flatnonzero(hits_p).astype(np.int32)
            indices.append(open_regions)
            values.append(hits_p[open_regions])
            hits_p[open_regions] = 0
    indptr = np.concatenate([[0], np.cumsum([len(entry) for entry in indices])])
    data = np.concatenate(values).astype(np.int32)
    return sparse.csr_matrix((data, np.concatenate(indices), indptr), shape=(len(obs), foreground_p.size))


def _record(
    arguments: Mapping[str, Any], *, table: np.ndarray, depth: _Depth, sizes: Mapping[str, int], profile_seed: int
) -> dict[str, Any]:
    """Return the arguments, resolved to one value a batch or type and in forms that can be written to a file."""
    kept = {k: arguments[k] for k in ("n_fg", "n_bg", "specificity", "effect_sd", "allow_empty", "seed")}
    return {
        "simulator": "accessibility",
        **kept,
        "n_cells": table,
        "median": depth.median,
        "log_sd": depth.log_sd,
        "clip": depth.clip,
        "rho": depth.rho,
        "depth_by_type": depth.factor,
        "chrom_sizes": dict(sizes),
        "profiles": "synthetic" if arguments["profiles"] is None else "given",
        "background": "synthetic" if arguments["background"] is None else "given",
        "profile_seed": profile_seed,
        "versions": {name: version(name) for name in ("epivi", "numpy", "anndata")},
    }


def _assemble(
    counts: sparse.csr_matrix,
    obs: pd.DataFrame,
    var: pd.DataFrame,
    fg_by_type: Mapping[str, np.ndarray],
    bg_p: np.ndarray,
    record: dict[str, Any],
) -> AnnData:
    """Put counts, tables and truth into one AnnData."""
    from anndata import AnnData

    obs = obs.assign(depth=np.diff(counts.indptr))[["cell_type", "batch", "fragments", "depth", "rare"]]
    foreground_p = var["foreground"].to_numpy()
    bulk = np.empty((foreground_p.size, len(fg_by_type)))
    bulk[foreground_p] = np.column_stack(list(fg_by_type.values()))
    bulk[~foreground_p] = bg_p[:, None]
    adata = AnnData(counts, obs=obs, var=var)
    adata.varm["bulk"] = pd.DataFrame(bulk, index=var.index, columns=list(fg_by_type))
    adata.uns[UNS_SIMULATION] = record
    return adata
