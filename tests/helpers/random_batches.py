"""Random samples, and random ways to share them out over a world of ranks."""

from __future__ import annotations

import random
from dataclasses import replace

from megaopd.batch import Prompt, Sample
from megaopd.config import ParallelConfig
from megaopd.data.packing import Batching, Packing, Side
from megaopd.parallel.layout import Layout


def random_samples(rng: random.Random, num: int, privileged: bool = False) -> list[Sample]:
    samples = []
    for i in range(num):
        length = rng.randrange(0, 25)
        extra = tuple(range(rng.randrange(1, 30))) if privileged else None
        samples.append(
            Sample(
                Prompt(f"p{i}", (1,) * rng.randrange(1, 12), teacher_token_ids=extra),
                0,
                tuple(range(length)),
                (0.0,) * length,
                tuple(rng.random() < 0.8 for _ in range(length)),
                "stop",
                0,
            )
        )
    return samples


def random_batching(rng: random.Random, world_size: int, side: Side = "student") -> Batching:
    """Any product of sizes that divides the world, and any packing."""
    sizes = {"tensor": 1, "context": 1, "pipeline": 1}
    rest = world_size
    while rest > 1 and rng.random() < 0.7:
        factor = rng.choice([f for f in range(2, rest + 1) if rest % f == 0])
        sizes[rng.choice(list(sizes))] *= factor
        rest //= factor
    parallel = ParallelConfig(**sizes)
    packing = rng.choice([Packing(1), Packing(3), Packing(1, 40), Packing(1, 200)])
    packing = replace(packing, pad_to_multiple=parallel.tensor)
    return Batching(Layout(parallel, world_size), packing, side)
