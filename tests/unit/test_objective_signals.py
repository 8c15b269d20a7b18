"""Every kind of teacher's signal: gradients against autograd in fp64, what a sampled token says in
expectation, and importance correction."""

from __future__ import annotations

import math
import typing
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megaopd.batch import HiddenSignal, PackedBatch, TeacherSignal, TokenSignal, TopKSignal
from megaopd.config import LossConfig
from megaopd.errors import ConfigError
from megaopd.losses import DIVERGENCES, topk_divergence
from megaopd.losses.importance import IMPORTANCE
from megaopd.losses.objective import METRICS, OBJECTIVES, YARDSTICKS, Objective
from tests.unit.losses.reference import SETTINGS, from_logprobs

V, WIDTH, H, K = 11, 16, 4, 3
KINDS = list(DIVERGENCES)
# The sampler is hotter than the loss and has other weights: far from what the trainer says.
SAMPLER_TEMPERATURE = 1.3


def make_batch(labels: Tensor, mask: Tensor, sampler: Tensor, weights: Tensor) -> PackedBatch:
    num = len(labels)
    return PackedBatch(
        tokens_T=labels,
        labels_T=labels,
        positions_T=torch.arange(num),
        loss_mask_T=mask,
        rollout_logprobs_T=torch.where(mask, sampler, 0.0),
        token_weights_T=weights,
        rows_T=torch.where(mask, torch.arange(num), -1),
        cu_seqlens=torch.tensor([0, num], dtype=torch.int32),
        sample_ids=("a/0",),
    )


