"""Python values to JSON and back, exactly, with a fixed table of types and no code in the data.

What JSON has no form for becomes an object with the key ``__epivi__`` that names one entry of the table below. Reading
looks the name up in the table and nowhere else, so that a hostile file can build plain values only.
"""

from __future__ import annotations

import base64
import math
import re
import sys
from collections import Counter, OrderedDict
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from epivi._errors import CheckpointError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import pandas as pd
    import torch

_TAG: Final = "__epivi__"
# what is written anywhere can be read anywhere: far below Python's limit of recursion
_MAX_DEPTH: Final = 100
_DTYPE: Final = re.compile(r"[<>|]([biufcS][1-9]\d{0,8}|[mM]8\[\d{0,9}[a-zA-Z]{1,2}\])")
_UNICODE_DTYPE: Final = re.compile(r"[<>|]U\d{1,8}")
_PANDAS_DTYPES: Final = frozenset(
    ["str", "string", "boolean", "Float32", "Float64"]
    + [f"{sign}Int{bits}" for sign in ("", "U") for bits in (8, 16, 32, 64)]
)


def encode(obj: Any, *, name: str = "metadata") -> Any:
    """Turn a nested value into what JSON can hold, so that `decode` gives back the same value and the same types.

    Parameters
    ----------
    obj
        None, bool, int, float (also nan and infinities), complex, str, bytes, Path, list, tuple, set, frozenset, dict,
        OrderedDict and Counter with keys of any of these types, numpy scalars and arrays (numbers, dates, strings,
        objects of this list), pandas Index and DataFrame with simple columns.
    name
        What the value is called in an error message.

    Returns
    -------
    Lists, dicts with string keys, strings, finite numbers, bools and None.

    Raises
    ------
    CheckpointError
        If a value has another type (subclasses are other types), or if the nesting is deeper than 100 levels.

    Examples
    --------
    >>> encode({"a": (1, 2.5)})
    {'a': {'__epivi__': 'tuple', 'value': [1, 2.5]}}
    """
    return _Encoder(None)(obj, name)


def decode(obj: Any) -> Any:
    """Turn the result of `encode` back into the value that it was made from.

    Parameters
    ----------
    obj
        What `encode` returned, possibly written to JSON and read again. May come from an untrusted file: only the types
        named at `encode` are ever built.

    Returns
    -------
    The value. Arrays own their memory and can be written to.

    Raises
    ------
    CheckpointError
        If `obj` was not made by `encode`: an unknown tag, a broken array, a key that cannot be hashed, endless nesting.

    Examples
    --------
    >>> decode(encode({1: {"x", "y"}})) == {1: {"x", "y"}}
    True
    """
    return _decoded(obj, None)


def flatten_state(state: Any) -> tuple[dict[str, torch.Tensor], Any]:
    """Split a nested state, for example of an optimizer, into its tensors and a JSON skeleton of the rest.

    Parameters
    ----------
    state
        Nested dicts, lists and other values known to `encode`, with tensors anywhere in it.

    Returns
    -------
    The tensors by their place in `state` (the objects themselves, not copies; one that occurs twice is listed once),
    and the skeleton that `unflatten_state` fills again.

    Raises
    ------
    CheckpointError
        If a value is neither a tensor nor known to `encode`.

    Examples
    --------
    >>> import torch
    >>> tensors, skeleton = flatten_state({"step": {0: torch.tensor(3.0)}, "lr": 0.1})
    >>> list(tensors)
    ["state['step'][0]"]
    >>> unflatten_state(tensors, skeleton)
    {'step': {0: tensor(3.)}, 'lr': 0.1}
    """
    tensors: dict[str, torch.Tensor] = {}
    return tensors, _Encoder(tensors)(state, "state")


def unflatten_state(tensors: Mapping[str, torch.Tensor], skeleton: Any) -> Any:
    """Put the tensors of `flatten_state` back into their skeleton.

    Parameters
    ----------
    tensors
        Tensors by the names that `flatten_state` gave; others are ignored.
    skeleton
        What `flatten_state` returned beside the tensors.

    Returns
    -------
    The nested state, with the very tensors of `tensors` in it.

    Raises
    ------
    CheckpointError
        If a tensor is missing or the skeleton was not made by `flatten_state`.

    Examples
    --------
    >>> unflatten_state(*flatten_state([1, (2, 3)]))
    [1, (2, 3)]
    """
    return _decoded(skeleton, tensors)


