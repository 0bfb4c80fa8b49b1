"""The one gate for predicted distributions: numbers that are finite, in range and of shapes that fit."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from epivi._errors import DataError

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray


def as_numbers(
    values: ArrayLike, name: str, *, low: float = -np.inf, high: float = np.inf, above: bool = False
) -> NDArray[np.float64]:
    """Return an array in double precision, refused unless finite and inside [low, high], or above `low`.

    Raises
    ------
    DataError
        If it cannot be read as numbers, or a value is NaN, infinite or out of range; the message gives the first.

    Examples
    --------
    >>> as_numbers([1, 2], "mean", low=0)
    array([1., 2.])
    """
    try:
        array = np.asarray(values, dtype=np.float64)
    except (TypeError, ValueError) as error:
        message = f"{name} cannot be read as numbers: {error}."
        raise DataError(message) from error
    # written so that NaN is outside
    good = np.isfinite(array) & (array > low if above else array >= low) & (array <= high)
    if not good.all():
        at = tuple(int(i) for i in np.argwhere(~good)[0])
        span = (
            f"between {low:g} and {high:g}" if np.isfinite(high) else f"{'above' if above else 'of at least'} {low:g}"
        )
        wanted = f"finite numbers {span}" if np.isfinite(low) else "finite numbers"
        where = f" at {at if len(at) > 1 else at[0]}" if at else ""
        message = (
            f"{name} holds {int((~good).sum())} values that are not {wanted}, the first is {array[at]:g}{where}. "
            "Leave out what is not available, or repair the values."
        )
        raise DataError(message)
    return array


def as_counts(values: ArrayLike, name: str = "counts") -> NDArray[np.float64]:
    """Return counts in double precision, refused unless whole, finite and not negative.

    Raises
    ------
    DataError
        If a value is none of a count.

    Examples
    --------
    >>> as_counts([0, 3])
    array([0., 3.])
    """
    array = as_numbers(values, name, low=0)
    if (fraction := array != np.floor(array)).any():
        message = (
            f"{name} holds {int(fraction.sum())} values that are not whole numbers, the first is "
            f"{array[fraction].flat[0]:g}. Give raw counts."
        )
        raise DataError(message)
    return array


def together(**arrays: NDArray[np.float64]) -> list[NDArray[np.float64]]:
    """Return arrays in their common shape.

    Raises
    ------
    DataError
        If they have none; the message gives all shapes.

    Examples
    --------
    >>> import numpy as np
    >>> [array.shape for array in together(mean=np.ones((2, 1)), variance=np.ones(3))]
    [(2, 3), (2, 3)]
    """
    try:
        return list(np.broadcast_arrays(*arrays.values()))
    except ValueError as error:
        shapes = ", ".join(f"{name} {array.shape}" for name, array in arrays.items())
        message = f"Shapes do not fit together: {shapes}. Give one shape, or shapes that broadcast."
        raise DataError(message) from error
