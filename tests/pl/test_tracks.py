"""What the picture of tracks shows: the drawn values are group means computed by hand."""

import matplotlib as mpl

mpl.use("Agg")

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgba
from mudata import MuData
from scipy import sparse

from epivi import pl
from epivi._errors import ConfigError, DataError

CHANNELS = ["H3K27ac", "ATAC"]
# five bins of 100 bp on chr1, the third left out, then two on chr2
BINS = pd.DataFrame(
    {
        "chrom": ["chr1"] * 4 + ["chr2"] * 2,
        "start": [0, 100, 300, 400, 0, 100],
        "end": [100, 200, 400, 500, 100, 200],
    }
)
GROUPS = ["B", "B", "T", "T", "T", np.nan]
# ATAC was measured in no B cell, and not in the last T cell
MASK = np.array([[1, 0], [1, 0], [1, 1], [1, 1], [1, 0], [1, 1]], dtype=bool)
WHOLE = "chr1:0-500"


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


@pytest.fixture
def x_ncl():
    return np.random.default_rng(0).poisson(3.0, (6, 2, 6)).astype(np.uint16)


def build(x_ncl, *, form="dense", mask=MASK):
    obs = pd.DataFrame({"kind": pd.Categorical(GROUPS)}, index=[f"c{i}" for i in range(6)])
    stored = x_ncl if form == "dense" else sparse.csr_matrix(x_ncl.reshape(6, -1))
    adata = AnnData(obs=obs, obsm={"tracks": stored}, uns={"tracks": {"channels": np.array(CHANNELS), "bins": BINS}})
    if mask is not None:
        adata.obsm["tracks_mask"] = mask
    return adata


def reconstruction(x_ncl, cells=range(6), *, offset=0.5):
    var = pd.concat([BINS.assign(channel=name) for name in CHANNELS])
    var.index = [f"{name}|{i}" for name in CHANNELS for i in range(6)]
    obs = pd.DataFrame(index=[f"c{i}" for i in cells])
    return AnnData(x_ncl.reshape(6, -1)[list(cells)].astype(np.float32) + offset, obs=obs, var=var)


def rows(ax):
    """The drawn rows by label: values and edges of the filled signal, and x and y of the line."""
    found = {}
    for panel in ax.child_axes:
        filled = [patch.get_data() for patch in panel.patches]
        lines = [(line.get_xdata(), line.get_ydata()) for line in panel.lines]
        found[panel.get_label()] = (filled, lines)
    return found


def values(ax, label):
    filled, _ = rows(ax)[label]
    return np.asarray(filled[0].values)


# --- what is drawn


@pytest.mark.parametrize("form", ["dense", "csr"])
def test_filled_signal_is_the_share_of_the_counts_of_the_measured_cells(x_ncl, form):
    ax = pl.tracks(build(x_ncl, form=form), WHOLE, groupby="kind")
    assert list(rows(ax)) == ["H3K27ac B", "H3K27ac T", "ATAC B", "ATAC T"]
    for label, m, cells in (("H3K27ac B", 0, [0, 1]), ("H3K27ac T", 0, [2, 3, 4]), ("ATAC T", 1, [2, 3])):
        pooled_l = x_ncl[cells, m].sum(axis=0) / x_ncl[cells, m].sum()
        np.testing.assert_allclose(values(ax, label), [*pooled_l[:2], np.nan, *pooled_l[2:4]])
        assert rows(ax)[label][0][0].edges.tolist() == [0, 100, 200, 300, 400, 500]
        assert ax.child_axes[0].patches[0].get_data().baseline == 0
    assert rows(ax)["ATAC B"] == ([], [])
    assert [text.get_text() for text in ax.child_axes[2].texts] == ["not measured"]


@pytest.mark.parametrize("form", ["dense", "csr"])
def test_mean_counts_of_a_cell(x_ncl, form):
    ax = pl.tracks(build(x_ncl, form=form), "chr2:0-200", groupby="kind", normalize="cell")
    np.testing.assert_allclose(values(ax, "ATAC T"), x_ncl[[2, 3], 1, 4:].mean(axis=0))
    np.testing.assert_allclose(values(ax, "H3K27ac T"), x_ncl[[2, 3, 4], 0, 4:].mean(axis=0))


def test_counts_under_the_mask_are_not_read(x_ncl):
    other = x_ncl.copy()
    other[~MASK] = 999
    for normalize in ("library", "cell"):
        pictures = [pl.tracks(build(x, form="csr"), WHOLE, groupby="kind", normalize=normalize) for x in (x_ncl, other)]
        for label in ("H3K27ac B", "H3K27ac T", "ATAC T"):
            np.testing.assert_array_equal(values(pictures[0], label), values(pictures[1], label))


