"""What layouts of student and teacher cost: time, memory and hand-over of real distillation steps.

Every layout runs in fresh processes over gloo, one thread a rank: teacher forward, hand-over of its
hidden states, student step with the optimizer, in fp32, on the same samples (random tokens, long-
tailed lengths, three quarters of each a response). One step warms up. A layout changes no loss: the
benchmark fails, with exit status 6, where one differs by more than 1e-4 relative in any step.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from layout_step import BENCH, MODELS, VARIANTS, make_models, parse_layout
from processes import measure, torchrun

from megaopd.errors import ConfigError, EnvironmentFault, NumericError, run_cli

STEP = Path(__file__).with_name("layout_step.py")
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
# By number of ranks: what is measured where --layouts names nothing.
LAYOUTS = {
    2: ("DP2", "TP2", "TP2xSP", "PP2", "PP2xVP2", "CP2", "DP2/TP2", "TP2/PP2", "CP2/DP2"),
    3: ("DP3", "TP3", "TP3xSP", "CP3", "TP3/DP3", "DP3/TP3"),
    4: (
        *("DP4", "TP4", "TP4xSP", "DP2xTP2", "TP2xPP2", "TP2xCP2", "DP2xPP2xVP2"),
        *("DP4/TP4", "DP2xTP2/TP4", "TP4/PP2xDP2"),
    ),
}


EPILOG = """\
layouts
  STUDENT or STUDENT/TEACHER; a side is factors joined by x: DPn TPn PPn CPn, VPn (virtual stages of
  PP), SP (sequence parallelism). DP is what remains and need not be named. Without /TEACHER the
  teacher has the student's layout.

variants
  plain; selective, full (recomputation); teacher-offload, train-offload, offload (both). On a CPU,
  host memory is the same memory: offloading shows what the copies cost, not what it saves.

columns
  s/step       median wall time of the timed steps; x first: over the first row
  teacher, student   seconds of the two phases, of the same steps
  CPU s        median CPU time of all ranks together, which tells more where others use the machine
  peak GiB     highest resident set of all ranks together; above: over the moment when the process
               groups stood and no model was built
  handed MB    hidden states that left their rank: rows x H_teacher x 4 bytes, a row once a receiver
  logits MB    the same rows as logits: rows x (padded vocabulary / student's TP) x 4 bytes, since a
               receiver needs the columns of its own vocabulary shard
  loss         mean reverse KL per token in the last step

How full micro-batches get is measured by packing.py, megaopd beside transformers by train_step.py.

examples
  python tools/bench/layouts.py --ranks 2
  python tools/bench/layouts.py --ranks 4 --layouts DP4 TP2xPP2 TP2xCP2/TP4 --steps 5
  python tools/bench/layouts.py --ranks 2 --layouts DP2 PP2 --variants plain full offload
  python tools/bench/layouts.py --ranks 3 --models demo      SmolLM2: 9 heads, 3 KV heads
"""


def check_losses(results: dict[str, dict[str, Any]]) -> None:
    """Raises:
    NumericError: a layout's loss in any step is not the first layout's.
    """
    first, *others = results
    for name in others:
        for step, (ours, its) in enumerate(
            zip(results[first]["losses"], results[name]["losses"], strict=True)
        ):
            if not abs(its - ours) <= 1e-4 * abs(ours):
                found = f"loss {its:.8f} in step {step}, {ours:.8f} in {first}"
                raise NumericError(name, found, "a layout must not change it: this is a defect")


def print_table(results: dict[str, dict[str, Any]]) -> None:
    """One line a layout; the columns are explained by --help."""
    first = next(iter(results.values()))
    width = max(map(len, results))
    heads = ["s/step", "x first", "teacher", "student", "CPU s", "peak GiB", "above"]
    heads += ["handed MB", "logits MB", "loss"]
    print(f"{'':{width}} " + " ".join(f"{head:>9}" for head in heads))
    for name, r in results.items():
        figures = (
            *(r["seconds"], r["seconds"] / first["seconds"], r["teacher_s"], r["student_s"]),
            *(r["cpu_seconds"], r["peak_gib"], r["peak_above_start_gib"]),
            *(r["hidden_bytes"] / 1e6, r["logits_bytes"] / 1e6),
        )
        line = " ".join(f"{figure:9.2f}" for figure in figures)
        print(f"{name:{width}} {line} {r['loss']:9.6f}")


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, default=2, help="processes (default 2)")
    parser.add_argument(
        "--layouts", nargs="+", metavar="NAME", help="see below (default: a list by --ranks)"
    )
    parser.add_argument(
        "--variants",
        nargs="+",
        choices=VARIANTS,
        default=["plain"],
        metavar="NAME",
        help=f"how each layout is run: {', '.join(VARIANTS)} (default plain)",
    )
    parser.add_argument(
        "--models",
        choices=MODELS,
        default="random",
        help="random: made here, 8 heads and 4 KV heads; demo: tools/prepare_demo.py's",
    )
    parser.add_argument("--tokens", type=int, default=1024, help="tokens of a step (default 1024)")
    parser.add_argument(
        "--micro-batch-tokens", type=int, default=256, help="token budget (default 256)"
    )
    parser.add_argument("--steps", type=int, default=3, help="timed steps (default 3)")
    parser.add_argument("--json", type=Path, default=BENCH / "layouts.json", help="result file")
    args = parser.parse_args(argv)
    args.layouts = args.layouts or list(LAYOUTS.get(args.ranks, ()))
    return args


def main(argv: list[str]) -> None:
    args = parse(argv)
    if args.models == "random":
        make_models()
    elif not (MODELS["demo"][0] / "config.json").is_file():
        found = "there are no demo models"
        raise EnvironmentFault(str(MODELS["demo"][0].parent), found, "run tools/prepare_demo.py")
    if not args.layouts:
        raise ConfigError("--layouts", f"no default for --ranks {args.ranks}", "name some")
    for layout in args.layouts:
        parse_layout(layout, args.ranks, args.models)

    common = [str(STEP), "--models", args.models, "--tokens", str(args.tokens)]
    common += ["--micro-batch-tokens", str(args.micro_batch_tokens), "--steps", str(args.steps)]
    results: dict[str, dict[str, Any]] = {}
    died = []
    for layout in args.layouts:
        for variant in args.variants:
            name = layout if variant == "plain" else f"{layout} {variant}"
            of_layout = ["--layout", layout, "--variant", variant]
            result = measure(name, [*torchrun(args.ranks), *common, *of_layout], ONE_THREAD)
            if result is None:
                died.append(name)
                continue
            results[name] = result
            print(f"{name}: {result['seconds']:.2f} s/step", flush=True)
    settings = {k: v for k, v in vars(args).items() if k != "json"}
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps({**settings, "results": results}, indent=2) + "\n")
    print(f"written to {args.json}")
    if results:
        print_table(results)
        check_losses(results)
    if died:
        raise EnvironmentFault(", ".join(died), "ended early", "see its own message above")


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
