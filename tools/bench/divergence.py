"""Speed and memory of the divergences beside their peers, in one run.

    python tools/bench/divergence.py [--device cuda] [--tokens 256] [--vocab 151936] [--json FILE]

Prints one table and writes JSON. On a CPU: one thread, CPU time, medians over rounds in which all
contestants take turns, page faults taken out of everybody's time by allocator settings (the
process restarts itself with them); peak extra memory is measured in processes of their own with the
allocator's defaults. On a GPU: CUDA events and the allocator's peak.

Peers (TRL, ModelOpt, Liger) go into a venv of their own under .bench/, without their dependencies;
only the loss functions are taken out of them.
"""

from __future__ import annotations

import argparse
import ast
import gc
import importlib
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
import types
import venv
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "100000000000"}
PEERS = {"trl": "1.16.0", "nvidia-modelopt": "0.47.0", "liger-kernel": "0.8.5"}
ROOT = Path(__file__).resolve().parents[2]
HIDDEN = 1024

if __name__ == "__main__" and str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402

from megaopd.losses import DIVERGENCES, divergence, linear_divergence  # noqa: E402

Loss = Callable[[Tensor, Tensor], Tensor]
PEER_BETA = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}


# --- peers ---------------------------------------------------------------------------------------


def peer_site(install: bool) -> Path | None:
    """site-packages of the peers' venv, made on first use; None if it cannot be made."""
    folder = ROOT / ".bench" / "peers"
    found = sorted(folder.glob("lib/python*/site-packages/trl"))
    if not found and install:
        venv.create(folder, with_pip=True)
        wanted = [f"{name}=={version}" for name, version in PEERS.items()]
        command = [
            str(folder / "bin" / "python"),
            "-m",
            "pip",
            "install",
            "-q",
            "--no-deps",
            *wanted,
        ]
        if subprocess.run(command, check=False).returncode:
            print("peers could not be installed; the table has none", file=sys.stderr)
            return None
        here = sysconfig.get_path("purelib")
        site = next(folder.glob("lib/python*/site-packages"))
        (site / "project.pth").write_text(here + "\n")
        found = sorted(folder.glob("lib/python*/site-packages/trl"))
    return found[0].parent if found else None


def function_from(path: Path, name: str, inside: str, namespace: dict[str, Any]) -> Callable:
    """A function of class `inside`, without importing the module that it stands in."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ClassDef) and node.name == inside:
            body = next(f for f in node.body if isinstance(f, ast.FunctionDef) and f.name == name)
            body.decorator_list, body.returns = [], None
            for argument in body.args.args:
                argument.annotation = None
            exec(compile(ast.Module([body], []), str(path), "exec"), namespace)
            return namespace[name]
    raise LookupError(f"{path}: no {inside}.{name}")


class _ReduceOverGroup(torch.autograd.Function):
    """Sum over the ranks forward, identity backward, as Megatron reduces a loss."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad


def trl_loss(site: Path) -> Callable[[float], Loss]:
    path = site / "trl/experimental/gkd/gkd_trainer.py"
    namespace = {"torch": torch, "F": F}
    function = function_from(path, "generalized_jsd_loss", "GKDTrainer", namespace)
    return lambda beta: lambda z, u: function(z[None], u[None], beta=beta, reduction="sum")


def modelopt_loss(site: Path, reverse: bool, tp: bool) -> Loss:
    parallel_state = types.SimpleNamespace(get_tensor_model_parallel_group=lambda: dist.group.WORLD)
    namespace = {"torch": torch, "F": F, "parallel_state": parallel_state}
    namespace["dist_nn"] = importlib.import_module("torch.distributed.nn")
    path = site / "modelopt/torch/distill/plugins/megatron.py"
    forward = function_from(path, "forward", "LogitsKLLoss", namespace)
    stand_in = types.SimpleNamespace(
        _temperature=1.0,
        _reverse=not reverse,  # its `reverse` names the other direction
        _config=types.SimpleNamespace(tensor_model_parallel_size=2 if tp else 1),
        pre_forward=lambda a, b: (a, b.detach()),
        post_forward=lambda loss, tp_reduce: _ReduceOverGroup.apply(loss) if tp else loss,
    )
    return lambda z, u: forward(stand_in, z[:, None], u[:, None]).sum()


