"""Simulated multiome: accessibility and an RNA reference, with sub-types that one modality may not see."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pandas as pd

from epivi._errors import ConfigError, nearest
from epivi._keys import MOD_ATAC, MOD_RNA, OBSM_PCA, UNS_SIMULATION
from epivi.simulate._arguments import (
    cell_table,
    check_integer,
    check_keywords,
    check_number,
    per_batch,
    split_evenly,
)
from epivi.simulate._rna import RnaSimulator
from epivi.simulate.profiles import check_profiles, subtype_profile, synthetic_profiles
from epivi.simulate.scatac import accessibility, rare_types

if TYPE_CHECKING:
    from anndata import AnnData
    from mudata import MuData

    from epivi.simulate._arguments import CellCounts


def multiome(  # noqa: PLR0913
    n_cells: CellCounts,
    *,
    n_subtypes: int | Sequence[int] = 2,
    subtype_share: float = 0.08,
    subtype_effect_sd: float = 1.6,
    subtype_only_in: str | None = None,
    rna_dims: int = 20,
    rna_noise: float = 0.5,
    rna_subtype_sd: float = 0.5,
    rna_median: float = 2000,
    rna_log_sd: float = 0.5,
    rna_counts: bool = True,
    n_genes: int = 1000,
    n_atac_only: int = 0,
    unique_types: bool = False,
    shuffle_reference: bool = False,
    atac_kwargs: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> MuData:
    r"""Simulate a multiome with nested cell types and a reference embedding of the RNA.

    Accessibility follows :func:`epivi.simulate.accessibility`; every type is split evenly into sub-types, each with a
    share of its type's foreground regions changed. The RNA embedding of cell i is
    :math:`r_i = \mathrm{centre}(\text{sub-type}) + \mathrm{Normal}(0, \mathrm{noise})`, its counts are
    :math:`\mathrm{Poisson}(\mathrm{depth}_i\, \mathrm{softmax}(r_i B))`.

    Parameters
    ----------
    n_cells
        Cells of each type, or one such list a batch.
    n_subtypes
        Sub-types of each type; one number, or one a type.
    subtype_share, subtype_effect_sd
        Share of a type's foreground regions that a sub-type changes, and standard deviation of the change of their log
        weight.
    subtype_only_in
        ``"atac"``: the RNA centres ignore the sub-type. ``"rna"``: the accessibility ignores it. None: both see it.
    rna_dims, rna_noise
        Dimensions of the embedding and standard deviation of a cell about its centre.
    rna_subtype_sd
        Standard deviation, in each dimension, of a sub-type's centre about its type's; types are Normal(0, 1).
    rna_median, rna_log_sd
        Median of the RNA depth and spread of its logarithm; the logarithm has correlation 0.5 with that of the ATAC
        depth within a batch.
    rna_counts, n_genes
        Whether to draw RNA counts, and for how many genes. Without counts the RNA modality has no features.
    n_atac_only
        Cells of one more batch, the last, that has half the (mean) median of fragments and no RNA. Types are split as
        in all other cells.
    unique_types
        Leave one type out of each batch, a different one in turn: the last type from the first batch, the type before
        it from the second, and so on. Needs two batches and two types. The cells left out of multiome batches are not
        replaced.
    shuffle_reference
        Permute the RNA embeddings among the cells: a negative control. Counts follow the permuted embedding.
    atac_kwargs
        Further arguments of :func:`epivi.simulate.accessibility`; ``profiles`` and ``depth_by_type`` go by type.
    seed
        Seed of everything. Multiome cells do not depend on ``n_atac_only``.

    Returns
    -------
    MuData; multiome cells come first, then the cells without RNA.

    - ``obs`` cell_type, subtype, batch (categorical), has_reference (bool);
    - ``obsm["reference"]`` the embedding, rows of NaN for cells without RNA;
    - ``mod["atac"]`` as from :func:`epivi.simulate.accessibility`, with obs subtype and one column a sub-type in
      ``varm["bulk"]``; rare is about types;
    - ``mod["rna"]`` the multiome cells: ``obsm["X_pca"]`` the embedding r, obs cell_type, subtype, batch, rna_depth;
      ``X`` csr_matrix of int32 counts, ``varm["loadings"]`` B transposed, var mean_logit (mean of r B over cells);
    - ``uns["simulation"]`` all arguments and the true centres of the sub-types.

    Raises
    ------
    ConfigError
        If an argument is out of its range, ``subtype_only_in`` is unknown, ``atac_kwargs`` holds an unknown or taken
        keyword, or ``unique_types`` has too few batches or types.
    DataError
        If given profiles are not valid.

    Examples
    --------
    >>> mdata = multiome(
    ...     [30, 30], n_atac_only=10, n_genes=50, atac_kwargs={"n_fg": 100, "n_bg": 100, "median": 50, "clip": (10, 90)}
    ... )
    >>> mdata["atac"].n_obs, mdata["rna"].n_obs, int(mdata.obs["has_reference"].sum())
    (70, 60, 60)
    """
    arguments = {**locals(), "atac_kwargs": dict(atac_kwargs or {})}
    _check_choices(subtype_only_in, arguments["atac_kwargs"])
    table = _with_atac_only(cell_table(n_cells), n_atac_only, unique_types=unique_types)
    subtypes = _subtype_numbers(n_subtypes, table.shape[1])
    rna = RnaSimulator(
        dims=check_integer("rna_dims", rna_dims, low=1),
        noise=check_number("rna_noise", rna_noise),
        subtype_sd=check_number("rna_subtype_sd", rna_subtype_sd),
        median=check_number("rna_median", rna_median, low=1),
        log_sd=check_number("rna_log_sd", rna_log_sd),
        n_genes=check_integer("n_genes", n_genes, low=1),
        sees_subtypes=subtype_only_in != "atac",
        seed=check_integer("seed", seed),
    )
    atac = _simulate_atac(table, subtypes, arguments)
    paired = cast("pd.DataFrame", atac.obs).iloc[: atac.n_obs - int(n_atac_only)]
    names = cast("pd.DataFrame", atac.varm["bulk"]).columns
    dims = [f"dim_{d}" for d in range(rna.dims)]  # files take only strings as column names
    centres = pd.DataFrame(rna.centres(subtypes), index=names, columns=dims)
    rna_adata = _simulate_rna(paired, centres, rna, shuffle=shuffle_reference, with_counts=rna_counts)
    return _join(atac, rna_adata, _record(arguments, subtypes, centres))


def _check_choices(subtype_only_in: str | None, atac_kwargs: Mapping[str, Any]) -> None:
    """Refuse an unknown modality and unknown or taken keywords."""
    if subtype_only_in not in (None, MOD_ATAC, MOD_RNA):
        message = (
            f"subtype_only_in='{subtype_only_in}' is unknown. {nearest(str(subtype_only_in), [MOD_ATAC, MOD_RNA])}"
        )
        raise ConfigError(message)
    check_keywords("atac_kwargs", atac_kwargs, accessibility, taken=["n_cells", "seed"])


def _with_atac_only(table: np.ndarray, n_atac_only: int, *, unique_types: bool) -> np.ndarray:
    """Return the cells of each batch and type, after the batch without RNA is added and unique types are left out."""
    n_atac_only = check_integer("n_atac_only", n_atac_only)
    shares_t = table.sum(axis=0).astype(float)
    n_batches, n_types = table.shape[0] + (n_atac_only > 0), table.shape[1]
    keep_bt = np.ones((n_batches, n_types), dtype=bool)
    if unique_types:
        if n_batches < 2 or n_types < 2:
            message = f"unique_types=True needs two batches and two types, found {n_batches} and {n_types}."
            raise ConfigError(message)
        keep_bt[np.arange(n_batches), n_types - 1 - np.arange(n_batches) % n_types] = False
    paired = table * keep_bt[: table.shape[0]]
    if paired.sum() == 0 or (n_atac_only and not (shares_t * keep_bt[-1]).any()):
        message = f"unique_types=True leaves a modality without cells (n_cells={table.tolist()}): give more types."
        raise ConfigError(message)
    if n_atac_only == 0:
        return paired
    return np.vstack([paired, split_evenly(n_atac_only, shares_t * keep_bt[-1])])


def _subtype_numbers(n_subtypes: int | Sequence[int], n_types: int) -> list[int]:
    """Return the number of sub-types of each type."""
    if not isinstance(n_subtypes, Sequence | np.ndarray) or isinstance(n_subtypes, str):
        return [check_integer("n_subtypes", n_subtypes, low=1)] * n_types
    if len(n_subtypes) != n_types:
        message = f"n_subtypes has {len(n_subtypes)} entries for {n_types} types: give one number, or one a type."
        raise ConfigError(message)
    return [check_integer(f"n_subtypes[{t}]", n, low=1) for t, n in enumerate(n_subtypes)]


def _simulate_atac(table: np.ndarray, subtypes: Sequence[int], arguments: Mapping[str, Any]) -> AnnData:
    """Simulate the accessibility of all cells, sub-type by sub-type, and name types and sub-types."""
    kwargs = dict(arguments["atac_kwargs"])
    profiles = _nested_profiles(subtypes, arguments)
    parts = [[split_evenly(int(n), np.ones(k)) for n, k in zip(row, subtypes, strict=True)] for row in table]
    if arguments["n_atac_only"]:
        _add_batch(kwargs, len(table) - 1)
    if kwargs.get("depth_by_type") is not None:
        factors = kwargs["depth_by_type"]
        if len(factors) != len(subtypes):
            message = f"depth_by_type has {len(factors)} entries for {len(subtypes)} types: give one factor a type."
            raise ConfigError(message)
        kwargs["depth_by_type"] = np.repeat(np.asarray(factors), subtypes).tolist()
    flat = {name: weights for group in profiles.values() for name, weights in group.items()}
    atac = accessibility(
        np.array([np.concatenate(row) for row in parts]), **{**kwargs, "profiles": flat}, seed=arguments["seed"]
    )
    parent = {name: cell_type for cell_type, group in profiles.items() for name in group}
    obs = cast("pd.DataFrame", atac.obs)
    types = [parent[name] for name in obs["cell_type"]]
    cell_type = pd.Categorical(types, categories=list(profiles))
    atac.obs = obs.assign(
        cell_type=cell_type.remove_unused_categories(),
        subtype=obs["cell_type"],
        rare=rare_types(table)[_batch_ranks(obs), cell_type.codes],
    )
    if kwargs.get("profiles") is None:
        atac.uns[UNS_SIMULATION]["profiles"] = "synthetic"
    return atac


def _nested_profiles(subtypes: Sequence[int], arguments: Mapping[str, Any]) -> dict[str, dict[str, np.ndarray]]:
    """Return the foreground weights by type and sub-type."""
    options: dict[str, Any] = {
        "n_fg": 2000,
        "specificity": 0.25,
        "effect_sd": 1.6,
        "profiles": None,
        "profile_seed": None,
    }
    options |= {key: value for key, value in arguments["atac_kwargs"].items() if key in options}
    given, own_seed = options.pop("profiles"), options.pop("profile_seed")
    seed = check_integer("seed", arguments["seed"]) if own_seed is None else check_integer("profile_seed", own_seed)
    if given is None:
        by_type = synthetic_profiles([f"type_{rank}" for rank in range(len(subtypes))], **options, seed=seed)
    else:
        by_type = check_profiles(given, n_types=len(subtypes), n_fg=options["n_fg"])
    share = check_number("subtype_share", arguments["subtype_share"], high=1.0)
    effect_sd = check_number("subtype_effect_sd", arguments["subtype_effect_sd"])
    if arguments["subtype_only_in"] == MOD_RNA:
        share = 0.0
    return {
        name: {
            f"{name}.{k}": subtype_profile(weights, share=share, effect_sd=effect_sd, seed=seed, rank=(rank, k))
            for k in range(subtypes[rank])
        }
        for rank, (name, weights) in enumerate(by_type.items())
    }


def _add_batch(kwargs: dict[str, Any], n_paired: int) -> None:
    """Extend the arguments that go by batch: half the median, all else as in the first batch."""
    median_b = per_batch("median", kwargs.get("median", 600), n_paired, low=np.finfo(float).tiny)
    kwargs["median"] = [*median_b, median_b.mean() / 2]
    for key in ("log_sd", "rho"):
        if isinstance(kwargs.get(key), Sequence | np.ndarray):
            value_b = per_batch(key, kwargs[key], n_paired)
            kwargs[key] = [*value_b, value_b[0]]
    clip = kwargs.get("clip", ())
    if isinstance(clip, Sequence | np.ndarray) and len(clip) > 0 and isinstance(clip[0], Sequence | np.ndarray):
        kwargs["clip"] = [*clip, clip[0]]


def _simulate_rna(
    paired: pd.DataFrame, centres: pd.DataFrame, rna: RnaSimulator, *, shuffle: bool, with_counts: bool
) -> AnnData:
    """Build the RNA modality of the multiome cells from their table."""
    from anndata import AnnData

    batch_n = _batch_ranks(paired)
    r_nd = rna.embeddings(centres.loc[paired["subtype"].tolist()].to_numpy(), batch_n, shuffle=shuffle)
    obs = paired[["cell_type", "subtype", "batch"]].apply(lambda column: column.cat.remove_unused_categories())
    obs["rna_depth"] = rna.depths(paired["depth"].to_numpy(), batch_n)
    if with_counts:
        loadings_dg = rna.loadings()
        genes = pd.Index([f"gene_{g}" for g in range(rna.n_genes)])
        var = pd.DataFrame({"mean_logit": r_nd.mean(axis=0) @ loadings_dg}, index=genes)
        adata = AnnData(rna.counts(r_nd, obs["rna_depth"].to_numpy(), batch_n), obs=obs, var=var)
        adata.varm["loadings"] = loadings_dg.T.copy()
    else:
        var = pd.DataFrame({"mean_logit": np.empty(0)}, index=pd.Index([], dtype="str"))
        adata = AnnData(None, obs=obs, var=var)
    adata.obsm[OBSM_PCA] = r_nd
    return adata


def _batch_ranks(obs: pd.DataFrame) -> np.ndarray:
    """Return the number at the end of the cells' batch names."""
    return np.array([int(name.removeprefix("batch_")) for name in obs["batch"]])


