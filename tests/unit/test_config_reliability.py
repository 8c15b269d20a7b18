"""Wrong values of the keys about runs that outlive the machine: one line that names the key."""

from __future__ import annotations

from typing import Any, get_type_hints

import pytest

from megaopd.config import CheckpointConfig, Config, DeadlineConfig, GuardConfig, validate
from megaopd.config_schema import build
from megaopd.errors import ConfigError

SECTIONS = {"checkpoint": CheckpointConfig, "deadline": DeadlineConfig, "guard": GuardConfig}
HINTS = {
    f"{section}.{name}": hint
    for section, cls in SECTIONS.items()
    for name, hint in get_type_hints(cls).items()
} | {
    "train.max_wall_time": str,
    "log.report_interval": int,
    "log.prometheus_port": int,
    "log.prometheus_host": str,
}
# Wrong for a type, whatever the key means.
WRONG: dict[Any, tuple[Any, ...]] = {
    int: ("many", 1.5, True, None, [1], {"a": 1}),
    float: ("soon", True, None, [1.0], float("nan"), float("inf")),
    bool: (1, "yes", None, [True]),
    str: (5, None, ["a"], {"a": "b"}),
}
NOT_NEGATIVE = [key for key, hint in HINTS.items() if hint in (int, float)]
POSITIVE = ["checkpoint.keep_last", "guard.window", "deadline.silence_s"]


def _config(key: str, value: Any) -> Config:
    values: dict[str, Any] = {
        "student": {"path": "s"},
        "teacher": {"path": "t"},
        "data": {"train": "x.jsonl"},
    }
    section, name = key.split(".")
    values.setdefault(section, {})[name] = value
    return build(Config, values)


def _refusal(key: str, value: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        validate(_config(key, value), 1, environ={})
    line = str(caught.value)
    assert line.startswith(f"{key}: found "), line
    assert "\n" not in line
    return line


@pytest.mark.parametrize("key", HINTS)
def test_a_wrong_type(key):
    hint = HINTS[key]
    for value in WRONG.get(hint, ("sometimes", 1, None)):
        assert "; expected " in _refusal(key, value) or "did you mean" in _refusal(key, value)


@pytest.mark.parametrize("key", NOT_NEGATIVE)
def test_a_number_out_of_its_range(key):
    assert "; expected " in _refusal(key, -1)
    if key in POSITIVE:
        assert "; expected a positive number" in _refusal(key, 0)
    else:
        validate(_config(key, 0), 1, environ={})


@pytest.mark.parametrize(
    "text",
    [
        *("4h", "1:2", "00:00:00", "0-00:00:00", "-01:00:00", "1:60:00", "1:00:60", "1-"),
        *(" 1:00:00", "1:00:00\n", "1.5:00:00", "infinity", "00:00", "\u0661:00:00x"),
    ],
)
def test_a_time_that_is_none(text):
    assert 'expected a time as "[DAYS-]HH:MM:SS"' in _refusal("train.max_wall_time", text)


def test_times_that_are_some():
    for text in ("", "00:00:01", "1-00:00:00", "100:00:00"):
        validate(_config("train.max_wall_time", text), 1, environ={})


def test_resume_is_one_of_its_words():
    assert "did you mean never?" in _refusal("checkpoint.resume", "nevr")
