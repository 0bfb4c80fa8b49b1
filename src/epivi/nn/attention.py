"""Self-attention with learned relative positions, and transformer layers around it.

Legend of shapes: b samples, t positions, d width, h heads, e width of a head, r relative distances.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from epivi._errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


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

    def _mask(self, query_bhte: Tensor, allowed: Tensor | None) -> Tensor | None:
        """Return what is added to the scores, or the Boolean mask if nothing is."""
        if self.position is None:
            return allowed
        bias = cast("RelativeBias", self.position)(query_bhte.shape[2]).to(query_bhte.dtype)[None]
        return bias if allowed is None else bias.masked_fill(~allowed, -torch.inf)


class TransformerLayer(nn.Module):
    r"""Attention and a feed-forward network, each with a residual connection and layer normalisation.

    Post-norm: :math:`x \leftarrow \mathrm{LN}(x + f(x))`; pre-norm: :math:`x \leftarrow x + f(\mathrm{LN}(x))`.

    Parameters
    ----------
    attention
        The attention; its width is that of the layer.
    n_hidden
        Units of the feed-forward network; ReLU follows them.
    dropout_rate
        Share of values set to zero in training, of both residual branches and of the hidden units.
    pre_norm
        Normalise before instead of after.

    Examples
    --------
    >>> layer = TransformerLayer(SelfAttention(8, 2), 16)
    >>> layer(torch.zeros(3, 5, 8)).shape
    torch.Size([3, 5, 8])
    """

    def __init__(
        self, attention: SelfAttention, n_hidden: int, *, dropout_rate: float = 0.1, pre_norm: bool = False
    ) -> None:
        super().__init__()
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
        if self.pre_norm:
            x_btd = x_btd + self.dropout(self.attention(self.attention_norm(x_btd), key_mask_bt))
            return x_btd + self.dropout(self._feed_forward(self.norm(x_btd)))
        x_btd = self.attention_norm(x_btd + self.dropout(self.attention(x_btd, key_mask_bt)))
        return self.norm(x_btd + self.dropout(self._feed_forward(x_btd)))

    def _feed_forward(self, x_btd: Tensor) -> Tensor:
        return self.project(self.dropout(self.hidden(x_btd).relu_()))


class Transformer(nn.Module):
    """Layers one after the other; pre-norm layers are followed by a last normalisation.

    Parameters
    ----------
    layers
        The layers, at least one, all pre-norm or all post-norm.

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

    def __init__(self, layers: Sequence[TransformerLayer]) -> None:
        super().__init__()
        if len({layer.pre_norm for layer in layers}) != 1:
            message = (
                f"A transformer needs layers of one kind, all pre-norm or all post-norm; {len(layers)} were given."
            )
            raise ConfigError(message)
        self.layers = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(layers[0].norm.normalized_shape[0]) if layers[0].pre_norm else nn.Identity()

    def forward(self, x_btd: Tensor, key_mask_bt: Tensor | None = None) -> Tensor:
        """Return the features after the last layer, shape (b, t, d)."""
        for layer in self.layers:
            x_btd = layer(x_btd, key_mask_bt)
        return self.norm(x_btd)
