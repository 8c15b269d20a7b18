"""Python that starts in a moment for the ranks of Slurm's jobs.

`python -m tests.helpers.slurm.fork_server DIR` imports what a run needs once and writes
DIR/bin/python, a program that takes what an interpreter takes (`-m module`, `-c code`, a file). It
asks the server for a fork of itself, which gets its arguments, environment, directory and files,
passes signals on to it, and ends as it ends; if it is killed, so is the fork.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import runpy
import selectors
import signal
import socket
import sys
import threading
import warnings
from pathlib import Path

# Runs without this package, in as little time as possible.
PROGRAM = """\
#!{python} -ISs
import json, os, signal, socket, sys
server = socket.socket(socket.AF_UNIX)
server.connect({socket!r})
order = json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]).encode()
socket.send_fds(server, [b"%12d" % len(order)], [0, 1, 2])
server.sendall(order)
for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, frame: server.sendall(bytes([number])))
status = int(server.recv(16) or -signal.SIGKILL)
if status >= 0:
    os._exit(status)
if -status != signal.SIGKILL:
    signal.signal(-status, signal.SIG_DFL)
os.kill(os.getpid(), -status)
"""


# Arguments, directory, environment; descriptors of the three standard files.
Order = tuple[tuple[list[str], str, dict[str, str]], list[int]]


def main(directory: Path) -> None:
    """Serves until its standard input ends."""
    _import_all()
    program, address = directory / "bin/python", directory / "socket"
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(address))
    listener.listen(64)
    program.parent.mkdir()
    program.write_text(PROGRAM.format(python=sys.executable, socket=str(address)))
    program.chmod(0o755)
    print("ready", flush=True)
    if order := _serve(listener):
        _become(*order)


def _import_all() -> None:
    """Whatever a run imports, early or late."""
    import transformers

    import megaopd.inputs
    import tests.helpers.preloaded  # noqa: F401

    for name in ("AutoTokenizer", "PreTrainedTokenizerFast"):
        getattr(transformers, name)
    # The parsers of overrides learn their grammar as they are used.
    megaopd.inputs.read_config(["conf=debug", "eval.reward=zero", 'run.dir="a b"'], 4)
    # A collection would touch, and so copy, every page with an object on it.
    gc.freeze()


def _serve(listener: socket.socket) -> tuple[Order, socket.socket] | None:
    """Forks for every client; a fork returns what it is to do, the server None at its end."""
    children: dict[int, tuple[int, socket.socket]] = {}
    with selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        selector.register(sys.stdin, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj is sys.stdin:
                    return None
                if key.fileobj is listener:
                    client, _ = listener.accept()
                    order = _receive(client)
                    pid = os.fork()
                    if pid == 0:
                        listener.close()
                        return order, client
                    for descriptor in order[1]:
                        os.close(descriptor)
                    descriptor = os.pidfd_open(pid)
                    children[descriptor] = (pid, client)
                    selector.register(descriptor, selectors.EVENT_READ)
                else:
                    selector.unregister(key.fd)
                    pid, client = children.pop(key.fd)
                    os.close(key.fd)
                    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
                    with client, contextlib.suppress(BrokenPipeError):
                        client.sendall(str(status).encode())


def _receive(client: socket.socket) -> Order:
    head, descriptors, _, _ = socket.recv_fds(client, 12, 3)
    text = b""
    while len(text) < int(head):
        text += client.recv(1 << 20)
    return json.loads(text), descriptors


def _become(order: Order, client: socket.socket) -> None:
    """What the fork does: it is the program that was asked for."""
    (argv, directory, environment), descriptors = order
    os.setsid()
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(directory)
    threading.Thread(target=_pass_on, args=(client,), daemon=True).start()
    warnings.filterwarnings("ignore", ".*found in sys.modules", RuntimeWarning)
    kind, *rest = argv
    if kind == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif kind == "-c":
        sys.argv = ["-c", *rest[1:]]
        exec(rest[0], {"__name__": "__main__"})
    else:
        sys.argv = argv
        runpy.run_path(kind, run_name="__main__")


def _pass_on(client: socket.socket) -> None:
    while number := client.recv(1):
        os.kill(os.getpid(), number[0])
    # The program is gone without a word: it was killed.
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
