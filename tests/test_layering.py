"""Imports run one way, from room to room, and a host is imported only where it is adapted."""

import ast
import sys
from pathlib import Path

import pytest
from extras import needs
from import_picture import FILES, LEAVES, ROOMS, file_of, imports, room_of

ROOT = Path(__file__).parents[1]
PACKAGES = ("optinspired_plugins", "timm_models", "nni_spaces")
# timm re-exports the first under a public module in spite of its name, and the second under none.
PUBLIC_TIMM = {"timm.layers._assert", "timm.models._features.FeatureGetterNet"}


def fault_of(name, file):
    """Return the reason why a file may not import a name, None if it may."""
    room, top = ROOMS[room_of(file)], name.split(".")[0]
    if top in PACKAGES:
        target = file_of(name)
        if target is not None and room_of(target) > room_of(file):
            return f"the room '{ROOMS[room_of(target)].name}' comes after '{room.name}'"
        if any(name == leaf or name.startswith(f"{leaf}.") for leaf in LEAVES):
            return "nothing imports this module"
        if top == "timm_models" and not file.startswith(top) and "timm" not in room.hosts:
            return f"'{room.name}' knows no timm"
    elif top not in room.hosts and top not in sys.stdlib_module_names:
        return f"only {', '.join(sorted(room.hosts)) or 'the standard library'} may be imported here"
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


def test_every_package_is_read_and_every_room_has_files():
    assert {file.split("/")[0] for file in FILES} == set(PACKAGES)
    assert {room_of(file) for file in FILES} == set(range(len(ROOMS)))


@pytest.mark.parametrize("file", FILES)
def test_imports_run_one_way(file):
    assert faults((ROOT / file).read_text(encoding="utf-8"), file) == []


@pytest.mark.parametrize("file", [file for file in FILES if file.startswith("nni_spaces/") and "_nni" not in file])
def test_nni_is_imported_quietly(file):
    names = [name for _, name in imports((ROOT / file).read_text(encoding="utf-8"), file)]
    hosts = [i for i, name in enumerate(names) if name.split(".")[0] in ("nni", "pytorch_lightning")]
    assert not hosts or "nni_spaces._nni" in names[: hosts[0]]


CORE = "optinspired_plugins/algorithms/coefficients.py"


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("optinspired_plugins/__init__.py", "import torch"),
        ("optinspired_plugins/_autoload.py", "import timm_models"),
        (CORE, "import timm"),
        (CORE, "def f():\n    from numpy import linalg"),
        (CORE, "from .. import cli"),
        (CORE, "from ..plotting import cells"),
        (CORE, "from timm_models.hbnet import HBNet"),
        (CORE, "from ... import examples"),
        ("optinspired_plugins/memory/heavy_ball.py", "from ..algorithms import rates"),
        ("optinspired_plugins/memory/heavy_ball.py", "import timm"),
        ("optinspired_plugins/report/page.py", "import optinspired_plugins.mm as mm"),
        ("optinspired_plugins/mm.py", "import mmcv"),
        ("optinspired_plugins/cli.py", "from .mm import HBNet"),
        ("timm_models/hbnet.py", "import nni_spaces"),
        ("timm_models/hbnet.py", "import mmengine"),
        ("timm_models/hbnet.py", "from examples.digits import load"),
        ("timm_models/hbnet.py", "from timm.models._builder import build_model_with_cfg"),
        ("timm_models/hbnet.py", "from timm.models import _registry"),
        ("timm_models/hbnet.py", "import timm\nnet = timm.create_model('hbnet50')"),
        ("timm_models/hbnet.py", "class A:\n    net = [create_model(n) for n in 'ab']"),
        ("timm_models/hbnet.py", "def f(net=create_model('a')): ..."),
        ("timm_models/inference/folding.py", "from ..stages.heavy_ball import HeavyBallStage"),
        ("timm_models/deep/hbnet.py", "from ..hbnet import HBNet\nfrom ... import nni_spaces"),
        ("nni_spaces/spaces/edges.py", "import timm"),
        ("nni_spaces/spaces/edges.py", "import timm_models"),
        ("nni_spaces/spaces/edges.py", "from ..runs.search import search"),
    ],
)
def test_a_fault_is_found(file, source):
    messages = faults(source, file)
    assert len(messages) == 1
    assert messages[0].startswith(f"{file}:{len(source.splitlines())} ")


@pytest.mark.parametrize(
    ("file", "source"),
    [
        (CORE, "import math, torch.nn.functional\nfrom . import objectives\nfrom .._checks import check_int"),
        ("optinspired_plugins/cli.py", "from . import report\nfrom .plotting import cells"),
        ("timm_models/hbnet.py", "from __future__ import annotations\nfrom timm.models.resnet import ResNet"),
        ("timm_models/hbnet.py", "from timm.layers import _assert\nfrom optinspired_plugins import theta"),
        ("timm_models/hbnet.py", "def f():\n    return timm.create_model('hbnet50')"),
        ("nni_spaces/spaces/edges.py", "import nni.nas\nfrom optinspired_plugins.cells.genotype import Genotype"),
        ("nni_spaces/runs/retrain.py", "import timm_models"),
    ],
)
def test_no_fault_is_invented(file, source):
    assert faults(source, file) == []


@pytest.mark.slow
def test_the_picture_is_drawn(tmp_path):
    needs("matplotlib")
    from import_picture import draw

    draw(tmp_path / "imports.svg")
    assert (
        "no import goes here" in (tmp_path / "imports.svg").read_text()
        or (tmp_path / "imports.svg").stat().st_size > 9999
    )
