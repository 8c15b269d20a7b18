"""Every check of `megaopd.verify` fails where there is something to find, and names a fix; whole
set-ups are in tests/e2e/test_verify.py."""

from __future__ import annotations

import math
import shutil
from collections import namedtuple
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megaopd.batch import Prompt, Sample, SamplingParams
from megaopd.config import (
    CheckpointConfig,
    Config,
    LoraConfig,
    RolloutConfig,
    RunConfig,
    StudentConfig,
    TeacherConfig,
    TrainConfig,
)
from megaopd.errors import CheckpointError, EnvironmentFault, NumericError, RolloutError
from megaopd.models.arch import read_arch
from megaopd.models.families import param_mappings
from megaopd.protocols import StepResult
from megaopd.rollout.embedded import EmbeddedEngine
from megaopd.verify import static, step, teachers
from megaopd.verify.setup import Setup
from megaopd.verify.static import checkpoint_bytes
from megaopd.verify.table import Check, Table, outcome_of
from tests.helpers.tiny_models import make_tiny_model

WEIGHTS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4)}


def make_setup(**fields: object) -> Setup:
    setup = Setup([], 1, 8)
    config = Config(
        student=StudentConfig(dtype="fp32"),
        teacher=TeacherConfig(path="teacher", dtype="fp32"),
        rollout=RolloutConfig(kind="embedded"),
    )
    for name, value in {"config": config, "small": config, **fields}.items():
        setattr(setup, name, value)
    return setup


def result(**metrics: float) -> StepResult:
    found = {"loss/divergence": 0.5, "train/grad_norm": 1.0, "rollout/mismatch_kl": 0.0}
    named = {name.replace("_", "/", 1): value for name, value in metrics.items()}
    return StepResult(found | named, 4, False)


