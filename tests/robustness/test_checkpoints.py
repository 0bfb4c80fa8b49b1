"""Saved models: every damage is noticed, nothing in them runs, and one seed gives one model."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

import epivi
from epivi._errors import CheckpointError

WEIGHTS, METADATA, MANIFEST = "weights.safetensors", "metadata.json", "manifest.json"


KINDS = ["SAILER", "ConvNetVAE", "FCVAE"]


def train(kind, data, **options):
    cls = getattr(epivi, kind)
    if kind == "SAILERX":
        cls.setup_mudata(data, batch_key="batch")
    else:
        cls.setup_anndata(data, batch_key="batch", continuous_covariate_keys=["age"])
    hidden = (4, 3) if kind.startswith("SAILER") else 4
    filters = {"kernel_size": 5, "stride": 5, "n_filters": (3,)} if kind == "ConvNetVAE" else {}
    model = cls(data, n_latent=2, n_hidden=hidden, seed=1, dropout_rate=0.1, **filters)
    model.train(max_epochs=3, batch_size=12, **options)
    return model


@pytest.fixture(scope="module")
def maker(make_peaks, make_multiome, make_tracks):
    """Makes the data of a kind of model."""
    return lambda kind: {"SAILER": make_peaks, "SAILERX": make_multiome}.get(kind, make_tracks)()


@pytest.fixture(scope="module", params=KINDS)
def model(request, maker, quiet):
    return train(request.param, maker(request.param), **quiet)


@pytest.fixture
def load(model):
    return type(model).load


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints") / "model"
    model.save(folder)
    return folder


@pytest.fixture
def copied(saved, tmp_path):
    return Path(shutil.copytree(saved, tmp_path / "model"))


class Payload:
    """Runs as soon as it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.fixture
def hostile(tmp_path):
    """A pickle, and whether it ran."""
    marker = tmp_path / "ran"
    raw = pickle.dumps(Payload(marker))
    pickle.loads(raw)
    assert marker.exists()
    marker.rmdir()
    yield raw
    assert not marker.exists()


def seal(folder):
    """Give a changed folder a manifest that agrees with it, as an attacker can."""
    manifest = json.loads((folder / MANIFEST).read_bytes())
    for name in (WEIGHTS, METADATA):
        raw = (folder / name).read_bytes()
        manifest["files"][name] = {"size": len(raw), "sha256": hashlib.sha256(raw).hexdigest()}
    manifest.pop("sha256")
    manifest["sha256"] = hashlib.sha256(json.dumps(manifest, indent=1).encode()).hexdigest()
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))


def test_flipped_bits_are_all_noticed(model, load, copied):
    n_flips = 1000 if isinstance(model, epivi.SAILER) else 200  # the files have one form
    rng = np.random.default_rng(0)
    files = [copied / name for name in (WEIGHTS, METADATA, MANIFEST)]
    contents = [path.read_bytes() for path in files]
    shares = np.array([len(raw) for raw in contents], dtype=float) ** 0.5
    n_noticed = 0
    for which in rng.choice(len(files), size=n_flips, p=shares / shares.sum()):
        raw = bytearray(contents[which])
        raw[rng.integers(len(raw))] ^= 1 << rng.integers(8)
        files[which].write_bytes(raw)
        with pytest.raises(CheckpointError):
            load(copied, adata=False)
        n_noticed += 1
        files[which].write_bytes(contents[which])
    assert n_noticed == n_flips
    loaded = load(copied, adata=model.adata)
    assert np.array_equal(loaded.get_latent_representation(), model.get_latent_representation())


@pytest.mark.parametrize("name", [WEIGHTS, METADATA, MANIFEST])
@pytest.mark.parametrize("change", ["missing", "empty", "cut", "longer"])
def test_files_that_are_missing_or_cut_are_named(load, copied, name, change):
    path = copied / name
    raw = path.read_bytes()
    path.unlink()
    if change != "missing":
        path.write_bytes({"empty": b"", "cut": raw[:-1], "longer": raw + b" "}[change])
    with pytest.raises(CheckpointError, match=name):
        load(copied, adata=False)


def test_a_pickle_beside_the_weights_is_refused_unread(load, copied, hostile):
    for name in ("model.pt", "attr.pkl", "model_params.pt"):
        (copied / name).write_bytes(hostile)
        with pytest.raises(CheckpointError, match=rf"also holds '{name}', which epivi did not write and does not open"):
            load(copied, adata=False)
        (copied / name).unlink()


