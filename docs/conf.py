"""Sphinx configuration; ``sphinx-build -W -b html docs docs/_build`` builds the pages."""

import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT))  # the installed package, if there is one; else the source tree, which is all that docs need

import fedfuse_jax  # noqa: E402

project = "FedFuse-JAX"
author = "The FedFuse-JAX developers"
copyright = author
version = release = fedfuse_jax.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
]
exclude_patterns = ["_build", "benchmarks_table.md", "gpu_table.md"]  # the latter are included in pages
nitpicky = False
default_role = "code"

myst_enable_extensions = ["attrs_inline", "colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "none"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_use_admonition_for_examples = False
napoleon_custom_sections = ["Source"]

html_theme = "furo"
html_title = f"FedFuse-JAX {version}"
html_static_path = ["_static"]
html_css_files = ["fedfuse.css"]
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#1f6f78", "color-brand-content": "#1f6f78"},
    "dark_css_variables": {"color-brand-primary": "#5fb3bd", "color-brand-content": "#5fb3bd"},
}

# --- Docstrings ------------------------------------------------------------------------------------------------

_POINT = re.compile(r"(\s+)(\*\w+\*(?: and \*\w+\*)?: .*)")


def _list_notes(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Makes a list of Notes: a line that begins with ``*Sharding*: `` begins an item. Runs before napoleon."""
    if "Notes:" not in lines:
        return
    in_list = False
    for number in range(lines.index("Notes:") + 1, len(lines)):
        if point := _POINT.fullmatch(lines[number]):
            lines[number] = f"{point[1]}- {point[2]}"
            in_list = True
        elif in_list and lines[number]:
            lines[number] = "  " + lines[number]


def setup(app: Any) -> None:
    """Registers what this file adds to Sphinx."""
    app.connect("autodoc-process-docstring", _list_notes, priority=100)
