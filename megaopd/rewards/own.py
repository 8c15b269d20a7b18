"""A reward of the user's: `path/to/file.py:function`, loaded before a run touches a device."""

from __future__ import annotations

import importlib.util
import inspect
import math
import sys
import traceback
from pathlib import Path
from types import ModuleType
from typing import Any

from megaopd.errors import ConfigError
from megaopd.protocols import Reward


def is_own(name: str) -> bool:
    return ".py:" in name


def load_own(name: str, key: str) -> Reward:
    """The function of ``path.py:function``, wrapped so that its answers are checked.

    Args:
        key: the configuration's, for the message.

    Raises:
        ConfigError: no such file or function, a file that cannot be imported, or a function that
            does not take (response, answer).
    """
    path, _, function = name.rpartition(":")
    if not Path(path).is_file():
        raise ConfigError(key, f"no file {path!r}", "name it from the working directory")
    try:
        module = _module(str(Path(path).resolve()))
    except Exception as error:  # whatever the user's file raises
        raise ConfigError(
            key, f"{path} cannot be imported ({_where(error, path)})", "mend it"
        ) from error
    reward = getattr(module, function, None)
    if not callable(reward):
        own = (f for f in vars(module).values() if inspect.isfunction(f))
        there = ", ".join(f.__name__ for f in own if f.__module__ == module.__name__) or "none"
        raise ConfigError(key, f"{path} has no function {function!r}", f"its functions are {there}")
    try:
        inspect.signature(reward).bind("response", "answer")
    except TypeError as error:
        raise ConfigError(
            key,
            f"{function}{inspect.signature(reward)} of {path}",
            "it must take (response: str, answer: str | None)",
        ) from error
    except ValueError:
        pass  # something built in, which shows no signature
    return _checked(reward, name, path, key)


def _module(path: str) -> ModuleType:
    """The file's module, imported once in a process, under a name that no other module has."""
    name = f"reward in {path}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError("not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs: dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _checked(reward: Any, name: str, path: str, key: str) -> Reward:
    def score(response: str, answer: str | None) -> float:
        try:
            value = reward(response, answer)
        except Exception as error:  # whatever the user's function raises
            raise ConfigError(key, f"{name} failed ({_where(error, path)})", "mend it") from error
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not 0 <= number <= 1:
            raise ConfigError(
                key, f"{name} returned {str(value)[:60]!r}", "return a number in [0, 1]"
            )
        return number

    return score


def _where(error: Exception, path: str) -> str:
    """The error in a line, with the line of the user's file that it came from."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename) == Path(path).resolve()]
    at = f"line {lines[-1]}: " if lines else ""
    return at + " ".join(f"{type(error).__name__}: {error}".split())[:200]
