"""Self-attention with learned relative positions, and transformer layers around it.

Legend of shapes: b samples, t positions (of all samples together where they are packed), d width, h heads, e width of
a head, r relative distances.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple, cast

import torch
from torch import nn
from torch.nn.functional import gelu, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint as recompute

from epivi._errors import ConfigError, nearest

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

ACTIVATIONS = ("relu", "gelu")
MAX_PACKED_HEAD_WIDTH = 256


class Packing(NamedTuple):
    """Where samples of different lengths stand in one row of tokens.

    Parameters
    ----------
    start_b
        First position of each sample and, last, the number of positions; int32, on the device of the tokens.
    longest
        Positions of the longest sample.

    Examples
    --------
    >>> Packing.of(torch.tensor([2, 3]), torch.zeros(5, 8))
    Packing(start_b=tensor([0, 2, 5], dtype=torch.int32), longest=3)
    """

    start_b: Tensor
    longest: int

    @classmethod
    def of(cls, length_b: Tensor, x_td: Tensor) -> Packing:
        """Return the packing of samples of these lengths; lengths on the CPU spare a wait for the GPU.

        Parameters
        ----------
        length_b
            Positions of each sample.
        x_td
            The tokens, sample after sample.

        Raises
        ------
        ConfigError
            If a length is below 1, or the lengths do not add up to the number of tokens.
        """
        length_b = length_b.cpu()
        if length_b.numel() == 0 or int(length_b.min()) < 1 or int(length_b.sum()) != x_td.shape[0]:
            message = (
                f"Packed samples need lengths of at least 1 that add up to the tokens; found {length_b.numel()} "
                f"lengths with sum {int(length_b.sum())} for {x_td.shape[0]} tokens."
            )
            raise ConfigError(message)
        start_b = nn.functional.pad(length_b.cumsum(0), (1, 0)).to(torch.int32)
        return cls(start_b.to(x_td.device), int(length_b.max()))


class _RelativeTable(nn.Module):
    """Numbers every distance j - i between positions; distances beyond the table take its nearest end."""

    def __init__(self, n_positions: int, max_distance: int | None) -> None:
        super().__init__()
        if n_positions < 1 or (max_distance is not None and max_distance < 1):
            message = (
                f"Relative positions need at least one position and a distance of at least 1; found "
                f"n_positions={n_positions}, max_distance={max_distance}."
            )
            raise ConfigError(message)
        longest = n_positions - 1
        self.max_distance = longest if max_distance is None else min(max_distance, longest)

    @property
    def n_distances(self) -> int:
        """Distances that are told apart, r = 2 max_distance + 1."""
        return 2 * self.max_distance + 1

    def distance(self, n: int, device: torch.device) -> Tensor:
        """Return the row of the table for each query and key, shape (t, t)."""
        position_t = torch.arange(n, device=device)
        distance_tt = position_t - position_t[:, None]
        return distance_tt.clamp_(-self.max_distance, self.max_distance) + self.max_distance


class RelativeBias(_RelativeTable):
    """Add a learned number to each score, by head and by distance between key and query.

    Parameters
    ----------
    n_heads
        Heads h.
    n_positions
        Positions t of the longest sequence that is expected; longer ones are taken, their distances are clipped.
    max_distance
        Distances beyond it are treated as this one; all are told apart if ``None``.

    Raises
    ------
    ConfigError
        If there is no position, or the distance is below 1.

    Examples
    --------
    >>> RelativeBias(2, 5)(3).shape
    torch.Size([2, 3, 3])
    """

    def __init__(self, n_heads: int, n_positions: int, *, max_distance: int | None = None) -> None:
        super().__init__(n_positions, max_distance)
        self.weight = nn.Parameter(0.02 * torch.randn(n_heads, self.n_distances))

    def forward(self, n: int) -> Tensor:
        """Return the biases of n positions, shape (h, n, n); rows are queries, columns keys."""
        return self.weight[:, self.distance(n, self.weight.device)]


class RelativeKeyValue(_RelativeTable):
    r"""Add a learned vector to keys and to values, by distance, shared by the heads (Shaw 2018, equations 3 and 4).

    .. math::
        s_{ij} = q_i \cdot (k_j + a_{j-i}) / \sqrt e, \qquad z_i = \sum_j \mathrm{softmax}(s_i)_j (v_j + c_{j-i})

    Parameters
    ----------
    width
        Width e of a head.
    n_positions, max_distance
        As in :class:`RelativeBias`.

    Raises
    ------
    ConfigError
        If there is no position, or the distance is below 1.

    Examples
    --------
    >>> RelativeKeyValue(4, 10, max_distance=2).keys.shape
    torch.Size([5, 4])
    """

    def __init__(self, width: int, n_positions: int, *, max_distance: int | None = None) -> None:
        super().__init__(n_positions, max_distance)
        self.keys = nn.Parameter(0.02 * torch.randn(self.n_distances, width))
        self.values = nn.Parameter(0.02 * torch.randn(self.n_distances, width))

    def forward(self, query_bhte: Tensor, key_bhte: Tensor, value_bhte: Tensor, allowed: Tensor | None) -> Tensor:
        """Return what is attended to, shape (b, h, t, e); ``allowed`` is True for pairs that may attend."""
        n = query_bhte.shape[2]
        row_tt = self.distance(n, query_bhte.device).expand(*query_bhte.shape[:2], n, n)
        query_bhte = query_bhte * query_bhte.shape[3] ** -0.5
        score_bhtt = query_bhte @ key_bhte.transpose(2, 3)
        score_bhtt = score_bhtt + (query_bhte @ self.keys.t().to(query_bhte.dtype)).gather(3, row_tt)
        if allowed is not None:
            # a finite number, so that a row without any key stays finite
            score_bhtt = score_bhtt.masked_fill(~allowed, torch.finfo(score_bhtt.dtype).min)
        weight_bhtt = score_bhtt.softmax(3)
        if allowed is not None:
            weight_bhtt = weight_bhtt * allowed
        by_distance_bhtr = weight_bhtt.new_zeros(*weight_bhtt.shape[:3], self.n_distances)
        by_distance_bhtr = by_distance_bhtr.scatter_add(3, row_tt, weight_bhtt)
        return weight_bhtt @ value_bhte + by_distance_bhtr @ self.values.to(by_distance_bhtr.dtype)


class SelfAttention(nn.Module):
    r"""Multi-head self-attention with optional relative positions and an optional mask of keys; no dropout of weights.

    .. math::
        z_i = \sum_j \mathrm{softmax}_j(q_i \cdot k_j / \sqrt e + \beta_{h, j-i})\, v_j

    Parameters
    ----------
    width
        Width d of input and output.
    n_heads
        Heads h; they divide the width.
    position
        What tells positions apart; nothing does if ``None``, and permuting positions then permutes the output.

    Raises
    ------
    ConfigError
        If the heads do not divide the width.

    Examples
    --------
    >>> attention = SelfAttention(8, 2, position=RelativeBias(2, 5))
    >>> attention(torch.zeros(3, 5, 8)).shape
    torch.Size([3, 5, 8])
    """

    def __init__(self, width: int, n_heads: int, *, position: RelativeBias | RelativeKeyValue | None = None) -> None:
        super().__init__()
        if n_heads < 1 or width % n_heads:
            message = f"A width of {width} cannot be split into {n_heads} heads; the heads must divide the width."
            raise ConfigError(message)
        self.n_heads = n_heads
        self.position = position
        self.project = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x_btd: Tensor, key_mask_bt: Tensor | None = None) -> Tensor:
        """Return the attended values, shape (b, t, d).

        Parameters
        ----------
        x_btd
            Input.
        key_mask_bt
            True for positions that may be attended to. A sample without any gets the bias of the last layer.
        """
        heads = self.project(x_btd).unflatten(2, (3, self.n_heads, -1)).permute(2, 0, 3, 1, 4)
        query_bhte, key_bhte, value_bhte = heads.unbind(0)
        allowed = None if key_mask_bt is None else key_mask_bt.bool()[:, None, None, :]
        if isinstance(self.position, RelativeKeyValue):
            z_bhte = self.position(query_bhte, key_bhte, value_bhte, allowed)
        else:
            mask = self._mask(query_bhte, allowed)
            z_bhte = scaled_dot_product_attention(query_bhte, key_bhte, value_bhte, attn_mask=mask)
        return self.out(z_bhte.transpose(1, 2).flatten(2))

    def forward_packed(self, x_td: Tensor, packing: Packing) -> Tensor:
        """Return the attended values of samples that stand one after the other, shape (t, d); CUDA only.

        Parameters
        ----------
        x_td
            Input of all samples. Half precision, or inside ``torch.autocast``.
        packing
            Where the samples stand; each attends to itself only.

        Raises
        ------
        ConfigError
            If there are relative positions, or as in :meth:`Transformer.forward_packed`.
        """
        if self.position is not None:
            message = (
                f"Packed attention knows no {type(self.position).__name__}; build the attention with position=None, "
                "or use forward."
            )
            raise ConfigError(message)
        query_the, key_the, value_the = self.project(x_td).unflatten(1, (3, self.n_heads, -1)).unbind(1)
        return self.out(_attend_packed(query_the, key_the, value_the, packing).flatten(1))

    def _mask(self, query_bhte: Tensor, allowed: Tensor | None) -> Tensor | None:
        """Return what is added to the scores, or the Boolean mask if nothing is."""
        if self.position is None:
            return allowed
        bias = cast("RelativeBias", self.position)(query_bhte.shape[2]).to(query_bhte.dtype)[None]
        return bias if allowed is None else bias.masked_fill(~allowed, -torch.inf)


def _attend_packed(query_the: Tensor, key_the: Tensor, value_the: Tensor, packing: Packing) -> Tensor:
    """Return softmax attention within each packed sample, shape (t, h, e), by the kernel of torch for CUDA."""
    found = f"found {query_the.dtype} on '{query_the.device.type}' with heads of width {query_the.shape[2]}"
    if not query_the.is_cuda:
        message = f"Packed attention needs CUDA, {found}. Use forward, with a mask of the pads."
        raise ConfigError(message)
    if query_the.dtype not in (torch.bfloat16, torch.float16):
        message = f"Packed attention needs bfloat16 or float16, {found}. Use torch.autocast or forward."
        raise ConfigError(message)
    if query_the.shape[2] % 8 or query_the.shape[2] > MAX_PACKED_HEAD_WIDTH:
        message = (
            f"Packed attention needs heads of a width that 8 divides, {MAX_PACKED_HEAD_WIDTH} at most, {found}. "
            "Use forward, or another number of heads."
        )
        raise ConfigError(message)
    start_b, longest = packing
    kernel = _packed_kernel()
    return kernel(
        query_the.contiguous(), key_the.contiguous(), value_the.contiguous(), start_b, start_b, longest, longest
    )


def _packed_kernel() -> Callable[..., Tensor]:
    """Return the attention of torch for packed samples, or say which torch has it."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError as error:
        message = f"Packed attention needs torch 2.10 or later, found {torch.__version__}. Update torch or use forward."
        raise ConfigError(message) from error
    return cast("Callable[..., Tensor]", varlen_attn)


