"""The rules of docs/developer/layout.md, held over the source: import order, sizes, docstrings, banned things, paths.

Each checker takes a folder and returns one line for each violation, so that the tests at the end can show it failing.
"""

from __future__ import annotations

import ast
import re
import subprocess
import tempfile
import tokenize
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

REPO = Path(__file__).resolve().parents[1]
SRC = REPO / "src" / "epivi"

# A room imports from groups to its left or from itself; rooms of one group do not know each other.
GROUPS = (
    ("_errors", "_keys"),
    ("_validate",),
    ("nn", "simulate", "datasets", "metrics", "pl"),
    ("pp", "objectives", "train"),
    ("data",),
    ("models", "tl"),
    ("cli",),
    ("__main__",),
)
RANK = {room: rank for rank, group in enumerate(GROUPS) for room in group}
MODEL_BRIDGES = {("sailerx", "sailer")}

# scvi and lightning bring torch along; `epivi.nn` is the one room left of `pp` that is made of torch.
TRAINING = ("torch", "scvi", "lightning", "pytorch_lightning")
CONTAINERS = ("anndata", "mudata", "scvi", "lightning", "pytorch_lightning")
FORBIDDEN = {"pp": (*TRAINING, "epivi.nn"), "metrics": TRAINING, "nn": CONTAINERS, "objectives": CONTAINERS}

MAX_FILE_LINES, MAX_FOLDER_FILES, MAX_FUNCTION_LINES = 450, 10, 70
NOT_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}
Function = ast.FunctionDef | ast.AsyncFunctionDef


def sources(package: Path) -> Iterator[tuple[Path, ast.Module]]:
    """Yield every source file, relative to the package, with its syntax tree."""
    for path in sorted(package.rglob("*.py")):
        yield path.relative_to(package), ast.parse(path.read_text(encoding="utf-8"))


