"""Scores of predicted cell types against known ones, from labels or from probabilities."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from epivi._errors import ConfigError, DataError
from epivi.metrics._inputs import check_finite, package_version

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike, NDArray

_N_BINS = 15


class _Prediction(NamedTuple):
    """Code of the predicted class of each cell, -1 for unassigned; probabilities (n, classes) if there are any."""

    codes: NDArray[np.intp]
    p_nk: NDArray[np.float64] | None


def annotation_scores(
    y_true: ArrayLike,
    predicted: Any,
    classes: Sequence[Any] | None = None,
    *,
    unassigned: str | None = None,
    threshold: float | None = None,
) -> dict[str, Any]:
    """Score predicted cell types: accuracy, F1, ROC-AUC, log loss and calibration.

    Parameters
    ----------
    y_true
        Known label of each cell, length n.
    predicted
        Predicted labels, length n, or probabilities, shape (n, classes): an array, or a DataFrame whose columns are
        the classes. Rows of probabilities sum to 1.
    classes
        The classes that could be predicted, in the order of the columns. Needed for an array of probabilities; for
        labels, by default, those of `y_true` and `predicted`.
    unassigned
        For labels: the name that stands for "no label given". Cells of that true label are not scored either.
    threshold
        For probabilities: cells whose highest probability is below it are unassigned.

    Returns
    -------
    Cells whose true label is none of `classes` are reported and not scored. An unassigned cell is a wrong one: it
    costs recall, and is no class of its own.

    - ``accuracy``; ``balanced_accuracy``, the mean recall of the classes in `y_true`;
    - ``f1_macro``, ``f1_weighted``, ``f1_micro`` over the classes that are true or predicted somewhere;
    - from probabilities, else NaN: ``roc_auc_macro``, the mean over classes of one against the rest, where classes
      without a cell (``absent_classes``) or with all cells are left out; ``log_loss`` in nats; ``ece``, the expected
      calibration error in 15 bins of the highest probability,
      ``sum_b n_b / n |accuracy_b - confidence_b|``. They ignore `threshold`;
    - ``share_unassigned`` of the scored cells; ``share_unassigned_unseen`` of the others, NaN if there are none;
    - ``n`` scored cells, ``n_unseen`` others, ``unseen_labels`` with their numbers of cells, ``n_classes`` scored,
      ``epivi_version``.

    Raises
    ------
    DataError
        If there is no cell, lengths differ, labels are missing, probabilities are not finite, negative or do not sum
        to 1 within 0.001, if a predicted label is none of `classes`, or if no true label is one of `classes`.
    ConfigError
        If `classes` is missing, repeated or of the wrong length, if `threshold` is not in [0, 1], or if `unassigned`
        comes with probabilities or `threshold` with labels.

    References
    ----------
    Guo et al., ICML (2017), eq. 3, for the expected calibration error.

    Examples
    --------
    >>> scores = annotation_scores(["B", "B", "T"], [[0.9, 0.1], [0.4, 0.6], [0.2, 0.8]], ["B", "T"])
    >>> scores["balanced_accuracy"], scores["roc_auc_macro"]
    (0.75, 1.0)
    >>> annotation_scores(["B", "T"], ["B", "unknown"], unassigned="unknown")["share_unassigned"]
    0.5
    """
    truth = _names(y_true, "y_true")
    if len(truth) == 0:
        msg = "y_true has no cell: nothing to score."
        raise DataError(msg)
    names, prediction = _as_prediction(truth, predicted, classes, unassigned, threshold)
    code_of = {name: code for code, name in enumerate(names)}
    true_codes = np.array([code_of.get(name, -1) for name in truth])
    seen = true_codes >= 0
    if not seen.any():
        msg = f"None of the {len(truth)} true labels (the first is '{truth[0]}') is one of the {len(names)} classes."
        raise DataError(msg)
    p_nk = None if prediction.p_nk is None else prediction.p_nk[seen]
    y, y_hat = true_codes[seen], prediction.codes[seen]
    unseen, counts = np.unique(truth[~seen].astype(str), return_counts=True)
    absent = tuple(name for code, name in enumerate(names) if not (y == code).any())
    return {
        **_label_scores(y, y_hat),
        **_probability_scores(y, p_nk),
        "share_unassigned": float((y_hat == -1).mean()),
        "share_unassigned_unseen": float((prediction.codes[~seen] == -1).mean()) if len(unseen) else float("nan"),
        "n": int(seen.sum()),
        "n_unseen": int((~seen).sum()),
        "unseen_labels": dict(zip(unseen.tolist(), counts.tolist(), strict=True)),
        "absent_classes": absent,
        "n_classes": len(names) - len(absent),
        "epivi_version": package_version(),
    }


def _label_scores(y: NDArray[np.intp], y_hat: NDArray[np.intp]) -> dict[str, float]:
    """Return the scores of predicted labels, code -1 being unassigned."""
    from sklearn.metrics import f1_score, recall_score

    scored = np.union1d(y, y_hat[y_hat >= 0])
    f1 = {
        f"f1_{mean}": float(f1_score(y, y_hat, labels=scored, average=mean, zero_division=0))
        for mean in ("macro", "weighted", "micro")
    }
    recall = recall_score(y, y_hat, labels=np.unique(y), average="macro", zero_division=0)
    return {"accuracy": float((y == y_hat).mean()), "balanced_accuracy": float(recall), **f1}


def _probability_scores(y: NDArray[np.intp], p_nk: NDArray[np.float64] | None) -> dict[str, float]:
    """Return the scores of probabilities, NaN without them."""
    if p_nk is None:
        return dict.fromkeys(("roc_auc_macro", "log_loss", "ece"), float("nan"))
    from sklearn.metrics import roc_auc_score

    present = [code for code in np.unique(y) if not (y == code).all()]
    aucs = [roc_auc_score(y == code, p_nk[:, code]) for code in present]
    p_true = p_nk[np.arange(len(y)), y]
    confidence, right = p_nk.max(axis=1), p_nk.argmax(axis=1) == y
    # bins are open on the left, as in the paper; a confidence is never 0
    bins = np.clip(np.ceil(confidence * _N_BINS).astype(int) - 1, 0, _N_BINS - 1)
    gap_b = np.bincount(bins, weights=right - confidence, minlength=_N_BINS)
    return {
        "roc_auc_macro": float(np.mean(aucs)) if aucs else float("nan"),
        "log_loss": float(-np.log(np.maximum(p_true, np.finfo(np.float64).eps)).mean()),
        "ece": float(np.abs(gap_b).sum() / len(y)),
    }


def _as_prediction(
    truth: NDArray[Any],
    predicted: Any,
    classes: Sequence[Any] | None,
    unassigned: str | None,
    threshold: float | None,
) -> tuple[list[str], _Prediction]:
    """Return the names of the classes and what was predicted."""
    n = len(truth)
    if np.ndim(predicted) == 1:
        if threshold is not None:
            msg = "threshold is for probabilities, but predicted holds labels: name the unassigned cells by unassigned."
            raise ConfigError(msg)
        labels = _names(predicted, "predicted")
        _check_length(len(labels), n)
        assigned = labels != (None if unassigned is None else str(unassigned))
        found = sorted({*truth, *labels[assigned]} - ({str(unassigned)} if unassigned is not None else set()))
        names = found if classes is None else _class_names(classes)
        code_of = {name: code for code, name in enumerate(names)}
        known = np.array([name in code_of for name in labels]) | ~assigned
        if not known.all():
            row = int(np.flatnonzero(~known)[0])
            msg = f"The predicted label '{labels[row]}' (row {row}) is none of the {len(names)} classes. "
            msg += "Add it to classes, or name it by unassigned."
            raise DataError(msg)
        codes = [code_of[name] if keep else -1 for name, keep in zip(labels, assigned, strict=True)]
        return names, _Prediction(np.array(codes), None)
    if unassigned is not None:
        msg = "unassigned is for labels, but predicted holds probabilities: give a threshold."
        raise ConfigError(msg)
    if classes is None:
        if not hasattr(predicted, "columns"):
            msg = "An array of probabilities needs classes, the names of its columns in order."
            raise ConfigError(msg)
        classes = list(predicted.columns)
    names = _class_names(classes)
    if hasattr(predicted, "columns") and (given := [str(name) for name in predicted.columns]) != names:
        msg = f"classes is {names[:5]}, but the columns of predicted are {given[:5]}: give the same order, or neither."
        raise ConfigError(msg)
    p_nk = _probabilities(predicted, n, len(names))
    codes_n = p_nk.argmax(axis=1)
    if threshold is not None:
        if isinstance(threshold, bool) or not isinstance(threshold, (int, float, np.number)) or not 0 <= threshold <= 1:
            msg = f"threshold is {threshold!r}, expected a probability from 0 to 1."
            raise ConfigError(msg)
        codes_n = np.where(p_nk.max(axis=1) < threshold, -1, codes_n)
    return names, _Prediction(codes_n, p_nk)


def _probabilities(predicted: Any, n: int, n_classes: int) -> NDArray[np.float64]:
    """Return probabilities of shape (n, classes) whose rows sum to 1."""
    try:
        p_nk = np.asarray(predicted, dtype=np.float64)
    except (TypeError, ValueError) as error:
        msg = f"predicted cannot be read as probabilities: {error}."
        raise DataError(msg) from error
    if p_nk.ndim != 2:
        msg = f"predicted has shape {p_nk.shape}, expected labels (cells,) or probabilities (cells, classes)."
        raise DataError(msg)
    _check_length(len(p_nk), n)
    if p_nk.shape[1] != n_classes:
        msg = f"classes names {n_classes} classes, but predicted has {p_nk.shape[1]} columns."
        raise ConfigError(msg)
    check_finite(p_nk, name="predicted")
    sums = p_nk.sum(axis=1)
    wrong = (p_nk < 0).any(axis=1) | (np.abs(sums - 1) > 1e-3)
    if wrong.any():
        row = int(np.flatnonzero(wrong)[0])
        msg = f"predicted holds {int(wrong.sum())} rows that are no probabilities, the first is row {row} with minimum "
        msg += f"{p_nk[row].min():g} and sum {sums[row]:g}. Give softmax probabilities, not logits."
        raise DataError(msg)
    return p_nk / sums[:, None]  # single precision leaves the sums off by rounding


def _check_length(found: int, n: int) -> None:
    """Refuse predictions that are not one a cell."""
    if found != n:
        msg = f"predicted has {found} cells, y_true has {n}: give one prediction for each cell."
        raise DataError(msg)


def _class_names(classes: Sequence[Any]) -> list[str]:
    """Return the names of the classes, refused if one is repeated."""
    names = _names(np.asarray(classes, dtype=object), "classes").tolist()
    if len(set(names)) < len(names):
        repeated = next(name for name in names if names.count(name) > 1)
        msg = f"classes holds '{repeated}' more than once: every class needs a name of its own."
        raise ConfigError(msg)
    return names


def _names(labels: Any, name: str) -> NDArray[Any]:
    """Return labels as strings, such that the integer 1 and the floating-point 1.0 are the same label."""
    import pandas as pd

    values = np.asarray(labels)
    if values.ndim != 1:
        msg = f"{name} has shape {values.shape}, expected one label for each cell."
        raise DataError(msg)
    if missing := int(pd.isna(values).sum()):
        msg = f"{name} has {missing} missing entries among {len(values)}. Remove these cells or name the group."
        raise DataError(msg)
    whole = (int(v) if isinstance(v, float) and v.is_integer() else v for v in values.tolist())
    return np.array([str(entry) for entry in whole], dtype=object)
