"""Tokenizers: loading, comparing, and the tokens that end a response."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from megaopd.data.tokenizer import check_same_tokenizer, load_tokenizer, stop_token_ids
from megaopd.errors import ConfigError

WORDS = ["<unk>", "<eos>", "a", "b", "c"]


def save(path: Path, words: Sequence[str] = WORDS, special: Sequence[str] = ()) -> Path:
    model = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    model.add_special_tokens(list(special))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=model, unk_token="<unk>", eos_token="<eos>"
    )
    tokenizer.save_pretrained(path)
    return path


def test_a_tokenizer_is_loaded_from_its_directory(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(save(tmp_path / "t"))
    assert tokenizer("a c")["input_ids"] == [2, 4]


def test_a_missing_or_broken_tokenizer_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere: there is no such directory"):
        load_tokenizer(tmp_path / "nowhere")
    broken = save(tmp_path / "broken")
    (broken / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match="broken: no tokenizer that can be read") as caught:
        load_tokenizer(broken)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "theirs",
    [
        WORDS,
        [*WORDS, "<|extra_0|>", "<|extra_1|>"],
        [*WORDS, "[PAD5]"],
        [*WORDS, "<unused0>"],
    ],
)
def test_the_same_vocabulary_passes_padding_aside(tmp_path: Path, theirs: list[str]) -> None:
    one, other = save(tmp_path / "one"), save(tmp_path / "other", theirs)
    check_same_tokenizer(one, other)
    check_same_tokenizer(other, one)


def test_more_rows_in_a_model_are_no_difference(tmp_path: Path) -> None:
    one, other = save(tmp_path / "one"), save(tmp_path / "other")
    (one / "config.json").write_text('{"model_type": "llama", "vocab_size": 5}')
    (other / "config.json").write_text('{"model_type": "llama", "vocab_size": 64}')
    check_same_tokenizer(one, other)


@pytest.mark.parametrize(
    ("theirs", "message"),
    [
        (["<unk>", "<eos>", "b", "a", "c"], "at id 2: 'a' in the student's, 'b' in the teacher's"),
        ([*WORDS[:4], "d"], "at id 4: 'c' in the student's, 'd' in the teacher's"),
        (WORDS[:4], "at id 4: 'c' in the student's, nothing in the teacher's"),
        ([*WORDS, "<think>"], "at id 5: nothing in the student's, '<think>' in the teacher's"),
    ],
)
def test_the_first_differing_id_is_named(tmp_path: Path, theirs: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_same_tokenizer(save(tmp_path / "one"), save(tmp_path / "other", theirs))
    assert message in str(caught.value)
    assert caught.value.exit_status == 2


def test_added_special_tokens_are_compared_too(tmp_path: Path) -> None:
    one = save(tmp_path / "one", special=["<|start|>"])
    other = save(tmp_path / "other", special=["<|begin|>"])
    with pytest.raises(ConfigError, match=r"at id 5: '<\|start\|>' in the student's, '<\|begin"):
        check_same_tokenizer(one, other)


@pytest.mark.parametrize(
    ("files", "stop", "expected"),
    [
        ({}, [], (1,)),
        ({"config.json": {"eos_token_id": 4}}, [], (4, 1)),
        ({"config.json": {"eos_token_id": 4}, "generation_config.json": {}}, [], (4, 1)),
        (
            {
                "config.json": {"eos_token_id": 4},
                "generation_config.json": {"eos_token_id": [1, 3]},
            },
            [],
            (1, 3),
        ),
        ({}, ["b", "a", "b"], (1, 3, 2)),
        ({"config.json": {"eos_token_id": None}}, ["<eos>"], (1,)),
    ],
)
def test_stop_tokens_are_the_models_own_and_the_configured(
    tmp_path: Path, files: dict[str, dict], stop: list[str], expected: tuple[int, ...]
) -> None:
    tokenizer = load_tokenizer(save(tmp_path / "t"))
    for name, content in files.items():
        (tmp_path / "t" / name).write_text(json.dumps(content))
    assert stop_token_ids(tokenizer, tmp_path / "t", stop) == expected


def test_a_stop_string_of_several_tokens_is_refused(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(save(tmp_path / "t"))
    with pytest.raises(ConfigError, match=r"rollout.stop: 'a b' is 2 tokens \('a', 'b'\)"):
        stop_token_ids(tokenizer, tmp_path / "t", ["c", "a b"])
    with pytest.raises(ConfigError, match=r"rollout\.stop: '' is 0 tokens"):
        stop_token_ids(tokenizer, tmp_path / "t", [""])


@pytest.mark.parametrize("text", ["{", "[]", '{"eos_token_id": "x"}'])
def test_a_broken_generation_config_is_named(tmp_path: Path, text: str) -> None:
    tokenizer = load_tokenizer(save(tmp_path / "t"))
    (tmp_path / "t" / "generation_config.json").write_text(text)
    with pytest.raises(ConfigError, match=r"generation_config\.json: not a JSON object"):
        stop_token_ids(tokenizer, tmp_path / "t", [])
