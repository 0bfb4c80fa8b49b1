"""Checks of the simulators' arguments: each refusal names the value that was found."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from epivi._errors import ConfigError, nearest

type CellCounts = Sequence[int] | Sequence[Sequence[int]] | np.ndarray


def stream(seed: int, *key: int) -> np.random.Generator:
    """Return the random stream of one part of a simulation.

    Parts have streams of their own, so that changing one part (say the size of a batch) leaves the others as they were.

    Examples
    --------
    >>> bool(stream(0, 1, 2).random() == stream(0, 1, 2).random())
    True
    """
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


def check_integer(name: str, value: object, *, low: int = 0) -> int:
    """Return a whole number of at least ``low``.

    Raises
    ------
    ConfigError
        If the value is no whole number or is smaller than ``low``.
    """
    if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < low:
        message = f"{name}={value!r} is not valid: give a whole number of at least {low}."
        raise ConfigError(message)
    return int(value)


def check_number(name: str, value: object, *, low: float = 0.0, high: float = np.inf) -> float:
    """Return a finite number between ``low`` and ``high``, both included.

    Raises
    ------
    ConfigError
        If the value is no number, is not finite or lies outside.
    """
    is_number = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    number = float(value) if is_number else np.nan  # type: ignore[arg-type]
    if not np.isfinite(number) or not low <= number <= high:
        span = f"of at least {low:g}" if np.isinf(high) else f"between {low:g} and {high:g}"
        message = f"{name}={value!r} is not valid: give a finite number {span}."
        raise ConfigError(message)
    return number


def cell_table(n_cells: CellCounts) -> np.ndarray:
    """Return the numbers of cells as an integer table, batches by types.

    Raises
    ------
    ConfigError
        If the argument is no list, its batches differ in length, an entry is negative or no whole number, or no cell is
        asked for.

    Examples
    --------
    >>> cell_table([10, 20])
    array([[10, 20]])
    """
    if not isinstance(n_cells, Sequence | np.ndarray) or isinstance(n_cells, str) or len(n_cells) == 0:
        message = f"n_cells={n_cells!r} is not valid: give the cells of each type, or one such list a batch."
        raise ConfigError(message)
    nested = [isinstance(entry, Sequence | np.ndarray) for entry in n_cells]
    if any(nested) != all(nested):
        message = f"n_cells={n_cells!r} mixes numbers and lists: give one list of numbers, or one list a batch."
        raise ConfigError(message)
    rows: list[list] = [list(row) for row in n_cells] if all(nested) else [list(n_cells)]  # type: ignore[arg-type]
    lengths = {len(row) for row in rows}
    if len(lengths) > 1 or lengths == {0}:
        message = f"The batches of n_cells have {[len(row) for row in rows]} types: give the same number, 0 if absent."
        raise ConfigError(message)
    table = np.array(
        [[check_integer(f"n_cells[{b}][{t}]", n) for t, n in enumerate(row)] for b, row in enumerate(rows)]
    )
    if table.sum() == 0:
        message = f"n_cells={n_cells!r} asks for no cell: give at least one positive number."
        raise ConfigError(message)
    return table


def per_batch(
    name: str, value: float | Sequence[float], n_batches: int, *, low: float = 0.0, high: float = np.inf
) -> np.ndarray:
    """Return one number a batch from a scalar or a list.

    Raises
    ------
    ConfigError
        If the length of a list is not the number of batches, or an entry is not valid.

    Examples
    --------
    >>> per_batch("rho", 0.4, 2)
    array([0.4, 0.4])
    """
    if not isinstance(value, Sequence | np.ndarray) or isinstance(value, str):
        return np.full(n_batches, check_number(name, value, low=low, high=high))
    if len(value) != n_batches:
        message = f"{name} has {len(value)} entries for {n_batches} batches: give one number, or one a batch."
        raise ConfigError(message)
    return np.array([check_number(f"{name}[{b}]", entry, low=low, high=high) for b, entry in enumerate(value)])


def check_clip(clip: Sequence, n_batches: int, *, allow_empty: bool) -> np.ndarray:
    """Return the limits of the number of fragments, shape (batches, 2).

    Raises
    ------
    ConfigError
        If the argument is no pair (or list of pairs), the limits are reversed or not finite, or the lower one permits
        empty cells and ``allow_empty`` is off.
    """
    nested = isinstance(clip, Sequence | np.ndarray) and len(clip) > 0 and isinstance(clip[0], Sequence | np.ndarray)
    pairs = list(clip) if nested else [clip] * n_batches
    if len(pairs) != n_batches:
        message = f"clip has {len(pairs)} pairs for {n_batches} batches: give one pair (low, high), or one a batch."
        raise ConfigError(message)
    for pair in pairs:
        if not isinstance(pair, Sequence | np.ndarray) or isinstance(pair, str) or len(pair) != 2:
            message = f"clip={clip!r} is not valid: give a pair (low, high), or one a batch."
            raise ConfigError(message)
        low, high = (check_number("clip", entry) for entry in pair)
        if low > high:
            message = f"clip=({low:g}, {high:g}) is reversed: the lower limit comes first."
            raise ConfigError(message)
        if low < 1 and not allow_empty:
            message = (
                f"clip=({low:g}, {high:g}) permits empty cells: raise the lower limit to 1 or set allow_empty=True."
            )
            raise ConfigError(message)
    return np.array(pairs, dtype=float)


def check_keywords(name: str, given: Mapping[str, object], receiver: Callable, taken: Sequence[str] = ()) -> None:
    """Refuse keywords that the receiving function does not know, or that the caller sets itself.

    Raises
    ------
    ConfigError
        If a keyword is unknown or taken.
    """
    known = [key for key in inspect.signature(receiver).parameters if key not in taken]
    for key in given:
        if key in taken:
            message = f"{name} may not hold '{key}': give it as an argument of its own."
            raise ConfigError(message)
        if key not in known:
            message = f"{name} holds the unknown keyword '{key}'. {nearest(key, known)}"
            raise ConfigError(message)


def split_evenly(total: int, shares: np.ndarray) -> np.ndarray:
    """Split a whole number in proportion to shares, by largest remainders.

    Examples
    --------
    >>> split_evenly(10, np.array([1.0, 1.0, 1.0]))
    array([4, 3, 3])
    """
    exact = total * shares / shares.sum()
    parts = np.floor(exact).astype(int)
    order = np.argsort(parts - exact, kind="stable")
    parts[order[: total - parts.sum()]] += 1
    return parts
