"""Small charts as inline SVG: lines and stacked bars over steps, with axes and hover text.

Knows nothing of a run: it takes numbers and labels. Colours are CSS variables (``--series-1`` ...,
``--ink``, ``--muted``, ``--grid``) that the page defines, for light and for dark.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape

Point = tuple[int, float]

WIDTH, HEIGHT = 480, 250
LEFT, RIGHT, TOP, BOTTOM = 58, 14, 22, 40  # room for tick labels and axis titles
NUM_COLOURS = 7
MAX_POINTS = 300
MAX_BARS = 90
MAX_MARKED_POINTS = 40


def line_chart(
    series: Mapping[str, Sequence[Point]],
    y_title: str,
    y_range: tuple[float, float] | None = None,
    references: Mapping[str, float] | None = None,
    x_title: str = "step",
    bands: Mapping[str, Sequence[tuple[int, float, float]]] | None = None,
    log_x: bool = False,
) -> str:
    """Lines over steps; a line breaks where a value is not finite.

    Args:
        series: label -> (step, value), ascending in step.
        y_title: quantity and unit.
        y_range: fixed lower and upper end; None spans the values, from 0 where they are near it.
        references: label -> value of dashed horizontal lines.
        bands: label -> (step, lower, upper) of the area around a line of that label.
        log_x: a logarithmic axis; all steps are positive.
    """
    references = references or {}
    thinned = {label: _thin(points, MAX_POINTS) for label, points in series.items()}
    finite = [v for points in thinned.values() for _, v in points if math.isfinite(v)]
    frame = _Frame(
        [step for points in thinned.values() for step, _ in points],
        y_range or _span([*finite, *references.values()]),
        y_title,
        x_title,
        log_x,
    )
    parts = [frame.axes()]
    for number, label in enumerate(thinned):
        area = (bands or {}).get(label, ())
        edge = [(x, high) for x, _, high in area] + [(x, low) for x, low, _ in reversed(area)]
        corners = " ".join(f"{frame.x(x)},{frame.y(y)}" for x, y in edge)
        if corners:
            parts.append(
                f'<polygon fill="{_colour(number)}" fill-opacity="0.15" points="{corners}"/>'
            )
    for label, value in references.items():
        y = frame.y(value)
        parts.append(
            f'<line class="reference" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>'
            f'<text class="tick" x="{WIDTH - RIGHT}" y="{y - 4:.1f}" text-anchor="end">'
            f"{escape(label)} {format_number(value)}</text>"
        )
    for number, points in enumerate(thinned.values()):
        colour = _colour(number)
        for run in _finite_runs(points):
            coordinates = " ".join(f"{frame.x(step)},{frame.y(value)}" for step, value in run)
            parts.append(f'<polyline class="line" stroke="{colour}" points="{coordinates}"/>')
            if len(points) <= MAX_MARKED_POINTS or len(run) == 1:
                parts.extend(
                    f'<circle cx="{frame.x(s)}" cy="{frame.y(v)}" r="2.5" fill="{colour}"/>'
                    for s, v in run
                )
    parts.append(frame.hover({label: dict(points) for label, points in thinned.items()}))
    return _svg(parts, y_title)


def stacked_chart(series: Mapping[str, Sequence[Point]], y_title: str) -> str:
    """Stacked bars over steps, the first series at the bottom; what is not finite counts as 0."""
    thinned = _thin_together(series, MAX_BARS)
    steps = sorted({step for values in thinned.values() for step in values})
    heights = [sum(values.get(step, 0.0) for values in thinned.values()) for step in steps]
    frame = _Frame(steps, (0.0, max(heights, default=0.0) or 1.0), y_title, "step")
    width = max(1.0, (WIDTH - LEFT - RIGHT) / max(1, len(steps)) - 1)
    parts = [frame.axes()]
    for step in steps:
        base = 0.0
        for number, values in enumerate(thinned.values()):
            value = values.get(step, 0.0)
            if value > 0:
                top, bottom = frame.y(base + value), frame.y(base)
                left = min(max(frame.x(step) - width / 2, LEFT), WIDTH - RIGHT - width)
                parts.append(
                    f'<rect x="{left:.1f}" y="{top}" width="{width:.1f}" '
                    f'height="{bottom - top:.2f}" fill="{_colour(number)}"/>'
                )
            base += value
    parts.append(frame.hover(thinned))
    return _svg(parts, y_title)


def legend(labels: Sequence[str]) -> str:
    """HTML that says which colour is which, in the order of the series."""
    items = (
        f'<span><i style="background:{_colour(number)}"></i>{escape(label)}</span>'
        for number, label in enumerate(labels)
    )
    return f'<div class="legend">{"".join(items)}</div>'


def format_number(value: float) -> str:
    """A value for a person: four significant digits, thousands separated, tiny ones as 1.2e-07."""
    if not math.isfinite(value):
        return {math.inf: "infinity", -math.inf: "-infinity"}.get(value, "not a number")
    if value != 0 and not 1e-3 <= abs(value) < 1e7:
        return f"{value:.3g}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def ticks(low: float, high: float, target: int = 5, integer: bool = False) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) within [low, high]."""
    if not high > low:
        return [low]
    rough = (high - low) / target
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough * 0.999)
    if integer:
        step = max(1.0, round(step))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12 - math.floor(math.log10(step))) for i in range(first, last + 1)]


