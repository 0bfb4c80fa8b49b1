"""Two processes under torchrun train the same models, to the same loss, and stop and resume together."""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import epivi
from epivi._errors import CheckpointError, ConfigError
from epivi.models.base_training import cut_rows

CONFTEST = str(Path(__file__).parent / "conftest.py")
N_CELLS, EPOCHS = 240, 4
# 216 training cells: 7 steps of 2 x 16 cells in two processes, of 32 in one
STEPS = 7
# cells, batch size, processes, sizes of the validation minibatches
CUTS = [
    (0, 16, 1, []),
    (40, 16, 1, [16, 16, 8]),
    (40, 16, 2, [16, 16, 8]),
    (10, 16, 1, [10]),
    (10, 16, 2, [5, 5]),
    (3, 16, 2, [1, 1, 1]),
    (5, 16, 4, [1, 1, 1, 1, 1]),
]
FILES = {"sailer": "cells.h5ad", "sailerx": "cells.h5mu", "convnetvae": "tracks.h5ad"}
DENSE = {"n_latent": 3, "encoder": "dense"}
NETWORKS = {"sailer": DENSE, "sailerx": DENSE, "convnetvae": {"n_latent": 3, "kernel_size": 5, "stride": 5}}
CODE = """
import os, runpy, sys, torch
sys.stdout = sys.stderr = open(log + os.environ["RANK"], "a", buffering=1)
os.dup2(sys.stderr.fileno(), 2)
torch.set_num_threads(1)
runpy.run_path(file, run_name="child")[function](**keywords)
"""


def command(model, folder, out):
    """The arguments of the command line."""
    arguments = ["fit", model, str(Path(folder, FILES[model])), "--out", str(out), "--batch-key", "batch"]
    for key, value in NETWORKS[model].items():
        arguments += [f"--{key.replace('_', '-')}", str(value)]
    return [*arguments, "--max-epochs", str(EPOCHS), "--batch-size", "16", "--accelerator", "cpu"]


def fit(model, folder, name, *, steps=None, trouble=None, at=None, only_rank=None):
    """Run the command line in one of the processes, and save the model of each; on the way, trouble for one of them."""
    import torch

    import epivi.cli
    from epivi.models.base import EpiModel
    from epivi.train.plan import TrainingPlan

    rank = int(os.environ["RANK"])
    train, after_step, step = EpiModel.train, TrainingPlan.on_train_batch_end, TrainingPlan._forward

    def train_and_save(self, *args, **kwargs):
        train(self, *args, **kwargs)
        self.save(Path(folder, f"{name}.rank{rank}"))

    def step_ended(plan, *args):
        with Path(folder, f"{name}.steps{rank}").open("a") as file:
            file.write(f"{plan.step}\n")
        if trouble == "interrupt" and plan.step == at and rank == only_rank:
            plan.is_stop_requested = True
        after_step(plan, *args)
        if trouble == "kill" and plan.step == at and rank == only_rank:
            os.kill(os.getpid(), signal.SIGKILL)

    def forward(plan, *args, **kwargs):
        output = step(plan, *args, **kwargs)
        if trouble == "nan" and plan.step == at and rank == only_rank:
            output.loss = output.loss * torch.nan
        return output

    EpiModel.train, TrainingPlan.on_train_batch_end, TrainingPlan._forward = train_and_save, step_ended, forward
    arguments = command(model, folder, Path(folder, name))
    arguments += [] if steps is None else ["--save-every-n-steps", str(steps)]
    code = epivi.cli.main(arguments)
    Path(folder, f"{name}.code{rank}").write_text(str(code))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("distributed")
    shared = runpy.run_path(CONFTEST)
    mdata = shared["multiome"](N_CELLS)
    mdata.write(folder / "cells.h5mu")
    mdata.mod["atac"].write(folder / "cells.h5ad")
    shared["tracks"](N_CELLS).write(folder / "tracks.h5ad")
    return folder


