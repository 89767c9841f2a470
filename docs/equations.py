"""The table from the paper's equations to functions, modules and tests, as a directive of the site.

The rows are those of ``optinspired_plugins.propagation.rules.EQUATIONS``; ``tests/test_equations.py`` tests that every
name in it exists, and ``tests/test_site.py`` that the API pages describe it.
"""

from __future__ import annotations

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.util.docutils import SphinxDirective

import nni_spaces
import optinspired_plugins
import timm_models
from optinspired_plugins.propagation.rules import EQUATIONS

__all__ = ["EquationTable", "public_name", "rows"]

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


def rows() -> list[tuple[str, str, str, str]]:
    """Return equation, function, forms in networks and test of every row, in MyST."""
    return [
        (
            equation.number,
            reference(equation.plain),
            ", ".join(reference(name) for name in equation[2:5] if name),
            "`{}`: `{}`".format(*equation.test.split("::")),
        )
        for equation in EQUATIONS
    ]


def reference(name: str) -> str:
    """Return a link to the description of a name, with the words that are enough to find it."""
    words = [word for word in name.split(".")[2:] if word != "spaces"]
    return f"{{py:obj}}`{'.'.join(words[-2:])} <{public_name(name)}>`"


class EquationTable(SphinxDirective):
    """``{equations}``: the table."""

    def run(self) -> list[nodes.Node]:
        """Return the table."""
        head = ("equation", "as printed", "in networks: modules, fast forms, for inference", "test")
        lines = [head, tuple("---" for _ in head), *rows()]
        node = nodes.container()
        self.state.nested_parse(StringList([f"| {' | '.join(line)} |" for line in lines], source="equations"), 0, node)
        return node.children
