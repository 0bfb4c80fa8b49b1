from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from epivi._errors import ConfigError
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
