"""Settings of the documentation site; `scripts/docs` builds it."""

from __future__ import annotations

import logging
import sys
import warnings
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.config import Config

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

import reference_pages  # noqa: E402 - stands beside this file, which Sphinx does not import as a package

from lora_lightning import __version__  # noqa: E402 - as above

project = "lora_lightning"
author = "the authors of lora_lightning"
release = version = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]
templates_path = ["_templates"]

html_theme = "furo"
html_title = f"lora_lightning {release}"
html_show_sourcelink = False

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

# Docstrings write names in single backticks.
default_role = "code"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
autosummary_generate = True
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_default_options = {"members": True, "show-inheritance": True}

nitpicky = True
# Types in signatures belong to torch, Lightning and transformers, whose inventories cannot be fetched offline. Links
# between pages, sections and terms are all checked.
nitpick_ignore_regex = [("py:.*", ".*")]

# Lightning warns at import about an optional package that it does not need here.
warnings.filterwarnings("ignore")
logging.getLogger("lightning").setLevel(logging.ERROR)


def setup(app: Sphinx) -> None:
    """Write the generated pages before Sphinx lists its files."""
    app.connect("config-inited", write_reference)


def write_reference(app: Sphinx, config: Config) -> None:
    """Write the pages of the reference that come from the code."""
    del config
    reference_pages.write_all(Path(app.srcdir) / "reference" / "generated")
