"""Real SGLang servers for tests, on this machine's CPU."""

from __future__ import annotations

import os
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from megaopd.rollout.sglang.flags import ServerSpec
from megaopd.rollout.sglang.fleet import ServerFleet
from megaopd.rollout.sglang.server import SGLangServer

ROOT = Path(__file__).resolve().parents[2]

# A start takes 20 s on an idle machine.
START_TIMEOUT_S = 400.0


def sglang_python() -> str:
    """The interpreter that has SGLang: $MEGAOPD_SGLANG_PYTHON, or what `make sglang` made."""
    python = Path(os.environ.get("MEGAOPD_SGLANG_PYTHON", ROOT / ".cache/sglang/bin/python"))
    if not python.exists():
        pytest.fail(f"{python}: there is no SGLang; run `make sglang`", pytrace=False)
    return str(python)


def cpu_spec(model: str | Path, **fields: Any) -> ServerSpec:
    """A server of `model` on the CPU in fp32."""
    settings = {"python": sglang_python(), "device": "cpu", "dtype": "fp32"} | fields
    return ServerSpec(model_path=str(model), **settings)


def make_fleet(
    model: str | Path,
    log_dir: Path,
    count: int = 1,
    *,
    fleet: dict[str, Any] | None = None,
    **spec: Any,
) -> ServerFleet:
    """`count` servers of one model with the same keys, not started yet.

    Args:
        fleet: arguments of `ServerFleet`.
        **spec: fields of `ServerSpec`.
    """
    # Random keys begin like an option now and then.
    keys = {"api_key": "-test-api-key-of-servers", "admin_key": "--test-admin-key-of-servers"}
    servers = [
        SGLangServer(
            cpu_spec(model, **spec), index, log_dir, start_timeout_s=START_TIMEOUT_S, **keys
        )
        for index in range(count)
    ]
    return ServerFleet(servers, **(fleet or {}))


def family_of(server: SGLangServer) -> list[psutil.Process]:
    """The processes of a server that runs."""
    process = psutil.Process(server.pid)
    return [process, *process.children(recursive=True)]


def is_alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def http_status(url: str, key: str) -> int:
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


StartServers = Callable[..., list[SGLangServer]]


@pytest.fixture(scope="module")
def sglang_servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[StartServers]:
    """Starts servers that run until the module's tests are over.

    `sglang_servers(model_dir, count=1, **spec)` returns servers that are ready; the same arguments
    return the same servers. A test that changes their weights leaves that to the next one.
    """
    fleets: dict[tuple[Any, ...], ServerFleet] = {}

    def start(model: str | Path, count: int = 1, **spec: Any) -> list[SGLangServer]:
        key = (str(model), count, tuple(sorted(spec.items())))
        if key not in fleets:
            fleet = make_fleet(model, tmp_path_factory.mktemp("sglang_logs"), count, **spec)
            fleet.start()
            fleets[key] = fleet
        return fleets[key].servers

    yield start
    for fleet in fleets.values():
        fleet.stop()
