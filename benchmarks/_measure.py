"""Time of training steps and peak memory of a process."""

from __future__ import annotations

import ctypes
import gc
import resource
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

MIB = 1024.0**2


def timed(run: Callable[[Any], None], warm_up: int, steps: int) -> dict[str, float]:
    """Return seconds a training step, wall-clock and processor time.

    Parameters
    ----------
    run
        Trains for ``warm_up + steps`` steps with the callback that it is given.
    warm_up, steps
        The clock runs from the end of the last warm-up step to the end of the last step.
    """
    from lightning.pytorch.callbacks import Callback

    class StepClock(Callback):
        """Takes the time at the end of the last warm-up step and of the last step."""

        def __init__(self) -> None:
            self.done = 0
            self.times: list[tuple[float, float]] = []

        def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:  # noqa: ARG002
            self.done += 1
            if self.done in (warm_up, warm_up + steps):
                self.times.append((time.perf_counter(), time.process_time()))

    clock = StepClock()
    run(clock)
    if len(clock.times) != 2:
        message = f"{clock.done} steps were run where {warm_up + steps} were asked for."
        raise RuntimeError(message)
    (wall_0, cpu_0), (wall_1, cpu_1) = clock.times
    return {"wall": (wall_1 - wall_0) / steps, "cpu": (cpu_1 - cpu_0) / steps}


def resident() -> float:
    """Return the resident memory of this process in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / MIB


def reset_peak() -> bool:
    """Let the kernel forget the peak of the resident memory so far; false where it cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak() -> float:
    """Return the peak of the resident memory in MiB.

    VmHWM is preferred to ru_maxrss, which a child process inherits from its parent.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024.0


def settle() -> float:
    """Free what is free, and return the resident memory that is left in MiB."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return resident()
