"""A teacher that follows the student: an exponential moving average of its weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from megaopd.checkpoint.pieces import Piece, StoredPieces, pieces
from megaopd.checkpoint.places import ParameterPlaces
from megaopd.config import TeacherConfig
from megaopd.data.packing import Batching
from megaopd.engine.offload import HostOffload
from megaopd.models import weights
from megaopd.models.arch import ModelArch
from megaopd.models.families import param_mappings
from megaopd.parallel.groups import ParallelGroups
from megaopd.protocols import Student
from megaopd.teacher.head import HeadSlot, HostedHead
from megaopd.teacher.megatron import MegatronTeacher

_KEYS = "ema_teacher"


class EMATeacher(MegatronTeacher):
    """A `MegatronTeacher` in the student's layout whose weights are an average of the student's.

    With w_t the student's weights after step t and decay d, the teacher of step t + 1 has
    m_t = d * m_{t-1} + (1 - d) * w_t, and m_0 = w_0 (mean teacher, arXiv 1703.01780). A step that
    was skipped is no step.

    w_t is what the student computes and samples with, in bf16 where it trains in bf16, and not the
    optimizer's fp32 main weights: these may be in host memory by then. Each w_t is then off by half
    a bf16 ulp at most, and so is their average; that is no more than what is lost anyway when the
    average is rounded to the teacher's bf16.

    Args:
        config: with `path` the directory that the student starts from.
        groups: of the student's layout.
        others: as of `MegatronTeacher`.
    """

    def __init__(
        self,
        config: TeacherConfig,
        arch: ModelArch,
        groups: ParallelGroups,
        batching: Batching,
        student: Batching,
        student_vocab_rows: int,
        name: str = "",
        slot: HeadSlot | None = None,
    ) -> None:
        super().__init__(
            config, arch, groups, batching, student, student_vocab_rows, name=name, slot=slot
        )
        own = weights.named_parameters(self.chunks, arch)
        experts = {n for n, mapping in param_mappings(arch).items() if mapping.expert is not None}
        peers = {n: groups.expt_dp if n in experts else groups.dp_cp for n in own}
        with self.offload.on_device():
            places = ParameterPlaces(self.chunks, groups)
            self._places = {name: places[param] for name, param in own.items()}
            self.average = ShardedAverage(own, peers, config.ema_decay)
        self.average_offload = HostOffload(
            groups.device, moved=self.average.tensors, enabled=config.offload
        )
        self.average_offload.to_host()

    def follow(self, student: Student) -> None:
        """Takes the student's new weights into the average; collective."""
        with self.average_offload.on_device(), self.offload.on_device():
            self.average.add(student.weight_shards())
            self._renew()

    def saved_pieces(self) -> Iterator[Piece]:
        """This rank's part of the average: of `megaopd.checkpoint`'s `StatePart`."""
        with self.average_offload.on_device():
            yield from self._pieces(for_saving=True)

    def restore(self, stored: StoredPieces, num_updates: int) -> None:
        """Goes on from a stored average, whatever layout stored it."""
        with self.average_offload.on_device(), self.offload.on_device():
            for piece in self._pieces(for_saving=False):
                stored.fill(piece)
            self._renew()

    def _pieces(self, *, for_saving: bool) -> Iterator[Piece]:
        prefix = f"{_KEYS}.{self.name}." if self.name else f"{_KEYS}."
        for name, part in self.average.parts.items():
            start = self.average.start(name)
            yield from pieces(prefix, self._places[name], part, start, for_saving=for_saving)

    def _renew(self) -> None:
        """Makes the average the teacher's weights."""
        self.average.write()
        if isinstance(self.head, HostedHead) and self.groups.is_last_stage:
            self.head.renew(self.chunks[-1].head.detach())


class ShardedAverage:
    """The moving average of a model's weights in fp32: in bf16, of 8 significant bits, a change of
    1 part in 1000 would be rounded away.

    The ranks that hold the same weight keep equal parts of its average, as the distributed
    optimizer does with its state, and gather the rounded parts.

    Args:
        weights: this rank's shards of the weights, by name: the average's start, and where `write`
            puts it.
        peers: the ranks that hold the same shard, by name.
        decay: what the average keeps of itself when weights are added.
    """

    def __init__(
        self, weights: Mapping[str, Tensor], peers: Mapping[str, dist.ProcessGroup], decay: float
    ) -> None:
        self.weights, self.peers, self.decay = dict(weights), peers, decay
        self.parts = {
            name: _part(weight.detach(), peers[name]).to(torch.float32, copy=True)
            for name, weight in self.weights.items()
        }

    def start(self, name: str) -> int:
        """The first of a weight's elements of which this rank keeps the average."""
        group = self.peers[name]
        return group.rank() * _part_size(self.weights[name], group)

    def tensors(self) -> Iterable[Tensor]:
        """The memory of the average on this rank, fp32."""
        return self.parts.values()

    @torch.no_grad()
    def add(self, weights: Mapping[str, Tensor]) -> None:
        """One step of the average; `weights` have the names and shapes of its own."""
        for name, part in self.parts.items():
            part.lerp_(_part(weights[name], self.peers[name]).float(), 1 - self.decay)

    @torch.no_grad()
    def write(self) -> None:
        """Rounds the average into the weights, every rank the same bits; collective."""
        for name, weight in self.weights.items():
            part, group = self.parts[name].to(weight.dtype), self.peers[name]
            if group.size() > 1:
                padded = weight.new_zeros(_part_size(weight, group))
                padded[: part.numel()] = part
                part = weight.new_empty(padded.numel() * group.size())
                dist.all_gather(list(part.split(padded.numel())), padded, group=group)
            weight.copy_(part[: weight.numel()].view_as(weight))


def _part_size(weight: Tensor, group: dist.ProcessGroup) -> int:
    return -(-weight.numel() // group.size())


def _part(weight: Tensor, group: dist.ProcessGroup) -> Tensor:
    """This rank's elements of a weight that the group shares; fewer, or none, at the end."""
    size = _part_size(weight, group)
    return weight.reshape(-1)[group.rank() * size :][:size]
