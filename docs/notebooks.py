"""The guide's pages about the three doors as notebooks."""

from __future__ import annotations

import re
from pathlib import Path
from tempfile import TemporaryDirectory
from textwrap import dedent

import nbformat
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

__all__ = ["DOORS", "NOTEBOOKS", "make_notebook", "write_notebooks"]

DOCS = Path(__file__).resolve().parent
NOTEBOOKS = DOCS / "_build" / "notebooks"
# Name of the notebook -> page.
DOORS = {
    "use-a-model": "guide/models",
    "bring-an-algorithm": "guide/algorithm",
    "search-a-cell": "guide/spaces",
}
# A block may be the text of a definition, and is then indented.
BLOCK = re.compile(r"^(?:: )?( *)```python\n(.*?)^\1 *```$", re.DOTALL | re.MULTILINE)
# Links to other pages, pictures and roles have no meaning outside the site.
LINK = re.compile(r"!?\[([^\]]*)\]\((?!http)[^)]*\)|\{py:\w+\}`~?(?:[\w.]*\.)?(\w+)`")


def make_notebook(text: str) -> nbformat.NotebookNode:
    """Return the notebook of a page: a cell for each block of Python, and cells of text between them."""
    cells, end = [], 0
    for block in BLOCK.finditer(text):
        cells += [_text(text[end : block.start()]), new_code_cell(dedent(block[2]).rstrip())]
        end = block.end()
    return new_notebook(cells=[cell for cell in [*cells, _text(text[end:])] if cell.source])


def _text(text: str) -> nbformat.NotebookNode:
    return new_markdown_cell(LINK.sub(lambda link: link[1] or f"`{link[2]}`", text).strip())


def run(notebook: nbformat.NotebookNode) -> None:
    """Run the cells in a temporary folder, and keep their output without the lines on stderr."""
    with TemporaryDirectory() as folder:
        NotebookClient(notebook, timeout=600, resources={"metadata": {"path": folder}}).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]


def write_notebooks(execute: bool, with_searches: bool) -> None:
    """Write the notebooks to ``docs/_build/notebooks``.

    Args:
        execute: run them, and keep their output.
        with_searches: run the one about searches, too, which needs NNI.

    Raises:
        nbclient.exceptions.CellExecutionError: a cell fails.
    """
    NOTEBOOKS.mkdir(parents=True, exist_ok=True)
    for name, page in DOORS.items():
        notebook = make_notebook((DOCS / f"{page}.md").read_text(encoding="utf-8"))
        if execute and (with_searches or page != DOORS["search-a-cell"]):
            run(notebook)
        nbformat.write(notebook, NOTEBOOKS / f"{name}.ipynb")
