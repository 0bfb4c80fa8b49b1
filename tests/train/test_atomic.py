from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import os
import shutil
import signal
import threading
import time
import warnings
from pathlib import Path

import pytest
import safetensors.torch
import torch

from epivi._errors import CheckpointError
from epivi.train import _atomic
from epivi.train.checkpoint import is_checkpoint, read_checkpoint, write_checkpoint

WEIGHTS, METADATA, MANIFEST = "weights.safetensors", "metadata.json", "manifest.json"


def save(path, value=1, **kwargs):
    tensors = {"w": torch.full((3,), float(value)), "step": torch.tensor(value)}
    return write_checkpoint(path, tensors=tensors, metadata={"value": value}, kind="model", **kwargs)


def value_of(path):
    found = read_checkpoint(path, kind="model")
    assert found.tensors["w"].tolist() == [float(found.metadata["value"])] * 3
    assert found.tensors["step"].item() == found.metadata["value"]
    return found.metadata["value"]


def refused(folder, match="damaged"):
    with pytest.raises(CheckpointError, match=match) as caught:
        read_checkpoint(folder)
    return str(caught.value)


def snapshot(folder):
    return {str(path.relative_to(folder)): path.is_file() and path.read_bytes() for path in sorted(folder.rglob("*"))}


# ---- overwriting -------------------------------------------------------------------------------------------
def test_overwriting_is_refused_where_something_could_be_lost(tmp_path):
    save(tmp_path / "c")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("mine")
    shutil.copytree(save(tmp_path / "noted"), tmp_path / "damaged")
    (tmp_path / "noted" / "notes.txt").write_text("mine")
    (tmp_path / "damaged" / MANIFEST).write_text("{}")
    (tmp_path / "empty").mkdir()
    before = snapshot(tmp_path)
    for name, overwrite, message in [
        ("c", False, "exists already. Pass overwrite=True"),
        ("empty", False, "exists already"),
        ("file", True, "is a file; a checkpoint is a folder"),
        ("home", True, r"other content than an epivi checkpoint \('thesis.tex'\)"),
        ("damaged", True, "other content than an epivi checkpoint"),
        ("noted", True, "also holds 'notes.txt', which overwriting would delete"),
        (".", True, "other content than an epivi checkpoint"),
        ("/", True, "'/' is a folder with other content"),
        ("file/c", True, "could not be written: .*File exists.*Check the permissions"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            save(tmp_path / name, 2, overwrite=overwrite)
        assert snapshot(tmp_path) == before
    assert value_of(save(tmp_path / "c", 2, overwrite=True)) == 2
    assert value_of(save(tmp_path / "empty", 3, overwrite=True)) == 3


def test_links_are_followed(tmp_path):
    save(tmp_path / "disk" / "real")
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "real")
    save(tmp_path / "link", 2, overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert value_of(tmp_path / "disk" / "real") == value_of(tmp_path / "link") == 2


@pytest.mark.parametrize("name", ["mkdir", "rename", "fsync"])
def test_failures_of_the_disk_leave_the_old_checkpoint(tmp_path, monkeypatch, name):
    folder = save(tmp_path / "c")
    before = snapshot(tmp_path)

    def fail(*args, **kwargs):
        raise PermissionError(13, "Permission denied", str(args[0]))

    with monkeypatch.context() as patch:
        patch.setattr(os, name, fail)
        with pytest.raises(CheckpointError, match=r"could not be written: .*Permission denied"):
            save(folder, 2, overwrite=True)
    assert snapshot(tmp_path) == before
    assert value_of(folder) == 1


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write and read everything")
def test_permissions_are_named(tmp_path):
    folder = save(tmp_path / "p" / "c")
    (folder / WEIGHTS).chmod(0)
    refused(folder, "could not be read: .*Permission denied")
    folder.parent.chmod(0o500)
    with pytest.raises(CheckpointError, match=r"could not be written: .*Permission denied.*Check the permissions"):
        save(tmp_path / "p" / "d")
    folder.parent.chmod(0o700)


def test_unreadable_files_are_named(tmp_path, monkeypatch):
    folder = save(tmp_path / "c")

    def fail(*args, **kwargs):
        raise PermissionError(13, "Permission denied", "f")

    monkeypatch.setattr(hashlib, "file_digest", fail)
    refused(folder, "could not be read: .*Permission denied.*Check the permissions")


# ---- kills -------------------------------------------------------------------------------------------------
STEPS = ["mkdir", "rename", "fsync", "open", "close", "chmod", "unlink", "rmdir", "scandir"]


def killed_while_saving(folder, at):
    """Save in a child that is killed right before its `at`-th call to the system; return whether it came that far."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    calls = 0
    with contextlib.suppress(BaseException):
        for module, name in [(os, name) for name in STEPS] + [(io, "open")]:

            def counted(*args, _function=getattr(module, name), **kwargs):  # noqa: B008
                nonlocal calls
                calls += 1
                if calls == at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return _function(*args, **kwargs)

            setattr(module, name, counted)
        save(folder, 2, overwrite=True)
    os._exit(0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process")
def test_a_kill_at_any_step_leaves_the_old_or_the_new(tmp_path, caplog):
    caplog.set_level(logging.ERROR)
    states, at, folder = [], 0, tmp_path / "c"
    killed = True
    while killed:
        at += 1
        save(folder, 1, overwrite=True)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["c"], "leftovers are removed at the next save"
        killed = killed_while_saving(folder, at)
        assert is_checkpoint(folder)
        states.append((value_of(folder), folder.exists()))
        if not folder.exists():
            with pytest.raises(CheckpointError, match="exists already"):
                save(folder, 3)
    assert len(states) > 25
    assert states == sorted(states, key=lambda state: state[0]), "from old to new, and never back"
    assert {(1, True), (1, False), (2, True)} == set(states)
    assert states[-1] == (2, True)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a forked process")
def test_a_kill_of_the_first_save_leaves_nothing(tmp_path):
    for at in range(3, 18, 3):
        assert killed_while_saving(tmp_path / "c", at)
        refused(tmp_path / "c", "There is no checkpoint")
    save(tmp_path / "c")
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_an_interrupt_between_the_renames_is_undone(tmp_path, monkeypatch):
    folder = save(tmp_path / "c")
    before, rename = snapshot(tmp_path), os.rename

    def interrupt(source, target):
        if str(source).endswith(".new"):
            raise KeyboardInterrupt
        rename(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", interrupt)
        with pytest.raises(KeyboardInterrupt):
            save(folder, 2, overwrite=True)
    assert snapshot(tmp_path) == before


def test_the_copy_aside_is_read_with_a_warning(tmp_path, caplog):
    folder = save(tmp_path / "c")
    name = f"{_atomic._prefix(folder)}{_atomic._host()}-{2**22 + 1}-00000000-00000000"
    folder.rename(tmp_path / f"{name}.old")
    assert value_of(folder) == 1
    assert "A run was killed while it replaced" in caplog.text
    save(folder, 2, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_only_leftovers_of_dead_runs_are_removed(tmp_path):
    folder, prefix, host = tmp_path / "c", _atomic._prefix(tmp_path / "c"), _atomic._host()
    other = _atomic._prefix(tmp_path / "c2")
    dead, alive, token = 2**22 + 1, os.getppid(), "0" * 8
    stays = [
        f"{prefix}{host}-{alive}-{token}-{token}.new",
        f"{prefix}{host}-{os.getpid()}-{_atomic._RUN}-{token}.new",
        f"{prefix}{token}-{dead}-{token}-{token}.new",
        f"{other}{host}-{dead}-{token}-{token}.new",
        f"{prefix}mine.new",
        ".epivi-c",
    ]
    goes = [f"{prefix}{host}-{dead}-{token}-{token}.{state}" for state in ("new", "old", "del")]
    goes += [f"{prefix}{host}-{os.getpid()}-{token}-{token}.new", f"{prefix}{host}-{10**12}-{token}-{token}.new"]
    ancient = f"{prefix}{token}-{dead}-{token}-{'1' * 8}.new"
    save(folder)
    for name in [*stays, *goes, ancient]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").touch()
    os.utime(tmp_path / ancient, (time.time() - 90_000,) * 2)
    save(folder, 2, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*stays, "c"])


def test_long_and_strange_folder_names(tmp_path):
    for name in ["n" * 255, "é" * 120, "a b*[x]?", "line\nbreak"]:
        save(tmp_path / name)
        assert value_of(save(tmp_path / name, 2, overwrite=True)) == 2
    assert len(list(tmp_path.iterdir())) == 4
    with pytest.raises(CheckpointError, match="is not Unicode, which safetensors needs"):
        save(tmp_path / "bytes\udcff")


def test_two_runs_at_once_make_one_checkpoint_and_one_error(tmp_path, monkeypatch):
    fsync = os.fsync

    def overtaken(descriptor):
        monkeypatch.setattr(os, "fsync", fsync)
        save(tmp_path / "c", 5)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", overtaken)
    with pytest.raises(CheckpointError, match="exists already"):
        save(tmp_path / "c", 6)
    rename = os.rename

    def overtaken_later(source, target):
        if str(source).endswith(".new"):
            monkeypatch.setattr(os, "rename", rename)
            save(tmp_path / "d", 7)
        rename(source, target)

    monkeypatch.setattr(os, "rename", overtaken_later)
    with pytest.raises(CheckpointError, match=r"Another run wrote .* at the same time"):
        save(tmp_path / "d", 8)
    assert (value_of(tmp_path / "c"), value_of(tmp_path / "d")) == (5, 7)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "d"]


def test_readers_never_see_a_mixture_while_a_run_saves(tmp_path):
    folder, done = save(tmp_path / "c", 0), threading.Event()

    def write():
        for value in range(1, 60):
            save(folder, value, overwrite=True)
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    seen = []
    while not done.is_set():
        assert is_checkpoint(folder)
        seen.append(value_of(folder))
    writer.join()
    assert seen == sorted(seen)
    assert value_of(folder) == 59


def test_a_folder_that_changes_all_the_time_is_given_up(tmp_path, monkeypatch):
    folder = save(tmp_path / "c")
    moments = iter(range(1000))
    monkeypatch.setattr("epivi.train.checkpoint.identity", lambda target: (0, 0, next(moments)))
    refused(folder, "is replaced again and again by another run")


def test_files_are_on_disk_before_the_rename(tmp_path, monkeypatch):
    log, fsync, rename = [], os.fsync, os.rename
    monkeypatch.setattr(os, "fsync", lambda fd: (log.append(Path(f"/proc/self/fd/{fd}").readlink().name), fsync(fd))[1])
    monkeypatch.setattr(os, "rename", lambda a, b: (log.append("rename"), rename(a, b))[1])
    if not Path("/proc/self/fd").exists():
        pytest.skip("needs /proc")
    save(tmp_path / "c")
    assert set(log[:3]) == {WEIGHTS, METADATA, MANIFEST}
    assert log[3].endswith(".new")
    assert log[4:6] == ["rename", tmp_path.name]


def test_a_full_disk_below_safetensors_is_named(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise safetensors.SafetensorError("No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    with pytest.raises(CheckpointError, match=r"could not be written: No space left on device.*free space"):
        save(tmp_path / "c")
    assert not list(tmp_path.iterdir())
