from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.distributions import Bernoulli, Normal, kl_divergence

from epivi._keys import BATCH_DEPTH, BATCH_INDICES
from epivi.nn.linear import PeakBlocks

ENCODERS = ["chromosome", "dense", "linear"]
CHROMOSOMES = np.array([1, 0, 2, 1, 0, 0, 2, 1, 2, 0, 1, 1])


def run(module, batch, *, seed=0, kl_weight=1.0, deterministic=False):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return module(batch, inference_kwargs={"deterministic": deterministic}, loss_kwargs={"kl_weight": kl_weight})


def noise_of(seed, shape=(7, 3)):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return torch.randn(shape, dtype=torch.double)


def likelihood(logits, x_np, omega=1.0, closed=1.0):
    x, p = torch.from_numpy(x_np), torch.sigmoid(logits)
    return -(omega * x * p.log() + closed * (1 - x) * (1 - p).log()).sum(1)


def pairs(mean, logvar):
    """Mean over all pairs of the divergences of two posteriors, one pair at a time."""
    q = [Normal(m, (v / 2).exp()) for m, v in zip(mean, logvar, strict=True)]
    return torch.stack([kl_divergence(a, b).sum() for a in q for b in q]).mean()


def standard_kl(mean, logvar):
    q = Normal(mean, (logvar / 2).exp())
    return kl_divergence(q, Normal(torch.zeros_like(mean), torch.ones_like(mean))).sum(1)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("lam", "kl_weight"), [(1.0, 1.0), (2.5, 0.3), (0.0, 0.7), (1.0, 0.0)])
