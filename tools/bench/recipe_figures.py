"""What the curves of recipes say: figures with intervals, tables, and a page with charts."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

from megaopd.report_page import write_page
from megaopd.report_svg import legend, line_chart

# Fields of `Point`, and what they are called.
COSTS = {"tokens": "student tokens", "flops": "student FLOPs", "seconds": "seconds"}
# Two-sided 95 % of Student's t by degrees of freedom.
T95 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


@dataclass(frozen=True)
class Point:
    """An evaluation, and what the student had spent by then."""

    step: int
    tokens: float
    flops: float
    seconds: float
    accuracy: float
    reverse_kl: float


def spent(points: Sequence[Point], accuracy: float, what: str) -> float:
    """What had been spent when the accuracy was first reached, on the straight line between two
    evaluations; infinite if it never was."""
    for before, after in pairwise(points):
        if before.accuracy >= accuracy:
            return float(getattr(before, what))
        if after.accuracy >= accuracy:
            share = (accuracy - before.accuracy) / (after.accuracy - before.accuracy)
            low, high = getattr(before, what), getattr(after, what)
            return float(low + share * (high - low))
    return math.inf


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and the ends of its 95 % interval."""
    mean = statistics.fmean(values)
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return mean, math.nan, math.nan
    half = T95[len(values) - 1] * statistics.stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def ratio(values: Sequence[float]) -> tuple[float, float, float]:
    """Geometric mean and the ends of its interval; infinite where a value is."""
    if any(map(math.isinf, values)):
        return math.inf, math.nan, math.nan
    mean, low, high = interval([math.log(v) for v in values])
    return math.exp(mean), math.exp(low), math.exp(high)


def figures(
    curves: Mapping[str, Sequence[Sequence[Point]]], against: str, targets: Sequence[float]
) -> dict[str, Any]:
    """The figures of recipes that are compared.

    Args:
        curves: of each recipe, one per seed, the seeds in the same order.
        against: the one that the others are measured by.
        targets: accuracies.

    Returns:
        Per recipe (mean, low, high) over the seeds of `start`, `final` and `mean` accuracy (the
        last over the evaluations after the start) and of `reverse_kl` at the end; and by target
        and cost how many seeds got there (`reached`), what it took (`to`) and how many times less
        than `against` took (`less`), at least so many where it did not get there (`bound`).
    """
    found: dict[str, Any] = {}
    for name, seeds in curves.items():
        row: dict[str, Any] = {
            "start": interval([points[0].accuracy for points in seeds]),
            "final": interval([points[-1].accuracy for points in seeds]),
            "mean": interval([statistics.fmean(p.accuracy for p in s[1:]) for s in seeds]),
            "reverse_kl": interval([points[-1].reverse_kl for points in seeds]),
            "to": {},
            "less": {},
            "bound": {},
            "reached": {},
        }
        for target in targets:
            row["reached"][target] = sum(spent(s, target, "tokens") < math.inf for s in seeds)
            for cost in COSTS:
                mine = [spent(points, target, cost) for points in seeds]
                theirs = [spent(points, target, cost) for points in curves[against]]
                # Whoever did not get there needs more than all that was spent.
                total = [float(getattr(points[-1], cost)) for points in curves[against]]
                least = [min(pair) for pair in zip(theirs, total, strict=True)]
                row["to"][f"{target} {cost}"] = interval(mine)
                row["less"][f"{target} {cost}"] = _times_less(least, mine)
                row["bound"][f"{target} {cost}"] = math.inf in theirs
        found[name] = row
    return found


def _times_less(theirs: Sequence[float], mine: Sequence[float]) -> tuple[float, float, float]:
    if not all(map(math.isfinite, mine)) or not all(mine):
        return math.nan, math.nan, math.nan
    return ratio([b / a for a, b in zip(mine, theirs, strict=True)])


def _shown(values: Sequence[float], digits: int = 3) -> str:
    mean, low, high = values
    if math.isnan(mean):
        return "-"
    if math.isinf(mean):
        return "not reached"
    if math.isnan(low):
        return f"{mean:.{digits}g}"
    return f"{mean:.{digits}g} [{low:.{digits}g}, {high:.{digits}g}]"


def table(
    name: str, found: Mapping[str, Any], against: str, targets: Sequence[float], num_seeds: int
) -> list[list[str]]:
    """Rows of text, the header first."""
    columns = ["accuracy at the start", "at the end", "mean on the way", "reverse KL at the end"]
    header = [name, *columns]
    for target in targets:
        for cost in COSTS:
            header += [f"{COSTS[cost]} to {target}", "times less"]
    rows = [header]
    for recipe, row in found.items():
        cells = [recipe, *(_shown(row[k]) for k in ("start", "final", "mean", "reverse_kl"))]
        for target in targets:
            for cost in COSTS:
                key = f"{target} {cost}"
                reached = row["reached"][target]
                missed = f"{reached} of {num_seeds} got there"
                cells.append(_shown(row["to"][key]) if reached == num_seeds else missed)
                at_least = ">= " if row["bound"][key] and reached == num_seeds else ""
                cells.append("-" if recipe == against else at_least + _shown(row["less"][key]))
        rows.append(cells)
    return rows


def chart(curves: Mapping[str, Sequence[Sequence[Point]]], cost: str) -> str:
    """Accuracy over what was spent: means over the seeds of each evaluation, with their spread."""
    lines: dict[str, list[tuple[int, float]]] = {}
    bands: dict[str, list[tuple[int, float, float]]] = {}
    # TFLOP; the others as they are.
    unit = 1e12 if cost == "flops" else 1.0
    for name, seeds in curves.items():
        lines[name], bands[name] = [], []
        for points in list(zip(*seeds, strict=True))[1:]:
            x = max(1, round(statistics.fmean(getattr(p, cost) for p in points) / unit))
            values = [p.accuracy for p in points]
            lines[name].append((x, statistics.fmean(values)))
            bands[name].append((x, min(values), max(values)))
    title = "student TFLOP" if cost == "flops" else COSTS[cost]
    drawing = line_chart(lines, "accuracy", (0.0, 1.0), x_title=title, bands=bands, log_x=True)
    return f"<figure><figcaption>{title}</figcaption>{legend(list(lines))}{drawing}</figure>"


def write_report(out: Path, parts: Mapping[str, tuple[list[list[str]], list[str]]]) -> None:
    body = ["<h1>What recipes reach, and for how much</h1>"]
    for name, (rows, charts) in parts.items():
        head, *rest = (
            "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in row)
            for tag, row in [("th", rows[0]), *(("td", row) for row in rows[1:])]
        )
        cells = "".join(f"<tr>{row}</tr>" for row in [head, *rest])
        body.append(f'<h2>{name}</h2><div class="wide"><table>{cells}</table></div>')
        body.append(f'<div class="charts">{"".join(charts)}</div>')
    body.append(
        "<p>Lines: means over seeds of each evaluation; bands: the lowest to the highest.</p>"
    )
    write_page(out / "report.html", "Recipes", "".join(body))
