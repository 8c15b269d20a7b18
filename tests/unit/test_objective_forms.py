"""Every form of the loss against autograd in fp64: policy gradient, estimators, likelihood, the
entropy bonus, and what is measured for advantages."""

from __future__ import annotations

import typing
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megaopd.batch import HiddenSignal, TokenScores, TokenSignal, TopKSignal
from megaopd.config import LossConfig
from megaopd.errors import ConfigError
from megaopd.losses import DIVERGENCES, backends, divergence
from megaopd.losses.objective import FORMS, METRICS, OBJECTIVES, Objective
from megaopd.losses.sampled_tokens import ESTIMATORS
from megaopd.losses.scores import NUM_SCORES
from tests.unit.losses.reference import from_logprobs
from tests.unit.test_objective_signals import SAMPLER_TEMPERATURE, Case, V, bucketed

ADVANTAGES = torch.tensor([0.0, 1.5, -2.0, 0.0, -0.7, 0.4, 0.0])
COMPILES = pytest.mark.skipif(not backends.can_compile(), reason="torch.compile does not work here")
BONUS = 0.3
Q3 = LossConfig(selection="q3", selection_ratio=0.5)


def make_case(seed: int = 0) -> Case:
    """With advantages, and sampler's log-probs on both sides of the clipping bounds."""
    case = Case(seed)
    log_p = (case.hidden @ case.head[:V].T).log_softmax(-1).detach()
    own = log_p.gather(1, case.batch.labels_T[:, None])[:, 0]
    shift = torch.tensor([0.0, -0.5, 0.5, 0.0, 0.4, -0.1, 0.1])
    sampler = torch.where(case.mask, own + shift, 0.0)
    case.batch = replace(case.batch, rollout_logprobs_T=sampler, advantages_T=ADVANTAGES)
    return case


def complete_signal(case: Case, kind: type):
    """Of top-k all tokens, so that the sampled one is among them."""
    if kind is TopKSignal:
        top = case.log_q.topk(V, dim=1)
        return TopKSignal(top.indices, top.values)
    return case.signal(kind)


