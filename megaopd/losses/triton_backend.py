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
from torch import Tensor

from megaopd.losses import divergences as table
from megaopd.losses.divergences import Part
from megaopd.losses.row_kernels import LOGIT_FLOOR, WIDE_GAP
from megaopd.losses.shard_scalars import ShardScalars, max_gap
from megaopd.losses.triton_kernels import forward_kernel, gradient_kernel, sums_kernel

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


class TritonBackend:
    """See `engine.Backend`; fp16, bf16 and fp32 logits with contiguous columns."""

    def __init__(
        self,
        parts: tuple[Part, ...],
        inv_tau: float,
        extra_inv_tau: float | None,
        entropy_coef: float = 0.0,
    ) -> None:
        self.parts, self.inv_tau, self.extra_inv_tau = parts, inv_tau, extra_inv_tau
        self.entropy_coef = entropy_coef
        self.terms = _terms(parts)
        self.common = {"FLOOR": LOGIT_FLOOR, "WIDE": WIDE_GAP, "num_warps": _NUM_WARPS}

    def _forward(self, z: Tensor, u: Tensor, with_values: bool) -> ShardScalars:
        num_rows, num_columns = z.shape
        out = torch.empty(num_rows, 10, dtype=torch.float64, device=z.device)
        terms = self.terms if with_values else {**self.terms, "CODE0": -1, "CODE1": -1}
        orders = [part.order or 0.0 for part in self.parts] + [0.0]
        if num_rows:
            forward_kernel[(num_rows,)](
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
        max_z, max_u, mass, ratio, entropy_z, entropy_u, *rest = out.unbind(1)
        log_mass_z = max_z * self.inv_tau + mass
        extra_masses = []
        if self.extra_inv_tau is not None:
            extra_masses = [
                top * self.extra_inv_tau + extra
                for top, extra in zip((max_z, max_u), rest[2:4], strict=True)
            ]
        return ShardScalars(
            max_z=max_z,
            max_u=max_u,
            log_mass_z=log_mass_z,
            log_mass_u=log_mass_z - (max_z - max_u) * self.inv_tau - ratio,
            entropy_z=entropy_z,
            entropy_u=entropy_u,
            extra_masses=extra_masses,
            values=rest[: len(self.parts)] if with_values else [],
            pulls=[],
        )

    def normalise(self, z: Tensor, u: Tensor) -> ShardScalars:
        return self._forward(z, u, with_values=False)

    def chain_divergence(self, z: Tensor, u: Tensor) -> ShardScalars:
        return self._forward(z, u, with_values=True)

    def local_divergence(self, z: Tensor, u: Tensor, refine: bool) -> ShardScalars:
        found = self.normalise(z, u)
        gap = max_gap(found.max_z, found.max_u, torch.float32) * self.inv_tau
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
            sums_kernel[(num_rows,)](
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
            gradient_kernel[(num_rows, triton.cdiv(num_columns, _BLOCK))](
                z,
                u,
                rows.contiguous(),
                out,
                z.stride(0),
                u.stride(0),
                out.stride(0),
                num_columns,
                self.inv_tau,
                self.entropy_coef,
                BLOCK=_BLOCK,
                **self.terms,
                **self.common,
            )
