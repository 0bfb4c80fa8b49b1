from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from epivi.models.convnetvae.config import FcvaeConfig
from epivi.models.convnetvae.fc_module import FcvaeModule, GroupedLayer, PaddedCovariates
from epivi.nn.covariates import Covariates

COLUMNS = [(2, 4), (3, 2), (2, 1), (1, 1)]
TABLE = {
    1: (12_876_744, 19_313_580, 12_875_208, 6_437_604),
    2: (12_943_816, 19_414_188, 12_942_280, 6_471_140),
    3: (13_010_888, 19_514_796, 13_009_352, 6_504_676),
}


@pytest.fixture
def build():
    def module(lengths, n_batch, **options):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(2)
            return FcvaeModule(
                FcvaeConfig(**options), lengths, Covariates(n_batch=n_batch), library=torch.ones(len(lengths))
            )

    return module


@pytest.mark.parametrize("column", range(4))
@pytest.mark.parametrize("n_layers", TABLE)
def test_parameters_are_those_of_the_table_and_of_the_formula(build, n_parameters, n_layers, column):
    c, s = COLUMNS[column]
    with torch.device("meta"):
        found = n_parameters(build((25_000,) * c, s, n_layers=n_layers))
    assert found == TABLE[n_layers][column]
    bins, h, z = 25_000, 128, 30
    deeper = (n_layers - 1) * (h**2 + 3 * h)
    expert = (bins + s) * h + 3 * h + deeper + 2 * (h * z + z)
    assert found == c * (expert + (z + s) * h + 3 * h + deeper + h * bins + bins)


@pytest.mark.parametrize(("c", "count"), [(2, 1_033_656), (3, 1_550_484)])
def test_small_networks_have_the_published_sizes(build, n_parameters, c, count):
    assert n_parameters(build((1992,) * c, 1, n_latent=10)) == count


@pytest.mark.parametrize("training", [False, True])
def test_grouped_layers_are_one_network_a_modality(training):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layer = GroupedLayer(3, 4, linear=True, dropout_rate=0.0, momentum=0.1, eps=1e-5).train(training)
        x_bch = torch.randn(9, 3, 4)
    found = layer(x_bch)
    for m in range(3):
        part = x_bch[:, m] @ layer.linear.weight[m] + layer.linear.bias[m]
        mean, var = (part.mean(0), part.var(0, correction=0)) if training else (torch.zeros(4), torch.ones(4))
        torch.testing.assert_close(found[:, m], torch.relu((part - mean) / (var + 1e-5).sqrt()))


def expert(module, m, x_bl, covariates_bk):
    """One expert written out, two layers."""
    rows = slice(sum(module.lengths[:m]), sum(module.lengths[: m + 1]))
    h = module.config.n_hidden
    units = slice(m * h, (m + 1) * h)
    x = torch.log1p(x_bl) @ module.first.weight[rows] + module.first.bias[m]
    x = x + covariates_bk @ module.first_covariates.weight[units].t()
    for i, layer in enumerate(module.encoder):
        if i:
            x = x @ layer.linear.weight[m] + layer.linear.bias[m]
        norm = layer.norm
        x = (x - norm.running_mean[units]) / (norm.running_var[units] + norm.eps).sqrt()
        x = torch.relu(x * norm.weight[units] + norm.bias[units])
    return x @ module.mean.weight[m] + module.mean.bias[m], x @ module.logvar.weight[m] + module.logvar.bias[m]


def rows_of(x_bf):
    at = x_bf.nonzero(as_tuple=True)
    indptr = torch.cat([torch.zeros(1, dtype=torch.long), torch.bincount(at[0], minlength=len(x_bf)).cumsum(0)])
    return indptr, at[1], x_bf[at]


@pytest.fixture
def case(build):
    """Three modalities of 5, 9 and 4 features in two batches, in double precision."""
    module = build((5, 9, 4), 2, n_latent=3, n_hidden=6, n_layers=2).double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in [*module.named_parameters(), *module.named_buffers()]:
            if value.is_floating_point() and value.ndim == 1:
                value.copy_(torch.rand(value.shape, generator=generator) + (0.5 if "var" in name else 0.0))
    x_bf = torch.poisson(torch.full((8, 18), 0.8, dtype=torch.double), generator=generator)
    covariates_bk = torch.eye(2, dtype=torch.double)[torch.tensor([0, 1] * 4)]
    return module, x_bf, covariates_bk


