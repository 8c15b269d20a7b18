"""The data that flows through a step, with its shapes.

Suffixes name logical dimensions: N samples, T packed tokens of one micro-batch on this rank,
S sequences in a pack, V vocabulary (a rank holds its shard), K top-k, H hidden size.

Alignment is a rule: position t of everything that ends in `_T` speaks about `labels_T[t]`. Labels
are shifted in `megaopd.data.packing` and nowhere else.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True)
class Prompt:
    """One prompt as the model sees it.

    Attributes:
        prompt_id: unique in its file.
        token_ids: the tokens after the chat template, if any.
        answer: the reference answer for the reward, or None.
        teacher: the name of the teacher that scores the samples of this prompt; empty is the
            run's one `teacher`, others are entries of `teachers`.
        teacher_token_ids: the prompt as the teacher sees it (privileged context); None is the same.
    """

    prompt_id: str
    token_ids: tuple[int, ...]
    answer: str | None = None
    teacher: str = ""
    teacher_token_ids: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Sample:
    """One response to a prompt.

    Attributes:
        prompt: the prompt.
        index: which of the n samples of this prompt this is, from 0.
        response_ids: R sampled token ids, the stop token included.
        response_logprobs: R log-probabilities of those tokens under the sampler's
            temperature-scaled, un-truncated softmax.
        response_mask: R flags; False on tokens that the model did not produce (tool output).
        finish_reason: "stop" (a stop token was sampled) or "length".
        weight_version: the version of the weights that sampled it; of several, the oldest.
        token_versions: R versions, where the weights changed on the way (a partial rollout); empty
            says that they are all weight_version. Off the mask they mean nothing.
        source: who wrote the response. One that the student did not sample has no sampler's
            log-probs (response_logprobs are 0) and no weight version that means anything.
    """

    prompt: Prompt
    index: int
    response_ids: tuple[int, ...]
    response_logprobs: tuple[float, ...]
    response_mask: tuple[bool, ...]
    finish_reason: str
    weight_version: int
    token_versions: tuple[int, ...] = ()
    source: Literal["student", "teacher", "data"] = "student"

    @property
    def sample_id(self) -> str:
        return f"{self.prompt.prompt_id}/{self.index}"

    @property
    def model_token_versions(self) -> list[int]:
        """The version of the weights that sampled each token that the model produced."""
        versions = self.token_versions or (self.weight_version,) * len(self.response_ids)
        return [v for v, own in zip(versions, self.response_mask, strict=True) if own]


@dataclass(frozen=True)
class Completion:
    """What a model added to a sequence of tokens in one go.

    Attributes:
        ids: the sampled token ids, the stop token included.
        logprobs: their log-probabilities under the sampler's temperature-scaled, un-truncated
            softmax; as many as `ids`.
        finish_reason: "stop" (a stop token was sampled) or "length".
        versions: the version of the weights that sampled each token; as many as `ids`.
    """

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: str
    versions: tuple[int, ...]


@dataclass(frozen=True)
class SamplingParams:
    """How to sample. `temperature=0` is greedy; `top_k=0` and `top_p=1` leave the softmax whole.

    Attributes:
        seed: with the prompt's id and the sample's index it determines the random numbers of a
            sample, whatever the batch or the number of ranks.
        stop_token_ids: sampling one of these ends the response ("stop").
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    n: int = 1
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()


