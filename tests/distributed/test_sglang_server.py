"""Servers as processes: flags, keys, starts that fail, restarts, and nothing left behind."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from megaopd.errors import RolloutError
from megaopd.rollout.sglang import launcher
from megaopd.rollout.sglang.address import check_not_public
from megaopd.rollout.sglang.flags import DEVICE_OPTIONS, ServerSpec, server_options
from megaopd.rollout.sglang.fleet import ServerFleet
from megaopd.rollout.sglang.server import SGLangServer
from tests.helpers.runs import ROOT
from tests.helpers.sglang import START_TIMEOUT_S, make_fleet, sglang_python
from tests.helpers.tiny_models import make_tiny_model


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


def test_a_private_address_of_another_host_is_refused(model: Path, tmp_path: Path) -> None:
    fleet = make_fleet(model, tmp_path, host="10.255.254.253", python=sys.executable)
    with pytest.raises(RolloutError, match=r"rollout\.sglang\.host: 10\.255.* cannot be bound"):
        fleet.start()


def test_an_interpreter_that_is_not_there(model: Path, tmp_path: Path) -> None:
    fleet = make_fleet(model, tmp_path, python="/no/python")
    with pytest.raises(RolloutError) as caught:
        fleet.start()
    assert str(caught.value).startswith("rollout.sglang.python: /no/python cannot be run (No such")


def test_an_interpreter_without_sglang_is_named_by_its_last_words(
    model: Path, tmp_path: Path
) -> None:
    fleet = make_fleet(model, tmp_path, python=sys.executable)
    with pytest.raises(RolloutError) as caught:
        fleet.start()
    assert str(caught.value) == (
        "sglang server 0: ended with status 1 before it was ready "
        "(ModuleNotFoundError: No module named 'sglang'); "
        f"read {tmp_path / 'sglang_0.log'}"
    )


@pytest.mark.slow
@pytest.mark.timeout(START_TIMEOUT_S)
def test_an_argument_that_the_server_does_not_know(model: Path, tmp_path: Path) -> None:
    fleet = make_fleet(model, tmp_path, args=("--no-such-flag",))
    with pytest.raises(RolloutError, match="unrecognized arguments: --no-such-flag"):
        fleet.start()


def test_ten_restarts_in_a_row_retire_a_server(model: Path, tmp_path: Path) -> None:
    fleet = failing_fleet(model, tmp_path, max_restarts=10)
    for restart in range(1, 11):
        assert fleet.retired == set()
        with pytest.raises(RolloutError, match="before it was ready"):
            fleet.restart(0)
        assert fleet.retired == (set() if restart < 10 else {0})
    with pytest.raises(RolloutError, match="restarted 10 times in a row; it is given up"):
        fleet.restart(0)


def test_a_server_that_ran_long_enough_breaks_the_row(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fleet = failing_fleet(model, tmp_path, max_restarts=2, stable_s=0.05)
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


def test_restarts_wait_longer_each_time(model: Path, tmp_path: Path) -> None:
    fleet = failing_fleet(model, tmp_path, max_restarts=3, first_delay_s=0.4)
    seconds = [seconds_of(lambda: failed_restart(fleet)) for _ in range(3)]
    assert seconds[1] > 0.4
    assert seconds[2] > 0.8


def test_a_stopped_fleet_restarts_nothing(model: Path, tmp_path: Path) -> None:
    fleet = failing_fleet(model, tmp_path)
    fleet.stop()
    with pytest.raises(RolloutError, match="given up"):
        fleet.restart(0)
    assert fleet.servers[0].pid is None


def failing_fleet(model: Path, log_dir: Path, **settings: float) -> ServerFleet:
    """One server whose process ends at once."""
    settings = {"first_delay_s": 0.001} | settings
    return make_fleet(model, log_dir, python="/bin/false", fleet=settings)


def failed_restart(fleet: ServerFleet) -> None:
    with pytest.raises(RolloutError):
        fleet.restart(0)


def seconds_of(call: Callable[[], object]) -> float:
    start = time.monotonic()
    call()
    return time.monotonic() - start


@pytest.mark.slow
@pytest.mark.timeout(2 * START_TIMEOUT_S)
def test_a_server_keeps_its_keys_and_leaves_nothing(model: Path, tmp_path: Path) -> None:
    fleet = make_fleet(model, tmp_path)
    fleet.start()
    server = fleet.servers[0]
    try:
        family = family_of(server)
        assert len(family) >= 3
        assert {os.getpgid(member.pid) for member in family} == {server.pid}
        assert server.version.startswith("0.")
        assert server.api_key != server.admin_key
        statuses = {
            (path, key): status(server.url + path, key)
            for path in ("/model_info", "/flush_cache")
            for key in ("", "wrong", server.api_key, server.admin_key)
        }
        assert statuses == {
            ("/model_info", ""): 401,
            ("/model_info", "wrong"): 401,
            ("/model_info", server.api_key): 200,
            ("/model_info", server.admin_key): 401,
            ("/flush_cache", ""): 401,
            ("/flush_cache", "wrong"): 401,
            ("/flush_cache", server.api_key): 401,
            ("/flush_cache", server.admin_key): 200,
        }
        log = server.log.read_text()
        assert "***" in log
        assert stat.S_IMODE(server.log.stat().st_mode) == 0o600
        places = [log.encode()]
        for member in family:
            places += [Path(f"/proc/{member.pid}/{name}").read_bytes() for name in PUBLIC]
        for place in places:
            assert server.api_key.encode() not in place
            assert server.admin_key.encode() not in place
        scratch = Path(family[0].environ()["TMPDIR"])
        assert stat.S_IMODE(scratch.stat().st_mode) == 0o700
        files = {region.path for member in family for region in member.memory_maps()}
        shared = [Path(file) for file in files if file.startswith("/dev/shm/sglang_")]
        assert [file for file in shared if file.exists()]
    finally:
        seconds = seconds_of(fleet.stop)
    assert seconds < 20
    assert [member for member in family if is_alive(member)] == []
    assert not scratch.exists()
    assert [file for file in shared if file.exists()] == []


# What any process of this user can read of another.
PUBLIC = ("cmdline", "environ")


@pytest.mark.slow
@pytest.mark.timeout(2 * START_TIMEOUT_S)
def test_a_server_dies_with_its_parent(model: Path, tmp_path: Path) -> None:
    """Which is killed, and has started the server in a thread that ended long ago."""
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
        assert status(words[1] + "/health", "") == 200
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        parent.stdout.close()
    _, alive = psutil.wait_procs(family, timeout=10)
    assert [member for member in alive if is_alive(member)] == []


def family_of(server: SGLangServer) -> list[psutil.Process]:
    process = psutil.Process(server.pid)
    return [process, *process.children(recursive=True)]


def is_alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def status(url: str, key: str) -> int:
    """The HTTP status of a GET, or of a POST where the server wants one."""
    request = urllib.request.Request(url)
    if url.endswith("/flush_cache"):
        request = urllib.request.Request(url, data=b"{}", method="POST")
    if key:
        request.add_header("Authorization", f"Bearer {key}")
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code
