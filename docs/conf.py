"""The site: ``make docs`` builds it; warnings are errors.

Sphinx, because autodoc reads the docstrings, which are in Captum's style, and doctest runs their
examples; with the theme on which PyTorch's own site is built.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(HERE)]
# The processes of the notebooks find the package of this tree too.
os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])

import captum_rlrp  # noqa: E402 - from the tree named above

project = "captum_rlrp"
author = "the captum_rlrp authors"
version = release = captum_rlrp.__version__

extensions = [
    "myst_nb",  # pages in Markdown, and notebooks in Markdown, which are executed
    "sphinx.ext.autodoc",
    "sphinx.ext.doctest",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
exclude_patterns = ["_build", "figures"]
html_theme = "pydata_sphinx_theme"
html_title = "captum_rlrp"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
html_theme_options = {"show_prev_next": False, "secondary_sidebar_items": ["page-toc"]}

myst_heading_anchors = 4
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_output_stderr = "remove"  # tqdm misses a widget there

autodoc_member_order = "bysource"
autodoc_typehints = "none"  # the docstrings say them
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_attr_annotations = False
doctest_global_setup = "from example_setup import *; enter()"
doctest_global_cleanup = "leave()"
doctest_test_doctest_blocks = "default"
