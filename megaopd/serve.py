"""SGLang servers on nodes where nothing trains: `python -m megaopd.serve`.

One process a node starts the servers of that node, says where they are, and starts again those that
are lost, at the URL that the trainer knows them by. It lives until SIGTERM, or until it has none.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from megaopd.config import Config, load
from megaopd.errors import ConfigError, RolloutError, run_cli
from megaopd.logger import get_logger, setup_logging

if TYPE_CHECKING:
    import torch

    from megaopd.rollout.sglang.fleet import ServerFleet

USAGE = """usage: python -m megaopd.serve hosts=ADDRESS[,...] urls=FILE conf=NAME [key=value ...]

Starts rollout.sglang.num_servers servers of the student on this node, for a trainer on others.

hosts=...    private addresses of the nodes; this one's is number $RANK, 0 without that
urls=FILE    where the servers' URLs are written to once all of them answer: FILE_$RANK
The rest is what the trainer gets too. The keys are in the variables that rollout.sglang.api_key_env
and rollout.sglang.admin_key_env name.
"""

logger = get_logger(__name__)

LOOK_EVERY_S = 1.0


@dataclass(frozen=True)
class _ThisNode:
    device: torch.device
    rank: int = 0
    world_size: int = 1


def main(argv: list[str]) -> None:
    if not argv or "--help" in argv or "-h" in argv:
        print(USAGE, end="")
        return
    node = int(os.environ.get("RANK", "0"))
    host, file = _take(argv, "hosts").split(","), _take(argv, "urls")
    if node >= len(host):
        raise ConfigError("hosts", f"{len(host)} for node number {node}", "give one for each node")
    # The trainer checks the rest of it.
    config = load([word for word in argv if not word.startswith(("hosts=", "urls="))])
    serve(_on_this_node(config, host[node], node), Path(f"{file}_{node}"))


def serve(config: Config, urls: Path) -> None:
    """Starts the servers of this node, writes their URLs to `urls`, and keeps them running.

    Raises:
        RolloutError: one did not start, or all have been given up.
    """
    import torch

    from megaopd.train_servers import server_fleet

    setup_logging(0)
    # The ranks' request to stop reaches every process of a job; servers go on until they are
    # stopped, and those started from here take this over.
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _leave)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    fleet = server_fleet(config, _ThisNode(device), first_gpu=0)
    for server in fleet.servers:
        server.keep_port = True
    try:
        fleet.start()
        partial = urls.with_name(f".{urls.name}.partial")
        partial.write_text(",".join(server.url for server in fleet.servers) + "\n")
        partial.rename(urls)
        while len(fleet.retired) < len(fleet.servers):
            time.sleep(LOOK_EVERY_S)
            _restart_lost(fleet)
    finally:
        fleet.stop()
    raise RolloutError(
        "rollout.sglang", "all servers of this node were given up", f"read {fleet.servers[0].log}"
    )


def _restart_lost(fleet: ServerFleet) -> None:
    for index, server in enumerate(fleet.servers):
        if index in fleet.retired or server.is_running():
            continue
        try:
            fleet.restart(index)
        except RolloutError as error:
            logger.warning("%s", error)


def _take(argv: list[str], name: str) -> str:
    values = [word.removeprefix(f"{name}=") for word in argv if word.startswith(f"{name}=")]
    if len(values) != 1 or not values[0]:
        found = "given more than once" if len(values) > 1 else "not given"
        raise ConfigError(name, found, f"give {name}=... once; see --help")
    return values[0]


def _on_this_node(config: Config, host: str, node: int) -> Config:
    """The configuration with servers that listen on `host`, and a log directory of this node's.

    Raises:
        ConfigError: a key is not set: the trainer could not know a random one.
    """
    servers = config.rollout.sglang
    for name in (servers.api_key_env, servers.admin_key_env):
        if not os.environ.get(name):
            raise ConfigError(name, "the variable is not set", "put the servers' key into it")
    return replace(
        config,
        run=replace(config.run, dir=f"{config.run.dir}/servers/node_{node}"),
        rollout=replace(config.rollout, sglang=replace(servers, host=host)),
    )


def _leave(number: int, frame: object) -> None:
    raise SystemExit(0)


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
