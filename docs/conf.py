"""Sphinx configuration: `make docs` builds with warnings as errors; DOCS_INTERSPHINX=1 links to other projects."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent / "_extensions"))

from importlib.metadata import version as installed_version

project = "qcompress"
author = "the qcompress developers"
copyright = "the qcompress developers"  # noqa: A001 - Sphinx names it so
release = version = installed_version("qcompress")

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.intersphinx",
    "sphinx.ext.viewcode",
    "myst_parser",
    "sphinx_gallery.gen_gallery",
    "sphinx_copybutton",
    "command_line",
]
exclude_patterns = ["_build", "_extensions"]
default_role = "py:obj"
html_theme = "furo"
html_title = f"qcompress {release}"
html_show_sourcelink = False

autodoc_typehints = "description"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": True}
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_preprocess_types = True

myst_enable_extensions = ["colon_fence", "dollarmath", "deflist"]
myst_heading_anchors = 3

# the builders of this project have no network; on one that has, references to other projects become links
intersphinx_mapping = (
    {
        "python": ("https://docs.python.org/3", None),
        "numpy": ("https://numpy.org/doc/stable", None),
        "torch": ("https://docs.pytorch.org/docs/stable", None),
        "dimod": ("https://docs.dwavequantum.com/en/latest", None),
    }
    if os.environ.get("DOCS_INTERSPHINX")
    else {}
)

sphinx_gallery_conf = {
    "examples_dirs": "../examples",
    "gallery_dirs": "tutorials",
    "filename_pattern": r"/\w+\.py$",  # every example is executed; one that fails, fails the build
    "abort_on_example_error": True,
    "within_subsection_order": "FileNameSortKey",
    "download_all_examples": False,
    "show_memory": False,
    "show_signature": False,
    "remove_config_comments": True,
    "min_reported_time": 1_000_000,
    "write_computation_times": False,
}
suppress_warnings = ["config.cache"]  # the gallery's settings hold functions, which Sphinx cannot store
