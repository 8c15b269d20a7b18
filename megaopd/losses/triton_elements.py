"""The elementwise functions of `divergences` for Triton, chosen by a code; tested against the
table.

p, q and d = log p - log q are fp32 blocks or scalars; see `divergences` for what value and pull
mean and for the series near d = 0.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _exp_remainder(y):
    """expm1(-y) + y for |y| <= 0.25."""
    s = y * (-1 / 5040) + 1 / 720
    s = s * y - 1 / 120
    s = s * y + 1 / 24
    s = s * y - 1 / 6
    s = s * y + 1 / 2
    return s * (y * y)


@triton.jit
def _atanh_tail(s):
    """atanh(s) - s for |s| <= 1/7."""
    s2 = s * s
    t = s2 * (1 / 9) + 1 / 7
    t = t * s2 + 1 / 5
    t = t * s2 + 1 / 3
    return t * s2 * s


@triton.jit
def log1p(x):
    """log(1 + x) for x > -1."""
    s = tl.where(tl.abs(x) < 0.25, x / (x + 2), 0.0)
    return tl.where(tl.abs(x) < 0.25, 2 * (s + _atanh_tail(s)), tl.log(1 + x))


@triton.jit
def _psi(x):
    """(1 + x) log(1 + x) - x for x in [-0.222, 0]."""
    s = x / (x + 2)
    return 2 * (s * s + (1 + s) * _atanh_tail(s)) / (1 - s)


@triton.jit
def _chi(x):
    """x - log(1 + x) for x in [-0.222, 0]."""
    s = x / (x + 2)
    return 2 * (s * s / (1 - s) - _atanh_tail(s))


@triton.jit
def _smaller_excess(d):
    """expm1(-|d|)."""
    y = tl.abs(d)
    near = y < 0.25
    return tl.where(near, _exp_remainder(tl.where(near, y, 0.0)) - y, tl.exp(-y) - 1)


@triton.jit
def _reverse_value(p, q, d):
    near = tl.abs(d) < 0.25
    return tl.where(near, p * _exp_remainder(tl.where(near, d, 0.0)), q - p + p * d)


@triton.jit
def _jsd_value(p, q, d, beta):
    ahead = d >= 0
    larger, b = tl.where(ahead, p, q), tl.where(ahead, beta, 1 - beta)
    e, y = _smaller_excess(d), tl.abs(d)
    near = y < 0.25
    small = tl.where(near, e, 0.0)
    far = -b * (1 + e) * y - (1 + b * e) * log1p(b * e)
    return larger * tl.where(near, b * _psi(small) - _psi(b * small), far)


@triton.jit
def _skew_value(p, q, d, alpha):
    """The skewed forward KL; the reverse one is this with p and q exchanged."""
    ahead = d >= 0
    larger, b = tl.where(ahead, p, q), tl.where(ahead, alpha, 1 - alpha)
    e, y = _smaller_excess(d), tl.abs(d)
    near = y < 0.25
    small = tl.where(near, e, 0.0)
    x, log_m = b * e, log1p(b * e)
    close = tl.where(
        ahead, _psi(small) - _psi(b * small) - (1 - alpha) * small * log_m, _chi(b * small)
    )
    far = tl.where(ahead, (1 + e) * (-y - log_m) - (1 - alpha) * e, x - log_m)
    return larger * tl.where(near, close, far)


@triton.jit
def _alpha_mean(p, q, d, alpha):
    ahead = d >= 0
    rate = tl.where(ahead, 1 - alpha, alpha)
    return tl.where(ahead, p, q) * tl.exp(-rate * tl.abs(d))


@triton.jit
def _alpha_value(p, q, d, alpha):
    near = tl.abs(d) * tl.maximum(1.0, tl.abs(1 - alpha)) < 0.25
    y = tl.where(near, d, 0.0)
    close = p * (_exp_remainder((1 - alpha) * y) - (1 - alpha) * _exp_remainder(y))
    far = _alpha_mean(p, q, d, alpha) - alpha * p - (1 - alpha) * q
    return tl.where(near, close, far) / (alpha * (alpha - 1))


@triton.jit
def value(p, q, d, CODE: tl.constexpr, X):
    """The summand of the term CODE with parameter X."""
    if CODE == 0:
        return _reverse_value(p, q, d)
    elif CODE == 1:
        return _reverse_value(q, p, -d)
    elif CODE == 2:
        return _jsd_value(p, q, d, X)
    elif CODE == 3:
        return _skew_value(p, q, d, X)
    elif CODE == 4:
        return _skew_value(q, p, -d, X)
    elif CODE == 5:
        return _alpha_value(p, q, d, X)
    else:
        return -0.5 * tl.where(d >= 0, p, q) * _smaller_excess(d)


@triton.jit
def _forward_pull(p, q, d):
    near = tl.abs(d) < 0.25
    y = tl.where(near, d, 0.0)
    return tl.where(near, p * (y - _exp_remainder(y)), p - q)


@triton.jit
def pull(p, q, d, CODE: tl.constexpr, X):
    """p * phi of the term CODE with parameter X."""
    if CODE == 0:
        return p * d
    elif CODE == 1:
        return _forward_pull(p, q, d)
    elif CODE == 2:
        b = tl.where(d >= 0, X, 1 - X)
        return (X - 1) * p * (log1p(b * _smaller_excess(d)) + tl.maximum(-d, 0.0))
    elif CODE == 3:
        e, b = _smaller_excess(d), tl.where(d >= 0, X, 1 - X)
        return (1 - X) * (1 - X) * p * tl.where(d >= 0, -e, e) / (1 + b * e)
    elif CODE == 4:
        e, b = _smaller_excess(d), tl.where(d >= 0, 1 - X, X)
        excess = (1 - X) * tl.where(d >= 0, -e, e) / (1 + b * e)
        return p * (-tl.maximum(-d, 0.0) - log1p(b * e) - X * excess)
    elif CODE == 5:
        y = (1 - X) * d
        near = tl.abs(y) < 0.25
        y = tl.where(near, y, 0.0)
        return tl.where(near, p * (_exp_remainder(y) - y), _alpha_mean(p, q, d, X) - p) / (X - 1)
    else:
        return 0.5 * p * tl.where(d > 0, 1.0, tl.where(d < 0, -1.0, 0.0))


@triton.jit
def block_log_ratio(sum_z, sum_u, e_z, e_u, d):
    """log(sum_z / sum_u) from d = log e_z - log e_u: corrected by what sum (q - p) comes to."""
    rough = tl.log(sum_z / sum_u)
    drift = -tl.sum(_forward_pull(e_z / sum_z, e_u / sum_u, d - rough), axis=0)
    return rough - log1p(drift)
