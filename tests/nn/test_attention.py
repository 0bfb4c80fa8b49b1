from __future__ import annotations

import pytest
import torch

from epivi._errors import ConfigError
from epivi.nn.attention import RelativeBias, RelativeKeyValue, SelfAttention, Transformer, TransformerLayer

B, T, D, H = 3, 7, 12, 3


def positions(kind, max_distance=None):
    torch.manual_seed(1)
    if kind is None:
        return None
    if kind == "bias":
        found = RelativeBias(H, T, max_distance=max_distance)
    else:
        found = RelativeKeyValue(D // H, T, max_distance=max_distance)
    for parameter in found.parameters():
        torch.nn.init.normal_(parameter)
    return found


def attention(kind, max_distance=None):
    return SelfAttention(D, H, position=positions(kind, max_distance)).double()


def explicit(layer, x_btd, key_mask_bt=None):
    """Entry by entry, from the formulas of the docstrings."""
    e = D // H
    query, key, value = layer.project(x_btd).split(D, dim=2)
    out = torch.zeros_like(x_btd)
    position = layer.position
    for b in range(x_btd.shape[0]):
        for h in range(H):
            q, k, v = (y[b, :, h * e : (h + 1) * e] for y in (query, key, value))
            for i in range(x_btd.shape[1]):
                scores, values = [], []
                for j in range(x_btd.shape[1]):
                    if key_mask_bt is not None and not key_mask_bt[b, j]:
                        continue
                    key_j, value_j, bias = k[j], v[j], 0.0
                    if position is not None:
                        row = max(-position.max_distance, min(position.max_distance, j - i)) + position.max_distance
                        if isinstance(position, RelativeBias):
                            bias = position.weight[h, row]
                        else:
                            key_j, value_j = key_j + position.keys[row], value_j + position.values[row]
                    scores.append(q[i] @ key_j / e**0.5 + bias)
                    values.append(value_j)
                if scores:
                    weight = torch.stack(scores).exp()
                    out[b, i, h * e : (h + 1) * e] = (weight / weight.sum()) @ torch.stack(values)
    return layer.out(out)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("kind", "max_distance"), [(None, None), ("bias", None), ("bias", 2), ("key-value", None), ("key-value", 2)]
)
def test_attention_is_the_explicit_softmax(kind, max_distance, masked):
    layer = attention(kind, max_distance)
    x_btd = torch.randn(B, T, D, dtype=torch.float64)
    mask_bt = torch.rand(B, T) > 0.4 if masked else None
    if masked:
        mask_bt[:, 0] = True
    with torch.no_grad():
        torch.testing.assert_close(layer(x_btd, mask_bt), explicit(layer, x_btd, mask_bt))


@pytest.mark.parametrize("kind", [None, "bias", "key-value"])
def test_masked_keys_have_no_influence_and_a_sample_without_keys_is_finite(kind):
    layer = attention(kind)
    x_btd = torch.randn(B, T, D, dtype=torch.float64)
    mask_bt = torch.tensor([[True] * 4 + [False] * 3, [True] * T, [False] * T])
    other_btd = x_btd.clone()
    other_btd[0, 4:] = 100.0
    first, second = layer(x_btd, mask_bt), layer(other_btd, mask_bt)
    assert torch.equal(first[0, :4], second[0, :4])
    torch.testing.assert_close(first[2], layer.out.bias.expand(T, D))
    first.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


def test_a_sequence_longer_than_the_table_takes_the_nearest_distance():
    bias = positions("bias")
    assert bias.n_distances == 2 * T - 1
    found = bias(T + 3)
    assert torch.equal(found[:, 0, T - 1], found[:, 0, T + 2])
    assert torch.equal(found[:, 2:, 2:], found[:, :-2, :-2])  # distances, not positions
    assert len({round(x, 12) for x in found[0].flatten().tolist()}) == 2 * T - 1
    assert RelativeBias(H, T, max_distance=100).n_distances == 2 * T - 1


@pytest.mark.parametrize(("kind", "is_same"), [(None, True), ("bias", False), ("key-value", False)])
def test_only_relative_positions_tell_positions_apart(kind, is_same):
    layer, x_btd, order = attention(kind), torch.randn(B, T, D, dtype=torch.float64), torch.randperm(T)
    assert torch.allclose(layer(x_btd[:, order]), layer(x_btd)[:, order]) == is_same


@pytest.mark.parametrize("pre_norm", [False, True])
def test_layers_equal_the_formula(pre_norm):
    torch.manual_seed(2)
    layers = [TransformerLayer(attention("bias"), 5, pre_norm=pre_norm).double() for _ in range(2)]
    encoder = Transformer(layers).double().eval()
    x_btd = torch.randn(B, T, D, dtype=torch.float64)
    expected = x_btd
    for layer in layers:

        def hidden(x, layer=layer):
            return layer.project(torch.relu(layer.hidden(x)))

        if pre_norm:
            expected = expected + layer.attention(layer.attention_norm(expected))
            expected = expected + hidden(layer.norm(expected))
        else:
            expected = layer.attention_norm(expected + layer.attention(expected))
            expected = layer.norm(expected + hidden(expected))
    if pre_norm:
        expected = encoder.norm(expected)
    torch.testing.assert_close(encoder(x_btd), expected)
    torch.testing.assert_close(expected.mean(2), torch.zeros(B, T, dtype=torch.float64))


def test_gradients_are_those_of_finite_differences():
    x_btd = torch.randn(1, 4, D, dtype=torch.float64, requires_grad=True)
    for kind in ("bias", "key-value"):
        assert torch.autograd.gradcheck(attention(kind, 2), (x_btd,))


def test_bad_sizes_are_refused():
    with pytest.raises(ConfigError, match="A width of 10 cannot be split into 3 heads"):
        SelfAttention(10, 3)
    with pytest.raises(ConfigError, match="n_positions=0, max_distance=None"):
        RelativeBias(2, 0)
    with pytest.raises(ConfigError, match="n_positions=5, max_distance=0"):
        RelativeKeyValue(2, 5, max_distance=0)
    mixed = [TransformerLayer(SelfAttention(4, 1), 4, pre_norm=kind) for kind in (True, False)]
    for layers in ([], mixed):
        with pytest.raises(ConfigError, match=f"layers of one kind, .* {len(layers)} were given"):
            Transformer(layers)
