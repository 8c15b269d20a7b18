"""Frozen dataclasses as the schema of a configuration: checking values, reading and printing docs.

Generic over the dataclasses: a new field or section needs no change here. Understands `int`,
`float`, `bool`, `str`, `Literal`, `tuple[X, ...]`, `X | None` and nested dataclasses.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import json
import math
import types
from collections.abc import Iterable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from megaopd.errors import ConfigError

T = TypeVar("T")


def build(cls: type[T], values: dict[str, Any]) -> T:
    """Turns nested dictionaries into the dataclass `cls`, checking every key and every type.

    Raises:
        ConfigError: an unknown key (with the nearest name) or a value of the wrong type.
    """
    return _build(cls, values, "", list(paths(cls)))


def paths(cls: type, prefix: str = "") -> Iterator[str]:
    """All dotted keys of a schema, e.g. ``loss.kind``, in order of declaration."""
    for name, hint in get_type_hints(cls).items():
        if is_dataclass(hint):
            yield from paths(hint, f"{prefix}{name}.")  # type: ignore[arg-type]
        else:
            yield f"{prefix}{name}"


def nearest(word: str, names: Iterable[str]) -> str | None:
    """The name that `word` is most likely a misspelling of, if any is close."""
    close = difflib.get_close_matches(word, list(names), n=1, cutoff=0.5)
    return close[0] if close else None


def _build(cls: type[T], values: Any, prefix: str, known: list[str]) -> T:
    if not isinstance(values, dict):
        raise ConfigError(
            prefix.rstrip("."), f"{_show(values)}, not a section", "write its keys below it"
        )
    hints = get_type_hints(cls)
    for key in values:
        if key not in hints:
            raise ConfigError(
                f"{prefix}{key}", "unknown key", _remedy(str(key), prefix, cls, known)
            )
    built = {}
    for name, value in values.items():
        hint, where = hints[name], f"{prefix}{name}"
        if is_dataclass(hint):
            built[name] = _build(hint, value, f"{where}.", known)  # type: ignore[arg-type]
        else:
            built[name] = _checked(value, hint, where)
    return cls(**built)


def _remedy(key: str, prefix: str, cls: type, known: list[str]) -> str:
    """The remedy for an unknown key: a like name beside it, a like name elsewhere, or the keys."""
    siblings = list(get_type_hints(cls))
    close = nearest(key, siblings)
    if close:
        return f"did you mean {prefix}{close}?"
    leaves: dict[str, str] = {}
    for path in known:
        leaves.setdefault(path.rsplit(".", 1)[-1], path)
    close = nearest(key, leaves)
    if close:
        return f"did you mean {leaves[close]}?"
    return f"known here: {', '.join(siblings)}"


def _checked(value: Any, hint: Any, where: str) -> Any:
    """Returns `value` as the type `hint`, or raises with what was found and what is expected."""
    origin, options = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in options:
            return None
        (inner,) = [o for o in options if o is not type(None)]
        if _matches(value, inner):
            return _checked(value, inner, where)
    elif origin is tuple:
        if isinstance(value, list | tuple):
            return tuple(_checked(v, options[0], f"{where}[{i}]") for i, v in enumerate(value))
    elif _matches(value, hint):
        return float(value) if hint is float else value
    remedy = f"expected {describe_type(hint)}"
    if origin is Literal and isinstance(value, str):
        close = nearest(value, map(str, options))
        remedy = f"did you mean {close}? {remedy}" if close else remedy
    if hint is str and isinstance(value, int | float):
        remedy += f", quoted in YAML and on the command line: '{where}=\"{value}\"'"
    raise ConfigError(where, _show(value), remedy)


def _matches(value: Any, hint: Any) -> bool:
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if get_origin(hint) is tuple:
        return isinstance(value, list | tuple)
    if hint is float:
        numeric = isinstance(value, int | float) and not isinstance(value, bool)
        return numeric and math.isfinite(value)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


_TYPE_NAMES = {int: "an integer", float: "a finite number", bool: "true or false", str: "a string"}


def describe_type(hint: Any) -> str:
    """A type in a person's words, e.g. ``one of fp32, bf16`` or ``an integer or null``."""
    origin, options = get_origin(hint), get_args(hint)
    if origin is Literal:
        return f"one of {', '.join(map(str, options))}"
    if origin is tuple:
        return f"a list, each item {describe_type(options[0])}"
    if origin in (Union, types.UnionType):
        return " or ".join("null" if o is type(None) else describe_type(o) for o in options)
    return _TYPE_NAMES[hint]


def _show(value: Any) -> str:
    names = {dict: "a section", list: "a list", type(None): "null"}
    if type(value) in (dict, list):
        return f"found {names[type(value)]} ({_literal(value)})"
    return f"found {names.get(type(value), _literal(value))}"


def _literal(value: Any) -> str:
    """A value as YAML (and JSON) writes it."""
    return json.dumps(value, ensure_ascii=False)


def field_docs(cls: type) -> dict[str, str]:
    """The string literal below each field of a dataclass, on one line, by field name."""
    (node,) = ast.parse(inspect.getsource(cls)).body
    assert isinstance(node, ast.ClassDef)
    docs = {}
    for statement, following in zip(node.body, node.body[1:], strict=False):
        if (
            isinstance(statement, ast.AnnAssign)
            and isinstance(statement.target, ast.Name)
            and isinstance(following, ast.Expr)
            and isinstance(following.value, ast.Constant)
        ):
            docs[statement.target.id] = " ".join(str(following.value.value).split())
    return docs


def to_yaml(config: Any) -> str:
    """The values of a configuration as YAML that `load` reads back, each below its doc.

    A value that is not the default carries the default in a comment.
    """
    lines = []
    for section in fields(config):
        part = getattr(config, section.name)
        default = type(part)()
        docs = field_docs(type(part))
        lines.append(f"{section.name}:")
        for field in fields(part):
            value, usual = getattr(part, field.name), getattr(default, field.name)
            note = "" if value == usual else f"    # default: {_literal(usual)}"
            lines.append(f"  # {docs[field.name]}")
            lines.append(f"  {field.name}: {_literal(value)}{note}")
        lines.append("")
    return "\n".join(lines)


def to_markdown(cls: type) -> str:
    """One table per section: key, type, default, meaning."""
    docs_of_sections = get_type_hints(cls)
    lines = []
    for name, section in docs_of_sections.items():
        hints, docs, default = get_type_hints(section), field_docs(section), section()
        lines += [f"## {name}", ""]
        about = section_doc(section)
        lines += [about, ""] if about else []
        lines += ["| key | type | default | meaning |", "|-|-|-|-|"]
        for key, hint in hints.items():
            cells = [
                f"`{name}.{key}`",
                describe_type(hint),
                f"`{_literal(getattr(default, key))}`",
                docs[key],
            ]
            lines.append("| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |")
        lines.append("")
    return "\n".join(lines)


def section_doc(cls: type) -> str:
    """The docstring of a section, empty where it has none (dataclass puts its signature there)."""
    doc = cls.__doc__ or ""
    return "" if doc.startswith(f"{cls.__name__}(") else " ".join(doc.split())
