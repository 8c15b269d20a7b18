"""Prompt files: reading, checking, tokenizing, and the order in which training draws from them.

Every rank reads the same file and draws the same prompts; nothing here communicates.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from megaopd.batch import Prompt
from megaopd.config import DataConfig
from megaopd.data.responses import ResponseForm
from megaopd.data.rows import Row, excerpt, read_rows
from megaopd.data.tokenizer import template_options
from megaopd.data.tool_template import ToolTemplate
from megaopd.errors import CheckpointError, DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class PromptSet:
    """The usable prompts of a file.

    Attributes:
        prompts: in the file's order.
        num_overlong: prompts longer than data.max_prompt_tokens, set aside.
        responses: the data set's own, by prompt id, where they were asked for.
    """

    prompts: tuple[Prompt, ...]
    num_overlong: int
    responses: Mapping[str, tuple[int, ...]] = field(default_factory=dict)


def load_prompts(
    path: str | Path,
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    teachers: Collection[str] | None = ("",),
    tools: ToolTemplate | None = None,
    *,
    reword: Callable[[str], str] | None = None,
    responses: ResponseForm | None = None,
) -> PromptSet:
    """Reads prompts from a JSONL or parquet file, or from a directory of them.

    A prompt is a string, or a list of ``{"role": ..., "content": ...}`` messages, which goes
    through the chat template; so is the one that the teacher sees, where data.teacher_prompt_column
    names it. An answer may be a string or a number.

    Args:
        teachers: the names that the column of teachers may hold; the empty one is that of the
            run's one `teacher`, where the column is missing. None: nobody is asked for.
        tools: offers tools in every prompt that goes through the chat template.
        reword: what becomes of the user's last message, or of a string prompt; the teacher's prompt
            is not touched.
        responses: where the data set's own responses stand; None does not read them.

    Raises:
        DataError: a row that cannot be read, a missing or wrong column, an empty prompt, an id met
            before, a teacher that there is not (all with file and row); no file, no prompt, or only
            overlong ones.
        ConfigError: data.enable_thinking is set and the chat template does not read it.
    """
    prompts: list[Prompt] = []
    given: dict[str, tuple[int, ...]] = {}
    row_of_id: dict[str, str] = {}
    num_overlong = 0
    options = template_options(config, tokenizer)
    for row in read_rows(path):
        where = row.where
        prompt_id = _scalar(row.get(config.id_column, row.number), config.id_column, where)
        if prompt_id in row_of_id:
            raise DataError(
                where,
                f"id {prompt_id!r} is taken by {row_of_id[prompt_id]}",
                f"make column {config.id_column!r} unique",
            )
        row_of_id[prompt_id] = where
        token_ids = _token_ids(row, "prompt_column", config, tokenizer, tools, options, reword)
        teacher_token_ids = None
        if config.teacher_prompt_column:
            teacher_token_ids = _token_ids(
                row, "teacher_prompt_column", config, tokenizer, tools, options
            )
        answer = row.get(config.answer_column)
        teacher = "" if teachers is None else _teacher(row, config.teacher_column, teachers)
        if responses is not None:
            given[prompt_id] = responses.read(row, tokenizer)
        if max(len(token_ids), len(teacher_token_ids or ())) > config.max_prompt_tokens:
            num_overlong += 1
            continue
        prompts.append(
            Prompt(
                prompt_id,
                token_ids,
                None if answer is None else _scalar(answer, config.answer_column, where),
                teacher,
                teacher_token_ids,
            )
        )
    if not row_of_id:
        raise DataError(str(path), "no prompt in it", "write one row for each prompt")
    if not prompts:
        raise DataError(
            str(path),
            f"all {num_overlong} prompts are longer than {config.max_prompt_tokens} tokens",
            "raise data.max_prompt_tokens",
        )
    return PromptSet(tuple(prompts), num_overlong, given)


def _scalar(value: Any, column: str, where: str) -> str:
    """An id or an answer as text."""
    if isinstance(value, bool) or not isinstance(value, str | int | float) or value == "":
        found = f"column {column!r} holds {excerpt(value)}"
        raise DataError(where, found, "write a string or a number")
    return str(value)


def _teacher(row: Row, column: str, teachers: Collection[str]) -> str:
    """The teacher that the row is routed to."""
    name = row.get(column)
    if name is None:
        name = ""
    if not isinstance(name, str) or name not in teachers:
        known = ", ".join(sorted(repr(t) for t in teachers if t)) or "none"
        raise row.error(
            f"column {column!r} names the teacher {excerpt(name)}; there are {known}",
            "enter it under teachers, or set data.teacher_column",
        )
    return name


def _token_ids(
    row: Row,
    key: Literal["prompt_column", "teacher_prompt_column"],
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    tools: ToolTemplate | None,
    options: Mapping[str, Any],
    reword: Callable[[str], str] | None = None,
) -> tuple[int, ...]:
    """The prompt in the column that the configuration's `key` names."""
    column, where = getattr(config, key), row.where
    value = row.get(column)
    if value is None:
        raise row.missing(column, f"set data.{key}")
    if not isinstance(value, str | list):
        found = f"column {column!r} holds {excerpt(value)}"
        raise DataError(where, found, "write a string or a list of messages")
    if not value or (isinstance(value, str) and not value.strip()):
        raise DataError(where, f"an empty prompt in column {column!r}", "remove the line")
    if reword is not None:
        value = _reworded(value, reword)
    messages = value if isinstance(value, list) else [{"role": "user", "content": value}]
    if isinstance(value, list) or config.chat_template:
        # The template writes the special tokens itself.
        text, add_special_tokens = _render(messages, tokenizer, tools, options, where), False
    else:
        text, add_special_tokens = value, True
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(where, "half of a surrogate pair", "mend the text's encoding") from error
    token_ids = tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
    if not token_ids:
        raise DataError(where, "a prompt of no tokens", "remove the line")
    return tuple(token_ids)


