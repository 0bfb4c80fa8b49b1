"""How well a trained CANDI predicts what was measured: scores and calibration."""

from __future__ import annotations

import itertools
import logging
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
import torch

from epivi._errors import ConfigError
from epivi.metrics import imputation_scores
from epivi.metrics.calibration import Recalibration, coverage, pit_distance, randomised_pit
from epivi.models.candi.outputs.prediction import Stretch
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
    """Scores and calibration."""

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

        The interval of level p holds a value where its PIT u is at most p / 2 away from 1/2; see :meth:`get_pit`.

        Parameters
        ----------
        region, biosamples, adata, batch_size, seed
            As in :meth:`evaluate`.
        levels
            Nominal levels.

        Returns
        -------
        Columns kind, assay, level, coverage. :func:`epivi.pl.calibration` draws the same from :meth:`get_pit`.

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

    def get_pit(
        self,
        region: Any = None,
        *,
        biosamples: Sequence[str] | str | None = None,
        adata: AnnData | None = None,
        batch_size: int = 32,
        seed: int = 0,
    ) -> dict[str, np.ndarray]:
        r"""Return the probability integral transform of what was measured, each track predicted from the others.

        For counts the randomised one, :math:`u = F(y - 1) + V (F(y) - F(y - 1))` with V uniform. It is uniform if the
        laws are right.

        Parameters
        ----------
        region, biosamples, adata, batch_size, seed
            As in :meth:`evaluate`.

        Returns
        -------
        Values by assay, biosamples joined, for :func:`epivi.pl.calibration`; of a model of counts and signal by
        ``"assay, kind"``.

        Raises
        ------
        ConfigError, DataError
            As :meth:`impute`.

        Notes
        -----
        Memory is that of :meth:`evaluate`.
        """
        request = self._held_out(adata, region, None, biosamples)
        pits = self._pits(request, batch_size, np.random.default_rng(seed), is_corrected=True)
        several = len(self.module.network.heads) > 1
        return {self.assay_names[a] + (f", {kind}" if several else ""): pit_l for (kind, a), pit_l in pits.items()}

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
        data, dataset = opened = self._opened(adata)
        if region is None:
            region = self.genome_split.validation
            if not len(region) or not self._has_trained_bins(dataset):
                message = "The data have no bins held out for validation: say where to learn the correction, region="
                raise ConfigError(message)
        if biosamples is None:
            biosamples = self._learned_from(data, adata)
        request = self._request(opened, region, None, biosamples, kind="left out")
        pits = self._pits(request, batch_size, np.random.default_rng(seed), is_corrected=False)
        knots = self.module.recalibration_knots.double().cpu().numpy()
        heads = list(self.module.network.heads)
        learned = np.tile(knots, (len(heads), len(self.assay_names), 1))
        for (kind, assay), pit_l in pits.items():
            learned[heads.index(kind), assay] = Recalibration.fit(pit_l).invert(knots)
        self.module.recalibration.copy_(torch.as_tensor(learned))
        self.module.is_recalibrated.fill_(value=True)

    def _held_out(
        self, adata: AnnData | None, region: Any, assays: Any, biosamples: Sequence[str] | str | None
    ) -> Request:
        """Return the request of all measured tracks, by default of test biosamples on bins that are held out."""
        data, dataset = opened = self._opened(adata)
        split = self.genome_split
        held = split.test if len(split.test) else split.validation
        if region is None and len(held) and self._has_trained_bins(dataset):
            region = held
        if biosamples is None:
            tested = [name for name in self.state["biosamples"]["test"] if name in data.obs_names]
            biosamples = [str(name) for name in tested] or None
        return self._request(opened, region, assays, biosamples, kind="left out")

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
