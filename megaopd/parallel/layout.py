"""Where a rank stands in a layout: arithmetic alone, for any rank, without a process group."""

from __future__ import annotations

from dataclasses import dataclass

from megaopd.config import ParallelConfig


@dataclass(frozen=True)
class Place:
    """Which share of the global batch a rank computes.

    Attributes:
        dp_rank: data-parallel rank: which samples.
        cp_rank: context-parallel rank: which part of every one of their sequences.
    """

    dp_rank: int = 0
    dp_size: int = 1
    cp_rank: int = 0
    cp_size: int = 1


@dataclass(frozen=True)
class Coordinates:
    """A rank's place along every dimension of its layout; `dp` is what is left of the world."""

    tp: int
    cp: int
    dp: int
    pp: int


@dataclass(frozen=True)
class Layout:
    """A layout over a world of ranks, numbered as Megatron numbers them: tp, cp, dp, pp, the first
    varying fastest. Expert parallelism divides the ranks of one pipeline stage anew and so has no
    coordinate here.

    Attributes:
        world_size: a multiple of tensor x context x pipeline.
    """

    parallel: ParallelConfig
    world_size: int

    @property
    def dp_size(self) -> int:
        p = self.parallel
        return self.world_size // (p.tensor * p.context * p.pipeline)

    def coordinates(self, rank: int) -> Coordinates:
        p = self.parallel
        rest, tp = divmod(rank, p.tensor)
        rest, cp = divmod(rest, p.context)
        pp, dp = divmod(rest, self.dp_size)
        return Coordinates(tp, cp, dp, pp)

    def rank(self, at: Coordinates) -> int:
        p = self.parallel
        return at.tp + p.tensor * (at.cp + p.context * (at.dp + self.dp_size * at.pp))

    def place(self, rank: int) -> Place:
        at = self.coordinates(rank)
        return Place(at.dp, self.dp_size, at.cp, self.parallel.context)

    def layers_per_stage(self, num_layers: int) -> tuple[int, ...]:
        """Layers of every (virtual) stage in the order of the network: as configured, else shared
        out evenly; what does not divide goes to the first stages, since the last has the loss."""
        p = self.parallel
        if p.layers_per_stage:
            return p.layers_per_stage
        each, more = divmod(num_layers, p.pipeline * p.virtual_pipeline)
        return tuple(each + (stage < more) for stage in range(p.pipeline * p.virtual_pipeline))
