"""Rows of data files: JSONL and parquet, one file or a directory of them.

Knows files and columns, nothing of prompts. Every row knows where it stands, for the messages.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaopd.errors import DataError

_PARQUET = (".parquet", ".pq")
_JSON_LINES = (".jsonl", ".ndjson", ".json")
# Beside a prepared file: the rows that are not in it.
DROPPED_SUFFIX = ".dropped.jsonl"
# A clone without `git lfs pull` holds these in place of the data.
_LFS_POINTER = b"version https://git-lfs.github.com/spec"
_SPLIT = re.compile(r"(train|test|validation|valid|val|dev|eval)(?![a-z])", re.IGNORECASE)


@dataclass(frozen=True)
class Row:
    """One row of a data file.

    Attributes:
        where: file and row (the line of a JSONL file, the row of a parquet file; from 1).
        number: the line or row, counted on through all files that were read together.
        values: by column.
    """

    where: str
    number: int
    values: Mapping[str, Any]

    def get(self, column: str, default: Any = None) -> Any:
        """The value in a column; dots lead into nested ones (``reward_model.ground_truth``). A null
        counts as missing."""
        value = _lookup(self.values, column)
        return default if value is None else value

    def has(self, column: str) -> bool:
        return _lookup(self.values, column) is not None

    def error(self, found: str, remedy: str) -> DataError:
        return DataError(self.where, found, remedy)

    def missing(self, column: str, remedy: str, others: str = "") -> DataError:
        """What to raise where a column is missing, and `others` (as ", nor b") are too."""
        if column in self.values:
            return self.error(f"column {column!r} is null{others}", remedy)
        columns = ", ".join(self.values) or "none"
        return self.error(f"no column {column!r}{others}; it has {columns}", remedy)


def _lookup(values: Mapping[str, Any], column: str) -> Any:
    if column in values:
        return values[column]
    first, dot, rest = column.partition(".")
    nested = values.get(first) if dot else None
    return _lookup(nested, rest) if isinstance(nested, Mapping) else None


def read_rows(path: str | Path, split: str = "") -> Iterator[Row]:
    """The rows of a file, or of the data files in a directory one after the other.

    A file is parquet by its name (.parquet, .pq), otherwise JSON lines; blank lines are skipped.

    Args:
        split: of a directory, the files of this split alone; see `data_files`.

    Raises:
        DataError: nothing to read, or something that cannot be read, with file and row.
    """
    before = 0
    for file in data_files(path, split):
        place = 0
        read = _parquet_rows if file.suffix.lower() in _PARQUET else _json_rows
        for place, values in read(file):
            yield Row(f"{file}:{place}", before + place, values)
        before += place


def data_files(path: str | Path, split: str = "") -> list[Path]:
    """The files that `path` names: itself, or those in and below a directory, by name.

    Directories are those of the Hugging Face hub: ``data/train-00000-of-00002.parquet``,
    ``main/test-00000-of-00001.parquet``, ``test.jsonl``. A file's split is the word that its name
    begins with; a file without one belongs to every split.

    Raises:
        DataError: no such file, no data file in the directory, files of several splits and none was
            asked for, or files in several folders (configurations of a data set).
    """
    path = Path(path)
    if not path.is_dir():
        return [path]
    known = (*_PARQUET, *_JSON_LINES)
    files = sorted(
        file
        for file in path.rglob("*")
        if file.suffix.lower() in known
        and not file.name.endswith(DROPPED_SUFFIX)
        and not any(part.startswith(".") for part in file.relative_to(path).parts)
    )
    splits = {
        file: found[1].lower() if (found := _SPLIT.match(file.name)) else "" for file in files
    }
    there = sorted({name for name in splits.values() if name})
    if split:
        files = [file for file in files if splits[file] in ("", split.lower())]
    if not files:
        of_split = f" of the split {split!r} (there are: {', '.join(there)})" if there else ""
        raise DataError(
            str(path), f"no parquet or JSONL file{of_split}", "name a file or another directory"
        )
    if len(there) > 1 and not split:
        raise DataError(
            str(path),
            f"files of several splits: {', '.join(there)}",
            "choose one (--split), or name a file",
        )
    folders = sorted({str(file.parent.relative_to(path)) for file in files})
    if len(folders) > 1:
        raise DataError(
            str(path), f"data files in several folders: {', '.join(folders)}", "name one of them"
        )
    return files


def num_rows(path: str | Path, split: str = "") -> int | None:
    """How many rows `read_rows` gives, where the files say it: parquet; None otherwise."""
    files = data_files(path, split)
    if any(file.suffix.lower() not in _PARQUET for file in files):
        return None
    return sum(_open_parquet(file).metadata.num_rows for file in files)


def _json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                where = f"{path}:{number}"
                try:
                    row = json.loads(line.rstrip())
                except (json.JSONDecodeError, RecursionError) as error:
                    if number == 1:
                        _refuse_pointer(path, line)
                    found = (
                        f"not valid JSON ({error.msg} at column {error.colno})"
                        if isinstance(error, json.JSONDecodeError)
                        else "JSON nested too deeply"
                    )
                    raise DataError(where, found, "write one JSON object per line") from error
                except UnicodeDecodeError as error:
                    raise DataError(where, "not UTF-8 text", "save the file as UTF-8") from error
                if not isinstance(row, dict):
                    found = f"a JSON {type(row).__name__}, not an object"
                    raise DataError(where, found, "write one JSON object per line")
                yield number, row
    except OSError as error:
        raise DataError(str(path), error.strerror or str(error), "name a readable file") from error


def _parquet_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow

    file = _open_parquet(path)
    number = 0
    try:
        for batch in file.iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise DataError(
            f"{path}:{number + 1}",
            f"parquet that cannot be read ({_line(error)})",
            "fetch it again",
        ) from error


def _open_parquet(path: Path) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        with path.open("rb") as file:
            _refuse_pointer(path, file.read(len(_LFS_POINTER)))
        return pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, ValueError) as error:
        raise DataError(
            str(path), f"not a parquet file that can be read ({_line(error)})", "fetch it again"
        ) from error
    except OSError as error:
        raise DataError(
            str(path), error.strerror or _line(error), "name a readable file"
        ) from error


def _refuse_pointer(path: Path, start: bytes) -> None:
    if start.startswith(_LFS_POINTER):
        raise DataError(
            str(path), "a pointer of Git LFS, not the data", "fetch the file itself: git lfs pull"
        )


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def excerpt(value: Any) -> str:
    """A value for a message, as JSON and not too long."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."
