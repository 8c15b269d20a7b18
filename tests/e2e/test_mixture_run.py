"""Recipes of mixed batches, whole runs: the first step's loss is what transformers computes from
the recorded samples, whatever the layout."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from megaopd.batch import Sample, SamplingParams
from megaopd.config import load
from megaopd.data.tokenizer import load_tokenizer
from megaopd.rollout.embedded import EmbeddedEngine
from megaopd.rollout.recorded import sample_of
from tests.helpers.runs import make_run, metrics_of, run_training

pytestmark = pytest.mark.slow

RESPONSES = [f"{'ab' * (i % 5)}c" for i in range(64)]


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("mixture")
    config = make_run(directory)
    path = directory / "train.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [{**row, "response": text} for row, text in zip(rows, RESPONSES, strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return config


def run(config: Path, out: Path, recipe: str, *overrides: str, num_ranks: int = 1) -> list[Sample]:
    """Two steps of a recipe; the samples of the first."""
    record = out / "samples.jsonl"
    done = run_training(
        config,
        num_ranks,
        f"+recipes={recipe}",
        f"run.dir={out}",
        f"rollout.record={record}",
        "train.num_steps=2",
        "data.eval=",
        *overrides,
    )
    assert done.returncode == 0, done.stderr
    first = json.loads(record.read_text().splitlines()[0])
    return [sample_of(fields) for fields in first["samples"]]


def logits_of(directory: Path, sample: Sample) -> Tensor:
    """fp64 [R, V] logits at the response's tokens, of plain transformers."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    ids = torch.tensor([[*sample.prompt.token_ids, *sample.response_ids]])
    with torch.no_grad():
        logits = model(ids).logits[0].double()
    return logits[len(sample.prompt.token_ids) - 1 : -1]


def mean_over_tokens(values: list[Tensor]) -> float:
    return float(torch.cat(values).mean())


def nll(directory: Path, samples: list[Sample]) -> float:
    return mean_over_tokens(
        [
            -logits_of(directory, s)
            .log_softmax(-1)
            .gather(-1, torch.tensor(s.response_ids)[:, None])[:, 0]
            for s in samples
        ]
    )


def test_sft_is_the_likelihood_of_the_data(config, tmp_path):
    samples = run(config, tmp_path / "out", "sft")
    tokenizer = load_tokenizer(config.parent / "student")
    given = {f"train{i}": text for i, text in enumerate(RESPONSES)}
    for sample in samples:
        ids = tokenizer(given[sample.prompt.prompt_id]).input_ids
        assert sample.response_ids == (*ids, tokenizer.eos_token_id)
        assert (sample.source, sample.finish_reason) == ("data", "stop")
    expected = nll(config.parent / "student", samples)
    losses = metrics_of(tmp_path / "out", "loss/likelihood")
    assert losses[0] == pytest.approx(expected, rel=1e-5)
    assert metrics_of(tmp_path / "out", "rollout/data_fraction") == [1, 1]
    for name in ("rollout/mismatch_kl", "rollout/staleness_mean", "loss/divergence"):
        assert metrics_of(tmp_path / "out", name) == []  # nothing of it is measured


def test_sequence_kd_is_the_likelihood_of_the_teachers_samples(config, tmp_path):
    samples = run(config, tmp_path / "out", "sequence_kd")
    assert {s.source for s in samples} == {"teacher"}
    expected = nll(config.parent / "student", samples)
    assert metrics_of(tmp_path / "out", "loss/likelihood")[0] == pytest.approx(expected, rel=1e-5)
    # They are the teacher's own: those that its model samples with the same random numbers.
    engine = EmbeddedEngine.from_pretrained(
        str(config.parent / "teacher"), device="cpu", dtype=torch.float32, batch_size=8
    )
    import hashlib

    seed = load([f"conf={config}"]).run.seed
    digest = hashlib.sha256(f"{seed}/train/1".encode()).digest()
    eos = load_tokenizer(config.parent / "teacher").eos_token_id
    params = SamplingParams(12, seed=int.from_bytes(digest[:6], "big"), stop_token_ids=(eos,))
    again = engine.generate([s.prompt for s in samples], params)
    assert [s.response_ids for s in again] == [s.response_ids for s in samples]


@pytest.fixture(scope="module")
def gkd(config, tmp_path_factory) -> tuple[Path, list[Sample]]:
    out = tmp_path_factory.mktemp("gkd") / "out"
    return out, run(config, out, "gkd", "rollout.mixture.teacher=0.25")


def test_gkd_is_the_jsd_of_all_tokens(config, gkd):
    out, samples = gkd
    sources = [s.source for s in samples]
    assert {source: sources.count(source) for source in set(sources)} == {
        "student": 4,
        "teacher": 2,
        "data": 2,
    }
    values = []
    for sample in samples:
        student, teacher = (
            logits_of(config.parent / role, sample).log_softmax(-1)
            for role in ("student", "teacher")
        )
        middle = torch.logaddexp(student, teacher) - math.log(2)
        sides = [(x.exp() * (x - middle)).sum(-1) for x in (student, teacher)]
        values.append((sides[0] + sides[1]) / 2)
    losses = metrics_of(out, "loss/divergence")
    assert losses[0] == pytest.approx(mean_over_tokens(values), rel=1e-4)
    assert len(metrics_of(out, "teacher/entropy")) == 2
    # Measured on the student's own tokens alone; others have no sampler to differ from.
    assert max(metrics_of(out, "rollout/mismatch_kl")) < 1e-6
    assert max(metrics_of(out, "rollout/mismatch_max")) < 1e-3


@pytest.mark.parametrize(
    ("num_ranks", "overrides"),
    [
        (1, ["train.micro_batch_size=1"]),
        (1, ["train.max_tokens_per_micro_batch=96"]),
        (2, []),
        (2, ["parallel.tensor=2"]),
        (2, ["parallel.pipeline=2"]),
        (2, ["parallel.context=2"]),
    ],
)
def test_layout_and_packing_change_nothing(config, gkd, tmp_path, num_ranks, overrides):
    out, samples = gkd
    words = ["rollout.mixture.teacher=0.25", *overrides]
    again = run(config, tmp_path / "out", "gkd", *words, num_ranks=num_ranks)
    assert [(s.sample_id, s.source, s.response_ids) for s in again] == [
        (s.sample_id, s.source, s.response_ids) for s in samples
    ]
    for name in ("loss/divergence", "train/grad_norm", "train/loss_tokens"):
        ours, theirs = metrics_of(tmp_path / "out", name), metrics_of(out, name)
        assert ours[0] == pytest.approx(theirs[0], rel=1e-5), name
        assert ours[1] == pytest.approx(theirs[1], rel=1e-3), name


def test_distillm_skews(config, tmp_path):
    samples = run(config, tmp_path / "out", "distillm")
    values = []
    for sample in samples:
        student, teacher = (
            logits_of(config.parent / role, sample).log_softmax(-1)
            for role in ("student", "teacher")
        )
        middle = torch.logaddexp(teacher + math.log(0.1), student + math.log(0.9))
        values.append((teacher.exp() * (teacher - middle)).sum(-1))
    losses = metrics_of(tmp_path / "out", "loss/divergence")
    assert losses[0] == pytest.approx(mean_over_tokens(values), rel=1e-4)
