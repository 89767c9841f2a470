"""Figures that can be downloaded: drawings of cells, and points with their Pareto front."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from html import escape
from typing import NamedTuple
from urllib.parse import quote

from ..cells.drawing import COLOURS

__all__ = ["Point", "download", "pareto_front", "scatter"]

INK, SOFT, CARD, PAPER = "#1b1f24", "#5d6670", "#f5f7f9", "#ffffff"
# Plain rules without variables, which every program that reads SVG knows.
STYLE = (
    f"text{{font:12px sans-serif;fill:{INK};text-anchor:middle}}.index{{font-size:10px}}.key{{text-anchor:start}}"
    f"rect{{fill:{CARD};stroke:{INK}}}.paper{{fill:{PAPER};stroke:none}}path{{fill:none;stroke-width:2}}"
    f".concat{{stroke:{SOFT};stroke-width:1.2}}.tip{{stroke:none}}.tip.concat{{fill:{SOFT}}}"
    + "".join(
        f".{family} path{{stroke:{colour}}}.{family} .tip{{fill:{colour};stroke:none}}"
        for family, colour in COLOURS.items()
    )
    + "[data-kind~=start] path{stroke-dasharray:7 4}[data-kind~=open] path,[data-kind~=tie] path"
    + "{stroke-dasharray:2 3}[data-kind~=shared] path{stroke-width:4}"
    + ".axis{stroke:#d6dbe0;stroke-width:1}.right{text-anchor:end}.trace{stroke:#0072B2}.dot{fill:#8a8a8a}"
    + ".dot.front{fill:#0072B2}"
)
KEY = 22


def download(svg: str, name: str, key: str = "") -> str:
    """Return a link that saves a figure as a file; it holds the file, so that it needs no script and no address.

    Args:
        svg: the figure, an ``<svg>`` element of the page.
        name: name of the file.
        key: a line of explanation below the figure.
    """
    content = quote(_as_file(svg, key), safe="")
    return f'<a class="download" download="{escape(name)}" href="data:image/svg+xml,{content}">SVG</a>'


def _as_file(svg: str, key: str) -> str:
    """Return a figure of the page as a file that is complete in itself, on white."""
    match = re.match(r'<svg ([^>]*)viewBox="0 0 ([\d.]+) ([\d.]+)"[^>]*>', svg)
    assert match is not None, "our figures begin so"
    width, height = float(match[2]), float(match[3]) + (KEY if key else 0)
    size = f'width="{width:g}" height="{height:g}" viewBox="0 0 {width:g} {height:g}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {match[1]}{size}><style>{STYLE}</style>'
    paper = f'<rect class="paper" width="{width:g}" height="{height:g}"/>'
    line = f'<text class="key" x="4" y="{height - 7:g}">{key}</text>' if key else ""
    return head + paper + svg[match.end() : -len("</svg>")] + line + "</svg>"


# --- parameters against results ---------------------------------------------------------------------------------------


class Point(NamedTuple):
    """A network: its parameters, its result, its name, and the address of its row in the page."""

    parameters: int
    result: float
    name: str
    address: str


LEFT, TOP, WIDTH, HEIGHT = 58, 12, 560, 250


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """Return the points that no other point equals or exceeds in both, by parameters."""
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.parameters, -p.result)):
        if not front or point.result > front[-1].result:
            front.append(point)
    return front


def scatter(points: Sequence[Point], result: str) -> str:
    """Return an ``<svg>`` of results against parameters, with the Pareto front as a line.

    Args:
        points: one or more networks.
        result: name of the result.
    """
    across = _axis([point.parameters for point in points], WIDTH)
    up = _axis([point.result for point in points], HEIGHT)

    def place(point: Point) -> tuple[float, float]:
        return LEFT + across.place(point.parameters), TOP + HEIGHT - up.place(point.result)

    parts = [
        f'<path class="axis" d="M{LEFT} {TOP + HEIGHT - up.place(value):.1f}h{WIDTH}"/>'
        f'<text class="right" x="{LEFT - 6}" y="{TOP + HEIGHT - up.place(value) + 4:.1f}">{value:g}</text>'
        for value in up.ticks
    ]
    parts += [
        f'<text class="middle" x="{LEFT + across.place(value):.1f}" y="{TOP + HEIGHT + 18}">{_in_short(value)}</text>'
        for value in across.ticks
    ]
    front = pareto_front(points)
    corners = "L".join(f"{x:.1f} {y:.1f}" for x, y in map(place, front))
    parts.append(f'<path class="trace sep" d="M{corners}"/>')
    parts += [_dot(point, *place(point), point in front) for point in points]
    parts.append(f'<text class="middle" x="{LEFT + WIDTH / 2}" y="{TOP + HEIGHT + 36}">parameters</text>')
    size = f'viewBox="0 0 {LEFT + WIDTH + 24} {TOP + HEIGHT + 44}" style="max-width:{LEFT + WIDTH + 24}px"'
    label = f"{result} against parameters"
    return f'<svg class="chart scatter" role="img" aria-label="{escape(label)}" {size}>{"".join(parts)}</svg>'


def _dot(point: Point, x: float, y: float, is_front: bool) -> str:
    title = f"{point.name}: {point.parameters:,} parameters, {point.result:g}"
    kind = "front sep" if is_front else "none"
    circle = f'<circle class="dot {kind}" cx="{x:.1f}" cy="{y:.1f}" r="{5 if is_front else 4}"/>'
    return f'<a href="#{point.address}"><title>{escape(title)}</title>{circle}</a>'


class _Axis(NamedTuple):
    """A linear axis: its ends, its length in pixels, and about four round numbers between the ends."""

    low: float
    high: float
    length: int
    ticks: list[float]

    def place(self, value: float) -> float:
        """Return the distance of a value from the begin of the axis."""
        return (value - self.low) / (self.high - self.low) * self.length


def _axis(values: Sequence[float], length: int) -> _Axis:
    """Return an axis with some room on both sides; equal values are in its middle."""
    low, high = min(values), max(values)
    room = 0.06 * (high - low) or abs(high) / 10 or 1.0
    low, high = low - room, high + room
    least = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(least))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= least)
    ticks = [round(i * step, 12) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return _Axis(low, high, length, ticks)


def _in_short(parameters: float) -> str:
    """Return a number of parameters as 3.35 M or 120 k."""
    if parameters >= 1e6:
        return f"{parameters / 1e6:g} M"
    return f"{parameters / 1e3:g} k" if parameters >= 1e3 else f"{parameters:g}"
