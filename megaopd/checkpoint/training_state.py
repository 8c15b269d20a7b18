"""The tensors of a training: weights, adapters, main weights and moments, piece by piece.

Every rank stores its own share: of what the distributed optimizer shares out, weights included, the
elements that it updates; of frozen weights the first of the ranks that hold them all. Weights have
the keys of any Megatron checkpoint of the model, so that whatever reads one reads these too; the
optimizer's state has those that Megatron-Core gives it in model space.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from megaopd.checkpoint.pieces import Piece, StoredPieces, pieces
from megaopd.checkpoint.places import ParameterPlaces
from megaopd.models.build import HiddenGPTModel
from megaopd.parallel.groups import ParallelGroups

OPTIMIZER_KEYS = "optimizer.state."
_MOMENTS = ("exp_avg", "exp_avg_sq")


class StatePart(Protocol):
    """Something with tensors that a resumed run needs. Every method is collective."""

    def saved_pieces(self) -> Iterator[Piece]:
        """What this rank stores; on the device, and valid until the next piece is asked for."""
        ...

    def restore(self, stored: StoredPieces, num_updates: int) -> None:
        """Takes this rank's part of what is stored.

        Args:
            num_updates: optimizer steps that were taken.

        Raises:
            CheckpointError: it is not there.
        """
        ...


class ModelState:
    """A `StatePart`: a model in training and its optimizer. Whoever calls it sees to it that both
    are on the device.

    Args:
        chunks: this rank's chunks of the model.
        optimizer: Megatron-Core's distributed one.
        groups: of the model's layout.
        frozen_base: the weights without adapters never change, and are not stored.
    """

    def __init__(
        self,
        chunks: Sequence[HiddenGPTModel],
        optimizer: MegatronOptimizer,
        groups: ParallelGroups,
        frozen_base: bool,
    ) -> None:
        self._places = ParameterPlaces(chunks, groups)
        self._params = [
            p
            for chunk in chunks
            for p in chunk.parameters()
            if not frozen_base or id(p) in self._places.adapters
        ]
        self._optimizers: list[Any] = [
            part
            for part in getattr(optimizer, "chained_optimizers", [optimizer])
            if not part.is_stub_optimizer
        ]
        self._groups = groups

    def saved_pieces(self) -> Iterator[Piece]:
        """See `StatePart`."""
        owned = {id(p): (start, stop) for p, start, stop, _ in self._owned()}
        for param in self._params:
            if param.requires_grad:
                start, stop = owned.get(id(param), (0, 0))
            else:
                start, stop = 0, param.numel() if self._is_first(param) else 0
            values = param.detach().reshape(-1)[start:stop]
            yield from pieces("", self._places[param], values, start, for_saving=True)
        for param, start, _, tensors in self._owned():
            for name, values in tensors.items():
                prefix = f"{OPTIMIZER_KEYS}{name}."
                yield from pieces(prefix, self._places[param], values, start, for_saving=True)

    def restore(self, stored: StoredPieces, num_updates: int) -> None:
        """See `StatePart`."""
        for param in self._params:
            values = param.detach().view(-1)
            for piece in pieces("", self._places[param], values, for_saving=False):
                stored.fill(piece)
        if num_updates:
            for optimizer in self._optimizers:
                _make_moments(optimizer)
                _set_num_updates(optimizer, num_updates)
        for param, start, _, tensors in self._owned():
            for name, values in tensors.items():
                prefix = f"{OPTIMIZER_KEYS}{name}."
                for piece in pieces(prefix, self._places[param], values, start, for_saving=False):
                    stored.fill(piece)

    def _is_first(self, param: Tensor) -> bool:
        """Whether this rank is the first of those that hold the same weights."""
        is_expert = not getattr(param, "allreduce", True)
        return (self._groups.expt_dp if is_expert else self._groups.dp_cp).rank() == 0

    def _owned(self) -> Iterator[tuple[Tensor, int, int, dict[str, Tensor]]]:
        """(parameter, first element, end, state by name) of this rank's shares; 1-D views.

        Before the first update there are no moments; main weights that are the model's own (fp32)
        are left out.
        """
        for optimizer in self._optimizers:
            for param in optimizer.model_param_gbuf_map:
                own = optimizer._get_model_param_range_map(param)["param"]
                if own.start == own.end:
                    continue
                state = optimizer._get_main_param_and_optimizer_states(param)
                main = state["param"].detach()
                tensors = {n: state[n].view(-1) for n in _MOMENTS if n in state}
                if main.untyped_storage().data_ptr() != param.untyped_storage().data_ptr():
                    tensors["fp32_param"] = main.view(-1)
                yield param, own.start, own.end, tensors


def _make_moments(optimizer: Any) -> None:
    """Makes the moments that the first update would make; what it does to the weights is undone by
    whoever loads them."""
    groups = optimizer.optimizer.param_groups
    rates = [group["lr"] for group in groups]
    for group in groups:
        group["lr"] = 0.0  # so that neither step nor decay moves a weight
    optimizer._init_optimizer_states_with_dummy_values()
    for group, rate in zip(groups, rates, strict=True):
        group["lr"] = rate


def _set_num_updates(optimizer: Any, num_updates: int) -> None:
    """torch counts the steps of every parameter, TransformerEngine and apex those of a group."""
    inner = optimizer.optimizer
    for group in inner.param_groups:
        if "step" in group:
            group["step"] = num_updates
    for state in inner.state.values():
        if "step" in state:
            state["step"].fill_(num_updates)
