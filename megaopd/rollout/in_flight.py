"""The rollouts of a step and of those after it, and what a checkpoint keeps of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from megaopd.batch import Prompt, Sample, SamplingParams
from megaopd.errors import CheckpointError
from megaopd.protocols import PendingRollout, RolloutEngine
from megaopd.rollout.recorded import sample_of

StartRollout = Callable[[int, Sequence[Prompt], SamplingParams], PendingRollout]


@dataclass
class _Rollout:
    step: int
    prompts: list[Prompt]
    pending: PendingRollout | None
    samples: list[Sample] | None = None
    metrics: dict[str, float] = field(default_factory=dict)


class RolloutsInFlight:
    """A queue of rollouts, begun ahead and taken in order. Every method is collective.

    Args:
        start: begins the rollout of a step.
        engine: whose metrics are those of the rollout that ended last.
        sampling: how a step's rollout is sampled.
    """

    def __init__(
        self,
        start: StartRollout,
        engine: RolloutEngine,
        sampling: Callable[[int], SamplingParams],
    ) -> None:
        self.start, self._engine, self._sampling = start, engine, sampling
        self._queue: deque[_Rollout] = deque()

    def __len__(self) -> int:
        return len(self._queue)

    @property
    def pending(self) -> list[PendingRollout]:
        """Those whose samples nobody has taken yet."""
        return [rollout.pending for rollout in self._queue if rollout.pending is not None]

    def begin(self, step: int, prompts: list[Prompt]) -> None:
        """Begins the rollout of a step, behind those that are under way."""
        pending = self.start(step, prompts, self._sampling(step))
        self._queue.append(_Rollout(step, prompts, pending))

    def first(self) -> tuple[list[Prompt], list[Sample], dict[str, float]]:
        """(prompts, samples, the engine's metrics) of the first one, which is waited for and stays
        the first.

        Raises:
            RolloutError: the engine cannot answer.
            StopRequested: the run is to stop; the rollout can be begun anew.
        """
        rollout = self._queue[0]
        if rollout.samples is None:
            assert rollout.pending is not None
            samples = rollout.pending.result()
            self._keep(rollout, samples)
        assert rollout.samples is not None
        return rollout.prompts, rollout.samples, rollout.metrics

    def drop_first(self) -> None:
        """Its samples have been trained on."""
        self._queue.popleft()

    def state_dict(self) -> list[dict[str, Any]]:
        """The rollouts, JSON-compatible: with samples where all of them are there, else with the
        prompts alone, to be sampled again."""
        for rollout in self._queue:
            if rollout.samples is None and rollout.pending is not None:
                samples = rollout.pending.take()
                if samples is not None:
                    self._keep(rollout, samples)
        return [
            {
                "step": rollout.step,
                "prompts": [prompt.prompt_id for prompt in rollout.prompts],
                "samples": rollout.samples and [asdict(sample) for sample in rollout.samples],
                "metrics": rollout.metrics,
            }
            for rollout in self._queue
        ]

    def load_state_dict(
        self, state: Sequence[Mapping[str, Any]], prompts: Mapping[str, Prompt]
    ) -> None:
        """Goes on where `state_dict` was taken; begins none before `resume`.

        Args:
            prompts: those of the run, by id.

        Raises:
            CheckpointError: one is not among them.
        """
        self._queue.clear()
        for entry in state:
            missing = [p for p in entry["prompts"] if p not in prompts]
            if missing:
                raise CheckpointError(
                    "samples in flight",
                    f"of the prompt {missing[0]!r}, which data.train does not have",
                    "resume with what data.train was",
                )
            samples = entry["samples"]
            self._queue.append(
                _Rollout(
                    int(entry["step"]),
                    [prompts[p] for p in entry["prompts"]],
                    None,
                    None if samples is None else [sample_of(fields) for fields in samples],
                    dict(entry["metrics"]),
                )
            )

    def resume(self) -> None:
        """Begins those that have no samples yet; the engine has its weights by now."""
        for rollout in self._queue:
            if rollout.samples is None and rollout.pending is None:
                params = self._sampling(rollout.step)
                rollout.pending = self.start(rollout.step, rollout.prompts, params)

    def give_up(self) -> None:
        """Gives up all that are under way."""
        for rollout in self._queue:
            if rollout.samples is None and rollout.pending is not None:
                rollout.pending.give_up()
                rollout.pending = None

    def _keep(self, rollout: _Rollout, samples: list[Sample]) -> None:
        rollout.samples, rollout.pending = samples, None
        rollout.metrics = dict(self._engine.metrics)
