"""The embedded engine holds conversations with tools, with a model that has learnt to call them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megaopd.batch import Prompt, Sample, SamplingParams
from megaopd.rollout.agent import Agent
from megaopd.rollout.embedded import EmbeddedEngine
from tests.helpers.distributed import run_distributed
from tests.helpers.tool_caller import AGENT, ANSWER, CALL, make_tool_caller, question

pytestmark = pytest.mark.slow

PARAMS = SamplingParams(max_new_tokens=160, temperature=0.0, seed=5, stop_token_ids=(511,))
# Often enough another call, or none at all.
WARM = replace(PARAMS, temperature=1.2, n=6)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory) -> Path:
    return make_tool_caller(tmp_path_factory.mktemp("caller"))


def make_engine(path: Path, **arguments) -> EmbeddedEngine:
    agent = Agent(AGENT, AutoTokenizer.from_pretrained(path))
    settings = {"device": "cpu", "dtype": torch.float32, "batch_size": 4} | arguments
    return EmbeddedEngine.from_pretrained(str(path), converse=agent, **settings)


def prompts_of(path: Path) -> list[Prompt]:
    return [question(path, f"q{i}") for i in range(3)]


def test_a_conversation(model_dir: Path) -> None:
    engine = make_engine(model_dir)
    (sample,) = engine.generate([question(model_dir)], PARAMS)
    text = AutoTokenizer.from_pretrained(model_dir).decode(list(sample.response_ids))
    assert text == f"{CALL}<eos>\ntool: 42\nassistant: {ANSWER}<eos>"
    assert sample.finish_reason == "stop"
    num_own = sum(sample.response_mask)
    num_given = len(sample.response_ids) - num_own
    assert engine.metrics == {
        "agent/num_turns": 2.0,
        "agent/llm_tokens": float(num_own),
        "agent/tool_tokens": float(num_given),
        "agent/tool_ratio": pytest.approx(num_given / (num_own + num_given)),
        "agent/tool_errors": 0.0,
    }


def test_logprobs_are_those_of_a_forward_pass(model_dir: Path) -> None:
    """Of the tokens that the model sampled, after the tokens that it was given."""
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    samples = make_engine(model_dir).generate(prompts_of(model_dir), WARM)
    assert any(not all(s.response_mask) for s in samples)
    for sample in samples:
        ids = torch.tensor([sample.prompt.token_ids + sample.response_ids])
        with torch.no_grad():
            logprobs = (model(ids).logits[0, :-1] / WARM.temperature).log_softmax(-1)
        start = len(sample.prompt.token_ids)
        expected = logprobs[start - 1 :].gather(1, ids[0, start:, None])[:, 0]
        mask = torch.tensor(sample.response_mask)
        found = torch.tensor(sample.response_logprobs)
        torch.testing.assert_close(found[mask], expected[mask], atol=1e-4, rtol=0)
        assert not found[~mask].any()


def same(found: list[Sample], wanted: list[Sample]) -> None:
    assert [s.sample_id for s in found] == [s.sample_id for s in wanted]
    assert [s.response_ids for s in found] == [s.response_ids for s in wanted]
    assert [s.response_mask for s in found] == [s.response_mask for s in wanted]


def test_samples_do_not_depend_on_the_batch(model_dir: Path) -> None:
    """Over turns too: a token's random number is that of its place in the response."""
    prompts = prompts_of(model_dir)
    expected = make_engine(model_dir).generate(prompts, WARM)
    assert len({s.response_ids for s in expected}) > 3
    same(make_engine(model_dir, batch_size=1).generate(prompts, WARM), expected)
    same(make_engine(model_dir, batch_size=100).generate(prompts[::-1], WARM)[:6], expected[12:])
    same(make_engine(model_dir).generate(prompts[1:2], WARM), expected[6:12])


def generate_on_rank(rank: int, world_size: int, path: str):
    engine = make_engine(Path(path), rank=rank, world_size=world_size)
    return engine.generate(prompts_of(Path(path)), WARM), engine.metrics


def test_ranks_share_out_the_conversations(model_dir: Path) -> None:
    alone = make_engine(model_dir)
    expected = alone.generate(prompts_of(model_dir), WARM)
    results = run_distributed(generate_on_rank, 2, str(model_dir), timeout_s=120)
    for found, metrics in results:
        same(found, expected)
        assert metrics == pytest.approx(alone.metrics)
