"""Scatter of a two-dimensional embedding."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from epivi._errors import ConfigError, DataError, nearest

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy.typing import ArrayLike, NDArray

_MISSING = "#d3d3d3"
_MAX_LEGEND = 60


def embedding(
    data: Any,
    *,
    basis: str | None = None,
    color: str | ArrayLike | None = None,
    size: float | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Draw the first two dimensions of an embedding, one point a cell, coloured by categories or by a value.

    Points are drawn in a seeded random order, so that no batch hides another because it comes last in the data.

    Parameters
    ----------
    data
        AnnData or MuData with the embedding in `obsm`, or an array of shape (n, 2 or more).
    basis
        Key of `obsm`, with or without ``X_`` in front; needed for AnnData.
    color
        Column of `obs`, or one value a cell: strings, booleans and categories get a legend (colours of
        ``uns["<column>_colors"]`` if there), numbers a colour bar. Missing values are grey.
    size
        Area of a point in points squared; by default 120,000 over the number of cells, between 1 and 60.
    ax
        Axes to draw on; new ones by default.

    Returns
    -------
    The Axes; `ax.collections[0]` holds the points.

    Raises
    ------
    DataError
        If the embedding has fewer than two dimensions or no cell, holds NaN or infinite values, if `color` has the
        wrong length, or if it has more than 60 categories.
    ConfigError
        If `basis` is missing or is no key of `obsm`, or `color` is no column of `obs`.

    Examples
    --------
    >>> import numpy as np
    >>> ax = embedding(np.array([[0.0, 1.0], [2.0, 3.0]]), color=["B", "T"])
    >>> [text.get_text() for text in ax.get_legend().get_texts()]
    ['B', 'T']
    """
    xy_n2, axis_name = _coordinates(data, basis)
    values, title, palette = _colour_values(data, color, len(xy_n2))
    order = np.random.default_rng(0).permutation(len(xy_n2))
    if ax is None:
        from matplotlib import pyplot as plt

        ax = plt.subplots(figsize=(5, 4), layout="constrained")[1]
    area = float(np.clip(120_000 / len(xy_n2), 1, 60)) if size is None else size
    style: dict[str, Any] = {"s": area, "linewidths": 0, "rasterized": len(xy_n2) > 20_000}
    if values is None:
        ax.scatter(xy_n2[order, 0], xy_n2[order, 1], color="#4c72b0", **style)
    elif _is_continuous(values):
        _scatter_continuous(ax, xy_n2, np.asarray(values, dtype=np.float64), order, title, style)
    else:
        _scatter_categories(ax, xy_n2, values, order, palette, style)
    ax.set_xlabel(f"{axis_name}1")
    ax.set_ylabel(f"{axis_name}2")
    ax.set_xticks([])
    ax.set_yticks([])
    if title:
        ax.set_title(title)
    return ax


def _coordinates(data: Any, basis: str | None) -> tuple[NDArray[np.float64], str]:
    """Return the coordinates, shape (n, 2), and the name of their axes."""
    name = "dim. "
    array = data
    if hasattr(data, "obsm"):
        if basis is None:
            msg = f"embedding needs basis=, a key of obsm. {nearest('', data.obsm.keys())}"
            raise ConfigError(msg)
        key = next((key for key in (basis, f"X_{basis}") if key in data.obsm), None)
        if key is None:
            msg = f"obsm has no '{basis}'. {nearest(f'X_{basis}', data.obsm.keys())}"
            raise ConfigError(msg)
        array, name = data.obsm[key], key.removeprefix("X_").upper()
    elif basis is not None:
        name = basis.removeprefix("X_").upper()
    xy_nd = np.asarray(array, dtype=np.float64)
    if xy_nd.ndim != 2 or xy_nd.shape[1] < 2 or xy_nd.shape[0] == 0:
        msg = f"The embedding has shape {xy_nd.shape}, expected (cells, 2 or more)."
        raise DataError(msg)
    xy_n2 = xy_nd[:, :2]
    if bad := int((~np.isfinite(xy_n2)).any(axis=1).sum()):
        msg = f"{bad} of {len(xy_n2)} cells have NaN or infinite coordinates. Remove them first."
        raise DataError(msg)
    return xy_n2, name


