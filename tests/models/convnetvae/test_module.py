from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch.nn.functional import conv1d, pad

from epivi.models.convnetvae.config import ConvNetVaeConfig
from epivi.models.convnetvae.conv_module import ConvNetVaeModule
from epivi.models.convnetvae.geometry import ConvGeometry
from epivi.nn.covariates import Covariates

# of the specification: channels, batches -> parameters of each variant at 25,000 bins
VARIANTS = {"K11 S11": (1, 11, 11), "K31 S31": (1, 31, 31), "K51 S51": (1, 51, 51)}
VARIANTS |= {f"K11 S3, {n} layers": (n, 11, 3) for n in (1, 2, 3)}
COLUMNS = [(2, 4), (3, 2), (2, 1), (1, 1)]
TABLE = {
    "K11 S11": (11_866_110, 11_721_087, 11_574_654, 11_573_949),
    "K31 S31": (4_222_014, 4_172_095, 4_118_206, 4_116_221),
    "K51 S51": (2_576_318, 2_547_903, 2_512_958, 2_509_693),
    "K11 S3, 1 layers": (43_480_286, 42_947_359, 42_413_022, 42_412_317),
    "K11 S3, 2 layers": (29_035_582, 28_680_447, 28_323_902, 28_323_197),
    "K11 S3, 3 layers": (19_556_350, 19_319_743, 19_081_726, 19_081_021),
}
MASKED = {"K31 S31": 4_175_071, "K11 S11": 11_722_143, "K11 S3, 2 layers": 28_681_503}
# channels, batches, bins, latent, variant, count
SMALL_GOLDENS = [
    (2, 1, 1992, 10, "K11 S11", 814_006),
    (3, 1, 1992, 10, "K11 S11", 814_711),
    (2, 2, 1000, 8, "K11 S3, 2 layers", 1_045_906),
]


@pytest.fixture
def build(layout):
    def module(variant, n_channels, n_batch, n_bins=25_000, **options):
        n_layers, kernel_size, stride = VARIANTS[variant]
        config = ConvNetVaeConfig(n_layers=n_layers, kernel_size=kernel_size, stride=stride, **options)
        geometry = ConvGeometry.of(layout(n_channels, n_bins), "none", stride)
        with torch.device("meta"):
            return ConvNetVaeModule(config, geometry, Covariates(n_batch=n_batch), library=torch.ones(n_channels))

    return module


@pytest.mark.parametrize("column", range(4))
@pytest.mark.parametrize("variant", TABLE)
def test_parameters_are_those_of_the_table(build, n_parameters, variant, column):
    assert n_parameters(build(variant, *COLUMNS[column])) == TABLE[variant][column]


