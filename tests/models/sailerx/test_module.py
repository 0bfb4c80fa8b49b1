from __future__ import annotations

import numpy as np
import pytest
import torch

from epivi._errors import DataError
from epivi._keys import BATCH_ALIGN_WEIGHT, BATCH_HAS_REFERENCE, BATCH_REFERENCE
from epivi.models.sailer.config import SailerConfig
from epivi.models.sailer.module import SailerModule
from epivi.models.sailerx.config import SailerxConfig
from epivi.models.sailerx.module import SailerxModule
from epivi.nn.covariates import DecoderCovariates
from epivi.nn.linear import PeakBlocks

N, P, R = 9, 30, 4
CHROMOSOMES = np.arange(P) % 3


def build(kind=SailerxModule, config=SailerxConfig, **kwargs):
    more = {"n_reference": R} if kind is SailerxModule else {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        choices = config(n_latent=3, n_hidden=(6, 4), **kwargs)
        covariates = DecoderCovariates(1.0, 0.5)
        return kind(choices, PeakBlocks(CHROMOSOMES), covariates, open_weight=3.0, **more).double()


@pytest.fixture
def batch():
    rng = np.random.default_rng(1)
    x = rng.random((N, P)) < 0.3
    has = np.array([1, 1, 0, 1, 1, 0, 1, 1, 1.0])
    rows, columns = np.nonzero(x)
    return {
        "x_indptr": torch.from_numpy(np.concatenate([[0], np.bincount(rows, minlength=N).cumsum()])),
        "x_indices": torch.from_numpy(columns),
        "depth": torch.from_numpy(x.sum(1).astype(float)).unsqueeze(1),
        "batch": torch.zeros(N, 1, dtype=torch.int64),
        BATCH_REFERENCE: torch.from_numpy(rng.normal(size=(N, R)) * has[:, None]),
        BATCH_HAS_REFERENCE: torch.from_numpy(has).unsqueeze(1),
        BATCH_ALIGN_WEIGHT: torch.from_numpy(rng.random(N) * has).unsqueeze(1),
    }


def run(module, batch, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return module(batch, loss_kwargs={"kl_weight": 0.5})


def masked(batch):
    zeros = {key: torch.zeros_like(batch[key]) for key in (BATCH_REFERENCE, BATCH_HAS_REFERENCE, BATCH_ALIGN_WEIGHT)}
    return batch | zeros


def test_a_is_the_weight_per_peak_times_the_peaks():
    assert build(align_weight=0.457).align_scale == pytest.approx(0.457 * P)
    assert build(align_weight=0.0).align_scale == 0


@pytest.mark.parametrize("align_weight", [0.457, 2.0])
def test_the_loss_adds_the_sum_over_pairs_one_by_one(batch, align_weight):
    module = build(align_weight=align_weight)
    outputs, _, output = run(module, batch)
    mean, r = outputs["mean_bd"], batch[BATCH_REFERENCE]
    weight, has = batch[BATCH_ALIGN_WEIGHT][:, 0], batch[BATCH_HAS_REFERENCE][:, 0].bool()
    cosine = torch.nn.functional.cosine_similarity
    total = 0.0
    for i in has.nonzero()[:, 0]:
        for j in has.nonzero()[:, 0]:
            total += weight[i] * weight[j] * (cosine(r[i], r[j], dim=0) - cosine(mean[i], mean[j], dim=0)) ** 2
    expected = total / 7**2
    torch.testing.assert_close(output.extra_metrics["align_loss"], expected, rtol=1e-10, atol=0)
    plain = run(build(SailerModule, SailerConfig), batch)[2]
    torch.testing.assert_close(output.loss, plain.loss + align_weight * P * expected, rtol=1e-10, atol=0)


@pytest.mark.parametrize("encoder", ["chromosome", "dense"])
def test_a_minibatch_without_references_is_that_of_sailer_bitwise(batch, encoder):
    first, second = build(encoder=encoder), build(SailerModule, SailerConfig, encoder=encoder)
    a, b = run(first, masked(batch))[2], run(second, batch)[2]
    assert torch.equal(a.loss, b.loss)
    assert a.extra_metrics["align_loss"] == 0
    a.loss.backward()
    b.loss.backward()
    for (name, p), (other, q) in zip(first.named_parameters(), second.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(p.grad, q.grad)


def test_a_single_reference_aligns_with_nothing(batch):
    alone = masked(batch)
    for key in (BATCH_REFERENCE, BATCH_HAS_REFERENCE, BATCH_ALIGN_WEIGHT):
        alone[key][0] = 1.0
    assert run(build(), alone)[2].extra_metrics["align_loss"] == 0


def test_only_the_means_and_the_alignment_see_the_reference(batch):
    module = build().eval()
    first = run(module, batch)
    second = run(module, batch | {BATCH_REFERENCE: batch[BATCH_REFERENCE].flip(1) * batch[BATCH_HAS_REFERENCE]})
    assert torch.equal(first[0]["z"], second[0]["z"])
    assert torch.equal(
        first[2].reconstruction_loss["reconstruction_loss"], second[2].reconstruction_loss["reconstruction_loss"]
    )


def test_the_loss_is_that_of_any_rotation_and_scale_of_the_reference(batch):
    module = build()
    rotation = torch.linalg.qr(torch.randn(R, R, dtype=torch.double, generator=torch.Generator().manual_seed(0)))[0]
    turned = batch | {BATCH_REFERENCE: 7.0 * batch[BATCH_REFERENCE] @ rotation}
    torch.testing.assert_close(run(module, turned)[2].loss, run(module, batch)[2].loss, rtol=1e-10, atol=0)


def test_fused_posteriors_are_products_and_hidden_references_leave_the_atac(batch):
    module = build(fuse_reference=True).eval()
    atac = SailerModule.inference(module, batch["x_indptr"], batch["x_indices"], deterministic=True)
    fused = module.inference(**module._get_inference_input(batch), deterministic=True)
    expert_mean, expert_logvar = module.expert(batch[BATCH_REFERENCE])
    has = batch[BATCH_HAS_REFERENCE][:, 0].bool()
    p, q = (-atac["logvar_bd"]).exp(), (-expert_logvar).exp()
    mean = (p * atac["mean_bd"] + q * expert_mean) / (p + q)
    torch.testing.assert_close(fused["qz"].loc[has], mean[has])
    torch.testing.assert_close(fused["qz"].variance[has], (1 / (p + q))[has])
    torch.testing.assert_close(fused["qz"].loc[~has], atac["mean_bd"][~has], rtol=1e-12, atol=1e-12)
    assert (fused["qz"].variance[has] < atac["qz"].variance[has]).all()
    hidden = module.inference(**module._get_inference_input(masked(batch)), deterministic=True)
    torch.testing.assert_close(hidden["qz"].loc, atac["mean_bd"], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(hidden["qz"].variance, atac["qz"].variance, rtol=1e-12, atol=0)


def test_in_training_half_of_the_references_are_hidden(batch):
    module = build(fuse_reference=True)
    for part in module.modules():
        if isinstance(part, torch.nn.BatchNorm1d):
            part.eval()  # so that each cell stands for itself
    arguments = module._get_inference_input(batch)
    atac = SailerModule.inference(module, batch["x_indptr"], batch["x_indices"], deterministic=True)["mean_bd"]
    torch.manual_seed(0)
    hidden = [
        torch.isclose(module.inference(**arguments, deterministic=True)["mean_bd"], atac).all(1) for _ in range(200)
    ]
    share = torch.stack(hidden).double().mean(0)
    has = batch[BATCH_HAS_REFERENCE][:, 0].bool()
    assert (share[~has] == 1).all()
    assert ((share[has] > 0.35) & (share[has] < 0.65)).all()


def test_another_width_of_the_reference_is_refused_where_it_is_fused(batch):
    other = batch | {BATCH_REFERENCE: torch.ones(N, R + 2, dtype=torch.double)}
    with pytest.raises(DataError, match="has 6 dimensions, and fuse_reference=True needs that of training, with 4"):
        build(fuse_reference=True)._get_inference_input(other)
    assert torch.isfinite(run(build(), other)[2].loss)


def test_gradients_are_finite_with_all_kinds_of_cells(batch):
    for module in (build(), build(fuse_reference=True)):
        run(module, batch)[2].loss.backward()
        assert all(torch.isfinite(p.grad).all() for p in module.parameters())
