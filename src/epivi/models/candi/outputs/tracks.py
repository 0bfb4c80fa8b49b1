"""Imputed and denoised tracks, and tracks at chosen covariates."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from epivi import _validate
from epivi._keys import UNS_SIGNAL_TRANSFORM
from epivi.models.candi.outputs.laws import ARCSINH, CountLaw, SignalLaw, summarise
from epivi.models.candi.outputs.prediction import Predictor
from epivi.models.candi.outputs.prompt import PromptMixin
from epivi.models.candi.outputs.request import bins_table, run_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from anndata import AnnData

    from epivi.models.candi.outputs.prediction import Stretch
    from epivi.models.candi.outputs.request import Request

SUMMARIES = ("mean", "median", "var", "lower", "upper")


class TracksMixin(PromptMixin):
    """Predicted tracks."""

    def impute(  # noqa: PLR0913
        self,
        region: Any = None,
        assays: Sequence[str] | str | None = None,
        biosamples: Sequence[str] | str | None = None,
        *,
        covariates: Mapping[str, Any] | None = None,
        leave_one_out: bool = False,
        interval: float | None = 0.9,
        threshold: float | None = None,
        original_scale: bool = False,
        adata: AnnData | None = None,
        batch_size: int = 32,
    ) -> AnnData:
        r"""Predict tracks that were not measured from all that were.

        Parameters
        ----------
        region
            ``"chr1:1,000,000-2,000,000"``, a chromosome, a list of both, or ``None`` for all bins.
        assays, biosamples
            Names; by default every assay that a biosample lacks.
        covariates
            Covariates of the predicted experiments by name: one value, or a mapping from assays to values; ``None``
            for unknown, which is the default. ``depth`` is in reads.
        leave_one_out
            Predict the assays that were measured, each from the others: what can be compared with the observation.
            The covariates are then those of the experiment, but for its coverage, which would give away how wide the
            track is.
        interval
            Probability between ``lower`` and ``upper``; ``None`` leaves them out.
        threshold
            Value whose probability of being exceeded is given as the layer ``exceeds``, on the scale of the result.
        original_scale
            Return the signal before its arcsinh transform: with X of mean u and variance v,
            :math:`E[\sinh X] = \sinh(u) e^{v/2}`, and quantiles through sinh. Nothing is undone where
            ``uns["signal_transform"]`` does not say "arcsinh".
        adata
            Data to predict; by default those of the training.
        batch_size
            Windows of a pass through the network; the result does not depend on it.

        Returns
        -------
        AnnData, obs = (biosample, assay), var = bins (chrom, start, end); layers ``mean``, ``median``, ``var``,
        ``lower``, ``upper`` of the counts, and with ``signal_`` before the name those of the signal; of a model of the
        signal alone without that. ``X`` is the mean.

        Raises
        ------
        ConfigError
            If a name or an argument is not valid, or there is nothing to predict.
        DataError
            If no bin overlaps the region.

        Notes
        -----
        Windows overlap; a tenth is cropped on each side, so that every bin is predicted with its surroundings. What a
        bin gets does not depend on the region asked for. The result is in memory as a whole, 4 bytes a bin for each
        track and layer: :meth:`export_bigwig` streams.
        """
        request = self._request(
            self._opened(adata), region, assays, biosamples, kind="left out" if leave_one_out else "missing"
        )
        return self._predict(request, covariates, interval, threshold, original_scale, batch_size)

    def denoise(  # noqa: PLR0913
        self,
        region: Any = None,
        assays: Sequence[str] | str | None = None,
        biosamples: Sequence[str] | str | None = None,
        *,
        covariates: Mapping[str, Any] | None = None,
        interval: float | None = 0.9,
        threshold: float | None = None,
        original_scale: bool = False,
        adata: AnnData | None = None,
        batch_size: int = 32,
    ) -> AnnData:
        """Return the expected tracks of assays that were measured, with nothing hidden from the model.

        Parameters
        ----------
        covariates
            Covariates of the result; by default those of the experiment itself. ``{"depth": 5e7}`` asks for another
            depth; coverage, which depends on it, is then unknown unless it is given.
        region, assays, biosamples, interval, threshold, original_scale, adata, batch_size
            As in :meth:`impute`; by default every assay that was measured.

        Returns
        -------
        As :meth:`impute`.

        Raises
        ------
        ConfigError, DataError
            As :meth:`impute`.
        """
        request = self._request(self._opened(adata), region, assays, biosamples, kind="measured")
        return self._predict(request, covariates, interval, threshold, original_scale, batch_size)

    def get_normalized_expression(
        self,
        region: Any = None,
        assays: Sequence[str] | str | None = None,
        biosamples: Sequence[str] | str | None = None,
        *,
        covariates: Mapping[str, Any] | None = None,
        interval: float | None = 0.9,
        original_scale: bool = False,
        adata: AnnData | None = None,
        batch_size: int = 32,
    ) -> AnnData:
        """Return tracks of all assays, measured or not, as if all had been measured alike ("supertracks").

        Parameters
        ----------
        covariates
            Covariates of all results, as in :meth:`impute`. Those left out are the mean of each number, of its
            logarithm for depth, and the commonest level of each category among all training experiments; of a model
            that does not read the depth, the reference depth of each assay.
        region, assays, biosamples, interval, original_scale, adata, batch_size
            As in :meth:`impute`.

        Returns
        -------
        As :meth:`impute`.

        Raises
        ------
        ConfigError, DataError
            As :meth:`impute`.
        """
        request = self._request(self._opened(adata), region, assays, biosamples, kind="all")
        return self._predict(request, self._typical_covariates(covariates), interval, None, original_scale, batch_size)

    def _layers(self) -> list[str]:
        """Names of the layers of the result."""
        return [prefix + name for prefix, _ in self._prefixes() for name in SUMMARIES]

    def _prefixes(self) -> list[tuple[str, str]]:
        """Return the prefix of the layers of counts and signal: none for the first of them."""
        return [("" if at == 0 else f"{kind}_", kind) for at, kind in enumerate(self.module.network.heads)]

    def _predict(
        self,
        request: Request,
        covariates: Mapping[str, Any] | None,
        interval: float | None,
        threshold: float | None,
        original_scale: bool,  # noqa: FBT001
        batch_size: int,
    ) -> AnnData:
        import anndata

        if interval is not None:
            check_interval(interval)
        if threshold is not None:
            _validate.check_number(threshold, "threshold")
        parts = [
            self._summaries(request, stretch, interval, threshold, original_scale)
            for stretch in self._stretches(request, covariates, batch_size)
        ]
        layers = {name: np.concatenate([part[name] for part in parts], axis=1) for name in parts[0]}
        obs = pd.DataFrame(
            {
                "biosample": [str(request.data.obs_names[target.row]) for target in request.targets],
                "assay": [self.assay_names[target.assay] for target in request.targets],
                "available": [target.available for target in request.targets],
            }
        )
        obs.index = obs["biosample"] + "|" + obs["assay"]
        var = bins_table(request.runs)
        transform = str(self.state["signal_transform"])
        uns = {UNS_SIGNAL_TRANSFORM: "none" if original_scale and transform == ARCSINH else transform}
        return anndata.AnnData(layers["mean"], obs=obs, var=var, layers=layers, uns=uns)

    def _stretches(self, request: Request, covariates: Mapping[str, Any] | None, batch_size: int) -> Iterator[Stretch]:
        """Check what was asked for, and return the parameters of the predicted laws, stretch by stretch."""
        self._check_if_trained(warn=True)
        given = self._unseen_covariates() if request.is_left_out else {}
        prompt = self._prompt(given | dict(covariates or {}))
        predictor = Predictor(self.module, request.dataset, batch_size=batch_size, prompt=prompt)
        whole = request.dataset.experiments.runs
        return itertools.chain.from_iterable(
            predictor.stretches(request.jobs, run_of(whole, part.first), part.first, part.stop) for part in request.runs
        )

    def _summaries(
        self,
        request: Request,
        stretch: Stretch,
        interval: float | None,
        threshold: float | None,
        original_scale: bool,  # noqa: FBT001
        only: Sequence[str] | None = None,
    ) -> dict[str, np.ndarray]:
        """Return the layers of a stretch, all or some, each (targets, bins)."""
        found: dict[str, np.ndarray] = {}
        for prefix, kind in self._prefixes():
            wanted = None if only is None else [name for name in SUMMARIES if prefix + name in only]
            if wanted == []:
                continue
            rows: dict[str, list[np.ndarray]] = {}
            for at, target in enumerate(request.targets):
                law = self._law(kind, stretch, at, original_scale=original_scale)
                correction = self._recalibration(kind, target.assay)
                found_l = summarise(law, interval=interval, threshold=threshold, recalibration=correction, only=wanted)
                for name, values_l in found_l.items():
                    rows.setdefault(prefix + name, []).append(values_l)
            found |= {name: np.stack(parts) for name, parts in rows.items()}
        return found

    def _law(self, kind: str, stretch: Stretch, at: int, *, original_scale: bool) -> CountLaw | SignalLaw:
        """Return the predicted laws of one target."""
        if kind == "counts":
            return CountLaw(*(stretch.parameters[name][at] for name in ("log_mean_bla", "log_theta_bla")))
        center_l, spread_l = (stretch.parameters[name][at] for name in ("mean_bla", "variance_bla"))
        return SignalLaw(center_l, spread_l, str(self.state["signal_transform"]), original=original_scale)


def check_interval(interval: Any) -> None:
    """Check the probability of an interval.

    Raises
    ------
    ConfigError
        If it is not between 0 and 1.

    Examples
    --------
    >>> check_interval(0.9)
    """
    _validate.check_number(interval, "interval", low=0.0, high=1.0, low_inclusive=False, high_inclusive=False)
