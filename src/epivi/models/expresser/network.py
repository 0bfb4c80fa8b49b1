"""The network of Expresser: an encoder of gene identities, and a decoder whose values are expression alone.

Legend of shapes: b cells, t tokens, q hidden genes, u genes asked for that are not tokens, d width, k bins, h heads, e
width of a head.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import nn
from torch.nn.functional import pad, scaled_dot_product_attention, softplus

from epivi.nn.attention import SelfAttention, Transformer, TransformerLayer
from epivi.nn.tokens import INIT_SD, TokenTable
from epivi.nn.value_attention import ValueAttention
from epivi.objectives.expression import inverse_softplus

if TYPE_CHECKING:
    from torch import Tensor

    from epivi.models.expresser.config import ExpresserConfig

USUAL_VALUE = 2.0
LEAST_LOG_VARIANCE, MOST_LOG_VARIANCE = -8.0, 4.0


class Prediction(NamedTuple):
    """What is told of hidden genes.

    Attributes
    ----------
    mean
        Log-normalised value if the gene is expressed, at least 0.
    log_variance
        Of a Gaussian law around it; ``None`` without.
    """

    mean: Tensor
    log_variance: Tensor | None = None


class Observed(NamedTuple):
    """Observed genes as genes asked for find them.

    Attributes
    ----------
    context_btd
        In context.
    mask_bt
        True for tokens.
    layers
        Keys and values in each layer.
    """

    context_btd: Tensor
    mask_bt: Tensor
    layers: list[tuple[Tensor, Tensor]]


def gather_rows(x_btd: Tensor, index_bq: Tensor) -> Tensor:
    """Return some positions of each sample, shape (b, q, d).

    Examples
    --------
    >>> gather_rows(torch.tensor([[[1.0], [2.0]]]), torch.tensor([[1, 1, 0]])).flatten().tolist()
    [2.0, 2.0, 1.0]
    """
    return x_btd.gather(1, index_bq[:, :, None].expand(-1, -1, x_btd.shape[2]))


class Head(nn.Module):
    """Values of hidden genes from what was mixed for them and the cell's maximum (thesis, equation 4.4).

    Parameters
    ----------
    width
        Width d.
    n_out
        1, or 2 with a variance.
    starts_at_zero
        Whether the last layer starts at 0, so that what it is added to stands at first.
    """

    def __init__(self, width: int, n_out: int, *, starts_at_zero: bool = False) -> None:
        super().__init__()
        self.hidden = nn.Linear(width + 1, width)
        self.out = nn.Linear(width, n_out)
        # a common log-normalised value of an expressed gene: from 0, the first epochs would learn no more than this
        nn.init.constant_(self.out.bias[:1], USUAL_VALUE)
        if starts_at_zero:
            nn.init.zeros_(self.out.weight)
            nn.init.zeros_(self.out.bias)

    def forward(self, mixed_bqd: Tensor, maximum_b: Tensor, baseline_bq: Tensor | None = None) -> Prediction:
        """Return the prediction, each part of shape (b, q)."""
        maximum_bq1 = maximum_b[:, None, None].expand(-1, mixed_bqd.shape[1], 1)
        out_bqo = self.out(self.hidden(torch.cat([mixed_bqd, maximum_bq1], 2)).relu()).float()
        raw_bq = out_bqo[:, :, 0]
        if baseline_bq is not None:
            raw_bq = raw_bq + inverse_softplus(baseline_bq)
        if out_bqo.shape[2] == 1:
            return Prediction(softplus(raw_bq))
        return Prediction(softplus(raw_bq), out_bqo[:, :, 1].clamp(LEAST_LOG_VARIANCE, MOST_LOG_VARIANCE))


class DetectionHead(nn.Module):
    """Logit that a gene is expressed, from its vector in context, what was mixed for it, and the cell's maximum.

    Parameters
    ----------
    width
        Width d.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(2 * width + 2, width)
        self.out = nn.Linear(width, 1)

    def forward(self, gene_bud: Tensor, mixed_bud: Tensor, maximum_b: Tensor, n_b: Tensor) -> Tensor:
        """Return the logits, shape (b, u); ``n_b`` is the number of observed genes."""
        cell_b2 = torch.stack([maximum_b, n_b.clamp_min(1).log()], 1)
        cell_bu2 = cell_b2[:, None].expand(-1, gene_bud.shape[1], 2)
        return self.out(self.hidden(torch.cat([gene_bud, mixed_bud, cell_bu2], 2)).relu())[:, :, 0].float()


