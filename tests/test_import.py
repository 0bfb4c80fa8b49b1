"""`import epivi` is quick, changes nothing outside the package, and shows its names before they are loaded."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.metadata import version

import pytest

import epivi

HEAVY = {"anndata", "jax", "lightning", "matplotlib", "mudata", "muon", "pandas", "scanpy", "scvi", "sklearn", "torch"}

# Run in a fresh interpreter. What `first` names is loaded before, so that what is compared is what epivi changes:
# importing scipy adds a warning filter.
PROBE = """
import json, logging, sys, time, warnings
import {first}

def state():
    root = logging.getLogger()
    return repr([warnings.filters, root.handlers, root.level, root.manager.disable, numpy.random.get_state(),
                 numpy.geterr(), sys.excepthook, sys.displayhook])

before = state()
start = time.perf_counter()
import {module}
seconds = time.perf_counter() - start
print(json.dumps(dict(seconds=seconds, unchanged=before == state(), modules=sorted(sys.modules))))
"""
COLD = "import time; start = time.perf_counter(); import epivi; print(time.perf_counter() - start)"


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout


def test_import_takes_less_than_half_a_second() -> None:
    assert min(float(run(COLD)) for _ in range(3)) < 0.5  # the best of three: the machine may be busy


def test_import_is_light_and_changes_nothing() -> None:
    probe = json.loads(run(PROBE.format(first="numpy", module="epivi")))
    assert HEAVY & set(probe["modules"]) == set()
    assert probe["unchanged"]


@pytest.mark.parametrize("room", ["metrics", "pl", "pp", "simulate", "tl"])
def test_rooms_without_networks_load_no_torch(room: str) -> None:
    probe = json.loads(run(PROBE.format(first="numpy, pandas, scipy.stats", module=f"epivi.{room}")))
    assert {"torch", "scvi", "lightning"} & set(probe["modules"]) == set()
    assert probe["unchanged"]


def test_version_is_that_of_the_installed_package() -> None:
    assert epivi.__version__ == version("epivi")


def test_dir_lists_the_public_names_before_they_are_loaded() -> None:
    listed, loaded = json.loads(run("import epivi, json, sys; print(json.dumps([dir(epivi), sorted(sys.modules)]))"))
    assert listed == sorted(epivi.__all__)
    assert {
        "CANDI",
        "ConvNetVAE",
        "EpiFoundation",
        "Expresser",
        "FCVAE",
        "SAILER",
        "SAILERX",
        "__version__",
        "metrics",
        "models",
        "pl",
        "pp",
        "simulate",
        "tl",
    } == set(listed)
    assert not [name for name in loaded if name.startswith("epivi.") and name != "epivi._errors"]


@pytest.mark.parametrize("name", ["metrics", "models", "pl", "pp", "simulate", "tl"])
def test_a_room_is_reached_through_the_front_door(name: str) -> None:
    assert getattr(epivi, name).__name__ == f"epivi.{name}"


@pytest.mark.parametrize("name", ["CANDI", "SAILER", "SAILERX"])
def test_a_model_is_reached_through_the_front_door(name: str) -> None:
    model = getattr(epivi, name)
    assert isinstance(model, type)
    assert model.__name__ == name
    assert model.__module__.startswith(f"epivi.models.{name.lower()}.")


def test_unknown_name_is_an_attribute_error_with_the_nearest_name() -> None:
    with pytest.raises(AttributeError, match=r"module 'epivi' has no attribute 'SAILR'\. Did you mean 'SAILER'\?"):
        _ = epivi.SAILR
    assert not hasattr(epivi, "no_such_room")
