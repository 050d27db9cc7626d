"""Line charts, as the numbers of an SVG that the page's template draws.

The page's own style colours them, so that they fit its dark and its light form.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

Point = tuple[float, float]

WIDTH, HEIGHT = 360, 230
LEFT, RIGHT, TOP, BOTTOM = 46, 12, 10, 40
"""Room for the numbers and names of the axes."""
ASIDE = 4
"""Pixels between the spreads of two lines, which would hide each other."""


@dataclass(frozen=True)
class Series:
    """What one line shows."""

    name: str
    points: Sequence[Point]
    """(x, y) in the order of x; the line has a gap where y isn't finite."""
    color: int | None = None
    """Place in the page's palette; None: a gray dotted line, to compare with."""
    spread: Sequence[float] = ()
    """Of each point, drawn as a bar above and below it."""
    joined: bool = True
    """Draw a line from point to point."""
    marked: bool = False
    """Draw the points."""


@dataclass(frozen=True)
class Tick:
    """A number beside an axis."""

    at: float
    """Pixels."""
    text: str


@dataclass(frozen=True)
class Line:
    """One line of a chart."""

    name: str
    color: int | None
    path: str
    """The `d` of an SVG path; likewise `bars`."""
    bars: str
    dots: list[Point]
    """Pixels."""


@dataclass(frozen=True)
class Chart:
    """All that the template draws."""

    title: str
    x_label: str
    y_label: str
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    lines: list[Line]
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    """Where the axes end; likewise `right`, `top` and `bottom`."""
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


def line_chart(
    title: str, series: Sequence[Series], *, x_label: str, y_label: str = ""
) -> Chart | None:
    """A chart of all series in one pair of axes; None where there is no finite point.

    The y axis has 0 in it.
    """
    xs, ys = [], [0.0]
    for each in series:
        spreads = each.spread or [0.0] * len(each.points)
        for (x, y), spread in zip(each.points, spreads, strict=True):
            if math.isfinite(y):
                xs.append(x)
                ys += [y, *(end for end in (y - spread, y + spread) if math.isfinite(end))]
    if not xs:
        return None
    x_low, x_high = _widened(min(xs), max(xs))
    y_low, y_high = _widened(min(ys), max(ys))

    def across(x: float) -> float:
        return round(LEFT + (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT), 1)

    def down(y: float) -> float:
        return round(HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM), 1)

    lines = []
    with_spread = [each for each in series if each.spread]
    for each in series:
        aside = 0.0
        if each.spread:
            aside = ASIDE * (with_spread.index(each) - (len(with_spread) - 1) / 2)
        path, bars, dots, begun = "", "", [], False
        for i, (x, y) in enumerate(each.points):
            if not math.isfinite(y):
                begun = False
                continue
            at = (across(x) + aside, down(y))
            if each.joined:
                path += f"{'L' if begun else 'M'}{at[0]} {at[1]}"
                begun = True
            if each.marked:
                dots.append(at)
            if each.spread and math.isfinite(each.spread[i]):
                bars += f"M{at[0]} {down(y - each.spread[i])}V{down(y + each.spread[i])}"
        lines.append(Line(each.name, each.color, path, bars, dots))
    return Chart(
        title,
        x_label,
        y_label,
        [Tick(across(value), f"{value:g}") for value in ticks(x_low, x_high)],
        [Tick(down(value), f"{value:g}") for value in ticks(y_low, y_high)],
        lines,
    )


def ticks(low: float, high: float, at_most: int = 6) -> list[float]:
    """Round numbers from low to high, 1, 2 or 5 times a power of ten apart."""
    least = (high - low) / (at_most - 1)
    power = 10.0 ** math.floor(math.log10(least))
    step = next(step for step in (power, 2 * power, 5 * power, 10 * power) if step >= least)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def thinned(points: Sequence[Point], at_most: int = 150) -> list[Point]:
    """The points, or the means of consecutive ones where there are more; NaN stays NaN."""
    size = -(-len(points) // at_most)
    parts = [points[i : i + size] for i in range(0, len(points), size or 1)]
    return [
        (sum(x for x, _ in part) / len(part), sum(y for _, y in part) / len(part)) for part in parts
    ]


def _widened(low: float, high: float) -> tuple[float, float]:
    """A range that isn't empty, and so can be an axis."""
    if high > low:
        return low, high
    more = abs(low) or 1.0
    return low - more / 2, high + more / 2