@pytest.mark.parametrize("variant", TABLE)
def test_parameters_follow_the_formula(build, n_parameters, variant):
    n, kernel, stride = VARIANTS[variant]
    widths, length, h, z, s = (3, 32, 64, 128)[: n + 1], 25_000, 128, 30, 2
    for _ in range(n):
        length = -(-length // stride)
    flat = widths[-1] * length
    convolutions = sum(a * b * kernel for a, b in itertools.pairwise(widths))
    encoder = convolutions + 3 * sum(widths[1:])
    decoder = convolutions + sum(widths[:-1]) + 2 * sum(widths[1:-1])
    dense = (flat + s) * h + 3 * h + 2 * (h * z + z) + (z + s) * flat + flat
    assert n_parameters(build(variant, 3, 2)) == encoder + decoder + dense


@pytest.mark.parametrize("variant", MASKED)
def test_mask_channels_add_one_input_a_modality(build, n_parameters, variant):
    assert n_parameters(build(variant, 3, 2, mask_channels=True)) == MASKED[variant]
    assert MASKED[variant] - TABLE[variant][1] == 3 * 32 * VARIANTS[variant][1]


@pytest.mark.parametrize(("c", "s", "bins", "z", "variant", "count"), SMALL_GOLDENS)
def test_small_networks_have_the_published_sizes(build, n_parameters, c, s, bins, z, variant, count):
    assert n_parameters(build(variant, c, s, bins, n_latent=z)) == count


def norm(x, layer):
    shape = (1, -1, 1) if x.ndim == 3 else (1, -1)
    mean, var, weight, bias = (
        value.view(shape) for value in (layer.running_mean, layer.running_var, layer.weight, layer.bias)
    )
    return (x - mean) / (var + layer.eps).sqrt() * weight + bias


def paper(module, x_bcl, covariates, kernel, stride):
    """The network of the paper written out: left padding, strided convolutions, upsampling."""
    h, lengths = x_bcl, [x_bcl.shape[2]]
    for conv, layer in zip(module.encoder.convs, module.encoder.norms, strict=True):
        lengths.append(-(-lengths[-1] // stride))
        h = pad(h, ((lengths[-1] - 1) * stride - lengths[-2] + kernel, 0))
        h = torch.relu(norm(conv1d(h, conv.weight, conv.bias, stride=stride), layer))
    joined = torch.cat([h.flatten(1), covariates], 1) @ module.join[0].weight.t() + module.join[0].bias
    hidden = torch.relu(norm(joined, module.join[1]))
    mean, logvar = (hidden @ head.weight.t() + head.bias for head in (module.heads.mean, module.heads.logvar))
    u = (torch.cat([mean, covariates], 1) @ module.expand.weight.t() + module.expand.bias).view(h.shape)
    for i, conv in enumerate(module.decoder.convs):
        if i:
            u = torch.relu(norm(u, module.decoder.norms[i - 1]))
        before, after = lengths[-1 - i], lengths[-2 - i]
        u = pad(u.repeat_interleave(stride, 2), (after - stride * before + kernel - 1, 0))
        u = conv1d(u, conv.weight, conv.bias)
    return mean, logvar, u


def scramble(module):
    """Weights and statistics that no default hides."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in [*module.named_parameters(), *module.named_buffers()]:
            if "running_var" in name or ("norm" in name and "weight" in name):
                value.copy_(0.5 + torch.rand(value.shape, generator=generator))
            elif value.is_floating_point() and value.ndim == 1 and "library" not in name:
                value.copy_(0.3 * torch.randn(value.shape, generator=generator))


@pytest.mark.parametrize(("n_layers", "kernel", "stride"), [(1, 11, 11), (2, 7, 3), (3, 5, 2)])
@pytest.mark.parametrize("mask_channels", [False, True])
def test_the_network_is_that_of_the_paper(layout, n_layers, kernel, stride, mask_channels):
    """In double precision, on one chromosome, with two batches: means, log variances and logits."""
    config = ConvNetVaeConfig(
        n_layers=n_layers, kernel_size=kernel, stride=stride, n_latent=3, n_hidden=7, n_filters=(4, 5, 6)[:n_layers],
        mask_channels=mask_channels,
    )  # fmt: skip
    geometry = ConvGeometry.of(layout(2, 50), "auto", stride)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        module = ConvNetVaeModule(config, geometry, Covariates(n_batch=2), library=torch.ones(2)).double().eval()
    scramble(module)
    generator = torch.Generator().manual_seed(1)
    x = torch.poisson(torch.full((6, 2, 50), 0.3, dtype=torch.double), generator=generator)
    mask = torch.ones(6, 2, dtype=torch.double)
    if mask_channels:
        mask[0, 1] = mask[4, 0] = 0.0
        x *= mask.unsqueeze(2)
    rows, columns = x.flatten(1).nonzero(as_tuple=True)
    indptr = torch.cat([torch.zeros(1, dtype=torch.long), torch.bincount(rows, minlength=6).cumsum(0)])
    covariates = torch.eye(2, dtype=torch.double)[torch.tensor([0, 1, 0, 1, 1, 0])]
    found = module.inference(indptr, columns, x.flatten(1)[rows, columns], mask, covariates, deterministic=True)
    logits = module.logits(module.generative(found["z"], covariates)["hidden"])[0]
    inputs = x.log1p()
    if mask_channels:
        inputs = torch.stack([inputs, mask.unsqueeze(2).expand_as(inputs)], 2).flatten(1, 2)
    mean, logvar, expected = paper(module, inputs, covariates, kernel, stride)
    torch.testing.assert_close(found["mean_bd"], mean, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found["logvar_bd"], logvar.clamp(-8, 8), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(logits, expected.flatten(1), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("n_layers", [1, 2])
def test_every_parameter_receives_a_gradient(kind, adata, make, entries, forward, n_layers):
    """Catches a network that is built and not used, as the third encoder of the released code."""
    filters = {"n_filters": (4, 6)[:n_layers], "stride": 3} if kind == "ConvNetVAE" else {}
    model = make(kind, adata, likelihood="nb", n_layers=n_layers, **filters)
    module = model.module.eval()
    scramble(module)
    forward(module, entries(model))[2].loss.backward()
    grads = {name: parameter.grad for name, parameter in module.named_parameters()}
    assert [name for name, grad in grads.items() if grad is None or not grad.abs().sum() > 0] == []
    # channels have weights of their own: each has its gradient
    for name, parts in _by_channel(kind, module, grads).items():
        assert all(part.abs().sum() > 0 for part in parts), name


def _by_channel(kind, module, grads):
    if kind == "ConvNetVAE":
        return {
            "encoder": grads["encoder.convs.0.weight"].unbind(1),
            "log_dispersion": grads["log_dispersion"].split(120),
        }
    names = [f"{name}.{what}" for name in ("mean", "logvar") for what in ("weight", "bias")]
    found = {name: grads[name].unbind(0) for name in names}
    found |= {f"first.{what}": grads[f"first.{what}"].chunk(3) for what in ("weight", "bias")}
    found |= {f"output.{what}": grads[f"output.{what}"].chunk(3) for what in ("weight", "bias")}
    found |= {"first_covariates": grads["first_covariates.weight"].chunk(3), "expand": grads["expand.weight"].chunk(3)}
    return found | {f"{part}.0.norm": grads[f"{part}.0.norm.weight"].chunk(3) for part in ("encoder", "decoder")}


@pytest.mark.parametrize("likelihood", ["poisson", "nb"])
def test_the_likelihood_is_that_of_torch(kind, incomplete, make, entries, forward, counts, dense_log_prob, likelihood):
    model = make(kind, incomplete, likelihood=likelihood)
    if likelihood == "nb":
        torch.nn.init.normal_(model.module.log_dispersion, generator=torch.Generator().manual_seed(0))
    tensors = entries(model)
    outputs, hidden, loss = forward(model.module, tensors)
    dense_bcl = torch.from_numpy(counts(incomplete)).double()
    expected_bc = dense_log_prob(model.module, hidden, dense_bcl, tensors["modality_mask"])
    found_bc = model.module.negative_log_likelihood(hidden, outputs["groups"], tensors["modality_mask"])
    torch.testing.assert_close(-found_bc.double(), expected_bc, rtol=1e-5, atol=1e-3)
    kl_b = torch.distributions.kl_divergence(outputs["qz"], torch.distributions.Normal(0.0, 1.0)).sum(1)
    torch.testing.assert_close(loss.loss.double(), (kl_b - expected_bc.sum(1)).mean(), rtol=1e-5, atol=1e-3)
    torch.testing.assert_close(loss.kl_local["kl_local"], kl_b, rtol=1e-4, atol=1e-4)
    weighted = model.module.loss(tensors, outputs, {"hidden": hidden}, kl_weight=0.25)
    torch.testing.assert_close(weighted.loss.double(), (0.25 * kl_b - expected_bc.sum(1)).mean(), rtol=1e-5, atol=1e-3)


def test_the_kl_term_is_scaled(kind, adata, make, entries, forward):
    losses = [forward(m.module, entries(m))[2] for m in (make(kind, adata, kl_scale=scale) for scale in (0.0, 2.0))]
    kl = losses[0].kl_local["kl_local"].mean()
    torch.testing.assert_close(losses[1].loss - losses[0].loss, 2 * kl, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("likelihood", ["poisson", "nb"])
def test_a_modality_without_counts_costs_nothing(kind, adata, make, entries, forward, likelihood):
    dense = adata.obsm["tracks"].toarray()
    dense[5, 120:240] = 0
    dense[7] = 0
    adata.obsm["tracks"] = type(adata.obsm["tracks"])(dense)
    model = make(kind, adata, likelihood=likelihood)
    tensors = entries(model)
    model.module.train()
    outputs, hidden, loss = forward(model.module, tensors)
    found_bc = model.module.negative_log_likelihood(hidden, outputs["groups"], tensors["modality_mask"])
    assert tensors["modality_mask"].all()
    assert found_bc[5, 1] == 0
    assert (found_bc[7] == 0).all()
    assert (found_bc[5, [0, 2]] > 0).all()
    loss.loss.backward()
    assert torch.isfinite(loss.loss)
    assert all(torch.isfinite(parameter.grad).all() for parameter in model.module.parameters())


def test_counts_under_a_masked_modality_change_nothing(kind, incomplete, make, entries, forward):
    """Neither those that the data hold nor those that reach the module."""
    model = make(kind, incomplete)
    tensors = entries(model)
    expected = forward(model.module, tensors)
    masked = tensors["modality_mask"][:, 1] == 0
    assert masked.any()
    other = incomplete.copy()
    dense = other.obsm["tracks"].toarray()
    dense[masked.numpy(), 120:240] = 99
    other.obsm["tracks"] = type(other.obsm["tracks"])(dense)
    del other.uns["_scvi_uuid"]
    found = forward(model.module, entries(make(kind, other)))
    assert torch.equal(found[2].loss, expected[2].loss)
    assert torch.equal(found[0]["mean_bd"], expected[0]["mean_bd"])
    rows = torch.from_numpy(dense).float()
    at = rows.nonzero(as_tuple=True)
    indptr = torch.cat([torch.zeros(1, dtype=torch.long), torch.bincount(at[0], minlength=60).cumsum(0)])
    smuggled = tensors | {"x_indptr": indptr, "x_indices": at[1], "x_values": rows[at]}
    found = forward(model.module, smuggled)
    torch.testing.assert_close(found[2].loss, expected[2].loss)
    torch.testing.assert_close(found[0]["mean_bd"], expected[0]["mean_bd"])


def test_modality_dropout_hides_some_and_keeps_one(kind, adata, make):
    model = make(kind, adata, modality_dropout_rate=0.7)
    mask_bc = torch.ones(4000, 3)
    mask_bc[:1000, 1:] = 0
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        seen_bc = model.module._drop_modalities(mask_bc)
    assert ((seen_bc == 0) | (seen_bc == mask_bc)).all()
    assert (seen_bc.sum(1) >= 1).all()
    assert torch.equal(seen_bc[:1000], mask_bc[:1000])
    # each is hidden with probability 0.7, but for the cells in which all would be
    assert seen_bc[1000:].mean().item() == pytest.approx(0.3 + 0.7**3 / 3, abs=0.02)
    assert make(kind, adata).module._drop_modalities(mask_bc) is mask_bc


def test_modalities_are_hidden_in_training_only_and_from_the_encoder_only(kind, adata, make, entries, monkeypatch):
    model = make(kind, adata, modality_dropout_rate=0.5, dropout_rate=0.0)
    module, tensors, seen = model.module, entries(model), []
    encode = type(module).encode
    monkeypatch.setattr(type(module), "encode", lambda *args: (seen.append(args[2]), encode(*args))[1])
    for training in (True, False):
        outputs = module.train(training).inference(**module._get_inference_input(tensors))
        assert torch.equal(outputs["mask_bc"], tensors["modality_mask"])
    assert 0 < seen[0].mean() < 1
    assert torch.equal(seen[1], tensors["modality_mask"])


@pytest.mark.parametrize("covariate", ["batch", "donor", "age"])
def test_covariates_reach_encoder_and_decoder(kind, adata, make, entries, forward, covariate):
    adata.obs["donor"] = [f"d{i % 3}" for i in range(adata.n_obs)]
    adata.obs["age"] = [math.sin(i) for i in range(adata.n_obs)]
    setup = {"batch_key": "batch", "categorical_covariate_keys": ["donor"], "continuous_covariate_keys": ["age"]}
    model = make(kind, adata, setup=setup)
    module, tensors = model.module, entries(model)
    assert module.covariates.n_columns == 1 + 3 + 2
    expected, hidden, _ = forward(module, tensors)
    key = {"batch": "batch", "donor": "extra_categorical_covs", "age": "extra_continuous_covs"}[covariate]
    changed = tensors | {key: (tensors[key] + 1) % (2.0 if covariate == "batch" else 3.0)}
    found, _, _ = forward(module, changed)
    assert (found["mean_bd"] != expected["mean_bd"]).any(1).all()
    other = module.generative(**module._get_generative_input(changed, expected))["hidden"]
    assert (other != hidden).flatten(1).any(1).all()


def test_modules_leave_the_global_generators_alone(kind, adata, make, global_state):
    before = global_state()
    first, second = make(kind, adata), make(kind, adata)
    assert global_state() == before
    state = second.module.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in first.module.state_dict().items())
