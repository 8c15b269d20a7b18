"""What checkpoints cost a training: time that it waits, time that hashing takes, beside Megatron's.

A student (random, 8 layers, hidden 512, vocabulary 49,152, fp32; its weights and moments are what
is saved) trains on DP 2 over gloo, one thread a rank. In one run, on the same state:

  steps      without checkpoints; with an asynchronous one at every step; the same without hashing
  saves      synchronous: ours, verified names and digests and all, beside Megatron-Core's
             dist_checkpointing.save of weights and (fully reshardable) optimizer, and beside a
             plain write and sync of as many bytes
  loads      ours, every file hashed first, beside Megatron-Core's

Hashing's share of a step is its processor time, one core's, over the step's time, if every step
were saved; at an interval of n steps it is that over n.

  python tools/bench/checkpoint.py --steps 3
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from layout_step import BENCH, MODELS, make_models, make_samples
from processes import torchrun

from megaopd.config import CheckpointConfig, Config, OptimizerConfig, ParallelConfig, StudentConfig
from megaopd.errors import run_cli

TOKENS = 1024
PLACE = BENCH / "checkpoint"


def timed(work: Callable[[], Any]) -> float:
    """Seconds of the slowest rank."""
    dist.barrier()
    start = time.perf_counter()
    work()
    dist.barrier()
    return time.perf_counter() - start


@contextlib.contextmanager
def without_hashing() -> Iterator[None]:
    """What is written has the digest of nothing."""
    from megaopd.storage import streamed

    class Nothing:
        def update(self, data: Any) -> None:
            pass

        def hexdigest(self) -> str:
            return "0" * 64

    hashes, streamed.hashlib = streamed.hashlib, type("hashlib", (), {"sha256": Nothing})
    try:
        yield
    finally:
        streamed.hashlib = hashes


def hashing_s(num_bytes: int) -> float:
    """Processor time of one core for so many bytes."""
    import hashlib

    block, digest = memoryview(bytearray(64 << 20)), hashlib.sha256()
    digest.update(block)
    start = time.thread_time()
    for _ in range(4):
        digest.update(block)
    return (time.thread_time() - start) / (4 * len(block)) * num_bytes


class Bench:
    """The student of this rank, and its ways to be saved."""

    def __init__(self) -> None:
        from megaopd.data.packing import Batching, CostModel, Packing
        from megaopd.engine.student import MegatronStudent
        from megaopd.models.arch import read_arch
        from megaopd.models.mapping import padded_vocab_size
        from megaopd.parallel import groups as parallel_groups
        from megaopd.parallel.device import init_distributed
        from megaopd.teacher.megatron import MegatronTeacher

        device = init_distributed()
        torch.set_num_threads(1)
        self.parallel = ParallelConfig()
        self.groups = parallel_groups.initialize(self.parallel, device, seed=1)
        path = str(MODELS["random"][0])
        arch = read_arch(path)
        self.config = Config(
            student=StudentConfig(path=path, dtype="fp32"), optimizer=OptimizerConfig(lr=1e-5)
        )
        teacher = self.config.teacher.__class__(path=str(MODELS["random"][1]), dtype="fp32")
        rows = padded_vocab_size(arch.vocab_size, 1)
        batching = Batching(
            self.groups.layout, Packing(max_tokens=1024), "student", CostModel.of(arch)
        )
        samples = make_samples(TOKENS, 512, arch.vocab_size)
        self.packs = batching.micro_batches(samples, batching.assign(samples), self.groups.rank)
        self.student = MegatronStudent(self.config, arch, self.groups, rows, arch.vocab_size)
        teacher_arch = read_arch(teacher.path)
        scored = MegatronTeacher(teacher, teacher_arch, self.groups, batching, batching, rows)
        self.signals = scored.score(samples)
        self.step()

    def step(self) -> None:
        self.student.train_step(self.packs, self.signals)

    def checkpoints(self, name: str, asynchronous: bool) -> Any:
        from megaopd.checkpoint.run_checkpoints import RunCheckpoints

        return RunCheckpoints(
            CheckpointConfig(asynchronous=asynchronous, keep_last=1),
            PLACE / name,
            [self.student],
            num_updates=lambda: self.student.num_updates,
            source_dir=self.config.student.path,
            dtype=torch.float32,
            layout={},
        )

    def steps_with_saves(self, name: str, num_steps: int) -> tuple[float, float]:
        """(seconds of a step, seconds that it waits) with a checkpoint under way all the time."""
        saved = self.checkpoints(name, asynchronous=True)
        times, waits = [], []
        for step in range(1, num_steps + 1):

            def work(step: int = step) -> None:
                saved.save(step, {})
                self.step()
                saved.poll()

            times.append(timed(work))
            waits.append(saved.metrics.get("checkpoint/wait_s", 0.0))
        saved.poll(wait=True)
        return statistics.median(times[1:]), statistics.median(waits[1:])

    def megatron_state(self, loading: bool) -> dict[str, Any]:
        metadata = {
            "distrib_optim_sharding_type": "fully_reshardable",
            "distrib_optim_fully_reshardable_mem_efficient": False,
        }
        with self.groups.active():
            model = self.student.chunks[0].sharded_state_dict(
                metadata={"dp_cp_group": self.groups.dp_cp}
            )
            state = {"model": {k: v for k, v in model.items() if "_extra_state" not in k}}
            state["optimizer"] = self.student.optimizer.sharded_state_dict(
                state["model"], is_loading=loading, metadata=metadata
            )
        return state

    def megatron_save(self) -> None:
        from megatron.core import dist_checkpointing
        from megatron.core.dist_checkpointing.serialization import get_default_save_sharded_strategy
        from megatron.core.dist_checkpointing.strategies.fully_parallel import (
            FullyParallelSaveStrategyWrapper,
        )

        strategy = FullyParallelSaveStrategyWrapper(
            get_default_save_sharded_strategy("torch_dist"), self.groups.dp_cp
        )
        with self.groups.active():
            dist_checkpointing.save(self.megatron_state(False), str(PLACE / "megatron"), strategy)
        if self.groups.rank == 0:  # as durable as ours
            subprocess.run(["sync", "-f", str(PLACE / "megatron")], check=True)

    def megatron_load(self) -> None:
        from megatron.core import dist_checkpointing

        with self.groups.active():
            dist_checkpointing.load(self.megatron_state(True), str(PLACE / "megatron"))

    def plain_write(self, num_bytes: int) -> None:
        data = memoryview(bytearray(os.urandom(1 << 20)) * 16)
        file = PLACE / f"plain_{self.groups.rank}"
        with file.open("wb", buffering=0) as out:
            left = num_bytes
            while left > 0:
                left -= out.write(data[:left])
            os.fsync(out.fileno())


def run(num_steps: int) -> None:
    bench = Bench()
    rank = bench.groups.rank
    if rank == 0:
        shutil.rmtree(PLACE, ignore_errors=True)
        for name in ("megatron", "ours", "every", "unhashed"):
            (PLACE / name).mkdir(parents=True)
    dist.barrier()
    num_bytes = sum(piece.values.nbytes for piece in bench.student.saved_pieces())
    alone = statistics.median(timed(bench.step) for _ in range(num_steps))
    every, waits = bench.steps_with_saves("every", num_steps + 1)
    with without_hashing():
        unhashed, _ = bench.steps_with_saves("unhashed", num_steps + 1)
    saved = bench.checkpoints("ours", asynchronous=False)
    # In turn, so that whatever else the machine does meets both.
    ours, theirs, plain = [], [], []
    for step in range(1, num_steps + 1):
        ours.append(timed(lambda step=step: saved.save(step, {})))  # type: ignore[misc]
        if rank == 0:
            shutil.rmtree(PLACE / "megatron")
            (PLACE / "megatron").mkdir()
        theirs.append(timed(bench.megatron_save))
        plain.append(timed(lambda: bench.plain_write(num_bytes)))

    def our_load() -> None:
        from megaopd.checkpoint.resumable import find_resumable

        found = find_resumable(PLACE / "ours", "auto")
        assert found is not None
        bench.checkpoints("ours", asynchronous=False).restore(found)

    loads = [(timed(our_load), timed(bench.megatron_load)) for _ in range(num_steps)]
    hashed = hashing_s(num_bytes)
    if rank == 0:
        ours_s, theirs_s, plain_s = (statistics.median(x) for x in (ours, theirs, plain))
        our_load_s, their_load_s = (statistics.median(x) for x in zip(*loads, strict=True))
        print(f"\n{num_bytes / 1e6:.0f} MB a rank, {bench.groups.world_size} ranks\n")
        print(f"step alone                      {alone:7.2f} s")
        print(f"step, a checkpoint at every one {every:7.2f} s   {every / alone:.2f} x")
        print(f"  without hashing               {unhashed:7.2f} s   {unhashed / alone:.2f} x")
        print(f"  of it, training waits         {waits:7.2f} s")
        share, interval = hashed / alone, int(-(-hashed // (0.02 * alone)))
        print(f"hashing                         {hashed:7.2f} s of one core, {share:.1%} of a step")
        print(f"  at most 2 % of the time       from a checkpoint every {interval} steps on")
        print(f"synchronous save                {ours_s:7.2f} s")
        print(f"  Megatron-Core's               {theirs_s:7.2f} s   {theirs_s / ours_s:.2f} x ours")
        print(f"  plain write and sync          {plain_s:7.2f} s   {plain_s / ours_s:.2f} x ours")
        print(f"verify and load                 {our_load_s:7.2f} s")
        print(
            f"  Megatron-Core's, unverified   {their_load_s:7.2f} s   "
            f"{their_load_s / our_load_s:.2f} x ours"
        )
        shutil.rmtree(PLACE)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=3, help="timed steps, saves and loads")
    args = parser.parse_args(argv)
    if "RANK" in os.environ:
        run(args.steps)
        return
    make_models()
    script = str(Path(__file__))
    command = [*torchrun(2), script, "--steps", str(args.steps)]
    sys.exit(subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode)


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