@pytest.fixture
def launch(folder, preload, tmp_path):
    """Run ``fit`` in two processes of torch's elastic launcher, the machinery of torchrun; returns codes and output."""

    def start(model, name, **keywords):
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=2,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            run_id=f"epivi-{os.getpid()}",
            max_restarts=0,
            monitor_interval=0.05,
            start_method="forkserver",
        )
        keywords = {"model": model, "folder": str(folder), "name": name} | keywords
        values = {"file": __file__, "function": "fit", "keywords": keywords, "log": str(tmp_path / f"{name}.log")}
        for rank in range(2):
            (folder / f"{name}.code{rank}").unlink(missing_ok=True)
        failed = None
        # the launcher leaves its handlers behind
        handlers = {number: signal.getsignal(number) for number in signal.valid_signals() if number != signal.SIGKILL}
        try:
            elastic_launch(config, exec)(CODE, values)
        except ChildFailedError as error:
            failed = error
        for number, handler in handlers.items():
            if signal.getsignal(number) is not handler:
                signal.signal(number, handler)
        texts = [(tmp_path / f"{name}.log{rank}").read_text() for rank in range(2)]
        codes = [path.read_text() if (path := folder / f"{name}.code{r}").exists() else None for r in range(2)]
        return failed, codes, texts

    return start


def epivi_class(model):
    return {"sailer": epivi.SAILER, "sailerx": epivi.SAILERX, "convnetvae": epivi.ConvNetVAE}[model]


def saved(model, folder, name):
    return [epivi_class(model).load(folder / f"{name}.rank{rank}", adata=False) for rank in range(2)]


def cells(model):
    shared = runpy.run_path(CONFTEST)
    data = shared["tracks"](N_CELLS) if model == "convnetvae" else shared["multiome"](N_CELLS)
    data = data.mod["atac"] if model == "sailer" else data
    cls = epivi_class(model)
    (cls.setup_mudata if model == "sailerx" else cls.setup_anndata)(data, batch_key="batch")
    return data


def alone(model, seed):
    """Train in this process, with as many cells a step."""
    built = epivi_class(model)(cells(model), seed=seed, **NETWORKS[model])
    built.train(max_epochs=EPOCHS, batch_size=32, enable_progress_bar=False, accelerator="cpu")
    return built


@torch.inference_mode()
def validation_loss(model):
    """The loss of the validation cells in one minibatch: pairs of cells count as often in every model."""
    batch = model.adata_manager.create_torch_dataset()[model.validation_indices]
    options = {"inference_kwargs": {"deterministic": True}, "loss_kwargs": {"kl_weight": 1.0}}
    return float(model.module(batch, **options)[2].loss)


def check_spread(found, model):
    several = [alone(model, seed) for seed in range(3)]
    assert np.array_equal(found.validation_indices, several[0].validation_indices)
    losses = [validation_loss(entry) for entry in several]
    assert abs(validation_loss(found) - np.mean(losses)) <= max(losses) - min(losses)
    for key in ("reconstruction_loss_validation", "elbo_validation"):
        values = [entry.history[key].to_numpy()[-1, 0] for entry in several]
        assert abs(found.history[key].to_numpy()[-1, 0] - np.mean(values)) <= max(values) - min(values), key


@pytest.mark.parametrize("model", FILES)
def test_two_processes_train_to_the_same_loss(model, launch, folder, one_thread, same_weights):
    failed, codes, texts = launch(model, f"{model}_whole")
    assert (failed, codes) == (None, ["0", "0"]), texts
    first, second = saved(model, folder, f"{model}_whole")
    assert same_weights(first.module.state_dict(), second.module.state_dict())
    assert first.history.keys() == second.history.keys()
    assert all(first.history[key].equals(second.history[key]) for key in first.history)
    assert len(first.history["train_loss"]) == EPOCHS
    assert (folder / f"{model}_whole.steps0").read_text() == (folder / f"{model}_whole.steps1").read_text()
    # only the first process writes, and nothing beside its folder
    assert "Wrote" in texts[0]
    assert "Wrote" not in texts[1]
    assert sorted(p.name for p in (folder / f"{model}_whole").iterdir()) == ["history.csv", "latent.csv", "model"]
    check_spread(epivi_class(model).load(folder / f"{model}_whole" / "model", cells(model)), model)


