"""Simulated tracks: several epigenomic marks of one cell as counts in bins, piecewise constant along the genome."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd
from scipy import sparse

from epivi._errors import ConfigError, nearest
from epivi._keys import (
    OBSM_TRACKS,
    OBSM_TRACKS_MASK,
    UNS_FRAGMENTS,
    UNS_SIMULATION,
    UNS_TRACKS,
    UNS_TRUTH,
    VAR_CHROM,
    VAR_END,
    VAR_START,
)
from epivi.simulate._arguments import check_integer, check_number, split_evenly, stream
from epivi.simulate.tracks._setting import TracksSetting, tracks_setting

if TYPE_CHECKING:
    from anndata import AnnData
    from mudata import MuData

GENOME: Final = "simulated"
BOUNDARY_EFFECT: Final = 2.0

_FLOOR = 0.001
_STREAM = 3
_BASE, _SHARED, _OWN, _ORDER, _SHIFT, _BOUNDARY, _LIBRARY, _COUNTS, _MISSING, _KEPT, _FILL = range(11)


@dataclass(frozen=True)
class _Profiles:
    """Truth about the types, in domains along the genome."""

    shared_td: np.ndarray
    own_tmd: np.ndarray
    shift_bmd: np.ndarray
    profile_tmd: np.ndarray
    boundary_k2: np.ndarray


def tracks(  # noqa: PLR0913
    n: int = 900,
    n_bins: int = 2000,
    n_modalities: int = 3,
    n_types: int = 6,
    *,
    domain: int = 12,
    depth: float | None = None,
    log_sd: float = 0.5,
    clip: Sequence[float] | None = None,
    shared: float | None = None,
    own: float | Sequence[float] | None = None,
    signs: Sequence[float] = (1, 1, -1),
    effect_sd: float = 0.9,
    ordered: bool = True,
    batch_shift: float = 0.0,
    n_batches: int | None = None,
    missing: Mapping[str | int, float] | None = None,
    low_signal: bool = False,
    chrom_sizes: Mapping[str, int] | Sequence[int] | None = None,
    boundary_signal: bool = False,
    allow_empty: bool = False,
    dense: bool = False,
    as_mudata: bool = False,
    bin_size_bp: int = 10_000,
    seed: int = 0,
    profile_seed: int | None = None,
) -> AnnData | MuData:
    r"""Simulate tracks of several marks in the same cells, constant within domains of neighbouring bins.

    For modality m, type t and domain d,

    .. math::
        \mathrm{profile}_{tmd} \propto \mathrm{base}_{md} \exp(\mathrm{sign}_m e_{td} + o_{tmd}) + 0.001,

    with base Gamma(0.7, 1), effects e common to all modalities (Normal(0, ``effect_sd``) with probability ``shared``,
    else 0) and effects o of one modality (with probability ``own``). The library of cell i is
    exp(Normal(ln depth, ``log_sd``)), clipped, and counts are Poisson(library · profile).

    Parameters
    ----------
    n
        Cells, split evenly over batches and types.
    n_bins
        Bins; as many as fill whole domains are kept (2,000 gives 1,992). ``chrom_sizes`` takes its place.
    n_modalities, n_types
        Numbers of modalities and of cell types.
    domain
        Bins of a domain.
    depth, log_sd, clip
        Median library of a modality (150, or 60 with ``low_signal``), spread of its logarithm, and limits (0.2 and 13
        times the depth, or 20 and 2,000).
    shared, own
        Probabilities of the two effects, 0.15 each; ``own`` may be given for each modality. With ``low_signal`` they
        are 0 and (0, 0.06, 0.12).
    signs
        Sign with which the common effects act on each modality, repeated if there are more modalities.
    effect_sd
        Standard deviation of the effects.
    ordered
        False applies one random permutation to the bins of all cells: what convolutions could use is gone.
    batch_shift
        Standard deviation of a shift of the log profile, by domain, batch and modality.
    n_batches
        Batches; by default 1, or 2 with a ``batch_shift``.
    missing
        Share of cells that lack a modality, by its name or number. Every cell keeps at least one. Counts do not depend
        on it: those left out are returned as truth.
    low_signal
        Take the defaults of the low-signal setting: the first modality carries nothing.
    chrom_sizes
        Bins of each chromosome; domains never cross chromosomes, and bins that fill no domain are left out. One
        chromosome by default.
    boundary_signal
        Give the domains on both sides of every boundary between chromosomes opposite effects of +2 and -2 (which side
        is positive is drawn for each type) on the same base, so that leakage across boundaries shows.
    allow_empty
        Give the last cell of every batch no counts. Otherwise a cell without any count gets one.
    dense
        Store counts as a dense array of uint16, (n, c, l), in place of CSR (n, c · l).
    as_mudata
        Return a MuData with a modality for each mark; cells that lack it are absent from it.
    bin_size_bp
        Width of a bin.
    seed
        Seed of the cells.
    profile_seed
        Seed of profiles, batch shifts and the permutation of bins; by default ``seed``.

    Returns
    -------
    AnnData without X, with

    - ``obsm["tracks"]`` counts, ``uns["tracks"]`` channels, bins, genome and bin_size_bp;
    - ``obsm["tracks_mask"]`` (with ``missing``) True where a modality was measured; other counts are left out;
    - ``obs`` cell_type, batch (categorical) and library_<modality>, the expected sums;
    - ``uns["truth"]`` profiles (types, modalities, bins; of no batch; they sum to one), domain (number of the domain of
      each bin), domains (table), shared_effect (types, domains), own_effect (types, modalities, domains), batch_shift
      (batches, modalities, domains), permutation (bin of the ordered data in each column), mask (cells, modalities),
      hidden (CSR, the counts left out), boundaries (pairs of domains), channels, types;
    - ``uns["simulation"]`` all arguments.

    Or MuData with the same obs and uns, and cells × bins as CSR in X of each modality; var has chrom, start, end
    and names such as ``ATAC:chr1:0-10000``.

    Raises
    ------
    ConfigError
        If an argument is out of its range or has the wrong length, a chromosome has no whole domain, ``missing`` names
        an unknown modality, or ``boundary_signal`` has fewer than two chromosomes or two domains on one of them.

    Examples
    --------
    >>> adata = tracks(60, 240, n_types=2, seed=1)
    >>> adata.n_obs, adata.obsm["tracks"].shape, adata.uns["tracks"]["channels"].tolist()
    (60, (60, 720), ['H3K27ac', 'ATAC', 'H3K27me3'])
    """
    arguments = dict(locals())
    n = check_integer("n", n, low=1)
    setting = tracks_setting(arguments)
    profiles = _draw_profiles(setting)
    obs = _cells(n, setting, allow_empty=allow_empty)
    counts = _draw_counts(obs, setting, profiles, allow_empty=allow_empty)
    domain_l = np.repeat(np.arange(setting.domains_of_chrom.sum()), setting.domain)
    order_l = np.arange(domain_l.size)
    if not ordered:
        order_l = stream(setting.profile_seed, _STREAM, _ORDER).permutation(domain_l.size)
        counts = [_columns(part, order_l) for part in counts]
    mask_nc = _measured(n, missing, setting)
    bins = _bins(setting)
    truth = _truth(setting, profiles, bins, domain_l, order_l)
    truth |= {"mask": mask_nc, "hidden": sparse.hstack([_rows(x, ~mask_nc[:, m]) for m, x in enumerate(counts)], "csr")}
    shown = [_rows(x, mask_nc[:, m]) for m, x in enumerate(counts)]
    obs = obs.drop(columns=["_batch", "_type"])
    uns = {UNS_TRUTH: truth, UNS_SIMULATION: _record(arguments, setting)}
    if as_mudata:
        return _as_mudata(shown, obs, bins, setting.names, uns)
    uns[UNS_TRACKS] = {"channels": np.array(setting.names), "bins": bins, "genome": GENOME, "bin_size_bp": bin_size_bp}
    return _as_anndata(shown, obs, uns, mask_nc if missing else None, dense=dense)


def _draw_profiles(s: TracksSetting) -> _Profiles:
    """Draw effects and profiles; those of a type and modality do not depend on the number of others."""
    n_domains = int(s.domains_of_chrom.sum())

    def effects(share: float, *key: int) -> np.ndarray:
        rng = stream(s.profile_seed, _STREAM, *key)
        has = rng.random(n_domains) < share
        return np.where(has, rng.normal(0.0, s.effect_sd, n_domains), 0.0)

    types, modalities = range(s.n_types), range(len(s.names))
    base_md = np.stack([stream(s.profile_seed, _STREAM, _BASE, m).gamma(0.7, 1.0, n_domains) for m in modalities])
    shared_td = np.stack([effects(s.shared, _SHARED, t) for t in types])
    own_tmd = np.stack([[effects(s.own[m], _OWN, t, m) for m in modalities] for t in types])
    shift_bmd = s.batch_shift * np.stack(
        [
            [stream(s.profile_seed, _STREAM, _SHIFT, b, m).normal(size=n_domains) for m in modalities]
            for b in range(s.n_batches)
        ]
    )
    last = np.cumsum(s.domains_of_chrom)[:-1] - 1
    boundary_k2 = np.stack([last, last + 1], axis=1) if s.boundary_signal else np.empty((0, 2), dtype=int)
    for k, pair in enumerate(boundary_k2):
        rng = stream(s.profile_seed, _STREAM, _BOUNDARY, k)
        # half of the types each way, so that the two sides tell types apart
        side_t = np.where(rng.permutation(s.n_types) % 2, BOUNDARY_EFFECT, -BOUNDARY_EFFECT)
        base_md[:, pair] = 1.0
        own_tmd[:, :, pair] = 0.0
        shared_td[:, pair] = side_t[:, None] * np.array([1.0, -1.0])
    profile_tmd = base_md * np.exp(s.signs[:, None] * shared_td[:, None] + own_tmd) + _FLOOR
    profile_tmd /= profile_tmd.sum(axis=-1, keepdims=True)
    return _Profiles(shared_td, own_tmd, shift_bmd, profile_tmd, boundary_k2)


def _cells(n: int, s: TracksSetting, *, allow_empty: bool) -> pd.DataFrame:
    """Return the cells' table with libraries, ordered by batch and type."""
    parts = []
    for b, n_batch in enumerate(split_evenly(n, np.ones(s.n_batches))):
        for t, n_cells in enumerate(split_evenly(int(n_batch), np.ones(s.n_types))):
            index = [f"batch_{b}:type_{t}:{i}" for i in range(n_cells)]
            part = pd.DataFrame({"_batch": b, "_type": t}, index=pd.Index(index, dtype=str))
            for m, name in enumerate(s.names):
                rng = stream(s.seed, _STREAM, _LIBRARY, b, t, m)
                part[f"library_{name}"] = np.clip(np.exp(rng.normal(np.log(s.depth), s.log_sd, n_cells)), *s.clip)
            parts.append(part)
    obs = pd.concat([part for part in parts if len(part)])
    if allow_empty:
        ends = np.flatnonzero(np.diff(obs["_batch"], append=-1))
        obs.iloc[ends, 2:] = 0.0
    types, batches = ([f"{what}_{k}" for k in obs[f"_{what}"]] for what in ("type", "batch"))
    present = [f"type_{t}" for t in sorted(set(obs["_type"]))]
    first = pd.DataFrame(
        {
            "cell_type": pd.Categorical(types, categories=present),
            "batch": pd.Categorical(batches, categories=list(dict.fromkeys(batches))),
        },
        index=obs.index,
    )
    return pd.concat([first, obs], axis=1)


