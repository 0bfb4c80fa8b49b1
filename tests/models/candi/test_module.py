from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

import epivi
from epivi._errors import ConfigError
from epivi.data.masking import swap_assays
from epivi.models.candi import module as candi_module

ITEMS = [[0, 0], [1, 100], [3, 200], [4, 310]]


def run(module, batch):
    inputs = module._get_inference_input(batch)
    encoded = module.inference(**inputs)
    outputs = module.generative(**module._get_generative_input(batch, encoded))
    return inputs, encoded, outputs


@pytest.fixture
def batch(trained):
    """Four windows; the last one reaches over the end of a run of 480 bins by nothing, the others are inside."""
    return trained.windows(trained.adata)[ITEMS]


def scipy_terms(batch, shown_ba, laws):
    """The four terms, by scipy from the parameters."""
    log_mean, log_theta, mean, variance = (x.detach().double().numpy() for x in laws)
    theta = np.exp(log_theta)
    y, s = batch["counts"].numpy(), batch["signal"].numpy()
    nll = {
        "counts": -stats.nbinom.logpmf(y, theta, theta / (theta + np.exp(log_mean))),
        "signal": -stats.norm.logpdf(s, mean, np.sqrt(variance)),
    }
    terms = {}
    for kind, nll_bla in nll.items():
        available = batch[f"available_{kind}"].numpy()
        for task, chosen_ba in (("imputation", available * (1 - shown_ba)), ("upsampling", available * shown_ba)):
            weight = chosen_ba[:, None, :] * batch["bin_mask"].numpy()[:, :, None]
            terms[f"{kind}_{task}"] = (nll_bla * weight).sum() / max(weight.sum(), 1)
    return terms


@pytest.mark.parametrize("padded", [False, True])
def test_the_loss_is_the_sum_of_four_means(own, batch, padded):
    if padded:
        batch["bin_mask"][1, 120:] = False
    torch.manual_seed(3)
    _, encoded, outputs = run(own.module, batch)
    found = own.module.loss(batch, encoded, outputs)
    terms = scipy_terms(batch, encoded["mask"].numpy(), outputs["outputs"])
    assert all(value > 0 for value in terms.values())
    for name, value in terms.items():
        assert found.extra_metrics[name].item() == pytest.approx(value, rel=1e-4)
    assert found.loss.item() == pytest.approx(sum(terms.values()), rel=1e-4)


def test_tasks_may_be_weighted_by_shares_of_the_assays(adata, make):
    model = make(adata, loss_weighting="mask_fraction")
    batch = model.windows(adata)[ITEMS]
    torch.manual_seed(3)
    _, encoded, outputs = run(model.module, batch)
    found = model.module.loss(batch, encoded, outputs)
    share = 1 - float(encoded["mask"].sum() / batch["available_counts"].sum())
    assert 0 < share < 1
    terms = found.extra_metrics
    expected = share * (terms["counts_imputation"] + terms["signal_imputation"])
    expected += (1 - share) * (terms["counts_upsampling"] + terms["signal_upsampling"])
    assert found.loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_padding_and_what_is_not_there_change_no_loss(own, batch, monkeypatch):
    # which reads are kept depends on all counts
    monkeypatch.setattr(candi_module, "draw_thinning", lambda shape, factors, device: torch.ones(shape, device=device))

    def loss(batch):
        torch.manual_seed(0)
        return own.module.loss(batch, *run(own.module, batch)[1:]).loss

    batch["bin_mask"][:, 140:] = False
    expected = loss(batch)
    other = dict(batch)
    for kind in ("counts", "signal"):
        other[kind] = batch[kind].clone()
        other[kind][:, 140:] = 77
        hidden = (batch[f"available_{kind}"] == 0)[:, None, :].expand_as(other[kind])
        other[kind][hidden] = 99
    assert loss(other).item() == expected.item()


