"""Recording samples and replaying them."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace

import pytest

from megaopd.batch import Prompt, Sample, SamplingParams
from megaopd.errors import DataError, RolloutError
from megaopd.rollout.recorded import RecordedEngine, SampleRecorder

PARAMS = SamplingParams(max_new_tokens=4, n=2)
PROMPTS = [
    Prompt("a", (1, 2, 3), answer="vier \u2028 \u00fc\n", teacher="math"),
    Prompt("b", (9,), answer=None),
]


def make_samples(prompts: list[Prompt], version: int) -> list[Sample]:
    """Two samples per prompt, with log-probabilities that need all their digits."""
    return [
        Sample(
            prompt=prompt,
            index=index,
            response_ids=(5, 6, index),
            response_logprobs=(-1 / 3 - index, -math.pi * 1e-7, -5e-324),
            response_mask=(True, False, True),
            finish_reason="stop" if index else "length",
            weight_version=version,
            token_versions=(version, version, version + 1) if index else (),
        )
        for prompt in prompts
        for index in range(2)
    ]


@pytest.fixture
def path(tmp_path):
    """A file of two recorded steps, 3 and 4; the second has its prompts the other way round."""
    file = tmp_path / "new" / "samples.jsonl"
    recorder = SampleRecorder(file)
    recorder.record(3, PROMPTS, make_samples(PROMPTS, version=2))
    recorder.record(4, PROMPTS[::-1], make_samples(PROMPTS[::-1], version=3))
    return file


def test_replay_is_exact(path):
    assert len(path.read_text().splitlines()) == 2
    engine = RecordedEngine(path)
    assert engine.generate(PROMPTS, PARAMS) == make_samples(PROMPTS, version=2)
    engine.load_weights(iter([]), version=7)
    assert engine.weight_version == 7
    # The samples still tell which weights really sampled them.
    assert engine.generate(PROMPTS[::-1], PARAMS) == make_samples(PROMPTS[::-1], version=3)
    with pytest.raises(RolloutError, match="no recorded step is left"):
        engine.generate(PROMPTS, PARAMS)


def test_results_come_in_the_order_of_the_starts(path):
    engine = RecordedEngine(path)
    first, second = engine.start(PROMPTS, PARAMS), engine.start(PROMPTS[::-1], PARAMS)
    assert first.result() == make_samples(PROMPTS, version=2)
    assert second.result() == make_samples(PROMPTS[::-1], version=3)
    engine.close()


def test_a_prompt_that_was_set_aside_stays_so(tmp_path):
    path = tmp_path / "samples.jsonl"
    SampleRecorder(path).record(1, PROMPTS, make_samples(PROMPTS[1:], version=2))
    row = json.loads(path.read_text())
    assert (row["set_aside"], row["weight_version"]) == (["a"], 2)
    engine = RecordedEngine(path)
    assert engine.generate(PROMPTS, PARAMS) == make_samples(PROMPTS[1:], version=2)
    assert engine.metrics == {"rollout/set_aside": 1.0}


def test_recording_starts_afresh(path):
    SampleRecorder(path).record(1, [], [])
    assert RecordedEngine(path).generate([], PARAMS) == []
    assert len(path.read_text().splitlines()) == 1


@pytest.mark.parametrize(
    ("prompts", "n", "message"),
    [
        (PROMPTS[::-1], 2, "step 3: sample a/0 is recorded where b/0 is asked for"),
        (PROMPTS, 1, "step 3: sample a/1 is recorded where b/0 is asked for"),
        (PROMPTS[:1], 2, "step 3: 4 samples are recorded where 2 are asked for"),
        ([*PROMPTS, Prompt("c", (1,))], 2, "step 3: 4 samples are recorded where 6"),
        (
            [PROMPTS[0], replace(PROMPTS[1], token_ids=(8,))],
            2,
            "step 3: prompt b was recorded with other token ids",
        ),
    ],
)
def test_other_prompts_are_refused(path, prompts, n, message):
    with pytest.raises(RolloutError, match=message):
        RecordedEngine(path).generate(prompts, replace(PARAMS, n=n))


@pytest.mark.parametrize(
    "line",
    [
        b'{"step": 4, "weight_ver',
        b'{"step": 4}',
        b"[]",
        b'{"step": 4, "set_aside": [], "samples": [{"prompt": {"prompt_id": "a"}}]}',
        b"\xff\xfe",
    ],
)
def test_damage_is_found_with_its_line(path, line):
    first = path.read_bytes().splitlines()[0]
    path.write_bytes(first + b"\n" + line + b"\n")
    engine = RecordedEngine(path)
    engine.generate(PROMPTS, PARAMS)
    with pytest.raises(DataError, match=r"samples\.jsonl:2: not a recorded step"):
        engine.generate(PROMPTS, PARAMS)


def test_files_that_cannot_be_used(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        RecordedEngine(tmp_path / "none.jsonl")
    with pytest.raises(DataError, match="cannot be written"):
        SampleRecorder(tmp_path)
    recorder = SampleRecorder(tmp_path / "gone" / "samples.jsonl")
    shutil.rmtree(tmp_path / "gone")
    with pytest.raises(DataError, match="cannot be written"):
        recorder.record(1, [], [])
