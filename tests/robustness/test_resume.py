"""A run that was killed goes on bitwise as if it had not been."""

from __future__ import annotations

import os
import runpy
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from epivi._errors import CheckpointError

# the child has no fixtures: the data come from the same file
CONFTEST = str(Path(__file__).parent / "conftest.py")
KINDS = ["SAILER", "SAILERX", "ConvNetVAE", "FCVAE"]
SAILERS = {"n_latent": 2, "n_hidden": (4, 3), "dropout_rate": 0.1, "input_dropout_rate": 0.1, "seed": 1}
TRACKS = {"n_latent": 2, "n_hidden": 4, "dropout_rate": 0.1, "modality_dropout_rate": 0.3, "seed": 1}
OPTIONS = {
    "SAILER": SAILERS,
    "SAILERX": SAILERS,
    "ConvNetVAE": TRACKS | {"kernel_size": 5, "stride": 3, "n_filters": (3,)},
    "FCVAE": TRACKS | {"likelihood": "nb"},
}
ARGUMENTS = {"max_epochs": 5, "batch_size": 8, "early_stopping_patience": 30}


def build(kind, **arguments):
    import epivi

    shared = runpy.run_path(CONFTEST)
    data = shared[{"SAILER": "peaks", "SAILERX": "multiome"}.get(kind, "tracks")]()
    cls = getattr(epivi, kind)
    (cls.setup_mudata if kind == "SAILERX" else cls.setup_anndata)(data, batch_key="batch")
    return cls(data, **(OPTIONS[kind] | arguments)), shared["QUIET"] | {"plan_kwargs": shared["FLAT"]}


def train(kind, run_dir, out, *, kill_at=None, kill_in=None, pause=0.0, **arguments):
    """Train, and save the model when that is done; on the way, kill this process with signal 9 where asked."""
    import epivi.train._atomic
    from epivi.train.plan import TrainingPlan

    model, options = build(kind)
    after_step, before_save = TrainingPlan.on_train_batch_end, epivi.train._atomic._rename_in
    before_validation = TrainingPlan.validation_step

    def step_ended(plan, *args):
        after_step(plan, *args)
        if pause:
            (Path(run_dir) / "steps" / str(plan.step)).touch()
            time.sleep(pause)
        if kill_in is None and plan.step == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def validating(plan, *args):
        if kill_in == "validation" and plan.step >= kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        before_validation(plan, *args)

    def rename_in(*args):
        model_steps = int(model.module.training and getattr(model.trainer.lightning_module, "step", 0))
        if kill_in == "save" and model_steps >= kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        before_save(*args)

    TrainingPlan.on_train_batch_end, TrainingPlan.validation_step = step_ended, validating
    epivi.train._atomic._rename_in = rename_in
    (Path(run_dir) / "steps").mkdir(parents=True, exist_ok=True)
    model.train(**(ARGUMENTS | options | {"run_dir": run_dir} | arguments))
    model.save(out)


def train_from_keywords(keywords):
    train(**keywords)


@pytest.fixture
def run(child, tmp_path):
    """Train in a child process; returns its exit code and, if it ended, weights, history and latents."""

    def start(name, **keywords):
        keywords = {"kind": "SAILER", "run_dir": str(tmp_path / name), "out": str(tmp_path / f"{name}.out")} | keywords
        process = child(train_from_keywords, keywords)
        code = process.wait()
        return (code, outcome(keywords["kind"], keywords["out"])) if code == 0 else (code, process.text)

    return start


def outcome(kind, folder):
    import epivi

    model = getattr(epivi, kind).load(folder, build(kind)[0].adata)
    return model.module.state_dict(), model.history, model.get_latent_representation()


def check_same(found, expected, same_weights):
    assert same_weights(found[0], expected[0])
    assert found[1].keys() == expected[1].keys()
    for key, table in expected[1].items():
        assert table.equals(found[1][key]), key
    assert np.array_equal(found[2], expected[2])


