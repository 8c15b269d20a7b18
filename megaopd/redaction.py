"""Keys and passwords stay out of what a process says: error lines, log lines, tracebacks.

A secret is known by where it stands: the value of an environment variable that is named like one,
in a URL before its host, or behind a flag or key that is named like one.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import threading
import traceback
from collections.abc import Mapping
from types import TracebackType
from typing import Any

HIDDEN = "***"

_VARIABLE = re.compile(r"(?:^|_)(?:API_?KEY|KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)$", re.I)
# Shorter values are words such as `true`, which stand everywhere.
_MIN_LENGTH = 8
# A password may hold what no URL may: all up to the last @ counts.
_LOGIN = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*://)[^\s'\"]+@")
_NAMED = re.compile(
    r"((?:api|admin|access|secret)[-_]?key|passw(?:or)?d|secret|(?:auth|access|hf)[-_]?token)"
    # As in key=x, --key,x and 'key': 'x', not in prose.
    r"(['\"]?=['\"]?|['\"][,:]\s*['\"]?|,['\"]?)[^\s'\",\]}]+",
    re.I,
)


def secrets_of(environ: Mapping[str, str], names: tuple[str, ...] = ()) -> dict[str, str]:
    """The secrets that environment variables hold, by the variable's name.

    Args:
        names: variables that hold one, whatever they are called.
    """
    return {
        name: value
        for name, value in environ.items()
        if len(value) >= _MIN_LENGTH and (name in names or _VARIABLE.search(name))
    }


def has_login(text: str) -> bool:
    """Whether a URL in `text` holds a user name or a password."""
    return _LOGIN.search(text) is not None


def redact(text: str, environ: Mapping[str, str] = os.environ) -> str:
    """`text` without secrets."""
    # One may hold another.
    for value in sorted(secrets_of(environ).values(), key=len, reverse=True):
        text = text.replace(value, HIDDEN)
    text = _LOGIN.sub(rf"\1{HIDDEN}@", text)
    return _NAMED.sub(rf"\1\2{HIDDEN}", text)


def redact_output() -> None:
    """From now on this process's log records and tracebacks hold no secrets."""
    make_record = logging.getLogRecordFactory()

    def make_redacted(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make_record(*args, **kwargs)
        try:
            message = record.getMessage()
        except (TypeError, ValueError, KeyError):  # a library's slip, which a handler would show
            message = f"{record.msg} % {record.args!r}"
        record.msg, record.args = redact(message), None
        if record.exc_info and record.exc_info[0] is not None:
            # What a formatter finds here it does not make again.
            record.exc_text = redact("".join(traceback.format_exception(*record.exc_info))).rstrip()
        return record

    def show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        print(
            redact("".join(traceback.format_exception(kind, error, trace))), end="", file=sys.stderr
        )

    def show_of_thread(args: threading.ExceptHookArgs) -> None:
        if args.exc_value is not None and args.exc_type is not SystemExit:
            show(args.exc_type, args.exc_value, args.exc_traceback)

    logging.setLogRecordFactory(make_redacted)
    sys.excepthook = show
    threading.excepthook = show_of_thread
