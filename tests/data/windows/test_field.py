from __future__ import annotations

import logging

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import torch
from scvi.data import AnnDataManagerValidationCheck

from epivi._errors import ConfigError, DataError
from epivi.data.sparse import SparseDataManager
from epivi.data.windows import ExperimentKeys, ExperimentsField, Runs, WindowDataset, runs
from epivi.models.base_saving import plain
from epivi.train._encoding import decode, encode

ITEMS = np.array([[0, 0], [2, 41], [4, 60]])
L = 9


def field(**keys):
    return ExperimentsField(ExperimentKeys(**keys))


def batch(adata, state):
    return WindowDataset(adata, state, L)[ITEMS]


def permuted(adata, order, rows=None):
    rows = np.arange(adata.n_obs) if rows is None else rows
    other = ad.AnnData(obs=adata.obs.iloc[rows].copy(), var=adata.var.iloc[order].copy(), uns=dict(adata.uns))
    for key, value in adata.obsm.items():
        other.obsm[key] = value[rows][:, order]
    return other


def test_the_state_holds_statistics_of_the_training_biosamples(adata):
    adata.obs["split"] = ["train", "train", "validation", "train", "test"]
    state = field(split_key="split", validation_chroms=["chr2"], test_chroms=[]).register_field(adata)
    train, available = [0, 1, 3], adata.obsm["availability"]
    assert state["column_names"].tolist() == ["a0", "a1", "a2", "a3"]
    assert state["biosamples"] == {"train": ["b0", "b1", "b3"], "validation": ["b2"], "test": ["b4"]}
    assert [tuple(r) for r in Runs.from_state(state["runs"])] == [tuple(r) for r in runs(adata.uns["bins"])]
    assert (state["validation_chroms"], state["test_chroms"]) == (["chr2"], [])
    assert (state["continuous"], state["categories"]) == (["depth", "read_length"], {"run_type": ["single", "paired"]})
    depth = np.where(available, adata.obsm["depth"], np.nan)[train].astype(float)
    np.testing.assert_allclose(state["depth_ref"], np.nanmedian(depth, axis=0))
    assert state["moments"]["depth"]["mean"] == pytest.approx(np.nanmean(np.log2(depth)))
    assert state["moments"]["depth"]["sd"] == pytest.approx(np.nanstd(np.log2(depth)))
    assert state["moments"]["read_length"] == {"mean": 50.0, "sd": 1.0}
    weight = np.where(available[train], 1, np.nan)
    wanted = np.nanmean(adata.obsm["signal"][train].mean(-1) * weight, axis=0)
    np.testing.assert_allclose(state["statistics"]["mean_signal"], wanted, rtol=1e-5)
    for a in range(4):
        values = adata.obsm["signal"][[b for b in train if available[b, a]], a]
        assert state["statistics"]["sd_signal"][a] == pytest.approx(values.std(), rel=1e-4)
    ratio = np.nan_to_num(depth / state["depth_ref"], nan=1)
    wanted = np.nanmean(adata.obsm["counts"][train].mean(-1) / ratio * weight, axis=0)
    np.testing.assert_allclose(state["statistics"]["mean_counts"], wanted, rtol=1e-6)


def test_states_survive_checkpoints_and_the_manager(adata):
    a = field()
    manager = SparseDataManager(
        fields=[a],
        setup_method_args={"model_name": "M", "setup_args": {}},
        validation_checks=AnnDataManagerValidationCheck(check_fully_paired_mudata=False),
    )
    before = set(adata.obsm)
    manager.register_fields(adata)
    assert set(adata.obsm) == before
    state = manager.registry["field_registries"]["X"]["state_registry"]
    again = decode(encode(plain(state)))
    wanted, found = batch(adata, state), batch(adata, again)
    for key in wanted:
        torch.testing.assert_close(found[key], wanted[key], rtol=0, atol=0, equal_nan=True)
    assert dict(manager.summary_stats) == {
        "n_cells": 5,
        "n_vars": 4,
        "n_continuous_covariates": 2,
        "n_categorical_covariates": 1,
    }
    moved = a.transfer_field(again, adata)
    assert moved["moments"] == state["moments"]
    assert a.view_state_registry(state) is None
    a.validate_field(adata)
    assert len(WindowDataset(adata, moved, L)) == 5


