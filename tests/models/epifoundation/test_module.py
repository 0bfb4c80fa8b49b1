from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scvi import REGISTRY_KEYS
from torch.nn.functional import cross_entropy, linear

from epivi import _keys as keys
from epivi.models.epifoundation.heads.local import Links

TOKENS = torch.tensor([[1, 2, 5, 7, 4], [1, 3, 6, 0, 0], [1, 2, 0, 0, 0]])
LENGTH = torch.tensor([5, 3, 2])
CHROM = torch.tensor([[-1, 1, 2, 0, 1], [-1, 2, 1, -1, -1], [-1, 1, -1, -1, -1]])


def size_of(module):
    return sum(parameter.numel() for parameter in module.parameters())


def batch_of(**more):
    shared = {
        keys.BATCH_TOKENS: TOKENS,
        keys.BATCH_LENGTH: LENGTH,
        keys.BATCH_TOKEN_CHROM: CHROM,
        REGISTRY_KEYS.BATCH_KEY: torch.tensor([[0], [1], [1]]),
    }
    return shared | more


def genes_of():
    """Two, one and no pair of genes; the last cell has no RNA."""
    return {
        keys.BATCH_GENES: torch.tensor([[0, 1, 2, 3], [1, 3, -1, -1], [-1, -1, -1, -1]]),
        keys.BATCH_GENE_TARGET: torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]),
        keys.BATCH_N_EXPRESSED: torch.tensor([[2], [1], [0]]),
    }


