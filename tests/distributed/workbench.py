"""A layout in place with tiny models: students and a teacher's signals, as many as are asked for.

Everything here runs in the ranks of `tests.helpers.distributed.run_distributed`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megaopd.batch import PackedBatch, Prompt, Sample
from megaopd.config import (
    Config,
    LossConfig,
    OptimizerConfig,
    ParallelConfig,
    StudentConfig,
    TeacherConfig,
)
from megaopd.data.packing import Batching, Packing
from megaopd.models.arch import read_arch
from tests.helpers.tiny_models import make_tiny_model

VOCAB_SIZE = 509
# "sandwich" has QKV biases, and norms behind attention and MLP; "windows" such norms too, sliding
# windows with a RoPE of their own, and a scaled embedding.
FAMILIES_BY_HEAD = {
    "untied": "Qwen3ForCausalLM",
    "tied": "LlamaForCausalLM",
    "sandwich": "Glm4ForCausalLM",
    "windows": "Gemma3ForCausalLM",
}
TIED = ("tied", "windows")

# Parameter's canonical name -> this rank's shard of its gradient.
Gradients = dict[str, Tensor]


def make_models(folder: Path, *heads: str) -> None:
    """A student and a teacher for each kind of head, or for these, where `Workbench.config` looks
    for them."""
    for head in heads or FAMILIES_BY_HEAD:
        family = FAMILIES_BY_HEAD[head]
        sizes = {"vocab_size": VOCAB_SIZE, "tie_word_embeddings": head in TIED}
        make_tiny_model(folder / f"{head}_student", family, seed=2, num_hidden_layers=2, **sizes)
        make_tiny_model(folder / f"{head}_teacher", family, seed=1, **sizes)


def make_sample(index: int, num_prompt: int, num_response: int, mask: str = "") -> Sample:
    """A sample of random tokens, determined by `index`; the mask has an x per response token that
    the model produced."""
    generator = torch.Generator().manual_seed(index)
    ids = torch.randint(0, VOCAB_SIZE, (num_prompt + num_response,), generator=generator).tolist()
    flags = tuple(c == "x" for c in mask) or (True,) * num_response
    return Sample(
        Prompt(str(index), tuple(ids[:num_prompt])),
        0,
        tuple(ids[num_prompt:]),
        (-5.0,) * num_response,
        flags,
        "stop",
        0,
    )


# One has no response, and one no loss token; test_layout_gradients.py has ranks without any.
SAMPLES = (
    make_sample(0, 3, 6),
    make_sample(1, 4, 5, mask="xx..x"),
    make_sample(2, 3, 9),
    make_sample(3, 7, 0),
    make_sample(4, 2, 3, mask="..."),
    make_sample(5, 2, 7),
    make_sample(6, 5, 2),
)
NUM_LOSS_TOKENS = sum(sum(s.response_mask) for s in SAMPLES)


def token_weights(labels: Tensor) -> Tensor:
    """From 0 to 2, by the label alone: the same under every layout."""
    return (labels % 5) / 2


@dataclass(frozen=True)
class Workbench:
    """A layout in place: teacher's signals, and students as many as are asked for."""

    folder: Path
    parallel: ParallelConfig
    groups: Any
    packing: Packing | None = None  # None is two samples to a micro-batch

    @property
    def batching(self) -> Batching:
        two = Packing(micro_batch_size=2, pad_to_multiple=self.parallel.tensor)
        return Batching(self.groups.layout, self.packing or two)

    @property
    def micro_batches(self) -> list[PackedBatch]:
        assignment = self.batching.assign(SAMPLES)
        batches = self.batching.micro_batches(SAMPLES, assignment, self.groups.rank)
        return [
            replace(b, token_weights_T=token_weights(b.labels_T) * b.loss_mask_T) for b in batches
        ]

    def config(
        self,
        head: str,
        dtype: str,
        freeze: tuple[str, ...] = (),
        lr: float = 1e-2,
        loss: LossConfig | None = None,
    ) -> Config:
        return Config(
            student=StudentConfig(str(self.folder / f"{head}_student"), dtype, freeze),
            teacher=TeacherConfig(path=str(self.folder / f"{head}_teacher"), dtype=dtype),
            parallel=self.parallel,
            loss=loss or LossConfig(),
            # Clipping would scale the gradients that are looked at.
            optimizer=OptimizerConfig(lr=lr, warmup_steps=2, clip_grad=0.0),
        )

    def student(self, head: str, dtype: str = "fp32", **settings: Any) -> Any:
        """A new `MegatronStudent`; `settings` are those of `config`."""
        from megaopd.engine.student import MegatronStudent
        from megaopd.models.mapping import padded_vocab_size

        config = self.config(head, dtype, **settings)
        rows = padded_vocab_size(VOCAB_SIZE, self.parallel.tensor)
        arch = read_arch(config.student.path)
        return MegatronStudent(config, arch, self.groups, rows, VOCAB_SIZE)

    def signals(self, head: str, dtype: str = "fp32") -> list[Any]:
        from megaopd.models.mapping import padded_vocab_size
        from megaopd.teacher.megatron import MegatronTeacher

        config = self.config(head, dtype)
        rows = padded_vocab_size(VOCAB_SIZE, self.parallel.tensor)
        arch = read_arch(config.teacher.path)
        batching = self.batching
        teacher = MegatronTeacher(config.teacher, arch, self.groups, batching, batching, rows)
        return teacher.score(SAMPLES)


def with_layout(
    folder: Path, parallel: ParallelConfig, work: Callable[[Workbench], dict[str, Any]]
) -> dict[str, Any]:
    from megaopd.parallel import groups as parallel_groups

    groups = parallel_groups.initialize(parallel, torch.device("cpu"), seed=1)
    try:
        return work(Workbench(folder, parallel, groups))
    finally:
        parallel_groups.release()


def full_gradients(student: Any) -> Gradients:
    """After a step: the averaged gradients, the data-parallel ranks' shards put together again."""
    from megaopd.models import weights

    (ddp,) = student.ddp
    for buffer in ddp.buffers:
        group = buffer.data_parallel_group
        for bucket in buffer.buckets:
            shards = list(bucket.grad_data.chunk(group.size()))
            dist.all_gather(shards, shards[group.rank()].clone(), group=group)
    named = weights.named_parameters(student.chunks, student.arch)
    return {name: p.main_grad.clone() for name, p in named.items() if p.requires_grad}


def exported(student: Any, only_trainable: bool = False) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in student.export_weights(only_trainable)}
