"""How a model is trained: loaders, trainer, interruption, failure, resume."""

from __future__ import annotations

import logging
import signal
import threading
import warnings
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import lightning.pytorch as pl
import pandas as pd
import torch
from torch.utils.data import DataLoader

from epivi._errors import ConfigError, TrainingError
from epivi.models.base_arguments import DECISIVE, make_trainer, parse_devices
from epivi.train.keeping import RunState, WeightKeeper, copy_weights
from epivi.train.plan import NotFiniteLossError, TrainingPlan
from epivi.train.schedules import Annealing, LearningRate
from epivi.train.tuning import embeddings_to_score

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    import numpy as np
    from scvi.train import Trainer

    from epivi.models.base import EpiModel
    from epivi.train.config import TrainingConfig

logger = logging.getLogger(__name__)

# what begins the names of metrics that tell of a KL term
ELBO_METRICS = ("elbo_", "kl_local_", "kl_weight")


class TrainingData(NamedTuple):
    """What a model trains on.

    Attributes
    ----------
    dataset
        Gives the batch of what a sampler yields.
    make_sampler
        Builds the sampler of the training minibatches from (rank, world size).
    validation
        What the validation minibatches hold, in a fixed order, at least one for each process; empty without validation.
    splits
        Rows of the observations for training, validation and test.
    """

    dataset: torch.utils.data.Dataset
    make_sampler: Callable[[int, int], Any]
    validation: list[Any]
    splits: dict[str, np.ndarray]


class Loaders(pl.LightningDataModule):
    """Loaders of training and validation minibatches whose order depends on (seed, epoch) alone.

    Parameters
    ----------
    data
        What the model trains on.
    num_workers
        Processes that read batches.
    """

    def __init__(self, data: TrainingData, *, num_workers: int = 0) -> None:
        super().__init__()
        self.data = data
        self.num_workers = num_workers
        self.plan: TrainingPlan | None = None
        self.start_epoch = 0

    def _loader(self, sampler: Any) -> DataLoader:
        generator = torch.Generator().manual_seed(0)
        return DataLoader(
            self.data.dataset, sampler=sampler, batch_size=None, num_workers=self.num_workers, generator=generator
        )

    def train_dataloader(self) -> DataLoader:
        """Return the training loader, from the minibatch on where an interrupted run stopped."""
        sampler = self.data.make_sampler(self.trainer.global_rank, self.trainer.world_size)
        if self.plan is not None:
            sampler.start = self.start_epoch
            sampler.first_batch = self.plan.batch_in_epoch
        return self._loader(sampler)

    def val_dataloader(self) -> DataLoader | list:
        """Return the validation loader, in a fixed order, split over the processes."""
        return self._loader(self.data.validation[self.trainer.global_rank :: self.trainer.world_size])