def test_without_groups_all_cells_count_and_a_cell_order_does_not(x_ncl):
    adata = build(x_ncl)
    ax = pl.tracks(adata, WHOLE, normalize="cell")
    assert list(rows(ax)) == CHANNELS
    np.testing.assert_allclose(values(ax, "ATAC")[[0, 1]], x_ncl[[2, 3, 5], 1, :2].mean(axis=0))
    shuffled = adata[[5, 3, 1, 0, 2, 4]].copy()
    np.testing.assert_allclose(values(pl.tracks(shuffled, WHOLE, normalize="cell"), "ATAC"), values(ax, "ATAC"))


def test_without_a_mask_all_cells_are_measured_and_a_frame_is_a_mask(x_ncl):
    ax = pl.tracks(build(x_ncl, mask=None), WHOLE, groupby="kind", normalize="cell")
    np.testing.assert_allclose(values(ax, "ATAC B")[:2], x_ncl[:2, 1, :2].mean(axis=0))
    adata = build(x_ncl, mask=None)
    adata.obsm["seen"] = pd.DataFrame(MASK[:, ::-1], columns=CHANNELS[::-1], index=adata.obs_names)
    ax = pl.tracks(adata, WHOLE, groupby="kind", normalize="cell", mask_key="seen")
    assert rows(ax)["ATAC B"] == ([], [])


def test_a_measured_modality_without_counts_is_flat(x_ncl):
    x_ncl[:2, 0] = 0
    ax = pl.tracks(build(x_ncl), "chr2:0-200", groupby="kind", groups="B", modality="H3K27ac")
    assert values(ax, "H3K27ac B").tolist() == [0.0, 0.0]
    assert ax.child_axes[0].get_ylim() == (0, 1)


def test_groups_and_modalities_keep_the_order_given(x_ncl):
    adata = build(x_ncl)
    ax = pl.tracks(adata, WHOLE, groupby="kind", groups=["T", "B"], modality=["ATAC", "H3K27ac"])
    assert list(rows(ax)) == ["ATAC T", "ATAC B", "H3K27ac T", "H3K27ac B"]
    np.testing.assert_array_equal(values(ax, "H3K27ac B"), values(pl.tracks(adata, WHOLE, groupby="kind"), "H3K27ac B"))


def test_region_takes_the_bins_that_overlap_it(x_ncl):
    ax = pl.tracks(build(x_ncl), ("chr1", 199, 301), normalize="cell", modality="H3K27ac")
    np.testing.assert_allclose(values(ax, "H3K27ac")[[0, 2]], x_ncl[:, 0, 1:3].mean(axis=0))
    assert rows(ax)["H3K27ac"][0][0].edges.tolist() == [100, 200, 300, 400]
    assert ax.get_xlim() == ax.child_axes[0].get_xlim() == (199, 301)


def test_wide_bins_are_sums_of_all_their_bins(x_ncl):
    # the region begins inside the first wide bin, which is drawn whole
    ax = pl.tracks(build(x_ncl), "chr1:150-500", normalize="cell", modality="H3K27ac", bin_size_bp=200)
    filled = rows(ax)["H3K27ac"][0][0]
    mean_l = x_ncl[:, 0].mean(axis=0)
    np.testing.assert_allclose(filled.values, [mean_l[:2].sum(), mean_l[2], mean_l[3]])
    assert filled.edges.tolist() == [0, 200, 400, 600]


# --- reconstructed tracks


@pytest.mark.parametrize("is_sparse", [False, True])
def test_line_is_the_mean_over_the_cells_of_the_filled_signal(x_ncl, is_sparse):
    model = reconstruction(x_ncl)
    if is_sparse:
        model.X = sparse.csr_matrix(model.X)
    ax = pl.tracks(build(x_ncl), WHOLE, groupby="kind", normalize="cell", reconstructed=model)
    for label, m, cells in (("H3K27ac B", 0, [0, 1]), ("H3K27ac T", 0, [2, 3, 4]), ("ATAC T", 1, [2, 3])):
        ((x, y),) = rows(ax)[label][1]
        mean_l = x_ncl[cells, m].mean(axis=0) + 0.5
        assert x.tolist() == [0, 100, 200, 300, 400, 500]
        np.testing.assert_allclose(y, [*mean_l[:2], np.nan, *mean_l[2:4], mean_l[3]], rtol=1e-6)
        np.testing.assert_allclose(y[:-1] - values(ax, label), [0.5, 0.5, np.nan, 0.5, 0.5], rtol=1e-5)
    # no B cell has ATAC: the prediction for all of them
    np.testing.assert_allclose(rows(ax)["ATAC B"][1][0][1][:2], x_ncl[:2, 1, :2].mean(axis=0) + 0.5, rtol=1e-6)
    assert rows(ax)["ATAC B"][0] == []
    assert [text.get_text() for text in ax.child_axes[0].get_legend().get_texts()] == ["observed", "reconstructed"]


