"""A student and a teacher small enough that every expectation is a sum over all responses.

Responses are two tokens of a vocabulary of five. The student has two parameters for all six of its
distributions, so that it cannot be the teacher: what it converges to tells which divergence is
minimised.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from megaopd.batch import HiddenSignal, Prompt, Sample, TokenScores
from megaopd.config import Config, CreditConfig, LossConfig
from megaopd.credit import CreditAssignment
from megaopd.data.packing import pack, with_credit
from megaopd.losses.objective import Objective

V, H = 5, 2
RESPONSES = list(itertools.product(range(V), repeat=2))
_generator = torch.Generator().manual_seed(8)
HEAD = torch.randn(V, H, generator=_generator).double()
# What a prefix (none, or the first token) makes of the parameters.
MIXERS = torch.eye(H).double() + 0.5 * torch.randn(V + 1, H, H, generator=_generator).double()
# Peaked, with most of its mass on tokens that the student has to trade off.
LOG_Q = (2.0 * torch.randn(V + 1, V, generator=_generator).double()).log_softmax(-1)


class Identity:
    def shard(self) -> Tensor:
        return torch.eye(V).double()


def log_p(theta: Tensor) -> Tensor:
    """[V + 1, V]: row 0 of the first token, row 1 + y of the one that follows y."""
    return (MIXERS @ theta @ HEAD.T).log_softmax(-1)


def path_logprobs(table: Tensor) -> Tensor:
    """[25, 2] log-probs of the tokens of all responses."""
    first, second = (torch.tensor(x) for x in zip(*RESPONSES, strict=True))
    return torch.stack([table[0, first], table[1 + first, second]], dim=1)


PREFIXES = torch.tensor([[0, 1 + first] for first, _ in RESPONSES])


def gradient(theta: Tensor, loss: LossConfig, credit: CreditConfig | None = None) -> Tensor:
    """The expected gradient of the loss over all responses, by the package."""
    theta = theta.detach().requires_grad_()
    own = path_logprobs(log_p(theta)).detach()
    samples = [
        Sample(Prompt(f"{i}", (0,)), 0, response, tuple(own[i].tolist()), (True,) * 2, "stop", 0)
        for i, response in enumerate(RESPONSES)
    ]
    batch = pack(samples)
    probability = own.sum(1).exp()
    at = batch.loss_mask_T
    weights, sampler = torch.zeros(2, len(at)).double()
    weights[at], sampler[at] = probability.repeat_interleave(2), own.flatten()
    batch = replace(batch, token_weights_T=weights, rollout_logprobs_T=sampler)
    hidden_TH = torch.zeros(len(at), H).double().index_put((at,), _hidden(theta))
    signal = HiddenSignal(LOG_Q[PREFIXES].flatten(0, 1), Identity())
    objective = Objective(replace(loss, backend="eager"), V, 1.0, None)
    if credit is not None:
        config = Config(loss=loss, credit=credit)
        scores = TokenScores(*objective.scores(hidden_TH, HEAD, batch, signal))
        worth = CreditAssignment(config, lambda samples: [])(samples, scores)
        (batch,) = with_credit([batch], None, worth.advantages_R)
    out = objective(hidden_TH, HEAD, batch, signal)
    return torch.autograd.grad(out.loss_sum, theta)[0]


def _hidden(theta: Tensor) -> Tensor:
    return (MIXERS @ theta)[PREFIXES].flatten(0, 1)


def exact_gradient(theta: Tensor, kind: str) -> Tensor:
    """Of the expected divergence at the prefixes that the student reaches, whose distribution is
    held fixed, or of the KL between whole responses, by autograd over all of them."""
    theta = theta.detach().requires_grad_()
    table = log_p(theta)
    if kind == "sequence":
        ours, theirs = (path_logprobs(x).sum(1) for x in (table, LOG_Q))
        value = (ours.exp() * (ours - theirs)).sum()
    else:
        p, q = (table, LOG_Q) if kind == "reverse" else (LOG_Q, table)
        divergences = (p.exp() * (p - q)).sum(-1)
        visits = torch.cat([torch.ones(1).double(), table[0].detach().exp()])
        value = (visits * divergences).sum()
    return torch.autograd.grad(value, theta)[0]


def optimum(slope) -> Tensor:
    theta = torch.zeros(H).double()
    for _ in range(100):
        step = slope(theta)
        if float(step.norm()) < 1e-5:
            return theta
        theta = theta - 0.6 * step
    pytest.fail("has not converged")


PG = LossConfig(objective="policy_gradient")
CASES = {
    "full reverse KL": ("reverse", LossConfig(), None),
    "policy gradient": ("reverse", PG, CreditConfig()),
    "policy gradient, entropy baseline": ("reverse", PG, CreditConfig(baseline="entropy")),
    "policy gradient, divergence baseline": ("reverse", PG, CreditConfig(baseline="divergence")),
    "k2 as a loss": ("reverse", LossConfig(objective="estimator"), None),
    "full forward KL": ("forward", LossConfig(kind="forward_kl"), None),
    "k3 as a loss": ("forward", LossConfig(objective="estimator", estimator="k3"), None),
    "policy gradient, discount 1": ("sequence", PG, CreditConfig(discount=1.0)),
}


@pytest.fixture(scope="module")
def optima() -> dict[str, Tensor]:
    return {
        kind: optimum(lambda theta, kind=kind: exact_gradient(theta, kind))
        for kind in ("reverse", "forward", "sequence")
    }


def test_the_optima_are_different_ones(optima):
    for one, other in itertools.combinations(optima.values(), 2):
        assert float((one - other).norm()) > 0.05


@pytest.mark.parametrize("name", CASES)
def test_expected_gradients_are_exact(name):
    kind, loss, credit = CASES[name]
    for seed in range(3):
        theta = torch.randn(H, generator=torch.Generator().manual_seed(seed)).double()
        found, wanted = gradient(theta, loss, credit), exact_gradient(theta, kind)
        # Scores and advantages travel in fp32.
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", CASES)
def test_what_it_converges_to(name, optima):
    kind, loss, credit = CASES[name]
    found = optimum(lambda theta: gradient(theta, loss, credit))
    torch.testing.assert_close(found, optima[kind], rtol=0, atol=2e-3)
