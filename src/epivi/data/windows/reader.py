"""From registered experiments to batches: only the bins of the wanted windows are read."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch
from torch.utils.data import Dataset

from epivi._errors import ConfigError, DataError
from epivi._keys import (
    BATCH_AVAILABLE_COUNTS,
    BATCH_AVAILABLE_SIGNAL,
    BATCH_BIN_MASK,
    BATCH_CATEGORICAL,
    BATCH_CONTINUOUS,
    BATCH_COUNTS,
    BATCH_DNA,
    BATCH_HAS_PRIOR,
    BATCH_LOG_DEPTH_RATIO,
    BATCH_PRIOR,
    BATCH_ROWS,
    BATCH_SIGNAL,
    BATCH_WINDOW,
)
from epivi._validate import check_choice, check_number
from epivi.data.windows._checks import blocks, in_memory
from epivi.data.windows.regions import Runs, runs

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from anndata import AnnData
    from torch import Tensor

COUNTS, SIGNAL = "counts", "signal"
KINDS: Final = (COUNTS, SIGNAL)

_NO_BASE = 4
_FINGERPRINT_WINDOWS = 64
_FINGERPRINT_BINS = 256


@dataclass(frozen=True, eq=False)
class Experiments:
    """Experiments of one object with the assays in the trained order; values stay where they are.

    Attributes
    ----------
    runs
        Runs of the bins.
    values
        Arrays (B, stored assays, n_bins) by kind, ``"counts"`` and ``"signal"``; ``None`` where the data lack it.
    available
        Which experiments have values, bool (B, A), by kind.
    indexer
        Stored assay of each trained one, -1 where it is missing, (A,).
    continuous
        (B, A, k) float32, log2 of the depth, NaN unknown.
    categorical
        (B, A, k) int64, -1 unknown.
    log_depth_ratio
        (B, A) float32: ln(depth / reference depth of the assay), 0 where unknown.
    dna
        uint8 (n_bins · width), or ``None``.
    prior
        Mean tracks (stored assays, n_bins), or ``None``.
    in_mean
        Which experiments of this object were in the mean tracks, bool (B, A), by kind.
    n_in_mean
        Experiments in the mean track of each assay, (A,), by kind.
    """

    runs: Runs
    values: dict[str, Any]
    available: dict[str, np.ndarray]
    indexer: np.ndarray
    continuous: np.ndarray
    categorical: np.ndarray
    log_depth_ratio: np.ndarray
    dna: Any
    prior: Any
    in_mean: dict[str, np.ndarray]
    n_in_mean: dict[str, np.ndarray]

    @property
    def n_rows(self) -> int:
        """Number of biosamples."""
        return self.log_depth_ratio.shape[0]

    @property
    def n_assays(self) -> int:
        """Number of trained assays."""
        return self.indexer.size


def open_experiments(adata: AnnData, state: Mapping[str, Any]) -> Experiments:
    """Collect what batches are made of from data that were registered.

    Parameters
    ----------
    adata
        The registered object.
    state
        What :meth:`epivi.data.windows.ExperimentsField.register_field` or ``transfer_field`` returned.
    """
    keys, small = state["keys"], state["experiments"]
    trained = {str(name): at for at, name in enumerate(state["biosamples"]["train"])}
    at_n = np.array([trained.get(str(name), -1) for name in adata.obs_names], dtype=np.int64)
    in_mean = {
        kind: np.where(at_n[:, None] >= 0, np.asarray(state["trained"][kind], dtype=bool)[at_n], False)  # noqa: FBT003
        for kind in state["kinds"]
    }
    return Experiments(
        runs=runs(adata.uns[keys["bins"]]),
        values={kind: None if keys[kind] is None else adata.obsm[keys[kind]] for kind in state["kinds"]},
        available={kind: np.asarray(small["available"][kind], dtype=bool) for kind in state["kinds"]},
        indexer=np.asarray(state["assay_indexer"], dtype=np.int64),
        continuous=np.asarray(small["continuous"], dtype=np.float32),
        categorical=np.asarray(small["categorical"], dtype=np.int64),
        log_depth_ratio=np.asarray(small["log_depth_ratio"], dtype=np.float32),
        dna=adata.uns[keys["dna"]] if keys["dna"] else None,
        prior=adata.varm.get(keys["prior"]),
        in_mean=in_mean,
        n_in_mean={kind: np.asarray(state["trained"][kind], dtype=bool).sum(axis=0) for kind in state["kinds"]},
    )


def cut(array: Any, rows: np.ndarray, first: np.ndarray, stop: np.ndarray) -> list[np.ndarray]:
    """Read the bins from ``first`` up to ``stop`` of one row after the other, each (assays, bins).

    Examples
    --------
    >>> [part.tolist() for part in cut(np.arange(6).reshape(1, 2, 3), np.array([0]), np.array([1]), np.array([3]))]
    [[[1, 2], [4, 5]]]
    """
    known: dict[tuple[int, int, int], np.ndarray] = {}
    places = list(zip(rows.tolist(), first.tolist(), stop.tolist(), strict=True))
    for b, s, e in dict.fromkeys(places):
        if (b, s, e) in known:
            continue
        # a lazy array makes a whole chunk for every window: all rows of one locus are taken from it at once
        here = sorted({row for row, *ends in places if ends == [s, e]}) if hasattr(array, "compute") else [b]
        part = array[here, :, s:e] if len(here) > 1 else array[b : b + 1, :, s:e]
        known |= {(row, s, e): one for row, one in zip(here, in_memory(part), strict=True)}
    return [known[place] for place in places]


class WindowDataset(Dataset):
    """Batches of windows: ``dataset[items]`` with items (b, 2) = (biosample row, first bin).

    A batch holds ``rows`` and ``window`` int64 (b,); ``bin_mask`` bool (b, l), false beyond the end of the run in which
    the window begins; ``counts`` and ``signal`` (b, l, a), 0 where unavailable or padded, for those kinds that the
    model was set up with; ``available_counts`` and ``available_signal`` (b, a), 0 or 1; ``continuous`` (b, a, k), NaN
    unknown; ``categorical`` int64 (b, a, k), -1 unknown; ``log_depth_ratio`` (b, a); if asked for, ``dna`` uint8
    (b, g), 4 where padded, and ``prior`` (b, l, a) with ``has_prior`` (b, a). All others are float32.

    The prior is the mean track of the assay over the *other* training biosamples. With the stored mean of n
    experiments it is (n · mean - own) / (n - 1) for an experiment that is in the mean, else the mean. ``has_prior`` is
    0 where no other experiment is left, and where an experiment in the mean is not available any more, so that its own
    values cannot be taken out.

    Parameters
    ----------
    adata
        The registered object.
    state
        What the field returned for it.
    window
        Bins of a window.
    dna
        Whether to read DNA; by default if the model was set up with it.
    prior
        ``"counts"`` or ``"signal"``: of which values the mean tracks in ``varm`` are (see :func:`mean_tracks`);
        ``None`` for no prior.

    Raises
    ------
    ConfigError
        If an argument is not valid.
    DataError
        If DNA or mean tracks are asked for and not there, or do not fit the bins.
    """

    def __init__(
        self,
        adata: AnnData,
        state: Mapping[str, Any],
        window: int,
        *,
        dna: bool | None = None,
        prior: str | None = None,
    ) -> None:
        check_number(window, "window", low=1, integer=True)
        self.experiments = open_experiments(adata, state)
        self.window = int(window)
        self.dna = bool(state["has_dna"]) if dna is None else dna
        self.prior = prior
        if self.dna and self.experiments.dna is None:
            message = "DNA is asked for, and the data were set up without. Give uns['dna'] or fasta= at setup."
            raise DataError(message)
        if prior is not None:
            check_choice(prior, "prior", state["kinds"])
            key, wanted = state["keys"]["prior"], (adata.n_vars, self.experiments.runs.total)
            if self.experiments.prior is None:
                message = f"A prior is asked for, and varm['{key}'] is not there. Store epivi's mean tracks in it."
                raise DataError(message)
            if tuple(self.experiments.prior.shape) != wanted:
                found = tuple(self.experiments.prior.shape)
                message = f"varm['{key}'] has the shape {found}, needed is {wanted} = (assays, bins)."
                raise DataError(message)

    def __len__(self) -> int:
        return self.experiments.n_rows

    def __getitem__(self, items: np.ndarray | Sequence[Sequence[int]]) -> dict[str, Tensor]:
        items = np.asarray(items, dtype=np.int64).reshape(-1, 2)
        rows, first = items[:, 0], items[:, 1]
        run = self.experiments.runs.of(first)
        bad = (rows < 0) | (rows >= len(self)) | (run < 0)
        if bad.any():
            row, start = items[int(np.argmax(bad))]
            message = (
                f"There is no window at biosample {row}, bin {start}: the data have {len(self)} biosamples and "
                f"{self.experiments.runs.total} bins."
            )
            raise ConfigError(message)
        stop = np.minimum(first + self.window, self.experiments.runs.stop[run])
        mask_bl = np.arange(self.window) < (stop - first)[:, None]
        batch = {BATCH_ROWS: rows, BATCH_WINDOW: first, BATCH_BIN_MASK: mask_bl}
        batch |= self._values(rows, first, stop)
        batch[BATCH_CONTINUOUS] = self.experiments.continuous[rows]
        batch[BATCH_CATEGORICAL] = self.experiments.categorical[rows]
        batch[BATCH_LOG_DEPTH_RATIO] = self.experiments.log_depth_ratio[rows]
        if self.dna:
            batch[BATCH_DNA] = self._bases(first, stop)
        return {key: torch.from_numpy(np.ascontiguousarray(value)) for key, value in batch.items()}

    def _values(self, rows: np.ndarray, first: np.ndarray, stop: np.ndarray) -> dict[str, np.ndarray]:
        """Return values, availability and prior."""
        batch: dict[str, np.ndarray] = {}
        for kind, entry, mask in (
            (COUNTS, BATCH_COUNTS, BATCH_AVAILABLE_COUNTS),
            (SIGNAL, BATCH_SIGNAL, BATCH_AVAILABLE_SIGNAL),
        ):
            if kind not in self.experiments.available:
                continue
            available_ba = self.experiments.available[kind][rows]
            batch[entry] = self._padded(self.experiments.values[kind], rows, (first, stop), available_ba)
            batch[mask] = available_ba.astype(np.float32)
            if kind == self.prior:
                batch |= self._priors(rows, (first, stop), batch[entry])
        return batch

    def _padded(
        self, array: Any, rows: np.ndarray, ends: tuple[np.ndarray, np.ndarray], wanted_ba: np.ndarray
    ) -> np.ndarray:
        """Return windows (b, l, a), 0 where not wanted or beyond a run."""
        found = np.zeros((rows.size, self.window, wanted_ba.shape[1]), dtype=np.float32)
        if array is not None and wanted_ba.any():
            for i, part in enumerate(cut(array, rows, *ends)):
                at = np.flatnonzero(wanted_ba[i])
                found[i, : part.shape[1], at] = part[self.experiments.indexer[at]]
        return found

    def _means(self, first: np.ndarray, stop: np.ndarray) -> np.ndarray:
        """Return windows of the mean tracks (b, l, a), 0 where there is none or beyond a run."""
        found = np.zeros((first.size, self.window, self.experiments.n_assays), dtype=np.float32)
        at = np.flatnonzero(self.experiments.indexer >= 0)
        known: dict[tuple[int, int], np.ndarray] = {}
        for i, place in enumerate(zip(first.tolist(), stop.tolist(), strict=True)):
            if place not in known:
                known[place] = in_memory(self.experiments.prior[:, place[0] : place[1]])[self.experiments.indexer[at]]
            found[i, : place[1] - place[0], at] = known[place]
        return found

    def _priors(
        self, rows: np.ndarray, ends: tuple[np.ndarray, np.ndarray], own_bla: np.ndarray
    ) -> dict[str, np.ndarray]:
        """Return the mean over the other training biosamples, and where there is one."""
        kind, found = str(self.prior), self.experiments
        is_stored = np.broadcast_to(found.indexer >= 0, (rows.size, found.n_assays))
        mean_bla = self._means(*ends)
        in_mean_ba, n_a = found.in_mean[kind][rows], found.n_in_mean[kind]
        left_ba = n_a - in_mean_ba
        has_ba = is_stored & (left_ba > 0) & (~in_mean_ba | found.available[kind][rows])
        if kind == COUNTS:
            own_bla = relative_counts(own_bla, found.log_depth_ratio[rows][:, None, :])
        rest_bla = (n_a * mean_bla - own_bla) / np.maximum(left_ba, 1)[:, None, :]
        prior_bla = np.where(in_mean_ba[:, None, :], rest_bla, mean_bla) * has_ba[:, None, :]
        inside_bl = np.arange(self.window) < (ends[1] - ends[0])[:, None]
        return {
            BATCH_PRIOR: (prior_bla * inside_bl[:, :, None]).astype(np.float32),
            BATCH_HAS_PRIOR: has_ba.astype(np.float32),
        }

    def _bases(self, first: np.ndarray, stop: np.ndarray) -> np.ndarray:
        """Return codes of bases (b, g)."""
        width = self.experiments.runs.bin_size_bp
        codes = np.full((first.size, self.window * width), _NO_BASE, dtype=np.uint8)
        known: dict[tuple[int, int], np.ndarray] = {}
        for i, place in enumerate(zip(first.tolist(), stop.tolist(), strict=True)):
            if place not in known:
                known[place] = in_memory(self.experiments.dna[place[0] * width : place[1] * width])
            codes[i, : known[place].size] = known[place]
        return codes


def relative_counts(counts: np.ndarray, log_depth_ratio: np.ndarray) -> np.ndarray:
    """Return log1p(count · depth_ref / depth), counts as they would be at the reference depth.

    Examples
    --------
    >>> relative_counts(np.array([2.0]), np.log([2.0])).round(2)
    array([0.69], dtype=float32)
    """
    return np.log1p(counts.astype(np.float32) * np.exp(-log_depth_ratio.astype(np.float32)))


def mean_tracks(
    adata: AnnData, state: Mapping[str, Any], rows: Sequence[int] | np.ndarray, *, kind: str = SIGNAL
) -> tuple[np.ndarray, np.ndarray]:
    """Average the tracks of some biosamples, assay by assay, block by block.

    Parameters
    ----------
    adata
        The registered object.
    state
        What the field returned for it.
    rows
        Biosamples to average, as a rule the training ones (:func:`split_rows`).
    kind
        ``"signal"``: the mean of the signal. ``"counts"``: the mean of log1p(count · depth_ref / depth), with the ratio
        1 where a depth is unknown.

    Returns
    -------
    Means, float32 (stored assays, n_bins), for ``adata.varm``; 0 where no experiment is available. And the number of
    experiments of each assay, int64 (stored assays,).

    Raises
    ------
    ConfigError
        If the data lack the kind.
    """
    found = open_experiments(adata, state)
    check_choice(kind, "kind", [name for name in found.values if found.values[name] is not None])
    array = found.values[kind]
    wanted_ba, ratio_ba = np.zeros((2, adata.n_obs, adata.n_vars))
    at = np.flatnonzero(found.indexer >= 0)
    rows = np.unique(np.asarray(rows, dtype=np.int64))
    wanted_ba[np.ix_(rows, found.indexer[at])] = found.available[kind][np.ix_(rows, at)]
    ratio_ba[:, found.indexer[at]] = found.log_depth_ratio[:, at]
    total_al = np.zeros((adata.n_vars, found.runs.total), dtype=np.float32)
    for row, assay, first, values_bal in blocks(array, wanted_ba > 0):
        size_b, size_a, size_l = values_bal.shape
        for b, a in np.argwhere(wanted_ba[row : row + size_b, assay : assay + size_a]):
            own_l = values_bal[b, a].astype(np.float32)
            if kind == COUNTS:
                own_l = relative_counts(own_l, ratio_ba[row + b, assay + a])
            total_al[assay + a, first : first + size_l] += own_l
    n_a = wanted_ba.sum(axis=0).astype(np.int64)
    total_al /= np.maximum(n_a, 1)[:, None].astype(np.float32)
    return total_al, n_a


def split_rows(adata: AnnData, state: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return the rows of the training, validation and test biosamples of the setup, by name.

    Parameters
    ----------
    adata
        The registered object, or one that shares biosamples with it.
    state
        What the field returned.
    """
    rows = {}
    for part, names in state["biosamples"].items():
        at = adata.obs_names.get_indexer([str(name) for name in names])
        rows[part] = np.sort(at[at >= 0]).astype(np.int64)
    return rows


