"""Where a server that we start may listen, and at which port."""

from __future__ import annotations

import errno
import ipaddress
import random
import socket

from megaopd.errors import RolloutError

# Below those that Linux gives to outgoing connections.
PORTS = range(20000, 32768)


def check_not_public(host: str) -> None:
    """Servers that we start are for this job alone.

    Raises:
        RolloutError: `host` is unknown, stands for all interfaces, or is reachable from anywhere.
    """
    try:
        found = {info[4][0] for info in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    except OSError as error:
        raise RolloutError(
            "rollout.sglang.host", f"{host} is no address ({error})", "name one of this host"
        ) from error
    for text in found:
        address = ipaddress.ip_address(str(text).split("%")[0])
        if address.is_unspecified or address.is_global:
            raise RolloutError(
                "rollout.sglang.host",
                f"{host} is open to the world",
                "name loopback or the address of a private interface",
            )


def free_port(host: str) -> int:
    """A port of `host` that nobody listens on.

    A server takes it seconds later. Until then no outgoing connection gets it, as the kernel gives
    those ports above the range; and two calls hardly ever choose the same one.

    Raises:
        RolloutError: `host` is no address of this host.
    """
    try:
        family = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][0]
        # 0, any port at all, is for a host whose range is full.
        for port in (*random.SystemRandom().sample(PORTS, 100), 0):
            with socket.socket(family, socket.SOCK_STREAM) as probe:
                try:
                    probe.bind((host, port))
                except OSError as error:
                    if error.errno != errno.EADDRINUSE:
                        raise
                else:
                    return probe.getsockname()[1]
    except OSError as error:
        raise RolloutError(
            "rollout.sglang.host",
            f"{host} cannot be bound ({error.strerror})",
            "name loopback or the address of a private interface of this host",
        ) from error
    raise RolloutError("rollout.sglang.host", f"{host} has no free port", "end other servers")