class Case:
    """A micro-batch of 7 tokens, 5 of them with a loss, one of these of weight 0; fp64."""

    def __init__(self, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.mask = torch.tensor([0, 1, 1, 0, 1, 1, 1], dtype=torch.bool)
        weights = torch.tensor([1.0, 2.0, 0.0, 1.0, 0.5, 1.0, 1.5])
        self.hidden, self.head = randn(7, H).requires_grad_(), randn(WIDTH, H).requires_grad_()
        labels = torch.randint(0, V, (7,), generator=generator)
        sampler = -torch.rand(7, generator=generator) * 4 - 0.5
        self.batch = make_batch(labels, self.mask, sampler, weights)
        self.log_q = randn(7, V).log_softmax(-1)[self.mask]

    def signal(self, kind: type) -> TeacherSignal:
        if kind is TopKSignal:
            top = self.log_q.topk(K, dim=1)
            return TopKSignal(top.indices.int(), top.values)
        if kind is TokenSignal:
            labels = self.batch.labels_T[self.mask]
            return TokenSignal(self.log_q.gather(1, labels[:, None])[:, 0])
        # Hidden states that are logits: the head is the identity, its padding 0.
        return HiddenSignal(self.log_q, Head(torch.eye(WIDTH, V, dtype=torch.float64)))

    def log_p(self) -> Tensor:
        return (self.hidden[self.mask] @ self.head[:V].T).log_softmax(-1)

    def weights(self) -> Tensor:
        return self.batch.token_weights_T[self.mask].double()

    def gradients(self, loss: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, (self.hidden, self.head))


class Head:
    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def shard(self) -> Tensor:
        return self.rows


def bucketed(log_p: Tensor, ids: Tensor) -> Tensor:
    """[L, V] -> [L, K + 1] log-probs of the ids and of all others."""
    rest = log_p.scatter(1, ids, -math.inf).logsumexp(1, keepdim=True)
    return torch.cat([log_p.gather(1, ids), rest], dim=1)


def reference(case: Case, signal: TeacherSignal, config: LossConfig) -> tuple[Tensor, Tensor]:
    """(a scalar whose autograd gradient is the objective's, value per loss token)."""
    log_p, weights = case.log_p(), case.weights()
    if isinstance(signal, TokenSignal):
        labels = case.batch.labels_T[case.mask][:, None]
        log_y = log_p.gather(1, labels)[:, 0]
        ratio = (log_y - case.batch.rollout_logprobs_T[case.mask]).exp().detach()
        counts = {
            "none": torch.ones_like(ratio),
            "truncated": ratio.clamp(max=config.importance_cap),
            "icepop": ratio * ((ratio >= config.icepop_low) & (ratio <= config.icepop_high)),
        }[config.importance]
        delta = (log_y - signal.logprobs_L).detach()
        value = counts * (torch.expm1(-delta) + delta)  # k3
        return (weights * counts * delta * log_y).sum(), value  # k1 as an advantage
    log_q = case.log_q
    if isinstance(signal, TopKSignal):
        ids = signal.ids_LK.long()
        log_p, log_q = bucketed(log_p, ids), bucketed(log_q, ids)
    value = from_logprobs(config.kind, log_p, log_q, config.beta, config.alpha)
    return (weights * value).sum(), value.detach()


FORMS = {
    "one chunk": {},
    "chunks": {"chunk_tokens": 2},
    "unfused": {"fused": False},
    "icepop": {"importance": "icepop"},
    "uncorrected": {"importance": "none"},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", OBJECTIVES)
def test_gradients_are_those_of_autograd(kind, form):
    config = LossConfig(backend="eager", **FORMS[form])
    objective = Objective(config, V, SAMPLER_TEMPERATURE, None)
    # Two micro-batches add up.
    for case in (Case(0), Case(1)):
        signal = case.signal(kind)
        out = objective(case.hidden, case.head, case.batch, signal)
        scalar, value = reference(case, signal, config)
        assert out.loss_sum.item() == pytest.approx(float((case.weights() * value).sum()), rel=1e-6)
        scored = case.weights() != 0
        assert out.sums["loss/divergence"].item() == pytest.approx(
            value[scored].sum().item(), rel=1e-6
        )
        assert (int(out.num_tokens), int(out.num_scored)) == (5, 4)
        for found, wanted in zip(
            case.gradients(2 * out.loss_sum), case.gradients(2 * scalar), strict=True
        ):
            torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-8)
            assert found.norm() > 0.01
        log_p = case.log_p().detach()[scored]
        entropy = -(log_p.exp() * log_p).sum()
        assert out.sums["student/entropy"].item() == pytest.approx(entropy.item(), rel=1e-6)
        hot = (case.hidden[case.mask] @ case.head[:V].T / SAMPLER_TEMPERATURE).log_softmax(-1)
        labels = case.batch.labels_T[case.mask][:, None]
        mismatch = hot.gather(1, labels)[:, 0] - case.batch.rollout_logprobs_T[case.mask]
        assert out.mismatch_max.item() == pytest.approx(mismatch[scored].abs().max().item())


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_without_loss_tokens_the_gradients_are_zero_and_not_missing(kind):
    case = Case()
    case.log_q, case.mask = case.log_q[:0], torch.zeros(7, dtype=torch.bool)
    batch = replace(case.batch, loss_mask_T=case.mask)
    out = Objective(LossConfig(), V, 1.0, None)(case.hidden, case.head, batch, case.signal(kind))
    assert out.loss_sum.item() == 0
    assert {float(value) for value in out.sums.values()} == {0.0}
    for gradient in case.gradients(out.loss_sum):
        assert gradient.abs().sum() == 0


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_nothing_is_computed_for_gradients_that_nobody_wants(kind):
    case = Case()
    signal = case.signal(kind)
    objective = Objective(LossConfig(backend="eager"), V, 1.0, None)
    wanted = objective(case.hidden, case.head, case.batch, signal)
    with torch.no_grad():
        out = objective(case.hidden, case.head, case.batch, signal)
    assert out.loss_sum.item() == wanted.loss_sum.item()
    assert not out.loss_sum.requires_grad
    frozen = objective(case.hidden, case.head.detach(), case.batch, signal)
    (gradient,) = torch.autograd.grad(frozen.loss_sum, case.hidden)
    torch.testing.assert_close(gradient, case.gradients(wanted.loss_sum)[0])


# One sampled token: every token of the vocabulary is the label of one row of equal hidden states,
# weighted with the probability that the sampler draws it.


def enumerated(config: LossConfig, sampler_temperature: float, stale: float):
    """(the objective's output, gradient, the exact divergence, its gradient), fp64."""
    case = Case(3)
    hidden = case.hidden[:1].detach().requires_grad_()
    head = case.head.detach().requires_grad_()
    logits = hidden @ head[:V].T
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(1, V, generator=generator, dtype=torch.float64) * stale
    log_sampler = ((logits.detach() + noise) / sampler_temperature).log_softmax(-1)[0]
    log_q = case.log_q[:1]
    batch = make_batch(
        torch.arange(V), torch.ones(V, dtype=torch.bool), log_sampler, log_sampler.exp()
    )
    objective = Objective(config, V, sampler_temperature, None)
    out = objective(hidden.expand(V, -1), head, batch, TokenSignal(log_q[0]))
    exact = from_logprobs(config.kind, logits.log_softmax(-1), log_q, **SETTINGS)[0]
    found = torch.autograd.grad(out.loss_sum, (hidden, head))
    wanted = torch.autograd.grad(exact, (hidden, head))
    return out, found, exact.item(), wanted


@pytest.mark.parametrize("kind", KINDS)
def test_in_expectation_a_sampled_token_has_the_divergence_and_its_gradient(kind):
    config = LossConfig(kind=kind, importance="none", **SETTINGS)
    out, found, exact, wanted = enumerated(config, sampler_temperature=1.0, stale=0.0)
    assert out.loss_sum.item() == pytest.approx(exact, rel=1e-6)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("kind", ["reverse_kl", "jsd"])
def test_the_ratio_makes_up_for_other_weights_and_temperatures(kind, temperature):
    config = LossConfig(kind=kind, importance="truncated", importance_cap=1e6, **SETTINGS)
    out, found, exact, wanted = enumerated(config, temperature, stale=0.5)
    assert out.loss_sum.item() == pytest.approx(exact, rel=1e-6)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)
    uncorrected = enumerated(replace(config, importance="none"), temperature, stale=0.5)
    assert abs(uncorrected[0].loss_sum.item() - exact) > 0.01 * exact


