"""How old the weights are that sampled what is trained on."""

from __future__ import annotations

from collections.abc import Sequence

from megaopd.batch import Sample
from megaopd.errors import RolloutError


def staleness(samples: Sequence[Sample], version: int, bound: int | None) -> dict[str, float]:
    """How many updates older than the weights that they train the student's tokens are, as metrics.

    Args:
        samples: the student's own, at least one.
        version: of the weights that will train on them.
        bound: largest difference that is allowed; None allows any, newer weights too.

    Raises:
        RolloutError: a sample is older than `bound`, or newer than our weights.
    """
    if bound is not None:
        for sample in samples:
            _check(sample, version, bound)
    behind = [version - v for s in samples for v in s.model_token_versions]
    return {
        "rollout/staleness_mean": sum(behind) / max(len(behind), 1),
        "rollout/staleness_max": float(max(behind, default=0)),
    }


def _check(sample: Sample, version: int, bound: int) -> None:
    versions = sample.model_token_versions or [version]
    oldest, newest = min(versions), max(versions)
    if version - oldest > bound:
        raise RolloutError(
            f"sample {sample.sample_id}",
            f"weights of version {oldest} sampled it, those of version {version} would train on "
            f"it, and rollout.max_staleness is {bound}",
            "a server missed a weight update: restart it",
        )
    if newest > version:
        raise RolloutError(
            f"sample {sample.sample_id}",
            f"weights of version {newest} sampled it, and ours are of version {version}",
            "another run updates the same server: give this one servers of its own",
        )
