"""Prompt files and the order of drawing from them."""

from __future__ import annotations

import json
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megaopd.batch import Prompt
from megaopd.config import DataConfig
from megaopd.data.prompts import PromptStream, load_prompts
from megaopd.errors import CheckpointError, ConfigError, DataError
from tests.helpers.data_files import write_rows

WORDS = ["<unk>", "<user>", "<assistant>", "one", "two", "three", "four", "system"]
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "<{{ m.role }}> {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    model = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=model, unk_token="<unk>", chat_template=TEMPLATE
    )


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join(f"{r if isinstance(r, str) else json.dumps(r)}\n" for r in rows))
    return path


def test_rows_become_prompts(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    file = write(
        tmp_path / "p.jsonl",
        {"id": "x", "prompt": "one two", "answer": "three"},
        "",
        {"prompt": "two", "answer": 4},
        {"id": 7, "prompt": [{"role": "user", "content": "three"}], "answer": None},
    )
    found = load_prompts(file, DataConfig(), tokenizer)
    assert found.prompts == (
        Prompt("x", (3, 4), "three"),
        Prompt("3", (4,), "4"),
        Prompt("7", (1, 5, 2), None),
    )
    assert found.num_overlong == 0


def test_the_chat_template_wraps_strings_on_request(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    file = write(tmp_path / "p.jsonl", {"q": "one two"})
    config = DataConfig(prompt_column="q", chat_template=True)
    assert load_prompts(file, config, tokenizer).prompts[0].token_ids == (1, 3, 4, 2)


def test_overlong_prompts_are_set_aside_and_counted(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    file = write(tmp_path / "p.jsonl", *({"prompt": "one " * n} for n in (1, 3, 2, 4)))
    found = load_prompts(file, DataConfig(max_prompt_tokens=2), tokenizer)
    assert [p.prompt_id for p in found.prompts] == ["1", "3"]
    assert found.num_overlong == 2


def test_a_row_may_name_its_teacher_and_what_that_one_sees(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    file = write(
        tmp_path / "p.jsonl",
        {"prompt": "one", "hint": "two one", "teacher": "math"},
        {"prompt": "one", "hint": [{"role": "user", "content": "three"}]},
        {"prompt": "one", "hint": "four", "teacher": None},
    )
    config = DataConfig(teacher_prompt_column="hint")
    assert load_prompts(file, config, tokenizer, ("", "math")).prompts == (
        Prompt("1", (3,), teacher="math", teacher_token_ids=(4, 3)),
        Prompt("2", (3,), teacher_token_ids=(1, 5, 2)),
        Prompt("3", (3,), teacher_token_ids=(6,)),
    )


def test_a_prompt_that_is_too_long_for_the_teacher_is_set_aside(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    file = write(tmp_path / "p.jsonl", *({"prompt": "one", "hint": "one " * n} for n in (2, 3)))
    config = DataConfig(teacher_prompt_column="hint", max_prompt_tokens=2)
    found = load_prompts(file, config, tokenizer)
    assert [p.prompt_id for p in found.prompts] == ["1"]
    assert found.num_overlong == 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": "one", "hint": "two", "teacher": "art"},
            "p.jsonl:2: column 'teacher' names the teacher \"art\"; there are 'code', 'math'; "
            "enter it under teachers",
        ),
        ({"prompt": "one", "hint": "two", "teacher": ["math"]}, "p.jsonl:2: column 'teacher'"),
        ({"prompt": "one"}, "p.jsonl:2: no column 'hint'; it has prompt; set data.teacher_prompt"),
        ({"prompt": "one", "hint": ""}, "p.jsonl:2: an empty prompt in column 'hint'"),
        ({"prompt": "one", "hint": 1}, "p.jsonl:2: column 'hint' holds 1"),
    ],
)
def test_bad_teachers_and_their_prompts_are_named_with_their_line(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, row: dict[str, Any], message: str
) -> None:
    file = write(tmp_path / "p.jsonl", {"prompt": "one", "hint": "two", "teacher": "math"}, row)
    config = DataConfig(teacher_prompt_column="hint")
    with pytest.raises(DataError) as caught:
        load_prompts(file, config, tokenizer, {"": 0, "math": 1, "code": 2})
    assert message in str(caught.value)
    assert caught.value.exit_status == 3


GOOD = {"id": "a", "prompt": "one"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([GOOD, "{bad"], "p.jsonl:2: not valid JSON (Expecting property name"),
        ([GOOD, "[1]"], "p.jsonl:2: a JSON list, not an object"),
        ([GOOD, {"text": "one", "n": 1}], "p.jsonl:2: no column 'prompt'; it has text, n"),
        ([GOOD, {"prompt": ""}], "p.jsonl:2: an empty prompt"),
        ([GOOD, {"prompt": " \n"}], "p.jsonl:2: an empty prompt"),
        ([GOOD, {"prompt": []}], "p.jsonl:2: an empty prompt"),
        ([GOOD, {"prompt": 3}], "p.jsonl:2: column 'prompt' holds 3"),
        ([GOOD, {"prompt": "\ud800"}], "p.jsonl:2: half of a surrogate pair"),
        ([GOOD, "", GOOD], "p.jsonl:1; make column 'id' unique"),
        ([{"id": "2", "prompt": "one"}, {"prompt": "one"}], "p.jsonl:2: id '2' is taken by "),
        ([{"id": True, "prompt": "one"}], "p.jsonl:1: column 'id' holds true"),
        ([{"prompt": "one", "answer": ["a"]}], "p.jsonl:1: column 'answer' holds [\"a\"]"),
        ([{"prompt": ["one"]}], 'p.jsonl:1: the message "one"'),
        ([{"prompt": [{"role": "user"}]}], 'p.jsonl:1: the message {"role": "user"}'),
        (
            [{"prompt": [{"role": "tool", "content": "x"}]}],
            "p.jsonl:1: the chat template refuses the messages (no tools)",
        ),
        ([], "p.jsonl: no prompt in it"),
        ([{"prompt": "one " * 99}], "p.jsonl: all 1 prompts are longer than 9 tokens"),
    ],
)
def test_bad_files_are_named_with_their_line(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, rows: list[Any], message: str
) -> None:
    file = write(tmp_path / "p.jsonl", *rows)
    with pytest.raises(DataError) as caught:
        load_prompts(file, DataConfig(max_prompt_tokens=9), tokenizer)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_status == 3


def test_unreadable_files_are_named(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match=r"none\.jsonl: No such file"):
        load_prompts(tmp_path / "none.jsonl", DataConfig(), tokenizer)
    latin = tmp_path / "latin.jsonl"
    latin.write_bytes(b'{"prompt": "one"}\n{"prompt": "caf\xe9"}\n')
    with pytest.raises(DataError, match=r"latin\.jsonl:2: not UTF-8"):
        load_prompts(latin, DataConfig(), tokenizer)


VERL = {
    "data_source": "math_dapo",
    "prompt": [{"role": "user", "content": "one two"}],
    "reward_model": {"ground_truth": "34", "style": "rule"},
    "extra_info": {"index": "x-1"},
}


@pytest.mark.parametrize("name", ["p.parquet", "p.jsonl", "directory"])
def test_verls_layout_is_read_by_dotted_columns(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, name: str
) -> None:
    path = tmp_path / name
    write_rows(path / "train-00000-of-00001.parquet" if name == "directory" else path, [VERL])
    config = DataConfig(
        answer_column="reward_model.ground_truth",
        id_column="extra_info.index",
        teacher_column="data_source",
    )
    found = load_prompts(path, config, tokenizer, ("", "math_dapo"))
    assert found.prompts == (Prompt("x-1", (1, 3, 4, 2), "34", "math_dapo"),)


def test_fields_that_parquet_adds_to_messages_do_not_reach_the_template(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    strict = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer,
        chat_template="{% for m in messages %}{{ m | length }}{{ m.content }}{% endfor %}",
    )
    file = write(
        tmp_path / "p.jsonl", {"prompt": [{"role": "user", "content": " one", "name": None}]}
    )
    assert load_prompts(file, DataConfig(), strict).prompts[0].token_ids == (0, 3)


THINKING = "{{ '<assistant>' if enable_thinking is defined and not enable_thinking else 'two' }}"


@pytest.mark.parametrize(("value", "ids"), [(None, (4,)), (True, (4,)), (False, (2,))])
def test_thinking_is_switched_by_the_template(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, value: bool | None, ids: tuple[int, ...]
) -> None:
    thinking = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer.backend_tokenizer, chat_template=THINKING
    )
    file = write(tmp_path / "p.jsonl", {"prompt": [{"role": "user", "content": "one"}]})
    config = DataConfig(enable_thinking=value)
    assert load_prompts(file, config, thinking).prompts[0].token_ids == ids


