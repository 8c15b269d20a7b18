"""The command line of an evaluation, in this process, on tiny models."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from megaopd.convert.to_megatron import convert_to_megatron
from megaopd.data.tokenizer import load_tokenizer
from megaopd.errors import ConfigError, DataError, MegaOPDError
from megaopd.evaluation.cli import main
from megaopd.evaluation.questions import AS_WRITTEN, VARIANTS
from megaopd.rollout.sglang.loop import EventLoopThread
from tests.helpers.fake_sglang import FakeServer, response_to
from tests.helpers.tiny_models import make_tiny_model


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Tiny models are slower with more, and other tests run beside these."""
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0})


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("hf") / "tiny", max_position_embeddings=512)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "sums.jsonl"
    rows = [
        {
            "id": f"s{i}",
            "prompt": [
                {
                    "role": "user",
                    "content": f"{i}+{i}? Let's think step by step and output "
                    'the final answer after "####".',
                }
            ],
            "answer": str(2 * i),
            "teacher": "nobody here",
        }
        for i in range(5)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(model: Path, data: Path, out: Path, *more: str) -> dict:
    fixed = ["--max-new-tokens", "6", "--reward", "format"]
    main([str(model), "--data", str(data), "--out", str(out), *fixed, *more])
    return json.loads((out / "results.json").read_text())


def responses(out: Path, name: str = "sums") -> list[dict]:
    lines = (out / f"{name}.responses.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines[1:]]


def test_files_and_figures(model, data, tmp_path, capsys):
    found = run(model, data, tmp_path / "out", "--n", "3", "--k", "1,3")
    (result,) = found["results"]
    assert (result["name"], result["instruction"]) == ("sums", AS_WRITTEN)
    assert (result["num_prompts"], result["num_samples"]) == (5, 3)
    assert list(result["pass_at"]) == ["1", "3"]
    assert result["set_aside"] == {"too long": 0, "refused by the engine": 0}
    assert found["settings"]["n"] == 3
    assert found["settings"]["dtype"] == "fp32"
    assert found["confidence"] == 0.95
    rows = responses(tmp_path / "out")
    assert [row["prompt_id"] for row in rows] == [f"s{i}" for i in range(5)]
    assert all([r["index"] for r in row["records"]] == [0, 1, 2] for row in rows)
    lengths = [len(r["response_ids"]) for row in rows for r in row["records"]]
    assert result["lengths"]["mean"] == pytest.approx(sum(lengths) / 15)
    assert result["truncated"]["value"] == pytest.approx(sum(n == 6 for n in lengths) / 15)
    page = (tmp_path / "out" / "report.html").read_text()
    assert "mean@3" in page
    assert "5 prompts, mean@3" in capsys.readouterr().out


def test_the_same_again_asks_nobody(model, data, tmp_path, monkeypatch, capsys):
    first = run(model, data, tmp_path / "out", "--n", "2")
    monkeypatch.setattr("megaopd.evaluation.cli._engine", None)
    assert run(model, data, tmp_path / "out", "--n", "2") == first
    # Fewer prompts need none either; more need the rest alone.
    assert (
        run(model, data, tmp_path / "out", "--n", "2", "--num-prompts", "3")["results"][0][
            "num_prompts"
        ]
        == 3
    )


def test_going_on_gives_the_same_file(model, data, tmp_path):
    whole = run(model, data, tmp_path / "whole", "--n", "2")
    run(model, data, tmp_path / "out", "--n", "2", "--num-prompts", "2")
    journal = tmp_path / "out" / "sums.responses.jsonl"
    with journal.open("ab") as file:
        file.write(b'{"prompt_id": "s2", "reco')  # killed here
    found = run(model, data, tmp_path / "out", "--n", "2", "--portion", "1")
    assert found == whole
    assert journal.read_bytes() == (tmp_path / "whole" / "sums.responses.jsonl").read_bytes()


def test_other_settings_are_refused(model, data, tmp_path):
    run(model, data, tmp_path / "out")
    for more in (["--n", "2"], ["--temperature", "0.5"], ["--seed", "1"], ["--reward", "zero"]):
        with pytest.raises(ConfigError, match="choose another --out, or pass --overwrite"):
            run(model, data, tmp_path / "out", *more)
    assert run(model, data, tmp_path / "out", "--n", "2", "--overwrite")["settings"]["n"] == 2


def test_another_file_under_the_same_name_is_refused(model, data, tmp_path):
    copy = tmp_path / "sums.jsonl"
    copy.write_text(data.read_text())
    run(model, copy, tmp_path / "out")
    copy.write_text(data.read_text().replace("2+2", "2+3"))
    with pytest.raises(ConfigError, match="data_sha256"):
        run(model, copy, tmp_path / "out")


def test_both_formats_answer_alike(model, data, tmp_path):
    megatron = tmp_path / "megatron"
    convert_to_megatron(model, megatron)
    for place, path in (("a", model), ("b", megatron)):
        run(path, data, tmp_path / place, "--n", "2")
    assert responses(tmp_path / "a") == responses(tmp_path / "b")


def test_instructions(model, data, tmp_path):
    words = [w for name in VARIANTS for w in ("--instruction", name)]
    found = run(model, data, tmp_path / "out", *words, "--num-prompts", "1", "--greedy")
    names = ["sums" if v == AS_WRITTEN else f"sums.{v}" for v in VARIANTS]
    assert [r["name"] for r in found["results"]] == names
    prompts = {
        name: responses(tmp_path / "out", name)[0]["records"][0]["prompt_text"] for name in names
    }
    assert prompts["sums"] == prompts["sums.hash"]
    assert prompts["sums.plain"] == "user: 0+0?\nassistant: "
    assert prompts["sums.boxed"].startswith("user: 0+0?\nPlease reason step by step")
    assert "\\boxed{}" in prompts["sums.boxed"]
    # `hash` is what the file has; all others differ.
    assert len(set(prompts.values())) == len(VARIANTS) - 1


def test_long_prompts_are_set_aside(model, data, tmp_path):
    tokenizer = load_tokenizer(model)
    lengths = [
        len(tokenizer(f"user: {json.loads(line)['prompt'][0]['content']}\nassistant: ").input_ids)
        for line in data.read_text().splitlines()
    ]
    long = tmp_path / "long.jsonl"
    row = json.loads(data.read_text().splitlines()[0])
    row |= {"id": "long", "prompt": [{"role": "user", "content": "ab " * 90}]}
    long.write_text(data.read_text() + json.dumps(row) + "\n")
    limit = str(max(lengths))
    (result,) = run(model, long, tmp_path / "out", "--max-prompt-tokens", limit)["results"]
    assert result["num_prompts"] == 5
    assert result["set_aside"]["too long"] == 1


def test_responses_to_train_on(model, data, tmp_path, capsys):
    """The first of each prompt's samples that came to its end, token for token."""
    train = tmp_path / "train.jsonl"
    words = ["--n", "4", "--max-new-tokens", "40", "--stop", "a", "--stop", "b"]
    run(model, data, tmp_path / "out", *words, "--responses", str(train))
    rows = [json.loads(line) for line in train.read_text().splitlines()]
    tokenizer = load_tokenizer(model)
    stops = [tokenizer.eos_token_id]
    stops += [tokenizer(text, add_special_tokens=False).input_ids[0] for text in "ab"]
    samples = {row["prompt_id"]: row["records"] for row in responses(tmp_path / "out")}
    ended = {i: [r for r in own if not r["truncated"]] for i, own in samples.items()}
    assert rows
    assert [row["id"] for row in rows] == [i for i, own in ended.items() if own]
    for row in rows:
        ids = tokenizer(row["response"], add_special_tokens=False).input_ids
        sampled = ended[row["id"]][0]["response_ids"]
        # The tokenizer's own end is left out: training adds it.
        assert tokenizer.decode(ids) == tokenizer.decode(
            sampled[: -1 if sampled[-1] == stops[0] else None]
        )
        assert sampled[-1] in stops
        assert row["teacher"] == "nobody here"  # the row is as it was, but for the response
    assert f"{len(rows)} written" in capsys.readouterr().out


def test_files_of_one_name(model, data, tmp_path):
    other = tmp_path / "sums.jsonl"
    other.write_text(data.read_text())
    with pytest.raises(DataError, match="another file is called sums as well"):
        run(model, data, tmp_path / "out", "--data", str(other))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--n 0", "--n: found 0; give 1 or more"),
        ("--n 2 --temperature 0", "--n: 2 at temperature 0, where all are the same"),
        ("--n 2 --k 1,3", "--k: 1,3 with --n 2; give values from 1 to n"),
        ("--n 2 --k one", "--k: found 'one'; give numbers"),
        ("--top-p 0", r"--top-p: found 0.0; give a value in \(0, 1\]"),
        ("--top-k -1", "--top-k: found -1; give 0 or more"),
        ("--url http://a:1", "--url: given, and --engine is embedded"),
        ("--max-new-tokens 512", "--max-new-tokens: 512 leave no room for a prompt"),
        ("--correct-only", "--correct-only: given without --responses"),
        ("--responses a.jsonl --instruction boxed", "--responses: given with several --data or an"),
        ("--responses a.parquet", "--responses: a.parquet, and JSON lines are written"),
        ("--responses {data}", "--responses: .* is what is asked; name another file"),
        ("--reward mth", "--reward: no 'mth'; did you mean math"),
        ("--thinking on", "data.enable_thinking: true, and the tokenizer's chat template"),
        ("--stop two", "rollout.stop: 'two' is"),
        (
            "--engine sglang --url http://other.host:1",
            r"rollout.urls\[0\]: http://other.host:1 is not on this host",
        ),
    ],
)
def test_arguments_that_make_no_sense(model, data, tmp_path, words: str, message: str):
    with pytest.raises(MegaOPDError, match=message):
        run(model, data, tmp_path / "out", *words.format(data=data).split())
    assert not (tmp_path / "out").exists()


