"""Folders of safetensors and JSON that hold a model or a training state: checked byte by byte, replaced atomically.

A checkpoint is a folder with exactly three files: ``weights.safetensors``, ``metadata.json`` and ``manifest.json``. The
manifest names the format and the kind, and holds size and SHA-256 of the two others and of its own content. Its text is
the one canonical form of that content, so that no byte of the folder can change unnoticed. The checksums find damage;
they are no signature. What protects from hostile files is that nothing here can run code: no pickle is read or written.

A new checkpoint is written to a hidden folder beside its target, forced to disk and then renamed. To overwrite, the old
folder is first renamed aside; whoever reads between the two renames, or after a kill there, finds the copy aside.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import logging
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from epivi._errors import CheckpointError
from epivi.train._atomic import identity, locate, replace_folder
from epivi.train._encoding import decode, encode, flatten_state, unflatten_state

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

__all__ = [
    "Checkpoint",
    "decode",
    "encode",
    "flatten_state",
    "is_checkpoint",
    "read_checkpoint",
    "unflatten_state",
    "write_checkpoint",
]

logger = logging.getLogger(__name__)

FORMAT: Final = "epivi-checkpoint"
FORMAT_VERSION: Final = 1
WEIGHTS: Final = "weights.safetensors"
METADATA: Final = "metadata.json"
MANIFEST: Final = "manifest.json"

_FIELDS: Final = {"format", "format_version", "epivi_version", "kind", "tensors", "files", "sha256"}
_ATTEMPTS: Final = 20
_FILES: Final = {WEIGHTS, METADATA, MANIFEST}
_FLOATS: Final = {"float16", "bfloat16", "float32", "float64", "float8_e4m3fn", "float8_e5m2"}
_DTYPES: Final = {"bool"} | {f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)} | _FLOATS


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """What `read_checkpoint` returns.

    Examples
    --------
    >>> Checkpoint(tensors={}, metadata={}, kind="model", epivi_version="0.1.0", format_version=1).kind
    'model'
    """

    tensors: dict[str, torch.Tensor]
    metadata: dict[Any, Any]
    kind: str
    epivi_version: str
    format_version: int


def write_checkpoint(
    directory: Path | str,
    *,
    tensors: Mapping[str, torch.Tensor | np.ndarray[Any, Any]],
    metadata: Mapping[str, Any],
    kind: str,
    overwrite: bool = False,
) -> Path:
    """Write tensors and metadata to a checkpoint folder, whole or not at all.

    Parameters
    ----------
    directory
        The folder to make. Missing parent folders are made too.
    tensors
        Dense tensors or numeric arrays of any shape, under any names. They may be views, share memory or lie on a GPU;
        each is stored by itself.
    metadata
        Values known to `encode`.
    kind
        What the checkpoint is, for example ``"model"``; `read_checkpoint` can insist on it.
    overwrite
        Whether an epivi checkpoint (or an empty folder) at `directory` may be replaced.

    Returns
    -------
    `directory` as a path.

    Raises
    ------
    CheckpointError
        If `directory` exists and `overwrite` is false, or is a file, or is a folder with anything else than an epivi
        checkpoint in it; if a tensor or a metadata value has no stored form; if the disk is full or not writable; if
        another run writes there at the same time. What was there before is there after.

    Examples
    --------
    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp()) / "run"
    >>> path = write_checkpoint(folder, tensors={"w": np.ones(3)}, metadata={"epoch": 4}, kind="model")
    >>> read_checkpoint(path).tensors["w"]
    tensor([1., 1., 1.], dtype=torch.float64)
    """
    target = _resolve(directory)
    if not isinstance(kind, str) or not kind:
        message = f"kind is {kind!r}; it must be a name such as 'model'."
        raise CheckpointError(message)
    try:
        _refuse_target(target, overwrite=overwrite)
        stored, text = _storable(tensors), _dump(encode(dict(metadata)))
        replace_folder(
            target,
            fill=lambda folder: _fill(folder, stored, text, kind),
            check=lambda: _refuse_target(target, overwrite=overwrite),
            overwrite=overwrite,
        )
    except OSError as error:
        message = (
            f"The checkpoint '{target}' could not be written: {error}. "
            "Check the permissions and the free space there, or choose another folder."
        )
        raise CheckpointError(message) from error
    return Path(directory)


def read_checkpoint(
    directory: Path | str, *, kind: str | None = None, device: str | torch.device = "cpu"
) -> Checkpoint:
    """Read a checkpoint folder after every byte of it has been checked.

    Parameters
    ----------
    directory
        The folder that `write_checkpoint` made.
    kind
        The kind that is needed; None takes any.
    device
        Where the tensors go.

    Returns
    -------
    The tensors in the order in which they were given, the metadata, and what the manifest says.

    Raises
    ------
    CheckpointError
        If there is no checkpoint; if a file is missing, unexpected, of the wrong size or changed; if the format is
        newer than this epivi knows; if the kind is another; if the content was not written by epivi.

    Examples
    --------
    >>> read_checkpoint("/nowhere")
    Traceback (most recent call last):
    epivi._errors.CheckpointError: There is no checkpoint at '/nowhere'. Check the path.
    """
    import torch

    target, device = _resolve(directory), torch.device(device)
    for _ in range(_ATTEMPTS):
        before = identity(target)
        try:
            checkpoint = _read_folder(target, kind)
        except CheckpointError:
            if identity(target) == before:
                raise
            continue
        except OSError as error:
            if identity(target) != before:
                continue
            message = f"The checkpoint '{target}' could not be read: {error}. Check the permissions and the disk."
            raise CheckpointError(message) from error
        # a change of identity means that another run replaced the folder between two of the files
        if identity(target) == before:
            for name, tensor in checkpoint.tensors.items():
                checkpoint.tensors[name] = tensor.to(device)
            return checkpoint
    message = f"The checkpoint '{target}' is replaced again and again by another run. Read it when that has finished."
    raise CheckpointError(message)


def is_checkpoint(directory: Path | str) -> bool:
    """Return whether a folder calls itself an epivi checkpoint; its content is not checked.

    Examples
    --------
    >>> is_checkpoint("/nowhere")
    False
    """
    target = _resolve(directory)
    # twice: another run may be between its two renames at the first look
    return _calls_itself_checkpoint(target) or _calls_itself_checkpoint(target)


def _resolve(directory: Path | str) -> Path:
    # symbolic links are followed, so that the renames happen on the disk where the folder lies
    target = os.path.realpath(directory)
    if target.encode("utf-8", "replace").decode() != target:
        message = f"The path {target!r} is not Unicode, which safetensors needs. Choose another path."
        raise CheckpointError(message)
    return Path(target)


def _calls_itself_checkpoint(target: Path) -> bool:
    try:
        path = locate(target) / MANIFEST
        manifest = json.loads(path.read_bytes()) if path.is_file() else None
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(manifest, dict) and manifest.get("format") == FORMAT


def _refuse_target(target: Path, *, overwrite: bool) -> None:
    """Raise if `target` may not be written to."""
    folder = locate(target)
    if not folder.exists():
        return
    if not folder.is_dir():
        message = f"'{target}' is a file; a checkpoint is a folder. Choose another path."
        raise CheckpointError(message)
    names = {path.name for path in folder.iterdir()}
    if names and not _calls_itself_checkpoint(target):
        message = (
            f"'{target}' is a folder with other content than an epivi checkpoint ({_listed(names)}). "
            "It is not replaced; choose a path that does not exist yet."
        )
        raise CheckpointError(message)
    if foreign := names - _FILES:
        message = (
            f"The checkpoint '{target}' also holds {_listed(foreign)}, which overwriting would delete. "
            "Move that elsewhere or choose another path."
        )
        raise CheckpointError(message)
    if not overwrite:
        message = f"'{target}' exists already. Pass overwrite=True to replace it, or choose another path."
        raise CheckpointError(message)


def _listed(names: set[str]) -> str:
    shown = ", ".join(f"'{name}'" for name in sorted(names)[:5])
    return f"{shown} and {len(names) - 5} more" if len(names) > 5 else shown


def _dump(content: Any, *, indent: int | None = None) -> bytes:
    return json.dumps(content, indent=indent, allow_nan=False).encode("ascii")


def _storable(tensors: Mapping[str, torch.Tensor | np.ndarray[Any, Any]]) -> dict[str, torch.Tensor]:
    """Return dense CPU tensors that share no memory, under names that safetensors can hold."""
    import torch

    stored: dict[str, torch.Tensor] = {}
    storages: set[int] = set()
    for name, given in tensors.items():
        tensor: Any = given
        if isinstance(given, np.ndarray) and given.dtype.kind in "biufc":
            with contextlib.suppress(TypeError):
                tensor = torch.from_numpy(np.array(given, dtype=given.dtype.newbyteorder("="), order="C"))
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            found = f"{type(given).__name__} ({getattr(given, 'dtype', 'no dtype')})"
            message = f"tensors[{name!r}] is a {found}; a checkpoint holds tensors and numeric arrays by string names."
            raise CheckpointError(message)
        dtype = str(tensor.dtype).removeprefix("torch.")
        if tensor.layout != torch.strided or tensor.device.type == "meta" or dtype not in _DTYPES:
            message = (
                f"tensors[{name!r}] has dtype {dtype}, layout {tensor.layout} and device {tensor.device}, for which "
                "safetensors has no form. Convert it to a dense tensor of a usual dtype."
            )
            raise CheckpointError(message)
        tensor = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
        if (storage := tensor.untyped_storage().data_ptr()) in storages:
            tensor = tensor.clone()
        storages.add(storage)
        stored[_escape(name)] = tensor
    return stored


def _escape(name: str) -> str:
    """Return a name that safetensors takes: its own key, and text that is not Unicode, become hexadecimal."""
    raw = name.encode("utf-8", "surrogatepass")
    taken = name == "__metadata__" or name.startswith("%") or raw.decode("utf-8", "replace") != name
    return f"%{raw.hex()}" if taken else name


def _unescape(name: str) -> str:
    return bytes.fromhex(name[1:]).decode("utf-8", "surrogatepass") if name.startswith("%") else name


def _fill(folder: Path, stored: dict[str, torch.Tensor], text: bytes, kind: str) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    weights, metadata = folder / WEIGHTS, folder / METADATA
    metadata.write_bytes(text)
    try:
        save_file(stored, str(weights))
    except SafetensorError as error:
        raise OSError(str(error)) from error
    # safetensors gives the file to its owner alone
    with contextlib.suppress(OSError):
        weights.chmod(stat.S_IMODE(metadata.stat().st_mode))
    try:
        version = importlib.metadata.version("epivi")
    except importlib.metadata.PackageNotFoundError:
        version = "unknown"
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "epivi_version": version,
        "kind": kind,
        "tensors": list(stored),
        "files": {path.name: {"size": path.stat().st_size, "sha256": _sha256(path)} for path in (weights, metadata)},
    }
    manifest["sha256"] = hashlib.sha256(_dump(manifest, indent=1)).hexdigest()
    (folder / MANIFEST).write_bytes(_dump(manifest, indent=1))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"The checkpoint is damaged: '{path}' {what}. Use another copy, or save the model again.")


def _read_folder(target: Path, kind: str | None) -> Checkpoint:
    """Check every file, then read metadata and tensors."""
    folder = locate(target)
    if folder != target:
        logger.warning("A run was killed while it replaced %s; reading the old checkpoint, %s.", target, folder)
    manifest = _read_manifest(folder)
    if kind is not None and manifest["kind"] != kind:
        message = f"The checkpoint '{folder}' is of kind '{manifest['kind']}'; '{kind}' is needed here. Check the path."
        raise CheckpointError(message)
    names = {path.name for path in folder.iterdir()}
    if foreign := names - _FILES:
        message = (
            f"The checkpoint '{folder}' also holds {_listed(foreign)}, which epivi did not write and does not open. "
            "Move that elsewhere, and read again if you trust the rest."
        )
        raise CheckpointError(message)
    for name, entry in manifest["files"].items():
        _check_file(folder / name, entry["size"], entry["sha256"])
    try:
        metadata = decode(json.loads((folder / METADATA).read_bytes()))
    except (ValueError, RecursionError) as error:
        raise _damaged(folder / METADATA, f"holds no metadata of epivi ({error})") from error
    if not isinstance(metadata, dict):
        raise _damaged(folder / METADATA, f"holds a {type(metadata).__name__} instead of a dict")
    tensors = _read_tensors(folder / WEIGHTS, manifest["tensors"])
    return Checkpoint(tensors, metadata, manifest["kind"], manifest["epivi_version"], manifest["format_version"])


def _read_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest and check its checksum, its version and its form: for ever in this order."""
    path = folder / MANIFEST
    if not folder.exists():
        message = f"There is no checkpoint at '{folder}'. Check the path."
        raise CheckpointError(message)
    if not path.is_file():
        found = _listed({entry.name for entry in folder.iterdir()}) if folder.is_dir() else "a file"
        message = (
            f"'{folder}' is not an epivi checkpoint: no {MANIFEST}, but {found or 'nothing'}, which is not opened."
        )
        raise CheckpointError(message)
    raw = path.read_bytes()
    try:
        manifest = json.loads(raw)
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise _damaged(path, f"does not name the format '{FORMAT}', or this is no epivi checkpoint")
        own = {key: value for key, value in manifest.items() if key != "sha256"}
        digest = hashlib.sha256(_dump(own, indent=1)).hexdigest()
        # the text is compared as a whole, so that not even white space can change
        intact = raw == _dump(own | {"sha256": digest}, indent=1)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"is not JSON ({error})") from error
    if not intact:
        raise _damaged(path, "does not agree with its own checksum")
    version = manifest.get("format_version")
    if type(version) is int and version > FORMAT_VERSION:
        message = (
            f"The checkpoint '{folder}' has format {version} and was written by epivi {manifest.get('epivi_version')}; "
            f"this epivi reads formats up to {FORMAT_VERSION}. Upgrade epivi."
        )
        raise CheckpointError(message)
    if not _is_well_formed(manifest):
        raise _damaged(path, f"has not the form of format {FORMAT_VERSION}")
    return manifest


