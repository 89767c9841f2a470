"""Figures: connection patterns of algorithms (Figure 1), cells, convergence against the rates of section 3, Table 2."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import mean, stdev
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, PathPatch
from matplotlib.path import Path

from . import rates
from .algorithms import ALGORITHMS, Algorithm
from .cell_layout import COLOURS, HEIGHT, LOOKS, WIDTH, Box, Point, lay_out, rounded
from .genotype import CellGenotype, Genotype
from .probing import layers_per_step
from .simulation import PAPER, Run
from .tracing import Call, Program, Sum, trace

__all__ = [
    "draw_algorithm",
    "draw_algorithms",
    "draw_cell",
    "draw_cells",
    "draw_condition_numbers",
    "draw_convergence",
    "draw_simulation",
]

# Okabe and Ito's palette, which the colour-blind can read.
BLUE, RED, GREEN, ORANGE, PURPLE = "#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7"
TITLES = {
    "gd": "Gradient descent: feed-forward network (7)",
    "hb": "Heavy ball: (11)",
    "agd": "Nesterov: (12)",
    "agd2": "Nesterov, summed form: (13)",
    "admm": "Linearised ADMM, two paths: (14)",
}
STYLES = {"gd": (BLUE, "-"), "hb": (RED, "--"), "agd": (GREEN, "-"), "agd2": (PURPLE, "--"), "admm": (ORANGE, "-")}
NAMES = {"gd": "GD", "hb": "HB", "agd": "AGD", "agd2": "AGD2", "admm": "ADMM"}


# --- connection patterns ----------------------------------------------------------------------------------------------


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


# --- cells ------------------------------------------------------------------------------------------------------------


def draw_cell(cell: CellGenotype, title: str = "", axes: Axes | None = None) -> Figure:
    """Draw a cell: inputs, nodes and output from left to right, edges with their operations, concatenation below.

    Args:
        cell: ``genotype.normal`` or ``genotype.reduction``.
        title: above the drawing.
        axes: where to draw; ``None`` for a figure of its own.
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
    """Draw the normal and the reduction cell of a genotype, one below the other."""
    cells = {"normal cell": genotype.normal, "reduction cell": genotype.reduction}
    layouts = [lay_out(cell) for cell in cells.values()]
    heights = [layout.height / 90 + 0.4 for layout in layouts]
    figure = Figure(figsize=(layouts[0].width / 90, sum(heights)), layout="constrained")
    grid = figure.subplots(2, 1, gridspec_kw={"height_ratios": heights})
    for axes, (title, cell) in zip(grid, cells.items()):
        draw_cell(cell, title, axes)
    return figure


# --- rates ------------------------------------------------------------------------------------------------------------


def draw_convergence(condition: float = 100.0, steps: int = 400) -> Figure:
    """Draw the distance to the minimiser by step, on a quadratic and on the objective (8) of tanh.

    Dotted: e^{−k/κ} and e^{−k/√κ}, the rates O((L/μ) log 1/ε) and O(√(L/μ) log 1/ε) of section 3.

    Args:
        condition: κ of both problems.
        steps: number of steps.
    """
    problems = {
        f"quadratic, κ = {condition:g}": rates.quadratic(condition),
        f"objective (8) of tanh, κ = {condition:g} at the minimiser": rates.tanh_objective(condition),
    }
    algorithms = {**rates.strongly_convex(condition), "agd2": ALGORITHMS["agd2"]()}
    figure = Figure(figsize=(9.5, 4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (title, problem) in zip(panels, problems.items()):
        for name, algorithm in algorithms.items():
            colour, line = STYLES[name]
            error = rates.distances(algorithm, problem, steps)
            width = 2.4 if name == "hb" else 1.4  # AGD runs over it
            axes.semilogy(error.tolist(), color=colour, linestyle=line, linewidth=width, label=NAMES[name])
        for scale, label in ((condition, "$e^{-k/κ}$"), (math.sqrt(condition), r"$e^{-k/\sqrt{κ}}$")):
            axes.semilogy([math.exp(-k / scale) for k in range(steps + 1)], ":", color="black", linewidth=1)
            k = min(0.86 * steps, 22 * scale)
            axes.annotate(label, (k, math.exp(-k / scale)), (4, 4), textcoords="offset points", fontsize=10)
        axes.set(title=title, xlabel="step k", ylim=(1e-12, 3))
        axes.title.set_fontsize("medium")
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("distance to the minimiser, relative")
    panels[0].legend(loc="lower left", fontsize="small")
    figure.supxlabel(
        "HB and AGD with the momentum of footnote 5; AGD2 is (4)-(5), whose momentum knows no μ.", fontsize="small"
    )
    return figure


def draw_condition_numbers(conditions: Sequence[float] = (10, 30, 100, 300, 1_000, 3_000, 10_000)) -> Figure:
    """Draw the steps to 10⁻⁶ of the first distance by condition number, with the fitted exponents.

    Args:
        conditions: κ of the quadratics.
    """
    figure = Figure(figsize=(5.5, 4), layout="constrained")
    axes = figure.subplots()
    for name in ("gd", "hb", "agd"):
        counts = [
            rates.steps_to_accuracy(rates.strongly_convex(kappa)[name], rates.quadratic(kappa)) for kappa in conditions
        ]
        exponent = rates.fitted_exponent(conditions, counts)
        colour, line = STYLES[name]
        label = rf"{NAMES[name]}: $\kappa^{{{exponent:.2f}}}$"
        axes.loglog(conditions, counts, line, color=colour, marker="o", markersize=4, label=label)
    axes.set(xlabel="condition number κ = L / μ", ylabel="steps to $10^{-6}$ of the first distance")
    axes.grid(alpha=0.3)
    axes.legend(title="fitted")
    return figure


# --- Table 2 ----------------------------------------------------------------------------------------------------------


def draw_simulation(runs: Iterable[Run]) -> Figure:
    """Draw the MSE of Table 2 by depth: measured, mean and standard deviation over seeds, and the paper's figures.

    Args:
        runs: of any networks, depths and seeds; ADMM, far above the rest, has a panel of its own.
    """
    cells: dict[str, dict[int, list[float]]] = {}
    for run in runs:
        cells.setdefault(run.network, {}).setdefault(run.depth, []).append(run.mse)
    groups = [g for g in ([n for n in cells if n != "admm"], [n for n in cells if n == "admm"]) if g]
    figure = Figure(figsize=(1 + 4.2 * len(groups), 4), layout="constrained")
    for axes, group in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups):
        for i, name in enumerate(group):
            colour, _ = STYLES[name]
            depths = sorted(cells[name])
            shift = 0.5 * (i - (len(group) - 1) / 2)  # so that error bars do not hide each other
            values = [cells[name][depth] for depth in depths]
            spread = [stdev(v) if len(v) > 1 else 0.0 for v in values]
            axes.errorbar(
                [depth + shift for depth in depths],
                [mean(v) for v in values],
                spread,
                color=colour,
                marker="o",
                markersize=4,
                capsize=3,
                label=f"{NAMES[name]}, measured",
            )
            printed = {depth: PAPER[name][depth] for depth in depths if depth in PAPER[name]}
            if printed:
                axes.plot(
                    list(printed),
                    list(printed.values()),
                    color=colour,
                    linestyle="--",
                    marker="x",
                    markersize=5,
                    linewidth=1,
                    label=f"{NAMES[name]}, paper",
                )
        axes.set(xlabel="depth", ylabel="MSE", xticks=sorted({d for name in group for d in cells[name]}))
        axes.grid(alpha=0.3)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), fontsize="x-small", ncols=len(group))
    return figure
