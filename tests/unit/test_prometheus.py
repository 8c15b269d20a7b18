"""Metrics over HTTP as Prometheus reads them."""

from __future__ import annotations

import http.client
import math
import re
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from megaopd import prometheus
from megaopd.config import Config
from megaopd.errors import ConfigError, EnvironmentFault
from megaopd.metrics import MetricsWriter
from megaopd.prometheus import PrometheusSink, exposition, metric_name

NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
SAMPLE = re.compile(rf'({NAME})\{{run="((?:[^"\\\n]|\\["\\n])*)"\}} (\S+)')
NUMBER = re.compile(r"[-+]?(\d+(\.\d*)?([eE][-+]?\d+)?|Inf)|NaN")


def parse(text: str) -> dict[tuple[str, str], float]:
    """(name, run) -> value, of a text that is to the letter of exposition format 0.0.4."""
    assert text.endswith("\n")
    found: dict[tuple[str, str], float] = {}
    typed: set[str] = set()
    for line in text[:-1].split("\n"):
        if line.startswith("# HELP "):
            assert re.fullmatch(rf"# HELP {NAME} (?:[^\\\n]|\\[\\n])+", line), line
        elif line.startswith("# "):
            match = re.fullmatch(rf"# TYPE ({NAME}) gauge", line)
            assert match, line
            assert match[1] not in typed
            typed.add(match[1])
        else:
            match = SAMPLE.fullmatch(line)
            assert match, line
            name, run, number = match.groups()
            assert name in typed
            assert NUMBER.fullmatch(number), line
            run = re.sub(r'\\(["\\n])', lambda m: "\n" if m[1] == "n" else m[1], run)
            assert (name, run) not in found
            found[name, run] = float(number)
    return found


def request(port: int, path: str = "/metrics", method: str = "GET", host: str = "127.0.0.1"):
    connection = http.client.HTTPConnection(host, port, timeout=10)
    connection.request(method, path)
    response = connection.getresponse()
    body = response.read().decode()
    connection.close()
    return response, body


@pytest.fixture
def sink() -> Iterator[PrometheusSink]:
    sink = PrometheusSink("demo", 24, "127.0.0.1", 0)
    yield sink
    sink.close()


def test_a_scrape_reads_the_newest_values(sink: PrometheusSink) -> None:
    assert parse(request(sink.port)[1]) == {("megaopd_num_steps", "demo"): 24.0}
    sink.write(0, {"eval/accuracy": 0.25})
    sink.write(3, {"loss/divergence": 1 / 3, "time/step_s": 2.0, "a/nan": math.nan})
    sink.write(4, {"loss/divergence": 1e-9, "a/inf": math.inf, "a/-inf": -math.inf})
    response, body = request(sink.port)
    assert response.status == 200
    assert response.getheader("Content-Type") == "text/plain; version=0.0.4; charset=utf-8"
    found = parse(body)
    assert found.pop(("megaopd_last_write_timestamp_seconds", "demo")) > 1.7e9
    assert math.isnan(found.pop(("megaopd_a_nan", "demo")))
    assert {name: value for (name, _), value in found.items()} == {
        "megaopd_num_steps": 24.0,
        "megaopd_eval_accuracy": 0.25,
        "megaopd_step": 4.0,
        "megaopd_loss_divergence": 1e-9,
        "megaopd_time_step_s": 2.0,
        "megaopd_a_inf": math.inf,
        "megaopd_a__inf": -math.inf,
    }
    assert "# HELP megaopd_loss_divergence Metric loss/divergence of the newest" in body