# 36 training cells in minibatches of 8 (the last of 4): 5 steps an epoch
POINTS = [
    {"kill_at": 10},  # at the end of an epoch
    {"kill_at": 3},
    {"kill_at": 24},  # before the last step
    {"kill_at": 10, "kill_in": "validation"},
    {"kill_at": 12, "kill_in": "save"},  # between the two renames
]


@pytest.fixture
def killed(run, same_weights, one_thread):
    """Kill a run at some points, let it end, and compare it with one that was not killed."""

    def check(kind, points, **keywords):
        code, expected = run("whole", kind=kind)
        assert code == 0, expected
        for i, point in enumerate(points):
            for part in point if isinstance(point, tuple) else (point,):
                code, text = run(f"killed{i}", kind=kind, **keywords, **part)
                assert code == -signal.SIGKILL, text
            code, found = run(f"killed{i}", kind=kind, **keywords)
            assert code == 0, found
            check_same(found, expected, same_weights)

    return check


def test_a_killed_run_ends_as_one_that_was_not(killed):
    killed("SAILER", POINTS, save_every_n_steps=1)


def test_a_killed_run_of_a_multiome_ends_as_one_that_was_not(killed):
    killed("SAILERX", [{"kill_at": 13}], save_every_n_steps=1)


@pytest.mark.parametrize("kind", ["ConvNetVAE", "FCVAE"])
def test_a_killed_run_of_tracks_ends_as_one_that_was_not(killed, kind):
    killed(kind, [({"kill_at": 8}, {"kill_at": 20})], save_every_n_steps=1)


def test_without_saves_inside_epochs_the_last_epoch_is_trained_anew(killed):
    killed("SAILERX", [({"kill_at": 4}, {"kill_at": 13})])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_twenty_kills_at_random_moments(kind, child, run, same_weights, one_thread, tmp_path):
    code, expected = run("whole", kind=kind, save_every_n_steps=1, pause=0.05)
    assert code == 0, expected
    rng = np.random.default_rng(0)
    for i in range(20):
        folder = tmp_path / f"run{i}"
        keywords = {"kind": kind, "run_dir": str(folder), "out": str(tmp_path / f"run{i}.out")}
        keywords |= {"save_every_n_steps": int(rng.integers(1, 4)), "pause": 0.05}
        process = child(train_from_keywords, keywords)
        # a step of 25, and a moment in the next one or two: its saves, its epoch's end, its validation
        step = folder / "steps" / str(rng.integers(1, 23))
        while not step.exists():
            time.sleep(0.002)
        time.sleep(rng.uniform(0.0, 0.08))
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        code, found = run(f"run{i}", **(keywords | {"pause": 0.0}))
        assert code == 0, found
        check_same(found, expected, same_weights)


def test_a_run_that_stopped_early_is_not_trained_further(quiet, flat, tmp_path, same_weights):
    arguments = ARGUMENTS | {"max_epochs": 60, "early_stopping_patience": 2, "lr": 0.1, "plan_kwargs": flat}
    first, _ = build("SAILER")
    first.train(run_dir=tmp_path / "run", **arguments, **quiet)
    n_epochs = len(first.history["train_loss"])
    assert n_epochs < 60
    second, _ = build("SAILER")
    second.train(run_dir=tmp_path / "run", **arguments, **quiet)
    assert len(second.history["train_loss"]) == n_epochs
    assert same_weights(first.module.state_dict(), second.module.state_dict())
    assert second.is_trained


class StopHereError(BaseException):
    """Ends a training as nothing inside it expects."""


