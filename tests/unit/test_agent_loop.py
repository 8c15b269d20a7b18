"""Conversations: what is parsed, what is appended, when it ends, and how engines hold them."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import replace

import pytest

from megaopd.batch import Completion, Prompt, SamplingParams
from megaopd.config import AgentConfig, DataConfig
from megaopd.data.prompts import load_prompts
from megaopd.data.tool_template import ToolTemplate
from megaopd.errors import ConfigError
from megaopd.evaluation import evaluate
from megaopd.rollout.agent import TOOLS, Agent, tool_schemas
from megaopd.rollout.agent.batching import Request, hold_conversations
from megaopd.rollout.agent.tool_calls import (
    MAX_CALLS,
    MalformedCall,
    ToolCall,
    parse_tool_calls,
)
from megaopd.rollout.agent.tools.tool import Tool
from megaopd.rollout.conversation import Conversation
from tests.helpers.tiny_models import tiny_tokenizer
from tests.helpers.tool_caller import AGENT, TEMPLATE

CALCULATE = '<tool_call>{"name": "calculator", "arguments": {"expression": "%s"}}</tool_call>'
PARAMS = SamplingParams(max_new_tokens=1000)
SCHEMAS = tool_schemas(AGENT)


@pytest.fixture
def tokenizer():
    tokenizer = tiny_tokenizer(512)
    tokenizer.chat_template = TEMPLATE
    return tokenizer


class TestParser:
    """Text of a model -> calls."""

    @pytest.mark.parametrize(
        ("text", "calls"),
        [
            ("The answer is 42.", []),
            ("", []),
            ('<tool_call>{"name": "a", "arguments": {"x": 1}}</tool_call>', [("a", {"x": 1})]),
            ('so:\n<tool_call>\n{"name": "a"}\n</tool_call><|im_end|>', [("a", {})]),
            (
                '<tool_call>{"arguments": {"x": "é<"}, "name": "a"}</tool_call> and '
                '<tool_call>{"name": "b", "arguments": "{\\"y\\": [2]}"}</tool_call>',
                [("a", {"x": "é<"}), ("b", {"y": [2]})],
            ),
            ('<think><tool_call>{"name": "a"}</tool_call></think> no', []),
            ('<think>x</think><tool_call>{"name": "a"}</tool_call>', [("a", {})]),
            ("</tool_call> <tool_cal> tool_call", []),
        ],
    )
    def test_calls(self, text: str, calls: list[tuple[str, dict[str, object]]]) -> None:
        assert parse_tool_calls(text) == [ToolCall(*call) for call in calls]

    @pytest.mark.parametrize(
        ("inside", "why"),
        [
            ("", "not valid JSON"),
            ("calculator(1)", "not valid JSON"),
            ('{"name": "a"', "not valid JSON"),
            ("{'name': 'a'}", "not valid JSON"),
            ('{"name": "a", "arguments": {"x": NaN}}', "not valid JSON"),
            ('{"name": "a", "arguments": {"x": -Infinity}}', "not valid JSON"),
            ('{"name": "a", "arguments": "{"}', "not valid JSON"),
            ('{"name": "a", "arguments": {"x": ' + "1" * 10_000 + "}}", "not valid JSON"),
            ("[" * 100_000, "not valid JSON"),
            ('{"name":' * 100_000, "not valid JSON"),
            ('{"name": "a"} {"name": "b"}', "not valid JSON"),
            ("[]", "no name"),
            ("null", "no name"),
            ('"name"', "no name"),
            ('{"arguments": {}}', "no name"),
            ('{"name": 3}', "no name"),
            ('{"name": ["a"]}', "no name"),
            ('{"name": "a", "arguments": [1]}', "not an object"),
            ('{"name": "a", "arguments": null}', "not an object"),
            ('{"name": "a", "arguments": "3"}', "not an object"),
        ],
    )
    def test_malformed(self, inside: str, why: str) -> None:
        (call,) = parse_tool_calls(f"<tool_call>{inside}</tool_call>")
        assert isinstance(call, MalformedCall)
        assert why in call.why
        assert len(call.why) < 100

    def test_unclosed(self) -> None:
        good = '<tool_call>{"name": "a"}</tool_call>'
        calls = parse_tool_calls(good + '<tool_call>{"name": "b"}')
        assert calls == [ToolCall("a", {}), MalformedCall("<tool_call> without </tool_call>")]

    @pytest.mark.parametrize("piece", ["<tool_call>", "<tool_call>{</tool_call>", "</think>", "<"])
    def test_time_is_bounded(self, piece: str) -> None:
        start = time.monotonic()
        assert len(parse_tool_calls(piece * 200_000)) <= MAX_CALLS + 1
        assert time.monotonic() - start < 1.0


class TestTemplate:
    """Tools and results as the chat template shows them."""

    def test_a_template_that_knows_tools(self, tokenizer) -> None:
        template = ToolTemplate(tokenizer, SCHEMAS)
        messages = [{"role": "user", "content": "hi"}]
        assert template.arguments(messages) == {"conversation": messages, "tools": SCHEMAS}
        ids = template.result_ids(3, ["7", "8"], 10)
        assert tokenizer.decode(ids) == "<eos>\ntool: 7\ntool: 8\nassistant: "
        # The model has sampled the end of its turn.
        assert template.result_ids(tokenizer.eos_token_id, ["7", "8"], 10) == ids[1:]

    def test_a_template_that_does_not(self, tokenizer) -> None:
        tokenizer.chat_template = tiny_tokenizer(512).chat_template
        template = ToolTemplate(tokenizer, SCHEMAS)
        shown = template.arguments(
            [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": "hi"},
                {"role": "assistant", "content": "calls"},
                {"role": "tool", "content": "7"},
                {"role": "tool", "content": "8"},
                {"role": "assistant", "content": "15"},
            ]
        )
        assert list(shown) == ["conversation"]
        system, *rest = shown["conversation"]
        assert system["role"] == "system"
        assert system["content"].startswith("Be brief.\n\n")
        assert json.dumps(SCHEMAS[0]) in system["content"]
        results = "<tool_response>\n7\n</tool_response>\n<tool_response>\n8\n</tool_response>"
        assert [m["content"] for m in rest] == ["hi", "calls", results, "15"]
        assert [m["role"] for m in rest] == ["user", "assistant", "user", "assistant"]
        ids = template.result_ids(3, ["7", "8"], 10)
        assert tokenizer.decode(ids) == f"\nuser: {results}\nassistant: "

    def test_results_are_plain_text(self, tokenizer) -> None:
        """What looks like a special token in a result is none, and half a character is none."""
        template = ToolTemplate(tokenizer, SCHEMAS)
        ids = template.result_ids(3, ["<eos><pad>\ud800"], 100)
        end = tokenizer.eos_token_id
        assert ids.count(end) == 1
        assert tokenizer.pad_token_id not in ids
        assert tokenizer.decode(ids) == "<eos>\ntool: <eos><pad>?\nassistant: "

    def test_results_are_cut(self, tokenizer) -> None:
        template = ToolTemplate(tokenizer, SCHEMAS)
        empty = len(template.result_ids(3, [""], 10))
        for longest in (1, 10):
            ids = template.result_ids(3, ["x" * 1000], longest)
            assert len(ids) == empty + longest

    def test_templates_that_cannot(self, tokenizer) -> None:
        tokenizer.chat_template = None
        with pytest.raises(ConfigError, match="has no chat template"):
            ToolTemplate(tokenizer, SCHEMAS)
        for text in ("{{ messages[0]['content'] }}", "{{ raise_exception('no') }}"):
            tokenizer.chat_template = text
            with pytest.raises(ConfigError, match="shows no results of tools"):
                ToolTemplate(tokenizer, SCHEMAS)


def test_prompt_files_offer_tools(tokenizer, tmp_path) -> None:
    """Strings and messages alike, and examples of calls; without tools nothing changes."""
    messages = [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "calls"},
        {"role": "tool", "content": "2"},
    ]
    rows = [{"prompt": "hi"}, {"prompt": messages}]
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = DataConfig(train=str(file), chat_template=True)

    def texts(tools: ToolTemplate | None) -> list[str]:
        found = load_prompts(file, config, tokenizer, tools=tools)
        return [tokenizer.decode(list(prompt.token_ids)) for prompt in found.prompts]

    shown = ["user: hi\nassistant: ", "user: 1+1?\nassistant: calls<eos>\ntool: 2\nassistant: "]
    assert texts(None) == shown
    assert texts(ToolTemplate(tokenizer, SCHEMAS)) == [f"T1 {text}" for text in shown]


class Script:
    """A model that says what it is told to, whatever it reads."""

    def __init__(self, tokenizer, turns: Sequence[str]) -> None:
        self.tokenizer, self.turns = tokenizer, list(turns)
        self.asked: list[tuple[tuple[int, ...], int]] = []

    async def complete(self, token_ids: tuple[int, ...], max_new_tokens: int) -> Completion:
        self.asked.append((token_ids, max_new_tokens))
        text = self.turns.pop(0)
        ids = tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        ids += (self.tokenizer.eos_token_id,)
        reason = "stop" if len(ids) <= max_new_tokens else "length"
        ids = ids[:max_new_tokens]
        turn = len(self.asked)
        return Completion(ids, tuple(-float(turn) for _ in ids), reason, (turn,) * len(ids))


def converse(tokenizer, turns: Sequence[str], config=AGENT, params=PARAMS):
    script = Script(tokenizer, turns)
    agent = Agent(config, tokenizer)
    conversation = asyncio.run(agent(script.complete, Prompt("p", (1, 2, 3)), 0, params))
    return conversation, script, tokenizer.decode(list(conversation.ids))


def test_a_conversation(tokenizer) -> None:
    turns = [CALCULATE % "6 * 7", "It is 42."]
    conversation, script, text = converse(tokenizer, turns)
    given = "\ntool: 42\nassistant: "
    assert text == f"{turns[0]}<eos>{given}{turns[1]}<eos>"
    assert conversation.finish_reason == "stop"
    # Every question is the tokens of the one before, those that came, and those that were given.
    lengths = [len(tokenizer(t)["input_ids"]) + 1 for t in turns]
    num_given = len(conversation.ids) - sum(lengths)
    assert script.asked[0] == ((1, 2, 3), 1000)
    assert script.asked[1][0] == (1, 2, 3, *conversation.ids[: -lengths[1]])
    assert script.asked[1][1] == 1000 - lengths[0] - num_given
    own = (True,) * lengths[0], (False,) * num_given, (True,) * lengths[1]
    assert conversation.mask == sum(own, ())
    values = (-1.0,) * lengths[0], (0.0,) * num_given, (-2.0,) * lengths[1]
    assert conversation.logprobs == sum(values, ())
    sample = conversation.sample(Prompt("p", (1, 2, 3)), 0)
    assert sample.weight_version == 1
    assert sample.model_token_versions == [1] * lengths[0] + [2] * lengths[1]
    assert conversation.metrics == {
        "agent/num_turns": 2.0,
        "agent/llm_tokens": float(sum(lengths)),
        "agent/tool_tokens": float(num_given),
        "agent/tool_ratio": pytest.approx(num_given / len(conversation.ids)),
        "agent/tool_errors": 0.0,
    }


def test_tokens_are_not_tokenized_again(tokenizer) -> None:
    """A model may spell a text as the tokenizer never would; its tokens stay."""
    agent = Agent(AGENT, tokenizer)
    letters = [tokenizer.convert_tokens_to_ids(c) for c in (CALCULATE % "1+1").replace(" ", "Ġ")]
    spelled = (*letters, tokenizer.eos_token_id)
    assert list(spelled[:-1]) != tokenizer(CALCULATE % "1+1")["input_ids"]
    answers = [spelled, (5, tokenizer.eos_token_id)]

    async def complete(token_ids: tuple[int, ...], max_new_tokens: int) -> Completion:
        ids = answers.pop(0)
        return Completion(ids, (0.0,) * len(ids), "stop", (0,) * len(ids))

    conversation = asyncio.run(agent(complete, Prompt("p", (1,)), 0, PARAMS))
    assert conversation.ids[: len(spelled)] == spelled
    assert "\ntool: 2\nassistant: " in tokenizer.decode(list(conversation.ids))


def test_no_call_is_a_single_turn(tokenizer) -> None:
    conversation, script, text = converse(tokenizer, ["hello"])
    assert text == "hello<eos>"
    assert len(script.asked) == 1
    assert conversation.metrics["agent/tool_ratio"] == 0.0


@pytest.mark.parametrize(
    ("turn", "result"),
    [
        (CALCULATE % "1 / 0", "error: division by zero"),
        ("<tool_call>{</tool_call>", "error: the call is not valid JSON"),
        ("<tool_call>", "error: <tool_call> without </tool_call>"),
        ('<tool_call>{"name": "rm"}</tool_call>', "error: there is no tool 'rm'; there are calc"),
        # A tool that exists and is not on offer.
        (
            '<tool_call>{"name": "sqlite", "arguments": {"sql": "SELECT 1"}}</tool_call>',
            "error: there is no tool 'sqlite'",
        ),
        ('<tool_call>{"name": "calculator"}</tool_call>', "error: the argument 'expression' is mi"),
        (
            '<tool_call>{"name": "calculator", "arguments": {"expression": 3}}</tool_call>',
            "error: the argument 'expression' is not of the type string",
        ),
        (
            '<tool_call>{"name": "calculator", "arguments": {"config": "x"}}</tool_call>',
            "error: there is no argument 'config'",
        ),
    ],
)
def test_the_student_reads_what_went_wrong(tokenizer, turn: str, result: str) -> None:
    config = replace(AGENT, max_tool_tokens=200)
    conversation, _, text = converse(tokenizer, [turn, "sorry"], config)
    assert f"\ntool: {result}" in text
    assert text.endswith("assistant: sorry<eos>")
    assert conversation.metrics["agent/tool_errors"] == 1.0


def test_several_calls_in_a_turn(tokenizer) -> None:
    turn = CALCULATE % "1+1" + CALCULATE % "x" + CALCULATE % "2+2"
    config = replace(AGENT, max_tool_tokens=200)
    conversation, _, text = converse(tokenizer, [turn, "done"], config)
    first, second, third = text.partition("<eos>")[2].split("tool: ")[1:]
    assert (first, third) == ("2\n", "4\nassistant: done<eos>")
    assert second.startswith("error: there is no 'x'")
    assert conversation.metrics["agent/tool_errors"] == 1.0
    conversation, _, text = converse(
        tokenizer, [CALCULATE % "1" * 12, "done"], config, replace(PARAMS, max_new_tokens=2000)
    )
    assert text.count("tool: 1\n") == MAX_CALLS
    assert "error: more than 8 calls in one turn" in text


def test_limits(tokenizer, monkeypatch) -> None:
    """Of time and output of a tool, of turns, and of a tool's own faults."""

    async def hang(config: AgentConfig) -> str:
        await asyncio.sleep(60)
        return "never"

    async def flood(config: AgentConfig) -> str:
        return "x" * 50_000_000

    async def break_down(config: AgentConfig) -> str:
        raise KeyError("secret")

    for function in (hang, flood, break_down):
        monkeypatch.setitem(TOOLS, function.__name__, Tool("", {}, function))
    config = AgentConfig(("hang", "flood", "break_down"), 3, 0.2, 40)

    def call(name: str) -> str:
        return f'<tool_call>{{"name": "{name}"}}</tool_call>'

    start = time.monotonic()
    conversation, _, text = converse(tokenizer, [call("hang") * 3, "x"], config)
    assert text.count("tool: error: it took longer than 0.2 s\n") == 3
    assert time.monotonic() - start < 2.0
    assert conversation.metrics["agent/tool_errors"] == 3.0

    conversation, _, text = converse(tokenizer, [call("flood"), "y"], config)
    # Two letters are a token at most.
    assert 40 <= text.count("x") <= 80
    assert conversation.metrics["agent/tool_tokens"] < 40 + 40

    conversation, _, text = converse(tokenizer, [call("break_down"), "y"], config)
    assert "tool: error: the tool failed (KeyError)\n" in text
    assert "secret" not in text

    conversation, script, text = converse(tokenizer, [call("flood")] * 9, config)
    assert len(script.asked) == 3
    assert conversation.finish_reason == "length"
    assert text.endswith("</tool_call><eos>")


