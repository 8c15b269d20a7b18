"""Rules of a configuration that no single type can state: ranges, divisibility, what needs what.

`validate` needs no file, `validate_models` the two architectures; both run before any weight is
read, on every rank alike. A rule is a few lines here and a row in tests/unit/test_config.py.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any, Protocol

from megaopd.config_schema import nearest
from megaopd.errors import ConfigError

if TYPE_CHECKING:
    from megaopd.config import Config


class Architecture(Protocol):
    """What the rules ask of a model, read from its config.json."""

    @property
    def num_layers(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def max_positions(self) -> int: ...


# Range in words, its test, and the fields that must lie in it (where they are not null).
_RANGES: tuple[tuple[str, Callable[[float], bool], tuple[str, ...]], ...] = (
    (
        "a positive number",
        lambda v: v > 0,
        (
            *("parallel.tensor", "parallel.pipeline", "parallel.context"),
            *("data.max_prompt_tokens", "rollout.max_new_tokens"),
            *("rollout.n", "rollout.batch_size", "loss.temperature", "loss.chunk_tokens"),
            *("optimizer.lr", "optimizer.eps", "train.num_steps", "train.global_batch_size"),
            *("train.micro_batch_size", "train.max_skipped_steps"),
        ),
    ),
    (
        "0 or more",
        lambda v: v >= 0,
        (
            *("run.seed", "rollout.temperature", "rollout.top_k", "optimizer.min_lr"),
            *("optimizer.warmup_steps", "optimizer.weight_decay", "optimizer.clip_grad"),
            *("eval.num_prompts", "eval.interval", "log.num_report_samples"),
        ),
    ),
    ("a value in [0, 1]", lambda v: 0 <= v <= 1, ("loss.beta",)),
    ("a value in [0, 1)", lambda v: 0 <= v < 1, ("optimizer.beta1", "optimizer.beta2")),
    ("a value in (0, 1]", lambda v: 0 < v <= 1, ("rollout.top_p",)),
)
_REQUIRED = ("student.path", "teacher.path", "data.train")


def validate(
    config: Config,
    world_size: int,
    student_arch: Architecture | None = None,
    teacher_arch: Architecture | None = None,
    *,
    divergences: Collection[str] | None = None,
    rewards: Collection[str] | None = None,
) -> None:
    """Checks a configuration against the number of ranks, and against the models where given.

    Args:
        world_size: ranks of the run.
        student_arch, teacher_arch: architectures; given both, `validate_models` runs too.
        divergences: the names that loss.kind may take; None does not check it.
        rewards: the names that eval.reward may take; None does not check it.

    Raises:
        ConfigError: the first rule that does not hold.
    """
    _check_ranges(config)
    _check_choices(config, divergences, rewards)
    _check_needs(config)
    _check_sizes(config, world_size)
    if student_arch is not None and teacher_arch is not None:
        validate_models(config, student_arch, teacher_arch)


def validate_models(config: Config, student_arch: Architecture, teacher_arch: Architecture) -> None:
    """Checks the layout and the lengths against both models.

    Raises:
        ConfigError: heads or KV heads that TP does not divide, layers that PP does not divide, or a
            prompt and response together longer than a context.
    """
    tensor, pipeline = config.parallel.tensor, config.parallel.pipeline
    for role, arch in (("student", student_arch), ("teacher", teacher_arch)):
        divisible = (
            ("tensor", tensor, arch.num_heads, "attention heads"),
            ("tensor", tensor, arch.num_kv_heads, "KV heads"),
            ("pipeline", pipeline, arch.num_layers, "layers"),
        )
        for key, size, count, what in divisible:
            if count % size:
                raise ConfigError(
                    f"parallel.{key}",
                    f"{size} does not divide the {role}'s {count} {what} "
                    f"({count} = {count // size} x {size} + {count % size})",
                    f"choose one of {_divisors(count)}",
                )
        prompt, response = config.data.max_prompt_tokens, config.rollout.max_new_tokens
        if prompt + response > arch.max_positions:
            raise ConfigError(
                "data.max_prompt_tokens + rollout.max_new_tokens",
                f"{prompt} + {response} = {prompt + response} tokens, longer than the {role}'s "
                f"context of {arch.max_positions}",
                "lower one of them",
            )


def _check_ranges(config: Config) -> None:
    for expected, holds, keys in _RANGES:
        for key in keys:
            value = _value(config, key)
            if value is not None and not holds(value):
                raise ConfigError(key, f"found {value}", f"expected {expected}")
    if config.loss.kind.startswith("skew_") and not 0 <= config.loss.alpha < 1:
        found = f"found {config.loss.alpha} for {config.loss.kind}"
        raise ConfigError(
            "loss.alpha", found, "expected a value in [0, 1), for 1 is no loss at all"
        )


def _value(config: Config, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


def _check_choices(
    config: Config, divergences: Collection[str] | None, rewards: Collection[str] | None
) -> None:
    for key, value, names in (
        ("loss.kind", config.loss.kind, divergences),
        ("eval.reward", config.eval.reward, rewards),
    ):
        if names is not None and value not in names:
            close = nearest(value, names)
            guess = f"did you mean {close}? " if close else ""
            raise ConfigError(key, f"no {value!r}", f"{guess}choose one of {', '.join(names)}")


def _check_needs(config: Config) -> None:
    for key in _REQUIRED:
        if not _value(config, key):
            raise ConfigError(key, "not set", f"give {key}=PATH or set it in the YAML file")
    rollout = config.rollout
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
    parallel, train = config.parallel, config.train
    if parallel.context > 1:
        raise ConfigError(
            "parallel.context",
            f"{parallel.context}, and context parallelism is not supported",
            "set it to 1",
        )
    if parallel.sequence_parallel and parallel.tensor == 1:
        raise ConfigError(
            "parallel.sequence_parallel",
            "true with parallel.tensor 1: there is no group to share the sequence",
            "set it to false, or parallel.tensor above 1",
        )
    model_size = parallel.tensor * parallel.pipeline * parallel.context
    if world_size % model_size:
        raise ConfigError(
            "parallel",
            f"tensor {parallel.tensor} x pipeline {parallel.pipeline} x context "
            f"{parallel.context} = {model_size} does not divide the world size {world_size}",
            f"start a multiple of {model_size} ranks or change the layout",
        )
    data_size = world_size // model_size
    unit = data_size * train.micro_batch_size
    if train.global_batch_size % unit:
        raise ConfigError(
            "train.global_batch_size",
            f"{train.global_batch_size} is not a multiple of data-parallel size {data_size} "
            f"(= {world_size} / {model_size}) x train.micro_batch_size {train.micro_batch_size} "
            f"= {unit}",
            f"choose a multiple of {unit}, or another micro-batch size",
        )
    if train.global_batch_size % config.rollout.n:
        raise ConfigError(
            "train.global_batch_size",
            f"{train.global_batch_size} is not a multiple of rollout.n {config.rollout.n}, the "
            "samples per prompt",
            f"choose a multiple of {config.rollout.n}",
        )


def _divisors(count: int) -> str:
    return ", ".join(str(d) for d in range(1, count + 1) if count % d == 0)
