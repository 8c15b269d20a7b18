"""Tool calls in the text of a model, in the form that Hermes models made common:

    <tool_call>
    {"name": "calculator", "arguments": {"expression": "6 * 7"}}
    </tool_call>

The text is whatever a model wrote: nothing in it may cost more than its length.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

OPEN, CLOSE = "<tool_call>", "</tool_call>"
END_OF_THOUGHT = "</think>"
# More in one turn are not read.
MAX_CALLS = 8


@dataclass(frozen=True)
class ToolCall:
    """A call that can be read; whether there is such a tool is another question."""

    name: str
    arguments: Mapping[str, Any]


@dataclass(frozen=True)
class MalformedCall:
    """Something that begins like a call; `why` is for the model."""

    why: str


def parse_tool_calls(text: str) -> list[ToolCall | MalformedCall]:
    """The calls in a turn of a model, in order, `MAX_CALLS` and one malformed one at most.

    What the model merely thinks, up to the last `</think>`, is not looked at.
    """
    calls: list[ToolCall | MalformedCall] = []
    position = text.rfind(END_OF_THOUGHT) + 1
    while (start := text.find(OPEN, position)) >= 0:
        if len(calls) == MAX_CALLS:
            return [*calls, MalformedCall(f"more than {MAX_CALLS} calls in one turn")]
        start += len(OPEN)
        end = text.find(CLOSE, start)
        if end < 0:
            return [*calls, MalformedCall(f"{OPEN} without {CLOSE}")]
        calls.append(_parse(text[start:end]))
        position = end + len(CLOSE)
    return calls


def _parse(text: str) -> ToolCall | MalformedCall:
    wanted = 'write {"name": ..., "arguments": {...}}'
    try:
        call = json.loads(text, parse_constant=_refuse)
        arguments = call.get("arguments", {}) if isinstance(call, dict) else None
        if isinstance(arguments, str):  # as in OpenAI's protocol
            arguments = json.loads(arguments, parse_constant=_refuse)
    # Digits without end are a ValueError too, brackets without end a RecursionError.
    except (ValueError, RecursionError):
        return MalformedCall(f"the call is not valid JSON; {wanted}")
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return MalformedCall(f"the call has no name; {wanted}")
    if not isinstance(arguments, dict):
        return MalformedCall(f"the arguments are not an object; {wanted}")
    return ToolCall(call["name"], arguments)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")
