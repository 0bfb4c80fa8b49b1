"""Loss of cells with and without hidden genes, no leak into predictions, and the detection loss."""

import numpy as np
import pytest
import torch
from scipy import sparse

from epivi import _keys as keys
from epivi.data.sparse import row_tensors
from epivi.models.expresser.config import ExpresserConfig
from epivi.models.expresser.encoding import CellEncoding
from epivi.models.expresser.module import ExpresserModule


def minibatch(counts, config, *, factor=None):
    encoding = CellEncoding(
        [f"c{i}" for i in range(len(counts))],
        np.arange(1, counts.shape[1] + 1),
        config,
        seed=0,
        gene_mean=np.ones(counts.shape[1] + 1) if config.baseline == "additive" else None,
    )
    batch = row_tensors(sparse.csr_matrix(counts)) | {keys.BATCH_ROWS: torch.arange(len(counts))}
    if factor is not None:
        batch["size_factor"] = torch.tensor(factor, dtype=torch.float32)[:, None]
    return encoding(batch, 0)


def module(n_genes=30, **choices):
    torch.manual_seed(0)
    config = ExpresserConfig.chosen({"dropout_rate": 0.0} | choices, size="test")
    return ExpresserModule(config, n_genes).eval(), config


def predictions(net, batch):
    return net(batch)[1]["prediction"].mean


@pytest.mark.parametrize(
    "choices",
    [
        {},
        {"decoder": "encoder"},
        {"binning": "count"},
        {"baseline": "additive", "likelihood": "gaussian", "binning": "residual"},
    ],
    ids=str,
)
@pytest.mark.parametrize("with_factor", [False, True])
def test_counts_of_hidden_genes_change_no_prediction(choices, with_factor) -> None:
    net, config = module(**choices)
    counts = np.random.default_rng(0).poisson(2.0, (4, 30)).astype(float) + 1
    factor = [300.0] * 4 if with_factor else None
    batch = minibatch(counts, config, factor=factor)
    changed = counts.copy()
    for i in range(4):
        query = batch[keys.BATCH_QUERY][i, : batch[keys.BATCH_QUERY_LENGTH][i]]
        changed[i, batch[keys.BATCH_TOKENS][i, query].numpy() - 1] += 50
    other = minibatch(changed, config, factor=factor)
    assert torch.equal(predictions(net, batch), predictions(net, other))
    assert net(batch)[2].loss != net(other)[2].loss


def test_leaky_normalisation_does_leak() -> None:
    net, config = module(leaky_normalization=True)
    counts = np.random.default_rng(0).poisson(2.0, (4, 30)).astype(float) + 1
    batch = minibatch(counts, config)
    changed = counts.copy()
    query = batch[keys.BATCH_QUERY][0, 0]
    changed[0, int(batch[keys.BATCH_TOKENS][0, query]) - 1] += 500
    assert not torch.equal(predictions(net, batch), predictions(net, minibatch(changed, config)))


@pytest.mark.parametrize("decoder", ["expression", "encoder"])
def test_cells_without_hidden_genes_add_nothing(decoder) -> None:
    net, config = module(decoder=decoder)
    counts = np.zeros((3, 30))
    counts[0, :10], counts[1, :1] = 3, 2
    every = net(minibatch(counts, config))[2].loss
    alone = net(minibatch(counts[:1], config))[2].loss
    assert every.item() == pytest.approx(alone.item(), rel=1e-5)


@pytest.mark.parametrize("decoder", ["expression", "encoder"])
def test_a_minibatch_without_hidden_genes_has_loss_and_gradient_zero(decoder) -> None:
    net, config = module(decoder=decoder)
    counts = np.zeros((2, 30))
    counts[0, 4] = 1
    loss = net(minibatch(counts, config))[2].loss
    loss.backward()
    assert loss.item() == 0.0
    assert all(p.grad is None or (p.grad == 0).all() for p in net.parameters())


def test_loss_is_the_mean_of_squared_errors_by_cell() -> None:
    net, config = module()
    counts = np.random.default_rng(1).poisson(1.0, (5, 30)).astype(float)
    batch = minibatch(counts, config)
    _, generated, out = net(batch)
    per_cell = []
    for i in range(5):
        query = batch[keys.BATCH_QUERY][i, : batch[keys.BATCH_QUERY_LENGTH][i]]
        error = batch[keys.BATCH_VALUE][i, query] - generated["prediction"].mean[i, : len(query)]
        per_cell.append(error.square().mean().item())
    assert out.loss.item() == pytest.approx(np.mean(per_cell), rel=1e-5)
    summed, _ = module(reduction="sum")
    assert summed(batch)[2].loss.item() > out.loss.item()


def test_gaussian_error_is_the_density_of_scipy_but_for_a_constant() -> None:
    from scipy.stats import norm

    from epivi.models.expresser.network import Prediction

    net, _ = module(likelihood="gaussian")
    mean, log_variance, x = torch.tensor([[1.0]]), torch.tensor([[0.7]]), torch.tensor([[2.5]])
    expected = -norm(1.0, np.exp(0.35)).logpdf(2.5) - 0.5 * np.log(2 * np.pi)
    assert net.error(Prediction(mean, log_variance), x).item() == pytest.approx(expected, rel=1e-6)


def test_detection_reads_observed_genes_alone() -> None:
    net, config = module(detection=True)
    counts = np.zeros((2, 30))
    counts[:, :20] = np.random.default_rng(2).poisson(2.0, (2, 20)) + 1
    batch = minibatch(counts, config)
    asked = []
    ask = net.ask
    net.ask = lambda *args: asked.append(args) or ask(*args)
    out = net(batch)[2]
    tokens, length, bins, *_, queries = asked[0]
    assert (bins[tokens > 0] > 0).all()
    for i in range(2):
        hidden = batch[keys.BATCH_TOKENS][i, batch[keys.BATCH_QUERY][i]]
        assert not set(hidden.tolist()) & set(tokens[i, : length[i]].tolist())
        assert set(hidden.tolist()) < set(queries[i].tolist())
        assert all(q > 20 or q in hidden for q in queries[i].tolist())
    assert out.extra_metrics["detection"] > 0
    assert out.loss.item() == pytest.approx(
        out.reconstruction_loss["reconstruction_loss"].mean().item() + out.extra_metrics["detection"].item(), rel=1e-5
    )