def _decoded(obj: Any, tensors: Mapping[str, torch.Tensor] | None) -> Any:
    try:
        return _Decoder(tensors)(obj)
    except CheckpointError:
        raise
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError, RecursionError, MemoryError) as error:
        message = (
            f"The stored value cannot be decoded ({type(error).__name__}: {error}). "
            "It was not written by epivi or was changed since; use another copy of the file."
        )
        raise CheckpointError(message) from error


def _tagged(tag: str, value: Any, **more: Any) -> dict[str, Any]:
    return {_TAG: tag, "value": value, **more}


def _expect(fine: object, what: str) -> None:
    if not fine:
        raise ValueError(what)


def _is_plain(text: str) -> bool:
    """Return whether a string survives JSON; lone halves of surrogate pairs do not."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


class _Encoder:
    """The way to JSON; `tensors` collects the tensors, None refuses them."""

    def __init__(self, tensors: dict[str, torch.Tensor] | None) -> None:
        self.tensors = tensors
        self._names: dict[int, str] = {}
        self._depth = 0

    def __call__(self, obj: Any, path: str) -> Any:
        if obj is None or obj is True or obj is False:
            return obj
        if self._depth == _MAX_DEPTH:
            message = f"{path[:80]}...: more than {_MAX_DEPTH} levels deep, or containing itself. Flatten the value."
            raise CheckpointError(message)
        self._depth += 1
        result = self._encode(obj, path)
        self._depth -= 1
        return result

    def _encode(self, obj: Any, path: str) -> Any:
        if (encoder := _ENCODERS.get(type(obj))) is not None:
            return encoder(self, obj, path)
        if isinstance(obj, np.generic):
            return self._array(np.asarray(obj), path, tag="scalar")
        if isinstance(obj, PurePath):
            return _tagged("Path", self._str(str(obj), path))
        if (torch := sys.modules.get("torch")) is not None and isinstance(obj, torch.Tensor):
            return self._tensor(obj, path)
        if (pandas := sys.modules.get("pandas")) is not None:
            if type(obj) is pandas.DataFrame:
                return self._frame(obj, path)
            if type(obj) in (pandas.Index, pandas.RangeIndex):
                return self._index(obj, path)
        what = f"type {type(obj).__module__}.{type(obj).__qualname__}".replace("builtins.", "")
        raise self._refusal(path, what)

    @staticmethod
    def _refusal(path: str, what: str) -> CheckpointError:
        message = (
            f"{path}: {what} cannot be stored in a checkpoint. "
            "Use plain Python values, numpy arrays or DataFrames of simple columns."
        )
        return CheckpointError(message)

    def _str(self, obj: str, _path: str) -> Any:
        return obj if _is_plain(obj) else _tagged("str", obj.encode("utf-8", "surrogatepass").hex())

    def _int(self, obj: int, _path: str) -> Any:
        # hexadecimal beyond 64 bits: Python limits the digits of decimal ones that it parses
        return obj if -(2**63) <= obj < 2**63 else _tagged("int", hex(obj))

    def _float(self, obj: float, _path: str) -> Any:
        return obj if math.isfinite(obj) else _tagged("float", repr(obj))

    def _complex(self, obj: complex, path: str) -> Any:
        return _tagged("complex", [self._float(obj.real, path), self._float(obj.imag, path)])

    def _bytes(self, obj: bytes, _path: str) -> Any:
        return _tagged("bytes", base64.b64encode(obj).decode())

    def _list(self, obj: Any, path: str) -> list[Any]:
        return [self(entry, f"{path}[{i}]") for i, entry in enumerate(obj)]

    def _tuple(self, obj: tuple[Any, ...], path: str) -> Any:
        return _tagged("tuple", self._list(obj, path))

    def _set(self, obj: Any, path: str) -> Any:
        # sorted, so that equal sets make equal files whatever the seed of Python's hashes
        entries = sorted((self(entry, f"{path}{{{entry!r}}}") for entry in obj), key=repr)
        return _tagged(type(obj).__name__, entries)

    def _dict(self, obj: dict[Any, Any], path: str) -> Any:
        if type(obj) is dict and _TAG not in obj and all(type(key) is str and _is_plain(key) for key in obj):
            return {key: self(value, f"{path}[{key!r}]") for key, value in obj.items()}
        pairs = [[self(key, f"{path}: key {key!r}"), self(value, f"{path}[{key!r}]")] for key, value in obj.items()]
        return _tagged(type(obj).__name__, pairs)

    def _array(self, obj: np.ndarray[Any, Any], path: str, *, tag: str = "array") -> Any:
        code, flat = obj.dtype.str, obj.reshape(-1)
        value: Any
        if _DTYPE.fullmatch(code):
            value = base64.b64encode(flat.tobytes()).decode()
        elif obj.dtype.kind in "OU" or obj.dtype == np.dtypes.StringDType():
            code = "T" if obj.dtype.kind == "T" else code
            value = flat.tolist()
            if not all(type(entry) is str and _is_plain(entry) for entry in value):
                value = self._list(value, path)
        else:
            raise self._refusal(path, f"a numpy array or scalar of dtype {obj.dtype}")
        return _tagged(tag, value, dtype=code, shape=list(obj.shape))

    def _column(self, obj: pd.Series | pd.Index, path: str) -> Any:
        dtype = obj.dtype
        if isinstance(dtype, np.dtype):
            return self._array(obj.to_numpy(), path)
        if str(dtype) in _PANDAS_DTYPES:
            missing = obj.isna()
            entries = [None if empty else entry for entry, empty in zip(obj.astype(object), missing, strict=True)]
            return _tagged("column", self._list(entries, path), dtype=str(dtype))
        raise self._refusal(path, f"a pandas column of dtype {dtype}")

    def _index(self, obj: pd.Index, path: str) -> Any:
        name = self(obj.name, f"{path}.name")
        if type(obj).__name__ == "RangeIndex":
            return _tagged("RangeIndex", [obj.start, obj.stop, obj.step], name=name)  # type: ignore[attr-defined]
        return _tagged("Index", self._column(obj, path), name=name)

    def _frame(self, obj: pd.DataFrame, path: str) -> Any:
        columns = [self._column(obj.iloc[:, i], f"{path}[{name!r}]") for i, name in enumerate(obj.columns)]
        return _tagged(
            "DataFrame", columns, index=self(obj.index, f"{path}.index"), columns=self(obj.columns, f"{path}.columns")
        )

    def _tensor(self, obj: torch.Tensor, path: str) -> Any:
        if self.tensors is None:
            message = f"{path}: a tensor cannot be stored in JSON. Store it among the tensors, or use flatten_state."
            raise CheckpointError(message)
        if (name := self._names.get(id(obj))) is None:
            name = path
            while name in self.tensors:
                name += "'"
            self._names[id(obj)] = name
            self.tensors[name] = obj
        return _tagged("tensor", self._str(name, path))


_ENCODERS: Final[dict[type, Callable[[_Encoder, Any, str], Any]]] = {
    int: _Encoder._int,
    float: _Encoder._float,
    complex: _Encoder._complex,
    str: _Encoder._str,
    bytes: _Encoder._bytes,
    list: _Encoder._list,
    tuple: _Encoder._tuple,
    set: _Encoder._set,
    frozenset: _Encoder._set,
    dict: _Encoder._dict,
    OrderedDict: _Encoder._dict,
    Counter: _Encoder._dict,
    np.ndarray: _Encoder._array,
}


class _Decoder:
    """The way back from JSON; `tensors` fills the places of the tensors."""

    def __init__(self, tensors: Mapping[str, torch.Tensor] | None) -> None:
        self.tensors = tensors

    def __call__(self, obj: Any) -> Any:
        if isinstance(obj, list):
            return [self(entry) for entry in obj]
        if not isinstance(obj, dict):
            return obj
        if _TAG not in obj:
            return {key: self(value) for key, value in obj.items()}
        tag = obj[_TAG]
        if not isinstance(tag, str) or tag not in _DECODERS:
            message = f"The stored type {tag!r:.80} is unknown: written by a newer epivi (upgrade), or not by epivi."
            raise CheckpointError(message)
        return _DECODERS[tag](self, obj)

    def _pairs(self, obj: dict[str, Any]) -> dict[Any, Any]:
        return {self(key): self(value) for key, value in obj["value"]}

    def _array(self, obj: dict[str, Any]) -> np.ndarray[Any, Any]:
        code, shape, value = obj["dtype"], tuple(obj["shape"]), obj["value"]
        _expect(all(type(extent) is int and extent >= 0 for extent in shape), f"shape {shape!r:.80}")
        if _DTYPE.fullmatch(code):
            raw, dtype = base64.b64decode(value, validate=True), np.dtype(code)
            length = len(raw) / dtype.itemsize
        else:
            _expect(code in ("|O", "T") or _UNICODE_DTYPE.fullmatch(code), f"dtype {code!r:.80}")
            raw, dtype = b"", np.dtypes.StringDType() if code == "T" else np.dtype(code)
            value = self(value)
            length = len(value)
        _expect(length == math.prod(shape), f"{length} entries for an array of shape {shape!r:.80}")
        if raw:
            return np.frombuffer(raw, dtype).reshape(shape).copy()
        array = np.empty(shape, dtype)
        flat = array.reshape(-1)
        # one by one: numpy would take a list of lists for more dimensions
        for i, entry in enumerate(value if array.size else ()):
            fits = code in ("|O", "T") or len(entry) * 4 <= dtype.itemsize
            _expect(code == "|O" or (type(entry) is str and fits), f"{entry!r:.80} in an array of dtype {dtype}")
            flat[i] = entry
        return array

    def _scalar(self, obj: dict[str, Any]) -> Any:
        array = self._array(obj)
        _expect(
            array.shape == () and array.dtype.kind not in "OT", f"a scalar of dtype {array.dtype} and {array.shape}"
        )
        return array[()]

    def _column(self, obj: dict[str, Any]) -> Any:
        """Read what a column or an index holds: a numpy or a pandas array."""
        if obj[_TAG] == "array":
            return self._array(obj)
        import pandas as pd

        _expect(obj[_TAG] == "column" and obj["dtype"] in _PANDAS_DTYPES, f"a column of type {obj[_TAG]!r:.80}")
        return pd.array(self(obj["value"]), dtype=obj["dtype"])

    def _index(self, obj: dict[str, Any]) -> Any:
        import pandas as pd

        name = self(obj["name"])
        if obj[_TAG] == "RangeIndex":
            start, stop, step = obj["value"]
            return pd.RangeIndex(start, stop, step, name=name)
        values = self._column(obj["value"])
        # the dtype is given, or pandas would infer another one for objects
        return pd.Index(values, dtype=values.dtype, name=name)

    def _frame(self, obj: dict[str, Any]) -> Any:
        import pandas as pd

        index, names = self._index(obj["index"]), self._index(obj["columns"])
        columns = [self._column(column) for column in obj["value"]]
        _expect(all(column.ndim == 1 for column in columns), "a column that is not one-dimensional")
        frame = pd.DataFrame(
            {i: pd.Series(column, index=index, dtype=column.dtype) for i, column in enumerate(columns)}, index=index
        )
        frame.columns = names
        return frame

    def _tensor(self, obj: dict[str, Any]) -> Any:
        name = self(obj["value"])
        if self.tensors is None or name not in self.tensors:
            message = f"The state needs the tensor {name!r:.200}, which is missing. Use another copy of the file."
            raise CheckpointError(message)
        return self.tensors[name]


_DECODERS: Final[dict[str, Callable[[_Decoder, dict[str, Any]], Any]]] = {
    "str": lambda _, obj: bytes.fromhex(obj["value"]).decode("utf-8", "surrogatepass"),
    "int": lambda _, obj: int(obj["value"], 16),
    "float": lambda _, obj: {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}[obj["value"]],
    "complex": lambda self, obj: complex(*self(obj["value"])),
    "bytes": lambda _, obj: base64.b64decode(obj["value"], validate=True),
    "Path": lambda self, obj: Path(self(obj["value"])),
    "tuple": lambda self, obj: tuple(self(obj["value"])),
    "set": lambda self, obj: set(self(obj["value"])),
    "frozenset": lambda self, obj: frozenset(self(obj["value"])),
    "dict": _Decoder._pairs,
    "OrderedDict": lambda self, obj: OrderedDict(self._pairs(obj)),
    "Counter": lambda self, obj: Counter(self._pairs(obj)),
    "array": _Decoder._array,
    "scalar": _Decoder._scalar,
    "Index": _Decoder._index,
    "RangeIndex": _Decoder._index,
    "DataFrame": _Decoder._frame,
    "tensor": _Decoder._tensor,
}
