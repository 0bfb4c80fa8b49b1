from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import pad

from epivi._errors import ConfigError
from epivi.nn.conv.layers import ConvDecoder, ConvEncoder, Stem

# kernel, stride, segments, widths
CASES = [
    (11, 11, (100,), (4,)),
    (31, 31, (95,), (4,)),
    (51, 51, (60, 3), (4,)),
    (11, 3, (100,), (4,)),
    (11, 3, (50, 7, 31), (4, 6)),
    (11, 3, (200, 1, 2), (4, 5, 6)),
    (3, 1, (20, 5), (4, 5)),
    (1, 1, (20, 5), (4,)),
    (5, 4, (33, 10), (4, 3)),
    (2, 2, (9, 4), (3, 3)),
    (7, 2, (5, 1, 3) * 25, (3, 3)),  # more segments than are copied one by one
    (6, 6, (9, 2) * 35, (3,)),
]


def random_tracks(segments, b=3, c=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x_bcl = torch.rand(b, c, sum(segments), generator=generator, dtype=torch.float64)
    return x_bcl * (x_bcl > 0.6)


def build(kind, kernel_size, stride, segments, widths, n_channels=2, seed=0, **options):
    torch.manual_seed(seed)
    options = {"dropout_rate": 0.0} | options
    model = kind(n_channels, segments, widths, kernel_size=kernel_size, stride=stride, **options).double()
    for norm in model.norms:  # statistics and affine parameters that matter
        nn.init.uniform_(norm.weight, 0.5, 2.0)
        nn.init.uniform_(norm.bias, -0.5, 0.5)
        norm.running_mean.uniform_(-0.5, 0.5)
        norm.running_var.uniform_(0.5, 2.0)
    return model


def loop_encoder(encoder, x_bcl, kernel_size, stride):
    """Segment by segment with explicit padding; statistics over all valid positions."""
    parts = list(x_bcl.split(encoder.segments[0], dim=2))
    for conv, norm in zip(encoder.convs, encoder.norms, strict=True):
        out = []
        for part in parts:
            length = part.shape[2]
            windows = -(-length // stride)
            out.append(conv(pad(part, ((windows - 1) * stride - length + kernel_size, 0))))
            assert out[-1].shape[2] == windows
        joined = norm(torch.cat(out, dim=2)).relu()
        parts = list(joined.split([part.shape[2] for part in out], dim=2))
    return torch.cat(parts, dim=2)


def loop_decoder(decoder, u_bft, kernel_size, stride):
    """Upsample, pad and convolve segment by segment."""
    for i, conv in enumerate(decoder.convs):
        if i:
            u_bft = decoder.norms[i - 1](u_bft).relu()
        lengths, windows = decoder.segments[-2 - i], decoder.segments[-1 - i]
        out = []
        for part, length in zip(u_bft.split(windows, dim=2), lengths, strict=True):
            up = part.repeat_interleave(stride, dim=2)
            out.append(conv(pad(up, (length - up.shape[2] + kernel_size - 1, 0))))
            assert out[-1].shape[2] == length
        u_bft = torch.cat(out, dim=2)
    return u_bft


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_encoder_equals_the_loop_over_segments(case, training):
    kernel_size, stride, segments, _ = case
    encoder, oracle = build(ConvEncoder, *case).train(training), build(ConvEncoder, *case).train(training)
    x_bcl = random_tracks(segments)
    got, expected = encoder(x_bcl), loop_encoder(oracle, x_bcl, kernel_size, stride)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    assert got.shape == (3, *encoder.out_shape)
    upstream = torch.randn_like(got)
    grads = torch.autograd.grad(got, list(encoder.parameters()), upstream)
    torch.testing.assert_close(
        grads, torch.autograd.grad(expected, list(oracle.parameters()), upstream), rtol=1e-9, atol=1e-10
    )
    # running statistics saw the valid positions only
    torch.testing.assert_close(encoder.state_dict(), oracle.state_dict())


@pytest.mark.parametrize("case", CASES)
def test_encoder_of_non_zeros_equals_the_dense_one(case):
    encoder = build(ConvEncoder, *case, n_channels=3)
    x_bcl = random_tracks(case[2], c=3)
    x_bcl[1] = 0.0
    rows_o, columns_o = torch.nonzero(x_bcl.flatten(1), as_tuple=True)
    values_o = x_bcl.flatten(1)[rows_o, columns_o]
    got = encoder.forward_sparse(rows_o.int(), columns_o.int(), values_o, 3)
    torch.testing.assert_close(got, encoder(x_bcl), rtol=0, atol=1e-14)


def test_one_segment_is_the_plain_network():
    encoder = build(ConvEncoder, 11, 3, (100,), (4, 6))
    first, second = encoder.convs
    plain = nn.Sequential(
        nn.ConstantPad1d((10, 0), 0.0), first, encoder.norms[0], nn.ReLU(),
        nn.ConstantPad1d((10, 0), 0.0), second, encoder.norms[1], nn.ReLU(),
    ).eval()  # fmt: skip
    x_bcl = random_tracks((100,))
    torch.testing.assert_close(encoder.eval()(x_bcl), plain(x_bcl), rtol=0, atol=1e-13)
    assert type(first) is nn.Conv1d


@pytest.mark.parametrize("case", [CASES[2], CASES[4], CASES[5], CASES[8]])
def test_a_segment_never_changes_the_features_of_another(case):
    encoder = build(ConvEncoder, *case).eval()
    x_bcl = random_tracks(case[2])
    before = encoder(x_bcl).split(encoder.segments[-1], dim=2)
    for j, part in enumerate(x_bcl.split(case[2], dim=2)):
        changed = x_bcl.clone()
        changed[:, :, sum(case[2][:j]) :][:, :, : part.shape[2]] += 1e3
        after = encoder(changed).split(encoder.segments[-1], dim=2)
        assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [i != j for i in range(len(case[2]))]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", CASES)
def test_polyphase_decoder_equals_upsampling_in_values_and_gradients(case, training):
    decoder = build(ConvDecoder, *case, n_channels=3).train(training)
    upsample = build(ConvDecoder, *case, n_channels=3, seed=1, form="upsample").train(training)
    oracle = build(ConvDecoder, *case, n_channels=3).train(training)
    upsample.load_state_dict(decoder.state_dict())
    u_bft = torch.randn(3, case[3][-1], decoder.lengths[-1], dtype=torch.float64, requires_grad=True)
    got = decoder(u_bft)
    assert got.shape == (3, 3, sum(case[2]))
    expected = loop_decoder(oracle, u_bft, *case[:2])
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(upsample(u_bft), expected, rtol=0, atol=1e-12)
    upstream = torch.randn_like(got)
    grads = torch.autograd.grad(got, [u_bft, *decoder.parameters()], upstream)
    torch.testing.assert_close(
        grads, torch.autograd.grad(expected, [u_bft, *oracle.parameters()], upstream), rtol=1e-9, atol=1e-11
    )
    torch.testing.assert_close(decoder.state_dict(), oracle.state_dict())


@pytest.mark.parametrize("case", CASES[:10])
def test_polyphase_decoder_equals_upsampling_in_single_precision(case):
    decoder = build(ConvDecoder, *case).float().eval()
    upsample = build(ConvDecoder, *case, form="upsample").float().eval()
    u_bft = torch.randn(2, case[3][-1], decoder.lengths[-1], requires_grad=True)
    got, expected = decoder(u_bft), upsample(u_bft)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    upstream = torch.rand_like(got) / got[0].numel()
    grads = torch.autograd.grad(got, [u_bft, *decoder.parameters()], upstream)
    torch.testing.assert_close(
        grads, torch.autograd.grad(expected, [u_bft, *upsample.parameters()], upstream), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("case", [CASES[2], CASES[4], CASES[8]])
def test_a_segment_is_decoded_from_its_own_features(case):
    decoder = build(ConvDecoder, *case).eval()
    u_bft = torch.randn(2, case[3][-1], decoder.lengths[-1], dtype=torch.float64)
    before = decoder(u_bft).split(case[2], dim=2)
    u_bft[:, :, : decoder.segments[-1][0]] += 1e3
    after = decoder(u_bft).split(case[2], dim=2)
    assert not torch.equal(before[0], after[0])
    assert all(torch.equal(a, b) for a, b in zip(before[1:], after[1:], strict=True))


def n_parameters(*modules):
    return sum(p.numel() for module in modules for p in module.parameters())


@pytest.mark.parametrize(
    ("c", "s", "kernel_size", "stride", "n_layers", "l", "z", "count"),
    [
        (2, 4, 11, 11, 1, 25_000, 30, 11_866_110),
        (3, 2, 31, 31, 1, 25_000, 30, 4_172_095),
        (2, 1, 51, 51, 1, 25_000, 30, 2_512_958),
        (3, 2, 11, 3, 1, 25_000, 30, 42_947_359),
        (2, 4, 11, 3, 2, 25_000, 30, 29_035_582),
        (1, 1, 11, 3, 3, 25_000, 30, 19_081_021),
        (3, 1, 11, 11, 1, 1992, 10, 814_711),
        (2, 2, 11, 3, 2, 1000, 8, 1_045_906),
    ],
)
def test_parameter_counts_of_the_whole_network(c, s, kernel_size, stride, n_layers, l, z, count):  # noqa: E741
    widths, h, columns = (32, 64, 128)[:n_layers], 128, s if s > 1 else 0
    sizes = {"kernel_size": kernel_size, "stride": stride}
    with torch.device("meta"):
        encoder, decoder = ConvEncoder(c, (l,), widths, **sizes), ConvDecoder(c, (l,), widths, **sizes)
        flat = encoder.out_shape[0] * encoder.out_shape[1]
        hidden = nn.Sequential(nn.Linear(flat + columns, h), nn.BatchNorm1d(h))
        heads = nn.ModuleList([nn.Linear(h, z), nn.Linear(h, z), nn.Linear(z + columns, flat)])
    assert n_parameters(encoder, decoder, hidden, heads) == count
    assert set(encoder.state_dict()) == {
        *(f"convs.{i}.{name}" for i in range(n_layers) for name in ("weight", "bias")),
        *(f"norms.{i}.{name}" for i in range(n_layers) for name in nn.BatchNorm1d(1).state_dict()),
    }
    assert len(decoder.state_dict()) == 2 * n_layers + 5 * (n_layers - 1)


def test_every_parameter_receives_a_gradient_with_dropout():
    encoder = build(ConvEncoder, 11, 3, (60, 40), (4, 6), dropout_rate=0.2)
    decoder = build(ConvDecoder, 11, 3, (60, 40), (4, 6), dropout_rate=0.2)
    logits = decoder(encoder(random_tracks((60, 40))))
    logits.log_softmax(2)[:, :, ::3].sum().backward()
    # a bias before batch normalisation, or added to all bins of a softmax, changes nothing
    for name, parameter in [*encoder.named_parameters(), *decoder.named_parameters()]:
        assert parameter.grad is not None, name
        if not (name.startswith("convs") and name.endswith("bias")):
            assert parameter.grad.abs().sum() > 1e-6, name


def test_dropout_is_drawn_in_training_only():
    encoder = build(ConvEncoder, 5, 5, (200,), (8,), dropout_rate=0.5)
    x_bcl = random_tracks((200,))
    assert not torch.equal(encoder(x_bcl), encoder(x_bcl))
    encoder.eval()
    assert torch.equal(encoder(x_bcl), encoder(x_bcl))


def test_receptive_field_is_what_a_feature_sees():
    encoder = build(ConvEncoder, 11, 3, (400,), (4, 5)).eval()
    x_bcl = random_tracks((400,)).requires_grad_()
    encoder(x_bcl)[0, :, 30].sum().backward()
    seen = torch.nonzero(x_bcl.grad[0].abs().sum(0))[:, 0]
    assert encoder.receptive_field == 41
    assert seen.max() - seen.min() + 1 <= 41
    assert seen.max() - seen.min() + 1 >= 35  # a ReLU may hide the rim


def test_stem_brings_fine_bins_onto_the_grid():
    torch.manual_seed(0)
    stem = Stem((1, 5, 2), n_inputs=2).double()
    tracks = [torch.randn(3, 2, 7 * r, dtype=torch.float64) for r in (1, 5, 2)]
    got = stem(tracks)
    assert got.shape == (3, stem.n_channels, 7)
    assert stem.n_channels == 4
    assert torch.equal(got[:, :2], tracks[0])
    for channel, m, ratio in ((2, "1", 5), (3, "2", 2)):
        fine = tracks[int(m)].unflatten(2, (7, ratio))
        expected = torch.einsum("bitr,ir->bt", fine, stem.convs[m].weight[0]) + stem.convs[m].bias
        torch.testing.assert_close(got[:, channel], expected)
    assert n_parameters(stem) == (2 * 5 + 1) + (2 * 2 + 1)
    assert n_parameters(Stem((1, 1, 1))) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernel_size": 2}, "The kernel covers 2 bins and moves by 3: bins between two windows would be skipped"),
        ({"stride": 0}, "The stride is 0; it must be at least 1"),
        ({"segments": (4, 0)}, r"Every segment needs at least one bin; the lengths are \(4, 0\)"),
        ({"segments": ()}, "Every segment needs at least one bin"),
        ({"widths": ()}, "Every layer needs at least one channel"),
        ({"widths": (3, 0)}, r"Every layer needs at least one channel; the widths are \(2, 3, 0\)"),
        ({"dropout_rate": 1.0}, "The dropout rate is 1.0; it must be at least 0 and below 1"),
    ],
)
@pytest.mark.parametrize("kind", [ConvEncoder, ConvDecoder])
def test_impossible_sizes_are_refused(kind, change, message):
    arguments = {"n_channels": 2, "segments": (20,), "widths": (4,), "kernel_size": 5, "stride": 3} | change
    if change == {"widths": ()}:
        arguments["n_channels"] = 0
    with pytest.raises(ConfigError, match=message):
        kind(**arguments)


def test_unknown_form_and_ratio_are_refused():
    with pytest.raises(ConfigError, match=r"The form of the decoder is 'upsampled'\. Did you mean 'upsample'"):
        ConvDecoder(2, (20,), kernel_size=5, stride=5, form="upsampled")
    with pytest.raises(ConfigError, match=r"at least one fine bin per bin; the ratios are \(1, 0\)"):
        Stem((1, 0))