def test_keys_that_are_not_there_are_not_used(make):
    adata = make()
    del adata.obsm["signal"], adata.uns["dna"], adata.uns["categories"], adata.obsm["depth"], adata.obsm["read_length"]
    state = field().register_field(adata)
    assert (state["kinds"], state["has_dna"], state["continuous"], state["categories"]) == (["counts"], False, [], {})
    found = batch(adata, state)
    assert {"signal", "dna", "available_signal"}.isdisjoint(found)
    assert found["continuous"].shape == found["categorical"].shape == (3, 4, 0)
    assert not found["log_depth_ratio"].any()
    assert np.isnan(state["depth_ref"]).all()
    adata = make()
    adata.obsm["availability_signal"] = adata.obsm["availability"].copy()
    adata.obsm["availability_signal"][0, 0] = False
    found = batch(adata, field().register_field(adata))
    assert (found["available_counts"][0, 0], found["available_signal"][0, 0]) == (1, 0)
    assert not found["signal"][0, :, 0].any()


def test_masks_may_be_tables_and_depth_may_be_no_covariate(adata):
    frame = pd.DataFrame(adata.obsm["availability"], index=adata.obs_names, columns=adata.var_names)
    wanted = batch(adata, field(continuous_covariates=[]).register_field(adata))
    adata.obsm["availability"] = frame[["a2", "a0", "a3", "a1"]]
    found = batch(adata, field(continuous_covariates=[]).register_field(adata))
    assert found["continuous"].shape == (3, 4, 0)
    assert found["log_depth_ratio"].abs().sum() > 0
    for key in ("counts", "log_depth_ratio", "available_counts"):
        torch.testing.assert_close(found[key], wanted[key])


def bad(make, change):
    adata = make()
    change(adata)
    return adata


def put(key, at, value, dtype=None):
    def change(adata):
        adata.obsm[key] = adata.obsm[key].astype(dtype or adata.obsm[key].dtype)
        adata.obsm[key][at] = value

    return change


def shape(key, cut):
    return lambda adata: adata.obsm.__setitem__(key, adata.obsm[key][cut])


