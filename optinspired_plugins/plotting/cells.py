"""Figures of the cells of a genotype, and of the pattern of an algorithm."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, PathPatch
from matplotlib.path import Path

from ..cells.drawing import COLOURS, HEIGHT, LOOKS, WIDTH, Box, Layout, Look, Point, lay_out, rounded
from ..cells.genotype import CellGenotype, Edge, Genotype
from ..propagation.patterns import LINEAR, Pattern, PatternEdge

__all__ = ["draw_cell", "draw_cells", "draw_pattern"]

CROWDED = 6


def draw_cell(cell: CellGenotype, title: str = "", axes: Axes | None = None) -> Figure:
    """Draw a cell from left to right: inputs, nodes with their edges, and output.

    Args:
        cell: ``genotype.normal`` or ``genotype.reduction``.
        title: above the drawing.
        axes: axes to draw on; ``None`` for a new figure.
    """
    return _draw_layout(lay_out(cell), title, axes, lambda edge: LOOKS[edge.operation])


def draw_pattern(pattern: Pattern, title: str = "", axes: Axes | None = None) -> Figure:
    """Draw the pattern of an algorithm as a cell.

    T is a layer of the source, and a number the weight. Linear edges are orange, or red where their weight is negative.
    Where a node has more than six edges, both edges from a source are one line.

    Args:
        pattern: from :func:`~optinspired_plugins.propagation.patterns.pattern`.
        title: above the drawing.
        axes: axes to draw on; ``None`` for a new figure.
    """
    is_crowded = max(map(len, pattern.nodes)) > CROWDED
    groups = [_by_source(node) if is_crowded else [[edge] for edge in node] for node in pattern.nodes]
    looks = [[_look(group) for group in node] for node in groups]
    cell = tuple(tuple(Edge(f"{t} {k}", group[0].source) for k, group in enumerate(n)) for t, n in enumerate(groups))

    def look_of(edge: Edge) -> Look:
        t, k = map(int, edge.operation.split())
        return looks[t][k]

    return _draw_layout(lay_out(cell), title, axes, look_of)


def _by_source(node: Sequence[PatternEdge]) -> list[list[PatternEdge]]:
    groups: dict[int, list[PatternEdge]] = {}
    for edge in node:
        groups.setdefault(edge.source, []).append(edge)
    return list(groups.values())


def _look(edges: Sequence[PatternEdge]) -> Look:
    """Return the weights as label, and the colour of a layer, of an identity or of a negative identity."""
    signs = ["−" if edge.weight < 0 else "+" for edge in edges]
    numbers = [f"{abs(edge.weight):.2g}" for edge in edges]
    terms = [number if e.kind == LINEAR else f"{number} T".removeprefix("1 ") for e, number in zip(edges, numbers)]
    label = " ".join(f"{sign} {term}" for sign, term in zip(signs, terms)).replace(" ", "", 1)
    if edges[0].kind == LINEAR:
        return Look(label, "neg" if edges[0].weight < 0 else "skip")
    return Look(label.removeprefix("+"), "sep")


def _draw_layout(layout: Layout, title: str, axes: Axes | None, look_of: Callable[[Edge], Look]) -> Figure:
    if axes is None:
        axes = Figure(figsize=(layout.width / 90, layout.height / 90 + 0.3), layout="constrained").subplots()
    for corners in layout.concat:
        _draw_wire(axes, corners, COLOURS["none"], 1.0, corners is layout.concat[-1])
    for wire in layout.wires:
        look = look_of(wire.edge)
        _draw_wire(axes, wire.corners, COLOURS[look.family], 1.6, True)
        axes.text(*wire.label, look.label, ha="center", va="bottom", fontsize=8)
    for box in layout.boxes:
        _draw_box(axes, box)
    axes.set(xlim=(0, layout.width), ylim=(layout.height, 0), aspect="equal")
    axes.set_title(title, fontsize="medium", loc="left")
    axes.axis("off")
    figure = axes.get_figure()
    assert isinstance(figure, Figure)
    return figure


def _draw_wire(axes: Axes, corners: tuple[Point, ...], colour: str, width: float, tip: bool) -> None:
    codes = {"M": [Path.MOVETO], "L": [Path.LINETO], "Q": [Path.CURVE3] * 2}
    steps = rounded(corners)
    path = Path([p for _, points in steps for p in points], [code for name, _ in steps for code in codes[name]])
    if tip:
        axes.add_patch(FancyArrowPatch(path=path, arrowstyle="-|>", mutation_scale=9, color=colour, linewidth=width))
    else:
        axes.add_patch(PathPatch(path, edgecolor=colour, facecolor="none", linewidth=width))


def _draw_box(axes: Axes, box: Box) -> None:
    corner, style = (box.x - WIDTH / 2, box.y - HEIGHT / 2), "round,pad=0,rounding_size=7"
    axes.add_patch(FancyBboxPatch(corner, WIDTH, HEIGHT, style, facecolor="#F1F4F7", edgecolor="black", linewidth=0.9))
    text, index = box.label
    axes.text(box.x, box.y, f"${text}_{{{index}}}$" if index else text, ha="center", va="center", fontsize=10)


def draw_cells(genotype: Genotype) -> Figure:
    """Draw the normal cell of a genotype, and the reduction cell below it."""
    cells = {"normal cell": genotype.normal, "reduction cell": genotype.reduction}
    layouts = [lay_out(cell) for cell in cells.values()]
    heights = [layout.height / 90 + 0.4 for layout in layouts]
    figure = Figure(figsize=(layouts[0].width / 90, sum(heights)), layout="constrained")
    grid = figure.subplots(2, 1, gridspec_kw={"height_ratios": heights})
    for axes, (title, cell) in zip(grid, cells.items()):
        draw_cell(cell, title, axes)
    return figure
