"""How full micro-batches are, and how even the ranks: token budget, fixed size, plain padding.

    python tools/bench/packing.py [--samples 512] [--steps 16] [--dp 8] [--budget 4096]

The lengths are those of a real corpus: the docstrings of modules, classes and functions, and the
Markdown and reStructuredText files, of the packages installed beside megaopd, tokenized with the
demo's tokenizer (tools/prepare_demo.py). They are long-tailed, as responses are; what is longer
than --max-tokens is cut there, as a length limit cuts it. Every step draws --samples of them.

Four ways to make micro-batches of a step, over --dp data-parallel ranks:

  padded       --micro-batch-size samples as they come, all padded to the longest of them
  fixed size   the same number of samples, packed, the ranks balanced by cost
  by count     a token budget of --budget, every rank as many samples as they come
  budget       a token budget, the ranks balanced by cost

efficiency: real over computed tokens. largest: tokens of the largest micro-batch, which the memory
of a run must hold. fill: mean over largest. balance: mean over largest cost of the ranks, whose
inverse is how much longer the slowest rank makes the step; the cost of n tokens is
n (1 + n / attention_length), with the attention_length of an 8B model.
"""

from __future__ import annotations

import argparse
import ast
import json
import random
import statistics
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megaopd.batch import Prompt, Sample
from megaopd.config import ParallelConfig
from megaopd.data.packing import Assignment, Batching, CostModel, MicroBatch, Packing
from megaopd.parallel.layout import Layout

ROOT = Path(__file__).resolve().parents[2]


def texts(folder: Path) -> Iterator[str]:
    """Docstrings and documentation files below a folder, in the order of their paths."""
    for path in sorted(folder.rglob("*")):
        if path.suffix in (".md", ".rst"):
            yield path.read_text(errors="ignore")
        elif path.suffix == ".py":
            try:
                tree = ast.parse(path.read_bytes())
            except (SyntaxError, ValueError):
                continue
            for node in ast.walk(tree):
                documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
                if documented and (text := ast.get_docstring(node)):
                    yield text


def corpus_lengths(tokenizer_dir: Path, packages: list[str], limit: int) -> list[int]:
    """Tokens of every text of at least 16 of them."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    site = Path(sysconfig.get_paths()["purelib"])
    found = [text for name in packages for text in texts(site / name)]
    ids = tokenizer(found, add_special_tokens=False)["input_ids"]
    return [min(len(row), limit) for row in ids if len(row) >= 16]


def sample(index: int, length: int) -> Sample:
    return Sample(Prompt(str(index), (0,)), 0, (0,) * (length - 1), (), (), "stop", 0)


def in_order(lengths: list[int], dp_size: int, size: int) -> Assignment:
    """Micro-batches of `size` samples, every rank as many samples, as they come."""
    share = len(lengths) // dp_size
    return Assignment(
        tuple(
            tuple(
                MicroBatch("", tuple(range(start, min(start + size, (rank + 1) * share))))
                for start in range(rank * share, (rank + 1) * share, size)
            )
            for rank in range(dp_size)
        )
    )


def budget_by_count(samples: list[Sample], batching: Batching) -> Assignment:
    """Every rank as many samples, as they come; the rank fills micro-batches by the budget."""
    share, one = len(samples) // batching.layout.dp_size, Layout(ParallelConfig(), 1)
    alone = Batching(one, batching.packing, cost=batching.cost)
    ranks = []
    for first in range(0, len(samples), share):
        (parts,) = alone.assign(samples[first : first + share]).by_rank
        ranks.append([MicroBatch("", tuple(first + i for i in part.samples)) for part in parts])
    num = max(map(len, ranks))
    return Assignment(tuple(tuple(r + [MicroBatch("", ())] * (num - len(r))) for r in ranks))


def figures(lengths: list[int], assignment: Assignment, padded: bool, cost: Any) -> dict[str, Any]:
    """Of one step."""
    sizes, costs = [], []
    for parts in assignment.by_rank:
        of_rank = [[lengths[i] for i in part.samples] for part in parts]
        if padded:
            of_rank = [[max(part)] * len(part) for part in of_rank]
        sizes += [sum(part) for part in of_rank]
        costs.append(sum(cost(n) for part in of_rank for n in part))
    return {
        "efficiency": sum(lengths) / sum(sizes),
        "micro_batches": assignment.num_micro_batches,
        "largest": max(sizes),
        "fill": sum(sizes) / len(sizes) / max(sizes),
        "balance": sum(costs) / len(costs) / max(costs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=512, help="samples of a step")
    parser.add_argument("--steps", type=int, default=16, help="steps that are averaged")
    parser.add_argument("--dp", type=int, default=8, help="data-parallel ranks")
    parser.add_argument("--micro-batch-size", type=int, default=4)
    parser.add_argument("--budget", type=int, default=4096, help="tokens of a micro-batch")
    parser.add_argument("--max-tokens", type=int, default=4096, help="longest sample")
    parser.add_argument("--packages", nargs="+", default=["transformers", "numpy"])
    parser.add_argument("--tokenizer", type=Path, default=ROOT / ".cache/demo/student")
    parser.add_argument("--out", type=Path, default=ROOT / ".bench/packing.json")
    args = parser.parse_args()

    corpus = corpus_lengths(args.tokenizer, args.packages, args.max_tokens)
    cost = CostModel()
    layout = Layout(ParallelConfig(), args.dp)
    fixed = Batching(layout, Packing(args.micro_batch_size), cost=cost)
    budget = Batching(layout, Packing(max_tokens=args.budget), cost=cost)
    rng = random.Random(0)
    rows: dict[str, list[dict[str, Any]]] = {}
    for _ in range(args.steps):
        lengths = rng.choices(corpus, k=args.samples)
        samples = [sample(i, n) for i, n in enumerate(lengths)]
        as_they_come = in_order(lengths, args.dp, args.micro_batch_size)
        for name, assignment in (
            ("padded", as_they_come),
            ("fixed size", fixed.assign(samples)),
            ("by count", budget_by_count(samples, budget)),
            ("budget", budget.assign(samples)),
        ):
            found = figures(lengths, assignment, name == "padded", cost)
            rows.setdefault(name, []).append(found)
    many = [sample(i, n) for i, n in enumerate(rng.choices(corpus, k=8192))]
    start = time.perf_counter()
    budget.assign(many)
    seconds = time.perf_counter() - start

    table = {
        name: {key: statistics.mean(row[key] for row in of_step) for key in of_step[0]}
        for name, of_step in rows.items()
    }
    quantiles = statistics.quantiles(corpus, n=100)
    shape = {
        "texts": len(corpus),
        "mean": statistics.mean(corpus),
        **{f"p{q}": quantiles[q - 1] for q in (50, 90, 99)},
        "max": max(corpus),
    }
    print("corpus:", ", ".join(f"{key} {value:.0f}" for key, value in shape.items()))
    print(f"{'':10} {'efficiency':>10} {'micro-batches':>13} {'largest':>8} {'fill':>6} balance")
    for name, row in table.items():
        print(
            f"{name:10} {row['efficiency']:10.3f} {row['micro_batches']:13.1f} "
            f"{row['largest']:8.0f} {row['fill']:6.3f} {row['balance']:7.3f}"
        )
    print(f"assigning 8,192 samples: {seconds:.3f} s")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    settings = {k: v for k, v in vars(args).items() if k not in ("out", "tokenizer")}
    result = {**settings, "corpus": shape, "assign_8192_s": seconds, "table": table}
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
