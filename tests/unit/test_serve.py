"""The process that keeps the servers of a node where nothing trains."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from megaopd import serve
from megaopd.config import Config
from megaopd.errors import ConfigError, RolloutError
from megaopd.rollout.sglang.flags import ServerSpec
from megaopd.rollout.sglang.server import SGLangServer


class FakeServer:
    def __init__(self, port: int, lives: int) -> None:
        self.url = f"http://10.0.0.7:{port}"
        self.log = Path(f"{port}.log")
        self.keep_port = False
        self.lives = lives

    def is_running(self) -> bool:
        """Each look takes a life."""
        self.lives -= 1
        return self.lives > 0


class FakeFleet:
    """Servers that can be started again once; the second time they are given up."""

    def __init__(self, *servers: FakeServer) -> None:
        self.servers = list(servers)
        self.retired: set[int] = set()
        self.restarts: list[int] = []
        self.stopped = False
        self.fails_to_start = False

    def start(self) -> None:
        if self.fails_to_start:
            raise RolloutError("sglang server 0", "ended", "read its log")

    def restart(self, index: int) -> None:
        if index in self.restarts:
            self.retired.add(index)
            raise RolloutError("sglang server", "was restarted once", "it is given up")
        self.restarts.append(index)
        self.servers[index].lives = 2

    def stop(self) -> None:
        self.stopped = True


@pytest.fixture
def fleet(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeFleet]:
    made = FakeFleet(FakeServer(30000, lives=5), FakeServer(30001, lives=2))
    seen: list[Config] = []

    def server_fleet(config: Config, world: object, first_gpu: int) -> FakeFleet:
        assert first_gpu == 0
        seen.append(config)
        return made

    monkeypatch.setattr("megaopd.train_servers.server_fleet", server_fleet)
    monkeypatch.setattr(serve, "LOOK_EVERY_S", 0.0)
    made.configs = seen  # type: ignore[attr-defined]
    handlers = [(number, signal.getsignal(number)) for number in (signal.SIGUSR1, signal.SIGTERM)]
    yield made
    for number, handler in handlers:
        signal.signal(number, handler)


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEGAOPD_SGLANG_API_KEY", "one")
    monkeypatch.setenv("MEGAOPD_SGLANG_ADMIN_KEY", "two")


def test_servers_are_named_kept_and_given_up(fleet, keys, monkeypatch, tmp_path):
    monkeypatch.setenv("RANK", "1")
    words = [f"hosts=10.0.0.6,10.0.0.7 urls={tmp_path}/urls conf=debug run.dir=runs/x"]
    with pytest.raises(RolloutError, match="all servers of this node were given up"):
        serve.main(words[0].split())
    assert [file.name for file in tmp_path.iterdir()] == ["urls_1"]
    expected = "http://10.0.0.7:30000,http://10.0.0.7:30001\n"
    assert (tmp_path / "urls_1").read_text() == expected
    assert sorted(fleet.restarts) == [0, 1]
    assert fleet.stopped
    assert all(server.keep_port for server in fleet.servers)
    (config,) = fleet.configs
    assert config.rollout.sglang.host == "10.0.0.7"
    assert config.run.dir == "runs/x/servers/node_1"
    # The request to stop is the ranks', and servers that are started here take that over.
    assert signal.getsignal(signal.SIGUSR1) is signal.SIG_IGN


def test_nothing_is_named_if_a_server_does_not_start(fleet, keys, tmp_path):
    fleet.fails_to_start = True
    with pytest.raises(RolloutError, match="sglang server 0"):
        serve.main(["hosts=10.0.0.6", f"urls={tmp_path}/urls", "conf=debug"])
    assert fleet.stopped
    assert not list(tmp_path.iterdir())


def test_sigterm_stops_the_servers(fleet, keys, monkeypatch, tmp_path):
    monkeypatch.setattr(serve, "_restart_lost", lambda servers: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(SystemExit) as ended:
        serve.main(["hosts=10.0.0.6", f"urls={tmp_path}/urls", "conf=debug"])
    assert ended.value.code == 0
    assert fleet.stopped


@pytest.mark.parametrize(
    ("words", "rank", "error"),
    [
        ("urls=u conf=debug", "0", "hosts: not given; give hosts=... once"),
        ("hosts=a hosts=b urls=u conf=debug", "0", "hosts: given more than once; "),
        ("hosts=a conf=debug", "0", "urls: not given; "),
        ("hosts=a urls=u conf=debug", "1", "hosts: 1 for node number 1; give one for each node"),
        ("hosts=a urls=u conf=debug", "0", r"MEGAOPD_SGLANG_API_KEY: the variable is not set; "),
    ],
)
def test_wrong_words(monkeypatch, words, rank, error):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.delenv("MEGAOPD_SGLANG_API_KEY", raising=False)
    with pytest.raises(ConfigError, match=f"^{error}"):
        serve.main(words.split())


def test_a_server_comes_back_where_it_was(tmp_path):
    spec = ServerSpec(model_path="m", python=sys.executable, device="cpu", dtype="fp32")
    server = SGLangServer(spec, 0, tmp_path)
    server.keep_port = True
    urls = []
    for _ in range(2):
        server.start()
        urls.append(server.url)
        server.stop()
    assert urls[0] == urls[1]
