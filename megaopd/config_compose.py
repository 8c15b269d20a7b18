"""From command-line words and YAML files to one plain dictionary; the only importer of Hydra.

Owns where `conf=NAME` is looked for, how overrides are read and what a YAML file may not do. It
knows nothing about which keys exist: that is `megaopd.config_schema`'s matter. Nothing of Hydra or
OmegaConf leaves this module.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megaopd.config_schema import nearest
from megaopd.errors import ConfigError

# Beside the package in a checkout; an installed package has none and reads ./conf alone.
REPOSITORY_CONF = Path(__file__).resolve().parent.parent / "conf"

_REFERENCE = re.compile(r"\$\{[A-Za-z_]\w*(\.\w+)*\}")


def compose(argv: list[str], defaults: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Composes ``["conf=NAME", "key=value", ...]`` over `defaults`.

    Args:
        argv: exactly one ``conf=NAME``; the rest are Hydra overrides. ``key=value`` works for every
            key, whether or not the YAML file mentions it.
        defaults: nested dictionary below the YAML file and the overrides; references may name its
            keys.

    Returns:
        The name of the configuration and the resolved values, plain Python throughout.

    Raises:
        ConfigError: no or an unknown configuration, bad YAML, a bad override, or a value that would
            run code.
    """
    path = _find(argv)
    overrides = [_checked_override(a) for a in argv if not a.startswith("conf=")]
    _refuse_code(_read_yaml(path), str(path))
    directories = [path.parent, Path("conf").resolve(), REPOSITORY_CONF]
    search = [str(d) for d in dict.fromkeys(directories[1:]) if d != path.parent and d.is_dir()]
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(path.parent)):
            node = hydra_compose(
                path.stem,
                [
                    *(_force(o, directories) for o in overrides),
                    f"hydra.searchpath={['file://' + d for d in search]}",
                ],
            )
        values = OmegaConf.to_container(node, resolve=False)
        assert isinstance(values, dict)
        _refuse_code(values, str(path))
        for key, value in values.items():
            if isinstance(value, list) and key in defaults:  # OmegaConf would not name the key
                raise ConfigError(key, "found a list, not a section", "write its keys below it")
        merged = OmegaConf.merge(OmegaConf.create(defaults), OmegaConf.create(values))
        resolved = OmegaConf.to_container(merged, resolve=True, throw_on_missing=True)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise ConfigError(
            f"conf={path.stem}", _one_line(error), "mend the file or the override"
        ) from (error)
    assert isinstance(resolved, dict)
    return path.stem, {str(k): v for k, v in resolved.items()}


def _find(argv: list[str]) -> Path:
    """The file that ``conf=NAME`` names: a path, or NAME.yaml in ./conf or REPOSITORY_CONF."""
    names = [a.removeprefix("conf=") for a in argv if a.startswith("conf=")]
    directories = list(dict.fromkeys([Path("conf").resolve(), REPOSITORY_CONF]))
    available = sorted({p.stem for d in directories for p in d.glob("*.yaml")})
    offer = f"one of {', '.join(available)}, or a path to a YAML file"
    offer = offer if available else "NAME is a path to a YAML file; there is no conf/ here"
    if len(names) != 1:
        found = "given more than once" if names else "not given"
        raise ConfigError("conf", found, f"give conf=NAME once: {offer}")
    name = names[0]
    if name.endswith((".yaml", ".yml")) or "/" in name:
        path = Path(name).expanduser().resolve()
        if path.is_file() and path.suffix == ".yaml":
            return path
        raise ConfigError("conf", f"there is no file {name}", "give the path of a .yaml file")
    for directory in directories:
        path = directory / f"{name}.yaml"
        if path.is_file():
            return path
    close = nearest(name, available)
    guess = f"did you mean {close}?" if close else f"choose: {offer}"
    raise ConfigError("conf", f"there is no {name}.yaml in ./conf or {REPOSITORY_CONF}", guess)


def _read_yaml(path: Path) -> Any:
    """The file before composition, so that a mistake is told with its line, which Hydra hides."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        problem = getattr(error, "problem", None) or str(error)
        raise ConfigError(
            where, f"not valid YAML ({_one_line(problem)})", "mend the line"
        ) from error
    if content is not None and not isinstance(content, dict):
        raise ConfigError(str(path), f"a YAML {type(content).__name__}", "write keys and values")
    return content


def _checked_override(word: str) -> str:
    key = re.split(r"=", word, maxsplit=1)[0].lstrip("+~")
    if "=" not in word and not word.startswith("~"):
        raise ConfigError(word, "neither conf=NAME nor key=value", "write overrides as key=value")
    if key.split(".")[0].split("/")[0] == "hydra":
        raise ConfigError(key, "a setting of Hydra itself", "remove it; the run does not use it")
    return word


def _force(word: str, directories: list[Path]) -> str:
    """Marks a plain ``key=value`` as add-or-override (Hydra's ++), so that the YAML file need not
    mention the key; a misspelt key is caught against the dataclasses afterwards. The choice of a
    group (a directory of YAML files, e.g. ``parallel=tp2``) is left as it is."""
    key = word.split("=", 1)[0]
    group = key.split("@")[0]
    if word[0] in "+~" or any((d / group).is_dir() for d in directories):
        return word
    return f"++{word}"


def _refuse_code(value: Any, where: str) -> None:
    """Refuses everything in a configuration that could build objects or call a resolver."""
    if isinstance(value, dict):
        for key, item in value.items():
            if re.fullmatch(r"_[a-z]+_|hydra|.*\bhydra/.*", str(key)):
                remedy = "remove it; a configuration holds values only"
                raise ConfigError(f"{where}: {key}", "a key that Hydra would act upon", remedy)
            _refuse_code(item, f"{where}: {key}" if where.endswith(".yaml") else f"{where}.{key}")
    elif isinstance(value, list):
        for item in value:
            _refuse_code(item, where)
    elif isinstance(value, str) and "${" in _REFERENCE.sub("", value):
        remedy = "only plain references such as ${train.num_steps} are allowed"
        raise ConfigError(where, f"the interpolation {value!r}", remedy)


def _one_line(error: object) -> str:
    text = str(error).split("Config search path:")[0]  # Hydra's list of directories, many lines
    return " ".join(text.split()).replace(";", ",")
