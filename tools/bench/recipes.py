"""What recipes reach, and for how many of the student's tokens, FLOPs and seconds.

    python tools/bench/recipes.py [--only cost,tip,...] [--seeds 1,2,3] [--jobs 1] [--out DIR]

Every run trains the demo's student (tools/prepare_demo.py) on the demo's task `copy`, the same 8
prompts a step for all recipes of a seed, with the demo's learning rate, and is evaluated as it goes
(greedy answers to 32 prompts that are not trained on). What is compared:

  cost      exact OPD, OPD by policy gradient, SFT on the teacher's greedy answers, GRPO: accuracy
            against what the student spent
  near      exact OPD and GRPO from a student that lacks one layer of the teacher instead of four,
            and is right now and then: reward alone has nothing to tell one that never is
  tip       the half of the tokens that TIP takes, against all of them and against the other half
  schedule  forward KL, then reverse KL, against either alone
  paced     PACED's weights of prompts against equal ones, four samples a prompt, near's student

A run is a directory below DIR that `python -m megaopd.train` wrote; one that is complete is not run
again, so the command can be repeated after a stop. The figures are the means over seeds with 95 %
intervals (Student's t); ratios are compared seed by seed, by their geometric mean. DIR/results.json
has all of them, DIR/report.html the curves.

student tokens: response tokens that the student was trained on; but for SFT, it sampled each first.
student FLOPs: products with weights and attention, of prompts and responses: 3 forward passes for
the training, one where the student samples, one where its log-probs are asked for before the step.
The teacher's are not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from queue import Queue
from typing import Any

from recipe_figures import COSTS, Point, chart, figures, table, write_report
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[2]
DEMO = ROOT / ".cache/demo"
PROMPTS_PER_STEP = 8
NUM_PROMPTS = 160
# The student that is right now and then: its layer that is dropped, and its name in the demo.
MILD_LAYER, MILD = 15, "student_without_15"


@dataclass(frozen=True)
class Recipe:
    """A contender.

    Attributes:
        overrides: what makes it, beside what all have.
        samples: of each prompt; the batch holds so many times the prompts of a step.
        passes: forward passes of the student that a step amounts to: 3 for the training, 1 for the
            sampling.
    """

    overrides: tuple[str, ...]
    samples: int = 1
    num_steps: int = 6
    eval_interval: int = 1
    student: str = "student"
    passes: int = 4


@dataclass(frozen=True)
class Contest:
    """Recipes that are compared.

    Attributes:
        against: the one that the others are measured by.
        targets: accuracies; what it took to get there is compared.
    """

    against: str
    recipes: Mapping[str, Recipe]
    targets: tuple[float, ...] = ()


def _opd(*overrides: str, **fields: Any) -> Recipe:
    return Recipe(("+recipes=opd_full", *overrides), **fields)


CONTESTS: dict[str, Contest] = {
    "cost": Contest(
        "grpo",
        {
            "opd_full": _opd(),
            # One more pass for the log-probs in the advantage.
            "opd_policy_gradient": Recipe(("+recipes=opd_policy_gradient",), num_steps=8, passes=5),
            "sft": Recipe(("+recipes=sft",), passes=3),
            "grpo": Recipe(("+recipes=grpo",), samples=8, num_steps=10, eval_interval=2),
        },
        targets=(0.5, 0.8),
    ),
    "near": Contest(
        "grpo",
        {
            "opd_full": _opd(student=MILD, num_steps=4),
            "grpo": Recipe(("+recipes=grpo",), samples=8, student=MILD),
        },
        targets=(0.9,),
    ),
    "tip": Contest(
        "all",
        {
            "all": _opd(),
            "soft_or_half": _opd("loss.selection=soft_or", "loss.selection_ratio=0.5"),
            "other_half": _opd(
                "loss.selection=soft_or", "loss.selection_ratio=0.5", "loss.selection_lowest=true"
            ),
        },
    ),
    "schedule": Contest(
        "reverse_kl",
        {
            "reverse_kl": _opd(),
            "forward_kl": _opd("loss.kind=forward_kl"),
            "forward_then_reverse": _opd(
                "+loss.schedule.forward={until_step: 2, kind: mixed, beta: 0.0}",
                "+loss.schedule.blend={until_step: 4, kind: mixed, beta: 1.0, linear: true}",
            ),
        },
    ),
    "paced": Contest(
        "uniform",
        {
            "uniform": _opd(samples=4, student=MILD),
            "paced": _opd("credit.weights=paced", samples=4, student=MILD),
        },
    ),
}


def command(recipe: Recipe, seed: int, out: Path, run_dir: Path) -> list[str]:
    batch = PROMPTS_PER_STEP * recipe.samples
    return [
        *(sys.executable, "-m", "megaopd.train", "conf=demo_cpu"),
        *recipe.overrides,
        f"run.seed={seed}",
        f"run.dir={run_dir}",
        f"student.path={DEMO / recipe.student}",
        f"teacher.path={DEMO / 'teacher'}",
        f"data.train={out / 'prompts.jsonl'}",
        f"data.eval={DEMO / 'copy/eval.jsonl'}",
        "parallel.tensor=1",
        f"rollout.n={recipe.samples}",
        f"train.global_batch_size={batch}",
        f"train.micro_batch_size={min(batch, 16)}",
        f"train.num_steps={recipe.num_steps}",
        "optimizer.warmup_steps=2",
        "optimizer.decay=constant",
        # Compiling would be most of so short a run.
        "loss.backend=eager",
        "eval.num_prompts=32",
        f"eval.interval={recipe.eval_interval}",
        "eval.teacher=false",
        "train.export=false",
        "log.tensorboard=false",
    ]


def prepare(out: Path) -> None:
    """The models of the demo and the prompts with the teacher's greedy answers, where missing."""
    tools = ROOT / "tools"
    if not (DEMO / "student" / "config.json").exists():
        _run([sys.executable, str(tools / "prepare_demo.py"), "--out", str(DEMO)])
    if not (DEMO / MILD / "config.json").exists():
        drop = ["--student", MILD, "--drop-layers", str(MILD_LAYER)]
        _run([sys.executable, str(tools / "prepare_demo.py"), "--out", str(DEMO), *drop])
    if not (out / "prompts.jsonl").exists():
        ask = [
            *(sys.executable, str(tools / "evaluate.py"), str(DEMO / "teacher")),
            *("--data", str(DEMO / "copy/train.jsonl"), "--num-prompts", str(NUM_PROMPTS)),
            *("--greedy", "--max-new-tokens", "8", "--stop", "\n", "--reward", "exact_match"),
            *("--out", str(out / "teacher"), "--responses", str(out / "prompts.jsonl")),
        ]
        _run(ask)


