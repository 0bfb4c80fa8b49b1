from __future__ import annotations

import copy

import numpy as np
import pandas as pd
import pytest
import torch

import epivi
from epivi._errors import ConfigError
from epivi.models.base_saving import plain
from epivi.models.epifoundation.outputs import expression


@pytest.mark.parametrize("which", ["pretrained", "expressive"])
def test_predictions_are_those_of_the_network(request, which):
    model = request.getfixturevalue(which)
    z = torch.from_numpy(model.get_latent_representation())
    with torch.no_grad():
        outputs = model.module.generative(z)["genes"].numpy()
    odds = outputs[:, :, -1] - outputs[:, :, 0]
    expected = outputs[:, :, 0] if which == "expressive" else 1 / (1 + np.exp(-odds))
    table = model.get_normalized_expression()
    np.testing.assert_allclose(table, expected, rtol=1e-5, atol=1e-6)
    assert list(table.columns) == model.gene_names.tolist()
    assert list(table.index) == list(model.adata.obs_names)
    assert table.to_numpy().dtype == np.float32


@pytest.mark.parametrize("which", ["pretrained", "expressive"])
def test_genes_come_in_the_order_asked_and_in_blocks(request, monkeypatch, which):
    model = request.getfixturevalue(which)
    whole = model.get_normalized_expression()
    genes = model.gene_names
    backwards = model.get_normalized_expression(gene_list=genes[::-1])
    assert list(backwards.columns) == genes[::-1].tolist()
    pd.testing.assert_frame_equal(backwards[genes], whole, rtol=1e-5)
    some = ["gene_13", "gene_2", "gene_2"]
    pd.testing.assert_frame_equal(model.get_normalized_expression(gene_list=some), whole[some], rtol=1e-5)
    pd.testing.assert_frame_equal(model.get_normalized_expression(gene_list="gene_4"), whole[["gene_4"]], rtol=1e-5)
    monkeypatch.setattr(expression, "GENES_AT_ONCE", 3)
    pd.testing.assert_frame_equal(model.get_normalized_expression(), whole, rtol=1e-5)


def test_cells_come_in_the_order_asked(pretrained):
    whole = pretrained.get_normalized_expression()
    rows = [40, 3, 17]
    found = pretrained.get_normalized_expression(indices=rows, batch_size=2)
    pd.testing.assert_frame_equal(found, whole.iloc[rows], rtol=1e-5)
    bare = pretrained.get_normalized_expression(return_numpy=True)
    np.testing.assert_array_equal(bare, whole.to_numpy())
    pd.testing.assert_frame_equal(pretrained.predict_expression(indices=rows), whole.iloc[rows], rtol=1e-5)


def test_no_rna_is_read(expressive, simulated):
    whole = expressive.get_normalized_expression()
    pd.testing.assert_frame_equal(expressive.get_normalized_expression(simulated["atac"].copy()), whole)
    other = simulated.copy()
    other.mod["rna"].X = other["rna"].X * 5
    pd.testing.assert_frame_equal(expressive.get_normalized_expression(other), whole)


def test_the_decoder_is_told_the_batch_asked_for(pretrained):
    z = torch.from_numpy(pretrained.get_latent_representation())
    found = {name: pretrained.get_normalized_expression(transform_batch=name) for name in ("batch_0", "batch_1")}
    for code, table in enumerate(found.values()):
        with torch.no_grad():
            outputs = pretrained.module.generative(z, None, torch.full((60, 1), code))["genes"]
        np.testing.assert_allclose(table, outputs.softmax(2)[:, :, 1].numpy(), rtol=1e-5, atol=1e-6)
    assert np.abs(found["batch_0"] - found["batch_1"]).max(axis=None) > 1e-4


def test_a_tuned_model_is_told_no_batch(simulated, pretrained, tune):
    tuned = tune(pretrained, "expression", simulated.copy(), batch_key="batch")
    assert tuned.module.batches is None
    whole = tuned.get_normalized_expression()
    pd.testing.assert_frame_equal(tuned.get_normalized_expression(transform_batch="batch_1"), whole)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"gene_list": ["gene_1", "gene_l"]}, "1 genes are not the model's, first 'gene_l'. Did you mean 'gene_"),
        ({"gene_list": "foo"}, "1 genes are not the model's, first 'foo'"),
        ({"transform_batch": "batch_2"}, "transform_batch='batch_2' is no batch of the model.*batch_"),
    ],
)
def test_names_that_are_unknown_are_refused(pretrained, options, match):
    with pytest.raises(ConfigError, match=match):
        pretrained.get_normalized_expression(**options)


