"""Draw which room of the packages imports which.

    python benchmarks/import_picture.py docs/figures/imports.png

A room is a folder, or files that belong together. The rooms are in order: each may import from itself and from the
rooms before it, so that all dots are below the diagonal. ``tests/test_layering.py`` holds the order.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

__all__ = ["FILES", "LEAVES", "ROOMS", "Room", "file_of", "imports", "room_of"]

ROOT = Path(__file__).parents[1]


class Room(NamedTuple):
    """A room: its name, the files in it, and the packages that they may import beside the standard library."""

    name: str
    files: tuple[str, ...]
    hosts: frozenset[str] = frozenset()


def _room(name: str, files: str, hosts: str = "") -> Room:
    return Room(name, tuple(files.split()), frozenset(hosts.split()))


# A file belongs to the first room that has a pattern for it.
_CORE, _TIMM, _NNI = "optinspired_plugins", "timm_models", "nni_spaces"
ROOMS = [
    _room("entry points", f"{_CORE}/__init__.py {_CORE}/_autoload.py"),
    _room("files and checks", f"{_CORE}/_checks.py {_CORE}/_extras.py {_CORE}/_files.py {_CORE}/run_folder.py"),
    _room("memory", f"{_CORE}/memory/*", "torch triton"),
    _room("algorithms", f"{_CORE}/algorithms/*", "torch"),
    _room("propagation", f"{_CORE}/propagation/*", "torch"),
    _room("cells", f"{_CORE}/cells/* {_CORE}/counting.py", "torch"),
    _room("simulation", f"{_CORE}/simulation.py", "torch"),
    _room("plotting", f"{_CORE}/plotting/*", "torch matplotlib"),
    _room("report", f"{_CORE}/report/* {_CORE}/next_steps.py"),
    _room("terminal", f"{_CORE}/terminal.py", "rich typer"),
    _room(
        "timm: helpers",
        f"{_TIMM}/_cfgs.py {_TIMM}/_conversions.py {_TIMM}/_host.py {_TIMM}/strides.py",
        "torch torchvision timm",
    ),
    _room("timm: inference", f"{_TIMM}/inference/*", "torch timm"),
    _room("timm: stages", f"{_TIMM}/stages/*", "torch timm"),
    _room("timm: models", f"{_TIMM}/*", "torch torchvision timm"),
    _room("nni: helpers", f"{_NNI}/_*.py", "nni pytorch_lightning"),
    _room("nni: spaces", f"{_NNI}/spaces/*", "torch nni"),
    _room("nni: strategies", f"{_NNI}/strategies/*", "torch nni pytorch_lightning"),
    _room(
        "nni: runs",
        f"{_NNI}/runs/*",
        "torch torchvision torchmetrics numpy PIL sklearn nni pytorch_lightning timm safetensors",
    ),
    _room("nni: trials", f"{_NNI}/trials/*", "torch torchmetrics numpy nni pytorch_lightning"),
    _room("nni: commands", f"{_NNI}/cli.py", "typer"),
    _room("mmengine", f"{_CORE}/mm.py", "torch mmengine timm"),
    _room("command", f"{_CORE}/cli.py", "torch rich typer"),
]
# Nothing imports these but Python's entry points and configs.
LEAVES = (f"{_CORE}.mm", f"{_CORE}.cli", f"{_CORE}._autoload")
FILES = sorted(
    file.relative_to(ROOT).as_posix() for package in (_CORE, _TIMM, _NNI) for file in (ROOT / package).rglob("*.py")
)


def room_of(file: str) -> int:
    """Return the number of a file's room."""
    return next(i for i, room in enumerate(ROOMS) if any(fnmatch(file, pattern) for pattern in room.files))


def imports(source: str, file: str) -> Iterator[tuple[int, str]]:
    """Yield line and full dotted name of every import, at any depth; ``from a import b`` is a.b."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = file.split("/")[: -node.level] if node.level else []
            module = ".".join([*parents, *filter(None, [node.module])])
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def file_of(name: str) -> str | None:
    """Return the file of ours that a dotted name stands for, or stands in."""
    parts = name.split(".")
    for length in (len(parts), len(parts) - 1):
        path = "/".join(parts[:length])
        for file in (f"{path}.py", f"{path}/__init__.py"):
            if file in FILES:
                return file
    return None


def draw(path: Path) -> None:
    """Draw a matrix: a dot where the row's room imports the column's, its size by the number of imports."""
    from matplotlib.figure import Figure

    counts: dict[tuple[int, int], int] = {}
    for file in FILES:
        for _, name in imports((ROOT / file).read_text(encoding="utf-8"), file):
            target = file_of(name)
            if target is not None and room_of(target) != room_of(file):
                pair = room_of(file), room_of(target)
                counts[pair] = counts.get(pair, 0) + 1
    figure = Figure(figsize=(8.2, 6.2), layout="constrained")
    axes = figure.subplots()
    names = [room.name for room in ROOMS]
    rows, columns = zip(*counts)
    axes.fill_between([-0.5, len(names) - 0.5], [-0.5, len(names) - 0.5], -0.5, color="0.94", linewidth=0)
    axes.scatter(columns, rows, s=[18 + 9 * count for count in counts.values()], color="#0072B2", zorder=2)
    axes.set_xticks(range(len(names)), names, rotation=50, ha="right", rotation_mode="anchor", fontsize=8)
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.set(xlim=(-0.5, len(names) - 0.5), ylim=(len(names) - 0.5, -0.5), xlabel="is imported", ylabel="imports")
    axes.grid(color="0.88", linewidth=0.6, zorder=0)
    axes.text(len(names) - 1, 0.4, "no import goes here", ha="right", va="center", color="0.45", fontsize=9)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    draw(Path(sys.argv[1]))
