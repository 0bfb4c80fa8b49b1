from __future__ import annotations

import contextlib
import json
import math
from collections import Counter, OrderedDict
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from epivi._errors import CheckpointError
from epivi.train.checkpoint import decode, encode, flatten_state, read_checkpoint, unflatten_state, write_checkpoint

relaxed = settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))


def same(a, b):
    """Equal in value, type, dtype and bits."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        raw_a, raw_b = (x.detach().contiguous().reshape(-1).view(torch.uint8) for x in (a, b))
        return a.dtype == b.dtype and a.shape == b.shape and torch.equal(raw_a, raw_b)
    if isinstance(a, np.ndarray):
        if a.dtype != b.dtype or a.shape != b.shape:
            return False
        return same(a.reshape(-1).tolist(), b.reshape(-1).tolist()) if a.dtype.hasobject else a.tobytes() == b.tobytes()
    if isinstance(a, np.generic):
        return a.dtype == b.dtype and a.tobytes() == b.tobytes()
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return same(list(a), list(b)) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, float):
        return (math.isnan(a) and math.isnan(b)) or (a == b and math.copysign(1, a) == math.copysign(1, b))
    return a == b


def through_json(value):
    return decode(json.loads(json.dumps(encode(value), allow_nan=False)))


# ---- values ------------------------------------------------------------------------------------------------
arrays = hnp.arrays(
    st.one_of(hnp.scalar_dtypes(), hnp.unicode_string_dtypes(), hnp.byte_string_dtypes()).filter(
        lambda dtype: dtype.str not in ("<m8", ">m8", "<M8", ">M8")
    ),
    hnp.array_shapes(min_dims=0, min_side=0, max_side=3),
)
keys = st.one_of(st.text(), st.integers(), st.booleans(), st.none(), st.tuples(st.integers(), st.text()), st.binary())
leaves = st.one_of(keys, st.floats(), st.complex_numbers(allow_nan=False), st.text(st.characters()), arrays)
values = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(keys, inner, max_size=4),
        st.dictionaries(keys, inner, max_size=4).map(OrderedDict),
        st.sets(keys, max_size=4),
        st.frozensets(keys, max_size=4),
    ),
    max_leaves=12,
)


@relaxed
@given(values)
def test_values_survive_json_exactly(value):
    assert same(through_json(value), value)


@pytest.mark.parametrize(
    "value",
    [
        -0.0,
        2**4000,
        -(2**63),
        float("-inf"),
        "\ud800 half",
        "\ud83d\ude00",
        {"__epivi__": "tuple", "value": [1]},
        {1: "a", "1": "b", True + 1: "c"},
        Counter({3: 2}),
        Path("/a/b c"),
        np.float32("nan"),
        np.str_("x"),
        np.bool_(True),
        np.datetime64("2020-01-02"),
        np.array(["chr1", "chrX"]),
        np.array(["a", None, float("nan"), 3, [1, 2]], dtype=object),
        np.array([["a", "b"], ["c", "\ud800"]], dtype=object),
        np.empty((0, 3), dtype=object),
        np.array(["x", "yy"], dtype=np.dtypes.StringDType()),
        np.arange(6, dtype=">i4").reshape(2, 3).T,
        np.random.default_rng(1).bit_generator.state,
        np.random.RandomState(1).get_state(legacy=False),
    ],
    ids=lambda value: str(type(value).__name__),
)
def test_extreme_values_survive(value):
    assert same(through_json(value), value)


@pytest.mark.parametrize(
    "frame",
    [
        pd.DataFrame({"loss": [1.5, float("nan")]}, index=pd.RangeIndex(2, name="epoch")),
        pd.DataFrame({"a": [1, 2], 3: ["x", None]}, index=pd.Index([10, 4], name=("n", 1))),
        pd.DataFrame({"o": np.array(["x", 1], dtype=object), "b": [True, False]}, index=["r1", "r2"]),
        pd.DataFrame({"i": pd.array([1, None], dtype="Int8"), "s": pd.array(["x", None], dtype="string")}),
        pd.DataFrame({"t": np.array(["2020-01-01", "NaT"], dtype="M8[ns]"), "f": np.float32([0.1, np.inf])}),
        pd.DataFrame(np.eye(2), columns=["twice", "twice"]),
        pd.DataFrame(index=pd.Index(["a"], dtype=object, name="only index")),
        pd.DataFrame({"empty": np.zeros(0, np.int16)}),
    ],
    ids=range(8),
)
def test_frames_survive(frame):
    pd.testing.assert_frame_equal(
        through_json({"h": frame})["h"], frame, check_exact=True, check_index_type="exact", check_column_type="exact"
    )


def test_equal_sets_make_equal_json():
    assert encode({f"x{i}" for i in range(50)}) == encode({f"x{i}" for i in reversed(range(50))})


class Odd:
    pass


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": [0, 1, 2, Odd()]}, r"metadata\['a'\]\[3\]: type .*Odd cannot be stored"),
        ({"f": print}, r"metadata\['f'\]: type builtin_function_or_method"),
        ({"t": torch.ones(1)}, r"metadata\['t'\]: a tensor cannot be stored in JSON.*flatten_state"),
        ({"m": np.ma.array([1])}, r"metadata\['m'\]: type numpy.ma.*MaskedArray"),
        ({"v": np.zeros(1, dtype=[("x", "i4")])}, r"metadata\['v'\]: a numpy array or scalar of dtype"),
        (
            {"d": pd.DataFrame({"c": pd.Categorical(["x"])})},
            r"metadata\['d'\]\['c'\]: a pandas column of dtype category",
        ),
        ({"s": pd.Series([1])}, r"metadata\['s'\]: type pandas.*Series"),
    ],
    ids=range(7),
)
def test_unknown_types_are_named(value, message):
    with pytest.raises(CheckpointError, match=message):
        encode(value)


def test_endless_values_are_refused():
    loop: list = []
    loop.append(loop)
    with pytest.raises(CheckpointError, match="more than 100 levels deep"):
        encode(loop)
    deep = json.loads("[" * 900 + "]" * 900)
    with contextlib.suppress(CheckpointError):
        decode(deep)


TAGS = [
    "str",
    "int",
    "float",
    "complex",
    "bytes",
    "Path",
    "tuple",
    "set",
    "dict",
    "Counter",
    "array",
    "scalar",
    "Index",
]
TAGS += [
    "frozenset",
    "OrderedDict",
    "RangeIndex",
    "DataFrame",
    "tensor",
    "column",
    "object",
    "builtins.eval",
    "__class__",
]
json_leaves = st.one_of(
    st.none(),
    st.integers(-3, 3),
    st.floats(),
    st.sampled_from(["", "YQ==", "zz", "0x1", "nan", "<f8", "|O", "<U9", "T"]),
)
hostile = st.recursive(
    json_leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.fixed_dictionaries(
            {"__epivi__": st.sampled_from(TAGS) | inner, "value": inner},
            optional=dict.fromkeys(("dtype", "shape", "name", "index", "columns"), inner),
        ),
    ),
    max_leaves=15,
)


@settings(relaxed, max_examples=300)
@given(hostile)
def test_decode_of_anything_is_a_value_or_a_clear_error(value):
    try:
        decode(value)
    except CheckpointError as error:
        assert "epivi" in str(error) or "missing" in str(error)  # noqa: PT017


def broken_array(**changes):
    return encode(np.arange(4.0)) | changes


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"__epivi__": "os.system", "value": "true"}, "stored type 'os.system' is unknown"),
        ({"__epivi__": "tuple"}, "cannot be decoded"),
        ({"__epivi__": "set", "value": [[1]]}, "unhashable"),
        (broken_array(shape=[5]), "4.0 entries for an array of shape"),
        (broken_array(shape=[-2, -2]), "shape"),
        (broken_array(dtype="|O"), "entries"),
        (broken_array(dtype="|V8"), "dtype"),
        (broken_array(dtype="<U1", value=["a", "bb", "c", "d"]), "'bb' in an array of dtype"),
        ({"__epivi__": "tensor", "value": "w"}, "needs the tensor 'w', which is missing"),
    ],
    ids=range(9),
)
def test_broken_values_say_what_is_wrong(value, message):
    with pytest.raises(CheckpointError, match=message):
        decode(value)


# ---- nested states -----------------------------------------------------------------------------------------
def train(model, optimizer, n_steps, seed):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(n_steps):
        x_bd = torch.randn(8, 5, generator=generator)
        optimizer.zero_grad()
        (model(x_bd) ** 2).mean().backward()
        optimizer.step()


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.Adam(p, lr=0.1, amsgrad=True),
        lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
        lambda p: torch.optim.Adam(p, lr=torch.tensor(0.1), foreach=False),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    ],
    ids=["adam", "fused_adamw", "tensor_lr", "sgd"],
)
def test_training_goes_on_bitwise_from_a_stored_optimizer(tmp_path, make):
    torch.manual_seed(0)
    model = torch.nn.Linear(5, 3)
    optimizer = make(model.parameters())
    train(model, optimizer, 3, seed=1)
    state = optimizer.state_dict()
    tensors, skeleton = flatten_state(state)
    weights = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    write_checkpoint(tmp_path / "c", tensors=weights | tensors, metadata={"state": skeleton}, kind="training")
    found = read_checkpoint(tmp_path / "c")
    restored = unflatten_state(found.tensors, found.metadata["state"])
    assert same(restored, state)
    other = torch.nn.Linear(5, 3)
    other.load_state_dict({name: found.tensors[f"model.{name}"] for name in model.state_dict()})
    continued = make(other.parameters())
    continued.load_state_dict(restored)
    train(model, optimizer, 4, seed=2)
    train(other, continued, 4, seed=2)
    assert same(other.state_dict(), model.state_dict())
    assert same(continued.state_dict(), optimizer.state_dict())


def test_states_keep_shared_objects_and_ambiguous_keys():
    shared = torch.arange(2)
    state = {
        "a.b": shared,
        "a": {"b": torch.zeros(1), 0: shared},
        0: [(shared, None)],
        "0": torch.nn.Parameter(torch.ones(1)),
    }
    tensors, skeleton = flatten_state(state)
    assert len(tensors) == 3
    back = unflatten_state(tensors, json.loads(json.dumps(skeleton)))
    assert back["a.b"] is back["a"][0] is back[0][0][0] is shared
    assert same(list(back), list(state))
    with pytest.raises(CheckpointError, match=r"state\['x'\]: type .*Odd"):
        flatten_state({"x": Odd()})
    with pytest.raises(CheckpointError, match="needs the tensor"):
        unflatten_state({}, skeleton)
