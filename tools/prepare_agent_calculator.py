"""Writes the prompts of conf/agent_calculator.yaml: arithmetic that a calculator answers.

Every prompt is a conversation in which five questions were answered by calling the calculator, and
a sixth question; its answer is the number alone. The chat template puts the tools before it.

    python tools/prepare_agent_calculator.py --out .cache/agent_calculator
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

from megaopd.errors import run_cli
from megaopd.rollout.agent.tools.calculator import evaluate

EXAMPLES = ("37 * 12", "815 - 20", "64 + 97", "128 * 45", "702 - 31")


def call(expression: str) -> str:
    arguments = {"name": "calculator", "arguments": {"expression": expression}}
    return f"<tool_call>\n{json.dumps(arguments)}\n</tool_call>"


def conversation(expression: str) -> list[dict[str, str]]:
    messages = []
    for example in EXAMPLES:
        messages += [
            {"role": "user", "content": f"What is {example}?"},
            {"role": "assistant", "content": call(example)},
            {"role": "tool", "content": evaluate(example)},
            {"role": "assistant", "content": evaluate(example)},
        ]
    return [*messages, {"role": "user", "content": f"What is {expression}?"}]


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path(".cache/agent_calculator"))
    parser.add_argument("--train", type=int, default=2000, help="training prompts")
    parser.add_argument("--eval", type=int, default=64, help="evaluation prompts, none in training")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)

    rng = random.Random(args.seed)
    expressions: dict[str, None] = dict.fromkeys(EXAMPLES)
    while len(expressions) < len(EXAMPLES) + args.train + args.eval:
        a, sign, b = rng.randint(10, 999), rng.choice("+-*"), rng.randint(10, 99)
        expressions[f"{a} {sign} {b}"] = None
    questions = list(expressions)[len(EXAMPLES) :]
    args.out.mkdir(parents=True, exist_ok=True)
    for name, part in (("eval", questions[: args.eval]), ("train", questions[args.eval :])):
        rows = [{"id": q, "prompt": conversation(q), "answer": evaluate(q)} for q in part]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (args.out / f"{name}.jsonl").write_text(lines)
    print(f"{args.out}: {args.train} prompts for training, {args.eval} for evaluation")


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
