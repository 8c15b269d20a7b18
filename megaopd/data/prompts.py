"""Prompt files: reading, checking, tokenizing, and the order in which training draws from them.

Every rank reads the same file and draws the same prompts; nothing here communicates.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from megaopd.batch import Prompt
from megaopd.config import DataConfig
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
    """

    prompts: tuple[Prompt, ...]
    num_overlong: int


def load_prompts(
    path: str | Path,
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    teachers: Collection[str] = ("",),
    tools: ToolTemplate | None = None,
) -> PromptSet:
    """Reads a JSONL file of prompts; blank lines are skipped.

    A prompt is a string, or a list of ``{"role": ..., "content": ...}`` messages, which goes
    through the chat template; so is the one that the teacher sees, where data.teacher_prompt_column
    names it. An answer may be a string or a number.

    Args:
        teachers: the names that the column of teachers may hold; the empty one is that of the
            run's one `teacher`, where the column is missing.
        tools: offers tools in every prompt that goes through the chat template.

    Raises:
        DataError: a line that is not a JSON object, a missing or wrong column, an empty prompt, an
            id met before, a teacher that there is not (all with file and line); no file, no prompt,
            or only overlong ones.
    """
    prompts: list[Prompt] = []
    line_of_id: dict[str, int] = {}
    num_overlong = 0
    for number, row in _rows(Path(path)):
        where = f"{path}:{number}"
        prompt_id = _scalar(row.get(config.id_column, number), config.id_column, where)
        if prompt_id in line_of_id:
            raise DataError(
                where,
                f"id {prompt_id!r} is taken by line {line_of_id[prompt_id]}",
                f"make column {config.id_column!r} unique",
            )
        line_of_id[prompt_id] = number
        token_ids = _token_ids(row, "prompt_column", config, tokenizer, tools, where)
        teacher_token_ids = None
        if config.teacher_prompt_column:
            teacher_token_ids = _token_ids(
                row, "teacher_prompt_column", config, tokenizer, tools, where
            )
        answer = row.get(config.answer_column)
        teacher = _teacher(row, config.teacher_column, teachers, where)
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
    if not line_of_id:
        raise DataError(str(path), "no prompt in it", "write one JSON object per line")
    if not prompts:
        raise DataError(
            str(path),
            f"all {num_overlong} prompts are longer than {config.max_prompt_tokens} tokens",
            "raise data.max_prompt_tokens",
        )
    return PromptSet(tuple(prompts), num_overlong)


def _rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line number from 1, JSON object)."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                where = f"{path}:{number}"
                try:
                    row = json.loads(line)
                except json.JSONDecodeError as error:
                    found = f"not valid JSON ({error.msg} at column {error.colno})"
                    raise DataError(where, found, "write one JSON object per line") from error
                except UnicodeDecodeError as error:
                    raise DataError(where, "not UTF-8 text", "save the file as UTF-8") from error
                if not isinstance(row, dict):
                    found = f"a JSON {type(row).__name__}, not an object"
                    raise DataError(where, found, "write one JSON object per line")
                yield number, row
    except OSError as error:
        raise DataError(str(path), error.strerror or str(error), "name a readable file") from error


def _scalar(value: Any, column: str, where: str) -> str:
    """An id or an answer as text."""
    if isinstance(value, bool) or not isinstance(value, str | int | float) or value == "":
        found = f"column {column!r} holds {_excerpt(value)}"
        raise DataError(where, found, "write a string or a number")
    return str(value)


def _teacher(row: dict[str, Any], column: str, teachers: Collection[str], where: str) -> str:
    """The teacher that the row is routed to."""
    name = row.get(column)
    if name is None:
        name = ""
    if not isinstance(name, str) or name not in teachers:
        known = ", ".join(sorted(repr(t) for t in teachers if t)) or "none"
        raise DataError(
            where,
            f"column {column!r} names the teacher {_excerpt(name)}; there are {known}",
            "enter it under teachers, or set data.teacher_column",
        )
    return name


def _token_ids(
    row: dict[str, Any],
    key: Literal["prompt_column", "teacher_prompt_column"],
    config: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    tools: ToolTemplate | None,
    where: str,
) -> tuple[int, ...]:
    """The prompt in the column that the configuration's `key` names."""
    column = getattr(config, key)
    if column not in row:
        raise DataError(
            where,
            f"no column {column!r}; it has {', '.join(row) or 'none'}",
            f"set data.{key}",
        )
    value = row[column]
    if not isinstance(value, str | list):
        found = f"column {column!r} holds {_excerpt(value)}"
        raise DataError(where, found, "write a string or a list of messages")
    if not value or (isinstance(value, str) and not value.strip()):
        raise DataError(where, f"an empty prompt in column {column!r}", "remove the line")
    messages = value if isinstance(value, list) else [{"role": "user", "content": value}]
    if isinstance(value, list) or config.chat_template:
        # The template writes the special tokens itself.
        text, add_special_tokens = _render(messages, tokenizer, tools, where), False
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


def _render(
    messages: list[Any],
    tokenizer: PreTrainedTokenizerBase,
    tools: ToolTemplate | None,
    where: str,
) -> str:
    for message in messages:
        well_formed = isinstance(message, dict) and all(
            isinstance(message.get(key), str) for key in ("role", "content")
        )
        if not well_formed:
            raise DataError(
                where,
                f"the message {_excerpt(message)}",
                'write {"role": "user", "content": "..."}, both strings',
            )
    if tokenizer.chat_template is None:
        raise DataError(
            where,
            "messages, and the tokenizer has no chat template",
            "give string prompts and data.chat_template=false, or another tokenizer",
        )
    import jinja2  # what transformers renders templates with

    shown = tools.arguments(messages) if tools else {"conversation": messages}
    try:
        return str(
            tokenizer.apply_chat_template(**shown, tokenize=False, add_generation_prompt=True)
        )
    except jinja2.TemplateError as error:
        found = f"the chat template refuses the messages ({' '.join(str(error).split())})"
        raise DataError(where, found, "mend the messages") from error


def _excerpt(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."


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
