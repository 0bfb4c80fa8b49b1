"""What the machine can do, measured, and the least time that a training step can take there."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable

# bytes that Adam moves for a parameter: weight, gradient and two moments read, all but the gradient written
ADAM_BYTES = 28


def best(run: Callable[[], Any], repeats: int = 7) -> float:
    """Return the least seconds of processor time of several runs on one thread: a busy machine does not count."""
    import torch

    n_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    run()
    seconds = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        seconds.append(time.process_time() - start)
    torch.set_num_threads(n_threads)
    return min(seconds)


def rates() -> dict[str, float]:
    """Return the rates of products (GFLOP/s) and of memory (GB/s) on one thread: by torch, and by the kernels."""
    import torch

    from epivi.nn.kernels import _decoder as kernels
    from epivi.nn.kernels import has_half_precision

    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    flop = 2 * 1024**3
    found = {
        "torch float32": flop / best(lambda: a @ b) / 1e9,
        "torch bfloat16": flop / best(lambda: a.bfloat16() @ b.bfloat16()) / 1e9,
    }
    x, y = torch.randn(32_000_000), torch.empty(32_000_000)
    found["memory"] = 8 * x.numel() / best(lambda: y.copy_(x)) / 1e9
    words = {"float32": False} | ({"bfloat16": True} if has_half_precision() else {})
    for name, half in words.items():
        n_r = 64 if half else 128
        left, right = np.zeros((960, n_r), np.uint32), np.zeros((n_r, 128), np.uint32)
        out = np.zeros((960, 128), np.float32)

        def multiply(left: Any = left, right: Any = right, out: Any = out, n_r: int = n_r, half: bool = half) -> None:
            for _ in range(20):
                kernels.product(out, left, n_r, 1, right, (960, 128, n_r), half, False)

        found[f"kernels {name}"] = 20 * 2 * 960 * 128 * 128 / best(multiply) / 1e9
    return found


def floor(
    n_peaks: int,
    n_hidden: int,
    n_parameters: int,
    batch_size: int,
    found: dict[str, float],
    *,
    n_products: int = 3,
) -> dict[str, float]:
    """Return the least milliseconds of the products of the decoder and of the optimiser in a step.

    ``n_products`` are those of peaks and hidden units: logits and both gradients, and the logits once more where a
    likelihood needs their sum before.
    """
    flop = n_products * 2 * n_peaks * n_hidden * batch_size
    rate = found.get("kernels bfloat16", found["kernels float32"])
    return {
        "decoder products": flop / rate / 1e6,
        "optimiser": ADAM_BYTES * n_parameters / found["memory"] / 1e6,
    }
