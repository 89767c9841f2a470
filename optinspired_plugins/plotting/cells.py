"""Figures of the cells of a genotype."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, PathPatch
from matplotlib.path import Path

from ..cells.drawing import COLOURS, HEIGHT, LOOKS, WIDTH, Box, Point, lay_out, rounded
from ..cells.genotype import CellGenotype, Genotype

__all__ = ["draw_cell", "draw_cells"]


def draw_cell(cell: CellGenotype, title: str = "", axes: Axes | None = None) -> Figure:
    """Draw a cell from left to right: inputs, nodes with their edges, and output.

    Args:
        cell: ``genotype.normal`` or ``genotype.reduction``.
        title: above the drawing.
        axes: axes to draw on; ``None`` for a new figure.
    """
    layout = lay_out(cell)
    if axes is None:
        axes = Figure(figsize=(layout.width / 90, layout.height / 90 + 0.3), layout="constrained").subplots()
    for corners in layout.concat:
        _draw_wire(axes, corners, COLOURS["none"], 1.0, corners is layout.concat[-1])
    for wire in layout.wires:
        look = LOOKS[wire.edge.operation]
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
