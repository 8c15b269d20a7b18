"""The figures of tools/bench/recipes.py, and its charts' axes."""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools/bench"))

from recipe_figures import Point, chart, figures, interval, ratio, spent, table

from megaopd.report_svg import line_chart


def points(accuracies: list[float], tokens: float) -> list[Point]:
    return [Point(i, tokens * i, 3 * tokens * i, 2.0 * i, a, 1.0) for i, a in enumerate(accuracies)]


def test_what_was_spent_is_read_off_the_line_between_two_evaluations() -> None:
    curve = points([0.0, 0.2, 0.8, 0.6], 100)
    assert spent(curve, 0.5, "tokens") == pytest.approx(150)
    assert spent(curve, 0.8, "seconds") == pytest.approx(4)
    assert spent(curve, 0.9, "tokens") == math.inf
    assert spent(points([0.6, 0.1], 100), 0.5, "tokens") == 0


def test_intervals_are_those_of_students_t() -> None:
    # scipy.stats.t.interval(0.95, 2, loc=2, scale=1 / sqrt(3)): 2 -+ 4.302653 x 0.577350
    assert interval([1.0, 2.0, 3.0]) == pytest.approx((2, -0.484138, 4.484138), abs=1e-3)
    assert ratio([10.0, 10.0]) == pytest.approx((10, 10, 10))
    assert ratio([5.0, 20.0])[0] == pytest.approx(10)


def test_ratios_compare_the_same_seed() -> None:
    curves = {
        "fast": [points([0.0, 1.0], 10), points([0.0, 1.0], 40)],
        "slow": [points([0.0, 1.0], 100), points([0.0, 1.0], 400)],
        "never": [points([0.0, 1.0], 10), points([0.0, 0.4], 10)],
    }
    found = figures(curves, against="slow", targets=(0.5, 0.8))
    assert found["fast"]["less"]["0.5 tokens"] == pytest.approx((10, 10, 10))
    assert found["slow"]["less"]["0.5 tokens"][0] == pytest.approx(1)
    assert found["never"]["reached"] == {0.5: 1, 0.8: 1}
    rows = table("cost", found, "slow", (0.5, 0.8), 2)
    assert [row[0] for row in rows] == ["cost", "fast", "slow", "never"]
    assert all(len(row) == len(rows[0]) for row in rows)
    assert "1 of 2 got there" in rows[3]
    assert not any(cell.startswith(">=") for cell in rows[3])
    # The second seed of `never` spent 10 and was not there: `slow`, at 200, has at least 10 / 200.
    bounded = figures(curves, against="never", targets=(0.5,))
    assert bounded["slow"]["bound"]["0.5 tokens"]
    assert bounded["slow"]["less"]["0.5 tokens"][0] == pytest.approx((5 / 50 * 10 / 200) ** 0.5)


def test_a_logarithmic_axis_gives_equal_room_to_equal_ratios() -> None:
    drawing = line_chart(
        {"a": [(1, 0.1), (10, 0.5), (100, 1.0)]},
        "accuracy",
        (0.0, 1.0),
        bands={"a": [(1, 0.0, 0.2), (100, 0.9, 1.0)]},
        log_x=True,
    )
    xs = [float(x) for x in re.findall(r'<circle cx="([\d.]+)"', drawing)]
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.11)
    (band,) = re.findall(r'<polygon [^>]*points="([^"]+)"', drawing)
    assert len(band.split()) == 4
    assert ">50<" in drawing


def test_a_chart_has_a_line_and_a_band_for_each_recipe() -> None:
    curves = {name: [points([0.0, 0.5, 1.0], 10), points([0.0, 0.7, 0.9], 10)] for name in "ab"}
    drawing = chart(curves, "tokens")
    assert drawing.count("<polyline") == drawing.count("<polygon") == 2
