"""Bars of the information that embeddings hold on a confounder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np

from epivi._errors import ConfigError, DataError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from matplotlib.axes import Axes
    from numpy.typing import NDArray


class ConfounderResult(Protocol):
    """What a bar needs of a `epivi.metrics.ConfounderInformation`."""

    mean: float
    max: float
    per_dimension: NDArray[np.float64]
    discrete: bool


def confounders(results: Mapping[str, ConfounderResult], *, ax: Axes | None = None) -> Axes:
    """Draw I(z,c) of several embeddings as bars: the mean over dimensions, with a mark at the maximum.

    Parameters
    ----------
    results
        Result of `epivi.metrics.confounder_information` by name of the method, all for the same confounder. The
        number of latent dimensions is written under each name: values at different numbers are not comparable.
    ax
        Axes to draw on; new ones by default.

    Returns
    -------
    The Axes: one bar a method in nats, in the order given.

    Raises
    ------
    DataError
        If there is no result, or an entry is not a result.
    ConfigError
        If continuous and discrete confounders are mixed: their values are not comparable.

    Examples
    --------
    >>> import numpy as np
    >>> from types import SimpleNamespace
    >>> result = SimpleNamespace(mean=0.1, max=0.3, per_dimension=np.array([0.3, 0.0, 0.0]), discrete=False)
    >>> float(confounders({"LSI": result}).patches[0].get_height())
    0.1
    """
    if not results:
        msg = "confounders got no result: give a mapping from method to the result of confounder_information."
        raise DataError(msg)
    for name, result in results.items():
        if not all(hasattr(result, field) for field in ("mean", "max", "per_dimension", "discrete")):
            msg = f"The entry '{name}' is a {type(result).__name__}, expected a result of confounder_information."
            raise DataError(msg)
    discrete = [name for name, result in results.items() if result.discrete]
    if 0 < len(discrete) < len(results):
        msg = f"{len(discrete)} of {len(results)} results are for a discrete confounder (the first is '{discrete[0]}')"
        msg += " and the others for a continuous one: they are not comparable. Draw two pictures."
        raise ConfigError(msg)
    if ax is None:
        from matplotlib import pyplot as plt

        ax = plt.subplots(figsize=(1.2 + 0.9 * len(results), 3.2), layout="constrained")[1]
    positions = np.arange(len(results))
    ax.bar(positions, [result.mean for result in results.values()], color="#4c72b0", label="mean over dimensions")
    ax.plot(
        positions, [result.max for result in results.values()], "v", color="#c44e52", linestyle="none", label="maximum"
    )
    names = [f"{name}\n{len(result.per_dimension)} dim." for name, result in results.items()]
    ax.set_xticks(positions, names)
    ax.set_ylabel("I(z, c) [nats]")
    ax.legend(frameon=False)
    ax.spines[["top", "right"]].set_visible(False)
    return ax
