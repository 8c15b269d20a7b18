"""The data set's own responses, as tokens, and an evaluation's responses as a data set."""

from __future__ import annotations

import json

import pytest

from megaopd.config import DataConfig
from megaopd.data.prompts import load_prompts
from megaopd.data.responses import ResponseForm
from megaopd.errors import DataError
from megaopd.evaluation.scoring import EvalRecord
from megaopd.evaluation.training_data import write_responses
from tests.helpers.data_files import write_rows
from tests.helpers.tiny_models import tiny_tokenizer

TOKENIZER = tiny_tokenizer(512)
EOS = TOKENIZER.eos_token_id
FORM = ResponseForm("solution", (EOS,), max_tokens=6)


def ids(text: str) -> tuple[int, ...]:
    return tuple(TOKENIZER(text, add_special_tokens=False).input_ids)


def read(tmp_path, *rows, form=FORM, **config):
    path = write_rows(tmp_path / "p.jsonl", list(rows))
    return load_prompts(path, DataConfig(**config), TOKENIZER, responses=form)


def test_the_end_is_added_once(tmp_path):
    found = read(
        tmp_path,
        {"id": "open", "prompt": "x", "solution": "abc"},
        {"id": "ended", "prompt": "x", "solution": f"abc{TOKENIZER.eos_token}"},
        {"id": "number", "prompt": "x", "solution": 42},
        {"id": "cut", "prompt": "x", "solution": "a b c d e f g h"},
    )
    assert found.responses["open"] == found.responses["ended"] == (*ids("abc"), EOS)
    assert found.responses["number"] == (*ids("42"), EOS)
    # A response that is cut has no end: that the text stops there is not to be learned.
    assert found.responses["cut"] == ids("a b c d e f g h")[:6]
    assert EOS not in found.responses["cut"]


def test_a_stop_of_the_run_ends_a_response(tmp_path):
    (stop,) = ids("\n")
    form = ResponseForm("solution", (stop, EOS), max_tokens=9)
    rows = [
        {"id": "a", "prompt": "x", "solution": "ab\n"},
        {"id": "b", "prompt": "x", "solution": "ab"},
    ]
    found = read(tmp_path, *rows, form=form)
    assert found.responses == {"a": ids("ab\n"), "b": (*ids("ab"), EOS)}


@pytest.mark.parametrize("messages", [False, True])
def test_columns_may_be_nested_and_prompts_messages(tmp_path, messages: bool):
    prompt = [{"role": "user", "content": "x"}] if messages else "x"
    form = ResponseForm("extra.solution", (EOS,), 9)
    found = read(tmp_path, {"id": "a", "prompt": prompt, "extra": {"solution": "ab"}}, form=form)
    assert found.responses == {"a": (*ids("ab"), EOS)}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, "p.jsonl:1: no column 'solution'; it has prompt; set data.response_column"),
        ({"solution": None}, "p.jsonl:1: column 'solution' is null; set data.response_column"),
        ({"solution": ""}, "p.jsonl:1: column 'solution' holds \"\"; write the response as text"),
        ({"solution": ["a"]}, "column 'solution' holds .*; write the response as text"),
        ({"solution": True}, "column 'solution' holds true"),
        ({"solution": "\ud800"}, "p.jsonl:1: half of a surrogate pair"),
    ],
)
def test_what_is_no_response(tmp_path, row, message: str):
    with pytest.raises(DataError, match=message):
        read(tmp_path, {"prompt": "x", **row})


def test_nobody_reads_responses_that_are_not_asked_for(tmp_path):
    assert read(tmp_path, {"prompt": "x"}, form=None).responses == {}


def record(prompt_id: str, text: str, correct: bool, cut: bool = False, index: int = 0):
    tokens = ids(text) if cut else (*ids(text), EOS)
    return EvalRecord(prompt_id, "x", "7", text, tokens, correct, float(correct), cut, index)


RECORDS = {
    "a": [record("a", "wrong", False), record("a", "right", True, index=1)],
    "b": [record("b", "cut", True, cut=True), record("b", "ended <pad> so", False, index=1)],
    "c": [record("c", "cut", False, cut=True)],
    "d": [],
}


@pytest.mark.parametrize(
    ("correct_only", "expected", "became"),
    [
        (
            False,
            {"a": "wrong", "b": "ended <pad> so"},
            {"written": 2, "none came to an end": 2, "not asked": 1},
        ),
        (
            True,
            {"a": "right"},
            {"written": 1, "none correct": 1, "none came to an end": 2, "not asked": 1},
        ),
    ],
)
def test_responses_become_data(tmp_path, correct_only: bool, expected, became):
    """What is written and read again is, token for token, what was sampled."""
    rows = [
        {"id": i, "prompt": "x", "answer": "7", "more": [1], "response": "old"} for i in "abcde"
    ]
    data = write_rows(tmp_path / "asked.jsonl", rows)
    out = tmp_path / "train.jsonl"
    found = write_responses(
        out, str(data), "id", RECORDS, TOKENIZER, (EOS,), correct_only=correct_only
    )
    assert dict(found) == became
    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert {row["id"]: row["response"] for row in written} == expected
    assert all(row["more"] == [1] and row["answer"] == "7" for row in written)
    form = ResponseForm("response", (EOS,), 99)
    again = load_prompts(out, DataConfig(), TOKENIZER, responses=form).responses
    sampled = {r.response_text: r.response_ids for own in RECORDS.values() for r in own}
    assert again == {prompt_id: sampled[text] for prompt_id, text in expected.items()}


def test_an_end_of_the_runs_own_stays_one(tmp_path):
    """A teacher that ended its line is not taught on as one that ended its turn."""
    (stop,) = ids("\n")
    stops = (EOS, stop)
    rows = [{"id": i, "prompt": "x"} for i in "ab"]
    records = {
        "a": [EvalRecord("a", "x", None, "A B", (*ids("A B"), stop), True, 1.0, False)],
        "b": [EvalRecord("b", "x", None, "A B", (*ids("A B"), EOS), True, 1.0, False)],
    }
    data, out = write_rows(tmp_path / "asked.jsonl", rows), tmp_path / "train.jsonl"
    write_responses(out, str(data), "id", records, TOKENIZER, stops, correct_only=False)
    again = load_prompts(
        out, DataConfig(), TOKENIZER, responses=ResponseForm("response", stops, 99)
    ).responses
    assert again == {name: own[0].response_ids for name, own in records.items()}


def test_nothing_to_train_on_leaves_the_file_as_it_was(tmp_path):
    data, out = write_rows(tmp_path / "asked.jsonl", [{"id": "c", "prompt": "x"}]), tmp_path / "t"
    out.write_text("before")
    with pytest.raises(DataError, match="no response to write: 1 none came to an end; raise --n"):
        write_responses(out, str(data), "id", RECORDS, TOKENIZER, (EOS,), correct_only=False)
    assert out.read_text() == "before"
