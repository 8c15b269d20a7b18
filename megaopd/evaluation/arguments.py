"""Evaluates a model on prompt files: mean@k, pass@k, majority vote, with intervals.

python tools/evaluate.py MODEL --data data/math500.jsonl --reward math --n 16 --out eval/math500
"""

from __future__ import annotations

import argparse
from pathlib import Path

from megaopd.config import Config, RolloutConfig, RunConfig, SGLangConfig, StudentConfig
from megaopd.errors import ConfigError
from megaopd.evaluation.estimates import default_ks
from megaopd.evaluation.questions import AS_WRITTEN, VARIANTS

EPILOG = """\
what comes out, in OUT
  results.json              all figures with their 95 % intervals, and what was asked
  report.html               the same, and responses to read; opens without network
  NAME.responses.jsonl      every response of the questions NAME, written as they come

  The same command goes on where it was ended: prompts that have their responses are not asked
  again, and the result is the one that it would have had. Other settings need another OUT.

examples
  python tools/evaluate.py models/Qwen3-8B --data data/math500.jsonl --reward math \\
      --n 16 --temperature 0.6 --top-p 0.95 --max-new-tokens 16384 --out eval/qwen3-8b
  python tools/evaluate.py runs/demo/hf --data a.jsonl --data b.jsonl --reward gsm8k --greedy \\
      --instruction as_written --instruction boxed --out eval/demo
  python tools/evaluate.py runs/opd/megatron --data data/aime24.jsonl --reward math --n 64 \\
      --engine sglang --servers 8 --out eval/aime24
  python tools/evaluate.py models/Qwen3-32B --data data/train.jsonl --reward math --n 4 \\
      --out eval/teacher --responses data/sft.jsonl --correct-only
  python tools/evaluate.py models/Qwen3-8B --data data/aime24.jsonl --reward math --n 16 \\
      --engine sglang --url http://10.0.0.7:30000 --out eval/running
  torchrun --nproc-per-node 8 -- tools/evaluate.py ...     embedded, a share of the samples a GPU;
      without the dashes torchrun takes --n for its own
"""


