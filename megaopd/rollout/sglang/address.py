"""Where a server that we start may listen, and at which port."""

from __future__ import annotations

import ipaddress
import socket

from megaopd.errors import RolloutError


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

    Raises:
        RolloutError: `host` is no address of this host.
    """
    try:
        family = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind((host, 0))
            return probe.getsockname()[1]
    except OSError as error:
        raise RolloutError(
            "rollout.sglang.host",
            f"{host} cannot be bound ({error.strerror})",
            "name loopback or the address of a private interface of this host",
        ) from error
