"""Frozen dataclasses as the schema of a configuration: checking values, reading and printing docs.

Generic over the dataclasses: a new field or section needs no change here. Understands `int`,
`float`, `bool`, `str`, `Literal`, `tuple[X, ...]`, `X | None`, and sections: a dataclass, an
optional one (`Section | None`) or named ones (`dict[str, Section]`), at any depth.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import json
import math
import sys
import types
from collections.abc import Iterable, Iterator
from dataclasses import is_dataclass
from functools import cache
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
    """All dotted keys of a schema, e.g. ``loss.kind``, in order of declaration.

    Those of an optional section come after the section's own, those of named sections with NAME in
    the name's place.
    """
    for name, hint in get_type_hints(cls).items():
        section, where = section_of(hint), f"{prefix}{name}"
        if section is None or is_optional(hint):
            yield where
        if section is not None:
            yield from paths(section, f"{where}.NAME." if is_named(hint) else f"{where}.")


def section_of(hint: Any) -> type | None:
    """The dataclass whose keys a field of this type holds, or None where it holds a value."""
    options = get_args(hint)
    if is_named(hint):
        return section_of(options[1])
    if is_optional(hint):
        (hint,) = [o for o in options if o is not type(None)]
    return hint if isinstance(hint, type) and is_dataclass(hint) else None


def is_named(hint: Any) -> bool:
    return get_origin(hint) is dict


def is_optional(hint: Any) -> bool:
    return get_origin(hint) in (Union, types.UnionType) and type(None) in get_args(hint)


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
    return cls(**{k: _field(v, hints[k], f"{prefix}{k}", known) for k, v in values.items()})


def _field(value: Any, hint: Any, where: str, known: list[str]) -> Any:
    section = section_of(hint)
    if section is None or (value is None and is_optional(hint)):
        return _checked(value, hint, where)
    if not is_named(hint):
        return _build(section, value, f"{where}.", known)
    if not isinstance(value, dict):
        raise ConfigError(where, f"{_show(value)}, not a section", "write a name and its keys")
    return {str(n): _build(section, v, f"{where}.{n}.", known) for n, v in value.items()}


def _remedy(key: str, prefix: str, cls: type, known: list[str]) -> str:
    """The remedy for an unknown key: a like name beside it, a like name elsewhere, or the keys."""
    siblings = list(get_type_hints(cls))
    close = nearest(key, siblings)
    if close:
        return f"did you mean {prefix}{close}?"
    leaves: dict[str, str] = {}
    for path in sorted(known, key=lambda p: p.count(".")):
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
    if origin is dict:
        return f"names, each of {describe_type(options[1])}"
    return "a section" if is_dataclass(hint) else _TYPE_NAMES[hint]


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
    node = _class_definitions(cls.__module__)[cls.__qualname__]
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


@cache
def _class_definitions(module: str) -> dict[str, ast.ClassDef]:
    """The classes of a module by name. `inspect` would parse all of it for each class."""
    tree = ast.parse(inspect.getsource(sys.modules[module]))
    return {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}


def to_yaml(config: Any) -> str:
    """The values of a configuration as YAML that `load` reads back, each below its doc.

    A value that is not the default carries the default in a comment.
    """
    return "\n".join(_yaml_lines(config, type(config)(), 0))


def _yaml_lines(part: Any, default: Any, depth: int) -> Iterator[str]:
    hints, docs, indent = get_type_hints(type(part)), field_docs(type(part)), "  " * depth
    for name, hint in hints.items():
        value, usual = getattr(part, name), getattr(default, name)
        section = section_of(hint)
        if name in docs:
            yield f"{indent}# {docs[name]}"
        if section is None or not value:
            note = "" if value == usual else f"    # default: {_literal(usual)}"
            yield f"{indent}{name}: {_literal(value)}{note}"
        elif is_named(hint):
            yield f"{indent}{name}:"
            for key, entry in value.items():
                yield f"{indent}  {_literal(key)}:"
                yield from _yaml_lines(entry, section(), depth + 2)
        else:
            yield f"{indent}{name}:" + ("    # default: null" if usual is None else "")
            yield from _yaml_lines(value, usual or section(), depth + 1)
        if depth == 0:
            yield ""


def to_markdown(cls: type) -> str:
    """One table per section: key, type, default, meaning.

    A section whose keys another one has already told, being of the same dataclass, refers to it.
    """
    hints, docs = get_type_hints(cls), field_docs(cls)
    # The plain sections, which the others refer to.
    homes = {hint: name for name, hint in hints.items() if section_of(hint) is hint}
    lines = []
    for name, hint in hints.items():
        section = section_of(hint)
        assert section is not None, f"{name}: a key outside of all sections"
        lines += [f"## {name}", ""]
        about = docs.get(name) or section_doc(section)
        lines += [about, ""] if about else []
        if homes.get(section, name) != name:
            keys = f"{name}.NAME" if is_named(hint) else name
            lines += [f"The keys of `{keys}` are those of `{homes[section]}`.", ""]
            continue
        lines += ["| key | type | default | meaning |", "|-|-|-|-|"]
        lines += _markdown_rows(section, f"{name}.", homes)
        lines.append("")
    return "\n".join(lines)


def _markdown_rows(cls: type, prefix: str, homes: dict[Any, str]) -> Iterator[str]:
    docs, default = field_docs(cls), cls()
    for name, hint in get_type_hints(cls).items():
        section, key = section_of(hint), f"{prefix}{name}"
        kind = describe_type(hint)
        if section in homes:
            kind = kind.replace("a section", f"the keys of `{homes[section]}`")
        if section is None or is_optional(hint) or is_named(hint):
            usual = f"`{_literal(getattr(default, name))}`"
            cells = [f"`{key}`", kind, usual, docs[name]]
            yield "| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |"
        if section is not None and section not in homes:
            deeper = f"{key}.NAME." if is_named(hint) else f"{key}."
            yield from _markdown_rows(section, deeper, homes)


def section_doc(cls: type) -> str:
    """The docstring of a section, empty where it has none (dataclass puts its signature there)."""
    doc = cls.__doc__ or ""
    return "" if doc.startswith(f"{cls.__name__}(") else " ".join(doc.split())
