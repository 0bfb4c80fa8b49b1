from __future__ import annotations

import inspect
import sys
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from epivi._errors import ConfigError
from epivi.nn import attention as module
from epivi.nn.attention import Packing, RelativeBias, RelativeKeyValue, SelfAttention, Transformer, TransformerLayer

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


def stack(n_layers=2, *, width=D, n_hidden=5, **options):
    torch.manual_seed(3)
    rate = options.pop("dropout_rate", 0.0)
    activation = options.pop("activation", "relu")
    layers = [
        TransformerLayer(SelfAttention(width, H), n_hidden, dropout_rate=rate, activation=activation)
        for _ in range(n_layers)
    ]
    return Transformer(layers, **options).double()


@pytest.mark.parametrize(
    ("width", "n_hidden", "n_heads", "golden"),
    [
        (512, 1024, 8, 2_102_784),
        (128, 256, 4, 132_480),
        (32, 64, 4, 8_544),
        (200, 800, 4, 482_600),
        (64, 256, 4, 49_984),
        (32, 128, 4, 12_704),
    ],
)
def test_a_layer_has_the_published_number_of_parameters(width, n_hidden, n_heads, golden):
    with torch.device("meta"):
        layers = [TransformerLayer(SelfAttention(width, n_heads), n_hidden) for _ in range(3)]
        count = {norm: sum(p.numel() for p in Transformer(layers, final_norm=norm).parameters()) for norm in (0, 1)}
    assert sum(p.numel() for p in layers[0].parameters()) == golden
    assert count == {0: 3 * golden, 1: 3 * golden + 2 * width}


@pytest.mark.parametrize("pre_norm", [False, True])
@pytest.mark.parametrize("final_norm", [None, False, True])
def test_the_last_normalisation_is_as_asked_for(pre_norm, final_norm):
    layers = [TransformerLayer(SelfAttention(D, H), 5, pre_norm=pre_norm).eval() for _ in range(2)]
    encoder = Transformer(layers, final_norm=final_norm)
    x_btd = torch.randn(B, T, D)
    expected = layers[1](layers[0](x_btd))
    if pre_norm if final_norm is None else final_norm:
        expected = torch.nn.functional.layer_norm(expected, [D])
    torch.testing.assert_close(encoder(x_btd), expected)


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch says why the other kernels do not apply
@pytest.mark.parametrize("masked", [False, True])
def test_a_boolean_mask_keeps_the_fused_kernel(masked):
    """Forward and gradients, with no kernel allowed that writes the scores out; a learned bias needs one that does."""
    x_btd = torch.randn(B, T, D, requires_grad=True)
    mask_bt = torch.arange(T).expand(B, -1) < torch.tensor([[T], [3], [5]]) if masked else None
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        SelfAttention(D, H)(x_btd, mask_bt).sum().backward()
        with pytest.raises(RuntimeError, match="No available kernel"):
            SelfAttention(D, H, position=RelativeBias(H, T))(x_btd, mask_bt)


def test_gelu_is_the_exact_one():
    layer = stack(1, activation="gelu").layers[0]
    x_btd = torch.randn(B, T, D, dtype=torch.float64)
    after = layer.attention_norm(x_btd + layer.attention(x_btd))
    hidden = layer.hidden(after)
    hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    torch.testing.assert_close(layer(x_btd), layer.norm(after + layer.project(hidden)))


def test_permuting_tokens_permutes_the_output_and_pads_and_other_samples_change_nothing():
    encoder = stack().float().eval()
    x_btd, order = torch.randn(B, T, D), torch.randperm(T)
    found = encoder(x_btd)
    torch.testing.assert_close(encoder(x_btd[:, order]), found[:, order], rtol=0, atol=1e-5)
    padded_btd = torch.cat([x_btd, 1e3 * torch.randn(B, 4, D)], dim=1)
    mask_bt = torch.arange(T + 4).expand(B, -1) < T
    torch.testing.assert_close(encoder(padded_btd, mask_bt)[:, :T], found, rtol=0, atol=2e-6)
    torch.testing.assert_close(encoder(x_btd[:1]), found[:1], rtol=0, atol=2e-6)
    # what stands at a pad has no influence at all
    other_btd = padded_btd.clone()
    other_btd[:, T:] = -7.0
    assert torch.equal(encoder(padded_btd, mask_bt)[:, :T], encoder(other_btd, mask_bt)[:, :T])


