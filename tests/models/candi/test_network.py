from __future__ import annotations

import pytest
import torch

from epivi._errors import ConfigError
from epivi.models.candi.config import CandiConfig
from epivi.models.candi.network import CandiNetwork, Fusion, InputSkip
from epivi.objectives.experiments import gaussian_nll, masked_mean, negative_binomial_nll, offset_log_mean

GOLDEN = {
    # signal tower, DNA tower, covariates, fusion 1, fusion 2, transformer, decoders, NB and Gaussian head, total
    "paper": (44_100, 1_355_516, 54_137, 928_935, 1_788_885, 35_777_124, 2_322_592, 1_295, 2_520, 44_597_696),
    "tutorial": (1_856, 14_600, 2_144, 5_312, 8_384, 83_928, 18_432, 80, 144, 153_312),
    "test": (432, 2_596, 1_632, 1_032, 1_224, 6_364, 4_176, 48, 84, 21_764),
    "pilot": (6_300, 0, 0, 18_630, 0, 369_522, 46_190, 0, 60, 440_702),
    "paper_code": (294_000, 1_606_330, 54_115, 928_935, 1_788_885, 35_770_560, 2_322_570, 2_660, 2_660, 45_093_285),
}
N_ASSAYS = {"paper": 35, "paper_code": 35, "tutorial": 8, "test": 6, "pilot": 5}
FORMS = {
    "default": {},
    "paper head": {"head": "paper"},
    "prior": {"locus_prior": True},
    "prior and skip": {"locus_prior": True, "skip": True, "dispersion": "assay-bin"},
}
RELEASED = ("head", "squeeze_excitation", "position", "max_distance", "upsampling", "missing")
FORMS["released"] = {name: getattr(CandiConfig.chosen({}, size="paper_code"), name) for name in RELEASED}
A, B, SMALL = 4, 3, {"n_bins": 32, "n_stages": 2, "expansion": 2, "n_heads": 2, "n_layers": 1, "bin_size_bp": 4}


@pytest.fixture(autouse=True)
def one_thread(threads_of_torch):
    """Tensors this small gain nothing from a second thread, and on a busy machine they wait for it."""
    torch.set_num_threads(1)


def build(form="default", *, heads=("counts", "signal"), has_dna=True, seed=0, dtype=torch.float64, **options):
    torch.manual_seed(seed)
    config = CandiConfig(**SMALL | FORMS[form] | options)
    network = CandiNetwork(config, A, 2, (3,), has_dna=has_dna, heads=heads).to(dtype).eval()
    with torch.no_grad():  # skips that start at 0 shall matter
        for name, parameter in network.named_parameters():
            if "skip" in name or "prior" in name:
                parameter.normal_(0.0, 0.3)
    return network


def batch(b=B, bins=32, dtype=torch.float64, seed=1):
    torch.manual_seed(seed)
    mask_ba = torch.ones(b, A)
    mask_ba[0, 1] = mask_ba[-1, 3] = 0.0
    has_prior_ba = torch.ones(b, A)
    has_prior_ba[0, 2] = 0.0
    return {
        "values_bla": 2 * torch.rand(b, bins, A, dtype=dtype),
        "mask_ba": mask_ba,
        "continuous_bak": torch.randn(b, A, 2, dtype=dtype),
        "categorical_bak": torch.randint(-1, 3, (b, A, 1)),
        "dna_bg": torch.randint(0, 5, (b, 4 * bins), dtype=torch.uint8),
        "prior_bla": 3 * torch.rand(b, bins, A, dtype=dtype),
        "has_prior_ba": has_prior_ba,
    }


def predict(network, batch, wanted=None, bin_mask_bl=None):
    prior = {name: batch[name] for name in ("prior_bla", "has_prior_ba")}
    inputs_blc = network.inputs(batch["values_bla"], batch["mask_ba"], **prior)
    z_btd = network.encode(**batch, bin_mask_bl=bin_mask_bl)
    wanted = wanted or {name: batch[name] for name in ("continuous_bak", "categorical_bak")}
    outputs = network.decode(z_btd, **wanted, **prior, inputs_blc=inputs_blc, bin_mask_bl=bin_mask_bl)
    return z_btd, [x for x in outputs if x is not None]


