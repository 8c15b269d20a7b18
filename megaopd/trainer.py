"""The loop of on-policy distillation. It knows protocols only: no Megatron, no SGLang."""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from megaopd.batch import PackedBatch, Prompt, Sample, SamplingParams, TeacherSignal
from megaopd.config import Config
from megaopd.credit import CreditAssignment
from megaopd.data.packing import Batching, with_credit
from megaopd.data.prompts import PromptStream
from megaopd.errors import NumericError
from megaopd.evaluation import EvalResult, eval_metrics, nothing_sampled
from megaopd.logger import get_logger
from megaopd.losses.objective import needs_teacher
from megaopd.metrics import MetricsWriter, PhaseTimer
from megaopd.protocols import (
    PendingRollout,
    RolloutEngine,
    StepResult,
    Student,
    Teacher,
    WeightSync,
)
from megaopd.rollout.mixture import mixture_metrics
from megaopd.rollout.staleness import staleness

logger = get_logger(__name__)

StartRollout = Callable[[int, Sequence[Prompt], SamplingParams], PendingRollout]


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of the student on the held-out prompts.

    Attributes:
        answers: scores and responses, sampled as `eval` says.
        reverse_kl: mean reverse KL to the teacher over the tokens of samples at the rollout's
            temperature, as far as the teacher's signals tell: exact, bounded or estimated.
    """

    answers: EvalResult
    reverse_kl: float


@dataclass(frozen=True)
class FitResult:
    """What a finished run amounts to; `before` and `after` are None without evaluation prompts,
    `mismatch_kl_max` where no token of the student's own was trained on."""

    before: Evaluation | None
    after: Evaluation | None
    num_steps: int
    train_wall_s: float
    mismatch_kl_max: float | None


