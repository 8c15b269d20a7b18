"""The command line: megaopd-convert hf-to-megatron | megatron-to-hf | check."""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn, get_args

from megaopd.config import Dtype
from megaopd.errors import ConfigError, run_cli

_OVERVIEW = """\
Converts models between Hugging Face directories and Megatron checkpoints.

  megaopd-convert hf-to-megatron Qwen3-8B qwen3-8b-megatron
  megaopd-convert check Qwen3-8B qwen3-8b-megatron
  megaopd-convert megatron-to-hf runs/mine/megatron exported --step 200
"""

_RANKS = """
Several processes share the work; start them with torchrun, on one node or on several that see the
same file system:

  torchrun --nproc-per-node 8 -m megaopd.convert {example}

Memory: each process holds one parameter at a time, never the model. Everything is written to a
hidden directory beside the destination and renamed when it is complete, verified by SHA-256
(`sha256sum -c SHA256SUMS` checks it without us) and on the disk. After an interruption just start
again.

Exit status: 0 done; 2 wrong usage, an unknown architecture, or the destination exists; 4 the source
is damaged, incomplete or no such model; 5 no space left.
"""

_TO_MEGATRON = """\
Hugging Face directory -> Megatron checkpoint DST/iter_0000000, in the torch_dist format that any
TP x PP x CP x EP layout reads. Tokenizer, chat template and configuration go along into its hf/.

  megaopd-convert hf-to-megatron Qwen3-8B qwen3-8b-megatron
  megaopd-convert hf-to-megatron Qwen3-8B qwen3-8b-megatron --dtype bf16 --dry-run

Only safetensors are read, and no code of the model's directory is executed.
"""

_TO_HF = """\
Megatron checkpoint, of a conversion or of a run on any layout -> Hugging Face directory that
transformers and SGLang load as it is. Optimizer states are left out.

  megaopd-convert megatron-to-hf runs/mine/megatron exported
  megaopd-convert megatron-to-hf runs/mine/megatron exported --step 200 --max-shard-size 2GB

SRC is the directory with iter_* in it, or one of them.
"""

_CHECK = """\
Compares a Hugging Face directory with a Megatron checkpoint, tensor by tensor and bit by bit; with
--logits also the logits that transformers and Megatron compute from them.

  megaopd-convert check Qwen3-8B qwen3-8b-megatron
  megaopd-convert check Qwen3-8B qwen3-8b-megatron --logits --samples 8
"""

_SIZE = re.compile(r"^(\d+(?:\.\d+)?)\s*([KMGT]?)(I?)B$")


def parse_size(text: str) -> int:
    """Bytes of "5GB" (powers of 1000) or "5GiB" (powers of 1024).

    Raises:
        argparse.ArgumentTypeError: it is no size, or below one byte.
    """
    match = _SIZE.match(text.upper())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size such as 5GB, 500MB or 4GiB")
    base = 1024 if match[3] else 1000
    size = int(float(match[1]) * base ** " KMGT".index(match[2] or " "))
    if size < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is less than a byte")
    return size


def main(argv: list[str]) -> None:
    """Runs one command; see `run` for the process around it."""
    args = _parser().parse_args(argv)
    signal.signal(signal.SIGTERM, _end)
    args.run(args)


def run(argv: list[str] | None = None) -> None:
    """The process: errors become one line and an exit status, an interruption leaves nothing."""
    argv = sys.argv[1:] if argv is None else argv
    use_huge_pages()
    try:
        run_cli(main, argv)
    except KeyboardInterrupt:
        _leave(128 + signal.SIGINT)
    except SystemExit as stop:
        if stop.code != 128 + signal.SIGTERM:  # argparse's own
            raise
        _leave(128 + signal.SIGTERM)
    if "torch" in sys.modules and sys.modules["torch"].distributed.is_initialized():
        sys.modules["torch"].distributed.destroy_process_group()