@pytest.mark.parametrize("size", GOLDEN)
def test_golden_parameter_counts(size):
    is_pilot = size == "pilot"
    with torch.device("meta"):
        network = CandiNetwork(
            CandiConfig.chosen({}, size=size),
            N_ASSAYS[size],
            0 if is_pilot else 3,
            () if is_pilot else (2,),
            has_dna=not is_pilot,
            heads=("signal",) if is_pilot else ("counts", "signal"),
        )
    *parts, decoder, counts, signal, total = GOLDEN[size]
    found = network.parameter_counts()
    names = ("signal_tower", "dna_tower", "covariates", "fusion", "dna_fusion", "transformer")
    assert [found[name] for name in names] == parts
    assert {found[name] for name in found if name.startswith("decoder")} == {decoder}
    assert (found.get("head_counts", 0), found["head_signal"]) == (counts, signal)
    assert sum(found.values()) == sum(p.numel() for p in network.parameters()) == total
    if size == "paper_code":
        assert sum(found[name] for name in names) == 40_442_825
        gates = sum(p.numel() for name, p in network.named_parameters() if ".gate." in name)
        assert gates == 501_134


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("heads", [("counts",), ("signal",), ("signal", "counts")])
def test_shapes_of_latent_and_outputs(form, heads):
    network, data = build(form, heads=heads), batch()
    z_btd, outputs = predict(network, data)
    assert z_btd.shape == (B, 8, A * 4)
    assert len(outputs) == 2 * len(heads)
    assert all(x.shape == (B, 32, A) and x.isfinite().all() for x in outputs)
    named = network.decode(z_btd, data["continuous_bak"], data["categorical_bak"], data["prior_bla"],
                           data["has_prior_ba"], inputs_blc=network.inputs(*list(data.values())[:2],
                           data["prior_bla"], data["has_prior_ba"]))  # fmt: skip
    assert (named.log_mean_bla is None, named.mean_bla is None) == ("counts" not in heads, "signal" not in heads)


@pytest.mark.parametrize("junk", ["random", "nan"])
@pytest.mark.parametrize("form", FORMS)
def test_what_is_unavailable_has_no_influence(form, junk):
    network, data = build(form), batch()
    wanted = {name: data[name].clone() for name in ("continuous_bak", "categorical_bak")}
    _, expected = predict(network, data, wanted)
    off_ba, no_prior_ba = data["mask_ba"] == 0, data["has_prior_ba"] == 0

    def fill(name, where):
        junk_like = torch.full_like(data[name], torch.nan) if junk == "nan" else 1e6 * torch.randn_like(data[name])
        return torch.where(where, junk_like, data[name])

    other = data | {
        "values_bla": fill("values_bla", off_ba[:, None]),
        "prior_bla": fill("prior_bla", no_prior_ba[:, None]),
        "continuous_bak": fill("continuous_bak", off_ba[:, :, None]),
        "categorical_bak": data["categorical_bak"].masked_fill(off_ba[:, :, None], 2 if junk == "random" else -1),
    }
    _, found = predict(network, other, wanted)
    assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))
    sum(x.square().sum() for x in found).backward()
    assert all(p.grad.isfinite().all() for p in network.parameters() if p.grad is not None)