def test_a_killed_run_of_two_processes_goes_on_bitwise(launch, folder, same_weights):
    if not (folder / "sailerx_whole").exists():
        launch("sailerx", "sailerx_whole")
    failed, codes, texts = launch("sailerx", "killed", steps=1, trouble="kill", at=STEPS + 3, only_rank=0)
    assert failed is not None
    assert codes == [None, None], texts
    assert [path.name for path in (folder / "killed").iterdir()] == ["run"]
    # one process would cut its epochs in another way
    model = epivi.SAILERX(cells("sailerx"), n_latent=3, encoder="dense", seed=0)
    arguments = {"max_epochs": EPOCHS, "batch_size": 16, "run_dir": folder / "killed" / "run", "accelerator": "cpu"}
    with pytest.raises(CheckpointError, match="processes: 2 then, 1 now"):
        model.train(**arguments)
    failed, codes, texts = launch("sailerx", "killed", steps=1)
    assert (failed, codes) == (None, ["0", "0"]), texts
    for found, expected in zip(
        saved("sailerx", folder, "killed"), saved("sailerx", folder, "sailerx_whole"), strict=True
    ):
        assert same_weights(found.module.state_dict(), expected.module.state_dict())
        assert all(found.history[key].equals(table) for key, table in expected.history.items())


def test_a_failure_of_one_process_stops_both(launch, folder):
    failed, codes, texts = launch("sailer", "failed", trouble="nan", at=STEPS + 2, only_rank=1)
    assert (failed, codes) == (None, ["3", "3"]), texts
    for text in texts:
        assert f"The loss of step {STEPS + 2} (epoch 1) is not finite." in text
        assert "the weights of epoch 0 are restored" in text
    assert "The minibatch holds 16 cells" in texts[1]
    assert "The minibatch holds" not in texts[0]
    assert not (folder / "failed" / "model").exists()


def test_an_interruption_of_one_process_stops_both_after_the_same_step(launch, folder, same_weights):
    failed, codes, texts = launch("sailer", "interrupted", trouble="interrupt", at=STEPS + 2, only_rank=1)
    assert (failed, codes) == (None, ["130", "130"]), texts
    steps = [(folder / f"interrupted.steps{rank}").read_text().split() for rank in range(2)]
    assert steps[0] == steps[1]
    assert steps[0][-1] == str(STEPS + 2)
    first, second = saved("sailer", folder, "interrupted")
    assert same_weights(first.module.state_dict(), second.module.state_dict())
    assert len(first.history["train_loss"]) == len(second.history["train_loss"]) == 1


@pytest.mark.parametrize(("n_cells", "batch_size", "world", "expected"), CUTS)
def test_every_process_validates(n_cells, batch_size, world, expected):
    parts = cut_rows(np.arange(n_cells), batch_size, world)
    assert [len(part) for part in parts] == expected
    assert [row for part in parts for row in part] == list(range(n_cells))
    assert n_cells == 0 or all(parts[rank::world] for rank in range(world))


def test_too_few_validation_cells_for_the_processes_are_refused():
    with pytest.raises(ConfigError, match="1 validation samples are too few for 2 processes"):
        cut_rows(np.arange(1), 16, 2)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["sailer", "sailerx"])
def test_torchrun_runs_the_command_line(model, folder, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "epivi"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for said in ("Wrote", "is finished"):
        done = subprocess.run(
            [*launcher, *command(model, folder, "out")],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        assert said in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["history.csv", "latent.csv", "model"]
    check_spread(epivi_class(model).load(tmp_path / "out" / "model", cells(model)), model)