class ExpresserNetwork(nn.Module):
    """Gene and bin tables, encoder, value attention and heads.

    Parameters
    ----------
    config
        Choices of the model.
    n_genes
        Genes m of the vocabulary.
    """

    def __init__(self, config: ExpresserConfig, n_genes: int) -> None:
        super().__init__()
        width = config.width
        self.genes = TokenTable(n_genes, width, n_special=1, norm=False)
        self.bins = TokenTable(config.n_bins, width, n_special=1, norm=False)
        layers = [
            TransformerLayer(
                SelfAttention(width, config.n_heads),
                config.n_hidden,
                dropout_rate=config.dropout_rate,
                activation="gelu",
            )
            for _ in range(config.n_layers)
        ]
        self.encoder = Transformer(layers, checkpoint=config.checkpoint)
        self.attention: ValueAttention | None = None
        if config.decoder == "expression":
            self.attention = ValueAttention(width, config.n_heads)
        else:
            self.mask_token = nn.Parameter(INIT_SD * torch.randn(width))
        n_out = 2 if config.likelihood == "gaussian" else 1
        self.head = Head(width, n_out, starts_at_zero=config.baseline == "additive")
        self.detection = DetectionHead(width) if config.detection else None
        self._start()

    @torch.no_grad()
    def _start(self) -> None:
        """Start where identities and levels can be told: the tables are small beside biases drawn at random.

        Biases of projections start at 0, as in most transformers, and bins lie in order on a line, so that from the
        first step on attention to a gene tells how highly it is expressed.
        """
        for part in self.modules():
            if isinstance(part, SelfAttention | ValueAttention):
                for linear in part.children():
                    if isinstance(linear, nn.Linear):
                        nn.init.zeros_(linear.bias)
        table_kd = self.bins.table.weight[1:]
        level_k1 = torch.linspace(-1.0, 1.0, table_kd.shape[0])[:, None]
        table_kd += level_k1 * torch.randn(table_kd.shape[1])

    def embed(self, tokens_bt: Tensor, bin_bt: Tensor, is_hidden_bt: Tensor | None = None) -> Tensor:
        """Return the vectors before the encoder, shape (b, t, d): identities, and in the ablation values too."""
        x_btd = self.genes(tokens_bt)
        if self.attention is not None:
            return x_btd
        x_btd = x_btd + self.bins(bin_bt)
        return x_btd if is_hidden_bt is None else x_btd + is_hidden_bt[:, :, None] * self.mask_token

    def encode(self, tokens_bt: Tensor, length_b: Tensor, bin_bt: Tensor) -> Tensor:
        """Return genes in context T', shape (b, t, d); without values unless the decoder is "encoder"."""
        mask_bt = token_mask(tokens_bt, length_b)
        return self.encoder(self.embed(tokens_bt, bin_bt, mask_bt & (bin_bt == 0)), mask_bt)

    def mix(self, query_bqd: Tensor, context_btd: Tensor, bin_bt: Tensor) -> Tensor:
        """Return what the observed genes tell of the queries, P, shape (b, q, d) (equation 4.3)."""
        if self.attention is None:
            return query_bqd
        table_kd = self.bins.table.weight
        return self.attention.forward_from_table(query_bqd, context_btd, bin_bt, table_kd, bin_bt > 0)

    def observe(self, tokens_bt: Tensor, length_b: Tensor, bin_bt: Tensor) -> Observed:
        """Return observed genes in context, and what genes asked for attend to in each layer."""
        mask_bt = token_mask(tokens_bt, length_b)
        x_btd = self.embed(tokens_bt, bin_bt)
        layers = []
        for module in self.encoder.layers:
            layer = cast("TransformerLayer", module)
            layers.append(keys_and_values(layer.attention, x_btd))
            x_btd = layer(x_btd, mask_bt)
        return Observed(x_btd, mask_bt, layers)

    def encode_asked(
        self,
        tokens_bt: Tensor,
        length_b: Tensor,
        bin_bt: Tensor,
        asked_bu: Tensor,
        observed: Observed | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return observed genes in context, (b, t, d), and genes asked for in the same context, (b, u, d).

        A gene that is asked for attends to the observed genes and to itself, and nothing attends to it: so it matters
        not which others are asked for. ``observed`` is that of :meth:`observe`, where it is known.
        """
        if observed is None:
            observed = self.observe(tokens_bt, length_b, bin_bt)
        x_bud = self.embed(asked_bu, torch.zeros_like(asked_bu), asked_bu > 0)
        for module, seen in zip(self.encoder.layers, observed.layers, strict=True):
            layer = cast("TransformerLayer", module)
            attended_bud = attend_to(layer.attention, x_bud, seen, observed.mask_bt)
            x_bud = layer.attention_norm(x_bud + layer.dropout(attended_bud))
            x_bud = layer.norm(x_bud + layer.dropout(layer._feed_forward(x_bud)))
        return observed.context_btd, x_bud


def token_mask(tokens_bt: Tensor, length_b: Tensor) -> Tensor:
    """Return True for tokens; a cell without any keeps its first pad, so that its attention is defined.

    Examples
    --------
    >>> token_mask(torch.zeros(2, 2), torch.tensor([0, 2])).tolist()
    [[True, False], [True, True]]
    """
    return torch.arange(tokens_bt.shape[1], device=tokens_bt.device) < length_b[:, None].clamp_min(1)


def keys_and_values(attention: SelfAttention, x_btd: Tensor) -> tuple[Tensor, Tensor]:
    """Return keys and values of t vectors and of a sink behind them, wider than a head, each (b, h, t + 1, e + r).

    In the first column beyond those of a head, the sink alone has a 1, in its key and in its value. A query that has
    its own score there thus attends to the sink as to itself, and finds how much in that column of the result.
    """
    heads = attention.project(x_btd).unflatten(2, (3, attention.n_heads, -1)).permute(2, 0, 3, 1, 4)
    n, width = heads.shape[3:]
    # kernels like widths that 8 divides
    padded = pad(heads[1:], (0, 8 - width % 8, 0, 1))
    padded[..., n, width] = 1.0
    key, value = padded.unbind(0)
    return key, value


def attend_to(attention: SelfAttention, x_bud: Tensor, seen: tuple[Tensor, Tensor], mask_bt: Tensor) -> Tensor:
    """Return the self-attention of each of u vectors to t others and to itself, shape (b, u, d).

    Parameters
    ----------
    attention
        Attention without positions; its weights are used.
    x_bud
        Vectors that attend.
    seen
        Keys and values of the vectors that are attended to, see :func:`keys_and_values`.
    mask_bt
        True for vectors that may be attended to.
    """
    heads = attention.project(x_bud).unflatten(2, (3, attention.n_heads, -1)).permute(2, 0, 3, 1, 4)
    query_bhue, own_key_bhue, own_value_bhue = heads.unbind(0)
    key, value = seen
    width = query_bhue.shape[3]
    own_bhu1 = (query_bhue * own_key_bhue).sum(3, keepdim=True)
    query = pad(torch.cat([query_bhue, own_bhu1], 3), (0, key.shape[3] - width - 1))
    allowed = pad(mask_bt, (0, 1), value=True)[:, None, None]
    z = scaled_dot_product_attention(query, key, value, attn_mask=allowed, scale=width**-0.5)
    z_bhue = z[..., :width] + z[..., width, None] * own_value_bhue
    return attention.out(z_bhue.transpose(1, 2).flatten(2))


def attend_one_sided(attention: SelfAttention, x_bud: Tensor, x_btd: Tensor, mask_bt: Tensor) -> Tensor:
    """Return the self-attention of each of u vectors to t others and to itself, shape (b, u, d).

    Parameters
    ----------
    attention
        Attention without positions; its weights are used.
    x_bud, x_btd
        Vectors that attend, and that are attended to.
    mask_bt
        True for vectors that may be attended to.
    """
    return attend_to(attention, x_bud, keys_and_values(attention, x_btd), mask_bt)
