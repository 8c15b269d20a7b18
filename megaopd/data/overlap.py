"""When two prompts are the same, and which prompts of one file stand in another."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from megaopd.data.rows import Row, read_rows
from megaopd.data.sources import Message, bare


def fingerprint(prompt: str | Sequence[Message]) -> bytes:
    """The same for prompts that ask the same: SHA-256 of the text without our instructions, system
    messages, dollar signs and LaTeX spacing, with white space made single and Unicode composed.

    Upper and lower case, digits and signs all count: a problem with other numbers is another one.
    """
    return _digest(_asked(prompt))


class OtherPrompts:
    """The prompts of other files, such as an evaluation's, that must not be in this one.

    Args:
        paths: prompt files.
        ngram: so many words in a row that a prompt shares with one of theirs make it one of theirs,
            as training sets are cleaned of test sets (Brown et al., arXiv 2005.14165, appendix C,
            with 13); 0 compares whole prompts alone.

    Raises:
        DataError: a file that cannot be read, or is no prompt file.
    """

    def __init__(self, paths: Iterable[str | Path], ngram: int = 0) -> None:
        self._ngram = ngram
        self._whole: dict[bytes, tuple[str, str]] = {}
        self._parts: dict[bytes, tuple[str, str]] = {}
        for path in paths:
            for row in read_rows(path):
                text = _asked(_prompt(row))
                place = str(path), row.where
                self._whole.setdefault(_digest(text), place)
                for part in _ngrams(text, ngram):
                    self._parts.setdefault(part, place)

    def find(self, prompt: str | Sequence[Message]) -> tuple[str, str, str] | None:
        """Where a prompt stands: (how: `in` or `overlaps with`, file, row); None for nowhere."""
        text = _asked(prompt)
        if place := self._whole.get(_digest(text)):
            return ("in", *place)
        for part in _ngrams(text, self._ngram):
            if place := self._parts.get(part):
                return ("overlaps with", *place)
        return None


def _asked(prompt: str | Sequence[Message]) -> str:
    if isinstance(prompt, str):
        texts = [prompt]
    else:
        texts = [m["content"] for m in prompt if m["role"] != "system"]
    text = unicodedata.normalize("NFC", "\n".join(bare(text) for text in texts))
    return " ".join(re.sub(r"\\[,;:! ]", " ", text.replace("$", "")).split())


def _ngrams(text: str, size: int) -> Iterator[bytes]:
    """All runs of `size` words, in lower case and without punctuation; none of a shorter text."""
    words = re.findall(r"\w+", text.lower()) if size else []
    for start in range(len(words) - size + 1 if size else 0):
        # Enough of the hash for any number of n-grams that memory has room for.
        yield _digest(" ".join(words[start : start + size]))[:12]


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode(errors="replace")).digest()


def _prompt(row: Row) -> str | list[Message]:
    """The prompt of a prompt file's row."""
    prompt = row.get("prompt")
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, list) and all(
        isinstance(m, dict) and isinstance(m.get("content"), str) for m in prompt
    ):
        return [{"role": str(m.get("role")), "content": m["content"]} for m in prompt]
    raise row.error(
        "no prompt in column 'prompt'", "--against takes prompt files; prepare this one first"
    )
