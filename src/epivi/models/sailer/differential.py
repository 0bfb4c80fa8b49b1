"""Differential accessibility from posterior samples."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from scvi import REGISTRY_KEYS

from epivi import _validate
from epivi._errors import ConfigError, DataError
from epivi._keys import BATCH_INDICES
from epivi.models.base import ROWS_AT_ONCE, EpiModel, check_indices

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData

COLUMNS = (
    "prob_da",
    "is_da_fdr",
    "bayes_factor",
    "effect_size",
    "emp_effect",
    "est_prob1",
    "est_prob2",
    "emp_prob1",
    "emp_prob2",
)
PEAKS_AT_ONCE = 4096
EPS = 1e-8


class DifferentialMixin(EpiModel):
    """Differential accessibility between groups of cells."""

    def differential_accessibility(  # noqa: PLR0913
        self,
        adata: AnnData | None = None,
        *,
        groupby: str | None = None,
        group1: str | Sequence[str] | None = None,
        group2: str | None = None,
        idx1: Sequence[int] | None = None,
        idx2: Sequence[int] | None = None,
        delta: float = 0.05,
        fdr_target: float = 0.05,
        n_samples: int = 1000,
        transform_batch: str | None = None,
    ) -> pd.DataFrame:
        r"""Compare accessibility between groups of cells at equal depth and batch.

        For each peak, pairs of posterior samples of the two groups give the effect :math:`p_2 - p_1`; the probability
        of differential accessibility is the larger of P(effect > delta) and P(effect < -delta).

        Parameters
        ----------
        adata
            Data; the trained data by default.
        groupby
            Column of obs that holds the groups.
        group1, group2
            Groups to compare: each of ``group1`` (by default every group) with ``group2`` (by default all other cells).
        idx1, idx2
            Row numbers or masks, in place of groups; ``idx2`` defaults to all other cells.
        delta
            Smallest difference in probability that counts.
        fdr_target
            Expected share of false discoveries among the peaks called.
        n_samples
            Posterior samples of each group.
        transform_batch
            Batch that the decoder is told for all cells, as in :meth:`get_normalized_accessibility`.

        Returns
        -------
        One row a peak (and comparison): ``prob_da``; ``is_da_fdr``; ``bayes_factor``; ``effect_size``, the estimated
        probability of group 2 minus that of group 1: **positive means more open in group 2**; ``emp_effect``, the same
        difference of observed shares of open cells; ``est_prob1``, ``est_prob2``, ``emp_prob1``, ``emp_prob2``; with
        ``groupby`` also ``comparison``, ``group1`` and ``group2``. Sorted by ``prob_da``.

        Raises
        ------
        ConfigError
            If neither groups nor indices are given, or a value is outside its range.
        DataError
            If a group is unknown or has no cells.
        """
        _validate.check_number(delta, "delta", low=0.0, high=1.0)
        _validate.check_number(fdr_target, "fdr_target", low=0.0, high=1.0)
        _validate.check_number(n_samples, "n_samples", low=1, integer=True)
        self._check_if_trained(warn=False)
        adata = self._validate_anndata(adata)
        batch = self._batch_code(transform_batch)
        tables = []
        for names, rows1, rows2 in _comparisons(adata, groupby, group1, group2, idx1, idx2):
            table = self._compare(adata, rows1, rows2, delta=delta, n_samples=n_samples, batch=batch)
            table["is_da_fdr"] = expected_fdr_calls(table["prob_da"].to_numpy(), fdr_target)
            table = table[list(COLUMNS)].sort_values("prob_da", ascending=False, kind="stable")
            if names is not None:
                table["comparison"] = f"{names[0]} vs {names[1]}"
                table["group1"], table["group2"] = names
            tables.append(table)
        return pd.concat(tables)

    @torch.inference_mode()
    def _compare(self, adata: AnnData, rows1: np.ndarray, rows2: np.ndarray, **options: Any) -> pd.DataFrame:
        """Compare two sets of rows; probabilities are computed for a slice of peaks at a time."""
        delta, n_samples = options["delta"], options["n_samples"]
        rng = np.random.default_rng([self.seed, 0xDA])
        hidden = [self._hidden_samples(adata, rows, rng, n_samples, options["batch"]) for rows in (rows1, rows2)]
        scales = [self.module.log_scale(h, self._depth("mean") or 1.0) for h in hidden]
        n_peaks = self.module.blocks.n_peaks
        estimates: dict[str, list[np.ndarray]] = {"est_prob1": [], "est_prob2": [], "prob_da": []}
        for start in range(0, n_peaks, PEAKS_AT_ONCE):
            peaks = torch.arange(start, min(start + PEAKS_AT_ONCE, n_peaks), device=self.device)
            first, second = (
                self.module.probabilities(h, peaks, log_scale_b=scale_b).cpu().numpy()
                for h, scale_b in zip(hidden, scales, strict=True)
            )
            effect = second - first
            estimates["est_prob1"].append(first.mean(0, dtype=np.float64))
            estimates["est_prob2"].append(second.mean(0, dtype=np.float64))
            estimates["prob_da"].append(np.maximum((effect > delta).mean(0), (effect < -delta).mean(0)))
        table = pd.DataFrame({k: np.concatenate(v) for k, v in estimates.items()}, index=pd.Index(self.feature_names))
        table["emp_prob1"], table["emp_prob2"] = (self._open_share(adata, rows) for rows in (rows1, rows2))
        table["effect_size"] = table["est_prob2"] - table["est_prob1"]
        table["emp_effect"] = table["emp_prob2"] - table["emp_prob1"]
        table["bayes_factor"] = np.log(table["prob_da"] + EPS) - np.log(1 - table["prob_da"] + EPS)
        return table

    def _hidden_samples(
        self, adata: AnnData, rows: np.ndarray, rng: np.random.Generator, n_samples: int, batch: int | None
    ) -> torch.Tensor:
        """Decode posterior samples of cells drawn with replacement, at mean depth, up to the input of the logits."""
        drawn = rng.choice(rows, size=n_samples)
        noise = torch.from_numpy(rng.standard_normal((n_samples, self.config.n_latent), dtype=np.float32))
        _, _, batches = self._batches(adata, drawn, None)
        parts, start = [], 0
        for entries in batches:
            outputs = self.module.inference(**self.module._get_inference_input(entries), deterministic=True)
            qz = outputs["qz"]
            stop = start + qz.loc.shape[0]
            outputs["z"] = qz.loc + qz.scale * noise[start:stop].to(qz.loc.device)
            inputs = self.module._get_generative_input(entries, outputs, depth=self._depth("mean"), batch=batch)
            parts.append(self.module.generative(**inputs)["hidden"])
            start = stop
        return torch.cat(parts)

    def _open_share(self, adata: AnnData, rows: np.ndarray) -> np.ndarray:
        """Share of the cells in which each peak is open, in the trained order."""
        manager = self.get_anndata_manager(adata, required=True)
        dataset = manager.create_torch_dataset(data_and_attributes=[REGISTRY_KEYS.X_KEY])
        total = np.zeros(self.module.blocks.n_peaks)
        for part in np.array_split(rows, max(rows.size // ROWS_AT_ONCE, 1)):
            total += np.bincount(dataset[part][BATCH_INDICES].numpy(), minlength=total.size)
        return total / rows.size


def _comparisons(
    adata: AnnData,
    groupby: str | None,
    group1: str | Sequence[str] | None,
    group2: str | None,
    idx1: Sequence[int] | None,
    idx2: Sequence[int] | None,
) -> list[tuple[tuple[str, str] | None, np.ndarray, np.ndarray]]:
    """Resolve groups or indices into pairs of rows."""
    if (groupby is None) == (idx1 is None):
        message = "Give either groupby= (with group1=, group2=) or idx1= (with idx2=)."
        raise ConfigError(message)
    if groupby is None:
        first = check_indices(idx1, adata.n_obs)
        second = np.setdiff1d(np.arange(adata.n_obs), first) if idx2 is None else check_indices(idx2, adata.n_obs)
        if not first.size or not second.size:
            message = f"One of the two groups has no cells ({first.size} and {second.size})."
            raise DataError(message)
        return [(None, first, second)]
    _validate.check_categorical(adata.obs, groupby, where="adata.obs")
    values = adata.obs[groupby].astype(str).to_numpy()
    known = sorted(set(values))
    wanted = (
        [name for name in known if name != group2]
        if group1 is None
        else [group1]
        if isinstance(group1, str)
        else list(group1)
    )
    for name in (*wanted, *(() if group2 is None else (group2,))):
        _validate.check_choice(str(name), f"group of obs['{groupby}']", known)
    if len(known) < 2:
        message = f"obs['{groupby}'] holds a single group ('{known[0]}'): there is nothing to compare with."
        raise DataError(message)
    result: list[tuple[tuple[str, str] | None, np.ndarray, np.ndarray]] = []
    for name in wanted:
        second = values != str(name) if group2 is None else values == str(group2)
        label = "rest" if group2 is None else str(group2)
        result.append(((str(name), label), np.flatnonzero(values == str(name)), np.flatnonzero(second)))
    return result


def expected_fdr_calls(probability: np.ndarray, target: float) -> np.ndarray:
    """Call as many features as keep the expected share of false discoveries at or below a target.

    Parameters
    ----------
    probability
        Posterior probability of each feature, shape (p,).
    target
        Expected false discovery rate.

    Returns
    -------
    Shape (p,), bool.

    Examples
    --------
    >>> expected_fdr_calls(np.array([0.99, 0.5, 0.98]), 0.05).tolist()
    [True, False, True]
    """
    order = np.argsort(-probability, kind="stable")
    expected = np.cumsum(1.0 - probability[order]) / np.arange(1, probability.size + 1)
    calls = np.zeros(probability.size, dtype=bool)
    calls[order[: int((expected <= target).sum())]] = True
    return calls