def test_answers_that_are_missing(model, tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"id": "a", "prompt": "x", "answer": "1"}\n{"id": "b", "prompt": "y"}\n')
    with pytest.raises(DataError, match="prompt b: has no answer, and the reward needs one; name"):
        run(model, path, tmp_path / "out", "--reward", "exact_match")
    assert not (tmp_path / "out").exists()
    run(model, path, tmp_path / "out", "--reward", "format")


def test_a_model_that_is_none(data, tmp_path):
    with pytest.raises(MegaOPDError, match="config.json"):
        run(tmp_path, data, tmp_path / "out")


@pytest.fixture
def server() -> Iterator[FakeServer]:
    loop = EventLoopThread("fake-server")
    server = FakeServer()
    loop.run(server.start())
    yield server
    loop.run(server.stop())
    loop.close()


def test_a_running_server(model, data, tmp_path, server):
    """Its weights are its own: none are sent. What it answers is what is scored."""
    where = ("--engine", "sglang", "--url", server.url)
    (result,) = run(model, data, tmp_path / "out", *where, "--n", "2")["results"]
    assert (result["num_prompts"], result["num_samples"]) == (5, 2)
    tokenizer = load_tokenizer(model)
    for row in responses(tmp_path / "out"):
        for record in row["records"]:
            prompt = tuple(tokenizer(record["prompt_text"], add_special_tokens=False).input_ids)
            assert tuple(record["response_ids"]) == response_to(prompt, 6)
    asked = len(server.requests)
    assert asked == 10
    run(model, data, tmp_path / "out", *where, "--n", "2")
    assert len(server.requests) == asked
    assert not [path for path, _ in server.told if "weights" in path]


def test_prompts_that_a_server_refuses(model, data, tmp_path, server):
    server.faults = [400]
    where = ("--engine", "sglang", "--url", server.url)
    (result,) = run(model, data, tmp_path / "out", *where)["results"]
    assert result["num_prompts"] == 4
    assert result["set_aside"]["refused by the engine"] == 1
