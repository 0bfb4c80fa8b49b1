"""Bookkeeping of an ingestion that may be killed at any moment: which pieces of its arrays are written.

The folder STORE.partial holds ``plan.json`` (what is ingested, with size and time of each file), ``data.zarr`` and one
file in ``done`` for each piece that is wholly written, with its checksum. Once all are, ``data.zarr`` becomes STORE.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import zlib
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from epivi._errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

# Bins of a chunk; chunks of a shard, so that a genome is some files and not thousands
CHUNK_BINS: Final = 1 << 16
_SHARD_CHUNKS: Final = 64


def digest(plan: dict[str, Any]) -> str:
    """Return what tells two plans apart.

    Examples
    --------
    >>> digest({"a": 1}) == digest({"a": 2})
    False
    """
    return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()


def stamp(path: Path | None) -> list[Any] | None:
    """Return path, size and time of a file.

    Examples
    --------
    >>> stamp(None)
    """
    if path is None:
        return None
    status = path.stat()
    return [str(path.resolve()), status.st_size, status.st_mtime_ns]


class Workshop:
    """The unfinished store.

    Parameters
    ----------
    store
        Where the finished one is to be.
    plan
        What is ingested.

    Raises
    ------
    ConfigError
        If the folder belongs to another ingestion.
    """

    def __init__(self, store: Path, plan: dict[str, Any]) -> None:
        import zarr

        self.store = store
        self.folder = partial_folder(store)
        plan = json.loads(json.dumps(plan))
        self._done_folder = self.folder / "done"
        self._done_folder.mkdir(parents=True, exist_ok=True)
        written = self.folder / "plan.json"
        if written.exists():
            _check_same(json.loads(written.read_text(encoding="utf-8")), plan, self.folder)
        else:
            _write_text(written, json.dumps(plan))
        self.root: Any = zarr.open_group(str(self.folder / "data.zarr"), mode="a")
        self._done = {
            path.stem: json.loads(path.read_text(encoding="utf-8")) for path in self._done_folder.glob("*.json")
        }
        self._checked: set[str] = set()

    def array(self, key: str, shape: tuple[int, ...], dtype: str, *, fill_value: int = 0) -> Any:
        """Return a zarr array, made if it is not there: chunks of 2^16 along the last axis, one row and column each."""
        if key in self.root:
            return self.root[key]
        n_chunks = -(-shape[-1] // CHUNK_BINS)
        ones = (1,) * (len(shape) - 1)
        return self.root.create_array(
            key,
            shape=shape,
            dtype=dtype,
            chunks=(*ones, CHUNK_BINS),
            shards=(*ones, CHUNK_BINS * min(n_chunks, _SHARD_CHUNKS)) if n_chunks > 1 else None,
            fill_value=fill_value,
            attributes={"encoding-type": "array", "encoding-version": "0.2.0"},
        )

    def report(self, piece: str, part: Any, at: tuple[Any, ...]) -> dict[str, Any] | None:
        """Return what was noted about a finished piece; None if it is to be written, or not as it was written.

        A machine that lost power may have kept the note and not the data.
        """
        note = self._done.get(piece)
        if note is not None and piece not in self._checked:
            if _checksum(np.asarray(part[at])) != note["checksum"]:
                return None
            self._checked.add(piece)
        return note

    def write(self, piece: str, part: Any, at: tuple[Any, ...], values: np.ndarray, note: dict[str, Any]) -> None:
        """Write a piece of an array, then note that it is finished."""
        part[at] = values
        note = {**note, "checksum": _checksum(values)}
        _write_text(self._done_folder / f"{piece}.json", json.dumps(note))
        self._done[piece] = json.loads(json.dumps(note))
        self._checked.add(piece)

    def finish(self) -> None:
        """Give the store its name and remove the rest."""
        data = self.folder / "data.zarr"
        for path in sorted(data.rglob("*")):
            if path.suffix == ".partial":  # what a killed write of zarr left
                path.unlink()
            elif path.is_file():
                with path.open("rb+") as file:
                    os.fsync(file.fileno())
        data.rename(self.store)
        # the lock is open still, which some systems do not remove
        shutil.rmtree(self.folder, ignore_errors=True)


def partial_folder(store: Path) -> Path:
    """Return the folder of the unfinished store.

    Examples
    --------
    >>> from pathlib import Path
    >>> partial_folder(Path("a.zarr")).name
    'a.zarr.partial'
    """
    return store.with_name(store.name + ".partial")


@contextlib.contextmanager
def locked(store: Path) -> Iterator[None]:
    """Keep a second process from writing the same store; the lock ends with the process.

    Raises
    ------
    ConfigError
        If another process writes it.
    """
    folder = partial_folder(store)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        try:
            import fcntl
        except ImportError:  # Windows: no lock
            pass
        else:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                message = f"Another process is writing '{store}'. Wait for it, or choose another path."
                raise ConfigError(message) from error
        yield


def _check_same(old: dict[str, Any], new: dict[str, Any], folder: Path) -> None:
    """Refuse to go on with another ingestion."""
    differs = [key for key in sorted({*old, *new}) if old.get(key) != new.get(key)]
    if differs:
        message = (
            f"'{folder}' holds an unfinished ingestion that differs in: {', '.join(differs)}. Call ingest as before to "
            "finish it, or delete the folder."
        )
        raise ConfigError(message)


def _checksum(values: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(values).view(np.uint8))


def _write_text(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    part = path.with_name(f"{path.name}.part")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