def test_cells_of_a_reconstruction_are_found_by_name(x_ncl):
    ax = pl.tracks(build(x_ncl), WHOLE, groupby="kind", reconstructed=reconstruction(x_ncl, [4, 1]))
    np.testing.assert_allclose(rows(ax)["H3K27ac T"][1][0][1][:2], x_ncl[4, 0, :2] + 0.5, rtol=1e-6)
    np.testing.assert_allclose(rows(ax)["ATAC T"][1][0][1][:2], x_ncl[4, 1, :2] + 0.5, rtol=1e-6)
    np.testing.assert_allclose(rows(ax)["ATAC B"][1][0][1][:2], x_ncl[1, 1, :2] + 0.5, rtol=1e-6)


def test_reconstruction_of_one_modality_leaves_the_others_without_a_line(x_ncl):
    model = reconstruction(x_ncl)
    ax = pl.tracks(build(x_ncl), WHOLE, reconstructed=model[:, model.var["channel"] == "ATAC"].copy())
    assert [len(lines) for _, lines in rows(ax).values()] == [0, 1]


def test_finer_reconstructed_bins_keep_their_own_edges(x_ncl):
    var = pd.DataFrame({"channel": "ATAC", "chrom": "chr1", "start": [0, 50, 100], "end": [50, 100, 150]})
    model = AnnData(
        np.array([[1.0, 2.0, 4.0]]), obs=pd.DataFrame(index=["c2"]), var=var.set_index(var.index.astype(str))
    )
    ax = pl.tracks(build(x_ncl), WHOLE, reconstructed=model)
    ((x, y),) = rows(ax)["ATAC"][1]
    assert (x.tolist(), y.tolist()) == ([0, 50, 100, 150], [1.0, 2.0, 4.0, 4.0])


# --- axes, scales, colours, genes


def tops(ax):
    return [panel.get_ylim()[1] for panel in ax.child_axes]


def test_scales(x_ncl):
    adata = build(x_ncl, mask=None)
    highest = [
        np.nanmax(values(pl.tracks(adata, WHOLE, groupby="kind"), label))
        for label in ("H3K27ac B", "H3K27ac T", "ATAC B", "ATAC T")
    ]
    wanted = {
        "row": highest,
        "modality": [max(highest[:2])] * 2 + [max(highest[2:])] * 2,
        "all": [max(highest)] * 4,
    }
    for ylim, top in wanted.items():
        np.testing.assert_allclose(tops(pl.tracks(adata, WHOLE, groupby="kind", ylim=ylim)), 1.05 * np.array(top))
    assert tops(pl.tracks(adata, WHOLE, ylim=0.25)) == [0.25, 0.25]
    assert tops(pl.tracks(adata, WHOLE, ylim={"ATAC": 2, "H3K27ac": 3})) == [3, 2]


def test_a_line_above_the_filled_signal_raises_the_scale(x_ncl):
    model = reconstruction(x_ncl, offset=100.0)
    ax = pl.tracks(build(x_ncl), WHOLE, modality="ATAC", normalize="cell", reconstructed=model)
    assert tops(ax)[0] == pytest.approx(1.05 * np.nanmax(rows(ax)["ATAC"][1][0][1]))


def test_given_axes_are_divided_and_returned(x_ncl):
    figure, (left, right) = plt.subplots(1, 2)
    assert pl.tracks(build(x_ncl), WHOLE, ax=right) is right
    assert (len(left.child_axes), len(right.child_axes)) == (0, 2)
    figure.canvas.draw()
    inside = right.get_position()
    boxes = [panel.get_position() for panel in right.child_axes]
    assert all(box.x0 == pytest.approx(inside.x0) and box.x1 == pytest.approx(inside.x1) for box in boxes)
    assert inside.y1 >= boxes[0].y1 > boxes[0].y0 > boxes[1].y1 > boxes[1].y0 >= inside.y0 - 1e-9
    assert right.child_axes[1].get_xlabel() == "chr1 (kb)"


