"""Checks the Hugging Face directory that a run exported against the run's own last evaluation.

Loads RUN/hf with plain transformers, generates greedily for the evaluation prompts, one at a time,
and compares token by token with what the trained model answered in its evaluation
(RUN/eval_after.jsonl). Writes `export_greedy_identical` and the counts into RUN/summary.json.

    python tools/check_export.py runs/demo [--prompts 32]
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

from megaopd.errors import CheckpointError, run_cli


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="directory of a finished run")
    parser.add_argument("--prompts", type=int, default=32, help="evaluation prompts to compare")
    args = parser.parse_args(argv)

    summary_path, answers_path = args.run / "summary.json", args.run / "eval_after.jsonl"
    for path in (summary_path, answers_path):
        if not path.is_file():
            raise CheckpointError(str(path), "not there", "give the directory of a finished run")
    summary = json.loads(summary_path.read_text())
    answers = [json.loads(line) for line in answers_path.read_text().splitlines()][: args.prompts]

    tokenizer = AutoTokenizer.from_pretrained(summary["hf_export"])
    model = AutoModelForCausalLM.from_pretrained(summary["hf_export"], dtype="auto").eval()
    identical = 0
    for answer in tqdm(answers, desc="greedy generations of the export", unit="prompt"):
        prompt = torch.tensor([answer["prompt_ids"]])
        output = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=summary["max_new_tokens"],
            eos_token_id=summary["stop_token_ids"],
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
        )
        identical += output[0, prompt.size(1) :].tolist() == answer["response_ids"]

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
