"""The compiled layers against those of torch, and the likelihood of counts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.distributions import Poisson

import epivi
from epivi._errors import ConfigError
from epivi._keys import BATCH_DEPTH, BATCH_VALUES
from epivi.models.sailer.config import SailerConfig
from epivi.nn.kernels import PeakLists, has_half_precision

ENCODERS = ["chromosome", "dense", "linear"]
LIKELIHOODS = ["bernoulli", "poisson"]


@pytest.fixture
def counted(tensors, x_np):
    """A batch with counts, and the counts as a matrix."""
    counts = x_np * np.random.default_rng(2).integers(1, 5, x_np.shape)
    batch = tensors(x_np)
    return batch | {BATCH_VALUES: torch.from_numpy(counts[counts > 0])}, torch.from_numpy(counts)


def run(module, batch, *, kl_weight=0.6):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return module(batch, loss_kwargs={"kl_weight": kl_weight})


def gradients(module, batch):
    module.zero_grad()
    output = run(module, batch)[2]
    output.loss.backward()
    return output.loss.item(), {name: p.grad.clone() for name, p in module.named_parameters()}


def logits_of(module, hidden):
    return torch.cat(list(module.decoder.logits(hidden)), 1)[:, module.blocks.rank]


def built(small_module, encoder, likelihood, kernels):
    weight = 5.0 if likelihood == "bernoulli" else 1.0
    return small_module(encoder, open_weight=weight, likelihood=likelihood, kernels=kernels).float()


@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("encoder", ENCODERS)
def test_compiled_layers_give_the_loss_and_the_gradients_of_torch(small_module, counted, encoder, likelihood):
    batch, _ = counted
    plain, compiled = (built(small_module, encoder, likelihood, kernels) for kernels in ("plain", "float32"))
    assert isinstance(run(compiled, batch)[0]["blocked"], PeakLists)
    assert not isinstance(run(plain, batch)[0]["blocked"], PeakLists)
    (loss, expected), (found_loss, found) = gradients(plain, batch), gradients(compiled, batch)
    assert found_loss == pytest.approx(loss, rel=1e-5)
    scale = max(float(g.abs().max()) for g in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-5 * scale)


@pytest.mark.skipif(not has_half_precision(), reason="the processor does not multiply bfloat16")
@pytest.mark.parametrize("likelihood", LIKELIHOODS)
@pytest.mark.parametrize("encoder", ENCODERS)
def test_half_precision_serves_the_steps_of_training_alone(small_module, counted, encoder, likelihood):
    batch, _ = counted
    single, half = (built(small_module, encoder, likelihood, kernels) for kernels in ("float32", "auto"))
    (loss, expected), (found_loss, found) = gradients(single, batch), gradients(half, batch)
    assert found_loss != loss
    assert found_loss == pytest.approx(loss, rel=5e-3)
    last = "decoder.logits.weight"
    assert float((found[last] - expected[last]).abs().max() / expected[last].abs().max()) < 0.03
    for module in (single, half):
        module.eval()
    assert run(single, batch)[2].loss.item() == run(half, batch)[2].loss.item()
    half.train()
    with torch.no_grad():
        assert not half.uses_half


def test_double_precision_is_left_to_torch(small_module, counted):
    assert not small_module(kernels="auto").uses_kernels
    assert small_module(kernels="auto").float().uses_kernels
    assert not small_module(kernels="plain").float().uses_kernels


@pytest.mark.parametrize("encoder", ENCODERS)
def test_the_poisson_loss_is_that_of_torch_with_rates_that_add_up_to_the_count(small_module, counted, encoder):
    batch, counts = counted
    module = small_module(encoder, open_weight=1.0, likelihood="poisson", invariance_weight=0.0)
    _, generated, output = run(module, batch, kl_weight=0.0)
    rate = torch.softmax(logits_of(module, generated["hidden"]), 1) * counts.sum(1, keepdim=True)
    has_counts = counts.sum(1) > 0
    expected = -Poisson(rate[has_counts]).log_prob(counts[has_counts]).sum(1)
    found = output.reconstruction_loss["reconstruction_loss"]
    torch.testing.assert_close(found[has_counts], expected, rtol=1e-9, atol=1e-9)
    assert not found[~has_counts].any()
    leaves = [module.decoder.logits.weight, module.decoder.logits.bias]
    got = torch.autograd.grad(output.loss, leaves, retain_graph=True)
    torch.testing.assert_close(got, torch.autograd.grad(expected.sum() / 7, leaves), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("kernels", ["float32", "plain"])
def test_poisson_accessibility_is_the_probability_of_any_count(small_module, counted, kernels):
    batch, _ = counted
    module = built(small_module, "chromosome", "poisson", kernels).eval()
    module.counts_per_depth.fill_(1.5)
    hidden = run(module, batch)[1]["hidden"]
    depth_b = batch[BATCH_DEPTH][:, 0].clamp_min(1.0).float()
    scale_b = module.log_scale(hidden, depth_b)
    found = module.probabilities(hidden, None, log_scale_b=scale_b)
    rate = torch.softmax(logits_of(module, hidden), 1) * 1.5 * depth_b.unsqueeze(1)
    torch.testing.assert_close(found, 1 - torch.exp(-rate), rtol=1e-5, atol=1e-6)
    peaks = torch.tensor([7, 0, 11, 7])
    torch.testing.assert_close(module.probabilities(hidden, peaks, log_scale_b=scale_b), found[:, peaks])
    assert built(small_module, "chromosome", "bernoulli", kernels).log_scale(hidden, depth_b) is None


@pytest.mark.parametrize("kernels", ["float32", "plain"])
@pytest.mark.parametrize("calibrated", [False, True])
def test_probabilities_are_those_of_torch(small_module, counted, kernels, calibrated):
    module = built(small_module, "chromosome", "bernoulli", kernels).eval()
    hidden = run(module, counted[0])[1]["hidden"]
    expected = torch.sigmoid(logits_of(module, hidden) - (np.log(5.0) if calibrated else 0.0))
    torch.testing.assert_close(module.probabilities(hidden, None, calibrated=calibrated), expected)


@pytest.mark.parametrize("more", [{"open_weight": 2.0}, {"loss_preset": "released_code"}])
def test_weights_of_open_entries_are_refused_for_counts(more):
    with pytest.raises(ConfigError, match="likelihood='poisson' models counts and has no weights of open entries"):
        SailerConfig(likelihood="poisson", **more)
    assert SailerConfig(likelihood="poisson").resolve_open_weight(0.1) == 1.0


def test_a_model_of_counts_trains_saves_and_answers(tmp_path):
    adata = epivi.simulate.accessibility([40, 40], n_fg=150, n_bg=150, median=80, clip=(40, 160))
    adata.X = adata.X.copy().astype(np.float32)
    adata.X.data[::3] = 2.0
    epivi.SAILER.setup_anndata(adata)
    model = epivi.SAILER(adata, likelihood="poisson", encoder="dense", n_hidden=(32, 16), n_latent=4)
    per_depth = adata.X.sum() / (adata.X > 0).sum()
    assert float(model.module.counts_per_depth) == pytest.approx(per_depth, rel=1e-5)
    quiet = {"enable_progress_bar": False, "early_stopping": False, "accelerator": "cpu"}
    model.train(max_epochs=1, batch_size=40, **quiet)
    before = model.get_elbo()
    model.train(max_epochs=30, batch_size=40, plan_kwargs={"n_epochs_kl_cycle": 0}, **quiet)
    assert model.get_elbo() > before
    p = model.get_normalized_accessibility(return_numpy=True)
    assert ((p > 0) & (p < 1)).all()
    # rates at the mean depth add up to its count
    depth = float(model.module.covariates.log_depth_mean.exp())
    np.testing.assert_allclose(-np.log1p(-p.astype(float)).sum(1), depth * per_depth, rtol=1e-3)
    model.save(tmp_path / "model")
    again = epivi.SAILER.load(tmp_path / "model", adata, accelerator="cpu")
    np.testing.assert_array_equal(again.get_normalized_accessibility(return_numpy=True), p)
    table = model.differential_accessibility(groupby="cell_type", n_samples=20)
    assert np.isfinite(table["effect_size"]).all()
    assert table["effect_size"].abs().max() < 1
