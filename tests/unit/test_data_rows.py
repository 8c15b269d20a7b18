"""Rows of JSONL and parquet files, and which files a directory stands for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megaopd.data.rows import Row, data_files, num_rows, read_rows
from megaopd.errors import DataError
from tests.helpers.data_files import write_rows

ROWS = [{"a": 1, "b": {"c": "x"}}, {"a": 2, "b": {"c": None}}]


@pytest.mark.parametrize("name", ["f.jsonl", "f.parquet"])
def test_rows_know_their_place_and_nested_columns(tmp_path: Path, name: str) -> None:
    rows = list(read_rows(write_rows(tmp_path / name, ROWS)))
    assert [(r.where, r.number, r.get("a")) for r in rows] == [
        (f"{tmp_path / name}:1", 1, 1),
        (f"{tmp_path / name}:2", 2, 2),
    ]
    assert [r.get("b.c", "none") for r in rows] == ["x", "none"]
    assert [r.has("b.c") for r in rows] == [True, False]
    assert rows[0].get("a.c") is None


def test_a_column_whose_name_has_a_dot_comes_first() -> None:
    assert Row("", 1, {"b.c": 1, "b": {"c": 2}}).get("b.c") == 1


def test_the_number_counts_on_through_files(tmp_path: Path) -> None:
    for name in ("train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl"):
        (tmp_path / name).write_text('{"a": 1}\n\n{"a": 2}\n')
    assert [r.number for r in read_rows(tmp_path)] == [1, 3, 4, 6]


SHARDS = ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet"]
LISTINGS = [
    (["train-0.parquet", "README.md", ".cache/x.parquet"], "", ["train-0.parquet"]),
    ([*SHARDS, "data/test-00000-of-00001.parquet"], "train", SHARDS),
    (["main/train-0.parquet", "main/test-0.parquet"], "test", ["main/test-0.parquet"]),
    (["aime2025-I.jsonl", "aime2025-II.jsonl"], "test", ["aime2025-I.jsonl", "aime2025-II.jsonl"]),
    (["training.jsonl", "training.jsonl.dropped.jsonl"], "", ["training.jsonl"]),
]


@pytest.mark.parametrize(("there", "split", "chosen"), LISTINGS)
def test_a_directory_stands_for_its_data_files(
    tmp_path: Path, there: list[str], split: str, chosen: list[str]
) -> None:
    for name in there:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert data_files(tmp_path, split) == [tmp_path / name for name in chosen]


REFUSED = [
    (["README.md"], "", "no parquet or JSONL file; name a file"),
    (["test.jsonl"], "train", r"no parquet or JSONL file of the split 'train' \(there are: test\)"),
    (["train.jsonl", "test.jsonl"], "", r"files of several splits: test, train; choose one"),
    (["a/test.jsonl", "b/test.jsonl"], "", "data files in several folders: a, b; name one of them"),
]


@pytest.mark.parametrize(("there", "split", "message"), REFUSED)
def test_a_directory_that_says_too_little_is_refused(
    tmp_path: Path, there: list[str], split: str, message: str
) -> None:
    for name in there:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(DataError, match=message):
        data_files(tmp_path, split)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
BROKEN = [
    ("f.jsonl", b'{"a": 1}\n{"a"\n', "f.jsonl:2: not valid JSON (Expecting ':' delimiter at col"),
    ("f.jsonl", b'{"a": 1}\n[1]\n', "f.jsonl:2: a JSON list, not an object"),
    ("f.jsonl", b'{"a": ' + b"[" * 200_000, "f.jsonl:1: JSON nested too deeply"),
    ("f.jsonl", POINTER, "f.jsonl: a pointer of Git LFS, not the data"),
    ("f.parquet", POINTER, "f.parquet: a pointer of Git LFS, not the data"),
    ("f.parquet", b"PAR1 and nothing more", "f.parquet: not a parquet file that can be read"),
    ("f.parquet", b"", "f.parquet: not a parquet file that can be read"),
]


@pytest.mark.parametrize(("name", "content", "message"), BROKEN)
def test_a_broken_file_is_one_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        list(read_rows(tmp_path / name))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_damaged_page_is_an_error_of_the_data(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"a": f"{i:09}" * 20} for i in range(4000)]
    file = write_rows(tmp_path / "f.parquet", rows)
    content = bytearray(file.read_bytes())
    content[100:400] = b"\xff" * 300
    file.write_bytes(content)
    with pytest.raises(DataError, match=r"f\.parquet:1: parquet that cannot be read"):
        list(read_rows(file))


def test_the_number_of_rows_is_told_where_files_say_it(tmp_path: Path) -> None:
    assert num_rows(write_rows(tmp_path / "f.parquet", ROWS)) == 2
    assert num_rows(write_rows(tmp_path / "f.jsonl", ROWS)) is None
