"""The arguments of a training, merged from defaults and the user's choices and checked before anything starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from epivi import _validate
from epivi._errors import ConfigError, nearest

LR_SCHEDULES = ("exponential", "cosine")
MONITORS = ("reconstruction_loss_validation", "elbo_validation", "validation_loss")


def check_shares(train_size: float, validation_size: float | None) -> None:
    """Check the shares of cells to train on and to validate on; ``None`` stands for all that are not in training.

    Raises
    ------
    ConfigError
        If a share is outside its range, or their sum exceeds one.

    Examples
    --------
    >>> check_shares(0.8, 0.1)
    """
    _validate.check_number(train_size, "train_size", low=0.0, high=1.0, low_inclusive=False)
    if validation_size is None:
        return
    _validate.check_number(validation_size, "validation_size", low=0.0, high=1.0, high_inclusive=False)
    if train_size + validation_size > 1.0 + 1e-9:
        message = f"train_size ({train_size}) + validation_size ({validation_size}) exceed 1: lower one of them."
        raise ConfigError(message)


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Arguments of a training.

    Parameters
    ----------
    max_epochs
        Passes over the training cells.
    batch_size
        Cells of a minibatch, on each process.
    train_size, validation_size
        Shares of cells; validation defaults to all that is not in training.
    early_stopping, early_stopping_patience, early_stopping_monitor, early_stopping_min_delta
        Stop after so many epochs (at full KL weight) without a lower value of the monitor.
    optimizer, lr, weight_decay, eps
        Optimiser.
    lr_schedule, lr_gamma, lr_warmup_share
        The learning rate is multiplied by ``lr_gamma`` each epoch (``"exponential"``), or rises in proportion to the
        step for this share of all steps and falls as a half cosine to zero (``"cosine"``).
    gradient_clip_norm
        Largest norm of the gradient; 0 means no limit.
    step_in_backward
        Update each weight as soon as its gradient is known and let go of the gradient: bitwise the same weights in less
        memory. It cannot be had with gradient clipping, accumulated gradients, several processes or mixed precision.
    n_epochs_warmup_reconstruction, n_epochs_kl_cycle, kl_cycle_ratio
        Warm-up without KL terms, then cyclical annealing.
    seed
        Seed of split, order of minibatches and noise.

    Raises
    ------
    ConfigError
        If a value is outside its range.
    """

    max_epochs: int = 400
    batch_size: int = 128
    train_size: float = 0.9
    validation_size: float | None = None
    early_stopping: bool = True
    early_stopping_patience: int = 50
    early_stopping_monitor: str = "reconstruction_loss_validation"
    early_stopping_min_delta: float = 0.0
    optimizer: str = "Adam"
    lr: float = 1e-3
    weight_decay: float = 1e-6
    eps: float = 1e-8
    lr_gamma: float = 0.995
    lr_schedule: str = "exponential"
    lr_warmup_share: float = 0.0
    gradient_clip_norm: float = 0.0
    step_in_backward: bool = False
    n_epochs_warmup_reconstruction: int = 10
    n_epochs_kl_cycle: int = 100
    kl_cycle_ratio: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        check = _validate.check_number
        check_shares(self.train_size, self.validation_size)
        _validate.check_choice(self.early_stopping, "early_stopping", (True, False))
        check(self.max_epochs, "max_epochs", low=1, integer=True)
        check(self.batch_size, "batch_size", low=2, integer=True)
        check(self.early_stopping_patience, "early_stopping_patience", low=1, integer=True)
        check(self.early_stopping_min_delta, "early_stopping_min_delta", low=0.0)
        check(self.lr, "lr", low=0.0, low_inclusive=False)
        check(self.weight_decay, "weight_decay", low=0.0)
        check(self.eps, "eps", low=0.0, low_inclusive=False)
        check(self.lr_gamma, "lr_gamma", low=0.0, high=1.0, low_inclusive=False)
        _validate.check_choice(self.lr_schedule, "lr_schedule", LR_SCHEDULES)
        check(self.lr_warmup_share, "lr_warmup_share", low=0.0, high=1.0, high_inclusive=False)
        check(self.gradient_clip_norm, "gradient_clip_norm", low=0.0)
        _validate.check_choice(self.step_in_backward, "step_in_backward", (True, False))
        check(self.n_epochs_warmup_reconstruction, "n_epochs_warmup_reconstruction", low=0, integer=True)
        check(self.n_epochs_kl_cycle, "n_epochs_kl_cycle", low=0, integer=True)
        check(self.kl_cycle_ratio, "kl_cycle_ratio", low=0.0, high=1.0)
        check(self.seed, "seed", low=0, integer=True)
        _validate.check_choice(self.optimizer, "optimizer", ("Adam", "AdamW"))
        _validate.check_choice(self.early_stopping_monitor, "early_stopping_monitor", MONITORS)

    @classmethod
    def merged(cls, *sources: Mapping[str, Any] | None) -> TrainingConfig:
        """Merge sources of arguments, later ones winning; ``None`` values do not count.

        Raises
        ------
        ConfigError
            If a source is no mapping, or holds an unknown argument; the nearest valid name is given.

        Examples
        --------
        >>> TrainingConfig.merged({"lr": 0.1}, {"lr": 0.2, "batch_size": None}).lr
        0.2
        """
        names = [entry.name for entry in fields(cls)]
        chosen: dict[str, Any] = {}
        for source in sources:
            if not isinstance(source, Mapping | None):
                message = f"Training arguments must be a dict, found {source!r} ({type(source).__name__})."
                raise ConfigError(message)
            for key, value in (source or {}).items():
                if key not in names:
                    message = f"Unknown training argument '{key}'. {nearest(key, names)}"
                    raise ConfigError(message)
                if value is not None:
                    chosen[key] = value
        return cls(**chosen)
