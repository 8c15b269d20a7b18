"""`megaopd.verify` on set-ups that are sound, and on ones that are broken in one way each."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.helpers.distributed import run_distributed
from tests.helpers.processes import run_module
from tests.helpers.runs import make_run
from tests.helpers.tiny_models import make_tiny_model

pytestmark = pytest.mark.slow


def teach(teacher: Path, prompts: Path, num_steps: int = 40) -> None:
    """Trains a tiny model on the text of the prompts, until it knows which letters there are."""
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    texts = [json.loads(line)["prompt"] for line in prompts.read_text().splitlines()]
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    rows = torch.tensor([tokenizer(t)["input_ids"][:4] for t in texts if len(t) >= 6])
    for _ in range(num_steps):
        loss = model(input_ids=rows, labels=rows).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(teacher)


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sound")
    make_run(directory)
    teach(directory / "teacher", directory / "train.jsonl")
    return directory


@pytest.fixture
def run(sound: Path, tmp_path: Path) -> Path:
    """A copy of the sound run that a test may break; returns run.yaml."""
    shutil.copytree(sound, tmp_path, dirs_exist_ok=True)
    config = tmp_path / "run.yaml"
    config.write_text(config.read_text().replace(str(sound), str(tmp_path)))
    return config


def verify(config: Path, num_ranks: int, *words: str) -> tuple[int, dict[str, str], str]:
    """Exit status, result by check, and all that was said."""
    done = run_module("megaopd.verify", [f"conf={config}", *words], num_ranks, 150)
    rows = [line for line in done.stdout.splitlines() if line[:1].strip() and line[22:26].strip()]
    results = {line[:22].strip(): line[22:26] for line in rows[:-1]}
    assert "Traceback" not in done.stderr, done.stderr
    return done.returncode, results, done.stdout


STATIC_CHECKS = {
    "configuration",
    "models' files",
    "tokenizers",
    "data",
    "chat templates",
    "disk space",
}


def test_a_sound_set_up_passes_on_two_ranks(run: Path) -> None:
    status, results, said = verify(run, 2, "parallel.tensor=2")
    assert status == 0, said
    assert results.pop("chat templates") == "skip"  # the prompts are strings
    assert set(results.values()) == {"pass"}, said
    assert results.keys() > STATIC_CHECKS - {"chat templates"}
    assert "SHA-256 of" in said
    assert said.splitlines()[-1] == f"{len(results)} passed, 0 failed, 1 skipped"
    assert not (run.parent / "out").exists()


def test_lora_with_its_base_as_the_teacher(run: Path) -> None:
    # B is 0, so both are one: nothing is to be learnt, and the check says so.
    shutil.rmtree(run.parent / "student")
    shutil.copytree(run.parent / "teacher", run.parent / "student")
    words = ("student.lora.rank=4", "teacher.kind=base", "teacher.path=")
    status, results, said = verify(run, 1, *words)
    assert status == 6
    assert results["teacher beats noise"] == results["teacher and itself"] == "pass"
    assert results["one training step"] == "FAIL"
    assert "the gradient's norm is 0" in said
    for file in ("train", "eval"):
        path = run.parent / f"{file}.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        told = [json.dumps(row | {"hint": "abc " + row["prompt"]}) for row in rows]
        path.write_text("\n".join(told) + "\n")
    status, results, said = verify(run, 1, *words, "data.teacher_prompt_column=hint")
    assert status == 0, said


@pytest.mark.parametrize(
    ("recipe", "said"),
    [
        # Few short samples are all wrong: that is no fault of the set-up.
        ("grpo", "no gradient: the samples of every prompt had one and the same reward"),
        # Training does not sample from the student, so the step itself brings no weights over.
        ("sequence_kd", "version 1: SHA-256 of 25 tensors agree"),
    ],
)
def test_recipes_whose_step_differs(run: Path, recipe: str, said: str) -> None:
    status, results, found = verify(run, 1, f"+recipes={recipe}")
    assert status == 0, found
    assert results["weight sync"] == "pass"
    assert said in found


def test_a_teacher_of_noise_is_found(run: Path) -> None:
    make_tiny_model(run.parent / "teacher", "Qwen3ForCausalLM", seed=1)
    status, results, said = verify(run, 1)
    assert status == 4
    assert results["teacher beats noise"] == "FAIL"
    assert results["teacher and itself"] == "pass"
    assert "no better than noise" in said
    assert "fix:  see with tools/check_conversion.py" in said


def _one_fails(rank: int, world_size: int, alone: bool) -> list[str]:
    """The rows of a check that fails on rank 1; the others wait for it in a collective of the
    check, or do not."""
    import torch.distributed as dist

    from megaopd.errors import EnvironmentFault
    from megaopd.verify.agreement import Agreement
    from megaopd.verify.table import Check, Table

    def check(setup: object) -> str:
        if rank == 1:
            raise EnvironmentFault("cuda:1", "out of memory", "end the others")
        if alone:
            dist.barrier()
        return "enough room"

    rows: list[str] = []
    table = Table(rows.append)
    checks = {"memory": Check(check, collective=True), "more": Check(check, ("memory",))}
    table.run(checks, None, Agreement(patience_s=1.0))
    assert table.exit_status == 5
    return rows


def test_what_one_rank_met_is_what_all_say() -> None:
    first, second = run_distributed(_one_fails, 2, False)
    assert first == second
    assert first[0].split()[:2] == ["memory", "FAIL"]
    assert first[1].split() == ["fix:", "end", "the", "others"]
    assert first[2].split()[:2] == ["more", "skip"]


def test_a_rank_that_fails_alone_leaves() -> None:
    with pytest.raises(RuntimeError, match="rank 1 died without a word, exit code 5"):
        run_distributed(_one_fails, 2, True)


def test_prompts_of_evaluation_among_those_of_training(run: Path) -> None:
    with (run.parent / "train.jsonl").open("a") as file:
        row = json.loads((run.parent / "eval.jsonl").read_text().splitlines()[2])
        file.write(json.dumps(row | {"id": "again"}) + "\n")
    status, results, said = verify(run, 1, "--static")
    assert status == 3
    assert (results["data"], results["chat templates"]) == ("FAIL", "skip")
    assert "1 of 6 prompts are in data.train too, eval2 first" in said
    assert "needs: data" in said


def test_chat_templates_that_differ(run: Path) -> None:
    for side, mark in (("student", "<u>"), ("teacher", "<user>")):
        template = "{% for m in messages %}" + mark + "{{ m.content }}{% endfor %}"
        (run.parent / side / "chat_template.jinja").write_text(template)
    status, results, said = verify(run, 1, "--static", "data.chat_template=true")
    assert status == 2
    assert results["chat templates"] == "FAIL"
    assert "first at '>x" in said


@pytest.mark.parametrize(
    ("words", "check", "status"),
    [
        (("loss.kind=nothing",), "configuration", 2),
        (("loss.knd=1",), "configuration", 2),
        (("--ranks", "3", "parallel.tensor=2"), "configuration", 2),
        (("credit.reward=nowhere.py:reward",), "configuration", 2),
        (("student.lora.targets=[gate]",), "models' files", 2),
        (("student.lora.adapter=nowhere",), "models' files", 4),
        (("run.dir=README.md/run",), "disk space", 5),
        (("data.train=nowhere.jsonl",), "data", 3),
    ],
)
def test_what_is_wrong_is_named(run: Path, words: tuple[str, ...], check: str, status: int) -> None:
    found, results, said = verify(run, 1, "--static", *words)
    assert (found, results[check]) == (status, "FAIL"), said
    assert "fix:" in said
