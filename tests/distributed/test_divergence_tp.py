"""Vocabulary-parallel divergences equal those of one shard; and their collectives, counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megaopd.losses import DIVERGENCES, divergence, linear_divergence, topk_divergence
from tests.helpers.distributed import run_distributed
from tests.unit.losses.reference import SETTINGS, random_logits, reference_gradient

KINDS = list(DIVERGENCES)
ONE_PASS = {"reverse_kl", "forward_kl", "alpha", "mixed"}
# True vocabulary and padded total: an uneven last shard, a rank of padding only, no padding.
VOCABULARIES = ((37, 48), (33, 96), (96, 96))


@contextmanager
def counted_collectives() -> Iterator[Counter[str]]:
    counts: Counter[str] = Counter()
    names = [
        name
        for name in dir(dist)
        if name.startswith(("all_", "reduce", "broadcast", "gather", "scatter", "send", "isend"))
        and callable(getattr(dist, name))
    ]
    originals = {name: getattr(dist, name) for name in names}

    def counting(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            counts[name] += 1
            return originals[name](*args, **kwargs)

        return call

    for name in names:
        setattr(dist, name, counting(name))
    try:
        yield counts
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def worst(*pairs: tuple[Tensor, Tensor]) -> float:
    return max(float((a.double() - b.double()).abs().max()) if a.numel() else 0.0 for a, b in pairs)


def logits_case(rank: int, size: int, kind: str, vocab: int, total: int) -> dict[str, Any]:
    z, u, w = random_logits(6, total, 1.0)
    w[1] = 0
    labels = torch.tensor([0, vocab - 1, 5, 7, 7, vocab // 2])
    width = total // size
    mine = slice(rank * width, (rank + 1) * width)
    options = {"kind": kind, "vocab_size": vocab, "labels_T": labels, "logprob_temperature": 0.7}
    options |= {"backend": "eager", **SETTINGS}
    whole = z.clone().requires_grad_()
    expected = divergence(whole, u, **options)
    (expected.loss_T * w).sum().backward()

    shard = z[:, mine].clone().requires_grad_()
    with counted_collectives() as forward:
        out = divergence(shard, u[:, mine], tp_group=dist.group.WORLD, chunk_tokens=4, **options)
    with counted_collectives() as backward:
        (out.loss_T * w).sum().backward()
    names = ("loss_T", "student_entropy_T", "teacher_entropy_T")
    names += ("student_logprobs_T", "teacher_logprobs_T")
    pairs = [(getattr(out, name), getattr(expected, name)) for name in names]
    exact = reference_gradient(kind, z[:, :vocab], u[:, :vocab], w)[1]
    full = torch.zeros(6, total, dtype=torch.float64)
    full[:, :vocab] = exact
    ratio = shard.grad.double().norm() / full[:, mine].norm() if full[:, mine].any() else 1.0
    return {
        "values": worst(*pairs),
        "gradient": worst((shard.grad, whole.grad[:, mine])),
        "exact": worst((shard.grad, full[:, mine])),
        "ratio": float(ratio),
        "forward": dict(forward),
        "backward": dict(backward),
        "loss": out.loss_T.tolist(),
    }


def padded_differently(rank: int, size: int, kind: str, vocab: int, total: int) -> float:
    """A teacher whose shards are wider, and so own other ids."""
    z, u, w = random_logits(5, total, 1.0)
    wider = total + 4 * size
    teacher = torch.cat([u[:, :vocab], torch.full((5, wider - vocab), 9.0)], dim=1)
    loss, grad = reference_gradient(kind, z[:, :vocab], u[:, :vocab], w)
    full = torch.zeros(5, total, dtype=torch.float64)
    full[:, :vocab] = grad
    narrow, wide = total // size, wider // size
    mine = slice(rank * narrow, (rank + 1) * narrow)
    shard = z[:, mine].clone().requires_grad_()
    out = divergence(
        shard,
        teacher[:, rank * wide : (rank + 1) * wide],
        kind=kind,
        vocab_size=vocab,
        tp_group=dist.group.WORLD,
        **SETTINGS,
    )
    (out.loss_T * w).sum().backward()
    return worst((out.loss_T, loss), (shard.grad, full[:, mine]))


def heads_case(rank: int, size: int, kind: str, vocab: int, total: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(4)
    hidden, teacher_hidden = (torch.randn(6, h, generator=generator) for h in (8, 4))
    head, teacher_head = (torch.randn(total, h, generator=generator) for h in (8, 4))
    w = torch.rand(6, generator=generator)
    w[2] = 0
    options = {"kind": kind, "vocab_size": vocab, "chunk_tokens": 2, **SETTINGS}
    whole, whole_head = hidden.clone().requires_grad_(), head.clone().requires_grad_()
    expected = linear_divergence(
        whole, whole_head, teacher_hidden, teacher_head, weights_T=w, **options
    )
    expected.loss_sum.backward()
    mine = slice(rank * total // size, (rank + 1) * total // size)
    found = {"error": 0.0, "backward": []}
    for weights, reduce in ((w, True), (None, True), (w, False)):
        leaf, leaf_head = hidden.clone().requires_grad_(), head[mine].clone().requires_grad_()
        out = linear_divergence(
            leaf,
            leaf_head,
            teacher_hidden,
            teacher_head[mine],
            tp_group=dist.group.WORLD,
            weights_T=weights,
            reduce_hidden_grad=reduce,
            **options,
        )
        with counted_collectives() as backward:
            (out.loss_sum if weights is not None else (out.loss_T * w).sum()).backward()
        found["backward"].append(dict(backward))
        if not reduce:
            dist.all_reduce(leaf.grad)
        scale = float(whole_head.grad.abs().max())
        errors = worst((leaf.grad, whole.grad), (leaf_head.grad, whole_head.grad[mine]))
        found["error"] = max(found["error"], errors / scale)
    return found


def topk_case(rank: int, size: int, kind: str, vocab: int, total: int) -> float:
    z, u, w = random_logits(5, total, 1.0)
    logprobs = u[:, :vocab].log_softmax(1)
    ids = logprobs.topk(9, dim=1).indices
    mine = slice(rank * total // size, (rank + 1) * total // size)
    worst_found = 0.0
    for tail in ("bucket", "renormalize"):
        options = {"kind": kind, "tail": tail, "vocab_size": vocab, **SETTINGS}
        whole, shard = z.clone().requires_grad_(), z[:, mine].clone().requires_grad_()
        expected = topk_divergence(whole, ids, logprobs.gather(1, ids), **options)
        (expected.loss_T * w).sum().backward()
        out = topk_divergence(
            shard, ids, logprobs.gather(1, ids), tp_group=dist.group.WORLD, **options
        )
        (out.loss_T * w).sum().backward()
        errors = worst((out.loss_T, expected.loss_T), (shard.grad, whole.grad[:, mine]))
        worst_found = max(worst_found, errors)
    return worst_found


def full_size(rank: int, size: int, kind: str, vocab: int, total: int) -> float:
    z, u, w = random_logits(2, total, 0.5)
    loss, grad = reference_gradient(kind, z[:, :vocab], u[:, :vocab], w)
    full = torch.zeros(2, total, dtype=torch.float64)
    full[:, :vocab] = grad
    mine = slice(rank * total // size, (rank + 1) * total // size)
    shard = z[:, mine].clone().requires_grad_()
    out = divergence(
        shard, u[:, mine], kind=kind, vocab_size=vocab, tp_group=dist.group.WORLD, **SETTINGS
    )
    (out.loss_T * w).sum().backward()
    return max(
        float(((out.loss_T - loss).abs() / loss).max()),
        worst((shard.grad, full[:, mine])) / float(grad.abs().max()),
    )


def every_case(rank: int, size: int) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for kind in KINDS:
        for vocab, total in VOCABULARIES:
            for case in (logits_case, padded_differently, heads_case, topk_case):
                found[case.__name__, kind, vocab] = case(rank, size, kind, vocab, total)
    for kind in ("reverse_kl", "jsd"):
        total = {2: 152_064, 4: 152_064}[size]
        found["full_size", kind] = full_size(rank, size, kind, 151_936, total)
    return found


def eight_shards(rank: int, size: int) -> float:
    return full_size(rank, size, "reverse_kl", 151_936, 8 * 19_072)


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request: pytest.FixtureRequest) -> list[dict[Any, Any]]:
    return run_distributed(every_case, request.param, timeout_s=120)


def of(ranks: list[dict[Any, Any]], case: str, kind: str) -> list[Any]:
    return [found[case, kind, vocab] for found in ranks for vocab, _ in VOCABULARIES]


@pytest.mark.parametrize("kind", KINDS)
def test_shards_equal_the_whole(ranks, kind):
    for found in of(ranks, "logits_case", kind):
        assert found["values"] < 1e-5
        assert found["gradient"] < 1e-6
        assert found["exact"] < 3e-6
        assert found["ratio"] == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_ranks_hold_the_same_bits(ranks, kind):
    for vocab, _ in VOCABULARIES:
        losses = [found["logits_case", kind, vocab]["loss"] for found in ranks]
        assert all(loss == losses[0] for loss in losses)


@pytest.mark.parametrize("kind", KINDS)
def test_collectives(ranks, kind):
    # 6 tokens in chunks of 4: two chunks.
    expected = {"all_gather": 2} if kind in ONE_PASS else {"all_gather": 2, "all_reduce": 2}
    for found in of(ranks, "logits_case", kind):
        assert found["forward"] == expected
        assert found["backward"] == {}
    for found in of(ranks, "heads_case", kind):
        assert found["backward"] == [{"all_reduce": 1}, {"all_reduce": 1}, {}]


@pytest.mark.parametrize("kind", KINDS)
def test_teachers_shards_may_own_other_ids(ranks, kind):
    assert max(of(ranks, "padded_differently", kind)) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_heads_equal_the_whole(ranks, kind):
    assert max(found["error"] for found in of(ranks, "heads_case", kind)) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_topk_equals_the_whole(ranks, kind):
    assert max(of(ranks, "topk_case", kind)) < 1e-5


@pytest.mark.parametrize("kind", ["reverse_kl", "jsd"])
def test_full_size(ranks, kind):
    assert max(found["full_size", kind] for found in ranks) < 1e-5


@pytest.mark.slow
def test_eight_shards_of_the_full_size():
    assert max(run_distributed(eight_shards, 8, timeout_s=200)) < 1e-5


def fails_on_rank_1(rank: int, size: int) -> None:
    if rank == 1:
        raise ValueError("rank one is unhappy")
    dist.barrier()


def hangs(rank: int, size: int) -> None:
    if rank == 0:
        dist.recv(torch.zeros(1), src=1)
    import time

    time.sleep(60)


def test_a_failure_ends_all_ranks_with_the_childs_traceback():
    with pytest.raises(RuntimeError, match="rank one is unhappy"):
        run_distributed(fails_on_rank_1, 2, timeout_s=60)


@pytest.mark.slow
def test_a_hang_ends_at_the_time_limit():
    with pytest.raises(TimeoutError, match=r"ranks \[0, 1\] of 2"):
        run_distributed(hangs, 2, timeout_s=8)
