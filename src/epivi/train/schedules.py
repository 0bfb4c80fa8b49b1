"""What the step number decides: the weight of the KL terms, the deterministic warm-up, the learning rate."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Annealing:
    r"""Reconstruction-only warm-up, then cyclical annealing of the KL terms (SAILER, Cao 2021).

    With t the steps since the warm-up, C the steps of a cycle and r the share of the cycle in which the weight rises,

    .. math:: \mathrm{kl}_w(t) = \min\left(\frac{t \bmod C}{r C}, 1\right)

    If ``max_epochs`` is below warm-up plus one cycle, the cycle shrinks to fit, so that training ends at weight one.

    Parameters
    ----------
    steps_per_epoch, max_epochs
        Length of the training.
    n_epochs_warmup
        Epochs without KL terms and without noise in the latent.
    n_epochs_cycle
        Epochs of a cycle; 0 means no cycle, the weight is one from the warm-up on.
    ratio
        Share r of the cycle in which the weight rises from 0 to 1.

    Examples
    --------
    >>> annealing = Annealing(steps_per_epoch=1, max_epochs=8, n_epochs_warmup=0, n_epochs_cycle=4, ratio=0.5)
    >>> [annealing.kl_weight(t) for t in range(5)]
    [0.0, 0.5, 1.0, 1.0, 0.0]
    """

    steps_per_epoch: int
    max_epochs: int
    n_epochs_warmup: int = 10
    n_epochs_cycle: int = 100
    ratio: float = 0.5

    @property
    def warmup_steps(self) -> int:
        """Steps of the warm-up, at most half of the training."""
        return min(self.n_epochs_warmup, self.max_epochs // 2) * self.steps_per_epoch

    @property
    def cycle_steps(self) -> int:
        """Steps of a cycle, after it was shrunk to fit."""
        left = self.max_epochs * self.steps_per_epoch - self.warmup_steps
        return min(self.n_epochs_cycle * self.steps_per_epoch, left)

    def is_deterministic(self, step: int) -> bool:
        """Whether the latent of this step is the posterior mean."""
        return step < self.warmup_steps

    def kl_weight(self, step: int) -> float:
        """Return the weight of the KL terms at a step, between 0 and 1."""
        if step < self.warmup_steps:
            return 0.0
        if self.cycle_steps <= 0 or self.ratio <= 0:
            return 1.0
        return min(((step - self.warmup_steps) % self.cycle_steps) / (self.ratio * self.cycle_steps), 1.0)

    def warn_if_it_ends_low(self) -> None:
        """Warn if the last step of the training has a KL weight below one: the latent is then under-regularised."""
        last = self.kl_weight(max(self.max_epochs * self.steps_per_epoch - 1, 0))
        # the last step before the top of a rise is high enough
        if last < 1.0 - 1.5 / max(self.ratio * self.cycle_steps, 3.0):
            logger.warning(
                "Training of %d epochs ends inside a rise of the KL weight (at %.2f): the latent is under-regularised. "
                "Choose max_epochs or n_epochs_kl_cycle so that it ends in the second half of a cycle.",
                self.max_epochs,
                last,
            )


@dataclass(frozen=True, kw_only=True)
class LearningRate:
    r"""Learning rate by epoch and step.

    With s of S steps done and a warm-up of W steps,

    .. math:: \mathrm{lr}(s) = \mathrm{lr} \cdot \min\left(\tfrac{s + 1}{W}, 1\right) \cdot f, \qquad
        f = \gamma^{\mathrm{epoch}} \quad\text{or}\quad
        f = \tfrac12\left(1 + \cos \pi \tfrac{\max(s - W, 0)}{S - W}\right)

    Parameters
    ----------
    lr
        Largest learning rate.
    steps_per_epoch, max_epochs
        Length of the training.
    schedule
        ``"exponential"`` or ``"cosine"``.
    gamma
        Factor of each epoch, of ``"exponential"``.
    warmup_share
        Share W / S of the steps in which the rate rises.

    Examples
    --------
    >>> rate = LearningRate(lr=1.0, steps_per_epoch=4, max_epochs=1, schedule="cosine", warmup_share=0.5)
    >>> [round(rate.at(step), 3) for step in range(4)]
    [0.5, 1.0, 1.0, 0.5]
    """

    lr: float
    steps_per_epoch: int = 1
    max_epochs: int = 1
    schedule: str = "exponential"
    gamma: float = 1.0
    warmup_share: float = 0.0

    def at(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        total = self.steps_per_epoch * self.max_epochs
        warmup = round(self.warmup_share * total)
        rise = min((step + 1) / warmup, 1.0) if warmup else 1.0
        if self.schedule == "cosine":
            done = max(step - warmup, 0) / max(total - warmup, 1)
            return self.lr * rise * 0.5 * (1.0 + math.cos(math.pi * min(done, 1.0)))
        return self.lr * rise * self.gamma ** (step // self.steps_per_epoch)
