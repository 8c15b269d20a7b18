"""What the training loop asks of its parts. Implementations are chosen in `megaopd.train` alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from megaopd.batch import PackedBatch, Prompt, Sample, SamplingParams, TeacherSignal, TokenScores


class PendingRollout(Protocol):
    """A rollout under way. Every method is collective.

    The engine's `metrics` are those of this rollout once `result` or `take` has given its samples,
    until another rollout's are given.
    """

    def result(self) -> list[Sample]:
        """Waits for the samples, as `RolloutEngine.generate` returns them; called once.

        Raises:
            RolloutError: on every rank alike: the engine cannot answer.
            StopRequested: on every rank alike: the run is to stop; the rollout is given up.
        """
        ...

    def take(self) -> list[Sample] | None:
        """The samples if all of them are there already, without waiting; `result` gives the same
        ones afterwards.

        None, on every rank alike, where some are not there, the engine cannot answer (`result`
        says why), or it samples only when the result is asked for.
        """
        ...

    def give_up(self) -> None:
        """Ends the rollout, for good: nobody asks for its samples any more, and when this returns
        nothing of it holds memory of the trainer's device. Nothing where it has ended already."""
        ...


class RolloutEngine(Protocol):
    """Samples responses. Collective: every rank calls it with the same arguments.

    Rollouts may be under way while another is asked for and while weights are loaded, which they
    either go on with (`Sample.token_versions`) or hold up. Results are asked for in the order of
    the starts, but for an evaluation's, which overtakes. An engine that shares the trainer's device
    takes its memory in `start` and gives it back in `result`.

    Attributes:
        weight_version: of the weights that were loaded last.
        metrics: name -> value, of the rollout whose result was given last, equal on every rank.
    """

    weight_version: int
    metrics: dict[str, float]

    def start(self, prompts: Sequence[Prompt], params: SamplingParams) -> PendingRollout:
        """Begins to sample and returns at once; an engine that can do nothing in the background
        samples when the result is asked for."""
        ...

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[Sample]:
        """Returns `params.n` samples per prompt, on every rank, ordered by prompt then index; none
        of a prompt that the engine set aside (and counted in its metrics).

        Raises:
            RolloutError: on every rank alike: the engine cannot answer.
            StopRequested: on every rank alike: the run is to stop; the rollout is given up.
        """
        ...

    def load_weights(self, weights: Iterator[tuple[str, Tensor]], version: int) -> None:
        """Takes (Hugging Face name, full tensor) pairs; afterwards samples carry `version`."""
        ...

    def close(self) -> None:
        """Gives up rollouts under way and whatever the engine started."""
        ...


class Teacher(Protocol):
    """Scores the student's samples. Collective.

    Attributes:
        metrics: name -> value, of the last `score`, equal on every rank.
    """

    metrics: dict[str, float]

    def score(self, samples: Sequence[Sample]) -> Sequence[TeacherSignal]:
        """Scores the global batch, which is the same on every rank.

        Returns:
            One signal per student micro-batch of this rank, in order; without rows elsewhere than
            on the student's last pipeline stage.
        """
        ...

    def follow(self, student: Student) -> None:
        """After every step that updated the student: what a teacher makes of its new weights."""
        ...

    def close(self) -> None:
        """Gives up whatever the teacher started."""
        ...


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step (or one evaluation pass) reports; equal on every rank.

    Attributes:
        metrics: name -> value, means over the global batch's loss tokens.
        num_tokens: loss tokens of the global batch.
        skipped: the update was left out because a loss or gradient was not finite.
        nonfinite_sample_ids: the samples of the micro-batches whose loss was not finite.
    """

    metrics: dict[str, float]
    num_tokens: int
    skipped: bool = False
    nonfinite_sample_ids: tuple[str, ...] = field(default=())


class Student(Protocol):
    """The model in training. Every method is collective."""

    def train_step(
        self,
        micro_batches: Sequence[PackedBatch],
        signals: Sequence[TeacherSignal],
        step: int,
    ) -> StepResult:
        """One optimizer step with the loss of `step`, counted from 1 (`loss.schedule`).

        Args:
            signals: one per micro-batch; none at all where the loss asks no teacher.
        """
        ...

    def score(
        self,
        micro_batches: Sequence[PackedBatch],
        signals: Sequence[TeacherSignal],
        num_rows: int,
    ) -> TokenScores:
        """What student and teacher say about the response tokens, without a gradient.

        Args:
            num_rows: R, response tokens of the global batch, whose places are
                `PackedBatch.rows_T`.

        Returns:
            the same on every rank.
        """
        ...

    def evaluate(
        self, micro_batches: Sequence[PackedBatch], signals: Sequence[TeacherSignal]
    ) -> StepResult:
        """The same loss without a gradient or an update."""
        ...

    def export_weights(self, only_trainable: bool = False) -> Iterator[tuple[str, Tensor]]:
        """Yields (Hugging Face name, full tensor) on every rank, one tensor at a time."""
        ...

    def weight_shards(self) -> Mapping[str, Tensor]:
        """This rank's shards of all weights as they are now, by canonical global name; views, valid
        until the next step and outside `off_device`."""
        ...

    def off_device(self) -> AbstractContextManager[None]:
        """While an engine generates: inside the block the student leaves it the device's memory, as
        far as it is configured to."""
        ...


class WeightSync(Protocol):
    """Brings the student's weights into the rollout engine."""

    def sync(self, student: Student, engine: RolloutEngine, version: int) -> None:
        """Collective. Afterwards the engine's samples are of these weights and carry `version`.

        Raises:
            RolloutError: on every rank alike: the engine cannot take them.
        """
        ...


class Checkpoints(Protocol):
    """Keeps a run, so that it can go on later. Every method is collective.

    Attributes:
        newest: step of the newest complete checkpoint, None where there is none.
        metrics: name -> value, of the last one, equal on every rank.
    """

    newest: int | None
    metrics: dict[str, float]

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Begins to save the run as it is; what it is made of may change when this returns.

        Args:
            state: JSON-compatible, equal on every rank.

        Raises:
            CheckpointError, EnvironmentFault: on every rank alike: it cannot be written.
        """
        ...

    def poll(self) -> None:
        """Completes what is under way, if every rank has written its share.

        Raises:
            CheckpointError, EnvironmentFault: as above.
        """
        ...

    def finish(self) -> None:
        """Waits until all that is under way is complete."""
        ...


class Reward(Protocol):
    """Scores one response text against the reference answer, in [0, 1]."""

    def __call__(self, response: str, answer: str | None) -> float: ...