@pytest.mark.parametrize("encoder", ENCODERS)
def test_the_loss_is_that_of_the_specification(
    small_module, tensors, x_np, dense_forward, encoder, lam, kl_weight, training
):
    module = small_module(encoder, invariance_weight=lam).train(training)
    batch = tensors(x_np)
    mean, logvar, _, logits = dense_forward(module, x_np, batch[BATCH_DEPTH][:, 0], batch["batch"][:, 0], noise_of(3))
    reconstruction = likelihood(logits, x_np, omega=5.0)
    expected = (kl_weight * standard_kl(mean, logvar) + (1 + lam) * reconstruction).mean()
    expected = expected + lam * kl_weight * pairs(mean, logvar)
    _, _, output = run(module, batch, seed=3, kl_weight=kl_weight)
    torch.testing.assert_close(output.loss, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(output.reconstruction_loss["reconstruction_loss"], reconstruction, rtol=1e-10, atol=0)
    torch.testing.assert_close(output.extra_metrics["information"], pairs(mean, logvar), rtol=1e-9, atol=1e-12)
    assert output.n_obs_minibatch == 7


@pytest.mark.parametrize("encoder", ENCODERS)
def test_gradients_are_those_of_the_dense_form(small_module, tensors, x_np, dense_forward, encoder):
    module = small_module(encoder, invariance_weight=1.5)
    batch = tensors(x_np)
    mean, logvar, _, logits = dense_forward(module, x_np, batch[BATCH_DEPTH][:, 0], batch["batch"][:, 0], noise_of(0))
    dense = (0.6 * standard_kl(mean, logvar) + 2.5 * likelihood(logits, x_np, 5.0)).mean()
    (dense + 1.5 * 0.6 * pairs(mean, logvar)).backward()
    expected = {name: p.grad.clone() for name, p in module.named_parameters()}
    module.zero_grad()
    run(module, batch, kl_weight=0.6)[2].loss.backward()
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_without_lambda_and_omega_it_is_the_conditional_vae(small_module, tensors, x_np, dense_forward, encoder):
    module = small_module(encoder, invariance_weight=0.0, open_weight=1.0)
    batch = tensors(x_np)
    mean, logvar, _, logits = dense_forward(module, x_np, batch[BATCH_DEPTH][:, 0], batch["batch"][:, 0], noise_of(1))
    log_p = Bernoulli(logits=logits).log_prob(torch.from_numpy(x_np)).sum(1)
    elbo = (log_p - standard_kl(mean, logvar)).mean()
    torch.testing.assert_close(run(module, batch, seed=1)[2].loss, -elbo, rtol=1e-10, atol=0)


@pytest.mark.parametrize("encoder", ["chromosome", "dense"])
def test_the_released_preset_equals_its_formula_and_differs(small_module, tensors, x_np, dense_forward, encoder):
    module = small_module(encoder, loss_preset="released_code", invariance_weight=1.0)
    batch = tensors(x_np)
    mean, logvar, _, logits = dense_forward(
        module, x_np, batch[BATCH_DEPTH][:, 0], batch["batch"][:, 0], noise_of(2), noise_by_variance=True
    )
    # all entries weigh omega, so that dividing by omega leaves the plain cross-entropy; KL with the standard
    # deviation in place of the variance, weighted 1 / (2 omega); the pairwise term by 1 / (2 omega b)
    reconstruction = likelihood(logits, x_np, omega=5.0, closed=5.0) / 5.0
    kl = standard_kl(mean, logvar / 2)
    expected = (2 * reconstruction).mean() + 0.4 / (2 * 5.0) * (kl.mean() + pairs(mean, logvar) / 7)
    found = run(module, batch, seed=2, kl_weight=0.4)[2].loss
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
    assert not torch.isclose(found, run(small_module(encoder), batch, seed=2, kl_weight=0.4)[2].loss)
    assert module.open_weight_shift == 0.0


@pytest.mark.parametrize("bound", ["mixture", "none"])
def test_other_bounds_of_the_information(small_module, tensors, x_np, dense_forward, bound):
    module = small_module(information_bound=bound)
    batch = tensors(x_np)
    mean, logvar, _, _ = dense_forward(module, x_np, batch[BATCH_DEPTH][:, 0], batch["batch"][:, 0], noise_of(0))
    q = [Normal(m, (v / 2).exp()) for m, v in zip(mean, logvar, strict=True)]
    kl = torch.stack([torch.stack([kl_divergence(a, b).sum() for b in q]) for a in q])
    expected = -((-kl).exp().mean(1).log()).mean() if bound == "mixture" else torch.tensor(0.0, dtype=torch.double)
    torch.testing.assert_close(run(module, batch)[2].extra_metrics["information"], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("n_open", [0, 1])
def test_the_loss_is_finite_with_one_open_peak_and_with_none(small_module, tensors, encoder, n_open):
    x_np = np.zeros((4, 12))
    x_np[0, :n_open] = 1
    module = small_module(encoder)
    loss = run(module, tensors(x_np))[2].loss
    loss.backward()
    assert torch.isfinite(loss)
    assert all(torch.isfinite(p.grad).all() for p in module.parameters() if p.grad is not None)


def test_the_warm_up_takes_the_mean(small_module, tensors, x_np):
    outputs = run(small_module(), tensors(x_np), deterministic=True)[0]
    assert torch.equal(outputs["z"], outputs["qz"].loc)


def test_the_encoder_does_not_see_the_covariates(small_module, tensors, x_np):
    module = small_module().eval()
    batch, other = tensors(x_np), tensors(x_np)
    other[BATCH_DEPTH] = other[BATCH_DEPTH] * 50 + 3
    other["batch"] = 1 - other["batch"]
    first, second = run(module, batch), run(module, other)
    assert torch.equal(first[0]["qz"].loc, second[0]["qz"].loc)
    assert not torch.equal(first[2].loss, second[2].loss)


def test_without_covariates_the_decoder_sees_none(small_module, tensors, x_np):
    module = small_module(use_covariates=False).eval()
    other = tensors(x_np)
    other[BATCH_DEPTH] = other[BATCH_DEPTH] * 50 + 3
    assert module.decoder.condition_layer.weight.shape[1] == 3
    assert torch.equal(run(module, tensors(x_np))[2].loss, run(module, other)[2].loss)


def test_moving_peaks_with_their_chromosomes_leaves_the_loss(small_module, tensors, x_np):
    module = small_module()
    expected = run(module, tensors(x_np))[2].loss
    order = np.random.default_rng(0).permutation(12)
    moved = small_module()
    moved.blocks = PeakBlocks(CHROMOSOMES[order])
    moved.encoder.first.blocks = moved.decoder.logits.blocks = moved.blocks
    weights = module.state_dict()
    # the row of each peak goes where its new position is
    for key in ("encoder.first.weight", "decoder.logits.weight", "decoder.logits.bias"):
        values = torch.empty_like(weights[key])
        values[moved.blocks.rank] = weights[key][module.blocks.rank[torch.from_numpy(order)]]
        weights[key] = values
    moved.load_state_dict(weights)
    torch.testing.assert_close(run(moved, tensors(x_np[:, order]))[2].loss, expected, rtol=1e-12, atol=0)


def test_tfidf_rows_have_one_length_and_the_papers_weights(small_module, tensors, x_np, dense_forward):
    frequency = torch.linspace(0.05, 0.9, 12)
    module = small_module(input_transform="tfidf", frequency=frequency, mean_open=9.0).eval()
    weight = np.log1p(1 / frequency.numpy())
    x = x_np * weight
    scaled = x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-6) * 3.0
    batch = tensors(x_np)
    mean, *_ = dense_forward(
        module, x_np, batch[BATCH_DEPTH][:, 0], batch["batch"][:, 0], noise_of(0), encoder_input=scaled
    )
    torch.testing.assert_close(run(module, batch)[0]["qz"].loc, mean, rtol=1e-5, atol=1e-6)


def test_hidden_peaks_are_made_up_for_by_the_others(small_module):
    module = small_module(input_dropout_rate=0.25)
    indptr, indices = torch.tensor([0, 40_000]), torch.zeros(40_000, dtype=torch.int64)
    torch.manual_seed(0)
    values = module._values(indptr, indices)
    assert set(values.unique().tolist()) <= {0.0, float(torch.tensor(1 / 0.75))}
    assert float((values == 0).float().mean()) == pytest.approx(0.25, abs=0.01)
    assert float(values.mean()) == pytest.approx(1.0, abs=0.02)
    assert module.eval()._values(indptr, indices) is None


@pytest.mark.parametrize("encoder", ENCODERS)
def test_logits_start_at_the_weighted_log_odds_of_the_peaks(small_module, encoder):
    frequency = torch.linspace(0.0, 1.0, 12)
    config = small_module(encoder).config
    from epivi.models.sailer.module import SailerModule
    from epivi.nn.covariates import DecoderCovariates

    blocks = small_module(encoder).blocks
    module = SailerModule(config, blocks, DecoderCovariates(0, 1), open_weight=4.0, frequency=frequency)
    p = frequency.clamp(1e-5, 1 - 1e-5)
    bias_in_users_order = module.decoder.logits.bias.detach()[blocks.rank]
    torch.testing.assert_close(bias_in_users_order, (4.0 * p / (1 - p)).log(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_probabilities_come_in_the_users_order_and_calibrated(small_module, tensors, x_np, dense_forward, encoder):
    module = small_module(encoder).eval()
    batch = tensors(x_np)
    outputs = run(module, batch, seed=1)
    *_, logits = dense_forward(module, x_np, batch[BATCH_DEPTH][:, 0], batch["batch"][:, 0], noise_of(1))
    weighted = torch.sigmoid(logits)
    hidden = outputs[1]["hidden"]
    torch.testing.assert_close(module.probabilities(hidden, None, calibrated=False), weighted)
    calibrated = module.probabilities(hidden, None)
    torch.testing.assert_close(calibrated, torch.sigmoid(logits - np.log(5.0)))
    peaks = torch.tensor([7, 0, 11, 7])
    torch.testing.assert_close(module.probabilities(hidden, peaks), calibrated[:, peaks])


def test_the_unweighted_likelihood_is_that_of_calibrated_probabilities(small_module, tensors, x_np):
    module = small_module().eval()
    outputs, generated, _ = run(module, tensors(x_np))
    p = module.probabilities(generated["hidden"], None)
    expected = -Bernoulli(probs=p).log_prob(torch.from_numpy(x_np)).sum(1)
    found = module.reconstruction(generated["hidden"], outputs["blocked"], weighted=False)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


def test_permuted_cells_give_permuted_posteriors(small_module, tensors, x_np):
    module = small_module().eval()
    order = [3, 1, 6, 0, 2, 5, 4]
    first, second = run(module, tensors(x_np))[0], run(module, tensors(x_np[order]))[0]
    torch.testing.assert_close(second["qz"].loc, first["qz"].loc[order], rtol=1e-12, atol=1e-14)
    assert second["blocked"].n_rows == 7
    assert tensors(x_np)[BATCH_INDICES].numel() == int(x_np.sum())
