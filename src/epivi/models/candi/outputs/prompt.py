"""From covariates as users write them to what the decoder is given, and corrections of predicted probabilities."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from epivi import _validate
from epivi._errors import ConfigError, nearest
from epivi.metrics.calibration import Recalibration
from epivi.models.candi.outputs.prediction import Prompt, Wanted
from epivi.models.candi.outputs.request import RequestMixin

DEPTH, COVERAGE = "depth", "coverage"


class PromptMixin(RequestMixin):
    """Covariates asked for."""

    def _prompt(self, covariates: Mapping[str, Any] | None) -> Prompt:
        """Return the prompt of covariates given by name.

        Raises
        ------
        ConfigError
            If a name, assay or level is unknown, or a value is not valid.
        """
        covariates = dict(covariates or {})
        numbers, levels = [str(name) for name in self.state["continuous"]], dict(self.state["categories"])
        known = [*numbers, *levels]
        if self._has_offset and DEPTH not in known:
            known.append(DEPTH)
        for name in covariates:
            if name not in known:
                message = f"The model has no covariate '{name}'. {nearest(name, known) if known else 'It has none.'}"
                raise ConfigError(message)
        self._forget_coverage(covariates)
        continuous, categorical, ratio = {}, {}, None
        for name, value in covariates.items():
            if name in levels:
                categorical[list(levels).index(name)] = self._codes(name, value, [str(one) for one in levels[name]])
                continue
            wanted = self._numbers(name, value)
            if name == DEPTH:
                ratio = self._ratio(wanted)
                wanted = Wanted(np.log2(wanted.values_a), wanted.is_asked_a)
            if name in numbers:
                continuous[numbers.index(name)] = wanted
        return Prompt(continuous, categorical, ratio)

    @property
    def _has_offset(self) -> bool:
        """Whether counts are predicted with the depth as a factor, be it a covariate or not."""
        return self.config.has_depth_offset and "counts" in self.module.network.heads

    def _forget_coverage(self, asked: dict[str, Any]) -> None:
        """Make coverage unknown where another depth is asked for, unless it is given: it depends on depth."""
        if DEPTH in asked and COVERAGE in self.state["continuous"] and COVERAGE not in asked:
            depth = asked[DEPTH]
            asked[COVERAGE] = dict.fromkeys(depth) if isinstance(depth, Mapping) else None

    def _unseen_covariates(self) -> dict[str, Any]:
        """Return the covariates with which tracks that were measured are predicted without them.

        Coverage tells how wide a track is, so that it would give away a part of what is to be predicted.
        """
        return {COVERAGE: None} if COVERAGE in self.state["continuous"] else {}

    def _by_assay(self, name: str, value: Any) -> list[tuple[int, Any]]:
        """Return number of the assay and value, for one value for all or a mapping from assays."""
        if not isinstance(value, Mapping):
            return [(at, value) for at in range(len(self.assay_names))]
        for assay in value:
            if assay not in self.assay_names:
                message = f"covariates['{name}'] names the assay '{assay}'. {nearest(assay, self.assay_names)}"
                raise ConfigError(message)
        return [(self.assay_names.index(assay), one) for assay, one in value.items()]

    def _numbers(self, name: str, value: Any) -> Wanted:
        values_a = np.full(len(self.assay_names), np.nan)
        is_asked_a = np.zeros(len(self.assay_names), dtype=bool)
        for at, one in self._by_assay(name, value):
            is_asked_a[at] = True
            if one is not None:
                low = 0.0 if name == DEPTH else None
                _validate.check_number(one, f"covariates['{name}']", low=low, low_inclusive=name != DEPTH)
                values_a[at] = float(one)
        return Wanted(values_a, is_asked_a)

    def _codes(self, name: str, value: Any, levels: list[str]) -> Wanted:
        codes_a = np.full(len(self.assay_names), -1, dtype=np.int64)
        is_asked_a = np.zeros(len(self.assay_names), dtype=bool)
        for at, one in self._by_assay(name, value):
            is_asked_a[at] = True
            if one is not None:
                if str(one) not in levels:
                    message = f"covariates['{name}']: there is no level '{one}'. {nearest(str(one), levels)}"
                    raise ConfigError(message)
                codes_a[at] = levels.index(str(one))
        return Wanted(codes_a, is_asked_a)

    def _ratio(self, depth: Wanted) -> Wanted:
        """Return ln(depth / reference depth), 0 where either is unknown."""
        with np.errstate(invalid="ignore"):
            ratio_a = np.log(depth.values_a / np.asarray(self.state["depth_ref"], dtype=np.float64))
        return Wanted(np.nan_to_num(ratio_a, nan=0.0), depth.is_asked_a)

    def _typical_covariates(self, asked: Mapping[str, Any] | None) -> dict[str, Any]:
        """Return covariates that are the same for all: those asked for, else what is typical of the training."""
        asked, found = dict(asked or {}), {}
        for name in map(str, self.state["continuous"]):
            mean = float(self.state["moments"][name]["mean"])
            found[name] = 2.0**mean if name == DEPTH else mean
        for name, level in self.state["commonest"].items():
            # a level that no training experiment has is only the first of the list
            found[str(name)] = str(level) if len(self.state["seen"][name]) else None
        if DEPTH not in found and self._has_offset:
            reference = zip(self.assay_names, self.state["depth_ref"], strict=True)
            found[DEPTH] = {assay: None if np.isnan(depth) else float(depth) for assay, depth in reference}
        self._forget_coverage(asked)
        for name, value in asked.items():
            typical = found.get(name)
            if isinstance(value, Mapping) and name in found:
                # assays that a mapping leaves out keep what is typical
                whole = typical if isinstance(typical, Mapping) else dict.fromkeys(self.assay_names, typical)
                found[name] = dict(whole) | dict(value)
            else:
                found[name] = value
        return found

    def _recalibration(self, kind: str, assay: int) -> Recalibration | None:
        """Return the correction of an assay's probabilities, ``None`` before :meth:`calibrate`."""
        if not bool(self.module.is_recalibrated):
            return None
        at = list(self.module.network.heads).index(kind)
        knots = self.module.recalibration_knots.double().cpu().numpy()
        return Recalibration(self.module.recalibration[at, assay].double().cpu().numpy(), knots)
