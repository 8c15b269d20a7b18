"""How the model is told of tools and of their results, by its chat template.

A template that knows tools writes both itself. For one that does not, tools go into the system
message and results into messages of the user, in the form that Hermes models made common.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

from megaopd.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, Any]

OFFER = """\
You can call functions. These there are, one JSON schema per line:
<tools>
{tools}
</tools>
For each call write a JSON object between tags:
<tool_call>
{{"name": <function>, "arguments": {{<argument>: <value>}}}}
</tool_call>
The result comes between <tool_response> and </tool_response>."""
RESULT = "<tool_response>\n{text}\n</tool_response>"


class ToolTemplate:
    """The chat template of a tokenizer, with tools on offer.

    Args:
        schemas: the tools, each as OpenAI describes a function.
        options: further variables of the template; see `tokenizer.template_options`.

    Raises:
        ConfigError: there is no chat template, or it shows results of tools in no way.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        schemas: Sequence[dict[str, Any]],
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._options = dict(options or {})
        self._schemas = list(schemas)
        if tokenizer.chat_template is None:
            raise ConfigError(
                "rollout.agent",
                "set, and the student's tokenizer has no chat template",
                "take a tokenizer with one, or set rollout.agent=null",
            )
        self._knows_tools = True
        self._knows_tools = self._shows_tools() and self._texts_around(1) is not None
        if self._texts_around(1) is None:
            raise ConfigError(
                "rollout.agent",
                "set, and the student's chat template shows no results of tools",
                "take a tokenizer whose template does, or set rollout.agent=null",
            )
        self._ids_around = cache(self._tokenized_around)

    def arguments(self, messages: Sequence[Message]) -> dict[str, Any]:
        """The arguments of `apply_chat_template` that show `messages` and the tools."""
        if self._knows_tools:
            return {"conversation": list(messages), "tools": self._schemas, **self._options}
        tools = "\n".join(json.dumps(schema, ensure_ascii=False) for schema in self._schemas)
        system = OFFER.format(tools=tools)
        shown = _results_by_user(messages)
        if shown and shown[0]["role"] == "system":
            system = f"{shown.pop(0)['content']}\n\n{system}"
        return {"conversation": [{"role": "system", "content": system}, *shown], **self._options}

    def result_ids(self, last_id: int, texts: Sequence[str], max_tokens: int) -> list[int]:
        """The tokens between the end of a turn of the model that called tools and its next turn.

        Results become tokens as plain text: what looks like a special token in them is none.

        Args:
            last_id: the last token that the model sampled. Where the template too ends the model's
                turn with it, it is not written twice.
            texts: the results, in the order of the calls.
            max_tokens: longest result; of a longer one the rest is cut off.
        """
        first, *rest = self._ids_around(len(texts))
        ids = list(first[1:] if first[:1] == (last_id,) else first)
        for text, after in zip(texts, rest, strict=True):
            # Half of a surrogate pair, say from a database, is no text.
            clean = text.encode(errors="replace").decode()
            found = self._tokenizer(clean, add_special_tokens=False, split_special_tokens=True)
            ids += found["input_ids"][:max_tokens]
            ids += after
        return ids

    def _shows_tools(self) -> bool:
        import jinja2  # what transformers renders templates with

        question = [{"role": "user", "content": "question"}]
        try:
            return self._render(question) != str(
                self._tokenizer.apply_chat_template(
                    question, tokenize=False, add_generation_prompt=True, **self._options
                )
            )
        except jinja2.TemplateError:
            return False

    def _render(self, messages: Sequence[Message]) -> str:
        return str(
            self._tokenizer.apply_chat_template(
                **self.arguments(messages), tokenize=False, add_generation_prompt=True
            )
        )

    def _texts_around(self, count: int) -> list[str] | None:
        """What stands between a turn of the model, `count` results and its next turn; None if the
        template does not show them.

        Found with placeholders in their places, which any template leaves alone.
        """
        import jinja2

        slots = [f"slot{i}slot" for i in range(count + 1)]
        results = [{"role": "tool", "name": "tool", "content": slot} for slot in slots[1:]]
        turns = [
            {"role": "user", "content": "question"},
            {"role": "assistant", "content": slots[0]},
        ]
        try:
            text = self._render([*turns, *results])
        except jinja2.TemplateError:
            return None
        texts = []
        for slot in slots:
            before, found, text = text.partition(slot)
            if not found:
                return None
            texts.append(before)
        return [*texts[1:], text]

    def _tokenized_around(self, count: int) -> list[tuple[int, ...]]:
        texts = self._texts_around(count)
        assert texts is not None
        return [
            tuple(self._tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts
        ]


def _results_by_user(messages: Sequence[Message]) -> list[Message]:
    """`messages` with results of tools in messages of the user, those in a row in one."""
    shown: list[Message] = []
    in_a_row = False
    for message in messages:
        if message["role"] != "tool":
            shown.append(message)
            in_a_row = False
            continue
        text = RESULT.format(text=message["content"])
        if in_a_row:
            text = f"{shown.pop()['content']}\n{text}"
        shown.append({"role": "user", "content": text})
        in_a_row = True
    return shown
