from __future__ import annotations

import anndata as ad
import mudata as md
import numpy as np
import pandas as pd
import pytest

from epivi.data.restore import restored_on_error


def anndata():
    obs = pd.DataFrame({"kept": ["x", "y"], "depth": [1.0, 2.0]}, index=["c1", "c2"])
    return ad.AnnData(np.ones((2, 3)), obs=obs, obsm={"X_pca": np.arange(4.0).reshape(2, 2)})


def write(data):
    """What a field may do: new columns and entries, and others in the place of old ones."""
    data.obs["_epivi_new"] = [3.0, 4.0]
    data.obs["depth"] = [5.0, 6.0]
    data.obs["kept"] = data.obs["kept"].astype("category")
    data.obsm["_epivi_new"] = np.zeros((2, 1))
    data.obsm["X_pca"] = np.zeros((2, 2))


def refuse(data, holders, error):
    with restored_on_error(data):
        for holder in holders:
            write(holder)
        raise error


def check_as_before(data, obs, array):
    assert list(data.obs) == list(obs)
    pd.testing.assert_frame_equal(data.obs, obs)
    assert data.obsm["X_pca"] is array
    assert "_epivi_new" not in data.obsm


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_anndata_is_as_before(error):
    adata = anndata()
    table, obs, array = adata.obs, adata.obs.copy(), adata.obsm["X_pca"]
    with pytest.raises(error):
        refuse(adata, [adata], error)
    check_as_before(adata, obs, array)
    # who holds the table sees the same
    assert adata.obs is table


def test_a_mudata_is_as_before_with_its_modalities():
    mdata = md.MuData(
        {
            "a": anndata(),
            "b": ad.AnnData(np.ones((1, 1)), obs=pd.DataFrame(index=["c2"]), var=pd.DataFrame(index=["g"])),
        }
    )
    mdata.obs["depth"], mdata.obs["kept"] = [1.0, 2.0], ["x", "y"]
    mdata.obsm["X_pca"] = np.ones((2, 2))
    holders = [mdata, mdata.mod["a"]]
    before = [(holder.obs.copy(), holder.obsm["X_pca"]) for holder in holders]
    members = {name: mdata.obsm[name].copy() for name in "ab"}
    mdata.mod["b"].obs["_epivi_new"] = 1.0
    with pytest.raises(ValueError, match="late"):
        refuse(mdata, holders, ValueError("late"))
    for holder, (obs, array) in zip(holders, before, strict=True):
        check_as_before(holder, obs, array)
    assert list(mdata.mod["b"].obs) == ["_epivi_new"]
    assert all(np.array_equal(mdata.obsm[name], members[name]) for name in "ab")


def test_without_an_error_everything_that_was_written_stays():
    adata = anndata()
    with restored_on_error(adata):
        write(adata)
    assert adata.obs["depth"].tolist() == [5.0, 6.0]
    assert {"_epivi_new"} <= set(adata.obs) & set(adata.obsm)


@pytest.mark.parametrize("make", [lambda: anndata()[:1], lambda: anndata().obs, lambda: "cells.h5ad", lambda: None])
def test_views_and_other_things_are_left_alone(make):
    data = make()
    with pytest.raises(ValueError, match="late"):
        refuse(data, [], ValueError("late"))
    assert getattr(data, "is_view", True)
