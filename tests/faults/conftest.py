"""The table of the fault suite: what was injected, and what was seen.

Every test reports one row. Where $FAULTS_TABLE names a document, the rows take the place of what
stands there between its two marks.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest

BEGIN, END = (
    "<!-- The table below is written by `make test-faults`. -->",
    "<!-- End of the table. -->",
)

# In the order of the table.
FILES = (
    *("test_kill_ranks", "test_kill_in_save", "test_disk", "test_damage", "test_in_training"),
    "test_servers",
)

Report = Callable[[str, str], None]


@pytest.fixture
def rng() -> random.Random:
    """Random choices; $FAULT_SEED repeats those of another run."""
    seed = int(os.environ.get("FAULT_SEED") or random.SystemRandom().randrange(10**6))
    print(f"FAULT_SEED={seed}")
    return random.Random(seed)


@pytest.fixture
def report(record_property: Callable[[str, object], None]) -> Report:
    """Takes (what was injected, what was seen)."""

    def take(injected: str, seen: str) -> None:
        print(f"injected: {injected}\nseen: {seen}")
        record_property("fault", f"{injected}\n{seen}")

    return take


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    found = [
        (FILES.index(Path(report.location[0]).stem), report.location[1], value)
        for reports in terminalreporter.stats.values()
        for report in reports
        if getattr(report, "when", "") == "call"
        for name, value in report.user_properties
        if name == "fault"
    ]
    rows = [value.split("\n") for _, _, value in sorted(found)]
    if not rows:
        return
    terminalreporter.section("faults")
    for injected, seen in rows:
        terminalreporter.write_line(f"{injected}\n    {seen}")
    document = os.environ.get("FAULTS_TABLE")
    if document and not any(map(terminalreporter.stats.get, ("failed", "error", "skipped"))):
        _write(Path(document), rows)


def _write(document: Path, rows: list[list[str]]) -> None:
    text = document.read_text(encoding="utf-8")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    lines = ["| injected | seen |", "|-|-|", *(f"| {a} | {b} |" for a, b in rows)]
    document.write_text("\n".join([before + BEGIN, "", *lines, "", END]) + after, encoding="utf-8")