class OPDTrainer:
    """prompts -> rollout -> pack -> teacher -> student step -> weight sync, `train.num_steps`
    times.

    With `rollout.max_staleness` k the rollouts of the next k steps are under way while one trains:
    synchronous training and k steps off are the same loop, which looks k steps ahead.

    Every method is collective: all ranks call it in step.

    Args:
        config: the run.
        student: the model in training.
        teacher: scores the student's samples.
        engine: samples from the student.
        weight_sync: brings the student's weights to the engine.
        prompts: the stream of training prompts.
        sampling: how to sample; its seed is the run's.
        batching: how the student's ranks share out and pack samples.
        rank: this rank.
        evaluator: scores of an engine's answers to the held-out prompts; None evaluates nothing.
        eval_prompts: the held-out prompts.
        metrics: where metrics go.
        record: takes (step, prompts, samples) of every training step, to replay them later.
        credit: what the response tokens of a step are worth; None weighs all alike, without
            advantages.
        start_rollout: begins the rollout of a training step, (step, prompts, params); None asks the
            engine for all of it.
    """

    def __init__(
        self,
        config: Config,
        *,
        student: Student,
        teacher: Teacher,
        engine: RolloutEngine,
        weight_sync: WeightSync,
        prompts: PromptStream,
        sampling: SamplingParams,
        batching: Batching,
        rank: int,
        evaluator: Callable[[RolloutEngine], EvalResult] | None,
        eval_prompts: Sequence[Prompt],
        metrics: MetricsWriter,
        record: Callable[[int, Sequence[Prompt], Sequence[Sample]], None] | None = None,
        start_rollout: StartRollout | None = None,
        credit: CreditAssignment | None = None,
    ) -> None:
        self.config = config
        self.student, self.teacher, self.engine = student, teacher, engine
        self.weight_sync = weight_sync
        self.prompts, self.sampling = prompts, sampling
        self.batching, self.rank = batching, rank
        self.evaluator, self.eval_prompts = evaluator, eval_prompts
        self.metrics = metrics
        self.record, self.credit = record, credit
        # Otherwise it is the yardstick of evaluations alone.
        self._asks_teacher = needs_teacher(config.loss) or (
            credit is not None and credit.needs_scores
        )
        # Where others write all responses, the engine needs its weights for evaluations alone.
        mixture = config.rollout.mixture
        self._asks_student = mixture is None or mixture.on_policy > 0
        self._engine_is_behind = False
        self.start_rollout: StartRollout = start_rollout or (
            lambda step, prompts, params: engine.start(prompts, params)
        )
        self.mismatch_kl_max: float | None = None
        self._skipped_in_a_row = 0
        # Of this step and those after it, in order.
        self._rollouts: deque[tuple[list[Prompt], PendingRollout]] = deque()

    def fit(self) -> FitResult:
        """Runs all steps, evaluating before, after and every `eval.interval` steps.

        Raises:
            NumericError: `train.max_skipped_steps` steps in a row had a non-finite loss or
                gradient.
            RolloutError: the engine cannot answer; the student is as its last step left it.
        """
        num_steps, interval = self.config.train.num_steps, self.config.eval.interval
        self.weight_sync.sync(self.student, self.engine, version=0)
        before = after = self.evaluate(step=0)
        train_wall_s = 0.0
        for step in range(1, num_steps + 1):
            start = time.monotonic()
            self.step(step)
            train_wall_s += time.monotonic() - start
            if step == num_steps or (interval and step % interval == 0):
                after = self.evaluate(step)
        return FitResult(before, after, num_steps, train_wall_s, self.mismatch_kl_max)

    def step(self, step: int) -> StepResult:
        """One step, numbered from 1."""
        timer = PhaseTimer()
        with timer.phase("rollout"), self.student.off_device():
            self._start_rollouts(step)
            prompts, pending = self._rollouts.popleft()
            samples = pending.result()
        if not samples:
            raise nothing_sampled(f"step {step}")
        rollout_metrics = mixture_metrics(prompts, samples)
        own = [sample for sample in samples if sample.source == "student"]
        if own:
            version, rollout = self.engine.weight_version, self.config.rollout
            # A recording holds what other weights sampled; its versions are those of its own run.
            bound = None if rollout.kind == "recorded" else rollout.max_staleness
            rollout_metrics |= staleness(own, version, bound) | self.engine.metrics
        if self.record is not None:
            self.record(step, prompts, samples)
        with timer.phase("pack"):
            assignment = self.batching.assign(samples)
            micro_batches = self.batching.micro_batches(samples, assignment, self.rank)
        with timer.phase("teacher"):
            signals = self.teacher.score(samples) if self._asks_teacher else []
        with timer.phase("credit"):
            micro_batches, credit_metrics = self._worth(samples, micro_batches, signals)
        with timer.phase("student"):
            result = self.student.train_step(micro_batches, signals, step)
        del signals
        with timer.phase("weight_sync"):
            if not result.skipped:
                self.teacher.follow(self.student)
                self._engine_is_behind = True
                if self._asks_student:
                    self._sync()

        utilisation = self.batching.utilisation(samples, assignment)
        self._log_step(
            step,
            samples,
            result,
            timer,
            {
                **rollout_metrics,
                **credit_metrics,
                **utilisation,
                **(self.teacher.metrics if self._asks_teacher else {}),
            },
        )
        self._check_finite(step, samples, result)
        return result

    def _sync(self) -> None:
        """Brings the student's weights to the engine."""
        self.weight_sync.sync(self.student, self.engine, self.engine.weight_version + 1)
        self._engine_is_behind = False

    def _worth(
        self,
        samples: Sequence[Sample],
        micro_batches: list[PackedBatch],
        signals: Sequence[TeacherSignal],
    ) -> tuple[list[PackedBatch], dict[str, float]]:
        """The micro-batches with what their tokens are worth, and metrics of that."""
        if self.credit is None:
            return micro_batches, {}
        scores = None
        if self.credit.needs_scores:
            num_rows = sum(len(s.response_ids) for s in samples)
            scores = self.student.score(micro_batches, signals, num_rows)
        worth = self.credit(samples, scores)
        return with_credit(micro_batches, worth.weights_R, worth.advantages_R), worth.metrics

    def _start_rollouts(self, step: int) -> None:
        """Starts what is not yet under way of this step's rollout and of those that it may run
        ahead of; none is started past the last step."""
        config = self.config
        ahead = min(config.rollout.max_staleness, config.train.num_steps - step)
        while len(self._rollouts) <= ahead:
            prompts = self.prompts.next(config.train.global_batch_size // config.rollout.n)
            number = step + len(self._rollouts)
            params = self._seeded("train", number)
            self._rollouts.append((prompts, self.start_rollout(number, prompts, params)))

    def evaluate(self, step: int) -> Evaluation | None:
        """Accuracy and reverse KL on the held-out prompts."""
        if self.evaluator is None:
            return None
        timer = PhaseTimer()
        with timer.phase("eval"):
            # The same random numbers at every evaluation: what differs is the student.
            sampling = replace(self._seeded("eval", 0), n=1)
            if self._engine_is_behind:
                self._sync()
            with self.student.off_device():
                answers = self.evaluator(self.engine)
                samples = self.engine.generate(self.eval_prompts, sampling)
            if not samples:
                raise nothing_sampled(f"evaluation at step {step}")
            assignment = self.batching.assign(samples)
            micro_batches = self.batching.micro_batches(samples, assignment, self.rank)
            result = self.student.evaluate(micro_batches, self.teacher.score(samples))
        evaluation = Evaluation(answers, result.metrics["loss/divergence"])
        # The student names them by what its teachers let it measure.
        yardsticks = {n: v for n, v in result.metrics.items() if n.startswith("eval/")}
        self.metrics.write(
            step,
            {
                **eval_metrics(answers, self.config.eval.reward),
                **yardsticks,
                "eval/set_aside": float(len(self.eval_prompts) - answers.num_prompts),
                **timer.metrics(),
                **timer.peak_memory(),
            },
        )
        return evaluation

    def _seeded(self, purpose: str, step: int) -> SamplingParams:
        digest = hashlib.sha256(f"{self.config.run.seed}/{purpose}/{step}".encode()).digest()
        return replace(self.sampling, seed=int.from_bytes(digest[:6], "big"))

    def _log_step(
        self,
        step: int,
        samples: Sequence[Sample],
        result: StepResult,
        timer: PhaseTimer,
        of_parts: Mapping[str, float],
    ) -> None:
        if (mismatch_kl := result.metrics.get("rollout/mismatch_kl")) is not None:
            self.mismatch_kl_max = max(self.mismatch_kl_max or 0.0, mismatch_kl)
        lengths = [len(s.response_ids) for s in samples]
        num_tokens = sum(len(s.prompt.token_ids) + len(s.response_ids) for s in samples)
        self.metrics.write(
            step,
            {
                **result.metrics,
                "rollout/response_tokens_mean": sum(lengths) / len(lengths),
                "rollout/truncated_fraction": sum(s.finish_reason == "length" for s in samples)
                / len(samples),
                "train/loss_tokens": result.num_tokens,
                "train/skipped": float(result.skipped),
                "perf/tokens_per_s": num_tokens / timer.total_s,
                **of_parts,
                "time/step_s": timer.total_s,
                **timer.metrics(),
                **timer.peak_memory(),
            },
        )

    def _check_finite(self, step: int, samples: Sequence[Sample], result: StepResult) -> None:
        if not result.skipped:
            self._skipped_in_a_row = 0
            return
        self._skipped_in_a_row += 1
        ids = result.nonfinite_sample_ids or tuple(s.sample_id for s in samples)
        logger.warning(
            "step %d skipped: loss or gradient is not finite; samples %s", step, ", ".join(ids)
        )
        if self._skipped_in_a_row >= self.config.train.max_skipped_steps:
            raise NumericError(
                f"step {step}",
                f"loss or gradient not finite {self._skipped_in_a_row} steps in a row, "
                f"last with samples {', '.join(ids[:8])}",
                "lower optimizer.lr, or look at these samples and at the teacher's weights",
            )
