"""The registry field of bulk experiments: biosamples by assays by bins, of which models read windows."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
from scvi import REGISTRY_KEYS
from scvi.data.fields import BaseAnnDataField

from epivi import _validate
from epivi._errors import DataError
from epivi._keys import (
    OBSM_AVAILABILITY_SIGNAL,
    OBSM_COUNTS,
    OBSM_EXPERIMENT_DEPTH,
    OBSM_SIGNAL,
    UNS_CATEGORIES,
    UNS_SIGNAL_TRANSFORM,
)
from epivi._validate import _some
from epivi.data.windows._checks import (
    check_availability,
    check_holder,
    check_some_available,
    check_values_array,
    scan,
)
from epivi.data.windows._covariates import (
    Levels,
    match_levels,
    moments,
    read_depth,
    read_levels,
    read_numbers,
    reference_depth,
)
from epivi.data.windows._dna import check_dna, read_fasta
from epivi.data.windows.keys import ExperimentKeys
from epivi.data.windows.reader import COUNTS, KINDS, SIGNAL
from epivi.data.windows.regions import Runs, check_chromosomes, runs

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from anndata import AnnData

logger = logging.getLogger(__name__)

SPLITS: Final = ("train", "validation", "test")
CONTINUOUS: Final = ("depth", "coverage", "read_length")


class _Found(NamedTuple):
    """What an object holds, assays in their stored order; no values were read."""

    runs: Runs
    keys: dict[str, Any]
    available: dict[str, np.ndarray]
    any_ba: np.ndarray


class ExperimentsField(BaseAnnDataField):
    """Bulk experiments (biosamples × assays × bins), of which models read windows; see :class:`ExperimentKeys`.

    Parameters
    ----------
    keys
        Where the experiments lie; the defaults if ``None``.
    where
        How messages call the object.
    registry_key
        Key in the registry.

    Notes
    -----
    All values of available experiments are checked block by block at registration; arrays on disk are never in memory
    as a whole. The statistics of the state (moments of covariates, reference depths, means) are those of the training
    biosamples.
    """

    def __init__(
        self, keys: ExperimentKeys | None = None, *, where: str = "adata", registry_key: str = REGISTRY_KEYS.X_KEY
    ) -> None:
        super().__init__()
        self.keys = ExperimentKeys() if keys is None else keys
        self.where = where
        self._registry_key = registry_key

    @property
    def registry_key(self) -> str:
        """Key in the registry."""
        return self._registry_key

    @property
    def attr_name(self) -> str:
        """Attribute that holds the registered array."""
        return "obsm"

    @property
    def attr_key(self) -> str:
        """Key of the registered array: what is available."""
        return self.keys.availability_key

    @property
    def is_empty(self) -> bool:
        """Never empty: experiments are needed."""
        return False

    def validate_field(self, adata: AnnData) -> None:
        """Check shapes, bins and availability, without reading values."""
        self._find(adata)

    def register_field(self, adata: AnnData) -> dict:
        """Check everything, and return names, bins, split, statistics of the training biosamples, and small arrays."""
        found = self._find(adata)
        assays = [str(name) for name in adata.var_names]
        rows = self._split(adata)
        train_b = np.isin(np.arange(adata.n_obs), rows["train"])
        for name in ("validation_chroms", "test_chroms"):
            check_chromosomes(getattr(self.keys, name), found.runs.chromosomes, name=name)
        numbers = read_numbers(adata, self._continuous(adata), found.any_ba, where=self.where)
        levels = read_levels(adata, self._categorical(adata), found.any_ba, where=self.where)
        seen = {name: level.used(train_b) for name, level in levels.items()}
        depth_ba = read_depth(adata, found.keys["depth"], found.any_ba, where=self.where)
        trained = {kind: mask[train_b] for kind, mask in found.available.items()}
        state = {
            "column_names": np.array(assays, dtype=np.str_),
            "biosamples": {part: [str(adata.obs_names[at]) for at in found_at] for part, found_at in rows.items()},
            "trained": trained,
            "kinds": list(found.available),
            "runs": found.runs.state(),
            "bin_size_bp": found.runs.bin_size_bp,
            "continuous": list(numbers),
            "moments": {name: moments(values[train_b]) for name, values in numbers.items()},
            "categories": {name: level.names for name, level in levels.items()},
            "seen": seen,
            "commonest": {name: level.commonest(train_b) for name, level in levels.items()},
            "depth_ref": reference_depth(depth_ba[train_b]),
            "has_dna": self._has_dna(adata, found),
            "signal_transform": _transform(adata),
            "validation_chroms": _names(self.keys.validation_chroms),
            "test_chroms": _names(self.keys.test_chroms),
        }
        if never := [
            name for name, any_one in zip(assays, found.any_ba[train_b].any(axis=0), strict=True) if not any_one
        ]:
            logger.warning(
                "No training biosample of %s has %s: nothing is learned about them.", self.where, _some(never)
            )
        indexer = np.arange(len(assays))
        state |= self._current(adata, found, state, indexer, (numbers, levels, depth_ba))
        state["statistics"] = self._scan(adata, found, train_b, depth_ba / state["depth_ref"])
        return state

    def transfer_field(self, state_registry: dict, adata_target: AnnData, **kwargs: Any) -> dict:  # noqa: ARG002
        """Match assays by name and categories by level; assays that are missing count as unavailable."""
        found = self._find(adata_target, state_registry)
        indexer = self._match_assays(state_registry, adata_target)
        if (width := found.runs.bin_size_bp) != (trained := int(state_registry["bin_size_bp"])):
            message = (
                f"The bins of {self.where} are {width} bp wide, those of the trained model {trained} bp. Count the "
                f"data in bins of {trained} bp."
            )
            raise DataError(message)
        ours, theirs = state_registry["signal_transform"], _transform(adata_target)
        if SIGNAL in state_registry["kinds"] and found.keys[SIGNAL] and ours and theirs and ours != theirs:
            message = (
                f"The signal of {self.where} is '{theirs}', the model was trained on '{ours}'. Transform it alike."
            )
            raise DataError(message)
        names = [name for name in state_registry["continuous"] if name in adata_target.obsm]
        numbers = read_numbers(adata_target, names, found.any_ba, where=self.where)
        known = [name for name in state_registry["categories"] if name in adata_target.obsm]
        levels = read_levels(adata_target, known, found.any_ba, where=self.where)
        if lacking := [
            name
            for name in (*state_registry["continuous"], *state_registry["categories"])
            if name not in adata_target.obsm
        ]:
            logger.warning("%s lacks the covariates %s: they count as unknown.", self.where, _some(lacking))
        depth_ba = read_depth(adata_target, found.keys["depth"], found.any_ba, where=self.where)
        if state_registry["has_dna"] and not self._has_dna(adata_target, found):
            message = f"The model was trained with DNA, and {self.where} has none. Give uns['dna'], or fasta= at setup."
            raise DataError(message)
        current = self._current(adata_target, found, state_registry, indexer, (numbers, levels, depth_ba))
        self._scan(adata_target, found, np.ones(adata_target.n_obs, dtype=bool), np.ones_like(depth_ba))
        return dict(state_registry) | current

    def get_summary_stats(self, state_registry: dict) -> dict:
        """Return the numbers of biosamples, assays and covariates."""
        return {
            "n_cells": int(state_registry["n_obs"]),
            "n_vars": len(state_registry["column_names"]),
            "n_continuous_covariates": len(state_registry["continuous"]),
            "n_categorical_covariates": len(state_registry["categories"]),
        }

    def view_state_registry(self, state_registry: dict) -> None:  # noqa: ARG002
        """Show nothing: there is too much of it."""
        return

    def _find(self, adata: AnnData, trained: Mapping[str, Any] | None = None) -> _Found:
        """Check names, bins, shapes and availability; a query may lack one of the kinds of values of the model."""
        check_holder(adata, where=self.where)
        keys = self.keys
        _validate.check_key(adata.uns, keys.bins_key, where=f"{self.where}.uns")
        bins = runs(adata.uns[keys.bins_key], where=f"{self.where}.uns['{keys.bins_key}']")
        shape = (adata.n_obs, adata.n_vars, bins.total)
        named: dict[str, Any] = {}
        for kind, key, default in ((COUNTS, keys.counts_key, OBSM_COUNTS), (SIGNAL, keys.signal_key, OBSM_SIGNAL)):
            named[kind] = _present(adata, key, default, where=self.where, may_lack=trained is not None)
            if trained is not None and kind not in trained["kinds"]:
                named[kind] = None
            if named[kind] is not None:
                where = f"{self.where}.obsm['{named[kind]}']"
                check_values_array(adata.obsm[named[kind]], where=where, shape=shape, is_counts=kind == COUNTS)
        if named[COUNTS] is None and named[SIGNAL] is None:
            wanted = " or ".join(f"'{key}'" for key in (keys.counts_key, keys.signal_key) if key is not None)
            message = f"{self.where}.obsm has neither counts nor signal: no entry {wanted}. Name them at setup."
            raise DataError(message)
        available = self._available(adata, named, KINDS if trained is None else trained["kinds"])
        any_ba = np.logical_or.reduce(list(available.values()))
        check_some_available(any_ba, adata.obs_names, where=self.where)
        dna_key = keys.dna_key if keys.dna_key is not None and (keys.fasta or keys.dna_key in adata.uns) else None
        depth_key = _present(adata, keys.depth_key, OBSM_EXPERIMENT_DEPTH, where=self.where)
        named |= {"bins": keys.bins_key, "dna": dna_key, "depth": depth_key, "prior": keys.prior_key}
        return _Found(bins, named, available, any_ba)

    def _available(self, adata: AnnData, named: Mapping[str, Any], kinds: Sequence[str]) -> dict[str, np.ndarray]:
        """Return which experiments have counts and signal; nothing for a kind that a query lacks."""
        assays = [str(name) for name in adata.var_names]
        masks = {}
        signal_key = _present(adata, self.keys.availability_signal_key, OBSM_AVAILABILITY_SIGNAL, where=self.where)
        for kind in kinds:
            if named[kind] is None:
                continue
            key = self.keys.availability_key if kind == COUNTS or signal_key is None else signal_key
            _validate.check_key(adata.obsm, key, where=f"{self.where}.obsm")
            where = f"{self.where}.obsm['{key}']"
            masks[kind] = check_availability(adata.obsm[key], where=where, obs_names=adata.obs_names, assays=assays)
        return masks

    def _split(self, adata: AnnData) -> dict[str, np.ndarray]:
        """Return the rows of the biosamples for training, validation and tests."""
        key = self.keys.split_key
        if key is None:
            return {"train": np.arange(adata.n_obs), "validation": np.arange(0), "test": np.arange(0)}
        _validate.check_key(adata.obs, key, where=f"{self.where}.obs")
        values = adata.obs[key].astype(object).to_numpy()
        odd = [at for at, value in enumerate(values) if value not in SPLITS]
        if odd:
            message = (
                f"{self.where}.obs['{key}'] is {values[odd[0]]!r} for biosample '{adata.obs_names[odd[0]]}': write "
                "'train', 'validation' or 'test'."
            )
            raise DataError(message)
        rows = {part: np.flatnonzero(values == part) for part in SPLITS}
        if not rows["train"].size:
            message = f"{self.where}.obs['{key}'] names no biosample for training. Write 'train' where to train."
            raise DataError(message)
        return rows

    def _continuous(self, adata: AnnData) -> list[str]:
        chosen = self.keys.continuous_covariates
        return [name for name in CONTINUOUS if name in adata.obsm] if chosen is None else list(chosen)

    def _categorical(self, adata: AnnData) -> list[str]:
        chosen = self.keys.categorical_covariates
        return [k for k in adata.uns.get(UNS_CATEGORIES, {}) if k in adata.obsm] if chosen is None else list(chosen)

    def _has_dna(self, adata: AnnData, found: _Found) -> bool:
        """Check the DNA, reading it from the FASTA file if need be, and return whether there is any."""
        key = found.keys["dna"]
        if key is None:
            return False
        if key not in adata.uns and self.keys.fasta is not None:
            adata.uns[key] = read_fasta(self.keys.fasta, adata, found.runs, where=self.where)
        check_dna(adata.uns[key], where=f"{self.where}.uns['{key}']", n_bp=found.runs.total * found.runs.bin_size_bp)
        return True

    def _match_assays(self, state: Mapping[str, Any], adata: AnnData) -> np.ndarray:
        """Return the stored assay of each trained one, -1 where it is missing."""
        trained = [str(name) for name in state["column_names"]]
        if unknown := sorted(set(map(str, adata.var_names)) - set(trained)):
            message = (
                f"{self.where} has the assays {_some(unknown)}, unknown to the trained model, which has "
                f"{_some(trained, n_shown=10)}. Rename them, or leave them out."
            )
            raise DataError(message)
        indexer = adata.var_names.get_indexer(trained).astype(np.int64)
        if (indexer < 0).any():
            lacking = [name for name, at in zip(trained, indexer, strict=True) if at < 0]
            logger.warning("%s lacks the assays %s: they count as unavailable.", self.where, _some(lacking))
        if (np.diff(indexer[indexer >= 0]) < 0).any():
            logger.info("Assays of %s are not in the order of training: they are matched by name.", self.where)
        return indexer

    def _current(
        self,
        adata: AnnData,
        found: _Found,
        state: Mapping[str, Any],
        indexer: np.ndarray,
        small: tuple[dict[str, np.ndarray], dict[str, Levels], np.ndarray],
    ) -> dict[str, Any]:
        """Return what belongs to this object and not to the model: keys and small arrays, assays in trained order."""
        numbers, levels, depth_ba = small
        shape = (adata.n_obs, indexer.size)

        def ordered(values_ba: np.ndarray, missing: Any) -> np.ndarray:
            return np.where(indexer >= 0, values_ba[:, indexer], missing)

        codes = match_levels(levels, state["categories"], state["seen"], unseen=self.keys.unseen, where=self.where)
        absent = np.zeros((adata.n_obs, adata.n_vars), dtype=bool)
        for kind in state["kinds"]:
            if kind not in found.available:
                logger.warning("%s has no %s: it counts as unavailable.", self.where, kind)
        continuous = [
            ordered(numbers[k], np.nan) if k in numbers else np.full(shape, np.nan) for k in state["continuous"]
        ]
        categorical = [ordered(codes[k], -1) if k in codes else np.full(shape, -1) for k in state["categories"]]
        with np.errstate(invalid="ignore"):
            ratio_ba = np.log(ordered(depth_ba, np.nan) / np.asarray(state["depth_ref"], dtype=np.float64))
        small_arrays = {
            "available": {kind: ordered(found.available.get(kind, absent), missing=False) for kind in state["kinds"]},
            "continuous": np.stack(continuous, axis=-1).astype(np.float32)
            if continuous
            else np.zeros((*shape, 0), "f4"),
            "categorical": np.stack(categorical, axis=-1).astype(np.int64)
            if categorical
            else np.zeros((*shape, 0), "i8"),
            "log_depth_ratio": np.nan_to_num(ratio_ba, nan=0.0).astype(np.float32),
        }
        keys = dict(found.keys)
        return {"keys": keys, "assay_indexer": indexer, "n_obs": adata.n_obs, "experiments": small_arrays}

    def _scan(self, adata: AnnData, found: _Found, train_b: np.ndarray, ratio_ba: np.ndarray) -> dict[str, np.ndarray]:
        """Check all values and return statistics of the assays in the training biosamples, NaN where there are none."""
        names, statistics = (adata.obs_names, adata.var_names), {}
        for kind, available_ba in found.available.items():
            where = f"{self.where}.obsm['{found.keys[kind]}']"
            sums_ba, squares_ba = scan(
                adata.obsm[found.keys[kind]],
                available_ba,
                found.runs,
                where=where,
                names=names,
                is_counts=kind == COUNTS,
            )
            weight_ba = np.where(available_ba & train_b[:, None], 1.0, np.nan) / found.runs.total
            if kind == COUNTS:
                sums_ba = sums_ba / np.where(np.isnan(ratio_ba), 1.0, ratio_ba)
            statistics[f"mean_{kind}"] = _mean(sums_ba * weight_ba)
            if kind == SIGNAL:
                variance_a = _mean(squares_ba * weight_ba) - statistics["mean_signal"] ** 2
                statistics["sd_signal"] = np.sqrt(np.maximum(variance_a, 0))
        return statistics


def _mean(values_ba: np.ndarray) -> np.ndarray:
    """Return the mean over biosamples of what is not NaN, NaN where there is nothing."""
    n_a = (~np.isnan(values_ba)).sum(axis=0)
    return np.where(n_a > 0, np.nansum(values_ba, axis=0) / np.maximum(n_a, 1), np.nan)


def _names(chosen: Sequence[str] | None) -> list[str] | None:
    return None if chosen is None else [str(name) for name in chosen]


def _transform(adata: AnnData) -> str:
    """Return how the signal was transformed, "" if unknown."""
    return str(adata.uns.get(UNS_SIGNAL_TRANSFORM, ""))


def _present(adata: AnnData, key: str | None, default: str, *, where: str, may_lack: bool = False) -> str | None:
    """Return a key of obsm, ``None`` for a default that is not there."""
    if key is None or (key not in adata.obsm and (may_lack or key == default)):
        return None
    _validate.check_key(adata.obsm, key, where=f"{where}.obsm")
    return key
