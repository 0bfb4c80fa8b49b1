"""The configuration of CANDI: every choice that shapes the network, checked once, and its named sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from epivi import _validate
from epivi._errors import ConfigError
from epivi.models.base_arguments import TRANSFORMER_TRAINING, SizedConfig

if TYPE_CHECKING:
    from collections.abc import Mapping

HEADS = ("default", "paper")
DISPERSIONS = ("assay", "assay-bin")
POSITIONS = ("bias", "key-value")
UPSAMPLINGS = ("nearest", "transposed")
MISSING = ("learned", "literal")
INPUTS = ("counts", "signal")
LOSS_WEIGHTINGS = ("equal", "mask_fraction")

_PAPER: dict[str, Any] = {"n_bins": 1200, "n_stages": 3, "expansion": 3, "n_heads": 9, "n_layers": 4}
SIZES: dict[str, dict[str, Any]] = {
    "test": {"n_bins": 160, "n_stages": 2, "expansion": 2, "n_heads": 4, "n_layers": 1},
    "tutorial": {"n_bins": 240, "n_stages": 3, "expansion": 2, "n_heads": 4, "n_layers": 2},
    "pilot": {"n_bins": 400, "n_stages": 3, "expansion": 3, "n_heads": 9, "n_layers": 2, "input": "signal"},
    "paper": _PAPER,
    "paper_code": _PAPER
    | {
        "head": "paper",
        "squeeze_excitation": True,
        "position": "key-value",
        "max_distance": 2,
        "upsampling": "transposed",
        "missing": "literal",
    },
}


@dataclass(frozen=True, kw_only=True)
class CandiConfig(SizedConfig):
    """Choices of a CANDI; the defaults are the size "tutorial".

    Parameters
    ----------
    n_bins
        Bins of a window, a multiple of 2^n_stages.
    n_stages
        Stages n of the towers; each halves the bins.
    expansion
        Factor e by which each stage multiplies the channels of an assay; the width is assays x e^n.
    n_heads, n_layers
        Heads and layers of the transformer; the heads divide the width.
    bin_size_bp
        Base pairs R of a bin.
    dropout_rate
        Share of values set to zero in training, inside the transformer.
    head
        "default": mean and dispersion of counts, no normalisation. "paper": equation (C5), which normalises over
        assays and thereby loses their level.
    dispersion
        "assay": one number an assay. "assay-bin": predicted for each bin. Of the default head only.
    position, max_distance
        How the attention tells distances apart: a learned number by head ("bias") or learned vectors of keys and
        values; distances beyond ``max_distance`` latent positions are treated as this one.
    upsampling
        "nearest" repeats positions and convolves; "transposed" is the released form, whose shortcut leaves odd bins
        at their bias.
    missing
        How a hidden or missing value is written: "learned" gives the input a channel with the mask and every
        covariate a learned vector; "literal" writes -1, as the released code.
    squeeze_excitation
        Scale channels by gates computed from the whole window; the output then depends on the length of the window.
    locus_prior
        Whether the mean of each assay over other biosamples is an input; predictions start from it.
    n_features
        Features of each assay that the decoder hands to the heads. The paper has 1, so that means and dispersions of
        few assays come from few numbers.
    pre_norm
        Whether the transformer normalises before attention and feed-forward network, and not after them.
    skip
        Whether the input also enters at full resolution before the heads.
    input
        What the encoder and the prior are made of: "counts" (their log1p) or "signal".
    thinning, thin_each_assay
        Factors by which the reads of the input are thinned in training, one drawn for each sample, or for each of its
        assays.
    mixup
        Parameter alpha of the Beta law of the weights with which, in training, biosamples are mixed at the same locus;
        0 mixes none.
    swap_rate
        Chance that, in training, an assay that is shown is that of another biosample at the same locus.
    covariate_dropout_rate
        Chance that, in training, a covariate asked of the decoder is unknown, and that all of an experiment are.
    hide_all_rate
        Share of training samples of which every assay is hidden.
    loss_weighting
        "equal", or "mask_fraction": terms are weighted by the shares of hidden and shown assays.

    Raises
    ------
    ConfigError
        If a value is outside its range or not among the choices, ``n_bins`` is not a multiple of 2^n_stages, or the
        paper's head is combined with a prior.

    Examples
    --------
    >>> CandiConfig(n_bins=400).width(8)
    64
    """

    n_bins: int = 240
    n_stages: int = 3
    expansion: int = 2
    n_heads: int = 4
    n_layers: int = 2
    bin_size_bp: int = 25
    dropout_rate: float = 0.1
    head: str = "default"
    dispersion: str = "assay"
    position: str = "bias"
    max_distance: int | None = None
    upsampling: str = "nearest"
    missing: str = "learned"
    squeeze_excitation: bool = False
    locus_prior: bool = False
    n_features: int = 1
    pre_norm: bool = False
    skip: bool = False
    input: str = "counts"
    thinning: tuple[int, ...] = (1, 2, 4)
    thin_each_assay: bool = False
    mixup: float = 0.0
    swap_rate: float = 0.0
    covariate_dropout_rate: float = 0.1
    hide_all_rate: float = 0.0
    loss_weighting: str = "equal"

    MODEL: ClassVar[str] = "CANDI"
    SIZES: ClassVar[Mapping[str, Mapping[str, Any]]] = SIZES

    def __post_init__(self) -> None:
        for name in ("n_bins", "n_stages", "expansion", "n_heads", "n_layers", "bin_size_bp", "n_features"):
            _validate.check_number(getattr(self, name), name, low=1, integer=True)
        if self.max_distance is not None:
            _validate.check_number(self.max_distance, "max_distance", low=1, integer=True)
        _validate.check_number(self.dropout_rate, "dropout_rate", low=0.0, high=1.0, high_inclusive=False)
        _validate.check_choice(self.head, "head", HEADS)
        _validate.check_choice(self.dispersion, "dispersion", DISPERSIONS)
        _validate.check_choice(self.position, "position", POSITIONS)
        _validate.check_choice(self.upsampling, "upsampling", UPSAMPLINGS)
        _validate.check_choice(self.missing, "missing", MISSING)
        for name in ("squeeze_excitation", "locus_prior", "pre_norm", "skip", "thin_each_assay"):
            _validate.check_choice(getattr(self, name), name, (True, False))
        self._check_training()
        if self.n_bins % self.scale:
            lower = self.n_bins // self.scale * self.scale
            message = (
                f"n_bins={self.n_bins} is not a multiple of 2^n_stages = {self.scale}. Take "
                f"{lower or self.scale} or {lower + self.scale}."
            )
            raise ConfigError(message)
        if self.head == "paper" and self.locus_prior:
            message = "head='paper' normalises over assays and cannot start from a prior. Take head='default'."
            raise ConfigError(message)

    def _check_training(self) -> None:
        _validate.check_choice(self.input, "input", INPUTS)
        _validate.check_choice(self.loss_weighting, "loss_weighting", LOSS_WEIGHTINGS)
        for name in ("covariate_dropout_rate", "swap_rate"):
            _validate.check_number(getattr(self, name), name, low=0.0, high=1.0, high_inclusive=False)
        _validate.check_number(self.mixup, "mixup", low=0.0)
        _validate.check_number(self.hide_all_rate, "hide_all_rate", low=0.0, high=1.0)
        if not isinstance(self.thinning, tuple | list) or not self.thinning:
            message = f"thinning must be one factor or more, as in (1, 2, 4), found {self.thinning!r}."
            raise ConfigError(message)
        for factor in self.thinning:
            _validate.check_number(factor, "thinning", low=1, integer=True)
        object.__setattr__(self, "thinning", tuple(self.thinning))  # a list, as JSON gives it, is not hashable

    @property
    def is_paired(self) -> bool:
        """Whether training needs the samples of a minibatch in pairs, two biosamples at one locus."""
        return self.mixup > 0 or self.swap_rate > 0

    @property
    def scale(self) -> int:
        """Bins of a latent position, 2^n."""
        return 2**self.n_stages

    @property
    def n_positions(self) -> int:
        """Latent positions of a window, L' = L / 2^n."""
        return self.n_bins // self.scale

    @property
    def window_bp(self) -> int:
        """Base pairs of a window, G = L R."""
        return self.n_bins * self.bin_size_bp

    @property
    def has_depth_offset(self) -> bool:
        """Whether the log mean of counts takes the depth as an offset (C8); the paper's head does not."""
        return self.head == "default"

    @property
    def n_input_channels(self) -> int:
        """Input channels of an assay: value, mask (unless missing ones are literal), prior (if there is one)."""
        return 1 + (self.missing == "learned") + self.locus_prior

    def width(self, n_assays: int) -> int:
        """Return the width d = A e^n.

        Raises
        ------
        ConfigError
            If the heads do not divide it.

        Examples
        --------
        >>> CandiConfig.chosen({}, size="paper").width(35)
        945
        """
        width = n_assays * self.expansion**self.n_stages
        if width % self.n_heads:
            fitting = [n for n in range(1, min(width, 17)) if width % n == 0]
            message = (
                f"n_heads={self.n_heads} does not divide the width {width} = {n_assays} assays x "
                f"{self.expansion}^{self.n_stages}. Numbers of heads that do: {', '.join(map(str, fitting))}."
            )
            raise ConfigError(message)
        return width

    def signal_channels(self, n_assays: int) -> tuple[int, ...]:
        """Return the channels before the first and after each stage of the signal tower: A e^i after stage i.

        Examples
        --------
        >>> CandiConfig.chosen({}, size="paper").signal_channels(35)
        (70, 105, 315, 945)
        """
        later = (n_assays * self.expansion**i for i in range(1, self.n_stages + 1))
        return (n_assays * self.n_input_channels, *later)

    def decoder_channels(self, n_assays: int) -> tuple[int, ...]:
        """Return the channels before the first and after each stage of a decoder.

        Examples
        --------
        >>> CandiConfig.chosen({}, size="paper").decoder_channels(35)
        (945, 315, 105, 35)
        """
        return tuple(n_assays * max(self.expansion**i, self.n_features) for i in range(self.n_stages, -1, -1))

    def dna_channels(self, n_assays: int) -> tuple[int, ...]:
        """Return the channels of the DNA tower: n + 2 geometric steps from 4 to the width, rounded.

        Examples
        --------
        >>> CandiConfig.chosen({}, size="paper").dna_channels(35)
        (4, 12, 36, 106, 317, 945)
        """
        n_steps = self.n_stages + 2
        width = self.width(n_assays)
        return tuple(round(4 * (width / 4) ** (i / n_steps)) for i in range(n_steps + 1))

    @property
    def dna_pools(self) -> tuple[int, ...]:
        """Positions that each stage of the DNA tower merges: n times 2, then the two most even factors of R."""
        small = max(n for n in range(1, int(self.bin_size_bp**0.5) + 1) if self.bin_size_bp % n == 0)
        return (2,) * self.n_stages + (small, self.bin_size_bp // small)

    def training_defaults(self, n_obs: int) -> dict[str, Any]:  # noqa: ARG002
        """Return the defaults of the training: AdamW, warm-up over 5 % of the steps, then a cosine.

        Examples
        --------
        >>> CandiConfig().training_defaults(100)["lr"]
        0.0003
        """
        return TRANSFORMER_TRAINING | {
            "lr": 3e-4,
            "batch_size": 32,
            "max_epochs": 20,
        }