REFUSED = [
    ({}, shape("counts", np.s_[:, :, :70]), r"obsm\['counts'\] has the shape \(5, 4, 70\), needed is \(5, 4, 72\) ="),
    ({}, shape("signal", np.s_[:, :3]), r"obsm\['signal'\] has the shape \(5, 3, 72\), needed is \(5, 4, 72\) = \(bio"),
    (
        {},
        put("counts", (2, 1, 45), -1, "int32"),
        r"obsm\['counts'\] is -1 for biosample 'b2', assay 'a1', bin 45 \(chr1",
    ),
    ({}, put("counts", (2, 1, 45), 0.5, "float32"), r"is 0.5 for .*\(chr1:325-330\). Whole numbers of reads"),
    (
        {},
        put("counts", (2, 1, 71), np.nan, "float32"),
        r"is nan for .*bin 71 \(chr2:130-135\). Mark.*without reads with 0",
    ),
    ({}, put("counts", (0, 0, 0), np.inf, "float32"), "is inf for biosample 'b0', assay 'a0', bin 0"),
    ({}, put("signal", (4, 2, 3), np.nan), r"obsm\['signal'\] is nan .*'b4', assay 'a2', bin 3 .*uncovered='zero'"),
    ({}, put("signal", (4, 2, 3), -np.inf), "is -inf .*Values must be finite: clip them"),
    ({}, put("counts", 0, 0, "bool"), "has dtype bool, numbers are needed. Convert it with .astype.'uint16'"),
    (
        {},
        put("signal", 0, 0, "complex64"),
        "has dtype complex64, numbers are needed. Convert it with .astype.'float32'",
    ),
    ({}, put("availability", [1, 3], False), "2 of 5 biosamples of adata have no available assay: 'b1', 'b3'"),
    ({}, put("availability", (0, 0), 2, "int8"), r"\['availability'\] \(int8\) holds other values than True and False"),
    ({}, shape("availability", np.s_[:, :3]), r"\['availability'\] has the shape \(5, 3\), needed is \(5, 4\)"),
    ({}, lambda a: a.obsm.__delitem__("availability"), "adata.obsm has no entry 'availability'"),
    ({}, lambda a: a.uns.__delitem__("bins"), "adata.uns has no entry 'bins'"),
    ({"counts_key": "reads"}, lambda _: None, "adata.obsm has no entry 'reads'"),
    ({"signal_key": None}, lambda a: a.obsm.__delitem__("counts"), "neither counts nor signal: no entry 'counts'"),
    ({}, put("depth", (0, 0), 0), r"obsm\['depth'\] is 0 for biosample 'b0', assay 'a0'; 1 such values. A depth is"),
    ({}, put("depth", (0, 0), np.inf), "is inf for biosample 'b0'.*Give a number, or NaN where unknown"),
    ({}, put("run_type", (0, 0), 2), "is 2 for biosample 'b0', assay 'a0'; 1 such values. Codes go from 0 to 1"),
    ({"split_key": "s"}, lambda _: None, "adata.obs has no entry 's'"),
    (
        {"split_key": "s"},
        lambda a: a.obs.__setitem__("s", ["train"] * 4 + ["x"]),
        r"obs\['s'\] is 'x' for biosample 'b4'",
    ),
    ({"split_key": "s"}, lambda a: a.obs.__setitem__("s", ["test"] * 5), r"obs\['s'\] names no biosample for training"),
    ({}, lambda a: setattr(a, "var_names", ["a", "a", "b", "c"]), "var_names are not unique: 'a' occurs"),
    ({"validation_chroms": ["chr9"]}, lambda _: None, "validation_chroms names 'chr9', which has no bin"),
]


@pytest.mark.parametrize(("keys", "change", "message"), REFUSED)
@pytest.mark.filterwarnings("ignore:Variable names are not unique")
def test_refused_inputs(make, keys, change, message):
    with pytest.raises((DataError, ConfigError), match=message):
        field(**keys).register_field(bad(make, change))


def test_views_and_strangers_are_refused(adata):
    with pytest.raises(DataError, match="adata is a view of another object"):
        field().register_field(adata[:2])
    with pytest.raises(DataError, match="an AnnData is needed"):
        field().register_field(np.ones(3))


def test_unusual_inputs_are_mentioned(adata, caplog):
    adata.obs["split"] = ["test", "test", "train", "train", "train"]
    adata.obsm["availability"][2:, 1] = False
    adata.obsm["availability"][0] = [True, False, False, False]
    adata.obsm["run_type"][:] = 0
    with caplog.at_level(logging.WARNING, logger="epivi"):
        field(split_key="split").register_field(adata)
    assert "1 biosamples of adata have one available assay: 'b0'" in caplog.text
    assert "No training biosample of adata has 'a1'" in caplog.text
    assert len(caplog.records) == 2


def test_queries_are_matched_by_name(make, caplog):
    adata = make()
    a = field()
    state = a.register_field(adata)
    wanted = batch(adata, state)
    order = np.array([2, 0, 3, 1])
    with caplog.at_level(logging.INFO, logger="epivi"):
        found = batch(query := permuted(adata, order), a.transfer_field(state, query))
    assert "not in the order of training: they are matched by name" in caplog.text
    for key in wanted:
        torch.testing.assert_close(found[key], wanted[key], rtol=0, atol=0, equal_nan=True)
    query = permuted(adata, np.array([3, 1]), rows=np.array([4, 2, 0]))
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="epivi"):
        moved = a.transfer_field(state, query)
    assert "adata lacks the assays 'a0', 'a2': they count as unavailable" in caplog.text
    found = WindowDataset(query, moved, L)[[[2, 0], [1, 41], [0, 60]]]
    for key in ("counts", "signal", "available_counts", "log_depth_ratio"):
        torch.testing.assert_close(found[key][..., [1, 3]], wanted[key][..., [1, 3]])
        assert not found[key][..., [0, 2]].any()
    assert found["continuous"][:, [0, 2]].isnan().all()
    assert (found["categorical"][:, [0, 2]] == -1).all()
    assert moved["moments"] == state["moments"]


