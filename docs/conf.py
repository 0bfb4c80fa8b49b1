"""Sphinx configuration. Build with: uv run --group doc sphinx-build -W -b html docs docs/_build/html."""

from __future__ import annotations

import shutil
from importlib.metadata import metadata
from pathlib import Path
from typing import Any

from sphinx.ext.napoleon import NumpyDocstring

info = metadata("epivi")

project = info["Name"]
author = "the epivi developers"
copyright = f"2026, {author}"
version = release = info["Version"]
repository_url = "https://github.com/epivi/epivi"

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",  # before sphinx_autodoc_typehints, which adds the types of the signature to its fields
    "sphinx_autodoc_typehints",
    "sphinxcontrib.bibtex",
]

# The notebooks live at the top level; Sphinx reads documents below its own folder only
shutil.copytree(Path(__file__).parents[1] / "tutorials", Path(__file__).parent / "tutorials", dirs_exist_ok=True)

source_suffix = {".rst": "restructuredtext", ".md": "myst-nb", ".ipynb": "myst-nb"}
exclude_patterns = ["_build", "**.ipynb_checkpoints"]
templates_path = ["_templates"]
needs_sphinx = "8.1"
nitpicky = False

# Docstrings: NumPy sections, types from the signature alone
napoleon_google_docstring = False
napoleon_numpy_docstring = True
napoleon_use_rtype = False
napoleon_use_param = True
typehints_defaults = "braces"
always_use_bars_union = True
autodoc_member_order = "groupwise"
autodoc_typehints = "none"
autosummary_generate = True
autosummary_ignore_module_all = False  # a room shows what its __all__ names

# Imports under TYPE_CHECKING are for type checkers; a name that cannot be resolved is shown as it is written.
suppress_warnings = ["sphinx_autodoc_typehints.forward_reference", "sphinx_autodoc_typehints.guarded_import"]

myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "cache"
nb_execution_raise_on_error = True
nb_execution_timeout = 600

bibtex_bibfiles = ["references.bib"]
bibtex_reference_style = "author_year"
bibtex_default_style = "alpha"

intersphinx_mapping = {
    "anndata": ("https://anndata.readthedocs.io/en/stable/", None),
    "mudata": ("https://mudata.readthedocs.io/stable/", None),
    "numpy": ("https://numpy.org/doc/stable/", None),
    "python": ("https://docs.python.org/3", None),
    "scvi-tools": ("https://docs.scvi-tools.org/en/stable/", None),
}

html_theme = "furo"
html_title = "epivi"
html_static_path = ["_static"]
html_theme_options = {
    "source_repository": repository_url,
    "source_branch": "main",
    "source_directory": "docs/",
}

FOREIGN = {"lightning", "pytorch_lightning", "scvi", "torch"}


def skip_foreign_members(_app: Any, _what: str, _name: str, obj: object, *_rest: Any) -> bool | None:
    """Leave out what a model inherits from other packages: it is documented there, with citations we do not have."""
    function = getattr(obj, "fget", None) or getattr(obj, "__func__", obj)
    module = getattr(function, "__module__", None) or ""
    return True if module.split(".")[0] in FOREIGN else None


def returns_as_prose(section: Any, *_args: Any, **_kwargs: Any) -> list[tuple[str, str, list[str]]]:
    """Read a section Returns as text: its types are those of the signature, and a list in it is a list."""
    lines = section._dedent(section._consume_to_next_section())
    if lines and lines[0].strip() == ":":
        # sphinx-autodoc-typehints marks the section so, and indents its first paragraph if that is a sentence
        lines = lines[1:]
        end = next((i for i, line in enumerate(lines) if not line.strip()), len(lines))
        lines[:end] = section._dedent(lines[:end])
    return [("", "", lines)]


NumpyDocstring._consume_returns_section = returns_as_prose


def setup(app: Any) -> None:
    """Connect the hook above."""
    app.connect("autodoc-skip-member", skip_foreign_members)
