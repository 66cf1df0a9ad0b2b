"""Sphinx configuration: `sphinx-build -W docs docs/_build/html`, no network needed."""

from __future__ import annotations

import os
from importlib.metadata import version as installed_version

project = "lensbridge"
author = "lensbridge developers"
copyright = "2026, lensbridge developers"
release = installed_version("lensbridge")
version = release

extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
if os.environ.get("LENSBRIDGE_DOCS_ONLINE"):
    # Links into other projects' documentation; off by default because the build must work offline.
    extensions.append("sphinx.ext.intersphinx")
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "torch": ("https://docs.pytorch.org/docs/stable", None),
    }

exclude_patterns = ["_build"]
templates_path = ["_templates"]
nitpicky = False

# Notebooks and code cells are shown as they are stored; "force" runs them at every build.
nb_execution_mode = "off"
nb_execution_raise_on_error = True
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3

# One page a module, found by walking the package: a new module needs no entry here.
autosummary_generate = True
autosummary_ignore_module_all = True
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_custom_sections = [("Source", "returns_style")]

html_theme = "furo"
html_title = f"lensbridge {release}"
