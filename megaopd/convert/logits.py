"""Compares the logits of a checkpoint in Megatron with those of transformers.

Collective: every rank of the launch calls `compare_logits`. Both models compute in fp32.
"""

from __future__ import annotations

import gc
import os
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AutoModelForCausalLM

from megaopd.batch import Prompt, Sample
from megaopd.config import ParallelConfig
from megaopd.data.packing import pack
from megaopd.data.tokenizer import load_tokenizer
from megaopd.engine.schedule import forward_only
from megaopd.errors import CheckpointError, ConfigError
from megaopd.models.arch import ModelArch
from megaopd.models.build import build_model
from megaopd.models.hf_io import WeightSource
from megaopd.models.mapping import padded_vocab_size
from megaopd.models.weights import load_weights
from megaopd.parallel import groups as parallel_groups
from megaopd.parallel.groups import ParallelGroups

# Of the largest difference, relative to the largest logit.
TOLERANCE = 1e-4
_RANDOM_TOKENS = 48

SENTENCES = (
    "The distance between the two towns is 48 kilometres, and a train covers it in half an hour.",
    "def mean(values):\n    return sum(values) / len(values) if values else 0.0\n",
    "Wasser kocht auf Meereshöhe bei 100 °C, in den Bergen schon früher.",
    "Solve for x: 3x + 7 = 22. Subtracting 7 from both sides gives 3x = 15, so x = 5.",
    "今天的天气很好 我们打算下午去公园散步。",
    '{"name": "probe", "channels": [1, 2, 4, 8], "enabled": true, "gain": -0.5}',
    "She closed the book, looked out at the rain, and decided that the letter could wait.",
    "SELECT city, COUNT(*) FROM orders WHERE total > 100 GROUP BY city ORDER BY 2 DESC;",
)


@dataclass(frozen=True)
class LogitsCompared:
    """How far Megatron's logits are from transformers'.

    Attributes:
        tokens: positions that were compared.
        text: whether they are of text, else of random ids.
        difference: the largest absolute difference.
        magnitude: transformers' largest absolute logit.
        kl: of Megatron's distribution from transformers', mean over positions, in nats.
        same_greedy: positions at which both have the same most likely token.
    """

    tokens: int
    text: bool
    difference: float
    magnitude: float
    kl: float
    same_greedy: int

    @property
    def relative(self) -> float:
        return self.difference / max(self.magnitude, torch.finfo(torch.float32).tiny)

    def __str__(self) -> str:
        return (
            f"{self.tokens:,} positions of {'text' if self.text else 'random tokens'}: by at most "
            f"{self.difference:.2e}, {self.relative:.1e} of the largest logit, "
            f"{self.magnitude:.4g} (tolerance {TOLERANCE:.0e}); KL {self.kl:.1e} nats, greedy "
            f"token the same at {100 * self.same_greedy / self.tokens:.2f} %"
        )


def compare_logits(
    hf: Path,
    megatron: WeightSource,
    arch: ModelArch,
    parallel: ParallelConfig,
    device: torch.device,
    num_samples: int,
) -> LogitsCompared:
    """Runs both models on the same sequences; collective, the same result on every rank.

    Megatron's model is in the layout `parallel`. What remains of the launch, data-parallel ranks,
    computes the same once more, because expert-parallel ranks among them need one another.
    transformers' model is on one rank, after Megatron's has been freed.

    Args:
        hf: Hugging Face directory, for transformers.
        megatron: what Megatron's model is loaded from.

    Raises:
        CheckpointError: the logits differ by more than `TOLERANCE` of the largest one.
        ConfigError: the layout does not fit the model or the launch.
    """
    # Some GPU libraries round fp32 factors to 10 bits unless told otherwise.
    os.environ.setdefault("NVIDIA_TF32_OVERRIDE", "0")
    _check_layout(parallel)
    sequences, text = probe_sequences(hf, arch.vocab_size, num_samples)
    groups = parallel_groups.initialize(parallel, device, seed=1)
    ours = _megatron_logits(megatron, arch, parallel, groups, sequences)
    gc.collect()  # a model's parts refer to each other
    found: list[LogitsCompared | None] = [None] * dist.get_world_size()
    mine = None
    if ours:
        mine = _compare(ours, _transformers_logits(hf, device, sequences), text)
    dist.all_gather_object(found, mine)
    (compared,) = (one for one in found if one is not None)
    if not compared.relative <= TOLERANCE:  # NaN included
        raise CheckpointError(
            str(megatron.path),
            f"logits differ from transformers': {compared}",
            "if all tensors are equal, report the architecture: the network is built differently",
        )
    return compared