def use_huge_pages() -> None:
    """Lets torch take memory in huge pages; to be called before torch is imported.

    Every parameter gets fresh memory, and in pages of 4 KiB its first touch takes several times as
    long as filling it.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def _end(number: int, frame: Any) -> NoReturn:
    """SIGTERM as an exception, so that what has been written is removed on the way out."""
    raise SystemExit(128 + number)


def _leave(status: int) -> NoReturn:
    """Ends at once, because other ranks may be waiting in a collective."""
    print("error: interrupted; nothing was left at the destination", file=sys.stderr, flush=True)
    os._exit(status)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="megaopd-convert",
        description=_OVERVIEW,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(
        name: str, run: Callable[[argparse.Namespace], None], line: str, text: str, example: str
    ) -> argparse.ArgumentParser:
        added = commands.add_parser(
            name,
            help=line,
            description=text,
            epilog=_RANKS.format(example=example) if example else None,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        added.set_defaults(run=run)
        return added

    to_megatron = command(
        "hf-to-megatron",
        _run_to_megatron,
        "Hugging Face directory -> Megatron checkpoint",
        _TO_MEGATRON,
        "hf-to-megatron Qwen3-32B qwen3-32b-megatron",
    )
    to_megatron.add_argument("src", metavar="SRC_HF", type=Path, help="Hugging Face directory")
    to_megatron.add_argument("dst", metavar="DST", type=Path, help="directory to write")

    to_hf = command(
        "megatron-to-hf",
        _run_to_hf,
        "Megatron checkpoint -> Hugging Face directory",
        _TO_HF,
        "megatron-to-hf runs/mine/megatron exported",
    )
    to_hf.add_argument("src", metavar="SRC", type=Path, help="Megatron checkpoint")
    to_hf.add_argument("dst", metavar="DST_HF", type=Path, help="directory to write")
    to_hf.add_argument("--step", type=int, help="which step; by default the newest complete one")
    to_hf.add_argument(
        "--max-shard-size",
        type=parse_size,
        default=parse_size("5GB"),
        metavar="SIZE",
        help="a safetensors file is closed before it exceeds this (5GB); processes share whole "
        "files, so give at least as many as there are processes",
    )
    for converter in (to_megatron, to_hf):
        converter.add_argument(
            "--dtype",
            choices=get_args(Dtype),
            help="dtype of all weights; by default each keeps its own",
        )
        converter.add_argument(
            "--overwrite", action="store_true", help="replace a model that is at the destination"
        )
        converter.add_argument(
            "--dry-run",
            action="store_true",
            help="print names, shapes, dtypes and sizes, and write nothing",
        )

    check = command(
        "check", _run_check, "compare the two, bit by bit or by logits", _CHECK, example=""
    )
    check.add_argument("hf", metavar="HF", type=Path, help="Hugging Face directory")
    check.add_argument("megatron", metavar="MEGATRON", type=Path, help="Megatron checkpoint")
    check.add_argument("--step", type=int, help="which step; by default the newest complete one")
    check.add_argument("--logits", action="store_true", help="compare logits too")
    check.add_argument("--samples", type=int, default=8, help="sequences for --logits (8)")
    for name in ("tensor", "pipeline", "expert"):
        check.add_argument(
            f"--{name}", type=int, default=1, help=f"{name} parallelism for --logits (1)"
        )
    return parser


def _run_to_megatron(args: argparse.Namespace) -> None:
    from megaopd.convert.ranks import Ranks
    from megaopd.convert.to_megatron import STEP, ToMegatron
    from megaopd.storage.steps import step_directory

    ranks = Ranks.join()
    with ranks.together():
        conversion = ToMegatron(args.src, _torch_dtype(args.dtype))
    destination = step_directory(args.dst, STEP)
    _convert(args, conversion, destination, ranks, "made of")


def _run_to_hf(args: argparse.Namespace) -> None:
    from megaopd.convert.ranks import Ranks
    from megaopd.convert.to_hf import ToHF

    ranks = Ranks.join()
    with ranks.together():
        conversion = ToHF(args.src, args.step, _torch_dtype(args.dtype), args.max_shard_size)
    _convert(args, conversion, args.dst, ranks, "file")


def _convert(
    args: argparse.Namespace, conversion: Any, destination: Path, ranks: Any, last: str
) -> None:
    """Runs either direction, or with --dry-run says what it would do."""
    from megaopd.convert.progress import shown_bytes

    rows = list(conversion.rows())
    what = f"{len(rows)} tensors, {shown_bytes(conversion.num_bytes)}"
    if args.dry_run:
        if ranks.is_main:
            _print_table(("name", "shape", "dtype", "bytes", last), rows)
            print(f"{what} would be written to {destination}; nothing was")
        return
    started = time.monotonic()
    conversion.run(args.dst, overwrite=args.overwrite, ranks=ranks)
    if ranks.is_main:
        elapsed = time.monotonic() - started
        rate = shown_bytes(conversion.num_bytes / elapsed)
        print(f"{destination}: {what} in {elapsed:.1f} s, {rate}/s")


def _print_table(titles: tuple[str, ...], rows: Iterable[tuple[Any, ...]]) -> None:
    cells = [titles, *(tuple(str(cell) for cell in row) for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(titles) - 1)]
    for row in cells:
        print("  ".join([*map(str.ljust, row, widths), row[-1]]))


def _run_check(args: argparse.Namespace) -> None:
    from megaopd.config import ParallelConfig
    from megaopd.convert.check import check_conversion

    for name in ("samples", "tensor", "pipeline", "expert"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name}", f"is {getattr(args, name)}", "give a positive number")
    report = check_conversion(
        args.hf,
        args.megatron,
        step=args.step,
        logits=args.logits,
        samples=args.samples,
        parallel=ParallelConfig(tensor=args.tensor, pipeline=args.pipeline, expert=args.expert),
    )
    if os.environ.get("RANK", "0") == "0":
        print(report.table(), flush=True)
    report.require()


def _torch_dtype(name: str | None) -> Any:
    if name is None:
        return None
    from megaopd.models.build import DTYPES

    return DTYPES[name]
