"""Divergences between student and teacher: exact over a vocabulary sharded over tensor parallelism.

Needs torch alone. `DIVERGENCES` is the table; a new entry is used by every function here and by the
tests.
"""

from megaopd.losses.dense import divergence
from megaopd.losses.divergences import DIVERGENCES, Divergence
from megaopd.losses.estimators import sampled_divergence
from megaopd.losses.fused import linear_divergence
from megaopd.losses.output import DivergenceOutput
from megaopd.losses.topk import topk_divergence
from megaopd.losses.validation import LossArgumentError

__all__ = [
    "DIVERGENCES",
    "Divergence",
    "DivergenceOutput",
    "LossArgumentError",
    "divergence",
    "linear_divergence",
    "sampled_divergence",
    "topk_divergence",
]
