"""What a training is asked for beside :class:`~epivi.train.config.TrainingConfig`, checked before anything starts."""

from __future__ import annotations

import inspect
import os
import warnings
from dataclasses import fields
from typing import TYPE_CHECKING, Any, ClassVar, Self

import lightning.pytorch as pl
from lightning.fabric.utilities.exceptions import MisconfigurationException
from scvi.model._utils import parse_device_args
from scvi.train import Trainer

from epivi import _validate
from epivi._errors import ConfigError, nearest
from epivi.train._atomic import check_folder

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    import torch

# what the trainer would take and what a resumable training decides itself: the length and the order of its epochs
OWN = (
    "fast_dev_run",
    "limit_train_batches",
    "overfit_batches",
    "reload_dataloaders_every_n_epochs",
    "use_distributed_sampler",
    "val_check_interval",
)
# parts of the names of strategies that copy this process, and of the ways in which they do
FORKING = ("spawn", "fork", "notebook")
# what changes the weights, so that a resumed run must be given the same
DECISIVE = ("precision", "accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm")


# how the transformers train unless they say otherwise: AdamW, warm-up over 5 % of the steps, then a cosine
TRANSFORMER_TRAINING: dict[str, Any] = {
    "optimizer": "AdamW",
    "lr_schedule": "cosine",
    "lr_warmup_share": 0.05,
    "gradient_clip_norm": 1.0,
    "weight_decay": 0.01,
    "n_epochs_warmup_reconstruction": 0,
    "n_epochs_kl_cycle": 0,
    "early_stopping_monitor": "validation_loss",
}


class SizedConfig:
    """Choices of a model that comes in named sizes; a base of frozen dataclasses.

    Attributes
    ----------
    MODEL
        Name of the model, for messages.
    SIZES
        Choices of each size.
    """

    MODEL: ClassVar[str]
    SIZES: ClassVar[Mapping[str, Mapping[str, Any]]]

    @classmethod
    def chosen(cls, arguments: Mapping[str, Any], *, size: str = "tutorial") -> Self:
        """Return a named size with some choices made differently.

        Parameters
        ----------
        arguments
            Choices by name; ``None`` leaves a choice to the size.
        size
            One of the sizes of the model.

        Raises
        ------
        ConfigError
            If the size or a choice is unknown; the nearest name is given.
        """
        _validate.check_choice(size, "size", cls.SIZES)
        names = [entry.name for entry in fields(cls)]  # type: ignore[arg-type]
        for name in arguments:
            if name not in names:
                message = f"{cls.MODEL} has no choice '{name}'. {nearest(name, names)}"
                raise ConfigError(message)
        return cls(**dict(cls.SIZES[size]) | {name: value for name, value in arguments.items() if value is not None})

    def summary(self) -> dict[str, Any]:
        """Return the choices as a dict of plain values."""
        return {entry.name: getattr(self, entry.name) for entry in fields(self)}  # type: ignore[arg-type]


def check_run_arguments(
    run_dir: Path | str | None,
    save_every_n_steps: int | None,
    num_workers: int,
    trainer_kwargs: Mapping[str, Any],
    known: Iterable[str],
) -> None:
    """Check where a run is kept and the names of the trainer's arguments.

    Parameters
    ----------
    run_dir, save_every_n_steps, num_workers, trainer_kwargs
        As in :meth:`epivi.models.base.EpiModel.train`.
    known
        Names of the arguments of ``train``, among which the nearest to an unknown one is sought too.

    Raises
    ------
    ConfigError
        If a value cannot be used, an argument is unknown or one that the training decides itself, or a strategy would
        train copies of the model.

    Examples
    --------
    >>> check_run_arguments(None, 10, 0, {"precision": "bf16-mixed"}, ())
    """
    if run_dir is not None:
        if not isinstance(run_dir, str | os.PathLike):
            message = f"run_dir={run_dir!r} ({type(run_dir).__name__}) is not valid: the path of a folder is needed."
            raise ConfigError(message)
        check_folder(run_dir, "run_dir")
    if save_every_n_steps is not None:
        _validate.check_number(save_every_n_steps, "save_every_n_steps", low=1, integer=True)
    _validate.check_number(num_workers, "num_workers", low=0, integer=True)
    parameters = {*inspect.signature(Trainer).parameters, *inspect.signature(pl.Trainer).parameters}
    taken = parameters - {*OWN, "self", "kwargs"}
    _check_strategy(trainer_kwargs.get("strategy"))
    for name in trainer_kwargs:
        if name in OWN:
            message = (
                f"The training argument '{name}' is not valid: epochs are whole passes over the training cells in an "
                "order of their own. Leave it out; train_size= and max_epochs= make a training shorter."
            )
            raise ConfigError(message)
        if name not in taken:
            message = f"Unknown training argument '{name}'. {nearest(name, sorted({*known, *taken} - {'self'}))}"
            raise ConfigError(message)


def _check_strategy(strategy: Any) -> None:
    """Refuse strategies whose processes are copies of this one: what they train does not come back to its model."""
    start = strategy if isinstance(strategy, str) else getattr(strategy, "_start_method", None)
    if isinstance(start, str) and any(word in start for word in FORKING):
        message = (
            f"strategy={strategy if isinstance(strategy, str) else type(strategy).__name__!r} cannot be used: it "
            f"starts its processes by '{start}', and the weights that these train are lost with them. Run the script "
            "(or 'epivi fit') under torchrun with strategy='ddp_find_unused_parameters_true'."
        )
        raise ConfigError(message)


def parse_devices(accelerator: str, devices: int | list[int] | str) -> tuple[str, Any, torch.device]:
    """Return accelerator and devices for the trainer, and the device of a model after its training.

    Raises
    ------
    ConfigError
        If there is no such accelerator or device here.

    Examples
    --------
    >>> parse_devices("cpu", "auto")[2]
    device(type='cpu')
    """
    try:
        return parse_device_args(accelerator, devices, return_device="torch")
    except (MisconfigurationException, ValueError, TypeError, RuntimeError) as error:
        message = f"accelerator={accelerator!r}, devices={devices!r} cannot be used: {error}"
        raise ConfigError(message) from error


def make_trainer(world_size: int, **kwargs: Any) -> Trainer:
    """Return a trainer of scvi-tools that writes nothing and runs on as many processes as the samplers count.

    Parameters
    ----------
    world_size
        Processes of the run.
    kwargs
        Arguments of :class:`scvi.train.Trainer`.

    Raises
    ------
    ConfigError
        If the trainer refuses its arguments, or would run on another number of processes.
    """
    try:
        with warnings.catch_warnings():
            # scvi-tools says that it turns its early stopping off; that of epivi goes on
            warnings.filterwarnings("ignore", message="early_stopping was automatically disabled")
            # the logger of scvi-tools would write a pickle to the working directory; the plan keeps the history
            trainer = Trainer(**({"logger": False} | kwargs))
    except (MisconfigurationException, ValueError, TypeError, RuntimeError) as error:
        message = f"The trainer refuses its arguments: {error}"
        raise ConfigError(message) from error
    if trainer.world_size != world_size:
        message = (
            f"devices={kwargs.get('devices')!r} asks for {trainer.world_size} processes without a strategy for them. "
            "Add strategy='ddp_find_unused_parameters_true', or train on one device."
        )
        raise ConfigError(message)
    return trainer