def test_every_modality_has_an_encoder_of_its_own(case):
    module, x_bf, covariates_bk = case
    groups = module.groups(*rows_of(torch.log1p(x_bf)))
    mean_bcd, logvar_bcd = module.experts(groups, covariates_bk)
    for m, part_bl in enumerate(x_bf.split(module.lengths, dim=1)):
        mean, logvar = expert(module, m, part_bl, covariates_bk)
        torch.testing.assert_close(mean_bcd[:, m], mean)
        torch.testing.assert_close(logvar_bcd[:, m], logvar.clamp(-8, 8))


def test_the_posterior_is_the_product_of_the_measured_experts_and_the_prior(case):
    """Equations 4-5, modality by modality, for every pattern of missing modalities."""
    module, x_bf, covariates_bk = case
    mask_bc = torch.tensor([[i >> m & 1 for m in range(3)] for i in range(8)], dtype=torch.double)
    outputs = module.inference(*rows_of(x_bf), mask_bc, covariates_bk, deterministic=True)
    precision, weighted = torch.ones(8, 3, dtype=torch.double), torch.zeros(8, 3, dtype=torch.double)
    parts = []
    for m, part_bl in enumerate(x_bf.split(module.lengths, dim=1)):
        mean, logvar = expert(module, m, part_bl, covariates_bk)
        parts.append(mask_bc[:, m, None] / logvar.clamp(-8, 8).exp())
        precision, weighted = precision + parts[-1], weighted + parts[-1] * mean
    torch.testing.assert_close(outputs["mean_bd"], weighted / precision)
    torch.testing.assert_close(outputs["logvar_bd"].exp(), 1 / precision)
    # nothing measured: the prior, exactly
    assert (outputs["mean_bd"][0] == 0).all()
    assert (outputs["qz"].scale[0] == 1).all()
    weights = module.expert_weights(*rows_of(x_bf), mask_bc, covariates_bk)
    expected = torch.stack([*parts, torch.ones_like(precision)], 1) / precision.unsqueeze(1)
    torch.testing.assert_close(weights, expected.mean(2))
    torch.testing.assert_close(weights.sum(1), torch.ones(8, dtype=torch.double))
    assert weights[0].tolist() == [0, 0, 0, 1]