def spread(module):
    """Make the units of cell vectors and genes others than one, and no weight of the last layers 0."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        module.cell_mean.normal_(generator=generator)
        module.cell_sd.uniform_(0.5, 1.5, generator=generator)
        if hasattr(module, "gene_mean"):
            module.gene_mean.normal_(generator=generator)
            module.gene_sd.uniform_(0.5, 1.5, generator=generator)
            module.decoder.out.weight.normal_(generator=generator)
        if module.readout is not None:
            module.readout.weight.normal_(generator=generator)
    return module


def units(module, z):
    return (z - module.cell_mean) / module.cell_sd


def run(module, batch):
    return module(batch)[2]


# size, (peaks, chromosomes, genes, batches), parameters in pretraining with and without batches
GOLDEN = [
    ("paper", (1_000_000, 24, 20_000, 13), 535_098_883, None),
    ("tutorial", (25_734, 21, 1_677, 12), 3_941_635, 3_931_651),
    ("test", (500, 24, 200, 2), 45_155, None),
]


@pytest.mark.parametrize(("size", "counts", "total", "without"), GOLDEN)
def test_the_number_of_parameters_is_the_published_one(build_module, size, counts, total, without):
    sizes = dict(zip(("n_peaks", "n_chrom", "n_genes", "n_batch"), counts, strict=True))
    with torch.device("meta"):
        module = build_module(size=size, linear_readout=False, **sizes)
        alone = build_module(size=size, linear_readout=False, **(sizes | {"n_batch": 1}))
        read_off = build_module(size=size, linear_readout=True, **sizes)
    assert size_of(module) == total
    assert size_of(read_off) == total + sizes["n_genes"] * module.config.width
    # without batches the decoder reads d columns less, q weights each
    width, n_gate = module.config.width, module.config.n_gate
    assert size_of(alone) == (without or total - (sizes["n_batch"] + 2) * width - n_gate * width)


@pytest.mark.parametrize(
    ("size", "batches", "decoder", "expression", "labels"),
    [
        ("paper", 7_680, 213_507, 147_842, 527_360 + 513 * 4),
        ("tutorial", 1_792, 28_931, 20_674, 33_536 + 129 * 4),
        ("test", 128, 4_227, 3_170, 2_240 + 33 * 4),
    ],
)
def test_the_number_of_parameters_of_the_heads_is_the_published_one(
    build_module, size, batches, decoder, expression, labels
):
    n_batch = {"paper": 13, "tutorial": 12, "test": 2}[size]
    with torch.device("meta"):
        pretraining = build_module(size=size, n_batch=n_batch)
        tuned = build_module(size=size, n_batch=n_batch, task="expression")
        annotation = build_module(size=size, n_batch=n_batch, task="annotation", n_classes=4)
    assert size_of(pretraining.batches) == batches
    assert size_of(pretraining.decoder) == decoder
    assert size_of(tuned.decoder) == expression
    assert size_of(annotation.decoder) == labels
    assert tuned.batches is annotation.batches is annotation.genes is None


@torch.no_grad()
def test_predictions_against_the_concatenated_form_of_the_equations(build_module):
    module = spread(build_module(n_batch=2))
    batch = batch_of()
    z = module.inference(**module._get_inference_input(batch))["z"]
    found = module.generative(z, None, batch[REGISTRY_KEYS.BATCH_KEY])["genes"]
    table, decoder = module.genes(module.encoder.places), module.decoder
    for cell in range(3):
        told = torch.cat([units(module, z[cell]), module.batches(batch[REGISTRY_KEYS.BATCH_KEY][cell, 0])])
        for gene in range(4):
            gate = torch.sigmoid(decoder.gate(table[gene]))
            hidden = linear(torch.cat([told, gate]), decoder.hidden.weight, decoder.hidden.bias)
            hidden = torch.where(hidden > 0, hidden, decoder.activation.weight * hidden)
            torch.testing.assert_close(found[cell, gene], decoder.out(hidden), rtol=1e-6, atol=1e-6)
    sampled = module.generative(z, torch.tensor([[3, 0], [1, 1], [2, -1]]), batch[REGISTRY_KEYS.BATCH_KEY])["genes"]
    torch.testing.assert_close(sampled[0], found[0, [3, 0]])
    torch.testing.assert_close(sampled[1], found[1, [1, 1]])


@torch.no_grad()
def test_the_batch_enters_the_decoder_alone_and_is_averaged_where_it_is_not_told(build_module):
    module = build_module(n_batch=3)
    one, other = (batch_of() | {REGISTRY_KEYS.BATCH_KEY: torch.full((3, 1), code)} for code in (0, 2))
    z = [module.inference(**module._get_inference_input(batch))["z"] for batch in (one, other)]
    assert torch.equal(*z)
    told = [module._with_batch(z[0], batch[REGISTRY_KEYS.BATCH_KEY]) for batch in (one, other)]
    assert not torch.equal(*told)
    mean = module.batches(torch.arange(3)).mean(0)
    torch.testing.assert_close(module._with_batch(z[0], None)[:, 32:], mean.expand(3, -1))


@torch.no_grad()
def test_genes_are_predicted_in_the_order_asked(build_module):
    module = spread(build_module(task="expression"))
    z = torch.randn(2, 32)
    whole = module.generative(z)["genes"]
    order = torch.tensor([2, 0, 3, 1]).expand(2, -1)
    torch.testing.assert_close(module.generative(z, order)["genes"], whole[:, order[0]])


@torch.no_grad()
def test_the_loss_of_pretraining_against_a_loop(build_module):
    module = build_module(n_batch=2)
    batch = batch_of(**genes_of())
    _, outputs, losses = module(batch)
    terms, right, baseline = [], {0: [], 1: []}, []
    for cell in range(3):
        n = int(batch[keys.BATCH_N_EXPRESSED][cell, 0])
        for at, gene in enumerate(batch[keys.BATCH_GENES][cell].tolist()):
            if gene < 0:
                continue
            truth = int(batch[keys.BATCH_GENE_TARGET][cell, at])
            logits = outputs["genes"][cell, at]
            terms.append(-float(logits.log_softmax(0)[truth]))
            right[truth].append(int(logits[1] > logits[0]) == truth)
            odds = math.exp(float(module.gene_log_odds[gene])) * (4 - n) / n
            baseline.append(-math.log(odds / (1 + odds) if truth else 1 / (1 + odds)))
    assert float(losses.loss) == pytest.approx(np.mean(terms), rel=1e-5)
    metrics = losses.extra_metrics
    assert float(metrics["gene_loss"]) == float(losses.loss)
    assert float(metrics["gene_frequency_loss"]) == pytest.approx(np.mean(baseline), rel=1e-5)
    assert float(metrics["balanced_accuracy"]) == pytest.approx((np.mean(right[0]) + np.mean(right[1])) / 2)
    assert losses.n_obs_minibatch == 3


@torch.no_grad()
def test_chance_is_ln_2(build_module):
    module = build_module()
    module.decoder.out.weight.zero_()
    module.decoder.out.bias.fill_(0.4)
    assert float(run(module, batch_of(**genes_of())).loss) == pytest.approx(math.log(2), abs=1e-6)


def test_cells_without_rna_take_part_in_nothing_but_do_not_break(build_module):
    module = build_module(n_batch=2)
    genes = genes_of()
    with torch.no_grad():
        whole = run(module, batch_of(**genes)).loss
        two = {key: value[:2] for key, value in batch_of(**genes).items()}
        torch.testing.assert_close(run(module, two).loss, whole)
    none = {key: value[2:] for key, value in batch_of(**genes).items()}
    for empty in (none, none | {keys.BATCH_GENES: torch.zeros(1, 0).long(), keys.BATCH_GENE_TARGET: torch.zeros(1, 0)}):
        module.zero_grad()
        losses = run(module, empty)
        losses.loss.backward()
        assert float(losses.loss.detach()) == 0.0
        assert all(float(value) == 0.0 for value in losses.extra_metrics.values())
        assert not any(p.grad.any() for p in module.parameters() if p.grad is not None)


@torch.no_grad()
@pytest.mark.parametrize("linear_readout", [True, False])
def test_expression_is_told_in_units_of_each_gene(build_module, linear_readout):
    module = spread(build_module(task="expression", linear_readout=linear_readout))
    z = torch.randn(2, 32)
    unit = units(module, z)
    raw = module.decoder(unit, module.genes(module.encoder.places))[:, :, 0]
    if linear_readout:
        raw = raw + unit @ module.readout.weight.T
    else:
        assert module.readout is None
    torch.testing.assert_close(module.generative(z)["genes"][:, :, 0], module.gene_mean + module.gene_sd * raw)


@torch.no_grad()
def test_before_training_the_decoder_adds_nothing_to_the_linear_readout(build_module):
    z = torch.randn(3, 32)
    for task in ("expression", "pretraining"):
        module = build_module(task=task, linear_readout=True, n_batch=2)
        assert not module.decoder.out.weight.any()
        module.cell_mean.normal_()
        module.gene_mean.normal_()
        module.gene_sd.uniform_(0.5, 1.5)
        module.readout.weight.normal_()
        linear = units(module, z) @ module.readout.weight.T
        found = module.generative(z)["genes"]
        if task == "expression":
            torch.testing.assert_close(found[:, :, 0], module.gene_mean + module.gene_sd * linear)
        else:
            # as many expressed as silent genes: the logits of the frequencies, about 0
            odds = module.gene_log_odds - module.gene_log_odds.mean()
            torch.testing.assert_close(found, torch.stack([torch.zeros_like(linear), linear + odds], dim=2))
        order = torch.tensor([[2, 0], [3, 3], [1, -1]])
        torch.testing.assert_close(
            module.generative(z, order)["genes"],
            found.gather(1, order.clamp_min(0)[:, :, None].expand(-1, -1, found.shape[2])),
        )


def test_a_frozen_encoder_drops_nothing(build_module):
    module = build_module(task="expression", dropout_rate=0.5)
    assert module.train().encoder.training
    for parameter in module.encoder.parameters():
        parameter.requires_grad_(requires_grad=False)
    module.train()
    assert module.training
    assert not module.encoder.training
    assert not module.eval().training


@torch.no_grad()
def test_the_loss_of_expression_is_the_squared_error_of_pairs_with_rna(build_module):
    module = spread(build_module(task="expression"))
    target = torch.tensor([[0.0, 1.5, 0.0, 2.0], [0.3, 0.0, 0.0, 0.0], [9.0, 9.0, 9.0, 9.0]])
    genes = torch.arange(4).repeat(3, 1)
    genes[2] = -1
    batch = batch_of(**{keys.BATCH_GENES: genes, keys.BATCH_GENE_TARGET: target})
    _, outputs, losses = module(batch)
    error = outputs["genes"][:2, :, 0] - target[:2]
    torch.testing.assert_close(losses.loss, ((error / module.gene_sd) ** 2).mean())
    torch.testing.assert_close(losses.extra_metrics["expression_mse"], (error**2).mean())
    # a sample of genes is the same pairs
    sample = batch_of(**{keys.BATCH_GENES: genes[:, [3, 1]], keys.BATCH_GENE_TARGET: target[:, [3, 1]]})
    _, sampled, losses = module(sample)
    torch.testing.assert_close(sampled["genes"][:2], outputs["genes"][:2, [3, 1]])
    torch.testing.assert_close(losses.loss, ((error / module.gene_sd)[:, [3, 1]] ** 2).mean())


@torch.no_grad()
@pytest.mark.parametrize("task", ["annotation", "batch_correction"])
def test_the_loss_of_labels_leaves_out_cells_without(build_module, task):
    module = build_module(task=task, n_classes=3)
    _, outputs, losses = module(batch_of(**{keys.BATCH_CLASS: torch.tensor([2, -1, 0])}))
    logits = outputs["classes"][[0, 2]]
    torch.testing.assert_close(losses.loss, cross_entropy(logits, torch.tensor([2, 0])))
    expected = (logits.argmax(1) == torch.tensor([2, 0])).float().mean()
    torch.testing.assert_close(losses.extra_metrics["accuracy"], expected)
    assert float(run(module, batch_of(**{keys.BATCH_CLASS: torch.tensor([-1, -1, -1])})).loss) == 0.0


def test_hidden_peaks_are_told_by_a_bilinear_form_and_pads_and_unknown_peaks_are_not_scored(build_module):
    module = spread(build_module(n_genes=0, masked_peak_weight=0.5, positions="none"))
    hidden = torch.tensor([[3, 2, -1], [4, -1, -1], [0, -1, -1]])
    is_open = torch.tensor([[1.0, 0.0, 1.0], [1.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    batch = batch_of(**{keys.BATCH_HIDDEN_PEAKS: hidden, keys.BATCH_HIDDEN_IS_OPEN: is_open})
    with torch.no_grad():
        module.peak_bias.weight.normal_()
        z = module.inference(**module._get_inference_input(batch))["z"]
        found = module.peak_logits(z, hidden.clamp_min(0))
        told = module.peak_readout(units(module, z))
        bias = module.peak_bias.weight[:, 0]
        for cell, at in ((0, 0), (0, 1), (1, 0)):
            peak = hidden[cell, at]
            expected = module.encoder.peaks(peak) @ told[cell] / math.sqrt(32) + bias[peak]
            torch.testing.assert_close(found[cell, at], expected)
        opened = -torch.stack([found[0, 0], found[1, 0]]).sigmoid().log().mean()
        closed = -(-found[0, 1]).sigmoid().log()
    losses = run(module, batch)
    expected = (opened + closed) / 2
    torch.testing.assert_close(losses.loss, 0.5 * expected)
    torch.testing.assert_close(losses.extra_metrics["peak_loss"], expected)
    losses.loss.backward()
    assert not module.peak_bias.weight.grad[[0, 1, 5, 6, 7]].any()


def test_a_model_without_the_objective_tells_no_peaks(build_module):
    with pytest.raises(RuntimeError, match="no masked-peak objective"):
        build_module().peak_logits(torch.zeros(1, 32), torch.ones(1, 1).long())


@torch.no_grad()
def test_the_adversary_adds_its_loss_where_there_are_batches(build_module):
    module = spread(build_module(n_batch=2, batch_adversary=0.3))
    batch = batch_of(**genes_of())
    inference, _, losses = module(batch)
    unit = units(module, inference["z"])
    expected = cross_entropy(module.adversary(unit), batch[REGISTRY_KEYS.BATCH_KEY][:, 0])
    torch.testing.assert_close(losses.extra_metrics["adversary_loss"], expected)
    torch.testing.assert_close(losses.loss, losses.extra_metrics["gene_loss"] + expected)
    assert build_module(n_batch=1, batch_adversary=0.3).adversary is None


def test_activations_computed_again_give_the_same_loss_and_gradients(build_module):
    found = []
    for checkpoint in (False, True):
        module = build_module(n_batch=2, dropout_rate=0.2, checkpoint=checkpoint).train()
        torch.manual_seed(3)
        loss = run(module, batch_of(**genes_of())).loss
        loss.backward()
        found.append([loss.detach()] + [p.grad for p in module.parameters() if p.grad is not None])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_only_dropout_is_random(build_module):
    module = build_module(dropout_rate=0.5)
    inputs = module._get_inference_input(batch_of())
    with torch.no_grad():
        assert torch.equal(module.inference(**inputs)["z"], module.inference(**inputs)["z"])
        module.train()
        assert not torch.equal(module.inference(**inputs)["z"], module.inference(**inputs)["z"])
    assert not any(isinstance(part, torch.nn.modules.batchnorm._BatchNorm) for part in module.modules())


def test_the_local_readout_asks_for_the_open_peaks(build_module):
    links = Links(np.array([0, 3]), np.array([1, 2]))
    module = build_module(task="expression", links=links)
    z = torch.zeros(2, 32)
    with pytest.raises(RuntimeError, match="The local readout needs the open peaks of the cells"):
        module.generative(z)
    module.local.start(np.array([1.0, -2.0]), np.zeros(2), is_used=True)
    module.gene_sd.fill_(3.0)
    tokens = torch.tensor([[1, 2, 5], [1, 3, 0]])
    difference = module.generative(z, tokens=tokens)["genes"] - module.generative(z, tokens=tokens[:, :1])["genes"]
    torch.testing.assert_close(difference[:, :, 0], torch.tensor([[0.0, 3.0, -6.0, 0.0], [0.0, 0.0, 0.0, 0.0]]))
    genes = torch.tensor([[2, 1, -1], [2, 0, 1]])
    some, whole = (module.generative(z, index, tokens=tokens)["genes"] for index in (genes, None))
    torch.testing.assert_close(some[0, :2, 0], whole[0, [2, 1], 0])
    torch.testing.assert_close(some[1, :, 0], whole[1, [2, 0, 1], 0])


def test_hidden_peaks_start_at_the_loss_of_chance(build_module):
    module = build_module(masked_peak_weight=1.0, n_genes=0)
    hidden = torch.tensor([[2, 4, 3, -1], [5, -1, 6, 7], [2, 3, 4, 5]])
    is_open = torch.tensor([[1.0, 1, 0, 0], [1, 1, 0, 0], [1, 0, 0, 1]])
    more = {keys.BATCH_HIDDEN_PEAKS: hidden, keys.BATCH_HIDDEN_IS_OPEN: is_open}
    losses = module(batch_of(**more))[2]
    assert float(losses.loss.detach()) == pytest.approx(math.log(2), abs=1e-6)
    losses.loss.backward()
    # and moves from there
    assert module.peak_readout.weight.grad.abs().max() > 0
