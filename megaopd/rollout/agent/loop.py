"""A conversation of the student with tools: turn, calls, results, turn, until it calls none.

Token ids are appended and never tokenized again: the student trains on exactly the tokens that it
sampled, after exactly the tokens that it saw.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from megaopd.batch import Prompt, SamplingParams
from megaopd.config import AgentConfig
from megaopd.data.tool_template import ToolTemplate
from megaopd.logger import get_logger
from megaopd.rollout.agent.tool_calls import MalformedCall, ToolCall, parse_tool_calls
from megaopd.rollout.agent.tools import TOOLS
from megaopd.rollout.agent.tools.tool import ToolError
from megaopd.rollout.conversation import Complete, Conversation

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = get_logger(__name__)

# No token is longer, in practice; it bounds what is tokenized of a long output.
MAX_CHARS_PER_TOKEN = 128


def tool_schemas(config: AgentConfig) -> list[dict[str, Any]]:
    """The tools on offer as chat templates take them.

    Raises:
        ConfigError: what a tool needs is not there.
    """
    for name in config.tools:
        TOOLS[name].check(config)
    return [TOOLS[name].schema(name) for name in config.tools]


class Agent:
    """Holds conversations with tools; implements `Converse`.

    A conversation ends with the first turn that calls no tool ("stop"), or ("length") when it has
    no room left for results and a token after them, or after `max_turns` turns. It ends with a
    token of the student in any case. `params.max_new_tokens` bounds all of it together.

    Metrics of a conversation: `agent/num_turns`, of the student; `agent/llm_tokens` and
    `agent/tool_tokens`, the tokens it sampled and those it was given after the prompt, template
    included; `agent/tool_ratio`, the latter's share; `agent/tool_errors`, calls that failed.

    Args:
        config: the tools and their limits.
        tokenizer: the student's. A copy is used: fast tokenizers must not be called from two
            threads at a time.
    """

    def __init__(self, config: AgentConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        self.config = config
        self._tokenizer = copy.deepcopy(tokenizer)
        self._template = ToolTemplate(self._tokenizer, tool_schemas(config))

    async def __call__(
        self, complete: Complete, prompt: Prompt, index: int, params: SamplingParams
    ) -> Conversation:
        ids: list[int] = []
        logprobs: list[float] = []
        mask: list[bool] = []
        versions: list[int] = []
        num_turns = num_errors = 0
        while True:
            room = params.max_new_tokens - len(ids)
            done = await complete(prompt.token_ids + tuple(ids), room)
            num_turns += 1
            ids += done.ids
            logprobs += done.logprobs
            mask += [True] * len(done.ids)
            versions += done.versions
            finish_reason = done.finish_reason
            if finish_reason != "stop":
                break
            # Some tokenizers would tidy up spaces, those within arguments too.
            text = self._tokenizer.decode(list(done.ids), clean_up_tokenization_spaces=False)
            calls = parse_tool_calls(text)
            if not calls:
                break
            finish_reason = "length"
            if num_turns == self.config.max_turns or len(ids) == params.max_new_tokens:
                break
            answers = await asyncio.gather(*map(self._answer, calls))
            num_errors += sum(failed for _, failed in answers)
            tool_ids = self._result_ids(ids[-1], [text for text, _ in answers])
            if len(ids) + len(tool_ids) >= params.max_new_tokens:
                break
            ids += tool_ids
            logprobs += [0.0] * len(tool_ids)
            mask += [False] * len(tool_ids)
            versions += [versions[-1]] * len(tool_ids)
        num_own = sum(mask)
        return Conversation(
            ids=tuple(ids),
            logprobs=tuple(logprobs),
            mask=tuple(mask),
            versions=tuple(versions),
            finish_reason=finish_reason,
            metrics={
                "agent/num_turns": float(num_turns),
                "agent/llm_tokens": float(num_own),
                "agent/tool_tokens": float(len(ids) - num_own),
                "agent/tool_ratio": 1 - num_own / len(ids),
                "agent/tool_errors": float(num_errors),
            },
        )

    async def _answer(self, call: ToolCall | MalformedCall) -> tuple[str, bool]:
        """What the student reads as the result of a call, and whether it failed."""
        try:
            if isinstance(call, MalformedCall):
                raise ToolError(call.why)
            if call.name not in self.config.tools:
                known = ", ".join(self.config.tools)
                raise ToolError(f"there is no tool {call.name[:60]!r}; there are {known}")
            async with asyncio.timeout(self.config.tool_timeout_s):
                return await TOOLS[call.name].call(self.config, call.arguments), False
        except ToolError as error:
            return f"error: {error}", True
        except TimeoutError:
            return f"error: it took longer than {self.config.tool_timeout_s:g} s", True
        except Exception as error:  # a tool's own fault is no reason to lose the run
            assert isinstance(call, ToolCall)
            logger.warning("the tool %s failed: %r", call.name, error, exc_info=True)
            return f"error: the tool failed ({type(error).__name__})", True

    def _result_ids(self, last_id: int, texts: Sequence[str]) -> list[int]:
        longest = self.config.max_tool_tokens
        cut = [text[: longest * MAX_CHARS_PER_TOKEN] for text in texts]
        return self._template.result_ids(last_id, cut, longest)
