"""Imports run one way: maths -> timm_models, nni_spaces -> leaves; a host is imported only where it is adapted to."""

import ast
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("optinspired_plugins", "timm_models", "nni_spaces")

# What a file may import beside the standard library; the first pattern that fits decides.
RULES = [
    ("optinspired_plugins/__init__.py", set()),
    ("optinspired_plugins/_autoload.py", set()),
    ("optinspired_plugins/mm.py", {"torch", "mmengine", "timm", "optinspired_plugins", "timm_models"}),
    ("optinspired_plugins/plotting/*", {"torch", "matplotlib", "optinspired_plugins"}),
    ("optinspired_plugins/report/*", {"optinspired_plugins"}),
    (
        "optinspired_plugins/cli.py",
        {"torch", "rich", "timm", "typer", "optinspired_plugins", "timm_models", "nni_spaces"},
    ),
    ("optinspired_plugins/cli_options.py", {"typer", "optinspired_plugins"}),
    ("optinspired_plugins/terminal.py", {"rich", "typer", "optinspired_plugins", "nni_spaces"}),
    ("optinspired_plugins/*", {"torch", "optinspired_plugins"}),
    ("timm_models/*", {"torch", "torchvision", "timm", "optinspired_plugins", "timm_models"}),
    ("nni_spaces/runs/data.py", {"torch", "numpy", "optinspired_plugins", "nni_spaces"}),
    ("nni_spaces/runs/image_sources.py", {"torchvision", "numpy", "PIL", "sklearn"}),
    (
        "nni_spaces/runs/retrain.py",
        {"torch", "timm", "pytorch_lightning", "torchmetrics", "safetensors"}
        | {"optinspired_plugins", "timm_models", "nni_spaces"},
    ),
    (
        "nni_spaces/trials/run.py",
        {"torch", "numpy", "nni", "optinspired_plugins", "nni_spaces"},
    ),
    ("nni_spaces/__init__.py", {"nni", "gym", "nni_spaces"}),
    ("nni_spaces/*", {"torch", "nni", "pytorch_lightning", "torchmetrics", "optinspired_plugins", "nni_spaces"}),
]

# Leaf -> the folders and files that may import it.
LEAVES = {
    "optinspired_plugins._autoload": (),
    "optinspired_plugins.mm": (),
    "optinspired_plugins.cli": (),
    "optinspired_plugins.cli_options": ("optinspired_plugins/cli.py",),
    "optinspired_plugins.report": ("optinspired_plugins/cli.py", "optinspired_plugins/report/"),
    "optinspired_plugins.terminal": ("optinspired_plugins/cli.py",),
    "optinspired_plugins.plotting": ("optinspired_plugins/cli.py", "optinspired_plugins/plotting/"),
}

# timm re-exports the first under a public module in spite of its name, and the second under none.
PUBLIC_TIMM = {"timm.layers._assert", "timm.models._features.FeatureGetterNet"}


