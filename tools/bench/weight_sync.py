"""Seconds and GB/s of each way for weights to reach SGLang servers, beside a copy of the bytes.

    python tools/bench/weight_sync.py --sglang .cache/sglang/bin/python [--model DIR] [--servers 1]

The weights are those of --model (by default the demo's teacher, 135 million parameters), in this
process's memory as one rank of a trainer has them: no gathering is counted, only the way to the
servers and into their model, from the first pause to the last server that goes on. The copy is a
`Tensor.copy_` of the same bytes by one thread, the least that any way could take. Each figure is
the median over the rounds.

The bubble is what a step costs a trainer on devices of its own beside its training: the wait for
samples and the sync. Training is a pause of --train-s, by default as long as a rollout takes while
nothing else happens; in the synchronous loop servers then stand still, one step off they generate
the next batch.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path

import torch
from torch import Tensor

from megaopd.batch import Prompt, SamplingParams
from megaopd.config import Config, RolloutConfig, SGLangConfig
from megaopd.models.arch import read_arch
from megaopd.models.hf_io import HFReader
from megaopd.rollout.sglang.engine import PendingSamples, SGLangEngine
from megaopd.rollout.sglang.flags import ServerSpec
from megaopd.rollout.sglang.fleet import ServerFleet
from megaopd.rollout.sglang.server import SGLangServer
from megaopd.train_servers import TRANSPORTS
from megaopd.weight_sync.servers import ServerSync

ROOT = Path(__file__).resolve().parents[2]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class OneRank:
    """What a transport is told of the process groups."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)


class Memory:
    """A student whose weights are whole already."""

    def __init__(self, path: Path, dtype: torch.dtype, device: str) -> None:
        reader = HFReader(path)
        self.weights = {
            name: reader.read(name).to(device, dtype) for name in sorted(reader.names())
        }

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.weights.values())

    def export_weights(self, only_trainable: bool = False) -> Iterator[tuple[str, Tensor]]:
        yield from self.weights.items()


def seconds(work: Callable[[], object], rounds: int) -> float:
    """Median; the first round, which warms up, does not count."""
    times = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def copy_seconds(student: Memory, rounds: int) -> float:
    """Seconds of a copy in the memory of one device."""
    target = [torch.empty_like(tensor) for tensor in student.weights.values()]

    def copy() -> None:
        for to, source in zip(target, student.weights.values(), strict=True):
            to.copy_(source)

    return seconds(copy, rounds)


@dataclass(frozen=True)
class Figures:
    """Seconds of one way: of a sync, and of a step's bubble."""

    sync_s: float
    synchronous_s: float
    one_step_off_s: float


def bubble(
    engine: SGLangEngine,
    sync: Callable[[], None],
    steps: list[SamplingParams],
    train_s: float,
    prompts: list[Prompt],
    ahead: int,
) -> tuple[float, float]:
    """The loop of `OPDTrainer`, without the training.

    Returns:
        Median seconds of a step's wait for samples, and of its bubble; without the first step,
        which has nothing to wait for but a whole rollout.
    """
    waits, bubbles = [], []
    pending: deque[PendingSamples] = deque()
    to_start = iter(steps)
    for _ in steps:
        began = time.perf_counter()
        pending += [engine.start(prompts, p) for p in islice(to_start, 1 + ahead - len(pending))]
        pending.popleft().result()
        waits.append(time.perf_counter() - began)
        time.sleep(train_s)
        began = time.perf_counter()
        sync()
        bubbles.append(waits[-1] + time.perf_counter() - began)
    return statistics.median(waits[1:]), statistics.median(bubbles[1:])


def measure(
    kind: str,
    servers: list[SGLangServer],
    student: Memory,
    args: argparse.Namespace,
    vocab_size: int,
) -> Figures:
    settings = SGLangConfig(
        sync=kind,  # type: ignore[arg-type]
        bucket_bytes=args.bucket_mib << 20,
        verify=args.verify,
    )
    config = Config(rollout=RolloutConfig(kind="sglang", sglang=settings))
    engine = SGLangEngine(
        servers,
        config=settings,
        vocab_size=vocab_size,
        transport=TRANSPORTS[kind](config, OneRank(args.device)),  # type: ignore[arg-type]
    )
    server_sync, versions = ServerSync(), count()

    def sync() -> None:
        server_sync.sync(student, engine, next(versions))  # type: ignore[arg-type]
        stale = engine.pool.stale() if engine.pool else []
        assert not stale, [client.url for client in stale]

    try:
        sync_s = seconds(sync, args.rounds)
        random = torch.Generator().manual_seed(1)
        prompts = [
            Prompt(f"p{i}", tuple(torch.randint(vocab_size, (32,), generator=random).tolist()))
            for i in range(args.prompts)
        ]
        steps = [SamplingParams(args.tokens, seed=step) for step in range(args.steps)]
        rollout_s, standing_s = bubble(engine, sync, steps, 0.0, prompts, ahead=0)
        train_s = rollout_s if args.train_s is None else args.train_s
        _, running_s = bubble(engine, sync, steps, train_s, prompts, ahead=1)
    finally:
        engine.close()
    print(f"{kind}: a rollout takes {rollout_s:.2f} s, training {train_s:.2f} s", flush=True)
    return Figures(sync_s, standing_s, running_s)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sglang", required=True, help="interpreter that has sglang")
    parser.add_argument("--model", type=Path, default=ROOT / ".cache/demo/teacher")
    parser.add_argument("--servers", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--bucket-mib", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=5, help="of a loop whose bubble is measured")
    parser.add_argument("--prompts", type=int, default=4, help="in a step")
    parser.add_argument("--tokens", type=int, default=32, help="in a response")
    parser.add_argument("--train-s", type=float, help="of a step; default: what a rollout takes")
    parser.add_argument("--verify", action="store_true", help="checksums too")
    parser.add_argument("--kinds", nargs="+", choices=TRANSPORTS, default=list(TRANSPORTS))
    args = parser.parse_args()
    torch.set_num_threads(1)

    student = Memory(args.model, DTYPES[args.dtype], args.device)
    copy_s = copy_seconds(student, args.rounds)
    figures: dict[str, Figures] = {}
    vocab_size = read_arch(args.model).vocab_size
    with tempfile.TemporaryDirectory() as logs:
        fleet = ServerFleet(
            [
                SGLangServer(
                    ServerSpec(
                        model_path=str(args.model),
                        python=args.sglang,
                        device=args.device,
                        dtype=args.dtype,
                        first_gpu=min(1 + i, max(torch.cuda.device_count() - 1, 0)),
                    ),
                    i,
                    logs,
                )
                for i in range(args.servers)
            ]
        )
        fleet.start()
        try:
            for kind in args.kinds:
                figures[kind] = measure(kind, fleet.servers, student, args, vocab_size)
        finally:
            fleet.stop()
    giga = student.num_bytes / 1e9
    print(f"{giga:.3f} GB in {args.dtype}, {args.servers} server(s), {args.bucket_mib} MiB buckets")
    print(f"{'way':12}  {'s':>7}  {'GB/s':>7}  of a copy  bubble: synchronous, one step off")
    print(f"{'copy':12}  {copy_s:7.3f}  {giga / copy_s:7.2f}")
    for kind, found in figures.items():
        speed = f"{found.sync_s:7.3f}  {giga / found.sync_s:7.2f}  {copy_s / found.sync_s:9.1%}"
        print(f"{kind:12}  {speed}  {found.synchronous_s:17.2f} s  {found.one_step_off_s:10.2f} s")


if __name__ == "__main__":
    main()
