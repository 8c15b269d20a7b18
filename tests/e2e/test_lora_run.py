"""Runs with LoRA adapters from end to end: what is trained, sampled with, written and resumed; and
teachers that are averaged."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megaopd.models.hf_io.reader import HFReader
from tests.helpers.runs import make_run, metrics_of, run_training
from tests.helpers.tiny_models import make_tiny_model

pytestmark = pytest.mark.slow

LORA = ("student.lora.rank=4", "student.lora.alpha=8", "optimizer.lr=1e-2")
BASE = ("teacher.kind=base", "teacher.path=", "data.teacher_prompt_column=hint")
TP2_SP = ("parallel.tensor=2", "parallel.sequence_parallel=true")
STEPS = 3


def _run(config: Path, name: str, num_ranks: int, *overrides: str) -> Path:
    out = config.parent / name
    done = run_training(config, num_ranks, f"run.dir={out}", *overrides)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture
def config(tmp_path: Path) -> Path:
    config = make_run(tmp_path, "Qwen3ForCausalLM", vocab_size=509, num_key_value_heads=2)
    for file in ("train", "eval"):
        path = tmp_path / f"{file}.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        lines = [json.dumps(row | {"hint": "the answer is a. " + row["prompt"]}) for row in rows]
        path.write_text("\n".join(lines) + "\n")
    return config


def _as_directory(path: Path) -> HFReader:
    """An adapter's tensors, by a reader that knows them under another file's name."""
    link = path / "model.safetensors"
    if not link.exists():
        link.symlink_to(path / "adapter_model.safetensors")
    return HFReader(path)


def test_one_set_of_weights_is_student_and_teacher(config: Path) -> None:
    rollouts = config.parent / "rollouts.jsonl"
    words = (*LORA, *BASE, "train.export=true", "train.recompute=full")
    one = _run(config, "one", 1, *words, f"rollout.record={rollouts}")
    # Samples are those of the merged weights, and so are the trainer's log-probs.
    assert max(metrics_of(one, "rollout/mismatch_kl")) < 1e-4
    assert len(metrics_of(one, "loss/divergence")) >= STEPS
    # A copy of the weights as the teacher says the same.
    replay = ("rollout.kind=recorded", f"rollout.path={rollouts}", "data.eval=")
    copied = _run(config, "copied", 1, *words, "teacher.kind=self", *replay)
    layouts = [
        _run(config, "tp2_sp", 2, *words, *replay, *TP2_SP, "train.offload=true"),
        _run(config, "pp2", 2, *words, *replay, "parallel.pipeline=2"),
    ]
    wanted = metrics_of(one, "train/grad_norm")
    for out in (copied, *layouts):
        assert metrics_of(out, "train/grad_norm") == pytest.approx(wanted, rel=1e-4), out.name

    base, merged = HFReader(config.parent / "student"), HFReader(one / "hf")
    adapter = _as_directory(one / "adapter")
    said = json.loads((one / "adapter" / "adapter_config.json").read_text())
    assert (said["peft_type"], said["r"], said["lora_alpha"]) == ("LORA", 4, 8)
    for name in base.names():
        prefix = f"base_model.model.{name.removesuffix('.weight')}"
        expected = base.read(name)
        if f"{prefix}.lora_A.weight" in adapter.names():
            a, b = (adapter.read(f"{prefix}.lora_{x}.weight") for x in "AB")
            expected = expected + 2.0 * b @ a
            assert b.abs().max() > 1e-3, name
        torch.testing.assert_close(merged.read(name), expected, rtol=0, atol=1e-5)
        assert name.endswith("_proj.weight") == (f"{prefix}.lora_A.weight" in adapter.names())


def test_a_run_goes_on_from_an_adapter(config: Path) -> None:
    first = _run(config, "first", 1, *LORA, "train.export=true", "data.eval=")
    # From the merged weights without adapters, and from the base with them: one and the same.
    rollouts = config.parent / "rollouts.jsonl"
    one_step = ("train.num_steps=1", "data.eval=")
    merged = _run(
        *(config, "merged", 1, *one_step, f"rollout.record={rollouts}"),
        f"student.path={first}/hf",
    )
    replay = ("rollout.kind=recorded", f"rollout.path={rollouts}")
    again = _run(
        *(config, "again", 2, *LORA, *one_step, *replay, "parallel.tensor=2"),
        f"student.lora.adapter={first}/adapter",
    )
    assert metrics_of(again, "loss/divergence") == pytest.approx(
        metrics_of(merged, "loss/divergence"), rel=1e-4
    )
    other = ("student.lora.rank=8", f"student.lora.adapter={first}/adapter")
    done = run_training(config, 1, *other)
    assert done.returncode == 4
    assert "adapter_config.json: r is 4, student.lora.rank 8" in done.stderr


@pytest.mark.long
def test_an_average_of_one_teacher_twice_is_that_teacher(config: Path) -> None:
    rollouts = config.parent / "rollouts.jsonl"
    common = ("data.eval=", "train.num_steps=2")
    alone = _run(config, "alone", 1, *common, f"rollout.record={rollouts}")
    replay = ("rollout.kind=recorded", f"rollout.path={rollouts}")
    folder = config.parent
    make_tiny_model(folder / "other", "LlamaForCausalLM", seed=5, vocab_size=509, hidden_size=32)

    def members(a: str, b: str) -> tuple[str, ...]:
        named = (("a", a), ("b", b))
        paths = [f"teachers.{name}.path={folder}/{path}" for name, path in named]
        dtypes = [f"teachers.{name}.dtype=fp32" for name, _ in named]
        average = ("teacher.kind=average", "teacher.path=", "teacher.members=[a,b]")
        return (*paths, *dtypes, *average)

    twice = _run(config, "twice", 2, *common, *replay, *members("teacher", "teacher"))
    mixed = _run(config, "mixed", 1, *common, *replay, *members("teacher", "other"))
    split = _run(
        *(config, "split", 2, *common, *replay, *members("teacher", "other")),
        *("parallel.tensor=2", "teachers.b.parallel.pipeline=2"),
    )
    wanted = metrics_of(alone, "loss/divergence")
    assert metrics_of(twice, "loss/divergence") == pytest.approx(wanted, rel=1e-5)
    found = metrics_of(mixed, "loss/divergence")
    assert found != pytest.approx(wanted, rel=1e-2)
    assert metrics_of(split, "loss/divergence") == pytest.approx(found, rel=1e-5)
