from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from epivi._errors import ConfigError
from epivi.nn.value_attention import ValueAttention

B, Q, K, D, H, V = 3, 4, 7, 12, 3, 5


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return ValueAttention(D, H).double()


@pytest.fixture
def inputs():
    torch.manual_seed(1)
    query_bqd, key_bkd = torch.randn(B, Q, D).double(), torch.randn(B, K, D).double()
    return query_bqd, key_bkd, torch.randint(0, V, (B, K)), torch.randn(V, D).double()


@pytest.fixture
def mask_bk():
    return torch.arange(K) < torch.tensor([[K], [3], [1]])


def explicit_weights(layer, query_bqd, key_bkd, mask_bk):
    """Softmax entry by entry, from equation 4.2; shape (b, h, q, k)."""
    e = D // H
    query, key = layer.query(query_bqd), layer.key(key_bkd)
    weight_bhqk = torch.zeros(len(query_bqd), H, query.shape[1], key.shape[1], dtype=torch.float64)
    for b, h, q, k in torch.cartesian_prod(*(torch.arange(n) for n in weight_bhqk.shape)).tolist():
        if mask_bk is None or mask_bk[b, k]:
            columns = slice(h * e, (h + 1) * e)
            weight_bhqk[b, h, q, k] = (query[b, q, columns] @ key[b, k, columns] / e**0.5).exp()
    return weight_bhqk / weight_bhqk.sum(3, keepdim=True)


@pytest.mark.parametrize("masked", [False, True])
def test_every_form_is_the_explicit_softmax(layer, inputs, mask_bk, masked):
    query_bqd, key_bkd, bin_bk, table_vd = inputs
    mask = mask_bk if masked else None
    with torch.no_grad():
        weight_bhqk = explicit_weights(layer, query_bqd, key_bkd, mask)
        value_bkhe = layer.value(table_vd[bin_bk]).unflatten(2, (H, D // H))
        expected = layer.out(torch.einsum("bhqk,bkhe->bqhe", weight_bhqk, value_bkhe).flatten(2))
        mass_bhqv = torch.stack([(weight_bhqk * (bin_bk == v)[:, None, None]).sum(3) for v in range(V)], dim=3)
        torch.testing.assert_close(layer(query_bqd, key_bkd, table_vd[bin_bk], mask), expected)
        torch.testing.assert_close(layer.forward_from_table(*inputs, mask), expected)
        torch.testing.assert_close(layer.forward_by_bin(*inputs, mask), expected)
        torch.testing.assert_close(layer.bin_mass(query_bqd, key_bkd, bin_bk, V, mask), mass_bhqv)
        torch.testing.assert_close(layer.weights(query_bqd, key_bkd, mask), weight_bhqk.mean(1))
        torch.testing.assert_close(mass_bhqv.sum(3), torch.ones(B, H, Q).double())


@pytest.mark.parametrize("form", ["forward_by_bin", "forward_from_table"])
@pytest.mark.parametrize("masked", [False, True])
def test_forms_by_bin_have_the_gradients_of_the_direct_form(layer, inputs, mask_bk, masked, form):
    layer.float()
    query_bqd, key_bkd, bin_bk, table_vd = inputs
    mask, found = mask_bk if masked else None, []
    for direct in (True, False):
        query, key, table = (x.float().requires_grad_() for x in (query_bqd, key_bkd, table_vd))
        out = (
            layer(query, key, table[bin_bk], mask) if direct else getattr(layer, form)(query, key, bin_bk, table, mask)
        )
        layer.zero_grad()
        (out.square() * torch.arange(D)).mean().backward()
        found.append([out, query.grad, key.grad, table.grad, *(p.grad for p in layer.parameters())])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


def test_gradients_are_those_of_finite_differences(layer, inputs, mask_bk):
    query_bqd, key_bkd, bin_bk, table_vd = (x[:1, :2] if x.dim() > 2 else x for x in inputs)
    bin_bk, mask = bin_bk[:1, :2], mask_bk[:1, :2]
    given = [x.clone().requires_grad_() for x in (query_bqd, key_bkd, table_vd)]
    assert torch.autograd.gradcheck(lambda q, k, t: layer.forward_by_bin(q, k, bin_bk, t, mask), given)
    assert torch.autograd.gradcheck(lambda q, k, t: layer(q, k, t[bin_bk], mask), given)


def test_order_pads_and_other_samples_change_nothing(layer, inputs, mask_bk):
    layer.float()
    query, key, bins, table = (x if x.dtype == torch.int64 else x.float() for x in inputs)
    order = torch.randperm(K)
    other_key, other_bins = key.masked_fill(~mask_bk[..., None], 50.0), bins.masked_fill(~mask_bk, 0)
    for form in ("forward_by_bin", "forward_from_table"):
        run = getattr(layer, form)
        found = run(query, key, bins, table, mask_bk)
        permuted = run(query, key[:, order], bins[:, order], table, mask_bk[:, order])
        torch.testing.assert_close(permuted, found, rtol=0, atol=1e-6)
        assert torch.equal(run(query, other_key, other_bins, table, mask_bk), found)
        torch.testing.assert_close(run(query[1:2], key[1:2, :3], bins[1:2, :3], table), found[1:2], rtol=0, atol=1e-6)
        # one query does not see the others
        torch.testing.assert_close(run(query[:, 2:3], key, bins, table, mask_bk), found[:, 2:3], rtol=0, atol=1e-6)


def test_a_boolean_mask_keeps_the_fused_kernel(layer, inputs, mask_bk):
    layer.float()
    query, key, bins, table = (x if x.dtype == torch.int64 else x.float().requires_grad_() for x in inputs)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        layer.forward_from_table(query, key, bins, table, mask_bk).sum().backward()
    assert query.grad.any()


def test_values_pass_through_the_weights_only(layer, inputs):
    """With one bin for all keys, queries and keys have no influence: P = (e W_V) W_O."""
    query_bqd, key_bkd, bin_bk, table_vd = inputs
    same_bk = torch.full_like(bin_bk, 2)
    expected = layer.out(layer.value(table_vd[2])).expand(B, Q, D)
    torch.testing.assert_close(layer(query_bqd, key_bkd, table_vd[same_bk]), expected)
    torch.testing.assert_close(layer.forward_by_bin(query_bqd, key_bkd, same_bk, table_vd), expected)


def test_a_sample_without_keys_is_finite_and_gives_the_last_bias(layer, inputs, mask_bk):
    mask_bk[2] = False
    query_bqd, key_bkd, bin_bk, table_vd = inputs
    for out_bqd in (layer(query_bqd, key_bkd, table_vd[bin_bk], mask_bk), layer.forward_by_bin(*inputs, mask_bk)):
        torch.testing.assert_close(out_bqd[2], layer.out.bias.expand(Q, D))
        layer.zero_grad()
        out_bqd.square().sum().backward()
        assert all(p.grad.isfinite().all() for p in layer.parameters())
    assert not layer.weights(query_bqd, key_bkd, mask_bk)[2].any()


@pytest.mark.parametrize(("width", "golden"), [(200, 160_800), (64, 16_640), (32, 4_224)])
def test_the_number_of_parameters_is_the_published_one(width, golden):
    assert sum(p.numel() for p in ValueAttention(width, 4).parameters()) == golden == 4 * width**2 + 4 * width


@pytest.mark.parametrize("n_heads", [0, 5])
def test_heads_that_do_not_divide_the_width_are_refused(n_heads):
    with pytest.raises(ConfigError, match=f"A width of 12 cannot be split into {n_heads} heads"):
        ValueAttention(12, n_heads)
