"""Who may know whom: the layers of the package, checked against what its files import.

Imports inside functions count, those for type checkers alone do not. A new module gets a place in
`LAYERS`; if it does not fit anywhere, it is asking to be split.
"""

from __future__ import annotations

import ast
import graphlib
import json
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "megaopd"

# From the bottom up; each string is a room, named by its modules. A room imports only rooms of the
# lines above it here, never one of its own line or below. The longest name that fits counts:
# models.mapping is a room of its own, outside models.
LAYERS = (
    ("redaction",),
    ("errors", "logger", "memory", "parallel.cpu"),
    ("storage", "interruption"),
    (
        "config config_compose config_credit config_files config_layouts config_loss config_lora"
        " config_mixture config_reliability config_rollout config_schema config_secrets"
        " config_servers config_teachers config_validate",
        "batch",
    ),
    ("parallel.layout", "metrics_file", "run_status", "prometheus", "report_page report_svg"),
    ("report report_refresh", "status"),
    ("protocols", "metrics", "data", "parallel", "guard", "watchdog"),
    ("losses", "credit", "rewards", "rollout", "models.mapping models.families"),
    ("models", "weight_sync", "evaluation"),
    ("checkpoint",),
    ("engine", "trainer", "inputs", "summary", "plan"),
    ("teacher", "convert", "throughput", "out_of_memory"),
    (
        "train train_checkpoints train_export train_loop train_rollout train_servers train_teachers"
        " train_watch serve evaluation.cli",
    ),
    ("verify",),
)

# The package itself sees to it that Megatron-Core can be imported without CUDA, and does no more.
ROOT_IMPORTS = {"parallel.cpu"}

# What is outside -> the only modules or packages that import it.
ONLY_IMPORTERS = {
    "hydra": ("config_compose",),
    "omegaconf": ("config_compose",),
    "yaml": ("config_compose", "config_files"),
    "megatron": ("parallel", "models", "checkpoint", "engine"),
    "megatron.core.parallel_state": ("parallel.groups",),
    "megatron.core.mpu": (),
    "transformers": ("data", "models", "rollout", "convert.logits", "train", "verify.__main__"),
    "safetensors": ("weight_sync.disk",),
    "wandb": ("metrics",),
    "pyarrow": ("data",),
    "math_verify": ("rewards.sandbox_worker",),
    "reasoning_gym": ("rewards.sandbox_worker",),
    "tests": (),
    "tools": (),
}

# Module -> what must not be loaded by importing it; imported in this order in one fresh process.
LIGHT = {
    "status.__main__": ("torch", "hydra", "omegaconf", "yaml", "asyncio"),
    "report": ("torch", "hydra"),
    "config": ("torch", "megatron", "transformers"),
    "data.packing": ("megatron", "transformers"),
    "losses": ("megatron", "transformers"),
    "credit": ("megatron", "transformers"),
    "rewards": ("megatron", "transformers", "sympy", "math_verify"),
    "models.mapping": ("megatron", "transformers"),
    "trainer": ("megatron", "transformers"),
    "train": ("megatron", "transformers"),
    "plan.table": ("megatron",),
    "models.families": ("megatron", "transformers"),
    "rollout.embedded": ("megatron",),
    "storage.steps": ("torch",),
    "checkpoint": ("megatron",),
    "convert.to_megatron": ("megatron",),
    "convert.to_hf": ("megatron",),
}


def _module_name(file: Path) -> str:
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


SOURCES = {_module_name(f): f.read_text() for f in sorted(PACKAGE.rglob("*.py"))}


def imports_of(source: str) -> set[str]:
    """Dotted names that a module imports: `from a import b` gives a.b, whatever b is."""
    found: set[str] = set()
    queue: list[ast.AST] = [ast.parse(source)]
    while queue:
        node = queue.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            queue.extend(node.orelse)
            continue
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "write imports with the package's name"
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        queue.extend(ast.iter_child_nodes(node))
    return found


def _own(name: str) -> str | None:
    """The module of megaopd that a dotted name lies in, None outside it."""
    if name.split(".")[0] != "megaopd":
        return None
    name = name.removeprefix("megaopd").removeprefix(".")
    while name not in SOURCES:
        name = name.rpartition(".")[0]
    return name


