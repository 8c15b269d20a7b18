"""The passes over logits as Triton kernels: one read forward, one read and one write backward.

Terms with a chain rule are finished in one read: a block of columns is reduced under its own
softmaxes while it is in registers, and the row's running scalars are joined with the block's by
the chain rule of `shard_scalars`. Other terms read the logits a second time once the normalisers
are known.

Needs CUDA tensors, or Triton's interpreter for tests.
"""

from __future__ import annotations

from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from megaopd.losses import divergences as table
from megaopd.losses.divergences import Part
from megaopd.losses.row_kernels import LOGIT_FLOOR, WIDE_GAP
from megaopd.losses.shard_scalars import ShardScalars
from megaopd.losses.triton_elements import block_log_ratio, log1p, pull, value

# The elementwise functions of `triton_elements`, by the table's.
_CODES = {
    table.reverse_kl_value: 0,
    table.forward_kl_value: 1,
    table.jsd_value: 2,
    table.skew_forward_kl_value: 3,
    table.skew_reverse_kl_value: 4,
    table.alpha_value: 5,
    table.tvd_value: 6,
}
_BLOCK, _NUM_WARPS = 4096, 8


def supports(parts: tuple[Part, ...]) -> bool:
    """Whether every term has been written for Triton too."""
    return len(parts) <= 2 and all(_function_of(part) in _CODES for part in parts)


def _function_of(part: Part) -> object:
    return part.value.func if isinstance(part.value, partial) else part.value


def _terms(parts: tuple[Part, ...]) -> dict[str, float | int]:
    """Code, parameter and weight of up to two terms, as kernel arguments; code -1 is none."""
    found: dict[str, float | int] = {}
    for i in range(2):
        part = parts[i] if i < len(parts) else None
        keywords = part.value.keywords if part and isinstance(part.value, partial) else {}
        found[f"CODE{i}"] = _CODES[_function_of(part)] if part else -1  # type: ignore[index]
        found[f"X{i}"] = float(next(iter(keywords.values()), 0.0))
        found[f"W{i}"] = part.weight if part else 0.0
    return found


@triton.jit
def _load(pointer, offsets, mask, FLOOR: tl.constexpr):
    x = tl.load(pointer + offsets, mask=mask, other=0.0).to(tl.float32)
    # A NaN must stay one: the comparison keeps it, a maximum may not.
    return tl.where(x < FLOOR, FLOOR, x)


@triton.jit
def _shares(log_mass, ratio, block_log_mass, block_ratio):
    """Joins two shards: their masses' logs and log-ratios log(mass z / mass u) -> those of both.

    Returns the joint ones, then of each shard the student's share w and d = log w - log v.
    """
    larger = tl.maximum(log_mass, block_log_mass)
    joint = larger + tl.log(tl.exp(log_mass - larger) + tl.exp(block_log_mass - larger))
    w, block_w = tl.exp(log_mass - joint), tl.exp(block_log_mass - joint)
    ahead = log_mass >= block_log_mass
    # Seen from the larger shard the correction is small, and exact where the ratios are close.
    pivot = tl.where(ahead, ratio, block_ratio)
    difference = tl.where(ahead, ratio - block_ratio, block_ratio - ratio)
    other_w = tl.where(ahead, block_w, w)
    other_u = tl.where(ahead, block_log_mass - block_ratio, log_mass - ratio)
    pivot_u = tl.where(ahead, log_mass - ratio, block_log_mass - block_ratio)
    top_u = tl.maximum(other_u, pivot_u)
    joint_u = top_u + tl.log(tl.exp(other_u - top_u) + tl.exp(pivot_u - top_u))
    small = tl.minimum(difference, 20.0)
    near = tl.abs(small) < 0.25
    series = small * (1 + small * (0.5 + small * (1 / 6 + small * (1 / 24 + small / 120))))
    close = pivot - log1p(other_w * tl.where(near, series, tl.exp(small) - 1))
    # Where this shard holds the larger part of the student's mass, x >= -1/2: log1p(x) is safe.
    joint_ratio = tl.where(difference > 20.0, joint - joint_u, close)
    joint_ratio = tl.where(w == 0, block_ratio, joint_ratio)
    return joint, joint_ratio, w, ratio - joint_ratio, block_w, block_ratio - joint_ratio