@pytest.mark.parametrize("form", FORMS)
def test_biosamples_of_a_batch_do_not_see_each_other(form):
    network, data = build(form, dtype=torch.float32), batch(b=5, dtype=torch.float32)
    order = torch.tensor([3, 0, 4, 1, 2])
    with torch.no_grad():
        z_btd, expected = predict(network, data)
        z_permuted, permuted = predict(network, {name: x[order] for name, x in data.items()})
        z_single, single = predict(network, {name: x[2:3] for name, x in data.items()})
    for whole, other, one in zip([z_btd, *expected], [z_permuted, *permuted], [z_single, *single], strict=True):
        torch.testing.assert_close(other, whole[order], atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(one, whole[2:3], atol=1e-6, rtol=1e-5)


def permute_assays(network, order):
    """Permute every assay axis of the weights: towers by blocks of channels, covariates by blocks, heads by rows."""

    def blocks(n):
        return torch.arange(n).view(A, -1)[order].flatten()

    def take(parameter, index, dim=0):
        parameter.data = parameter.data.index_select(dim, index)

    for stage in network.signal_tower.stages:
        for part in (stage.conv, stage.shortcut, stage.norm):
            take(part.weight, blocks(part.weight.shape[0]))
            take(part.bias, blocks(part.weight.shape[0]))
    width = network.fusion.n_inputs
    rest = torch.arange(width, network.fusion.project.weight.shape[1])
    take(network.fusion.project.weight, torch.cat([blocks(width), rest]), dim=1)
    embeddings = [network.covariates, *(decoder.covariates for decoder in network.decoders.values())]
    for embed in embeddings:
        columns = torch.arange(embed.project.weight.shape[1]).view(3, A, -1)  # fields, assays, width
        take(embed.project.weight, columns[:, order].flatten(), dim=1)
    for decoder in network.decoders.values():
        if decoder.skip is not None:
            inputs = A + blocks(decoder.skip.hidden.weight.shape[1] - A)
            take(decoder.skip.hidden.weight, torch.cat([torch.arange(A), inputs]), dim=1)
    for name, parameter in network.heads.named_parameters():
        if "norm" not in name or parameter.shape == (A,):
            take(parameter, order)


@pytest.mark.parametrize("form", [name for name in FORMS if name != "released"])
def test_permuting_assays_with_their_weights_permutes_the_outputs(form):
    network, data, order = build(form), batch(), torch.tensor([2, 0, 3, 1])
    _, expected = predict(network, data)
    permute_assays(network, order)
    axis = {"dna_bg": None, "values_bla": 2, "prior_bla": 2}
    moved = {
        name: x if axis.get(name, 1) is None else x.index_select(axis.get(name, 1), order) for name, x in data.items()
    }
    _, found = predict(network, moved)
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two[:, :, order])


