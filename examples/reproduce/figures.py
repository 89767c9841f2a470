"""Figures of the results page; every seed is a dot."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from networks import NETWORKS

from optinspired_plugins.plotting.connections import BLUE, RED

__all__ = ["draw_dots", "draw_stability"]

Rows = Sequence[Mapping[str, str]]


def draw_dots(groups: Mapping[str, Mapping[str, Sequence[float]]], quantity: str) -> Figure:
    """Draw values as dots with a bar at the mean: a panel per group, a line per name."""
    names = list(dict.fromkeys(name for lines in groups.values() for name in lines))
    figure = Figure(figsize=(3 + 4 * len(groups), 1.2 + 0.32 * len(names)), layout="constrained")
    panels = figure.subplots(1, len(groups), squeeze=False, sharex=True, sharey=True)[0]
    for axes, (title, lines) in zip(panels, groups.items()):
        for name, values in lines.items():
            y = names.index(name)
            axes.plot(values, [y] * len(values), "o", color=BLUE, alpha=0.7, markersize=5)
            axes.plot([mean(values)], [y], "|", color=RED, markersize=16, markeredgewidth=2)
        axes.set_title(title, fontsize="medium")
        axes.set_xlabel(quantity)
        axes.grid(alpha=0.3)
    panels[0].set_yticks(range(len(names)), names)
    panels[0].set_ylim(len(names) - 0.5, -0.5)
    return figure


def draw_stability(panels: Mapping[str, Rows]) -> Figure:
    """Draw loss and gradient norm by step: pale lines, and in bold the mean of ten steps."""
    figure = Figure(figsize=(1 + 4 * len(panels), 6), layout="constrained")
    grid = figure.subplots(2, len(panels), squeeze=False, sharex=True, sharey="row")
    for column, (title, curves) in zip(grid.T, panels.items()):
        runs: dict[tuple[str, str], list[Mapping[str, str]]] = {}
        for row in curves:
            runs.setdefault((row["network"], row["seed"]), []).append(row)
        labels = set()
        for (network, _), run in runs.items():
            label = NETWORKS[network].label.partition(",")[0]
            for axes, name in zip(column, ("loss", "grad_norm")):
                colour = BLUE if network.startswith("hbnet") else RED
                _plot_run(axes, [float(row[name]) for row in run], colour, None if label in labels else label)
            labels.add(label)
        column[0].set(title=title, yscale="log", ylim=(1, 1e2))  # divergent runs leave the figure
        column[1].set(xlabel="step", yscale="log", ylim=(0.1, 1e3))
        column[0].legend(loc="upper right")
        for axes in column:
            axes.grid(alpha=0.3)
    grid[0, 0].set_ylabel("training loss")
    grid[1, 0].set_ylabel("norm of the gradient")
    return figure


def _plot_run(axes: Axes, values: Sequence[float], colour: str, label: str | None) -> None:
    axes.plot(values, color=colour, alpha=0.2, linewidth=0.6)
    smooth = [mean(values[max(i - 9, 0) : i + 1]) for i in range(len(values))]
    axes.plot(smooth, color=colour, linewidth=1.2, label=label)
