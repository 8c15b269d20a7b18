"""Samples kept in a file: recording what an engine sampled, and replaying it as an engine.

A replay gives two runs the same samples, so that what differs between them is the training alone.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from megaopd.batch import Prompt, Sample, SamplingParams
from megaopd.errors import DataError, RolloutError
from megaopd.rollout.deferred import DeferredRollout


class SampleRecorder:
    """Writes samples to a JSONL file, one line per step: ``{step, weight_version, set_aside,
    samples}``.

    The version is the oldest of the samples'; set_aside holds the ids of the prompts that the
    engine gave no samples of. Floats are written with all their digits, so that a replay is exact.
    One rank records.

    Args:
        path: the file; one that is there is replaced.
        done: steps whose lines are kept, of a file that a resumed run goes on with.

    Raises:
        DataError: the file cannot be written.
    """

    def __init__(self, path: str | Path, done: int = 0) -> None:
        self._path = Path(path)
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            kept = b""
            if done and self._path.is_file():
                kept = b"".join(self._path.read_bytes().splitlines(keepends=True)[:done])
            self._path.write_bytes(kept)
        except OSError as error:
            raise DataError(
                str(path), f"cannot be written ({error.strerror})", "choose another file"
            ) from error

    def record(self, step: int, prompts: Sequence[Prompt], samples: Sequence[Sample]) -> None:
        """Appends the samples of one step's prompts; they are in the file when the call returns.

        Raises:
            DataError: they cannot be written.
        """
        answered = {sample.prompt.prompt_id for sample in samples}
        line = {
            "step": step,
            "weight_version": min((s.weight_version for s in samples), default=None),
            "set_aside": [p.prompt_id for p in prompts if p.prompt_id not in answered],
            "samples": [asdict(sample) for sample in samples],
        }
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            raise DataError(
                str(self._path),
                f"cannot be written ({error.strerror})",
                "make room, or record less",
            ) from error


class RecordedEngine:
    """A `RolloutEngine` that answers the k-th `generate` with the k-th step of a file.

    Every rank reads the file. Samples carry the weight version that really sampled them.

    Args:
        path: what `SampleRecorder` wrote.

    Raises:
        DataError: no such file; later, in `generate`, a line that is not a recorded step.
    """

    def __init__(self, path: str | Path) -> None:
        self.weight_version = 0
        self.metrics: dict[str, float] = {}
        self._path = Path(path)
        if not self._path.is_file():
            raise DataError(str(path), "there is no such file", "check rollout.path")
        self._lines = self._read_lines()

    def load_weights(self, weights: Iterator[tuple[str, Tensor]], version: int) -> None:
        """Notes the version; nothing is taken from the iterator."""
        self.weight_version = version

    def skip(self, num_steps: int) -> None:
        """Goes past steps that have been trained on, without looking at them."""
        for _ in range(num_steps):
            next(self._lines, None)

    def start(self, prompts: Sequence[Prompt], params: SamplingParams) -> DeferredRollout:
        """Reads the step when the result is asked for."""
        return DeferredRollout(self, prompts, params)

    def generate(self, prompts: Sequence[Prompt], params: SamplingParams) -> list[Sample]:
        """Returns the next recorded step.

        Raises:
            RolloutError: no step is left, or it was recorded for other prompts.
            DataError: the file is damaged; the message names the line.
        """
        step, set_aside, samples = self._next_step()
        where = f"{self._path} step {step}"
        remedy = "replay with the data, seed and batch size of the recording"
        answered = [prompt for prompt in prompts if prompt.prompt_id not in set_aside]
        wanted = [(prompt, index) for prompt in answered for index in range(params.n)]
        for (prompt, index), sample in zip(wanted, samples, strict=False):
            asked = f"{prompt.prompt_id}/{index}"
            if sample.sample_id != asked:
                found = f"sample {sample.sample_id} is recorded where {asked} is asked for"
                raise RolloutError(where, found, remedy)
            if sample.prompt.token_ids != prompt.token_ids:
                found = f"prompt {prompt.prompt_id} was recorded with other token ids"
                raise RolloutError(where, found, remedy)
        if len(samples) != len(wanted):
            found = f"{len(samples)} samples are recorded where {len(wanted)} are asked for"
            raise RolloutError(where, found, remedy)
        self.metrics = {"rollout/set_aside": float(len(set_aside))}
        # The prompts of this run say which teacher answers them, and what it is shown.
        return [replace(s, prompt=p) for (p, _), s in zip(wanted, samples, strict=True)]

    def close(self) -> None:
        """Closes the file."""
        self._lines.close()

    def _read_lines(self) -> Generator[tuple[int, bytes], None, None]:
        with self._path.open("rb") as file:
            yield from enumerate(file, start=1)

    def _next_step(self) -> tuple[int, set[str], list[Sample]]:
        number, line = next(self._lines, (0, b""))
        if not number:
            raise RolloutError(
                str(self._path), "no recorded step is left", "lower train.num_steps or record more"
            )
        try:
            row = json.loads(line)
            samples = [sample_of(fields) for fields in row["samples"]]
            return row["step"], set(row["set_aside"]), samples
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{self._path}:{number}",
                f"not a recorded step ({type(error).__name__}: {error})",
                "record the rollouts again",
            ) from error


def sample_of(fields: dict[str, Any]) -> Sample:
    prompt = dict(fields["prompt"])
    for key in ("token_ids", "teacher_token_ids"):
        if prompt.get(key) is not None:
            prompt[key] = tuple(prompt[key])
    names = ("response_ids", "response_logprobs", "response_mask", "token_versions")
    tuples = {name: tuple(fields[name]) for name in names}
    return Sample(**{**fields, **tuples, "prompt": Prompt(**prompt)})