@pytest.mark.parametrize("form", [name for name in FORMS if name != "released"])
@pytest.mark.parametrize("real", [8, 20])
def test_the_padding_of_a_short_run_changes_nothing(form, real):
    network, data = build(form), batch()
    bin_mask_bl = (torch.arange(32) < real).expand(B, 32)
    z_btd, found = predict(network, data, bin_mask_bl=bin_mask_bl)
    short = data | {"dna_bg": data["dna_bg"][:, : 4 * real]}
    short |= {name: data[name][:, :real] for name in ("values_bla", "prior_bla")}
    z_short, expected = predict(network, short)
    torch.testing.assert_close(z_btd[:, : real // 4], z_short)
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one[:, :real], two)


def test_doubling_the_depth_doubles_the_mean_when_depth_is_no_covariate():
    network, data = build(), batch()
    outputs = network.decode(network.encode(**data), data["continuous_bak"], data["categorical_bak"])
    ratio_ba = torch.zeros(B, A, dtype=torch.float64)
    once, twice = (offset_log_mean(outputs.log_mean_bla, ratio_ba + x).exp() for x in (0.0, torch.tensor(2.0).log()))
    torch.testing.assert_close(twice, 2 * once, rtol=1e-6, atol=0.0)


def test_a_prior_is_where_predictions_start():
    torch.manual_seed(0)
    config = CandiConfig(**SMALL | {"locus_prior": True, "skip": True, "input": "signal"})
    network, data = CandiNetwork(config, A, 0, (), has_dna=False, heads=("signal",)), batch(dtype=torch.float32)
    data = {name: data[name] for name in ("values_bla", "mask_ba", "prior_bla", "has_prior_ba")}
    prior = [data["prior_bla"], data["has_prior_ba"]]
    inputs_blc = network.inputs(*data.values())
    assert inputs_blc.shape == (B, 32, 3 * A)
    with torch.no_grad():
        z_btd = network.encode(data["values_bla"], data["mask_ba"], prior_bla=prior[0], has_prior_ba=prior[1])
        mean_bla = network.decode(z_btd, None, None, *prior, inputs_blc=inputs_blc).mean_bla
    is_in = (prior[1] > 0)[:, None].expand_as(mean_bla)
    assert (mean_bla - prior[0])[is_in].abs().mean() < 0.15


def test_the_skip_passes_single_bins_and_the_latent_does_not():
    network, data = build("prior and skip", has_dna=False), batch()
    prior = [data["prior_bla"], data["has_prior_ba"]]
    inputs_blc = network.inputs(data["values_bla"], data["mask_ba"], *prior)
    z_btd = network.encode(**data)
    changed_blc = inputs_blc.clone()
    changed_blc[:, 10] += 1.0
    covariates = data["continuous_bak"], data["categorical_bak"], *prior
    one, two = (network.decode(z_btd, *covariates, inputs_blc=x).mean_bla for x in (inputs_blc, changed_blc))
    assert (one != two).any(2).any(0).nonzero().flatten().tolist() == [9, 10, 11]
    skip = InputSkip(A, 3 * A)
    x_bla = torch.randn(2, 8, A)
    assert torch.equal(skip(x_bla, torch.randn(2, 8, 3 * A)), x_bla)


@pytest.mark.parametrize("form", FORMS)
def test_empty_masks_cost_nothing_and_all_gradients_are_zero(form):
    network, data = build(form), batch()
    _, (log_mean, log_theta, mean, variance) = predict(network, data)
    empty = torch.zeros(B, 1, A)
    loss = masked_mean(gaussian_nll(data["values_bla"], mean, variance), empty)
    loss = loss + masked_mean(negative_binomial_nll(data["values_bla"].round(), log_mean, log_theta), empty)
    loss.backward()
    assert loss.item() == 0.0
    assert all((p.grad == 0).all() for p in network.parameters() if p.grad is not None)


@pytest.mark.parametrize("form", FORMS)
def test_every_weight_learns(form):
    network, data = build(form), batch()
    data["continuous_bak"][1, 0] = torch.nan
    _, outputs = predict(network, data)
    weights = [torch.randn_like(x) for x in outputs]
    sum((x * w).sum() for x, w in zip(outputs, weights, strict=True)).backward()
    # a gate of so few channels has one hidden unit, which a ReLU may have switched off
    silent = [name for name, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert [name for name in silent if ".gate." not in name] == []


def test_heads_are_in_single_precision_under_autocast():
    network, data = build("prior", dtype=torch.float32), batch(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z_btd, outputs = predict(network, data)
    assert all(x.dtype == torch.float32 and x.isfinite().all() for x in outputs)
    z_plain, plain = predict(network, data)
    torch.testing.assert_close(z_btd.float(), z_plain, atol=0.15, rtol=0.1)
    torch.testing.assert_close(outputs, plain, atol=0.15, rtol=0.1)


def test_fusion_is_a_linear_map_of_both_parts():
    fusion = Fusion(4, 3, 5).double()
    x_btd, constant_bh = torch.randn(2, 7, 4, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    joined = torch.cat([x_btd, constant_bh[:, None].expand(2, 7, 3)], dim=2)
    torch.testing.assert_close(fusion(x_btd, constant_bh), fusion.norm(fusion.project(joined)).relu())


def test_what_is_missing_is_named():
    data = batch()
    with pytest.raises(ConfigError, match="built with DNA; pass dna_bg"):
        build().encode(**data | {"dna_bg": None})
    with pytest.raises(ConfigError, match="The windows have 30 bins, which is not a multiple of 4"):
        build().encode(**data | {"values_bla": data["values_bla"][:, :30]})
    z_btd = torch.zeros(B, 8, A * 4, dtype=torch.float64)
    with pytest.raises(ConfigError, match="locus_prior=True; pass prior_bla and has_prior_ba"):
        build("prior").encode(**data | {"prior_bla": None})
    with pytest.raises(ConfigError, match="locus_prior=True; pass prior_bla and has_prior_ba"):
        build("prior").decode(z_btd)
    with pytest.raises(ConfigError, match=r"skip=True; pass inputs_blc, the result of inputs\(...\)"):
        build("prior and skip").decode(z_btd)
    with pytest.raises(ConfigError, match="at least one head, any of counts, signal"):
        build(heads=())
    with pytest.raises(ConfigError, match="Did you mean 'counts'"):
        build(heads=("count",))
    with pytest.raises(ConfigError, match="n_assays=0"):
        CandiNetwork(CandiConfig(), 0, 0, (), has_dna=False, heads=("signal",))