def _draw_counts(
    obs: pd.DataFrame, s: TracksSetting, profiles: _Profiles, *, allow_empty: bool
) -> list[sparse.csr_matrix]:
    """Draw the counts of each modality, cells × bins.

    Independent Poisson counts with rates library · profile are the same as a Poisson(library) number of fragments, each
    of which falls into a bin by the profile: the work grows with the fragments and not with the bins.
    """
    n_bins = profiles.profile_tmd.shape[-1] * s.domain
    batch_n, type_n = obs["_batch"].to_numpy(), obs["_type"].to_numpy()
    rows: list[list[np.ndarray]] = [[] for _ in s.names]
    columns: list[list[np.ndarray]] = [[] for _ in s.names]
    total_n = np.zeros(len(obs), dtype=np.int64)
    for b, t in np.unique(np.stack([batch_n, type_n], axis=1), axis=0):
        cells = np.flatnonzero((batch_n == b) & (type_n == t))
        for m, name in enumerate(s.names):
            rng = stream(s.seed, _STREAM, _COUNTS, int(b), int(t), m)
            fragments = rng.poisson(obs[f"library_{name}"].to_numpy()[cells])
            rows[m].append(np.repeat(cells, fragments))
            columns[m].append(_fall(profiles, b, t, m, s.domain, rng.random(fragments.sum())))
            total_n[cells] += fragments
    for cell in [] if allow_empty else np.flatnonzero(total_n == 0):
        at = stream(s.seed, _STREAM, _FILL, int(cell)).random(1)
        rows[0].append(np.array([cell]))
        columns[0].append(_fall(profiles, batch_n[cell], type_n[cell], 0, s.domain, at))
    counts = []
    for row, column in zip(map(np.concatenate, rows), map(np.concatenate, columns), strict=True):
        ones = np.ones(row.size, dtype=np.int32)
        counts.append(sparse.csr_matrix((ones, (row, column)), shape=(len(obs), n_bins)))
    return counts


