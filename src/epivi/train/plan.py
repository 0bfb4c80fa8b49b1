"""What happens in each step of any model: loss, optimiser, metrics, noise that depends on the step alone."""

from __future__ import annotations

import math
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch

from epivi._errors import ConfigError, TrainingError
from epivi._keys import BATCH_ROWS
from epivi.train.weights import weights_are_finite

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from scvi.module.base import BaseModuleClass, LossOutput
    from torch import Tensor

    from epivi.train.keeping import RunState, WeightKeeper
    from epivi.train.schedules import Annealing, LearningRate

_VALIDATION_STREAM = 1 << 40
# attribute of a parameter of which only some entries train, the gradients of the others being masked
IS_PARTLY_FROZEN = "is_partly_frozen"


class TrainingPlan(pl.LightningModule):
    """Trains a module of scvi-tools with annealed KL terms; a run can stop after any step and go on bitwise equally.

    Parameters
    ----------
    module
        A module whose ``inference`` takes ``deterministic`` and whose ``loss`` takes ``kl_weight``.
    annealing
        KL weight and deterministic warm-up, by step.
    optimizer
        ``"Adam"`` or ``"AdamW"``.
    learning_rate
        Learning rate of each step.
    weight_decay, eps
        Of the optimiser.
    step_in_backward
        Update each weight as soon as its gradient is known, and let go of the gradient.
    seed
        Seed of the noise: what is drawn in a step depends on (seed, step, process) alone.

    Notes
    -----
    Metrics are summed on the device in float64 and read once an epoch, so that logging costs no synchronisation.
    """

    def __init__(
        self,
        module: BaseModuleClass,
        *,
        annealing: Annealing,
        learning_rate: LearningRate,
        optimizer: str = "Adam",
        weight_decay: float = 1e-6,
        eps: float = 1e-8,
        step_in_backward: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.module = module
        self.annealing = annealing
        self.optimizer_name = optimizer
        self.learning_rate = learning_rate
        self.weight_decay, self.eps = weight_decay, eps
        self.step_in_backward = step_in_backward
        self._handles: list[Any] = []
        self.seed = seed
        self.epoch = 0
        self.step = 0
        self.batch_in_epoch = 0
        self.records: list[dict[str, float]] = []
        self.sums: dict[str, dict[str, Tensor]] = {"train": {}, "validation": {}}
        self.keeper: WeightKeeper | None = None
        self.run_state: RunState | None = None
        self.embed: Callable[[str], dict[str, Tensor]] | None = None
        self._embedded: dict[tuple[str, int], dict[str, Tensor]] = {}
        self.is_stop_requested = False
        self._last_rows: Tensor | None = None
        self._resumed_sums: list[dict[str, dict[str, float]]] = []

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimiser over the trainable parameters, with the state of an interrupted run if there is one."""
        kind = {"Adam": torch.optim.Adam, "AdamW": torch.optim.AdamW}[self.optimizer_name]
        parameters = [p for p in self.module.parameters() if p.requires_grad]
        # decay would move the frozen columns of a partly frozen weight, whose gradients are zero
        whole = [p for p in parameters if not getattr(p, IS_PARTLY_FROZEN, False)]
        partly = [p for p in parameters if getattr(p, IS_PARTLY_FROZEN, False)]
        groups: list[dict[str, Any]] = [{"params": whole}] if whole else []
        if partly:
            groups.append({"params": partly, "weight_decay": 0.0})
        optimizer = kind(
            groups,
            lr=self.learning_rate.at(self.step),
            weight_decay=self.weight_decay,
            eps=self.eps,
            fused=parameters[0].device.type != "mps" and not self._clips_scaled_gradients,
        )
        if self.run_state is not None:
            self.run_state.restore_optimizer(optimizer)
        if self.step_in_backward:
            self._check_step_in_backward()
            self._raw_optimizer = optimizer
        return optimizer

    def _check_step_in_backward(self) -> None:
        """Refuse what needs all gradients at once."""
        if self._trainer is None:
            return
        needs = {
            "gradient clipping": bool(self.trainer.gradient_clip_val),
            "accumulated gradients": self.trainer.accumulate_grad_batches > 1,
            "several processes": self.trainer.world_size > 1,
            "mixed precision": "mixed" in str(self.trainer.precision),
        }
        found = [name for name, is_needed in needs.items() if is_needed]
        if found:
            message = (
                f"step_in_backward=True cannot be had with {' and '.join(found)}: weights change before all gradients "
                "are known. Leave one of them out."
            )
            raise ConfigError(message)

    def _step_one(self, parameter: torch.nn.Parameter) -> None:
        """Update the one weight that has a gradient."""
        self._raw_optimizer.step()
        parameter.grad = None

    @property
    def _clips_scaled_gradients(self) -> bool:
        """Whether gradients are clipped in mixed precision, which Lightning refuses with a fused optimiser."""
        if self._trainer is None or not self.trainer.gradient_clip_val:
            return False
        return "mixed" in str(self.trainer.precision)

    def _forward(self, batch: dict[str, Tensor], *, kl_weight: float, deterministic: bool, stream: int) -> LossOutput:
        with _seeded(self.seed, stream, self.global_rank, self.device):
            return self.module(
                batch, inference_kwargs={"deterministic": deterministic}, loss_kwargs={"kl_weight": kl_weight}
            )[2]

    @property
    def optimizer(self) -> Any:
        """The one optimiser."""
        return self.optimizers()

    def on_train_batch_start(self, *args: Any) -> None:  # noqa: ARG002
        """Set the learning rate of the step."""
        if self.step_in_backward and not self._handles:
            trained = [p for group in self.optimizer.param_groups for p in group["params"]]
            self._handles = [p.register_post_accumulate_grad_hook(self._step_one) for p in trained]
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate.at(self.step)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:  # noqa: ARG002
        """Return the loss of a minibatch; a loss that is not finite stops the training."""
        kl_weight = self.annealing.kl_weight(self.step)
        output = self._forward(
            batch, kl_weight=kl_weight, deterministic=self.annealing.is_deterministic(self.step), stream=self.step
        )
        is_finite = bool(torch.isfinite(output.loss))
        if not is_finite:
            self.on_train_end()
        self._last_rows = batch.get(BATCH_ROWS)
        if self._is_anywhere(not is_finite):
            raise NotFiniteLossError(self.epoch, self.step, None if is_finite else self._last_rows)
        self._add("train", output, {"kl_weight": kl_weight})
        return output.loss

    def _is_anywhere(self, flag: bool) -> bool:  # noqa: FBT001
        """Return whether a flag is set on any process: all of them stop together or not at all."""
        if self.trainer.world_size == 1:
            return flag
        shared = torch.tensor(float(flag), device=self.device)
        torch.distributed.all_reduce(shared, torch.distributed.ReduceOp.MAX)
        return bool(shared)

    def _share_buffers(self) -> None:
        """Give every process the statistics of the first one, those that are saved."""
        if self.trainer.world_size > 1:
            saved = self.module.state_dict().keys()
            for name, buffer in self.module.named_buffers():
                if name in saved:
                    torch.distributed.broadcast(buffer, 0)

    def on_train_batch_end(self, *args: Any) -> None:  # noqa: ARG002
        """Count the step and save the state of the run if it is due."""
        if self.trainer.accumulate_grad_batches == 1:
            self.optimizer.zero_grad()  # before the next loss, which may need the memory of the gradients
        self.step += 1
        self.batch_in_epoch += 1
        if self._is_anywhere(self.is_stop_requested):
            self.is_stop_requested = self.trainer.should_stop = True
        if self.run_state is not None and self.batch_in_epoch < self.annealing.steps_per_epoch:
            self.run_state.save_if_due(self)

    def on_validation_start(self) -> None:
        """Validate the same model on every process."""
        self._share_buffers()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Add a minibatch to the validation metrics, at full KL weight and with the same noise in every epoch."""
        output = self._forward(batch, kl_weight=1.0, deterministic=False, stream=_VALIDATION_STREAM + batch_idx)
        self._add("validation", output, {})

    def on_validation_epoch_end(self) -> None:
        """Log what was validated, for callbacks that read it when the validation ends; the epoch ends after it."""
        if self.trainer.world_size == 1 and not self.trainer.sanity_checking:
            self.log_dict(self._read("validation", self._all_sums()))

    @property
    def _training_epoch_outputs(self) -> dict[str, Tensor]:
        """Embeddings that scvi.autotune scores at the end of the training."""
        return self._embeddings("training")

    @property
    def _validation_epoch_outputs(self) -> dict[str, Tensor]:
        """Embeddings that scvi.autotune scores at the end of a validation."""
        return self._embeddings("validation")

    def _embeddings(self, stage: str) -> dict[str, Tensor]:
        """Return the embeddings of a stage, computed once a step since scvi.autotune asks twice."""
        if self.embed is None:
            message = "This plan knows no model to embed cells with: train by the model's train()."
            raise ConfigError(message)
        key = (stage, self.step)
        if key not in self._embedded:
            self._embedded = {key: self.embed(stage)}
        return self._embedded[key]

    @torch.no_grad()
    def _add(self, mode: str, output: LossOutput, more: dict[str, float]) -> None:
        n = output.n_obs_minibatch
        values = {
            "loss": output.loss * n,
            "reconstruction_loss": output.reconstruction_loss_sum,
            "kl_local": output.kl_local_sum,
            "n": n,
        }
        values["elbo"] = values["reconstruction_loss"] + values["kl_local"]
        values |= {key: value * n for key, value in (output.extra_metrics | more).items()}
        sums = self.sums[mode]
        for key, value in values.items():
            total = torch.as_tensor(value, device=self.device).detach().double()
            sums[key] = sums[key] + total if key in sums else total.clone()

    def _own_sums(self) -> dict[str, dict[str, float]]:
        """Return the sums of this process as numbers, read from the device at once."""
        read = {}
        for mode, sums in self.sums.items():
            values = torch.stack(list(sums.values())).tolist() if sums else []
            read[mode] = dict(zip(sums, values, strict=True))
        return read

    def _all_sums(self) -> list[dict[str, dict[str, float]]]:
        """Return the sums of every process, to every process."""
        own = self._own_sums()
        if self._trainer is None or self.trainer.world_size == 1:
            return [own]
        gathered = [own] * self.trainer.world_size
        torch.distributed.all_gather_object(gathered, own)
        return gathered

    def _read(self, mode: str, parts: list[dict[str, dict[str, float]]]) -> dict[str, float]:
        """Return the metrics of an epoch from the sums of every process; one that has none of a key adds nothing."""
        keys = dict.fromkeys(key for part in parts for key in part[mode])
        values = {key: math.fsum(part[mode].get(key, 0.0) for part in parts) for key in sorted(keys)}
        if not values:
            return {}
        n = values.pop("n")
        names = {"loss": "train_loss" if mode == "train" else "validation_loss", "kl_weight": "kl_weight"}
        return {names.get(key, f"{key}_{mode}"): value / n for key, value in values.items()}

    def on_train_epoch_end(self) -> None:
        """Close the epoch: metrics, best weights, early stopping, state of the run."""
        if self.batch_in_epoch < self.annealing.steps_per_epoch:
            self.sums = {"train": {}, "validation": {}}
            return  # stopped inside the epoch
        self._share_buffers()
        if not weights_are_finite(self.module):
            raise NotFiniteLossError(self.epoch, self.step - 1, self._last_rows, what="weights")
        parts = self._all_sums()
        self.sums = {"train": {}, "validation": {}}
        record = {"epoch": float(self.epoch)} | self._read("train", parts) | self._read("validation", parts)
        self.records.append(record)
        self.log_dict({k: v for k, v in record.items() if k != "epoch"}, rank_zero_only=False, sync_dist=False)
        if self.keeper is not None and self.keeper.update(self.module, record):
            self.trainer.should_stop = True
        self.epoch += 1
        self.batch_in_epoch = 0
        if self.run_state is not None:
            self.run_state.save_if_due(self)

    def state(self) -> dict[str, Any]:
        """Return counters, metrics and sums: what a resumed run needs beside weights and optimiser.

        Every process must call it at the same step, since it holds the sums of all.
        """
        return {
            "epoch": self.epoch,
            "step": self.step,
            "batch_in_epoch": self.batch_in_epoch,
            "records": [dict(record) for record in self.records],
            "sums": self._all_sums(),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`state` returned."""
        self.epoch, self.step, self.batch_in_epoch = (state[k] for k in ("epoch", "step", "batch_in_epoch"))
        self.records = [dict(record) for record in state["records"]]
        self._resumed_sums = state["sums"]
        self._take_sums(0)

    def _take_sums(self, rank: int) -> None:
        self.sums = {
            mode: {key: torch.tensor(value, dtype=torch.float64) for key, value in sums.items()}
            for mode, sums in self._resumed_sums[rank].items()
        }

    def on_train_end(self) -> None:
        """Leave the weights without hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def on_train_start(self) -> None:
        """Take what this process had summed before the run was interrupted."""
        if self._resumed_sums:
            self._take_sums(self.global_rank)
            self._resumed_sums = []


class NotFiniteLossError(TrainingError):
    """The loss of a minibatch is NaN or infinite.

    Parameters
    ----------
    epoch, step
        Where it happened.
    rows
        Rows of the cells of the minibatch.
    what
        What is not finite.
    """

    def __init__(self, epoch: int, step: int, rows: Tensor | None, *, what: str = "loss") -> None:
        verb = "is" if what == "loss" else "are"
        super().__init__(f"The {what} of step {step} (epoch {epoch}) {verb} not finite.")
        self.epoch, self.step = epoch, step
        self.rows: list[int] = [] if rows is None else rows.reshape(-1).tolist()


@contextmanager
def _seeded(seed: int, stream: int, rank: int, device: torch.device) -> Iterator[None]:
    """Draw from a generator that depends on (seed, stream, rank) alone, and leave the global generators untouched."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(_mix(seed, stream, rank))
        yield


def _mix(*numbers: int) -> int:
    """Mix integers into one seed of 63 bits (the splitmix64 finaliser over a running sum)."""
    mixed = 0
    for number in numbers:
        mixed = (mixed + number + 0x9E3779B97F4A7C15) % 2**64
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) % 2**64
        mixed ^= mixed >> 31
    return mixed % (2**63 - 1)
