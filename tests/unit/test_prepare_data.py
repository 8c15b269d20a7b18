"""Prompt files from data sets: every kind in the layouts of its originals, and what is left out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megaopd.data.answers import final_answer, last_boxed, plain_number
from megaopd.data.overlap import OtherPrompts, fingerprint
from megaopd.data.preparation import Form, prepare
from megaopd.data.rows import read_rows
from megaopd.data.sources import INSTRUCTIONS, SOURCES, Example, ask, bare
from megaopd.errors import ConfigError, DataError, EnvironmentFault
from tests.helpers.data_files import read_json_lines, write_rows
from tools.prepare_data import main

DAPO = (
    "Solve the following math problem step by step. The last line of your response should be of "
    "the form Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n"
    "Find $x$.\n\nRemember to put your answer on its own line after \"Answer:\"."
)  # fmt: skip
VERL = {
    "data_source": "math_dapo",
    "prompt": [{"content": DAPO, "role": "user"}],
    "ability": "MATH",
    "reward_model": {"ground_truth": "034", "style": "rule-lighteval/MATH_v2"},
    "extra_info": {"index": "9a9b"},
}
TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
BOXED = "\nPlease reason step by step, and put your final answer within \\boxed{}."

# kind -> (a row of an original, what becomes of it); every entry of the table has its rows here.
LAYOUTS: dict[str, list[tuple[dict[str, Any], dict[str, Any]]]] = {
    "gsm8k": [
        (
            {"question": "How many?", "answer": "2+2 = <<2+2=4>>4\n#### 1,234"},
            {
                "id": "gsm8k-1",
                "prompt": "How many? Let's think step by step and output the final answer after "
                '"####".',
                "answer": "1234",
                "data_source": "gsm8k",
            },
        ),
        ({"question": "How low?", "answer": "#### -5.0"}, {"answer": "-5"}),
    ],
    "math500": [
        (
            {
                "problem": "What?",
                "solution": "so \\boxed{2}",
                "answer": "\\frac{1}{2}",
                "subject": "Algebra",
                "level": 2,
                "unique_id": "test/algebra/1.json",
            },
            {
                "id": "math500-test/algebra/1.json",
                "prompt": f"What?{BOXED}",
                "answer": "\\frac{1}{2}",
                "data_source": "math500",
            },
        ),
        (
            {
                "problem": "P",
                "level": "Level 5",
                "solution": "\\boxed{0} then \\boxed{\\frac{a}{b}}",
            },
            {"answer": "\\frac{a}{b}"},
        ),
    ],
    "dapo_math": [
        (
            VERL,
            {"id": "dapo_math-9a9b", "prompt": DAPO, "answer": "034", "data_source": "math_dapo"},
        ),
        (
            {"prompt": "Find $x$.", "solution": "34", "source_prompt": VERL["prompt"]},
            {"prompt": DAPO, "answer": "34", "data_source": "dapo_math"},
        ),
        ({"prompt": "Find $x$.", "solution": "34"}, {"prompt": DAPO}),
    ],
    "aime24": [
        (
            {"id": 60, "problem": "P", "solution": "s", "answer": "025", "url": "", "year": "2024"},
            {"id": "aime24-60", "prompt": f"P{BOXED}", "answer": "25", "data_source": "aime24"},
        ),
        (
            {"ID": "2024-II-4", "Problem": "P", "Solution": "s", "Answer": 33},
            {"id": "aime24-2024-II-4", "prompt": f"P{BOXED}", "answer": "33"},
        ),
        ({"id": 61, "problem": "P", "solution": "\\boxed{113}.", "url": ""}, {"answer": "113"}),
        (VERL, {"id": "aime24-9a9b", "prompt": f"Find $x$.{BOXED}", "answer": "34"}),
    ],
    "aime25": [
        ({"problem": "P", "answer": "70", "id": "0"}, {"id": "aime25-0", "answer": "70"}),
        ({"question": "Q", "answer": "336^\\circ"}, {"prompt": f"Q{BOXED}", "answer": "336"}),
        ({"problem_idx": 3, "problem": "P", "answer": 16}, {"id": "aime25-3", "answer": "16"}),
    ],
    "messages": [
        (
            {"messages": TURNS},
            {"id": "messages-1", "prompt": TURNS[:1], "answer": "Hello", "data_source": "messages"},
        ),
        (
            {"conversations": [{"from": "human", "value": "A"}, {"from": "gpt", "value": "B"}]},
            {"prompt": [{"role": "user", "content": "A"}], "answer": "B"},
        ),
        ({"prompt": "Say it", "answer": 3}, {"prompt": "Say it", "answer": "3"}),
        (VERL, {"id": "messages-9a9b", "prompt": DAPO, "answer": "034"}),
        ({"messages": TURNS[:1]}, {"answer": None}),
    ],
}


def run(out: Path, *argv: Any) -> list[dict[str, Any]]:
    """Runs the tool; returns the rows of its prompt file."""
    main([str(word) for word in (*argv, "--out", out)])
    return [dict(row.values) for row in read_rows(out)]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("kind", SOURCES)
def test_originals_become_prompts(tmp_path: Path, kind: str, suffix: str) -> None:
    for number, (row, expected) in enumerate(LAYOUTS[kind]):
        file = write_rows(tmp_path / f"{number}.{suffix}", [row])
        (found,) = run(tmp_path / f"out{number}.{suffix}", kind, "--in", file)
        assert set(found) == {"id", "prompt", "answer", "data_source"}
        if isinstance(expected.get("prompt"), str):
            expected = expected | {"prompt": [{"role": "user", "content": expected["prompt"]}]}
        assert {key: found[key] for key in expected} == expected


# Of every kind whose rows can hold a response: a row, and the response.
RESPONSES = {
    "gsm8k": (LAYOUTS["gsm8k"][0][0], "2+2 = <<2+2=4>>4\n#### 1,234"),
    "math500": (LAYOUTS["math500"][0][0], "so \\boxed{2}"),
    "aime24": (LAYOUTS["aime24"][0][0], "s"),
    "messages": (LAYOUTS["messages"][0][0], "Hello"),
}


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("kind", RESPONSES)
def test_responses_are_written_on_request(tmp_path: Path, kind: str, suffix: str) -> None:
    row, response = RESPONSES[kind]
    file = write_rows(tmp_path / f"in.{suffix}", [row])
    (found,) = run(tmp_path / f"out.{suffix}", kind, "--in", file, "--responses")
    assert found["response"] == response
    assert list(found) == ["id", "prompt", "answer", "data_source", "response"]


def test_a_row_without_a_response(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "in.jsonl", [LAYOUTS["dapo_math"][2][0], VERL])
    with pytest.raises(DataError, match=r"in.jsonl:1: no response of its own; leave out --respons"):
        run(tmp_path / "out.jsonl", "dapo_math", "--in", file, "--responses")
    rows = [{"messages": TURNS[:1]}, {"messages": TURNS}]
    file = write_rows(tmp_path / "chats.jsonl", rows)
    out = tmp_path / "chats_out.jsonl"
    (found,) = run(out, "messages", "--in", file, "--responses", "--on-bad", "drop")
    assert found["response"] == "Hello"
    (dropped,) = read_json_lines(tmp_path / "chats_out.jsonl.dropped.jsonl")
    assert dropped["reason"] == "unreadable"


# kind, a row, what is said of it after the file and the row.
BAD = [
    ("gsm8k", {"question": "Q", "answer": "4"}, "column 'answer' ends in no '#### NUMBER' (\"4\")"),
    ("gsm8k", {"problem": "Q", "answer": "#### 4"}, "no column 'question'; it has problem, answer"),
    ("gsm8k", {"question": " ", "answer": "#### 4"}, "an empty prompt"),
    ("gsm8k", {"question": ["Q"], "answer": "#### 4"}, "column 'question' holds [\"Q\"]"),
    ("gsm8k", {"question": "\ud800", "answer": "#### 4"}, "half of a surrogate pair in the prompt"),
    ("math500", {"problem": "P", "solution": "42"}, "column 'solution' has no \\boxed answer"),
    ("math500", {"problem": "P", "answer": True}, "column 'answer' holds true"),
    ("aime24", {"problem": "P", "answer": "1000"}, "column 'answer' has the answer \"1000\"; AIME"),
    ("aime24", {"ID": 1, "Problem": "P", "Answer": "x"}, "column 'Answer' has the answer \"x\""),
    ("aime25", {"problem": "P", "solution": "\\boxed{x}"}, "column 'solution' has the answer"),
    ("dapo_math", {"prompt": TURNS, "solution": "1"}, "holds messages of user, assistant"),
    ("dapo_math", {"prompt": "P"}, "no column 'reward_model.ground_truth', nor solution or answer"),
    ("aime24", {"problem": "P"}, "no column 'answer', nor solution; it has problem"),
    ("aime24", {"problem": None, "answer": 1}, "column 'problem' is null, nor Problem or question"),
    ("messages", {"text": "Hi"}, "no column 'messages', nor conversations or prompt; it has text"),
    ("messages", {"messages": [{"role": "user"}]}, "column 'messages', message 1: {\"role\""),
    ("messages", {"messages": TURNS[1:]}, "column 'messages' has no message of the user"),
    ("messages", {"messages": []}, "column 'messages' holds []"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "row", "message"), BAD)
def test_a_bad_row_ends_it_with_file_row_and_column(
    tmp_path: Path, kind: str, row: dict[str, Any], message: str
) -> None:
    good = LAYOUTS[kind][0][0]
    file = write_rows(tmp_path / "in.jsonl", [good, row])
    with pytest.raises(DataError) as caught:
        run(tmp_path / "out.jsonl", kind, "--in", file)
    assert str(caught.value).startswith(f"{file}:2: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_status == 3
    assert [f.name for f in tmp_path.iterdir()] == ["in.jsonl"]


def test_what_is_left_out_is_counted_and_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def row(question: str, answer: str = "#### 1") -> dict[str, str]:
        return {"question": question, "answer": answer}

    test = write_rows(tmp_path / "test.jsonl", [row("In the test?")])
    run(tmp_path / "eval.jsonl", "gsm8k", "--in", test, "--instruction", "boxed")
    train = write_rows(
        tmp_path / "train.jsonl",
        [
            row("A?"),
            row(" A?\n"),
            row("A?", "#### 2"),
            row("In  the $test$?"),
            row("B?", "none"),
            row("a?"),
        ],
    )
    out = tmp_path / "out.jsonl"
    argv = ("gsm8k", "--in", train, "--against", tmp_path / "eval.jsonl", "--on-bad", "drop")
    assert [r["id"] for r in run(out, *argv)] == ["gsm8k-1", "gsm8k-6"]
    overlap = f"in {tmp_path / 'eval.jsonl'}"
    bad = f"{train}:5: column 'answer' ends in no '#### NUMBER' (\"none\"); take GSM8K's own "
    listed = read_json_lines(tmp_path / "out.jsonl.dropped.jsonl")
    assert listed[-1].pop("error").startswith(bad)
    assert listed == [
        {"row": f"{train}:2", "reason": "duplicate", "of": f"{train}:1"},
        {
            "row": f"{train}:3",
            "reason": "duplicate with another answer",
            "of": f"{train}:1",
            "answer": "2",
            "kept_answer": "1",
        },
        {"row": f"{train}:4", "reason": overlap, "of": f"{tmp_path / 'eval.jsonl'}:1"},
        {"row": f"{train}:5", "reason": "unreadable"},
    ]
    assert capsys.readouterr().out.splitlines()[-1] == (
        f"{out}: 2 prompts from 6 rows; left out and listed in {out}.dropped.jsonl: 1 duplicate, "
        f"1 duplicate with another answer, 1 {overlap}, 1 unreadable"
    )


def test_nothing_left_out_leaves_no_list_not_even_an_older_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = LAYOUTS["aime24"][0][0]
    twice = write_rows(tmp_path / "twice.jsonl", [row, row])
    once = write_rows(tmp_path / "once.jsonl", [row])
    out = tmp_path / "out.jsonl"
    run(out, "aime24", "--in", twice)
    assert (tmp_path / "out.jsonl.dropped.jsonl").exists()
    with pytest.raises(ConfigError, match=r"out\.jsonl: exists; choose another name, or pass --ov"):
        run(out, "aime24", "--in", once)
    run(out, "aime24", "--in", once, "--overwrite")
    assert sorted(f.name for f in tmp_path.iterdir()) == ["once.jsonl", "out.jsonl", "twice.jsonl"]
    said = capsys.readouterr().out.splitlines()
    assert said[-2:] == [
        f"{out}: 1 prompts from 1 rows; nothing left out",
        "note: a complete aime24 has 30 problems",
    ]


def test_the_form_of_prompts_is_a_matter_of_options(tmp_path: Path) -> None:
    file = write_rows(
        tmp_path / "in.jsonl", [{"question": "Q?", "answer": "#### 4", "gold": "#### 5"}]
    )
    (found,) = run(
        tmp_path / "a.parquet", "gsm8k", "--in", file, "--system", "S", "--instruction", "boxed",
        "--teacher", "math", "--data-source", "school", "--answer-column", "gold",
    )  # fmt: skip
    assert found == {
        "id": "gsm8k-1",
        "prompt": [
            {"role": "system", "content": "S"},
            {"role": "user", "content": f"Q?{BOXED}"},
        ],
        "answer": "5",
        "data_source": "school",
        "teacher": "math",
    }
    (found,) = run(tmp_path / "b.parquet", "gsm8k", "--in", file, "--text", "--instruction", "none")
    assert found["prompt"] == "Q?"
    words = ["gsm8k", "--in", file, "--text", "--system", "S"]
    with pytest.raises(DataError, match=r"in\.jsonl:1: 2 messages, and plain text is asked for"):
        run(tmp_path / "c.jsonl", *words)
    with pytest.raises(DataError, match="no prompt left of 1 rows"):
        run(tmp_path / "c.jsonl", *words, "--on-bad", "drop")


def test_ids_stay_unique(tmp_path: Path) -> None:
    rows = [{"problem_idx": 1, "problem": p, "answer": 1} for p in ("P", "Q")]
    file = write_rows(tmp_path / "in.jsonl", rows)
    found = run(tmp_path / "out.jsonl", "aime25", "--in", file)
    assert [r["id"] for r in found] == ["aime25-1", "aime25-1-2"]


def test_against_takes_prompt_files_alone(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "in.jsonl", [LAYOUTS["gsm8k"][0][0]])
    with pytest.raises(DataError, match=r"in\.jsonl:1: no prompt in column 'prompt'; --against"):
        run(tmp_path / "out.jsonl", "gsm8k", "--in", file, "--against", file)


def test_an_error_on_the_way_leaves_nothing(tmp_path: Path) -> None:
    def rows() -> Any:
        yield from ()
        raise DataError("here", "broken", "mend it")

    with pytest.raises(DataError, match="broken"):
        prepare(rows(), Form("x", "none"), tmp_path / "out.parquet")
    with pytest.raises(DataError, match=r"out\.jsonl: no prompt left of 0 rows"):
        prepare([], Form("x", "none"), tmp_path / "out.jsonl")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("instruction", INSTRUCTIONS)
def test_an_instruction_comes_off_again(instruction: str) -> None:
    assert bare(ask("What is {x}?", instruction)) == "What is {x}?"


SAME = [("a  b", "a b "), ("$x$ is", "x is"), ("caf\u00e9", "cafe\u0301"), ("1\\,000", "1 000")]
OTHER = [("3 + 5", "3 - 5"), ("1 23", "12 3"), ("x\u00b2", "x2"), ("a", "A"), ("x=1", "x=2")]


@pytest.mark.parametrize(("one", "two"), SAME)
def test_prompts_that_ask_the_same(one: str, two: str) -> None:
    system = {"role": "system", "content": "S"}
    asked = {"role": "user", "content": ask(two, "boxed")}
    assert fingerprint(one) == fingerprint([system, asked])


@pytest.mark.parametrize(("one", "two"), OTHER)
def test_prompts_that_do_not(one: str, two: str) -> None:
    assert fingerprint(one) != fingerprint(two)


def test_words_in_a_row_are_found(tmp_path: Path) -> None:
    """A problem that is quoted within another, or ends otherwise, is one of the other file's."""
    theirs = "A train leaves at 8:00, drives 60 km/h. How far is it at ten?"
    path = write_rows(tmp_path / "eval.jsonl", [{"prompt": theirs}, {"prompt": "Short?"}])
    others = OtherPrompts([path], ngram=8)
    quoted = f"Solve: {theirs.replace(',', ' -').upper()} And then?"
    assert others.find(quoted) == ("overlaps with", str(path), f"{path}:1")
    assert others.find(theirs) == ("in", str(path), f"{path}:1")
    assert others.find("A train leaves at 8:00, drives 61 km/h.") is None  # 7 words, and another
    assert others.find("So short? Short?") is None
    assert OtherPrompts([path]).find(quoted) is None

    rows = [{"question": q, "answer": "#### 1"} for q in (quoted, theirs, "Another one?")]
    file = write_rows(tmp_path / "in.jsonl", rows)
    out = tmp_path / "out.jsonl"
    found = run(out, "gsm8k", "--in", file, "--against", path, "--ngram", "8")
    assert [row["id"] for row in found] == ["gsm8k-3"]
    dropped = read_json_lines(tmp_path / "out.jsonl.dropped.jsonl")
    assert [row["reason"] for row in dropped] == [f"overlaps with {path}", f"in {path}"]
    for words in (["--ngram", "8"], ["--against", path, "--ngram", "-1"]):
        with pytest.raises(ConfigError, match="--ngram: "):
            run(out, "gsm8k", "--in", file, *words)


