"""The command line `torchrun --nproc-per-node N -m megaopd.verify conf=NAME [key=value ...]`."""

from __future__ import annotations

import os
import sys

from megaopd.errors import ConfigError, run_cli
from megaopd.verify.setup import Setup
from megaopd.verify.static import STATIC
from megaopd.verify.table import Table, row

USAGE = """usage: torchrun --nproc-per-node N -m megaopd.verify conf=NAME [key=value ...] [options]
       python -m megaopd.verify conf=NAME [key=value ...] --static [--ranks N]

Checks a set-up and prints a row for each check: what was found, and the fix where it failed. The
words are those of megaopd.train. All checks run on the run's own ranks: models are loaded, a few
samples are drawn, scored and trained on once, and the engine gets the new weights. Nothing is
exported.

--static       only what needs no device: configuration, files, tokenizers, templates, data, disk
--ranks N      with --static: the number of ranks that the run is to have
--tokens N     longest response that is sampled (default 64)
--debug        show the traceback of an error

Exit status: 0, or that of the first failed check (2 configuration, 3 data, 4 checkpoint,
5 environment, 6 numeric, 7 rollout); torchrun itself makes 1 of them all.
"""


def main(argv: list[str]) -> None:
    if not argv or {"-h", "--help"} & set(argv):
        print(USAGE, end="")
        return
    rest = list(argv)
    static = "--static" in rest
    if static:
        rest.remove("--static")
    ranks = _number(rest, "--ranks", int(os.environ.get("WORLD_SIZE", "1")))
    num_tokens = _number(rest, "--tokens", 64)
    is_main = os.environ.get("RANK", "0") == "0"
    table = Table(_say if is_main else _say_nothing)
    setup = Setup(rest, ranks, num_tokens)
    table.run(STATIC, setup)
    if table.exit_status and not is_main:
        _speak_for_a_node(table)
    if static:
        table.show(table.summary())
    else:
        _on_devices(table, setup)
    if table.exit_status:
        raise SystemExit(table.exit_status)


def _speak_for_a_node(table: Table) -> None:
    """Other nodes may lack files that the first one has: their first ranks say so. All others leave
    as if nothing were wrong, or torchrun would end the first while it still writes its table."""
    if os.environ.get("LOCAL_RANK") != "0":
        raise SystemExit(0)
    for name, outcome in table.outcomes.items():
        if outcome.status == "FAIL":
            for line in row(name, outcome):
                print(f"rank {os.environ['RANK']}: {line}", file=sys.stderr, flush=True)


def _on_devices(table: Table, setup: Setup) -> None:
    import torch.distributed as dist
    from transformers.utils.logging import disable_progress_bar

    from megaopd.parallel import groups as parallel_groups
    from megaopd.verify.agreement import Agreement
    from megaopd.verify.step import ON_DEVICES

    disable_progress_bar()
    agree = Agreement()
    with setup.closing:
        table.run(ON_DEVICES, setup, agree)
    table.show(table.summary())
    if dist.is_initialized():
        agree.wait()
        parallel_groups.shutdown()


def _number(argv: list[str], option: str, default: int) -> int:
    """Takes `option N` out of the words."""
    if option not in argv:
        return default
    at = argv.index(option)
    text = argv[at + 1] if at + 1 < len(argv) else ""
    if not text.isdigit() or int(text) == 0:
        raise ConfigError(option, f"found {text!r}", "give a positive number")
    del argv[at : at + 2]
    return int(text)


def _say(line: str) -> None:
    print(line, flush=True)


def _say_nothing(line: str) -> None:
    """Of other ranks than the first."""


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
