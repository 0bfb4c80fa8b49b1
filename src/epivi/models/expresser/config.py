"""The configuration of Expresser: every choice that shapes network and masking, checked once, and its named sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from epivi import _validate
from epivi._errors import ConfigError
from epivi.models.base_arguments import TRANSFORMER_TRAINING, SizedConfig

if TYPE_CHECKING:
    from collections.abc import Mapping

DECODERS = ("expression", "encoder")
BINNINGS = ("relative", "count", "residual")
LIKELIHOODS = ("mse", "gaussian")
BASELINES = ("none", "additive")
REDUCTIONS = ("mean", "sum")
GENE_INITS = ("random", "correlation")
HIGHEST_MASK_RATE = 0.5
HIGHEST_LR = 5e-3

SIZES: dict[str, dict[str, Any]] = {
    "test": {
        "width": 32,
        "n_layers": 2,
        "n_heads": 4,
        "n_hidden": 128,
        "n_bins": 10,
        "max_genes": 48,
        "gene_init": "random",
    },
    "tutorial": {
        "width": 64,
        "n_layers": 3,
        "n_heads": 4,
        "n_hidden": 256,
        "n_bins": 50,
        "max_genes": 256,
        "gene_init": "correlation",
    },
    "paper": {
        "width": 200,
        "n_layers": 12,
        "n_heads": 4,
        "n_hidden": 800,
        "n_bins": 50,
        "max_genes": 1100,
        "gene_init": "random",
    },
}


@dataclass(frozen=True, kw_only=True)
class ExpresserConfig(SizedConfig):
    """Choices of an Expresser; the defaults are the size "tutorial".

    Parameters
    ----------
    width, n_layers, n_heads, n_hidden
        Width d, encoder layers N, heads h, and units of the feed-forward networks.
    n_bins
        Bins k of expression.
    max_genes
        Genes read of a cell in training; above them a hashed sample is taken. At inference all are read.
    mask_rate
        Share of the expressed genes of a cell that is hidden, at least one and never all.
    dropout_rate
        Share of values set to zero in training, of residual branches and hidden units; attention is never dropped.
    decoder
        "expression": values enter as values of the decoder's attention alone; "encoder": the ablation "without
        decoder", where values are added to the tokens of the observed genes and hidden genes carry a mask token.
    binning
        "relative": equal intervals up to the cell's maximum; "count": counts 1, 2, 3, ... as they are; "residual"
        (beyond the thesis): what the additive baseline leaves of a value, which needs ``baseline="additive"``.
    leaky_normalization
        Whether size factor and maximum are those of the whole cell, hidden genes included, as in the thesis.
    likelihood
        "mse": squared error; "gaussian": mean and variance, for intervals (beyond the thesis).
    reduction
        Whether the loss of a cell is the mean or the sum over its hidden genes.
    baseline
        What the network starts from: "none", or "additive": mean of the gene plus shift of the cell (beyond the
        thesis); the network then learns what is left.
    gene_init
        How the vectors of genes start: "random" (the thesis), or "correlation": at the loadings of the genes on the
        components of their correlations over the training cells (beyond the thesis).
    detection
        Whether a head tells how probable it is that a gene is expressed at all (beyond the thesis).
    checkpoint
        Whether activations are computed again in the backward pass, which saves memory.

    Raises
    ------
    ConfigError
        If a value is outside its range or not among the choices, the heads do not divide the width, or bins of
        residuals have no baseline.

    Examples
    --------
    >>> ExpresserConfig.chosen({}, size="paper").n_layers
    12
    """

    width: int = 64
    n_layers: int = 3
    n_heads: int = 4
    n_hidden: int = 256
    n_bins: int = 50
    max_genes: int = 256
    mask_rate: float = 0.15
    dropout_rate: float = 0.1
    decoder: str = "expression"
    binning: str = "relative"
    leaky_normalization: bool = False
    likelihood: str = "mse"
    reduction: str = "mean"
    baseline: str = "none"
    gene_init: str = "correlation"
    detection: bool = False
    checkpoint: bool = False

    MODEL: ClassVar[str] = "Expresser"
    SIZES: ClassVar[Mapping[str, Mapping[str, Any]]] = SIZES

    def __post_init__(self) -> None:
        for name in ("width", "n_layers", "n_heads", "n_hidden", "n_bins"):
            _validate.check_number(getattr(self, name), name, low=1, integer=True)
        _validate.check_number(self.max_genes, "max_genes", low=2, integer=True)
        _validate.check_number(self.dropout_rate, "dropout_rate", low=0.0, high=1.0, high_inclusive=False)
        _validate.check_number(self.mask_rate, "mask_rate", low=0.0, high=HIGHEST_MASK_RATE, low_inclusive=False)
        _validate.check_choice(self.decoder, "decoder", DECODERS)
        _validate.check_choice(self.binning, "binning", BINNINGS)
        _validate.check_choice(self.likelihood, "likelihood", LIKELIHOODS)
        _validate.check_choice(self.reduction, "reduction", REDUCTIONS)
        _validate.check_choice(self.gene_init, "gene_init", GENE_INITS)
        _validate.check_choice(self.baseline, "baseline", BASELINES)
        for name in ("leaky_normalization", "detection", "checkpoint"):
            _validate.check_choice(getattr(self, name), name, (True, False))
        if self.width % self.n_heads:
            message = f"n_heads={self.n_heads} does not divide width={self.width}."
            raise ConfigError(message)
        if self.binning == "residual" and self.baseline != "additive":
            message = "binning='residual' is what the additive baseline leaves: take baseline='additive' with it."
            raise ConfigError(message)

    @property
    def n_folds(self) -> int:
        """Parts into which the genes of a cell fall when each is predicted from the others, 1 / mask rate."""
        return max(round(1.0 / self.mask_rate), 2)

    def training_defaults(self, n_obs: int) -> dict[str, Any]:  # noqa: ARG002
        """Return the defaults of the training: AdamW, warm-up over 5 % of the steps, then a cosine.

        Examples
        --------
        >>> ExpresserConfig.chosen({}, size="paper").training_defaults(100)["lr"]
        0.0001
        """
        return TRANSFORMER_TRAINING | {
            # the rate of the thesis at its width; smaller networks need a higher one: at a lower one attention stays
            # even, and no more is learned than means of genes and cells
            "lr": min(1e-4 * (SIZES["paper"]["width"] / self.width) ** 3, HIGHEST_LR),
            "batch_size": 64,
            "max_epochs": 30,
            "early_stopping_patience": 10,
        }
