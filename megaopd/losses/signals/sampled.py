"""Divergence estimated from the sampled tokens alone.

With y ~ p and d = log p(y) - log q(y), every divergence of the table D = sum_j value_j has

    D = E_y[value(1, e^-d, d)]        and        grad D = E_y[phi(d) grad log p(y)],

for value and p phi = pull are homogeneous of degree 1 in (p, q), and E_y[grad log p(y)] = 0 makes
phi's constant irrelevant. So one token gives unbiased estimates of the divergence and of its
gradient. For the reverse KL they are the estimators k3 and, phi being d, k1 as an advantage (or k2
as a loss, which has the same gradient); see `estimators`.
"""

from __future__ import annotations

import torch

from megaopd.batch import TokenSignal
from megaopd.losses.divergences import parts_of
from megaopd.losses.importance import importance
from megaopd.losses.label_rows import LabelRows
from megaopd.losses.signals.labels import TokenLoss, label_terms
from megaopd.losses.signals.terms import LossRows, LossSettings, LossTerms

# A token that is e^80 times likelier for the teacher is never sampled; fp32 ends at e^88.
LEAST_D = -80.0


def sampled_objective(settings: LossSettings, rows: LossRows, signal: TokenSignal) -> LossTerms:
    """The sum's value is the estimate of the divergence, its gradient the estimate of the
    divergence's gradient: not the derivative of that value.

    Each token is weighted with what `importance` makes of p(y) over the sampler's probability of
    it, so that it speaks for the weights in training. The sampler's softmax must be whole.

    Raises:
        LossArgumentError: a temperature other than the servers', or tokens that the student did not
            sample.
    """
    c = settings.config
    settings.require_server_temperature()
    parts = parts_of(c.kind, c.beta, c.alpha)
    scored, kept = rows.scored()
    scored.require_sampled("a teacher that tells the sampled tokens alone (teacher.top_k 0)")
    teacher = signal.logprobs_L.to(rows.hidden_LH.device, non_blocking=True)[kept]

    def token_loss(found: LabelRows, chunk: slice) -> TokenLoss:
        d = (found.logprobs - teacher[chunk]).clamp(min=LEAST_D)
        one, q = torch.ones_like(d), torch.exp(-d)
        value, phi = torch.zeros_like(d), torch.zeros_like(d)
        for part in parts:
            value += part.weight * part.value(one, q, d)
            phi += part.weight * part.pull(one, q, d)
        counts, metrics = importance(found.logprobs - scored.sampler_logprobs_L[chunk], c)
        value = counts * value
        return TokenLoss(value, counts * phi, {"loss/divergence": value, **metrics})

    return label_terms(settings, scored, kept, len(rows.weights_L), token_loss)
