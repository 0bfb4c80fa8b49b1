"""What the picture of a benchmark shows."""

import matplotlib as mpl

mpl.use("Agg")

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgba

from epivi import pl
from epivi._errors import DataError

COLUMNS = [
    ("bio", "clisi"),
    ("bio", "nmi_leiden"),
    ("batch", "kbet"),
    ("batch", "ilisi"),
    ("confounder", "I(z,depth)"),
    ("aggregate", "total_scib"),
]


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


@pytest.fixture
def table():
    values = [[0.9, 0.2, np.nan, 0.5, 0.31, 0.4], [1.0, 0.8, np.nan, np.nan, 1.7, 0.7]]
    return pd.DataFrame(values, index=["X_pca", "X_sailer"], columns=pd.MultiIndex.from_tuples(COLUMNS))


def test_rows_are_sorted_by_the_total_and_values_written(table):
    ax = pl.benchmark(table)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["X_sailer", "X_pca"]
    texts = {(text.get_position()[1], round(text.get_position()[0], 1)): text.get_text() for text in ax.texts[:10]}
    # columns of one group lie one apart, groups 0.4 more; kbet has no value and is left out
    positions = [0.0, 1.0, 2.4, 3.8, 5.2]
    assert [texts[0, x] for x in positions] == ["1.00", "0.80", "-", "1.70", "0.70"]
    assert [texts[1, x] for x in positions] == ["0.90", "0.20", "0.50", "0.31", "0.40"]
    np.testing.assert_allclose(ax.get_xticks(), positions)
    assert [label.get_text() for label in ax.get_xticklabels()] == [
        "clisi",
        "nmi leiden",
        "ilisi",
        "I(z,depth)",
        "total scib",
    ]
    assert [text.get_text() for text in ax.texts[10:]] == [
        "Bio conservation",
        "Batch correction",
        "Confounders",
        "Aggregate",
    ]


def test_dots_are_coloured_by_score_and_bars_as_long(table):
    ax = pl.benchmark(table)
    colour = {tuple(dot.get_offsets()[0]): dot.get_facecolor()[0] for dot in ax.collections}
    assert len(colour) == 5  # two metrics of two embeddings, one of one; none for the confounder
    np.testing.assert_allclose(colour[0.0, 0.0], to_rgba(mpl.colormaps["viridis"](1.0)))
    np.testing.assert_allclose(colour[1.0, 1.0], to_rgba(mpl.colormaps["viridis"](0.2)))
    widths = [bar.get_width() for bar in ax.patches]
    assert widths[0] / widths[1] == pytest.approx(0.7 / 0.4)


def test_given_axes_are_used_and_the_table_is_left_alone(table):
    _, ax = plt.subplots()
    before = table.copy()
    assert pl.benchmark(table, ax) is ax
    assert len(plt.get_fignums()) == 1
    pd.testing.assert_frame_equal(table, before)


def test_without_totals_the_order_is_kept(table):
    ax = pl.benchmark(table[["bio"]])
    assert [label.get_text() for label in ax.get_yticklabels()] == ["X_pca", "X_sailer"]


def test_bad_tables_are_refused(table):
    with pytest.raises(DataError, match=r"The table is a dict, expected the result of epivi\.metrics\.benchmark"):
        pl.benchmark({"a": 1})
    with pytest.raises(DataError, match=r"The table is of shape \(2, 2\)"):
        pl.benchmark(table["bio"])
    with pytest.raises(DataError, match=r"The table is of shape \(0, 6\)"):
        pl.benchmark(table.iloc[:0])
    with pytest.raises(DataError, match="columns of the group 'speed', expected bio, batch"):
        pl.benchmark(table.rename(columns={"bio": "speed"}))
    with pytest.raises(DataError, match="The table has no value in any of its 6 columns"):
        pl.benchmark(table * np.nan)
