"""JSON lines between the ranks and rank 0, over sockets that never block."""

from __future__ import annotations

import json
import secrets
import selectors
import socket
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any

Message = dict[str, Any]
"""`kind` says what it is; LOST is the end of a connection."""
LOST: Message = {"kind": "lost"}
LAST_WORDS = ("bye", "failed")
# Who ends a connection waits so long for the other end to do so.
LINGER_S = 2.0
# More than this in a line is not ours.
MAX_LINE = 1 << 16
CONNECT_TIMEOUT_S = 60.0


class Wire:
    """One end of a connection.

    Attributes:
        ended: nothing comes any more: the other end is closed, or speaks another language.
    """

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.connection = connection
        self.ended = False
        self._received, self._unsent = b"", b""

    def send(self, message: Mapping[str, Any]) -> None:
        """Sends it, after what has not found room yet; at the latest with the next `send`."""
        # Whoever reads nothing is silent, and hears of nothing but the end.
        if len(self._unsent) > MAX_LINE:
            return
        self._unsent += json.dumps(message).encode() + b"\n"
        try:
            self._unsent = self._unsent[self.connection.send(self._unsent) :]
        except BlockingIOError:
            pass
        except OSError:
            # What came before its end is still to be read.
            self._unsent = b""

    def receive(self) -> list[Message]:
        """All that has come."""
        while not self.ended:
            try:
                data = self.connection.recv(MAX_LINE)
            except BlockingIOError:
                break
            except OSError:
                data = b""
            self.ended = not data
            self._received += data
            if len(self._received) > 16 * MAX_LINE:
                break
        *lines, self._received = self._received.split(b"\n")
        messages: list[Message] = []
        for line in lines:
            try:
                message = json.loads(line)
            except ValueError:
                message = None
            if not isinstance(message, dict) or "kind" not in message:
                self.ended = True
                return messages
            messages.append(message)
        self.ended = self.ended or len(self._received) > MAX_LINE
        return messages


class Link:
    """What a rank hears from others; this one has no others."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()

    def poll(self, timeout_s: float = 0.0) -> list[tuple[int, Message]]:
        """(rank, message) of what came; waits at most so long for the first."""
        return [
            found
            for key, _ in self._selector.select(timeout_s)
            for found in self._read(key.fileobj, key.data)
        ]

    def tell(self, message: Mapping[str, Any]) -> None:
        """To everybody at the other end."""

    def say_last(self, message: Mapping[str, Any]) -> None:
        """Tells it and ends all connections, after the others if they are quick: what they have
        sent and nobody has read would keep what they were told from them."""
        self.tell(message)
        until = time.monotonic() + LINGER_S
        while self._is_connected() and time.monotonic() < until:
            self.poll(0.05)
        self.close()

    def close(self) -> None:
        """Ends all connections; again does nothing."""
        for key in list((self._selector.get_map() or {}).values()):
            key.fileobj.close()  # type: ignore[union-attr]
        self._selector.close()

    def _is_connected(self) -> bool:
        return False

    def _read(self, source: Any, wire: Wire | None) -> list[tuple[int, Message]]:
        raise NotImplementedError

    def _forget(self, source: Any) -> None:
        self._selector.unregister(source)
        source.close()


class Hub(Link):
    """Rank 0's link to all others.

    Args:
        host: a name or address of this machine that the others know.

    Attributes:
        port: where they connect.
        token: what they say first.
    """

    def __init__(self, host: str) -> None:
        super().__init__()
        try:
            family = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][0]
            self._server = socket.create_server((host, 0), family=family, backlog=4096)
        except OSError:
            # The name belongs to a router in front of us.
            self._server = socket.create_server(("", 0), backlog=4096)
        self._server.setblocking(False)
        self.port: int = self._server.getsockname()[1]
        self.token = secrets.token_hex(16)
        self._selector.register(self._server, selectors.EVENT_READ)
        self._wires: dict[int, Wire] = {}
        self._rank_of: dict[Wire, int] = {}
        self._early: list[tuple[int, Message]] = []

    def poll(self, timeout_s: float = 0.0) -> list[tuple[int, Message]]:
        early, self._early = self._early, []
        return early + super().poll(0.0 if early else timeout_s)

    def tell(self, message: Mapping[str, Any]) -> None:
        for wire in self._wires.values():
            wire.send(message)

    def missing_of(self, world_size: int) -> list[int]:
        """Waits for the other ranks; returns those that do not come."""
        until = time.monotonic() + CONNECT_TIMEOUT_S
        while len(self._rank_of) < world_size - 1 and time.monotonic() < until:
            self._early += super().poll(0.1)
        return sorted(set(range(1, world_size)) - set(self._rank_of.values()))

    def _is_connected(self) -> bool:
        return bool(self._wires)

    def _read(self, source: Any, wire: Wire | None) -> list[tuple[int, Message]]:
        if wire is None:
            self._accept()
            return []
        messages = wire.receive()
        if wire not in self._rank_of and messages:
            hello = messages.pop(0)
            if hello["kind"] == "hello" and hello.get("token") == self.token:
                self._rank_of[wire] = hello["rank"]
                self._wires[hello["rank"]] = wire
            else:
                wire.ended = True
        # Who has said its last word waits for us to hang up.
        if any(message["kind"] in LAST_WORDS for message in messages):
            wire.ended = True
        if wire.ended:
            self._forget(source)
        rank = self._rank_of.get(wire)
        if rank is None:
            return []
        if wire.ended:
            messages.append(LOST)
            self._wires.pop(rank, None)
        return [(rank, message) for message in messages]

    def _accept(self) -> None:
        with suppress(OSError):  # there is no other one
            while True:
                connection, _ = self._server.accept()
                self._selector.register(connection, selectors.EVENT_READ, Wire(connection))


class Member(Link):
    """Another rank's link to rank 0.

    Raises:
        OSError: there is no way to it.
    """

    def __init__(self, host: str, port: int, token: str, rank: int) -> None:
        super().__init__()
        connection = socket.create_connection((host, port), timeout=CONNECT_TIMEOUT_S)
        self._wire = Wire(connection)
        self._selector.register(connection, selectors.EVENT_READ, self._wire)
        self.tell({"kind": "hello", "token": token, "rank": rank})

    def tell(self, message: Mapping[str, Any]) -> None:
        self._wire.send(message)

    def _is_connected(self) -> bool:
        return not self._wire.ended

    def _read(self, source: Any, wire: Wire | None) -> list[tuple[int, Message]]:
        found = [(0, message) for message in self._wire.receive()]
        if self._wire.ended:
            self._forget(source)
            found.append((0, LOST))
        return found