def _fall(profiles: _Profiles, b: int, t: int, m: int, domain: int, uniform: np.ndarray) -> np.ndarray:
    """Return the bins into which fragments fall, from uniform numbers."""
    weights_l = np.repeat(profiles.profile_tmd[t, m] * np.exp(profiles.shift_bmd[b, m]), domain)
    edges = np.cumsum(weights_l)
    return np.minimum(np.searchsorted(edges / edges[-1], uniform, side="right"), edges.size - 1)


def _measured(n: int, missing: Any, s: TracksSetting) -> np.ndarray:
    """Return which modalities were measured in which cell, shape (n, c)."""
    mask_nc = np.ones((n, len(s.names)), dtype=bool)
    if missing is None:
        return mask_nc
    if not isinstance(missing, Mapping):
        message = f"missing={missing!r} is not valid: give a dict from modalities to shares, such as {{'ATAC': 0.3}}."
        raise ConfigError(message)
    for key, share in missing.items():
        if key not in s.names and not (isinstance(key, int | np.integer) and 0 <= key < len(s.names)):
            message = f"missing names the unknown modality {key!r}. {nearest(str(key), s.names)}"
            raise ConfigError(message)
        m = s.names.index(key) if isinstance(key, str) else int(key)
        mask_nc[:, m] = stream(s.seed, _STREAM, _MISSING, m).random(n) >= check_number(
            f"missing[{key!r}]", share, high=1
        )
    kept_n = stream(s.seed, _STREAM, _KEPT).integers(len(s.names), size=n)
    lost = np.flatnonzero(~mask_nc.any(axis=1))
    mask_nc[lost, kept_n[lost]] = True
    return mask_nc


