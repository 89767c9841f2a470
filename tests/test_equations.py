"""The table of the paper's equations: every number once, and every name in it exists."""

import re
from functools import reduce
from importlib import import_module
from pathlib import Path

import pytest
from extras import needs

from optinspired_plugins.propagation.rules import EQUATIONS

NUMBERS = [f"({n})" for n in range(1, 30)] + ["Table 1", "Table 3", "Table 6"]


def find(name):
    """Return the object of a dotted name; the module is the longest part that can be imported."""
    parts = name.split(".")
    for i in reversed(range(1, len(parts))):
        try:
            module = import_module(".".join(parts[:i]))
        except ModuleNotFoundError as error:
            if not f"{name}.".startswith(f"{error.name}."):
                raise  # a host that is not installed
            continue
        return reduce(getattr, parts[i:], module)
    raise ModuleNotFoundError(name)


def test_every_equation_stands_in_the_table_once():
    assert [equation.number for equation in EQUATIONS] == NUMBERS


@pytest.mark.parametrize("equation", EQUATIONS, ids=NUMBERS)
def test_every_name_exists(equation):
    if "nni_spaces" in equation.plain:
        needs("nni")
    for name in filter(None, equation[1:5]):
        assert find(name) is not None
    file, test = equation.test.split("::")
    source = Path(__file__).with_name(file).read_text(encoding="utf-8")
    assert re.search(rf"^def {test}\(", source, re.MULTILINE)
