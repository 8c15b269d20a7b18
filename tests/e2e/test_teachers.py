"""Teachers in a layout of their own, several of them, with a context that the student lacks: the
same rollouts give the same training, whatever the layouts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.runs import make_run, metrics_of, run_training
from tests.helpers.tiny_models import make_tiny_model

pytestmark = pytest.mark.slow

STEPS = 2


def _run(config: Path, name: str, num_ranks: int, *overrides: str) -> Path:
    out = config.parent / name
    done = run_training(config, num_ranks, f"run.dir={out}", *overrides)
    assert done.returncode == 0, done.stderr
    return out


def test_teachers_by_prompt_each_in_its_own_layout(tmp_path: Path) -> None:
    config = make_run(tmp_path, "Qwen3ForCausalLM", vocab_size=509)
    make_tiny_model(tmp_path / "other", "LlamaForCausalLM", seed=5, vocab_size=509, hidden_size=32)
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    for number, row in enumerate(rows):
        row["hint"] = "the answer is a. " + row["prompt"]
        row["teacher"] = "other" if number % 3 == 0 else None
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rollouts = tmp_path / "rollouts.jsonl"
    common = (
        *("data.eval=", f"train.num_steps={STEPS}", "data.teacher_prompt_column=hint"),
        f"+teachers.other={{path: {tmp_path}/other, dtype: fp32}}",
    )
    replay = ("rollout.kind=recorded", f"rollout.path={rollouts}")
    one = _run(config, "one", 1, *common, f"rollout.record={rollouts}")
    same = _run(config, "tp2", 2, *common, *replay, "parallel.tensor=2")
    mixed = _run(
        *(config, "mixed", 2, *common, *replay, "parallel.tensor=2"),
        *("+teacher.parallel.pipeline=2", "+teachers.other.parallel.context=2"),
        *("teacher.max_tokens_per_micro_batch=200", "train.max_tokens_per_micro_batch=120"),
    )
    # The teachers' words matter: without the hint it is another loss.
    plain = _run(config, "plain", 1, *common, *replay, "data.teacher_prompt_column=")
    wanted = metrics_of(one, "loss/divergence")
    assert len(wanted) == STEPS
    for out in (same, mixed):
        for series in ("loss/divergence", "train/grad_norm"):
            found = metrics_of(out, series)
            assert found == pytest.approx(metrics_of(one, series), rel=1e-5), series
    assert metrics_of(plain, "loss/divergence") != pytest.approx(wanted, rel=1e-3)
    assert metrics_of(same, "perf/hand_over_bytes") == [0.0] * STEPS
    assert min(metrics_of(mixed, "perf/hand_over_bytes")) > 0
    for out in (one, same, mixed):
        assert min(metrics_of(out, "perf/dp_balance")) == 1.0  # one data-parallel rank
        assert 0.9 < min(metrics_of(out, "perf/packing_efficiency")) <= 1.0


def test_a_teacher_that_there_is_not_is_named_with_its_line(tmp_path: Path) -> None:
    config = make_run(tmp_path)
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write('{"id": "last", "prompt": "x", "answer": "a", "teacher": "math"}\n')
    done = run_training(config, 1)
    assert done.returncode == 3
    assert "train.jsonl:65: column 'teacher' names the teacher \"math\"; there are none" in (
        done.stderr
    )


def test_a_student_taught_by_itself_with_the_answer_before_it(tmp_path: Path) -> None:
    config = make_run(tmp_path, "Qwen3ForCausalLM", vocab_size=509)
    for file in ("train", "eval"):
        path = tmp_path / f"{file}.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        lines = [json.dumps(row | {"hint": "the answer is a. " + row["prompt"]}) for row in rows]
        path.write_text("\n".join(lines) + "\n")
    common = ("teacher.kind=self", "teacher.path=", f"train.num_steps={STEPS}")
    privileged = ("data.teacher_prompt_column=hint", "teacher.offload=true", "eval.teacher=true")
    told = _run(config, "told", 2, *common, *privileged, "parallel.tensor=2")
    untold = _run(config, "untold", 1, *common)
    assert min(metrics_of(told, "loss/divergence")) > 1e-3
    assert min(metrics_of(told, "train/grad_norm")) > 1e-3
    # Without a privileged prompt nothing is to be learnt: student and teacher are one.
    assert metrics_of(untold, "loss/divergence")[0] == pytest.approx(0.0, abs=1e-9)
    assert metrics_of(untold, "train/grad_norm")[0] < 1e-5
    summary = json.loads((told / "summary.json").read_text())
    assert summary["teacher_accuracy"] is not None


def test_an_average_of_the_student_beside_another_teacher(tmp_path: Path) -> None:
    config = make_run(tmp_path, "LlamaForCausalLM", vocab_size=509)
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    for number, row in enumerate(rows):
        row["teacher"] = "slow" if number % 2 else None
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rollouts = tmp_path / "rollouts.jsonl"
    common = ("data.eval=", f"train.num_steps={STEPS}", "optimizer.warmup_steps=0")
    replay = ("rollout.kind=recorded", f"rollout.path={rollouts}")
    slow = "+teachers.slow={kind: ema, dtype: fp32, ema_decay: 0.5, offload: %s}"
    one = _run(config, "one", 1, *common, slow % "false", f"rollout.record={rollouts}")
    divergence = metrics_of(one, "loss/divergence")
    for name, layout in (("tp2", "parallel.tensor=2"), ("pp2", "parallel.pipeline=2")):
        out = _run(config, name, 2, *common, *replay, slow % "true", layout)
        assert metrics_of(out, "loss/divergence") == pytest.approx(divergence, rel=1e-5)
    # The step leaves the average behind the student: a frozen copy would be further away.
    frozen = slow.replace("kind: ema", "kind: self") % "false"
    still = metrics_of(_run(config, "self", 1, *common, *replay, frozen), "loss/divergence")
    assert still[0] == divergence[0]
    assert still[1] > divergence[1]