def face(ax, label):
    return next(p for p in ax.child_axes if p.get_label() == label).patches[0].get_facecolor()[:3]


def test_colours(x_ncl):
    adata = build(x_ncl, mask=None)
    ax = pl.tracks(adata, WHOLE)
    assert face(ax, "H3K27ac") != face(ax, "ATAC")
    ax = pl.tracks(adata, WHOLE, groupby="kind")
    assert face(ax, "H3K27ac B") == face(ax, "ATAC B") != face(ax, "ATAC T")
    adata.uns["kind_colors"] = ["#ff0000", "#00ff00"]
    assert face(pl.tracks(adata, WHOLE, groupby="kind", groups=["T"]), "ATAC T") == to_rgba("#00ff00")[:3]
    ax = pl.tracks(adata, WHOLE, groupby="kind", colors={"ATAC": "#0000ff", "B": "#123456"})
    assert face(ax, "ATAC T") == to_rgba("#0000ff")[:3]
    assert face(ax, "ATAC B") == face(ax, "H3K27ac B") == to_rgba("#123456")[:3]


GENES = pd.DataFrame(
    {
        "chrom": ["chr1", "chr1", "chr1", "chr2", "chr1"],
        "start": [450, 50, 60, 0, 600],
        "end": [900, 300, 200, 90, 700],
        "name": ["LONGNAME", "SOX2", "OCT4", "ELSEWHERE", "BEYOND"],
        "strand": ["+", "-", ".", "+", "+"],
    }
)


def test_genes_of_the_region_lie_in_lanes(x_ncl):
    ax = pl.tracks(build(x_ncl), WHOLE, genes=GENES)
    panel = ax.child_axes[-1]
    assert panel.get_label() == "genes"
    assert [text.get_text() for text in panel.texts] == ["SOX2 ←", "OCT4", "LONGNAME →"]
    assert [list(line.get_xdata()) for line in panel.lines] == [[50, 300], [60, 200], [450, 500]]
    assert [list(line.get_ydata()) for line in panel.lines] == [[0, 0], [-1, -1], [0, 0]]
    # a name that would leave the region begins further to the left
    assert panel.texts[2].get_position()[0] < 450
    assert len(pl.tracks(build(x_ncl), WHOLE, genes=GENES.drop(columns="strand")).child_axes) == 3


def test_no_row_for_genes_where_there_are_none(x_ncl):
    assert len(pl.tracks(build(x_ncl), "chr2:100-200", genes=GENES).child_axes) == 2


# --- what is refused


def changed(adata, **uns):
    adata.uns["tracks"] = {**adata.uns["tracks"], **uns}
    return adata


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groupby": "knd"}, "obs has no column 'knd'. Did you mean 'kind'"),
        ({"groups": ["B"]}, "needs groupby="),
        ({"groupby": "kind", "groups": ["b"]}, "names the group 'b', which obs"),
        ({"groupby": "kind", "groups": ["B", "B"]}, "at least one group, each once"),
        ({"groupby": "kind", "groups": []}, "at least one group, each once"),
        ({"groupby": "empty"}, "obs\\['empty'\\] has no value"),
        ({"modality": "ATACC"}, "modality names the channel 'ATACC', which adata does not have. Did you mean 'ATAC'"),
        ({"modality": ["ATAC", "ATAC"]}, "at least one channel, each once"),
        ({"modality": []}, "at least one channel, each once"),
        ({"normalize": "libary"}, "normalize='libary' is not valid"),
        ({"bin_size_bp": 150}, "bin_size_bp=150 cuts the bin 100-200"),
        ({"bin_size_bp": 0}, "bin_size_bp=0 is out of range"),
        ({"ylim": "group"}, "ylim='group' is not valid"),
        ({"ylim": 0}, "ylim=0 is out of range"),
        ({"ylim": {"ATAC": 1}}, "ylim has no entry for the modality 'H3K27ac'"),
        ({"ylim": {"ATAC": 1, "H3K27ac": -1}}, "ylim\\['H3K27ac'\\]=-1 is out of range"),
        ({"colors": {"C": "red"}}, "colors names 'C', no group or modality"),
        ({"colors": {"ATAC": "rot"}}, "colors\\['ATAC'\\]='rot' is no colour"),
    ],
)
def test_options_that_are_not_valid(x_ncl, options, message):
    adata = build(x_ncl)
    adata.obs["empty"] = np.nan
    with pytest.raises(ConfigError, match=message):
        pl.tracks(adata, WHOLE, **options)


