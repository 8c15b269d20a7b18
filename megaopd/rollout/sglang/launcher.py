"""Runs `sglang.launch_server`; executed by path in the interpreter that has sglang, which need not
have this package, so it imports the standard library alone.

What it adds to the server: the keys arrive on standard input and never stand on a command line, in
the environment, in a file or in the log (the server logs all its arguments); flags that this
version does not know are replaced by what it does know; and the process dies with its parent.

Protocol: one JSON object on standard input, ``{"parent": pid, "options": [...], "args": [...],
"secrets": {...}}`` (see `megaopd.rollout.sglang.flags`); one JSON line on standard output,
``{"version": ..., "argv": [...], "secrets": [...]}``: the version, the arguments without the keys,
and the secret flags that the server takes. All other output goes to standard error: the log. Its
own command line is not looked at.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import logging
import os
import runpy
import signal
import sys
from importlib import import_module
from importlib.metadata import version
from typing import Any

PR_SET_PDEATHSIG = 1


def die_with(parent: int) -> None:
    """Asks the kernel for SIGKILL when the thread that started this process ends."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        # It died before the call.
        os._exit(1)


def known_flags() -> set[str]:
    """All flags of this version's server, whether or not its help shows them."""
    parser = argparse.ArgumentParser()
    import_module("sglang.srt.server_args").ServerArgs.add_cli_args(parser)
    return set(parser._option_string_actions)


def choose(options: list[list[list[str]]], known: set[str]) -> list[str]:
    """The first alternative of each option whose flags are all known, one after the other.

    Raises:
        SystemExit: an option has none; an empty alternative always counts as known.
    """
    chosen = []
    for alternatives in options:
        for alternative in alternatives:
            if all(word in known for word in alternative if word.startswith("--")):
                chosen += alternative
                break
        else:
            sys.exit(f"this version of sglang has none of the flags {alternatives}")
    return chosen


def redact_log(secrets: list[str]) -> None:
    """Takes the secrets out of all log records of this process."""
    make_record = logging.getLogRecordFactory()

    def make_redacted(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make_record(*args, **kwargs)
        message = record.getMessage()
        if any(secret in message for secret in secrets):
            for secret in secrets:
                message = message.replace(secret, "***")
            record.msg, record.args = message, None
        return record

    logging.setLogRecordFactory(make_redacted)


def main() -> None:
    order = json.loads(sys.stdin.readline())
    die_with(order["parent"])
    # A job's warning to the run may reach all processes; the server's end is the run's affair.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    # Whatever else is printed, by an import say, belongs to the log.
    report_to = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    # The server's modules are looked up by name; those that lie beside this file are not meant.
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry or ".") != here]
    # Thousands of modules: garbage collections would take a quarter of the time, and find nothing.
    gc.disable()
    known = known_flags()
    import_module("sglang.srt.entrypoints.http_server")
    gc.freeze()
    gc.enable()
    secrets = {flag: key for flag, key in order["secrets"].items() if flag in known}
    argv = choose(order["options"], known) + order["args"]
    report = {"version": version("sglang"), "argv": argv, "secrets": list(secrets)}
    with os.fdopen(report_to, "w") as line:
        print(json.dumps(report), file=line)
    redact_log(list(secrets.values()))
    # In one word: a random key may begin like an option.
    with_secrets = [f"{flag}={key}" for flag, key in secrets.items()]
    sys.argv = ["sglang.launch_server", *argv, *with_secrets]
    runpy.run_module("sglang.launch_server", run_name="__main__")


if __name__ == "__main__":
    main()
