from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import json
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import epivi.train.checkpoint
from epivi._errors import CheckpointError
from epivi.train.checkpoint import is_checkpoint, read_checkpoint, write_checkpoint

WEIGHTS, METADATA, MANIFEST = "weights.safetensors", "metadata.json", "manifest.json"
relaxed = settings(deadline=None, max_examples=60, suppress_health_check=list(HealthCheck))


def save(path, value=1, **kwargs):
    tensors = {"w": torch.full((3,), float(value)), "step": torch.tensor(value)}
    return write_checkpoint(path, tensors=tensors, metadata={"value": value}, kind="model", **kwargs)


def value_of(path):
    found = read_checkpoint(path, kind="model")
    assert found.tensors["w"].tolist() == [float(found.metadata["value"])] * 3
    assert found.tensors["step"].item() == found.metadata["value"]
    return found.metadata["value"]


def seal(folder, **changes):
    """Give a changed folder a manifest that agrees with it, as an attacker can."""
    manifest = json.loads((folder / MANIFEST).read_bytes()) | changes
    if "files" not in changes:
        for name in (WEIGHTS, METADATA):
            raw = (folder / name).read_bytes()
            manifest["files"][name] = {"size": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    manifest.pop("sha256")
    manifest["sha256"] = hashlib.sha256(json.dumps(manifest, indent=1).encode()).hexdigest()
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))


def refused(folder, match="damaged"):
    with pytest.raises(CheckpointError, match=match) as caught:
        read_checkpoint(folder)
    return str(caught.value)


def same(a, b):
    """Equal in dtype, shape and bits."""
    raw_a, raw_b = (x.contiguous().reshape(-1).view(torch.uint8) for x in (a, b))
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(raw_a, raw_b)


# ---- folders -----------------------------------------------------------------------------------------------
def test_every_kind_of_tensor_survives_bitwise_and_in_order(tmp_path):
    base = torch.randn(4, 6, dtype=torch.float64)
    tensors = {
        "view": base[1:3, ::2],
        "same": base,
        "again": base,
        "transposed": base.T,
        "expanded": torch.ones(1).expand(3),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 7, dtype=torch.bfloat16),
        "bfloat16": torch.tensor([1.5, float("nan"), -0.0], dtype=torch.bfloat16),
        "half": torch.tensor([1e-7], dtype=torch.float16),
        "bool": torch.tensor([[True], [False]]),
        "int64": torch.tensor([-(2**63), 2**63 - 1]),
        "uint8": torch.get_rng_state(),
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "numpy": np.arange(6, dtype=np.uint16).reshape(2, 3)[:, ::-1],
        "big endian": np.arange(3, dtype=">f8"),
        "0-d numpy": np.array(2, dtype=np.int8),
        **{
            name: torch.tensor(i)
            for i, name in enumerate(["", "__metadata__", "%41", '\0\n"', "é/😀", "\ud800", "../x"])
        },
    }
    found = read_checkpoint(write_checkpoint(tmp_path / "c", tensors=tensors, metadata={}, kind="k"))
    assert list(found.tensors) == list(tensors)
    for name, tensor in tensors.items():
        if isinstance(tensor, np.ndarray):
            expected = torch.tensor(tensor.tolist(), dtype=found.tensors[name].dtype)
            assert str(found.tensors[name].dtype) == f"torch.{tensor.dtype.name}"
        else:
            expected = tensor.detach()
        assert same(found.tensors[name], expected), name
    assert read_checkpoint(tmp_path / "c", device="meta").tensors["view"].device.type == "meta"
    storages = {tensor.untyped_storage().data_ptr() for tensor in found.tensors.values() if tensor.numel()}
    assert len(storages) == len(tensors) - 1


