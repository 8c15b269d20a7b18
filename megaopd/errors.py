"""What a person sees when something is wrong: one line and an exit status.

Every error that a user can cause or mend is a `MegaOPDError`; its text has the form
``<field or file>: <what was found>; <what to do>``. `run_cli` prints it as ``error: ...`` and exits
with the class's status. A bug keeps its traceback.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from megaopd.redaction import redact, redact_output


class MegaOPDError(Exception):
    """Base of all errors that end in one line on stderr.

    Args:
        where: the configuration field, file or object at fault.
        found: what was found there.
        remedy: what to do about it.

    Attributes:
        parts: the three of them.
    """

    exit_status = 1
    agreed = False
    """Whether the ranks agree on the error before they raise it, so that one of them can report
    it."""

    def __init__(self, where: str, found: str, remedy: str) -> None:
        super().__init__(f"{where}: {found}; {remedy}")
        self.parts = (where, found, remedy)

    def __reduce__(self) -> tuple[type[MegaOPDError], tuple[str, str, str]]:
        return type(self), self.parts


class ConfigError(MegaOPDError):
    exit_status = 2


class DataError(MegaOPDError):
    exit_status = 3


class CheckpointError(MegaOPDError):
    exit_status = 4


class EnvironmentFault(MegaOPDError):
    exit_status = 5


class NumericError(MegaOPDError):
    exit_status = 6
    agreed = True


class RolloutError(MegaOPDError):
    exit_status = 7
    agreed = True


class StopRequested(MegaOPDError):
    """A signal or the time limit ended the run before its last step; it is to be started again."""

    exit_status = 75
    agreed = True


def run_cli(main: Callable[[list[str]], None], argv: list[str]) -> None:
    """Runs `main(argv)`; turns a `MegaOPDError` into one line and its exit status.

    Neither holds a secret (`megaopd.redaction`), nor does what the process logs.

    ``--debug`` anywhere in argv is removed and lets the traceback through. Before the process group
    exists every rank finds the same error, and rank 0 alone prints it; afterwards a rank prints
    what it met by itself. Where each rank has a log of its own ($MEGAOPD_RANK_LOGS) all print it:
    the first to leave is the end of the others, rank 0 included. The process leaves through
    `os._exit` because the other ranks may be waiting in a collective that will never complete.
    """
    debug = "--debug" in argv
    redact_output()
    try:
        main([a for a in argv if a != "--debug"])
    except MegaOPDError as error:
        if debug:
            raise
        speaks = os.environ.get("RANK", "0") == "0" or "MEGAOPD_RANK_LOGS" in os.environ
        if speaks or (_in_process_group() and not error.agreed):
            kind = "stopped" if isinstance(error, StopRequested) else "error"
            print(redact(f"{kind}: {error}"), file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(error.exit_status)


def _in_process_group() -> bool:
    """Whether this process has joined others, without importing torch to find out."""
    distributed = sys.modules.get("torch.distributed")
    return distributed is not None and distributed.is_initialized()
