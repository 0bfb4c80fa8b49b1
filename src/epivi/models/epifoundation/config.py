"""The configuration of EpiFoundation: every choice that shapes the network, checked once, and its named sizes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

from epivi import _validate
from epivi._errors import ConfigError
from epivi.models.base_arguments import TRANSFORMER_TRAINING, SizedConfig

if TYPE_CHECKING:
    from collections.abc import Mapping

PRETRAINING = "pretraining"
ANNOTATION = "annotation"
EXPRESSION = "expression"
BATCH_CORRECTION = "batch_correction"
TASKS = (PRETRAINING, ANNOTATION, EXPRESSION, BATCH_CORRECTION)
LABEL_TASKS = (ANNOTATION, BATCH_CORRECTION)
POSITIONS = ("chromosome", "genome", "none")
EXPRESSION_TARGETS = ("lognorm", "level")
PEAK_INITS = ("random", "lsi")

SIZES: dict[str, dict[str, Any]] = {
    "test": {
        "width": 32,
        "n_layers": 2,
        "n_heads": 4,
        "n_hidden": 64,
        "n_gate": 32,
        "max_peaks": 64,
        "max_genes": 32,
        "dropout_rate": 0.0,
        "peak_init": "random",
        "linear_readout": False,
        "local_readout_bp": 0,
    },
    "tutorial": {
        "width": 128,
        "n_layers": 3,
        "n_heads": 4,
        "n_hidden": 256,
        "n_gate": 64,
        "max_peaks": 1024,
        "max_genes": 512,
        "dropout_rate": 0.0,
        "peak_init": "lsi",
        "linear_readout": True,
        "local_readout_bp": 50_000,
    },
    "paper": {
        "width": 512,
        "n_layers": 6,
        "n_heads": 8,
        "n_hidden": 1024,
        "n_gate": 128,
        "max_peaks": 12_000,
        "max_genes": 8_000,
        "dropout_rate": 0.15,
        "peak_init": "random",
        "linear_readout": False,
        "local_readout_bp": 0,
    },
}


@dataclass(frozen=True, kw_only=True)
class EpiFoundationConfig(SizedConfig):
    """Choices of an EpiFoundation; the defaults are the size "tutorial".

    Parameters
    ----------
    task
        What the heads are for: "pretraining", "annotation", "expression" or "batch_correction".
    width, n_layers, n_heads, n_hidden
        Width d, encoder layers N, heads h and units f of the feed-forward networks.
    n_gate
        Units q of the gated decoders.
    max_peaks, max_genes
        Peaks read of a cell, and genes scored of it in a training step; above them a hashed sample is taken.
    dropout_rate
        Share of values set to zero in training, of inputs and residual branches; attention weights are never dropped.
        The paper has 0.15; in narrow networks it hides the small differences between cells.
    peak_dim
        Width of the peak table before a linear layer; the width of the model if ``None``.
    positions
        What tells where a peak or gene lies: "chromosome" (the paper), "genome" (beyond it: chromosome and learned
        bins of the genome at several scales), or "none".
    peak_identity
        Whether each peak has a learned row of its own; without one, peaks are known by their position alone.
    peak_init
        How the rows of the peaks start: "random", or "lsi": the peaks' loadings of a latent semantic index of the
        training cells.
    masked_peak_weight, masked_peak_rate
        Weight of the masked-peak objective of pretraining (beyond the paper), and the share of open peaks hidden.
    batch_adversary
        Weight of an adversary that reads the batch off the cell vector (beyond the paper); 0 has none.
    count_levels
        Whether tokens carry the count of their peak in levels 1, 2 and 3 or more (beyond the paper).
    expression_target, n_levels
        What the task "expression" predicts: log-normalised values, or ranks within the cell in so many levels.
    linear_readout
        Whether expression is also read off the cell vector by a linear map, which starts at a least-squares fit
        (beyond the paper). The gated decoder starts at zero and learns what is left.
    local_readout_bp
        Window in bp around each gene, of whose open peaks the task "expression" reads the gene directly, beside the
        cell vector, by a linear map that starts at a least-squares fit (beyond the paper); 0 has none.
    checkpoint
        Whether activations are computed again in the backward pass, which saves memory.

    Raises
    ------
    ConfigError
        If a value is outside its range or not among the choices, the heads do not divide the width, or peaks would
        have neither identity nor position.

    Examples
    --------
    >>> EpiFoundationConfig.chosen({}, size="paper").width
    512
    """

    task: str = PRETRAINING
    width: int = 128
    n_layers: int = 3
    n_heads: int = 4
    n_hidden: int = 256
    n_gate: int = 64
    max_peaks: int = 1024
    max_genes: int = 512
    dropout_rate: float = 0.0
    peak_dim: int | None = None
    positions: str = "chromosome"
    peak_identity: bool = True
    peak_init: str = "lsi"
    masked_peak_weight: float = 0.0
    masked_peak_rate: float = 0.15
    batch_adversary: float = 0.0
    count_levels: bool = False
    expression_target: str = "lognorm"
    n_levels: int = 10
    linear_readout: bool = True
    local_readout_bp: int = 50_000
    checkpoint: bool = False

    MODEL: ClassVar[str] = "EpiFoundation"
    SIZES: ClassVar[Mapping[str, Mapping[str, Any]]] = SIZES

    @classmethod
    def chosen(cls, arguments: Mapping[str, Any], *, size: str = "tutorial") -> Self:
        """Return a named size with some choices made differently; see :meth:`SizedConfig.chosen`.

        Examples
        --------
        >>> EpiFoundationConfig.chosen({"n_layers": 1, "n_heads": None}, size="test").n_heads
        4
        """
        if arguments.get("peak_identity") is False:
            # there are no rows to start, and no weights of single peaks
            without = {"peak_init": "random", "local_readout_bp": 0}
            arguments = {**arguments, **{k: v for k, v in without.items() if arguments.get(k) is None}}
        return super().chosen(arguments, size=size)

    def __post_init__(self) -> None:
        _validate.check_choice(self.task, "task", TASKS)
        for name in ("width", "n_layers", "n_heads", "n_hidden", "n_gate", "max_peaks"):
            _validate.check_number(getattr(self, name), name, low=1, integer=True)
        _validate.check_number(self.max_genes, "max_genes", low=2, integer=True)
        _validate.check_number(self.local_readout_bp, "local_readout_bp", low=0, integer=True)
        _validate.check_number(self.n_levels, "n_levels", low=2, integer=True)
        if self.peak_dim is not None:
            _validate.check_number(self.peak_dim, "peak_dim", low=1, integer=True)
        for name in ("dropout_rate", "masked_peak_rate"):
            _validate.check_number(getattr(self, name), name, low=0.0, high=1.0, high_inclusive=False)
        for name in ("masked_peak_weight", "batch_adversary"):
            _validate.check_number(getattr(self, name), name, low=0.0)
        _validate.check_choice(self.positions, "positions", POSITIONS)
        _validate.check_choice(self.peak_init, "peak_init", PEAK_INITS)
        _validate.check_choice(self.expression_target, "expression_target", EXPRESSION_TARGETS)
        for name in ("peak_identity", "count_levels", "linear_readout", "checkpoint"):
            _validate.check_choice(getattr(self, name), name, (True, False))
        if self.width % self.n_heads:
            message = f"n_heads={self.n_heads} does not divide width={self.width}."
            raise ConfigError(message)
        if not self.peak_identity and self.positions != "genome":
            message = "peak_identity=False leaves peaks without a meaning: take positions='genome' with it."
            raise ConfigError(message)
        if not self.peak_identity and (self.masked_peak_weight or self.peak_init != "random" or self.local_readout_bp):
            message = (
                f"masked_peak_weight={self.masked_peak_weight:g}, peak_init='{self.peak_init}' and "
                f"local_readout_bp={self.local_readout_bp} are about single peaks, which peak_identity=False does not "
                "tell apart: take 0, 'random' and 0 with it."
            )
            raise ConfigError(message)

    def for_task(self, task: str, **changes: Any) -> Self:
        """Return the same network with other heads.

        Examples
        --------
        >>> EpiFoundationConfig().for_task("annotation").task
        'annotation'
        """
        return replace(self, task=task, **changes)

    def training_defaults(self, n_obs: int) -> dict[str, Any]:  # noqa: ARG002
        """Return the defaults of the training: AdamW, warm-up over 5 % of the steps, then a cosine.

        Examples
        --------
        >>> EpiFoundationConfig.chosen({}, size="paper").training_defaults(100)["lr"]
        0.0001
        """
        return TRANSFORMER_TRAINING | {
            # the published rate at the published width; smaller networks bear, and need, a higher one
            "lr": 1e-4 * SIZES["paper"]["width"] / self.width,
            "batch_size": 32,
            "max_epochs": 50,
            "early_stopping_patience": 10,
        }
