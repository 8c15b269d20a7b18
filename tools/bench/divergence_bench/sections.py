"""What is measured: the divergences of logits, those fused with the heads, both under tensor
parallelism, and peak memory in processes of its own."""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tools.bench.divergence_bench import contenders, measure, peers
from tools.bench.divergence_bench.contenders import Contender, fastest_backend
from tools.bench.divergence_bench.report import Row

MEMORY_KINDS = ("reverse_kl", "forward_kl", "jsd")
_CHECKED_TOKENS = 4
_TIMEOUT_S = 1800


def single_rank_group() -> None:
    """The tensor-parallel path of a peer needs a process group, of one rank here."""
    if not dist.is_initialized():
        store = Path(tempfile.mkdtemp()) / "store"
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)


def _loss_error(loss: Callable[..., Tensor], inputs: Sequence[Tensor], exact: Tensor) -> float:
    with torch.no_grad():
        found = loss(*inputs).double()
    return float((found - exact).abs() / exact.abs())


def _measured(
    section: str,
    dtype: str,
    kind: str,
    found: list[Contender],
    work: dict[str, Callable[[], Any]],
    yardstick: str,
    repeats: int,
    device: str,
) -> list[Row]:
    """Rows for the yardstick, every contender that ran and every one that did not."""
    times = measure.medians(measure.take_turns(work, repeats, device))
    mine = times.get(f"ours, {fastest_backend(device)}")
    rows = []
    for name in [yardstick, *(c.name for c in found)]:
        row = Row(section, dtype, kind, name)
        if name in times:
            row.ms = times[name] * 1e3
            ratio = times[name] / times[yardstick]
            setattr(row, "over_stream" if section == "logits" else "over_matmuls", ratio)
            row.over_ours = times[name] / mine if mine else None
        rows.append(row)
    for row, contender in zip(rows[1:], found, strict=True):
        row.note = contender.reason
    return rows


def logits(options: argparse.Namespace, dtype: str, kind: str, site: Path | None) -> list[Row]:
    """Time on logits that exist already, and the error of every contender's loss."""
    z, u = contenders.logits(options.tokens, options.vocab, getattr(torch, dtype), options.device)
    found = contenders.on_logits(kind, options.device, site, options.contenders)
    out = torch.empty_like(z)
    work: dict[str, Any] = {"streaming limit": lambda: torch.add(z, u, out=out)}
    work |= {c.name: measure.step(c.loss, [z], [u]) for c in found if c.loss}
    rows = _measured(
        "logits", dtype, kind, found, work, "streaming limit", options.repeats, options.device
    )
    few = z[:_CHECKED_TOKENS], u[:_CHECKED_TOKENS]
    exact = contenders.naive(kind, few[0].double(), few[1].double())
    for row, contender in zip(rows[1:], found, strict=True):
        if contender.loss:
            row.loss_error = _loss_error(contender.loss, few, exact)
    return rows


