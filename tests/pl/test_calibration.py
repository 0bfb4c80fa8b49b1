"""What the pictures of calibration and importance show."""

import matplotlib as mpl

mpl.use("Agg")

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt

from epivi import metrics, pl
from epivi._errors import ConfigError, DataError


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def pits():
    rng = np.random.default_rng(0)
    return {"narrow": rng.beta(0.4, 0.4, size=(50, 40)), "good": rng.random(1000)}


@pytest.fixture
def table():
    values = {"ATAC": [0.8, 0.2, 0.6, np.nan], "H3K4me3": [0.5, 0.5, 0.9, 0.3]}
    return pd.DataFrame(values, index=["DNase", "ATAC", "H3K4me3", "accessibility"])


def test_the_curve_is_the_coverage(pits):
    ax = pl.calibration(pits)
    assert [line.get_label() for line in ax.lines] == ["calibrated", "narrow", "good"]
    np.testing.assert_array_equal(ax.lines[0].get_xydata(), [[0, 0], [1, 1]])
    for line, u in zip(ax.lines[1:], pits.values(), strict=True):
        np.testing.assert_array_equal(line.get_ydata(), metrics.coverage(u, line.get_xdata()))
    assert (ax.lines[1].get_ydata()[5:-5] < ax.lines[1].get_xdata()[5:-5]).all()
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("nominal coverage", "observed coverage")
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["calibrated", "narrow", "good"]
    assert pl.calibration(pits["good"]).get_legend() is None


def test_the_histogram_is_a_density(pits):
    ax = pl.calibration(pits["narrow"], kind="histogram", n_bins=10)
    height, edges, _ = ax.patches[0].get_data()
    np.testing.assert_allclose(edges, np.linspace(0, 1, 11))
    counts = [((pits["narrow"] >= low) & (pits["narrow"] < low + 0.1)).sum() for low in edges[:-1]]
    np.testing.assert_allclose(height, np.array(counts) / 200, atol=1e-9)
    assert ax.get_ylim()[0] == 0
    several = pl.calibration(pits, kind="histogram")
    assert [patch.get_label() for patch in several.patches] == list(pits)
    assert [patch.get_fill() for patch in several.patches] == [False, False]


def test_importance_is_scaled_by_column_and_marks_inputs(table):
    ax = pl.importance(table, inputs={"accessibility": ["DNase", "ATAC"]})
    shown = ax.images[0].get_array()
    np.testing.assert_allclose(shown.filled(-1), [[1, 1], [-1, 1], [0, -1], [-1, 0]], atol=1e-12)
    marks = {(text.get_text(), *text.get_position()) for text in ax.texts}
    assert marks == {("X", 0, 1), ("X", 1, 2), ("X", 0, 3)}
    assert [label.get_text() for label in ax.get_xticklabels()] == ["ATAC", "H3K4me3"]
    assert [label.get_text() for label in ax.get_yticklabels()] == table.index.tolist()
    assert (ax.images[0].norm.vmin, ax.images[0].norm.vmax) == (0, 1)
    assert ax.images[0].cmap.get_bad()[:3] == pytest.approx((0.941, 0.902, 0.824), abs=0.01)


def test_importance_without_a_value_or_with_equal_ones(table):
    table["empty"] = np.nan
    table["same"] = 0.4
    shown = pl.importance(table).images[0].get_array()
    assert shown.mask[:, 2].all()
    assert shown[:, 3].tolist() == [1, 1, 1, 1]


def test_importance_can_write_the_values(table):
    ax = pl.importance(table, annotate=True, cmap="magma")
    written = {text.get_position(): text.get_text() for text in ax.texts}
    assert written[0, 0] == "0.80"
    assert written[0, 1] == "X"
    assert (0, 3) not in written


def test_given_axes_are_used(pits, table):
    _, axes = plt.subplots(1, 3)
    assert pl.calibration(pits, ax=axes[0]) is axes[0]
    assert pl.calibration(pits, kind="histogram", ax=axes[1]) is axes[1]
    assert pl.importance(table, ax=axes[2]) is axes[2]
    assert len(plt.get_fignums()) == 1


@pytest.mark.parametrize(
    ("pit", "options", "error", "message"),
    [
        ([0.5], {"kind": "cover"}, ConfigError, "kind='cover' is not valid. Did you mean 'coverage'"),
        ([0.5], {"n_bins": 0}, ConfigError, "n_bins=0 is out of range"),
        ({}, {}, DataError, "calibration got no PIT values"),
        ({"model": []}, {}, DataError, "'model' has no PIT value"),
        ([0.5, 1.5, np.nan], {}, DataError, r"'observed' has 2 of 3 values outside \[0, 1\], the first is 1\.5"),
        ({"model": ["x"]}, {}, DataError, "The PIT values of 'model' cannot be read as numbers"),
    ],
)
def test_bad_pit_is_refused(pit, options, error, message):
    with pytest.raises(error, match=message):
        pl.calibration(pit, **options)


@pytest.mark.parametrize(
    ("change", "options", "error", "message"),
    [
        (lambda t: t.to_numpy(), {}, DataError, "table is a ndarray, expected a DataFrame"),
        (lambda t: t.iloc[:0], {}, DataError, "table has no rows"),
        (lambda t: t[[]], {}, DataError, "table has no columns"),
        (lambda t: t.iloc[[0, 0]], {}, DataError, "Two rows of table are named 'DNase'"),
        (lambda t: t[["ATAC", "ATAC"]], {}, DataError, "Two columns of table are named 'ATAC'"),
        (lambda t: t.replace(0.9, np.inf), {}, DataError, "infinite value in row 'H3K4me3', column 'H3K4me3'"),
        (lambda t: t.astype(str).replace("0.9", "x"), {}, DataError, "table cannot be read as numbers"),
        (lambda t: t, {"inputs": {"DNas": []}}, ConfigError, "inputs names the row 'DNas', .* Did you mean 'DNase'"),
        (lambda t: t, {"cmap": "viridi"}, ConfigError, "cmap='viridi' is no colour map of matplotlib. Did you mean"),
    ],
)
def test_bad_tables_are_refused(table, change, options, error, message):
    with pytest.raises(error, match=message):
        pl.importance(change(table), **options)