def test_a_template_without_thinking_refuses_the_switch(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    file = write(tmp_path / "p.jsonl", GOOD)
    with pytest.raises(ConfigError, match=r"data\.enable_thinking: false, and the tokenizer"):
        load_prompts(file, DataConfig(enable_thinking=False), tokenizer)


def test_messages_need_a_chat_template(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    plain = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    file = write(tmp_path / "p.jsonl", {"prompt": [{"role": "user", "content": "one"}]})
    with pytest.raises(DataError, match="the tokenizer has no chat template"):
        load_prompts(file, DataConfig(), plain)


PROMPTS = [Prompt(str(i), (i,)) for i in range(10)]


def flat(draws: list[list[str]]) -> list[str]:
    return list(chain.from_iterable(draws))


def draw(stream: PromptStream, num: int, times: int) -> list[list[str]]:
    return [[p.prompt_id for p in stream.next(num)] for _ in range(times)]


def test_every_epoch_holds_every_prompt_once_in_its_own_order() -> None:
    stream = PromptStream(PROMPTS, seed=1)
    epochs = [tuple(flat(draw(stream, 5, 2))) for _ in range(3)]
    assert all(sorted(epoch) == sorted(str(i) for i in range(10)) for epoch in epochs)
    assert len(set(epochs)) == 3


def test_the_seed_decides_the_order() -> None:
    first, same, other = (PromptStream(PROMPTS, seed) for seed in (1, 1, 2))
    order = draw(first, 4, 7)
    assert draw(same, 4, 7) == order
    assert draw(other, 4, 7) != order


def test_without_shuffling_the_order_is_the_files() -> None:
    stream = PromptStream(PROMPTS, seed=1, shuffle=False)
    assert flat(draw(stream, 4, 5)) == [str(i) for i in range(10)] * 2


@pytest.mark.parametrize("num", [3, 7, 9, 10])
def test_a_draw_never_repeats_a_prompt_and_none_is_favoured(num: int) -> None:
    stream = PromptStream(PROMPTS, seed=3)
    draws = draw(stream, num, 60)
    assert all(len(set(d)) == num for d in draws)
    counts = Counter(flat(draws))
    # After any number of draws the prompts differ by an epoch, and by one that waits.
    assert max(counts.values()) - min(counts[str(i)] for i in range(10)) <= 2


@pytest.mark.parametrize("num", [3, 7])
def test_a_stream_resumes_where_it_was(num: int) -> None:
    stream = PromptStream(PROMPTS, seed=5)
    for _ in range(11):
        stream.next(num)
        state = json.loads(json.dumps(stream.state_dict()))
        resumed = PromptStream(PROMPTS, seed=5)
        resumed.load_state_dict(state)
        twin = PromptStream(PROMPTS, seed=5)
        twin.load_state_dict(state)
        assert draw(resumed, num, 5) == draw(twin, num, 5)
    expected = draw(stream, num, 4)
    late = PromptStream(PROMPTS, seed=5)
    late.load_state_dict(state)
    assert draw(late, num, 4) == expected


def test_the_order_of_an_epoch_does_not_depend_on_the_way_there() -> None:
    orders = []
    for num in (1, 2, 5, 10):
        stream = PromptStream(PROMPTS, seed=9)
        orders.append(flat(draw(stream, num, 30 // num))[20:])
    late = PromptStream(PROMPTS, seed=9)
    late.load_state_dict(late.state_dict() | {"epoch": 2})
    assert orders == [flat(draw(late, 10, 1))] * 4


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (PromptStream(PROMPTS[1:], 1), "the prompts of data.train changed"),
        (PromptStream(PROMPTS, 2), "run.seed changed"),
        (PromptStream(PROMPTS, 1, shuffle=False), "data.shuffle changed"),
    ],
)
def test_a_position_in_something_else_is_refused(other: PromptStream, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        other.load_state_dict(PromptStream(PROMPTS, 1).state_dict())


def test_a_step_larger_than_the_file_is_refused() -> None:
    with pytest.raises(DataError, match="10 usable prompts, and a step needs 11 different ones"):
        PromptStream(PROMPTS, 1).next(11)
