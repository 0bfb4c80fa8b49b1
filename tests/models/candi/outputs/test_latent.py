from __future__ import annotations

import numpy as np
import pytest

from epivi._errors import ConfigError
from epivi.models.candi.outputs.prediction import Predictor


def test_one_row_for_each_window(trained):
    found = trained.get_latent_representation()
    # 480, 320 and 240 bins in windows of 160 that overlap by 32: 4, 3 and 2
    assert found.shape == (5 * (4 + 3 + 2), 16)
    assert list(found.obs.columns) == ["biosample", "chrom", "start", "end"]
    assert found.obs_names.is_unique
    spans = found.obs[(found.obs["biosample"] == "biosample_2") & (found.obs["chrom"] == "chr1")]
    expected = [[0, 144], [144, 272], [272, 400], [400, 480]]
    assert (spans[["start", "end"]] // 25).to_numpy().tolist() == expected
    assert found.obs_names[0] == "biosample_0|chr1:0-3600"


def test_positions_are_those_of_the_windows(trained):
    found = trained.get_latent_representation("chr1", "biosample_1", positions=True)
    assert found.shape == (120, 16)
    assert (found.obs["end"] - found.obs["start"] == 100).all()
    assert found.obs["start"].tolist() == list(range(0, 12_000, 100))
    predictor = Predictor(trained.module, trained.windows(trained.adata))
    starts = np.array([0, 128, 256, 320])
    batch = predictor.read(1, starts)
    z = predictor.encode(batch, np.ones(4, dtype=np.float32))["z"].numpy()
    for window, low, high in ((0, 0, 144), (1, 144, 272), (2, 272, 400), (3, 400, 480)):
        at = slice(low // 4, high // 4)
        inside = slice((low - starts[window]) // 4, (high - starts[window]) // 4)
        np.testing.assert_allclose(found.X[at], z[window, inside], rtol=1e-4, atol=1e-5)


def test_the_latent_of_a_window_is_the_mean_of_its_positions(trained):
    windows = trained.get_latent_representation("chr1", "biosample_1")
    positions = trained.get_latent_representation("chr1", "biosample_1", positions=True)
    for row, (start, end) in enumerate(windows.obs[["start", "end"]].to_numpy()):
        inside = ((positions.obs["start"] >= start) & (positions.obs["end"] <= end)).to_numpy()
        np.testing.assert_allclose(windows.X[row], positions.X[inside].mean(axis=0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("positions", [False, True])
def test_neither_batch_size_nor_order_nor_company_matter(trained, positions):
    expected = trained.get_latent_representation("chr1", positions=positions)
    for size in (1, 3):
        found = trained.get_latent_representation("chr1", positions=positions, batch_size=size)
        assert list(found.obs_names) == list(expected.obs_names)
        np.testing.assert_allclose(found.X, expected.X, rtol=1e-3, atol=1e-5)
    some = trained.get_latent_representation("chr1", ["biosample_3", "biosample_1"], positions=positions)
    np.testing.assert_allclose(some.X, expected[some.obs_names].X, rtol=1e-3, atol=1e-5)


def test_the_region_chooses_positions_and_changes_none(trained):
    whole = trained.get_latent_representation("chr1", "biosample_0", positions=True)
    # inside what windows share: bins 130 to 143
    part = trained.get_latent_representation("chr1:3250-3600", "biosample_0", positions=True)
    assert part.n_obs == 4
    np.testing.assert_allclose(part.X, whole[part.obs_names].X, rtol=1e-3, atol=1e-5)


def test_the_end_of_a_run_that_is_no_multiple_of_a_position(trained, adata, on_bins):
    odd = on_bins(adata, np.r_[0:70, 480:690])
    found = trained.get_latent_representation(None, "biosample_1", positions=True, adata=odd)
    last = found.obs.groupby("chrom", observed=True)["end"].max()
    assert last["chr1"] == 70 * 25
    assert last["chr2"] == 210 * 25
    assert found.obs_names.is_unique


def test_a_region_without_a_position_is_refused(trained):
    with pytest.raises(ConfigError, match="No latent position of 4 bins has its middle in the region"):
        trained.get_latent_representation("chr1:0-25", positions=True)
    with pytest.raises(ConfigError, match="batch_size=0"):
        trained.get_latent_representation("chr1", batch_size=0)
    with pytest.raises(ConfigError, match="There is no biosample 'x'"):
        trained.get_latent_representation("chr1", "x")
