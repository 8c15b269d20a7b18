"""The loop of on-policy distillation. It knows protocols only: no Megatron, no SGLang."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from typing import Any

from megaopd.batch import PackedBatch, Prompt, Sample, SamplingParams, TeacherSignal
from megaopd.config import Config
from megaopd.credit import CreditAssignment
from megaopd.data.packing import Batching, with_credit
from megaopd.data.prompts import PromptStream
from megaopd.errors import StopRequested
from megaopd.evaluation import EvalResult, eval_metrics, nothing_sampled
from megaopd.evaluation.of_run import Evaluation
from megaopd.guard import Guard
from megaopd.interruption import Interruption
from megaopd.logger import get_logger
from megaopd.losses.objective import needs_teacher
from megaopd.metrics import MetricsWriter, PhaseTimer
from megaopd.parallel.agreement import first_reason
from megaopd.protocols import (
    Checkpoints,
    RolloutEngine,
    StepResult,
    Student,
    Teacher,
    WeightSync,
)
from megaopd.rollout.in_flight import RolloutsInFlight, StartRollout
from megaopd.rollout.mixture import mixture_metrics
from megaopd.rollout.staleness import staleness

logger = get_logger(__name__)

Watch = Callable[[str, int], AbstractContextManager[None]]
"""(phase, step) -> a block that is watched: by deadlines, by a person."""


def _unwatched(phase: str, step: int) -> AbstractContextManager[None]:
    return nullcontext()


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

    Between two phases the ranks agree on whether the run is to stop. Up to the teacher's word a
    step has changed nothing: it is given up, and a resumed run begins it again. From there on it is
    finished first.

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
        checkpoints: where the run is saved; None saves nothing.
        interruption: whether this process is to stop.
        watch: who looks at the phases.
        keep_evaluation: takes ("before" or "after", evaluation) of every evaluation.
        throughput: (samples, metrics of the phases) -> metrics of the devices' work.

    Attributes:
        done: steps that are done; skipped ones count.
        rollouts: of the next step and those after it, as far as they have begun.
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
        checkpoints: Checkpoints | None = None,
        interruption: Interruption | None = None,
        watch: Watch = _unwatched,
        keep_evaluation: Callable[[str, Evaluation], None] = lambda name, evaluation: None,
        throughput: Callable[[Sequence[Sample], Mapping[str, float]], dict[str, float]] = (
            lambda samples, phases: {}
        ),
    ) -> None:
        self.config = config
        self.student, self.teacher, self.engine = student, teacher, engine
        self.weight_sync = weight_sync
        self.prompts, self.sampling = prompts, sampling
        self.batching, self.rank = batching, rank
        self.evaluator, self.eval_prompts = evaluator, eval_prompts
        self.metrics = metrics
        self.record, self.credit = record, credit
        self.checkpoints, self.watch = checkpoints, watch
        self.interruption = interruption or Interruption()
        self.keep_evaluation, self.throughput = keep_evaluation, throughput
        self.guard = Guard(config.guard, config.train.max_skipped_steps)
        # Otherwise it is the yardstick of evaluations alone.
        self._asks_teacher = needs_teacher(config.loss) or (
            credit is not None and credit.needs_scores
        )
        # Where others write all responses, the engine needs its weights for evaluations alone.
        mixture = config.rollout.mixture
        self._asks_student = mixture is None or mixture.on_policy > 0
        self._engine_is_behind = False
        self.rollouts = RolloutsInFlight(
            start_rollout or (lambda step, prompts, params: engine.start(prompts, params)),
            engine,
            lambda step: self._seeded("train", step),
        )
        self.done = 0
        self.mismatch_kl_max: float | None = None
        self._weight_version = 0
        self._train_wall_s = 0.0
        self._evaluated = -1
        self._before: Evaluation | None = None
        self._after: Evaluation | None = None

    def fit(self) -> FitResult:
        """Runs all steps that are not done, evaluating before, after and every `eval.interval`
        steps.

        Raises:
            NumericError: `train.max_skipped_steps` steps in a row had a non-finite loss or
                gradient, or the guard saw a run gone wrong.
            RolloutError: the engine cannot answer; the student is as its last step left it.
            StopRequested: the process was told to stop; a checkpoint is complete.
            CheckpointError, EnvironmentFault: a checkpoint cannot be written.
        """
        try:
            with self.watch("weight_sync", self.done):
                self.weight_sync.sync(self.student, self.engine, self._weight_version)
            self.rollouts.resume()
            while True:
                self._stop_if_asked()
                if self._evaluation_is_due():
                    self._after = self.evaluate(self.done)
                    self._before = self._before if self.done else self._after
                    self._evaluated = self.done
                if self._checkpoint_is_due():
                    self._save()
                if self.done >= self.config.train.num_steps:
                    break
                start = time.monotonic()
                self.step(self.done + 1)
                self._train_wall_s += time.monotonic() - start
        except StopRequested as stop:
            raise self._stopped(stop) from None
        if self.checkpoints is not None:
            with self.watch("checkpoint", self.done):
                self.checkpoints.finish()
        return FitResult(
            self._before, self._after, self.done, self._train_wall_s, self.mismatch_kl_max
        )

    def step(self, step: int) -> StepResult:
        """One step, numbered from 1.

        Raises:
            StopRequested: the step is given up, and has changed nothing.
        """
        timer = PhaseTimer()
        with self._phase(timer, "rollout", step), self.student.off_device():
            self._start_rollouts(step)
            prompts, samples, engine_metrics = self.rollouts.first()
        self._stop_if_asked()
        if not samples:
            raise nothing_sampled(f"step {step}")
        rollout_metrics = mixture_metrics(prompts, samples)
        own = [sample for sample in samples if sample.source == "student"]
        if own:
            version, rollout = self.engine.weight_version, self.config.rollout
            # A recording holds what other weights sampled; its versions are those of its own run.
            bound = None if rollout.kind == "recorded" else rollout.max_staleness
            rollout_metrics |= staleness(own, version, bound) | engine_metrics
        with timer.phase("pack"):
            assignment = self.batching.assign(samples)
            micro_batches = self.batching.micro_batches(samples, assignment, self.rank)
        with self._phase(timer, "teacher", step):
            signals = self.teacher.score(samples) if self._asks_teacher else []
        self._stop_if_asked()
        self.rollouts.drop_first()
        if self.record is not None:
            self.record(step, prompts, samples)
        with self.watch("student", step):
            with timer.phase("credit"):
                micro_batches, credit_metrics = self._worth(samples, micro_batches, signals)
            with timer.phase("student"):
                result = self.student.train_step(micro_batches, signals, step)
        del signals
        with self._phase(timer, "weight_sync", step):
            if not result.skipped:
                self.teacher.follow(self.student)
                self._engine_is_behind = True
                if self._asks_student:
                    self._sync()
        self.done = step

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
                **(self.checkpoints.metrics if self.checkpoints else {}),
            },
        )
        return result

    def state_dict(self) -> dict[str, Any]:
        """Where the run is between two steps, JSON-compatible and equal on every rank: all but the
        tensors of its parts. Collective."""
        return {
            "step": self.done,
            "config": asdict(self.config),
            "weight_version": self.engine.weight_version,
            "prompts": self.prompts.state_dict(),
            "credit": self.credit.state_dict() if self.credit else {},
            "guard": self.guard.state_dict(),
            "rollouts": self.rollouts.state_dict(),
            "evaluated": self._evaluated,
            "mismatch_kl_max": self.mismatch_kl_max,
            "train_wall_s": self._train_wall_s,
            "reverse_kl": [e and e.reverse_kl for e in (self._before, self._after)],
        }

    def load_state_dict(
        self, state: Mapping[str, Any], before: EvalResult | None, after: EvalResult | None
    ) -> None:
        """Goes on where `state_dict` was taken.

        Args:
            before, after: the answers of the first and the last evaluation, as far as they are
                there.

        Raises:
            CheckpointError: the data or the seed are not what they were.
        """
        self.done = int(state["step"])
        self._weight_version = int(state["weight_version"])
        self.prompts.load_state_dict(state["prompts"])
        if self.credit is not None:
            self.credit.load_state_dict(state["credit"])
        self.guard.load_state_dict(state["guard"])
        self.rollouts.load_state_dict(
            state["rollouts"], {prompt.prompt_id: prompt for prompt in self.prompts.prompts}
        )
        self.mismatch_kl_max = state["mismatch_kl_max"]
        self._train_wall_s = float(state["train_wall_s"])
        self._evaluated = int(state["evaluated"])
        self._before, self._after = (
            Evaluation(answers, reverse_kl) if answers and reverse_kl is not None else None
            for answers, reverse_kl in zip((before, after), state["reverse_kl"], strict=True)
        )

    @contextmanager
    def _phase(self, timer: PhaseTimer, name: str, step: int) -> Iterator[None]:
        with self.watch(name, step), timer.phase(name):
            yield

    def _stop_if_asked(self) -> None:
        """Between two phases: completes a checkpoint whose files are written, and stops where any
        rank is told to.

        Raises:
            StopRequested: on every rank alike.
        """
        if self.checkpoints is not None:
            with self.watch("checkpoint", self.done):
                self.checkpoints.poll()
        reason = first_reason(self.interruption.reason)
        if reason is not None:
            raise StopRequested("run", reason, "start it again to go on")

    def _stopped(self, stop: StopRequested) -> StopRequested:
        """Saves the run, and says where."""
        where, reason, remedy = stop.parts
        self._keep_rollouts()
        if self.done == 0 or self.checkpoints is None:
            return StopRequested(where, f"{reason}, before the first step was done", remedy)
        self._save()
        with self.watch("checkpoint", self.done):
            self.checkpoints.finish()
        return StopRequested(
            where,
            f"{reason}; the checkpoint of step {self.done} is complete",
            "start the same command again to go on",
        )

    def _keep_rollouts(self) -> None:
        """Nothing samples any more; what is there already goes into the checkpoint."""
        self.rollouts.state_dict()
        self.rollouts.give_up()

    def _evaluation_is_due(self) -> bool:
        done, interval = self.done, self.config.eval.interval
        due = done in (0, self.config.train.num_steps) or bool(interval and done % interval == 0)
        return due and self._evaluated != done

    def _checkpoint_is_due(self) -> bool:
        interval = self.config.checkpoint.interval
        last = self.done == self.config.train.num_steps
        return bool(interval and self.done and (last or self.done % interval == 0))

    def _save(self) -> None:
        """Begins a checkpoint of what is done, unless there is one."""
        if self.checkpoints is not None and self.checkpoints.newest != self.done:
            with self.watch("checkpoint", self.done):
                self.checkpoints.save(self.done, self.state_dict())

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
        while len(self.rollouts) <= ahead:
            prompts = self.prompts.next(config.train.global_batch_size // config.rollout.n)
            self.rollouts.begin(step + len(self.rollouts), prompts)

    def evaluate(self, step: int) -> Evaluation | None:
        """Accuracy and reverse KL on the held-out prompts."""
        if self.evaluator is None:
            return None
        timer = PhaseTimer()
        with self._phase(timer, "eval", step):
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
        self.keep_evaluation("after" if step else "before", evaluation)
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
        phases = timer.metrics()
        metrics = {
            **result.metrics,
            "rollout/response_tokens_mean": sum(lengths) / len(lengths),
            "rollout/truncated_fraction": sum(s.finish_reason == "length" for s in samples)
            / len(samples),
            "train/loss_tokens": result.num_tokens,
            "train/skipped": float(result.skipped),
            "perf/tokens_per_s": num_tokens / timer.total_s,
            **self.throughput(samples, phases),
            **of_parts,
            "time/step_s": timer.total_s,
            **phases,
            **timer.peak_memory(),
        }
        self.metrics.write(step, metrics)
        if result.skipped:
            ids = result.nonfinite_sample_ids or tuple(s.sample_id for s in samples)
            self.guard.skipped(step, ids)
        else:
            self.guard.check(step, metrics)
