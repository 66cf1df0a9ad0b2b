"""Sphinx configuration: `sphinx-build -W docs docs/_build/html`, no network needed."""

from __future__ import annotations

import os
import sys
from importlib.metadata import version as installed_version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "_ext"))

# For the notebooks' kernels and the models of the list of names: no network, no bars in the output.
os.environ.update(HF_HUB_OFFLINE="1", TQDM_DISABLE="1", TOKENIZERS_PARALLELISM="false")

project = "lensbridge"
author = "lensbridge developers"
copyright = "2026, lensbridge developers"
release = installed_version("lensbridge")
version = release

extensions = [
    "names",  # docs/_ext/names.py
    "support",  # docs/_ext/support.py
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

exclude_patterns = ["_build", "generated/points.md", "generated/support.md"]
templates_path = ["_templates"]
nitpicky = False
# Several classes may have an attribute of one name ("device"); Sphinx calls a mention of it ambiguous.
suppress_warnings = ["ref.python"]

# Pages with code cells are run at every build, and a cell that fails ends it.
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 60
nb_execution_show_tb = True
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