ANSWERS = [
    ("\\boxed{1} and \\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
    ("\\boxed{1} and \\boxed{2", "1"),
    ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
    ("\\boxed{a\\boxed{b}}", "b"),
    ("} \\fbox{3} {", "3"),
    ("Answer: 3\nAnswer: $4$.", "4"),
    ("**Answer:** 5", "5"),
    ("The answer: 6", None),
    ("Answer:\n7", None),
    ("work #### $1,200.50 left", "1200.5"),
    ("Answer: 1 \\boxed{2}", "2"),
    ("<think>\\boxed{1}</think>\\boxed{2}", "2"),
    ("<think>\\boxed{1}", None),
    ("<think>\\boxed{1}</think> so it is", None),
    ("42", None),
]


@pytest.mark.parametrize(("text", "answer"), ANSWERS)
def test_where_a_response_says_its_answer(text: str, answer: str | None) -> None:
    assert final_answer(text) == answer


@pytest.mark.parametrize("unit", ["\\boxed{", "{", "\\", "answer:", "####", "<think>", "Answer: $"])
def test_a_hostile_text_costs_no_more_than_its_length(unit: str) -> None:
    text = unit * (300_000 // len(unit))
    assert last_boxed(text) is None
    # Beyond the time: a line that says "Answer:" again and again says just that.
    assert (final_answer(text) or "") in text


@pytest.mark.parametrize(
    ("text", "number"),
    [("007", "7"), ("-0.50 m", "-0.5"), ("$3", "3"), (".5", "0.5"), ("-0", "0"), ("x", None)],
)
def test_plain_numbers(text: str, number: str | None) -> None:
    assert plain_number(text) == number


@pytest.mark.slow
def test_generated_problems_carry_what_scores_them(tmp_path: Path) -> None:
    pytest.importorskip("reasoning_gym")
    argv = ("reasoning_gym", "--task", "chain_sum=3", "--task", "countdown", "--size", "2")
    found = run(tmp_path / "a.jsonl", *argv, "--seed", 7)
    assert [r["data_source"] for r in found] == ["chain_sum"] * 3 + ["countdown"] * 2
    assert [r["id"] for r in found[2:4]] == [
        "reasoning_gym-chain_sum-2",
        "reasoning_gym-countdown-0",
    ]
    assert found[0]["prompt"][0]["content"].endswith("alone between <answer> and </answer>.")
    known = json.loads(found[0]["answer"])
    assert set(known) == {"task", "answer", "metadata"}
    assert run(tmp_path / "b.jsonl", *argv, "--seed", 7) == found
    assert run(tmp_path / "c.jsonl", *argv, "--seed", 8) != found


@pytest.mark.slow
def test_tasks_are_known_before_they_are_generated(tmp_path: Path) -> None:
    pytest.importorskip("reasoning_gym")
    with pytest.raises(ConfigError, match="no task 'chainsum' in reasoning-gym; did you mean"):
        run(tmp_path / "a.jsonl", "reasoning_gym", "--task", "chainsum")
    with pytest.raises(ConfigError, match="--task: none; name the tasks"):
        run(tmp_path / "a.jsonl", "reasoning_gym")
    with pytest.raises(ConfigError, match="write NAME=NUMBER"):
        run(tmp_path / "a.jsonl", "reasoning_gym", "--task", "chain_sum=0")


def test_without_the_package_its_extra_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "reasoning_gym", None)
    with pytest.raises(EnvironmentFault, match=r"pip install 'megaopd\[reasoning_gym\]'"):
        run(tmp_path / "a.jsonl", "reasoning_gym", "--task", "chain_sum")


def test_help_teaches_every_kind(capsys: pytest.CaptureFixture[str]) -> None:
    for kind, source in SOURCES.items():
        with pytest.raises(SystemExit):
            main([kind, "--help"])
        said = capsys.readouterr().out
        assert source.about in said
        assert all(columns in said for _, columns in source.layouts)


def test_an_example_of_a_new_kind_is_one_entry(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megaopd.data.sources import Source

    new = Source("mine", (("mine", "q, a"),), "none", lambda row, _: Example(row.get("q"), "1"))
    monkeypatch.setitem(SOURCES, "mine", new)
    file = write_rows(tmp_path / "in.jsonl", [{"q": "Q"}])
    (found,) = run(tmp_path / "out.jsonl", "mine", "--in", file)
    assert found["prompt"] == [{"role": "user", "content": "Q"}]
