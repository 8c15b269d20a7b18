"""Batches of several authors: who answers what, and what becomes of the samples."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest

from megaopd.batch import Prompt, Sample, SamplingParams
from megaopd.config import Config, LossConfig, MixtureConfig, RolloutConfig, TeacherConfig
from megaopd.config_mixture import check_mixture, data_share
from megaopd.data.packing import Batching, Packing
from megaopd.errors import ConfigError, StopRequested
from megaopd.interruption import stopped
from megaopd.parallel.layout import Layout
from megaopd.rollout.deferred import DeferredRollout
from megaopd.rollout.mixture import SOURCES, Mixture, authors, counts, mixture_metrics
from megaopd.rollout.recorded import RecordedEngine, SampleRecorder
from tests.helpers.background_engine import BackgroundEngine

EOS = 0
PARAMS = SamplingParams(max_new_tokens=4, n=1, stop_token_ids=(EOS,), seed=5)
SHARES = (
    MixtureConfig(on_policy=0.5),
    MixtureConfig(on_policy=0.5, teacher=0.25),
    MixtureConfig(on_policy=0.49, teacher=0.01),
    MixtureConfig(on_policy=0.1, teacher=0.3),
    MixtureConfig(on_policy=1 / 3, teacher=1 / 3),
    MixtureConfig(on_policy=0.0, teacher=1.0),
    MixtureConfig(on_policy=0.0),
    MixtureConfig(on_policy=0.9, teacher=0.1),
)


@pytest.mark.parametrize("shares", SHARES, ids=str)
@pytest.mark.parametrize("num_prompts", [1, 2, 7, 64])
def test_shares_are_exact(shares: MixtureConfig, num_prompts: int):
    """A batch is off by less than one prompt for each author, and no error adds up."""
    total: Counter[str] = Counter()
    exact = {
        "student": shares.on_policy,
        "teacher": shares.teacher,
        "data": data_share(shares),
    }
    for step in range(1, 60):
        of_step = counts(step, num_prompts, shares)
        assert min(of_step.values()) >= 0
        assert sum(of_step.values()) == num_prompts
        total.update(of_step)
        for source in SOURCES:
            assert abs(total[source] - exact[source] * num_prompts * step) <= 1.0 + 1e-9
        assert Counter(authors(step, num_prompts, shares, seed=1)) == Counter(
            {source: n for source, n in of_step.items() if n}
        )


def test_a_half_of_an_even_batch_is_a_half_of_it():
    for step in range(1, 9):
        assert counts(step, 64, MixtureConfig(0.5, 0.25)) == {
            "student": 32,
            "teacher": 16,
            "data": 16,
        }


def test_who_answers_follows_from_step_and_seed():
    shares = MixtureConfig(0.5, 0.25)
    drawn = [tuple(authors(step, 8, shares, seed=1)) for step in range(1, 41)]
    assert drawn == [tuple(authors(step, 8, shares, seed=1)) for step in range(1, 41)]
    assert drawn != [tuple(authors(step, 8, shares, seed=2)) for step in range(1, 41)]
    # Every place of a batch sees every author.
    assert all(set(place) == set(SOURCES) for place in zip(*drawn, strict=True))


class Author:
    """An engine whose responses are its own name's token, once for each prompt token."""

    def __init__(self, token: int, set_aside: Sequence[str] = ()) -> None:
        self.token, self.set_aside = token, set_aside
        self.weight_version = 3
        self.metrics: dict[str, float] = {}
        self.asked: list[Prompt] = []
        self.closed = False

    def start(self, prompts: Sequence[Prompt], params: SamplingParams) -> DeferredRollout:
        self.asked += prompts
        return DeferredRollout(self, prompts, params)

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[Sample]:
        return [
            Sample(
                prompt=prompt,
                index=index,
                response_ids=(self.token,) * len(prompt.token_ids) + (EOS,),
                response_logprobs=(-1.0,) * (len(prompt.token_ids) + 1),
                response_mask=(True,) * (len(prompt.token_ids) + 1),
                finish_reason="stop",
                weight_version=3,
            )
            for prompt in prompts
            if prompt.prompt_id not in self.set_aside
            for index in range(params.n)
        ]

    def load_weights(self, weights, version) -> None:
        raise AssertionError("nobody loads weights here")

    def close(self) -> None:
        self.closed = True


PROMPTS = [
    Prompt(f"p{i}", (1, 2), teacher="math" if i % 2 else "", teacher_token_ids=(1, 2, 3))
    for i in range(8)
]
RESPONSES = {p.prompt_id: (40 + i, EOS) if i % 3 else (40 + i,) * 4 for i, p in enumerate(PROMPTS)}


