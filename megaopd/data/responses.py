"""The data set's own responses: what a row says that the model should have answered, as tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megaopd.data.rows import Row, excerpt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class ResponseForm:
    """How the text in a column becomes a response.

    Attributes:
        column: where the text stands.
        stop_token_ids: the tokens that end a response; one whose last token is none of them gets
            the tokenizer's own end, or else the first of these.
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
            raise row.missing(self.column, "set data.response_column")
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
        if self.stop_token_ids and (not ids or ids[-1] not in self.stop_token_ids):
            own = tokenizer.eos_token_id
            ids.append(own if own in self.stop_token_ids else self.stop_token_ids[0])
        return tuple(ids[: self.max_tokens])
