"""Rules of a configuration that no single type can state: ranges, divisibility, what needs what.

`validate` needs no file, `validate_models` the architectures; both run before any weight is read,
on every rank alike. Those of a layout are in `megaopd.config_layouts`, those of servers in
`megaopd.config_servers`. A rule is a few lines and a row in tests/unit/test_config.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

from megaopd.config_layouts import Architecture, check_model, check_ranks
from megaopd.config_loss import check_loss
from megaopd.config_mixture import check_mixture
from megaopd.config_schema import nearest
from megaopd.config_secrets import check_secrets
from megaopd.config_servers import check_host, check_rollout_servers, check_teacher_servers
from megaopd.config_teachers import WITH_PATH, check_teachers
from megaopd.errors import ConfigError
from megaopd.interruption import wall_time_s

if TYPE_CHECKING:
    from megaopd.config import Config, ParallelConfig, TeacherConfig

# Range in words, its test, and the fields that must lie in it (where neither they nor their section
# are null); those of `teacher` hold for every teacher.
_RANGES: tuple[tuple[str, Callable[[float], bool], tuple[str, ...]], ...] = (
    (
        "a positive number",
        lambda v: v > 0,
        (
            *("data.max_prompt_tokens", "rollout.max_new_tokens"),
            *("rollout.n", "rollout.batch_size", "loss.temperature", "loss.chunk_tokens"),
            *("eval.n", "credit.reward_beta"),
            *("optimizer.lr", "optimizer.eps", "train.num_steps", "train.global_batch_size"),
            *("train.micro_batch_size", "train.max_skipped_steps"),
            *("train.max_tokens_per_micro_batch", "teacher.max_tokens_per_micro_batch"),
            *("rollout.sglang.num_servers", "rollout.sglang.tensor", "rollout.sglang.bucket_bytes"),
            *("rollout.sglang.progress_timeout_s", "rollout.sglang.health_interval_s"),
            *("rollout.sglang.start_timeout_s", "rollout.agent.max_turns"),
            *("rollout.agent.tool_timeout_s", "rollout.agent.max_tool_tokens"),
            *("student.lora.rank", "student.lora.alpha", "deadline.silence_s"),
            *("checkpoint.keep_last", "guard.window"),
        ),
    ),
    (
        "0 or more",
        lambda v: v >= 0,
        (
            *("run.seed", "rollout.temperature", "rollout.top_k", "optimizer.min_lr"),
            *("optimizer.warmup_steps", "optimizer.weight_decay", "optimizer.clip_grad"),
            *("eval.num_prompts", "eval.interval", "log.num_report_samples"),
            *("eval.temperature", "eval.top_k"),
            *("student.router_aux_loss_coef", "teacher.top_k", "rollout.max_staleness"),
            *("rollout.sglang.max_tokens_in_flight", "rollout.sglang.max_retries"),
            *("rollout.sglang.max_restarts", "loss.entropy_coef", "loss.clip_high"),
            *("credit.paced_a", "credit.paced_b", "log.report_interval"),
            *("checkpoint.interval", "checkpoint.keep_every", "guard.patience"),
            *("guard.loss_spike", "guard.mismatch_kl", "deadline.start_s", "deadline.rollout_s"),
            *("deadline.teacher_s", "deadline.student_s", "deadline.weight_sync_s"),
            *("deadline.eval_s", "deadline.checkpoint_s"),
        ),
    ),
    (
        "a value in [0, 1]",
        lambda v: 0 <= v <= 1,
        (
            *("loss.beta", "loss.icepop_low", "loss.clip_low"),
            *("credit.discount", "credit.paced_memory"),
            *("rollout.mixture.on_policy", "rollout.mixture.teacher"),
        ),
    ),
    ("a port from 1 to 65535, or 0", lambda v: 0 <= v <= 65535, ("log.prometheus_port",)),
    # Tokens of the weights that train them have the ratio 1: they are neither cut nor left out.
    ("1 or more", lambda v: v >= 1, ("loss.importance_cap", "loss.icepop_high")),
    (
        "a value in [0, 1)",
        lambda v: 0 <= v < 1,
        ("optimizer.beta1", "optimizer.beta2", "teacher.ema_decay"),
    ),
    (
        "a value in (0, 1]",
        lambda v: 0 < v <= 1,
        ("rollout.top_p", "eval.top_p", "loss.selection_ratio"),
    ),
)


def validate(
    config: Config,
    world_size: int,
    student_arch: Architecture | None = None,
    teacher_arch: Architecture | None = None,
    *,
    divergences: Collection[str] | None = None,
    rewards: Collection[str] | None = None,
    tools: Collection[str] | None = None,
    environ: Mapping[str, str] = os.environ,
) -> None:
    """Checks a configuration against the number of ranks, and against the models where given.

    Args:
        world_size: ranks of the run.
        student_arch, teacher_arch: architectures; given both, `validate_models` runs too.
        divergences: the names that loss.kind may take; None does not check it.
        rewards: the names that eval.reward may take; None does not check it. A path.py:function is
            the affair of whoever loads it.
        tools: the names that rollout.agent.tools may hold; None does not check them.
        environ: environment variables, which hold the keys of servers.

    Raises:
        ConfigError: the first rule that does not hold.
    """
    check_secrets(config, environ)
    _check_ranges(config)
    _check_choices(config, divergences, rewards, tools)
    _check_needs(config)
    check_teachers(config, _teachers(config))
    check_mixture(config, _teachers(config))
    check_loss(config, _teachers(config), divergences)
    check_rollout_servers(config, environ)
    for key, teacher in _teachers(config).items():
        check_teacher_servers(key, teacher, environ)
    check_host("log.prometheus_host", config.log.prometheus_host)
    _check_sizes(config, world_size)
    if student_arch is not None and teacher_arch is not None:
        validate_models(config, student_arch, teacher_arch)


def validate_models(
    config: Config,
    student_arch: Architecture,
    teacher_arch: Architecture,
    teachers: Mapping[str, Architecture] | None = None,
) -> None:
    """Checks the layouts and the lengths against all models.

    Args:
        teachers: architectures of the entries of `config.teachers`, by name.

    Raises:
        ConfigError: a model that its layout does not divide, a prompt and response together longer
            than a context, or a load-balancing loss for a model without experts.
    """
    archs = {"student": student_arch, "teacher": teacher_arch}
    archs |= {f"teacher {name}": arch for name, arch in (teachers or {}).items()}
    for where, role, parallel in _layouts(config):
        if role in archs:
            check_model(where, role, parallel, archs[role], trained=role == "student")
    prompt, response = config.data.max_prompt_tokens, config.rollout.max_new_tokens
    for role, arch in archs.items():
        if prompt + response > arch.max_positions:
            raise ConfigError(
                "data.max_prompt_tokens + rollout.max_new_tokens",
                f"{prompt} + {response} = {prompt + response} tokens, longer than the {role}'s "
                f"context of {arch.max_positions}",
                "lower one of them",
            )
    if config.student.router_aux_loss_coef and student_arch.moe is None:
        raise ConfigError(
            "student.router_aux_loss_coef",
            f"{config.student.router_aux_loss_coef}, and the student is not a mixture of experts",
            "set it to 0",
        )


def _teachers(config: Config) -> dict[str, TeacherConfig]:
    """All teachers by their key."""
    named = {f"teachers.{name}": teacher for name, teacher in config.teachers.items()}
    return {"teacher": config.teacher, **named}


def _layouts(config: Config) -> list[tuple[str, str, ParallelConfig]]:
    """(key, role, layout) of the student and of every teacher on its ranks."""
    layouts = [("parallel", "student", config.parallel)]
    for key, teacher in _teachers(config).items():
        if teacher.kind == "sglang":
            continue  # its servers' own affair
        role = key.replace("teachers.", "teacher ")
        where = "parallel" if teacher.parallel is None else f"{key}.parallel"
        layouts.append((where, role, teacher.parallel or config.parallel))
    return layouts


def _check_ranges(config: Config) -> None:
    for expected, holds, keys in _RANGES:
        for key in keys:
            section, *names = key.split(".")
            parts: dict[str, Any] = {section: getattr(config, section)}
            if section == "teacher":
                parts = {**_teachers(config)}
            for where, value in parts.items():
                for name in names:
                    value = None if value is None else getattr(value, name)
                    where = f"{where}.{name}"
                if value is not None and not holds(value):
                    raise ConfigError(where, f"found {value}", f"expected {expected}")
    if config.loss.kind.startswith("skew_") and not 0 <= config.loss.alpha < 1:
        found = f"found {config.loss.alpha} for {config.loss.kind}"
        raise ConfigError(
            "loss.alpha", found, "expected a value in [0, 1), for 1 is no loss at all"
        )


def _check_choices(
    config: Config,
    divergences: Collection[str] | None,
    rewards: Collection[str] | None,
    tools: Collection[str] | None,
) -> None:
    asked = config.rollout.agent.tools if config.rollout.agent else ()
    for key, value, names in (
        ("loss.kind", config.loss.kind, divergences),
        ("eval.reward", config.eval.reward, rewards),
        ("credit.reward", config.credit.reward or config.eval.reward, rewards),
        *((f"rollout.agent.tools[{i}]", tool, tools) for i, tool in enumerate(asked)),
    ):
        own_reward = key.endswith(".reward") and ".py:" in value
        if names is not None and value not in names and not own_reward:
            close = nearest(value, names)
            guess = f"did you mean {close}? " if close else ""
            raise ConfigError(key, f"no {value!r}", f"{guess}choose one of {', '.join(names)}")


def _check_needs(config: Config) -> None:
    if config.student.lora and config.student.freeze:
        raise ConfigError(
            "student.freeze",
            "set together with student.lora, which freezes all weights",
            "set student.freeze=[], and student.lora.targets to the layers that are to learn",
        )
    required = {"student.path": config.student.path, "data.train": config.data.train}
    for key, teacher in _teachers(config).items():
        if teacher.kind in WITH_PATH:
            required[f"{key}.path"] = teacher.path
    for key, value in required.items():
        if not value:
            raise ConfigError(key, "not set", f"give {key}=PATH or set it in the YAML file")
    rollout = config.rollout
    if rollout.agent and not rollout.agent.tools:
        raise ConfigError(
            "rollout.agent.tools", "none", "name the tools, or set rollout.agent=null"
        )
    if rollout.kind == "recorded" and not rollout.path:
        raise ConfigError(
            "rollout.path", "not set, and rollout.kind is recorded", "name the recording to replay"
        )
    if rollout.kind == "recorded" and config.data.eval:
        raise ConfigError(
            "data.eval", "set, and recorded rollouts cannot answer other prompts", "set data.eval="
        )
    if rollout.record and rollout.record == rollout.path:
        raise ConfigError(
            "rollout.record", "the recording that is replayed", "record to another file"
        )
    if config.eval.interval and not config.data.eval:
        raise ConfigError(
            "eval.interval", f"{config.eval.interval} without data.eval", "set data.eval as well"
        )
    if config.eval.n > 1 and config.eval.temperature == 0:
        raise ConfigError(
            "eval.n",
            f"{config.eval.n} at eval.temperature 0, where all samples are the same",
            "set eval.temperature=1, or eval.n=1",
        )
    wall_time_s(config.train.max_wall_time)
    optimizer = config.optimizer
    if optimizer.min_lr > optimizer.lr:
        raise ConfigError(
            "optimizer.min_lr", f"{optimizer.min_lr} > optimizer.lr {optimizer.lr}", "lower it"
        )
    if optimizer.decay != "constant" and optimizer.warmup_steps >= config.train.num_steps:
        raise ConfigError(
            "optimizer.warmup_steps",
            f"{optimizer.warmup_steps} of train.num_steps {config.train.num_steps} leave no step "
            f"for the {optimizer.decay} decay",
            "warm up for fewer steps",
        )


def _check_sizes(config: Config, world_size: int) -> None:
    for where, role, parallel in _layouts(config):
        check_ranks(where, role, parallel, world_size)
    _check_token_budgets(config)
    parallel, train = config.parallel, config.train
    model_size = parallel.tensor * parallel.pipeline * parallel.context
    data_size = world_size // model_size
    unit = data_size * train.micro_batch_size
    # A token budget makes micro-batches of any number of samples.
    if train.max_tokens_per_micro_batch is None and train.global_batch_size % unit:
        raise ConfigError(
            "train.global_batch_size",
            f"{train.global_batch_size} is not a multiple of data-parallel size {data_size} "
            f"(= {world_size} / {model_size}) x train.micro_batch_size {train.micro_batch_size} "
            f"= {unit}",
            f"choose a multiple of {unit}, another micro-batch size, or "
            "train.max_tokens_per_micro_batch",
        )
    if train.global_batch_size % config.rollout.n:
        raise ConfigError(
            "train.global_batch_size",
            f"{train.global_batch_size} is not a multiple of rollout.n {config.rollout.n}, the "
            "samples per prompt",
            f"choose a multiple of {config.rollout.n}",
        )


def _check_token_budgets(config: Config) -> None:
    """Every budget holds the longest sequence, padded as context parallelism cuts it."""
    prompt, response = config.data.max_prompt_tokens, config.rollout.max_new_tokens
    budgets = [("train", config.train.max_tokens_per_micro_batch, config.parallel)]
    for key, teacher in _teachers(config).items():
        if teacher.kind == "sglang":
            continue
        budget = teacher.max_tokens_per_micro_batch or config.train.max_tokens_per_micro_batch
        owner = key if teacher.max_tokens_per_micro_batch else "train"
        budgets.append((owner, budget, teacher.parallel or config.parallel))
    for owner, budget, parallel in budgets:
        longest, padding = prompt + response, ""
        if parallel.context > 1:
            pieces = 2 * parallel.context
            longest = -(-longest // pieces) * pieces
            padding = (
                f", padded to {longest} = {longest // pieces} x 2 x context {parallel.context}"
            )
        if budget is not None and budget < longest:
            raise ConfigError(
                f"{owner}.max_tokens_per_micro_batch",
                f"{budget} is less than the {longest} tokens of the longest sequence "
                f"(data.max_prompt_tokens {prompt} + rollout.max_new_tokens {response} = "
                f"{prompt + response}{padding})",
                f"give at least {longest}, or shorten the sequences",
            )
