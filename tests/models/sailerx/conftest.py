from __future__ import annotations

import pytest

import epivi

SMALL = {"n_latent": 4, "n_hidden": (12, 8), "seed": 1, "min_reference_per_batch": 4}


@pytest.fixture
def make_x(mdata):
    """Build a small SAILERX on a MuData of its own, or on that given."""

    def build(data=None, *, setup=None, **kwargs):
        data = mdata if data is None else data
        epivi.SAILERX.setup_mudata(data, **(setup or {}))
        return epivi.SAILERX(data, **(SMALL | kwargs))

    return build


@pytest.fixture(scope="session")
def small():
    return SMALL


@pytest.fixture(scope="session")
def atac_only():
    """A copy of a MuData without its RNA, in the order of ``mdata.obs_names``."""
    from mudata import MuData

    def build(mdata, rows=slice(None)):
        atac = mdata["atac"][mdata.obs_names[rows]].copy()
        return MuData({"atac": atac})

    return build
