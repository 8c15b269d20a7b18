"""tools/evaluate.py as people run it: killed and started again, on several ranks."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest

from tests.helpers.processes import run_module
from tests.helpers.runs import make_run, metrics_of, run_training
from tests.helpers.tiny_models import make_tiny_model

pytestmark = pytest.mark.slow

NUM_PROMPTS = 24


@pytest.fixture(scope="module")
def arguments(tmp_path_factory) -> list[str]:
    directory = tmp_path_factory.mktemp("evaluate")
    model = make_tiny_model(directory / "model")
    rows = [{"id": f"p{i}", "prompt": f"x{i} and {i}", "answer": "a"} for i in range(NUM_PROMPTS)]
    (directory / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [str(model), "--data", str(directory / "p.jsonl"), "--reward", "format"]
    return [*words, "--n", "2", "--max-new-tokens", "24", "--portion", "2"]


def evaluate(arguments: list[str], out: Path, num_ranks: int = 1) -> dict:
    done = run_module("tools.evaluate", [*arguments, "--out", str(out)], num_ranks, 120)
    assert done.returncode == 0, done.stderr
    return json.loads((out / "results.json").read_text())


@pytest.fixture(scope="module")
def whole(arguments, tmp_path_factory) -> tuple[dict, bytes]:
    out = tmp_path_factory.mktemp("whole") / "out"
    return evaluate(arguments, out), (out / "p.responses.jsonl").read_bytes()


def test_killed_and_started_again(arguments, whole, tmp_path):
    """SIGKILL while it answers, twice: the files are those of one that ran through."""
    out = tmp_path / "out"
    journal = out / "p.responses.jsonl"
    for _ in range(2):
        enough = max(_num_lines(journal), 1) + 3
        done = run_module(
            "tools.evaluate",
            [*arguments, "--out", str(out)],
            kill_when=lambda enough=enough: _num_lines(journal) >= enough,
        )
        assert done.returncode == -signal.SIGKILL, done.stderr
    assert 1 < _num_lines(journal) < 1 + NUM_PROMPTS
    assert not (out / "results.json").exists()
    results, content = whole
    assert evaluate(arguments, out) == results
    assert journal.read_bytes() == content


def _num_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_ranks_share_the_samples(arguments, whole, tmp_path):
    results, content = whole
    assert evaluate(arguments, tmp_path / "out", num_ranks=2) == results
    assert (tmp_path / "out" / "p.responses.jsonl").read_bytes() == content


def test_one_line_and_a_status(arguments, tmp_path):
    out = str(tmp_path / "out")
    done = run_module("tools.evaluate", [*arguments, "--out", out, "--reward", "mth"])
    assert done.returncode == 2
    assert done.stderr.startswith("error: --reward: no 'mth'; did you mean math")
    assert len(done.stderr.splitlines()) == 1


def test_the_same_evaluator_during_training(tmp_path):
    """Every n steps, with samples; of the student at the end it is what evaluate.py says."""
    config = make_run(tmp_path)
    done = run_training(
        config,
        1,
        "train.num_steps=2",
        "train.export=true",
        "eval.interval=1",
        "eval.n=2",
        "eval.temperature=1.0",
        "eval.reward=format",
        "eval.teacher=false",
    )
    assert done.returncode == 0, done.stderr
    out = tmp_path / "out"
    for name in ("accuracy", "accuracy_low", "accuracy_high", "pass_at_2", "majority"):
        assert len(metrics_of(out, f"eval/{name}")) == 3
    words = [str(out / "hf"), "--data", str(tmp_path / "eval.jsonl"), "--reward", "format"]
    words += ["--n", "2", "--seed", "1234", "--max-new-tokens", "12"]
    results = evaluate(words, tmp_path / "again")
    rows = [json.loads(line) for line in (out / "eval_after.jsonl").read_text().splitlines()]
    lines = (tmp_path / "again" / "eval.responses.jsonl").read_text().splitlines()[1:]
    records = [record for line in lines for record in json.loads(line)["records"]]
    assert [r["response_ids"] for r in records] == [r["response_ids"] for r in rows]
    (found,) = results["results"]
    assert found["mean"]["value"] == metrics_of(out, "eval/accuracy")[-1]
    assert found["lengths"]["mean"] == metrics_of(out, "eval/response_tokens_mean")[-1]
