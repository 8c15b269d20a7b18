"""Credit: what a sample and each of its tokens are worth in a step, weights and advantages.

Computed after the teacher's word and before the student's step, over the global batch, from data
that every rank holds alike: so neither micro-batches nor layouts can change it. Needs torch alone.
"""

from megaopd.credit.advantages import ADVANTAGES
from megaopd.credit.assignment import CreditAssignment, Worth
from megaopd.credit.pass_rates import PassRates
from megaopd.credit.responses import Responses
from megaopd.credit.weights import AGGREGATIONS, WEIGHTS

__all__ = [
    "ADVANTAGES",
    "AGGREGATIONS",
    "WEIGHTS",
    "CreditAssignment",
    "PassRates",
    "Responses",
    "Worth",
]
