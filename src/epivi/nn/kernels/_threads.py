"""Compiled functions on several threads: as many as torch uses."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable


@lru_cache(maxsize=4)
def _pool(n_threads: int, process: int) -> ThreadPoolExecutor:  # noqa: ARG001
    """Threads of this process; a forked one has none of its parent's."""
    return ThreadPoolExecutor(n_threads, thread_name_prefix="epivi")


def run_all(function: Callable[..., Any], jobs: Iterable[tuple[Any, ...]]) -> None:
    """Call a function that releases the interpreter's lock with each tuple of arguments, in any order.

    Jobs must not write to the same memory.

    Examples
    --------
    >>> found = []
    >>> run_all(lambda a, b: found.append(a + b), [(1, 2), (3, 4)])
    >>> sorted(found)
    [3, 7]
    """
    jobs, n_threads = list(jobs), torch.get_num_threads()
    if n_threads == 1 or len(jobs) == 1:
        for job in jobs:
            function(*job)
        return
    for done in [_pool(n_threads, os.getpid()).submit(function, *job) for job in jobs]:
        done.result()