def test_models_that_predict_no_expression_say_so(annotated, simulated, make, learn):
    with pytest.raises(ConfigError, match="The model is for annotation and predicts none"):
        annotated.get_normalized_expression()
    with pytest.raises(ConfigError, match="The model was set up without expression"):
        learn(make(simulated["atac"].copy())).get_normalized_expression()


def test_levels_are_predicted_on_their_scale(pretrained, simulated, tune):
    tuned = tune(
        pretrained,
        "expression",
        simulated.copy(),
        model_kwargs={"expression_target": "level", "n_levels": 5},
        max_epochs=25,
        lr=1e-2,
        early_stopping=False,
    )
    found = tuned.get_normalized_expression().to_numpy()
    y = simulated["rna"].X.toarray()
    levels = np.zeros(y.shape)
    for cell, row in enumerate(y):
        values = np.log1p(1e4 * row[row > 0] / row.sum())
        levels[cell, row > 0] = (np.quantile(values, np.linspace(0, 1, 4)) <= values[:, None]).sum(1)
    # on average as large as the levels, and nearer to them than their mean
    assert found.mean() == pytest.approx(levels.mean(), rel=0.25)
    assert ((found - levels) ** 2).mean() < ((levels - levels.mean()) ** 2).mean()


def test_genes_are_read_off_the_peaks_near_them_too(near, simulated):
    whole = near.get_normalized_expression()
    local, x = near.module.local, (simulated["atac"].X.toarray() > 0).astype(float)
    weight, mean = np.zeros((80, 20)), np.zeros((80, 20))
    weight[local.peak, local.gene] = local.weight.detach()
    mean[local.peak, local.gene] = local.mean
    without = copy_without(near).get_normalized_expression()
    expected = (x @ weight - (weight * mean).sum(0)) * near.module.gene_sd.numpy()
    np.testing.assert_allclose(whole - without, expected, rtol=1e-4, atol=1e-4)
    assert np.abs(expected).max() > 0.1


def copy_without(model):
    """The same model, whose local readout adds nothing."""
    model = copy.copy(model)
    model.module = copy.deepcopy(model.module)
    model.module.local.is_used.fill_(0.0)
    return model


def test_some_genes_read_off_near_peaks_are_those_of_all(near, monkeypatch):
    whole = near.get_normalized_expression()
    some = ["gene_13", "gene_2", "gene_19"]
    pd.testing.assert_frame_equal(near.get_normalized_expression(gene_list=some), whole[some], rtol=1e-4, atol=1e-5)
    rows = [40, 3, 17]
    found = near.get_normalized_expression(indices=rows, batch_size=2)
    pd.testing.assert_frame_equal(found, whole.iloc[rows], rtol=1e-4, atol=1e-5)
    monkeypatch.setattr(expression, "GENES_AT_ONCE", 3)
    pd.testing.assert_frame_equal(near.get_normalized_expression(), whole, rtol=1e-4, atol=1e-5)


def test_a_loaded_model_reads_near_peaks_alike(near, simulated, tmp_path):
    whole = near.get_normalized_expression()
    near.save(tmp_path / "model")
    for data in (False, simulated.copy()):
        loaded = epivi.EpiFoundation.load(tmp_path / "model", adata=data)
        found = loaded.get_normalized_expression(simulated["atac"].copy())
        pd.testing.assert_frame_equal(found, whole, rtol=1e-6)
    query = epivi.EpiFoundation.load_query_data(simulated["atac"].copy(), tmp_path / "model")
    assert query.transfer_report_.loc["local.weight", "fate"] == "taken"
    pd.testing.assert_frame_equal(query.get_normalized_expression(), whole, rtol=1e-6)


