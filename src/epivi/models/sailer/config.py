"""The configuration of SAILER: every choice that shapes the network or the loss, checked once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from epivi import _validate
from epivi._errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

ENCODERS = ("chromosome", "dense", "linear")
PRESETS = ("epivi", "released_code")
BOUNDS = ("pairwise", "mixture", "none")
TRANSFORMS = ("binary", "tfidf")
LIKELIHOODS = ("bernoulli", "poisson")
KERNELS = ("auto", "float32", "plain")
OPEN_WEIGHT_CAP = 30.0
# a deep network holds 2 x 64 weights a peak; with fewer open entries a peak they cannot be fit
LINEAR_BELOW = 128.0
LINEAR_DEFAULTS = {
    "input_transform": "tfidf",
    "input_dropout_rate": 0.75,
    "open_weight": 1.0,
    "n_latent": 20,
    "kl_scale": 0.1,
}
# few cells: all of them train, until so many cells were shown, within limits of the number of epochs
LINEAR_TRAINING = {"lr": 3e-3, "train_size": 1.0, "early_stopping": False}
LINEAR_CELLS_SHOWN = 262_000
LINEAR_EPOCHS = (60, 250)
HIDDEN = {"chromosome": (64, 32), "dense": (1000, 100), "linear": (1000, 100)}


@dataclass(frozen=True, kw_only=True)
class SailerConfig:
    """Choices of a SAILER network; see :class:`epivi.SAILER` for their meaning.

    Raises
    ------
    ConfigError
        If a value is outside its range or not among the choices; the message names the argument.

    Examples
    --------
    >>> SailerConfig(encoder="dense").hidden
    (1000, 100)
    """

    encoder: str = "chromosome"
    n_latent: int = 10
    n_hidden: tuple[int, int] | None = None
    dropout_rate: float = 0.0
    input_transform: str = "binary"
    input_dropout_rate: float = 0.0
    likelihood: str = "bernoulli"
    open_weight: float | str = "auto"
    invariance_weight: float = 1.0
    kl_scale: float = 1.0
    information_bound: str = "pairwise"
    loss_preset: str = "epivi"
    batch_norm_momentum: float = 0.1
    batch_norm_eps: float = 1e-5
    use_covariates: bool = True
    kernels: str = "auto"

    @classmethod
    def chosen(cls, arguments: Mapping[str, Any], *, has_chromosomes: bool, open_per_peak: float) -> Self:
        """Return the configuration of a constructor's arguments, open choices filled by what suits data and encoder.

        Parameters
        ----------
        arguments
            Choices by name; ``None`` leaves a choice open.
        has_chromosomes
            Whether peaks carry chromosomes.
        open_per_peak
            Cells in which a peak is open, on average.

        Examples
        --------
        >>> SailerConfig.chosen({"encoder": "auto"}, has_chromosomes=True, open_per_peak=21.0).encoder
        'linear'
        """
        filled = {key: value for key, value in arguments.items() if value is not None}
        deep = "chromosome" if has_chromosomes else "dense"
        encoder = filled.get("encoder", deep)
        if encoder == "auto":
            encoder = "linear" if open_per_peak < LINEAR_BELOW else deep
        return cls(**cls.encoder_defaults(encoder) | filled | {"encoder": encoder})

    @staticmethod
    def encoder_defaults(encoder: str) -> dict[str, Any]:
        """Return the defaults of an encoder that differ from those of the class."""
        return dict(LINEAR_DEFAULTS) if encoder == "linear" else {}

    def training_defaults(self, n_obs: int) -> dict[str, Any]:
        """Return the defaults of a training on so many cells that suit the network.

        Examples
        --------
        >>> SailerConfig(encoder="linear").training_defaults(1_000)["max_epochs"]
        250
        """
        if self.encoder != "linear":
            return {}
        low, high = LINEAR_EPOCHS
        return LINEAR_TRAINING | {"max_epochs": min(max(LINEAR_CELLS_SHOWN // max(n_obs, 1), low), high)}

    def __post_init__(self) -> None:
        _validate.check_choice(self.encoder, "encoder", ENCODERS)
        _validate.check_choice(self.input_transform, "input_transform", TRANSFORMS)
        _validate.check_choice(self.information_bound, "information_bound", BOUNDS)
        _validate.check_choice(self.loss_preset, "loss_preset", PRESETS)
        _validate.check_choice(self.likelihood, "likelihood", LIKELIHOODS)
        _validate.check_choice(self.kernels, "kernels", KERNELS)
        _validate.check_number(self.n_latent, "n_latent", low=1, integer=True)
        for name in ("dropout_rate", "input_dropout_rate"):
            _validate.check_number(getattr(self, name), name, low=0.0, high=1.0, high_inclusive=False)
        _validate.check_number(self.invariance_weight, "invariance_weight", low=0.0)
        _validate.check_number(self.kl_scale, "kl_scale", low=0.0)
        _validate.check_number(self.batch_norm_momentum, "batch_norm_momentum", low=0.0, high=1.0, low_inclusive=False)
        _validate.check_number(self.batch_norm_eps, "batch_norm_eps", low=0.0, low_inclusive=False)
        if not isinstance(self.use_covariates, bool):
            message = f"use_covariates must be True or False, found {self.use_covariates!r}."
            raise ConfigError(message)
        if isinstance(self.open_weight, str):
            _validate.check_choice(self.open_weight, "open_weight", ("auto",))
        else:
            _validate.check_number(self.open_weight, "open_weight", low=0.0, low_inclusive=False)
        self._check_hidden()
        self._check_likelihood()

    def _check_likelihood(self) -> None:
        """Refuse weights of open entries where entries are counts."""
        if self.likelihood == "bernoulli":
            return
        if self.open_weight not in ("auto", 1.0) or self.loss_preset != "epivi":
            message = (
                f"likelihood='{self.likelihood}' models counts and has no weights of open entries: leave out "
                f"open_weight (found {self.open_weight!r}) and loss_preset (found '{self.loss_preset}')."
            )
            raise ConfigError(message)

    def _check_hidden(self) -> None:
        if self.n_hidden is None:
            return
        if not isinstance(self.n_hidden, tuple | list) or len(self.n_hidden) != 2:
            message = f"n_hidden must be two numbers of units, as in (1000, 100), found {self.n_hidden!r}."
            raise ConfigError(message)
        for units in self.n_hidden:
            _validate.check_number(units, "n_hidden", low=1, integer=True)

    @property
    def hidden(self) -> tuple[int, int]:
        """Hidden units: as given, or the defaults of the encoder."""
        if self.n_hidden is None:
            return HIDDEN[self.encoder]
        return int(self.n_hidden[0]), int(self.n_hidden[1])

    def resolve_open_weight(self, density: float) -> float:
        """Return omega: as given, or the ratio of closed to open entries, at most 30; 1 where entries are counts.

        Parameters
        ----------
        density
            Share of open entries in the data.

        Examples
        --------
        >>> SailerConfig().resolve_open_weight(0.2)
        4.0
        """
        if self.likelihood != "bernoulli":
            return 1.0
        if isinstance(self.open_weight, str):
            return min(max((1.0 - density) / density, 1.0), OPEN_WEIGHT_CAP)
        return float(self.open_weight)

    def summary(self) -> dict[str, Any]:
        """Return the choices as a dict of plain values."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}
