"""The examples as pages: copies that sphinx-gallery can read, and the command line of each."""

from __future__ import annotations

import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

__all__ = ["STAGED", "arguments", "stage_examples"]

DOCS = Path(__file__).resolve().parent
STAGED = DOCS / "_build" / "examples"
HEADER = """\
Examples
========

Complete programs of the folder ``examples``, each of them a command. ``make docs EXAMPLES=1`` runs them, which takes
minutes, and then the pages show their output.
"""


def stage_examples(with_searches: bool) -> None:
    """Copy the examples for sphinx-gallery, with a line under the title of each.

    Args:
        with_searches: copy the examples that need NNI, too; sphinx-gallery imports the names in an example.
    """
    shutil.rmtree(STAGED, ignore_errors=True)
    STAGED.mkdir(parents=True)
    (STAGED / "GALLERY_HEADER.rst").write_text(HEADER, encoding="utf-8")
    for file in sorted((DOCS.parent / "examples").glob("*.py")):
        first, _, rest = file.read_text(encoding="utf-8").partition("\n")
        rest = rest.replace("\n    ", "\n::\n\n    ", 1) if rest.startswith("\n    ") else rest  # the command
        if "nni_spaces" in rest and not with_searches:
            continue
        if "import optuna" in rest and find_spec("optuna") is None:
            continue
        title = first.removeprefix('"""').rstrip(".")
        rest = rest.replace("__doc__.splitlines()[0]", repr(title))  # sphinx-gallery runs them without a docstring
        (STAGED / file.name).write_text(f'"""\n{title}\n{"=" * len(title)}\n{rest}', encoding="utf-8")


def arguments(_: Any, script_vars: dict[str, Any]) -> list[str]:
    """Return the command line of an example."""
    return ["--out", str(DOCS / "_build" / "runs" / Path(script_vars["src_file"]).stem)]
