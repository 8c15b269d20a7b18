"""Checks of the loop: the parts are built, take one step, and the engine gets the weights."""

from __future__ import annotations

import hashlib
import math
from contextlib import closing
from dataclasses import replace

import torch
from torch import Tensor

from megaopd.errors import EnvironmentFault, NumericError, RolloutError
from megaopd.metrics import MetricsWriter
from megaopd.parallel import groups as parallel_groups
from megaopd.parallel.device import init_distributed
from megaopd.train_loop import build_trainer
from megaopd.train_rollout import ENGINES, mixture
from megaopd.train_teachers import build_teacher, student_side
from megaopd.verify.setup import Setup
from megaopd.verify.table import Check, NotApplicable
from megaopd.verify.teachers import check_agreement, check_knowledge

# KL between engine and trainer, nats a token: what rounding amounts to.
MISMATCH = {"fp32": 1e-4, "bf16": 1e-2}
# What rounding leaves of the gradient where student and teacher are one.
NO_GRADIENT = 1e-6
_MISMATCH_FIX = (
    "a wrong RoPE, chat template, dtype or weight: compare the exported student's logits with "
    "tools/check_conversion.py, and start the servers with the student's dtype"
)


def _devices(setup: Setup) -> str:
    device = init_distributed()
    setup.groups = parallel_groups.initialize(setup.config.parallel, device, setup.config.run.seed)
    setup.side = student_side(setup.small, setup.inputs, setup.groups)
    if device.type != "cuda":
        return f"{setup.world_size} ranks on the CPU"
    free, total = torch.cuda.mem_get_info(device)
    if free < total / 2:
        raise EnvironmentFault(
            str(device),
            f"{free / 2**30:.0f} of {total / 2**30:.0f} GiB free",
            "end the other processes on it",
        )
    return f"{setup.world_size} ranks, {torch.cuda.get_device_name(device)}"


def _engine(setup: Setup) -> str:
    config, inputs, groups = setup.small, setup.inputs, setup.groups
    engine = ENGINES[config.rollout.kind](config, inputs, groups)
    setup.engine = setup.closing.enter_context(closing(engine))
    authors = mixture(config, inputs, groups, engine)
    setup.authors = setup.closing.enter_context(closing(authors))
    return f"{config.rollout.kind} answers"


def _teachers(setup: Setup) -> str:
    teacher = build_teacher(setup.small, setup.inputs, setup.side)
    setup.teacher = setup.closing.enter_context(closing(teacher))
    return ", ".join(name or "teacher" for name in setup.inputs.teacher_archs)


def _student(setup: Setup) -> str:
    student = setup.side.model()
    numbers = [p.numel() for chunk in student.chunks for p in chunk.parameters() if p.requires_grad]
    setup.trainer = build_trainer(
        setup.small,
        replace(
            setup.inputs,
            sampling=replace(
                setup.inputs.sampling, max_new_tokens=setup.small.rollout.max_new_tokens
            ),
        ),
        setup.side,
        engine=setup.engine,
        authors=setup.authors,
        teacher=setup.teacher,
        metrics=MetricsWriter(setup.small.run.dir, setup.small, enabled=False),
    )
    return f"{sum(numbers) / 1e6:.4g} M parameters in training on this rank"


def _step(setup: Setup) -> str:
    """Weights to the engine, samples, scores, forward, backward, update."""
    trainer = setup.trainer
    trainer.weight_sync.sync(trainer.student, setup.engine, version=0)
    setup.result = result = trainer.step(1)
    norm = result.metrics["train/grad_norm"]
    if result.skipped or not math.isfinite(norm):
        raise NumericError(
            "first step",
            f"loss or gradient is not finite (gradient norm {norm})",
            "look at the teacher's weights, and try student.dtype=fp32",
        )
    losses = [
        f"{name} {value:.4g}"
        for name, value in result.metrics.items()
        if name.startswith("loss/") and not name.endswith("fraction")
    ]
    done = f"{result.num_tokens} tokens, {', '.join(losses)}"
    credit = setup.config.credit
    by_reward = credit.weights == "paced" or (
        setup.config.loss.objective == "policy_gradient" and not credit.teacher_coef
    )
    if norm < NO_GRADIENT and by_reward:
        return f"{done}, no gradient: the samples of every prompt had one and the same reward"
    if norm < NO_GRADIENT:
        raise NumericError(
            "first step",
            f"the gradient's norm is {norm:.1g} ({', '.join(losses)})",
            "student and teacher are one and see the same prompt: set data.teacher_prompt_column, "
            "or another teacher; or student.freeze leaves nothing to train",
        )
    return f"{done}, gradient norm {norm:.3g}"