class TransformerLayer(nn.Module):
    r"""Attention and a feed-forward network, each with a residual connection and layer normalisation.

    Post-norm: :math:`x \leftarrow \mathrm{LN}(x + f(x))`; pre-norm: :math:`x \leftarrow x + f(\mathrm{LN}(x))`.

    Parameters
    ----------
    attention
        The attention; its width is that of the layer.
    n_hidden
        Units of the feed-forward network.
    dropout_rate
        Share of values set to zero in training, of both residual branches and of the hidden units.
    pre_norm
        Normalise before instead of after.
    activation
        What follows the hidden units: ``"relu"``, or ``"gelu"`` in its exact form.

    Raises
    ------
    ConfigError
        If the activation is not known.

    Examples
    --------
    >>> layer = TransformerLayer(SelfAttention(8, 2), 16)
    >>> layer(torch.zeros(3, 5, 8)).shape
    torch.Size([3, 5, 8])
    """

    def __init__(
        self,
        attention: SelfAttention,
        n_hidden: int,
        *,
        dropout_rate: float = 0.1,
        pre_norm: bool = False,
        activation: Literal["relu", "gelu"] = "relu",
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            message = f"Unknown activation '{activation}'. {nearest(activation, ACTIVATIONS)}"
            raise ConfigError(message)
        self.activation = activation
        width = attention.out.out_features
        self.pre_norm = pre_norm
        self.attention = attention
        self.attention_norm = nn.LayerNorm(width)
        self.hidden = nn.Linear(width, n_hidden)
        self.project = nn.Linear(n_hidden, width)
        self.norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout_rate)

    def forward(self, x_btd: Tensor, key_mask_bt: Tensor | None = None) -> Tensor:
        """Return the new features, shape (b, t, d)."""
        return self._residual(x_btd, lambda y_btd: self.attention(y_btd, key_mask_bt))

    def forward_packed(self, x_td: Tensor, packing: Packing) -> Tensor:
        """Return the new features of packed samples, shape (t, d); see :meth:`SelfAttention.forward_packed`."""
        return self._residual(x_td, lambda y_td: self.attention.forward_packed(y_td, packing))

    def _residual(self, x: Tensor, attend: Callable[[Tensor], Tensor]) -> Tensor:
        if self.pre_norm:
            x = x + self.dropout(attend(self.attention_norm(x)))
            return x + self.dropout(self._feed_forward(self.norm(x)))
        x = self.attention_norm(x + self.dropout(attend(x)))
        return self.norm(x + self.dropout(self._feed_forward(x)))

    def _feed_forward(self, x: Tensor) -> Tensor:
        hidden = self.hidden(x)
        hidden = hidden.relu_() if self.activation == "relu" else gelu(hidden)
        return self.project(self.dropout(hidden))


