"""Bytes on a rank in each phase of a step."""

from __future__ import annotations

from dataclasses import dataclass, field

from megaopd.models.mapping import padded_vocab_size
from megaopd.parallel.layout import Layout
from megaopd.plan.activations import scoring_activations, training_activations
from megaopd.plan.parameters import num_copies, rank_parameters, total_parameters
from megaopd.plan.workload import Workload

PHASES = ("rollout", "teacher", "student", "optimizer")
FP32 = 4
# The tokens of a chunk of the loss on a GPU where loss.chunk_tokens is null, and the rows of the
# head whose gradient is made at a time (megaopd/losses/fused.py).
CHUNK_TOKENS, HEAD_BLOCK = 2048, 8192


@dataclass(frozen=True)
class RankMemory:
    """What ranks of one kind hold, by phase.

    Attributes:
        ranks: the ranks that hold exactly this.
        student_stage, teacher_stage: their pipeline stages.
        phases: phase -> what -> bytes on the device.
        host: what -> bytes of pinned host memory, at most at any time.
    """

    ranks: tuple[int, ...]
    student_stage: int
    teacher_stage: int
    phases: dict[str, dict[str, int]] = field(hash=False)
    host: dict[str, int] = field(hash=False)

    def total(self, phase: str) -> int:
        return sum(self.phases[phase].values())

    @property
    def worst_phase(self) -> str:
        return max(PHASES, key=self.total)

    @property
    def peak(self) -> int:
        return self.total(self.worst_phase)


def plan_memory(work: Workload) -> list[RankMemory]:
    """Every kind of rank of the layouts in `work.config`, by its first rank."""
    student = Layout(work.student_parallel, work.world_size)
    teacher = Layout(work.teacher_parallel, work.world_size)
    kinds: dict[tuple[int, int, bool], list[int]] = {}
    for rank in range(work.world_size):
        s, t = student.coordinates(rank), teacher.coordinates(rank)
        kinds.setdefault((s.pp, t.pp, _owns_head_shard(work, rank)), []).append(rank)
    return [_rank_memory(work, tuple(ranks), *kind) for kind, ranks in kinds.items()]


def _owns_head_shard(work: Workload, rank: int) -> bool:
    """Whether a rank's own part of the teacher's head holds the rows of the student's partition."""
    s, t = work.student_parallel, work.teacher_parallel
    at_s = Layout(s, work.world_size).coordinates(rank)
    at_t = Layout(t, work.world_size).coordinates(rank)
    if at_s.pp < s.pipeline - 1 or at_t.pp < t.pipeline - 1:
        return False
    wanted = padded_vocab_size(work.student.vocab_size, s.tensor) // s.tensor
    own = padded_vocab_size(work.teacher.vocab_size, t.tensor) // t.tensor
    return at_t.tp * own <= at_s.tp * wanted and (at_s.tp + 1) * wanted <= (at_t.tp + 1) * own


