"""The Triton kernels of `triton_backend`: a row each, in blocks of columns.

What a row is left with is joined block by block as `shard_scalars` joins shards of the vocabulary.
"""

from __future__ import annotations

import triton
import triton.language as tl

from megaopd.losses.shard_scalars import NO_MASS as _NO_MASS
from megaopd.losses.triton_elements import block_log_ratio, log1p, pull, value

NO_MASS = tl.constexpr(_NO_MASS)


@triton.jit
def _load(pointer, offsets, mask, FLOOR: tl.constexpr):
    x = tl.load(pointer + offsets, mask=mask, other=0.0).to(tl.float32)
    # A NaN must stay one: the comparison keeps it, a maximum may not.
    return tl.where(x < FLOOR, FLOOR, x)


@triton.jit
def _exp(x):
    """fp64 scalar -> fp32."""
    return tl.exp(x.to(tl.float32))


@triton.jit
def _shares(log_mass, ratio, block_log_mass, block_ratio):
    """Joins two shards: their masses' logs and log-ratios log(mass z / mass u) -> those of both.

    Logs are fp64, for the digits of large logits; only what is left of them after a subtraction
    goes to fp32.

    Returns the joint ones, then of each shard log w, the student's share, and d = log w - log v,
    v the teacher's.
    """
    larger = tl.maximum(log_mass, block_log_mass)
    sizes = _exp(log_mass - larger) + _exp(block_log_mass - larger)
    joint = larger + tl.log(sizes)
    log_w, block_log_w = log_mass - joint, block_log_mass - joint
    ahead = log_mass >= block_log_mass
    # Seen from the larger shard the correction is small, and exact where the ratios are close.
    pivot = tl.where(ahead, ratio, block_ratio)
    difference = pivot - tl.where(ahead, block_ratio, ratio)
    other_w = _exp(tl.where(ahead, block_log_w, log_w))
    small = tl.minimum(difference, 20.0).to(tl.float32)
    near = tl.abs(small) < 0.25
    series = small * (1 + small * (0.5 + small * (1 / 6 + small * (1 / 24 + small / 120))))
    # Where this shard holds the larger part of the student's mass, x >= -1/2: log1p(x) is safe.
    close = pivot - log1p(other_w * tl.where(near, series, tl.exp(small) - 1))
    log_u, block_log_u = log_mass - ratio, block_log_mass - block_ratio
    larger_u = tl.maximum(log_u, block_log_u)
    sizes_u = _exp(log_u - larger_u) + _exp(block_log_u - larger_u)
    joint_ratio = tl.where(difference > 20.0, joint - (larger_u + tl.log(sizes_u)), close)
    return joint, joint_ratio, log_w, ratio - joint_ratio, block_log_w, block_ratio - joint_ratio


@triton.jit
def _chained(result, log_w, d, block_result, block_log_w, block_d, order, CODE: tl.constexpr, X):
    """The chain rule for one term."""
    within = _exp(log_w - (1 - order) * d) * result
    within += _exp(block_log_w - (1 - order) * block_d) * block_result
    between = value(_exp(log_w), _exp(log_w - d), d.to(tl.float32), CODE, X)
    between += value(
        _exp(block_log_w), _exp(block_log_w - block_d), block_d.to(tl.float32), CODE, X
    )
    return within + between


@triton.jit
def _join_entropy(entropy, log_share, block_entropy, block_log_share):
    mine = _exp(log_share) * (entropy - log_share.to(tl.float32))
    return mine + _exp(block_log_share) * (block_entropy - block_log_share.to(tl.float32))


