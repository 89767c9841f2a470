"""Figures of the connection patterns of algorithms (Figure 1)."""

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

# The palette of Okabe and Ito, safe for colour-blind readers.
BLUE, RED, GREEN, ORANGE, PURPLE = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7"


TITLES = {
    "gd": "Gradient descent: feed-forward network (7)",
    "hb": "Heavy ball: (11)",
    "agd": "Nesterov: (12)",
    "agd2": "Nesterov, summed form: (13)",
    "admm": "Linearised ADMM, two paths: (14)",
}


class Mark(NamedTuple):
    """A state or point (circle) or a layer (box), with its position and label."""

    x: float
    y: float
    label: str
    is_layer: bool


class Arrow(NamedTuple):
    """A weighted connection of two marks, by their indices."""

    source: int
    target: int
    weight: float


def connections(program: Program) -> tuple[list[Mark], list[Arrow]]:
    """Lay out a program.

    Steps go to the right, and each path has a row. States without a layer are between the rows.

    Args:
        program: traced without a transition.

    Returns:
        Marks and the arrows between them.
    """
    paths = max(program.calls)
    marks, arrows = [Mark(0, 0, _label("x", 0), False)], []
    place = {0: 0}  # register -> mark
    rows = {path: (paths - 1) / 2 - path for path in range(paths)}
    sums = [i for i in program.instructions if isinstance(i, Sum)]
    summed = [i for i in sums if i.name != "point"]
    layer_x = 0.68 if len(summed) < len(sums) else 0.5  # room for a point before it
    for register, instruction in enumerate(program.instructions, start=1):
        if isinstance(instruction, Call):
            step, path = instruction.step, instruction.path
            place[register] = len(marks)
            arrows.append(Arrow(place[instruction.register], len(marks), 1.0))
            marks.append(Mark(step + layer_x, 1.6 * rows[path], f"$T{_prime(path, paths)}_{{{step}}}$", True))
            if not any(s.step == step + 1 and any(t.register == register for t in s.terms) for s in summed):
                # The output of the layer is the next state.
                arrows.append(Arrow(len(marks) - 1, len(marks), 1.0))
                place[register] = len(marks)
                marks.append(Mark(step + 1, 1.6 * rows[path], _label(f"x{_prime(path, paths)}", step + 1), False))
            continue
        x, row, label = _place_of_sum(program, instruction, rows, paths)
        place[register] = len(marks)
        marks.append(Mark(x, 1.6 * row, label, False))
        arrows += [Arrow(place[term.register], place[register], term.weight) for term in instruction.terms]
    return marks, arrows


def _place_of_sum(
    program: Program, instruction: Sum, rows: Mapping[int, float], paths: int
) -> tuple[float, float, str]:
    if instruction.name == "point":
        return instruction.step + 0.36, 0.0, _label("y", instruction.step)
    if instruction.name == "result":
        return instruction.step + 0.3, 0.0, "out"
    calls = [program.instructions[t.register - 1] for t in instruction.terms if t.register > 0]
    layer_paths = [c.path for c in calls if isinstance(c, Call) and c.step == instruction.step - 1]
    if layer_paths:
        path = layer_paths[0]
        return instruction.step, rows[path], _label(f"x{_prime(path, paths)}", instruction.step)
    name = {"multiplier": r"\lambda"}.get(instruction.name, rf"\mathit{{{instruction.name[:6]}}}")
    return instruction.step + 0.16, 0.0, _label(name, instruction.step)


def _label(name: str, step: int) -> str:
    return f"${name}_{{{step}}}$"


def _prime(path: int, paths: int) -> str:
    """Return the primes of a path: T' and x' are the first path of two."""
    return "'" * (paths - 1 - path)


def draw_algorithm(algorithm: Algorithm, steps: int = 4, title: str = "", axes: Axes | None = None) -> Figure:
    """Draw the unrolled network of an algorithm.

    Circles are iterates, boxes layers. An arrow adds its source to its target, times the number beside it. Negative
    weights are red.

    Args:
        algorithm: an object with ``init``, ``step`` and ``result``, linear with constant coefficients.
        steps: number of steps, ≥ 1.
        title: above the drawing.
        axes: axes to draw on; ``None`` for a new figure.

    Raises:
        NotLinearError: the algorithm is not a program of weighted sums.
        TypeError: a method is missing.
        ValueError: ``steps`` is out of range, or the algorithm has no layer in a step.
    """
    layers_per_step(algorithm, steps)
    marks, arrows = connections(trace(algorithm, steps))
    if axes is None:
        height = 3.2 if max(mark.y for mark in marks) == 0 else 4.2
        axes = Figure(figsize=(2.4 * steps + 1, height), layout="constrained").subplots()
    for arrow in arrows:
        _draw_arrow(axes, marks[arrow.source], marks[arrow.target], arrow.weight)
    for mark in marks:
        box = dict(
            boxstyle="square,pad=0.35" if mark.is_layer else "circle,pad=0.22",
            facecolor="#DCE9F3" if mark.is_layer else "white",
            edgecolor="black",
            linewidth=0.9,
        )
        axes.text(mark.x, mark.y, mark.label, ha="center", va="center", bbox=box, fontsize=10, zorder=3)
    low, high = _extent(marks, arrows)
    axes.set_xlim(-0.25, max(mark.x for mark in marks) + 0.25)
    axes.set_ylim(low, high)
    axes.set_title(title, fontsize="medium")
    axes.axis("off")
    figure = axes.get_figure()
    assert isinstance(figure, Figure)
    return figure


def _extent(marks: Sequence[Mark], arrows: Sequence[Arrow]) -> tuple[float, float]:
    """Return the lowest and highest y of a drawing, with a margin."""
    curves = [marks[a.source].y + _bend(marks[a.source], marks[a.target], a.weight) for a in arrows]
    heights = [*(mark.y for mark in marks), *curves]
    return min(heights) - 0.3, max(heights) + 0.3


def _bend(source: Mark, target: Mark, weight: float) -> float:
    """Return the height of an arrow above the straight line.

    It is negative for a negative weight, and 0 for short arrows and between rows.
    """
    if source.y != target.y or target.x - source.x < 0.7:
        return 0.0
    return math.copysign(0.26 + 0.2 * (target.x - source.x), weight)


def _draw_arrow(axes: Axes, source: Mark, target: Mark, weight: float) -> None:
    bend, span = _bend(source, target, weight), target.x - source.x
    colour = RED if weight < 0 else BLUE if bend else "#333333"
    # A quadratic curve with its control point at twice the height passes through the bend. It is drawn by points, since
    # arc3 measures in display units.
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
    """Draw the connection patterns of several algorithms below each other.

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