@pytest.mark.parametrize(
    ("region", "error"), [("chr1", ConfigError), ("chr1:5-5", ConfigError), ("chr9:0-9", DataError)]
)
def test_regions_without_bins(x_ncl, region, error):
    with pytest.raises(error, match=r"cannot be read|does not end|No bin lies in chr9:0-9.*chr1:0-500, chr2:0-200"):
        pl.tracks(build(x_ncl), region)


def test_too_many_rows(x_ncl):
    adata = build(np.tile(x_ncl, (6, 1, 1))[:6])
    many = AnnData(
        obs=pd.DataFrame({"name": [f"g{i}" for i in range(31)]}, index=[f"c{i}" for i in range(31)]),
        obsm={"tracks": np.ones((31, 2, 6), dtype=np.uint16)},
        uns=adata.uns,
    )
    with pytest.raises(DataError, match="62 rows, at most 60"):
        pl.tracks(many, WHOLE, groupby="name")


def test_tracks_that_do_not_fit(x_ncl):
    with pytest.raises(DataError, match="adata is a DataFrame"):
        pl.tracks(BINS, WHOLE)
    with pytest.raises(DataError, match=r"adata is a MuData.*stack_tracks"):
        pl.tracks(MuData({"a": AnnData(np.ones((2, 1)))}), WHOLE)
    with pytest.raises(DataError, match="has no entry 'trcks'"):
        pl.tracks(build(x_ncl), WHOLE, key="trcks")
    adata = build(x_ncl)
    adata.uns["tracks"] = {"bins": BINS}
    with pytest.raises(DataError, match="has no entry 'channels'"):
        pl.tracks(adata, WHOLE)
    with pytest.raises(DataError, match=r"has shape \(6, 2, 6\), needed is \(6, 2, 5\)"):
        pl.tracks(changed(build(x_ncl), bins=BINS[:5]), WHOLE)
    with pytest.raises(DataError, match=r"has shape \(6, 12\), needed is \(6, 10\)"):
        pl.tracks(changed(build(x_ncl, form="csr"), bins=BINS[:5]), WHOLE)
    with pytest.raises(DataError, match="has no entry 'end'"):
        pl.tracks(changed(build(x_ncl), bins=BINS.drop(columns="end")), WHOLE)
    with pytest.raises(DataError, match="The bins 0-100 and 90-200 overlap"):
        pl.tracks(changed(build(x_ncl), bins=BINS.assign(start=[0, 90, 300, 400, 0, 100])), WHOLE)
    bad = x_ncl.astype(np.float32)
    bad[0, 1, 0] = np.nan
    with pytest.raises(DataError, match="'ATAC' hold NaN or infinite"):
        pl.tracks(build(bad, mask=None), WHOLE)


@pytest.mark.parametrize("mask", [MASK[:, :1], MASK.astype(int)])
def test_masks_that_do_not_fit(x_ncl, mask):
    with pytest.raises(DataError, match=r"needed is a Boolean array of shape \(6, 2\)"):
        pl.tracks(build(x_ncl, mask=mask), WHOLE)
    with pytest.raises(DataError, match="obsm has no entry 'seen'"):
        pl.tracks(build(x_ncl), WHOLE, mask_key="seen")


def test_reconstructions_that_do_not_fit(x_ncl):
    model = reconstruction(x_ncl)
    with pytest.raises(DataError, match="reconstructed is a ndarray"):
        pl.tracks(build(x_ncl), WHOLE, reconstructed=model.X)
    bare = model.copy()
    del bare.var["channel"]
    with pytest.raises(DataError, match=r"reconstructed\.var has no entry 'channel'"):
        pl.tracks(build(x_ncl), WHOLE, reconstructed=bare)
    with pytest.raises(DataError, match="1 of 6 cells of reconstructed are not in adata: 'c0'"):
        pl.tracks(build(x_ncl)[1:].copy(), WHOLE, reconstructed=model)
    model.obs_names = ["c0"] * 6
    with pytest.raises(DataError, match=r"reconstructed\.obs_names are not unique"):
        pl.tracks(build(x_ncl), WHOLE, reconstructed=model)


@pytest.mark.parametrize(
    ("genes", "message"), [("genes.bed", "genes is a str"), (GENES.drop(columns="name"), "genes has no entry 'name'")]
)
def test_genes_that_are_no_table(x_ncl, genes, message):
    with pytest.raises(DataError, match=message):
        pl.tracks(build(x_ncl), WHOLE, genes=genes)