@triton.jit
def forward_kernel(
    z_ptr,
    u_ptr,
    out_ptr,
    z_stride,
    u_stride,
    out_stride,
    num_columns,
    inv_tau,
    extra_inv_tau,
    order0,
    order1,
    X0,
    X1,
    W0,
    W1,
    CODE0: tl.constexpr,
    CODE1: tl.constexpr,
    EXTRA: tl.constexpr,
    FLOOR: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Scalars of one row -> out[0:10], fp64: max z, max u, log mass z less max z / tau,
    log(mass z / mass u) less (max z - max u) / tau, entropies of z and u, the two terms, log masses
    of z and u at the extra temperature less the maxima over it."""
    row = tl.program_id(0).to(tl.int64)
    z_row, u_row = z_ptr + row * z_stride, u_ptr + row * u_stride
    max_z, max_u = tl.full((), -1e30, tl.float32), tl.full((), -1e30, tl.float32)
    mass, ratio = tl.full((), NO_MASS, tl.float64), tl.full((), 0.0, tl.float64)
    entropy_z, entropy_u = tl.full((), 0.0, tl.float32), tl.full((), 0.0, tl.float32)
    result0, result1 = tl.full((), 0.0, tl.float32), tl.full((), 0.0, tl.float32)
    extra_z, extra_u = tl.full((), 0.0, tl.float32), tl.full((), 0.0, tl.float32)
    for start in range(0, num_columns, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        mask = offsets < num_columns
        z, u = _load(z_row, offsets, mask, FLOOR), _load(u_row, offsets, mask, FLOOR)
        top_z = tl.max(tl.where(mask, z, -1e30), axis=0)
        top_u = tl.max(tl.where(mask, u, -1e30), axis=0)
        centred_z, centred_u = tl.where(mask, z - top_z, 0.0), tl.where(mask, u - top_u, 0.0)
        e_z = tl.where(mask, tl.exp(centred_z * inv_tau), 0.0)
        e_u = tl.where(mask, tl.exp(centred_u * inv_tau), 0.0)
        sum_z, sum_u = tl.sum(e_z, axis=0), tl.sum(e_u, axis=0)
        gap = top_z - top_u
        wide = tl.abs(gap) > WIDE
        d = tl.where(wide, centred_z - centred_u, (z - u) - gap) * inv_tau
        log_ratio = block_log_ratio(sum_z, sum_u, e_z, e_u, tl.where(mask, d, 0.0))
        p, q, d = e_z / sum_z, e_u / sum_u, tl.where(mask, d - log_ratio, 0.0)
        exact_gap = tl.where(wide, top_z.to(tl.float64) - top_u.to(tl.float64), gap)
        block_mass = top_z.to(tl.float64) * inv_tau + tl.log(sum_z)
        block_ratio = exact_gap * inv_tau + log_ratio
        block_entropy_z = tl.log(sum_z) - tl.sum(p * centred_z * inv_tau, axis=0)
        block_entropy_u = tl.log(sum_u) - tl.sum(q * centred_u * inv_tau, axis=0)

        joint, joint_ratio, log_w, w_d, block_log_w, block_d = _shares(
            mass, ratio, block_mass, block_ratio
        )
        entropy_z = _join_entropy(entropy_z, log_w, block_entropy_z, block_log_w)
        entropy_u = _join_entropy(entropy_u, log_w - w_d, block_entropy_u, block_log_w - block_d)
        if CODE0 >= 0:
            block_result = tl.sum(value(p, q, d, CODE0, X0), axis=0)
            result0 = _chained(
                result0, log_w, w_d, block_result, block_log_w, block_d, order0, CODE0, X0
            )
        if CODE1 >= 0:
            block_result = tl.sum(value(p, q, d, CODE1, X1), axis=0)
            result1 = _chained(
                result1, log_w, w_d, block_result, block_log_w, block_d, order1, CODE1, X1
            )
        if EXTRA:
            new_z, new_u = tl.maximum(max_z, top_z), tl.maximum(max_u, top_u)
            more_z = tl.sum(tl.where(mask, tl.exp((z - new_z) * extra_inv_tau), 0.0), axis=0)
            more_u = tl.sum(tl.where(mask, tl.exp((u - new_u) * extra_inv_tau), 0.0), axis=0)
            extra_z = extra_z * tl.exp((max_z - new_z) * extra_inv_tau) + more_z
            extra_u = extra_u * tl.exp((max_u - new_u) * extra_inv_tau) + more_u
        max_z, max_u = tl.maximum(max_z, top_z), tl.maximum(max_u, top_u)
        mass, ratio = joint, joint_ratio
    out = out_ptr + row * out_stride
    tl.store(out, max_z)
    tl.store(out + 1, max_u)
    tl.store(out + 2, mass - max_z.to(tl.float64) * inv_tau)
    tl.store(out + 3, ratio - (max_z.to(tl.float64) - max_u.to(tl.float64)) * inv_tau)
    tl.store(out + 4, entropy_z)
    tl.store(out + 5, entropy_u)
    tl.store(out + 6, result0)
    tl.store(out + 7, result1)
    if EXTRA:
        tl.store(out + 8, tl.log(extra_z))
        tl.store(out + 9, tl.log(extra_u))


@triton.jit
def _probabilities(z, u, mask, rows, inv_tau, WIDE: tl.constexpr):
    """`row_kernels.probabilities` of a block; rows points at the row's scalars."""
    max_z, max_u = tl.load(rows), tl.load(rows + 1)
    scale_z, scale_u, log_ratio = tl.load(rows + 2), tl.load(rows + 3), tl.load(rows + 4)
    centred_z, centred_u, gap = z - max_z, u - max_u, max_z - max_u
    p = tl.where(mask, tl.exp(centred_z * inv_tau) * scale_z, 0.0)
    q = tl.where(mask, tl.exp(centred_u * inv_tau) * scale_u, 0.0)
    d = tl.where(tl.abs(gap) > WIDE, centred_z - centred_u, (z - u) - gap) * inv_tau - log_ratio
    return p, q, tl.where(mask, d, 0.0)


@triton.jit
def sums_kernel(
    z_ptr,
    u_ptr,
    rows_ptr,
    out_ptr,
    z_stride,
    u_stride,
    num_columns,
    inv_tau,
    X0,
    X1,
    W0,
    W1,
    CODE0: tl.constexpr,
    CODE1: tl.constexpr,
    FLOOR: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sums of value and pull of both terms of one row -> out[0:4]."""
    row = tl.program_id(0).to(tl.int64)
    rows = rows_ptr + row * 5
    value0, pull0 = tl.full((), 0.0, tl.float32), tl.full((), 0.0, tl.float32)
    value1, pull1 = tl.full((), 0.0, tl.float32), tl.full((), 0.0, tl.float32)
    for start in range(0, num_columns, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        mask = offsets < num_columns
        z = _load(z_ptr + row * z_stride, offsets, mask, FLOOR)
        u = _load(u_ptr + row * u_stride, offsets, mask, FLOOR)
        p, q, d = _probabilities(z, u, mask, rows, inv_tau, WIDE)
        value0 += tl.sum(value(p, q, d, CODE0, X0), axis=0)
        pull0 += tl.sum(pull(p, q, d, CODE0, X0), axis=0)
        if CODE1 >= 0:
            value1 += tl.sum(value(p, q, d, CODE1, X1), axis=0)
            pull1 += tl.sum(pull(p, q, d, CODE1, X1), axis=0)
    out = out_ptr + row * 4
    tl.store(out, value0)
    tl.store(out + 1, pull0)
    tl.store(out + 2, value1)
    tl.store(out + 3, pull1)


@triton.jit
def gradient_kernel(
    z_ptr,
    u_ptr,
    rows_ptr,
    out_ptr,
    z_stride,
    u_stride,
    out_stride,
    num_columns,
    inv_tau,
    entropy_coef,
    X0,
    X1,
    W0,
    W1,
    CODE0: tl.constexpr,
    CODE1: tl.constexpr,
    FLOOR: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`row_kernels.write_gradient` for one block of one row; out may be z."""
    row = tl.program_id(0).to(tl.int64)
    rows = rows_ptr + row * 7
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < num_columns
    z = _load(z_ptr + row * z_stride, offsets, mask, FLOOR)
    u = _load(u_ptr + row * u_stride, offsets, mask, FLOOR)
    p, q, d = _probabilities(z, u, mask, rows, inv_tau, WIDE)
    entropy = entropy_coef * (z - tl.load(rows)) * inv_tau
    total = W0 * pull(p, q, d, CODE0, X0) + p * (entropy - tl.load(rows + 5))
    if CODE1 >= 0:
        total += W1 * pull(p, q, d, CODE1, X1)
    total *= tl.load(rows + 6)
    tl.store(out_ptr + row * out_stride + offsets, total.to(out_ptr.dtype.element_ty), mask=mask)
