from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch

import epivi
from epivi._errors import ConfigError
from epivi.models.candi.outputs.prediction import Job, Predictor, Prompt, Wanted

ALL = np.ones(4, dtype=np.float32)


@pytest.fixture
def predictor(trained):
    return Predictor(trained.module, trained.windows(trained.adata), batch_size=2)


def run_at(predictor, at):
    return list(predictor.dataset.experiments.runs)[at]


def joined(predictor, run, low, high, jobs=None):
    jobs = [Job(1, ALL, (0, 2))] if jobs is None else jobs
    parts = list(predictor.stretches(jobs, run, low, high))
    assert [part.first for part in parts] == sorted(part.first for part in parts)
    assert parts[0].first == low
    for before, after in pairwise(parts):
        assert before.first + before.parameters["mean_bla"].shape[1] == after.first
    return {name: np.concatenate([part.parameters[name] for part in parts], axis=1) for name in parts[0].parameters}


def test_a_run_is_covered_once_and_agrees_with_one_window_inside_its_crop(predictor):
    run = run_at(predictor, 0)
    found = joined(predictor, run, 0, 480)
    for start, low, high in ((0, 0, 144), (128, 144, 272), (320, 400, 480)):
        batch = predictor.read(1, np.array([start]))
        outputs = predictor.decode(batch, predictor.encode(batch, ALL))
        for name, values in found.items():
            one = getattr(outputs, name)[0].numpy()[low - start : high - start, [0, 2]].T
            assert values.shape == (2, 480)
            np.testing.assert_allclose(values[:, low:high], one, rtol=1e-4, atol=1e-5)


def test_a_bin_does_not_depend_on_what_else_is_asked_for(predictor):
    run = run_at(predictor, 0)
    whole = joined(predictor, run, 0, 480)
    for low, high in ((0, 1), (130, 150), (143, 145), (270, 480), (479, 480)):
        part = joined(predictor, run, low, high)
        for name, values in part.items():
            np.testing.assert_allclose(values, whole[name][:, low:high], rtol=1e-4, atol=1e-5)


def test_the_batch_size_changes_nothing(trained, predictor):
    run = run_at(predictor, 1)
    expected = joined(predictor, run, 480, 800)
    for size in (1, 50):
        other = Predictor(trained.module, predictor.dataset, batch_size=size)
        for name, values in joined(other, run, 480, 800).items():
            np.testing.assert_allclose(values, expected[name], rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigError, match="batch_size=0"):
        Predictor(trained.module, predictor.dataset, batch_size=0)


def test_the_values_of_hidden_assays_have_no_influence(predictor):
    batch = predictor.read(1, np.array([0, 100]))
    shown = np.array([1, 1, 0, 1], dtype=np.float32)
    other = dict(batch)
    other["counts"] = batch["counts"].clone()
    # hidden, and not available
    other["counts"][:, :, [2, 1]] = torch.randint(500, (2, 160, 2)).float()
    other["signal"] = torch.rand_like(batch["signal"])
    first, second = (predictor.decode(one, predictor.encode(one, shown)) for one in (batch, other))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_covariates_of_hidden_assays_do_not_reach_the_encoder(predictor):
    batch = predictor.read(1, np.array([0]))
    shown = np.array([1, 1, 0, 1], dtype=np.float32)
    other = dict(batch)
    other["continuous"] = batch["continuous"].clone()
    other["continuous"][:, 2] = 3.0
    assert torch.equal(predictor.encode(batch, shown)["z"], predictor.encode(other, shown)["z"])
    assert not torch.equal(predictor.encode(batch, ALL)["z"], predictor.encode(other, ALL)["z"])


def test_a_constant_network_gives_seamless_tracks(own, flatten):
    flatten(own)
    found = own.denoise("chr1", ["H3K4me3"])
    depth = own.adata.obsm["depth"][:4, 2] / np.asarray(own.state["depth_ref"])[2]
    expected = np.exp(0.7) * np.broadcast_to(depth[:, None], (4, 480))
    np.testing.assert_allclose(found.layers["mean"], expected, rtol=1e-4)
    np.testing.assert_allclose(found.layers["signal_mean"], 1.0, rtol=1e-5)
    np.testing.assert_allclose(found.layers["signal_var"], 0.25, rtol=1e-5)


@pytest.mark.parametrize("skip", [False, True])
def test_short_runs_and_gaps(make, learn, skip):
    """Runs of 100 and 30 bins, shorter than a window of 160: what lies beyond their ends has no influence."""
    data = epivi.simulate.bulk(3, 4, chrom_sizes=[400, 200, 60], gap=40, seed=3, missing=0.0)
    model = learn(make(data, skip=skip), 1)
    found = model.denoise(None, biosamples="biosample_1")
    assert found.shape == (4, 660)
    assert np.isfinite(found.layers["mean"]).all()
    assert list(found.var_names) == [
        f"{chrom}:{start}-{end}" for chrom, start, end in data.uns["bins"].itertuples(index=False)
    ]
    # the run of 100 bins as an object of its own
    keep = np.arange(400, 500)
    alone = model.denoise("chr2:0-2500", biosamples="biosample_1")
    np.testing.assert_array_equal(alone.layers["mean"], found.layers["mean"][:, keep])
    spoiled = data.copy()
    spoiled.obsm["counts"][:, :, 500:] = 300
    other = model.denoise("chr2:0-2500", biosamples="biosample_1", adata=spoiled)
    np.testing.assert_allclose(other.layers["mean"], alone.layers["mean"], rtol=1e-5)


def test_a_prompt_without_wishes_changes_nothing(predictor):
    batch = predictor.read(0, np.array([0]))
    found = Prompt().apply(batch)
    assert torch.equal(found["categorical"], batch["categorical"])
    wanted = Wanted(np.array([1.0, 2.0, np.nan, 4.0]), np.array([True, False, True, False]))
    asked = Prompt(log_depth_ratio=wanted).apply(batch)["log_depth_ratio"][0]
    assert asked[0] == 1
    assert asked[2].isnan()
    assert torch.equal(asked[[1, 3]], batch["log_depth_ratio"][0][[1, 3]])
