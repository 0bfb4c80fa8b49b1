"""What the scatter shows: positions, colours, legend."""

import matplotlib as mpl

mpl.use("Agg")

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgba

from epivi import pl
from epivi._errors import ConfigError, DataError


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


@pytest.fixture
def adata():
    rng = np.random.default_rng(0)
    obs = pd.DataFrame({"kind": pd.Categorical(["T", "B", "T", "NK"] * 5), "depth": rng.random(20)})
    obs.index = obs.index.astype(str)
    return AnnData(obs=obs, obsm={"X_umap": rng.normal(size=(20, 2)), "X_sailer": rng.normal(size=(20, 5))})


def colour_of_point(ax, xy):
    """Face colour of the point at given coordinates."""
    points = ax.collections[0]
    points.update_scalarmappable()
    at = np.flatnonzero((points.get_offsets() == xy).all(axis=1))
    assert len(at) == 1
    return tuple(points.get_facecolors()[at[0]])


def legend(ax):
    box = ax.get_legend()
    names = [text.get_text() for text in box.get_texts()]
    return dict(zip(names, (to_rgba(handle.get_color()) for handle in box.legend_handles), strict=True))


def test_every_cell_is_drawn_once_in_the_colour_of_its_category(adata):
    ax = pl.embedding(adata, basis="umap", color="kind")
    xy = adata.obsm["X_umap"]
    np.testing.assert_array_equal(np.sort(np.asarray(ax.collections[0].get_offsets()), axis=0), np.sort(xy, axis=0))
    shown = legend(ax)
    assert list(shown) == ["B", "NK", "T"]
    assert len(set(shown.values())) == 3
    for i, kind in enumerate(adata.obs["kind"]):
        assert colour_of_point(ax, xy[i]) == pytest.approx(shown[kind])
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_title()) == ("UMAP1", "UMAP2", "kind")


def test_stored_colours_are_used(adata):
    adata.uns["kind_colors"] = ["#ff0000", "#00ff00", "#0000ff"]
    ax = pl.embedding(adata, basis="X_umap", color="kind")
    assert legend(ax) == {"B": to_rgba("#ff0000"), "NK": to_rgba("#00ff00"), "T": to_rgba("#0000ff")}


def test_values_get_a_colour_bar(adata):
    ax = pl.embedding(adata, basis="umap", color="depth")
    depth = adata.obs["depth"].to_numpy()
    shown = dict(
        zip(map(tuple, ax.collections[0].get_offsets().tolist()), ax.collections[0].get_array().tolist(), strict=True)
    )
    assert shown == dict(zip(map(tuple, adata.obsm["X_umap"].tolist()), depth.tolist(), strict=True))
    assert ax.get_legend() is None
    assert [other.get_ylabel() for other in ax.figure.axes if other is not ax] == ["depth"]


def test_missing_values_are_grey():
    Z = np.array([[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]])
    grey = to_rgba("#d3d3d3")
    ax = pl.embedding(Z, color=pd.Categorical(["B", None, "T"]))
    assert colour_of_point(ax, Z[1]) == pytest.approx(grey)
    assert list(legend(ax)) == ["B", "T", "missing"]
    ax = pl.embedding(Z, color=[0.5, np.nan, 1.0])
    assert colour_of_point(ax, Z[1]) == pytest.approx(grey)
    assert colour_of_point(ax, Z[0]) != pytest.approx(grey)


def test_an_array_is_drawn_without_colours_on_the_given_axes():
    Z = np.random.default_rng(0).normal(size=(30, 4))
    _, ax = plt.subplots()
    before = plt.get_fignums()
    assert pl.embedding(Z, basis="X_lsi", ax=ax) is ax
    assert plt.get_fignums() == before
    drawn = np.asarray(ax.collections[0].get_offsets())
    np.testing.assert_array_equal(drawn[np.lexsort(drawn.T)], Z[:, :2][np.lexsort(Z[:, :2].T)])
    assert ax.get_xlabel() == "LSI1"
    assert ax.get_legend() is None


def test_booleans_are_categories_and_many_categories_differ():
    Z = np.random.default_rng(0).normal(size=(120, 2))
    assert list(legend(pl.embedding(Z, color=np.arange(120) % 2 == 0))) == ["False", "True"]
    for k in (15, 30):
        shown = legend(pl.embedding(Z, color=[f"t{i % k:02}" for i in range(120)]))
        assert len(shown) == len(set(shown.values())) == k


def test_the_same_call_draws_the_same_order():
    Z = np.random.default_rng(0).normal(size=(50, 2))
    first, second = (np.asarray(pl.embedding(Z, color=Z[:, 0]).collections[0].get_offsets()) for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_input_is_left_alone(adata):
    before = adata.copy()
    pl.embedding(adata, basis="umap", color="kind")
    pd.testing.assert_frame_equal(adata.obs, before.obs)
    assert list(adata.uns) == list(before.uns)


@pytest.mark.parametrize(
    ("error", "options", "message"),
    [
        (ConfigError, {}, "embedding needs basis=, a key of obsm. Valid are: 'X_umap', 'X_sailer'"),
        (ConfigError, {"basis": "umpa"}, "obsm has no 'umpa'. Did you mean 'X_umap'"),
        (ConfigError, {"basis": "umap", "color": "kinds"}, "obs has no column 'kinds'. Did you mean 'kind'"),
        (DataError, {"basis": "umap", "color": [1, 2]}, r"color has shape \(2,\), expected one value .* the 20 cells"),
    ],
)
def test_bad_keys_are_refused(adata, error, options, message):
    with pytest.raises(error, match=message):
        pl.embedding(adata, **options)


@pytest.mark.parametrize(
    ("Z", "color", "message"),
    [
        (np.ones((5, 1)), None, r"The embedding has shape \(5, 1\), expected \(cells, 2 or more\)"),
        (np.ones((0, 2)), None, r"The embedding has shape \(0, 2\)"),
        (np.array([[0, np.nan], [np.inf, 0], [1, 1]]), None, "2 of 3 cells have NaN or infinite coordinates"),
        (np.ones((61, 2)), [f"t{i}" for i in range(61)], "color has 61 categories, more than the 60"),
    ],
)
def test_bad_data_are_refused(Z, color, message):
    with pytest.raises(DataError, match=message):
        pl.embedding(Z, color=color)


def test_a_column_name_needs_obs():
    with pytest.raises(ConfigError, match=r"obs has no column 'kind'\. There are none"):
        pl.embedding(np.ones((3, 2)), color="kind")