def imports(tree: ast.Module, file: Path) -> Iterator[tuple[int, str]]:
    """Yield line and full dotted name of everything imported, inside functions and under TYPE_CHECKING too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # the package in which a relative import starts is the file's folder, for __init__.py as well
            folder = ("epivi", *file.parent.parts)
            start = folder[: len(folder) - node.level + 1] if node.level else ()
            base = ".".join([*start, *([node.module] if node.module else [])])
            yield from ((node.lineno, f"{base}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if called in {"import_module", "__import__", "require"} and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


def room(first_part: str) -> str:
    """Return the room of a file or folder that lies directly in the package."""
    name = first_part.removesuffix(".py")
    # a room without a folder may be several files: _validate_counts.py, cli_fit.py
    return next((wide for wide in ("_validate", "cli") if name.startswith(f"{wide}_")), name)


def check_import_order(package: Path) -> list[str]:
    """Imports between rooms, and between the folders of `models`."""
    found = []
    for file, tree in sources(package):
        if file == Path("__init__.py"):
            continue
        own = room(file.parts[0])
        if own not in RANK:
            found.append(f"{file}: '{own}' is not a room of the house")
            continue
        for line, name in imports(tree, file):
            parts = name.split(".")
            if parts[0] != "epivi" or parts[1:] == ["__version__"]:
                continue
            other = room(parts[1]) if len(parts) > 1 else ""
            if other not in RANK:  # the front door imports the models, so it lies right of them
                if RANK[own] < RANK["cli"]:
                    found.append(f"{file}:{line}: '{own}' imports '{name}' through the front door")
            elif other != own and RANK[other] >= RANK[own]:
                found.append(f"{file}:{line}: '{own}' imports '{name}', which is not to its left")
            elif own == other == "models" and not _models_may(file, parts[2:]):
                found.append(f"{file}:{line}: imports '{name}' across model folders")
    return found


def _models_may(file: Path, target: list[str]) -> bool:
    """Model folders see themselves and `base*`, nothing else but the bridges; `base*` sees no model folder."""
    if file == Path("models/__init__.py"):
        return True
    own, other = file.parts[1].removesuffix(".py"), target[0] if target else ""
    return other in {own, "__future__"} or other.startswith("base") or (own, other) in MODEL_BRIDGES


def check_forbidden_libraries(package: Path) -> list[str]:
    """Libraries that a room must not know."""
    return [
        f"{file}:{line}: '{room(file.parts[0])}' imports '{name}'"
        for file, tree in sources(package)
        for line, name in imports(tree, file)
        for banned in FORBIDDEN.get(room(file.parts[0]), ())
        if name == banned or name.startswith(f"{banned}.")
    ]


def check_sizes(package: Path) -> list[str]:
    """Lines of a file, files of a folder, code lines of a function."""
    found = []
    folders: dict[Path, int] = {}
    for file, tree in sources(package):
        folders[file.parent] = folders.get(file.parent, 0) + 1
        n_lines = len((package / file).read_text(encoding="utf-8").splitlines())
        if n_lines > MAX_FILE_LINES:
            found.append(f"{file}: {n_lines} lines, at most {MAX_FILE_LINES}")
        code = _code_lines(package / file, tree)
        for node in ast.walk(tree):
            if isinstance(node, Function):
                n_code = sum(node.lineno <= line <= (node.end_lineno or 0) for line in code)
                if n_code > MAX_FUNCTION_LINES:
                    found.append(
                        f"{file}:{node.lineno}: '{node.name}' has {n_code} code lines, at most {MAX_FUNCTION_LINES}"
                    )
    found += [
        f"{folder}: {n} files, at most {MAX_FOLDER_FILES}" for folder, n in folders.items() if n > MAX_FOLDER_FILES
    ]
    return found


def _code_lines(path: Path, tree: ast.Module) -> set[int]:
    """Return the lines that hold code: no blank line, no comment, no docstring."""
    with tokenize.open(path) as handle:
        tokens = list(tokenize.generate_tokens(handle.readline))
    code = {line for t in tokens if t.type not in NOT_CODE for line in range(t.start[0], t.end[0] + 1)}
    for node in ast.walk(tree):
        if isinstance(node, Function | ast.ClassDef | ast.Module) and ast.get_docstring(node) is not None:
            text = node.body[0]
            code -= set(range(text.lineno, (text.end_lineno or 0) + 1))
    return code


def check_docstrings(package: Path) -> list[str]:
    """Modules, public functions, public classes and their public methods say what they do."""
    found = []
    for file, tree in sources(package):
        nodes = [("module", 1, tree), *((n.name, n.lineno, n) for n in _public(tree))]
        found += [
            f"{file}:{line}: '{name}' has no docstring" for name, line, node in nodes if not _says_something(node)
        ]
    return found


def _says_something(node: ast.Module | ast.ClassDef | Function) -> bool:
    return bool(re.search(r"\w", ast.get_docstring(node) or ""))


def _public(parent: ast.Module | ast.ClassDef) -> Iterator[ast.ClassDef | Function]:
    for node in parent.body:
        if not isinstance(node, ast.ClassDef | Function) or node.name.startswith("_"):
            continue
        # an overload, an override or a setter speaks through the definition it belongs to
        marks = {d.attr if isinstance(d, ast.Attribute) else getattr(d, "id", "") for d in node.decorator_list}
        if not marks & {"overload", "override", "setter", "deleter"}:
            yield node
        if isinstance(node, ast.ClassDef):
            yield from _public(node)


def check_banned(package: Path) -> list[str]:
    """No assert, print, unspecific raise or open end in the source."""
    found = []
    for file, tree in sources(package):
        for node in ast.walk(tree):
            if isinstance(node, ast.Assert):
                found.append(f"{file}:{node.lineno}: assert")
            elif (
                isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print" and room(file.parts[0]) != "cli"
            ):
                found.append(f"{file}:{node.lineno}: print")
            elif isinstance(node, ast.Raise):
                raised = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
                if getattr(raised, "id", "") in {"Exception", "BaseException", "NotImplementedError"}:
                    found.append(f"{file}:{node.lineno}: raise {raised.id}")
        for number, line in enumerate((package / file).read_text(encoding="utf-8").splitlines(), start=1):
            if re.search(r"\b(TODO|FIXME)\b", line):
                found.append(f"{file}:{number}: open end")
    return found


def check_machine_paths(root: Path, places: tuple[Path, ...]) -> list[str]:
    """Name no absolute path of a person's machine in any text file: no home folder, none of `places`."""
    here = "|".join(re.escape(str(place)) for place in places)
    pattern = re.compile(rf"(?<![\w.*:/~-])(?:/(?:home|Users|root)/\w|[A-Z]:\\+Users\\|(?:{here})(?:/|\b))")
    found = []
    for file in _project_files(root):
        if not file.is_file() or file.stat().st_size > 1_000_000:
            continue
        content = file.read_bytes()
        if b"\0" in content:  # a picture or another binary file
            continue
        for number, line in enumerate(content.decode("utf-8", errors="replace").splitlines(), start=1):
            if match := pattern.search(line):
                found.append(f"{file.relative_to(root)}:{number}: {match.group()}")
    return found


