r"""Where a text says its final answer: after `\boxed{`, `Answer:`, `####` or between answer tags.

Plain scans of the text, linear in its length whatever it holds. Nothing is interpreted here: what
an answer is worth is the affair of `megaopd.rewards`.
"""

from __future__ import annotations

import re

# "Answer: 42" on a line of its own, bold or not; "The final answer is: 42" is no such line.
_ANSWER_LINE = re.compile(r"^[ \t]*(?:\*\*)?answer[ \t]*:(.*)$", re.I | re.M)
_NUMBER = re.compile(r"[-+]?\$?[ \t]*(\d[\d,]*(?:\.\d+)?|\.\d+)")
# One pass over the braces of a text, in which an escaped character is one token.
_TEX = re.compile(r"(?P<box>\\(?:boxed|fbox)[ ]?\{)|\\.|[{}]", re.DOTALL)


def after_thinking(text: str) -> str:
    """What follows the thinking: all of a text without any, nothing of one that still thinks."""
    _, ended, rest = text.rpartition("</think>")
    if ended:
        return rest
    return text.partition("<think>")[0]


def last_boxed(text: str) -> str | None:
    r"""The content of the last `\boxed{...}` whose braces balance; escaped braces do not count."""
    last: tuple[int, int] | None = None
    # Of each brace that is open: where a box's content begins, None for any other brace.
    opened: list[int | None] = []
    for token in _TEX.finditer(text):
        if token["box"]:
            opened.append(token.end())
        elif token[0] == "{":
            opened.append(None)
        elif token[0] == "}" and opened:
            start = opened.pop()
            if start is not None and (last is None or start > last[0]):
                last = (start, token.start())
    return None if last is None else text[slice(*last)].strip()


def answer_line(text: str) -> str | None:
    """What the last line `Answer: ...` says, without the `$`, `**` and full stop around it."""
    lines: list[str] = _ANSWER_LINE.findall(text)
    if not lines:
        return None
    return lines[-1].lstrip("*$ \t").rstrip("*$. \t") or None


def hash_number(text: str) -> str | None:
    """The number behind the last `####` of a GSM8K solution, as `plain_number` writes it."""
    _, found, rest = text.rpartition("####")
    if not found:
        return None
    return plain_number(rest.lstrip())


def plain_number(text: str) -> str | None:
    """The number that `text` begins with: no thousands separators, dollar signs or spare zeros."""
    found = _NUMBER.match(text)
    if found is None:
        return None
    whole, _, fraction = found[1].replace(",", "").partition(".")
    whole, fraction = whole.lstrip("0") or "0", fraction.rstrip("0")
    number = f"{whole}.{fraction}" if fraction else whole
    return f"-{number}" if text.startswith("-") and number != "0" else number


def tagged(text: str) -> str | None:
    """The content of the last `<answer>...</answer>`."""
    before, found, _ = text.rpartition("</answer>")
    if not found:
        return None
    _, opened, content = before.rpartition("<answer>")
    return content.strip() if opened else None


def final_answer(text: str) -> str | None:
    """The final answer of a response, after its thinking: boxed, else on its `Answer:` line, else
    the number behind `####`. A text that marks no answer has none."""
    text = after_thinking(text)
    for find in (last_boxed, answer_line, hash_number):
        answer = find(text)
        if answer:
            return answer
    return None