def run_training(
    model: EpiModel,
    config: TrainingConfig,
    *,
    accelerator: str = "auto",
    devices: int | list[int] | str = "auto",
    run_dir: Path | str | None = None,
    save_every_n_steps: int | None = None,
    num_workers: int = 0,
    **trainer_kwargs: Any,
) -> None:
    """Train a model, or go on with the unfinished run in ``run_dir``.

    Parameters
    ----------
    model
        The model; its module, history and splits are set.
    config
        Arguments of the training.
    accelerator, devices
        As in :class:`lightning.pytorch.Trainer`.
    run_dir
        Folder in which the state of the run is kept, so that it can be resumed exactly.
    save_every_n_steps
        Save inside epochs too.
    num_workers
        Processes that read batches.
    trainer_kwargs
        Further arguments of :class:`scvi.train.Trainer`.

    Raises
    ------
    TrainingError
        If the loss is not finite; the last good weights are restored and the cells named.
    CheckpointError
        If the unfinished run in ``run_dir`` does not fit.
    """
    accelerator, lightning_devices, device = parse_devices(accelerator, devices)
    trainer_kwargs = {"enable_progress_bar": True, "use_distributed_sampler": False} | trainer_kwargs
    world_size = _world_size(lightning_devices, trainer_kwargs)
    data = model.training_data(config, world_size)
    if data.validation:
        trainer_kwargs.setdefault("check_val_every_n_epoch", 1)
    if config.gradient_clip_norm:
        trainer_kwargs.setdefault("gradient_clip_val", config.gradient_clip_norm)
    loaders = Loaders(data, num_workers=num_workers)
    steps = data.make_sampler(0, world_size).n_batches
    annealing = Annealing(
        steps_per_epoch=steps,
        max_epochs=config.max_epochs,
        n_epochs_warmup=config.n_epochs_warmup_reconstruction,
        n_epochs_cycle=config.n_epochs_kl_cycle,
        ratio=config.kl_cycle_ratio,
    )
    annealing.warn_if_it_ends_low()
    learning_rate = LearningRate(
        lr=config.lr,
        steps_per_epoch=steps,
        max_epochs=config.max_epochs,
        schedule=config.lr_schedule,
        gamma=config.lr_gamma,
        warmup_share=config.lr_warmup_share,
    )
    optimiser = {key: getattr(config, key) for key in ("optimizer", "weight_decay", "eps", "step_in_backward", "seed")}
    plan = TrainingPlan(model.module, annealing=annealing, learning_rate=learning_rate, **optimiser)
    patience = config.early_stopping_patience if config.early_stopping and data.validation else None
    plan.keeper = WeightKeeper(
        config.early_stopping_monitor,
        patience=patience,
        min_delta=config.early_stopping_min_delta,
        on_disk=config.step_in_backward,
    )
    plan.embed = partial(embeddings_to_score, model, plan, restore_best=config.early_stopping)
    loaders.plan = plan
    if run_dir is not None:
        fingerprint = model.fingerprint(config) | {"processes": world_size}
        fingerprint |= {key: trainer_kwargs[key] for key in DECISIVE if trainer_kwargs.get(key) is not None}
        plan.run_state = RunState(run_dir, fingerprint, every_n_steps=save_every_n_steps)
        if plan.run_state.resume(plan):
            logger.info("Resuming the run in %s at epoch %d, step %d.", run_dir, plan.epoch, plan.step)
    loaders.start_epoch = plan.epoch
    model.train_indices, model.validation_indices, model.test_indices = data.splits.values()
    if plan.batch_in_epoch:
        # the first epoch is shorter: the loader is asked for anew after it
        trainer_kwargs["reload_dataloaders_every_n_epochs"] = 1
    if plan.epoch < config.max_epochs and not plan.keeper.is_exhausted:
        trainer = make_trainer(
            world_size,
            max_epochs=config.max_epochs - plan.epoch,
            accelerator=accelerator,
            devices=lightning_devices,
            **trainer_kwargs,
        )
        model.trainer = trainer
        _fit(model, plan, trainer, loaders)
    _finish(model, plan, device, restore_best=config.early_stopping)


def _fit(model: EpiModel, plan: TrainingPlan, trainer: Trainer, loaders: Loaders) -> None:
    before = copy_weights(model.module, on_disk=plan.step_in_backward)
    model.module.train()
    try:
        with _graceful_interrupt(plan), _without_hints():
            trainer.fit(plan, datamodule=loaders)
    except NotFiniteLossError as error:
        where = _restore(model, plan, before)
        names = list(dict.fromkeys(str(name) for name in model.adata.obs_names[error.rows]))[:5]
        cells = f" The minibatch holds {len(error.rows)} cells, among them {names}." if names else ""
        message = (
            f"{error}{cells} Training stopped; {where}. "
            "Look at these cells, lower the learning rate (plan_kwargs={'lr': ...}) or filter extreme cells and peaks."
        )
        raise TrainingError(message) from error
    except torch.cuda.OutOfMemoryError as error:
        model.module.to("cpu")
        where = _restore(model, plan, before)
        batch_size = loaders.data.make_sampler(0, 1).batch_size
        message = (
            f"The GPU ran out of memory at batch_size={batch_size}. The model is intact, on the CPU; {where}. "
            f"Train with batch_size={max(batch_size // 2, 2)}."
        )
        raise TrainingError(message) from error
    except SystemExit as error:
        # the trainer answers a second Ctrl-C by leaving the process
        if isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from error
        raise
    finally:
        model.module.eval()


