"""What a step has to do, as the plan sees it: models, samples, tokens, and what costs memory."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

from megaopd.config import Config, ParallelConfig
from megaopd.models.arch import ModelArch

Recompute = Literal["none", "selective", "full"]

DTYPE_BYTES = {"fp32": 4, "bf16": 2}


@dataclass(frozen=True)
class Workload:
    """A step of a run.

    Attributes:
        config: the run; its layouts, recompute and offload are where a plan starts.
        student, teacher: the architectures.
        world_size: ranks.
        tokens_per_sample: mean tokens of prompt and response together.
        loss_tokens_per_sample: mean tokens of a response.
        tokens_per_micro_batch: tokens that a data-parallel rank packs into one forward pass of the
            student, over all its context-parallel ranks.
        teacher_tokens_per_micro_batch: the same of the teacher.
    """

    config: Config
    student: ModelArch
    teacher: ModelArch
    world_size: int
    tokens_per_sample: int
    loss_tokens_per_sample: int
    tokens_per_micro_batch: int
    teacher_tokens_per_micro_batch: int

    @classmethod
    def of(
        cls,
        config: Config,
        student: ModelArch,
        teacher: ModelArch,
        world_size: int,
        *,
        tokens_per_sample: int | None = None,
        loss_tokens_per_sample: int | None = None,
        tokens_per_rank: int | None = None,
    ) -> Workload:
        """A step as a configuration describes it; what is None is taken at its longest.

        Args:
            tokens_per_rank: `tokens_per_micro_batch`, unless a single sample is longer.
        """
        response = config.rollout.max_new_tokens
        longest = config.data.max_prompt_tokens + response
        mean = longest if tokens_per_sample is None else tokens_per_sample
        loss = max(1, mean * response // longest)
        default = config.train.max_tokens_per_micro_batch or config.train.micro_batch_size * mean
        # A micro-batch holds one sample at least, however long.
        budget = max(longest, default if tokens_per_rank is None else tokens_per_rank)
        return cls(
            config=config,
            student=student,
            teacher=teacher,
            world_size=world_size,
            tokens_per_sample=mean,
            loss_tokens_per_sample=(
                loss if loss_tokens_per_sample is None else loss_tokens_per_sample
            ),
            tokens_per_micro_batch=budget,
            teacher_tokens_per_micro_batch=max(
                longest, config.teacher.max_tokens_per_micro_batch or budget
            ),
        )

    @property
    def num_samples(self) -> int:
        return self.config.train.global_batch_size

    @property
    def num_tokens(self) -> int:
        """Tokens of the global batch."""
        return self.num_samples * self.tokens_per_sample

    @property
    def num_loss_tokens(self) -> int:
        return self.num_samples * self.loss_tokens_per_sample

    @property
    def student_bytes(self) -> int:
        """Bytes of an element of the student's weights and activations."""
        return DTYPE_BYTES[self.config.student.dtype]

    @property
    def teacher_bytes(self) -> int:
        return DTYPE_BYTES[self.config.teacher.dtype]

    @property
    def student_parallel(self) -> ParallelConfig:
        return self.config.parallel

    @property
    def teacher_parallel(self) -> ParallelConfig:
        return self.config.teacher.parallel or self.config.parallel

    def dp_size(self, parallel: ParallelConfig) -> int:
        return self.world_size // (parallel.tensor * parallel.pipeline * parallel.context)

    def num_micro_batches(self, parallel: ParallelConfig, tokens_per_micro_batch: int) -> int:
        """Micro-batches of a data-parallel rank, samples taken as equally long."""
        samples = -(-self.num_samples // self.dp_size(parallel))
        packed = max(1, tokens_per_micro_batch // self.tokens_per_sample)
        count = -(-samples // packed)
        if parallel.virtual_pipeline > 1:  # Megatron's interleaved schedule wants multiples of PP
            count = -(-count // parallel.pipeline) * parallel.pipeline
        return count

    def with_choice(
        self,
        student: ParallelConfig,
        teacher: ParallelConfig,
        recompute: Recompute,
        teacher_offload: bool,
        train_offload: bool,
    ) -> Workload:
        """The same step in other layouts."""
        c = self.config
        config = dataclasses.replace(
            c,
            parallel=student,
            teacher=dataclasses.replace(c.teacher, parallel=teacher, offload=teacher_offload),
            train=dataclasses.replace(c.train, recompute=recompute, offload=train_offload),
        )
        return dataclasses.replace(self, config=config)
