"""Predictions along the genome: overlapping windows, cropped and stitched, one stretch of bins after the other."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import numpy as np
import torch

from epivi import _keys as keys
from epivi import _validate
from epivi.data.windows import tile

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor

    from epivi.data.windows import Run, WindowDataset
    from epivi.models.candi.module import CandiModule

PARAMETERS: Final = {"counts": ("log_mean_bla", "log_theta_bla"), "signal": ("mean_bla", "variance_bla")}


class Job(NamedTuple):
    """One pass over the genome for one biosample.

    Attributes
    ----------
    row
        Row of the biosample.
    shown_a
        1 for the assays that the encoder is shown, shape (a,).
    assays
        Numbers of the assays to predict.
    """

    row: int
    shown_a: np.ndarray
    assays: tuple[int, ...]


class Wanted(NamedTuple):
    """Values asked for of one covariate, and the assays for which they were asked; both of shape (a,)."""

    values_a: np.ndarray
    is_asked_a: np.ndarray


@dataclass(frozen=True)
class Prompt:
    """Covariates asked for in place of those of the data.

    Attributes
    ----------
    continuous
        By number of the covariate: log2 for depth, NaN for unknown.
    categorical
        By number of the covariate: codes, -1 for unknown.
    log_depth_ratio
        ln(depth / reference depth); ``None`` leaves that of the data.
    """

    continuous: Mapping[int, Wanted] = field(default_factory=dict)
    categorical: Mapping[int, Wanted] = field(default_factory=dict)
    log_depth_ratio: Wanted | None = None

    def apply(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the covariates to decode at, of a batch of windows."""
        found = {
            "continuous": batch[keys.BATCH_CONTINUOUS].clone(),
            "categorical": batch[keys.BATCH_CATEGORICAL].clone(),
            "log_depth_ratio": batch[keys.BATCH_LOG_DEPTH_RATIO],
        }
        for name, asked in (("continuous", self.continuous), ("categorical", self.categorical)):
            for number, wanted in asked.items():
                found[name][:, :, number] = _replaced(found[name][:, :, number], wanted)
        if self.log_depth_ratio is not None:
            found["log_depth_ratio"] = _replaced(found["log_depth_ratio"], self.log_depth_ratio)
        return found


def _replaced(own_ba: Tensor, wanted: Wanted) -> Tensor:
    values_a = torch.as_tensor(wanted.values_a).to(own_ba)
    return torch.where(torch.as_tensor(wanted.is_asked_a).to(own_ba.device), values_a, own_ba)


class Stretch(NamedTuple):
    """Predictions for neighbouring bins.

    Attributes
    ----------
    first
        Number of the first bin.
    parameters
        By name, shape (n, l): one row for each assay of each job, in their order.
    """

    first: int
    parameters: dict[str, np.ndarray]


class Predictor:
    """Predicts laws of counts and signal along runs of bins.

    Parameters
    ----------
    module
        The trained module.
    dataset
        Windows of the data.
    batch_size
        Windows of a pass through the network.
    prompt
        Covariates asked for.

    Raises
    ------
    ConfigError
        If ``batch_size`` is not a positive integer.
    """

    def __init__(
        self, module: CandiModule, dataset: WindowDataset, *, batch_size: int = 32, prompt: Prompt | None = None
    ) -> None:
        _validate.check_number(batch_size, "batch_size", low=1, integer=True)
        self.module = module
        self.dataset = dataset
        self.batch_size = batch_size
        self.prompt = Prompt() if prompt is None else prompt
        self.window = module.config.n_bins
        self.device = next(module.parameters()).device

    def windows(self, run: Run, low: int, high: int) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Yield first bins of windows and the bins to keep of each, in minibatches, for bins ``low`` to ``high``.

        The run is tiled whole, so that the prediction of a bin does not depend on the bins that were asked for.
        """
        tiling = tile(run, self.window)
        used = (tiling.crop_to > low) & (tiling.crop_from < high)
        starts = tiling.starts[used]
        crop_from, crop_to = np.maximum(tiling.crop_from[used], low), np.minimum(tiling.crop_to[used], high)
        for at in range(0, starts.size, self.batch_size):
            part = slice(at, at + self.batch_size)
            yield starts[part], crop_from[part], crop_to[part]

    def read(self, row: int, starts_w: np.ndarray) -> dict[str, Tensor]:
        """Return the batch of some windows of a biosample, on the model's device."""
        batch = self.dataset[np.stack([np.full(starts_w.size, row), starts_w], axis=1)]
        return {key: value.to(self.device) for key, value in batch.items()}

    @torch.inference_mode()
    def encode(self, batch: Mapping[str, Tensor], shown_a: np.ndarray) -> dict[str, Any]:
        """Return what the encoder makes of the assays that are shown: the latent ``z``, shape (b, t, d), and more."""
        kind = self.module.input_kind
        mask_ba = batch[f"available_{kind}"] * torch.as_tensor(shown_a, dtype=torch.float32).to(self.device)
        inputs = {"values": batch[kind], "mask": mask_ba}
        inputs |= {name: batch[key] for name, key in _INPUTS.items() if key in batch}
        return self.module.inference(**inputs)

    @torch.inference_mode()
    def decode(self, batch: Mapping[str, Tensor], encoded: Mapping[str, Any]) -> Any:
        """Return the parameters of the laws at the covariates asked for."""
        inputs = self.prompt.apply(batch)
        inputs |= {name: batch[key] for name, key in _PRIORS.items() if key in batch}
        inputs |= {name: encoded[name] for name in ("z", "inputs", "bin_mask")}
        return self.module.generative(**inputs)["outputs"]

    def stretches(self, jobs: Sequence[Job], run: Run, low: int, high: int) -> Iterator[Stretch]:
        """Yield predictions for the bins from ``low`` to ``high`` of a run, from left to right without a gap."""
        names = [name for kind in self.module.network.heads for name in PARAMETERS[kind]]
        for starts, crop_from, crop_to in self.windows(run, low, high):
            keep = (np.arange(self.window) >= (crop_from - starts)[:, None]) & (
                np.arange(self.window) < (crop_to - starts)[:, None]
            )
            found: dict[str, list[np.ndarray]] = {name: [] for name in names}
            row, batch = -1, {}
            for job in jobs:
                if job.row != row:
                    row, batch = job.row, self.read(job.row, starts)
                outputs = self.decode(batch, self.encode(batch, job.shown_a))
                for name in names:
                    values_bla = getattr(outputs, name).float().cpu().numpy()[:, :, list(job.assays)]
                    found[name].append(values_bla[keep].T)
            yield Stretch(int(crop_from[0]), {name: np.concatenate(parts) for name, parts in found.items()})


_PRIORS: Final = {"prior": keys.BATCH_PRIOR, "has_prior": keys.BATCH_HAS_PRIOR}
_INPUTS: Final = {
    "continuous": keys.BATCH_CONTINUOUS,
    "categorical": keys.BATCH_CATEGORICAL,
    "bin_mask": keys.BATCH_BIN_MASK,
    "dna": keys.BATCH_DNA,
    **_PRIORS,
}