@dataclass(frozen=True)
class PackedBatch:
    """One micro-batch: S sequences laid end to end.

    Under context parallelism every sequence is padded to a multiple of 2 x cp_size, cut into that
    many pieces, and rank r holds pieces r and 2 cp_size - 1 - r of each (zigzag, so that causal
    attention costs every rank the same); the `_T` tensors are this rank's T = cu_seqlens[-1] /
    cp_size tokens.

    Attributes:
        tokens_T: int64 input tokens.
        labels_T: int64, the token that follows tokens_T[t] in its own sequence (0 where there is
            none).
        positions_T: int64 position of tokens_T[t] in its sequence.
        loss_mask_T: bool, True where labels_T[t] is a response token that the model produced.
        rollout_logprobs_T: fp32 log-probability of labels_T[t] under the sampler, 0 off the mask.
        token_weights_T: fp32 weight of the token's loss.
        rows_T: int64, the place of labels_T[t] among all response tokens of the global batch (its
            samples end to end, tool tokens counted), -1 off the mask: the name under which the
            teacher's word on it travels.
        cu_seqlens: int32 [S + 1], starts of the sequences and the end, over all context-parallel
            ranks; the padding is a sequence too.
        sample_ids: the S' <= S ids of the real sequences, in order.
        teacher: the name of the teacher of all its samples (`Prompt.teacher`).
        advantages_T: fp32 advantage of labels_T[t], 0 off the mask; None where the loss has none.
        sampled_T: bool, True on the loss mask where the student sampled labels_T[t], so that
            rollout_logprobs_T speaks about it; None says everywhere on the mask.
    """

    tokens_T: Tensor
    labels_T: Tensor
    positions_T: Tensor
    loss_mask_T: Tensor
    rollout_logprobs_T: Tensor
    token_weights_T: Tensor
    rows_T: Tensor
    cu_seqlens: Tensor
    sample_ids: tuple[str, ...]
    teacher: str = ""
    advantages_T: Tensor | None = None
    sampled_T: Tensor | None = None

    @property
    def max_seqlen(self) -> int:
        return int((self.cu_seqlens[1:] - self.cu_seqlens[:-1]).max())

    def to(self, device: torch.device) -> PackedBatch:
        """The same micro-batch on `device`."""
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return replace(self, **moved)


class TeacherHead(Protocol):
    """A teacher's LM head, as this rank holds it."""

    def shard(self) -> Tensor:
        """This rank's rows of the head on its device, in the student's vocabulary partition,
        [V / tp_size, H]; rows past the teacher's vocabulary are 0. Another head of the run may
        leave the device for it."""
        ...


@dataclass(frozen=True)
class HiddenSignal:
    """The teacher's word on a micro-batch, as hidden states: exact and small.

    Attributes:
        hidden_LH: the teacher's last hidden states after its final norm, one row per loss token:
            row l speaks about the l-th True of the micro-batch's loss_mask_T. It may lie in host
            memory.
        head: the head that makes logits of them.
    """

    hidden_LH: Tensor
    head: TeacherHead


@dataclass(frozen=True)
class TopKSignal:
    """The teacher's word on a micro-batch, as its K likeliest tokens: of a teacher on servers.

    Row l speaks about the l-th True of loss_mask_T. Both may lie in host memory.

    Attributes:
        ids_LK: integer token ids of the student's vocabulary, distinct within a row; -1 where a row
            has fewer than K.
        logprobs_LK: fp32 log-probabilities at temperature 1, normalised over the whole vocabulary;
            those of ids -1 mean nothing.
    """

    ids_LK: Tensor
    logprobs_LK: Tensor


@dataclass(frozen=True)
class TokenSignal:
    """The teacher's word on a micro-batch, on the sampled tokens alone.

    Attributes:
        logprobs_L: fp32 log-probability at temperature 1 of the label at the l-th True of
            loss_mask_T. It may lie in host memory.
    """

    logprobs_L: Tensor


TeacherSignal = HiddenSignal | TopKSignal | TokenSignal
"""What a teacher says about a micro-batch; `megaopd.losses.objective` has an objective for each."""


@dataclass(frozen=True)
class TokenScores:
    """What student and teacher say about every response token of the global batch, fp32 [R] each,
    equal on every rank, on the CPU; addressed by `PackedBatch.rows_T`.

    All are at the loss's temperature, and 0 off the loss mask. What a teacher's kind of signal does
    not tell is NaN.

    Attributes:
        student_logprobs_R: log p of the sampled token, by the weights that are about to train.
        teacher_logprobs_R: log q of it.
        student_entropy_R: nats, over the whole vocabulary.
        teacher_entropy_R: likewise.
        divergence_R: the reverse KL(p || q) over the whole vocabulary.
    """

    student_logprobs_R: Tensor
    teacher_logprobs_R: Tensor
    student_entropy_R: Tensor
    teacher_entropy_R: Tensor
    divergence_R: Tensor