def _restore(model: EpiModel, plan: TrainingPlan, before: dict[str, torch.Tensor]) -> str:
    """Put back the weights of the last finished epoch, else those before the training; say which."""
    kept = plan.keeper.last_good if plan.keeper is not None else None
    model.module.load_state_dict(before if kept is None else kept)
    model.history_ = history(plan.records, has_elbo=getattr(model.module, "has_elbo", True))
    model.is_trained_ = model.is_trained_ or kept is not None
    if kept is None:
        return "no epoch was finished, the weights from before the training are restored"
    return f"the weights of epoch {plan.epoch - 1} are restored"


def _finish(model: EpiModel, plan: TrainingPlan, device: torch.device, *, restore_best: bool) -> None:
    keeper = plan.keeper
    if keeper is not None and keeper.best_weights is not None and (restore_best or plan.is_stop_requested):
        model.module.load_state_dict(keeper.best_weights)
        logger.info(
            "Kept the weights of epoch %d, the best by %s (%.5g).", keeper.best_epoch, keeper.monitor, keeper.best
        )
    if plan.is_stop_requested:
        logger.warning("Training was interrupted at epoch %d, step %d.", plan.epoch, plan.step)
    model.history_ = history(plan.records, has_elbo=getattr(model.module, "has_elbo", True))
    model.module.eval()
    model.is_trained_ = True
    model.is_interrupted_ = plan.is_stop_requested
    model.to_device(device)


def history(records: list[dict[str, float]], *, has_elbo: bool = True) -> dict[str, pd.DataFrame]:
    """Return one table a metric, indexed by epoch, as scvi-tools does.

    Parameters
    ----------
    records
        Metrics of each epoch.
    has_elbo
        Whether the model has a KL term; what tells of one is left out if not.

    Examples
    --------
    >>> history([{"epoch": 0.0, "train_loss": 2.0}])["train_loss"].to_numpy().tolist()
    [[2.0]]
    """
    keys = dict.fromkeys(key for record in records for key in record if key != "epoch")
    if not has_elbo:
        keys = dict.fromkeys(key for key in keys if not key.startswith(ELBO_METRICS))
    epochs = [int(record["epoch"]) for record in records]
    tables = {}
    for key in keys:
        values = pd.Series([record.get(key) for record in records], index=pd.Index(epochs, name="epoch"), name=key)
        tables[key] = values.astype("float64").dropna().to_frame()
    return tables


@contextmanager
def _graceful_interrupt(plan: TrainingPlan) -> Iterator[None]:
    """Let the first Ctrl-C end the training after the current step; the second one interrupts at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.getsignal(signal.SIGINT)

    def stop(signum: int, frame: Any) -> None:
        if plan.is_stop_requested and callable(previous):
            previous(signum, frame)
        plan.is_stop_requested = True

    signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


@contextmanager
def _without_hints() -> Iterator[None]:
    """Hide Lightning's hints on loaders and logging, which do not apply here, and a deprecation it uses itself."""
    from lightning.fabric.utilities.warnings import PossibleUserWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", category=PossibleUserWarning)
        warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
        yield


def cut_rows(indices: np.ndarray, batch_size: int, world_size: int) -> list[np.ndarray]:
    """Cut what is validated on, rows of an array, into minibatches, at least one for each process.

    Raises
    ------
    ConfigError
        If there are fewer rows than processes.

    Examples
    --------
    >>> import numpy as np
    >>> [part.tolist() for part in cut_rows(np.arange(3), 2, 1)]
    [[0, 1], [2]]
    """
    n = len(indices)
    if not n:
        return []
    if n < world_size:
        message = (
            f"{n} validation samples are too few for {world_size} processes. "
            "Lower train_size, or train without validation: validation_size=0."
        )
        raise ConfigError(message)
    size = min(batch_size, n // world_size)
    return [indices[start : start + size] for start in range(0, n, size)]


def _world_size(devices: int | list[int] | str, trainer_kwargs: dict[str, Any]) -> int:
    """Processes of the run: more than one only under a distributed strategy."""
    strategy = trainer_kwargs.get("strategy")
    if strategy is None or strategy == "auto":
        return 1
    n_devices = devices if isinstance(devices, int) else len(devices) if isinstance(devices, list) else 1
    return n_devices * trainer_kwargs.get("num_nodes", 1)
