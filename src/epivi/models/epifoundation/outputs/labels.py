"""Labels of cells with calibrated probabilities."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp
from scvi import REGISTRY_KEYS

from epivi import _validate
from epivi._errors import ConfigError
from epivi.models.epifoundation.config import LABEL_TASKS
from epivi.models.epifoundation.outputs.latent import LatentMixin
from epivi.train.config import TrainingConfig

if TYPE_CHECKING:
    from collections.abc import Sequence

    from anndata import AnnData
    from mudata import MuData

logger = logging.getLogger(__name__)

UNASSIGNED = "unassigned"
ENTROPY = "entropy"
MIN_CELLS = 20
LOG_TEMPERATURES = (-3.0, 3.0)
SPLIT_ARGUMENTS = ("train_size", "validation_size", "early_stopping")


class LabelsMixin(LatentMixin):
    """Predicted labels."""

    classes: list[str]
    validation_indices: Any
    _splits: Any

    def predict_labels(
        self,
        adata: AnnData | MuData | None = None,
        indices: Sequence[int] | None = None,
        batch_size: int | None = None,
        *,
        soft: bool = False,
        threshold: float | None = None,
    ) -> pd.Series | pd.DataFrame:
        """Return the cell type of each cell, or the probabilities of all types.

        Probabilities are a softmax of the logits over a temperature that was fitted on the validation cells after
        training (Guo et al., 2017), as :func:`fit_temperature` has it; with fewer than 20 of them it is 1.

        Parameters
        ----------
        adata, indices, batch_size
            As in :meth:`get_latent_representation`.
        soft
            Return probabilities, and their entropy in nats in the column ``"entropy"``.
        threshold
            Cells whose highest probability is below it are ``"unassigned"``.

        Returns
        -------
        A series of labels, or a table (cells × types and entropy), indexed by cell.

        Raises
        ------
        ConfigError
            If the model was not fine-tuned on labels, or the threshold is no probability.
        """
        if self.config.task not in LABEL_TASKS:
            message = (
                f"A model for {self.config.task} predicts no labels: tuned = model.finetune('annotation', "
                "labels_key=...), then tuned.predict_labels(adata)."
            )
            raise ConfigError(message)
        if threshold is not None:
            _validate.check_number(threshold, "threshold", low=0.0, high=1.0)
        data, rows = self._opened(adata, indices)
        logits_nk = self._logits(data, rows, batch_size) / float(self.module.temperature)
        log_nk = logits_nk - logsumexp(logits_nk, axis=1, keepdims=True)
        index = pd.Index(np.asarray(data.obs_names)[rows])
        probability_nk = np.exp(log_nk)
        if soft:
            table = pd.DataFrame(probability_nk, index=index, columns=self.classes)
            table[ENTROPY] = -(probability_nk * log_nk).sum(1)
            return table
        labels = pd.Series(np.asarray(self.classes, dtype=object)[logits_nk.argmax(1)], index=index, name="label")
        if threshold is not None:
            labels[probability_nk.max(1) < threshold] = UNASSIGNED
        return labels.astype("category")

    @torch.inference_mode()
    def _logits(self, adata: AnnData | MuData, rows: np.ndarray, batch_size: int | None) -> np.ndarray:
        """Return the logits of the classes, shape (n, k), float64."""
        logits_nk = np.zeros((rows.size, len(self.classes)))
        for at, batch in self._read(adata, rows, batch_size):
            logits_nk[at] = self.module.generative(self._cells(batch))["classes"].double().cpu().numpy()
        return logits_nk

    def _calibrate(self) -> None:
        """Fit the temperature on the labelled validation cells; with fewer than 20 of them it stays 1."""
        rows = np.asarray(self.validation_indices, dtype=np.int64)
        class_n = self._classes(rows)
        labelled = class_n >= 0
        if labelled.sum() < MIN_CELLS:
            logger.warning(
                "%d labelled validation cells are too few to calibrate probabilities (%d are needed).",
                int(labelled.sum()),
                MIN_CELLS,
            )
            return
        logits_nk = self._logits(self.adata, rows[labelled], None)
        self.module.temperature.fill_(fit_temperature(logits_nk, class_n[labelled]))

    def _classes(self, rows: np.ndarray) -> np.ndarray:
        """Return the classes of cells of the training data, -1 without label."""
        named = [str(c) for c in self._field_state(REGISTRY_KEYS.LABELS_KEY)["categorical_mapping"]]
        class_of_code = np.array([self.classes.index(name) if name in self.classes else -1 for name in named])
        return class_of_code[self._registered(REGISTRY_KEYS.LABELS_KEY)[rows].astype(int)]

    def _without_few_labels(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Return arguments of a training without validation, where it would look at few labelled cells."""
        plan = arguments.get("plan_kwargs")
        plan = plan if isinstance(plan, Mapping) else {}
        if any(source.get(name) is not None for source in (arguments, plan) for name in SPLIT_ARGUMENTS):
            return arguments
        seed = arguments.get("seed", plan.get("seed"))
        defaults = self.config.training_defaults(self.adata.n_obs)
        config = TrainingConfig.merged({"seed": self.seed}, defaults, {"seed": seed})
        n_labelled = int((self._classes(self._splits(config)["validation"]) >= 0).sum())
        if n_labelled >= MIN_CELLS:
            return arguments
        logger.info(
            "%d labelled validation cells are too few to stop early by (%d are needed): all cells train, to the end.",
            n_labelled,
            MIN_CELLS,
        )
        return arguments | {"train_size": 1.0, "validation_size": 0.0, "early_stopping": False}


def fit_temperature(logits_nk: np.ndarray, class_n: np.ndarray) -> float:
    r"""Return the temperature T that maximises the likelihood of classes under softmax(logits / T), and of one error.

    Of n cells that are all right no temperature is low enough. As in Platt (1999), the probability of the true class
    is therefore taken to be (n + 1) / (n + 2), the rest in equal parts that of the other classes, so that n cells
    never speak for more certainty than n cells can.

    Parameters
    ----------
    logits_nk
        Shape (n, k), k at least 2.
    class_n
        True classes, shape (n,).

    Examples
    --------
    >>> round(fit_temperature(np.array([[4.0, 0.0]] * 8), np.zeros(8, dtype=int)), 2)  # 4 / T = log 9
    1.82
    """
    n_cells, n_classes = logits_nk.shape
    target_nk = np.full(logits_nk.shape, 1.0 / ((n_cells + 2) * (n_classes - 1)))
    np.put_along_axis(target_nk, class_n[:, None], (n_cells + 1) / (n_cells + 2), axis=1)

    def loss(log_t: float) -> float:
        scaled_nk = logits_nk / np.exp(log_t)
        return float((logsumexp(scaled_nk, axis=1) - (target_nk * scaled_nk).sum(1)).mean())

    return float(np.exp(minimize_scalar(loss, bounds=LOG_TEMPERATURES, method="bounded").x))
