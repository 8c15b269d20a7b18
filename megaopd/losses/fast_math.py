"""exp, expm1 and log1p that a compiler can inline and vectorise.

torch.compile's C++ calls these functions out of line for every vector and spills every register
around the call: most of the time of a kernel. Written as polynomials in tensor operations they stay
in registers. Only fp32 under torch.compile on a CPU takes them; everything else takes torch's own,
which is faster in eager mode and, in fp64, more exact. Method: Cody and Waite, "Software Manual for
the Elementary Functions", 1980; the coefficients are minimax fits.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LOG2_E = 1.4426950408889634
# log 2 in two parts; n * _LN2_HIGH is exact for every exponent n.
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4
_LN2 = _LN2_HIGH + _LN2_LOW
# (expm1(r) - r) / r^2 for |r| <= log(2) / 2, highest power first; expm1 to 3e-9 relative to exp.
_EXPM1_TAIL = (
    0.0013814535923302174,
    0.00836874544620514,
    0.04166839271783829,
    0.1666652113199234,
    0.4999999403953552,
)
# The exponent field of a float starts at this bit; 127 in it is 2^0.
_EXPONENT, _BIAS = 2.0**23, 127
# Bits of sqrt(1/2): from here to twice it log1p needs no scaling.
_SQRT_HALF_BITS = 0x3F3504F3


def _inlined(x: Tensor) -> bool:
    on_cpu = x.device.type == "cpu" and x.dtype == torch.float32
    return on_cpu and torch.compiler.is_compiling()


def exp(x: Tensor) -> Tensor:
    """exp(x) for x <= 88."""
    return exp_polynomial(x) if _inlined(x) else torch.exp(x)


def expm1(x: Tensor) -> Tensor:
    """exp(x) - 1 for x <= 88, -inf excluded."""
    return expm1_polynomial(x) if _inlined(x) else torch.expm1(x)


def log1p(x: Tensor) -> Tensor:
    """log(1 + x) for -1 < x <= 0."""
    return log1p_polynomial(x) if _inlined(x) else torch.log1p(x)


def _split(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """2^n, r and (expm1(r) - r) / r with exp(x) = 2^n exp(r); 2^n is 0 below the smallest
    normal number."""
    n = torch.round(x * _LOG2_E)
    r = x - n * _LN2_HIGH
    r = r - n * _LN2_LOW
    tail = r * _EXPM1_TAIL[0] + _EXPM1_TAIL[1]
    for coefficient in _EXPM1_TAIL[2:]:
        tail = tail * r + coefficient
    # The exponent's bits made in floating point, where a clamp at 0 costs one instruction.
    bits = torch.relu(n * _EXPONENT + _BIAS * _EXPONENT).to(torch.int32)
    return bits.view(torch.float32), r, tail * r


def exp_polynomial(x: Tensor) -> Tensor:
    """exp of finite fp32 x <= 88 to 2e-7 relative; exactly 0 below -87.7, NaN stays NaN."""
    power, r, tail = _split(x)
    return ((tail + 1) * r + 1) * power


def expm1_polynomial(x: Tensor) -> Tensor:
    """expm1 of finite fp32 x <= 88 to 3e-7 relative; NaN stays NaN."""
    power, r, tail = _split(x)
    return (tail * r + r) * power + (power - 1)


def log1p_polynomial(x: Tensor) -> Tensor:
    """log1p of fp32 x in (-1, 0] to 3e-7 relative; NaN stays NaN."""
    n = ((1 + x).view(torch.int32) - _SQRT_HALF_BITS) >> 23
    scale = ((_BIAS - n) << 23).view(torch.float32)
    f = x * scale + (scale - 1)  # (1 + x) / 2^n - 1, without the rounding of 1 + x where n = 0
    s = f / (f + 2)
    s2 = s * s
    tail = s2 * (2 / 9) + 2 / 7
    for coefficient in (2 / 5, 2 / 3):
        tail = tail * s2 + coefficient
    return n.to(torch.float32) * _LN2 + (tail * s2 * s + 2 * s)
