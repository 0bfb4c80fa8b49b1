"""CANDI in two processes: different windows, the same weights."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest

import epivi

SCRIPT = """
import sys
from pathlib import Path
import numpy as np, torch
torch.set_num_threads(1)
import epivi
from epivi.models.candi.module import CandiModule
rank, seen, forward = int(__import__("os").environ["RANK"]), [], CandiModule.forward
def spy(self, tensors, *args, **kwargs):
    if self.training:
        seen.append(torch.stack([tensors["rows"], tensors["window"]], 1).numpy())
    return forward(self, tensors, *args, **kwargs)
CandiModule.forward = spy
adata = epivi.simulate.bulk(4, 3, chrom_sizes=[1600, 320], missing=0.0, seed=0)
epivi.CANDI.setup_anndata(adata, validation_chroms=["chr2"])
model = epivi.CANDI(adata, size="test", seed=0, mixup=MIXUP)
model.train(2, batch_size=4, accelerator="cpu", strategy="ddp_find_unused_parameters_true", devices=2,
            enable_progress_bar=False, logger=False, run_dir=Path(sys.argv[1], "run"))
np.save(Path(sys.argv[1], f"seen{rank}.npy"), np.concatenate(seen))
model.save(Path(sys.argv[1], f"model{rank}"))
"""


@pytest.mark.slow
@pytest.mark.parametrize("mixup", [0.0, 1.0])
def test_two_processes_see_different_windows_and_end_with_the_same_weights(tmp_path, mixup):
    script = tmp_path / "train.py"
    script.write_text(SCRIPT.replace("MIXUP", str(mixup)))
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*launcher, str(script), str(tmp_path)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    models = [epivi.CANDI.load(tmp_path / f"model{rank}", adata=False) for rank in range(2)]
    states = [model.module.state_dict() for model in models]
    assert all((states[0][key] == states[1][key]).all() for key in states[0])
    assert all(models[0].history[key].equals(models[1].history[key]) for key in models[0].history)
    seen = [np.load(tmp_path / f"seen{rank}.npy") for rank in range(2)]
    assert seen[0].shape == seen[1].shape
    epochs = [part.reshape(2, -1, 2) for part in seen]
    for one, other in zip(*epochs, strict=True):
        assert not {tuple(pair) for pair in one.tolist()[:: 1 + (mixup > 0)]} & {
            tuple(pair) for pair in other.tolist()[:: 1 + (mixup > 0)]
        }
