from __future__ import annotations

import mudata as md
import numpy as np
import pandas as pd
import pytest
import torch
from scvi import REGISTRY_KEYS

import epivi
from epivi._errors import ConfigError, DataError


def weights_of(model):
    return {name: value.clone() for name, value in model.module.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("task", ["annotation", "batch_correction", "expression"])
def test_the_base_stays_as_it_is(own, simulated, tune, task):
    before, latent = weights_of(own), own.get_latent_representation()
    tuned = tune(own, task, simulated.copy(), labels_key="cell_type", batch_key="batch")
    assert same(weights_of(own), before)
    np.testing.assert_array_equal(own.get_latent_representation(), latent)
    assert own.config.task == "pretraining"
    assert tuned.config == own.config.for_task(task)
    assert not np.array_equal(tuned.get_latent_representation(), latent)


def test_the_base_reads_its_own_data_as_before_after_another_setup_of_them(simulated, make, learn, tune):
    base = learn(make(simulated.copy()))
    batches, latent = base._registered(REGISTRY_KEYS.BATCH_KEY), base.get_latent_representation()
    predicted = base.get_normalized_expression()
    tuned = tune(base, "annotation", labels_key="batch", batch_key="cell_type")
    assert tuned.classes == ["batch_0", "batch_1"]
    assert tuned.adata is base.adata
    labels = tuned.predict_labels()
    np.testing.assert_array_equal(base.get_latent_representation(), latent)
    pd.testing.assert_frame_equal(base.get_normalized_expression(), predicted)
    np.testing.assert_array_equal(base._registered(REGISTRY_KEYS.BATCH_KEY), batches)
    assert base.classes == ["type_0", "type_1", "type_2"]
    pd.testing.assert_series_equal(tuned.predict_labels(), labels)
    learn(base)


def test_the_report_says_what_was_taken(pretrained, simulated, tune):
    tuned = tune(pretrained, "expression", simulated.copy(), train=False)
    report = tuned.transfer_report_
    own, base = weights_of(tuned), weights_of(pretrained)
    assert set(report.index) == set(own) | set(base)
    for name, fate in report["fate"].items():
        taken = name.startswith(("encoder.", "genes."))
        assert fate == ("taken" if taken else "dropped" if name in base else "new"), name
        if taken:
            assert torch.equal(own[name], base[name])
        assert report["shape"][name] == tuple((base if name in base else own)[name].shape)
    assert not tuned.is_trained
    # a head of one output cannot be that of two
    assert report["fate"]["decoder.out.weight"] == "dropped"
    assert report["fate"]["batches.table.weight"] == "dropped"
    labels = tune(pretrained, "annotation", simulated.copy(), labels_key="cell_type", train=False)
    assert (labels.transfer_report_.loc[["decoder.0.weight", "temperature"], "fate"] == "new").all()
    assert not any(name.startswith("genes.") for name in labels.module.state_dict())


def test_rows_of_genes_are_matched_by_name(pretrained, simulated, tune):
    mdata = simulated.copy()
    rna = mdata["rna"][:, ["gene_7", "gene_3", "gene_0", "gene_19"]].copy()
    rna.var_names = ["gene_7", "other", "gene_0", "gene_19"]
    data = md.MuData({"atac": mdata["atac"], "rna": rna})
    tuned = tune(pretrained, "expression", data, train=False)
    fresh = epivi.EpiFoundation(data, **tuned.init_arguments).module.genes.genes.table.weight
    found, base = (model.module.genes.genes.table.weight for model in (tuned, pretrained))
    assert tuned.transfer_report_.loc["genes.genes.table.weight", "fate"] == "taken, rows matched by name"
    for row, expected in enumerate((base[0], base[8], fresh[2], base[1], base[20])):
        assert torch.equal(found[row], expected)
    assert tuned.gene_names.tolist() == ["gene_7", "other", "gene_0", "gene_19"]


def test_genes_in_another_order_keep_their_rows(pretrained, simulated, tune):
    mdata = simulated.copy()
    order = np.random.default_rng(0).permutation(20)
    data = md.MuData({"atac": mdata["atac"], "rna": mdata["rna"][:, order].copy()})
    tuned = tune(pretrained, "expression", data, train=False)
    found, base = (model.module.genes.genes.table.weight for model in (tuned, pretrained))
    assert torch.equal(found[1:], base[1:][torch.from_numpy(order)])


@pytest.mark.parametrize(("freeze", "prefix"), [("peaks", "encoder.peaks."), ("encoder", "encoder.")])
def test_what_is_frozen_stays_bitwise(pretrained, simulated, tune, freeze, prefix):
    tuned = tune(pretrained, "annotation", simulated.copy(), labels_key="cell_type", freeze=freeze, lr=1e-2)
    base = weights_of(pretrained)
    moved = {name for name, value in weights_of(tuned).items() if name in base and not torch.equal(value, base[name])}
    assert not any(name.startswith(prefix) for name in moved)
    if freeze == "encoder":
        np.testing.assert_array_equal(tuned.get_latent_representation(), pretrained.get_latent_representation())
    else:
        assert "encoder.transformer.layers.0.hidden.weight" in moved
        assert "encoder.places.chromosomes.table.weight" in moved


def test_nothing_is_frozen_unless_asked(pretrained, simulated, tune):
    tuned = tune(pretrained, "expression", simulated.copy(), lr=1e-2)
    base = weights_of(pretrained)
    frozen = {name for name, value in weights_of(tuned).items() if name in base and torch.equal(value, base[name])}
    # each weight learns but those that the task has no use of
    assert not any(name.startswith("encoder.") for name in frozen), frozen


def test_fine_tuning_is_repeatable_and_has_a_seed_of_its_own(pretrained, simulated, tune):
    first, second, other = (
        tune(pretrained, "annotation", simulated.copy(), labels_key="cell_type", seed=seed) for seed in (None, 1, 2)
    )
    assert same(weights_of(first), weights_of(second))
    assert not same(weights_of(first), weights_of(other))
    assert other.seed == 2


def test_choices_of_the_new_model_may_differ(pretrained, simulated, tune):
    options = {"expression_target": "level", "n_levels": 4, "dropout_rate": 0.0, "max_genes": 8}
    tuned = tune(pretrained, "expression", simulated.copy(), model_kwargs=options)
    assert {key: getattr(tuned.config, key) for key in options} == options


@pytest.mark.parametrize(
    ("task", "options", "match"),
    [
        ("anotation", {}, "'annotation'"),
        ("pretraining", {}, "task"),
        ("annotation", {"freeze": "peak"}, "'peaks'"),
        ("annotation", {"model_kwargs": {"n_hidden": 32}}, "'encoder.transformer.layers.0.hidden.weight' has shape"),
        ("annotation", {"model_kwargs": {"width": 64}}, "leave out what changes the encoder from model_kwargs"),
    ],
)
def test_what_cannot_be_tuned_is_refused(pretrained, simulated, tune, task, options, match):
    with pytest.raises(ConfigError, match=match):
        tune(pretrained, task, simulated.copy(), labels_key="cell_type", **options)


def test_tasks_need_labels_or_expression(pretrained, simulated, tune):
    with pytest.raises(ConfigError, match="at least two classes, found 0"):
        tune(pretrained, "annotation", simulated.copy())
    # the genes of the model are known, the expression of these cells is not
    atac = simulated["atac"].copy()
    atac.obs["cell_type"] = "one"
    with pytest.raises(ConfigError, match="at least two classes, found 1"):
        tune(pretrained, "annotation", atac, labels_key="cell_type")
    fewer = simulated["atac"][:, :50].copy()
    with pytest.raises(DataError, match="project_peaks"):
        tune(pretrained, "annotation", fewer, labels_key="cell_type")


def test_peaks_alone_are_annotated_by_a_model_of_both(pretrained, simulated, tune):
    tuned = tune(pretrained, "annotation", simulated["atac"].copy(), labels_key="cell_type")
    expected = tune(pretrained, "annotation", simulated.copy(), labels_key="cell_type")
    pd.testing.assert_frame_equal(tuned.predict_labels(soft=True), expected.predict_labels(soft=True))


def test_a_model_of_peaks_alone_is_tuned_on_expression(simulated, make, learn, tune):
    base = learn(make(simulated["atac"].copy()))
    tuned = tune(base, "expression", simulated.copy())
    assert tuned.get_normalized_expression().shape == (60, 20)
    assert (tuned.transfer_report_.loc[["genes.genes.table.weight", "decoder.out.weight"], "fate"] == "new").all()
    assert (tuned.transfer_report_.loc[["peak_readout.weight", "peak_bias.weight"], "fate"] == "dropped").all()


def test_a_tuned_model_is_tuned_again(annotated, simulated, tune):
    tuned = tune(annotated, "expression", simulated.copy())
    assert tuned.config.task == "expression"
    assert (tuned.transfer_report_.loc["encoder.norm.weight", "fate"]) == "taken"


def test_labels_are_learnt(pretrained, simulated, tune):
    tuned = tune(
        pretrained,
        "annotation",
        simulated.copy(),
        labels_key="cell_type",
        max_epochs=30,
        early_stopping=False,
        lr=3e-3,
        train_size=0.7,
    )
    accuracy = tuned.history["accuracy_train"].to_numpy()[:, 0]
    assert accuracy[-1] > 0.9 > accuracy[0]
    truth = simulated.obs["cell_type"].astype(str).to_numpy()
    assert (tuned.predict_labels().astype(str).to_numpy() == truth)[tuned.train_indices].mean() > 0.9


def test_a_query_with_a_new_batch_has_all_weights_and_a_row_for_it(pretrained, simulated, learn):
    query = simulated.copy()
    query.obs["batch"] = pd.Categorical(["batch_1"] * 30 + ["new"] * 30)
    before = weights_of(pretrained)
    model = epivi.EpiFoundation.load_query_data(query, pretrained)
    weights = weights_of(model)
    for name, value in before.items():
        if name != "batches.table.weight":
            assert torch.equal(weights[name], value), name
    rows = weights["batches.table.weight"]
    assert torch.equal(rows[:2], before["batches.table.weight"])
    torch.testing.assert_close(rows[2], rows[:2].mean(0))
    assert (model.transfer_report_["fate"] != "dropped").all()
    assert model.is_trained
    latent = pretrained.get_latent_representation()
    np.testing.assert_array_equal(model.get_latent_representation(), latent)
    np.testing.assert_array_equal(
        model.get_normalized_expression(transform_batch="batch_1"),
        pretrained.get_normalized_expression(transform_batch="batch_1"),
    )
    learn(model)
    assert not torch.equal(weights_of(model)["batches.table.weight"][2], rows[2])
    assert same(weights_of(pretrained), before)
    np.testing.assert_array_equal(pretrained.get_latent_representation(), latent)


def test_an_adversary_keeps_what_it_knows_of_known_batches(simulated, make, learn):
    base = learn(make(simulated.copy(), batch_adversary=1.0))
    query = simulated.copy()
    query.obs["batch"] = pd.Categorical(["batch_1"] * 30 + ["new"] * 30)
    model = epivi.EpiFoundation.load_query_data(query, base)
    before, weights = weights_of(base), weights_of(model)
    for name in ("adversary.network.2.weight", "adversary.network.2.bias"):
        assert torch.equal(weights[name][:2], before[name])
        assert len(weights[name]) == 3
        assert not weights[name][2].any()
    assert (model.transfer_report_["fate"] != "dropped").all()
    learn(model)


def test_a_model_of_one_batch_predicts_for_new_ones_as_before(simulated, make, learn):
    data = simulated.copy()
    data.obs["batch"] = "only"
    base = learn(make(data))
    assert base.module.batches is None
    query = simulated.copy()
    query.obs["batch"] = pd.Categorical(["only"] * 30 + ["new"] * 30)
    model = epivi.EpiFoundation.load_query_data(query, base)
    expected = base.get_normalized_expression().to_numpy()
    for batch in (None, "only", "new"):
        found = model.get_normalized_expression(transform_batch=batch).to_numpy()
        np.testing.assert_allclose(found, expected, atol=1e-6)
    learn(model)


def test_a_query_is_read_from_a_folder_and_may_lack_expression_or_batches(pretrained, simulated, tmp_path, learn):
    pretrained.save(tmp_path / "model")
    query = simulated["atac"].copy()
    del query.obs["batch"], query.obs["cell_type"]
    model = epivi.EpiFoundation.load_query_data(query, tmp_path / "model")
    np.testing.assert_array_equal(model.get_latent_representation(), pretrained.get_latent_representation())
    assert model.gene_names.tolist() == pretrained.gene_names.tolist()
    learn(model)


def test_a_query_with_peaks_of_its_own_is_read_by_position(simulated, make, learn):
    base = learn(make(simulated.copy(), positions="genome"))
    query = epivi.simulate.shifted_peaks(simulated["atac"].copy(), shift=50)
    with pytest.raises(DataError, match="project_peaks"):
        epivi.EpiFoundation.load_query_data(query, base)
    model = epivi.EpiFoundation.load_query_data(query, base, new_peaks="position")
    assert np.isfinite(model.get_latent_representation()).all()
    learn(model)


def test_a_query_with_unknown_types_needs_fine_tuning(annotated, simulated):
    query = simulated.copy()
    query.obs["cell_type"] = pd.Categorical(["type_0"] * 30 + ["new"] * 30)
    with pytest.raises(ConfigError, match=r"cell types \['new'\] that the model does not know"):
        epivi.EpiFoundation.load_query_data(query, annotated)
    query.obs["cell_type"] = pd.Categorical(["type_0"] * 30 + ["type_2"] * 30)
    model = epivi.EpiFoundation.load_query_data(query, annotated)
    pd.testing.assert_series_equal(model.predict_labels(), annotated.predict_labels())


@pytest.mark.parametrize("reference", [None, 3])
def test_the_reference_of_a_query_must_be_a_model(simulated, reference):
    with pytest.raises(ConfigError, match="reference_model must be a EpiFoundation or its folder"):
        epivi.EpiFoundation.load_query_data(simulated.copy(), reference)
