"""`sampled_divergence`: the Monte Carlo estimators k1, k2, k3 of KL(p || q) from one sampled token.

With y ~ p, delta = log p(y) - log q(y), r = q(y) / p(y) = exp(-delta):

| | value | as a loss: gradient, y fixed | its expectation |
|-|-|-|-|
| k1 = delta | unbiased | grad log p(y) | 0: no teacher in it |
| k2 = delta^2 / 2 | biased | delta grad log p(y) | grad KL(p || q) |
| k3 = r - 1 + delta | unbiased, >= 0 | (1 - r) grad log p(y) | grad KL(q || p) |
| k1 as an advantage | - | delta grad log p(y) | grad KL(p || q) |

The names are those of http://joschu.net/blog/kl-approx.html. All of it supposes that y was drawn
from the p whose log-probability is given.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megaopd.losses.validation import require


def sampled_divergence(
    student_logprobs_T: Tensor,
    teacher_logprobs_T: Tensor,
    *,
    estimator: str = "k1",
    use: str = "advantage",
) -> Tensor:
    """A per-token loss or advantage from the log-probs of the sampled tokens.

    Args:
        student_logprobs_T: [T] log p(y_t); differentiable for a loss.
        teacher_logprobs_T: [T] log q(y_t); no gradient.
        estimator: "k1", "k2" or "k3".
        use: "loss": differentiable, to be minimised. k2's expected gradient is that of the reverse
            KL(p || q); k3's is that of the FORWARD KL(q || p), though its value estimates the
            reverse one. "advantage": detached and negated, to be multiplied with log p(y_t) in a
            policy gradient that is maximised. k1's expected gradient is then that of the reverse
            KL; those of k2 and k3 belong to no divergence (k3: the reverse KL's minus the forward
            KL's).

    Returns:
        [T] fp32.

    Raises:
        LossArgumentError: an unknown name, or k1 as a loss.
    """
    require(
        estimator in ("k1", "k2", "k3"), "loss.estimator", f"{estimator!r}", "choose k1, k2 or k3"
    )
    require(use in ("loss", "advantage"), "loss.use", f"{use!r}", "choose loss or advantage")
    require(
        (estimator, use) != ("k1", "loss"),
        "loss.estimator",
        "k1 as a loss: its gradient, grad log p(y), has expectation 0 and no teacher in it",
        "use k1 as an advantage, or k2 as a loss; both have the gradient of KL(p || q)",
    )
    student = student_logprobs_T if use == "loss" else student_logprobs_T.detach()
    delta = student.float() - teacher_logprobs_T.detach().float()
    if estimator == "k1":
        value = delta
    elif estimator == "k2":
        value = 0.5 * delta * delta
    else:
        value = torch.expm1(-delta) + delta
    return value if use == "loss" else -value
