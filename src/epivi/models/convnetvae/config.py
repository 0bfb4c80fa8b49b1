"""The configurations of ConvNet-VAE and FC-VAE: every choice that shapes the network or the loss, checked once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from epivi import _validate
from epivi._errors import ConfigError
from epivi.data.tracks.grids import BOUNDARIES

if TYPE_CHECKING:
    from collections.abc import Mapping

LIKELIHOODS = ("poisson", "nb")
FILTERS = (32, 64, 128)
MODALITY_DROPOUT = 0.3


@dataclass(frozen=True, kw_only=True)
class TracksConfig:
    """Choices that ConvNet-VAE and FC-VAE share; see :class:`epivi.ConvNetVAE` for their meaning.

    Raises
    ------
    ConfigError
        If a value is outside its range or not among the choices; the message names the argument.
    """

    n_latent: int = 30
    n_hidden: int = 128
    n_layers: int = 1
    dropout_rate: float = 0.2
    likelihood: str = "poisson"
    kl_scale: float = 1.0
    modality_dropout_rate: float = 0.0
    batch_norm_momentum: float = 0.1
    batch_norm_eps: float = 1e-5

    @classmethod
    def chosen(cls, arguments: Mapping[str, Any], *, is_missing: bool) -> Any:
        """Return the configuration of a constructor's arguments, open choices filled by what suits the data.

        Parameters
        ----------
        arguments
            Choices by name; ``None`` leaves a choice open.
        is_missing
            Whether some cell lacks a modality.

        Examples
        --------
        >>> FcvaeConfig.chosen({"n_latent": 10, "modality_dropout_rate": None}, is_missing=True).modality_dropout_rate
        0.3
        """
        filled = {key: value for key, value in arguments.items() if value is not None}
        defaults = {"modality_dropout_rate": MODALITY_DROPOUT} if is_missing else {}
        return cls(**defaults | filled)

    def training_defaults(self, n_obs: int) -> dict[str, Any]:  # noqa: ARG002
        """Return the defaults of the training: those of the paper, stopped early on the validation ELBO."""
        return {
            "max_epochs": 300,
            "batch_size": 128,
            "lr": 1e-3,
            "lr_gamma": 1.0,
            "weight_decay": 0.0,
            "n_epochs_warmup_reconstruction": 0,
            "n_epochs_kl_cycle": 0,
            "early_stopping_monitor": "validation_loss",
        }

    def __post_init__(self) -> None:
        for name in ("n_latent", "n_hidden"):
            _validate.check_number(getattr(self, name), name, low=1, integer=True)
        _validate.check_number(self.n_layers, "n_layers", low=1, high=3, integer=True)
        for name in ("dropout_rate", "modality_dropout_rate"):
            _validate.check_number(getattr(self, name), name, low=0.0, high=1.0, high_inclusive=False)
        _validate.check_choice(self.likelihood, "likelihood", LIKELIHOODS)
        _validate.check_number(self.kl_scale, "kl_scale", low=0.0)
        _validate.check_number(self.batch_norm_momentum, "batch_norm_momentum", low=0.0, high=1.0, low_inclusive=False)
        _validate.check_number(self.batch_norm_eps, "batch_norm_eps", low=0.0, low_inclusive=False)

    @property
    def norm_options(self) -> dict[str, float]:
        """Dropout and batch normalisation of the layers."""
        return {
            "dropout_rate": self.dropout_rate,
            "momentum": self.batch_norm_momentum,
            "eps": self.batch_norm_eps,
        }

    def summary(self) -> dict[str, Any]:
        """Return the choices as a dict of plain values."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


@dataclass(frozen=True, kw_only=True)
class FcvaeConfig(TracksConfig):
    """Choices of an FC-VAE; see :class:`epivi.FCVAE` for their meaning.

    Examples
    --------
    >>> FcvaeConfig().n_latent
    30
    """


@dataclass(frozen=True, kw_only=True)
class ConvNetVaeConfig(TracksConfig):
    """Choices of a ConvNet-VAE; see :class:`epivi.ConvNetVAE` for their meaning.

    Raises
    ------
    ConfigError
        If a value is outside its range, or the kernel is smaller than the stride.

    Examples
    --------
    >>> ConvNetVaeConfig(n_layers=2, kernel_size=11, stride=3).filters
    (32, 64)
    """

    kernel_size: int = 31
    stride: int = 31
    n_filters: tuple[int, ...] | None = None
    boundaries: str = "auto"
    mask_channels: bool = False

    @classmethod
    def chosen(cls, arguments: Mapping[str, Any], *, is_missing: bool) -> Any:
        """As in :class:`TracksConfig`; channels that tell which modalities were measured come with missing ones.

        Raises
        ------
        ConfigError
            If modalities are hidden in training and ``mask_channels`` is false.
        """
        config = super().chosen(arguments, is_missing=is_missing)
        if arguments.get("mask_channels") is None:
            return cls(**config.summary() | {"mask_channels": is_missing or config.modality_dropout_rate > 0})
        if not config.mask_channels and config.modality_dropout_rate > 0:
            message = (
                "mask_channels=False, but modalities are missing or modality_dropout_rate is above 0: the network "
                "could not tell an absent modality from one without counts. Leave mask_channels open."
            )
            raise ConfigError(message)
        return config

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("kernel_size", "stride"):
            _validate.check_number(getattr(self, name), name, low=1, integer=True)
        if self.kernel_size < self.stride:
            message = (
                f"kernel_size ({self.kernel_size}) is smaller than stride ({self.stride}): bins would be skipped. "
                "Raise kernel_size or lower stride."
            )
            raise ConfigError(message)
        _validate.check_choice(self.boundaries, "boundaries", ("auto", *BOUNDARIES))
        _validate.check_choice(self.mask_channels, "mask_channels", (True, False))
        if self.n_filters is not None:
            if not isinstance(self.n_filters, tuple | list) or len(self.n_filters) != self.n_layers:
                message = (
                    f"n_filters must be {self.n_layers} numbers, one a layer, as in {FILTERS[: self.n_layers]}, found "
                    f"{self.n_filters!r}."
                )
                raise ConfigError(message)
            for number in self.n_filters:
                _validate.check_number(number, "n_filters", low=1, integer=True)

    @property
    def filters(self) -> tuple[int, ...]:
        """Channels after each convolution: as given, or 32, 64, 128."""
        return FILTERS[: self.n_layers] if self.n_filters is None else tuple(int(n) for n in self.n_filters)