def test_the_order_of_bins_does_not_matter(adata, make, entries, forward):
    """The same network on permuted bins, its weights permuted with them."""
    model = make("FCVAE", adata, likelihood="nb")
    torch.nn.init.normal_(model.module.log_dispersion, generator=torch.Generator().manual_seed(0))
    order = np.random.default_rng(0).permutation(120)
    columns = np.concatenate([order + 120 * m for m in range(3)])
    other = adata.copy()
    del other.uns["_scvi_uuid"]
    other.obsm["tracks"] = other.obsm["tracks"][:, columns].tocsr()
    permuted = make("FCVAE", other)
    permuted = make("FCVAE", other, likelihood="nb")
    state = model.module.state_dict()
    for key in ("first.weight", "output.weight", "output.bias", "log_dispersion"):
        state[key] = state[key][columns]
    permuted.module.load_state_dict(state)
    expected, found = (forward(m.module, entries(m)) for m in (model, permuted))
    torch.testing.assert_close(found[0]["mean_bd"], expected[0]["mean_bd"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found[2].loss, expected[2].loss, rtol=1e-6, atol=0.0)


def test_the_first_layer_is_drawn_as_one_linear_layer_on_bins_and_covariates(build):
    module = build((400, 100), 3, n_hidden=64)
    for m, (weights, length) in enumerate(zip(module.first.weight.split((400, 100)), (400, 100), strict=True)):
        bound = 1 / math.sqrt(length + 3)
        for part in (weights, module.first.bias[m], module.first_covariates.weight[64 * m : 64 * (m + 1)]):
            assert 0.8 * bound < part.abs().max() <= bound


def test_one_batch_is_one_column_of_zeros():
    alone = PaddedCovariates(n_batch=1)
    assert (alone.n_columns, alone.is_padded) == (1, True)
    assert alone(torch.zeros(3, dtype=torch.long)).tolist() == [[0.0]] * 3
    for covariates in (Covariates(n_batch=2), Covariates(n_continuous=1), Covariates(n_cats_per_cov=[3])):
        padded = PaddedCovariates.of(covariates)
        assert not padded.is_padded
        assert padded.n_columns == covariates.n_columns
    # the constant column becomes that of the first batch, or stays where there is still one
    assert PaddedCovariates(n_batch=2).columns_of(alone) == [0]
    assert alone.columns_of(alone) == [0]
    assert PaddedCovariates(n_batch=3).columns_of(PaddedCovariates(n_batch=2)) == [0, 1]


def test_the_weights_of_a_constant_column_are_zero(build):
    module = build((5, 4), 1, n_latent=3, n_hidden=6)
    assert (module.first_covariates.weight == 0).all()
    assert (module.expand.weight[:, 3:] == 0).all()
    assert (module.expand.weight[:, :3] != 0).all()


def test_batch_statistics_are_those_of_the_cells_that_have_the_modality():
    layer = GroupedLayer(2, 3, linear=False, dropout_rate=0.0, momentum=0.3, eps=1e-5).double()
    generator = torch.Generator().manual_seed(0)
    x_bch = torch.randn(9, 2, 3, generator=generator, dtype=torch.double)
    seen_bc = torch.ones(9, 2)
    seen_bc[4:, 1] = 0
    found_bch = layer(x_bch, seen_bc)
    plain = torch.nn.BatchNorm1d(3, momentum=0.3).double()
    for m, rows in ((0, slice(None)), (1, slice(0, 4))):
        plain.reset_running_stats()
        expected_bh = torch.relu(plain(x_bch[rows, m]))
        torch.testing.assert_close(found_bch[rows, m], expected_bh)
        torch.testing.assert_close(layer.norm.running_mean.view(2, 3)[m], plain.running_mean)
        torch.testing.assert_close(layer.norm.running_var.view(2, 3)[m], plain.running_var)


def test_a_modality_of_fewer_than_two_cells_keeps_its_statistics():
    layer = GroupedLayer(2, 3, linear=False, dropout_rate=0.0, momentum=0.3, eps=1e-5)
    seen_bc = torch.ones(5, 2)
    seen_bc[1:, 1] = 0
    out_bch = layer(torch.full((5, 2, 3), 2.0), seen_bc)
    torch.testing.assert_close(layer.norm.running_mean.view(2, 3)[1], torch.zeros(3))
    torch.testing.assert_close(out_bch[:, 1], torch.full((5, 3), 2.0), rtol=1e-4, atol=0)


def test_what_absent_modalities_hold_changes_nothing_in_training(build):
    module = build((7, 5), 1, n_latent=3, n_hidden=4, dropout_rate=0.0).train()
    rows, columns = torch.arange(12) % 6, torch.arange(12)
    indptr = torch.tensor([0, 2, 4, 6, 8, 10, 12])
    indices = torch.tensor([0, 7, 1, 8, 2, 9, 3, 10, 4, 11, 5, 8])
    seen_bc = torch.ones(6, 2)
    seen_bc[3:, 1] = 0
    del rows, columns
    results = []
    for other in (1.0, 50.0):
        values = torch.ones(12)
        values[[7, 9, 11]] = other  # counts of the second modality in cells that lack it
        groups = module.groups(indptr, indices, values)
        shifted = [group._replace(values=group.values) for group in groups]
        with torch.no_grad():
            results.append(module.encode(shifted, seen_bc, torch.zeros(6, 1)))
    for first, second in zip(*results, strict=True):
        torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_initial_weights_are_those_of_the_docstring(build):
    """The first layers as torch.nn.Linear, all others Xavier uniform with biases of zero."""
    module = build((900, 700), 3, n_layers=2, n_hidden=40, n_latent=20)

    def fills(weights, bound):
        return 0.98 * bound < weights.abs().max() <= bound * (1 + 1e-6)

    for m, (first, start) in enumerate(((900, 0), (700, 900))):
        bound = 1 / math.sqrt(first + 3)
        assert fills(module.first.weight[start : start + first], bound)
        assert module.first.bias[m].abs().max() <= bound
        assert fills(module.first_covariates.weight[m * 40 : (m + 1) * 40], bound)
        assert fills(module.output.weight[start : start + first], math.sqrt(6 / (40 + first)))
        for head in (module.mean, module.logvar):
            assert fills(head.weight[m], math.sqrt(6 / (40 + 20)))
        for layers in (module.encoder, module.decoder):
            assert fills(layers[1].linear.weight[m], math.sqrt(6 / (40 + 40)))
    assert fills(module.expand.weight, 1 / math.sqrt(20 + 3))
    zero = [module.mean, module.logvar, module.output, module.encoder[1].linear, module.decoder[1].linear]
    assert not any(part.bias.any() for part in zero)
