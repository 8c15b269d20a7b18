"""The process in which libraries read what a model wrote; executed by path, and imports nothing of
this package, so that it starts quickly and holds none of the trainer's memory.

It reads one JSON list of arguments a line from standard input and writes `{"score": ...}` for each.
What it may cost and do is bounded here, before the first text is read:

- CPU time of a check and address space: the kernel ends the process, whatever it is in;
- nothing but literals and arithmetic is evaluated, although some libraries call `eval` on answers
  (`refuse`); no file is written, no process started, no connection made;
- it dies with its parent, and at the end of its input.

`SCORERS` holds what it can check, by name; the parent's side is `megaopd.rewards.sandbox`.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import string
import sys
import types
from collections.abc import Callable
from functools import lru_cache
from typing import Any

PR_SET_PDEATHSIG = 1
# The names in an arithmetic expression: what sympy's parser writes around numbers and symbols,
# variables of one letter, elementary functions.
_ARITHMETIC = frozenset(
    ("Integer", "Float", "Rational", "Symbol", "Function", *string.ascii_letters, "pi")
) | {
    "Integral",
    "sqrt",
    "exp",
    "log",
    "sin",
    "cos",
    "tan",
    "asin",
    "acos",
    "atan",
    "sinh",
    "cosh",
    "tanh",
}
# What sympy's parser runs before it evaluates an expression, be it a number's digits.
_PARSER_NAMESPACE = compile("from sympy import *", "<string>", "exec")
# Audit events that end in a refusal: writing files, other processes, connections, foreign code.
_FORBIDDEN = (
    "os.system",
    "os.exec",
    "os.fork",
    "os.forkpty",
    "os.posix_spawn",
    "os.spawn",
    "os.kill",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.mkdir",
    "os.chmod",
    "os.chown",
    "os.link",
    "os.symlink",
    "os.truncate",
    "os.putenv",
    "shutil.",
    "subprocess.",
    "pty.",
    "socket.",
    "signal.pthread_kill",
    "ctypes.",
    "pickle.find_class",
    "sys.addaudithook",
    "webbrowser.",
    "urllib.",
)


class Refused(Exception):
    """A library was about to do with a model's text what no answer needs."""


def refuse(event: str, args: tuple[Any, ...]) -> None:
    """An audit hook; see PEP 578. It cannot be taken off again."""
    if event == "exec":
        code = args[0]
        if isinstance(code, types.CodeType) and not _harmless(code):
            raise Refused(f"code with the names {', '.join(code.co_names)[:80]}")
    elif event == "open":
        if args[1] is not None and set(str(args[1])) & set("wax+"):
            raise Refused("a file to write")
        if args[1] is None and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR):
            raise Refused("a file to write")
    elif event.startswith(_FORBIDDEN):
        raise Refused(event)


def _harmless(code: types.CodeType) -> bool:
    """Modules of the disk, and expressions that only literals and arithmetic are in."""
    if code == _PARSER_NAMESPACE:
        return True
    if not code.co_filename.startswith("<") or code.co_filename.startswith("<frozen "):
        return True
    nested = any(isinstance(constant, types.CodeType) for constant in code.co_consts)
    return not nested and _ARITHMETIC.issuperset(code.co_names)


def math_scorer() -> Callable[[str, str], float]:
    """Whether two LaTeX expressions are the same, as math-verify decides it."""
    import logging

    from math_verify import LatexExtractionConfig, parse, verify

    logging.disable(logging.CRITICAL)
    # LaTeX alone: the library's other way of reading an expression calls `eval`. Its own time
    # limits are signals that cannot interrupt big integers; ours end the process.
    latex = [LatexExtractionConfig(boxed_match_priority=0)]

    def read(text: str) -> list[Any]:
        return parse("\\boxed{" + text + "}", latex, parsing_timeout=None)

    read_answer = lru_cache(maxsize=4096)(read)

    def score(response: str, answer: str) -> float:
        return float(verify(read_answer(answer), read(response), timeout_seconds=None))

    score("\\frac{1}{2} + x^2", "x^2 + 0.5")
    score("\\{1, \\sqrt{2}\\}", "(1, 3] \\cup \\{2\\}")
    score("x < 3", "3 > x")
    return score


def reasoning_scorer() -> Callable[[str, str], float]:
    """The score that a task of reasoning-gym gives an answer to one of its problems."""
    import reasoning_gym

    scorer = lru_cache(maxsize=None)(reasoning_gym.get_score_answer_fn)

    def score(response: str, entry: str) -> float:
        known = json.loads(entry)
        # Tasks change the entries that they are given; each check has its own.
        return float(scorer(known["task"])(answer=response, entry=known))

    # The parser that some tasks use, with all that it imports.
    from sympy.parsing.sympy_parser import parse_expr

    parse_expr("1 + 2*x")
    return score


# name -> function that loads what it needs and returns the scoring function.
SCORERS: dict[str, Callable[[], Callable[..., float]]] = {
    "math": math_scorer,
    "reasoning_gym": reasoning_scorer,
}


def main() -> None:
    name, cpu_s, memory_bytes, parent = sys.argv[1:]
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):
        os._exit(1)  # it died before the call
    # Meant for the run, which ends its workers by itself; a job's signals may reach all processes.
    for number in (signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # Answers go where standard output was; what a library prints goes nowhere.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 1)
    sys.dont_write_bytecode = True
    try:
        score = SCORERS[name]()
    except ImportError as error:
        print(json.dumps({"missing": str(error)}), file=answers, flush=True)
        return
    os.dup2(nowhere, 2)
    resource.setrlimit(resource.RLIMIT_AS, (int(memory_bytes),) * 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    print(json.dumps({"ready": True}), file=answers, flush=True)
    # Its default action is the end of the process, even inside a computation in C.
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    sys.addaudithook(refuse)
    for line in sys.stdin.buffer:
        signal.setitimer(signal.ITIMER_PROF, float(cpu_s))
        reply: dict[str, Any]
        try:
            reply = {"score": score(*json.loads(line))}
        except MemoryError:
            # What is left of the memory would fail the checks to come.
            os._exit(1)
        except Exception as error:  # whatever a library makes of a hostile text
            reply = {"score": 0.0, "error": f"{type(error).__name__}: {error}"[:200]}
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(reply), file=answers, flush=True)


if __name__ == "__main__":
    main()
