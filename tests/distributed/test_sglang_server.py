"""Servers as processes: flags, keys, starts that fail, restarts, and nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import psutil
import pytest

from megaopd.errors import RolloutError
from megaopd.rollout.sglang import launcher
from megaopd.rollout.sglang.address import check_not_public, free_port
from megaopd.rollout.sglang.flags import DEVICE_OPTIONS, ServerSpec, server_options
from megaopd.rollout.sglang.fleet import ServerFleet
from megaopd.rollout.sglang.scratch import (
    PREFIX,
    SHARED_MEMORY,
    make_scratch,
    note_shared_memory,
    remove_scratch,
)
from megaopd.rollout.sglang.server import SGLangServer
from tests.helpers.runs import ROOT
from tests.helpers.sglang import START_TIMEOUT_S, http_status, is_alive, make_fleet, sglang_python
from tests.helpers.tiny_models import make_tiny_model

# For processes that end before they look at it.
MODEL = "model"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model"))


def all_specs() -> list[ServerSpec]:
    common = {"model_path": "model", "python": "python", "dtype": "bf16"}
    return [
        ServerSpec(device=device, colocated=colocated, **common)
        for device in DEVICE_OPTIONS
        for colocated in (False, True)
    ]


@pytest.mark.parametrize(
    ("known", "chosen"),
    [
        ({"--new-a", "--new-b", "--old", "--rare"}, ["--new-a", "1", "--new-b", "2", "--rare"]),
        ({"--new-a", "--old"}, ["--old"]),
    ],
)
def test_the_first_known_alternative_is_chosen(known: set[str], chosen: list[str]) -> None:
    options = [[["--new-a", "1", "--new-b", "2"], ["--old"]], [["--rare"], []]]
    assert launcher.choose(options, known) == chosen


def test_an_option_without_a_known_alternative_ends_the_launcher() -> None:
    with pytest.raises(SystemExit, match=r"none of the flags \[\['--new-a'"):
        launcher.choose([[["--new-a"], ["--old"]]], {"--other"})


@pytest.mark.slow
def test_this_version_knows_the_flags_of_every_device() -> None:
    """And every value is one that its parser takes."""
    script = (
        "import sys, json, argparse\n"
        f"sys.path.append({str(ROOT / 'megaopd/rollout/sglang')!r})\n"
        "import launcher\n"
        "from sglang.srt.server_args import ServerArgs\n"
        "known = launcher.known_flags()\n"
        "parser = argparse.ArgumentParser(exit_on_error=False)\n"
        "ServerArgs.add_cli_args(parser)\n"
        "for options in json.loads(sys.argv[1]):\n"
        "    parsed = parser.parse_args(launcher.choose(options, known))\n"
        "    print(parsed.device, parsed.port, parsed.skip_tokenizer_init)\n"
        "    print(parsed.enable_memory_saver)\n"
        "print({'--api-key', '--admin-api-key'} <= known)\n"
    )
    options = [server_options(spec, 1234) for spec in all_specs()]
    done = subprocess.run(
        [sglang_python(), "-c", script, json.dumps(options)],
        capture_output=True,
        text=True,
        timeout=START_TIMEOUT_S,
        env=os.environ | {"SGLANG_USE_CPU_ENGINE": "1", "PYTHONPATH": ""},
    )
    lines = done.stdout.splitlines()
    expected = []
    for spec in all_specs():
        expected += [f"{spec.device} 1234 True", str(spec.device == "cuda" and spec.colocated)]
    assert lines[-len(expected) - 1 :] == [*expected, "True"], done.stderr[-2000:]


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "8.8.8.8", "2001:4860:4860::8888"])
def test_addresses_open_to_the_world_are_refused(host: str) -> None:
    with pytest.raises(RolloutError, match=r"rollout\.sglang\.host: .* is open to the world"):
        check_not_public(host)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "10.1.2.3", "192.168.7.7"])
def test_loopback_and_private_addresses_are_taken(host: str) -> None:
    check_not_public(host)


def test_a_private_address_of_another_host_is_refused(tmp_path: Path) -> None:
    fleet = make_fleet(MODEL, tmp_path, host="10.255.254.253", python=sys.executable)
    with pytest.raises(RolloutError, match=r"rollout\.sglang\.host: 10\.255.* cannot be bound"):
        fleet.start()


@pytest.mark.parametrize("word", ["--host", "--hos", "--port=1", "--api-key", "--admin-api-key"])
def test_arguments_that_are_ours_are_refused(tmp_path: Path, word: str) -> None:
    fleet = make_fleet(MODEL, tmp_path, args=("--tp-size", "1", word), python=sys.executable)
    with pytest.raises(RolloutError, match=r"rollout\.sglang\.args: --.* is set by us"):
        fleet.start()


def test_ports_are_none_that_outgoing_connections_get() -> None:
    ports = [free_port("127.0.0.1") for _ in range(20)]
    assert all(20000 <= port < 32768 for port in ports)
    assert len(set(ports)) > 15


def test_who_takes_the_port_is_told_no_key(tmp_path: Path) -> None:
    """Another process answers where the server should, and the server's process lives."""
    asked: list[str | None] = []

    class Squatter(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.headers.get("Authorization"))
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None: ...

    server = make_fleet(MODEL, tmp_path, python=sys.executable).servers[0]
    server._process = subprocess.Popen(["sleep", "60"], start_new_session=True)
    server._reported = b"\n"
    server._started_at = time.monotonic()
    with ThreadingHTTPServer(("127.0.0.1", 0), Squatter) as squatter:
        Thread(target=squatter.serve_forever, daemon=True).start()
        server.url = f"http://127.0.0.1:{squatter.server_port}"
        with pytest.raises(RolloutError, match="another process took it"):
            server.wait_ready()
        squatter.shutdown()
    assert asked == [None]
    assert server.pid is None