def imports(source, file):
    """Yield (line, full dotted name) of every import statement, at any depth; ``from a import b`` is a.b."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = file.split("/")[: -node.level] if node.level else []
            module = ".".join([*parents, *filter(None, [node.module])])
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def is_within(name, module):
    return name == module or name.startswith(f"{module}.")


def fault_of(name, file):
    """Say why this file may not import this name; None if it may."""
    allowed = next(packages for pattern, packages in RULES if fnmatch(file, pattern))
    top = name.split(".")[0]
    if top not in allowed and top not in sys.stdlib_module_names:
        return f"only {', '.join(sorted(allowed)) or 'the standard library'} may be imported here"
    for leaf, importers in LEAVES.items():
        if is_within(name, leaf) and not file.startswith(importers or ("none",)):
            return f"{leaf} is a leaf"
    if top == "timm" and name not in PUBLIC_TIMM and any(part.startswith("_") for part in name.split(".")):
        return "this is private to timm"
    return None


def model_creations(source):
    """Lines that call create_model when the file is imported, which is before timm is complete."""
    pending = list(ast.parse(source).body)
    while pending:
        node = pending.pop()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            # Its body runs later; its decorators and defaults do not.
            pending += [*node.decorator_list, *node.args.defaults, *filter(None, node.args.kw_defaults)]
            continue
        if isinstance(node, ast.Lambda):
            continue
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "create_model":
            yield node.lineno
        pending += ast.iter_child_nodes(node)


def faults(source, file):
    """List what is wrong in a file, as 'file:line ...'."""
    wrong = [
        (line, f"imports {name}: {fault}") for line, name in imports(source, file) if (fault := fault_of(name, file))
    ]
    wrong += [(line, "calls create_model at import") for line in model_creations(source)]
    return [f"{file}:{line} {text}" for line, text in sorted(wrong)]


FILES = sorted(file.relative_to(ROOT).as_posix() for package in PACKAGES for file in (ROOT / package).rglob("*.py"))


def test_every_package_is_read():
    assert {file.split("/")[0] for file in FILES} == set(PACKAGES)


@pytest.mark.parametrize("file", FILES)
def test_imports_run_one_way(file):
    assert faults((ROOT / file).read_text(encoding="utf-8"), file) == []


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("optinspired_plugins/__init__.py", "import torch"),
        ("optinspired_plugins/_autoload.py", "import timm_models"),
        ("optinspired_plugins/algorithms/coefficients.py", "import timm"),
        ("optinspired_plugins/algorithms/coefficients.py", "def f():\n    from numpy import linalg"),
        ("optinspired_plugins/algorithms/coefficients.py", "from .. import cli"),
        ("optinspired_plugins/algorithms/coefficients.py", "from ..plotting import cells"),
        ("optinspired_plugins/algorithms/coefficients.py", "from timm_models.hbnet import HBNet"),
        ("optinspired_plugins/algorithms/coefficients.py", "from ... import examples"),
        ("optinspired_plugins/report/page.py", "import optinspired_plugins.mm as mm"),
        ("optinspired_plugins/mm.py", "import mmcv"),
        ("timm_models/hbnet.py", "import nni_spaces"),
        ("timm_models/hbnet.py", "import mmengine"),
        ("timm_models/hbnet.py", "from examples.digits import load"),
        ("timm_models/hbnet.py", "from timm.models._builder import build_model_with_cfg"),
        ("timm_models/hbnet.py", "from timm.models import _registry"),
        ("timm_models/hbnet.py", "import timm\nnet = timm.create_model('hbnet50')"),
        ("timm_models/hbnet.py", "class A:\n    net = [create_model(n) for n in 'ab']"),
        ("timm_models/hbnet.py", "def f(net=create_model('a')): ..."),
        ("timm_models/deep/hbnet.py", "from ..hbnet import HBNet\nfrom ... import nni_spaces"),
        ("nni_spaces/spaces/edges.py", "import timm"),
    ],
)
def test_a_fault_is_found(file, source):
    found = faults(source, file)
    assert len(found) == 1
    assert found[0].startswith(f"{file}:{len(source.splitlines())} ")


@pytest.mark.parametrize(
    ("file", "source"),
    [
        (
            "optinspired_plugins/algorithms/coefficients.py",
            "import math, torch.nn.functional\nfrom . import propagation",
        ),
        ("optinspired_plugins/cli.py", "from . import report\nfrom .plotting import cell"),
        ("timm_models/hbnet.py", "from __future__ import annotations\nfrom timm.models.resnet import ResNet"),
        ("timm_models/hbnet.py", "from timm.layers import _assert\nfrom optinspired_plugins import theta"),
        ("timm_models/hbnet.py", "def f():\n    return timm.create_model('hbnet50')"),
        ("nni_spaces/spaces/edges.py", "import nni.nas\nfrom optinspired_plugins.cells.genotype import Genotype"),
    ],
)
def test_no_fault_is_invented(file, source):
    assert faults(source, file) == []
