"""From command-line words and YAML files to one plain dictionary; the only importer of Hydra.

Owns where `conf=NAME` is looked for and how overrides are read; what a file may hold is
`megaopd.config_files`'s matter, which keys exist `megaopd.config_schema`'s. Nothing of Hydra or
OmegaConf leaves this module.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.config_source import ConfigResult
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megaopd.config_files import (
    check_file,
    check_references,
    check_text,
    check_values,
    is_hydra,
)
from megaopd.config_schema import nearest
from megaopd.errors import ConfigError

# Beside the package in a checkout; an installed package has none and reads ./conf alone.
REPOSITORY_CONF = Path(__file__).resolve().parent.parent / "conf"


class CheckedFiles(FileConfigSource):
    """Where Hydra reads files: each one that it takes in, by a defaults list or by an override, is
    checked before Hydra sees it."""

    @staticmethod
    def scheme() -> str:
        return "checked"

    def load_config(self, config_path: str) -> ConfigResult:
        file = Path(self.path) / self._normalize_file_name(config_path)
        if Path(config_path).is_absolute() or ".." in Path(config_path).parts:
            raise ConfigError(str(file), "outside of the directories of configurations", "move it")
        check_file(file)
        return super().load_config(config_path)


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
    check_file(path)
    directories = [path.parent, Path("conf").resolve(), REPOSITORY_CONF]
    search = [d for d in dict.fromkeys(directories[1:]) if d != path.parent and d.is_dir()]
    try:
        node = _hydra(path, [_force(o, directories) for o in overrides], search)
        values = OmegaConf.to_container(node, resolve=False)
        assert isinstance(values, dict)
        check_values(values, str(path))
        for key, value in values.items():
            if isinstance(value, list) and key in defaults:  # OmegaConf would not name the key
                raise ConfigError(key, "found a list, not a section", "write its keys below it")
        merged = OmegaConf.merge(OmegaConf.create(defaults), OmegaConf.create(values))
        unresolved = OmegaConf.to_container(merged, resolve=False)
        assert isinstance(unresolved, dict)
        check_references({str(k): v for k, v in unresolved.items()})
        resolved = OmegaConf.to_container(merged, resolve=True, throw_on_missing=True)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
        raise ConfigError(
            f"conf={path.stem}", _one_line(error), "mend the file or the override"
        ) from error
    except RecursionError as error:
        raise ConfigError(
            f"conf={path.stem}", "nested too deeply", "mend the file or the override"
        ) from error
    assert isinstance(resolved, dict)
    return path.stem, {str(k): v for k, v in resolved.items()}


def _hydra(path: Path, overrides: list[str], search: list[Path]) -> DictConfig:
    """What Hydra composes of a checked file, of the files that it and the overrides take in, and of
    the overrides."""
    Plugins.instance().register(CheckedFiles)
    with initialize_config_dir(version_base="1.3", config_dir=str(path.parent)):
        for entry in GlobalHydra.instance().config_loader().get_search_path().get_path():
            if entry.provider == "main":
                entry.path = f"{CheckedFiles.scheme()}://{path.parent}"
        # Given this, Hydra looks for files anew, at the entry's new path too.
        others = [f"{CheckedFiles.scheme()}://{directory}" for directory in search]
        return hydra_compose(path.stem, [*overrides, f"hydra.searchpath={others}"])


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
        with suppress(OSError, RuntimeError, ValueError):  # too long, nobody's home, no name
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


def _checked_override(word: str) -> str:
    key = word.split("=", 1)[0].lstrip("+~")
    if not key or ("=" not in word and not word.startswith("~")):
        raise ConfigError(word, "neither conf=NAME nor key=value", "write overrides as key=value")
    if is_hydra(key):
        raise ConfigError(key, "a setting of Hydra itself", "remove it; the run does not use it")
    # Hydra interpolates the choice of a group before there are values to check.
    for text in word.split("=", 1):
        check_text(text, key)
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


def _one_line(error: BaseException) -> str:
    text = str(error) or str(error.__cause__)  # Hydra's may be empty around OmegaConf's
    text = text.split("Config search path:")[0]  # Hydra's list of directories, many lines
    return " ".join(text.split()).replace(";", ",")