class Transformer(nn.Module):
    """Layers one after the other, with or without a last normalisation.

    Parameters
    ----------
    layers
        The layers, at least one, all pre-norm or all post-norm.
    final_norm
        Normalise after the last layer; only pre-norm layers are followed by it if ``None``.
    checkpoint
        Keep the inputs of each layer only in training and compute the rest again for the gradients: the same result
        and the same gradients, dropout included, with less memory and more time.

    Raises
    ------
    ConfigError
        If there is no layer, or the two kinds are mixed.

    Examples
    --------
    >>> encoder = Transformer([TransformerLayer(SelfAttention(8, 2), 16) for _ in range(2)])
    >>> encoder(torch.zeros(3, 5, 8)).shape
    torch.Size([3, 5, 8])
    """

    def __init__(
        self, layers: Sequence[TransformerLayer], *, final_norm: bool | None = None, checkpoint: bool = False
    ) -> None:
        super().__init__()
        if len({layer.pre_norm for layer in layers}) != 1:
            message = (
                f"A transformer needs layers of one kind, all pre-norm or all post-norm; {len(layers)} were given."
            )
            raise ConfigError(message)
        self.layers = nn.ModuleList(layers)
        if final_norm is None:
            final_norm = layers[0].pre_norm
        self.norm = nn.LayerNorm(layers[0].norm.normalized_shape[0]) if final_norm else nn.Identity()
        self.checkpoint = checkpoint

    def forward(self, x_btd: Tensor, key_mask_bt: Tensor | None = None) -> Tensor:
        """Return the features after the last layer, shape (b, t, d)."""
        for layer in self.layers:
            x_btd = self._run(layer, x_btd, key_mask_bt)
        return self.norm(x_btd)

    def forward_packed(self, x_td: Tensor, length_b: Tensor) -> Tensor:
        """Return the features of samples that stand one after the other without pads, shape (t, d); CUDA only.

        Up to the precision of the kernel the result is that of :meth:`forward` with the pads masked.

        Parameters
        ----------
        x_td
            Tokens of all samples. Half precision, or any inside ``torch.autocast``.
        length_b
            Positions of each sample, on the CPU at best.

        Raises
        ------
        ConfigError
            If a length is below 1 or the lengths do not add up to t, the device is not CUDA, the precision is not
            bfloat16 or float16, 8 does not divide the width of a head, or torch is older than 2.10.
        """
        packing = Packing.of(length_b, x_td)
        for layer in self.layers:
            x_td = self._run(cast("TransformerLayer", layer).forward_packed, x_td, packing)
        return self.norm(x_td)

    def _run(self, layer: Callable[..., Tensor], *inputs: object) -> Tensor:
        if self.checkpoint and self.training and torch.is_grad_enabled():
            return recompute(layer, *inputs, use_reentrant=False, preserve_rng_state=True)
        return layer(*inputs)
