"""Host memory for what the device need not hold at the moment.

A tensor that has been sent away keeps its identity: only its storage is emptied, so parameters,
their views in Megatron's buffers, and the optimizer's state are all valid again once the storage is
back. Until then nobody may touch it. Views, products and the forward of a guarded module raise;
on CUDA a kernel that reads it is an illegal access, on the CPU an elementwise one ends the process,
and what copies a storage without a kernel (`torch.save`, `Tensor.numpy`) writes garbage. So
whatever reads offloaded tensors does it inside `HostOffload.on_device()`. A CPU tensor that was
given to numpy cannot leave any more: torch fixes the size of its storage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

# Pinned memory is allotted in powers of two: larger buffers are made of pieces of this many bytes.
PIECE_BYTES = 64 << 20

Tensors = Callable[[], Iterable[Tensor]]


def _nothing() -> Iterable[Tensor]:
    return ()


class HostOffload:
    """Sends tensors to host memory and brings them back.

    The tensors are asked for at every departure, because some appear late: the optimizer makes its
    state in its first step. Of tensors that share a storage all move, once. Copies run on the
    current stream: a stream beside it would have to wait for it at both ends, since memory that is
    given up goes to the next allocation in this stream's order.

    Args:
        device: what lies elsewhere (a step counter on the CPU, say) stays there.
        moved: tensors whose contents change on the device; copied at every departure.
        constant: tensors whose contents never change; copied at the first departure alone.
        dropped: tensors whose contents nobody needs: they come back as zeros.
        enabled: without it every method does nothing.

    Attributes:
        away: whether the tensors are in host memory.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        moved: Tensors = _nothing,
        constant: Tensors = _nothing,
        dropped: Tensors = _nothing,
        enabled: bool = True,
    ) -> None:
        self.device, self.enabled = device, enabled
        self.away = False
        self._moved, self._constant, self._dropped = moved, constant, dropped
        # Storages on the device -> their copies; kept between departures, pinned once.
        self._copies: dict[torch.UntypedStorage, list[Tensor]] = {}
        self._sizes: dict[torch.UntypedStorage, int] = {}

    @property
    def host_buffers(self) -> list[Tensor]:
        """The host memory that it holds, uint8."""
        return [piece for pieces in self._copies.values() for piece in pieces]

    def to_host(self) -> None:
        """Sends the tensors away; nothing where they are."""
        if not self.enabled or self.away:
            return
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # other streams may still work on them
        moved, constant, dropped = (
            self._storages(tensors()) for tensors in (self._moved, self._constant, self._dropped)
        )
        # Copies of storages that are gone (a state that was loaded anew) are given up.
        copies = {s: self._copies[s] for s in (*moved, *constant) if s in self._copies}
        fresh = [s for s in (*moved, *constant) if s not in copies]
        copies |= {s: _host_pieces(s.nbytes(), self.device) for s in fresh}
        for storage in dict.fromkeys([*moved, *fresh]):
            for piece, part in zip(copies[storage], _pieces(storage), strict=True):
                piece.copy_(part, non_blocking=True)
        self._copies = copies
        self._sizes = {s: s.nbytes() for s in (*moved, *constant, *dropped)}
        for storage in self._sizes:
            storage.resize_(0)
        self.away = True

    def to_device(self) -> None:
        """Brings the tensors back; nothing where they are."""
        if not self.away:
            return
        for storage, size in self._sizes.items():
            storage.resize_(size)
            copies = self._copies.get(storage)
            if copies is None:
                _flat(storage).zero_()
                continue
            for piece, part in zip(copies, _pieces(storage), strict=True):
                part.copy_(piece, non_blocking=True)
        self.away = False

    @contextmanager
    def on_device(self) -> Iterator[None]:
        """The tensors are on the device inside the block, and where they were after it."""
        was_away = self.away
        self.to_device()
        try:
            yield
        finally:
            if was_away:
                self.to_host()

    @contextmanager
    def off_device(self) -> Iterator[None]:
        """The tensors are in host memory inside the block, and where they were after it.

        The memory is given back to the driver: other processes may use it.
        """
        was_away = self.away
        self.to_host()
        if self.enabled and self.device.type == "cuda":
            torch.cuda.empty_cache()
        try:
            yield
        finally:
            if not was_away:
                self.to_device()

    def guard(self, modules: Iterable[torch.nn.Module]) -> None:
        """Makes the forward of `modules` an error while the tensors are away."""

        def check(module: torch.nn.Module, args: Any) -> None:
            if self.away:
                raise RuntimeError(f"{type(module).__name__}: its weights are in host memory")

        if self.enabled:
            for module in modules:
                module.register_forward_pre_hook(check)

    def _storages(self, tensors: Iterable[Tensor]) -> list[torch.UntypedStorage]:
        """The distinct storages on the device, in order."""
        found = {t.untyped_storage(): None for t in tensors if t.device.type == self.device.type}
        return [storage for storage in found if storage.nbytes()]


def gradients(chunks: Sequence[torch.nn.Module]) -> Iterator[Tensor]:
    """The gradients of all parameters in training: views of Megatron's buffers."""
    for parameter in parameters(chunks):
        if hasattr(parameter, "main_grad"):
            yield parameter.main_grad


def optimizer_tensors(
    optimizer: MegatronOptimizer, chunks: Sequence[torch.nn.Module]
) -> Iterator[Tensor]:
    """Moments and main weights, without main weights that are the model's own (fp32)."""
    own = {p.untyped_storage() for p in parameters(chunks)}
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        if part.is_stub_optimizer:  # this rank has nothing to train
            continue
        main = (p for group in part.param_groups for p in group["params"])
        state = (value for values in part.state.values() for value in values.values())
        for tensor in (*main, *state):
            if isinstance(tensor, Tensor) and tensor.untyped_storage() not in own:
                yield tensor


def parameters(chunks: Sequence[torch.nn.Module]) -> Iterator[Tensor]:
    """The weights of a model's chunks."""
    for chunk in chunks:
        yield from chunk.parameters()


def _flat(storage: torch.UntypedStorage) -> Tensor:
    """All bytes of a storage, as uint8."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)


def _pieces(storage: torch.UntypedStorage) -> tuple[Tensor, ...]:
    return _flat(storage).split(PIECE_BYTES)


def _host_pieces(size: int, device: torch.device) -> list[Tensor]:
    """`size` bytes of host memory, pinned where that speeds up copies."""
    return [
        torch.empty(
            min(PIECE_BYTES, size - start), dtype=torch.uint8, pin_memory=device.type == "cuda"
        )
        for start in range(0, size, PIECE_BYTES)
    ]
