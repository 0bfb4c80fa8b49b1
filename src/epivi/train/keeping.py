"""What is kept while a model trains: the best weights, the last good ones, and a state to resume from."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch

from epivi._errors import CheckpointError
from epivi.train.checkpoint import flatten_state, is_checkpoint, read_checkpoint, unflatten_state, write_checkpoint
from epivi.train.weights import is_better, weights_are_finite

if TYPE_CHECKING:
    from torch import nn

KIND = "run"
ALIGNMENT = 64


class Run(Protocol):
    """What is read of a training run, and restored into it: what :class:`epivi.train.plan.TrainingPlan` offers."""

    module: Any
    step: int
    batch_in_epoch: int
    keeper: WeightKeeper | None

    @property
    def optimizer(self) -> Any:
        """The optimiser as Lightning wraps it."""

    @property
    def global_rank(self) -> int:
        """Number of this process."""

    def state(self) -> dict[str, Any]:
        """Return counters, metrics and sums."""

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state` returned."""


def copy_weights(module: nn.Module, *, on_disk: bool = False) -> dict[str, torch.Tensor]:
    """Return a copy of the module's state, on the CPU.

    Parameters
    ----------
    module
        The module.
    on_disk
        Keep the copy in a temporary file without a name, from which the tensors are read when they are needed.

    Examples
    --------
    >>> copy_weights(torch.nn.Linear(1, 1), on_disk=True)["bias"].shape
    torch.Size([1])
    """
    state = {key: value.detach() for key, value in module.state_dict().items()}
    if not on_disk:
        return {key: value.to("cpu", copy=True) for key, value in state.items()}
    starts: dict[str, int] = {}
    with tempfile.TemporaryFile() as file:
        for key, value in state.items():
            starts[key] = file.tell()
            file.write(value.to("cpu").reshape(-1).view(torch.uint8).numpy().data)
            file.write(bytes(-file.tell() % ALIGNMENT))
        file.write(bytes(ALIGNMENT))  # a file without a byte cannot be mapped
        file.flush()
        stored = torch.from_numpy(np.memmap(file, dtype=np.uint8, mode="c"))
    return {
        key: stored[start : start + state[key].nbytes].view(state[key].dtype).view(state[key].shape)
        for key, start in starts.items()
    }


class WeightKeeper:
    """Keeps the best weights by a validation metric, and those of the last epoch that was finite.

    Only epochs at full KL weight count: within a cycle of annealing the metric is not comparable, and the latent of
    earlier epochs is under-regularised.

    Parameters
    ----------
    monitor
        Metric to minimise, a key of the epoch's record.
    patience
        Epochs without improvement, counted at full KL weight, after which training stops; ``None`` never stops.
    min_delta
        Least change that counts.
    on_disk
        Keep the weights in temporary files.
    """

    def __init__(self, monitor: str, *, patience: int | None, min_delta: float = 0.0, on_disk: bool = False) -> None:
        self.on_disk = on_disk
        self.monitor = monitor
        self.patience = patience
        self.min_delta = min_delta
        self.best = math.inf
        self.best_epoch = -1
        self.waited = 0
        self.best_weights: dict[str, torch.Tensor] | None = None
        self.last_good: dict[str, torch.Tensor] | None = None

    def update(self, module: nn.Module, record: dict[str, float]) -> bool:
        """Take note of an epoch; returns whether training should stop."""
        self.last_good = copy_weights(module, on_disk=self.on_disk)
        if record.get("kl_weight", 1.0) < 1.0 or self.monitor not in record:
            return False
        if is_better(record[self.monitor], self.best, self.min_delta):
            self.best, self.best_epoch, self.waited = record[self.monitor], int(record["epoch"]), 0
            self.best_weights = self.last_good
            return False
        self.waited += 1
        return self.is_exhausted

    @property
    def is_exhausted(self) -> bool:
        """Whether training should stop, or has stopped."""
        return self.patience is not None and self.waited >= self.patience

    def state(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        names = ("best", "best_epoch", "waited", "best_weights", "last_good")
        return {name: getattr(self, name) for name in names}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state` returned."""
        for name, value in state.items():
            setattr(self, name, value)


class RunState:
    """Saves a run so that it can be resumed exactly, at the end of epochs and inside them.

    Parameters
    ----------
    directory
        Folder of the run; the state lies in ``directory / "state"``.
    fingerprint
        What must agree between the interrupted run and this one: data, configuration, training arguments.
    every_n_steps
        Save after this many steps too; ``None`` saves at the end of epochs only.
    """

    def __init__(
        self,
        directory: Path | str,
        fingerprint: dict[str, Any],
        *,
        every_n_steps: int | None = None,
    ) -> None:
        self.path = Path(directory) / "state"
        self.fingerprint = fingerprint
        self.every_n_steps = every_n_steps
        self._optimizer_state: dict[str, Any] | None = None
        self._last_step = 0

    def save_if_due(self, plan: Run) -> None:
        """Save at the end of an epoch, or after ``every_n_steps`` steps; every process must call it."""
        is_epoch_end = plan.batch_in_epoch == 0
        is_step_due = self.every_n_steps is not None and plan.step - self._last_step >= self.every_n_steps
        if is_epoch_end or is_step_due:
            self.save(plan)

    def save(self, plan: Run) -> None:
        """Write weights, optimiser, counters, metrics and best weights; the old state stays until the new is whole.

        The first process writes for all. Weights that are not finite are not written: the next step stops the training.
        """
        counters = plan.state()
        self._last_step = plan.step
        if plan.global_rank > 0 or not weights_are_finite(plan.module):
            return
        state = {
            "module": plan.module.state_dict(),
            "optimizer": plan.optimizer.optimizer.state_dict(),
            "plan": counters,
            "keeper": plan.keeper.state() if plan.keeper is not None else None,
        }
        tensors, skeleton = flatten_state(state)
        metadata = {"fingerprint": self.fingerprint, "skeleton": skeleton}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_checkpoint(self.path, tensors=tensors, metadata=metadata, kind=KIND, overwrite=True)

    def resume(self, plan: Run) -> bool:
        """Restore an interrupted run into the plan, if there is one; returns whether there was.

        Raises
        ------
        CheckpointError
            If the saved run was made with other data, another configuration or other training arguments.
        """
        if not is_checkpoint(self.path):
            return False
        saved = read_checkpoint(self.path, kind=KIND)
        differing = sorted(
            key
            for key in self.fingerprint.keys() | saved.metadata["fingerprint"].keys()
            if self.fingerprint.get(key) != saved.metadata["fingerprint"].get(key)
        )
        if differing:
            shown = ", ".join(
                f"{key}: {saved.metadata['fingerprint'].get(key)!r} then, {self.fingerprint.get(key)!r} now"
                for key in differing[:5]
            )
            message = (
                f"The unfinished run in {self.path.parent} does not fit ({shown}). Train with the same data and "
                "arguments to resume it, or choose another folder to start anew."
            )
            raise CheckpointError(message)
        state = unflatten_state(saved.tensors, saved.metadata["skeleton"])
        plan.module.load_state_dict(state["module"])
        plan.load_state(state["plan"])
        if plan.keeper is not None and state["keeper"] is not None:
            plan.keeper.load_state(state["keeper"])
        self._optimizer_state = state["optimizer"]
        self._last_step = plan.step
        return True

    def restore_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Load the optimiser of the interrupted run, once."""
        if self._optimizer_state is not None:
            optimizer.load_state_dict(self._optimizer_state)
            self._optimizer_state = None