GRAPH = {
    module: {own for name in imports_of(source) if (own := _own(name)) is not None} - {module}
    for module, source in SOURCES.items()
}


def _inside(module: str, names: tuple[str, ...] | list[str]) -> str:
    """The longest of `names` that is the module or a package around it, or ''."""
    return max((n for n in names if module == n or module.startswith(f"{n}.")), key=len, default="")


LEVEL_OF = {name: i for i, rooms in enumerate(LAYERS) for room in rooms for name in room.split()}
ROOM_OF = {name: room for rooms in LAYERS for room in rooms for name in room.split()}


def violations(graph: dict[str, set[str]]) -> list[str]:
    """The edges of an import graph that do not lead to a lower layer or stay within a room."""
    found = []
    for module, targets in graph.items():
        here = _inside(module, list(LEVEL_OF))
        for target in targets:
            there = _inside(target, list(LEVEL_OF))
            if ROOM_OF[here] != ROOM_OF[there] and LEVEL_OF[there] >= LEVEL_OF[here]:
                found.append(f"{module} imports {target}")
    return sorted(found)


def test_every_module_has_a_room_and_every_room_a_module():
    rooms = {_inside(module, list(LEVEL_OF)) for module in SOURCES if module}
    assert "" not in rooms, [m for m in SOURCES if m and not _inside(m, list(LEVEL_OF))]
    assert rooms == set(LEVEL_OF)


def test_layers():
    assert GRAPH[""] == ROOT_IMPORTS
    assert violations({module: targets for module, targets in GRAPH.items() if module}) == []


def test_nothing_imports_the_package_root_or_the_entry():
    for module, targets in GRAPH.items():
        assert not targets & {"", "train"}, module


def test_packages_have_no_cycle():
    packages: dict[str, set[str]] = defaultdict(set)
    for module, targets in GRAPH.items():
        if module:
            package = module.split(".")[0]
            packages[package] |= {target.split(".")[0] for target in targets} - {package}
    assert packages["engine"] >= {"losses", "models", "parallel"}  # the graph is not empty
    graphlib.TopologicalSorter(packages).prepare()


def test_modules_have_no_cycle():
    graphlib.TopologicalSorter(GRAPH).prepare()


@pytest.mark.parametrize("outside", ONLY_IMPORTERS)
def test_only_these_import_it(outside):
    importers = {
        module
        for module, source in SOURCES.items()
        if any(_inside(name, [outside]) for name in imports_of(source))
    }
    allowed = ONLY_IMPORTERS[outside]
    assert {m for m in importers if not _inside(m, allowed)} == set()
    # A name that no longer imports it has no business in the table.
    assert {_inside(m, allowed) for m in importers} == set(allowed)


_PROBE = """
import importlib, json, sys
dirty = {}
for module, unwanted in json.loads(sys.argv[1]).items():
    before = set(sys.modules)
    importlib.import_module(f"megaopd.{module}")
    dirty[module] = [name for name in unwanted if name in set(sys.modules) - before]
print(json.dumps(dirty))
"""


def test_what_importing_a_module_loads():
    done = subprocess.run(
        [sys.executable, "-c", _PROBE, json.dumps(LIGHT)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=PACKAGE.parent,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {module: [] for module in LIGHT}


def test_the_checks_see_what_they_look_for():
    source = """
import a.b
from c import d as e
if TYPE_CHECKING:
    import unseen
else:
    import seen
def f():
    from g.h import i, j
"""
    assert imports_of(source) == {"a.b", "c.d", "seen", "g.h.i", "g.h.j"}
    assert _own("megaopd.losses.linear_divergence") == "losses"
    assert _own("megaopd.losses.row_kernels") == "losses.row_kernels"
    assert _own("megaopdx") is None
    assert violations({"rollout.embedded": {"rewards.text_match"}}) == [
        "rollout.embedded imports rewards.text_match"
    ]
    assert violations({"losses.engine": {"models.build"}, "errors": {"batch"}}) == [
        "errors imports batch",
        "losses.engine imports models.build",
    ]
    assert violations({"models.build": {"models.mapping"}, "models.mapping": {"models.arch"}}) == [
        "models.mapping imports models.arch"
    ]
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter({"a": {"b"}, "b": {"a"}}).prepare()
