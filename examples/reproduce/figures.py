"""The figures of the results page, from rows of CSV: every seed is a dot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from networks import NETWORKS

from optinspired_plugins.plotting import BLUE, ORANGE, RED

__all__ = ["draw_dots", "draw_stability"]

Rows = Sequence[Mapping[str, str]]


def draw_dots(groups: Mapping[str, Mapping[str, Sequence[float]]], quantity: str) -> Figure:
    """Draw a panel a group: a dot for each value, a bar at the mean, a line for each name."""
    height = 1.2 + 0.32 * max(len(lines) for lines in groups.values())
    figure = Figure(figsize=(2 + 4 * len(groups), height), layout="constrained")
    for axes, (title, lines) in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups.items()):
        for y, values in enumerate(lines.values()):
            axes.plot(values, [y] * len(values), "o", color=BLUE, alpha=0.7, markersize=5)
            axes.plot([mean(values)], [y], "|", color=RED, markersize=16, markeredgewidth=2)
        axes.set(title=title, xlabel=quantity)
        axes.set_yticks(range(len(lines)), list(lines))
        axes.set_ylim(len(lines) - 0.5, -0.5)
        axes.grid(alpha=0.3)
    return figure


def draw_stability(curves: Rows) -> Figure:
    """Draw loss and gradient norm by step, a line a seed: each step pale, the mean of ten in bold."""
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    above, below = figure.subplots(1, 2)
    networks = list(dict.fromkeys(row["network"] for row in curves))
    for network, colour in zip(networks, (RED, BLUE, ORANGE)):
        runs: dict[str, list[Mapping[str, str]]] = {}
        for row in curves:
            if row["network"] == network:
                runs.setdefault(row["seed"], []).append(row)
        for i, run in enumerate(runs.values()):
            label = NETWORKS[network].label if i == 0 else None
            for axes, name in ((above, "loss"), (below, "grad_norm")):
                _plot_run(axes, [float(row[name]) for row in run], colour, label)
    above.set(xlabel="step", ylabel="training loss", yscale="log")
    below.set(xlabel="step", ylabel="norm of the gradient", yscale="log")
    above.legend()
    for axes in (above, below):
        axes.grid(alpha=0.3)
    return figure


def _plot_run(axes: Axes, values: Sequence[float], colour: str, label: str | None) -> None:
    axes.plot(values, color=colour, alpha=0.2, linewidth=0.6)
    smooth = [mean(values[max(i - 9, 0) : i + 1]) for i in range(len(values))]
    axes.plot(smooth, color=colour, linewidth=1.2, label=label)
