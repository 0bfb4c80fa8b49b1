"""Convolutional encoder and decoder of tracks along the genome (ConvNet-VAE, Gao and Welch 2025).

Legend of shapes: b cells of the batch, c channels (modalities), l bins, f channels of a layer, t positions of a layer,
o non-zeros of the batch, k taps of the kernel.
"""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Literal, cast

import torch
from torch import nn
from torch.nn.functional import conv1d, pad

from epivi._errors import ConfigError, nearest
from epivi.nn.conv.layout import (
    Interleave,
    Runs,
    check_convolution,
    decoder_padding,
    encoder_padding,
    layer_lengths,
    receptive_field,
)
from epivi.nn.dropout import relu_dropout_

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

FORMS = ("polyphase", "upsample")


class _ConvStack(nn.Module):
    """What encoder and decoder share: lengths of every layer, convolutions, norms and what follows them."""

    def __init__(self, segments: Sequence[int], n_layers: int, stride: int, dropout_rate: float) -> None:
        super().__init__()
        self.stride = stride
        self.dropout_rate = dropout_rate
        lengths = [layer_lengths(length, stride, n_layers) for length in segments]
        self.segments: tuple[tuple[int, ...], ...] = tuple(zip(*lengths, strict=True))
        self.convs = nn.ModuleList()
        self.norms = nn.ModuleList()

    @property
    def lengths(self) -> tuple[int, ...]:
        """Length of the track before and after each layer: l, L_1, ..., L_n, summed over the segments."""
        return tuple(sum(lengths) for lengths in self.segments)

    def _activate(self, x_bft: Tensor, layer: int) -> Tensor:
        """Batch normalisation, ReLU, dropout."""
        return relu_dropout_(self.norms[layer](x_bft), self.dropout_rate, training=self.training)