def test_what_dead_trainers_left_is_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    ended = subprocess.Popen(["true"])
    ended.wait()
    shared = tmp_path / "shared"
    orphan, ours, foreign = (
        tmp_path / name
        for name in (f"{PREFIX}{ended.pid}-a", f"{PREFIX}{os.getpid()}-b", f"other-{ended.pid}-c")
    )
    for path in (orphan, ours, foreign):
        path.mkdir()
        (path / "file").touch()
    shared.touch()
    note_shared_memory(orphan, {str(shared)})
    scratch = make_scratch()
    assert stat.S_IMODE(scratch.stat().st_mode) == 0o700
    assert {path.name for path in tmp_path.iterdir()} == {scratch.name, ours.name, foreign.name}


def test_a_start_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    for python in ("/no/python", "/bin/false"):
        fleet = make_fleet(MODEL, tmp_path, python=python)
        with pytest.raises(RolloutError):
            fleet.start()
        assert list((tmp_path / "tmp").iterdir()) == []


def test_an_interpreter_that_is_not_there(tmp_path: Path) -> None:
    fleet = make_fleet(MODEL, tmp_path, python="/no/python")
    with pytest.raises(RolloutError) as caught:
        fleet.start()
    assert str(caught.value).startswith("rollout.sglang.python: /no/python cannot be run (No such")


def test_an_interpreter_without_sglang_is_named_by_its_last_words(tmp_path: Path) -> None:
    fleet = make_fleet(MODEL, tmp_path, python=sys.executable)
    with pytest.raises(RolloutError) as caught:
        fleet.start()
    assert str(caught.value) == (
        "sglang server 0: ended with status 1 before it was ready "
        "(ModuleNotFoundError: No module named 'sglang'); "
        f"read {tmp_path / 'sglang_0.log'}"
    )


def test_the_telling_line_of_a_log_is_quoted(tmp_path: Path) -> None:
    python = tmp_path / "python"
    refusal = "server: error: unrecognized arguments: --no-such-flag"
    python.write_text(f"#!/bin/sh\n(echo usage; echo {refusal}; echo; echo bye) >&2; exit 2\n")
    python.chmod(0o700)
    fleet = make_fleet(MODEL, tmp_path, python=str(python))
    with pytest.raises(RolloutError, match=f"ended with status 2 before .* .{refusal}.; read"):
        fleet.start()