@pytest.mark.parametrize("length", [5, 60, 80, 84, 85, 86, 90, 100, 104, 110, 120, 140, 200])
def test_the_length_of_all_of_it_is_bounded(tokenizer, length: int) -> None:
    turns = [CALCULATE % "6*7", CALCULATE % "7*7", "It is 49."]
    params = replace(PARAMS, max_new_tokens=length)
    conversation, script, _ = converse(tokenizer, turns, params=params)
    assert len(conversation.ids) <= length
    for token_ids, room in script.asked:
        assert len(token_ids) - 3 + room == length
        assert room >= 1
    assert conversation.mask[-1]  # the last word is the student's
    whole, _, _ = converse(tokenizer, turns)
    assert whole.ids[: len(conversation.ids)] == conversation.ids
    assert conversation.finish_reason == ("stop" if conversation == whole else "length")


def test_the_reward_sees_the_last_turn(tokenizer) -> None:
    conversation, _, _ = converse(tokenizer, [CALCULATE % "6*7", "42"])
    prompt = Prompt("p", (1, 2, 3), "42")

    class Engine:
        def generate(self, prompts, params):
            return [conversation.sample(prompt, 0)]

    def reward(response: str, answer: str | None) -> float:
        return float(response == answer)

    result = evaluate(Engine(), [prompt], reward, tokenizer, PARAMS)
    assert result.accuracy == 1.0
    assert result.records[0].response_ids == conversation.ids


