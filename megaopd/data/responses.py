"""The data set's own responses: what a row says that the model should have answered, as tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megaopd.data.rows import Row, excerpt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def implied_end(tokenizer: PreTrainedTokenizerBase, stop_token_ids: Sequence[int]) -> int | None:
    """The end that a response has when its text shows none: the tokenizer's own end token, or else
    the first of `stop_token_ids`; None where nothing ends a response."""
    if tokenizer.eos_token_id in stop_token_ids:
        return tokenizer.eos_token_id
    return stop_token_ids[0] if stop_token_ids else None


_REMEDY = "set data.response_column, or write one: prepare_data.py and evaluate.py have --responses"


@dataclass(frozen=True)
class ResponseForm:
    """How the text in a column becomes a response.

    Attributes:
        column: where the text stands.
        stop_token_ids: the tokens that end a response; one whose last token is none of them gets
            `implied_end`.
        max_tokens: longest response; a longer one is cut, and does not end.
    """

    column: str
    stop_token_ids: Sequence[int]
    max_tokens: int

    def read(self, row: Row, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
        """The response in a row.

        Raises:
            DataError: the column is missing, or holds no text.
        """
        value = row.get(self.column)
        if value is None:
            raise row.missing(self.column, _REMEDY)
        if isinstance(value, bool) or not isinstance(value, str | int | float) or value == "":
            raise row.error(
                f"column {self.column!r} holds {excerpt(value)}", "write the response as text"
            )
        text = str(value)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise row.error("half of a surrogate pair", "mend the text's encoding") from error
        ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        end = implied_end(tokenizer, self.stop_token_ids)
        if end is not None and (not ids or ids[-1] not in self.stop_token_ids):
            ids.append(end)
        if not ids:
            raise row.error(f"column {self.column!r} has no tokens", "write the response as text")
        return tuple(ids[: self.max_tokens])