@triton.jit
def _chained(result, w, d, block_result, block_w, block_d, order, CODE: tl.constexpr, X):
    """The chain rule for one term."""
    within = w * tl.exp(tl.minimum(-(1 - order) * d, 80.0)) * result
    block_within = block_w * tl.exp(tl.minimum(-(1 - order) * block_d, 80.0)) * block_result
    v = w * tl.exp(tl.minimum(-d, 80.0))
    block_v = block_w * tl.exp(tl.minimum(-block_d, 80.0))
    between = value(w, v, d, CODE, X) + value(block_w, block_v, block_d, CODE, X)
    return within + block_within + between


@triton.jit
def _join_entropy(entropy, log_share, block_entropy, block_log_share):
    return tl.exp(log_share) * (entropy - log_share) + tl.exp(block_log_share) * (
        block_entropy - block_log_share
    )


@triton.jit
def _forward_kernel(
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
    """Scalars of one row -> out[0:11]: max z, max u, log mass z, log(mass z / mass u) less the
    first block's max z - max u, entropies of z and u, the two terms, extra log masses of z and u,
    and that
    difference: without a constant shift between the models in it the ratio keeps its digits."""
    row = tl.program_id(0).to(tl.int64)
    z_row, u_row = z_ptr + row * z_stride, u_ptr + row * u_stride
    max_z, max_u = tl.full((), -1e30, tl.float32), tl.full((), -1e30, tl.float32)
    mass, ratio = tl.full((), -1e30, tl.float32), tl.full((), 0.0, tl.float32)
    entropy_z, entropy_u = tl.full((), 0.0, tl.float32), tl.full((), 0.0, tl.float32)
    result0, result1 = tl.full((), 0.0, tl.float32), tl.full((), 0.0, tl.float32)
    extra_z, extra_u = tl.full((), 0.0, tl.float32), tl.full((), 0.0, tl.float32)
    shift = tl.full((), 0.0, tl.float32)
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
        if start == 0:
            shift = gap
        d = tl.where(tl.abs(gap) > WIDE, centred_z - centred_u, (z - u) - gap) * inv_tau
        log_ratio = block_log_ratio(sum_z, sum_u, e_z, e_u, tl.where(mask, d, 0.0))
        p, q, d = e_z / sum_z, e_u / sum_u, tl.where(mask, d - log_ratio, 0.0)
        block_mass = top_z * inv_tau + tl.log(sum_z)
        block_ratio = (gap - shift) * inv_tau + log_ratio
        block_entropy_z = tl.log(sum_z) - tl.sum(p * centred_z * inv_tau, axis=0)
        block_entropy_u = tl.log(sum_u) - tl.sum(q * centred_u * inv_tau, axis=0)

        joint, joint_ratio, w, w_d, block_w, block_d = _shares(mass, ratio, block_mass, block_ratio)
        log_w, block_log_w = mass - joint, block_mass - joint
        entropy_z = _join_entropy(entropy_z, log_w, block_entropy_z, block_log_w)
        entropy_u = _join_entropy(entropy_u, log_w - w_d, block_entropy_u, block_log_w - block_d)
        if CODE0 >= 0:
            block_result = tl.sum(value(p, q, d, CODE0, X0), axis=0)
            result0 = _chained(result0, w, w_d, block_result, block_w, block_d, order0, CODE0, X0)
        if CODE1 >= 0:
            block_result = tl.sum(value(p, q, d, CODE1, X1), axis=0)
            result1 = _chained(result1, w, w_d, block_result, block_w, block_d, order1, CODE1, X1)
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
    tl.store(out + 2, mass)
    tl.store(out + 3, ratio)
    tl.store(out + 4, entropy_z)
    tl.store(out + 5, entropy_u)
    tl.store(out + 6, result0)
    tl.store(out + 7, result1)
    tl.store(out + 10, shift)
    if EXTRA:
        tl.store(out + 8, max_z * extra_inv_tau + tl.log(extra_z))
        tl.store(out + 9, max_u * extra_inv_tau + tl.log(extra_u))


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
def _sums_kernel(
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
def _gradient_kernel(
    z_ptr,
    u_ptr,
    rows_ptr,
    out_ptr,
    z_stride,
    u_stride,
    out_stride,
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
    """`row_kernels.write_gradient` for one block of one row; out may be z."""
    row = tl.program_id(0).to(tl.int64)
    rows = rows_ptr + row * 7
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < num_columns
    z = _load(z_ptr + row * z_stride, offsets, mask, FLOOR)
    u = _load(u_ptr + row * u_stride, offsets, mask, FLOOR)
    p, q, d = _probabilities(z, u, mask, rows, inv_tau, WIDE)
    total = W0 * pull(p, q, d, CODE0, X0) - p * tl.load(rows + 5)
    if CODE1 >= 0:
        total += W1 * pull(p, q, d, CODE1, X1)
    total *= tl.load(rows + 6)
    tl.store(out_ptr + row * out_stride + offsets, total.to(out_ptr.dtype.element_ty), mask=mask)


class TritonBackend:
    """See `engine.Backend`; fp16, bf16 and fp32 logits with contiguous columns."""

    def __init__(
        self, parts: tuple[Part, ...], inv_tau: float, extra_inv_tau: float | None
    ) -> None:
        self.parts, self.inv_tau, self.extra_inv_tau = parts, inv_tau, extra_inv_tau
        self.terms = _terms(parts)
        self.common = {"FLOOR": LOGIT_FLOOR, "WIDE": WIDE_GAP, "num_warps": _NUM_WARPS}

    def _forward(self, z: Tensor, u: Tensor, with_values: bool) -> ShardScalars:
        num_rows, num_columns = z.shape
        out = torch.empty(num_rows, 11, dtype=torch.float32, device=z.device)
        terms = self.terms if with_values else {**self.terms, "CODE0": -1, "CODE1": -1}
        orders = [part.order or 0.0 for part in self.parts] + [0.0]
        if num_rows:
            _forward_kernel[(num_rows,)](
                z,
                u,
                out,
                z.stride(0),
                u.stride(0),
                out.stride(0),
                num_columns,
                self.inv_tau,
                self.extra_inv_tau or 1.0,
                orders[0],
                orders[1],
                EXTRA=self.extra_inv_tau is not None,
                BLOCK=_BLOCK,
                **terms,
                **self.common,
            )
        max_z, max_u, mass, ratio, entropy_z, entropy_u, *rest = out.double().unbind(1)
        return ShardScalars(
            max_z=max_z,
            max_u=max_u,
            log_mass_z=mass,
            log_mass_u=mass - ratio - rest[4] * self.inv_tau,
            entropy_z=entropy_z,
            entropy_u=entropy_u,
            extra_masses=rest[2:4] if self.extra_inv_tau is not None else [],
            values=rest[: len(self.parts)] if with_values else [],
            pulls=[],
        )

    def normalise(self, z: Tensor, u: Tensor) -> ShardScalars:
        return self._forward(z, u, with_values=False)

    def chain_divergence(self, z: Tensor, u: Tensor) -> ShardScalars:
        return self._forward(z, u, with_values=True)

    def local_divergence(self, z: Tensor, u: Tensor, refine: bool) -> ShardScalars:
        found = self.normalise(z, u)
        gap = (found.max_z.float() - found.max_u.float()).double()
        gap = torch.where(gap.abs() > WIDE_GAP, found.max_z - found.max_u, gap) * self.inv_tau
        rows = [
            found.max_z,
            found.max_u,
            (found.max_z * self.inv_tau - found.log_mass_z).exp(),
            (found.max_u * self.inv_tau - found.log_mass_u).exp(),
            found.log_mass_z - found.log_mass_u - gap,
        ]
        found.values, found.pulls = self.global_sums(z, u, torch.stack(rows, dim=1).float())
        return found

    def global_sums(self, z: Tensor, u: Tensor, rows: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        num_rows, num_columns = z.shape
        out = torch.empty(num_rows, 4, dtype=torch.float32, device=z.device)
        if num_rows:
            _sums_kernel[(num_rows,)](
                z,
                u,
                rows.contiguous(),
                out,
                z.stride(0),
                u.stride(0),
                num_columns,
                self.inv_tau,
                BLOCK=_BLOCK,
                **self.terms,
                **self.common,
            )
        sums = out.double().unbind(1)
        count = len(self.parts)
        return list(sums[0::2][:count]), list(sums[1::2][:count])

    def write_gradient(self, z: Tensor, u: Tensor, rows: Tensor, out: Tensor) -> None:
        num_rows, num_columns = z.shape
        if num_rows:
            _gradient_kernel[(num_rows, triton.cdiv(num_columns, _BLOCK))](
                z,
                u,
                rows.contiguous(),
                out,
                z.stride(0),
                u.stride(0),
                out.stride(0),
                num_columns,
                self.inv_tau,
                BLOCK=_BLOCK,
                **self.terms,
                **self.common,
            )
