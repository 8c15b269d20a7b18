"""Checks the Hugging Face directory that a run exported against the run's own last evaluation.

Loads RUN/hf with plain transformers, generates greedily for the evaluation prompts, one at a time,
and compares token by token with what the trained model answered in its evaluation
(RUN/eval_after.jsonl). Conversations with tools are held anew, with the run's own tools. Writes
`export_greedy_identical` and the counts into RUN/summary.json.

    python tools/check_export.py runs/demo [--prompts 32]
    python tools/check_export.py conf=demo_cpu run.dir=elsewhere    the run of these arguments
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from megaopd.batch import Completion, Prompt, SamplingParams
from megaopd.config import load
from megaopd.errors import CheckpointError, run_cli
from megaopd.rollout.agent import Agent
from megaopd.rollout.agent.batching import Request, hold_conversations
from megaopd.rollout.conversation import single_turn


def run_directory(words: list[str]) -> Path:
    """The directory itself, or that of the run which was started with these arguments."""
    if len(words) == 1 and not words[0].startswith("conf="):
        return Path(words[0])
    return Path(load(words).run.dir)


class Export:
    """An exported model as plain transformers loads it, generating greedily."""

    def __init__(self, directory: str, stop_token_ids: Sequence[int]) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(directory)
        self._model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto").eval()
        self._stop_token_ids = list(stop_token_ids)

    def answer(self, requests: Sequence[Request]) -> list[Completion]:
        """As `hold_conversations` asks; log-probabilities are left 0."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: Request) -> Completion:
        prompt = torch.tensor([request.token_ids])
        output = self._model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=request.max_new_tokens,
            eos_token_id=self._stop_token_ids,
            pad_token_id=self.tokenizer.pad_token_id or self.tokenizer.eos_token_id,
        )
        ids = tuple(output[0, prompt.size(1) :].tolist())
        reason = "stop" if ids[-1] in self._stop_token_ids else "length"
        return Completion(ids, (0.0,) * len(ids), reason, (0,) * len(ids))


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "run",
        nargs="+",
        help="directory of a finished run, or the arguments that the run was started with "
        "(conf=NAME key=value ...), which name it",
    )
    parser.add_argument("--prompts", type=int, default=32, help="evaluation prompts to compare")
    args = parser.parse_args(argv)

    run = run_directory(args.run)
    summary_path, answers_path = run / "summary.json", run / "eval_after.jsonl"
    for path in (summary_path, answers_path):
        if not path.is_file():
            raise CheckpointError(str(path), "not there", "give the directory of a finished run")
    summary = json.loads(summary_path.read_text())
    if summary["hf_export"] is None:
        raise CheckpointError(str(run), "the run exported nothing", "run it with train.export=true")
    if summary["eval_temperature"] > 0:
        raise CheckpointError(
            str(run),
            f"its evaluations sample at temperature {summary['eval_temperature']:g}, and what is "
            "compared are greedy answers",
            "run it with eval.temperature=0 eval.n=1, or compare with tools/evaluate.py",
        )
    answers = [json.loads(line) for line in answers_path.read_text().splitlines()][: args.prompts]

    export = Export(summary["hf_export"], summary["stop_token_ids"])
    tools = load([f"conf={run / 'config.yaml'}"]).rollout.agent
    converse = Agent(tools, export.tokenizer) if tools else single_turn
    params = SamplingParams(max_new_tokens=summary["max_new_tokens"], temperature=0.0)
    identical = 0
    for answer in tqdm(answers, desc="greedy generations of the export", unit="prompt"):
        prompt = Prompt(answer["prompt_id"], tuple(answer["prompt_ids"]))
        (found,) = hold_conversations(converse, [(prompt, 0)], params, export.answer)
        identical += list(found.ids) == answer["response_ids"]

    summary["export_greedy_identical"] = identical
    summary["export_greedy_compared"] = len(answers)
    summary_path.write_text(json.dumps(summary, indent=2) + "\n")
    print(f"{identical} of {len(answers)} greedy generations are token-identical")
    if identical != len(answers):
        raise CheckpointError(
            summary["hf_export"],
            f"{len(answers) - identical} of {len(answers)} greedy generations differ",
            "compare the weights of the export with those of the run",
        )


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
