"""Writes prompt files from data sets that are on this disk, or generates one.

python tools/prepare_data.py gsm8k --in gsm8k/main --split train --out train.jsonl
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megaopd.data import reasoning_gym
from megaopd.data.preparation import Form, convert, prepare
from megaopd.data.rows import num_rows
from megaopd.data.sources import INSTRUCTIONS, SOURCES, Columns
from megaopd.errors import ConfigError, run_cli
from megaopd.rewards import REWARDS

EPILOG = """\
what comes out
  OUT                   .jsonl or .parquet, by its name; complete or not there. Columns: id, prompt
                        (messages, or a string with --text), answer, data_source, and teacher where
                        --teacher names one, and response with --responses. data.train and
                        data.eval take it as it is.
  OUT.dropped.jsonl     a line for every row that was left out, with the row and the reason; no file
                        where there is none. The same prompt a second time is left out, and so is
                        one that is in a file of --against, or shares --ngram words with one.
  A row that cannot be understood ends it with one line and exit status 3; --on-bad drop lists it.

examples
  python tools/prepare_data.py gsm8k --in gsm8k/main --split test --out data/gsm8k_test.jsonl
  python tools/prepare_data.py gsm8k --in gsm8k/main --split train --out data/gsm8k.jsonl \\
      --against data/gsm8k_test.jsonl
  python tools/prepare_data.py dapo_math --in DAPO-Math-17k/data --out data/dapo.parquet \\
      --against data/aime24.jsonl --against data/aime25.jsonl
  python tools/prepare_data.py math500 --in MATH-500/test.jsonl --out data/math500.jsonl
  python tools/prepare_data.py messages --in chats.parquet --answer-column a.b --out c.jsonl
  python tools/prepare_data.py reasoning_gym --task chain_sum=500 --task countdown --size 200 \\
      --out data/reasoning.jsonl
"""


def parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    top = argparse.ArgumentParser(description=__doc__, epilog=EPILOG, formatter_class=raw)
    kinds = top.add_subparsers(dest="kind", required=True, metavar="KIND")
    for name, source in SOURCES.items():
        layouts = "".join(f"\n  {where}\n      {columns}" for where, columns in source.layouts)
        kind = kinds.add_parser(
            name,
            help=source.about,
            description=f"{source.about}\n\nlayouts read, parquet and JSONL alike{layouts}",
            formatter_class=raw,
        )
        kind.add_argument(
            "--in", dest="path", type=Path, required=True, help="a file, or a directory of files"
        )
        kind.add_argument("--split", default="", help="of a directory's files, those of this split")
        kind.add_argument(
            "--prompt-column", default="", help="in place of the layout's; dots lead into structs"
        )
        kind.add_argument("--answer-column", default="", help="the same for the answer")
        _add_common(kind, source.instruction)
    generated = kinds.add_parser(
        "reasoning_gym",
        help="problems that reasoning-gym generates (pip install 'megaopd[reasoning_gym]')",
        description="Generates problems of reasoning-gym's tasks, which score answers themselves:\n"
        "train and evaluate with the reward reasoning_gym.",
        formatter_class=raw,
    )
    generated.add_argument(
        "--task",
        action="append",
        default=[],
        metavar="NAME[=NUMBER]",
        help="a task and how many problems of it; once for each task",
    )
    generated.add_argument(
        "--size", type=int, default=1000, help="problems of a task without NUMBER"
    )
    generated.add_argument("--seed", type=int, default=0, help="of the problems")
    _add_common(generated, reasoning_gym.INSTRUCTION)
    return top


def _add_common(kind: argparse.ArgumentParser, instruction: str) -> None:
    kind.add_argument("--out", type=Path, required=True, help="the prompt file: .jsonl or .parquet")
    kind.add_argument(
        "--against",
        action="append",
        default=[],
        type=Path,
        metavar="FILE",
        help="a prompt file whose prompts must not be in this one; may be given again",
    )
    kind.add_argument(
        "--ngram",
        type=int,
        default=0,
        metavar="N",
        help="nor may N words in a row of them: 13, say (default: whole prompts are compared)",
    )
    kind.add_argument(
        "--instruction",
        choices=list(INSTRUCTIONS),
        default=instruction,
        help="how the answer is asked for (default: %(default)s)",
    )
    kind.add_argument("--system", default="", help="a system message before every prompt")
    kind.add_argument("--text", action="store_true", help="prompts as plain text, not as messages")
    kind.add_argument("--data-source", default="", help="column data_source (default: the row's)")
    kind.add_argument(
        "--responses",
        action="store_true",
        help="write the solution, or the assistant's last turn, to column response (for SFT, GKD)",
    )
    kind.add_argument("--teacher", default="", help="the entry of `teachers` for all rows")
    kind.add_argument(
        "--on-bad",
        choices=("stop", "drop"),
        default="stop",
        help="what a row does that cannot be understood (default: %(default)s)",
    )
    kind.add_argument("--overwrite", action="store_true", help="replace OUT")


def _with_bar(rows: Iterable[Any], total: int | None) -> Iterator[Any]:
    yield from tqdm(rows, total=total, unit=" rows", disable=None, mininterval=0.5)


def main(argv: list[str]) -> None:
    args = parser().parse_args(argv)
    if args.ngram and (args.ngram < 0 or not args.against):
        found = f"found {args.ngram}" if args.against else "given without --against"
        raise ConfigError("--ngram", found, "give a number of words, and the files to compare with")
    if args.kind == "reasoning_gym":
        sizes = reasoning_gym.task_sizes(args.task, args.size)
        rows = reasoning_gym.generate(sizes, args.seed, REWARDS["reasoning_gym"])
        total: int | None = sum(sizes.values())
    else:
        columns = Columns(args.prompt_column, args.answer_column)
        rows = convert(args.kind, args.path, args.split, columns)
        total = num_rows(args.path, args.split)
    form = Form(
        args.kind,
        args.instruction,
        args.system,
        args.text,
        args.data_source,
        args.teacher,
        args.responses,
    )
    done = prepare(
        _with_bar(rows, total),
        form,
        args.out,
        against=args.against,
        ngram=args.ngram,
        on_bad=args.on_bad,
        overwrite=args.overwrite,
    )
    print(done)
    expected = SOURCES[args.kind].num_problems if args.kind in SOURCES else None
    if expected and done.kept < expected:
        print(f"note: a complete {args.kind} has {expected} problems")


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