def parser() -> argparse.ArgumentParser:
    top = argparse.ArgumentParser(
        prog="evaluate.py",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = top.add_argument
    add("model", help="Hugging Face directory or Megatron checkpoint (its newest complete step)")
    add("--data", action="append", required=True, metavar="FILE", help="prompts; may be repeated")
    add("--out", type=Path, required=True, help="directory of the results")
    add("--overwrite", action="store_true", help="begin anew in OUT")

    asked = top.add_argument_group("what is asked")
    add = asked.add_argument
    add(
        "--instruction",
        action="append",
        choices=list(VARIANTS),
        help=f"how it is asked (default: {AS_WRITTEN}); may be repeated: one result each",
    )
    add("--num-prompts", type=int, default=0, help="the first so many of each file; 0: all")
    add("--max-prompt-tokens", type=int, default=0, help="longer ones are set aside; 0: what fits")
    add("--prompt-column", default="prompt")
    add("--answer-column", default="answer")
    add("--id-column", default="id")
    add("--chat-template", action="store_true", help="string prompts become a user's message")
    add("--thinking", choices=("on", "off"), help="for chat templates that know it")

    sampled = top.add_argument_group("how it is answered")
    add = sampled.add_argument
    add("--n", type=int, default=1, help="samples of each prompt (default: 1)")
    add("--temperature", type=float, default=1.0, help="default: 1; 0 is greedy")
    add("--top-p", type=float, default=1.0)
    add("--top-k", type=int, default=0)
    add("--greedy", action="store_true", help="as --temperature 0 --n 1")
    add("--max-new-tokens", type=int, default=1024)
    add("--stop", action="append", default=[], help="a token that ends a response; repeatable")
    add("--seed", type=int, default=0)

    scored = top.add_argument_group("how it is scored")
    add = scored.add_argument
    add("--reward", default="math", help="a reward's name or path.py:function (default: math)")
    add("--k", default="", metavar="K,...", help="of pass@k (default: 1, 2, 4, ..., n)")
    add("--responses", type=Path, metavar="FILE", help="write prompts with a response, to train on")
    add("--correct-only", action="store_true", help="of --responses, those with full marks alone")
    add("--samples", type=int, default=24, help="prompts shown in the report")

    engine = top.add_argument_group("who answers")
    add = engine.add_argument
    add("--engine", choices=("embedded", "sglang"), default="embedded")
    add("--dtype", choices=("fp32", "bf16"), help="default: bf16 on a GPU, fp32 elsewhere")
    add("--batch-size", type=int, default=64, help="sequences at once on a rank, embedded")
    add("--url", action="append", default=[], help="a running server, sglang; repeatable")
    add("--servers", type=int, default=1, help="servers to start, sglang without --url")
    add("--tensor", type=int, default=1, help="tensor-parallel size of a server that is started")
    add("--sglang-python", default="", help="interpreter that has sglang (default: this one)")
    add("--sglang-arg", action="append", default=[], help="one more argument of a started server")
    add("--portion", type=int, default=0, help="prompts asked for at a time; 0: by the batch size")
    return top


def check(args: argparse.Namespace) -> tuple[int, ...]:
    """Checks the arguments, fills in what follows from others, and returns the k of pass@k.

    Raises:
        ConfigError: arguments that make no sense together.
    """
    if args.greedy:
        args.temperature, args.n = 0.0, 1
    for name in ("n", "max_new_tokens", "batch_size", "servers", "tensor"):
        if getattr(args, name) < 1:
            raise ConfigError(
                f"--{name.replace('_', '-')}", f"found {getattr(args, name)}", "give 1 or more"
            )
    for name in ("num_prompts", "max_prompt_tokens", "samples", "portion", "temperature", "top_k"):
        if getattr(args, name) < 0:
            raise ConfigError(
                f"--{name.replace('_', '-')}", f"found {getattr(args, name)}", "give 0 or more"
            )
    if not 0 < args.top_p <= 1:
        raise ConfigError("--top-p", f"found {args.top_p}", "give a value in (0, 1]")
    if args.temperature == 0 and args.n > 1:
        raise ConfigError(
            "--n", f"{args.n} at temperature 0, where all are the same", "set --temperature 1"
        )
    if args.correct_only and not args.responses:
        raise ConfigError("--correct-only", "given without --responses", "name the file to write")
    if args.responses and (
        len(args.data) > 1 or (args.instruction or [AS_WRITTEN]) != [AS_WRITTEN]
    ):
        raise ConfigError(
            "--responses",
            "given with several --data or another --instruction",
            "ask one file, as it is written",
        )
    if args.responses and args.responses.suffix in (".parquet", ".pq"):
        raise ConfigError(
            "--responses", f"{args.responses}, and JSON lines are written", "name it .jsonl"
        )
    if args.responses and args.responses.resolve() in {Path(p).resolve() for p in args.data}:
        raise ConfigError("--responses", f"{args.responses} is what is asked", "name another file")
    if args.engine == "embedded" and args.url:
        raise ConfigError("--url", "given, and --engine is embedded", "set --engine sglang")
    try:
        ks = tuple(sorted({int(word) for word in args.k.split(",")})) if args.k else ()
    except ValueError as error:
        raise ConfigError("--k", f"found {args.k!r}", "give numbers, as in 1,4,16") from error
    if ks and not 1 <= ks[0] <= ks[-1] <= args.n:
        raise ConfigError("--k", f"{args.k} with --n {args.n}", "give values from 1 to n")
    return ks or default_ks(args.n)


def run_config(args: argparse.Namespace) -> Config:
    """The arguments as a run's configuration, as far as an engine asks for it."""
    return Config(
        run=RunConfig(name=args.out.name, dir=str(args.out), seed=args.seed),
        student=StudentConfig(path=args.model),
        rollout=RolloutConfig(
            kind=args.engine,
            n=args.n,
            max_new_tokens=args.max_new_tokens,
            batch_size=args.batch_size,
            urls=tuple(args.url),
            launch=args.engine == "sglang" and not args.url,
            sglang=SGLangConfig(
                num_servers=args.servers,
                tensor=args.tensor,
                python=args.sglang_python,
                args=tuple(args.sglang_arg),
            ),
        ),
    )
