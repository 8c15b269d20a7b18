"""The peers: installed into a venv of their own, and only their loss functions taken out of them.

Their packages are not imported whole: what stands around the losses would need much more than they
do, and is no part of what is measured.
"""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
import sysconfig
import types
import venv
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

VERSIONS = {"trl": "1.16.0", "nvidia-modelopt": "0.47.0", "liger-kernel": "0.8.5"}
# GKD's beta: what of TRL's and Liger's generalized JSD each kind is.
BETA = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": 0.5}

# (student, teacher) logits [T, V] -> sum of the loss over tokens
LogitsLoss = Callable[[Tensor, Tensor], Tensor]
# (student hidden, head, teacher hidden, head) -> sum of the loss over tokens
HeadsLoss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def peer_site(folder: Path, install: bool) -> Path | None:
    """site-packages of the peers' venv, made on first use; None where it is not and cannot be."""
    found = sorted(folder.glob("lib/python*/site-packages/trl"))
    if not found and install:
        venv.create(folder, with_pip=True)
        wanted = [f"{name}=={version}" for name, version in VERSIONS.items()]
        command = [str(folder / "bin/python"), "-m", "pip", "install", "-q", "--no-deps", *wanted]
        if subprocess.run(command, check=False).returncode:
            print("the peers could not be installed", file=sys.stderr)
            return None
        site = next(folder.glob("lib/python*/site-packages"))
        (site / "project.pth").write_text(sysconfig.get_path("purelib") + "\n")
        found = sorted(folder.glob("lib/python*/site-packages/trl"))
    return found[0].parent if found else None


def _method(path: Path, name: str, inside: str, namespace: dict[str, Any]) -> Callable[..., Tensor]:
    """A method of class `inside`, without importing the module that it stands in."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ClassDef) and node.name == inside:
            body = next(f for f in node.body if isinstance(f, ast.FunctionDef) and f.name == name)
            body.decorator_list, body.returns = [], None
            for argument in body.args.args:
                argument.annotation = None
            exec(compile(ast.Module([body], []), str(path), "exec"), namespace)
            return namespace[name]
    raise LookupError(f"{path}: no {inside}.{name}")


def trl(site: Path, kind: str) -> LogitsLoss:
    """TRL's `generalized_jsd_loss`."""
    path = site / "trl/experimental/gkd/gkd_trainer.py"
    loss = _method(path, "generalized_jsd_loss", "GKDTrainer", {"torch": torch, "F": F})
    return lambda z, u: loss(z[None], u[None], beta=BETA[kind], reduction="sum")


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


def modelopt(site: Path, kind: str, tp: bool) -> LogitsLoss:
    """ModelOpt's `LogitsKLLoss`; with `tp` its tensor-parallel path over the default group."""
    parallel_state = types.SimpleNamespace(get_tensor_model_parallel_group=lambda: dist.group.WORLD)
    namespace = {"torch": torch, "F": F, "parallel_state": parallel_state}
    namespace["dist_nn"] = importlib.import_module("torch.distributed.nn")
    path = site / "modelopt/torch/distill/plugins/megatron.py"
    forward = _method(path, "forward", "LogitsKLLoss", namespace)
    stand_in = types.SimpleNamespace(
        _temperature=1.0,
        _reverse=kind == "reverse_kl",
        _config=types.SimpleNamespace(tensor_model_parallel_size=2 if tp else 1),
        pre_forward=lambda a, b: (a, b.detach()),
        post_forward=lambda loss, tp_reduce: _ReduceOverGroup.apply(loss) if tp else loss,
    )
    return lambda z, u: forward(stand_in, z[:, None], u[:, None]).sum()


def trl_chunked(site: Path, kind: str) -> HeadsLoss:
    """TRL's `ChunkedDivergenceFunction`, loaded beside stand-ins for the packages around it."""
    for name in ("trl", "trl.trainer", "trl.kernels"):
        package = types.ModuleType(name)
        package.__path__ = [str(site / name.replace(".", "/"))]
        sys.modules[name] = package
    trainer_parts = types.ModuleType("trl.trainer.utils")
    trainer_parts.maybe_gather_lm_head_ctx = lambda *_: nullcontext()  # type: ignore[attr-defined]
    sys.modules["trl.trainer.utils"] = trainer_parts
    function = importlib.import_module("trl.kernels.chunked_divergence").ChunkedDivergenceFunction
    return lambda h, w, ht, wt: function.apply(h, w, None, ht, wt, None, BETA[kind])[0].sum()


def liger_jsd(site: Path, kind: str) -> LogitsLoss:
    """Liger's `LigerJSDFunction`, a Triton kernel on log-probabilities; needs CUDA."""
    _make_importable(site)
    function = importlib.import_module("liger_kernel.ops.jsd").LigerJSDFunction

    def loss(z: Tensor, u: Tensor) -> Tensor:
        mean = function.apply(F.log_softmax(z, -1), F.log_softmax(u, -1), None, BETA[kind], -100)
        return mean * z.shape[0]

    return loss


def liger_fused(site: Path, kind: str) -> HeadsLoss:
    """Liger's chunked fused JSD in plain torch."""
    _make_importable(site)
    module = importlib.import_module("liger_kernel.chunked_loss.jsd_loss")
    mean = module.LigerFusedLinearJSDLoss(0.0, 1.0, beta=BETA[kind], compiled=False)

    def loss(h: Tensor, w: Tensor, ht: Tensor, wt: Tensor) -> Tensor:
        labels = torch.zeros(h.shape[0], dtype=torch.int64, device=h.device)
        return mean(h, w, ht, wt, labels) * h.shape[0]

    return loss


def _make_importable(site: Path) -> None:
    if str(site) not in sys.path:
        sys.path.append(str(site))  # last: this project's versions of everything else come first
