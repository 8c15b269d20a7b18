"""An evaluation goes on where it was ended, with the result that it would have had."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path

import pytest

from megaopd.batch import Prompt, Sample, SamplingParams
from megaopd.errors import ConfigError, DataError, EnvironmentFault, RolloutError
from megaopd.evaluation.journal import Journal
from megaopd.evaluation.progress import AHEAD, answer_all
from megaopd.evaluation.scoring import score_all
from megaopd.rollout.deferred import DeferredRollout

SETTINGS = {"model": "m", "n": 2, "stop_token_ids": (0,), "temperature": 0.7}
PROMPTS = [Prompt(f"p{i}", (1, i), "7") for i in range(7)]
PARAMS = SamplingParams(max_new_tokens=4, n=2, seed=3)


class Random:
    """An engine whose responses follow from seed, prompt and index, as engines' have to.

    Args:
        fails_after: prompts after which it cannot answer any more.
        set_aside: ids of prompts that it refuses.
    """

    def __init__(self, fails_after: int = 99, set_aside: Sequence[str] = ()) -> None:
        self.fails_after, self.set_aside = fails_after, set_aside
        self.weight_version = 0
        self.metrics: dict[str, float] = {}
        self.asked: list[str] = []

    def start(self, prompts, params) -> DeferredRollout:
        return DeferredRollout(self, prompts, params)

    def generate(self, prompts, params) -> list[Sample]:
        self.asked += [p.prompt_id for p in prompts]
        if len(self.asked) > self.fails_after:
            raise RolloutError("engine", "it died", "look at it")
        samples = []
        for prompt in prompts:
            if prompt.prompt_id in self.set_aside:
                continue
            for index in range(params.n):
                rng = random.Random(f"{params.seed}/{prompt.prompt_id}/{index}")
                ids = tuple(rng.randrange(5, 9) for _ in range(rng.randrange(1, 5)))
                mask = (True,) * len(ids)
                logprobs = (-1.0,) * len(ids)
                samples.append(Sample(prompt, index, ids, logprobs, mask, "stop", 0))
        return samples

    def load_weights(self, weights, version) -> None:
        raise AssertionError("nobody loads weights here")

    def close(self) -> None:
        """It started nothing."""


class Digits:
    def decode(self, token_ids, *, skip_special_tokens=False) -> str:
        return "".join(map(str, token_ids))


def reward(response: str, answer: str | None) -> float:
    return float("7" in response)


def run(path: Path, engine: Random, portion: int = 2) -> Journal:
    journal = Journal(path, SETTINGS)
    answer_all(
        engine,
        PROMPTS,
        PARAMS,
        lambda samples: score_all(samples, reward, Digits()),
        done=journal.done,
        add=journal.add,
        portion=portion,
    )
    return journal


def test_everything_is_asked_once(tmp_path):
    engine = Random()
    journal = run(tmp_path / "a", engine)
    assert engine.asked == list(journal.done) == [p.prompt_id for p in PROMPTS]
    assert [r.index for r in journal.done["p3"]] == [0, 1]
    again = Random()
    assert run(tmp_path / "a", again).done == journal.done
    assert again.asked == []


@pytest.mark.parametrize("portion", [1, 2, 3, 100])
def test_portions_change_nothing(tmp_path, portion: int):
    whole = run(tmp_path / "whole", Random(), 100)
    assert run(tmp_path / "portions", Random(), portion).done == whole.done


@pytest.mark.parametrize("fails_after", [0, 1, 2, 5, 6])
def test_an_engine_that_died(tmp_path, fails_after: int):
    """What was answered before stays; the next process asks the rest alone."""
    whole = run(tmp_path / "whole", Random())
    with pytest.raises(RolloutError, match="it died"):
        run(tmp_path / "a", Random(fails_after), portion=1)
    done = Journal(tmp_path / "a", SETTINGS).done
    assert list(done) == [p.prompt_id for p in PROMPTS[:fails_after]]
    second = Random()
    journal = run(tmp_path / "a", second, portion=1)
    assert journal.done == whole.done
    assert second.asked == [p.prompt_id for p in PROMPTS[fails_after:]]
    assert (tmp_path / "a").read_bytes() == (tmp_path / "whole").read_bytes()


def test_a_kill_at_any_byte(tmp_path):
    """Whatever a process that was killed had written of the file, going on gives the same file."""
    whole = run(tmp_path / "whole", Random())
    content = (tmp_path / "whole").read_bytes()
    starts = [i + 1 for i, byte in enumerate(content) if byte == ord("\n")]
    places = {0, 1, len(content), *starts, *(s - 1 for s in starts), *range(0, len(content), 53)}
    for place in sorted(places):
        path = tmp_path / "cut"
        path.write_bytes(content[:place])
        assert run(path, Random()).done == whole.done, place
        assert path.read_bytes() == content, place


def test_prompts_that_the_engine_refuses_are_not_asked_again(tmp_path):
    journal = run(tmp_path / "a", Random(set_aside=["p2"]))
    assert journal.done["p2"] == []
    again = Random()
    run(tmp_path / "a", again)
    assert again.asked == []


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("n", 4, "n 2, and now it is 4"),
        ("temperature", 1.0, r"temperature 0.7, and now it is 1.0"),
        ("stop_token_ids", (0, 1), r"stop_token_ids \[0\], and now it is \[0, 1\]"),
        ("reward", "math", 'reward null, and now it is "math"'),
    ],
)
def test_other_settings_need_another_file(tmp_path, key: str, value, words: str):
    run(tmp_path / "a", Random())
    with pytest.raises(ConfigError, match=f"{words}; choose another --out"):
        Journal(tmp_path / "a", {**SETTINGS, key: value})
    # Nothing was lost, and --overwrite begins anew.
    assert len(Journal(tmp_path / "a", SETTINGS).done) == len(PROMPTS)
    anew = Journal(tmp_path / "a", {**SETTINGS, key: value}, overwrite=True)
    assert anew.done == {}
    assert Journal(tmp_path / "a", {**SETTINGS, key: value}).done == {}


@pytest.mark.parametrize(
    "line",
    [
        b"{",
        b"[]",
        b'{"prompt_id": "p"}',
        b'{"prompt_id": "p", "records": [{}]}',
        b"\xff",
        b'{"prompt_id": "p", "records": 3}',
    ],
)
def test_a_damaged_line_in_the_middle(tmp_path, line: bytes):
    run(tmp_path / "a", Random())
    lines = (tmp_path / "a").read_bytes().splitlines(keepends=True)
    (tmp_path / "a").write_bytes(b"".join([*lines[:2], line + b"\n", *lines[2:]]))
    with pytest.raises(DataError, match=r"a:3: not a line of an evaluation .*; pass --overwrite"):
        Journal(tmp_path / "a", SETTINGS)


def test_a_file_of_something_else(tmp_path):
    (tmp_path / "a").write_text('"text"\n')
    with pytest.raises(ConfigError, match="version null, and now it is 1"):
        Journal(tmp_path / "a", SETTINGS)


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EnvironmentFault, match="cannot be read or written"):
        Journal(tmp_path / "file" / "a", SETTINGS)


def test_servers_are_asked_for_the_next_portion_before_the_last_is_done(tmp_path):
    events: list[str] = []

    class Watched(Random):
        def start(self, prompts, params) -> DeferredRollout:
            events.append(f"start {prompts[0].prompt_id}")
            return super().start(prompts, params)

        def generate(self, prompts, params) -> list[Sample]:
            events.append(f"wait {prompts[0].prompt_id}")
            return super().generate(prompts, params)

    assert AHEAD == 2
    run(tmp_path / "a", Watched(), portion=3)
    assert events == ["start p0", "start p3", "wait p0", "start p6", "wait p3", "wait p6"]


def test_texts_of_any_kind_come_back(tmp_path):
    journal = run(tmp_path / "a", Random())
    record = journal.done["p0"][0]
    hostile = "\ud800 \u2028 \x00 \n \r </script> 😀"
    journal.add("new", [type(record)(**{**vars(record), "response_text": hostile})])
    assert Journal(tmp_path / "a", SETTINGS).done["new"][0].response_text == hostile
    assert all(json.loads(line) for line in (tmp_path / "a").read_text().splitlines())
