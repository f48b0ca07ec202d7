"""Sphinx's settings of the documentation.

sphinx-build -W --keep-going -b html docs build/html        # the site
sphinx-build -W --keep-going -b linkcheck docs build/links  # external links; needs a network
"""

import re
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import tomllib
from sphinx.application import Sphinx

sys.path.insert(0, str(Path(__file__).parent / "_extensions"))

import dat_ds

project = "dat_ds"
author = "The dat_ds developers"
project_copyright = author
version = release = dat_ds.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "repository_links",
]
exclude_patterns = ["_extensions"]

# Links to files that are not pages lead there.
_project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text("utf-8"))
_repository = _project["project"]["urls"]["Repository"]
repository_url = f"{_repository}/blob/main"

# The pages are read on GitHub as well: its anchors, its tables, its alerts.
myst_heading_anchors = 6
myst_links_external_new_tab = False

highlight_language = "text"  # of blocks that name none

html_theme = "furo"
html_title = f"dat_ds {release}"
html_show_copyright = False
html_copy_source = False
html_static_path = ["_static"]
html_css_files = ["tables.css"]

autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
default_role = "code"
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False

# A role in a docstring that names something of ours has to find it; classes are also what every
# annotation refers to, private ones among them.
nitpicky = True
nitpick_ignore_regex = [(r"py:(class|mod|obj)", r".*"), (r"py:.*", r"(?!dat_ds\.).*")]

linkcheck_anchors = False  # GitHub's pages make theirs with JavaScript
linkcheck_ignore = [re.escape(_repository)]


def reachable(url: str) -> bool:
    """Whether an inventory can be fetched, so that a build without a network has no warnings."""
    try:
        with urllib.request.urlopen(f"{url}/objects.inv", timeout=5):
            return True
    except (urllib.error.URLError, TimeoutError):
        return False


intersphinx_mapping = {
    name: (url, None)
    for name, url in {
        "numpy": "https://numpy.org/doc/stable",
        "python": "https://docs.python.org/3",
        "torch": "https://docs.pytorch.org/docs/stable",
    }.items()
    if reachable(url)
}


def keep_attribute_text(
    app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]
) -> None:
    """Keep napoleon from reading an attribute's text before a colon as its type."""
    if what in ("attribute", "data", "property"):
        lines[:0] = ["..", ""]  # an empty comment


def setup(app: Sphinx) -> None:
    """Sphinx's entry point."""
    app.connect("autodoc-process-docstring", keep_attribute_text, priority=400)  # napoleon: 500
