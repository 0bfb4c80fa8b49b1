"""The configuration of SAILERX: that of SAILER and the alignment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from epivi import _validate
from epivi.models.sailer.config import SailerConfig

SAMPLERS = ("shuffle", "neighbors")
LINEAR_DEFAULTS = {"align_weight": 2000.0, "input_dropout_rate": 0.2, "n_latent": 50, "kl_scale": 1.0}


@dataclass(frozen=True, kw_only=True)
class SailerxConfig(SailerConfig):
    """Choices of a SAILERX network; see :class:`epivi.SAILERX` for their meaning.

    Raises
    ------
    ConfigError
        If a value is outside its range or not among the choices.

    Examples
    --------
    >>> SailerxConfig().n_latent
    50
    """

    n_latent: int = 50
    align_weight: float = 0.457
    min_reference_per_batch: int = 32
    sampler: str = "shuffle"
    fuse_reference: bool = False

    @staticmethod
    def encoder_defaults(encoder: str) -> dict[str, Any]:
        """Return the defaults of an encoder that differ from those of the class."""
        defaults = SailerConfig.encoder_defaults(encoder)
        return defaults | LINEAR_DEFAULTS if encoder == "linear" else defaults

    def training_defaults(self, n_obs: int) -> dict[str, Any]:
        """Return the defaults of a training on so many cells that suit the network."""
        more = {"max_epochs": 60} if self.encoder == "linear" else {}
        return super().training_defaults(n_obs) | {"batch_size": 200} | more

    def __post_init__(self) -> None:
        super().__post_init__()
        _validate.check_number(self.align_weight, "align_weight", low=0.0)
        _validate.check_number(self.min_reference_per_batch, "min_reference_per_batch", low=2, integer=True)
        _validate.check_choice(self.sampler, "sampler", SAMPLERS)
        _validate.check_choice(self.fuse_reference, "fuse_reference", (True, False))
