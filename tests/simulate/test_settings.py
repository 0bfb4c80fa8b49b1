from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from epivi._errors import ConfigError
from epivi.simulate import SETTINGS, accessibility, standard


def types_by_batch(adata):
    return pd.crosstab(adata.obs["batch"], adata.obs["cell_type"]).to_numpy().tolist()


def test_the_settings_are_those_of_the_tables():
    totals = {name: np.sum(setting["n_cells"]) for name, setting in SETTINGS.items()}
    assert totals == {
        "S1": 1600,
        "S2": 1800,
        "S3": 2100,
        "S1-chr": 1600,
        "Sim1": 10_000,
        "Sim2": 10_000,
        "Sim3": 20_000,
    }
    assert {name: SETTINGS[name]["median"] for name in ("Sim1", "Sim2", "Sim3")} == {
        "Sim1": 5000,
        "Sim2": 3000,
        "Sim3": (2500, 5000),
    }
    for name in ("Sim1", "Sim2", "Sim3"):
        assert SETTINGS[name]["n_fg"] + SETTINGS[name]["n_bg"] == 90_635


def test_settings_cannot_be_changed():
    with pytest.raises(TypeError):
        SETTINGS["S1"]["median"] = 5


def test_s1_equals_the_default_of_the_simulator():
    direct = accessibility([400, 400, 400, 360, 40], seed=3)
    adata = standard("S1", 3)
    assert (adata.X != direct.X).nnz == 0
    assert adata.obs.equals(direct.obs)


def test_s1_chr_has_22_chromosomes_and_the_same_weights():
    adata = standard("S1-chr", scale=0.1)
    assert adata.var["chrom"].nunique() == 22
    assert adata.varm["bulk"].to_numpy().tolist() == standard("S1", scale=0.1).varm["bulk"].to_numpy().tolist()


def test_batches_of_s3_and_sim3_have_their_own_rare_types():
    adata = standard("S3", scale=0.2)
    assert types_by_batch(adata) == [[70, 70, 60, 10, 0], [70, 70, 60, 0, 10]]
    rare = adata.obs[adata.obs["rare"]]
    assert rare.groupby("batch", observed=True)["cell_type"].unique().explode().tolist() == ["type_3", "type_4"]
    sim3 = standard("Sim3", scale=0.02)
    assert types_by_batch(sim3) == [[50, 50, 50, 50, 2, 0], [50, 50, 50, 50, 0, 2]]


def test_scaling_regions_keeps_the_density():
    arguments = {"scale": 0.05, "log_sd": 0.0}
    wide, narrow = standard("Sim1", region_scale=0.1, **arguments), standard("Sim1", region_scale=0.05, **arguments)
    assert types_by_batch(wide) == [[124, 124, 124, 124, 5]]
    assert wide.n_vars == 2 * narrow.n_vars
    assert abs(wide.X.nnz / np.prod(wide.shape) - narrow.X.nnz / np.prod(narrow.shape)) < 0.002
    assert wide.obs["fragments"].unique().tolist() == [500]
    assert wide.uns["simulation"]["clip"].tolist() == [[100, 2000]]


def test_overrides_are_taken_as_they_are():
    adata = standard("Sim2", scale=0.02, median=333, log_sd=0.0, n_cells=[4, 4])
    assert adata.obs["fragments"].unique().tolist() == [333]
    assert adata.n_obs == 8


def test_a_present_type_keeps_a_cell():
    assert types_by_batch(standard("S3", scale=0.001, region_scale=0.1)) == [[1, 1, 1, 1, 0], [1, 1, 1, 0, 1]]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"name": "Sim9"}, "'Sim9' is not a standard setting. Did you mean 'Sim"),
        ({"name": "S1", "scale": 0}, "scale=0 is not valid"),
        ({"name": "S1", "region_scale": -1}, "region_scale=-1 is not valid"),
        ({"name": "S1", "medain": 5}, "overrides holds the unknown keyword 'medain'. Did you mean 'median'"),
    ],
)
def test_what_is_refused_is_named(arguments, words):
    with pytest.raises(ConfigError, match=words):
        standard(**arguments)
