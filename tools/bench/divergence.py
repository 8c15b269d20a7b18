"""Speed, memory and exactness of the divergences beside their peers, in one run.

    python tools/bench/divergence.py [--device cuda]

Prints one table and writes it as JSON. Sections:

  logits   forward and backward of [T, V] logits: every kind, our backends, TRL, ModelOpt (plain and
           tensor-parallel path), Liger, naive torch, and the streaming limit (read two arrays,
           write one)
  fused    the same from hidden states (H = 1024) and heads, beside its four bare matmuls
  tp2      logits split over two ranks with gloo (CPU)
  memory   peak of one call beyond its inputs, each contender in a process of its own

On a CPU: one thread, CPU time, medians of rounds in which the contenders of a kind take turns. On
a GPU: CUDA events and the allocator's peak. Peers (TRL, ModelOpt, Liger) are installed into a venv
of their own, .bench/peers. A whole run takes long; in pieces, all in one table:

  python tools/bench/divergence.py --sections logits --kinds reverse_kl jsd --dtypes float32
  python tools/bench/divergence.py --sections fused --contenders ours trl --append
  python tools/bench/divergence.py --sections memory --kinds jsd --append
  python tools/bench/divergence.py --tokens 16 --vocab 4096 --repeats 1 --json /tmp/smoke.json
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from megaopd.losses import DIVERGENCES  # noqa: E402
from tools.bench.divergence_bench import contenders, measure, peers, report, sections  # noqa: E402

SECTIONS = ("logits", "fused", "tp2", "memory")
CONTENDERS = ("ours", "naive", "trl", "modelopt", "liger")


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", default="cpu", choices=["cpu", "cuda"])
    add("--tokens", type=int, help="T; default 256 on a CPU, 32768 on a GPU")
    add("--vocab", type=int, default=151_936, help="V; default %(default)s")
    add(
        "--sections",
        nargs="+",
        metavar="SECTION",
        default=SECTIONS,
        choices=SECTIONS,
        help=f"of {', '.join(SECTIONS)}; default all",
    )
    add(
        "--kinds",
        nargs="+",
        metavar="KIND",
        choices=list(DIVERGENCES),
        help=f"of {', '.join(DIVERGENCES)}; default all, "
        f"for memory {', '.join(sections.MEMORY_KINDS)}",
    )
    dtypes = ("float32", "bfloat16")
    add("--dtypes", nargs="+", metavar="DTYPE", default=dtypes, choices=dtypes, help="default both")
    names = ", ".join(CONTENDERS)
    add(
        "--contenders",
        nargs="+",
        metavar="NAME",
        default=CONTENDERS,
        choices=CONTENDERS,
        help=f"of {names}; default all",
    )
    add("--repeats", type=int, default=5, help="timed rounds, half as many for fused")
    add("--json", type=Path, default=ROOT / ".bench" / "divergence.json", help="where rows go")
    add("--append", action="store_true", help="keep the rows of --json that are not measured anew")
    add("--no-install", action="store_true", help="peers only if they are installed already")
    add("--memory-of", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.repeats < 1:
        parser.error("--repeats: at least 1")
    options.tokens = options.tokens or (256 if options.device == "cpu" else 32_768)
    return options


def measured(options: argparse.Namespace, site: Path | None) -> list[report.Row]:
    rows: list[report.Row] = []
    sections.single_rank_group()
    kinds = options.kinds or list(DIVERGENCES)
    for dtype in options.dtypes:
        for kind in kinds:
            for name in ("logits", "fused"):
                if name in options.sections:
                    print(f"{name} {dtype} {kind}", file=sys.stderr)
                    rows += getattr(sections, name)(options, dtype, kind, site)
    if "tp2" in options.sections:
        if options.device == "cpu":
            rows += sections.tensor_parallel(options, kinds, site)
        else:
            note = "over gloo, on a CPU"
            rows += [report.Row("tp2", d, "-", "-", note=note) for d in options.dtypes]
    if "memory" in options.sections:
        for dtype in options.dtypes:
            for kind in options.kinds or sections.MEMORY_KINDS:
                rows += memory_of_kind(options, dtype, kind, site)
    return rows


def memory_of_kind(
    options: argparse.Namespace, dtype: str, kind: str, site: Path | None
) -> list[report.Row]:
    on_logits = contenders.on_logits(kind, options.device, site, options.contenders)
    if "ours" in options.contenders:
        on_logits.append(sections.in_place(kind, options.device))
    on_heads = contenders.on_heads(kind, options.device, site, options.contenders)
    rows = []
    for section, found in (("logits", on_logits), ("fused", on_heads)):
        for contender in found:
            if contender.loss:
                print(f"memory {section} {dtype} {kind} {contender.name}", file=sys.stderr)
                rows.append(sections.memory(options, section, dtype, kind, contender.name))
    return rows


def main(argv: list[str]) -> None:
    options = parse(argv)
    torch.set_num_threads(1)
    folder = ROOT / ".bench" / "peers"
    if options.memory_of:
        sections.memory_child(options, peers.peer_site(folder, install=False))
        return
    wanted = measure.TIME_ALLOCATOR
    if options.device == "cpu" and any(os.environ.get(k) != v for k, v in wanted.items()):
        # The allocator reads its settings when a process starts.
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **wanted})
    setting = {
        "shape": f"T={options.tokens} V={options.vocab}, fused H={contenders.HIDDEN}",
        "machine": f"{options.device}, one thread, torch {torch.__version__}",
        "allocator for times": " ".join(f"{k}={v}" for k, v in wanted.items()),
        "allocator for memory": " ".join(f"{k}={v}" for k, v in measure.MEMORY_ALLOCATOR.items()),
        "peers": " ".join(f"{name}=={version}" for name, version in peers.VERSIONS.items()),
    }
    older = report.read(options.json, setting) if options.append else []
    needs_peers = set(options.contenders) & {"trl", "modelopt", "liger"}
    site = None
    if needs_peers:
        site = peers.peer_site(folder, install=not options.no_install)
    rows = report.merge(older, measured(options, site))
    report.write(options.json, setting, rows)
    report.show(setting, rows)


if __name__ == "__main__":
    main(sys.argv[1:])