def _mismatch(setup: Setup) -> str:
    """The sampler's log-probs of its tokens are the trainer's."""
    if setup.config.rollout.kind == "recorded":
        raise NotApplicable("a recording holds what other weights sampled")
    if "rollout/mismatch_kl" not in setup.result.metrics:
        raise NotApplicable("no sample of the step is the student's")
    return _checked_mismatch(setup, setup.result.metrics["rollout/mismatch_kl"])


def _checked_mismatch(setup: Setup, mismatch: float) -> str:
    limit = MISMATCH[setup.config.student.dtype]
    if not mismatch <= limit:
        raise RolloutError(
            "rollout/mismatch_kl",
            f"{mismatch:.2g} nats a token between engine and trainer, at most {limit:g}",
            _MISMATCH_FIX,
        )
    return f"{mismatch:.1g} nats a token between engine and trainer"


def _weight_sync(setup: Setup) -> str:
    """The engine has the weights of after the step: by checksum, and by what it samples."""
    from megaopd.rollout.embedded import EmbeddedEngine

    trainer, engine = setup.trainer, setup.engine
    if setup.config.rollout.kind == "recorded":
        raise NotApplicable("a recording takes no weights")
    if engine.weight_version == 0:  # training does not ask the student: the step has no need
        trainer.weight_sync.sync(trainer.student, engine, version=1)
    compared = "the servers' checksums agree"
    if isinstance(engine, EmbeddedEngine):
        held, num_equal = engine.weights(), 0
        for name, tensor in trainer.student.export_weights():
            if _sha256(tensor) != _sha256(held[name]):
                raise RolloutError(
                    f"weight {name}",
                    "differs between trainer and engine after a weight sync",
                    "report it: the engine takes what the trainer exports",
                )
            num_equal += 1
        compared = f"SHA-256 of {num_equal} tensors agree"
    prompts = setup.inputs.train_prompts[: max(1, setup.small.train.global_batch_size)]
    params = replace(trainer.sampling, n=1, seed=1)
    with trainer.student.off_device():
        samples = engine.generate(prompts, params)
    batching = setup.side.batching
    batches = batching.micro_batches(samples, batching.assign(samples), setup.groups.rank)
    result = trainer.student.evaluate(batches, setup.teacher.score(samples))
    mismatch = _checked_mismatch(setup, result.metrics["rollout/mismatch_kl"])
    return f"version {engine.weight_version}: {compared}; {mismatch}"


def _sha256(tensor: Tensor) -> str:
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(flat.numpy().data).hexdigest()


ON_DEVICES: dict[str, Check] = {
    "devices": Check(_devices, ("data",), collective=True),
    "rollout engine": Check(_engine, ("devices",), collective=True),
    "teacher loads": Check(_teachers, ("devices",), collective=True),
    "teacher beats noise": Check(check_knowledge, ("teacher loads",), collective=True),
    "teacher and itself": Check(check_agreement, ("teacher loads",), collective=True),
    "student loads": Check(_student, ("rollout engine", "teacher loads"), collective=True),
    "one training step": Check(_step, ("student loads",), collective=True),
    "rollout mismatch": Check(_mismatch, ("one training step",), collective=True),
    "weight sync": Check(_weight_sync, ("one training step",), collective=True),
}
"""Checks on the run's own ranks, in order."""