def _project_files(root: Path) -> list[Path]:
    """Return what git tracks or would track; without git, everything that is not in a hidden folder."""
    git = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(git, capture_output=True, check=True, text=True).stdout
        return [root / name for name in listed.split("\0") if name]
    except (OSError, subprocess.CalledProcessError):
        files = (p for p in root.rglob("*") if p.is_file())
        return [p for p in files if not any(part.startswith(".") for part in p.relative_to(root).parts[:-1])]


@pytest.mark.parametrize(
    "check", [check_import_order, check_forbidden_libraries, check_sizes, check_docstrings, check_banned]
)
def test_source_keeps_the_rule(check: Callable[[Path], list[str]]) -> None:
    assert check(SRC) == []


def test_tests_and_benchmarks_keep_the_file_size() -> None:
    long = {
        str(path.relative_to(REPO)): n
        for folder in ("tests", "benchmarks")
        for path in (REPO / folder).rglob("*.py")
        if (n := len(path.read_text(encoding="utf-8").splitlines())) > MAX_FILE_LINES
    }
    assert long == {}


def test_no_file_names_this_machine() -> None:
    # a clone that lies directly in the temporary folder must not turn every "/tmp/x" into a finding
    parents = {REPO.parent} - {Path(tempfile.gettempdir()), Path(REPO.anchor)}
    assert check_machine_paths(REPO, (REPO, *parents)) == []