def trl_chunked(site: Path) -> Callable[..., Tensor]:
    """TRL's fused divergence, loaded beside stand-ins for the packages around it."""
    for name in ("trl", "trl.trainer", "trl.kernels"):
        package = types.ModuleType(name)
        package.__path__ = [str(site / name.replace(".", "/"))]
        sys.modules[name] = package
    utils = types.ModuleType("trl.trainer.utils")
    utils.maybe_gather_lm_head_ctx = lambda *_: nullcontext()  # type: ignore[attr-defined]
    sys.modules["trl.trainer.utils"] = utils
    module = importlib.import_module("trl.kernels.chunked_divergence")
    return lambda h, w, ht, wt: module.ChunkedDivergenceFunction.apply(
        h, w, None, ht, wt, None, 1.0
    )[0].sum()


def liger_fused(site: Path) -> Callable[..., Tensor]:
    """Liger's chunked fused JSD in plain torch."""
    sys.path.append(str(site))
    module = importlib.import_module("liger_kernel.chunked_loss.jsd_loss")
    loss = module.LigerFusedLinearJSDLoss(0.0, 1.0, beta=0.5, compiled=False)
    return lambda h, w, ht, wt: loss(h, w, ht, wt, torch.zeros(h.shape[0], dtype=torch.int64))


def naive(kind: str) -> Loss:
    """What one writes first: fp32 log-softmaxes and the formula, with autograd."""

    def loss(z: Tensor, u: Tensor) -> Tensor:
        log_p, log_q = F.log_softmax(z.float(), -1), F.log_softmax(u.float(), -1)
        p, q = log_p.exp(), log_q.exp()
        if kind == "reverse_kl":
            return (p * (log_p - log_q)).sum()
        if kind == "forward_kl":
            return (q * (log_q - log_p)).sum()
        log_m = (0.5 * p + 0.5 * q).log()
        return 0.5 * (p * (log_p - log_m) + q * (log_q - log_m)).sum()

    return loss


# --- contestants ---------------------------------------------------------------------------------


def ours(kind: str, backend: str, inplace: bool = False, group: Any = None) -> Loss:
    def loss(z: Tensor, u: Tensor) -> Tensor:
        out = divergence(z, u, kind=kind, backend=backend, inplace=inplace, tp_group=group)
        return out.loss_T.sum()

    return loss


def contestants(device: str, site: Path | None) -> dict[tuple[str, str], Loss]:
    """(kind, name) -> loss(z, u) to be run forward and backward."""
    backends = ["eager", "compiled"] if device == "cpu" else ["eager", "triton"]
    found: dict[tuple[str, str], Loss] = {}
    for kind in DIVERGENCES:
        for backend in backends:
            found[kind, f"ours, {backend}"] = ours(kind, backend)
        if kind in PEER_BETA:
            found[kind, "naive torch"] = naive(kind)
        if kind in PEER_BETA and site:
            found[kind, "TRL"] = trl_loss(site)(PEER_BETA[kind])
        if kind in ("reverse_kl", "forward_kl") and site:
            reverse = kind == "reverse_kl"
            found[kind, "ModelOpt"] = modelopt_loss(site, reverse, tp=False)
            found[kind, "ModelOpt, TP path"] = modelopt_loss(site, reverse, tp=True)
    return found


