"""One layout's steps, on one rank of many: what layouts.py starts and measures."""

from __future__ import annotations

import argparse
import random
import re
import statistics
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from processes import ROOT, ready, report

from megaopd.batch import Prompt, Sample
from megaopd.config import ParallelConfig, TeacherConfig, TrainConfig
from megaopd.config_layouts import check_model, check_ranks
from megaopd.errors import ConfigError, run_cli
from megaopd.models.arch import read_arch

BENCH = ROOT / ".bench"
# Student and teacher of layouts.py --models; `random` is made here: SmolLM2's size and vocabulary,
# but heads that TP 2 and 4 divide, and hidden sizes that differ.
MODELS = {
    "random": (BENCH / "layouts/student", BENCH / "layouts/teacher"),
    "demo": (ROOT / ".cache/demo/student", ROOT / ".cache/demo/teacher"),
}
SHAPE = {
    "vocab_size": 49_152,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
SIDES = {
    "student": {"num_hidden_layers": 8, "hidden_size": 512, "intermediate_size": 1536},
    "teacher": {"num_hidden_layers": 12, "hidden_size": 768, "intermediate_size": 2048},
}


@dataclass(frozen=True)
class Variant:
    """How a layout is run: what is recomputed, and what waits in host memory."""

    train: TrainConfig = field(default_factory=TrainConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)


VARIANTS = {
    "plain": Variant(),
    "selective": Variant(TrainConfig(recompute="selective")),
    "full": Variant(TrainConfig(recompute="full")),
    "teacher-offload": Variant(teacher=TeacherConfig(offload=True)),
    "train-offload": Variant(TrainConfig(offload=True)),
    "offload": Variant(TrainConfig(offload=True), TeacherConfig(offload=True)),
}


def parse_side(text: str, where: str, num_ranks: int) -> ParallelConfig:
    """The layout that factors such as TP2xSP name.

    Raises:
        ConfigError: no such factor, or a DP that is not what remains.
    """
    fields = {"TP": "tensor", "PP": "pipeline", "VP": "virtual_pipeline", "CP": "context"}
    values: dict[str, Any] = {}
    dp_size: int | None = None
    for factor in text.split("x"):
        match = re.fullmatch(r"(TP|PP|VP|CP|DP)(\d+)", factor)
        if factor == "SP":
            values["sequence_parallel"] = True
        elif match is None:
            remedy = "join factors such as DP2 TP2 PP2 VP2 CP2 SP by x"
            raise ConfigError(where, f"no factor {factor!r} in {text!r}", remedy)
        elif match[1] == "DP":
            dp_size = int(match[2])
        else:
            values[fields[match[1]]] = int(match[2])
    parallel = ParallelConfig(**values)
    check_ranks(where, "model", parallel, num_ranks)
    model_size = parallel.tensor * parallel.pipeline * parallel.context
    if dp_size is not None and dp_size * model_size != num_ranks:
        found = f"DP {dp_size} x {model_size} = {dp_size * model_size}, and there are {num_ranks}"
        raise ConfigError(where, f"{found} ranks", f"DP is {num_ranks // model_size}")
    return parallel


def parse_layout(text: str, num_ranks: int, models: str) -> tuple[ParallelConfig, ParallelConfig]:
    """(student's, teacher's) layout of STUDENT or STUDENT/TEACHER, checked against the models."""
    student, _, teacher = text.partition("/")
    where = f"--layouts {text}"
    sides = tuple(parse_side(side, where, num_ranks) for side in (student, teacher or student))
    for role, parallel, path in zip(("student", "teacher"), sides, MODELS[models], strict=True):
        check_model(where, role, parallel, read_arch(str(path)), trained=role == "student")
    return sides[0], sides[1]


def make_models() -> None:
    """Writes the random pair once; the tokenizer plays no part."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    for seed, (side, path) in enumerate(zip(SIDES, MODELS["random"], strict=True), start=1):
        if not (path / "model.safetensors").is_file():
            print(f"making {path}", flush=True)
            torch.manual_seed(seed)
            Qwen3ForCausalLM(Qwen3Config(**SHAPE, **SIDES[side])).save_pretrained(path)


def make_samples(num_tokens: int, longest: int, vocab_size: int) -> list[Sample]:
    """The step's samples, the same on every rank and for every layout."""
    rng = random.Random(0)
    samples: list[Sample] = []
    left = num_tokens
    while left:
        length = min(left, longest, max(16, int(rng.lognormvariate(4.3, 0.6))))
        ids = tuple(rng.randrange(vocab_size) for _ in range(length))
        num_prompt = max(1, length // 4)
        num = length - num_prompt
        prompt = Prompt(str(len(samples)), ids[:num_prompt])
        samples.append(Sample(prompt, 0, ids[num_prompt:], (0.0,) * num, (True,) * num, "stop", 0))
        left -= length
    return samples


def run(args: argparse.Namespace) -> None:
    """All steps of this rank; rank 0 reports."""
    import torch.distributed as dist

    from megaopd.config import Config, OptimizerConfig, StudentConfig
    from megaopd.data.packing import Batching, CostModel, Packing, Side
    from megaopd.engine.student import MegatronStudent
    from megaopd.metrics import PhaseTimer
    from megaopd.models.mapping import padded_vocab_size
    from megaopd.parallel import groups as parallel_groups
    from megaopd.parallel.device import init_distributed
    from megaopd.parallel.groups import ParallelGroups
    from megaopd.teacher.megatron import MegatronTeacher

    device = init_distributed()
    torch.set_num_threads(1)
    layouts = parse_layout(args.layout, dist.get_world_size(), args.models)
    variant = VARIANTS[args.variant]
    groups, teacher_groups = (parallel_groups.initialize(p, device, seed=1) for p in layouts)
    paths = [str(path) for path in MODELS[args.models]]
    arch, teacher_arch = (read_arch(path) for path in paths)
    teacher_config = TeacherConfig(path=paths[1], dtype="fp32", offload=variant.teacher.offload)
    config = Config(
        student=StudentConfig(path=paths[0], dtype="fp32"),
        teacher=teacher_config,
        parallel=layouts[0],
        optimizer=OptimizerConfig(lr=1e-5),
        train=variant.train,
    )

    def batching(of: ParallelGroups, side: Side, cost: CostModel) -> Batching:
        packing = Packing(max_tokens=args.micro_batch_tokens, pad_to_multiple=of.parallel.tensor)
        return Batching(of.layout, packing, side, cost)

    ours = batching(groups, "student", CostModel.of(arch))
    theirs = batching(teacher_groups, "teacher", CostModel.of(teacher_arch))
    vocab_rows = padded_vocab_size(arch.vocab_size, groups.parallel.tensor)
    samples = make_samples(args.tokens, args.micro_batch_tokens, arch.vocab_size)
    if groups.rank == 0:
        ready()
    dist.barrier()
    teacher = MegatronTeacher(
        teacher_config, teacher_arch, teacher_groups, theirs, ours, vocab_rows
    )
    student = MegatronStudent(config, arch, groups, vocab_rows, arch.vocab_size)

    def step() -> dict[str, float]:
        dist.barrier()
        cpu_start, timer = time.process_time(), PhaseTimer()
        assignment = ours.assign(samples)
        packs = ours.micro_batches(samples, assignment, groups.rank)
        with timer.phase("teacher"):
            signals = teacher.score(samples)
        with timer.phase("student"):
            result = student.train_step(packs, signals)
        cpu_s = torch.tensor(time.process_time() - cpu_start)
        dist.barrier()
        seconds = timer.total_s
        dist.all_reduce(cpu_s)
        return {
            "seconds": seconds,
            "cpu_seconds": float(cpu_s),
            "teacher_s": timer.metrics()["time/teacher_s"],
            "student_s": timer.metrics()["time/student_s"],
            "loss": result.metrics["loss/divergence"],
        }

    steps = [step() for _ in range(1 + args.steps)]
    if groups.rank == 0:
        medians = {key: statistics.median(s[key] for s in steps[1:]) for key in steps[0]}
        handed = int(teacher.metrics["perf/hand_over_bytes"])
        rows = handed // (teacher_arch.hidden_size * 4)
        report(
            {
                **medians,
                "loss": steps[-1]["loss"],
                "losses": [s["loss"] for s in steps],
                "loss_tokens": sum(sum(s.response_mask) for s in samples),
                "micro_batches": ours.assign(samples).num_micro_batches,
                "rows_sent": rows,
                "hidden_bytes": handed,
                "logits_bytes": rows * (vocab_rows // groups.parallel.tensor) * 4,
            }
        )
    parallel_groups.shutdown()


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("layout", "variant", "models"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("tokens", "micro-batch-tokens", "steps"):
        parser.add_argument(f"--{name}", type=int, required=True)
    run(parser.parse_args(argv))


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