def make(shares: MixtureConfig, student=None):
    student = student or Author(10)
    teachers = {"": Author(20), "math": Author(21)}
    return Mixture(shares, 1, student, teachers, RESPONSES), student, teachers


def test_every_author_answers_its_own():
    shares = MixtureConfig(0.5, 0.25)
    mixture, student, teachers = make(shares)
    samples = mixture.start(1, PROMPTS, PARAMS).result()
    assert [s.prompt for s in samples] == PROMPTS
    assert [s.source for s in samples] == authors(1, 8, shares, seed=1)
    for sample in samples:
        prompt, ids = sample.prompt, sample.response_ids
        if sample.source == "student":
            assert ids == (10, 10, EOS)
            assert set(sample.response_logprobs) == {-1.0}
            assert sample.weight_version == 3
            continue
        # Nobody else's log-probs or versions are the sampler's.
        assert sample.response_logprobs == (0.0,) * len(ids)
        assert sample.weight_version == 0
        if sample.source == "teacher":
            # It answers what it is shown, and the sample is of the student's prompt.
            assert ids == ((21 if prompt.teacher else 20),) * 3 + (EOS,)
        else:
            assert ids == RESPONSES[prompt.prompt_id]
            assert sample.finish_reason == ("stop" if ids[-1] == EOS else "length")
    assert {p.token_ids for engine in teachers.values() for p in engine.asked} == {(1, 2, 3)}
    assert {p.token_ids for p in student.asked} == {(1, 2)}
    assert mixture_metrics(PROMPTS, samples) == {
        "rollout/student_fraction": 0.5,
        "rollout/teacher_fraction": 0.25,
        "rollout/data_fraction": 0.25,
        "rollout/set_aside": 0.0,
    }
    mixture.close()
    assert all(engine.closed for engine in teachers.values())
    assert not student.closed


def test_samples_are_taken_when_every_author_is_done():
    shares = MixtureConfig(0.5, 0.0)
    student = BackgroundEngine()
    student.load_weights(iter([]), version=0)
    mixture, _, _ = make(shares, student)
    rollout = mixture.start(1, PROMPTS, PARAMS)
    assert rollout.take() is None
    student.load_weights(iter([]), version=1)
    taken = rollout.take()
    assert [s.prompt for s in taken] == PROMPTS
    assert [s.source for s in taken] == authors(1, 8, shares, seed=1)
    assert rollout.result() == taken

    mixture, _, _ = make(MixtureConfig(0.5, 0.25), student)
    rollout = mixture.start(1, PROMPTS, PARAMS)
    student.load_weights(iter([]), version=2)
    # A teacher in these processes samples when the result is asked for.
    assert rollout.take() is None
    rollout.give_up()
    assert student.events[-1] == ("give up", 1)


def test_a_rollout_that_is_to_stop_is_given_up_by_all_authors():
    class Stopped(Author):
        def generate(self, prompts, params):
            raise stopped("SIGUSR1", "a rollout")

    student = BackgroundEngine()
    student.load_weights(iter([]), version=0)
    mixture = Mixture(
        MixtureConfig(0.5, 0.5), 1, student, {"": Stopped(20), "math": Author(21)}, {}
    )
    with pytest.raises(StopRequested, match="SIGUSR1 during a rollout"):
        mixture.start(1, PROMPTS, PARAMS).result()
    assert student.events[-1] == ("give up", 0)


def test_several_samples_of_a_prompt_have_one_author():
    mixture, _, _ = make(MixtureConfig(0.5, 0.5))
    samples = mixture.start(1, PROMPTS, replace(PARAMS, n=3)).result()
    assert [s.sample_id for s in samples] == [f"p{i}/{k}" for i in range(8) for k in range(3)]
    for i in range(8):
        assert len({s.source for s in samples[3 * i : 3 * i + 3]}) == 1


def test_all_the_students_is_the_students_engine():
    mixture, student, _ = make(MixtureConfig())
    assert mixture.start(1, PROMPTS, PARAMS).result() == student.generate(PROMPTS, PARAMS)
    assert mixture_metrics(PROMPTS, student.generate(PROMPTS, PARAMS)) == {}


def test_a_prompt_that_the_student_cannot_answer_is_left_out():
    shares = MixtureConfig(0.5, 0.25)
    whose = authors(1, 8, shares, seed=1)
    aside = PROMPTS[whose.index("student")].prompt_id
    mixture, _, _ = make(shares, Author(10, [aside]))
    samples = mixture.start(1, PROMPTS, PARAMS).result()
    assert [s.prompt.prompt_id for s in samples] == [f"p{i}" for i in range(8) if f"p{i}" != aside]
    assert mixture_metrics(PROMPTS, samples)["rollout/set_aside"] == 1


