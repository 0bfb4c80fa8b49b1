"""Genes asked for: the fused attention with a sink is the softmax written out, and observed genes need be read once."""

import numpy as np
import pytest
import torch
from scipy import sparse

from epivi.models.expresser.config import ExpresserConfig
from epivi.models.expresser.network import ExpresserNetwork, attend_one_sided, keys_and_values
from epivi.models.expresser.outputs.imputation import Told, _as_rows, _columns
from epivi.nn.attention import SelfAttention


@pytest.mark.parametrize(("width", "n_heads"), [(32, 4), (12, 4), (30, 2)])
@pytest.mark.parametrize("scale", [0.1, 5.0])
def test_attention_with_a_sink_is_the_softmax_written_out(width, n_heads, scale) -> None:
    torch.manual_seed(0)
    attention = SelfAttention(width, n_heads).double()
    asked, seen = (scale * torch.randn(3, n, width, dtype=torch.float64) for n in (5, 7))
    mask = torch.arange(7) < torch.tensor([[1], [4], [7]])
    e = width // n_heads
    expected = torch.zeros(3, 5, width, dtype=torch.float64)
    q_own, k_own, v_own = attention.project(asked).split(width, 2)
    _, k_seen, v_seen = attention.project(seen).split(width, 2)
    for b in range(3):
        for u in range(5):
            for h in range(n_heads):
                part = slice(h * e, (h + 1) * e)
                keys = torch.cat([k_seen[b, mask[b], part], k_own[b, u, None, part]])
                values = torch.cat([v_seen[b, mask[b], part], v_own[b, u, None, part]])
                expected[b, u, part] = (keys @ q_own[b, u, part] / e**0.5).softmax(0) @ values
    got = attend_one_sided(attention, asked, seen, mask)
    assert torch.allclose(got, attention.out(expected), atol=1e-10)
    key, value = keys_and_values(attention, seen)
    assert key.shape == value.shape == (3, n_heads, 8, e + 8 - e % 8)


def test_gradients_pass_through_the_sink() -> None:
    torch.manual_seed(1)
    attention = SelfAttention(8, 2).double()
    asked = torch.randn(1, 2, 8, dtype=torch.float64, requires_grad=True)
    seen = torch.randn(1, 3, 8, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, True, False]])
    assert torch.autograd.gradcheck(lambda a, s: attend_one_sided(attention, a, s, mask), (asked, seen))


@pytest.mark.parametrize("decoder", ["expression", "encoder"])
def test_observed_genes_that_are_known_change_nothing(decoder) -> None:
    torch.manual_seed(0)
    net = ExpresserNetwork(ExpresserConfig.chosen({"decoder": decoder}, size="test"), 30).eval()
    tokens, bins, length = (
        torch.tensor([[4, 9, 2], [5, 0, 0]]),
        torch.tensor([[1, 5, 9], [2, 0, 0]]),
        torch.tensor([3, 1]),
    )
    asked = torch.tensor([[7, 8, 20], [4, 11, 0]])
    observed = net.observe(tokens, length, bins)
    one, two = net.encode_asked(tokens, length, bins, asked), net.encode_asked(tokens, length, bins, asked, observed)
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])
    assert len(observed.layers) == 2


def test_observed_genes_are_read_once_for_all_genes_asked_for(trained, monkeypatch) -> None:
    from epivi.models.expresser.outputs import imputation

    calls = []
    observe = trained.module.network.observe
    monkeypatch.setattr(trained.module.network, "observe", lambda *inputs: calls.append(1) or observe(*inputs))
    whole = trained.impute(mode="all").X.toarray()
    n_whole = len(calls)
    monkeypatch.setattr(imputation, "NUMBERS_AT_ONCE", 20_000)
    asked, ask = [], trained.module.ask
    monkeypatch.setattr(trained.module, "ask", lambda **inputs: asked.append(1) or ask(**inputs))
    assert np.allclose(trained.impute(mode="all").X.toarray(), whole, atol=1e-5)
    assert len(asked) > len(calls) - n_whole > n_whole


def test_entries_become_rows_with_the_genes_asked_for() -> None:
    rows = np.array([4, 1])
    column = _columns(6, rows)
    assert column.tolist() == [-1, -1, 1, -1, -1, 0, -1]
    cell, token = np.array([1, 0]), np.array([5, 2])
    parts = [
        Told(cell, token, {"X": np.array([1.0, 2.0]), "lower": np.array([0.5, 0.0])}),
        Told(np.array([1]), np.array([2]), {"X": np.array([9.0])}),
    ]
    found = _as_rows(iter(parts), 3, column)
    assert found["X"].toarray().tolist() == [[0, 2], [1, 9], [0, 0]]
    assert found["lower"].toarray().tolist() == [[0, 0], [0.5, 0], [0, 0]]
    assert found["X"].dtype == np.float32
    assert sparse.issparse(found["lower"])
    assert _as_rows([], 3, column) == {}