@settings(relaxed, max_examples=25)
@given(
    st.dictionaries(
        st.text(st.characters()),
        hnp.arrays(
            st.one_of(hnp.boolean_dtypes(), hnp.integer_dtypes(), hnp.floating_dtypes(sizes=(32, 64))),
            hnp.array_shapes(min_dims=0, min_side=0, max_side=3),
        ),
    ),
    st.dictionaries(st.text(), st.integers() | st.tuples(st.text(), st.binary()), max_size=3),
)
def test_checkpoints_hold_any_names_and_values(tmp_path, tensors, metadata):
    found = read_checkpoint(
        write_checkpoint(tmp_path / "c", tensors=tensors, metadata=metadata, kind="k", overwrite=True)
    )
    assert found.metadata == metadata
    assert list(found.tensors) == list(tensors)
    for name, array in tensors.items():
        assert found.tensors[name].numpy().tobytes() == array.astype(array.dtype.newbyteorder("=")).tobytes()


def test_format_1_stays_readable(tmp_path):
    manifest = (
        '{\n "format": "epivi-checkpoint",\n "format_version": 1,\n "epivi_version": "0.1.0",\n "kind": "model",\n'
        ' "tensors": [\n  "w",\n  "n"\n ],\n "files": {\n  "weights.safetensors": {\n   "size": 136,\n'
        '   "sha256": "ba77367b714c32e89fd201299ce7478218a1ce3344f64bc041d49f7bee5567d2"\n  },\n  "metadata.json": {\n'
        '   "size": 179,\n   "sha256": "285191b0779a508c017548fa01aa5afc7f520655514d083a09f5f7690bbe1577"\n  }\n },\n'
        ' "sha256": "e8882d13b5748b30b9244c059ca7596bc5c9d076c664e1b3f772bcd311d5a93c"\n}'
    )
    (tmp_path / MANIFEST).write_text(manifest)
    (tmp_path / METADATA).write_text(
        '{"epoch": 3, "names": {"__epivi__": "array", "value": ["a", "b"], "dtype": "<U1", "shape": [2]}, '
        '"t": {"__epivi__": "tuple", "value": [1, {"__epivi__": "float", "value": "inf"}]}}'
    )
    header = b'{"n":{"dtype":"I64","shape":[],"data_offsets":[0,8]},'
    header += b'"w":{"dtype":"F32","shape":[1,2],"data_offsets":[8,16]}}   '
    body = np.int64(7).tobytes() + np.float32([1.5, -2.0]).tobytes()
    (tmp_path / WEIGHTS).write_bytes(np.uint64(len(header)).tobytes() + header + body)
    found = read_checkpoint(tmp_path)
    assert (found.kind, found.epivi_version, found.format_version) == ("model", "0.1.0", 1)
    assert list(found.tensors) == ["w", "n"]
    assert same(found.tensors["w"], torch.tensor([[1.5, -2.0]]))
    assert same(found.tensors["n"], torch.tensor(7))
    assert found.metadata.pop("names").tolist() == ["a", "b"]
    assert found.metadata == {"epoch": 3, "t": (1, math.inf)}


def test_equal_content_makes_equal_bytes_with_the_usual_permissions(tmp_path):
    a, b = save(tmp_path / "a"), save(tmp_path / "deep" / "er" / "b")
    (tmp_path / "plain").touch()
    assert {path.name for path in a.iterdir()} == {WEIGHTS, METADATA, MANIFEST}
    for path in a.iterdir():
        assert path.read_bytes() == (b / path.name).read_bytes()
        assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "deep", "plain"]


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"w": [1.0]}, r"tensors\['w'\] is a list"),
        ({"w": np.array(["x"])}, r"tensors\['w'\] is a ndarray \(<U1\)"),
        ({"w": np.zeros(1, np.complex128)}, r"tensors\['w'\] has dtype complex128"),
        ({"w": np.zeros(1, np.longdouble)}, r"tensors\['w'\] is a ndarray \(.*float"),
        ({3: torch.ones(1)}, r"tensors\[3\] .* string names"),
        ({"w": torch.ones(2, 2).to_sparse()}, r"tensors\['w'\] has .* layout torch.sparse_coo"),
        ({"w": torch.ones(2, device="meta")}, r"tensors\['w'\] has .* device meta"),
    ],
    ids=range(7),
)
def test_tensors_without_a_form_are_refused_before_anything_is_written(tmp_path, tensors, message):
    with pytest.raises(CheckpointError, match=message):
        write_checkpoint(tmp_path / "c", tensors=tensors, metadata={}, kind="k")
    with pytest.raises(CheckpointError, match="kind is ''"):
        write_checkpoint(tmp_path / "c", tensors={}, metadata={}, kind="")
    assert not list(tmp_path.iterdir())


