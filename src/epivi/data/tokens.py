"""Cells as ragged sets of tokens: hashed limits and samples that depend on the cell alone, padding, ranks.

A token is a stored column of a cell's compressed row. Whatever is drawn for a cell is a function of its name, the
columns, the seed and the number of the draw: never of the order of the columns or of the minibatch.
"""

from __future__ import annotations

import hashlib
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from torch.utils.data import Dataset

from epivi._errors import DataError
from epivi._validate import check_number

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from torch import Tensor

# constants of splitmix64: its step, and the shifts and factors of its finaliser
_STEP = np.uint64(0x9E3779B97F4A7C15)
_FACTOR_1, _FACTOR_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_SHIFT_1, _SHIFT_2, _SHIFT_3 = np.uint64(30), np.uint64(27), np.uint64(31)
_MASK_64 = 2**64 - 1
# numbers that are scrambled at a time, so that they stay in the processor's cache
_BLOCK = 8192


def name_keys(names: Iterable[Any]) -> np.ndarray:
    """Return a key of each cell name, its BLAKE2b digest of 8 bytes: uint64 (n,).

    Examples
    --------
    >>> a, b = name_keys(["cell 1", "cell 2"]), name_keys(["cell 2", "cell 1"])
    >>> bool((a == b[::-1]).all() and a[0] != a[1])
    True
    """
    digests = [hashlib.blake2b(str(name).encode(), digest_size=8).digest() for name in names]
    return np.frombuffer(b"".join(digests), dtype="<u8").astype(np.uint64)


def _mix(x: np.ndarray) -> np.ndarray:
    """Scramble 64-bit numbers in place by the finaliser of splitmix64, which maps no two of them to one."""
    flat = x.reshape(-1)
    for start in range(0, flat.size, _BLOCK):
        part = flat[start : start + _BLOCK]
        part ^= part >> _SHIFT_1
        part *= _FACTOR_1
        part ^= part >> _SHIFT_2
        part *= _FACTOR_2
        part ^= part >> _SHIFT_3
    return x


def _states(keys: np.ndarray, seed: int, draw: int) -> np.ndarray:
    """Return the state of each cell's generator, in the shape of the keys."""
    stream = _mix(np.array([seed & _MASK_64], dtype=np.uint64)) + np.array([draw & _MASK_64], dtype=np.uint64)
    return _mix(keys.astype(np.uint64) ^ _mix(stream))


def _steps(tokens: np.ndarray) -> np.ndarray:
    """Return how far each token lies from the state of a generator."""
    return (tokens.astype(np.uint64) + np.uint64(1)) * _STEP


def token_hash(keys_o: np.ndarray, tokens_o: np.ndarray, *, seed: int, draw: int) -> np.ndarray:
    """Return a hash of (cell, token, seed, draw): uint64 (o,).

    It is the output number ``token`` of a splitmix64 generator (Steele, Lea and Flood 2014) whose state is mixed from
    the cell's key, the seed and the draw. Two tokens of a cell never have one hash, so that no ties occur in a row.

    Parameters
    ----------
    keys_o
        Keys of the cells, see :func:`name_keys`; shapes of keys and tokens are broadcast.
    tokens_o
        Numbers of the tokens.
    seed, draw
        Seed, and number of the draw.

    Examples
    --------
    >>> keys = name_keys(["cell 1", "cell 1", "cell 2"])
    >>> len(set(token_hash(keys, np.array([4, 5, 4]), seed=0, draw=0).tolist()))
    3
    """
    keys_o, tokens_o = np.atleast_1d(keys_o), np.atleast_1d(tokens_o)
    return _mix(np.asarray(_states(keys_o, seed, draw) + _steps(tokens_o)))


def keep_limited(
    indptr: np.ndarray, indices: np.ndarray, keys_b: np.ndarray, limit: int, *, seed: int, draw: int = 0
) -> np.ndarray:
    """Choose at most ``limit`` tokens of each cell, those with the smallest hash: boolean (o,).

    Parameters
    ----------
    indptr, indices
        Compressed rows, shapes (b + 1,) and (o,), each column of a row once, in any order.
    keys_b
        Keys of the cells, see :func:`name_keys`.
    limit
        Most tokens of a cell; all are kept where there are no more.
    seed, draw
        Seed, and number of the draw: other draws choose other tokens.

    Raises
    ------
    ConfigError
        If ``limit`` is not a whole number from 1 on.
    DataError
        If there is not one key for each row.

    Examples
    --------
    >>> keys = name_keys(["a", "b"])
    >>> keep = keep_limited(np.array([0, 4, 6]), np.array([0, 3, 7, 8, 1, 2]), keys, 2, seed=0)
    >>> int(keep[:4].sum()), keep[4:].tolist()
    (2, [True, True])
    """
    check_number(limit, "limit", low=1, integer=True)
    _check_rows(indptr, keys_b)
    keep_o = np.ones(indices.size, dtype=bool)
    states_b = _states(keys_b, seed, draw)
    for row in np.flatnonzero(np.diff(indptr) > limit).tolist():
        part = slice(int(indptr[row]), int(indptr[row + 1]))
        hash_t = _mix(_steps(indices[part]) + states_b[row])
        keep_o[part] = hash_t <= _smallest(hash_t, limit)
    return keep_o