LONG_FUNCTION = "def f():\n" + '    """Say."""\n' + "    x = 1\n" * (MAX_FUNCTION_LINES - 1)
BAD = [
    (check_import_order, {"pp/a.py": "from epivi.data import fields"}, "pp/a.py:1: 'pp' imports 'epivi.data.fields'"),
    (check_import_order, {"nn/a.py": "def f():\n    import epivi.train.plan"}, "nn/a.py:2: 'nn' imports"),
    (check_import_order, {"nn/a.py": "import epivi.metrics"}, "which is not to its left"),
    (check_import_order, {"objectives/a.py": "from epivi.train import plan"}, "which is not to its left"),
    (check_import_order, {"nn/a.py": "from ..data import fields"}, "'nn' imports 'epivi.data.fields'"),
    (check_import_order, {"data/__init__.py": "from ..models.base import x"}, "'data' imports 'epivi.models.base.x'"),
    (check_import_order, {"_validate_x.py": "from epivi import pp"}, "'_validate' imports 'epivi.pp'"),
    (check_import_order, {"pp/a.py": "from epivi import cli_fit"}, "'pp' imports 'epivi.cli_fit'"),
    (check_import_order, {"_errors.py": "from epivi import _keys"}, "'_errors' imports 'epivi._keys'"),
    (check_import_order, {"models/base.py": "import epivi"}, "through the front door"),
    (check_import_order, {"data/a.py": "from epivi import SAILER"}, "through the front door"),
    (check_import_order, {"data/a.py": "import_module('epivi.models')"}, "'data' imports 'epivi.models'"),
    (check_import_order, {"utils.py": ""}, "'utils' is not a room"),
    (check_import_order, {"models/sailer/a.py": "from epivi.models.sailerx import b"}, "across model folders"),
    (check_import_order, {"models/candi/a.py": "from ..sailer import b"}, "across model folders"),
    (check_import_order, {"models/base.py": "from epivi.models.sailer import b"}, "across model folders"),
    (check_import_order, {"models/candi/a.py": "from epivi.models import SAILER"}, "across model folders"),
    (check_forbidden_libraries, {"pp/a.py": "def f():\n    import torch.nn"}, "pp/a.py:2: 'pp' imports 'torch.nn'"),
    (check_forbidden_libraries, {"pp/a.py": "from epivi.nn import mlp"}, "'pp' imports 'epivi.nn.mlp'"),
    (check_forbidden_libraries, {"metrics/a.py": "from torch import Tensor"}, "'metrics' imports 'torch.Tensor'"),
    (check_forbidden_libraries, {"nn/a.py": "import anndata as ad"}, "'nn' imports 'anndata'"),
    (check_forbidden_libraries, {"objectives/a.py": "from scvi.nn import FCLayers"}, "'objectives' imports"),
    (check_forbidden_libraries, {"nn/a.py": "import lightning"}, "'nn' imports 'lightning'"),
    (check_sizes, {"nn/a.py": "x = 1\n" * (MAX_FILE_LINES + 1)}, "nn/a.py: 451 lines"),
    (check_sizes, {f"nn/a{i}.py": "" for i in range(MAX_FOLDER_FILES + 1)}, "nn: 11 files"),
    (check_sizes, {"nn/a.py": LONG_FUNCTION + "    y = 2\n"}, "'f' has 71 code lines"),
    (check_docstrings, {"nn/a.py": '"""Say."""\ndef f(): ...'}, "nn/a.py:2: 'f' has no docstring"),
    (
        check_docstrings,
        {"nn/a.py": '"""Say."""\nclass A:\n    """Say."""\n    def f(self): ...'},
        "'f' has no docstring",
    ),
    (check_docstrings, {"nn/a.py": '"""Say."""\nclass A: ...'}, "'A' has no docstring"),
    (check_docstrings, {"nn/a.py": '"""."""'}, "'module' has no docstring"),
    (check_banned, {"nn/a.py": "assert True"}, "nn/a.py:1: assert"),
    (check_banned, {"nn/a.py": "print(1)"}, "nn/a.py:1: print"),
    (check_banned, {"nn/a.py": "raise Exception('x')"}, "nn/a.py:1: raise Exception"),
    (check_banned, {"nn/a.py": "raise NotImplementedError"}, "nn/a.py:1: raise NotImplementedError"),
    (check_banned, {"nn/a.py": "x = 1  # TO" + "DO: more"}, "nn/a.py:1: open end"),
]
GOOD = [
    (check_import_order, {"pp/a.py": "import numpy, epivi._keys\nfrom epivi.nn import x\nfrom . import b"}),
    (check_import_order, {"_validate_x.py": "from epivi._validate import a", "cli.py": "import epivi"}),
    (check_import_order, {"cli.py": "import epivi.cli_fit", "cli_fit.py": "from epivi import pp"}),
    (check_import_order, {"simulate/a.py": "from epivi import __version__", "__init__.py": "import epivi.cli"}),
    (check_import_order, {"models/sailerx/a.py": "from epivi.models.sailer import b\nfrom ..base_io import c"}),
    (check_import_order, {"models/__init__.py": "from epivi.models.sailer import SAILER"}),
    (check_forbidden_libraries, {"train/a.py": "import torch, lightning", "nn/a.py": "import torch"}),
    (check_sizes, {"nn/a.py": LONG_FUNCTION + "\n    # why\n"}),
    (check_docstrings, {"nn/a.py": '"""Say."""\ndef _f(): ...\nclass A:\n    """Say."""\n    def _g(self): ...'}),
    (check_banned, {"cli.py": "print(1)", "cli_fit.py": "print(1)", "nn/a.py": "raise\n"}),
]


def plant(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return root


@pytest.mark.parametrize(("check", "files", "finding"), BAD)
def test_checker_sees_a_bad_tree(
    tmp_path: Path, check: Callable[[Path], list[str]], files: dict[str, str], finding: str
) -> None:
    found = check(plant(tmp_path, files))
    assert len(found) == 1
    assert finding in found[0]


@pytest.mark.parametrize(("check", "files"), GOOD)
def test_checker_leaves_a_good_tree_alone(
    tmp_path: Path, check: Callable[[Path], list[str]], files: dict[str, str]
) -> None:
    assert check(plant(tmp_path, files)) == []


@pytest.mark.parametrize(
    "path", ["/" + "home/ann/x", "/" + "root/x", "C:" + "\\Users\\ann", "/some/clone/data", "/some/clone"]
)
def test_machine_paths_are_seen(tmp_path: Path, path: str) -> None:
    plant(tmp_path, {"docs/a.md": f"fine\nread `{path}`\n"})
    assert [line.split(": ")[0] for line in check_machine_paths(tmp_path, (Path("/some/clone"),))] == ["docs/a.md:2"]


def test_other_paths_are_left_alone(tmp_path: Path) -> None:
    text = "https://example.org/home/ann ../shared/data path/to/root/x ~/root/x /some/clones src/home/x\n"
    plant(tmp_path, {"docs/a.md": text})
    (tmp_path / "picture.png").write_bytes(b"\0/some/clone/")
    assert check_machine_paths(tmp_path, (Path("/some/clone"),)) == []
