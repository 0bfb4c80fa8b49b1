"""Replacing a folder so that a kill at any moment leaves the old one or the new one.

Beside its target a run has up to three hidden folders, named for the target, the machine, the process and a random
token: ``.new`` is being written, ``.old`` is the whole old folder between the two renames, ``.del`` is being deleted.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import platform
import re
import secrets
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from epivi._errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger(__name__)

_DAY_S: Final = 86_400
# tells this run from a dead one that had the same process id, as is usual in containers
_RUN: Final = secrets.token_hex(4)
_SUFFIX: Final = re.compile(r"([0-9a-f]{8})-(\d+)-([0-9a-f]{8})-[0-9a-f]{8}\.(new|old|del)")


def check_folder(path: Path | str, name: str) -> None:
    """Check that a folder can be written, or made where it does not exist yet.

    Parameters
    ----------
    path
        The folder.
    name
        How the message names the argument.

    Raises
    ------
    ConfigError
        If it is a file, lies below one, or may not be written.

    Examples
    --------
    >>> check_folder(".", "run_dir")
    """
    if "\0" in str(path):
        message = f"{name} {str(path)!r} is no path: it holds a null character. Choose another one."
        raise ConfigError(message)
    existing = next(folder for folder in (Path(path), *Path(path).absolute().parents) if folder.exists())
    if not existing.is_dir():
        message = f"{name} {path}: '{existing}' is a file, not a folder. Choose another one."
        raise ConfigError(message)
    if not os.access(existing, os.W_OK | os.X_OK):
        message = f"{name} {path}: no permission to write in '{existing}'. Choose another folder."
        raise ConfigError(message)


def locate(target: Path) -> Path:
    """Return `target`, or the copy aside if a run was killed between its two renames.

    Examples
    --------
    >>> locate(Path("/nowhere"))
    PosixPath('/nowhere')
    """
    if target.exists():
        return target
    aside = [path for path, _ in _siblings(target, "old")]
    return max(aside, key=lambda path: path.stat().st_ctime_ns, default=target)


def identity(target: Path) -> tuple[int, int, int] | None:
    """Return what changes when another folder takes the place of `target`; None if there is nothing.

    Examples
    --------
    >>> identity(Path("/nowhere"))
    """
    with contextlib.suppress(OSError):
        status = target.stat()
        return status.st_dev, status.st_ino, status.st_ctime_ns
    return None


def replace_folder(
    target: Path, *, fill: Callable[[Path], None], check: Callable[[], None], overwrite: bool = False
) -> None:
    """Make the folder `target` anew, and remove what dead runs left beside it.

    Parameters
    ----------
    target
        The folder, without symbolic links in its path.
    fill
        Writes the files of the empty folder that it gets.
    check
        Raises if `target` may not be replaced; called once more right before that.
    overwrite
        Whether what is at `target` is replaced.

    Raises
    ------
    CheckpointError
        If another run made `target` at the same time.
    OSError
        If the disk is full, or not writable. The old folder is in its place then.

    Examples
    --------
    >>> import tempfile
    >>> target = Path(tempfile.mkdtemp()) / "a"
    >>> replace_folder(target, fill=lambda folder: None, check=lambda: None)
    >>> target.is_dir()
    True
    """
    own = f"{_prefix(target)}{_host()}-{os.getpid()}-{_RUN}-{secrets.token_hex(4)}"
    new, old, trash = (target.with_name(f"{own}.{state}") for state in ("new", "old", "del"))
    target.parent.mkdir(parents=True, exist_ok=True)
    _clean(target, "new", "del")
    try:
        new.mkdir()
        fill(new)
        for path in [*new.iterdir(), new]:
            _fsync(path)
        check()
        if overwrite:
            with contextlib.suppress(FileNotFoundError):
                target.rename(old)
        _rename_in(new, target)
    except BaseException:
        with contextlib.suppress(OSError):
            old.rename(trash if target.exists() else target)
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(trash, ignore_errors=True)
        raise
    _fsync(target.parent)
    with contextlib.suppress(FileNotFoundError):
        # renamed first, so that a copy aside is always a whole one
        old.rename(trash)
    shutil.rmtree(trash, ignore_errors=True)
    _clean(target, "new", "del", "old")


def _rename_in(new: Path, target: Path) -> None:
    try:
        new.rename(target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        message = f"Another run wrote '{target}' at the same time, and its files were kept. Give each run its own path."
        raise CheckpointError(message) from error


def _prefix(target: Path) -> str:
    """Return how the names of the folders beside `target` begin: of limited length, and for `target` alone."""
    digest = hashlib.sha256(os.fsencode(target.name)).hexdigest()
    return f".epivi-{target.name[:40]}-{digest[:12]}-"


def _host() -> str:
    """Return a digest of the place in which process ids are valid: machine and container."""
    place = platform.node()
    with contextlib.suppress(OSError):
        place += str(Path("/proc/self/ns/pid").readlink())
    return hashlib.sha256(place.encode()).hexdigest()[:8]


def _siblings(target: Path, *states: str) -> list[tuple[Path, re.Match[str]]]:
    prefix = _prefix(target)
    paths = [path for path in target.parent.iterdir() if path.name.startswith(prefix)] if target.parent.is_dir() else []
    matches = [(path, _SUFFIX.fullmatch(path.name.removeprefix(prefix))) for path in paths]
    return [(path, match) for path, match in matches if match is not None and match[4] in states]


def _fsync(path: Path) -> None:
    if not path.is_dir():
        with path.open("rb+") as file:
            os.fsync(file.fileno())
        return
    # some file systems cannot do this for folders, and then need not
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _clean(target: Path, *states: str) -> None:
    """Remove what dead runs left beside `target`."""
    here, own_pid = _host(), os.getpid()
    for path, match in _siblings(target, *states):
        host, pid, run = match[1], int(match[2]), match[3]
        if (host, pid, run) == (here, own_pid, _RUN):
            continue
        with contextlib.suppress(OSError):
            dead = host == here and (pid == own_pid or not _is_alive(pid))
            # where the process cannot be asked, its age tells
            if dead or time.time() - path.stat().st_mtime > _DAY_S:
                logger.info("Removing %s, which an interrupted run left.", path)
                shutil.rmtree(path, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    if os.name == "nt":
        # there, signal 0 would end the process
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True
