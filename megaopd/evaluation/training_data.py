"""Responses of an evaluation as a prompt file to train on: SFT on a teacher, rejection sampling."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megaopd.data.responses import implied_end
from megaopd.data.rows import read_rows
from megaopd.errors import DataError
from megaopd.evaluation.scoring import EvalRecord
from megaopd.storage.staged_file import staged_file

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

COLUMN = "response"


def write_responses(
    out: Path,
    data: str,
    id_column: str,
    records: Mapping[str, Sequence[EvalRecord]],
    tokenizer: PreTrainedTokenizerBase,
    stop_token_ids: Sequence[int],
    *,
    correct_only: bool,
) -> Counter[str]:
    """Writes the rows of a prompt file with one response each, in the column `response`.

    Of a prompt's samples the first is taken that came to its end; with `correct_only` the first of
    these that has full marks.

    Args:
        out: JSON lines; one that is there is replaced.
        data: the prompt file that was asked.
        records: by prompt id; rows without an entry were not asked.

    Returns:
        what became of the rows: `written`, or why not.

    Raises:
        DataError: no row has a response to write; `out` is left as it was.
        MegaOPDError: the prompt file cannot be read any more, or `out` not written.
    """
    became: Counter[str] = Counter()
    with (
        staged_file(out, overwrite=True) as path,
        path.open("w", encoding="utf-8") as file,
    ):
        for row in read_rows(data):
            own = records.get(str(row.get(id_column, row.number)))
            if own is None:
                became["not asked"] += 1
                continue
            ended = [record for record in own if not record.truncated]
            good = [record for record in ended if record.correct or not correct_only]
            if not good:
                became["none correct" if ended else "none came to an end"] += 1
                continue
            became["written"] += 1
            text = _text(good[0].response_ids, tokenizer, stop_token_ids)
            file.write(json.dumps({**_plain(row.values), COLUMN: text}, default=str) + "\n")
        if not became["written"]:
            found = ", ".join(f"{num} {why}" for why, num in became.items() if num)
            raise DataError(str(out), f"no response to write: {found}", "raise --n")
    return became


def _text(
    ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, stop_token_ids: Sequence[int]
) -> str:
    """The response as it was sampled, special tokens and all. An end that `ResponseForm` adds by
    itself is left out; another one, as that of rollout.stop, is text like the rest."""
    implied = bool(ids) and ids[-1] == implied_end(tokenizer, stop_token_ids)
    return tokenizer.decode(list(ids[:-1] if implied else ids), skip_special_tokens=False)


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key != COLUMN}
