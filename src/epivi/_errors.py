"""Every exception that epivi raises, and the one gate for optional dependencies.

A message says what was found, where (key, row, file and line) and what to do.
"""

from __future__ import annotations

import difflib
import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable
    from types import ModuleType


class EpiviError(Exception):
    """Base class of all errors raised on purpose by epivi."""


class DataError(EpiviError, ValueError):
    """The user's data cannot be used as they are."""


class ConfigError(EpiviError, ValueError):
    """An argument, an option or a combination of options is not valid."""


class CheckpointError(EpiviError, ValueError):
    """A saved model or training state is missing, damaged or does not fit."""


class TrainingError(EpiviError, RuntimeError):
    """Training was stopped because it could not go on, for example on a loss that is not finite."""


class MissingDependencyError(EpiviError, ImportError):
    """An optional dependency is needed and is not installed."""


def require(name: str, extra: str) -> ModuleType:
    """Import an optional dependency or say how to install it.

    Parameters
    ----------
    name
        Name of the module, as in ``import name``.
    extra
        The extra of epivi that installs it.

    Returns
    -------
    The imported module.

    Raises
    ------
    MissingDependencyError
        If the module cannot be imported.

    Examples
    --------
    >>> require("math", "none").sqrt(4.0)
    2.0
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        message = (
            f"The module '{name}' is needed here and is not installed. Install it with: pip install 'epivi[{extra}]'."
        )
        raise MissingDependencyError(message) from error


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return the end of an error message: the nearest valid name, or all of them.

    Examples
    --------
    >>> nearest("bacth", ["batch", "depth"])
    "Did you mean 'batch'?"
    >>> nearest("zzz", ["batch", "depth"])
    "Valid are: 'batch', 'depth'."
    """
    valid = [str(entry) for entry in valid]
    if match := difflib.get_close_matches(str(name), valid, n=1):
        return f"Did you mean '{match[0]}'?"
    if not valid:
        return "There are none."
    shown = ", ".join(f"'{entry}'" for entry in valid[:10])
    more = f" and {len(valid) - 10} more" if len(valid) > 10 else ""
    return f"Valid are: {shown}{more}."