def test_nothing_else_is_served(sink: PrometheusSink) -> None:
    for path in ("/", "/metrics/../../etc/passwd", "/metricsx"):
        response, body = request(sink.port, path)
        assert (response.status, body) == (404, "see /metrics\n")
    assert request(sink.port, "/metrics?name=x")[0].status == 200
    head, body = request(sink.port, method="HEAD")
    assert (head.status, body) == (200, "")
    assert request(sink.port, method="POST")[0].status == 501
    assert request(sink.port)[0].getheader("Server") == "megaopd"
    with socket.create_connection(("127.0.0.1", sink.port), timeout=10) as raw:
        raw.sendall(b"\x16\x03\x01\x00garbage\r\n\r\n")
        assert b"400" in raw.recv(1000)
    assert request(sink.port)[0].status == 200


def test_clients_that_say_nothing_do_not_stop_others(
    sink: PrometheusSink, monkeypatch: pytest.MonkeyPatch
) -> None:
    idle = [socket.create_connection(("127.0.0.1", sink.port)) for _ in range(8)]
    assert request(sink.port)[0].status == 200
    more = [socket.create_connection(("127.0.0.1", sink.port)) for _ in range(40)]
    for connection in idle + more:
        connection.close()
    sink.write(1, {"a": 1.0})


def test_a_name_of_the_run_is_escaped() -> None:
    name = 'a"b\\c\nd\\n} é\udc80'
    text = exposition(name, {"megaopd_x": 1.0}, {"megaopd_x": "b\\c\nd"})
    assert parse(text) == {("megaopd_x", name): 1.0}
    assert metric_name('eval/pass@4 {x="y"}\n') == "megaopd_eval_pass_4__x__y___"
    sink = PrometheusSink(name, 1, "localhost", 0)
    try:
        assert parse(request(sink.port)[1]) == {("megaopd_num_steps", name[:-1] + "?"): 1.0}
    finally:
        sink.close()


def make_config(port: int, host: str = "127.0.0.1") -> Config:
    config = Config()
    log = replace(config.log, tensorboard=False, prometheus_port=port, prometheus_host=host)
    return replace(config, log=log, run=replace(config.run, name="r"))


def test_a_port_in_use_is_an_error_before_anything_is_written(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        wanted = (
            f"log.prometheus_port: cannot listen on 127.0.0.1:{port} (Address already in use); "
            "choose another log.prometheus_port, or 0 to serve none"
        )
        with pytest.raises(EnvironmentFault) as raised:
            MetricsWriter(tmp_path / "run", make_config(port))
        assert str(raised.value) == wanted
        assert raised.value.exit_status == 5
        assert not (tmp_path / "run").exists()
        # Other ranks do not serve.
        MetricsWriter(tmp_path / "run", make_config(port), enabled=False).close()


def test_the_writer_serves_what_it_writes_until_it_is_closed(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with MetricsWriter(tmp_path, make_config(port)) as writer:
        writer.write(1, {"loss/divergence": 0.5})
        assert parse(request(port)[1])["megaopd_loss_divergence", "r"] == 0.5
    with pytest.raises(ConnectionRefusedError):
        request(port)


@pytest.mark.parametrize("host", ["0.0.0.0", "", "0", "8.8.8.8", "::"])
def test_the_whole_network_is_not_served(host: str) -> None:
    with pytest.raises(ConfigError, match=r"log\.prometheus_host: .* the whole network reaches"):
        PrometheusSink("r", 1, host, 0)


@pytest.mark.parametrize("host", ["203.0.113.7", "no.such.host.invalid", "a" * 300, "\x00"])
def test_an_address_that_is_not_ours_costs_one_line(host: str) -> None:
    with pytest.raises(EnvironmentFault) as raised:
        PrometheusSink("r", 1, host, 0)
    assert str(raised.value).startswith("log.prometheus_port: cannot listen on ")
    assert "\n" not in str(raised.value)


def test_the_loopback_of_ipv6() -> None:
    try:
        sink = PrometheusSink("r", 1, "::1", 0)
    except EnvironmentFault:
        pytest.skip("no IPv6 here")
    try:
        assert request(sink.port, host="::1")[0].status == 200
    finally:
        sink.close()
    assert prometheus.CONTENT_TYPE.startswith("text/plain; version=0.0.4")
