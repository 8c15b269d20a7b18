"""Batches of several authors: the student, its teachers, the data set (GKD, arXiv 2306.13649).

Which prompts are whose follows from the step, the seed and the shares alone: it is the same on
every rank and under every layout, and a resumed run goes on as if nothing had happened.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch

from megaopd.batch import Prompt, Sample, SamplingParams
from megaopd.config import MixtureConfig
from megaopd.errors import StopRequested
from megaopd.protocols import PendingRollout, RolloutEngine

Source = Literal["student", "teacher", "data"]
SOURCES: tuple[Source, ...] = ("student", "teacher", "data")


def counts(step: int, num_prompts: int, shares: MixtureConfig) -> dict[Source, int]:
    """How many prompts of a step, numbered from 1, each author answers.

    Over the first s steps the student answers the whole number that is nearest to lambda times
    their prompts, at every s; likewise the teachers of what is left. So a batch is off by less than
    one prompt, and errors do not add up.
    """

    def rounded(share: float, before: int, now: int) -> int:
        return math.floor(share * now + 0.5) - math.floor(share * before + 0.5)

    before, now = (step - 1) * num_prompts, step * num_prompts
    student = rounded(shares.on_policy, before, now)
    others = 1 - shares.on_policy
    share = min(1.0, shares.teacher / others) if others > 0 else 0.0
    # The prompts that are not the student's, counted in the same way.
    left = [n - math.floor(shares.on_policy * n + 0.5) for n in (before, now)]
    teacher = rounded(share, *left)
    return {"student": student, "teacher": teacher, "data": num_prompts - student - teacher}


def authors(step: int, num_prompts: int, shares: MixtureConfig, seed: int) -> list[Source]:
    """Who answers each prompt of a step: `counts` of each, drawn anew at each step."""
    of_step = counts(step, num_prompts, shares)
    ordered = [source for source in SOURCES for _ in range(of_step[source])]
    digest = hashlib.sha256(f"{seed}/mixture/{step}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return [ordered[i] for i in torch.randperm(num_prompts, generator=generator).tolist()]


class Mixture:
    """Begins the rollouts of training steps, each author's share of them.

    Args:
        shares: of the authors.
        seed: the run's.
        student: the engine that samples from the student.
        teachers: the engines that sample from the teachers, by `Prompt.teacher`; those that shares
            never ask need not be there.
        responses: the tokens of the data set's, by prompt id; likewise.
    """

    def __init__(
        self,
        shares: MixtureConfig,
        seed: int,
        student: RolloutEngine,
        teachers: Mapping[str, RolloutEngine],
        responses: Mapping[str, tuple[int, ...]],
    ) -> None:
        self._shares, self._seed = shares, seed
        self._student, self._teachers, self._responses = student, teachers, responses

    def start(self, step: int, prompts: Sequence[Prompt], params: SamplingParams) -> PendingRollout:
        """Begins the rollout of a step; collective, as the engines are."""
        if self._shares.on_policy == 1:
            return self._student.start(prompts, params)
        whose = authors(step, len(prompts), self._shares, self._seed)
        by_source: dict[Source, list[Prompt]] = {source: [] for source in SOURCES}
        for prompt, source in zip(prompts, whose, strict=True):
            by_source[source].append(prompt)
        pending: list[PendingRollout] = []
        if by_source["student"]:
            pending.append(self._student.start(by_source["student"], params))
        for name in sorted({prompt.teacher for prompt in by_source["teacher"]}):
            # A teacher answers what it is shown, privileged context and all.
            asked = [
                replace(p, token_ids=p.teacher_token_ids or p.token_ids)
                for p in by_source["teacher"]
                if p.teacher == name
            ]
            pending.append(self._teachers[name].start(asked, params))
        given = [self._given(p, params) for p in by_source["data"]]
        of_prompt = {p.prompt_id: source for p, source in zip(prompts, whose, strict=True)}
        return MixedRollout(tuple(prompts), of_prompt, pending, given)

    def close(self) -> None:
        """Ends the teachers' engines; the student's is its owner's."""
        for engine in self._teachers.values():
            engine.close()

    def _given(self, prompt: Prompt, params: SamplingParams) -> Sample:
        ids = self._responses[prompt.prompt_id]
        return Sample(
            prompt=prompt,
            index=0,
            response_ids=ids,
            response_logprobs=(0.0,) * len(ids),
            response_mask=(True,) * len(ids),
            finish_reason="stop" if ids[-1] in params.stop_token_ids else "length",
            weight_version=0,
            source="data",
        )


@dataclass(frozen=True)
class MixedRollout:
    """Implements `megaopd.protocols.PendingRollout`.

    Attributes:
        prompts: of the step, in order.
        whose: prompt id -> its author.
        pending: what engines were asked.
        given: samples that need no engine.
    """

    prompts: tuple[Prompt, ...]
    whose: Mapping[str, Source]
    pending: Sequence[PendingRollout]
    given: Sequence[Sample]

    def result(self) -> list[Sample]:
        """All samples, ordered by prompt then index.

        Raises:
            RolloutError: on every rank alike: an engine cannot answer.
            StopRequested: on every rank alike: the run is to stop.
        """
        try:
            return self._ordered([rollout.result() for rollout in self.pending])
        except StopRequested:
            self.give_up()
            raise

    def take(self) -> list[Sample] | None:
        """The same, if every engine has answered."""
        answers: list[Sequence[Sample]] = []
        for rollout in self.pending:
            samples = rollout.take()
            if samples is None:
                return None
            answers.append(samples)
        return self._ordered(answers)

    def give_up(self) -> None:
        """Of every engine."""
        for rollout in self.pending:
            rollout.give_up()

    def _ordered(self, answers: Sequence[Sequence[Sample]]) -> list[Sample]:
        found: dict[str, list[Sample]] = {}
        for sample in [*self.given, *(s for samples in answers for s in samples)]:
            found.setdefault(sample.prompt.prompt_id, []).append(sample)
        return [
            self._attributed(prompt, sample)
            for prompt in self.prompts
            for sample in found.get(prompt.prompt_id, [])
        ]

    def _attributed(self, prompt: Prompt, sample: Sample) -> Sample:
        source = self.whose[prompt.prompt_id]
        if source == "student":
            return sample
        return replace(
            sample,
            prompt=prompt,
            response_logprobs=(0.0,) * len(sample.response_ids),
            weight_version=0,
            token_versions=(),
            source=source,
        )


def mixture_metrics(prompts: Sequence[Prompt], samples: Sequence[Sample]) -> dict[str, float]:
    """Each author's share of a step's samples, and the prompts that nobody answered; nothing where
    all samples are the student's."""
    written = [sample.source for sample in samples]
    if set(written) <= {"student"}:
        return {}
    answered = {sample.prompt.prompt_id for sample in samples}
    shares = {f"rollout/{of}_fraction": written.count(of) / len(written) for of in SOURCES}
    return {**shares, "rollout/set_aside": float(len(prompts) - len(answered))}
