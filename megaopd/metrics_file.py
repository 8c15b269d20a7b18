"""metrics.jsonl: one JSON object per line and step, as `megaopd.metrics` writes it.

Read without torch: the status screen and the report of a run on another machine need the numbers
alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from megaopd.errors import DataError

METRICS_FILE = "metrics.jsonl"

Row = dict[str, Any]
"""`step`, an int, and metrics, floats."""


def json_line(step: int, metrics: Mapping[str, float]) -> str:
    """The line of a step; what JSON has no number for is a string, which `float` reads back."""
    row = {"step": int(step), **{name: _encode(value) for name, value in metrics.items()}}
    return json.dumps(row, allow_nan=False) + "\n"


def _encode(value: float) -> float | int | str:
    if not math.isfinite(value):
        return {math.inf: "Infinity", -math.inf: "-Infinity"}.get(value, "NaN")
    return int(value) if value.is_integer() and abs(value) < 2**53 else value


def parse_row(line: str | bytes) -> Row:
    """Reads a line.

    Raises:
        ValueError: it is not what `json_line` makes.
    """
    try:
        row = json.loads(line)
        step = int(row.pop("step"))
        return {"step": step, **{name: float(value) for name, value in row.items()}}
    except (TypeError, AttributeError, KeyError, OverflowError, RecursionError) as error:
        raise ValueError("not a line of metrics") from error


def is_training(row: Mapping[str, Any]) -> bool:
    """Whether a row is a training step's, and not an evaluation's."""
    return any(name.startswith("loss/") for name in row)


def read_metrics(path: str | Path, most: int | None = None) -> list[Row]:
    """Reads metrics.jsonl: one dictionary per line, `step` an int, everything else a float.

    A last line that a killed run left half written is dropped.

    Args:
        most: read no more than about so many lines of steps and as many of evaluations, evenly
            spread, the last ones among them; None reads all.

    Raises:
        DataError: no such file, or a line before the last that is not what `MetricsWriter` writes.
    """
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError as error:
        raise DataError(str(path), error.strerror or str(error), "name a run's metrics") from error
    rows = []
    for number in range(len(lines)) if most is None else _spread(lines, most):
        try:
            rows.append(parse_row(lines[number]))
        except ValueError as error:
            if number == len(lines) - 1:
                break
            raise DataError(f"{path}:{number + 1}", "not a line of metrics", "remove it") from error
    return rows


def _spread(lines: Sequence[bytes], most: int) -> list[int]:
    """Indices of about `most` lines of either kind, ascending."""
    kinds: tuple[list[int], list[int]] = ([], [])
    for number, line in enumerate(lines):
        kinds[b'"loss/' in line].append(number)
    chosen = []
    for numbers in kinds:
        stride = -(-len(numbers) // most) or 1
        chosen += numbers[::-stride]
    return sorted(chosen)
