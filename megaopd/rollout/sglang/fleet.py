"""The servers that a run starts: all at once, again when one is lost, and never for ever."""

from __future__ import annotations

import atexit
import time

from megaopd.errors import RolloutError
from megaopd.logger import get_logger
from megaopd.rollout.sglang.server import SGLangServer

logger = get_logger(__name__)


class ServerFleet:
    """The servers that this run starts. Restarts wait longer each time, and end.

    Args:
        servers: not started yet.
        max_restarts: restarts of one server in a row after which it is retired.
        stable_s: a server that ran this long breaks the row.
        first_delay_s: the wait before the second restart in a row; it doubles up to a minute. The
            first restart does not wait.

    Attributes:
        retired: indices of the servers that are given up.
    """

    def __init__(
        self,
        servers: list[SGLangServer],
        *,
        max_restarts: int = 10,
        stable_s: float = 300.0,
        first_delay_s: float = 1.0,
    ) -> None:
        self.servers = servers
        self.retired: set[int] = set()
        self._max_restarts = max_restarts
        self._stable_s = stable_s
        self._first_delay_s = first_delay_s
        self._restarts = [0] * len(servers)
        self._ready_at = [float("inf")] * len(servers)
        self._closed = False
        atexit.register(self.stop)

    def start(self) -> None:
        """Starts all servers at the same time and waits until all are ready.

        Raises:
            RolloutError: one of them did not start; none is left running.
        """
        try:
            for server in self.servers:
                server.start()
            for index, server in enumerate(self.servers):
                server.wait_ready()
                self._ready_at[index] = time.monotonic()
        except BaseException:
            self.stop()
            raise

    def restart(self, index: int) -> SGLangServer:
        """Stops what is left of a server and starts it again, with its first weights and the same
        keys, at a new port. Blocks until it is ready; different servers restart independently.

        Raises:
            RolloutError: it did not get ready; `retired` says whether to try again.
        """
        server = self.servers[index]
        if time.monotonic() - self._ready_at[index] > self._stable_s:
            self._restarts[index] = 0
        self._ready_at[index] = float("inf")
        if self._restarts[index] >= self._max_restarts:
            self.retired.add(index)
        if index in self.retired or self._closed:
            server.stop(grace_s=0.0)
            raise RolloutError(
                f"sglang server {index}",
                f"was restarted {self._restarts[index]} times in a row",
                f"it is given up; read {server.log}",
            )
        self._restarts[index] += 1
        server.stop(grace_s=0.0)
        if self._restarts[index] > 1:
            self._pause(self._first_delay_s * 2 ** (self._restarts[index] - 2))
        logger.warning(
            "sglang server %d: restart %d of at most %d in a row",
            *(index, self._restarts[index], self._max_restarts),
        )
        try:
            server.start()
            if self._closed:
                server.stop(grace_s=0.0)
            server.wait_ready()
        except RolloutError:
            server.stop(grace_s=0.0)
            if self._restarts[index] >= self._max_restarts:
                self.retired.add(index)
            raise
        self._ready_at[index] = time.monotonic()
        return server

    def _pause(self, delay_s: float) -> None:
        """Sleeps, at most a minute, and not on when the fleet is stopped."""
        until = time.monotonic() + min(60.0, delay_s)
        while time.monotonic() < until and not self._closed:
            time.sleep(0.05)

    def stop(self) -> None:
        """Stops all servers, for good."""
        self._closed = True
        atexit.unregister(self.stop)
        for server in self.servers:
            server.stop()