def _colour_values(data: Any, color: Any, n: int) -> tuple[Any, str, list[str] | None]:
    """Return the values that colour the cells (a pandas object), a title, and stored colours."""
    import pandas as pd

    if color is None:
        return None, "", None
    title, palette = "", None
    if isinstance(color, str):
        columns = [] if getattr(data, "obs", None) is None else list(data.obs.columns)
        if color not in columns:
            msg = f"obs has no column '{color}'. {nearest(color, columns)}"
            raise ConfigError(msg)
        title = color
        stored = data.uns.get(f"{color}_colors") if hasattr(data, "uns") else None
        palette = None if stored is None else [str(entry) for entry in stored]
        color = data.obs[color]
    values = color if isinstance(color, (pd.Series, pd.Categorical)) else np.asarray(color)
    if values.ndim != 1 or len(values) != n:
        msg = f"color has shape {values.shape}, expected one value for each of the {n} cells."
        raise DataError(msg)
    return pd.Series(values).reset_index(drop=True), title, palette


def _is_continuous(values: Any) -> bool:
    """Tell numbers from categories."""
    import pandas as pd

    return pd.api.types.is_numeric_dtype(values.dtype) and not pd.api.types.is_bool_dtype(values.dtype)


def _scatter_continuous(
    ax: Axes, xy_n2: NDArray[np.float64], value_n: NDArray[np.float64], order: NDArray[np.intp], title: str, style: Any
) -> None:
    """Draw points coloured by a number, with a colour bar; cells without a value are grey."""
    from matplotlib import colormaps

    known_n = np.isfinite(value_n)
    points = ax.scatter(
        xy_n2[order, 0],
        xy_n2[order, 1],
        c=np.ma.masked_where(~known_n, value_n)[order],
        cmap=colormaps["viridis"].with_extremes(bad=_MISSING),
        plotnonfinite=True,
        **style,
    )
    ax.figure.colorbar(points, ax=ax, label=title or None)


def _scatter_categories(
    ax: Axes,
    xy_n2: NDArray[np.float64],
    values: Any,
    order: NDArray[np.intp],
    palette: list[str] | None,
    style: Any,
) -> None:
    """Draw points coloured by category, with a legend; cells without a category are grey."""
    import pandas as pd
    from matplotlib import colormaps
    from matplotlib.colors import to_hex, to_rgba
    from matplotlib.lines import Line2D

    kinds = pd.Categorical(values)
    names = [str(name) for name in kinds.categories]
    if len(names) > _MAX_LEGEND:
        msg = f"color has {len(names)} categories, more than the {_MAX_LEGEND} that colours can tell apart."
        raise DataError(msg)
    if palette is None or len(palette) < len(names):
        if len(names) <= 20:
            palette = [to_hex(colormaps["tab10" if len(names) <= 10 else "tab20"](i)) for i in range(len(names))]
        else:
            palette = [to_hex(shade) for shade in colormaps["turbo"](np.linspace(0, 1, len(names)))]
    rgba_k = np.array([to_rgba(entry) for entry in palette[: len(names)]] + [to_rgba(_MISSING)])
    ax.scatter(
        xy_n2[order, 0], xy_n2[order, 1], c=rgba_k[kinds.codes][order], **style
    )  # code -1 takes the last row, missing
    shown = [*names, "missing"] if (kinds.codes == -1).any() else names
    handles = [
        Line2D([], [], marker="o", linestyle="none", color=rgba_k[i], label=name) for i, name in enumerate(shown)
    ]
    ax.legend(
        handles=handles, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5), ncols=1 + (len(shown) - 1) // 20
    )
