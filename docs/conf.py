"""How Sphinx builds the documentation: `make docs`."""

import sys
from pathlib import Path

import gradreg

sys.path.insert(0, str(Path(__file__).parent / "extensions"))

project = "gradreg"
author = "gradreg contributors"
copyright = "2026, gradreg contributors"
release = gradreg.__version__

extensions = [
    "executed",
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
]
myst_heading_anchors = 3
copybutton_exclude = ".linenos, .gp, .go"

autodoc_default_options = {"exclude-members": "extra_repr"}
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100
napoleon_use_rtype = False
napoleon_use_ivar = True

nitpicky = True  # a reference to a name of the library that there is not, is an error; other libraries are not asked
nitpick_ignore_regex = [("py:.*", r"(?!gradreg\.).*")]

html_theme = "furo"
html_title = "gradreg"
html_static_path = ["_static"]
html_css_files = ["gradreg.css"]