def test_no_author_asks_anything_of_an_engine_without_a_share():
    mixture, student, teachers = make(MixtureConfig(on_policy=0.0))
    samples = mixture.start(1, PROMPTS, PARAMS).result()
    assert [s.response_ids for s in samples] == list(RESPONSES.values())
    assert student.asked == teachers[""].asked == teachers["math"].asked == []


@pytest.mark.parametrize("micro_batch_size", [1, 3, 8])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_packing_and_layout_change_no_token(micro_batch_size: int, world_size: int):
    """Whose a token is goes with it, whatever the micro-batches and the data-parallel ranks."""
    mixture, _, _ = make(MixtureConfig(0.5, 0.25))
    samples = mixture.start(2, PROMPTS, PARAMS).result()
    batching = Batching(Layout(Config().parallel, world_size), Packing(micro_batch_size))
    assignment = batching.assign(samples)
    seen: dict[int, tuple[int, bool, float]] = {}
    for rank in range(world_size):
        for batch in batching.micro_batches(samples, assignment, rank):
            assert batch.sampled_T is not None
            for row, label, sampled, logprob in zip(
                batch.rows_T.tolist(),
                batch.labels_T.tolist(),
                batch.sampled_T.tolist(),
                batch.rollout_logprobs_T.tolist(),
                strict=True,
            ):
                if row >= 0:
                    assert row not in seen
                    seen[row] = (label, sampled, logprob)
    expected = [
        (token, sample.source == "student", -1.0 if sample.source == "student" else 0.0)
        for sample in samples
        for token in sample.response_ids
    ]
    assert [seen[row] for row in range(len(expected))] == expected


def test_a_recording_keeps_the_authors(tmp_path):
    mixture, _, _ = make(MixtureConfig(0.5, 0.25))
    samples = mixture.start(1, PROMPTS, PARAMS).result()
    SampleRecorder(tmp_path / "samples.jsonl").record(1, PROMPTS, samples)
    again = RecordedEngine(tmp_path / "samples.jsonl").generate(PROMPTS, PARAMS)
    assert again == samples


def configured(**fields) -> Config:
    config = Config()
    rollout = {k: v for k, v in fields.items() if hasattr(config.rollout, k)}
    return replace(
        config,
        rollout=replace(config.rollout, **rollout),
        **{k: v for k, v in fields.items() if k not in rollout},
    )


HALF = MixtureConfig(0.5)
WITH_COLUMN = replace(Config().data, response_column="solution")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            configured(mixture=MixtureConfig(0.7, 0.7)),
            "rollout.mixture: on_policy 0.7 . teacher 0.7 are more than 1; lower one",
        ),
        (configured(mixture=HALF), "data.response_column: not set, and 0.5 of rollout.mixture"),
        (configured(mixture=HALF, data=WITH_COLUMN, n=2), "rollout.n: 2 with the data set's"),
        (
            configured(mixture=MixtureConfig(0.5, 0.5), kind="recorded"),
            "rollout.mixture: set, and rollout.kind is recorded",
        ),
        (
            configured(mixture=MixtureConfig(0, 1), loss=LossConfig(objective="policy_gradient")),
            "rollout.mixture.on_policy: 0 with loss.objective policy_gradient",
        ),
        (
            configured(mixture=MixtureConfig(0, 1), teacher=TeacherConfig(kind="ema")),
            "rollout.mixture.teacher: 1, and teacher.kind is ema, whose weights move",
        ),
        (
            configured(mixture=MixtureConfig(0, 1), teacher=TeacherConfig(kind="average")),
            "rollout.mixture.teacher: 1, and teacher.kind is average, which scores tokens",
        ),
        (
            configured(mixture=MixtureConfig(0, 1), teacher=TeacherConfig(kind="sglang", top_k=0)),
            "teacher.top_k: 0 with rollout.mixture.on_policy 0",
        ),
    ],
    ids=str,
)
def test_what_does_not_go_together(config: Config, message: str):
    with pytest.raises(ConfigError, match=message):
        check_mixture(config, {"teacher": config.teacher})


@pytest.mark.parametrize(
    "config",
    [
        Config(),
        configured(mixture=MixtureConfig(), n=4),
        configured(mixture=HALF, data=WITH_COLUMN),
        configured(mixture=MixtureConfig(0.9, 0.1), n=4),
        configured(
            mixture=MixtureConfig(0, 1),
            teacher=TeacherConfig(kind="sglang", top_k=0),
            loss=LossConfig(objective="likelihood"),
        ),
    ],
    ids=str,
)
def test_what_goes_together(config: Config):
    check_mixture(config, {"teacher": config.teacher})


def test_sections_are_found_by_their_names():
    assert RolloutConfig().mixture is None
    assert data_share(MixtureConfig(0.9, 0.1)) == 0
    assert data_share(MixtureConfig(0.5, 0.25)) == 0.25
