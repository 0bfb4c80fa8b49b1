"""Curves of a training history."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from epivi._errors import ConfigError, DataError, nearest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes

# the first pair of which something was recorded is drawn by default
_DEFAULT_KEYS = (
    ("train_loss_epoch", "validation_loss"),
    ("elbo_train", "elbo_validation"),
    ("reconstruction_loss_train", "reconstruction_loss_validation"),
)


def history(model: Any, *, keys: Sequence[str] | str | None = None, ax: Axes | None = None) -> Axes:
    """Draw what was recorded while a model trained, one line a quantity over its epochs.

    Parameters
    ----------
    model
        A trained model with a `history`, or such a history: a mapping from the name of a quantity to a table of one
        column, indexed by epoch.
    keys
        Quantities to draw; by default the training and validation loss, or all if neither was recorded.
    ax
        Axes to draw on; new ones by default.

    Returns
    -------
    The Axes, with a line for each key in the order given.

    Raises
    ------
    DataError
        If the model has no history (it is not trained), or a table cannot be drawn as one line.
    ConfigError
        If a key was not recorded.

    Examples
    --------
    >>> import pandas as pd
    >>> ax = history({"elbo_train": pd.DataFrame({"elbo_train": [3.0, 2.0, 1.5]})})
    >>> ax.lines[0].get_ydata().tolist()
    [3.0, 2.0, 1.5]
    """
    recorded = model if isinstance(model, Mapping) else getattr(model, "history", None)
    if not isinstance(recorded, Mapping) or not recorded:
        msg = f"{type(model).__name__} has no training history: train the model first, or give its history."
        raise DataError(msg)
    chosen = _choose(recorded, keys)
    lines = {key: _as_line(recorded[key], key) for key in chosen}
    if ax is None:
        from matplotlib import pyplot as plt

        ax = plt.subplots(figsize=(5, 3.2), layout="constrained")[1]
    for key, (steps, values) in lines.items():
        ax.plot(steps, values, label=key, marker="." if len(values) == 1 else "")
    ax.set_xlabel("step" if all(key.endswith("_step") for key in chosen) else "epoch")
    if len(lines) == 1:
        ax.set_ylabel(chosen[0])
    else:
        ax.legend(frameon=False)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def _choose(recorded: Mapping[str, Any], keys: Sequence[str] | str | None) -> list[str]:
    """Return the keys to draw."""
    if keys is None:
        for pair in _DEFAULT_KEYS:
            if found := [key for key in pair if key in recorded]:
                return found
        # steps and epochs do not share an axis
        return [key for key in recorded if not key.endswith("_step")] or list(recorded)
    chosen = [keys] if isinstance(keys, str) else list(keys)
    if not chosen:
        msg = "keys is empty: name a recorded quantity, or leave it out."
        raise ConfigError(msg)
    for key in chosen:
        if key not in recorded:
            msg = f"'{key}' was not recorded. {nearest(key, recorded)}"
            raise ConfigError(msg)
    return chosen


def _as_line(table: Any, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Return steps and values of one recorded quantity."""
    try:
        values = np.asarray(table, dtype=np.float64).squeeze()
        values = np.atleast_1d(values)
    except (TypeError, ValueError) as error:
        msg = f"The history of '{key}' cannot be read as numbers: {error}."
        raise DataError(msg) from error
    if values.ndim != 1 or len(values) == 0:
        msg = f"The history of '{key}' has shape {np.shape(table)}, expected one column with a row for each epoch."
        raise DataError(msg)
    index = getattr(table, "index", None)
    steps = np.arange(len(values)) if index is None or callable(index) else np.asarray(index)
    return steps, values
