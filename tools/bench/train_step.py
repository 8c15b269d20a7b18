"""Time and peak memory of one distillation step: megaopd beside plain transformers and TRL's loss.

    python tools/bench/train_step.py [--tokens 2048] [--steps 5] [--out train_step.json] [--no-trl]

The same batch, the same random Qwen3-shaped pair (hidden 512, 8 and 4 layers, 8 heads, 4 KV heads,
vocabulary 151,936), the same cores: megaopd runs its teacher phase and student phase (optimizer
step included) with TP = number of cores and one thread a rank; the others run teacher forward,
student forward with full logits, autograd and AdamW in one process with that many threads. The
three take turns in one run, each in fresh processes. Memory is the highest resident set of all
processes of a contender together, sampled every 20 ms, as it is and above the moment before the
first step. What a layout costs is in layouts.py.

TRL is installed by this script into a folder of its own (.bench/trl), never into the project.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from processes import ROOT, measure, ready, report, torchrun

BENCH = ROOT / ".bench"
MODELS = BENCH / "train_step"
# TRL with what its GKD trainer imports, and nothing that would bring another torch.
TRL = [
    "trl==1.16.0",
    "accelerate",
    "datasets",
    "multiprocess",
    "dill",
    "xxhash",
    "pandas",
    "pyarrow",
]
SEQ = 256
VOCAB = 151_936
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "tie_word_embeddings": True,
    "max_position_embeddings": 4096,
}


def make_models() -> None:
    """Writes the random pair once; the tokenizer plays no part."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    for name, layers, seed in (("teacher", 8, 0), ("student", 4, 1)):
        if not (MODELS / name / "config.json").is_file():
            torch.manual_seed(seed)
            model = Qwen3ForCausalLM(Qwen3Config(num_hidden_layers=layers, **SHAPE))
            model.save_pretrained(MODELS / name)