def _run(arguments: Sequence[str]) -> None:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    subprocess.run(arguments, check=True, cwd=ROOT, env=env)


def train(recipe: Recipe, seed: int, out: Path, run_dir: Path, cores: Queue[set[int]]) -> None:
    """One run, unless it is there already.

    Args:
        cores: sets of cores that nobody uses; it takes one for as long as it runs.

    Raises:
        SystemExit: it failed; its output is in run_dir.log.
    """
    if (run_dir / "summary.json").exists():
        return
    run_dir.mkdir(parents=True, exist_ok=True)
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    log = run_dir.with_suffix(".log")
    own = cores.get()
    try:
        with log.open("w") as file:
            status = subprocess.run(
                command(recipe, seed, out, run_dir),
                cwd=ROOT,
                env=env,
                stdout=file,
                stderr=file,
                # A trainer has as many threads as it has cores.
                preexec_fn=lambda: os.sched_setaffinity(0, own),
            ).returncode
    finally:
        cores.put(own)
    if status:
        raise SystemExit(f"error: {run_dir.name}: status {status}; read {log}")


def curve(recipe: Recipe, run_dir: Path, prompt_tokens: float) -> list[Point]:
    points: list[Point] = []
    tokens = flops = seconds = 0.0
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        if "time/step_s" in row:
            samples = PROMPTS_PER_STEP * recipe.samples
            tokens += row["train/loss_tokens"]
            response = row["train/loss_tokens"] / samples
            flops += (
                recipe.passes * samples * _forward_flops(recipe.student, prompt_tokens, response)
            )
            seconds += row["time/step_s"]
        if "eval/accuracy" in row:
            accuracy, kl = row["eval/accuracy"], row["eval/reverse_kl"]
            points.append(Point(row["step"], tokens, flops, seconds, accuracy, kl))
    return points