def label_logprobs(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """log p(y), log q(y) and the sampler's log-prob of the loss tokens."""
    labels = case.batch.labels_T[case.mask][:, None]
    log_p, log_q = (x.gather(1, labels)[:, 0] for x in (case.log_p(), case.log_q))
    return log_p, log_q, case.batch.rollout_logprobs_T[case.mask]


def reference(case: Case, config: LossConfig, signal: object) -> Tensor:
    """A scalar with the loss's value and, by autograd, its gradient."""
    log_p, log_q, sampler = label_logprobs(case)
    ratio = (log_p - sampler).exp()
    if config.objective == "policy_gradient":
        a = ADVANTAGES[case.mask]
        bounded = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
        value = -torch.minimum(ratio * a, bounded * a)
    elif config.objective == "estimator":
        d = log_p - log_q
        value = {"k2": d**2 / 2, "k3": (-d).exp() - 1 + d}[config.estimator]
        value = value * ratio.detach().clamp(max=config.importance_cap)
    elif config.objective == "likelihood":
        value = -log_p
    elif isinstance(signal, TokenSignal):
        counts = ratio.detach().clamp(max=config.importance_cap)
        d = (log_p - log_q).detach()
        # The value is an estimate, its gradient another one: joined straight through.
        value = counts * (d * (log_p - log_p.detach()) + (-d).exp() - 1 + d)
    else:
        p, q = case.log_p(), case.log_q
        if isinstance(signal, TopKSignal):
            ids = signal.ids_LK.long()
            p, q = bucketed(p, ids), bucketed(q, ids)
        value = from_logprobs(config.kind, p, q, config.beta, config.alpha)
    entropy = -(case.log_p().exp() * case.log_p()).sum(-1)
    return (case.weights() * (value - config.entropy_coef * entropy)).sum()


CONFIGS = {
    "policy_gradient": {"objective": "policy_gradient"},
    "policy_gradient_wide": {"objective": "policy_gradient", "clip_low": 0.9, "clip_high": 9.0},
    "k2": {"objective": "estimator"},
    "k3": {"objective": "estimator", "estimator": "k3"},
    "likelihood": {"objective": "likelihood"},
    "divergence": {},
}


@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.parametrize("bonus", [0.0, BONUS])
@pytest.mark.parametrize("kind", OBJECTIVES)
@pytest.mark.parametrize("name", CONFIGS)
def test_values_and_gradients_are_those_of_autograd(name, kind, bonus, chunk):
    config = LossConfig(
        backend="eager", entropy_coef=bonus, chunk_tokens=chunk, importance_cap=1.2, **CONFIGS[name]
    )
    case = make_case()
    partial = name == "divergence" and kind is TopKSignal
    signal = case.signal(kind) if partial else complete_signal(case, kind)
    out = Objective(config, V, 1.0, None)(case.hidden, case.head, case.batch, signal)
    expected = reference(case, config, signal)
    assert out.loss_sum.item() == pytest.approx(expected.item(), rel=1e-6)
    for found, wanted in zip(case.gradients(out.loss_sum), case.gradients(expected), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)
    assert set(out.sums) <= set(METRICS)
    assert ("loss/entropy" in out.sums) == bool(bonus)


@pytest.mark.parametrize("form", [{}, {"fused": False}, {"temperature": 0.7}])
@pytest.mark.parametrize("divergence_kind", DIVERGENCES)
def test_entropy_bonus_of_every_divergence(divergence_kind, form):
    config = LossConfig(
        kind=divergence_kind, backend="eager", entropy_coef=BONUS, beta=0.3, alpha=0.2, **form
    )
    case = make_case()
    signal = case.signal(HiddenSignal)
    out = Objective(config, V, 1.0, None)(case.hidden, case.head, case.batch, signal)
    z, u = case.hidden[case.mask] @ case.head[:V].T, case.log_q
    log_p, log_q = ((x / config.temperature).log_softmax(-1) for x in (z, u))
    value = from_logprobs(divergence_kind, log_p, log_q, 0.3, 0.2)
    entropy = -(log_p.exp() * log_p).sum(-1)
    expected = (case.weights() * (value - BONUS * entropy)).sum()
    assert out.loss_sum.item() == pytest.approx(expected.item(), rel=1e-6)
    for found, wanted in zip(case.gradients(out.loss_sum), case.gradients(expected), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)
    scored = case.weights() != 0
    # Metrics are the terms of the loss: the divergence without the bonus, the bonus by itself.
    assert out.sums["loss/divergence"].item() == pytest.approx(value[scored].sum().item(), rel=1e-6)
    assert out.sums["loss/entropy"].item() == pytest.approx(-BONUS * entropy[scored].sum().item())


@pytest.mark.parametrize(
    ("backend", "dtype", "tolerance"),
    [
        ("eager", torch.float32, 1e-5),
        ("eager", torch.bfloat16, 2e-2),
        pytest.param("compiled", torch.float32, 1e-5, marks=[pytest.mark.slow, COMPILES]),
    ],
)
def test_a_schedule_moves_coefficients_without_new_kernels(backend, dtype, tolerance):
    generator = torch.Generator().manual_seed(3)
    z, u = (torch.randn(5, 40, generator=generator) * 2 for _ in range(2))
    num_kernels = []
    for beta, bonus in ((0.5, BONUS), (0.8, BONUS / 4)):
        options = {"kind": "mixed", "beta": beta, "backend": backend, "entropy_coef": bonus}
        leaf = z.to(dtype).requires_grad_()
        out = divergence(leaf, u.to(dtype), **options)
        (found,) = torch.autograd.grad(out.loss_T.sum(), leaf)
        exact = z.to(dtype).double().requires_grad_()
        log_p = exact.log_softmax(-1)
        log_q = u.to(dtype).double().log_softmax(-1)
        value = from_logprobs("mixed", log_p, log_q, beta, 0.1)
        loss = (value + bonus * (log_p.exp() * log_p).sum(-1)).sum()
        (wanted,) = torch.autograd.grad(loss, exact)
        assert out.loss_T.sum().item() == pytest.approx(loss.item(), rel=1e-4)
        assert float((found.double() - wanted).norm() / wanted.norm()) < tolerance
        num_kernels.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert num_kernels[0] == num_kernels[1]


def test_the_policy_gradient_stops_at_its_bounds():
    """Ratios e^0.5, e^-0.5, e^-0.4, e^0.1, e^-0.1 with advantages 1.5, -2, -0.7, 0.4, 0: the first
    three are past 1.2 or 0.8 in the direction in which their advantage pushes."""
    case = make_case()
    case.batch = replace(case.batch, token_weights_T=torch.ones(7))
    config = LossConfig(objective="policy_gradient")
    objective = Objective(config, V, 1.0, None)
    out = objective(case.hidden, case.head, case.batch, case.signal(HiddenSignal))
    assert out.sums["loss/clip_fraction"].item() == 3
    hidden_gradient = case.gradients(out.loss_sum)[0][case.mask]
    assert hidden_gradient.norm(dim=1).gt(1e-3).tolist() == [False, False, False, True, False]


def test_what_the_forms_refuse():
    case = make_case()
    foreign = replace(case.batch, sampled_T=case.mask & (torch.arange(7) != 4))
    bare = replace(case.batch, advantages_T=None)
    for config, batch, signal, message in (
        (LossConfig(objective="policy_gradient"), bare, HiddenSignal, "without advantages"),
        (LossConfig(objective="policy_gradient"), foreign, HiddenSignal, "1 tokens that the stu"),
        (LossConfig(objective="estimator"), foreign, HiddenSignal, "1 tokens that the student di"),
        (LossConfig(), foreign, TokenSignal, "1 tokens that the student did not sample"),
        (LossConfig(objective="estimator"), case.batch, TopKSignal, "not among the teacher's 3"),
        (LossConfig(objective="estimator", temperature=0.5), case.batch, TokenSignal, "0.5 with"),
        (Q3, case.batch, TokenSignal, "which is no divergence"),
    ):
        objective = Objective(config, V, 1.0, None)
        with pytest.raises(ConfigError, match=message):
            objective(case.hidden, case.head, batch, case.signal(signal))


@pytest.mark.parametrize("form", ["likelihood", "divergence"])
def test_tokens_of_others_have_no_mismatch(form):
    case = make_case()
    case.batch = replace(case.batch, sampled_T=case.mask & (torch.arange(7) != 4))
    out = Objective(LossConfig(objective=form), V, 1.0, None)(
        case.hidden, case.head, case.batch, case.signal(HiddenSignal)
    )
    log_p, _, sampler = label_logprobs(case)
    d = (log_p - sampler).detach()
    # Loss tokens are 1, 2, 4, 5 and 6; 2 has weight 0 and 4 is another's.
    own = [i for i, token in enumerate((1, 2, 4, 5, 6)) if token not in (2, 4)]
    own = [i for i in own if case.weights()[i] != 0]
    expected = (torch.expm1(d) - d)[own]
    assert out.counts["rollout/mismatch_kl"].item() == len(own)
    assert out.sums["rollout/mismatch_kl"].item() == pytest.approx(expected.sum().item())
    assert out.mismatch_max.item() == pytest.approx(d[own].abs().max().item(), rel=1e-5)


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_scores(kind):
    case = make_case()
    signal = complete_signal(case, kind)
    objective = Objective(LossConfig(backend="eager"), V, SAMPLER_TEMPERATURE, None)
    found = TokenScores(*objective.scores(case.hidden, case.head, case.batch, signal))
    log_p, log_q, _ = label_logprobs(case)
    torch.testing.assert_close(found.student_logprobs_R, log_p.detach())
    torch.testing.assert_close(found.teacher_logprobs_R, log_q)
    p = case.log_p().detach()
    torch.testing.assert_close(found.student_entropy_R, -(p.exp() * p).sum(-1))
    if kind is HiddenSignal:
        q = case.log_q
        torch.testing.assert_close(found.teacher_entropy_R, -(q.exp() * q).sum(-1))
        torch.testing.assert_close(found.divergence_R, (p.exp() * (p - q)).sum(-1))
    else:
        assert found.teacher_entropy_R.isnan().all()
        assert found.divergence_R.isnan().all()


def test_tables_and_configuration_name_the_same():
    hints = typing.get_type_hints(LossConfig)
    assert typing.get_args(hints["objective"]) == tuple(FORMS)
    assert typing.get_args(hints["estimator"]) == tuple(ESTIMATORS)
    assert len(typing.get_type_hints(TokenScores)) == NUM_SCORES