def test_queries_may_lie_elsewhere_and_lack_much(make, caplog):
    adata = make()
    a = field(dna_key=None)
    state = a.register_field(adata)
    query = make(1)
    query.uns["bins"] = query.uns["bins"].assign(chrom="scaffold").iloc[:40]
    query.obsm["counts"] = query.obsm["counts"][:, :, :40]
    del query.obsm["signal"], query.obsm["depth"], query.obsm["run_type"]
    with caplog.at_level(logging.WARNING, logger="epivi"):
        moved = a.transfer_field(state, query)
    assert "adata has no signal: it counts as unavailable" in caplog.text
    assert "adata lacks the covariates 'depth', 'run_type': they count as unknown" in caplog.text
    found = WindowDataset(query, moved, L)[[[0, 35]]]
    assert found["bin_mask"].sum() == 5
    assert not found["signal"].any()
    assert not found["available_signal"].any()
    assert found["continuous"][..., 0].isnan().all()
    assert not found["log_depth_ratio"].any()


def retyped(adata, levels):
    adata.uns["categories"] = {"run_type": np.array(levels)}


TRANSFERS = [
    (
        lambda q: setattr(q, "var_names", ["a0", "a1", "x", "y"]),
        "has the assays 'x', 'y', unknown to the trained model",
    ),
    (lambda q: q.uns.__setitem__("bins", q.uns["bins"].assign(end=q.uns["bins"]["start"] + 4)), "4 bp wide, .* 5 bp"),
    (lambda q: q.uns.__setitem__("signal_transform", "identity"), "is 'identity', the model was trained on 'arcsinh'"),
    (lambda q: q.uns.__delitem__("dna"), "The model was trained with DNA, and adata has none"),
    (
        lambda q: retyped(q, ["single", "long"]),
        r"obsm\['run_type'\] has the categories 'long', which no training.*unseen=",
    ),
    (put("counts", (0, 0, 3), -1, "int64"), "is -1 for biosample 'b0'"),
]


@pytest.mark.parametrize(("change", "message"), TRANSFERS)
def test_queries_that_do_not_fit_are_refused(make, change, message):
    state = field().register_field(make())
    with pytest.raises(DataError, match=message):
        field().transfer_field(state, bad(make, change))


def test_levels_are_matched_by_name_and_unseen_ones_may_be_unknown(make, caplog):
    adata = make()
    state = field().register_field(adata)
    query = make()
    retyped(query, ["long", "paired", "single"])
    available = query.obsm["availability"]
    codes = query.obsm["run_type"].copy()
    query.obsm["run_type"] = np.where(codes == 0, 2, 1).astype(np.int8)
    moved = field().transfer_field(state, query)
    np.testing.assert_array_equal(moved["experiments"]["categorical"][..., 0], np.where(available, codes, -1))
    query.obsm["run_type"][0, 0] = 0
    with caplog.at_level(logging.WARNING, logger="epivi"):
        moved = field(unseen="unknown").transfer_field(state, query)
    assert "the categories 'long' of 'run_type' count as unknown" in caplog.text
    assert moved["experiments"]["categorical"][0, 0, 0] == -1
    # a level that only a held-out biosample has was not learned either
    adata.obs["split"] = ["test", "train", "train", "train", "train"]
    adata.obsm["run_type"][:] = 1
    adata.obsm["run_type"][0] = 0
    with pytest.raises(DataError, match="has the categories 'single', which no training experiment has"):
        field(split_key="split").register_field(adata)