def test_an_empty_mask_costs_nothing(own, batch):
    alone = {key: value[:1] for key, value in batch.items()}
    for kind in ("counts", "signal"):
        # a single assay: nothing can be hidden
        alone[f"available_{kind}"] = torch.tensor([[1.0, 0, 0, 0]])
    _, encoded, outputs = run(own.module, alone)
    found = own.module.loss(alone, encoded, outputs)
    assert found.extra_metrics["counts_imputation"] == 0
    assert found.extra_metrics["counts_upsampling"] > 0
    nothing = alone | {"bin_mask": torch.zeros_like(alone["bin_mask"])}
    found = own.module.loss(nothing, encoded, outputs)
    assert found.loss.item() == 0
    found.loss.backward()
    gradients = [p.grad for p in own.module.parameters() if p.grad is not None]
    assert gradients
    assert all((grad == 0).all() for grad in gradients)


def test_a_sample_keeps_an_assay_and_hides_only_those_it_has(own, batch):
    available = batch["available_counts"]
    for seed in range(20):
        torch.manual_seed(seed)
        shown = own.module._get_inference_input(batch)["mask"]
        assert (shown <= available).all()
        assert (shown.sum(1) >= 1).all()


def test_thinning_lowers_the_input_and_its_depth(own, batch, monkeypatch):
    monkeypatch.setattr(
        candi_module, "draw_thinning", lambda shape, factors, device: torch.full(shape, 4.0, device=device)
    )
    torch.manual_seed(0)
    inputs = own.module._get_inference_input(batch)
    values, counts = inputs["values"], batch["counts"]
    assert (values <= counts).all()
    assert (values == values.round()).all()
    n = counts.sum().item()
    # binomial with probability 1/4
    assert abs(values.sum().item() - n / 4) < 4 * np.sqrt(n * 3 / 16)
    before, after = batch["continuous"], inputs["continuous"]
    np.testing.assert_allclose(after[:, :, own.module.depth_index], before[:, :, own.module.depth_index] - 2)
    assert after[:, :, own.module.coverage_index].isnan().all()
    assert torch.equal(after[:, :, 2].nan_to_num(-1), before[:, :, 2].nan_to_num(-1))
    # the covariates of the target are those of the full depth
    encoded = own.module.inference(**inputs)
    wanted = own.module._get_generative_input(batch, encoded)["continuous"]
    assert torch.equal(wanted.nan_to_num(-1), before.nan_to_num(-1))


def test_one_factor_a_sample_or_one_an_assay(adata, make):
    for each, expected in ((False, {(1,)}), (True, {(1,), (4,)})):
        model = make(adata.copy(), thinning=(1, 4), thin_each_assay=each)
        batch = model.windows(model.adata)[[[1, 0]] * 16]
        depth = model.module.depth_index
        torch.manual_seed(0)
        after = model.module._get_inference_input(batch)["continuous"][:, :, depth]
        fall = (batch["continuous"][:, :, depth] - after)[:, [0, 2, 3]].round()
        n_kinds = {len(row.unique()) for row in fall}
        assert set(fall.unique().tolist()) == {0.0, 2.0}
        assert (2 in n_kinds) == each, expected


def test_without_thinning_nothing_is_thinned(adata, make):
    model = make(adata, thinning=(1,))
    batch = model.windows(adata)[ITEMS]
    inputs = model.module._get_inference_input(batch)
    assert torch.equal(inputs["values"], batch["counts"])
    assert inputs["continuous"] is batch["continuous"]


def test_signals_are_not_thinned(adata, make):
    model = make(adata, setup={"counts_key": None})
    batch = model.windows(adata)[ITEMS]
    inputs = model.module._get_inference_input(batch)
    assert torch.equal(inputs["values"], batch["signal"])
    assert torch.equal(model.module.transformed(inputs["values"]), batch["signal"])


def test_some_samples_may_hide_everything(make):
    data = epivi.simulate.bulk(3, 4, chrom_sizes=[320, 160], dna=True, seed=2)
    model = make(data, setup={"validation_chroms": ["chr2"], "test_chroms": None}, hide_all_rate=0.5)
    batch = model.windows(data)[[[0, 0]] * 400]
    torch.manual_seed(0)
    blind = (model.module._get_inference_input(batch)["mask"].sum(1) == 0).float().mean().item()
    assert abs(blind - 0.5) < 0.1