def fused(options: argparse.Namespace, dtype: str, kind: str, site: Path | None) -> list[Row]:
    """Time from hidden states and heads, beside the four matmuls that cannot be saved."""
    made = contenders.heads(options.tokens, options.vocab, getattr(torch, dtype), options.device)
    h, w, ht, wt = made
    found = contenders.on_heads(kind, options.device, site, options.contenders)

    def matmuls() -> None:
        z = h @ w.t()
        ht @ wt.t()
        z @ w
        z.t() @ h

    work: dict[str, Any] = {"four matmuls": matmuls}
    work |= {c.name: measure.step(c.loss, [h, w], [ht, wt]) for c in found if c.loss}
    repeats = max(1, options.repeats // 2)  # seconds each, and steadier
    rows = _measured("fused", dtype, kind, found, work, "four matmuls", repeats, options.device)
    few = h[:_CHECKED_TOKENS], w, ht[:_CHECKED_TOKENS], wt
    exact = contenders.naive(kind, (few[0] @ w.t()).double(), (few[2] @ wt.t()).double())
    for row, contender in zip(rows[1:], found, strict=True):
        if contender.loss:
            row.loss_error = _loss_error(contender.loss, few, exact)
    return rows


def tensor_parallel(options: argparse.Namespace, kinds: Sequence[str], site: Path) -> list[Row]:
    """TP=2 over gloo: the slower rank's CPU time per call."""
    context = torch.multiprocessing.get_context("spawn")
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        arguments = (f"{folder}/store", options, kinds, site, results)
        ranks = [context.Process(target=_tp_rank, args=(r, *arguments)) for r in range(2)]
        try:
            for process in ranks:
                process.start()
            rows = results.get(timeout=_TIMEOUT_S)
            for process in ranks:
                process.join(60)
        finally:
            for process in ranks:
                if process.is_alive():
                    process.kill()
    return rows


def _tp_rank(
    rank: int,
    store: str,
    options: argparse.Namespace,
    kinds: Sequence[str],
    site: Path | None,
    results: Any,
) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    rows = []
    for dtype in options.dtypes:
        z, u = contenders.logits(options.tokens, options.vocab // 2, getattr(torch, dtype), "cpu")
        for kind in kinds:
            table: dict[str, peers.LogitsLoss] = {}
            if "ours" in options.contenders:
                for backend in ("eager", "compiled"):
                    loss = contenders.ours(kind, backend, group=dist.group.WORLD)
                    table[f"ours, {backend}"] = loss
            if "modelopt" in options.contenders and site and kind in ("reverse_kl", "forward_kl"):
                table["ModelOpt, TP path"] = peers.modelopt(site, kind, tp=True)
            work = {name: measure.step(loss, [z], [u]) for name, loss in table.items()}
            mine = measure.medians(measure.take_turns(work, options.repeats, "cpu"))
            both: list[Any] = [None, None]
            dist.all_gather_object(both, mine)
            slower = {name: max(times[name] for times in both) for name in work}
            ours = slower.get("ours, compiled")
            rows += [
                Row("tp2", dtype, kind, name, ms=s * 1e3, over_ours=s / ours if ours else None)
                for name, s in slower.items()
            ]
    if rank == 0:
        results.put(rows)
    dist.barrier()


def in_place(kind: str, device: str) -> Contender:
    """A contender for memory alone: in time it is our fastest backend."""
    return Contender("ours, in place", contenders.ours(kind, fastest_backend(device), inplace=True))


def memory(options: argparse.Namespace, section: str, dtype: str, kind: str, name: str) -> Row:
    """Peak of one contender, in a process of its own with an allocator that gives memory back."""
    command = [sys.executable, sys.argv[0], "--memory-of", section, dtype, kind, name]
    command += ["--device", options.device]
    command += ["--tokens", str(options.tokens), "--vocab", str(options.vocab)]
    done = subprocess.run(
        command,
        env=measure.memory_environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=_TIMEOUT_S,
    )
    row = Row(section, dtype, kind, name)
    figures = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("PEAK ")]
    if figures:
        row.peak_units = float(figures[0])
    else:
        row.note = "no memory figure: " + (done.stderr.strip().splitlines() or ["no output"])[-1]
    return row


def memory_child(options: argparse.Namespace, site: Path | None) -> None:
    """What `memory` starts; prints the peak in units of one [T, V] array."""
    section, dtype_name, kind, name = options.memory_of
    dtype, device, every = getattr(torch, dtype_name), options.device, options.contenders
    single_rank_group()
    if section == "fused":
        inputs = contenders.heads(options.tokens, options.vocab, dtype, device)
        small = contenders.heads(8, options.vocab, dtype, device)
        found, trained = contenders.on_heads(kind, device, site, every), 2
    else:
        inputs = list(contenders.logits(options.tokens, options.vocab, dtype, device))
        small = [x[:16].clone() for x in inputs]
        found, trained = contenders.on_logits(kind, device, site, every), 1
        found.append(in_place(kind, device))
    loss = next(c.loss for c in found if c.name == name and c.loss)
    measure.step(loss, small[:trained], small[trained:])()  # compiles
    del small
    work = measure.step(loss, inputs[:trained], inputs[trained:])
    unit = options.tokens * options.vocab * dtype.itemsize
    print(f"PEAK {measure.peak_extra(work, device, inputs) / unit:.4f}")