def _reworded(value: str | list[Any], reword: Callable[[str], str]) -> str | list[Any]:
    if isinstance(value, str):
        return reword(value)
    last = value[-1]
    # What is malformed is for the template to refuse.
    if not isinstance(last, dict) or not isinstance(last.get("content"), str):
        return value
    if last.get("role") != "user":
        return value
    return [*value[:-1], {**last, "content": reword(last["content"])}]


def _render(
    messages: list[Any],
    tokenizer: PreTrainedTokenizerBase,
    tools: ToolTemplate | None,
    options: Mapping[str, Any],
    where: str,
) -> str:
    for message in messages:
        well_formed = isinstance(message, dict) and all(
            isinstance(message.get(key), str) for key in ("role", "content")
        )
        if not well_formed:
            raise DataError(
                where,
                f"the message {excerpt(message)}",
                'write {"role": "user", "content": "..."}, both strings',
            )
    if tokenizer.chat_template is None:
        raise DataError(
            where,
            "messages, and the tokenizer has no chat template",
            "give string prompts and data.chat_template=false, or another tokenizer",
        )
    import jinja2  # what transformers renders templates with

    # Parquet gives every message all fields that any message has.
    messages = [{k: v for k, v in message.items() if v is not None} for message in messages]
    shown = tools.arguments(messages) if tools else {"conversation": messages, **options}
    try:
        return str(
            tokenizer.apply_chat_template(**shown, tokenize=False, add_generation_prompt=True)
        )
    except jinja2.TemplateError as error:
        found = f"the chat template refuses the messages ({' '.join(str(error).split())})"
        raise DataError(where, found, "mend the messages") from error


class PromptStream:
    """Endless draws from a prompt set: every epoch has its own order and each prompt once.

    A draw never holds a prompt twice: where it reaches into the next epoch, a prompt that it
    already holds waits for the next draw. The order depends on `seed` and the prompts alone, so it
    is the same on every rank and under every layout, and the stream resumes from a few numbers.

    Args:
        prompts: what to draw from.
        seed: determines the order of every epoch.
        shuffle: False keeps the file's order in every epoch.
    """

    def __init__(self, prompts: Sequence[Prompt], seed: int, shuffle: bool = True) -> None:
        self.prompts = tuple(prompts)
        self.seed = seed
        self.shuffle = shuffle
        self.epoch = 0
        self._position = 0
        self._waiting: list[int] = []
        self._order = self._epoch_order()

    def next(self, num: int) -> list[Prompt]:
        """The next `num` prompts, all different.

        Raises:
            DataError: there are fewer than `num` prompts.
        """
        if num > len(self.prompts):
            raise DataError(
                "data.train",
                f"{len(self.prompts)} usable prompts, and a step needs {num} different ones",
                "add prompts, or lower train.global_batch_size",
            )
        drawn: dict[int, None] = {}
        candidates, self._waiting = self._waiting, []
        while len(drawn) < num:
            index = candidates.pop(0) if candidates else self._advance()
            if index in drawn:
                self._waiting.append(index)
            else:
                drawn[index] = None
        self._waiting = candidates + self._waiting
        return [self.prompts[i] for i in drawn]

    def state_dict(self) -> dict[str, Any]:
        """The position, as JSON-compatible values."""
        return {
            "epoch": self.epoch,
            "position": self._position,
            "waiting": list(self._waiting),
            "seed": self.seed,
            "shuffle": self.shuffle,
            "prompts_sha256": self._digest(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues where `state_dict` was taken.

        Raises:
            CheckpointError: the state was taken over other prompts or another order.
        """
        own = self.state_dict()
        for key, what in (
            ("prompts_sha256", "the prompts of data.train"),
            ("seed", "run.seed"),
            ("shuffle", "data.shuffle"),
        ):
            if state[key] != own[key]:
                raise CheckpointError(
                    "position in data.train",
                    f"{what} changed since the checkpoint was written",
                    "resume with what it was, or start a new run",
                )
        self.epoch = state["epoch"]
        self._position = state["position"]
        self._waiting = list(state["waiting"])
        self._order = self._epoch_order()

    def _advance(self) -> int:
        if self._position == len(self._order):
            self.epoch += 1
            self._position = 0
            self._order = self._epoch_order()
        self._position += 1
        return self._order[self._position - 1]

    def _epoch_order(self) -> list[int]:
        if not self.shuffle:
            return list(range(len(self.prompts)))
        # Hashed, so that (seed 1, epoch 2) and (seed 2, epoch 1) have nothing in common.
        digest = hashlib.sha256(f"{self.seed}/{self.epoch}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
        return torch.randperm(len(self.prompts), generator=generator).tolist()

    def _digest(self) -> str:
        ids = json.dumps([p.prompt_id for p in self.prompts])
        return hashlib.sha256(ids.encode()).hexdigest()
