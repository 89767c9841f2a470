"""The table from the paper's equations to functions, modules and tests, for the directive ``{equations}`` of the site.

The rows come from ``optinspired_plugins.propagation.rules.EQUATIONS``; ``tests/test_equations.py`` tests that every
name in it exists, and ``tests/test_site.py`` that the API pages describe it.
"""

from __future__ import annotations

import nni_spaces
import optinspired_plugins
import timm_models
from optinspired_plugins.propagation.rules import EQUATIONS

__all__ = ["PUBLIC", "public_name", "table"]

# Where a public name is defined -> the name in the API. The lazy packages know it without an import.
PUBLIC = {
    f"{package.__name__}.{module}.{name}": f"{package.__name__}.{name}"
    for package in (optinspired_plugins, nni_spaces)
    for name, module in package._EXPORTS.items()
} | {
    f"{value.__module__}.{name}": f"timm_models.{name}"
    for name in timm_models.__all__
    if hasattr(value := getattr(timm_models, name), "__module__")
}


def public_name(name: str) -> str:
    """Return the name under which the API pages describe an object or a method."""
    parent, _, last = name.rpartition(".")
    return PUBLIC.get(name) or (f"{PUBLIC[parent]}.{last}" if parent in PUBLIC else name)


def table() -> list[str]:
    """Return the lines of the table, in MyST."""
    head = ("equation", "as printed", "in networks: modules, fast forms, for inference", "test")
    rows = [
        (
            equation.number,
            reference(equation.plain),
            ", ".join(reference(name) for name in equation[2:5] if name),
            in_words(equation.test),
        )
        for equation in EQUATIONS
    ]
    return [f"| {' | '.join(row)} |" for row in (head, ("---",) * len(head), *rows)]


def in_words(test: str) -> str:
    """Return a test as its file and the words of its name."""
    file, name = test.split("::test_")
    return f"`{file}`: {name.replace('_', ' ')}"


def reference(name: str) -> str:
    """Return a link to the description of a name, with the words that are enough to find it."""
    words = [word for word in name.split(".")[2:] if word != "spaces"]
    return f"{{py:obj}}`{'.'.join(words[-2:])} <{public_name(name)}>`"