def test_ten_restarts_in_a_row_retire_a_server(tmp_path: Path) -> None:
    fleet = failing_fleet(tmp_path, max_restarts=10)
    for restart in range(1, 11):
        assert fleet.retired == set()
        with pytest.raises(RolloutError, match="before it was ready"):
            fleet.restart(0)
        assert fleet.retired == (set() if restart < 10 else {0})
    with pytest.raises(RolloutError, match="restarted 10 times in a row; it is given up"):
        fleet.restart(0)


def test_a_server_that_ran_long_enough_breaks_the_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = failing_fleet(tmp_path, max_restarts=2, stable_s=0.05)
    with monkeypatch.context() as patch:
        # Stands for a process that gets ready and dies later.
        patch.setattr(SGLangServer, "wait_ready", lambda server: None)
        for _ in range(5):
            fleet.restart(0)
            time.sleep(0.1)
    for _ in range(2):
        assert fleet.retired == set()
        with pytest.raises(RolloutError):
            fleet.restart(0)
    assert fleet.retired == {0}


def test_restarts_wait_longer_each_time(tmp_path: Path) -> None:
    fleet = failing_fleet(tmp_path, max_restarts=3, first_delay_s=0.4)
    seconds = [seconds_of(lambda: failed_restart(fleet)) for _ in range(3)]
    assert seconds[1] > 0.4
    assert seconds[2] > 0.8


def test_a_stopped_fleet_restarts_nothing(tmp_path: Path) -> None:
    fleet = failing_fleet(tmp_path)
    fleet.stop()
    with pytest.raises(RolloutError, match="given up"):
        fleet.restart(0)
    assert fleet.servers[0].pid is None


def failing_fleet(log_dir: Path, **settings: float) -> ServerFleet:
    """One server whose process ends at once."""
    settings = {"first_delay_s": 0.001} | settings
    return make_fleet(MODEL, log_dir, python="/bin/false", fleet=settings)


def failed_restart(fleet: ServerFleet) -> None:
    with pytest.raises(RolloutError):
        fleet.restart(0)


def seconds_of(call: Callable[[], object]) -> float:
    start = time.monotonic()
    call()
    return time.monotonic() - start


@pytest.mark.slow
@pytest.mark.timeout(2 * START_TIMEOUT_S)
def test_a_server_dies_with_its_parent(model: Path, tmp_path: Path) -> None:
    """Which is killed, and has started the server in a thread that ended long ago. What it cannot
    clean up the next start of a server does."""
    script = (
        "import sys, threading, time\n"
        "from pathlib import Path\n"
        "from tests.helpers.sglang import make_fleet\n"
        "fleet = make_fleet(sys.argv[1], Path(sys.argv[2]))\n"
        "thread = threading.Thread(target=fleet.start)\n"
        "thread.start()\n"
        "thread.join()\n"
        "print(fleet.servers[0].pid, fleet.servers[0].url, flush=True)\n"
        "time.sleep(1000)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", script, str(model), str(tmp_path)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    try:
        assert parent.stdout is not None
        words = parent.stdout.readline().split()
        assert words, "the parent died by itself"
        server = psutil.Process(int(words[0]))
        family = [server, *server.children(recursive=True)]
        time.sleep(1)
        assert http_status(words[1] + "/health", "") == 200
        scratch = Path(server.environ()["TMPDIR"])
        shared = [Path(file) for file in (scratch / SHARED_MEMORY).read_text().splitlines()]
        assert shared
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        parent.stdout.close()
    _, alive = psutil.wait_procs(family, timeout=10)
    assert [member for member in alive if is_alive(member)] == []
    assert scratch.exists()
    remove_scratch(make_scratch())
    assert [path for path in (scratch, *shared) if path.exists()] == []
