"""The responses of an evaluation on the disk: what is done stays done, whatever ends the process.

A JSON-lines file. Its first line says what was asked; every other line holds all records of one
prompt. Lines are appended and synced, so a process that is killed loses the prompts under way.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from megaopd.errors import ConfigError, DataError, EnvironmentFault
from megaopd.evaluation.scoring import EvalRecord

# Format of the lines; another one cannot be gone on with.
VERSION = 1


class Journal:
    """Opens the file, or begins it.

    Args:
        path: the file.
        settings: everything that determines the records, JSON values by name.
        overwrite: begin anew whatever is there.

    Attributes:
        done: prompt id -> its records, none where the engine set the prompt aside.

    Raises:
        ConfigError: the file was begun with other settings.
        DataError: a line in the middle of it is damaged. A last line that was cut off is not: its
            prompt is asked again.
        EnvironmentFault: it cannot be read or written.
    """

    def __init__(
        self, path: str | Path, settings: Mapping[str, Any], overwrite: bool = False
    ) -> None:
        self.path = Path(path)
        self.done: dict[str, list[EvalRecord]] = {}
        header = {"version": VERSION, **settings}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if not overwrite and self._cut_to_whole_lines():
                self._read(header)
                return
            with self.path.open("wb") as file:
                _append(file, header)
        except OSError as error:
            raise self._fault(error) from error

    def add(self, prompt_id: str, records: Sequence[EvalRecord]) -> None:
        """Notes the records of one prompt; they are on the disk when the call returns.

        Raises:
            EnvironmentFault: they cannot be written.
        """
        line = {"prompt_id": prompt_id, "records": [asdict(record) for record in records]}
        try:
            with self.path.open("ab") as file:
                _append(file, line)
        except OSError as error:
            raise self._fault(error) from error
        self.done[prompt_id] = list(records)

    def _cut_to_whole_lines(self) -> bool:
        """Removes a last line that was cut off; whether a line is left."""
        if not self.path.exists():
            return False
        with self.path.open("r+b") as file:
            content = file.read()
            whole = content.rfind(b"\n") + 1
            if whole < len(content):
                file.truncate(whole)
        return whole > 0

    def _read(self, header: Mapping[str, Any]) -> None:
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    row = json.loads(line)
                    if number > 1:
                        self.done[row["prompt_id"]] = [_record(r) for r in row["records"]]
                        continue
                except (ValueError, KeyError, TypeError) as error:
                    raise DataError(
                        f"{self.path}:{number}",
                        f"not a line of an evaluation ({type(error).__name__}: {error})",
                        "pass --overwrite to begin anew, or choose another --out",
                    ) from error
                self._compare(row, header)

    def _compare(self, found: Any, wanted: Mapping[str, Any]) -> None:
        known = found if isinstance(found, dict) else {}
        for key, value in wanted.items():
            # As it comes back from the file: tuples are lists.
            value = json.loads(json.dumps(value))
            if known.get(key) != value:
                raise ConfigError(
                    str(self.path),
                    f"an evaluation with {key} {_short(known.get(key))}, and now it is "
                    f"{_short(value)}",
                    "choose another --out, or pass --overwrite to begin anew",
                )

    def _fault(self, error: OSError) -> EnvironmentFault:
        return EnvironmentFault(
            str(self.path),
            f"cannot be read or written ({error.strerror or error})",
            "check --out and the room on its file system",
        )


def _append(file: Any, line: Mapping[str, Any]) -> None:
    file.write(json.dumps(line).encode() + b"\n")
    file.flush()
    os.fsync(file.fileno())


def _record(values: dict[str, Any]) -> EvalRecord:
    known = {field.name for field in fields(EvalRecord)}
    if set(values) != known:
        raise ValueError(f"fields {sorted(set(values) ^ known)}")
    return EvalRecord(**{**values, "response_ids": tuple(values["response_ids"])})


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
