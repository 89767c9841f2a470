"""Layout of a drawn cell, labels and colours of operations, and SVG.

Inputs, nodes and output are in a row, left to right. An edge between neighbours is straight; every other edge runs in a
lane above the row. No two edges of a lane share a gap between neighbours. Labels are in the gaps, so they do not
overlap. The concatenation runs below the row. Lengths are pixels, and y grows downwards, as in SVG.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from .genotype import CellGenotype, Edge

__all__ = ["COLOURS", "LOOKS", "OWN", "Box", "Layout", "Look", "Wire", "lay_out", "to_svg"]

PITCH, WIDTH, HEIGHT, LANE, RADIUS = 132, 48, 32, 30, 9
OWN = "own"  # the family of registered operations


class Look(NamedTuple):
    """Label and family of an operation."""

    label: str
    family: str


# Table 6, and the registered operations; "none" has a weight in searches, but is in no genotype.
LOOKS = {
    "sep_conv_3x3": Look("sep 3×3", "sep"),
    "sep_conv_5x5": Look("sep 5×5", "sep"),
    "dil_conv_3x3": Look("dil 3×3", "dil"),
    "dil_conv_5x5": Look("dil 5×5", "dil"),
    "max_pool_3x3": Look("max 3×3", "pool"),
    "avg_pool_3x3": Look("avg 3×3", "pool"),
    "skip_connect": Look("skip", "skip"),
    "neg_skip_connect": Look("−skip", "neg"),
    "none": Look("none", "none"),
}
# The palette of Okabe and Ito, safe for colour-blind readers.
COLOURS = {
    "sep": "#0072B2",
    "dil": "#CC79A7",
    "pool": "#009E73",
    "skip": "#E69F00",
    "neg": "#D55E00",
    "none": "#8A8A8A",
    OWN: "#56B4E9",
}

Point = tuple[float, float]


class Box(NamedTuple):
    """An input, node or output by its centre; ``label`` is (text, index), the index may be empty."""

    x: float
    y: float
    label: tuple[str, str]


class Wire(NamedTuple):
    """An edge: corners from source to target, and the middle of the lower border of its label."""

    edge: Edge
    target: int
    lane: int
    corners: tuple[Point, ...]
    label: Point


class Layout(NamedTuple):
    """A drawn cell: boxes, wires, and the lines of the concatenation."""

    boxes: tuple[Box, ...]
    wires: tuple[Wire, ...]
    concat: tuple[tuple[Point, ...], ...]
    width: float
    height: float


def lay_out(cell: CellGenotype) -> Layout:
    """Lay out a cell."""
    edges = [(edge, t) for t, node in enumerate(cell, start=2) for edge in node]
    lanes = _lanes(edges)
    y = LANE * (max(lanes) + 1) + HEIGHT / 2
    names = [("c", "k−2"), ("c", "k−1"), *((str(t), "") for t in range(2, 2 + len(cell))), ("c", "k")]
    boxes = tuple(Box(WIDTH / 2 + 2 + PITCH * i, y, name) for i, name in enumerate(names))
    # Lower lanes leave further to the right and arrive further to the left, so that lines do not cross.
    leaving: dict[int, list[int]] = {}
    arriving: dict[int, list[int]] = {}
    for lane, (edge, target) in sorted(zip(lanes, edges)):
        if lane:
            leaving.setdefault(edge.source, []).append(lane)
            arriving.setdefault(target, []).append(lane)
    wires = tuple(_wire(edge, t, lane, boxes, leaving, arriving) for (edge, t), lane in zip(edges, lanes))
    floor, out = y + HEIGHT / 2 + 18, boxes[-1].x
    drops = [((box.x, y + HEIGHT / 2), (box.x, floor)) for box in boxes[3:-1]]
    bus = ((boxes[2].x, y + HEIGHT / 2), (boxes[2].x, floor), (out, floor), (out, y + HEIGHT / 2))
    return Layout(boxes, wires, (*drops, bus), out + WIDTH / 2 + 2, floor + 6)


def _lanes(edges: list[tuple[Edge, int]]) -> list[int]:
    """Return the lowest free lane of each edge; lane 0 is for neighbours only."""
    taken: dict[int, int] = {}  # the lanes of a gap, as bits
    lanes = [0] * len(edges)
    for i in sorted(range(len(edges)), key=lambda i: (edges[i][1] - edges[i][0].source, i)):
        (_, source), target = edges[i]
        used = 0 if target - source == 1 else 1
        for gap in range(source, target):
            used |= taken.get(gap, 0)
        free = ~used & (used + 1)
        taken.update({gap: taken.get(gap, 0) | free for gap in range(source, target)})
        lanes[i] = free.bit_length() - 1
    return lanes


def _wire(
    edge: Edge,
    target: int,
    lane: int,
    boxes: tuple[Box, ...],
    leaving: dict[int, list[int]],
    arriving: dict[int, list[int]],
) -> Wire:
    start, end = boxes[edge.source], boxes[target]
    gap = edge.source + (target - edge.source - 1) // 2
    middle = (boxes[gap].x + boxes[gap + 1].x) / 2
    if lane == 0:
        corners: tuple[Point, ...] = ((start.x + WIDTH / 2, start.y), (end.x - WIDTH / 2, end.y))
        return Wire(edge, target, lane, corners, (middle, start.y - 5))
    x0 = start.x + _port(leaving[edge.source].index(lane), len(leaving[edge.source]))
    x1 = end.x - _port(arriving[target].index(lane), len(arriving[target]))
    top, y = start.y - HEIGHT / 2, start.y - HEIGHT / 2 - LANE * lane + 8
    return Wire(edge, target, lane, ((x0, top), (x0, y), (x1, y), (x1, top)), (middle, y - 5))


def _port(rank: int, count: int) -> float:
    """Return the distance from the centre of a box to its ``rank``-th line."""
    return (WIDTH / 2 - 4) * (1 - rank / count)


def rounded(corners: tuple[Point, ...]) -> list[tuple[str, tuple[Point, ...]]]:
    """Return M, L and Q commands of a path with rounded corners."""
    path: list[tuple[str, tuple[Point, ...]]] = [("M", (corners[0],))]
    for before, corner, after in zip(corners, corners[1:], corners[2:]):
        path += [("L", (_towards(corner, before),)), ("Q", (corner, _towards(corner, after)))]
    return [*path, ("L", (corners[-1],))]


def _towards(corner: Point, other: Point) -> Point:
    dx, dy = other[0] - corner[0], other[1] - corner[1]
    length = abs(dx) + abs(dy)
    share = min(RADIUS, length / 2) / length
    return corner[0] + share * dx, corner[1] + share * dy


def to_svg(cell: CellGenotype, name: str, kinds: Sequence[str] = ()) -> str:
    """Return an ``<svg>`` element for an HTML page; the page defines the colours of its classes.

    Args:
        cell: the nodes.
        name: text for screen readers.
        kinds: the attribute ``data-kind`` of each edge, in the order of the nodes; empty for none.
    """
    layout = lay_out(cell)
    size = f'viewBox="0 0 {layout.width:g} {layout.height:g}" style="max-width:{layout.width:g}px"'
    parts = [f'<svg class="drawing" role="img" aria-label="{escape(name)}" {size}>']
    parts += [f'<path class="concat" d="{_d(corners)}"/>' for corners in layout.concat]
    parts += [_arrow(layout.concat[-1], "concat")]
    parts += [_svg_wire(wire, kind) for wire, kind in zip(layout.wires, kinds or [""] * len(layout.wires))]
    parts += [_svg_box(box) for box in layout.boxes]
    return "".join(parts) + "</svg>"


def _svg_wire(wire: Wire, kind: str) -> str:
    look = LOOKS[wire.edge.operation]
    title = f"<title>{wire.edge.operation}: {wire.edge.source} → {wire.target}</title>"
    text = f'<text x="{wire.label[0]:g}" y="{wire.label[1]:g}">{look.label}</text>'
    mark = f' data-kind="{kind}"' if kind else ""
    return f'<g class="{look.family}"{mark}>{title}<path d="{_d(wire.corners)}"/>{_arrow(wire.corners)}{text}</g>'


def _svg_box(box: Box) -> str:
    x, y = box.x - WIDTH / 2, box.y - HEIGHT / 2
    text, index = box.label
    index = f'<tspan class="index" dy="4">{index}</tspan>' if index else ""
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{WIDTH}" height="{HEIGHT}" rx="7"/>'
        f'<text x="{box.x:g}" y="{box.y + 4.5:g}">{text}{index}</text>'
    )


def _d(corners: tuple[Point, ...]) -> str:
    return "".join(command + " ".join(f"{x:.4g} {y:.4g}" for x, y in points) for command, points in rounded(corners))


def _arrow(corners: tuple[Point, ...], name: str = "") -> str:
    """Return a triangle at the end of a line that arrives from the left, from above or from below."""
    (_, y0), (x, y) = corners[-2:]
    if y == y0:
        shape = f"M{x:.4g} {y:.4g}l-8 -4v8z"
    else:
        shape = f"M{x:.4g} {y:.4g}l-4 {-8 if y > y0 else 8}h8z"
    return f'<path class="tip {name}" d="{shape}"/>'.replace(' "', '"')