def fingerprint(adata: AnnData, state: Mapping[str, Any]) -> str:
    """Return a SHA-256 that changes with names, bins, availability, covariates and values of the data.

    Of the values, up to 64 windows of 256 bins are read, evenly spaced along the bins, of one biosample after the
    other.

    Parameters
    ----------
    adata
        The registered object.
    state
        What the field returned for it.
    """
    found = open_experiments(adata, state)
    digest = sha256("\n".join([*map(str, adata.obs_names), "", *map(str, state["column_names"])]).encode())
    digest.update(found.runs.state()["hash"].encode())
    for array in (found.continuous, found.categorical, found.log_depth_ratio):
        digest.update(np.ascontiguousarray(array).data)
    n = min(_FINGERPRINT_WINDOWS, max(found.n_rows, -(-found.runs.total // _FINGERPRINT_BINS)))
    first = np.linspace(0, max(found.runs.total - _FINGERPRINT_BINS, 0), n).astype(np.int64)
    stop = np.minimum(first + _FINGERPRINT_BINS, found.runs.total)
    rows = np.arange(n) % found.n_rows
    for kind, array in found.values.items():
        digest.update(kind.encode() + np.ascontiguousarray(found.available[kind]).tobytes())
        at = np.flatnonzero(found.indexer >= 0)
        for row, part in zip(rows, cut(array, rows, first, stop) if array is not None else (), strict=False):
            shown = part[found.indexer[at]].astype(np.float32) * 1
            shown[~found.available[kind][row, at]] = 0
            digest.update(np.ascontiguousarray(shown).tobytes())
    width = found.runs.bin_size_bp
    for low, high in zip(first.tolist(), stop.tolist(), strict=True):
        if found.dna is not None:
            digest.update(np.ascontiguousarray(in_memory(found.dna[low * width : high * width])).tobytes())
        if found.prior is not None:
            digest.update(np.ascontiguousarray(in_memory(found.prior[:, low:high])).tobytes())
    return digest.hexdigest()
