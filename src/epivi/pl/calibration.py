"""Pictures of calibration: coverage curve and PIT histogram; and which inputs matter for which imputed assay."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from epivi._errors import ConfigError, DataError, nearest
from epivi._validate import check_choice, check_number

if TYPE_CHECKING:
    from collections.abc import Sequence

    import pandas as pd
    from matplotlib.axes import Axes
    from numpy.typing import ArrayLike

_COVERAGE, _HISTOGRAM = "coverage", "histogram"
_GREY, _MISSING = "#808080", "#f0e6d2"
_N_LEVELS = 99


def calibration(
    pit: ArrayLike | Mapping[str, ArrayLike], *, kind: str = _COVERAGE, n_bins: int = 20, ax: Axes | None = None
) -> Axes:
    """Draw how well predicted distributions are calibrated: observed against nominal coverage, or the PIT histogram.

    Parameters
    ----------
    pit
        PIT values in [0, 1], any shape, or several by name; for counts the randomised ones, as
        :func:`epivi.metrics.nb_pit` returns them.
    kind
        ``"coverage"``: share of the values in the central interval of each nominal level, with the diagonal; above it
        intervals are too wide. ``"histogram"``: density of the values, 1 everywhere if calibrated; a valley in the
        middle says that intervals are too narrow, a hill that they are too wide, a slope that predictions are biased.
    n_bins
        Bars of the histogram.
    ax
        Axes to draw on; new ones by default.

    Returns
    -------
    The Axes: a line for each name, after that of perfect calibration.

    Raises
    ------
    DataError
        If there is no value, or one is not a number in [0, 1].
    ConfigError
        If `kind` is unknown or `n_bins` not a positive integer.

    Examples
    --------
    >>> import numpy as np
    >>> ax = calibration({"model": np.linspace(0, 1, 101)})
    >>> [line.get_label() for line in ax.lines]
    ['calibrated', 'model']
    """
    check_choice(kind, "kind", (_COVERAGE, _HISTOGRAM))
    check_number(n_bins, "n_bins", low=1, integer=True)
    named = pit if isinstance(pit, Mapping) else {"observed": pit}
    if not named:
        message = "calibration got no PIT values: give an array, or a mapping from names to arrays."
        raise DataError(message)
    values = {str(name): _as_pit(entry, name) for name, entry in named.items()}
    if ax is None:
        from matplotlib import pyplot as plt

        ax = plt.subplots(figsize=(3.6, 3.4), layout="constrained")[1]
    if kind == _COVERAGE:
        _draw_coverage(ax, values)
    else:
        _draw_histogram(ax, values, int(n_bins))
    if isinstance(pit, Mapping):
        ax.legend(frameon=False, fontsize=8)
    ax.set_xlim(0, 1)
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def importance(
    table: pd.DataFrame,
    *,
    inputs: Mapping[str, Sequence[str]] | None = None,
    cmap: str = "viridis",
    annotate: bool = False,
    ax: Axes | None = None,
) -> Axes:
    """Draw how well each set of input assays predicts each target assay, as a heatmap of colours by column.

    As Figure 4 of the CANDI paper: the brightest cell of a column is the best predictor of that target.

    Parameters
    ----------
    table
        Score (higher is better, such as Pearson's r) of each input configuration (rows) for each target assay
        (columns); NaN where there is none.
    inputs
        Assays that a configuration consists of, by name of the row; by default those whose names are the row's. Where
        the target is among them, the cell holds an X, and its value counts neither for the colours nor for the best.
    cmap
        Colour map of matplotlib.
    annotate
        Write the values.
    ax
        Axes to draw on; new ones by default.

    Returns
    -------
    The Axes: one image of (rows, columns) with the values scaled to 0 to 1 in each column, masked where there is no
    value (beige) or an X.

    Raises
    ------
    DataError
        If `table` is no DataFrame of numbers, is empty, holds infinite values or has names twice.
    ConfigError
        If `inputs` names a row that is not there, or the colour map is unknown.

    Examples
    --------
    >>> import pandas as pd
    >>> table = pd.DataFrame({"ATAC": [0.8, 0.2, 0.4]}, index=["DNase", "H3K9me3", "H3K4me3"])
    >>> importance(table).images[0].get_array().round(2).tolist()
    [[1.0], [0.0], [0.33]]
    """
    values_rc = _as_scores(table)
    rows, columns = [str(name) for name in table.index], [str(name) for name in table.columns]
    for name in inputs or {}:
        if name not in rows:
            message = f"inputs names the row '{name}', which the table has not. {nearest(str(name), rows)}"
            raise ConfigError(message)
    sets = [set((inputs or {}).get(row, (row,))) for row in rows]
    own_rc = np.array([[column in given for column in columns] for given in sets])
    shown_rc = np.ma.masked_array(_scaled(np.where(own_rc, np.nan, values_rc)))
    shown_rc.mask = np.isnan(shown_rc.data)
    colours = _colour_map(cmap)
    if ax is None:
        from matplotlib import pyplot as plt

        size = (1.8 + 0.42 * len(columns), 1.2 + 0.32 * len(rows))
        ax = plt.subplots(figsize=size, layout="constrained")[1]
    ax.imshow(shown_rc, cmap=colours, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    for r, c in np.argwhere(own_rc):
        ax.text(c, r, "X", ha="center", va="center", fontsize=8)
    if annotate:
        for r, c in np.argwhere(~shown_rc.mask):
            shade = "black" if shown_rc[r, c] > 0.6 else "white"
            ax.text(c, r, f"{values_rc[r, c]:.2f}", ha="center", va="center", fontsize=7, color=shade)
    ax.set_xticks(range(len(columns)), columns, rotation=90)
    ax.set_yticks(range(len(rows)), rows)
    ax.set_xlabel("target assay")
    ax.set_ylabel("input")
    return ax


def _as_pit(pit: Any, name: Any) -> np.ndarray:
    """Return the PIT values in one dimension."""
    try:
        values = np.asarray(pit, dtype=np.float64).ravel()
    except (TypeError, ValueError) as error:
        message = f"The PIT values of '{name}' cannot be read as numbers: {error}."
        raise DataError(message) from error
    if values.size == 0:
        message = f"'{name}' has no PIT value: at least one is needed."
        raise DataError(message)
    # written so that NaN is outside
    if not (good := (values >= 0) & (values <= 1)).all():
        message = (
            f"'{name}' has {int((~good).sum())} of {values.size} values outside [0, 1], the first is "
            f"{values[~good][0]:g}. Give PIT values, such as epivi.metrics.nb_pit returns."
        )
        raise DataError(message)
    return values


def _draw_coverage(ax: Axes, values: Mapping[str, np.ndarray]) -> None:
    """Draw observed against nominal coverage of central intervals."""
    levels = np.linspace(0, 1, _N_LEVELS + 2)
    ax.plot([0, 1], [0, 1], "--", color=_GREY, linewidth=1, label="calibrated")
    for name, u in values.items():
        distance = np.sort(np.abs(u - 0.5))
        ax.plot(levels, np.searchsorted(distance, levels / 2 + 1e-12, side="right") / u.size, label=name)
    ax.set_ylim(0, 1)
    ax.set_aspect("equal")
    ax.set_xlabel("nominal coverage")
    ax.set_ylabel("observed coverage")


def _draw_histogram(ax: Axes, values: Mapping[str, np.ndarray], n_bins: int) -> None:
    """Draw the density of PIT values: filled for one set, lines for several."""
    ax.plot([0, 1], [1, 1], "--", color=_GREY, linewidth=1, label="calibrated")
    edges = np.linspace(0, 1, n_bins + 1)
    for i, (name, u) in enumerate(values.items()):
        density = np.histogram(u, edges, density=True)[0]
        alone = len(values) == 1
        ax.stairs(density, edges, fill=alone, alpha=0.6 if alone else 1.0, color=f"C{i}", label=name)
    ax.set_ylim(bottom=0)
    ax.set_xlabel("PIT")
    ax.set_ylabel("density")


def _as_scores(table: Any) -> np.ndarray:
    """Return the scores, (rows, columns)."""
    if not hasattr(table, "columns") or not hasattr(table, "index"):
        message = f"table is a {type(table).__name__}, expected a DataFrame of inputs by target assays."
        raise DataError(message)
    for what, names in (("rows", table.index), ("columns", table.columns)):
        if len(names) == 0:
            message = f"table has no {what}."
            raise DataError(message)
        if not names.is_unique:
            message = f"Two {what} of table are named '{names[names.duplicated()][0]}'. Rename or remove one."
            raise DataError(message)
    try:
        values = table.to_numpy(dtype=np.float64)
    except (TypeError, ValueError) as error:
        message = f"table cannot be read as numbers: {error}."
        raise DataError(message) from error
    if np.isinf(values).any():
        r, c = np.argwhere(np.isinf(values))[0]
        message = f"table has an infinite value in row '{table.index[r]}', column '{table.columns[c]}'."
        raise DataError(message)
    return values


def _scaled(values_rc: np.ndarray) -> np.ndarray:
    """Return each column scaled to 0 to 1; 1 where its values are equal, NaN where there is none."""
    out = np.full(values_rc.shape, np.nan)
    for c, column in enumerate(values_rc.T):
        known = ~np.isnan(column)
        if known.any():
            low, high = column[known].min(), column[known].max()
            out[known, c] = (column[known] - low) / (high - low) if high > low else 1.0
    return out


def _colour_map(cmap: str) -> Any:
    """Return the colour map, beige where there is nothing."""
    from matplotlib import colormaps

    if cmap not in colormaps:
        message = f"cmap='{cmap}' is no colour map of matplotlib. {nearest(str(cmap), list(colormaps))}"
        raise ConfigError(message)
    return colormaps[cmap].with_extremes(bad=_MISSING)