def _record(arguments: Mapping[str, Any], subtypes: Sequence[int], centres: pd.DataFrame) -> dict[str, Any]:
    """Return the arguments in forms that can be written to a file, and the true centres; the ATAC part has its own."""
    left_out = {"n_cells", "n_subtypes", "atac_kwargs", "subtype_only_in"}
    return {
        "simulator": "multiome",
        **{key: value for key, value in arguments.items() if key not in left_out},
        "subtype_only_in": arguments["subtype_only_in"] or "both",
        "n_cells": cell_table(arguments["n_cells"]),
        "n_subtypes": np.array(subtypes),
        "centres": centres,
    }


def _join(atac: AnnData, rna: AnnData, record: dict[str, Any]) -> MuData:
    """Join the modalities, the multiome cells first."""
    from mudata import MuData

    with warnings.catch_warnings():
        # mudata 0.4 drops columns in place, which pandas 3.1 deprecates
        warnings.filterwarnings("ignore", message="The inplace keyword", category=DeprecationWarning)
        mdata = MuData({MOD_ATAC: atac, MOD_RNA: rna})
    for key in ("cell_type", "subtype", "batch"):
        mdata.obs[key] = atac.obs[key]
    mdata.obs["has_reference"] = mdata.obs_names.isin(rna.obs_names)
    reference_nd = np.full((mdata.n_obs, rna.obsm[OBSM_PCA].shape[1]), np.nan)
    reference_nd[mdata.obs_names.get_indexer(rna.obs_names)] = rna.obsm[OBSM_PCA]
    mdata.obsm["reference"] = reference_nd
    mdata.uns[UNS_SIMULATION] = record
    return mdata