class _Frame:
    """The plane of a chart: from steps and values to coordinates."""

    def __init__(
        self,
        steps: Iterable[int],
        y_range: tuple[float, float],
        y_title: str,
        x_title: str,
        log_x: bool = False,
    ) -> None:
        self.steps = sorted(set(steps)) or [0]
        self.x_low, self.x_high = self.steps[0], max(self.steps[-1], self.steps[0] + 1)
        self.y_low, self.y_high = y_range
        self.y_title, self.x_title, self.log_x = y_title, x_title, log_x

    def x(self, step: float) -> float:
        share = (step - self.x_low) / (self.x_high - self.x_low)
        if self.log_x:
            share = math.log(step / self.x_low) / math.log(self.x_high / self.x_low)
        return round(LEFT + share * (WIDTH - LEFT - RIGHT), 1)

    def y(self, value: float) -> float:
        share = (value - self.y_low) / (self.y_high - self.y_low)
        return round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 2)

    def axes(self) -> str:
        parts = []
        for value in ticks(self.y_low, self.y_high):
            y = self.y(value)
            parts.append(
                f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>'
                f'<text class="tick" x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">'
                f"{format_number(value)}</text>"
            )
        base = HEIGHT - BOTTOM
        for value in self._x_ticks():
            x = self.x(value)
            parts.append(
                f'<line class="axis" x1="{x}" x2="{x}" y1="{base}" y2="{base + 4}"/>'
                f'<text class="tick" x="{x}" y="{base + 16}" text-anchor="middle">'
                f"{value:,.0f}</text>"
            )
        parts.append(
            f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>'
            f'<text class="tick" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" '
            f'text-anchor="middle">{escape(self.x_title)}</text>'
            f'<text class="tick" x="4" y="11">{escape(self.y_title)}</text>'
        )
        return "".join(parts)

    def _x_ticks(self) -> list[float]:
        if not self.log_x:
            return ticks(self.x_low, self.x_high, 6, integer=True)
        powers = range(math.floor(math.log10(self.x_low)), math.ceil(math.log10(self.x_high)) + 1)
        rounds = (10.0**power * m for power in powers for m in (1, 2, 5))
        return [value for value in rounds if self.x_low <= value <= self.x_high]

    def hover(self, values: Mapping[str, Mapping[int, float]]) -> str:
        """One invisible column per step whose tooltip lists every series' value there."""
        parts = []
        for i, step in enumerate(self.steps):
            left, right = float(LEFT), float(WIDTH - RIGHT)
            if i > 0:
                left = self.x((self.steps[i - 1] + step) / 2)
            if i + 1 < len(self.steps):
                right = self.x((step + self.steps[i + 1]) / 2)
            lines = [f"{self.x_title} {step}"]
            lines += [
                f"{label}: {format_number(v[step])}" for label, v in values.items() if step in v
            ]
            tooltip = escape("\n".join(lines))
            parts.append(
                f'<rect class="hover" x="{left}" y="{TOP}" width="{right - left:.1f}" '
                f'height="{HEIGHT - TOP - BOTTOM}"><title>{tooltip}</title></rect>'
            )
        return "".join(parts)


def _svg(parts: Sequence[str], label: str) -> str:
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(label)}">'
        f"{''.join(parts)}</svg>"
    )


def _colour(number: int) -> str:
    return f"var(--series-{number % NUM_COLOURS + 1})"


def _or_zero(value: float) -> float:
    return value if math.isfinite(value) else 0.0


def _thin(points: Sequence[Point], limit: int) -> list[Point]:
    """At most `limit` points: means over neighbouring steps, at the last of them."""
    if len(points) <= limit:
        return list(points)
    size = -(-len(points) // limit)
    groups = (points[i : i + size] for i in range(0, len(points), size))
    return [(group[-1][0], sum(v for _, v in group) / len(group)) for group in groups]


def _thin_together(
    series: Mapping[str, Sequence[Point]], limit: int
) -> dict[str, dict[int, float]]:
    """At most `limit` steps, the same for all series: means over neighbouring steps, at the last of
    them, where a series counts as 0 at a step that it lacks."""
    steps = sorted({step for points in series.values() for step, _ in points})
    size = max(1, -(-len(steps) // limit))
    group_of = {step: i // size for i, step in enumerate(steps)}
    groups = [steps[i : i + size] for i in range(0, len(steps), size)]
    thinned: dict[str, dict[int, float]] = {}
    for label, points in series.items():
        sums: dict[int, float] = {}
        for step, value in points:
            group = groups[group_of[step]]
            sums[group[-1]] = sums.get(group[-1], 0.0) + _or_zero(value) / len(group)
        thinned[label] = sums
    return thinned


def _finite_runs(points: Sequence[Point]) -> list[list[Point]]:
    runs: list[list[Point]] = [[]]
    for point in points:
        if math.isfinite(point[1]):
            runs[-1].append(point)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


def _span(values: Sequence[float]) -> tuple[float, float]:
    """An interval around the values: from 0 where they are positive and reach down towards it."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    if low == high:
        margin = abs(low) or 1.0
        return (0.0, 2 * margin) if low >= 0 else (2 * low, 0.0)
    if 0 <= low < 0.5 * high:
        low = 0.0
    margin = 0.06 * (high - low)
    return (low - margin if low else 0.0, high + margin)
