"""The network of Expresser: an encoder of gene identities, and a decoder whose values are expression alone.

Legend of shapes: b cells, t tokens, q hidden genes, u genes asked for that are not tokens, d width, k bins, h heads, e
width of a head.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from torch import nn
from torch.nn.functional import softplus

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

    def encode_asked(
        self, tokens_bt: Tensor, length_b: Tensor, bin_bt: Tensor, asked_bu: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return observed genes in context, (b, t, d), and genes asked for in the same context, (b, u, d).

        A gene that is asked for attends to the observed genes and to itself, and nothing attends to it: so it matters
        not which others are asked for.
        """
        mask_bt = token_mask(tokens_bt, length_b)
        x_btd = self.embed(tokens_bt, bin_bt)
        x_bud = self.embed(asked_bu, torch.zeros_like(asked_bu), asked_bu > 0)
        for module in self.encoder.layers:
            layer = cast("TransformerLayer", module)
            attended_bud = attend_one_sided(layer.attention, x_bud, x_btd, mask_bt)
            x_bud = layer.attention_norm(x_bud + layer.dropout(attended_bud))
            x_bud = layer.norm(x_bud + layer.dropout(layer._feed_forward(x_bud)))
            x_btd = layer(x_btd, mask_bt)
        return x_btd, x_bud


def token_mask(tokens_bt: Tensor, length_b: Tensor) -> Tensor:
    """Return True for tokens; a cell without any keeps its first pad, so that its attention is defined.

    Examples
    --------
    >>> token_mask(torch.zeros(2, 2), torch.tensor([0, 2])).tolist()
    [[True, False], [True, True]]
    """
    return torch.arange(tokens_bt.shape[1], device=tokens_bt.device) < length_b[:, None].clamp_min(1)


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
    n_heads = attention.n_heads

    def heads(x: Tensor) -> tuple[Tensor, ...]:
        return attention.project(x).unflatten(2, (3, n_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)

    query_bhue, own_key_bhue, own_value_bhue = heads(x_bud)
    _, key_bhte, value_bhte = heads(x_btd)
    # own key and value: a column of its own for each query, which the fused kernel does not know
    scale = query_bhue.shape[3] ** -0.5
    score_bhut = scale * query_bhue @ key_bhte.transpose(2, 3)
    score_bhut = score_bhut.masked_fill(~mask_bt[:, None, None], -torch.inf)
    own_bhu1 = scale * (query_bhue * own_key_bhue).sum(3, keepdim=True)
    weight_bhuk = torch.cat([score_bhut, own_bhu1], 3).softmax(3)
    z_bhue = weight_bhuk[..., :-1] @ value_bhte + weight_bhuk[..., -1:] * own_value_bhue
    return attention.out(z_bhue.transpose(1, 2).flatten(2))
