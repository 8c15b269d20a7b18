"""Rules of `rollout.mixture`: what samples of others than the student need, and what they may be
combined with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from megaopd.errors import ConfigError

if TYPE_CHECKING:
    from megaopd.config import Config, MixtureConfig, TeacherConfig

# Losses whose theory says that the student sampled the tokens.
_ON_POLICY_LOSSES = ("policy_gradient", "estimator")

_CANNOT_SAMPLE = {
    "ema": "whose weights move: its samples would be those of the start",
    "average": "which scores tokens and samples none",
}


def data_share(mixture: MixtureConfig | None) -> float:
    """Fraction of the prompts that have the data set's responses."""
    if mixture is None:
        return 0.0
    left = 1.0 - mixture.on_policy - mixture.teacher
    # 1 - 0.9 - 0.1 is not 0 in floating point.
    return left if left > 1e-9 else 0.0


def check_mixture(config: Config, teachers: Mapping[str, TeacherConfig]) -> None:
    """Checks `rollout.mixture`.

    Args:
        teachers: all of them by their keys.

    Raises:
        ConfigError: the first rule that does not hold.
    """
    mixture, rollout = config.rollout.mixture, config.rollout
    if mixture is None:
        return
    if mixture.on_policy + mixture.teacher > 1 + 1e-9:
        raise ConfigError(
            "rollout.mixture",
            f"on_policy {mixture.on_policy} + teacher {mixture.teacher} are more than 1",
            "lower one of them",
        )
    if mixture.on_policy == 1:
        return
    if rollout.kind == "recorded":
        raise ConfigError(
            "rollout.mixture",
            "set, and rollout.kind is recorded: the recording holds the samples of all authors",
            "set rollout.mixture=null",
        )
    if config.loss.objective in _ON_POLICY_LOSSES:
        raise ConfigError(
            "rollout.mixture.on_policy",
            f"{mixture.on_policy} with loss.objective {config.loss.objective}, whose gradient is "
            "an expectation over the student's own samples",
            "set it to 1, or loss.objective=divergence",
        )
    _check_teachers(config, mixture, teachers)
    if data_share(mixture):
        _check_data(config)


def _check_teachers(
    config: Config, mixture: MixtureConfig, teachers: Mapping[str, TeacherConfig]
) -> None:
    for key, teacher in teachers.items():
        if mixture.teacher and teacher.kind in _CANNOT_SAMPLE:
            why = _CANNOT_SAMPLE[teacher.kind]
            raise ConfigError(
                "rollout.mixture.teacher",
                f"{mixture.teacher}, and {key}.kind is {teacher.kind}, {why}",
                "set it to 0, or choose another teacher",
            )
        sampled_only = teacher.kind == "sglang" and teacher.top_k == 0
        if sampled_only and config.loss.objective == "divergence":
            raise ConfigError(
                f"{key}.top_k",
                f"0 with rollout.mixture.on_policy {mixture.on_policy}: an estimate from sampled "
                "tokens needs the student's own samples",
                f"set {key}.top_k=64, or rollout.mixture=null",
            )


def _check_data(config: Config) -> None:
    if not config.data.response_column:
        raise ConfigError(
            "data.response_column",
            f"not set, and {data_share(config.rollout.mixture):g} of rollout.mixture are the data "
            "set's responses",
            "name the column, or raise rollout.mixture.on_policy or rollout.mixture.teacher",
        )
    if config.rollout.n > 1:
        raise ConfigError(
            "rollout.n",
            f"{config.rollout.n} with the data set's responses, of which a prompt has one",
            "set it to 1",
        )
