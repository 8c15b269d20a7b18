"""Who competes: our backends, the peers and plain torch, on logits and on hidden states."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megaopd.losses import divergence, linear_divergence
from tools.bench.divergence_bench import peers

HIDDEN = 1024
BETA, ALPHA = 0.5, 0.1  # the parameters of every kind that has one


@dataclass(frozen=True)
class Contender:
    """One line of a table.

    Attributes:
        name: how the table calls it; the first word is what `--contenders` selects by.
        loss: inputs -> sum of the loss over tokens; None where it does not run.
        reason: why it does not run.
    """

    name: str
    loss: Callable[..., Tensor] | None
    reason: str = ""


def our_backends(device: str) -> list[tuple[str, str]]:
    """(backend, "") or (backend, why it does not run here)."""
    needs_gpu = "" if device == "cuda" else "needs a GPU"
    return [("eager", ""), ("compiled", ""), ("triton", needs_gpu)]


def fastest_backend(device: str) -> str:
    return "triton" if device == "cuda" else "compiled"


def ours(kind: str, backend: str, inplace: bool = False, group: Any = None) -> peers.LogitsLoss:
    def loss(z: Tensor, u: Tensor) -> Tensor:
        out = divergence(
            z,
            u,
            kind=kind,
            beta=BETA,
            alpha=ALPHA,
            backend=backend,
            inplace=inplace,
            tp_group=group,
        )
        return out.loss_T.sum()

    return loss


def ours_fused(kind: str, backend: str) -> peers.HeadsLoss:
    def loss(h: Tensor, w: Tensor, ht: Tensor, wt: Tensor) -> Tensor:
        ones = torch.ones(h.shape[0], device=h.device)
        out = linear_divergence(
            h, w, ht, wt, kind=kind, beta=BETA, alpha=ALPHA, backend=backend, weights_T=ones
        )
        assert out.loss_sum is not None  # weights were given
        return out.loss_sum

    return loss


def naive(kind: str, z: Tensor, u: Tensor) -> Tensor:
    """What one writes first: log-softmaxes in fp32 (fp64 for fp64), the formula, autograd."""
    wide = torch.float64 if z.dtype == torch.float64 else torch.float32
    log_p, log_q = F.log_softmax(z.to(wide), -1), F.log_softmax(u.to(wide), -1)
    p, q = log_p.exp(), log_q.exp()
    if kind == "reverse_kl":
        return (p * (log_p - log_q)).sum()
    if kind == "forward_kl":
        return (q * (log_q - log_p)).sum()
    if kind == "mixed":
        return ((BETA * p - (1 - BETA) * q) * (log_p - log_q)).sum()
    if kind == "jsd":
        log_m = (BETA * q + (1 - BETA) * p).log()
        return (BETA * q * (log_q - log_m) + (1 - BETA) * p * (log_p - log_m)).sum()
    if kind == "skew_forward_kl":
        return (q * (log_q - (ALPHA * q + (1 - ALPHA) * p).log())).sum()
    if kind == "skew_reverse_kl":
        return (p * (log_p - (ALPHA * p + (1 - ALPHA) * q).log())).sum()
    if kind == "alpha":
        mean = (ALPHA * log_p + (1 - ALPHA) * log_q).exp().sum(-1)
        return ((mean - 1) / (ALPHA * (ALPHA - 1))).sum()
    if kind == "tvd":
        return 0.5 * (p - q).abs().sum()
    raise KeyError(f"{kind}: no plain formula; enter it here")


def _peer(name: str, site: Path | None, load: Callable[[Path], Any], kind_fits: bool) -> Contender:
    if not kind_fits:
        return Contender(name, None, "has no such divergence")
    if site is None:
        return Contender(name, None, "not installed")
    try:
        return Contender(name, load(site))
    except (ImportError, OSError, LookupError) as error:
        return Contender(name, None, f"does not load: {type(error).__name__}: {error}"[:120])


def on_logits(kind: str, device: str, site: Path | None, groups: Sequence[str]) -> list[Contender]:
    """All contenders for one kind, those that do not run here with the reason."""

    def found() -> Iterator[Contender]:
        for backend, reason in our_backends(device):
            loss = None if reason else ours(kind, backend)
            yield Contender(f"ours, {backend}", loss, reason)
        yield Contender("naive torch", partial(naive, kind))
        generalized, kl = kind in peers.BETA, kind in ("reverse_kl", "forward_kl")
        yield _peer("TRL", site, lambda s: peers.trl(s, kind), generalized)
        yield _peer("ModelOpt", site, lambda s: peers.modelopt(s, kind, tp=False), kl)
        yield _peer("ModelOpt, TP path", site, lambda s: peers.modelopt(s, kind, tp=True), kl)
        if device == "cuda" or not generalized:
            yield _peer("Liger", site, lambda s: peers.liger_jsd(s, kind), generalized)
        else:
            yield Contender("Liger", None, "needs a GPU: a Triton kernel")

    return _selected(found(), groups)


def on_heads(kind: str, device: str, site: Path | None, groups: Sequence[str]) -> list[Contender]:
    """The same from hidden states and heads."""

    def found() -> Iterator[Contender]:
        backend = fastest_backend(device)
        yield Contender(f"ours, {backend}", ours_fused(kind, backend))
        generalized = kind in peers.BETA
        yield _peer("TRL chunked", site, lambda s: peers.trl_chunked(s, kind), generalized)
        yield _peer("Liger chunked", site, lambda s: peers.liger_fused(s, kind), generalized)

    return _selected(found(), groups)


def _selected(found: Iterator[Contender], groups: Sequence[str]) -> list[Contender]:
    return [c for c in found if c.name.split()[0].strip(",").lower() in groups]


def logits(tokens: int, vocab: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    """Student's and teacher's, close to each other as in a distillation under way."""
    torch.manual_seed(0)
    z = torch.randn(tokens, vocab, device=device) * 2
    return z.to(dtype), (z + torch.randn(tokens, vocab, device=device) * 0.5).to(dtype)


def heads(tokens: int, vocab: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """Student's hidden states and head, teacher's hidden states and head."""
    torch.manual_seed(0)
    found = []
    for _ in range(2):
        found.append(torch.randn(tokens, HIDDEN, device=device).to(dtype))
        found.append((0.05 * torch.randn(vocab, HIDDEN, device=device)).to(dtype))
    return found
