"""A training's tensors between layouts: what any layout saves, any other goes on from."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megaopd.config import CheckpointConfig, ParallelConfig
from megaopd.config_lora import LoraConfig
from megaopd.storage.steps import step_directory
from tests.distributed.workbench import VOCAB_SIZE, Workbench, make_models, with_layout
from tests.helpers.checkpoints import stored_tensors
from tests.helpers.distributed import run_distributed

pytestmark = pytest.mark.slow

TWO = {
    "dp2": ParallelConfig(),
    "tp2": ParallelConfig(tensor=2, sequence_parallel=True),
    "pp2": ParallelConfig(pipeline=2),
    "cp2": ParallelConfig(context=2),
}
FOUR = {"dp2tp2": ParallelConfig(tensor=2), "pp2dp2": ParallelConfig(pipeline=2)}
NUM_STEPS = 2


def _pairs(layouts: dict[str, ParallelConfig]) -> list[tuple[str, str]]:
    """(who saves, who goes on): each from itself, and from the one before it in the ring."""
    names = list(layouts)
    return [pair for i, name in enumerate(names) for pair in ((name, name), (names[i - 1], name))]


def checkpoints(folder: Path, student: Any, asynchronous: bool = True) -> Any:
    from megaopd.checkpoint.run_checkpoints import RunCheckpoints

    return RunCheckpoints(
        CheckpointConfig(asynchronous=asynchronous),
        folder,
        [student],
        num_updates=lambda: student.num_updates,
        source_dir=student.path,
        dtype=student.chunks[0].config.params_dtype,
        layout={},
    )


def stored(root: Path, step: int) -> dict[str, Tensor]:
    return stored_tensors(step_directory(root, step), VOCAB_SIZE)


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    """The keys that differ."""
    return sorted(
        {k for k in a.keys() | b.keys() if k not in a or k not in b or not torch.equal(a[k], b[k])}
    )


def _student(bench: Workbench, head: str, dtype: str, lora: bool) -> Any:
    from megaopd.engine.student import MegatronStudent
    from megaopd.models.arch import read_arch
    from megaopd.models.mapping import padded_vocab_size

    config = bench.config(head, dtype, freeze=() if lora else ("*.input_layernorm.weight",))
    if lora:
        config = replace(config, student=replace(config.student, lora=LoraConfig(rank=4)))
    rows = padded_vocab_size(VOCAB_SIZE, bench.parallel.tensor)
    student = MegatronStudent(
        config, read_arch(config.student.path), bench.groups, rows, VOCAB_SIZE
    )
    student.path = config.student.path
    return student


def _between_layouts(
    rank: int, world_size: int, folder: Path, layouts: dict[str, ParallelConfig], kind: str
) -> dict[str, Any]:
    from megaopd.checkpoint.resumable import find_resumable

    head, dtype, lora = kind.split("-")[0], kind.split("-")[1], kind.endswith("lora")

    def train(student: Any, bench: Workbench, signals: Any, steps: range) -> list[float]:
        found = []
        for step in steps:
            result = student.train_step(bench.micro_batches, signals, step)
            found.append(result.metrics["loss/divergence"])
        return found

    def write(name: str) -> Any:
        def work(bench: Workbench) -> dict[str, Any]:
            student, signals = _student(bench, head, dtype, lora), bench.signals(head, dtype)
            train(student, bench, signals, range(1, NUM_STEPS + 1))
            saved = checkpoints(folder / name, student)
            saved.save(NUM_STEPS, {"seen": name})
            # Training goes on while it is written, and changes nothing of it.
            losses = train(student, bench, signals, range(NUM_STEPS + 1, NUM_STEPS + 3))
            saved.finish()
            after = checkpoints(folder / f"{name}_after", student, asynchronous=False)
            after.save(NUM_STEPS + 2, {})
            return {"losses": losses}

        return work

    def read(source: str, name: str) -> Any:
        def work(bench: Workbench) -> dict[str, Any]:
            student, signals = _student(bench, head, dtype, lora), bench.signals(head, dtype)
            found = find_resumable(folder / source, "auto")
            assert found is not None
            assert found.state["seen"] == source
            again = checkpoints(folder / f"{source}_to_{name}", student)
            again.restore(found)
            again.newest = None
            again.save(NUM_STEPS, {})
            again.finish()
            losses = train(student, bench, signals, range(NUM_STEPS + 1, NUM_STEPS + 3))
            after = checkpoints(folder / f"{source}_to_{name}_after", student)
            after.save(NUM_STEPS + 2, {})
            after.finish()
            return {"losses": losses, "lr": student.optimizer.param_groups[0]["lr"]}

        return work

    found: dict[str, Any] = {}
    for name, parallel in layouts.items():
        found[name] = with_layout(folder, parallel, write(name))["losses"]
    for source, name in _pairs(layouts):
        result = with_layout(folder, layouts[name], read(source, name))
        found[f"{source} {name}"] = result["losses"]
        if rank == 0:
            was, now = stored(folder / source, 2), stored(folder / f"{source}_to_{name}", 2)
            found[f"{source} {name} differs"] = equal(was, now)
            found["keys"] = sorted(was)
            if source == name:
                was = stored(folder / f"{name}_after", NUM_STEPS + 2)
                now = stored(folder / f"{name}_to_{name}_after", NUM_STEPS + 2)
                found[f"{name} goes on otherwise"] = equal(was, now)
        dist.barrier()
    return found


@pytest.mark.parametrize(
    ("kind", "layouts"),
    [
        ("untied-fp32", TWO),
        ("tied-bf16", {name: TWO[name] for name in ("dp2", "tp2")}),
        ("untied-fp32-lora", {name: TWO[name] for name in ("tp2", "pp2")}),
        ("tied-fp32", FOUR),
    ],
)
def test_every_layout_goes_on_from_every_layout(tmp_path, kind, layouts):
    """Weights and optimizer state bit for bit; the steps after it bit for bit at the same layout,
    and to rounding at another."""
    make_models(tmp_path, kind.split("-")[0])
    world_size = 4 if layouts is FOUR else 2
    found = run_distributed(_between_layouts, world_size, tmp_path, layouts, kind, timeout_s=240)[0]
    trained = [key for key in found["keys"] if key.startswith("optimizer.state.exp_avg.")]
    assert trained
    assert not any("input_layernorm" in key for key in trained)
    if "lora" in kind:
        assert all(key.startswith("optimizer.state.exp_avg.adapter.") for key in trained)
        assert not any(key.startswith("decoder") for key in found["keys"])
    tolerance = 1e-5 if "fp32" in kind else 2e-2
    for source, name in _pairs(layouts):
        assert found[f"{source} {name} differs"] == [], (source, name)
        if source == name:
            assert found[f"{source} {name}"] == found[source]
            assert found[f"{source} goes on otherwise"] == []
        else:
            assert found[f"{source} {name}"] == pytest.approx(found[source], rel=tolerance)
