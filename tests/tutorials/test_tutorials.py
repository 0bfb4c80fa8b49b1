"""The notebooks run from top to bottom, as a reader runs them."""

import json
from pathlib import Path

import matplotlib as mpl
import pytest

mpl.use("Agg")
NOTEBOOKS = sorted((Path(__file__).parents[2] / "tutorials").glob("*.ipynb"))


def test_there_are_tutorials() -> None:
    assert len(NOTEBOOKS) >= 2


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_tutorial_runs(path: Path) -> None:
    notebook = json.loads(path.read_text())
    names: dict = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), path.name, "exec"), names)
    assert "model" in names
    assert names["model"].is_trained


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_tutorial_holds_no_output(path: Path) -> None:
    notebook = json.loads(path.read_text())
    assert all(not cell.get("outputs") for cell in notebook["cells"])
