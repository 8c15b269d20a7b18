"""The inlined functions against fp64 over their whole ranges."""

from __future__ import annotations

import math

import pytest
import torch

from megaopd.losses import fast_math, row_kernels

NEGATIVE = -torch.cat([torch.linspace(0, 87.3, 200_001), torch.logspace(-8, 1.9, 20_001)])
UNIT = -torch.cat([torch.linspace(0, 0.999, 100_001), torch.logspace(-9, -1, 20_001)])


@pytest.mark.parametrize(
    ("fast", "exact", "x", "bound"),
    [
        (fast_math.exp_polynomial, torch.exp, NEGATIVE, 2e-7),
        (fast_math.exp_polynomial, torch.exp, -NEGATIVE, 2e-7),
        (fast_math.expm1_polynomial, torch.expm1, NEGATIVE, 3e-7),
        (fast_math.log1p_polynomial, torch.log1p, UNIT, 3e-7),
    ],
)
def test_relative_error(fast, exact, x, bound):
    x = x[x != 0]
    expected = exact(x.double())
    assert ((fast(x).double() - expected) / expected).abs().max() < bound


def test_ends_of_the_ranges():
    floor = row_kernels.LOGIT_FLOOR
    low = torch.tensor([-88.0, -104.0, floor, 100 * floor])
    assert not fast_math.exp_polynomial(low).any()
    assert (fast_math.expm1_polynomial(low) == -1).all()
    zero, nan = torch.zeros(1), torch.full((1,), math.nan)
    assert fast_math.exp_polynomial(zero).item() == 1
    assert fast_math.expm1_polynomial(zero).item() == 0
    assert fast_math.log1p_polynomial(zero).item() == 0
    for fast in ("exp_polynomial", "expm1_polynomial", "log1p_polynomial"):
        assert getattr(fast_math, fast)(nan).isnan()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_row_maxima(dtype):
    x = torch.randn(5, 33).to(dtype)
    x[1] = -x[1].abs() - 1  # integers compare the other way round here
    x[2, 3], x[3] = math.inf, -math.inf
    x[4, 1:] = -math.inf
    expected = x.float().amax(dim=1).clamp(min=row_kernels.LOGIT_FLOOR)
    assert torch.equal(row_kernels.row_maximum(x), expected)
