"""Files of the command line: what is read, and what is written whole or not at all."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from epivi._errors import ConfigError, DataError
from epivi._keys import MOD_ATAC, MOD_RNA

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from mudata import MuData


def read(path: Path) -> Any:
    """Read an .h5ad or .h5mu file.

    Parameters
    ----------
    path
        The file.

    Raises
    ------
    DataError
        If the file is missing, has another ending, or cannot be read.
    """
    if not path.is_file():
        message = f"{path} does not exist or is no file."
        raise DataError(message)
    if path.suffix not in (".h5ad", ".h5mu"):
        message = f"{path}: the ending must be .h5ad or .h5mu."
        raise DataError(message)
    import anndata
    import mudata

    try:
        return anndata.read_h5ad(path) if path.suffix == ".h5ad" else mudata.read_h5mu(path)
    except Exception as error:
        message = f"{path} cannot be read: {type(error).__name__}: {error}"
        raise DataError(message) from error


def modality(mdata: MuData, wanted: str | None, usual: str, flag: str) -> str:
    """Return a modality by its name, its usual name, or as the only one that is left.

    Parameters
    ----------
    mdata
        MuData.
    wanted
        Name that the user gave; ``None`` if there is none.
    usual
        Usual name.
    flag
        Option of the command line that names it.

    Raises
    ------
    ConfigError
        If there is no such modality, or several are left.

    Examples
    --------
    >>> from types import SimpleNamespace
    >>> modality(SimpleNamespace(mod={"peaks": None, "rna": None}), None, "atac", "--atac")
    'peaks'
    """
    if wanted is not None:
        if wanted not in mdata.mod:
            message = f"{flag} {wanted}: the file has the modalities {sorted(mdata.mod)}."
            raise ConfigError(message)
        return wanted
    if usual in mdata.mod:
        return usual
    others = [name for name in mdata.mod if name not in (MOD_ATAC, MOD_RNA)]
    if len(others) != 1:
        message = f"The file has the modalities {sorted(mdata.mod)}: name one with {flag}."
        raise ConfigError(message)
    return others[0]


def replace(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file beside its place, then move it there: it is whole, or as it was.

    Parameters
    ----------
    path
        The file.
    write
        Writes the path that it is given.

    Examples
    --------
    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "a.txt"
    >>> replace(path, lambda partial: partial.write_text("x"))
    >>> path.read_text()
    'x'
    """
    partial = path.with_name(f".partial-{path.name}")
    try:
        write(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
