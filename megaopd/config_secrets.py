"""No key is a value of the configuration, which goes into run directories, reports and metrics."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from megaopd.errors import ConfigError
from megaopd.redaction import has_login, secrets_of

if TYPE_CHECKING:
    from megaopd.config import Config

_REMEDY = "take it out: keys come from environment variables (docs/security.md)"
_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]*")


def check_secrets(config: Config, environ: Mapping[str, str]) -> None:
    """Checks that no value holds a key or a password. What it holds is never repeated.

    Args:
        environ: environment variables, some of which hold keys.

    Raises:
        ConfigError: names the value's key.
    """
    texts = dict(_texts(dataclasses.asdict(config), ""))
    names = [(key, text) for key, text in texts.items() if key.endswith("_env")]
    for key, name in names:
        if not _VARIABLE.fullmatch(name):
            raise ConfigError(
                key,
                "not the name of an environment variable in capitals, so perhaps a key",
                "name the variable, and put the key into it",
            )
    secrets = secrets_of(environ, tuple(name for _, name in names))
    for key, text in texts.items():
        for name, secret in secrets.items():
            if secret in text:
                raise ConfigError(key, f"it holds the value of ${name}", _REMEDY)
        if has_login(text):
            raise ConfigError(key, "it holds a user name or password", _REMEDY)


def _texts(value: Any, key: str) -> Iterator[tuple[str, str]]:
    """All texts below a value, by their keys; a name that a person gave is one too."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, tuple | list):
        for i, item in enumerate(value):
            yield from _texts(item, f"{key}[{i}]")
    elif isinstance(value, dict):
        for i, (name, item) in enumerate(value.items()):
            yield f"{key or 'name'} (name {i + 1})", name
            yield from _texts(item, f"{key}.{name}".lstrip("."))
