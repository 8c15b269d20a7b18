"""Which parameters are left out of training, by patterns over their Hugging Face names."""

from __future__ import annotations

import fnmatch

from megaopd.errors import ConfigError
from megaopd.models.arch import ModelArch
from megaopd.models.families import param_mappings
from megaopd.models.mapping import ParamMapping


def is_frozen(mapping: ParamMapping, patterns: tuple[str, ...]) -> bool:
    """Whether a pattern matches all Hugging Face tensors of a parameter.

    Raises:
        ConfigError: the patterns match only some of the tensors that Megatron fuses.
    """
    hits = [any(fnmatch.fnmatch(name, p) for p in patterns) for name in mapping.hf]
    if any(hits) and not all(hits):
        raise ConfigError(
            "student.freeze",
            f"matches only some of {', '.join(mapping.hf)}, which are one parameter",
            "match all of them or none",
        )
    return any(hits)


def check_freeze(arch: ModelArch, patterns: tuple[str, ...]) -> None:
    """Checks `student.freeze` before a model is built.

    Raises:
        ConfigError: a pattern matches nothing, or only part of a fused parameter.
    """
    mappings = param_mappings(arch).values()
    names = [name for mapping in mappings for name in mapping.hf]
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise ConfigError(
                "student.freeze",
                f"'{pattern}' matches no tensor",
                f"use Hugging Face names, such as '{names[0]}'",
            )
    for mapping in mappings:
        is_frozen(mapping, patterns)
