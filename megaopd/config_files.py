"""What a YAML file of a configuration may hold, checked before Hydra reads it.

It is an allow-list: values under plain names, references to other values, and a list of names to
take in. What Hydra, OmegaConf or YAML could act upon (objects to build, resolvers, tags, other
places to read from) is none of these. A file may also be of no more than a sensible size, written
out and expanded.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from megaopd.errors import ConfigError

MAX_BYTES = 1 << 18
"""Of a file, as it is written."""
MAX_VALUES = 5_000
"""Of a file, keys included, aliases written out."""
MAX_DEPTH = 50
"""Of brackets in brackets."""
MAX_EXPANDED = 1 << 20
"""Of a configuration, in characters and values, references written out."""

_REFERENCE = re.compile(r"\$\{([A-Za-z_]\w*(?:\.\w+)*)\}")
_KEY = re.compile(r"[^\W_][\w.+ -]*")
_GROUP = re.compile(r"(?:(?:optional|override) )*/?[A-Za-z0-9][\w-]*(?:/[A-Za-z0-9][\w-]*)*")
_OPTION = re.compile(r"[A-Za-z0-9][\w.+-]*(?:/[A-Za-z0-9][\w.+-]*)*")
_PACKAGE = re.compile(r"_global_|_group_|_here_|[A-Za-z0-9][\w-]*(?:\.[A-Za-z0-9][\w-]*)*")
_PACKAGE_LINE = re.compile(r"^\s*#\s*@\s*package\b(.*)$", re.MULTILINE)
_TAGS = {
    f"tag:yaml.org,2002:{name}"
    # OmegaConf leaves dates the strings that they are.
    for name in ("str", "int", "float", "bool", "null", "seq", "map", "merge", "timestamp")
}


def check_file(path: Path) -> None:
    """Checks a file before anything acts upon it.

    Raises:
        ConfigError: it cannot be read, is no YAML of plain values, or too large.
    """
    text = _read(path)
    content = _parse(text, path)
    if content is not None and not isinstance(content, dict):
        raise ConfigError(str(path), f"a YAML {type(content).__name__}", "write keys and values")
    for package in _PACKAGE_LINE.findall(text):
        _check_package(package.strip(), str(path))
    values = dict(content or {})
    _check_defaults(values.pop("defaults", []), f"{path}: defaults")
    check_values(values, str(path))


def check_values(value: Any, where: str) -> None:
    """Checks that there is nothing but values under plain names, and references to others.

    Raises:
        ConfigError: names the key.
    """
    if isinstance(value, dict):
        for key, item in value.items():
            check_key(key if isinstance(key, str | int) else "", where)
            check_values(item, f"{where}: {key}" if where.endswith(".yaml") else f"{where}.{key}")
    elif isinstance(value, list):
        for item in value:
            check_values(item, where)
    elif isinstance(value, str):
        check_text(value, where)
    elif isinstance(value, int) and value.bit_length() > 63:
        raise ConfigError(where, "an integer of more than 64 bits", "write a smaller one")


def check_key(name: str | int, where: str) -> None:
    """Checks one name.

    Raises:
        ConfigError: it could mean something else.
    """
    key = str(name)
    if re.fullmatch(r"_\w+_", key) or is_hydra(key):
        remedy = "remove it; a configuration holds values only"
        raise ConfigError(f"{where}: {key}", "a key that Hydra would act upon", remedy)
    if not _KEY.fullmatch(key):
        remedy = "name it in letters and digits; _ - + . and spaces may follow"
        raise ConfigError(f"{where}: {key!r}", "no name of a key", remedy)


def check_text(text: str, where: str) -> None:
    """Checks that all interpolations of a text are plain references.

    Raises:
        ConfigError: one calls a resolver, or could.
    """
    if "${" in _REFERENCE.sub("", text):
        remedy = "only plain references such as ${train.num_steps} are allowed"
        raise ConfigError(where, f"the interpolation {text!r}", remedy)


def is_hydra(key: str) -> bool:
    """Whether a key, group or package names Hydra's own settings."""
    return "hydra" in re.split(r"[./@: ]", key)


def check_references(values: Mapping[str, Any]) -> None:
    """Checks that a configuration stays small when its references are written out, each of which
    may stand for others.

    Raises:
        ConfigError: it does not.
    """
    sizes: dict[str, int] = {}

    def size_of(value: Any, key: str) -> int:
        if isinstance(value, dict):
            size = 1 + sum(size_of(item, f"{key}.{name}") for name, item in value.items())
        elif isinstance(value, list):
            size = 1 + sum(size_of(item, key) for item in value)
        elif isinstance(value, str):
            size = len(value) + sum(map(size_at, _REFERENCE.findall(value)))
        else:
            size = 1
        if size > MAX_EXPANDED:
            remedy = "let references lead to values, not to further references"
            raise ConfigError(key.lstrip("."), f"expands to more than {MAX_EXPANDED}", remedy)
        return size

    def size_at(path: str) -> int:
        if path not in sizes:
            sizes[path] = 0  # one that leads back here is OmegaConf's to refuse
            value: Any = values
            for name in path.split("."):
                value = value.get(name) if isinstance(value, Mapping) else None
            sizes[path] = size_of(value, path)
        return sizes[path]

    size_of(dict(values), "")