def _rows(counts: sparse.csr_matrix, keep_n: np.ndarray) -> sparse.csr_matrix:
    """Return the counts with the other rows emptied."""
    keep = np.repeat(keep_n, np.diff(counts.indptr))
    indptr = np.concatenate([[0], np.cumsum(np.diff(counts.indptr) * keep_n)])
    return sparse.csr_matrix((counts.data[keep], counts.indices[keep], indptr), shape=counts.shape)


def _columns(counts: sparse.csr_matrix, order_l: np.ndarray) -> sparse.csr_matrix:
    """Return the counts with the columns in another order."""
    moved = counts[:, order_l]
    moved.sort_indices()
    return moved


def _bins(s: TracksSetting) -> pd.DataFrame:
    """Return the table of bins."""
    sizes = list(s.bins_of_chrom.values())
    start = np.concatenate([np.arange(size) for size in sizes]) * s.bin_size_bp
    return _table(np.repeat(list(s.bins_of_chrom), sizes), start, start + s.bin_size_bp)


def _table(chrom: np.ndarray, start: np.ndarray, end: np.ndarray) -> pd.DataFrame:
    names = [f"{c}:{a}-{b}" for c, a, b in zip(chrom, start, end, strict=True)]
    columns = {VAR_CHROM: chrom.astype(object), VAR_START: start, VAR_END: end}
    return pd.DataFrame(columns, index=pd.Index(names, dtype=str)).astype({VAR_CHROM: str})