# ---- damage ------------------------------------------------------------------------------------------------
def test_every_flipped_byte_of_a_small_checkpoint_is_noticed(tmp_path):
    folder, rng = save(tmp_path / "c"), np.random.default_rng(0)
    for path in folder.iterdir():
        raw = path.read_bytes()
        for i in range(len(raw)):
            path.write_bytes(raw[:i] + bytes([raw[i] ^ int(rng.integers(1, 256))]) + raw[i + 1 :])
            assert path.name in refused(folder)
        path.write_bytes(raw)
    assert value_of(folder) == 1


def test_a_thousand_random_flips_of_a_larger_checkpoint_are_noticed(tmp_path):
    rng = np.random.default_rng(1)
    tensors = {f"layer{i}": rng.normal(size=(20, 50)) for i in range(10)}
    folder = write_checkpoint(tmp_path / "c", tensors=tensors, metadata={"x": list(range(5000))}, kind="k")
    paths = sorted(folder.iterdir())
    for i in range(1000):
        path = paths[i % 3]
        with path.open("rb+") as file:
            at = int(rng.integers(path.stat().st_size))
            file.seek(at)
            byte = file.read(1)[0]
            file.seek(at)
            file.write(bytes([byte ^ (1 << int(rng.integers(8)))]))
            file.flush()
            assert path.name in refused(folder)
            file.seek(at)
            file.write(bytes([byte]))
    assert read_checkpoint(folder).metadata == {"x": list(range(5000))}


@pytest.mark.parametrize("name", [WEIGHTS, METADATA, MANIFEST])
def test_truncated_longer_and_missing_files_are_noticed(tmp_path, name):
    folder = save(tmp_path / "c")
    path, raw = folder / name, (folder / name).read_bytes()
    for changed in [raw[:n] for n in range(0, len(raw), 7)] + [
        raw + b"\0",
        raw + b" ",
        raw + b"\n",
        b" " + raw,
        raw * 2,
    ]:
        path.write_bytes(changed)
        assert name in refused(folder)
    path.unlink()
    assert name in refused(folder, "not an epivi checkpoint: no manifest" if name == MANIFEST else "is missing")
    path.mkdir()
    assert name in refused(folder, "not an epivi checkpoint" if name == MANIFEST else "is not a regular file")


def test_what_is_no_checkpoint_is_said_so(tmp_path):
    refused(tmp_path / "nothing", "There is no checkpoint at .*nothing")
    refused(tmp_path, "not an epivi checkpoint: no manifest.json, but nothing")
    (tmp_path / "model.pt").touch()
    refused(tmp_path, "no manifest.json, but 'model.pt', which is not opened")
    refused(tmp_path / "model.pt", "but a file")
    (tmp_path / MANIFEST).write_text('{"name": "a web page"}')
    refused(tmp_path, "does not name the format 'epivi-checkpoint'")
    assert not is_checkpoint(tmp_path)
    assert not is_checkpoint(tmp_path / "nothing")
    (tmp_path / MANIFEST).write_text("[" * 100_000)
    refused(tmp_path, "is not JSON")
    assert not is_checkpoint(tmp_path)
    assert is_checkpoint(save(tmp_path / "c"))


def test_newer_formats_and_other_kinds_are_named(tmp_path):
    folder = save(tmp_path / "c")
    with pytest.raises(CheckpointError, match="is of kind 'model'; 'training' is needed"):
        read_checkpoint(folder, kind="training")
    seal(folder, format_version=2, epivi_version="9.9", something="new")
    assert "written by epivi 9.9" in refused(folder, "has format 2 .* up to 1. Upgrade epivi")