def _check_layout(parallel: ParallelConfig) -> None:
    world = dist.get_world_size()
    if world % (parallel.tensor * parallel.pipeline * parallel.expert):
        raise ConfigError(
            "--tensor, --pipeline, --expert",
            f"{parallel.tensor} x {parallel.pipeline} x {parallel.expert} does not divide the "
            f"{world} processes of the launch",
            "start as many with torchrun --nproc-per-node",
        )


def probe_sequences(hf: Path, vocab_size: int, number: int) -> tuple[list[list[int]], bool]:
    """Returns the token ids that both models are given, and whether they are text."""
    try:
        tokenizer = load_tokenizer(hf)
        encoded = [tokenizer(_text(i)).input_ids for i in range(number)]
    except ConfigError:
        encoded = [[]]
    # Without files of a tokenizer, transformers makes an empty one of the architecture's kind.
    if min(map(len, encoded)) >= 2 and max(map(max, encoded)) < vocab_size:
        return encoded, True
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab_size, (number, _RANDOM_TOKENS), generator=generator)
    return ids.tolist(), False


def _text(index: int) -> str:
    """Later rounds join two sentences, so that no text comes twice."""
    turn, first = divmod(index, len(SENTENCES))
    more = " " + SENTENCES[(first + turn) % len(SENTENCES)] if turn else ""
    return SENTENCES[first] + more


def _megatron_logits(
    source: WeightSource,
    arch: ModelArch,
    parallel: ParallelConfig,
    groups: ParallelGroups,
    sequences: list[list[int]],
) -> list[Tensor]:
    """Logits [T, V] of each sequence on the CPU, on one rank of the launch; elsewhere nothing."""
    chunks = build_model(
        arch, parallel, groups, "fp32", padded_vocab_size(arch.vocab_size, parallel.tensor)
    )
    load_weights(chunks, arch, source)
    for chunk in chunks:
        chunk.eval()
    last = chunks[-1]
    collected = forward_only(
        chunks,
        [pack([_sample(i, ids)]) for i, ids in enumerate(sequences)],
        groups,
        lambda i, batch, hidden: hidden[: len(sequences[i])] @ last.head.T,
    )
    logits = []
    for shard in collected:
        shards = [torch.empty_like(shard) for _ in range(parallel.tensor)]
        dist.all_gather(shards, shard.contiguous(), group=groups.tp)
        if groups.tp.rank() == groups.dp_cp.rank() == 0:
            logits.append(torch.cat(shards, -1)[:, : arch.vocab_size].cpu())
    parallel_groups.release()
    return logits


def _sample(index: int, ids: list[int]) -> Sample:
    rest = len(ids) - 1
    prompt, response = Prompt(str(index), tuple(ids[:1])), tuple(ids[1:])
    return Sample(prompt, 0, response, (0.0,) * rest, (True,) * rest, "stop", 0)


@torch.no_grad()
def _transformers_logits(
    hf: Path, device: torch.device, sequences: list[list[int]]
) -> list[Tensor]:
    model = AutoModelForCausalLM.from_pretrained(
        hf,
        dtype=torch.float32,
        local_files_only=True,
        trust_remote_code=False,
        use_safetensors=True,
    )
    model = model.eval().to(device)
    return [model(torch.tensor([ids], device=device)).logits[0].cpu() for ids in sequences]


def _compare(ours: list[Tensor], theirs: list[Tensor], text: bool) -> LogitsCompared:
    differences, magnitudes, kl, same = [], [], 0.0, 0
    for our, their in zip(ours, theirs, strict=True):
        differences.append((our - their).abs().max().item())
        magnitudes.append(their.abs().max().item())
        p, q = their.double().log_softmax(-1), our.double().log_softmax(-1)
        kl += (p.exp() * (p - q)).sum().item()
        same += int((our.argmax(-1) == their.argmax(-1)).sum())
    tokens = sum(map(len, theirs))
    # Of a NaN, max() would make whatever comes first.
    difference, magnitude = (torch.tensor(x).max().item() for x in (differences, magnitudes))
    return LogitsCompared(tokens, text, difference, magnitude, kl / tokens, same)