@pytest.mark.parametrize("name", [WEIGHTS, METADATA, MANIFEST])
@pytest.mark.parametrize("sealed", [False, True])
def test_a_pickle_in_place_of_a_file_runs_nothing(load, copied, hostile, name, sealed):
    (copied / name).write_bytes(hostile)
    if sealed and name != MANIFEST:
        seal(copied)
    with pytest.raises(CheckpointError, match=f"damaged.*{name}"):
        load(copied, adata=False)


def test_a_folder_with_a_pickle_alone_is_no_checkpoint(load, hostile, tmp_path):
    (tmp_path / "scvi").mkdir()
    (tmp_path / "scvi" / "model.pt").write_bytes(hostile)
    with pytest.raises(CheckpointError, match=r"is not an epivi checkpoint: no manifest.json, but 'model.pt'"):
        load(tmp_path / "scvi", adata=False)


def test_a_pickle_in_the_metadata_stays_text(load, copied, hostile):
    metadata = json.loads((copied / METADATA).read_bytes())
    metadata["init"]["n_latent"] = {"__reduce__": hostile.hex(), "py/object": "os.mkdir"}
    (copied / METADATA).write_text(json.dumps(metadata))
    seal(copied)
    with pytest.raises(epivi._errors.EpiviError):
        load(copied, adata=False)


@pytest.mark.parametrize("kind", KINDS)
def test_a_pickle_in_the_state_of_a_run_runs_nothing(kind, maker, hostile, quiet, tmp_path):
    train(kind, maker(kind), run_dir=tmp_path / "run", **quiet)
    state = tmp_path / "run" / "state"
    (state / WEIGHTS).write_bytes(hostile)
    seal(state)
    with pytest.raises(CheckpointError, match=f"damaged.*{WEIGHTS}"):
        train(kind, maker(kind), run_dir=tmp_path / "run", **quiet)


@pytest.mark.parametrize("kind", KINDS)
def test_no_pickle_is_written_or_read(kind, maker, quiet, tmp_path, monkeypatch):
    import torch

    def forbidden(*args, **kwargs):
        pytest.fail("a pickle was written or read")

    for module, names in ((pickle, ("dump", "load", "Pickler", "Unpickler")), (torch, ("save", "load"))):
        for name in names:
            monkeypatch.setattr(module, name, forbidden)
    monkeypatch.chdir(tmp_path)
    model = train(kind, maker(kind), run_dir="run", save_every_n_steps=2, **quiet)
    model.save("model", save_anndata=True)
    type(model).load("model")
    train(kind, maker(kind), run_dir="run", **quiet)
    written = {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*") if path.is_file()}
    assert written == {"run", "model", "model.data"}
    for path in tmp_path.rglob("*"):
        if path.is_dir():
            continue
        # a safetensors file begins with the length of its header, which may be any bytes
        raw = path.read_bytes()[8 if path.suffix == ".safetensors" else 0 :]
        # protocol 2 and above begin with this byte, archives of torch.save are zip files
        assert raw[:1] not in (b"\x80", b"P"), path


@pytest.mark.parametrize("kind", [*KINDS, "SAILERX"])
def test_one_seed_gives_bitwise_one_model(kind, maker, quiet, tmp_path):
    for name in ("first", "second"):
        train(kind, maker(kind), **quiet).save(tmp_path / name)
    assert (tmp_path / "first" / WEIGHTS).read_bytes() == (tmp_path / "second" / WEIGHTS).read_bytes()
    first, second = (json.loads((tmp_path / name / METADATA).read_bytes()) for name in ("first", "second"))
    # scvi-tools gives each setup a number of its own
    for metadata in (first, second):
        metadata.pop("registry")
    assert first == second


def test_a_save_that_fails_leaves_the_old_model(model, copied, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    before = {path.name: path.read_bytes() for path in copied.iterdir()}
    monkeypatch.setattr("epivi.train._atomic._fsync", full)
    with pytest.raises(CheckpointError, match=r"could not be written.*No space left"):
        model.save(copied, overwrite=True)
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in copied.iterdir()} == before
    assert [path.name for path in copied.parent.iterdir()] == ["model"]
