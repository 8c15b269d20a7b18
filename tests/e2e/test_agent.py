"""Whole runs in which the student calls a tool, with the embedded engine and with SGLang."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megaopd.errors import ConfigError
from megaopd.train import main as train
from tests.helpers.runs import metrics_of, run_training
from tests.helpers.sglang import sglang_python
from tests.helpers.tool_caller import ANSWER, QUESTION, make_tool_caller
from tools.check_export import main as check_export

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

NUM_STEPS = 3
BATCH = 8


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    """A teacher that knows how to call the calculator, and a student that does not quite."""
    path = tmp_path_factory.mktemp("agent")
    make_tool_caller(path / "teacher", seed=1)
    make_tool_caller(path / "student", seed=2, max_loss=0.1)
    for name, count in (("train", 64), ("eval", 4)):
        rows = [{"id": f"{name}{i}", "prompt": QUESTION, "answer": ANSWER} for i in range(count)]
        (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "run.yaml").write_text(
        f"""
student: {{path: {path}/student, dtype: fp32}}
teacher: {{path: {path}/teacher, dtype: fp32}}
parallel: {{tensor: 2}}
data: {{train: {path}/train.jsonl, eval: {path}/eval.jsonl, chat_template: true,
        max_prompt_tokens: 64}}
rollout: {{max_new_tokens: 128, agent: {{tools: [calculator], max_turns: 3, max_tool_tokens: 8}}}}
optimizer: {{lr: 1.0e-4, warmup_steps: 1, clip_grad: 0.0}}
train: {{num_steps: {NUM_STEPS}, global_batch_size: {BATCH}, micro_batch_size: 4}}
log: {{tensorboard: false}}
"""
    )
    return path


def check_run(out: Path, engine: str) -> None:
    turns, own, given = (
        metrics_of(out, f"agent/{name}") for name in ("num_turns", "llm_tokens", "tool_tokens")
    )
    assert len(turns) == NUM_STEPS
    # Most samples are the learnt conversation of two turns.
    assert all(1 < value <= 3 for value in turns)
    assert min(given) > 0
    ratios = metrics_of(out, "agent/tool_ratio")
    assert all(0 < ratio < 0.5 for ratio in ratios)
    assert len(metrics_of(out, "agent/tool_errors")) == NUM_STEPS
    # The student trains on the tokens that it sampled, and on no others.
    assert metrics_of(out, "train/loss_tokens") == pytest.approx([mean * BATCH for mean in own])
    lengths = metrics_of(out, "rollout/response_tokens_mean")
    assert lengths == pytest.approx([a + b for a, b in zip(own, given, strict=True)])
    # What the engine sampled after the tools' tokens is what the trainer computes there.
    assert max(metrics_of(out, "rollout/mismatch_kl")) < 1e-6
    summary = json.loads((out / "summary.json").read_text())
    assert summary["rollout"] == engine
    # Greedy: the call is made, and its result is the last word.
    assert summary["student_accuracy_after"] == 1.0
    assert metrics_of(out, "eval/accuracy") == [1.0, 1.0]


def test_embedded(directory: Path) -> None:
    out = directory / "embedded"
    done = run_training(directory / "run.yaml", 2, f"run.dir={out}", timeout_s=300)
    assert done.returncode == 0, done.stderr
    check_run(out, "embedded")
    # The export holds the same conversations.
    check_export([str(out)])
    summary = json.loads((out / "summary.json").read_text())
    assert summary["export_greedy_identical"] == summary["export_greedy_compared"] == 4


@pytest.mark.long
def test_sglang(directory: Path) -> None:
    out = directory / "sglang"
    words = (
        "+rollout=sglang",
        f"rollout.sglang.python={sglang_python()}",
        f"run.dir={out}",
        "train.export=false",
    )
    done = run_training(directory / "run.yaml", 2, *words, timeout_s=400)
    assert done.returncode == 0, done.stderr
    check_run(out, "sglang")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["rollout.agent.tools=[calculator,sqlit]"],
            "rollout.agent.tools[1]: no 'sqlit'; did you mean sqlite?",
        ),
        (
            ["rollout.agent.tools=[sqlite]"],
            "rollout.agent.database: not set, and the tool sqlite reads it; name an SQLite file",
        ),
        (
            ["rollout.agent.tools=[sqlite]", "rollout.agent.database=missing.db"],
            "rollout.agent.database: missing.db cannot be read (unable to open database file)",
        ),
    ],
)
def test_one_line_says_what_is_wrong(directory: Path, words: list[str], message: str) -> None:
    """Before a device is touched; that a `ConfigError` is one line and status 2 is run_cli's."""
    with pytest.raises(ConfigError) as error:
        train([f"conf={directory / 'run.yaml'}", "parallel.tensor=1", *words])
    assert str(error.value).startswith(message)
