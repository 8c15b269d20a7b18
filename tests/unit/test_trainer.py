"""The loop, synchronous and ahead of itself, with an engine that samples in the background."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest

from megaopd.batch import Prompt, SamplingParams
from megaopd.config import Config, MixtureConfig, ParallelConfig, RolloutConfig, TrainConfig
from megaopd.data.packing import Batching, Packing
from megaopd.data.prompts import PromptStream
from megaopd.errors import NumericError, RolloutError
from megaopd.evaluation import evaluate
from megaopd.parallel.layout import Layout
from megaopd.rollout.mixture import MixedRollout
from megaopd.trainer import OPDTrainer
from megaopd.weight_sync.in_process import InProcessSync
from tests.helpers.background_engine import BackgroundEngine, ListedStudent, Rows, SilentTeacher

NUM_STEPS = 4
PROMPTS = [Prompt(f"p{i}", (1, 2)) for i in range(8)]
EVAL_PROMPTS = [Prompt("e0", (1,)), Prompt("e1", (2,))]


class Digits:
    def decode(self, token_ids, *, skip_special_tokens=False):
        return "".join(map(str, token_ids))


def make_trainer(max_staleness=0, engine=None, student=None, evaluated=False, **rollout):
    """A trainer of 4 steps of 2 prompts with 2 samples each."""
    config = Config(
        rollout=RolloutConfig(n=2, max_new_tokens=4, max_staleness=max_staleness, **rollout),
        train=TrainConfig(num_steps=NUM_STEPS, global_batch_size=4, micro_batch_size=4),
    )
    config = replace(config, eval=replace(config.eval, interval=1 if evaluated else 0))
    sampling = SamplingParams(max_new_tokens=4, n=2)
    evaluator = partial(
        evaluate,
        prompts=EVAL_PROMPTS,
        reward=lambda response, answer: 1.0,
        tokenizer=Digits(),
        params=SamplingParams(max_new_tokens=4, temperature=0.0),
    )
    recorded = []
    trainer = OPDTrainer(
        config,
        student=student or ListedStudent(),
        teacher=SilentTeacher(),
        engine=engine or BackgroundEngine(),
        weight_sync=InProcessSync(),
        prompts=PromptStream(PROMPTS, seed=1),
        sampling=sampling,
        batching=Batching(Layout(ParallelConfig(), 1), Packing(4, None, 1)),
        rank=0,
        evaluator=evaluator if evaluated else None,
        eval_prompts=EVAL_PROMPTS if evaluated else (),
        metrics=Rows(),
        record=lambda *line: recorded.append(line),
    )
    return trainer, recorded


@pytest.mark.parametrize(
    ("max_staleness", "events"),
    [
        (0, "load0 start0 load1 start1 load2 start2 load3 start3 load4"),
        (1, "load0 start0 start1 load1 start2 load2 start3 load3 load4"),
        (2, "load0 start0 start1 start2 load1 start3 load2 load3 load4"),
        (9, "load0 start0 start1 start2 start3 load1 load2 load3 load4"),
    ],
)
def test_which_rollout_starts_when(max_staleness, events):
    """The same prompts with the same random numbers train at the same steps, however far ahead they
    were sampled, and no rollout is started for a step that never comes."""
    trainer, recorded = make_trainer(max_staleness)
    trainer.fit()
    assert " ".join(f"{name}{number}" for name, number in trainer.engine.events) == events

    stream = PromptStream(PROMPTS, seed=1)
    drawn = [[p.prompt_id for p in stream.next(2)] for _ in range(NUM_STEPS)]
    assert [sorted(ids) for ids in trainer.student.trained] == [
        sorted(f"{p}/{i}" for p in step for i in range(2)) for step in drawn
    ]
    assert [[p.prompt_id for p in prompts] for _, prompts, _ in recorded] == drawn
    assert [step for step, _, _ in recorded] == [1, 2, 3, 4]
    synchronous, _ = make_trainer(0)
    synchronous.fit()
    assert trainer.engine.asked == synchronous.engine.asked
    assert len({params.seed for params in trainer.engine.asked}) == NUM_STEPS


@pytest.mark.parametrize(
    ("max_staleness", "versions", "means"),
    [
        (0, ["0000", "1111", "2222", "3333"], [0, 0, 0, 0]),
        # Partial rollouts: half of a response under the weights of its start, half under the next.
        (1, ["0000", "0011", "1122", "2233"], [0, 2 / 3, 2 / 3, 2 / 3]),
        (2, ["0000", "0011", "0011", "1122"], [0, 2 / 3, 5 / 3, 5 / 3]),
    ],
)
def test_which_weights_sampled_what(max_staleness, versions, means):
    """The last token is a tool's, which no weights sampled: two of three tokens may be old."""
    trainer, recorded = make_trainer(max_staleness)
    trainer.fit()
    for (_, _, samples), digits in zip(recorded, versions, strict=True):
        expected = tuple(map(int, digits))
        assert {s.token_versions for s in samples} == {expected}
        assert {s.weight_version for s in samples} == {expected[0]}
    assert trainer.metrics.of("rollout/staleness_mean") == pytest.approx(means)
    bounds = [min(max_staleness, step) for step in range(NUM_STEPS)]
    assert trainer.metrics.of("rollout/staleness_max") == bounds


