"""The error that a wrong argument of a loss raises."""

from __future__ import annotations

from megaopd.errors import ConfigError


class LossArgumentError(ConfigError, ValueError):
    """A loss was asked for something it cannot give; a `ValueError` for callers from Python.

    Args:
        where: the argument at fault.
        found: what was found there.
        remedy: what to do about it.
    """


def require(condition: bool, where: str, found: str, remedy: str) -> None:
    """Raises `LossArgumentError(where, found, remedy)` unless `condition` holds."""
    if not condition:
        raise LossArgumentError(where, found, remedy)