# ---- hostile files -----------------------------------------------------------------------------------------
class Bomb:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def test_hostile_pickles_run_nothing(tmp_path):
    marker = tmp_path / "ran"
    bomb = pickle.dumps(Bomb(marker))
    pickle.loads(bomb)
    assert marker.exists(), "the bomb itself must work"
    marker.unlink()
    for name in ("model.pt", "state.pkl", ".hidden.pickle", "weights.safetensors.bak"):
        folder = save(tmp_path / name)
        (folder / name).write_bytes(bomb)
        refused(folder, f"also holds '{name}', which epivi did not write and does not open")
    folder = save(tmp_path / "c")
    for raw in (bomb, np.uint64(len(bomb)).tobytes() + bomb, b"", b"\xff" * 64):
        (folder / WEIGHTS).write_bytes(raw)
        refused(folder, "weights.safetensors' (has|does not agree)")
        seal(folder)
        refused(folder, "is not a file of safetensors")
    torch.save({"w": torch.ones(1)}, folder / WEIGHTS)
    seal(folder)
    refused(folder, "is not a file of safetensors")
    assert not marker.exists()


@pytest.mark.parametrize(
    "text",
    [
        '{"a": {"__epivi__": "builtins.eval", "value": "open(\'ran\', \'w\')"}}',
        '{"a": {"__epivi__": "pickle", "value": "' + base64.b64encode(pickle.dumps(1)).decode() + '"}}',
        '{"a": {"__epivi__": "array", "dtype": "|O", "shape": [1], "value": "gASVBQ=="}}',
        '{"a": {"__epivi__": "array", "dtype": "<f8", "shape": [1000000000000], "value": ""}}',
        '{"a": ' + "[" * 50_000 + "]" * 50_000 + "}",
        "[1]",
        "{} {}",
        '{"a": ' + "9" * 5000 + "}",
        "\xff",
        "",
    ],
    ids=range(10),
)
def test_hostile_metadata_is_a_clear_error(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    folder = save(tmp_path / "c")
    (folder / METADATA).write_bytes(text.encode("latin-1"))
    seal(folder)
    refused(folder, "metadata.json' holds")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c"]


@pytest.mark.parametrize(
    "change",
    [
        {"files": {}},
        {"files": {"/etc/passwd": {"size": 1, "sha256": ""}, METADATA: {"size": 1, "sha256": ""}}},
        {"files": {WEIGHTS: 3, METADATA: 4}},
        {"tensors": [1]},
        {"kind": 3},
        {"format_version": True},
        {"format_version": -1},
        {"more": 1},
    ],
    ids=range(8),
)
def test_sealed_nonsense_in_the_manifest_is_a_clear_error(tmp_path, change):
    folder = save(tmp_path / "c")
    seal(folder, **change)
    refused(folder, "has not the form of format 1")


def test_tensors_must_be_the_ones_of_the_manifest(tmp_path):
    folder = save(tmp_path / "c")
    seal(folder, tensors=["w"])
    refused(folder, "holds other tensors than manifest.json names")


def test_no_pickle_is_imported_or_called(tmp_path, monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError(args)

    for module, name in [(pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load"), (torch, "save")]:
        monkeypatch.setattr(module, name, forbidden)
    assert value_of(save(tmp_path / "c")) == 1
    for path in Path(epivi.train.checkpoint.__file__).parent.glob("*.py"):
        if path.name in ("_atomic.py", "_encoding.py", "checkpoint.py"):
            assert not any(word in path.read_text() for word in ("import pickle", "torch.load", "eval(", "exec("))


def test_a_source_tree_that_is_not_installed_writes_no_version(tmp_path, monkeypatch):
    def fail(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", fail)
    assert read_checkpoint(save(tmp_path / "c")).epivi_version == "unknown"