def _truth(
    s: TracksSetting, profiles: _Profiles, bins: pd.DataFrame, domain_l: np.ndarray, order_l: np.ndarray
) -> dict[str, Any]:
    """Return the truth about types and bins, bins in the order of the stored columns."""
    first = bins.iloc[:: s.domain]
    return {
        "types": np.array([f"type_{t}" for t in range(s.n_types)]),
        "channels": np.array(s.names),
        "profiles": np.repeat(profiles.profile_tmd / s.domain, s.domain, axis=-1)[..., order_l],
        "domain": domain_l[order_l],
        "domains": _table(
            first[VAR_CHROM].to_numpy(dtype=object),
            first[VAR_START].to_numpy(),
            first[VAR_START].to_numpy() + s.domain * s.bin_size_bp,
        ),
        "shared_effect": profiles.shared_td,
        "own_effect": profiles.own_tmd,
        "batch_shift": profiles.shift_bmd,
        "permutation": order_l,
        "boundaries": profiles.boundary_k2,
    }


def _record(arguments: Mapping[str, Any], s: TracksSetting) -> dict[str, Any]:
    """Return the arguments, with defaults filled in, in forms that can be written to a file."""
    kept = {k: arguments[k] for k in ("n", "ordered", "low_signal", "allow_empty", "dense", "as_mudata")}
    fields = {key: getattr(s, key) for key in s.__dataclass_fields__ if key not in ("names", "bins_of_chrom")}
    missing = {str(key): float(share) for key, share in (arguments["missing"] or {}).items()}
    more = {"n_modalities": len(s.names), "chrom_sizes": dict(s.bins_of_chrom), "missing": missing}
    versions = {name: version(name) for name in ("epivi", "numpy", "anndata")}
    return {"simulator": "tracks"} | kept | fields | more | {"versions": versions}


def _as_anndata(
    counts: list[sparse.csr_matrix], obs: pd.DataFrame, uns: dict[str, Any], mask_nc: np.ndarray | None, *, dense: bool
) -> AnnData:
    """Put the counts of all modalities into one array of obsm."""
    from anndata import AnnData

    stored: Any = sparse.hstack(counts, "csr")
    if dense:
        dtype = np.uint16 if stored.max() <= np.iinfo(np.uint16).max else np.uint32
        stored = stored.astype(dtype).toarray().reshape(len(obs), len(counts), -1)
    adata = AnnData(obs=obs, uns=uns, obsm={OBSM_TRACKS: stored})
    if mask_nc is not None:
        adata.obsm[OBSM_TRACKS_MASK] = mask_nc
    return adata


def _as_mudata(
    counts: list[sparse.csr_matrix], obs: pd.DataFrame, bins: pd.DataFrame, names: Sequence[str], uns: dict[str, Any]
) -> MuData:
    """Make a modality of each mark; the truth about cells follows the order of the MuData."""
    from anndata import AnnData
    from mudata import MuData

    mask_nc = uns[UNS_TRUTH]["mask"]
    parts = {}
    counted = {"genome": GENOME, "bin_size_bp": uns[UNS_SIMULATION]["bin_size_bp"]}
    for m, name in enumerate(names):
        table = obs.loc[mask_nc[:, m], ["cell_type", "batch"]]
        # a MuData wants names that no other modality has
        var = bins.set_index(name + ":" + bins.index)
        parts[name] = AnnData(counts[m][mask_nc[:, m]], obs=table.copy(), var=var, uns={UNS_FRAGMENTS: dict(counted)})
    with warnings.catch_warnings():
        # mudata 0.4 drops columns in place, which pandas 3.1 deprecates
        warnings.filterwarnings("ignore", message="The inplace keyword", category=DeprecationWarning)
        mdata = MuData(parts)
    order = obs.index.get_indexer(mdata.obs_names)
    for key in obs:
        mdata.obs[key] = obs[key].iloc[order]
    for key in ("mask", "hidden"):
        uns[UNS_TRUTH][key] = uns[UNS_TRUTH][key][order]
    mdata.uns.update(uns)
    return mdata
