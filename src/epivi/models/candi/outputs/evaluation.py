"""How well a trained CANDI predicts what was measured: scores, calibration, and which experiment to do next."""

from __future__ import annotations

import itertools
import logging
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
import torch

from epivi import _validate
from epivi._errors import ConfigError
from epivi.data.windows import validation_windows
from epivi.metrics import imputation_scores
from epivi.metrics.calibration import Recalibration, coverage, pit_distance, randomised_pit
from epivi.models.candi.outputs.prediction import Predictor, Stretch
from epivi.models.candi.outputs.tracks import TracksMixin

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from anndata import AnnData

    from epivi.models.candi.outputs.request import Request

logger = logging.getLogger(__name__)

LEVELS = (0.5, 0.8, 0.9, 0.95)


class Observed(NamedTuple):
    """Predictions of measured tracks, each from the others, with what was observed.

    Attributes
    ----------
    kind
        ``"counts"`` or ``"signal"``.
    biosample, assay
        Name of the biosample, number of the assay.
    values_l
        Observed values, shape (l,).
    law
        Predicted laws.
    """

    kind: str
    biosample: str
    assay: int
    values_l: np.ndarray
    law: Any


class EvaluationMixin(TracksMixin):
    """Scores, calibration, ranking of experiments."""

    def evaluate(
        self,
        region: Any = None,
        assays: Sequence[str] | str | None = None,
        biosamples: Sequence[str] | str | None = None,
        *,
        levels: Sequence[float] = LEVELS,
        adata: AnnData | None = None,
        batch_size: int = 32,
        seed: int = 0,
    ) -> pd.DataFrame:
        """Score the prediction of every measured track from the others of its biosample.

        Parameters
        ----------
        region
            As in :meth:`impute`; by default the bins for tests, or those of validation if there are none, or all if the
            data have other bins than those of the setup.
        assays, biosamples, adata, batch_size
            As in :meth:`impute`; by default the test biosamples, or all if there are none.
        levels
            Probabilities of the intervals whose coverage is reported.
        seed
            Seed of the randomised probability integral transform.

        Returns
        -------
        One row for each biosample, assay and kind: scores of :func:`epivi.metrics.imputation_scores`, mean negative
        log-likelihood in nats, coverage of each level, Kolmogorov distance of the PIT; and the share of the scored bins
        that trained the model and whether the biosample did, which tell what the scores are worth.

        Raises
        ------
        ConfigError, DataError
            As :meth:`impute`.

        Notes
        -----
        Parameters of all predicted laws are in memory: 16 bytes a bin for each track with counts and signal, about 2 GB
        a track for a human genome in bins of 25 bp. Name chromosomes for large data.
        """
        rows, rng = [], np.random.default_rng(seed)
        trained = {str(name) for name in self.state["biosamples"]["train"]}
        request = self._held_out(adata, region, assays, biosamples)
        seen = self._share_of_training_bins(request)
        scored = {str(request.data.obs_names[target.row]) for target in request.targets}
        if seen or scored & trained:
            logger.warning(
                "%.0f %% of the bins and %d of the %d biosamples that are scored trained the model.",
                100 * seen,
                len(scored & trained),
                len(scored),
            )
        for found in self._observed(request, batch_size):
            mean_l = found.law.mean()
            pit_l = self._pit(found, rng)
            rows.append(
                {"biosample": found.biosample, "assay": self.assay_names[found.assay], "kind": found.kind}
                | imputation_scores(found.values_l, mean_l)
                | {"nll": float(np.mean(found.law.nll(found.values_l)))}
                | {f"coverage_{level:g}": float(c) for level, c in zip(levels, coverage(pit_l, levels), strict=True)}
                | {"pit_distance": float(pit_distance(pit_l))}
                | {"trained_bins": seen, "trained_biosample": found.biosample in trained}
            )
        return pd.DataFrame(rows)

    def calibration(
        self,
        region: Any = None,
        *,
        levels: Sequence[float] = tuple(np.round(np.linspace(0.05, 0.95, 19), 2)),
        biosamples: Sequence[str] | str | None = None,
        adata: AnnData | None = None,
        batch_size: int = 32,
        seed: int = 0,
    ) -> pd.DataFrame:
        """Return how often intervals hold what was measured, each track predicted from the others.

        The randomised probability integral transform u = F(y - 1) + V (F(y) - F(y - 1)), V uniform, is uniform if the
        laws are right, for counts too; the interval of level p holds y where |u - 1/2| <= p / 2.

        Parameters
        ----------
        region, biosamples, adata, batch_size, seed
            As in :meth:`evaluate`.
        levels
            Nominal levels.

        Returns
        -------
        Columns kind, assay, level, coverage; for :func:`epivi.pl.calibration`.

        Raises
        ------
        ConfigError, DataError
            As :meth:`impute`.

        Notes
        -----
        Memory is that of :meth:`evaluate`.
        """
        rng, rows = np.random.default_rng(seed), []
        request = self._held_out(adata, region, None, biosamples)
        for (kind, assay), pit_l in self._pits(request, batch_size, rng, is_corrected=True).items():
            for level, share in zip(levels, coverage(pit_l, levels), strict=True):
                rows.append({"kind": kind, "assay": self.assay_names[assay], "level": level, "coverage": share})
        return pd.DataFrame(rows)

    def calibrate(
        self,
        region: Any = None,
        *,
        biosamples: Sequence[str] | str | None = None,
        adata: AnnData | None = None,
        batch_size: int = 32,
        seed: int = 0,
    ) -> None:
        """Correct medians, intervals and tail probabilities of each assay by what was observed.

        The correction is a monotone map of the PIT (Kuleshov et al. 2018), learned from tracks predicted from the
        others; it is saved with the model. Means and variances stay as they are.

        Parameters
        ----------
        region
            Where to learn it: bins used neither for training nor for scoring; by default those of validation.
        biosamples, adata, batch_size, seed
            As in :meth:`evaluate`; by default all biosamples that trained the model.

        Raises
        ------
        ConfigError
            If no region is given and there are no bins of validation, or as :meth:`impute`.
        DataError
            As :meth:`impute`, or if an assay has fewer than 20 bins to learn from. What was learned before stays.

        Notes
        -----
        Memory is that of :meth:`evaluate`. An assay that was not measured keeps its laws as they are.
        """
        data, dataset = self._opened(adata)
        if region is None:
            region = self.genome_split.validation
            if not len(region) or not self._has_trained_bins(dataset):
                message = "The data have no bins held out for validation: say where to learn the correction, region="
                raise ConfigError(message)
        if biosamples is None:
            biosamples = self._learned_from(data, adata)
        request = self._request(adata, region, None, biosamples, kind="left out")
        pits = self._pits(request, batch_size, np.random.default_rng(seed), is_corrected=False)
        knots = self.module.recalibration_knots.double().cpu().numpy()
        heads = list(self.module.network.heads)
        learned = np.tile(knots, (len(heads), len(self.assay_names), 1))
        for (kind, assay), pit_l in pits.items():
            learned[heads.index(kind), assay] = Recalibration.fit(pit_l).invert(knots)
        self.module.recalibration.copy_(torch.as_tensor(learned))
        self.module.is_recalibrated.fill_(value=True)

    def rank_assays(
        self,
        target: str,
        available: Sequence[str] = (),
        candidates: Sequence[str] | None = None,
        *,
        kind: str | None = None,
        n_windows: int = 256,
        adata: AnnData | None = None,
        batch_size: int = 32,
    ) -> pd.DataFrame:
        r"""Rank candidate experiments by how much they would help to predict an assay.

        Where a candidate b and the target a were measured, the gain is
        :math:`\mathrm{NLL}_a(S) - \mathrm{NLL}_a(S \cup b)`, its mean over training biosamples and windows of the
        validation chromosomes, in nats a bin.

        Parameters
        ----------
        target
            Assay to predict.
        available
            Assays that exist (S).
        candidates
            Assays that could be done; all others by default.
        kind
            ``"counts"`` or ``"signal"``; by default what the encoder reads.
        n_windows
            Most windows (biosample, window) to look at, evenly spaced.
        adata, batch_size
            As in :meth:`impute`.

        Returns
        -------
        Index candidate, best first; columns ``gain``, ``sem`` (standard error over windows), ``n_biosamples``. A
        candidate never measured together with the target and all of ``available`` has NaN.

        Raises
        ------
        ConfigError
            If a name is unknown or repeated, the target is among the others, or a number is not valid.
        """
        self._check_if_trained(warn=True)
        _validate.check_number(n_windows, "n_windows", low=1, integer=True)
        names = self.assay_names
        candidates = [n for n in names if n != target and n not in available] if candidates is None else candidates
        for name in (target, *available, *candidates):
            _validate.check_choice(name, "assay", names)
        if len({target, *available, *candidates}) < 1 + len(available) + len(candidates):
            message = "target, available and candidates must name different assays."
            raise ConfigError(message)
        kind = self.config.input if kind is None else kind
        _validate.check_choice(kind, "kind", list(self.module.network.heads))
        data, dataset = self._opened(adata)
        predictor = Predictor(self.module, dataset, batch_size=batch_size)
        held = self.genome_split.validation
        bins = held if len(held) and self._has_trained_bins(dataset) else dataset.experiments.runs
        found = dataset.experiments.available
        counted = data.obs_names.isin(self._learned_from(data, adata))
        base = [names.index(name) for name in available]
        at = names.index(target)
        rows = {}
        for name in candidates:
            number = names.index(name)
            needed = counted & found[self.config.input][:, [*base, number]].all(axis=1) & found[kind][:, at]
            gains: list[np.ndarray] = []
            if needed.any():
                items = validation_windows(bins, np.flatnonzero(needed), self.config.n_bins, max_windows=n_windows)
                gains = list(self._gains(predictor, items, base, number, at, kind))
            gain_w = np.concatenate(gains) if gains else np.full(1, np.nan)
            sem = float(gain_w.std(ddof=1) / np.sqrt(gain_w.size)) if gain_w.size > 1 else np.nan
            rows[name] = {"gain": float(gain_w.mean()), "sem": sem, "n_biosamples": int(needed.sum())}
        table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("candidate")
        return table.sort_values("gain", ascending=False, na_position="last")

    def _gains(self, predictor: Predictor, items: np.ndarray, base: list[int], number: int, at: int, kind: str) -> Any:
        """Yield the gain of each window by showing one more assay."""
        without_a, with_a = np.zeros((2, len(self.assay_names)), dtype=np.float32)
        without_a[base] = 1.0
        with_a[[*base, number]] = 1.0
        for start in range(0, len(items), predictor.batch_size):
            batch = {
                key: value.to(predictor.device)
                for key, value in predictor.dataset[items[start : start + predictor.batch_size]].items()
            }
            mask_bl = batch["bin_mask"].double()
            nll = []
            for shown_a in (without_a, with_a):
                outputs = predictor.decode(batch, predictor.encode(batch, shown_a))
                nll_bl = self.module.nll(batch, outputs, kind)[:, :, at].double()
                nll.append((nll_bl * mask_bl).sum(1) / mask_bl.sum(1))
            yield (nll[0] - nll[1]).cpu().numpy()

    def _learned_from(self, data: AnnData, adata: AnnData | None) -> list[str]:
        """Return the training biosamples, or all biosamples of data that were passed or have none of them."""
        names = [str(name) for name in data.obs_names]
        trained = {str(name) for name in self.state["biosamples"]["train"]} & set(names)
        return names if adata is not None or not trained else [name for name in names if name in trained]

    def _held_out(
        self, adata: AnnData | None, region: Any, assays: Any, biosamples: Sequence[str] | str | None
    ) -> Request:
        """Return the request of all measured tracks, by default of test biosamples on bins that are held out."""
        data, dataset = self._opened(adata)
        split = self.genome_split
        held = split.test if len(split.test) else split.validation
        if region is None and len(held) and self._has_trained_bins(dataset):
            region = held
        if biosamples is None:
            tested = [name for name in self.state["biosamples"]["test"] if name in data.obs_names]
            biosamples = [str(name) for name in tested] or None
        return self._request(adata, region, assays, biosamples, kind="left out")

    def _share_of_training_bins(self, request: Request) -> float:
        """Return which share of the bins asked for the model was trained on, by their coordinates."""
        width, shared = request.runs.bin_size_bp, 0
        for trained, part in itertools.product(self.genome_split.train, request.runs):
            if trained.chrom == part.chrom:
                low = max(trained.start_bp, part.start_bp)
                high = min(trained.start_bp + width * trained.n_bins, part.start_bp + width * part.n_bins)
                shared += max(high - low, 0)
        return shared / (width * request.runs.total)

    def _observed(self, request: Request, batch_size: int) -> Iterator[Observed]:
        """Yield each target with its observed values and predicted laws, chromosome runs joined."""
        parts = list(self._stretches(request, None, batch_size))
        joined = Stretch(
            parts[0].first,
            {name: np.concatenate([part.parameters[name] for part in parts], axis=1) for name in parts[0].parameters},
        )
        del parts
        found = request.dataset.experiments
        for kind in self.module.network.heads:
            for at, target in enumerate(request.targets):
                if not found.available[kind][target.row, target.assay]:
                    continue
                stored = found.indexer[target.assay]
                values = [found.values[kind][target.row, stored, run.first : run.stop] for run in request.runs]
                values_l = np.concatenate([np.asarray(part) for part in values]).astype(np.float64)
                law = self._law(kind, joined, at, original_scale=False)
                yield Observed(kind, str(request.data.obs_names[target.row]), target.assay, values_l, law)

    def _pit(self, found: Observed, rng: np.random.Generator, *, is_corrected: bool = True) -> np.ndarray:
        """Return the PIT of a track, corrected if asked for and the model was calibrated."""
        correction = self._recalibration(found.kind, found.assay) if is_corrected else None
        at = found.law.cdf(found.values_l)
        if correction is not None:
            at = correction.apply(at)
        if found.kind == "signal":
            return at
        below = found.law.cdf_below(found.values_l)
        return randomised_pit(found.values_l, below if correction is None else correction.apply(below), at, seed=rng)

    def _pits(
        self, request: Request, batch_size: int, rng: np.random.Generator, *, is_corrected: bool
    ) -> dict[tuple[str, int], np.ndarray]:
        """Return the PIT of each kind and assay, biosamples joined."""
        pits: dict[tuple[str, int], list[np.ndarray]] = {}
        for found in self._observed(request, batch_size):
            pits.setdefault((found.kind, found.assay), []).append(self._pit(found, rng, is_corrected=is_corrected))
        return {key: np.concatenate(parts) for key, parts in pits.items()}