def _smallest(hash_t: np.ndarray, n: int) -> np.ndarray:
    """Return the n-th smallest number."""
    return np.partition(hash_t, n - 1)[n - 1]


def _check_rows(indptr: np.ndarray, keys_b: np.ndarray) -> None:
    """Refuse keys that are not one for each row."""
    if keys_b.size != indptr.size - 1:
        message = f"keys_b has {keys_b.size} keys for {indptr.size - 1} rows: give one for each row of the minibatch."
        raise DataError(message)


def pad_rows(
    indptr: np.ndarray, values_o: np.ndarray, *, fill: float = 0, lead: float | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Pad ragged rows to the longest of them.

    Parameters
    ----------
    indptr, values_o
        Compressed rows, shapes (b + 1,) and (o,).
    fill
        What stands behind the end of a row.
    lead
        Leading entry of every row, such as the number of [CLS]; ``None`` for none.

    Returns
    -------
    The padded rows (b, t), of the type of the values, and the lengths (b,), int64, with the leading entry counted.

    Examples
    --------
    >>> padded_bt, length_b = pad_rows(np.array([0, 2, 2]), np.array([5, 6]), lead=1)
    >>> padded_bt.tolist(), length_b.tolist()
    ([[1, 5, 6], [1, 0, 0]], [3, 1])
    """
    n_b = np.diff(indptr).astype(np.int64)
    shift = int(lead is not None)
    longest = int(n_b.max(initial=0))
    padded_bt = np.full((n_b.size, longest + shift), fill, dtype=values_o.dtype)
    padded_bt[:, shift:][np.arange(longest) < n_b[:, None]] = values_o
    if lead is not None:
        padded_bt[:, 0] = lead
    return padded_bt, n_b + shift


def take(indptr: np.ndarray, keep: np.ndarray, *arrays_o: np.ndarray) -> tuple[np.ndarray, ...]:
    """Restrict ragged rows to the entries of a mask.

    Parameters
    ----------
    indptr
        Ends of the rows, shape (b + 1,).
    keep
        Which entries to keep, shape (o,).
    arrays_o
        Entries, each of shape (o,).

    Returns
    -------
    The new ends of the rows, int64 (b + 1,), and the entries that are kept of each array.

    Examples
    --------
    >>> [part.tolist() for part in take(np.array([0, 2, 3]), np.array([True, False, True]), np.array([7, 8, 9]))]
    [[0, 1, 2], [7, 9]]
    """
    n_kept = np.concatenate([[0], np.cumsum(keep, dtype=np.int64)])
    return n_kept[indptr], *(array_o[keep] for array_o in arrays_o)


def balanced_sample(
    indptr: np.ndarray,
    indices: np.ndarray,
    n_features: int,
    keys_b: np.ndarray,
    limit: int,
    *,
    seed: int,
    draw: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Sample columns of each cell, half of them stored and half not (EpiFoundation, equation 8).

    A cell with n stored columns gets min(limit // 2, n, n_features - n) of either kind, those with the smallest hash.

    Parameters
    ----------
    indptr, indices
        Compressed rows, shapes (b + 1,) and (o,), each column of a row once, in any order.
    n_features
        Number of columns.
    keys_b
        Keys of the cells, see :func:`name_keys`.
    limit
        Most columns of a sample.
    seed, draw
        Seed, and number of the draw.

    Returns
    -------
    The columns of each sample in rising order, int64 (b, g), -1 behind the end, and whether they are stored, boolean
    (b, g). A cell with no stored column, or no other, has none.

    Raises
    ------
    ConfigError
        If ``limit`` or ``n_features`` is not a whole number, from 2 and from 1 on.
    DataError
        If there is not one key for each row, or a column lies beyond ``n_features``.

    Examples
    --------
    >>> keys = name_keys(["a", "b"])
    >>> sample_bg, is_member_bg = balanced_sample(np.array([0, 1, 4]), np.array([2, 0, 1, 3]), 6, keys, 4, seed=0)
    >>> is_member_bg.sum(1).tolist(), (sample_bg >= 0).sum(1).tolist()
    ([1, 2], [2, 4])
    """
    check_number(limit, "limit", low=2, integer=True)
    check_number(n_features, "n_features", low=1, integer=True)
    _check_rows(indptr, keys_b)
    if indices.size and not 0 <= indices.min() <= indices.max() < n_features:
        message = f"Columns {indices.min()} to {indices.max()} are stored; the rows have {n_features} columns."
        raise DataError(message)
    n_stored_b = np.diff(indptr)
    half_b = np.minimum(np.minimum(n_stored_b, n_features - n_stored_b), limit // 2).tolist()
    sample_bg = np.full((len(half_b), 2 * max(half_b, default=0)), -1, dtype=np.int64)
    is_member_bg = np.zeros(sample_bg.shape, dtype=bool)
    steps_g, states_b = _steps(np.arange(n_features)), _states(keys_b, seed, draw)
    for row, half in enumerate(half_b):
        if half:
            stored_t = indices[indptr[row] : indptr[row + 1]]
            is_stored_g = np.zeros(n_features, dtype=bool)
            is_stored_g[stored_t] = True
            hash_g = _mix(steps_g + states_b[row])
            # one bound for each kind
            most_2 = np.stack([_smallest(hash_g[~is_stored_g], half), _smallest(hash_g[stored_t], half)])
            columns = np.flatnonzero(hash_g <= most_2[is_stored_g.view(np.int8)])
            sample_bg[row, : columns.size] = columns
            is_member_bg[row, : columns.size] = is_stored_g[columns]
    return sample_bg, is_member_bg


def rank_levels(indptr: np.ndarray, values_o: np.ndarray, n_bins: int) -> np.ndarray:
    """Return the level of each value among the values of its cell: int64 (o,), from 1 to n_bins - 1.

    The edges of a cell are the quantiles of its values at ``linspace(0, 1, n_bins - 1)``; the level of a value is the
    number of edges that are at most the value (EpiFoundation, section 3.4). Levels are ranks within a cell; values that
    are not stored have level 0.

    Parameters
    ----------
    indptr, values_o
        Compressed rows, shapes (b + 1,) and (o,), finite and without stored zeros.
    n_bins
        Number of levels, 0 included.

    Raises
    ------
    ConfigError
        If ``n_bins`` is not a whole number from 2 on.

    Examples
    --------
    >>> rank_levels(np.array([0, 4, 5]), np.array([0.5, 2.0, 1.0, 2.0, 7.0]), 4).tolist()
    [1, 3, 1, 3, 3]
    """
    check_number(n_bins, "n_bins", low=2, integer=True)
    q = np.linspace(0, 1, n_bins - 1)
    levels_o = np.empty(values_o.size, dtype=np.int64)
    # ends of rows that are not empty, once each
    for start, stop in pairwise(np.unique(indptr).tolist()):
        values_t = values_o[start:stop]
        levels_o[start:stop] = np.searchsorted(_quantiles(np.sort(values_t), q), values_t, side="right")
    return levels_o


def _quantiles(sorted_t: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Return quantiles of sorted numbers, to the last bit as :func:`numpy.quantile` rounds them, in less time."""
    last = sorted_t.size - 1
    place = last * q
    low = np.floor(place)
    weight = place - low
    index = low.astype(np.intp)
    below, above = sorted_t[index], sorted_t[np.minimum(index + 1, last)]
    step = above - below
    return np.where(weight >= 0.5, above - step * (1 - weight), below + step * weight)


class Drawn(NamedTuple):
    """What a sampler of tokens yields.

    Attributes
    ----------
    rows
        Row numbers of the minibatch.
    draw
        Number of the draw, such as the epoch.
    """

    rows: np.ndarray
    draw: int


class TokenDataset(Dataset):
    """Minibatches of tokens: what a source reads is encoded with the number of the draw.

    Parameters
    ----------
    source
        Gives the batch of row numbers, such as :class:`epivi.data.sparse.BatchDataset`.
    encode
        Turns a batch and the number of the draw into the batch that the model reads.

    Examples
    --------
    >>> data = TokenDataset(np.arange(10, 20), lambda rows, draw: (rows.tolist(), draw))
    >>> data[Drawn(np.array([3, 1]), 7)], data[np.array([2])]
    (([13, 11], 7), ([12], 0))
    """

    def __init__(self, source: Any, encode: Callable[[Any, int], dict[str, Tensor]]) -> None:
        self.source = source
        self.encode = encode

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: Drawn | Sequence[int] | np.ndarray) -> dict[str, Tensor]:
        """Return the encoded minibatch; plain rows are draw 0."""
        rows, draw = index if isinstance(index, Drawn) else (index, 0)
        return self.encode(self.source[rows], draw)