def batch_ids(num_tokens: int) -> torch.Tensor:
    """[num_tokens / 256, 256] token ids, the same for every contender."""
    generator = torch.Generator().manual_seed(7)
    return torch.randint(0, VOCAB, (num_tokens // SEQ, SEQ), generator=generator)


def timed(step: Any, num_steps: int, rank: int = 0) -> dict[str, Any]:
    """Runs one warm-up and `num_steps` timed steps; tells the parent when the first one starts."""
    if rank == 0:
        ready()
    step()
    seconds = []
    for _ in range(num_steps):
        start = time.perf_counter()
        loss = step()
        seconds.append(time.perf_counter() - start)
    return {"seconds": sorted(seconds)[len(seconds) // 2], "loss": float(loss)}


def run_megaopd(num_tokens: int, num_steps: int) -> dict[str, Any]:
    from megaopd.batch import Prompt, Sample
    from megaopd.config import (
        Config,
        OptimizerConfig,
        ParallelConfig,
        StudentConfig,
        TeacherConfig,
    )
    from megaopd.data.packing import Batching, Packing
    from megaopd.engine.student import MegatronStudent
    from megaopd.models.arch import read_arch
    from megaopd.models.mapping import padded_vocab_size
    from megaopd.parallel import groups as parallel_groups
    from megaopd.parallel.device import init_distributed
    from megaopd.teacher.megatron import MegatronTeacher

    device = init_distributed()
    tp_size = int(os.environ["WORLD_SIZE"])
    config = Config(
        student=StudentConfig(path=str(MODELS / "student"), dtype="fp32"),
        teacher=TeacherConfig(path=str(MODELS / "teacher"), dtype="fp32"),
        parallel=ParallelConfig(tensor=tp_size),
        optimizer=OptimizerConfig(lr=1e-5),
    )
    groups = parallel_groups.initialize(config.parallel, device, seed=1)
    rows = padded_vocab_size(VOCAB, tp_size)
    student_arch = read_arch(config.student.path)
    teacher_arch = read_arch(config.teacher.path)
    packing = Packing(num_tokens // SEQ, pad_to_multiple=tp_size)
    ours, theirs = (Batching(groups.layout, packing, side) for side in ("student", "teacher"))
    teacher = MegatronTeacher(config.teacher, teacher_arch, groups, theirs, ours, rows)
    student = MegatronStudent(config, student_arch, groups, rows, VOCAB)
    samples = []
    for i, row in enumerate(batch_ids(num_tokens).tolist()):
        # Every position but the last has a label, as in the plain version.
        ids = tuple(row[1:])
        samples.append(
            Sample(
                Prompt(str(i), (row[0],)), 0, ids, (0.0,) * len(ids), (True,) * len(ids), "stop", 0
            )
        )
    packs = ours.micro_batches(samples, ours.assign(samples), groups.rank)

    def step() -> float:
        result = student.train_step(packs, teacher.score(samples))
        return result.metrics["loss/divergence"]

    result = timed(step, num_steps, groups.tp.rank())
    if groups.tp.rank() != 0:
        parallel_groups.shutdown()
        raise SystemExit(0)
    return result


def run_transformers(num_tokens: int, num_steps: int, use_trl: bool) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    teacher, student = (
        AutoModelForCausalLM.from_pretrained(MODELS / name, dtype=torch.float32)
        for name in ("teacher", "student")
    )
    teacher.eval()
    student.train()
    optimizer = torch.optim.AdamW(
        student.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.0
    )
    ids = batch_ids(num_tokens)
    if use_trl:
        sys.path.append(str(BENCH / "trl"))
        from trl.experimental.gkd import GKDTrainer

    def step() -> torch.Tensor:
        optimizer.zero_grad()
        with torch.no_grad():
            teacher_logits = teacher(ids).logits[:, :-1]
        student_logits = student(ids).logits[:, :-1]
        if use_trl:
            # Its beta = 1 is the reverse KL.
            loss = GKDTrainer.generalized_jsd_loss(
                student_logits,
                teacher_logits,
                beta=1.0,
                num_items_in_batch=ids.size(0) * (SEQ - 1),
            )
        else:
            log_p = student_logits.log_softmax(-1)
            log_q = teacher_logits.log_softmax(-1)
            loss = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        return loss.detach()

    return timed(step, num_steps)


def measured(contender: str, args: argparse.Namespace) -> dict[str, Any] | None:
    """Runs a contender in fresh processes; its time, loss and memory, or None if it died."""
    command, env = [sys.executable], {"TRL_EXPERIMENTAL_SILENCE": "1"}
    if contender == "megaopd":
        command = torchrun(len(os.sched_getaffinity(0)))
        env["OMP_NUM_THREADS"] = "1"
    command += [__file__, "--role", contender, "--tokens", str(args.tokens)]
    return measure(contender, [*command, "--steps", str(args.steps)], env)


def install_trl() -> None:
    target = BENCH / "trl"
    if not (target / "trl").is_dir():
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target"]
        subprocess.run([*command, str(target), *TRL], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=2048, help="packed tokens of the batch")
    parser.add_argument("--steps", type=int, default=5, help="timed steps; the median is reported")
    parser.add_argument("--out", type=Path, default=BENCH / "train_step.json")
    parser.add_argument("--no-trl", action="store_true", help="leave TRL out")
    parser.add_argument("--role", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.role:
        if args.role == "megaopd":
            result = run_megaopd(args.tokens, args.steps)
        else:
            result = run_transformers(args.tokens, args.steps, use_trl=args.role == "trl")
        report(result)
        return

    make_models()
    contenders = ["megaopd", "plain"]
    if not args.no_trl:
        install_trl()
        contenders.append("trl")
    every = {name: measured(name, args) for name in contenders}
    results = {name: result for name, result in every.items() if result}
    ours = results["megaopd"]
    print(f"{'':10} {'s/step':>8} {'x ours':>7} {'peak GiB':>9} {'x ours':>7} {'above':>7} loss")
    for name, r in results.items():
        print(
            f"{name:10} {r['seconds']:8.2f} {r['seconds'] / ours['seconds']:7.2f} "
            f"{r['peak_gib']:9.2f} {r['peak_gib'] / ours['peak_gib']:7.2f} "
            f"{r['peak_above_start_gib']:7.2f} {r['loss']:.5f}"
        )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"tokens": args.tokens, **results}, indent=2) + "\n")
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
