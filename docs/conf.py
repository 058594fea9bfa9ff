"""The guides and the API reference as a site, built by Sphinx.

The command is ``python -m sphinx -W -b html docs build/site``, after ``pip install -c constraints.txt ".[docs]"``.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "executors")]

project = "flowtrain"
author = "The flowtrain maintainers"
html_title = "flowtrain"
html_theme = "alabaster"
html_theme_options = {"description": "Train PyTorch models with callbacks that cannot race.", "page_width": "1100px"}

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "myst_parser"]
default_role = "py:obj"  # a name in single backquotes is a link if the reference has it
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autoclass_content = "class"
napoleon_numpy_docstring = False
myst_heading_anchors = 4
