"""What the bars of I(z, c) show."""

import matplotlib as mpl

mpl.use("Agg")

import numpy as np
import pytest
from matplotlib import pyplot as plt

from epivi import metrics, pl
from epivi._errors import ConfigError, DataError


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def results():
    rng = np.random.default_rng(0)
    depth = rng.lognormal(8, 0.5, size=200)
    lsi, sailer = rng.normal(size=(200, 3)), rng.normal(size=(200, 2))
    lsi[:, 0] += 3 * np.log(depth)
    return {name: metrics.confounder_information(Z, depth) for name, Z in {"LSI": lsi, "SAILER": sailer}.items()}


def test_bars_are_means_and_marks_are_maxima(results):
    ax = pl.confounders(results)
    assert [bar.get_height() for bar in ax.patches] == [result.mean for result in results.values()]
    assert ax.lines[0].get_ydata().tolist() == [result.max for result in results.values()]
    centres = [bar.get_x() + bar.get_width() / 2 for bar in ax.patches]
    np.testing.assert_allclose(ax.lines[0].get_xdata(), centres)
    assert [label.get_text() for label in ax.get_xticklabels()] == ["LSI\n3 dim.", "SAILER\n2 dim."]
    assert ax.get_ylabel() == "I(z, c) [nats]"


def test_given_axes_are_used(results):
    _, ax = plt.subplots()
    assert pl.confounders(results, ax=ax) is ax
    assert len(plt.get_fignums()) == 1


def test_bad_input_is_refused(results):
    with pytest.raises(DataError, match="confounders got no result"):
        pl.confounders({})
    with pytest.raises(DataError, match="The entry 'LSI' is a float, expected a result of confounder_information"):
        pl.confounders({"LSI": 0.3})
    batch = metrics.confounder_information(np.random.default_rng(0).normal(size=(100, 2)), ["a", "b"] * 50)
    with pytest.raises(ConfigError, match=r"1 of 3 results are for a discrete confounder \(the first is 'batch'\)"):
        pl.confounders({**results, "batch": batch})
