"""What training on selected tokens alone saves (`loss.selection`, TIP), beside training on all.

    python tools/bench/selection.py [--device cuda]

Times and peak memory of the loss of one micro-batch, from hidden states and both LM heads to their
gradients: without a selection, and with each selection at several ratios. On a CPU: one thread, CPU
time, medians of rounds in which all take turns, and the growth of a fresh process; on a GPU: CUDA
events and the allocator's peak. Prints a table of ratios to the run without a selection.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from megaopd.batch import HiddenSignal, PackedBatch  # noqa: E402
from megaopd.config import LossConfig  # noqa: E402
from megaopd.losses.objective import Objective  # noqa: E402
from tools.bench.divergence_bench import contenders, measure  # noqa: E402

SELECTIONS = ("soft_or", "entropy", "q3")
NUM_RESPONSES = 4


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", default="cpu", choices=["cpu", "cuda"])
    add("--tokens", type=int, default=512, help="loss tokens of the micro-batch")
    add("--vocab", type=int, default=49_152)
    add("--selections", nargs="+", default=SELECTIONS, choices=SELECTIONS)
    add("--ratios", nargs="+", type=float, default=(0.9, 0.5, 0.25, 0.1), help="1 keeps all")
    add("--repeats", type=int, default=3, help="timed rounds")
    add("--peak-of", nargs=2, metavar=("SELECTION", "RATIO"), help=argparse.SUPPRESS)
    return parser.parse_args(argv)


class Head:
    """A teacher's head in one piece."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def shard(self) -> Tensor:
        return self.rows


class Case:
    """One micro-batch of responses with a loss on every token."""

    def __init__(self, options: argparse.Namespace) -> None:
        num, device = options.tokens, options.device
        self.vocab = options.vocab
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        self.inputs = contenders.heads(num, options.vocab, dtype, device)
        labels = torch.randint(options.vocab, (num,), device=device)
        starts = [num * i // NUM_RESPONSES for i in range(NUM_RESPONSES + 1)]
        self.batch = PackedBatch(
            tokens_T=labels,
            labels_T=labels,
            positions_T=torch.arange(num, device=device),
            loss_mask_T=torch.ones(num, dtype=torch.bool, device=device),
            rollout_logprobs_T=torch.full((num,), -10.0, device=device),
            token_weights_T=torch.ones(num, device=device),
            rows_T=torch.arange(num, device=device),
            cu_seqlens=torch.tensor(starts, dtype=torch.int32, device=device),
            sample_ids=tuple(map(str, range(NUM_RESPONSES))),
        )

    def step(self, selection: str, ratio: float) -> None:
        """The loss and its gradients."""
        config = LossConfig(selection=selection, selection_ratio=ratio)
        hidden, head, teacher_hidden, teacher_head = self.inputs
        leaves = [x.detach().requires_grad_() for x in (hidden, head)]
        objective = Objective(config, self.vocab, 1.0, None)
        signal = HiddenSignal(teacher_hidden, Head(teacher_head))
        objective(*leaves, self.batch, signal).loss_sum.backward()


def print_peak(options: argparse.Namespace) -> None:
    """What `peak` starts."""
    selection, ratio = options.peak_of[0], float(options.peak_of[1])
    case = Case(options)
    small = argparse.Namespace(**{**vars(options), "tokens": NUM_RESPONSES * 2})
    Case(small).step(selection, ratio)  # what is made once
    case.step(selection, ratio)  # compiles
    inputs = case.inputs
    print("PEAK", measure.peak_extra(lambda: case.step(selection, ratio), options.device, inputs))


def peak(options: argparse.Namespace, selection: str, ratio: float) -> int:
    """Bytes beyond the inputs, in a process of its own whose allocator gives memory back."""
    command = [sys.executable, __file__, "--peak-of", selection, str(ratio)]
    command += ["--device", options.device]
    command += ["--tokens", str(options.tokens), "--vocab", str(options.vocab)]
    done = subprocess.run(
        command,
        env=measure.memory_environment(),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return int(done.stdout.split()[-1])


def main(argv: list[str]) -> None:
    options = parse(argv)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if options.peak_of:
        print_peak(options)
        return
    wanted = measure.TIME_ALLOCATOR
    if options.device == "cpu" and any(os.environ.get(k) != v for k, v in wanted.items()):
        # The allocator reads its settings when a process starts.
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **wanted})
    cases = [("none", 1.0)]
    cases += [(name, ratio) for name in options.selections for ratio in options.ratios]
    case = Case(options)
    work = {f"{name} {ratio}": (lambda n=name, r=ratio: case.step(n, r)) for name, ratio in cases}
    seconds = measure.medians(measure.take_turns(work, options.repeats, options.device))
    peaks = {f"{name} {ratio}": peak(options, name, ratio) for name, ratio in cases}
    first = next(iter(work))
    print(f"T={options.tokens} V={options.vocab} H={contenders.HIDDEN} on {options.device}")
    print("| selection | ratio | s | time | peak MiB | peak |\n|-|-|-|-|-|-|")
    for name, ratio in cases:
        key = f"{name} {ratio}"
        print(
            f"| {name} | {ratio} | {seconds[key]:.3f} | {seconds[key] / seconds[first]:.2f} "
            f"| {peaks[key] / 2**20:.0f} | {peaks[key] / peaks[first]:.2f} |"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