@cache
def _arch(student: str) -> Any:
    from megaopd.models.arch import read_arch

    return read_arch(DEMO / student)


def _forward_flops(student: str, prompt: float, response: float) -> float:
    """Of one sample: every layer for every token, the head for those of the response."""
    from megaopd.plan.cost import layer_flops

    arch = _arch(student)
    total = prompt + response
    layers = sum(sum(layer_flops(arch, i, total)) for i in range(arch.num_layers))
    return layers * total + 2 * arch.vocab_size * arch.hidden_size * response


def mean_prompt_tokens(out: Path) -> float:
    from megaopd.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(DEMO / "teacher")
    rows = [json.loads(line) for line in (out / "prompts.jsonl").read_text().splitlines()]
    return statistics.fmean(len(tokenizer(row["prompt"])["input_ids"]) for row in rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default=",".join(CONTESTS), help="contests (default: all)")
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once, which share the cores")
    parser.add_argument("--out", type=Path, default=ROOT / ".bench/recipes", metavar="DIR")
    args = parser.parse_args()
    names = args.only.split(",")
    unknown = [name for name in names if name not in CONTESTS]
    if unknown:
        raise SystemExit(f"error: --only: no {unknown[0]!r}; choose of {', '.join(CONTESTS)}")
    if not all(seed.isdigit() for seed in args.seeds.split(",")):
        raise SystemExit(f"error: --seeds: found {args.seeds}; write numbers, as in 1,2,3")
    seeds = [int(seed) for seed in args.seeds.split(",")]
    every = sorted(os.sched_getaffinity(0))
    if not 1 <= args.jobs <= len(every):
        raise SystemExit(f"error: --jobs: found {args.jobs}; choose 1 to {len(every)}, the cores")
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    prepare(out)
    runs: dict[str, tuple[Recipe, int, Path]] = {}
    for name in names:
        for label, recipe in CONTESTS[name].recipes.items():
            for seed in seeds:
                # Recipes that two contests share are run once.
                runs[f"{name} {label} {seed}"] = (
                    recipe,
                    seed,
                    out / f"{_first_name(recipe)}-{seed}",
                )
    todo = {run[2]: run for run in runs.values()}
    cores: Queue[set[int]] = Queue()
    for job in range(args.jobs):
        cores.put(set(every[job :: args.jobs]))
    with ThreadPoolExecutor(args.jobs) as pool, tqdm(total=len(todo), unit="run") as progress:
        futures = [
            pool.submit(train, recipe, seed, out, at, cores) for recipe, seed, at in todo.values()
        ]
        for future in futures:
            future.result()
            progress.update()
    prompt_tokens = mean_prompt_tokens(out)
    results: dict[str, Any] = {"seeds": seeds}
    parts = {}
    for name in names:
        contest = CONTESTS[name]
        curves = {
            label: [
                curve(recipe, runs[f"{name} {label} {seed}"][2], prompt_tokens) for seed in seeds
            ]
            for label, recipe in contest.recipes.items()
        }
        results[name] = figures(curves, contest.against, contest.targets)
        rows = table(name, results[name], contest.against, contest.targets, len(seeds))
        parts[name] = (rows, [chart(curves, cost) for cost in COSTS])
        print(f"\n## {name}")
        for i, row in enumerate(rows):
            print("| " + " | ".join(row) + " |")
            if not i:
                print("|" + "-|" * len(row))
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    write_report(out, parts)
    print(f"\n{out / 'report.html'}")


def _first_name(recipe: Recipe) -> str:
    """Contest and name under which this recipe is first found."""
    return next(
        f"{name}-{label}"
        for name, contest in CONTESTS.items()
        for label, found in contest.recipes.items()
        if found == recipe
    )


if __name__ == "__main__":
    main()
