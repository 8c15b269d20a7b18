"""Runs checks one after another and prints a row for each: passed, failed with its fix, skipped."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from megaopd.errors import EnvironmentFault, MegaOPDError

Status = Literal["pass", "FAIL", "skip"]

# Room for the names of checks.
_WIDTH = 22


class NotApplicable(Exception):
    """There is nothing to check here; its text says why."""


@dataclass(frozen=True)
class Check:
    """One row of the table.

    Attributes:
        run: (what earlier checks left) -> what was found, in a few words; raises a MegaOPDError
            whose text says what is wrong and what to do, or `NotApplicable`.
        needs: checks without whose success it is skipped.
        collective: the ranks run it together, and it has passed when it has on all of them.
    """

    run: Callable[[Any], str]
    needs: tuple[str, ...] = ()
    collective: bool = False


@dataclass(frozen=True)
class Outcome:
    """What came of a check.

    Attributes:
        found: what was found, or why it was skipped.
        fix: what to do about a failure.
        exit_status: of the error behind a failure.
    """

    status: Status
    found: str
    fix: str = ""
    exit_status: int = 0


@dataclass
class Table:
    """The rows so far; rank 0's are printed as they come.

    Args:
        show: takes a line of text.
    """

    show: Callable[[str], None]
    outcomes: dict[str, Outcome] = field(default_factory=dict)

    def run(
        self,
        checks: Mapping[str, Check],
        setup: Any,
        agree: Callable[[str, Outcome], Outcome] = lambda name, outcome: outcome,
    ) -> None:
        """Runs all checks whose needs are met.

        Args:
            agree: for collective checks: (name, this rank's outcome) -> that of all ranks.
        """
        for name, check in checks.items():
            missing = [n for n in check.needs if self.outcomes[n].status != "pass"]
            start = time.monotonic()
            if missing:
                outcome = Outcome("skip", f"needs: {', '.join(missing)}")
            else:
                outcome = outcome_of(check, setup)
                outcome = agree(name, outcome) if check.collective else outcome
            self.outcomes[name] = outcome
            for line in row(name, outcome, time.monotonic() - start):
                self.show(line)

    @property
    def exit_status(self) -> int:
        """0, or that of the first failure."""
        return next((o.exit_status for o in self.outcomes.values() if o.status == "FAIL"), 0)

    def summary(self) -> str:
        """The last line."""
        counts = {
            status: sum(o.status == status for o in self.outcomes.values())
            for status in ("pass", "FAIL", "skip")
        }
        return f"{counts['pass']} passed, {counts['FAIL']} failed, {counts['skip']} skipped"


def row(name: str, outcome: Outcome, seconds: float = 0.0) -> list[str]:
    """The lines of a check."""
    took = f"  ({seconds:.1f} s)" if seconds >= 1 else ""
    lines = [f"{name:<{_WIDTH}}{outcome.status}  {outcome.found}{took}"]
    if outcome.fix:
        lines.append(f"{'':<{_WIDTH}}fix:  {outcome.fix}")
    return lines


def outcome_of(check: Check, setup: Any) -> Outcome:
    """Runs a check on this rank."""
    try:
        return Outcome("pass", check.run(setup))
    except NotApplicable as reason:
        return Outcome("skip", str(reason))
    except MegaOPDError as error:
        where, found, remedy = error.parts
        return Outcome("FAIL", f"{where}: {found}", remedy, error.exit_status)
    except (RuntimeError, MemoryError) as error:
        from megaopd.out_of_memory import is_out_of_memory

        if not is_out_of_memory(error):
            raise
        found = (str(error) or "out of memory").splitlines()[0]
        remedy = "python -m megaopd.plan shows what fits; raise parallelism, or train.offload=true"
        return Outcome("FAIL", found, remedy, EnvironmentFault.exit_status)
