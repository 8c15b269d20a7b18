"""A tiny model that has learnt one conversation by heart: it calls the calculator, then answers."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from megaopd.batch import Prompt
from megaopd.config import AgentConfig
from megaopd.data.tool_template import ToolTemplate
from megaopd.rollout.agent import tool_schemas
from tests.helpers.tiny_models import make_tiny_model

AGENT = AgentConfig(tools=("calculator",), max_turns=3, max_tool_tokens=8)
QUESTION = "6*7?"
CALL = '<tool_call>{"name": "calculator", "arguments": {"expression": "6*7"}}</tool_call>'
ANSWER = "42"
# Knows tools: it writes them at the beginning, and ends the turns of the model with its end token.
TEMPLATE = (
    "{% if tools %}T{{ tools | length }} {% endif %}{% for m in messages %}"
    "{{ m['role'] }}: {{ m['content'] }}{{ '<eos>\\n' if m['role'] == 'assistant' else '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
)


def make_tool_caller(dst: Path, seed: int = 0, max_loss: float = 0.02) -> Path:
    """Writes the model to `dst`, trained until its mean loss on its own tokens is `max_loss`."""
    make_tiny_model(dst, seed=seed, num_hidden_layers=2, initializer_range=0.05)
    tokenizer = AutoTokenizer.from_pretrained(dst)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(dst)
    ids = list(question(dst).token_ids)
    labels = [-100] * len(ids)
    end = tokenizer.eos_token_id
    template = ToolTemplate(tokenizer, tool_schemas(AGENT))
    for turn in (CALL, ANSWER):
        own = [*tokenizer(turn, add_special_tokens=False)["input_ids"], end]
        given = template.result_ids(end, ["42"], 8) if turn == CALL else []
        ids += own + given
        labels += own + [-100] * len(given)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_pretrained(dst, dtype=torch.float32)
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
        for _ in range(400):
            loss = model(torch.tensor([ids]), labels=torch.tensor([labels])).loss
            if loss.item() < max_loss:
                break
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        else:
            raise AssertionError(f"the loss is still {loss.item():.3f}")
    model.save_pretrained(dst)
    return dst


def question(path: Path, prompt_id: str = "q") -> Prompt:
    """The question that the model in `path` has learnt, with the tools before it."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    template = ToolTemplate(tokenizer, tool_schemas(AGENT))
    text = tokenizer.apply_chat_template(
        **template.arguments([{"role": "user", "content": QUESTION}]),
        tokenize=False,
        add_generation_prompt=True,
    )
    return Prompt(prompt_id, tuple(tokenizer(text, add_special_tokens=False)["input_ids"]), ANSWER)
