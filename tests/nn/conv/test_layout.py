from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from epivi.nn.conv import layout as conv_layout
from epivi.nn.conv.layers import ConvEncoder
from epivi.nn.conv.layout import (
    Interleave,
    Runs,
    decoder_padding,
    encoder_padding,
    layer_lengths,
    receptive_field,
)


@pytest.mark.parametrize(
    ("kernel_size", "stride", "lengths", "encoder", "decoder", "field"),
    [
        (11, 11, (2273,), (3,), (7,), (11,)),
        (31, 31, (807,), (17,), (13,), (31,)),
        (51, 51, (491,), (41,), (9,), (51,)),
        (11, 3, (8334,), (10,), (8,), (11,)),
        (11, 3, (8334, 2778), (10, 8), (10, 8), (11, 41)),
        (11, 3, (8334, 2778, 926), (10, 8, 8), (10, 10, 8), (11, 41, 131)),
    ],
)
def test_table_of_the_published_variants(kernel_size, stride, lengths, encoder, decoder, field):
    n = len(lengths)
    before = layer_lengths(25_000, stride, n)
    assert before == (25_000, *lengths)
    assert tuple(encoder_padding(length, kernel_size, stride) for length in before[:-1]) == encoder
    assert tuple(decoder_padding(length, kernel_size, stride) for length in before[-2::-1]) == decoder
    assert tuple(receptive_field(kernel_size, stride, i) for i in range(1, n + 1)) == field


@settings(deadline=None, max_examples=100)
@given(st.integers(1, 300), st.integers(1, 20), st.integers(0, 20))
def test_paddings_end_the_last_window_at_the_last_bin(length, stride, extra):
    kernel_size = stride + extra
    windows = layer_lengths(length, stride, 1)[1]
    left = encoder_padding(length, kernel_size, stride)
    assert left >= 0
    assert (left + length - kernel_size) % stride == 0
    assert (left + length - kernel_size) // stride + 1 == windows
    padding = decoder_padding(length, kernel_size, stride)
    assert padding >= 0
    assert stride * windows + padding - kernel_size + 1 == length


def test_lengths_add_up_over_segments():
    encoder = ConvEncoder(1, (25, 7, 100), (2, 2), kernel_size=11, stride=3)
    assert encoder.segments == ((25, 7, 100), (9, 3, 34), (3, 1, 12))
    assert encoder.lengths == (132, 46, 16)


def cut(sizes, gaps):
    starts, at = [], 0
    for size, gap in zip(sizes, gaps, strict=True):
        starts.append(at + gap)
        at += gap + size
    return Runs(starts, sizes, at + 2)


@pytest.mark.parametrize("limit", [0, 64])
def test_place_and_pick_undo_each_other_and_are_adjoint(limit, monkeypatch):
    monkeypatch.setattr(conv_layout, "MAX_COPIED_RUNS", limit)
    runs = cut([3, 1, 4], [2, 0, 5])
    assert runs.index.tolist() == [2, 3, 4, 5, 11, 12, 13, 14]
    x = torch.randn(2, 8, dtype=torch.float64, requires_grad=True)
    y = torch.randn(2, 17, dtype=torch.float64, requires_grad=True)
    assert torch.equal(runs.pick(runs.place(x)), x)
    torch.testing.assert_close((runs.place(x) * y).sum(), (x * runs.pick(y)).sum())
    assert (runs.place(x).sum(1) - x.sum(1)).abs().max() < 1e-12
    assert torch.autograd.gradcheck(runs.place, x)
    assert torch.autograd.gradcheck(runs.pick, y)


def test_runs_that_fill_the_axis_copy_nothing():
    x = torch.randn(2, 5)
    runs = Runs([0, 3], [3, 2], 5)
    assert runs.place(x) is x
    assert runs.pick(x) is x
    assert runs.state_dict() == {}


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 13), min_size=1, max_size=5), st.integers(1, 6), st.booleans())
def test_interleave_equals_the_definition(segments, stride, phases_last):
    n = sum(-(-length // stride) for length in segments)
    y_bost = torch.randn(2, 3, stride, n, dtype=torch.float64)
    if phases_last:  # the memory order of a matrix product
        y_bost = y_bost.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)
    base_bot = torch.randn(2, 3, n, dtype=torch.float64)
    inputs = (y_bost.requires_grad_(), base_bot.requires_grad_())
    layer = Interleave(segments, stride)
    expected, t = [], 0
    for length in segments:
        windows = -(-length // stride)
        part = [y_bost[:, :, r, i] + base_bot[:, :, i] for i in range(t, t + windows) for r in range(stride)]
        expected += part[stride * windows - length :]
        t += windows
    got = layer(*inputs)
    expected_bol = torch.stack(expected, dim=2)
    assert torch.equal(got, expected_bol)
    upstream = torch.randn_like(got)
    torch.testing.assert_close(
        torch.autograd.grad(got, inputs, upstream), torch.autograd.grad(expected_bol, inputs, upstream)
    )
