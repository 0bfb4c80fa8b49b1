from __future__ import annotations

import anndata as ad
import mudata as md
import numpy as np
import pandas as pd
import pytest

from epivi._errors import ConfigError, DataError
from epivi.models.base_setup import ObsKeys, modality_names


@pytest.mark.parametrize(
    ("keys", "error", "message"),
    [
        ({"batch_key": "bacth"}, DataError, r"obs.*'bacth'.*'batch'"),
        ({"labels_key": "none"}, DataError, "none"),
        ({"categorical": ["gap"]}, DataError, r"'gap'.*1 missing values"),
        ({"continuous": ["batch"]}, DataError, "numbers are needed"),
        ({"batch_key": "batch", "categorical": ["batch"]}, ConfigError, "'batch' is used twice"),
        ({"categorical": "batch"}, ConfigError, "must be a list"),
    ],
)
def test_columns_that_cannot_be_used_are_named(keys, error, message):
    obs = pd.DataFrame({"batch": ["a", "b"], "gap": ["a", None]})
    with pytest.raises(error, match=message):
        ObsKeys(**keys).check(obs, where="adata.obs")


def test_columns_that_can_be_used_pass():
    obs = pd.DataFrame({"batch": ["a", "b"], "donor": [1, 2], "age": [1.0, 2.0]})
    keys = ObsKeys(batch_key="batch", categorical=["donor"], continuous=["age"])
    keys.check(obs, where="obs")
    assert keys.used == ["batch", "donor", "age"]


def test_columns_are_read_from_the_mudata_first_and_else_from_the_modality():
    part = ad.AnnData(np.ones((2, 1)))
    mdata = md.MuData({"peaks": part})
    part.obs["batch"] = ["a", "b"]
    assert ObsKeys(batch_key="batch").check_mudata(mdata, "peaks") == "peaks"
    mdata.obs["batch"] = ["c", "c"]
    assert ObsKeys(batch_key="batch").check_mudata(mdata, "peaks") is None
    with pytest.raises(DataError, match=r"mdata\.obs.*'donor'"):
        ObsKeys(batch_key="donor").check_mudata(mdata, "peaks")


def test_keys_are_those_of_the_arguments_of_a_setup():
    arguments = {
        "batch_key": "batch",
        "labels_key": None,
        "categorical_covariate_keys": ["donor"],
        "continuous_covariate_keys": ["age"],
        "layer": "counts",
    }
    expected = ObsKeys(batch_key="batch", categorical=["donor"], continuous=["age"])
    assert ObsKeys.of({"model_name": "M", "setup_args": arguments}) == expected
    assert ObsKeys.of({"setup_args": {}}) == ObsKeys()


@pytest.fixture(scope="module")
def pair():
    parts = {name: ad.AnnData(np.ones((2, 1)), var=pd.DataFrame(index=[name])) for name in ("atac", "gex")}
    return md.MuData(parts)


def test_modalities_are_resolved_by_the_names_given(pair):
    assert modality_names(pair, {"rna": "gex"}, needs_rna=True) == ("atac", "gex")
    assert modality_names(pair, {"rna": "atac", "atac": "gex"}, needs_rna=True) == ("gex", "atac")
    # a query may come without RNA
    assert modality_names(pair, None, needs_rna=False) == ("atac", "rna")


@pytest.mark.parametrize(
    ("modalities", "error", "message"),
    [
        (None, DataError, r"no modality 'rna' for 'rna'.*Name it with modalities=\{'rna': ...\}"),
        ({"atac": "attac", "rna": "gex"}, DataError, "no modality 'attac' for 'atac'. Did you mean 'atac'"),
        ({"rna": "gex", "peaks": "atac"}, ConfigError, "unknown entry 'peaks'"),
        ({"atac": "gex", "rna": "gex"}, ConfigError, "names 'gex' twice"),
        (["atac", "gex"], ConfigError, r"must be a dict .*\(list\)"),
        ("gex", ConfigError, "must be a dict"),
    ],
)
def test_modalities_that_cannot_be_resolved_are_refused(pair, modalities, error, message):
    with pytest.raises(error, match=message):
        modality_names(pair, modalities, needs_rna=True)


def test_the_peaks_are_always_needed(pair):
    with pytest.raises(DataError, match="no modality 'open' for 'atac'"):
        modality_names(pair, {"atac": "open"}, needs_rna=False)
    with pytest.raises(DataError, match=r"takes a MuData, found AnnData\. For an AnnData use setup_anndata"):
        modality_names(pair["atac"], None, needs_rna=False)