def test_the_next_rollout_samples_while_this_step_trains():
    """A step that does not end before the next one's rollout has two tokens: with the rollouts one
    after the other it would wait in vain."""
    engine = BackgroundEngine()

    def wait_for_next(step):
        if step < NUM_STEPS:
            rollout = trainer.rollouts.pending[0]
            engine.wait_for(lambda: len(rollout.token_versions) == 2)
            assert rollout.token_versions == [step - 1] * 2

    trainer, _ = make_trainer(1, engine, ListedStudent(before_step=wait_for_next))
    assert trainer.fit().num_steps == NUM_STEPS


def test_evaluation_between_rollouts_under_way():
    """Evaluation asks for samples of its own and disturbs none of those that are under way."""
    alone, recorded_alone = make_trainer(1)
    alone.fit()
    trainer, recorded = make_trainer(1, evaluated=True)
    result = trainer.fit()
    assert recorded == recorded_alone
    assert result.before.answers.accuracy == result.after.answers.accuracy == 1.0
    assert [step for step, row in trainer.metrics.rows if "eval/accuracy" in row] == [0, 1, 2, 3, 4]
    greedy = [params for params in trainer.engine.asked if params.temperature == 0]
    assert len(greedy) == 5
    # The same random numbers at every evaluation.
    sampled = [p.seed for p in trainer.engine.asked if p.n == 1 and p.temperature == 1]
    assert len(sampled) == 5
    assert len(set(sampled)) == 1


@pytest.mark.parametrize(("max_staleness", "missed"), [(0, 1), (1, 2)])
def test_a_sample_older_than_the_bound_never_trains(max_staleness, missed):
    engine = BackgroundEngine()
    engine.missed = missed
    trainer, _ = make_trainer(max_staleness, engine)
    message = (
        rf"sample p\d/0: weights of version -{missed} sampled it, those of version 0 would train "
        rf"on it, and rollout.max_staleness is {max_staleness}; a server missed"
    )
    with pytest.raises(RolloutError, match=message):
        trainer.fit()
    assert trainer.student.trained == []


def test_a_sample_of_weights_that_are_not_ours_never_trains():
    """Newer than those of this run: somebody else updates the server as well."""
    engine = BackgroundEngine()
    engine.missed = -1
    trainer, _ = make_trainer(0, engine)
    with pytest.raises(RolloutError, match=r"weights of version 1 sampled it, and ours are of ve"):
        trainer.fit()
    assert trainer.student.trained == []


def test_a_recording_may_be_of_any_age():
    engine = BackgroundEngine()
    engine.missed = 3
    trainer, _ = make_trainer(0, engine, kind="recorded")
    trainer.fit()
    assert trainer.metrics.of("rollout/staleness_max") == [3] * NUM_STEPS


@pytest.mark.parametrize(
    ("max_staleness", "versions"), [(0, "0000 0000 1111 2222"), (1, "0000 0000 0011 1122")]
)
def test_a_skipped_step_leaves_the_engine_its_weights(max_staleness, versions):
    trainer, recorded = make_trainer(max_staleness, student=ListedStudent(skip=[1]))
    trainer.fit()
    loads = [number for name, number in trainer.engine.events if name == "load"]
    # A version is the number of updates that made it, so that staleness is a difference.
    assert loads == [0, 1, 2, 3]
    seen = ["".join(map(str, samples[0].token_versions)) for _, _, samples in recorded]
    assert " ".join(seen) == versions
    assert trainer.teacher.followed == 3
    assert trainer.metrics.of("train/skipped") == [1, 0, 0, 0]


