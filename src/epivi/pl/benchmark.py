"""The table of a benchmark as a picture: dots for metrics, bars for the totals."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from epivi._errors import DataError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

GROUPS = {"bio": "Bio conservation", "batch": "Batch correction", "confounder": "Confounders", "aggregate": "Aggregate"}
_BAR = 0.86


def benchmark(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Draw the table of `epivi.metrics.benchmark`: embeddings as rows, best total first.

    A metric is a dot whose colour is its score, from 0 (dark) to 1 (bright), an aggregate a bar as long as its score;
    the values are written in. Information on confounders has no scale in common with the scores and is written
    without a dot. Columns without any value are left out, and a missing value is a dash.

    Parameters
    ----------
    table
        Result of `epivi.metrics.benchmark`, or a part of its rows or columns.
    ax
        Axes to draw on; new ones by default.

    Returns
    -------
    The Axes. Rows lie at y = 0, 1, ... from the top, columns at x = 0, 1, ..., with a gap between groups.

    Raises
    ------
    DataError
        If `table` has no row, no value, or columns other than pairs of a group and a metric.

    Examples
    --------
    >>> import pandas as pd
    >>> columns = pd.MultiIndex.from_tuples([("bio", "clisi"), ("aggregate", "bio")])
    >>> ax = benchmark(pd.DataFrame([[0.9, 0.9], [0.95, 0.95]], index=["X_pca", "X_sailer"], columns=columns))
    >>> [text.get_text() for text in ax.get_yticklabels()]
    ['X_sailer', 'X_pca']
    """
    shown, x_of = _columns(table)
    n_rows, width = len(shown), max(x_of) + 1
    if ax is None:
        from matplotlib import pyplot as plt

        ax = plt.subplots(figsize=(2.0 + 0.72 * width, 1.9 + 0.5 * n_rows), layout="constrained")[1]
    from matplotlib import colormaps

    colours = colormaps["viridis"]
    for i, (x, group) in enumerate(zip(x_of, shown.columns.get_level_values(0), strict=True)):
        for y, value in enumerate(shown.iloc[:, i].to_numpy()):
            if np.isnan(value):
                ax.text(x, y, "-", ha="center", va="center", color="#888888")
                continue
            score = float(np.clip(value, 0, 1))
            ink = "black"
            if group == "aggregate":
                ax.barh(y, _BAR * score, left=x - _BAR / 2, height=0.62, color="#9ecae1")
            elif group != "confounder":
                ax.scatter(x, y, s=560, color=colours(score), linewidths=0)
                ink = "white" if score < 0.6 else "black"
            ax.text(x, y, f"{value:.2f}", ha="center", va="center", color=ink, fontsize=8)
    _label(ax, shown, x_of)
    ax.set_xlim(-0.6, width - 0.4)
    ax.set_ylim(n_rows - 0.5, -0.5)
    return ax


def _columns(table: pd.DataFrame) -> tuple[pd.DataFrame, list[float]]:
    """Return what is drawn, best total first, and where each column lies."""
    import pandas as pd

    if not isinstance(table, pd.DataFrame) or table.columns.nlevels != 2 or len(table) == 0:
        found = f"of shape {table.shape}" if isinstance(table, pd.DataFrame) else f"a {type(table).__name__}"
        msg = f"The table is {found}, expected the result of epivi.metrics.benchmark: rows of embeddings, columns of "
        msg += "pairs of a group and a metric."
        raise DataError(msg)
    groups = table.columns.get_level_values(0)
    if unknown := [str(name) for name in dict.fromkeys(groups) if name not in GROUPS]:
        msg = f"The table has columns of the group '{unknown[0]}', expected {', '.join(GROUPS)}."
        raise DataError(msg)
    shown = table.loc[:, table.notna().any()].astype(np.float64)
    if shown.shape[1] == 0:
        msg = f"The table has no value in any of its {table.shape[1]} columns; its attrs['absent'] may say why."
        raise DataError(msg)
    order = [name for name in ("total_scib", "bio", "batch") if ("aggregate", name) in shown.columns]
    if order:
        shown = shown.sort_values(("aggregate", order[0]), ascending=False, kind="stable")
    groups = shown.columns.get_level_values(0)
    gaps = np.cumsum([0, *(0.4 * (groups[1:] != groups[:-1]))])
    return shown, (np.arange(len(groups)) + gaps).tolist()


def _label(ax: Axes, shown: pd.DataFrame, x_of: list[float]) -> None:
    """Write the names of embeddings, metrics and groups."""
    groups, metrics = (shown.columns.get_level_values(level) for level in (0, 1))
    ax.set_xticks(
        x_of, [str(name).replace("_", " ") for name in metrics], rotation=45, ha="left", rotation_mode="anchor"
    )
    ax.set_yticks(range(len(shown)), [str(name) for name in shown.index])
    ax.xaxis.tick_top()
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    for group in dict.fromkeys(groups):
        inside = [x for x, name in zip(x_of, groups, strict=True) if name == group]
        ax.annotate(
            GROUPS[group],
            (float(np.mean(inside)), 0),
            xytext=(0, -6),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="center",
            va="top",
            fontweight="bold",
        )
