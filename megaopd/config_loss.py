"""Rules of `loss` and `credit`: what an objective needs of samples, teachers and rewards."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING

from megaopd.config_schema import nearest
from megaopd.errors import ConfigError

if TYPE_CHECKING:
    from megaopd.config import Config, TeacherConfig

# Losses whose expectation is over the student's own distribution.
_SAMPLED = ("policy_gradient", "estimator")


def check_loss(
    config: Config,
    teachers: Mapping[str, TeacherConfig],
    divergences: Collection[str] | None,
) -> None:
    """Checks `loss` and `credit`.

    Args:
        teachers: all of them by their keys.
        divergences: the names that a kind may take; None does not check it.

    Raises:
        ConfigError: the first rule that does not hold.
    """
    _check_schedule(config, divergences)
    _check_selection(config)
    _check_advantages(config)
    _check_sampled(config)
    for key, teacher in teachers.items():
        _check_signal(config, key, teacher)


def _check_schedule(config: Config, divergences: Collection[str] | None) -> None:
    by_step: dict[int, str] = {}
    for name, stage in config.loss.schedule.items():
        where = f"loss.schedule.{name}"
        if stage.until_step < 1:
            raise ConfigError(
                f"{where}.until_step", f"found {stage.until_step}", "expected a step, from 1"
            )
        if stage.until_step in by_step:
            raise ConfigError(
                f"{where}.until_step",
                f"{stage.until_step}, where stage {by_step[stage.until_step]} ends as well",
                "give each stage a last step of its own",
            )
        by_step[stage.until_step] = name
        kind = stage.kind or config.loss.kind
        if divergences is not None and kind not in divergences:
            close = nearest(kind, divergences)
            guess = f"did you mean {close}? " if close else ""
            raise ConfigError(
                f"{where}.kind", f"no {kind!r}", f"{guess}choose one of {', '.join(divergences)}"
            )
        ranges: tuple[tuple[str, float | None, Callable[[float], bool], str], ...] = (
            ("beta", stage.beta, lambda v: 0 <= v <= 1, "a value in [0, 1]"),
            ("entropy_coef", stage.entropy_coef, lambda v: v >= 0, "0 or more"),
            ("selection_ratio", stage.selection_ratio, lambda v: 0 < v <= 1, "a value in (0, 1]"),
        )
        for field, value, holds, expected in ranges:
            if value is not None and not holds(value):
                raise ConfigError(f"{where}.{field}", f"found {value}", f"expected {expected}")
        alpha = config.loss.alpha if stage.alpha is None else stage.alpha
        if kind.startswith("skew_") and not 0 <= alpha < 1:
            raise ConfigError(
                f"{where}.alpha", f"found {alpha} for {kind}", "expected a value in [0, 1)"
            )


def _check_selection(config: Config) -> None:
    loss = config.loss
    if loss.selection != "none":
        return
    ratios = {"loss.selection_ratio": loss.selection_ratio}
    for name, stage in loss.schedule.items():
        if stage.selection_ratio is not None:
            ratios[f"loss.schedule.{name}.selection_ratio"] = stage.selection_ratio
    for key, ratio in ratios.items():
        if ratio < 1:
            raise ConfigError(
                key, f"{ratio} with loss.selection none, which trains on all", "choose a selection"
            )


def _check_advantages(config: Config) -> None:
    credit, objective = config.credit, config.loss.objective
    if objective != "policy_gradient":
        for key, found, default in (
            ("reward_coef", credit.reward_coef, 0.0),
            ("discount", credit.discount, 0.0),
            ("baseline", credit.baseline, "none"),
        ):
            if found != default:
                raise ConfigError(
                    f"credit.{key}",
                    f"{found} with loss.objective {objective}, which has no advantages",
                    f"set it to {default}, or loss.objective=policy_gradient",
                )
        return
    if not credit.teacher_coef and not credit.reward_coef:
        raise ConfigError(
            "credit.teacher_coef",
            "0 as well as credit.reward_coef: there is no advantage",
            "set one of them",
        )
    if credit.reward_coef and config.rollout.n < 2:
        raise ConfigError(
            "rollout.n",
            "1 with credit.reward_coef, whose advantage compares the samples of a prompt",
            "set rollout.n=8, or credit.reward_coef=0",
        )


def _check_sampled(config: Config) -> None:
    loss, rollout = config.loss, config.rollout
    if loss.objective not in _SAMPLED:
        return
    why = f"with loss.objective {loss.objective}, an expectation over the student's distribution"
    if rollout.temperature == 0:
        raise ConfigError("rollout.temperature", f"0 {why}", "set rollout.temperature=1")
    for key, value, whole in (("top_p", rollout.top_p, 1), ("top_k", rollout.top_k, 0)):
        if value != whole:
            raise ConfigError(
                f"rollout.{key}",
                f"{value} {why}: the sampler leaves tokens out",
                f"set it to {whole}",
            )
    if loss.objective == "policy_gradient" and rollout.temperature != loss.temperature:
        raise ConfigError(
            "loss.temperature",
            f"{loss.temperature} with rollout.temperature {rollout.temperature}: the ratio that is "
            "clipped would compare two temperatures",
            f"set loss.temperature={rollout.temperature}",
        )


def _check_signal(config: Config, key: str, teacher: TeacherConfig) -> None:
    """What a teacher on servers tells."""
    loss = config.loss
    if teacher.kind != "sglang":
        return
    asks = loss.objective == "estimator"
    asks |= loss.objective == "policy_gradient" and config.credit.teacher_coef != 0
    if asks and teacher.top_k:
        raise ConfigError(
            f"{key}.top_k",
            f"{teacher.top_k} with loss.objective {loss.objective}, which needs the log-prob of "
            "every sampled token, likely or not",
            f"set {key}.top_k=0",
        )
    if loss.selection in ("soft_or", "q3") and not teacher.top_k:
        raise ConfigError(
            "loss.selection",
            f"{loss.selection} with {key}.top_k 0: a divergence needs more than the sampled tokens",
            f"choose entropy, or set {key}.top_k=64",
        )
    if config.credit.baseline != "none":
        raise ConfigError(
            "credit.baseline",
            f"{config.credit.baseline} with {key}.kind sglang, which tells neither its entropy nor "
            "the divergence",
            "set it to none",
        )
