"""A setup that is refused late, after fields have written, leaves the user's object as it was."""

from __future__ import annotations

import mudata as md
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

import epivi
from epivi._errors import DataError
from epivi.data import restore


def bits(value):
    return value.toarray().tobytes() if sparse.issparse(value) else np.asarray(value).tobytes()


def everything(data):
    """Tables, entries of obsm and keys of uns, of the object and of its modalities."""
    parts = {"": data} | (dict(data.mod) if isinstance(data, md.MuData) else {})
    return {
        name: (part.obs.copy(), {key: bits(value) for key, value in part.obsm.items()}, set(part.uns))
        for name, part in parts.items()
    }


def same(before, after):
    for name, (obs, obsm, uns) in before.items():
        pd.testing.assert_frame_equal(after[name][0], obs)
        assert (after[name][1], after[name][2]) == (obsm, uns)


def bad_depth(adata):
    adata.obs.iloc[3, adata.obs.columns.get_loc("depth")] = -1.0
    return adata


def no_reference(mdata):
    mdata.mod["rna"].obsm["X_pca"][:] = np.nan
    return mdata


def logs(mdata):
    mdata.mod["rna"].X = mdata.mod["rna"].X.log1p()
    return mdata


def only_nan(adata):
    adata.obsm["X_ref"][:] = np.nan
    return adata


def empty(adata):
    adata.obsm["tracks"] = adata.obsm["tracks"] * 0
    return adata


def empty_modalities(mdata):
    for part in mdata.mod.values():
        part.X = part.X * 0
    return mdata


# model, data, change, arguments of the setup, words of the error
CASES = {
    "SAILER: depth": ("SAILER", "peaks", bad_depth, {"depth_key": "depth"}, "depth"),
    "SAILERX: reference": ("SAILERX", "multiome", no_reference, {"reference_key": "X_pca"}, "reference"),
    "SAILERX: RNA counts": ("SAILERX", "multiome", logs, {}, "not a whole number"),
    "SAILERX: AnnData": ("SAILERX", "peaks", only_nan, {"reference_key": "X_ref"}, "reference"),
    "ConvNetVAE: counts": ("ConvNetVAE", "tracks", empty, {}, "no measured count above zero"),
    "ConvNetVAE: MuData": ("ConvNetVAE", "tracks_mudata", empty_modalities, {}, "no measured count above zero"),
    "FCVAE: counts": ("FCVAE", "tracks", empty, {}, "no measured count above zero"),
    "FCVAE: MuData": ("FCVAE", "tracks_mudata", empty_modalities, {}, "no measured count above zero"),
}


def set_up(model, data, **setup):
    cls = getattr(epivi, model)
    (cls.setup_mudata if isinstance(data, md.MuData) else cls.setup_anndata)(data, **setup)


@pytest.fixture
def make(make_peaks, make_multiome, make_tracks, make_tracks_mudata):
    makers = {"peaks": make_peaks, "multiome": make_multiome, "tracks": make_tracks}
    return lambda kind: (makers | {"tracks_mudata": make_tracks_mudata})[kind]()


@pytest.fixture
def wrote(monkeypatch):
    """Names of what fields had written when the object was put back."""
    seen, put_back = [], restore._restore

    def look(before):
        seen.extend([*before.holder.obs, *before.holder.obsm])
        put_back(before)

    monkeypatch.setattr(restore, "_restore", look)
    return seen


@pytest.mark.parametrize("is_set_up", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_a_refused_setup_leaves_the_object_as_it_was(name, is_set_up, make, wrote):
    model, kind, change, setup, words = CASES[name]
    data = make(kind)
    if is_set_up:
        # what an earlier model reads must stay too
        first = {key: value for key, value in setup.items() if key != "depth_key"}
        set_up(model, data, labels_key="cell_type", **first)
    data = change(data)
    before = everything(data)
    with pytest.raises(DataError, match=words):
        set_up(model, data, batch_key="batch", **setup)
    same(before, everything(data))
    # else the case would show nothing
    assert any(str(key).startswith("_epivi_") for key in wrote)


@pytest.mark.parametrize(("model", "kind"), [("SAILER", "peaks"), ("SAILERX", "multiome"), ("ConvNetVAE", "tracks")])
def test_other_data_that_are_refused_stay_as_they_were(model, kind, make):
    data = make(kind)
    set_up(model, data, batch_key="batch", categorical_covariate_keys=["donor"])
    built = getattr(epivi, model)(data, n_latent=2, seed=0)
    built.is_trained_ = True
    other = make(kind)
    other.obs["donor"] = "d7"
    before = everything(other)
    with pytest.raises(DataError, match=r"obs\['donor'\] holds \['d7'\], unknown .* which has \['d0', 'd1'\]"):
        built.get_latent_representation(other)
    same(before, everything(other))