def test_the_depth_is_an_offset_of_the_default_head_alone(adata, make):
    for head, slope in (("default", 1.0), ("paper", 0.0)):
        model = make(adata.copy(), head=head)
        batch = model.windows(model.adata)[ITEMS]
        encoded = model.module.inference(**model.module._get_inference_input(batch))
        inputs = model.module._get_generative_input(batch, encoded)
        first = model.module.generative(**inputs)["outputs"].log_mean_bla
        inputs["log_depth_ratio"] = inputs["log_depth_ratio"] + 0.25
        second = model.module.generative(**inputs)["outputs"].log_mean_bla
        np.testing.assert_allclose((second - first).detach(), 0.25 * slope, atol=1e-5)


def test_covariates_are_standardised_by_the_training_biosamples(adata, make):
    adata.obs["split"] = ["train", "train", "train", "test", "test"]
    model = make(adata, setup={"split_key": "split", "covariates_key": ["depth", "read_length"]})
    available = adata.obsm["availability"][:3]
    depth = np.log2(adata.obsm["depth"][:3][available])
    standard = model.module.standardised(torch.tensor([[[depth.mean(), np.nan]], [[depth.mean() + depth.std(), 0.0]]]))
    assert standard[0, 0, 0].item() == pytest.approx(0, abs=1e-4)
    assert standard[0, 0, 1].isnan()
    assert standard[1, 0, 0].item() == pytest.approx(1, abs=1e-4)


def test_laws_stay_in_single_precision_where_the_network_is_in_half(own, batch):
    torch.manual_seed(0)
    first = run(own.module, batch)[2]["outputs"]
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, encoded, outputs = run(own.module, batch)
        loss = own.module.loss(batch, encoded, outputs).loss
    for one, other in zip(first, outputs["outputs"], strict=True):
        assert other.dtype == torch.float32
        np.testing.assert_allclose(other.detach(), one.detach(), atol=0.1, rtol=0.1)
    assert loss.dtype == torch.float32


def test_swapped_assays_are_read_from_the_partner_and_the_targets_stay(adata, make, monkeypatch):
    model = make(adata, swap_rate=0.5, mixup=0.0, thinning=(1,), covariate_dropout_rate=0.0)
    module = model.module.train()
    batch = model.windows(adata)[np.array([[b, 0] for b in (1, 3, 0, 2)])]
    drawn = []

    def swap(*args):
        drawn.append(swap_assays(*args))
        return drawn[-1]

    monkeypatch.setattr(candi_module, "swap_assays", swap)
    torch.manual_seed(3)
    inputs = module._get_inference_input(batch)
    swapped = drawn[0]
    assert swapped.any()
    partner = torch.tensor([1, 0, 3, 2])
    assert torch.equal(inputs["values"], torch.where(swapped[:, None], batch["counts"][partner], batch["counts"]))
    numbers = torch.where(swapped[:, :, None], batch["continuous"][partner], batch["continuous"])
    assert torch.equal(inputs["continuous"].nan_to_num(-9), numbers.nan_to_num(-9))
    found = module.inference(**inputs)
    outputs = module.generative(**module._get_generative_input(batch, found))
    changed = batch | {"counts": torch.where(swapped[:, None], batch["counts"] + 50, batch["counts"])}
    losses, again = (module.loss(data, found, outputs).extra_metrics for data in (batch, changed))
    assert losses["counts_upsampling"] != again["counts_upsampling"]
    assert torch.equal(losses["counts_imputation"], again["counts_imputation"])
    module.eval()
    module._get_inference_input(batch)
    assert len(drawn) == 1


def test_mixed_biosamples_train_and_the_order_is_paired(adata, make, learn):
    model = make(adata, mixup=1.0)
    learn(model, 1)
    assert np.isfinite(model.history["train_loss"].to_numpy(dtype=float)).all()
    with pytest.raises(ConfigError, match="one locus"):
        model.module.train()(model.windows(adata)[np.array([[0, 0], [1, 160]])])
    model.module.eval()
