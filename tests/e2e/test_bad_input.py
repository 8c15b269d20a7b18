"""What a person sees who got something wrong: one line, an exit status, no traceback."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.helpers.processes import run_module
from tests.helpers.runs import make_run, run_training

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Mistake:
    """Overrides or a damaged file, and what must be said about it."""

    status: int
    says: tuple[str, ...]
    overrides: tuple[str, ...] = ()
    world_size: int = 1
    damage: Callable[[Path], None] = field(default=lambda directory: None)


def _truncate_shard(directory: Path) -> None:
    shard = directory / "teacher/model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])


def _remove_shard(directory: Path) -> None:
    (directory / "teacher/model.safetensors").unlink()


def _break_line(directory: Path) -> None:
    lines = (directory / "train.jsonl").read_text().splitlines()
    lines[2] = lines[2][:-2]
    (directory / "train.jsonl").write_text("\n".join(lines))


def _other_tokenizer(directory: Path) -> None:
    path = directory / "teacher/tokenizer.json"
    data = json.loads(path.read_text())
    vocab = data["model"]["vocab"]
    first, second = sorted(vocab, key=vocab.__getitem__)[300:302]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    path.write_text(json.dumps(data))


def _six_experts(directory: Path) -> None:
    path = directory / "teacher/config.json"
    fields = json.loads(path.read_text())
    fields |= {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe"}
    fields |= {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    path.write_text(json.dumps(fields))


MISTAKES = {
    "unknown key": Mistake(2, ("optimizer.lrr", "optimizer.lr"), ("optimizer.lrr=1",)),
    "wrong type": Mistake(2, ("train.num_steps", "many"), ("train.num_steps=many",)),
    "layout": Mistake(
        2,
        ("parallel", "student's tensor 3", "= 3 does not divide the world size 4"),
        ("parallel.tensor=3",),
        world_size=4,
    ),
    "another world for the teacher": Mistake(
        2,
        ("teacher.parallel", "tensor 2 x pipeline 1 x context 4 = 8", "world size 4"),
        ("teacher.parallel.tensor=2", "teacher.parallel.context=4"),
        world_size=4,
    ),
    "deeper than layers": Mistake(
        2,
        ("parallel.pipeline", "= 4 stages", "student's 2 layers"),
        ("parallel.pipeline=4",),
        world_size=4,
    ),
    "uneven stages": Mistake(
        2,
        ("teacher.parallel.pipeline", "teacher's 4 layers (4 = 1 x 3 + 1)"),
        ("parallel.context=3", "teacher.parallel.pipeline=3"),
        world_size=3,
    ),
    "layers per stage": Mistake(
        2,
        ("teacher.parallel.layers_per_stage", "1 + 2 = 3", "4 layers"),
        ("teacher.parallel.pipeline=2", "teacher.parallel.layers_per_stage=[1,2]"),
        world_size=2,
    ),
    "virtual stages": Mistake(
        2, ("parallel.virtual_pipeline", "pipeline 1"), ("parallel.virtual_pipeline=2",)
    ),
    "segments": Mistake(
        2,
        (
            "train.max_tokens_per_micro_batch",
            "64 + ",
            " 13 = 77, padded to 80 = 20 x 2 x context 2",
        ),
        (
            *("parallel.context=2", "train.max_tokens_per_micro_batch=78"),
            "rollout.max_new_tokens=13",
        ),
        world_size=2,
    ),
    "experts": Mistake(
        2,
        ("teacher.parallel.expert", "6 experts (6 = 1 x 4 + 2)"),
        ("teacher.parallel.expert=4",),
        world_size=4,
        damage=_six_experts,
    ),
    "ranks of experts": Mistake(
        2,
        ("teacher.parallel.expert", "expert 3 x expert_tensor 2 = 6", "4 ranks"),
        ("teacher.parallel.expert=3", "teacher.parallel.tensor=2"),
        world_size=4,
    ),
    "no experts": Mistake(
        2, ("parallel.expert", "not a mixture"), ("parallel.expert=2",), world_size=2
    ),
    "self teacher with a path": Mistake(2, ("teacher.path", "self"), ("teacher.kind=self",)),
    "key of a named teacher": Mistake(
        2, ("teachers.math.pth", "teachers.math.path"), ("teachers.math.pth=x",)
    ),
    "heads": Mistake(2, ("parallel.tensor", "4", "KV"), ("parallel.tensor=4",), world_size=4),
    "batch": Mistake(
        2, ("train.global_batch_size", "8"), ("train.micro_batch_size=3",), world_size=1
    ),
    "context length": Mistake(2, ("256",), ("rollout.max_new_tokens=400",)),
    "loss kind": Mistake(2, ("loss.kind", "reverse_kl"), ("loss.kind=revers_kl",)),
    "reward": Mistake(2, ("eval.reward", "exact_match"), ("eval.reward=exact",)),
    "tokenizer": Mistake(2, ("300",), damage=_other_tokenizer),
    "bad JSON": Mistake(3, ("train.jsonl:3",), damage=_break_line),
    "missing column": Mistake(3, ("question",), ("data.prompt_column=question",)),
    "missing shard": Mistake(4, ("teacher", "safetensors"), damage=_remove_shard),
    "truncated shard": Mistake(4, ("teacher/model.safetensors",), damage=_truncate_shard),
}


@pytest.fixture(scope="module")
def good_run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("good")
    make_run(directory)
    return directory


@pytest.mark.parametrize("name", MISTAKES)
def test_one_line_and_status(good_run, tmp_path, name):
    mistake = MISTAKES[name]
    directory = tmp_path / "run"
    shutil.copytree(good_run, directory)
    config = directory / "run.yaml"
    config.write_text(config.read_text().replace(str(good_run), str(directory)))
    mistake.damage(directory)
    done = run_module(
        "megaopd.train",
        [f"conf={config}", *mistake.overrides],
        WORLD_SIZE=str(mistake.world_size),
        RANK="0",
    )
    _check(done, mistake)
    assert not (directory / "out").exists()  # nothing was started


def _check(done: subprocess.CompletedProcess[str], mistake: Mistake) -> None:
    assert done.returncode == mistake.status, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert "Traceback" not in done.stderr
    assert ";" in lines[0]  # what was found; what to do
    for words in mistake.says:
        assert words in lines[0]


def test_debug_shows_the_traceback(good_run):
    done = run_module("megaopd.train", [f"conf={good_run}/run.yaml", "x.y=1", "--debug"])
    assert done.returncode != 0
    assert "Traceback" in done.stderr


def test_three_non_finite_steps_end_the_run(good_run, tmp_path):
    """A teacher whose final norm is NaN: every step is skipped, the third ends the run."""
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(good_run / "teacher", tmp_path / "teacher")
    shard = tmp_path / "teacher/model.safetensors"
    tensors = load_file(shard)
    tensors["model.norm.weight"][0] = torch.nan
    save_file(tensors, shard, metadata={"format": "pt"})
    out = tmp_path / "out"
    done = run_training(
        good_run / "run.yaml",
        1,
        f"teacher.path={tmp_path / 'teacher'}",
        f"run.dir={out}",
        "train.num_steps=9",
        "train.export=true",
        "eval.teacher=false",
        "data.eval=",
    )
    assert "error: step 3: loss or gradient not finite 3 steps in a row" in done.stderr
    assert done.returncode == 6
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["train/skipped"] for row in rows] == [1, 1, 1]
    assert "step 1 skipped" in done.stderr
    assert "train" in done.stderr.split("samples ")[1]  # ids of the samples
    # Nothing is lost: the weights, untouched by the skipped steps, were exported.
    before = load_file(good_run / "student/model.safetensors")
    after = load_file(out / "hf/model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
