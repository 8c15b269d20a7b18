"""The newest metrics of a run over HTTP, in Prometheus' text format (exposition format 0.0.4)."""

from __future__ import annotations

import ipaddress
import math
import re
import socket
import threading
import time
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from typing import Any

from megaopd.errors import ConfigError, EnvironmentFault

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
# A client that does not say what it wants is hung up on.
REQUEST_TIMEOUT_S = 10.0
# Requests that are answered at once; more of them are turned away.
MAX_REQUESTS = 16

_NOT_IN_NAMES = re.compile(r"[^a-zA-Z0-9_]")
_OWN = {
    "megaopd_step": "Step of the newest metrics.",
    "megaopd_num_steps": "Steps of the whole run.",
    "megaopd_last_write_timestamp_seconds": "When the newest metrics were written.",
}


def metric_name(name: str) -> str:
    """`loss/divergence` as Prometheus names it: `megaopd_loss_divergence`."""
    return f"megaopd_{_NOT_IN_NAMES.sub('_', name)}"


def exposition(run: str, values: Mapping[str, float], about: Mapping[str, str]) -> str:
    """One gauge for every value, with the run's name as its label.

    Args:
        values: by Prometheus' name.
        about: what a name means, where there is more to say than the name.
    """
    label = _escaped(run).replace('"', '\\"')
    lines = []
    for name, value in values.items():
        lines.append(f"# HELP {name} {_escaped(about[name])}" if name in about else "")
        lines.append(f"# TYPE {name} gauge")
        lines.append(f'{name}{{run="{label}"}} {_number(value)}')
    return "".join(f"{line}\n" for line in lines if line)


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n")


def _number(value: float) -> str:
    if math.isfinite(value):
        return repr(float(value))
    return {math.inf: "+Inf", -math.inf: "-Inf"}.get(value, "NaN")


class PrometheusSink:
    """Serves the newest value of every metric at http://host:port/metrics, from a thread.

    Args:
        run: name of the run, the label of every value.
        num_steps: steps of the whole run.
        host, port: where to listen (`log.prometheus_host`, `log.prometheus_port`); port 0 takes a
            free one.

    Attributes:
        port: the port that it listens on.

    Raises:
        ConfigError: the host is a name of an address that the whole network reaches.
        EnvironmentFault: the address cannot be listened on.
    """

    def __init__(self, run: str, num_steps: int, host: str, port: int) -> None:
        self._run = run
        self._about = dict(_OWN)
        self._values = {"megaopd_num_steps": float(num_steps)}
        self._lock = threading.Lock()
        self._server = _listen(host, port)
        self._server.text = self.text
        self.port = int(self._server.server_address[1])
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.1,), name="prometheus", daemon=True
        )
        self._thread.start()

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Takes the metrics of a step; those that it lacks keep their last value."""
        with self._lock:
            for name, value in metrics.items():
                self._values[metric_name(name)] = value
                self._about[metric_name(name)] = f"Metric {name} of the newest step that has it."
            self._values["megaopd_step"] = float(step)
            self._values["megaopd_last_write_timestamp_seconds"] = time.time()

    def text(self) -> str:
        """What a scrape gets."""
        with self._lock:
            return exposition(self._run, self._values, self._about)

    def close(self) -> None:
        """Stops listening."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=5)


class _Server(ThreadingHTTPServer):
    """Answers from daemon threads, no more of them at once than a run can spare."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 64
    text: Any

    def __init__(self, family: int, address: Any) -> None:
        self.address_family = family
        self._free = threading.BoundedSemaphore(MAX_REQUESTS)
        super().__init__(address, _Handler)

    def server_bind(self) -> None:
        # HTTPServer's own asks the name service who this is, which may take its time.
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), self.server_address[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._free.acquire(blocking=False):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._free.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A scraper that hangs up is none of the run's business."""


class _Handler(BaseHTTPRequestHandler):
    timeout = REQUEST_TIMEOUT_S
    server: _Server

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def _answer(self) -> None:
        found = self.path.split("?")[0] == "/metrics"
        body = self.server.text() if found else "see /metrics\n"
        data = body.encode("utf-8", errors="replace")
        self.send_response(200 if found else 404)
        self.send_header("Content-Type", CONTENT_TYPE)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def version_string(self) -> str:
        return "megaopd"

    def log_message(self, format: str, *args: Any) -> None:
        """The console is for the run."""


def _listen(host: str, port: int) -> _Server:
    where = f"{host or 'an empty host'}:{port}"
    try:
        # A name that is empty is every address of the machine.
        found = socket.getaddrinfo(host or "0.0.0.0", port, type=socket.SOCK_STREAM)
        family, _, _, _, address = found[0]
        ip = ipaddress.ip_address(str(address[0]).split("%")[0])
        if ip.is_global or ip.is_unspecified:
            raise ConfigError(
                "log.prometheus_host",
                f"{host!r}, which the whole network reaches",
                "give the address of loopback or of the job's private interface",
            )
        return _Server(family, address)
    except (OSError, OverflowError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise EnvironmentFault(
            "log.prometheus_port",
            f"cannot listen on {where} ({reason})",
            "choose another log.prometheus_port, or 0 to serve none",
        ) from error