def test_too_many_skipped_steps_end_the_run():
    trainer, _ = make_trainer(1, student=ListedStudent(skip=[2, 3, 4]))
    with pytest.raises(NumericError, match="step 4: loss or gradient not finite 3 steps in a row"):
        trainer.fit()


def test_prompts_that_the_engine_sets_aside():
    engine = BackgroundEngine()
    stream = PromptStream(PROMPTS, seed=1)
    first, second = stream.next(2), stream.next(2)
    engine.set_aside = {first[0].prompt_id, *(p.prompt_id for p in second)}
    trainer, _ = make_trainer(1, engine)
    with pytest.raises(RolloutError, match="step 2: the engine set every prompt aside"):
        trainer.fit()
    assert trainer.student.trained == [[f"{first[1].prompt_id}/{i}" for i in range(2)]]
    assert trainer.metrics.of("rollout/set_aside") == [1]


def test_evaluation_prompts_that_the_engine_sets_aside():
    engine = BackgroundEngine()
    engine.set_aside = {"e0"}
    trainer, _ = make_trainer(0, engine, evaluated=True)
    assert len(trainer.fit().after.answers.records) == 1
    assert trainer.metrics.of("eval/set_aside") == [1] * (NUM_STEPS + 1)
    engine.set_aside = {"e0", "e1"}
    with pytest.raises(RolloutError, match="evaluation: the engine set every prompt aside; look"):
        trainer.evaluate(1)


def test_steps_whose_samples_others_wrote():
    """A step without a sample of the student has no staleness, and nothing of its engine."""
    engine = BackgroundEngine()
    asked = []

    class Written:
        def __init__(self, step, prompts):
            self.step, self.prompts = step, prompts

        def result(self):
            samples = engine.generate(self.prompts, SamplingParams(max_new_tokens=4, n=2))
            source = "data" if self.step % 2 else "student"
            # Nobody knows of which weights a text of the data set is.
            version = -7 if source == "data" else engine.weight_version
            return [
                replace(s, source=source, weight_version=version, token_versions=())
                for s in samples
            ]

    def start(step, prompts, params):
        asked.append((step, params.seed))
        return Written(step, prompts)

    trainer, recorded = make_trainer(1, engine)
    trainer.rollouts.start = start
    trainer.fit()
    assert [step for step, _ in asked] == [1, 2, 3, 4]
    assert len({seed for _, seed in asked}) == NUM_STEPS
    assert trainer.metrics.of("rollout/data_fraction") == [1, 1]
    assert trainer.metrics.of("rollout/student_fraction") == [0, 0]
    assert len(trainer.metrics.of("rollout/staleness_mean")) == 2
    assert trainer.metrics.of("rollout/set_aside") == [0] * NUM_STEPS
    assert {s.source for _, _, samples in recorded for s in samples} == {"data", "student"}


def test_weights_travel_only_where_the_student_is_asked():
    """Training on others' responses, the engine has new weights for its evaluations alone."""
    mixture = MixtureConfig(on_policy=0.0)
    trainer, _ = make_trainer(0, evaluated=True, mixture=mixture)
    trainer.config = replace(trainer.config, eval=replace(trainer.config.eval, interval=2))
    author = BackgroundEngine()

    def start(step, prompts, params):
        whose = dict.fromkeys((p.prompt_id for p in prompts), "teacher")
        return MixedRollout(tuple(prompts), whose, [author.start(prompts, params)], [])

    trainer.rollouts.start = start
    trainer.fit()
    events = "".join({"load": "L", "start": "e"}[name] for name, _ in trainer.engine.events)
    assert events == "Lee" * 3  # before the first step, after the second and the last


def test_the_figures_of_a_run():
    trainer, _ = make_trainer(1)
    result = trainer.fit()
    assert (result.before, result.after, result.num_steps) == (None, None, NUM_STEPS)
    assert result.mismatch_kl_max == pytest.approx(4e-3)
    assert trainer.metrics.of("rollout/response_tokens_mean") == [4] * NUM_STEPS
    assert trainer.metrics.of("rollout/truncated_fraction") == [1] * NUM_STEPS
    assert trainer.metrics.of("train/loss_tokens") == [16] * NUM_STEPS
