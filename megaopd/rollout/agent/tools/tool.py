"""What a tool is: a function, and what the student reads of it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megaopd.config import AgentConfig

# JSON schema's names of types.
_TYPES: dict[str, type | tuple[type, ...]] = {
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "array": list,
    "object": dict,
}


class ToolError(Exception):
    """The call failed by the student's fault; it reads the message and may try again."""


def _nothing_to_check(config: AgentConfig) -> None:
    pass


@dataclass(frozen=True)
class Tool:
    """A tool that the student may call.

    Attributes:
        description: what it does, for the student.
        parameters: the arguments, all of them required: name -> JSON schema, with one of the types
            that JSON has.
        function: `await function(config, **arguments)` is what the student reads. It raises
            `ToolError` for arguments that make no sense. It is safe for whatever arguments of the
            right types, stops when it is cancelled, and does not hold up the event loop.
        check: raises `ConfigError` where the configuration lacks what the tool needs.
    """

    description: str
    parameters: Mapping[str, Mapping[str, Any]]
    function: Callable[..., Awaitable[str]]
    check: Callable[[AgentConfig], None] = _nothing_to_check

    def schema(self, name: str) -> dict[str, Any]:
        """OpenAI's description of a function, as chat templates take it."""
        return {
            "type": "function",
            "function": {
                "name": name,
                "description": self.description,
                "parameters": {
                    "type": "object",
                    "properties": {key: dict(value) for key, value in self.parameters.items()},
                    "required": list(self.parameters),
                },
            },
        }

    async def call(self, config: AgentConfig, arguments: Mapping[str, Any]) -> str:
        """Checks the arguments against `parameters` and calls the function.

        Raises:
            ToolError: an argument is missing, unknown or of another type, or the function's own.
        """
        for key in arguments:
            if key not in self.parameters:
                known = ", ".join(self.parameters)
                raise ToolError(f"there is no argument {key[:60]!r}; give {known}")
        for key, schema in self.parameters.items():
            if key not in arguments:
                raise ToolError(f"the argument {key!r} is missing")
            value, kind = arguments[key], schema["type"]
            # In Python a bool is an int.
            is_other = isinstance(value, bool) and kind != "boolean"
            if is_other or not isinstance(value, _TYPES[kind]):
                raise ToolError(f"the argument {key!r} is not of the type {kind}")
        return await self.function(config, **arguments)