def _read(path: Path) -> str:
    try:
        # Neither a pipe nor a device, which may never end.
        size = path.stat().st_size if path.is_file() else None
        if size is None:
            raise ConfigError(str(path), "not a file", "give the path of a .yaml file")
        if size > MAX_BYTES:
            found = f"{size} bytes, and a configuration has {MAX_BYTES} at most"
            raise ConfigError(str(path), found, "leave out what does not belong there")
        return path.read_text(encoding="utf-8")
    except OSError as error:
        found = f"cannot be read ({error.strerror})"
        raise ConfigError(str(path), found, "check its permissions") from error
    except UnicodeDecodeError as error:
        raise ConfigError(str(path), f"not valid YAML ({error})", "save it as UTF-8") from error


def _parse(text: str, path: Path) -> Any:
    """The content, told with its line where it is wrong, which Hydra hides."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        if _count(node, {}, path) > MAX_VALUES:
            raise _TooMuch(f"aliases stand for more than {MAX_VALUES} values")
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        problem = " ".join(str(getattr(error, "problem", None) or error).split())
        raise ConfigError(where, f"not valid YAML ({problem})", "mend the line") from error
    except _TooMuch as error:
        raise ConfigError(str(path), str(error), "leave out what does not belong there") from error
    except RecursionError as error:
        raise ConfigError(str(path), "nested too deeply", "write it flatter") from error
    except (ValueError, TypeError) as error:  # a number or a key that Python does not take
        raise ConfigError(str(path), f"not valid YAML ({error})", "mend the file") from error


class _TooMuch(Exception):
    """A file holds, or stands for, more than a configuration has."""


class _Loader(yaml.SafeLoader):
    """Ends while it reads where there is too much: PyYAML's time grows with the square of the
    depth."""

    num_values = 0
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        self.num_values += 1
        if self.num_values > MAX_VALUES:
            raise _TooMuch(f"more than {MAX_VALUES} values")
        if self.depth > 2 * MAX_DEPTH:
            raise _TooMuch(f"nested too deeply, more than {2 * MAX_DEPTH} levels")
        self.depth += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1

    def fetch_flow_collection_start(self, token: type[yaml.Token]) -> None:
        if self.flow_level > MAX_DEPTH:
            raise _TooMuch(f"brackets more than {MAX_DEPTH} deep")
        super().fetch_flow_collection_start(token)


def _count(node: yaml.Node, counts: dict[int, int], path: Path) -> int:
    """The number of values that a node stands for, keys included and aliases written out; to know
    it takes as long as the file, not as what it stands for."""
    where = f"{path}:{node.start_mark.line + 1}"
    if id(node) not in counts:
        if node.tag not in _TAGS:
            found = f"not valid YAML (the tag {node.tag})"
            raise ConfigError(where, found, "write the value without a tag")
        counts[id(node)] = 0
        children = []
        if isinstance(node, yaml.SequenceNode):
            children = list(node.value)
        elif isinstance(node, yaml.MappingNode):
            children = [child for pair in node.value for child in pair]
        counts[id(node)] = 1 + sum(_count(child, counts, path) for child in children)
    if not counts[id(node)]:
        raise ConfigError(where, "an anchor that holds itself", "write out what it means")
    return counts[id(node)]


def _check_defaults(entries: Any, where: str) -> None:
    """A defaults list: `_self_`, names of files, or `group: name`."""
    remedy = "write _self_, a name, or `group: name`, as in `parallel: tp2`"
    if not isinstance(entries, list):
        raise ConfigError(where, f"a {type(entries).__name__}, not a list", remedy)
    for entry in entries:
        if entry == "_self_":
            continue
        target, choice = "", entry
        if isinstance(entry, dict):
            target, choice = next(iter(entry.items()), ("", None))
        names = choice if isinstance(entry, dict) and isinstance(choice, list) else [choice]
        if isinstance(entry, dict) and choice is None:  # nothing of the group
            names = []
        words = [str(target), *map(str, names)]
        for word in words:
            check_text(word, where)
        group, at, package = str(target).partition("@")
        if at:
            _check_package(package, where)
        if (
            any(map(is_hydra, words))
            or (isinstance(entry, dict) and (len(entry) != 1 or not _GROUP.fullmatch(group)))
            or not all(map(_is_option, names))
        ):
            raise ConfigError(where, f"found {entry!r}", remedy)


def _is_option(name: Any) -> bool:
    return isinstance(name, str) and _OPTION.fullmatch(name) is not None


def _check_package(package: str, where: str) -> None:
    if not _PACKAGE.fullmatch(package) or is_hydra(package):
        remedy = "write _global_, or the keys that the file is for"
        raise ConfigError(where, f"the package {package!r}", remedy)