CHANGES = {
    "lr": ({}, {"lr": 0.5}, "lr: 0.001 then, 0.5 now"),
    "batch size": ({}, {"batch_size": 9}, "batch_size: 8 then, 9 now"),
    "epochs": ({}, {"max_epochs": 6}, "max_epochs: 5 then, 6 now"),
    "seed of the training": ({}, {"seed": 9}, "seed: 1 then, 9 now"),
    "split": ({}, {"train_size": 0.8}, "train_size: 0.9 then, 0.8 now"),
    "plan": ({}, {"plan_kwargs": {"weight_decay": 0.1}}, "weight_decay: 1e-06 then, 0.1 now"),
    "clipping": ({}, {"gradient_clip_val": 1.0}, "gradient_clip_val: None then, 1.0 now"),
    "network": ({"n_latent": 3}, {}, "config: .*'n_latent': 2.* then, .*'n_latent': 3.* now"),
    "weights at the start": ({"seed": 7}, {"seed": 1}, "model_seed: 1 then, 7 now"),
}


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory):
    """A run that was stopped in its second epoch."""
    from epivi.train.plan import TrainingPlan

    folder = tmp_path_factory.mktemp("resume") / "run"
    model, options = build("SAILER")
    with pytest.MonkeyPatch.context() as patch:
        after_step = TrainingPlan.on_train_batch_end

        def stop(plan, *args):
            after_step(plan, *args)
            if plan.step == 7:
                raise StopHereError

        patch.setattr(TrainingPlan, "on_train_batch_end", stop)
        with pytest.raises(StopHereError):
            model.train(run_dir=folder, save_every_n_steps=1, **ARGUMENTS, **options)
    return folder


@pytest.mark.parametrize("name", CHANGES)
def test_other_arguments_are_refused_and_named(name, unfinished, no_training):
    init, arguments, match = CHANGES[name]
    model, options = build("SAILER", **init)
    with pytest.raises(CheckpointError, match=rf"unfinished run in .* does not fit \(.*{match}.*Train with the same"):
        model.train(run_dir=unfinished, **(ARGUMENTS | options | arguments))


@pytest.mark.parametrize("change", ["one count", "one batch", "one name", "a cell more"])
def test_other_data_are_refused(change, unfinished, make_peaks, no_training):
    import epivi

    adata = make_peaks(41 if change == "a cell more" else 40)
    if change == "one count":
        counts = adata.X.toarray()
        counts[39, 50] = 0 if counts[39, 50] else 1
        adata.X = type(adata.X)(counts)
    elif change == "one batch":
        adata.obs.loc["c39", "batch"] = "b0"
    elif change == "one name":
        adata.obs_names = [*adata.obs_names[:-1], "other"]
    epivi.SAILER.setup_anndata(adata, batch_key="batch")
    _, options = build("SAILER")
    model = epivi.SAILER(
        adata, n_latent=2, n_hidden=(4, 3), dropout_rate=0.1, input_dropout_rate=0.1, seed=1, open_weight=None
    )
    with pytest.raises(CheckpointError, match=r"does not fit \(data: '[0-9a-f]{64}' then"):
        model.train(run_dir=unfinished, **(ARGUMENTS | options))


def test_another_model_is_refused(unfinished, no_training):
    model, options = build("SAILERX")
    with pytest.raises(CheckpointError, match="model: 'SAILER' then, 'SAILERX' now"):
        model.train(run_dir=unfinished, **(ARGUMENTS | options))


def test_what_does_not_matter_may_change(unfinished, quiet, tmp_path, same_weights):
    import shutil

    shutil.copytree(unfinished, tmp_path / "run")
    model, options = build("SAILER")
    model.train(run_dir=tmp_path / "run", save_every_n_steps=3, num_workers=1, **(ARGUMENTS | options))
    whole, options = build("SAILER")
    whole.train(**(ARGUMENTS | options))
    assert same_weights(model.module.state_dict(), whole.module.state_dict())


def test_a_damaged_state_is_refused(unfinished, no_training, tmp_path):
    import shutil

    shutil.copytree(unfinished, tmp_path / "run")
    weights = tmp_path / "run" / "state" / "weights.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[len(raw) // 2] ^= 1
    weights.write_bytes(raw)
    model, options = build("SAILER")
    with pytest.raises(CheckpointError, match="damaged"):
        model.train(run_dir=tmp_path / "run", **(ARGUMENTS | options))
