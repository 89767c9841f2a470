"""Figures: connection patterns of algorithms (Figure 1), cells, convergence against the rates of section 3, Table 2."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch

from ..algorithms.methods import ALGORITHMS, Algorithm
from ..propagation.probing import layers_per_step
from ..propagation.tracing import Call, Program, Sum, trace

__all__ = ["draw_algorithm", "draw_algorithms"]

# Okabe and Ito's palette, which the colour-blind can read.
BLUE, RED, GREEN, ORANGE, PURPLE = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7"


TITLES = {
    "gd": "Gradient descent: feed-forward network (7)",
    "hb": "Heavy ball: (11)",
    "agd": "Nesterov: (12)",
    "agd2": "Nesterov, summed form: (13)",
    "admm": "Linearised ADMM, two paths: (14)",
}


class Node(NamedTuple):
    """Something drawn: a state or point (circle) or a layer (box), with its place and label."""

    x: float
    y: float
    label: str
    is_layer: bool


class Edge(NamedTuple):
    """A weighted connection of two nodes, by their indices."""

    source: int
    target: int
    weight: float


def connections(program: Program) -> tuple[list[Node], list[Edge]]:
    """Lay out a program: time runs to the right, each path has a row, what has no layer of its own runs between them.

    Args:
        program: traced without a transition.

    Returns:
        Nodes and the edges between them.
    """
    paths = max(program.calls)
    nodes, edges = [Node(0, 0, _label("x", 0), False)], []
    place = {0: 0}  # register -> node
    rows = {path: (paths - 1) / 2 - path for path in range(paths)}
    sums = [i for i in program.instructions if isinstance(i, Sum)]
    summed = [i for i in sums if i.name != "point"]
    layer_x = 0.68 if len(summed) < len(sums) else 0.5  # room for a point in front of it
    for register, instruction in enumerate(program.instructions, start=1):
        if isinstance(instruction, Call):
            step, path = instruction.step, instruction.path
            place[register] = len(nodes)
            edges.append(Edge(place[instruction.register], len(nodes), 1.0))
            nodes.append(Node(step + layer_x, 1.6 * rows[path], f"$T{_prime(path, paths)}_{{{step}}}$", True))
            if not any(s.step == step + 1 and any(t.register == register for t in s.terms) for s in summed):
                # The layer's output is the next state.
                edges.append(Edge(len(nodes) - 1, len(nodes), 1.0))
                place[register] = len(nodes)
                nodes.append(Node(step + 1, 1.6 * rows[path], _label(f"x{_prime(path, paths)}", step + 1), False))
            continue
        x, row, label = _place_of_sum(program, instruction, rows, paths)
        place[register] = len(nodes)
        nodes.append(Node(x, 1.6 * row, label, False))
        edges += [Edge(place[term.register], place[register], term.weight) for term in instruction.terms]
    return nodes, edges


def _place_of_sum(
    program: Program, instruction: Sum, rows: Mapping[int, float], paths: int
) -> tuple[float, float, str]:
    if instruction.name == "point":
        return instruction.step + 0.36, 0.0, _label("y", instruction.step)
    if instruction.name == "result":
        return instruction.step + 0.3, 0.0, "out"
    calls = [program.instructions[t.register - 1] for t in instruction.terms if t.register > 0]
    found = [c.path for c in calls if isinstance(c, Call) and c.step == instruction.step - 1]
    if found:
        return instruction.step, rows[found[0]], _label(f"x{_prime(found[0], paths)}", instruction.step)
    name = {"multiplier": r"\lambda"}.get(instruction.name, rf"\mathit{{{instruction.name[:6]}}}")
    return instruction.step + 0.16, 0.0, _label(name, instruction.step)


def _label(name: str, step: int) -> str:
    return f"${name}_{{{step}}}$"


def _prime(path: int, paths: int) -> str:
    """T' and x' are the first path of two; further ones count."""
    return "'" * (paths - 1 - path)


def draw_algorithm(algorithm: Algorithm, steps: int = 4, title: str = "", axes: Axes | None = None) -> Figure:
    """Draw the network that an algorithm unrolls into, read off the algorithm itself.

    Circles are iterates, boxes layers; an arrow adds its source to its target, times the number beside it where that is
    not 1. Negative weights are red.

    Args:
        algorithm: an object with ``init``, ``step`` and ``result``, linear with constant coefficients.
        steps: number of steps, ≥ 1.
        title: above the drawing.
        axes: where to draw; ``None`` for a figure of its own.

    Raises:
        NotLinearError: the algorithm cannot be read as weighted sums.
        TypeError: a method is missing.
        ValueError: ``steps`` is out of range, or the algorithm has no layer in a step.
    """
    layers_per_step(algorithm, steps)
    nodes, edges = connections(trace(algorithm, steps))
    if axes is None:
        height = 3.2 if max(node.y for node in nodes) == 0 else 4.2
        axes = Figure(figsize=(2.4 * steps + 1, height), layout="constrained").subplots()
    for edge in edges:
        _draw_edge(axes, nodes[edge.source], nodes[edge.target], edge.weight)
    for node in nodes:
        box = dict(
            boxstyle="square,pad=0.35" if node.is_layer else "circle,pad=0.22",
            facecolor="#DCE9F3" if node.is_layer else "white",
            edgecolor="black",
            linewidth=0.9,
        )
        axes.text(node.x, node.y, node.label, ha="center", va="center", bbox=box, fontsize=10, zorder=3)
    low, high = _extent(nodes, edges)
    axes.set_xlim(-0.25, max(node.x for node in nodes) + 0.25)
    axes.set_ylim(low, high)
    axes.set_title(title, fontsize="medium")
    axes.axis("off")
    figure = axes.get_figure()
    assert isinstance(figure, Figure)
    return figure


def _extent(nodes: Sequence[Node], edges: Sequence[Edge]) -> tuple[float, float]:
    """Lowest and highest ordinate of a drawing, with a margin."""
    curves = [nodes[e.source].y + _bend(nodes[e.source], nodes[e.target], e.weight) for e in edges]
    heights = [*(node.y for node in nodes), *curves]
    return min(heights) - 0.3, max(heights) + 0.3


def _bend(source: Node, target: Node, weight: float) -> float:
    """How far above the straight line an edge runs, below for a negative weight; 0 where nothing is in the way."""
    if source.y != target.y or target.x - source.x < 0.7:
        return 0.0
    return math.copysign(0.26 + 0.2 * (target.x - source.x), weight)


def _draw_edge(axes: Axes, source: Node, target: Node, weight: float) -> None:
    bend, span = _bend(source, target, weight), target.x - source.x
    colour = RED if weight < 0 else BLUE if bend else "#333333"
    # A quadratic curve with its control point twice as far out passes through the bend. arc3 measures in display units,
    # so the curve is given by its points.
    points = [(t / 20) for t in range(21)]
    xs = [source.x + t * span for t in points]
    ys = [source.y + t * (target.y - source.y) + 4 * t * (1 - t) * bend for t in points]
    axes.plot(xs, ys, color=colour, linewidth=1.0, zorder=1)
    middle = 10 if bend else 11
    axes.add_patch(
        FancyArrowPatch(
            (xs[middle - 1], ys[middle - 1]),
            (xs[middle], ys[middle]),
            arrowstyle="-|>",
            mutation_scale=9,
            color=colour,
            linewidth=0,
            zorder=2,
        )
    )
    if weight != 1:
        text = f"{weight:.2g}".replace("-", "−")
        style = dict(facecolor="white", edgecolor="none", pad=0.6, alpha=0.9)
        lift = 0.0 if bend or source.y != target.y else 0.11
        axes.text(
            xs[13], ys[13] + lift, text, color=colour, fontsize=7, ha="center", va="center", bbox=style, zorder=2.5
        )


def draw_algorithms(algorithms: Mapping[str, Algorithm] | None = None, steps: int = 4) -> Figure:
    """Draw the connection patterns of several algorithms, one below another.

    Args:
        algorithms: titles and algorithms; ``None`` for the five of Table 2.
        steps: number of steps of each.
    """
    if algorithms is None:
        algorithms = {TITLES[name]: make() for name, make in ALGORITHMS.items()}
    extents = [_extent(*connections(trace(algorithm, steps))) for algorithm in algorithms.values()]
    heights = [0.3 + high - low for low, high in extents]
    figure = Figure(figsize=(2.2 * steps + 1, 1.3 * sum(heights)), layout="constrained")
    grid = figure.subplots(len(algorithms), 1, squeeze=False, gridspec_kw={"height_ratios": heights})
    for axes, (title, algorithm) in zip(grid[:, 0], algorithms.items(), strict=True):
        draw_algorithm(algorithm, steps, title, axes)
    return figure