class ConvEncoder(_ConvStack):
    """Strided convolutions over tracks; each layer is followed by batch normalisation, ReLU and dropout.

    Every segment is convolved as if alone, with shared weights, and padded with zeros on its left so that the last
    window ends at the last bin. Batch statistics see the valid positions only. With one segment it is the paper's
    network.

    Parameters
    ----------
    n_channels
        Input channels c.
    segments
        Bins of each segment, in order; they add up to l.
    widths
        Output channels of each layer.
    kernel_size, stride
        K and S of every layer, S <= K.
    dropout_rate
        Share of values set to zero in training, at least 0 and below 1.
    momentum, eps
        Of the batch normalisation.

    Raises
    ------
    ConfigError
        If the kernel is smaller than the stride, or sizes are below one.

    Examples
    --------
    >>> encoder = ConvEncoder(3, (60, 40), (8, 16), kernel_size=5, stride=3)
    >>> encoder.lengths, encoder(torch.zeros(2, 3, 100)).shape
    ((100, 34, 12), torch.Size([2, 16, 12]))
    """

    column_position: Tensor

    def __init__(
        self,
        n_channels: int,
        segments: Sequence[int],
        widths: Sequence[int] = (32,),
        *,
        kernel_size: int,
        stride: int,
        dropout_rate: float = 0.2,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> None:
        check_convolution(segments, kernel_size, stride, (n_channels, *widths), dropout_rate)
        super().__init__(segments, len(widths), stride, dropout_rate)
        self.n_channels = n_channels
        self.receptive_field = receptive_field(kernel_size, stride, len(widths))
        for n_in, n_out in pairwise((n_channels, *widths)):
            self.convs.append(nn.Conv1d(n_in, n_out, kernel_size, stride=stride))
            self.norms.append(nn.BatchNorm1d(n_out, momentum=momentum, eps=eps))
        layouts = [_encoder_runs(lengths, kernel_size, stride) for lengths in self.segments[:-1]]
        self.padded = nn.ModuleList(before for before, _ in layouts)
        self.windows = nn.ModuleList(after for _, after in layouts)
        first = layouts[0][0]
        columns = torch.arange(n_channels).unsqueeze(1) * first.total + first.index
        self.register_buffer("column_position", columns.flatten(), persistent=False)

    @property
    def out_shape(self) -> tuple[int, int]:
        """Channels and positions (f_n, L_n) of the output."""
        return cast("nn.Conv1d", self.convs[-1]).out_channels, self.lengths[-1]

    def forward(self, x_bcl: Tensor) -> Tensor:
        """Return features, shape (b, f_n, L_n), of dense tracks."""
        return self._layers(cast("Runs", self.padded[0]).place(x_bcl))

    def forward_sparse(self, rows_o: Tensor, columns_o: Tensor, values_o: Tensor, n_rows: int) -> Tensor:
        """Return features, shape (b, f_n, L_n), of the non-zeros of tracks.

        Parameters
        ----------
        rows_o, columns_o
            Cell of each non-zero and its column, channel x l + bin; each pair once.
        values_o
            Value of each non-zero, as the network shall see it (a logarithm of counts).
        n_rows
            Cells of the batch.
        """
        total = cast("Runs", self.padded[0]).total
        width = self.n_channels * total
        x = torch.zeros(n_rows * width, dtype=cast("Tensor", self.convs[0].weight).dtype, device=values_o.device)
        x[rows_o.long() * width + self.column_position[columns_o]] = values_o.to(x.dtype)
        return self._layers(x.view(n_rows, self.n_channels, total))

    def _layers(self, x_bft: Tensor) -> Tensor:
        for i, (conv, windows) in enumerate(zip(self.convs, self.windows, strict=True)):
            if i:
                x_bft = cast("Runs", self.padded[i]).place(x_bft)
            x_bft = self._activate(cast("Runs", windows).pick(conv(x_bft)), i)
        return x_bft


def _encoder_runs(lengths: Sequence[int], kernel_size: int, stride: int) -> tuple[Runs, Runs]:
    """Bins in the padded input of a layer, and valid windows in its output.

    A segment takes P_j zeros, its bins and zeros up to a multiple of the stride, so that the next one starts a window.
    """
    paddings = [encoder_padding(n, kernel_size, stride) for n in lengths]
    sizes = [stride * -(-(p + n) // stride) for p, n in zip(paddings, lengths, strict=True)]
    offsets = [0, *accumulate(sizes[:-1])]
    total = offsets[-1] + paddings[-1] + lengths[-1]
    bins = Runs([at + p for at, p in zip(offsets, paddings, strict=True)], lengths, total)
    n_windows = (total - kernel_size) // stride + 1
    return bins, Runs([at // stride for at in offsets], [-(-n // stride) for n in lengths], n_windows)


class ConvDecoder(_ConvStack):
    r"""Upsampling and convolution from positions back to bins; the mirror of :class:`ConvEncoder`.

    Each layer repeats every position S times, pads on the left and convolves. In the polyphase form nothing of the
    upsampled length is convolved: output phase r of position t is

    .. math::
        \mathrm{out}[S t + r] = b + \sum_j W_r[j]\, u[t + j], \qquad
        W_r[j] = \sum_{k:\ \lfloor (r + k - K + 1)/S \rfloor = j} W[k],

    with the summed kernels rebuilt in each step, so that parameters and checkpoints are those of W. If K is at most
    S + 1, only j = -1 and 0 occur, :math:`W_r[-1] = \sum_k W[k] - W_r[0]`, and one product with
    :math:`u[t] - u[t - 1]` is enough besides a sum shared by all phases.

    Parameters
    ----------
    n_channels
        Output channels of the last layer: the modalities, or the sum of their bins per position where some modalities
        have finer bins.
    segments, widths, kernel_size, stride, dropout_rate, momentum, eps
        As given to the encoder.
    form
        "polyphase", or "upsample": the plain computation with the same parameters.

    Raises
    ------
    ConfigError
        If the kernel is smaller than the stride, sizes are below one, or the form is unknown.

    Examples
    --------
    >>> decoder = ConvDecoder(3, (60, 40), (8, 16), kernel_size=5, stride=3)
    >>> decoder(torch.zeros(2, 16, 12)).shape
    torch.Size([2, 3, 100])
    """

    def __init__(  # noqa: PLR0913
        self,
        n_channels: int,
        segments: Sequence[int],
        widths: Sequence[int] = (32,),
        *,
        kernel_size: int,
        stride: int,
        dropout_rate: float = 0.2,
        momentum: float = 0.1,
        eps: float = 1e-5,
        form: Literal["polyphase", "upsample"] = "polyphase",
    ) -> None:
        check_convolution(segments, kernel_size, stride, (n_channels, *widths), dropout_rate)
        if form not in FORMS:
            message = f"The form of the decoder is '{form}'. {nearest(form, FORMS)}"
            raise ConfigError(message)
        super().__init__(segments, len(widths), stride, dropout_rate)
        self.form = form
        self.kernel_size = kernel_size
        # outputs of each layer in the order of computation: L_(n-1) first, the bins last
        self.out_segments = self.segments[-2::-1]
        self.polyphase = nn.ModuleList()
        for (n_in, n_out), lengths in zip(pairwise((*widths[::-1], n_channels)), self.out_segments, strict=True):
            self.convs.append(nn.Conv1d(n_in, n_out, kernel_size))
            self.polyphase.append(_Polyphase(lengths, kernel_size, stride))
        self.norms.extend(nn.BatchNorm1d(width, momentum=momentum, eps=eps) for width in widths[-2::-1])

    def forward(self, u_bft: Tensor) -> Tensor:
        """Return logits, shape (b, n_channels, l), from features (b, f_n, L_n)."""
        for i, (conv, polyphase) in enumerate(zip(self.convs, self.polyphase, strict=True)):
            if i:
                u_bft = self._activate(u_bft, i - 1)
            if self.form == "upsample":
                u_bft = torch.cat(list(self._upsampled(u_bft, cast("nn.Conv1d", conv), self.out_segments[i])), dim=2)
            else:
                u_bft = polyphase(u_bft, conv.weight, conv.bias)
        return u_bft

    def _upsampled(self, u_bft: Tensor, conv: nn.Conv1d, lengths: Sequence[int]) -> Iterator[Tensor]:
        """Upsample and convolve segment by segment."""
        parts = u_bft.split([-(-length // self.stride) for length in lengths], dim=2)
        for part_bft, length in zip(parts, lengths, strict=True):
            padding = decoder_padding(length, self.kernel_size, self.stride)
            yield conv(pad(part_bft.repeat_interleave(self.stride, dim=2), (padding, 0)))


class _Polyphase(nn.Module):
    """One decoder layer in polyphase form; holds positions only, no parameters."""

    phase_sum: Tensor
    segment_start: Tensor

    def __init__(self, lengths: Sequence[int], kernel_size: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        self.n_taps = -(-(kernel_size - 1) // stride) + 1
        windows = [-(-n // stride) for n in lengths]
        starts = [0, *accumulate(windows)]
        self.interleave = Interleave(lengths, stride)
        self.register_buffer("segment_start", torch.tensor(starts[:-1]), persistent=False)
        # which taps k of W add to which phase r and tap of the summed kernel
        phase_r, tap_k = torch.arange(stride), torch.arange(kernel_size).unsqueeze(1)
        tap_kr = (phase_r + tap_k - kernel_size + 1).div(stride, rounding_mode="floor") + self.n_taps - 1
        phase_sum = nn.functional.one_hot(tap_kr, self.n_taps).flatten(1).float()
        self.register_buffer("phase_sum", phase_sum, persistent=False)
        # zeros before each segment; the convolution runs over them and its outputs at the joints are dropped
        n_before = self.n_taps - 1
        shifted = [start + n_before * j for j, start in enumerate(starts)]
        self.padded = Runs([at + n_before for at in shifted[:-1]], windows, shifted[-1])
        self.valid = Runs(shifted[:-1], windows, shifted[-1] - n_before)

    def forward(self, u_bft: Tensor, weight_oik: Tensor, bias_o: Tensor) -> Tensor:
        # summed kernels: outputs x inputs x phases x taps
        summed = (weight_oik @ self.phase_sum.to(weight_oik.dtype)).unflatten(2, (self.stride, self.n_taps))
        if self.n_taps == 2:
            return self._two_taps(u_bft, weight_oik.sum(2), summed[..., 1], bias_o)
        n_out = summed.shape[0]
        kernel = summed.transpose(1, 2).flatten(0, 1)
        y_bft = self.valid.pick(conv1d(self.padded.place(u_bft), kernel, bias_o.repeat_interleave(self.stride)))
        y_bost = y_bft.unflatten(1, (n_out, self.stride))
        return self.interleave(y_bost, y_bost.new_zeros(()).expand(len(u_bft), n_out, y_bost.shape[3]))

    def _two_taps(self, u_bft: Tensor, total_oi: Tensor, last_ois: Tensor, bias_o: Tensor) -> Tensor:
        """One product with the differences of neighbours, and the neighbour's sum over all taps."""
        u_btf = u_bft.transpose(1, 2)
        before_btf = pad(u_btf[:, :-1], (0, 0, 1, 0)).index_fill(1, self.segment_start, 0.0)
        n_out, _, stride = last_ois.shape
        y_bts = (u_btf - before_btf) @ last_ois.permute(1, 0, 2).flatten(1)
        base_bto = before_btf @ total_oi.t() + bias_o
        return self.interleave(y_bts.unflatten(2, (n_out, stride)).permute(0, 2, 3, 1), base_bto.transpose(1, 2))


class Stem(nn.Module):
    """Bring modalities with finer bins onto the common grid: one strided convolution for each of them.

    Parameters
    ----------
    ratios
        Fine bins in one common bin, for each modality; a modality with ratio one passes unchanged.
    n_inputs
        Channels of each modality: 1, or 2 with a mask beside the values.

    Raises
    ------
    ConfigError
        If there is no modality or a ratio is below one.

    Examples
    --------
    >>> stem = Stem((1, 10))
    >>> stem([torch.zeros(2, 1, 7), torch.zeros(2, 1, 70)]).shape
    torch.Size([2, 2, 7])
    """

    def __init__(self, ratios: Sequence[int], n_inputs: int = 1) -> None:
        if not ratios or min(ratios) < 1:
            message = f"Every modality needs a ratio of at least one fine bin per bin; the ratios are {tuple(ratios)}."
            raise ConfigError(message)
        super().__init__()
        self.ratios = tuple(int(ratio) for ratio in ratios)
        self.n_channels = sum(1 if ratio > 1 else n_inputs for ratio in self.ratios)
        self.convs = nn.ModuleDict(
            {str(m): nn.Conv1d(n_inputs, 1, ratio, stride=ratio) for m, ratio in enumerate(self.ratios) if ratio > 1}
        )

    def forward(self, tracks_bil: Sequence[Tensor]) -> Tensor:
        """Return the channels of the common grid, shape (b, n_channels, l).

        Parameters
        ----------
        tracks_bil
            One tensor a modality, shape (b, n_inputs, l x ratio): the fine bins in a grid in which every common bin
            holds the same number of them, zeros where a chromosome ends earlier.
        """
        parts = [
            self.convs[str(m)](x_bil) if ratio > 1 else x_bil
            for m, (ratio, x_bil) in enumerate(zip(self.ratios, tracks_bil, strict=True))
        ]
        return torch.cat(parts, dim=1)
