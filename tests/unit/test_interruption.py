"""A process is told to stop: by a signal, by another one, by the clock."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from megaopd import interruption
from megaopd.errors import ConfigError
from megaopd.interruption import Interruption, process_age_s, wall_time_s


@pytest.fixture
def told() -> Iterator[Interruption]:
    told = Interruption()
    yield told
    told.restore()


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("", None),
        ("00:00:01", 1),
        ("03:50:00", 13800),
        ("3:50:00", 13800),
        ("100:00:00", 360000),
        ("1-00:00:00", 86400),
        ("2-03:04:05", 183845),
    ],
)
def test_wall_times(text, seconds):
    assert wall_time_s(text) == seconds


@pytest.mark.parametrize(
    "text",
    ["13800", "50:00", "3h", "00:60:00", "00:00:60", "-1-00:00:00", "1-", "00:00:00", " 01:00:00",
     "01:00:00\n", "0-00:00:00", "1:00:00:00"],
)  # fmt: skip
def test_no_wall_times(text):
    with pytest.raises(ConfigError, match="train.max_wall_time: found .*; expected a time as"):
        wall_time_s(text)
    with pytest.raises(ConfigError):
        Interruption().install(text)


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_is_noted_and_the_first_one_counts(told, number):
    assert told.reason is None
    told.install()
    assert not told.requested
    for sent in (number, signal.SIGUSR1, signal.SIGTERM):
        os.kill(os.getpid(), sent)
    assert told.reason == number.name
    assert told.requested


def test_a_signal_wakes_who_waits(told):
    """The handler runs while the main thread waits in Python, and the wait goes on."""
    told.install()
    threading.Timer(0.05, os.kill, (os.getpid(), signal.SIGUSR1)).start()
    began, seen = time.monotonic(), threading.Event()
    watcher = threading.Thread(target=lambda: wait_for(told) and seen.set())
    watcher.start()
    time.sleep(0.2)
    assert time.monotonic() - began >= 0.2
    watcher.join(5)
    assert seen.is_set()


def wait_for(told: Interruption) -> bool:
    until = time.monotonic() + 5
    while not told.requested and time.monotonic() < until:
        time.sleep(0.01)
    return told.requested


def test_time_counts_from_the_start_of_the_process(told, monkeypatch):
    now = 1000.0
    monkeypatch.setattr(interruption, "process_age_s", lambda: 20.0)
    monkeypatch.setattr(time, "monotonic", lambda: now)
    told.install("00:01:00")
    now = 1039.9
    assert told.reason is None
    now = 1040.0
    assert told.reason == "train.max_wall_time 00:01:00"
    os.kill(os.getpid(), signal.SIGTERM)
    assert told.reason == "train.max_wall_time 00:01:00"


def test_the_signals_are_given_back(told):
    before = [signal.getsignal(number) for number in interruption.SIGNALS]
    told.install("00:00:01")
    told.install()  # without a limit again
    os.kill(os.getpid(), signal.SIGUSR1)
    assert told.requested
    told.restore()
    assert not told.requested
    assert [signal.getsignal(number) for number in interruption.SIGNALS] == before


def test_the_age_of_this_process():
    begin = process_age_s()
    time.sleep(0.05)
    assert 0.04 <= process_age_s() - begin < 5
    assert 0 < begin < 3600
