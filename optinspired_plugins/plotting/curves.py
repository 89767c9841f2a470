"""Figures of curves: convergence, condition numbers and the simulation of Table 2."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import mean, stdev

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..algorithms import rates
from ..algorithms.methods import ALGORITHMS, HeavyBall
from ..simulation import PAPER, Run
from .connections import BLUE, GREEN, ORANGE, PURPLE, RED

__all__ = ["draw_condition_numbers", "draw_convergence", "draw_simulation"]

STYLES = {"gd": (BLUE, "-"), "hb": (RED, "--"), "agd": (GREEN, "-"), "agd2": (PURPLE, "--"), "admm": (ORANGE, "-")}
STYLES["hbnet"] = (RED, ":")

NAMES = {"gd": "GD", "hb": "HB", "agd": "AGD", "agd2": "AGD2", "admm": "ADMM", "hbnet": "HB, β = 1"}


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
    algorithms = {**rates.strongly_convex(condition), "agd2": ALGORITHMS["agd2"](), "hbnet": HeavyBall(beta=1.0)}
    figure = Figure(figsize=(9.5, 4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (title, problem) in zip(panels, problems.items()):
        for name, algorithm in algorithms.items():
            colour, line = STYLES[name]
            error = rates.distances(algorithm, problem, steps)
            width = 2.4 if name == "hb" else 1.4  # visible below AGD
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
        "HB and AGD with the momentum of footnote 5; AGD2 is (4)-(5), without μ; β = 1 as in HBNet (§7.1).",
        fontsize="small",
    )
    return figure


def draw_condition_numbers(conditions: Sequence[float] = (10, 30, 100, 300, 1_000, 3_000, 10_000)) -> Figure:
    """Draw the steps to 10⁻⁶ of the first distance by condition number, with fitted exponents.

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


def draw_simulation(runs: Iterable[Run]) -> Figure:
    """Draw the MSE of Table 2 by depth.

    Shown are mean and standard deviation over seeds, and the figures of the paper. ADMM has a separate panel, since its
    MSE is far above the rest.

    Args:
        runs: runs of any networks, depths and seeds.
    """
    errors: dict[str, dict[int, list[float]]] = {}
    for run in runs:
        errors.setdefault(run.network, {}).setdefault(run.depth, []).append(run.mse)
    groups = [g for g in ([n for n in errors if n != "admm"], [n for n in errors if n == "admm"]) if g]
    figure = Figure(figsize=(1 + 4.2 * len(groups), 4), layout="constrained")
    for axes, group in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups):
        for i, name in enumerate(group):
            # The shift keeps error bars apart.
            _draw_errors(axes, name, errors[name], 0.5 * (i - (len(group) - 1) / 2))
        axes.set(xlabel="depth", ylabel="MSE", xticks=sorted({d for name in group for d in errors[name]}))
        axes.grid(alpha=0.3)
        axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), fontsize="x-small", ncols=len(group))
    return figure


def _draw_errors(axes: Axes, name: str, errors: Mapping[int, list[float]], shift: float) -> None:
    """Draw the MSE of one network by depth, measured and printed in the paper."""
    colour, _ = STYLES[name]
    depths = sorted(errors)
    values = [errors[depth] for depth in depths]
    axes.errorbar(
        [depth + shift for depth in depths],
        [mean(v) for v in values],
        [stdev(v) if len(v) > 1 else 0.0 for v in values],
        color=colour,
        marker="o",
        markersize=4,
        capsize=3,
        label=f"{NAMES[name]}, measured",
    )
    printed = {depth: PAPER[name][depth] for depth in depths if depth in PAPER[name]}
    if printed:
        (line,) = axes.plot(list(printed), list(printed.values()), "x--", color=colour, markersize=5, linewidth=1)
        line.set_label(f"{NAMES[name]}, paper")
