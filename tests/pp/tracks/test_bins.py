"""The choice of bins, against hand-made cases and a brute-force choice."""

from __future__ import annotations

import logging

import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp
from anndata import AnnData
from mudata import MuData

from epivi._errors import ConfigError, DataError
from epivi.pp import select_bins, stack_tracks

pytestmark = pytest.mark.filterwarnings("ignore:.*option is deprecated:DeprecationWarning")


def bins(n, chrom=None, start=None):
    start = np.arange(n) * 10 if start is None else np.asarray(start)
    return pd.DataFrame({"chrom": chrom or ["chr1"] * n, "start": start, "end": start + 10})


def container(sums, table=None):
    """Two cells a modality, whose counts sum to the given numbers; the second cell of each is its own."""
    parts = {}
    for i, sums_l in enumerate(np.asarray(sums)):
        table = bins(len(sums_l)) if table is None else table
        counts = sp.csr_matrix(np.stack([sums_l // 2, sums_l - sums_l // 2]))
        var = table.set_axis([f"m{i}:{name}" for name in range(len(table))])
        parts[f"m{i}"] = AnnData(counts, obs=pd.DataFrame(index=["a", f"b{i}"]), var=var)
    return MuData(parts)


def chosen(sums, n_bins, table=None, **options):
    """Return the chosen bins, which must be the same for all kinds of data."""
    mdata = container(sums, table)
    found = select_bins(mdata, n_bins, **options)
    starts = [part.var[["chrom", "start"]].apply(tuple, axis=1).tolist() for part in found.mod.values()]
    assert all(entry == starts[0] for entry in starts)
    for dense in (False, True):
        tracks = select_bins(stack_tracks(mdata, dense=dense), n_bins, **options)
        wanted = stack_tracks(found, dense=dense)
        x, y = (data.obsm["tracks"] for data in (tracks, wanted))
        np.testing.assert_array_equal(x if dense else x.toarray(), y if dense else y.toarray())
        pd.testing.assert_frame_equal(tracks.uns["tracks"]["bins"], wanted.uns["tracks"]["bins"])
        assert list(tracks.uns["tracks"]["channels"]) == list(wanted.uns["tracks"]["channels"])
        assert tracks.obs_names.tolist() == mdata.obs_names.tolist()
    whole = container(sums, table)["m0"].var[["chrom", "start"]].apply(tuple, axis=1).tolist()
    return [whole.index(entry) for entry in starts[0]]


def test_rank_takes_the_best_of_each_modality_and_sum_does_not():
    sums = [[900, 800, 700, 600, 5], [1, 2, 3, 4, 50]]
    assert chosen(sums, 2) == [0, 4]
    assert chosen(sums, 2, by="sum") == [0, 1]
    # ranks: 1 2 3 4 5 and 5 4 3 2 1; best ranks 1 2 3 2 1; bins 1 and 3 have equal means, so the position decides
    assert chosen(sums, 3) == [0, 1, 4]
    # among equal best ranks the mean rank decides: bin 3 is second in both
    assert chosen([[900, 800, 700, 850, 5], [1, 2, 3, 4, 50]], 3) == [0, 3, 4]


def test_equal_counts_share_a_rank():
    assert chosen([[5, 7, 7, 0], [9, 1, 1, 0]], 2) == [1, 2]
    assert chosen([[3, 3, 3, 3], [1, 1, 1, 2]], 1) == [3]


@pytest.mark.parametrize("by", ["rank", "sum"])
def test_order_of_modalities_does_not_matter(by):
    sums = np.random.default_rng(0).poisson(20, (3, 40)) + 1
    assert chosen(sums, 11, by=by) == chosen(sums[::-1], 11, by=by)
    assert len(chosen(sums, 11, by=by)) == 11


def test_rank_does_not_depend_on_depth():
    sums = np.random.default_rng(1).poisson(20, (2, 40)) + 1
    assert chosen(sums, 9) == chosen(sums * np.array([[7], [1]]), 9)


def test_windows():
    sums = [[1, 9, 9, 1, 0, 8, 8, 0, 0, 0]]
    assert chosen(sums, 4, by="windows", window=2) == [1, 2, 5, 6]
    assert chosen(sums, 5, by="windows", window=2) == [1, 2, 5, 6]
    assert chosen(sums, 3, by="windows", window=3) == [0, 1, 2]
    # a gap and the end of a chromosome break windows
    gap = bins(10, start=[0, 10, 30, 40, 50, 60, 70, 80, 90, 100])
    assert chosen(sums, 2, gap, by="windows", window=2) == [5, 6]
    ends = bins(10, ["chr1"] * 6 + ["chr2"] * 4)
    assert chosen(sums, 4, ends, by="windows", window=2) == [1, 2, 4, 5]


def test_windows_weigh_modalities_alike():
    sums = [[1000, 1000, 990, 990, 1, 0], [0, 0, 0, 0, 1, 1]]
    assert chosen(sums, 2, by="windows", window=2) == [4, 5]


def test_windows_equal_a_brute_force_choice():
    rng = np.random.default_rng(3)
    for _ in range(20):
        sums = rng.poisson(3, (2, 30)) + 1
        table = bins(30, start=np.cumsum(rng.choice([10, 10, 10, 25], 30)))
        share = (sums / sums.sum(axis=1, keepdims=True)).sum(axis=0)
        taken = np.zeros(30, dtype=bool)
        start = table["start"].to_numpy()
        for _ in range(9 // 3):
            best, best_at = 0.0, -1
            for at in range(28):
                whole = start[at + 2] - start[at] == 20
                if whole and not taken[at : at + 3].any() and share[at : at + 3].sum() > best + 1e-11:
                    best, best_at = share[at : at + 3].sum(), at
            if best_at >= 0:
                taken[best_at : best_at + 3] = True
        if not taken.any():
            continue
        assert chosen(sums, 9, table, by="windows", window=3) == np.flatnonzero(taken).tolist()


def test_all_and_too_few(caplog):
    sums = np.ones((2, 6), dtype=int)
    assert chosen(sums, 2, by="all") == list(range(6))
    with caplog.at_level(logging.INFO, logger="epivi.pp.tracks.bins"):
        assert chosen(sums, 25_000) == list(range(6))
    assert "There are 6 bins, not more than n_bins=25000: all are kept" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="epivi.pp.tracks.bins"):
        assert chosen(sums, 25_000, by="windows", window=4) == [0, 1, 2, 3]
    assert "1 of 6250 windows of 4 bins were found" in caplog.text


def test_one_modality_and_input_left_alone():
    adata = container([[5, 1, 9, 4]])["m0"]
    found = select_bins(adata, 2)
    assert found.var["start"].tolist() == [0, 20]
    assert adata.n_vars == 4
    assert not found.is_view


def test_mudata_keeps_what_is_not_chosen():
    mdata = container([[5, 1, 9, 4], [1, 2, 3, 4]])
    rna = AnnData(np.ones((2, 3)), obs=pd.DataFrame(index=["z", "a"]), var=pd.DataFrame(index=["g1", "g2", "g3"]))
    mdata = MuData({"rna": rna, **mdata.mod})
    mdata = mdata[["b1", "a", "z", "b0"]].copy()
    mdata.obs["batch"] = ["p", "q", "q", "p"]
    mdata.obsm["X_pca"] = np.arange(8.0).reshape(4, 2)
    mdata.uns["note"] = "kept"
    found = select_bins(mdata, 2, modalities=["m0", "m1"])
    assert found["rna"].n_vars == 3
    assert found["m0"].var["start"].tolist() == found["m1"].var["start"].tolist() == [20, 30]
    assert found.obs_names.tolist() == ["b1", "a", "z", "b0"]
    assert found.obs["batch"].tolist() == ["p", "q", "q", "p"]
    np.testing.assert_array_equal(found.obsm["X_pca"], mdata.obsm["X_pca"])
    assert found.uns["note"] == "kept"
    assert mdata["m0"].n_vars == 4
    with pytest.raises(DataError, match=r"mdata\['rna'\] has no positions"):
        select_bins(mdata, 2)


@pytest.mark.parametrize("dense", [False, True])
def test_counts_of_cells_that_were_not_measured_do_not_count(dense):
    adata = stack_tracks(container([[5, 1, 9, 4], [1, 2, 3, 4]]), dense=dense)
    x = adata.obsm["tracks"].copy() if dense else adata.obsm["tracks"].tolil()
    hidden = int(np.flatnonzero(~adata.obsm["tracks_mask"][:, 0])[0])
    if dense:
        x[hidden, 0, 1] = 200
    else:
        x[hidden, 1] = 200
    adata.obsm["tracks"] = x if dense else x.tocsr()
    assert select_bins(adata, 1, by="sum").uns["tracks"]["bins"]["start"].tolist() == [20]
    del adata.obsm["tracks_mask"]
    assert select_bins(adata, 1, by="sum").uns["tracks"]["bins"]["start"].tolist() == [10]


def test_refusals():
    mdata = container([[5, 1, 9, 4], [1, 2, 3, 4]])
    with pytest.raises(ConfigError, match="n_bins=0"):
        select_bins(mdata, 0)
    with pytest.raises(ConfigError, match="window=0"):
        select_bins(mdata, window=0)
    with pytest.raises(ConfigError, match="by='best' is not valid"):
        select_bins(mdata, by="best")
    with pytest.raises(ConfigError, match="window=3 exceeds n_bins=2: no window could be kept"):
        select_bins(mdata, 2, by="windows", window=3)
    with pytest.raises(DataError, match=r"No 5 bins that follow one another.*longest stretch has 4"):
        select_bins(mdata, 9, by="windows", window=5)
    with pytest.raises(DataError, match="an AnnData is needed"):
        select_bins(np.ones((2, 2)))
    broken = mdata["m0"].copy()
    broken.X = broken.X * 0.3
    with pytest.raises(DataError, match="not a whole number"):
        select_bins(broken)


def test_tracks_that_do_not_fit_their_description():
    adata = stack_tracks(container([[5, 1, 9, 4], [1, 2, 3, 4]]))
    for dense in (np.ones((3, 2, 3)), np.ones((3, 8)), sp.csr_matrix(np.ones((3, 6)))):
        adata.obsm["tracks"] = dense
        with pytest.raises(DataError, match=r"does not fit the 2 channels and 4 bins of adata.uns\['tracks'\]"):
            select_bins(adata, 2)
    del adata.uns["tracks"]["bins"]
    with pytest.raises(DataError, match="has no entry 'bins'"):
        select_bins(adata, 2)
    del adata.uns["tracks"]
    with pytest.raises(DataError, match="has no entry 'tracks'"):
        select_bins(adata, 2)