def _is_well_formed(manifest: dict[str, Any]) -> bool:
    files, names = manifest.get("files"), manifest.get("tensors")
    return (
        set(manifest) == _FIELDS
        and type(manifest["format_version"]) is int
        and manifest["format_version"] >= 1
        and isinstance(manifest["kind"], str)
        and isinstance(manifest["epivi_version"], str)
        and isinstance(names, list)
        and all(isinstance(name, str) for name in names)
        and isinstance(files, dict)
        and set(files) == {WEIGHTS, METADATA}
        and all(isinstance(entry, dict) and set(entry) == {"size", "sha256"} for entry in files.values())
    )


def _check_file(path: Path, size: int, digest: str) -> None:
    if not path.is_file():
        raise _damaged(path, "is not a regular file" if path.exists() else "is missing")
    if (found := path.stat().st_size) != size:
        raise _damaged(path, f"has {found} bytes instead of {size}")
    if _sha256(path) != digest:
        raise _damaged(path, f"does not agree with its checksum in {MANIFEST}")


def _read_tensors(path: Path, names: list[str]) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            if sorted(file.keys()) != sorted(names):
                raise _damaged(path, f"holds other tensors than {MANIFEST} names")
            # cloned: the tensors of the file are views of its pages on disk
            return {_unescape(name): file.get_tensor(name).clone() for name in names}
    except CheckpointError:
        raise
    except (SafetensorError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise _damaged(path, f"is not a file of safetensors ({error})") from error
