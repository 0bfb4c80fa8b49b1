from __future__ import annotations

import threading

import pytest
import torch

from epivi.nn.kernels._threads import run_all


@pytest.fixture(params=[1, 3])
def n_threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_every_job_runs_once(n_threads):
    found = []
    run_all(lambda a, b: found.append((a, b)), [(i, 2 * i) for i in range(50)])
    assert sorted(found) == [(i, 2 * i) for i in range(50)]


def test_jobs_run_beside_each_other(n_threads):
    barrier = threading.Barrier(n_threads)
    run_all(lambda _: barrier.wait(timeout=10), [(i,) for i in range(n_threads)])


def test_errors_come_out(n_threads):
    def fail(i):
        if i == 3:
            message = "job 3"
            raise ValueError(message)

    with pytest.raises(ValueError, match="job 3"):
        run_all(fail, [(i,) for i in range(5)])