def loss_chunk(work: Workload) -> dict[str, int]:
    """Bytes that the divergence of one micro-batch allocates (megaopd/losses/fused.py).

    Logits of both models for one chunk, the head's gradient (fp32 where chunks of a narrower type
    are summed, and then the product of a block of rows beside it), the hidden gradient, the
    hidden states and their copies at the loss tokens. With a single chunk the teacher's logits are
    freed before the head's gradient is made.
    """
    tp, bs, bt = work.student_parallel.tensor, work.student_bytes, work.teacher_bytes
    hs, ht = work.student.hidden_size, work.teacher.hidden_size
    rows = padded_vocab_size(work.student.vocab_size, tp) // tp
    tokens = loss_tokens_per_micro_batch(work)
    most = work.config.loss.chunk_tokens or CHUNK_TOKENS
    num_chunks = max(1, -(-tokens // most))
    # An explicit chunk is taken as it is; the default one is made to come out even.
    chunk = min(most, tokens) if work.config.loss.chunk_tokens else -(-tokens // num_chunks)
    logits_student, logits_teacher = chunk * rows * bs, chunk * rows * bt
    head_gradient = rows * hs * (bs if num_chunks == 1 else FP32)
    if num_chunks == 1:
        logits = max(logits_student + logits_teacher, logits_student + head_gradient)
        buffers = {"loss chunk": max(0, logits - head_gradient), "head gradient": head_gradient}
    else:
        product = 0 if bs == FP32 else min(HEAD_BLOCK, rows) * hs * bs
        buffers = {
            "loss chunk": logits_student + logits_teacher + product,
            "head gradient": head_gradient,
        }
    whole = -(-work.tokens_per_micro_batch // work.student_parallel.context)
    buffers["loss rows"] = tokens * (2 * hs * bs + ht * bt) + whole * hs * bs
    return buffers


def loss_tokens_per_micro_batch(work: Workload) -> int:
    """Loss tokens of a micro-batch on one rank, of samples with the mean share of response."""
    tokens = -(-work.tokens_per_micro_batch // work.student_parallel.context)
    return -(-tokens * work.loss_tokens_per_sample // work.tokens_per_sample)


def cached_rows(work: Workload) -> int:
    """Rows of the teacher's hidden states that a last-stage rank of the student keeps per step."""
    p = work.student_parallel
    return -(-work.num_loss_tokens // (work.dp_size(p) * p.context))


def _rank_memory(
    work: Workload, ranks: tuple[int, ...], s_stage: int, t_stage: int, owns_head: bool
) -> RankMemory:
    config, s, t = work.config, work.student_parallel, work.teacher_parallel
    bs, bt, world = work.student_bytes, work.teacher_bytes, work.world_size
    student = rank_parameters(
        *(work.student, s, world, s_stage, config.student.freeze, config.student.lora)
    )
    teacher = rank_parameters(work.teacher, t, world, t_stage)

    student_weights = student.stored * bs
    state = {
        "gradients": student.gradients * FP32,
        "optimizer state": 2 * student.optimizer_shard * FP32,
        # With fp32 weights the optimizer updates them in place.
        "main weights": student.optimizer_shard * FP32 if bs < FP32 else 0,
    }
    # Of a student without its adapters there is one copy.
    teacher_weights = 0 if config.teacher.kind == "base" else teacher.numel * bt
    is_last = s_stage == s.pipeline - 1
    tp = s.tensor
    head = padded_vocab_size(work.student.vocab_size, tp) // tp * work.teacher.hidden_size * bt
    head = head if is_last else 0
    engine = embedded_engine(work) if config.rollout.kind == "embedded" else {}
    copy = {"engine weights": engine["engine weights"]} if engine else {}
    resident = {"student weights": student_weights, **copy}
    generating = copy if config.train.offload else resident
    away = {} if config.train.offload else state
    average = {}
    if config.teacher.kind == "ema":  # kept in parts by the ranks that hold the same weights
        dense, experts = num_copies(t, world)
        parts = -(-(teacher.numel - teacher.expert) // dense) - (-teacher.expert // experts)
        average = {"teacher average": parts * FP32}
    teacher_idle = {} if config.teacher.offload else {"teacher weights": teacher_weights, **average}
    # While the teacher's own weights are there, its own rows of the head need no second copy.
    head_idle = {"teacher head shard": head if config.teacher.offload or not owns_head else 0}

    scoring = scoring_activations(
        work.teacher,
        t,
        t_stage,
        tokens=-(-work.teacher_tokens_per_micro_batch // t.context),
        dtype_bytes=bt,
    )
    training = training_activations(
        work.student,
        s,
        s_stage,
        tokens=-(-work.tokens_per_micro_batch // s.context),
        num_micro_batches=work.num_micro_batches(s, work.tokens_per_micro_batch),
        dtype_bytes=bs,
        recompute=config.train.recompute,
    )
    phases = {
        "rollout": {
            **generating,
            **away,
            **teacher_idle,
            **head_idle,
            **engine,
        },
        "teacher": {
            **resident,
            **away,
            **teacher_idle,
            "teacher weights": teacher_weights,  # a head apart from them is away
            "activations": scoring.working,
        },
        "student": {
            **resident,
            **state,
            **teacher_idle,
            **head_idle,
            "activations": training.saved,
            "working set": training.working,
            **(loss_chunk(work) if is_last else {}),
        },
        "optimizer": {**resident, **state, **teacher_idle, **head_idle},
    }
    cache = cached_rows(work) * work.teacher.hidden_size * bt if is_last else 0
    host = {"teacher cache": cache, "teacher head shard": head_idle["teacher head shard"]}
    if config.teacher.offload:
        host |= {"teacher weights": teacher_weights, **average}
    if config.train.offload:
        # Gradients are dropped: nobody needs them after the step.
        host["student weights"] = student_weights
        host["student state"] = sum(state.values()) - state["gradients"]
    phases = {phase: {k: v for k, v in parts.items() if v} for phase, parts in phases.items()}
    return RankMemory(ranks, s_stage, t_stage, phases, {k: v for k, v in host.items() if v})


def embedded_engine(work: Workload) -> dict[str, int]:
    """The embedded engine's whole copy of the student, KV cache and the logits of one position."""
    arch, b = work.student, work.student_bytes
    c = work.config
    samples = -(-work.num_samples // work.world_size)
    batch = min(c.rollout.batch_size, samples)
    longest = c.data.max_prompt_tokens + c.rollout.max_new_tokens
    kv = 2 * arch.num_layers * arch.num_kv_heads * arch.head_dim * b
    return {
        "engine weights": total_parameters(arch) * b,
        "KV cache": batch * longest * kv,
        "sampling": batch * arch.vocab_size * (b + FP32),
    }
