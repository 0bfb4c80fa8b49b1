"""Packed attention on CUDA against the padded form of the same weights."""

from __future__ import annotations

import pytest
import torch

from epivi._errors import ConfigError
from epivi.nn.attention import SelfAttention, Transformer, TransformerLayer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="packed attention needs CUDA"),
]
LENGTHS = [300, 1, 17, 128, 64]
D, H = 64, 4


@pytest.fixture
def encoder():
    pytest.importorskip("torch.nn.attention.varlen")
    torch.manual_seed(0)
    layers = [TransformerLayer(SelfAttention(D, H), 128, dropout_rate=0.0, activation="gelu") for _ in range(2)]
    return Transformer(layers, final_norm=True).cuda()


@pytest.fixture
def tokens():
    length_b = torch.tensor(LENGTHS)
    mask_bt = (torch.arange(max(LENGTHS)) < length_b[:, None]).cuda()
    torch.manual_seed(1)
    return torch.randn(len(LENGTHS), max(LENGTHS), D, device="cuda"), mask_bt, length_b


def run(encoder, tokens, *, packed, dtype=None):
    x_btd, mask_bt, length_b = tokens
    x = x_btd.clone().requires_grad_()
    encoder.zero_grad()
    with torch.autocast("cuda", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
        out_td = encoder.forward_packed(x[mask_bt], length_b) if packed else encoder(x, mask_bt)[mask_bt]
    (out_td.float().square() * torch.arange(D, device="cuda")).mean().backward()
    return [out_td.detach().float(), x.grad, *(p.grad.clone() for p in encoder.parameters())]


@pytest.mark.parametrize("checkpoint", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_packed_equals_padded_up_to_the_precision(encoder, tokens, dtype, checkpoint):
    exact = run(encoder, tokens, packed=False)
    encoder.checkpoint = checkpoint
    padded, packed = (run(encoder, tokens, packed=which, dtype=dtype) for which in (False, True))
    for one, two, best in zip(packed, padded, exact, strict=True):
        scale = best.abs().max() + 1e-4
        # no further from the exact result than a few times what the padded form in half precision is
        allowed = 3 * (two - best).abs().max() + (0.01 if dtype == torch.bfloat16 else 0.002) * scale
        assert (one - best).abs().max() <= allowed


def test_other_samples_change_nothing(encoder, tokens):
    x_btd, mask_bt, length_b = tokens
    encoder.eval()
    with torch.no_grad(), torch.autocast("cuda", dtype=torch.bfloat16):
        whole_td = encoder.forward_packed(x_btd[mask_bt], length_b)
        alone_td = encoder.forward_packed(x_btd[0, : LENGTHS[0]], length_b[:1])
    torch.testing.assert_close(whole_td[: LENGTHS[0]], alone_td, rtol=0, atol=0.05)


def test_full_precision_is_refused(encoder, tokens):
    x_btd, mask_bt, length_b = tokens
    with pytest.raises(ConfigError, match=r"needs bfloat16 or float16, found torch\.float32 on 'cuda'"):
        encoder.forward_packed(x_btd[mask_bt], length_b)