@pytest.mark.parametrize("masked", [False, True])
def test_checkpointing_changes_neither_result_nor_gradients_nor_the_random_stream(masked):
    x_btd = torch.randn(B, T, D, dtype=torch.float64)
    mask_bt = torch.arange(T).expand(B, -1) < torch.tensor([[T], [3], [5]]) if masked else None
    found, calls = [], []
    for checkpoint in (False, True):
        encoder = stack(3, checkpoint=checkpoint, dropout_rate=0.3).train()
        encoder.layers[0].hidden.register_forward_hook(lambda *_: calls.append(1))
        x = x_btd.clone().requires_grad_()
        torch.manual_seed(4)
        out = encoder(x, mask_bt)
        out.square().sum().backward()
        found.append([out, x.grad, *(p.grad for p in encoder.parameters()), torch.rand(1)])
    assert len(calls) == 3  # the checkpointed layer ran again
    for one, two in zip(*found, strict=True):
        assert torch.equal(one, two)
    encoder.eval()
    encoder(x, mask_bt).sum().backward()
    with torch.no_grad():
        encoder.train()(x, mask_bt)
    assert len(calls) == 5  # never again without gradients to compute in training


def plain_packed(query_the, key_the, value_the, packing):
    """Sample after sample, softmax written out: what the kernel of torch computes on CUDA."""
    outs = []
    for start, end in zip(packing.start_b[:-1].tolist(), packing.start_b[1:].tolist(), strict=True):
        query, key, value = (x[start:end].transpose(0, 1) for x in (query_the, key_the, value_the))
        outs.append(((query @ key.mT / query.shape[2] ** 0.5).softmax(2) @ value).transpose(0, 1))
    assert packing.longest == max(packing.start_b.diff().tolist())
    return torch.cat(outs)


@pytest.mark.parametrize("checkpoint", [False, True])
def test_packed_samples_give_what_padded_samples_give(monkeypatch, checkpoint):
    monkeypatch.setattr(module, "_attend_packed", plain_packed)
    encoder = stack(checkpoint=checkpoint, final_norm=True)
    length_b = torch.tensor([T, 1, 4])
    mask_bt = torch.arange(T) < length_b[:, None]
    x_btd = torch.randn(B, T, D, dtype=torch.float64)
    grads = []
    for packed in (False, True):
        x = x_btd.clone().requires_grad_()
        out_td = encoder.forward_packed(x[mask_bt], length_b) if packed else encoder(x, mask_bt)[mask_bt]
        encoder.zero_grad()
        out_td.square().mul(torch.arange(D)).sum().backward()
        grads.append([out_td, x.grad, *(p.grad for p in encoder.parameters())])
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(one, two)


def test_packing_is_refused_where_it_cannot_work():
    encoder, x_td = stack(), torch.zeros(5, D, dtype=torch.float64)
    for lengths in ([2, 2], [5, 0], []):
        message = f"{len(lengths)} lengths with sum {sum(lengths)} for 5 tokens"
        with pytest.raises(ConfigError, match=message):
            encoder.forward_packed(x_td, torch.tensor(lengths, dtype=torch.int64))
    with pytest.raises(ConfigError, match=r"needs CUDA, found torch\.float64 on 'cpu'"):
        encoder.forward_packed(x_td, torch.tensor([2, 3]))
    packing = Packing.of(torch.tensor([2, 3]), x_td)
    with pytest.raises(ConfigError, match="knows no RelativeBias"):
        attention("bias").forward_packed(x_td, packing)
    for dtype, width, message in [
        (torch.float32, 16, r"needs bfloat16 or float16, found torch\.float32"),
        (torch.float16, 12, "8 divides, 256 at most, .* heads of width 12"),
        (torch.float16, 264, "8 divides, 256 at most, .* heads of width 264"),
    ]:
        # stands for a tensor on a GPU, which few machines have
        x_the = SimpleNamespace(is_cuda=True, device=torch.device("cuda"), dtype=dtype, shape=(5, H, width))
        with pytest.raises(ConfigError, match=message):
            module._attend_packed(x_the, x_the, x_the, packing)


def test_the_packed_kernel_is_that_of_torch_or_named_as_missing(monkeypatch):
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    names = list(inspect.signature(module._packed_kernel()).parameters)
    assert names[:7] == ["query", "key", "value", "cu_seq_q", "cu_seq_k", "max_q", "max_k"]
    assert module._packed_kernel() is varlen.varlen_attn
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", None)
    with pytest.raises(ConfigError, match=r"needs torch 2\.10 or later, found"):
        module._packed_kernel()


def test_an_unknown_activation_is_refused():
    with pytest.raises(ConfigError, match=r"Unknown activation 'gelo'\. Did you mean 'gelu'"):
        TransformerLayer(SelfAttention(4, 1), 4, activation="gelo")