def logits(tokens: int, vocab: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    z = torch.randn(tokens, vocab, device=device) * 2
    return z.to(dtype), (z + torch.randn(tokens, vocab, device=device) * 0.5).to(dtype)


def timed(work: Callable[[], Any], device: str) -> float:
    """Seconds of one call: CPU time, or device time."""
    if device == "cuda":
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3
    before = time.process_time()
    work()
    return time.process_time() - before


def take_turns(work: dict[Any, Callable[[], Any]], rounds: int, device: str) -> dict[Any, float]:
    """Medians over `rounds`, after one round to warm up."""
    times: dict[Any, list[float]] = {key: [] for key in work}
    for number in range(rounds + 1):
        for key, call in work.items():
            seconds = timed(call, device)
            if number:
                times[key].append(seconds)
    return {key: median(values) for key, values in times.items()}


def forward_backward(loss: Loss, z: Tensor, u: Tensor) -> Callable[[], None]:
    def work() -> None:
        loss(z.detach().requires_grad_(), u).backward()

    return work


def bench_logits(options: argparse.Namespace, dtype: str, site: Path | None) -> list[dict]:
    z, u = logits(options.tokens, options.vocab, getattr(torch, dtype), options.device)
    out = torch.empty_like(z)
    work: dict[Any, Callable[[], Any]] = {("-", "stream"): lambda: torch.add(z, u, out=out)}
    for key, loss in contestants(options.device, site).items():
        if options.kinds is None or key[0] in options.kinds:
            work[key] = forward_backward(loss, z, u)
    times = take_turns(work, options.rounds, options.device)
    stream = times["-", "stream"]
    return [
        {"dtype": dtype, "kind": kind, "name": name, "s": s, "over_stream": s / stream}
        for (kind, name), s in times.items()
    ]


def heads(tokens: int, vocab: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = ((tokens, HIDDEN), (vocab, HIDDEN)) * 2
    found = [torch.randn(s, device=device) for s in shapes]
    return [(x * (1.0 if x.shape[0] == tokens else 0.1)).to(dtype) for x in found]


def fused_contestants(device: str, site: Path | None) -> dict[str, Callable[..., Tensor]]:
    def fused(backend: str) -> Callable[..., Tensor]:
        def loss(h: Tensor, w: Tensor, ht: Tensor, wt: Tensor) -> Tensor:
            ones = torch.ones(h.shape[0], device=h.device)
            found = linear_divergence(h, w, ht, wt, backend=backend, weights_T=ones)
            assert found.loss_sum is not None
            return found.loss_sum

        return loss

    found = {"ours, " + b: fused(b) for b in (["compiled"] if device == "cpu" else ["triton"])}
    if site:
        found["TRL chunked"] = trl_chunked(site)
        try:
            found["Liger (jsd)"] = liger_fused(site)
        except ImportError as error:
            print(f"Liger does not run here: {error}", file=sys.stderr)
    return found


def bench_fused(options: argparse.Namespace, dtype: str, site: Path | None) -> list[dict]:
    tensors = heads(options.tokens, options.vocab, getattr(torch, dtype), options.device)
    h, w, ht, wt = tensors

    def matmuls() -> None:
        z = h @ w.t()
        ht @ wt.t()
        z @ w
        z.t() @ h

    def step(loss: Callable[..., Tensor]) -> Callable[[], None]:
        def work() -> None:
            a, b = h.detach().requires_grad_(), w.detach().requires_grad_()
            loss(a, b, ht, wt).backward()

        return work

    work: dict[Any, Callable[[], Any]] = {"four matmuls": matmuls}
    work |= {n: step(loss) for n, loss in fused_contestants(options.device, site).items()}
    times = take_turns(work, max(1, options.rounds // 2), options.device)
    bare = times["four matmuls"]
    return [
        {"dtype": dtype, "kind": "fused reverse_kl", "name": n, "s": s, "over_matmuls": s / bare}
        for n, s in times.items()
    ]


# --- memory --------------------------------------------------------------------------------------


def resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    return 0


def peak_extra(work: Callable[[], Any], device: str, inputs: list[Tensor]) -> int:
    """Bytes that one call holds at its peak beyond what was there before."""
    gc.collect()
    for x in inputs:  # pages that the system took back while idle would count as new
        x.detach().sum()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    before = resident("VmRSS")
    work()
    return resident("VmHWM") - before


def memory_child(options: argparse.Namespace) -> None:
    """Measures one contestant, named on the command line; prints bytes in units of one [T, V]."""
    dtype_name, kind, name = options.memory.split("/")
    dtype, device = getattr(torch, dtype_name), options.device
    site = peer_site(install=False)
    single_rank_group()
    unit = options.tokens * options.vocab * torch.finfo(dtype).bits // 8
    if kind == "fused reverse_kl":
        h, w, ht, wt = heads(options.tokens, options.vocab, dtype, device)
        loss = fused_contestants(device, site)[name]
        small = heads(8, options.vocab, dtype, device)
        loss(small[0].requires_grad_(), small[1].requires_grad_(), *small[2:]).backward()
        del small
        h.requires_grad_()
        w.requires_grad_()
        extra = peak_extra(lambda: loss(h, w, ht, wt).backward(), device, [h, w, ht, wt])
    else:
        z, u = logits(options.tokens, options.vocab, dtype, device)
        table = contestants(device, site)
        fast = "compiled" if device == "cpu" else "triton"
        table[kind, "ours, in place"] = ours(kind, fast, inplace=True)
        loss = table[kind, name]
        few = slice(0, 2 * (8 if device == "cpu" else 64))
        forward_backward(loss, z[few].clone(), u[few])()
        z.requires_grad_()
        extra = peak_extra(lambda: loss(z, u).backward(), device, [z, u])
    print(f"PEAK {extra / unit:.3f}")


def peak_memory(options: argparse.Namespace, dtype: str, kind: str, name: str) -> float | None:
    command = [sys.executable, __file__, "--memory", f"{dtype}/{kind}/{name}"]
    command += ["--device", options.device, "--tokens", str(options.tokens)]
    command += ["--vocab", str(options.vocab)]
    environment = {k: v for k, v in os.environ.items() if k not in ALLOCATOR}
    result = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, timeout=900
    )
    for line in result.stdout.splitlines():
        if line.startswith("PEAK "):
            return float(line.split()[1])
    print(f"no memory figure for {dtype} {kind} {name}: {result.stderr[-300:]}", file=sys.stderr)
    return None


# --- tensor parallelism --------------------------------------------------------------------------


def single_rank_group() -> None:
    if not dist.is_initialized():
        store = tempfile.mkdtemp() + "/store"
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)


def tp_rank(rank: int, store: str, options: argparse.Namespace, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    site = peer_site(install=False)
    rows = []
    for dtype in options.dtypes:
        z, u = logits(options.tokens, options.vocab // 2, getattr(torch, dtype), "cpu")
        mine = ours("reverse_kl", "compiled", group=dist.group.WORLD)
        work = {"ours, compiled": forward_backward(mine, z, u)}
        if site:
            peer = modelopt_loss(site, reverse=True, tp=True)
            work["ModelOpt, TP path"] = forward_backward(peer, z, u)
        times = take_turns(work, options.rounds, "cpu")
        rows += [
            {"dtype": dtype, "kind": "reverse_kl, TP=2", "name": n, "s": s}
            for n, s in times.items()
        ]
    if rank == 0:
        results.put(rows)
    dist.barrier()


def bench_tp(options: argparse.Namespace) -> list[dict]:
    context = torch.multiprocessing.get_context("spawn")
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        arguments = (f"{folder}/store", options, results)
        ranks = [context.Process(target=tp_rank, args=(r, *arguments)) for r in range(2)]
        for process in ranks:
            process.start()
        rows = results.get(timeout=1200)
        for process in ranks:
            process.join(60)
    return rows


# --- the table -----------------------------------------------------------------------------------


def show(rows: list[dict]) -> None:
    heading = f"{'dtype':9} {'kind':18} {'name':20} {'ms':>9} {'x stream':>9} {'x matmuls':>9}"
    print(heading, f"{'peak u':>7}")
    for row in rows:
        cells = [f"{row['dtype']:9} {row['kind']:18} {row['name']:20} {row['s'] * 1e3:9.1f}"]
        for key, width in (("over_stream", 9), ("over_matmuls", 9), ("peak_units", 7)):
            value = row.get(key)
            cells.append(f"{value:{width}.2f}" if value is not None else " " * width)
        print(" ".join(cells))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--tokens", type=int, default=None)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kinds", nargs="*", default=None, choices=list(DIVERGENCES))
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16"])
    parser.add_argument("--skip", nargs="*", default=[], choices=["fused", "tp", "memory", "peers"])
    parser.add_argument("--json", default=str(ROOT / ".bench" / "divergence.json"))
    parser.add_argument("--memory", default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.tokens = options.tokens or (256 if options.device == "cpu" else 32_768)
    torch.set_num_threads(1)
    if options.memory:
        memory_child(options)
        return
    if options.device == "cpu" and any(os.environ.get(k) != v for k, v in ALLOCATOR.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ALLOCATOR})
    site = None if "peers" in options.skip else peer_site(install=True)
    single_rank_group()
    rows: list[dict] = []
    for dtype in options.dtypes:
        rows += bench_logits(options, dtype, site)
        if "fused" not in options.skip:
            rows += bench_fused(options, dtype, site)
    if options.device == "cpu" and "tp" not in options.skip:
        rows += bench_tp(options)
    if "memory" not in options.skip:
        fast = "ours, compiled" if options.device == "cpu" else "ours, triton"
        wanted = ("reverse_kl", "jsd", "fused reverse_kl")
        in_place = [
            {"dtype": dtype, "kind": kind, "name": "ours, in place", "s": float("nan")}
            for dtype in options.dtypes
            for kind in ("reverse_kl", "jsd")
        ]
        rows += in_place
        for row in rows:
            if row["kind"] in wanted and row["name"] not in ("four matmuls", "ours, eager"):
                row["peak_units"] = peak_memory(options, row["dtype"], row["kind"], row["name"])
        print(f"peak of {fast}: memory beyond the inputs, in units of one [T, V] array")
    shape = f"T={options.tokens} V={options.vocab}"
    print(f"{shape}, one thread, {options.device}, torch {torch.__version__}")
    print("allocator:", " ".join(f"{k}={v}" for k, v in ALLOCATOR.items()), "(not for memory)")
    show(rows)
    Path(options.json).parent.mkdir(parents=True, exist_ok=True)
    report = {"tokens": options.tokens, "vocab": options.vocab, "device": options.device}
    Path(options.json).write_text(json.dumps({**report, "peers": PEERS, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