def with_ratios(ratios: list[float], config: LossConfig):
    """The output and head gradient for tokens of these ratios, and those of each by itself."""
    case = Case()
    case.mask = torch.zeros(7, dtype=torch.bool)
    case.mask[: len(ratios)] = True
    log_p = case.log_p().detach()
    labels = case.batch.labels_T[case.mask]
    sampler = torch.zeros(7)
    exact = log_p.gather(1, labels[:, None])[:, 0] - torch.tensor(ratios).log()
    sampler = sampler.double()
    sampler[case.mask] = exact
    batch = make_batch(case.batch.labels_T, case.mask, sampler, torch.ones(7))
    signal = TokenSignal(torch.linspace(-3, -1, len(ratios)).double())
    out = Objective(config, V, 1.0, None)(case.hidden, case.head, batch, signal)
    return out, case.gradients(out.loss_sum)[0][case.mask]


def test_truncated_and_icepop_on_known_ratios():
    ratios = [0.3, 0.999, 1.0, 2.001, 6.0]
    plain, rows = with_ratios(ratios, LossConfig(importance="none"))
    assert "loss/importance_clip_fraction" not in plain.sums
    for name, weights, num_clipped in (
        ("truncated", [0.3, 0.999, 1.0, 2.0, 2.0], 2),
        ("icepop", [0.0, 0.999, 1.0, 2.001, 0.0], 2),
    ):
        out, found = with_ratios(ratios, LossConfig(importance=name))
        assert out.sums["loss/importance_clip_fraction"].item() == num_clipped
        torch.testing.assert_close(found, rows * torch.tensor(weights)[:, None].double())


