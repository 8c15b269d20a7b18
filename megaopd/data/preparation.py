"""From the rows of a data set to a prompt file: one schema, no prompt twice, none of another file.

A prompt file's columns are `id`, `prompt`, `answer`, `data_source`, and `teacher` and `response`
where they are asked for. What is left out is written beside the file, a line for each row with the
reason.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from megaopd.data.overlap import OtherPrompts, fingerprint
from megaopd.data.rows import DROPPED_SUFFIX, Row, read_rows
from megaopd.data.sources import SOURCES, Columns, Example, Message, ask
from megaopd.errors import DataError
from megaopd.storage.staged_file import staged_file

# A row with what became of it.
Converted = tuple[Row, Example | DataError]

DUPLICATE = "duplicate"
OTHER_ANSWER = "duplicate with another answer"
UNREADABLE = "unreadable"


@dataclass(frozen=True)
class Form:
    """How examples become prompts.

    Attributes:
        name: the kind of data set; `data_source` and the ids of rows that have none of their own.
        instruction: the entry of `sources.INSTRUCTIONS` around a problem.
        system: a system message before every prompt; empty writes none.
        text: write prompts as plain text instead of messages.
        data_source: written to every row in place of the row's own.
        teacher: the teacher that every row is routed to; empty leaves the column out.
        responses: write the data set's own responses, in a column of this name.
    """

    name: str
    instruction: str
    system: str = ""
    text: bool = False
    data_source: str = ""
    teacher: str = ""
    responses: bool = False

    def prompt(self, example: Example, where: str) -> str | list[Message]:
        """What the model is asked.

        Raises:
            DataError: a conversation or a system message, and `text`; no response where the form
                has one.
        """
        if self.responses and not example.response:
            raise DataError(where, "no response of its own", "leave out --responses")
        problem = example.problem
        if isinstance(problem, str):
            messages = [{"role": "user", "content": ask(problem, self.instruction)}]
        else:
            messages = [*problem]
            last = messages[-1]
            if self.instruction != "none" and last["role"] == "user":
                messages[-1] = {**last, "content": ask(last["content"], self.instruction)}
        if self.system:
            messages.insert(0, {"role": "system", "content": self.system})
        if not self.text:
            return messages
        if len(messages) > 1:
            raise DataError(
                where, f"{len(messages)} messages, and plain text is asked for", "leave out --text"
            )
        return messages[0]["content"]


@dataclass
class Preparation:
    """What came of a preparation.

    Attributes:
        rows: read.
        kept: written.
        dropped: reason -> number of rows.
        out: the prompt file.
        dropped_file: the list of what was left out, None where that is nothing.
    """

    out: Path
    rows: int = 0
    kept: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    dropped_file: Path | None = None

    def __str__(self) -> str:
        line = f"{self.out}: {self.kept:,} prompts from {self.rows:,} rows"
        if self.dropped_file is None:
            return f"{line}; nothing left out"
        reasons = ", ".join(f"{num:,} {reason}" for reason, num in self.dropped.most_common())
        return f"{line}; left out and listed in {self.dropped_file}: {reasons}"


def convert(
    kind: str, path: str | Path, split: str = "", columns: Columns | None = None
) -> Iterator[Converted]:
    """The examples of a data set of `sources.SOURCES`, row by row.

    Raises:
        DataError: a file that cannot be read. What is wrong with a single row is yielded.
    """
    columns = columns or Columns()
    for row in read_rows(path, split):
        try:
            example = SOURCES[kind].convert(row, columns)
            yield row, _checked(row, example)
        except DataError as error:
            yield row, error


def _checked(row: Row, example: Example) -> Example:
    texts = (
        [example.problem]
        if isinstance(example.problem, str)
        else [message["content"] for message in example.problem]
    )
    if not "".join(texts).strip():
        raise row.error("an empty prompt", "mend or remove the row")
    parts = {"prompt": "".join(texts), "answer": example.answer, "response": example.response}
    for part, written in parts.items():
        try:
            (written or "").encode()
        except UnicodeEncodeError as error:
            found = f"half of a surrogate pair in the {part}"
            raise row.error(found, "mend the text's encoding") from error
    return example


def prepare(
    converted: Iterable[Converted],
    form: Form,
    out: str | Path,
    *,
    against: Sequence[str | Path] = (),
    ngram: int = 0,
    on_bad: Literal["stop", "drop"] = "stop",
    overwrite: bool = False,
) -> Preparation:
    """Writes a prompt file, .parquet or JSON lines by its name, and what it leaves out beside it.

    Of prompts that are the same (see `fingerprint`) the first is kept.

    Args:
        against: prompt files whose prompts must not be in this one, such as an evaluation's.
        ngram: words in a row that a prompt must not share with one of these; see `OtherPrompts`.
        on_bad: what a row that cannot be understood does: end it all, or be left out.
        overwrite: replace the file.

    Raises:
        DataError: a bad row, or no prompt left.
        ConfigError, EnvironmentFault: the file exists, or cannot be written.
    """
    out = Path(out)
    done = Preparation(out)
    beside = out.with_name(out.name + DROPPED_SUFFIX)
    others = OtherPrompts(against, ngram)
    seen: dict[bytes, tuple[str, str | None]] = {}
    ids: set[str] = set()
    with ExitStack() as stack:
        # Left in the other order: the list is there before the prompts are.
        prompts = stack.enter_context(
            PromptWriter(stack.enter_context(staged_file(out, overwrite=overwrite)), form)
        )
        dropped = stack.enter_context(
            stack.enter_context(staged_file(beside, overwrite=True)).open("w", encoding="utf-8")
        )

        def drop(row: Row, reason: str, **details: Any) -> None:
            done.dropped[reason] += 1
            dropped.write(_json({"row": row.where, "reason": reason, **details}))

        for row, example in converted:
            done.rows += 1
            try:
                if isinstance(example, DataError):
                    raise example
                prompt = form.prompt(example, row.where)
            except DataError as error:
                if on_bad == "stop":
                    raise
                drop(row, UNREADABLE, error=str(error))
                continue
            if found := others.find(prompt):
                how, file, where = found
                drop(row, f"{how} {file}", of=where)
                continue
            key = fingerprint(prompt)
            if key in seen:
                first, answer = seen[key]
                same = answer == example.answer
                drop(
                    row,
                    DUPLICATE if same else OTHER_ANSWER,
                    of=first,
                    **({} if same else {"answer": example.answer, "kept_answer": answer}),
                )
                continue
            seen[key] = row.where, example.answer
            prompt_id = _unique_id(form.name, example, row, ids)
            prompts.write(prompt_id, prompt, example)
            done.kept += 1
        if not done.kept:
            raise DataError(
                str(out), f"no prompt left of {done.rows} rows", "check --in and --against"
            )
    if done.dropped:
        done.dropped_file = beside
    else:
        beside.unlink()
    return done


def _unique_id(name: str, example: Example, row: Row, taken: set[str]) -> str:
    own = example.example_id
    prompt_id = f"{name}-{row.number if own is None else own}"
    if prompt_id in taken:
        prompt_id = f"{prompt_id}-{row.number}"
    taken.add(prompt_id)
    return prompt_id


def _json(values: dict[str, Any]) -> str:
    return json.dumps(values, ensure_ascii=False) + "\n"


class PromptWriter:
    """Context manager: writes the rows of a prompt file, .parquet by its name or JSON lines."""

    _GROUP = 4096

    def __init__(self, path: Path, form: Form) -> None:
        self._path = path
        self._form = form
        self._rows: list[dict[str, Any]] = []
        # The name is that of a staged file: .NAME.partial.
        self._parquet = path.name.removesuffix(".partial").endswith((".parquet", ".pq"))
        self._file: Any = None

    def __enter__(self) -> PromptWriter:
        if self._parquet:
            import pyarrow.parquet

            self._file = pyarrow.parquet.ParquetWriter(self._path, self._schema())
        else:
            self._file = self._path.open("w", encoding="utf-8")
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self._flush()
        self._file.close()

    def write(self, prompt_id: str, prompt: str | list[Message], example: Example) -> None:
        form = self._form
        row = {
            "id": prompt_id,
            "prompt": prompt,
            "answer": example.answer,
            "data_source": form.data_source or example.data_source or form.name,
        }
        if form.teacher:
            row["teacher"] = form.teacher
        if form.responses:
            row["response"] = example.response
        self._rows.append(row)
        if len(self._rows) == self._GROUP:
            self._flush()

    def _flush(self) -> None:
        if self._parquet and self._rows:
            import pyarrow

            self._file.write_table(pyarrow.Table.from_pylist(self._rows, schema=self._schema()))
        elif not self._parquet:
            self._file.writelines(_json(row) for row in self._rows)
        self._rows = []

    def _schema(self) -> Any:
        import pyarrow as pa

        message = pa.struct([("role", pa.string()), ("content", pa.string())])
        columns = [
            ("id", pa.string()),
            ("prompt", pa.string() if self._form.text else pa.list_(message)),
            ("answer", pa.string()),
            ("data_source", pa.string()),
        ]
        if self._form.teacher:
            columns.append(("teacher", pa.string()))
        if self._form.responses:
            columns.append(("response", pa.string()))
        return pa.schema(columns)