class Engine(EmbeddedEngine):
    """An embedded engine without a model: it holds what it is told."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self.held, self.weight_version = weights, 1

    def weights(self) -> dict[str, Tensor]:
        return self.held

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[Sample]:
        return []


class Trainer:
    """Of a loop whose step comes to `outcome`; it is its own student, teacher and batching."""

    def __init__(self, outcome: StepResult, mismatch: float = 0.0) -> None:
        self.outcome, self.mismatch = outcome, mismatch
        self.student = self.teacher = self.weight_sync = self.batching = self
        self.sampling = SamplingParams(max_new_tokens=4)
        self.groups = self
        self.rank = 0

    def sync(self, *arguments: object, version: int) -> None:
        pass

    def step(self, number: int) -> StepResult:
        return self.outcome

    def export_weights(self) -> Iterator[tuple[str, Tensor]]:
        yield from WEIGHTS.items()

    def off_device(self) -> object:
        from contextlib import nullcontext

        return nullcontext()

    def assign(self, samples: Sequence[Sample]) -> None:
        return None

    def micro_batches(self, *arguments: object) -> list[object]:
        return []

    def score(self, samples: Sequence[Sample]) -> list[object]:
        return []

    def evaluate(self, *arguments: object) -> StepResult:
        return result(rollout_mismatch_kl=self.mismatch)


def in_the_loop(outcome: StepResult, engine: Engine | None = None, mismatch: float = 0.0) -> Setup:
    trainer = Trainer(outcome, mismatch)
    inputs = type("Inputs", (), {"train_prompts": [Prompt("0", (1,))]})
    return make_setup(
        trainer=trainer,
        engine=engine or Engine(dict(WEIGHTS)),
        inputs=inputs,
        side=trainer,
        teacher=trainer,
        groups=trainer,
        result=outcome,
    )


@pytest.mark.parametrize(
    "outcome",
    [
        result(train_grad_norm=math.nan),
        result(train_grad_norm=math.inf),
        result(train_grad_norm=0.0),
        replace(result(), skipped=True),
    ],
)
def test_a_step_that_cannot_train(outcome: StepResult) -> None:
    with pytest.raises(NumericError, match="first step: ") as caught:
        step._step(in_the_loop(outcome))
    assert caught.value.parts[2]


def test_a_step_that_trains() -> None:
    found = step._step(in_the_loop(result()))
    assert found == "4 tokens, loss/divergence 0.5, gradient norm 1"


@pytest.mark.parametrize("mismatch", [1e-3, math.nan, math.inf])
def test_an_engine_that_computes_something_else(mismatch: float) -> None:
    outcome = result(rollout_mismatch_kl=mismatch)
    with pytest.raises(RolloutError, match="nats a token between engine and trainer, at most"):
        step._mismatch(in_the_loop(outcome))
    # Of bf16 rounding leaves more.
    setup = in_the_loop(outcome)
    setup.config = replace(setup.config, student=StudentConfig(dtype="bf16"))
    if mismatch == 1e-3:
        assert step._mismatch(setup) == "0.001 nats a token between engine and trainer"
    else:
        with pytest.raises(RolloutError, match="at most 0.01"):
            step._mismatch(setup)


@pytest.mark.parametrize("place", [(0, 0), (1, 2)])
def test_an_engine_that_kept_an_older_weight(place: tuple[int, int]) -> None:
    held = {name: tensor.clone() for name, tensor in WEIGHTS.items()}
    assert "SHA-256 of 2 tensors agree" in step._weight_sync(in_the_loop(result(), Engine(held)))
    held["a"][place] += 1e-6
    with pytest.raises(RolloutError, match="weight a: differs between trainer and engine"):
        step._weight_sync(in_the_loop(result(), Engine(held)))


def test_new_samples_that_do_not_match() -> None:
    """The weights are there, and something else is not: a cache of the old ones, say."""
    with pytest.raises(RolloutError, match="rollout/mismatch_kl: 0.5 nats"):
        step._weight_sync(in_the_loop(result(), mismatch=0.5))


@pytest.mark.parametrize("self_kl", [1e-3, math.nan])
def test_a_teacher_that_differs_from_itself(self_kl: float) -> None:
    readings = [teachers.Reading(-1.0, -6.0, 0.0), teachers.Reading(-1.0, -6.0, self_kl)]
    setup = make_setup(readings={"": readings})
    with pytest.raises(NumericError, match="teacher: differs from itself by"):
        teachers.check_agreement(setup)
    setup.readings = {"": readings[:1]}
    assert teachers.check_agreement(setup).endswith("teacher 0")


@pytest.mark.parametrize(
    ("logprob", "noise", "error"),
    [
        (-6.1, -6.0, CheckpointError),  # below noise
        (-5.6, -6.0, CheckpointError),  # hardly above it
        (-2.0, -1.8, CheckpointError),  # noise is as likely as text
        (math.nan, -6.0, NumericError),
        (-math.inf, -6.0, NumericError),
    ],
)
def test_a_teacher_that_knows_nothing(logprob: float, noise: float, error: type) -> None:
    inputs = type("Inputs", (), {"vocab_size": 512})
    setup = make_setup(readings={"": [teachers.Reading(logprob, noise, 0.0)]}, inputs=inputs)
    with pytest.raises(error) as caught:
        teachers.check_knowledge(setup)
    assert "check_conversion.py" in caught.value.parts[2]
    setup.readings = {"": [teachers.Reading(-2.0, -6.0, 0.0)]}
    assert teachers.check_knowledge(setup).startswith("teacher -2.00 nats a token of the prompts")


def test_memory_that_is_short_has_a_fix() -> None:
    def loads(setup: object) -> str:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nmore")

    outcome = outcome_of(Check(loads), None)
    assert (outcome.status, outcome.exit_status) == ("FAIL", 5)
    assert outcome.found == "CUDA out of memory. Tried to allocate 2.00 GiB"
    assert "megaopd.plan" in outcome.fix


def test_a_defect_of_ours_is_no_row() -> None:
    def broken(setup: object) -> str:
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        Table(print).run({"broken": Check(broken)}, None)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("verify") / "student")


def numel(student: Path) -> int:
    mappings = param_mappings(read_arch(student)).values()
    return sum(math.prod(shape) for m in mappings for shape in m.layout.hf_shapes())


def with_checkpoints(student: Path, dtype: str = "fp32", **kept: object) -> Config:
    return Config(
        run=RunConfig(dir=str(student.parent / "run")),
        student=StudentConfig(str(student), dtype),
        teacher=TeacherConfig(path=str(student), dtype=dtype),
        train=TrainConfig(num_steps=100, export=True),
        checkpoint=CheckpointConfig(**kept),
    )


def test_what_checkpoints_take(student: Path) -> None:
    arch, n = read_arch(student), numel(student)

    def taken(config: Config) -> float:
        return checkpoint_bytes(config, arch) / n

    assert taken(with_checkpoints(student)) == 4 + 8  # the one of a run that is stopped
    assert taken(with_checkpoints(student, interval=10)) == 3 * 12  # two, and one under way
    assert taken(with_checkpoints(student, "bf16", interval=10)) == 3 * (2 + 12)
    assert taken(with_checkpoints(student, interval=60)) == 2 * 12  # there are no more
    assert taken(with_checkpoints(student, interval=10, keep_every=50)) == 5 * 12
    assert taken(with_checkpoints(student, interval=10, keep_every=4)) == 8 * 12  # 20, 40, ...
    assert taken(with_checkpoints(student, interval=50, export_hf=True)) == 2 * (12 + 4)
    config = with_checkpoints(student, interval=10)
    ema = replace(config, teacher=TeacherConfig(kind="ema", dtype="fp32"))
    assert taken(ema) == 3 * (12 + 4)
    frozen = replace(config, student=replace(config.student, freeze=("model.*", "lm_head*")))
    assert taken(frozen) == 3 * 4
    lora = replace(config, student=replace(config.student, lora=LoraConfig(rank=1)))
    assert 0 < taken(lora) < 1


@pytest.mark.parametrize("missing", [0, 1])
def test_a_disk_without_room(student: Path, monkeypatch: pytest.MonkeyPatch, missing: int) -> None:
    config = with_checkpoints(student, interval=10)
    setup = make_setup(config=config, student_arch=read_arch(student))
    wanted = 4 * numel(student) + checkpoint_bytes(config, setup.student_arch)
    usage = namedtuple("usage", "free")(wanted - missing)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage)
    if missing:
        with pytest.raises(EnvironmentFault, match="GB will be written; make room"):
            static._disk(setup)
    else:
        assert static._disk(setup).startswith("run.dir: 0.0")
