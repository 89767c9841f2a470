"""Draw which tensors of a heavy-ball stage of three layers are in memory, and when.

    python docs/iterates_figure.py docs/figures/iterates.png

The rows are the iterates x_0, …, x_3 of (16) and the insides of T_0, T_1, T_2; the columns are the steps of a training
step. ``docs/inside/heavy-ball.md`` explains the figure.
"""

from __future__ import annotations

import sys
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure

__all__ = ["LIVES", "Life", "draw"]

STEPS = ["T₀", "T₁", "T₂", "later\nstages", "∂T₂", "∂T₁", "∂T₀"]
ROWS = ["x₀", "x₁", "x₂", "x₃", "inside T₀", "inside T₁", "inside T₂"]
FIRST, AGAIN = "#3b6ea8", "#e08a2c"


class Life(NamedTuple):
    """A time in which a tensor is in memory, in steps; ``again``: it was computed a second time."""

    row: str
    begin: float
    end: float
    again: bool = False


LIVES = {
    "memory='stored'": [
        Life("x₀", 0.3, 2),
        Life("x₁", 1, 6),
        Life("x₂", 2, 5),
        Life("x₃", 3, 4),
        Life("inside T₀", 0, 7),
        Life("inside T₁", 1, 6),
        Life("inside T₂", 2, 5),
    ],
    "memory='reversible'": [
        Life("x₀", 0.3, 2),
        Life("x₁", 1, 3),
        Life("x₁", 4.5, 6, again=True),
        Life("x₂", 2, 5),
        Life("x₃", 3, 4.5),
        Life("inside T₀", 0, 1),
        Life("inside T₀", 6, 7, again=True),
        Life("inside T₁", 1, 2),
        Life("inside T₁", 5, 6, again=True),
        Life("inside T₂", 2, 3),
        Life("inside T₂", 4, 5, again=True),
    ],
}


def draw() -> Figure:
    """Return the figure: one panel for each way to store."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    for axes, (title, lives) in zip(figure.subplots(1, 2, sharey=True), LIVES.items()):
        _panel(axes, title, lives)
    return figure


def _panel(axes: Axes, title: str, lives: list[Life]) -> None:
    for life in lives:
        color = AGAIN if life.again else FIRST
        axes.barh(ROWS.index(life.row), life.end - life.begin, left=life.begin, height=0.6, color=color)
    axes.axvspan(3, 4, color="0.93", zorder=0)
    axes.set_title(title, fontsize=11)
    axes.set_xlim(0, len(STEPS))
    axes.set_xticks([i + 0.5 for i in range(len(STEPS))], STEPS)
    axes.set_yticks(range(len(ROWS)), ROWS)
    axes.set_ylim(len(ROWS) - 0.5, -0.5)
    for boundary in range(1, len(STEPS)):
        axes.axvline(boundary, color="0.85", linewidth=0.6, zorder=0)
    axes.tick_params(length=0)
    for side in axes.spines.values():
        side.set_visible(False)


if __name__ == "__main__":
    draw().savefig(sys.argv[1], dpi=150)
