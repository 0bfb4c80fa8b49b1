"""Which assay tells most about which: gains in likelihood where both were measured, expected gains where not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from epivi import _validate
from epivi._errors import ConfigError
from epivi.data.windows import validation_windows
from epivi.models.candi.outputs.prediction import Predictor
from epivi.models.candi.outputs.prompt import PromptMixin

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from anndata import AnnData
    from torch import Tensor

HOW = ("retrospective", "prospective")


class RankingMixin(PromptMixin):
    """Ranking of experiments."""

    def rank_assays(  # noqa: PLR0913
        self,
        target: str,
        available: Sequence[str] = (),
        candidates: Sequence[str] | None = None,
        *,
        how: str = "retrospective",
        kind: str | None = None,
        n_windows: int = 256,
        n_draws: int = 8,
        adata: AnnData | None = None,
        batch_size: int = 32,
        seed: int = 0,
    ) -> pd.DataFrame:
        r"""Rank candidate experiments by how much they would help to predict an assay.

        ``"retrospective"``: where a candidate b and the target a were measured, the gain is
        :math:`\mathrm{NLL}_a(S) - \mathrm{NLL}_a(S \cup b)` in nats a bin. ``"prospective"``: where the assays S were
        measured, whether b was or not, b is drawn from its predicted law, and the gain is the variance that knowing it
        would explain, :math:`\mathrm{Var}_b\, E_a(S \cup b)`: by the law of total variance the fall of the variance of
        a that is to be expected. Gains are means over training biosamples and windows of the validation chromosomes.

        Parameters
        ----------
        target
            Assay to predict.
        available
            Assays that exist (S).
        candidates
            Assays that could be done; all others by default.
        how
            ``"retrospective"`` or ``"prospective"``.
        kind
            ``"counts"`` or ``"signal"``; by default what the encoder reads.
        n_windows
            Most windows (biosample, window) to look at, evenly spaced.
        n_draws
            Draws of the candidate, of ``"prospective"``; at least two.
        adata, batch_size
            As in :meth:`impute`.
        seed
            Seed of the draws.

        Returns
        -------
        Index candidate, best first; columns ``gain``, ``sem`` (standard error over windows), ``n_biosamples``. A
        candidate without a biosample to look at has NaN.

        Raises
        ------
        ConfigError
            If a name is unknown or repeated, the target is among the others, or a choice or number is not valid.
        """
        self._check_if_trained(warn=True)
        _validate.check_choice(how, "how", HOW)
        _validate.check_number(n_windows, "n_windows", low=1, integer=True)
        _validate.check_number(n_draws, "n_draws", low=2, integer=True)
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
        prompt = self._prompt(self._unseen_covariates())
        predictor = Predictor(self.module, dataset, batch_size=batch_size, prompt=prompt)
        held = self.genome_split.validation
        bins = held if len(held) and self._has_trained_bins(dataset) else dataset.experiments.runs
        found = dataset.experiments.available
        counted = data.obs_names.isin(self._learned_from(data, adata))
        base, at = [names.index(name) for name in available], names.index(target)
        rows = {}
        for name in candidates:
            number = names.index(name)
            shown = [*base, number] if how == "retrospective" else base
            needed = counted & found[self.config.input][:, shown].all(axis=1)
            if how == "retrospective":
                needed &= found[kind][:, at]
            gains: list[np.ndarray] = []
            if needed.any():
                items = validation_windows(bins, np.flatnonzero(needed), self.config.n_bins, max_windows=n_windows)
                question = (base, number, at, kind)
                if how == "retrospective":
                    gains = list(self._measured_gains(predictor, items, question))
                else:
                    gains = list(self._expected_gains(predictor, items, question, n_draws, seed))
            gain_w = np.concatenate(gains) if gains else np.full(1, np.nan)
            sem = float(gain_w.std(ddof=1) / np.sqrt(gain_w.size)) if gain_w.size > 1 else np.nan
            rows[name] = {"gain": float(gain_w.mean()), "sem": sem, "n_biosamples": int(needed.sum())}
        table = pd.DataFrame.from_dict(rows, orient="index").rename_axis("candidate")
        return table.sort_values("gain", ascending=False, na_position="last")

    def get_assay_importance(
        self, *, kind: str | None = None, n_windows: int = 256, adata: AnnData | None = None, batch_size: int = 32
    ) -> pd.DataFrame:
        """Return how much each assay alone tells about each other one (Figure 4 of the paper).

        Parameters
        ----------
        kind, n_windows, adata, batch_size
            As in :meth:`rank_assays`.

        Returns
        -------
        Assays shown × assays predicted: gain in nats a bin over showing nothing, NaN on the diagonal and where two
        assays were never measured together; for :func:`epivi.pl.importance`.

        Raises
        ------
        ConfigError
            As :meth:`rank_assays`.
        """
        names = self.assay_names
        columns = {
            name: self.rank_assays(name, kind=kind, n_windows=n_windows, adata=adata, batch_size=batch_size)["gain"]
            for name in names
        }
        return pd.DataFrame(columns).reindex(index=names, columns=names)

    def _windows_of(self, predictor: Predictor, items: np.ndarray) -> Iterator[dict[str, Tensor]]:
        """Yield batches of windows on the model's device."""
        for start in range(0, len(items), predictor.batch_size):
            batch = predictor.dataset[items[start : start + predictor.batch_size]]
            yield {key: value.to(predictor.device) for key, value in batch.items()}

    def _shown(self, assays: Sequence[int]) -> np.ndarray:
        """Return 1 for the assays that are shown, shape (a,)."""
        shown_a = np.zeros(len(self.assay_names), dtype=np.float32)
        shown_a[list(assays)] = 1.0
        return shown_a

    def _measured_gains(
        self, predictor: Predictor, items: np.ndarray, question: tuple[list[int], int, int, str]
    ) -> Iterator[np.ndarray]:
        """Yield the gain in likelihood of each window by showing one more assay."""
        base, number, at, kind = question
        for batch in self._windows_of(predictor, items):
            nll = []
            for shown in (base, [*base, number]):
                outputs = predictor.decode(batch, predictor.encode(batch, self._shown(shown)))
                nll.append(_window_mean(self.module.nll(batch, outputs, kind)[:, :, at], batch))
            yield (nll[0] - nll[1]).cpu().numpy()

    def _expected_gains(
        self,
        predictor: Predictor,
        items: np.ndarray,
        question: tuple[list[int], int, int, str],
        n_draws: int,
        seed: int,
    ) -> Iterator[np.ndarray]:
        """Yield the variance of the mean of each window over draws of one more assay, shown, from its law."""
        base, number, at, kind = question
        source = self.config.input
        rng = np.random.default_rng(seed)
        for batch in self._windows_of(predictor, items):
            outputs = predictor.decode(batch, predictor.encode(batch, self._shown(base)))
            means = []
            for _ in range(n_draws):
                drawn = dict(batch)
                drawn[source] = batch[source].clone()
                drawn[source][:, :, number] = _draw(outputs, source, number, rng).to(batch[source])
                drawn[f"available_{source}"] = batch[f"available_{source}"].clone()
                drawn[f"available_{source}"][:, number] = 1.0
                shown = predictor.decode(drawn, predictor.encode(drawn, self._shown([*base, number])))
                means.append(_mean(shown, kind)[:, :, at].double())
            yield _window_mean(torch.stack(means).var(dim=0), batch).cpu().numpy()


def _window_mean(values_bl: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the mean over the real bins of each window."""
    mask_bl = batch["bin_mask"].double()
    return (values_bl.double() * mask_bl).sum(1) / mask_bl.sum(1)


def _mean(outputs: Any, kind: str) -> Tensor:
    """Return the mean of the predicted laws, shape (b, l, a)."""
    return outputs.log_mean_bla.double().exp() if kind == "counts" else outputs.mean_bla


def _draw(outputs: Any, kind: str, assay: int, rng: np.random.Generator) -> Tensor:
    """Return a draw from the predicted laws of one assay, shape (b, l)."""
    if kind == "counts":
        theta = outputs.log_theta_bla[:, :, assay].double().exp().cpu().numpy()
        mean = outputs.log_mean_bla[:, :, assay].double().exp().cpu().numpy()
        return torch.from_numpy(rng.poisson(rng.gamma(theta, mean / theta)).astype(np.float32))
    center, spread = (getattr(outputs, name)[:, :, assay].cpu().numpy() for name in ("mean_bla", "variance_bla"))
    return torch.from_numpy(rng.normal(center, np.sqrt(spread)).astype(np.float32))
