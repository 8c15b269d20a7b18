"""An engine that really samples in the background, in threads, and parts for the loop around it."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from megaopd.batch import PackedBatch, Prompt, Sample, SamplingParams, TeacherSignal, TokenScores
from megaopd.protocols import StepResult

NUM_TOKENS = 4
TIMEOUT_S = 20.0


class BackgroundEngine:
    """A `RolloutEngine` of responses of 4 tokens.

    A rollout samples two tokens at once, then waits for new weights or for somebody who asks for
    its result, whichever is first, and samples the other two with the weights of that moment: new
    weights wait for the first two and are there until the others are done.

    Attributes:
        events: what happened in which order, e.g. ("start", 0), ("load", 1).
        asked: the parameters of every rollout, in order of the starts.
        rollouts: all that were started, in order.
        missed: by how many versions the samples' weights are behind the engine's, as on a server
            that missed updates.
        set_aside: ids of prompts that get no sample.
    """

    def __init__(self) -> None:
        self.weight_version = -1
        self.metrics: dict[str, float] = {}
        self.events: list[tuple[Any, ...]] = []
        self.asked: list[SamplingParams] = []
        self.missed = 0
        self.set_aside: set[str] = set()
        self.changed = threading.Condition()
        self.rollouts: list[BackgroundRollout] = []

    def load_weights(self, weights: Iterator[tuple[str, Tensor]], version: int) -> None:
        rollouts = [rollout for rollout in self.rollouts if not rollout.given_up]
        for rollout in rollouts:
            self.wait_for(lambda r=rollout: len(r.token_versions) >= NUM_TOKENS // 2)
        with self.changed:
            self.weight_version = version
            self.events.append(("load", version))
            self.changed.notify_all()
        for rollout in rollouts:
            self.wait_for(lambda r=rollout: len(r.token_versions) == NUM_TOKENS)

    def start(self, prompts: Sequence[Prompt], params: SamplingParams) -> BackgroundRollout:
        with self.changed:
            self.events.append(("start", len(self.asked)))
            self.asked.append(params)
        self.rollouts.append(BackgroundRollout(self, prompts, params))
        return self.rollouts[-1]

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[Sample]:
        return self.start(prompts, params).result()

    def close(self) -> None:
        self.events.append(("close",))

    def wait_for(self, condition: Callable[[], bool]) -> None:
        with self.changed:
            assert self.changed.wait_for(condition, TIMEOUT_S), "nothing happened in time"


class BackgroundRollout:
    """The versions that sampled the tokens are known as they come: `token_versions`."""

    def __init__(
        self, engine: BackgroundEngine, prompts: Sequence[Prompt], params: SamplingParams
    ) -> None:
        self.engine, self.prompts, self.params = engine, prompts, params
        self.token_versions: list[int] = []
        self.start_version, self.wanted = engine.weight_version, False
        self.given_up = False
        self._thread = threading.Thread(target=self._sample_all, daemon=True)
        self._thread.start()

    def _sample_all(self) -> None:
        engine = self.engine
        for token in range(NUM_TOKENS):
            with engine.changed:
                # A rollout that nobody ever asks for ends unheard: its `result` would see it.
                if token == NUM_TOKENS // 2 and not engine.changed.wait_for(
                    lambda: self.wanted or engine.weight_version > self.start_version, TIMEOUT_S
                ):
                    return
                if self.given_up:
                    return
                self.token_versions.append(engine.weight_version - engine.missed)
                engine.changed.notify_all()

    def result(self) -> list[Sample]:
        engine = self.engine
        with engine.changed:
            self.wanted = True
            engine.changed.notify_all()
        self._thread.join(TIMEOUT_S)
        return self._samples()

    def take(self) -> list[Sample] | None:
        return None if len(self.token_versions) < NUM_TOKENS else self._samples()

    def give_up(self) -> None:
        engine = self.engine
        with engine.changed:
            engine.events.append(("give up", engine.rollouts.index(self)))
            self.given_up = self.wanted = True
            engine.changed.notify_all()
        self._thread.join(TIMEOUT_S)

    def _samples(self) -> list[Sample]:
        engine = self.engine
        assert len(self.token_versions) == NUM_TOKENS
        kept = [p for p in self.prompts if p.prompt_id not in engine.set_aside]
        engine.metrics = {"rollout/set_aside": float(len(self.prompts) - len(kept))}
        return [
            Sample(
                prompt=prompt,
                index=index,
                response_ids=(3,) * NUM_TOKENS,
                response_logprobs=(-1.0,) * NUM_TOKENS,
                # The last token is a tool's.
                response_mask=(True,) * (NUM_TOKENS - 1) + (False,),
                finish_reason="length",
                weight_version=min(self.token_versions),
                token_versions=tuple(self.token_versions),
            )
            for prompt in kept
            for index in range(self.params.n)
        ]


class ListedStudent:
    """A `Student` that notes the samples of every step.

    Args:
        before_step: called at the start of each training step, with its number from 1.
        skip: steps whose loss is not finite.
    """

    def __init__(
        self, before_step: Callable[[int], None] = lambda step: None, skip: Sequence[int] = ()
    ) -> None:
        self.before_step, self.skip = before_step, skip
        self.trained: list[list[str]] = []

    def train_step(
        self, micro_batches: Sequence[PackedBatch], signals: Sequence[TeacherSignal], step: int
    ) -> StepResult:
        assert step == len(self.trained) + 1
        self.before_step(step)
        self.trained.append([i for batch in micro_batches for i in batch.sample_ids])
        metrics = {"loss/divergence": 1.0 / step, "rollout/mismatch_kl": 1e-3 * step}
        return StepResult(metrics, len(self.trained[-1]) * NUM_TOKENS, step in self.skip)

    def score(
        self,
        micro_batches: Sequence[PackedBatch],
        signals: Sequence[TeacherSignal],
        num_rows: int,
    ) -> TokenScores:
        """log p of every token is its number in the global batch, and log q is 0."""
        zeros = torch.zeros(num_rows)
        return TokenScores(torch.arange(num_rows).float(), zeros, zeros, zeros, zeros)

    def evaluate(
        self, micro_batches: Sequence[PackedBatch], signals: Sequence[TeacherSignal]
    ) -> StepResult:
        return StepResult({"loss/divergence": 0.5, "eval/reverse_kl": 0.5}, 1)

    def export_weights(self, only_trainable: bool = False) -> Iterator[tuple[str, Tensor]]:
        return iter(())

    def weight_shards(self) -> Mapping[str, Tensor]:
        return {}

    def off_device(self) -> AbstractContextManager[None]:
        return nullcontext()


class SilentTeacher:
    """A `Teacher` that says nothing and notes whom it follows."""

    def __init__(self) -> None:
        self.metrics: dict[str, float] = {}
        self.followed = 0

    def score(self, samples: Sequence[Sample]) -> list[TeacherSignal]:
        return []

    def follow(self, student: object) -> None:
        self.followed += 1

    def close(self) -> None:
        """It started nothing."""


class Rows:
    """Where metrics go: a list of (step, metrics)."""

    def __init__(self) -> None:
        self.rows: list[tuple[int, dict[str, float]]] = []

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self.rows.append((step, dict(metrics)))

    def of(self, name: str) -> list[float]:
        return [row[name] for _, row in self.rows if name in row]
