"""The rows of the benchmark: merged, kept as JSON, printed as one table."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

# Header, width, field and digits of the numeric columns.
_COLUMNS = (
    ("ms", 9, "ms", 1),
    ("x stream", 9, "over_stream", 2),
    ("x matmuls", 10, "over_matmuls", 2),
    ("x ours", 7, "over_ours", 2),
    ("peak u", 9, "peak_units", 3),
)


@dataclass
class Row:
    """What was measured of one contender.

    Attributes:
        section: "logits", "fused" or "tp2".
        ms: median time of forward and backward.
        over_stream: time over that of reading two [T, V] arrays and writing one.
        over_matmuls: time over that of the fused form's four bare matmuls.
        over_ours: time over that of our fastest backend, in the same run.
        loss_error: of the loss, relative to fp64 on the same inputs.
        peak_units: memory held at the peak beyond the inputs, in units of one [T, V] array.
        note: why there is no time.
    """

    section: str
    dtype: str
    kind: str
    contender: str
    ms: float | None = None
    over_stream: float | None = None
    over_matmuls: float | None = None
    over_ours: float | None = None
    loss_error: float | None = None
    peak_units: float | None = None
    note: str = ""

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.section, self.dtype, self.kind, self.contender


def merge(older: Iterable[Row], newer: Iterable[Row]) -> list[Row]:
    """One row per contender: time, ratios and error of the newest that has them, peak likewise.

    A ratio is of one run: a new time takes the place of the old one with all its ratios.
    """
    rows: dict[tuple[str, ...], Row] = {}
    for row in (*older, *newer):
        known = rows.get(row.key, row)
        timed = row if row.ms is not None or known.ms is None else known
        weighed = row if row.peak_units is not None else known
        rows[row.key] = replace(timed, peak_units=weighed.peak_units, note=row.note or timed.note)
    order = {name: i for i, name in enumerate(("logits", "fused", "tp2"))}
    return sorted(rows.values(), key=lambda r: (order[r.section], r.dtype != "float32"))


def read(path: Path, setting: dict[str, Any]) -> list[Row]:
    """The rows of an earlier run with the same setting; none if there is no such file.

    Raises:
        SystemExit: they were measured with another setting.
    """
    if not path.is_file():
        return []
    report = json.loads(path.read_text())
    for name, value in setting.items():
        then = report["setting"].get(name)
        if then != value:
            raise SystemExit(
                f"error: --append: {path} has {name} {then!r}, this run {value!r}; "
                "give another --json"
            )
    return [Row(**row) for row in report["rows"]]


def write(path: Path, setting: dict[str, Any], rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    report = {"setting": setting, "rows": [asdict(row) for row in rows]}
    path.write_text(json.dumps(report, indent=1) + "\n")


def show(setting: dict[str, Any], rows: list[Row]) -> None:
    for name, value in setting.items():
        print(f"{name}: {value}")
    numbers = "".join(f"{header:>{width}}" for header, width, _, _ in _COLUMNS)
    print(f"{'':7}{'dtype':9}{'kind':17}{'contender':19}{numbers}{'loss err':>10}  note")
    for row in rows:
        cells = f"{row.section:7}{row.dtype:9}{row.kind:17}{row.contender:19}"
        for _, width, field, digits in _COLUMNS:
            value = getattr(row, field)
            cells += " " * width if value is None else f"{value:{width}.{digits}f}"
        cells += " " * 10 if row.loss_error is None else f"{row.loss_error:10.0e}"
        print(f"{cells}  {row.note}".rstrip())
