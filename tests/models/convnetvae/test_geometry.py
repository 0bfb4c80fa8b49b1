from __future__ import annotations

import logging

import numpy as np
import pytest

from epivi._errors import DataError
from epivi.data.tracks.grids import TrackGrid, TrackLayout
from epivi.models.convnetvae.geometry import ConvGeometry


def test_channels_on_one_grid_keep_their_bins(layout):
    geometry = ConvGeometry.of(layout(3, 50), "auto", 11)
    assert geometry.is_common
    assert (geometry.lengths, geometry.ratios, geometry.segments) == ((50, 50, 50), (1, 1, 1), (50,))
    assert np.array_equal(geometry.input_positions, np.arange(150))
    assert np.array_equal(geometry.output_positions, np.arange(150))


@pytest.mark.parametrize(
    ("boundaries", "segments"), [("none", (9,)), ("chromosome", (6, 3)), ("gap", (2, 4, 3)), ("auto", (2, 4, 3))]
)
def test_runs_end_where_they_are_told(grid, layout, boundaries, segments):
    parts = layout(1, grids=[grid(("chr1", 0, 2), ("chr1", 5, 4), ("chr2", 0, 3))])
    geometry = ConvGeometry.of(parts, boundaries, 1)
    assert geometry.segments == segments
    assert geometry.boundaries == ("gap" if boundaries == "auto" else boundaries)


def test_bins_that_lie_far_apart_keep_chromosomes_apart_only(grid, layout, caplog):
    scattered = layout(1, grids=[grid(*(("chr1", 3 * i, 1) for i in range(30)), ("chr2", 0, 30))])
    with caplog.at_level(logging.WARNING, logger="epivi"):
        geometry = ConvGeometry.of(scattered, "auto", 5)
    assert geometry.segments == (30, 30)
    assert "60 bins lie in 31 runs" in caplog.text
    # 6 + 6 windows of five bins, or 30 + 6
    assert "from 12 to 36 positions" in caplog.text
    assert "by='windows'" in caplog.text
    caplog.clear()
    assert len(ConvGeometry.of(scattered, "gap", 5).segments) == 31
    assert caplog.text == ""


def test_few_gaps_are_kept_apart_without_a_word(grid, layout, caplog):
    geometry = ConvGeometry.of(layout(1, grids=[grid(("chr1", 0, 40), ("chr1", 50, 40))]), "auto", 5)
    assert geometry.segments == (40, 40)
    assert caplog.text == ""


def test_finer_bins_have_places_inside_the_common_ones(grid, layout):
    coarse = grid(("chr1", 0, 3), ("chr2", 0, 2), size=100, ends={"chr1": 260})
    fine = grid(("chr1", 0, 6), ("chr1", 7, 6), ("chr2", 0, 10), size=20, ends={"chr1": 260})
    geometry = ConvGeometry.of(layout(3, grids=[fine, coarse], of_channel=(0, 1, 0)), "chromosome", 2)
    assert not geometry.is_common
    assert (geometry.lengths, geometry.ratios, geometry.segments) == ((22, 5, 22), (5, 1, 5), (3, 2))
    assert geometry.input_sizes == (25, 5, 25)
    # by hand: start of the fine bin within its chromosome, and the first common bin of the chromosome
    starts = [0, 20, 40, 60, 80, 100, 140, 160, 180, 200, 220, 240, *range(0, 200, 20)]
    common = [*(s // 100 for s in starts[:12]), *(3 + s // 100 for s in starts[12:])]
    slots = [s % 100 // 20 for s in starts]
    inside = np.array([5 * at + slot for at, slot in zip(common, slots, strict=True)])
    assert np.array_equal(geometry.input_positions, [*inside, *range(25, 30), *(inside + 30)])
    rows = np.array([5 * slot + at for at, slot in zip(common, slots, strict=True)])
    # outputs: five phases of channel 0, channel 1, five phases of channel 2, each of the five common bins
    assert np.array_equal(geometry.output_positions, [*rows, *range(25, 30), *(rows + 30)])
    assert len(set(geometry.output_positions.tolist())) == 49


def test_a_channel_may_hold_some_of_the_bins_of_the_others(grid, layout):
    """Of grids of one width, the larger one is common, whatever the order."""
    some, all_bins = grid(("chr1", 2, 3)), grid(("chr1", 0, 9))
    for grids, of_channel in (([some, all_bins], (0, 1)), ([all_bins, some], (1, 0))):
        geometry = ConvGeometry.of(layout(2, grids=grids, of_channel=of_channel), "none", 3)
        assert (geometry.ratios, geometry.input_sizes) == ((1, 1), (9, 9))
        assert geometry.input_positions.tolist() == [2, 3, 4, *range(9, 18)]


@pytest.mark.parametrize("shift", ["width", "offset", "outside"])
def test_bins_that_do_not_nest_point_to_the_model_that_takes_them(grid, layout, shift):
    coarse = grid(("chr1", 0, 5), size=100)
    other = {"width": grid(("chr1", 0, 5), size=30), "outside": grid(("chr3", 0, 5), size=50)}.get(shift)
    if other is None:
        other = grid(("chr1", 0, 9), size=50)
        other = type(other)(other.chrom, other.start + 10, other.end + 10, 50)
    with pytest.raises(DataError, match=r"the bins of 'm1' do not fit: .*FCVAE takes modalities with any bins"):
        ConvGeometry.of(layout(2, grids=[coarse, other], of_channel=(0, 1)), "auto", 3)


def test_gaps_are_weighed_over_all_layers(caplog):
    starts = np.concatenate([np.arange(10) * 10 + 1_000 * run for run in range(200)])
    grid = TrackGrid(np.repeat("chr1", starts.size), starts, starts + 10, 10)
    layout = TrackLayout(("a",), (grid,), (0,))
    assert ConvGeometry.of(layout, "auto", 3).boundaries == "gap"  # 800 positions against 667
    with caplog.at_level("WARNING"):
        deep = ConvGeometry.of(layout, "auto", 3, 3)  # 200 against 75
    assert deep.boundaries == "chromosome"
    assert "from 75 to 200 positions" in caplog.text
