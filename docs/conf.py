"""Settings of the documentation site: ``make docs`` builds it to ``docs/_build/html``."""

from __future__ import annotations

import os
import re
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
sys.path[:0] = [str(DOCS), str(ROOT)]

from docutils import nodes
from docutils.statemachine import StringList
from equations import PUBLIC, table
from gallery import STAGED, stage_examples
from notebooks import write_notebooks
from sphinx.addnodes import desc_signature
from sphinx.util.docutils import SphinxDirective

import optinspired_plugins

project = "optinspired-plugins"
author = "The optinspired-plugins authors"
copyright = f"{author}, Apache-2.0"
version = release = optinspired_plugins.__version__
language = "en"
smartquotes = False  # options begin with two hyphens

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_build", "results/*"]
html_theme = "furo"
html_title = "optinspired-plugins"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_show_sourcelink = False
copybutton_exclude = ".linenos, .gp"

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 4
myst_links_external_new_tab = False

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False

# --- hosts that may be absent -----------------------------------------------------------------------------------------

# Pages of the API that need a host -> a module that imports it.
ADAPTERS = {"api/nni_spaces": "nni_spaces._nni", "api/mm": "optinspired_plugins.mm"}


def is_installed(adapter: str) -> bool:
    """Return True if a module and its host can be imported."""
    try:
        import_module(adapter)
    except ImportError:
        return False
    return True


def without_absent_hosts(app: Any, docname: str, source: list[str]) -> None:
    """Leave out the descriptions on a page about a host that is not installed."""
    if docname in ADAPTERS and not is_installed(ADAPTERS[docname]):
        note = "The host of this package was not installed where this site was built."
        source[0] = re.sub(r"```\{eval-rst\}.*?```", note, source[0], flags=re.DOTALL)


# --- the gallery, and notebooks ---------------------------------------------------------------------------------------

is_run, has_searches = bool(os.environ.get("EXAMPLES")), is_installed("nni_spaces._nni")
stage_examples(has_searches)
write_notebooks(is_run, has_searches)
sphinx_gallery_conf = {
    "examples_dirs": str(STAGED),
    "gallery_dirs": "examples",
    "filename_pattern": r"/\d\d_\w+\.py$",
    "plot_gallery": is_run,
    "reset_argv": "gallery.arguments",
    "within_subsection_order": "FileNameSortKey",
    "notebook_extensions": set(),  # examples are commands; notebooks.py makes notebooks of the guide
    "download_all_examples": False,
    "write_computation_times": False,
    "show_memory": False,
    "show_signature": False,
    "min_reported_time": 1e9,
}

# --- the table of equations -------------------------------------------------------------------------------------------


class EquationTable(SphinxDirective):
    """``{equations}``: the table from the paper to the code."""

    def run(self) -> list[nodes.Node]:
        """Return the table."""
        node = nodes.container(classes=["equations"])
        self.state.nested_parse(StringList(table(), source="equations"), 0, node)
        return [node]


# --- links out of this folder -----------------------------------------------------------------------------------------

LINK = re.compile(r"(?<!!)\[([^\]]*)\]\((?!http|#)([^)\s]+)\)")


def plain_links(app: Any, docname: str, source: list[str]) -> None:
    """Replace links to folders, and to files beside the site, which the repository's pages have, by their text."""
    source[0] = LINK.sub(lambda link: link[0] if is_page(docname, link[2]) else link[1], source[0])


def is_page(docname: str, target: str) -> bool:
    """Return True if a relative link leads to a file of the site."""
    file = (DOCS / docname).parent.joinpath(target.partition("#")[0]).resolve()
    return file.is_relative_to(DOCS) and not file.is_dir()


def name_twice(app: Any, doctree: Any) -> None:
    """Give an object of the API also the place under which its source links to it."""
    defined = {public: name for name, public in PUBLIC.items()}
    for signature in doctree.findall(desc_signature):
        signature["ids"] += [defined[name] for name in signature["ids"] if name in defined]


def forget_builtins(app: Any, env: Any) -> None:
    """Take out of the list of sources the module of attributes that are plain values; viewcode makes no page of it."""
    env._viewcode_modules.pop("builtins", None)


def setup(app: Any) -> None:
    """Connect the functions of this file."""
    app.add_directive("equations", EquationTable)
    app.connect("source-read", plain_links)
    app.connect("source-read", without_absent_hosts)
    app.connect("doctree-read", name_twice)
    app.connect("env-updated", forget_builtins)