class TestBatching:
    """Conversations over a model that answers batches."""

    @staticmethod
    def completion(request: Request, *ids: int) -> Completion:
        return Completion(ids, (0.0,) * len(ids), "stop", (0,) * len(ids))

    def test_the_model_is_asked_when_all_wait(self) -> None:
        """Whatever tools take, and however many turns each has."""
        batches: list[list[tuple[str, int]]] = []

        async def turns(complete, prompt, index, params) -> Conversation:
            ids: tuple[int, ...] = ()
            for _ in range(int(prompt.prompt_id)):
                await asyncio.sleep(0.01 * index)
                done = await complete(prompt.token_ids + ids, 9)
                ids += done.ids
            return Conversation(ids, (0.0,) * len(ids), (True,) * len(ids), (0,) * len(ids), "stop")

        def answer(requests: Sequence[Request]) -> list[Completion]:
            batches.append([(r.prompt.prompt_id, r.position) for r in requests])
            return [self.completion(r, r.index, r.position) for r in requests]

        jobs = [(Prompt(str(n), (7,)), 5 - n) for n in (1, 3, 0, 2)]
        found = hold_conversations(turns, jobs, PARAMS, answer)
        assert [c.ids for c in found] == [(4, 0), (2, 0, 2, 2, 2, 4), (), (3, 0, 3, 2)]
        assert [sorted(batch) for batch in batches] == [
            [("1", 0), ("2", 0), ("3", 0)],
            [("2", 2), ("3", 2)],
            [("3", 4)],
        ]
        assert hold_conversations(turns, [], PARAMS, answer) == []

    def test_an_error_ends_all(self) -> None:
        ended: list[str] = []

        async def one_turn(complete, prompt, index, params) -> Conversation:
            try:
                await complete(prompt.token_ids, 9)
                if prompt.prompt_id == "bad":
                    raise ValueError("of the conversation")
                await complete(prompt.token_ids, 9)
                raise AssertionError("asked again")
            finally:
                ended.append(prompt.prompt_id)

        def answer(requests: Sequence[Request]) -> list[Completion]:
            return [self.completion(r, 1) for r in requests]

        def broken(requests: Sequence[Request]) -> list[Completion]:
            raise ValueError("of the model")

        jobs = [(Prompt(name, (7,)), 0) for name in ("a", "bad", "b")]
        with pytest.raises(ValueError, match="of the conversation"):
            hold_conversations(one_turn, jobs, PARAMS, answer)
        assert sorted(ended) == ["a", "b", "bad"]
        ended.clear()
        with pytest.raises(ValueError, match="of the model"):
            hold_conversations(one_turn, jobs, PARAMS, broken)
        assert sorted(ended) == ["a", "b", "bad"]
