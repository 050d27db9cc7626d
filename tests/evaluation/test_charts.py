"""Line charts: where points, ticks and gaps stand."""

from __future__ import annotations

import math

import pytest

from steerlm2.evaluation.charts import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Series,
    line_chart,
    thinned,
    ticks,
)


def test_the_axes_span_the_points_and_zero() -> None:
    chart = line_chart("a", [Series("a", [(1, 2.0), (3, 4.0)], 0, marked=True)], x_label="x")
    assert chart is not None
    (line,) = chart.lines
    floor = HEIGHT - BOTTOM
    assert line.dots == [(LEFT, (TOP + floor) / 2), (WIDTH - RIGHT, TOP)]
    assert line.path == f"M{LEFT}.0 {(TOP + floor) / 2}L{WIDTH - RIGHT}.0 {TOP}.0"
    assert [tick.text for tick in chart.y_ticks] == ["0", "1", "2", "3", "4"]
    assert chart.y_ticks[0].at == floor


def test_what_is_no_number_is_a_gap() -> None:
    points = [(1, 1.0), (2, 2.0), (3, math.nan), (4, math.inf), (5, 1.0), (6, 0.0)]
    chart = line_chart("a", [Series("a", points, 0, marked=True)], x_label="x")
    assert chart is not None
    (line,) = chart.lines
    assert [letter for letter in line.path if letter in "ML"] == ["M", "L", "M", "L"]
    assert len(line.dots) == 4
    assert "nan" not in line.path


@pytest.mark.parametrize("points", [[], [(1, math.nan)]])
def test_without_a_point_there_is_no_chart(points: list[tuple[float, float]]) -> None:
    assert line_chart("a", [Series("a", points)], x_label="x") is None


@pytest.mark.parametrize("y", [0.0, -2.0, 1e-9, 3e12])
def test_one_point_makes_a_chart(y: float) -> None:
    """Its ranges would be empty."""
    chart = line_chart("a", [Series("a", [(5, y)], 0, marked=True)], x_label="x")
    assert chart is not None
    ((x, down),) = chart.lines[0].dots
    assert LEFT < x < WIDTH - RIGHT
    assert TOP <= down <= HEIGHT - BOTTOM


def test_spreads_stand_aside_and_within_the_chart() -> None:
    """Of two lines at the same place neither hides the other; the dotted one has none."""
    own = [Series(name, [(1, 1.0), (2, 1.0)], 0, spread=[0.5, math.nan]) for name in "ab"]
    chart = line_chart("a", [Series("ideal", [(1, 1), (2, 2)]), *own], x_label="x")
    assert chart is not None
    ideal, first, second = chart.lines
    assert ideal.bars == ""
    assert first.bars.count("M") == 1, "a spread that isn't a number has no bar"
    assert first.bars != second.bars
    assert [bars.split(" ")[1] for bars in (first.bars, second.bars)] == ["145.0V55.0"] * 2


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 4, [0, 1, 2, 3, 4]),
        (0, 800, [0, 200, 400, 600, 800]),
        (1.5, 249.5, [50, 100, 150, 200]),
        (0, 0.27, [0, 0.1, 0.2]),
        (-0.3, 0.5, [-0.2, 0, 0.2, 0.4]),
    ],
)
def test_ticks_are_round_numbers(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == expected


def test_thinning_takes_means_of_neighbours() -> None:
    points = [(step, float(step % 2)) for step in range(1, 8)]
    assert thinned(points, 10) == points
    assert thinned(points, 4) == [(1.5, 0.5), (3.5, 0.5), (5.5, 0.5), (7.0, 1.0)]
    assert thinned([]) == []