def test_a_model_that_was_saved_before_there_were_local_readouts_is_loaded(expressive, simulated, tmp_path, copy_of):
    old = copy_of(expressive)
    old.init_arguments = {k: v for k, v in old.init_arguments.items() if k != "local_readout_bp"} | {
        name: getattr(old.config, name)
        for name in ("width", "n_layers", "n_hidden", "n_gate", "max_peaks", "max_genes")
    }
    # as then: a size that has one today, and genes without their bodies
    old.init_arguments |= {"size": "tutorial", "linear_readout": False, "peak_init": "random", "dropout_rate": 0.1}
    old.registry_ = plain(old.registry_)
    state = old.registry_["field_registries"]["rna"]["state_registry"]
    del state["start"], state["end"]
    old.save(tmp_path / "model")
    for data in (False, simulated.copy()):
        loaded = epivi.EpiFoundation.load(tmp_path / "model", adata=data)
        assert loaded.module.local is None
        found = loaded.get_normalized_expression(simulated["atac"].copy())
        pd.testing.assert_frame_equal(found, expressive.get_normalized_expression(), rtol=1e-6)


def test_peaks_that_a_query_lacks_do_not_count_as_closed(simulated, make, learn):
    options = {"task": "expression", "local_readout_bp": 50_000, "positions": "genome"}
    model = learn(make(simulated.copy(), **options))
    local, rng = model.module.local, np.random.default_rng(0)
    local.start(rng.normal(size=local.mean.numel()), rng.random(local.mean.numel()), is_used=True)
    query = simulated["atac"][:, 20:70].copy()
    model.prepare_query(query, new_peaks="position")
    difference = model.get_normalized_expression(query) - copy_without(model).get_normalized_expression(query)
    weight, mean = np.zeros((80, 20)), np.zeros((80, 20))
    weight[local.peak, local.gene] = local.weight.detach()
    mean[local.peak, local.gene] = local.mean
    x = query.X.toarray() > 0
    expected = x @ weight[20:70] - (weight * mean)[20:70].sum(0)
    np.testing.assert_allclose(difference, expected * model.module.gene_sd.numpy(), rtol=1e-3, atol=1e-3)


def test_fine_tuning_builds_the_local_readout_anew(near, simulated, tune):
    again = tune(near, "expression", simulated.copy(), train=False)
    assert again.transfer_report_.loc["local.weight", "fate"] == "dropped"
    assert not again.module.local.weight.any()
    assert tune(near, "annotation", simulated.copy(), labels_key="cell_type", train=False).module.local is None


@pytest.mark.parametrize(("which", "kind"), [("pretrained", "prob"), ("expressive", "lognorm"), ("levelled", "level")])
def test_the_kind_that_a_model_predicts_can_be_asked_for_and_no_other(request, which, kind):
    model = request.getfixturevalue(which)
    whole = model.get_normalized_expression(indices=[0, 1])
    pd.testing.assert_frame_equal(model.predict_expression(indices=[0, 1], kind=kind), whole)
    pd.testing.assert_frame_equal(model.predict_expression(None, [0, 1]), whole)
    found = model.predict_expression(None, [0, 1], ["gene_3"], kind=kind, return_numpy=True)
    np.testing.assert_allclose(found, whole[["gene_3"]], rtol=1e-5)
    ways = {
        "prob": "the pretrained model gives it",
        "lognorm": r"model.finetune\('expression'\) gives one",
        "level": r"model_kwargs=\{'expression_target': 'level'\}\) gives one",
    }
    for other in set(ways) - {kind}:
        with pytest.raises(
            ConfigError, match=f"kind='{other}' is not what this model predicts.*'{kind}': .*{ways[other]}"
        ):
            model.predict_expression(kind=other)
    with pytest.raises(ConfigError, match="'level'"):
        model.predict_expression(kind="levels")


@pytest.fixture(scope="module")
def levelled(pretrained, simulated, tune):
    return tune(pretrained, "expression", simulated.copy(), model_kwargs={"expression_target": "level"})


def test_a_model_of_labels_predicts_no_kind_of_expression(annotated):
    with pytest.raises(ConfigError, match="The model is for annotation and predicts none"):
        annotated.predict_expression(kind="prob")