@pytest.mark.parametrize("kind", [HiddenSignal, TopKSignal])
def test_full_vocabulary_objectives_do_not_look_at_the_sampler(kind):
    case = Case()
    outs = [
        Objective(LossConfig(importance=name, backend="eager"), V, 1.0, None)(
            case.hidden, case.head, case.batch, case.signal(kind)
        )
        for name in ("none", *IMPORTANCE)
    ]
    assert len({out.loss_sum.item() for out in outs}) == 1
    assert all("loss/importance_clip_fraction" not in out.sums for out in outs)


def test_top_k_is_a_lower_bound_that_is_met_with_all_tokens():
    case = Case()
    objective = Objective(LossConfig(backend="eager"), V, 1.0, None)

    def divergence(k: int) -> float:
        top = case.log_q.topk(k, dim=1)
        out = objective(case.hidden, case.head, case.batch, TopKSignal(top.indices, top.values))
        mass = out.sums["teacher/top_k_mass"].item()
        assert mass == pytest.approx(top.values.exp().sum(1)[case.weights() != 0].sum().item())
        return out.sums["loss/divergence"].item()

    out = objective(case.hidden, case.head, case.batch, case.signal(HiddenSignal))
    full = out.sums["loss/divergence"].item()
    bounds = [divergence(k) for k in (1, 2, 4, 8, V)]
    assert bounds == sorted(bounds)
    assert bounds[-1] == pytest.approx(full, rel=1e-6)
    assert bounds[0] < 0.9 * full


@pytest.mark.parametrize("kind", KINDS)
def test_an_absent_candidate_is_as_if_it_had_not_been_asked_for(kind):
    generator = torch.Generator().manual_seed(1)
    z, u = (torch.randn(4, V, generator=generator).double() for _ in range(2))
    top = u.log_softmax(-1).topk(K, dim=1)
    outcomes = []
    for ids, logprobs in (
        (top.indices, top.values),
        (
            torch.cat([top.indices, torch.full((4, 1), -1)], 1),
            torch.cat([top.values, torch.full((4, 1), 0.0)], 1),
        ),
    ):
        leaf = z.clone().requires_grad_()
        out = topk_divergence(leaf, ids, logprobs, kind=kind, **SETTINGS)
        out.loss_T.sum().backward()
        outcomes.append((out.loss_T.detach(), out.teacher_entropy_T, leaf.grad))
    for one, other in zip(*outcomes, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", [TopKSignal, TokenSignal])
def test_a_temperature_that_servers_do_not_have_is_refused(kind):
    case = Case()
    objective = Objective(LossConfig(temperature=0.5), V, 1.0, None)
    with pytest.raises(ConfigError, match=r"loss\.temperature: 0\.5 with a teacher on servers"):
        objective(case.hidden, case.head, case.batch, case.signal(kind))


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_a_non_finite_head_is_not_hidden(kind):
    case = Case()
    with torch.no_grad():
        case.head[2, 0] = math.nan
    for importance in ("none", *IMPORTANCE):
        config = LossConfig(importance=importance, backend="eager")
        out = Objective(config, V, 1.0, None)(case.hidden, case.head, case.batch, case.signal(kind))
        assert not math.isfinite(out.loss_sum.item())


def test_the_tables_know_all_signals_and_names():
    assert set(OBJECTIVES) == set(YARDSTICKS) == set(typing.get_args(TeacherSignal))
    choices = typing.get_args(typing.get_type_hints(LossConfig)["importance"])
    assert choices == ("none", *IMPORTANCE)
    case = Case()
    for kind in OBJECTIVES:
        objective = Objective(LossConfig(backend="eager"), V, 1.0, None)
        out = objective(case.hidden, case.head, case.batch, case.signal(kind))
        assert set(out.sums) <= set(METRICS)
