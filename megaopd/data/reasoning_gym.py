"""Problems that the package reasoning-gym generates, as rows of a data set.

The `answer` of such a prompt is JSON, `{"task", "answer", "metadata"}`, because a task scores an
answer by what it knows of the problem; the reward `reasoning_gym` reads it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

from megaopd.data.rows import Row
from megaopd.data.sources import Example
from megaopd.errors import ConfigError, DataError, EnvironmentFault

if TYPE_CHECKING:
    from megaopd.protocols import Reward

INSTRUCTION = "tags"
_REMEDY = "leave the task out, or list such problems (--on-bad drop)"


def load() -> Any:
    """The package.

    Raises:
        EnvironmentFault: it is not installed.
    """
    try:
        return import_module("reasoning_gym")
    except ImportError as error:
        raise EnvironmentFault(
            "reasoning_gym",
            f"the package reasoning-gym cannot be imported ({error})",
            "pip install 'megaopd[reasoning_gym]'",
        ) from error


def task_sizes(words: list[str], size: int) -> dict[str, int]:
    """``["chain_sum", "countdown=200"]`` as {task: number of problems}.

    Raises:
        ConfigError: no task, an unknown one, one named twice, or a number that is none.
    """
    from megaopd.config_schema import nearest

    known = list(load().factory.DATASETS)
    sizes: dict[str, int] = {}
    for word in words:
        task, _, own = word.partition("=")
        if task not in known:
            guess = nearest(task, known)
            raise ConfigError(
                "--task",
                f"no task {task!r} in reasoning-gym",
                f"did you mean {guess}?" if guess else f"there are {', '.join(known)}",
            )
        if task in sizes:
            raise ConfigError("--task", f"{task} twice", "name it once")
        if own and not (own.isascii() and own.isdigit() and int(own)):
            raise ConfigError("--task", f"{word!r}", "write NAME=NUMBER, the number of problems")
        sizes[task] = int(own) if own else size
    if not sizes:
        raise ConfigError("--task", "none", "name the tasks: --task chain_sum --task countdown=200")
    return sizes


def generate(
    sizes: Mapping[str, int], seed: int, reward: Reward
) -> Iterator[tuple[Row, Example | DataError]]:
    """The problems of every task, from `seed`; the same seed gives the same problems.

    A problem whose own answer does not get full marks from the JSON that is written is a
    `DataError`: its rewards could not be trusted. So is one that has no answer of its own and
    changes as JSON.

    Args:
        reward: scores (response, answer) as the reward `reasoning_gym` does.

    Raises:
        ConfigError: a task that cannot be generated.
    """
    package = load()
    number = 0
    for task, size in sizes.items():
        try:
            dataset = package.create_dataset(task, size=size, seed=seed)
        except Exception as error:  # whatever a task makes of its configuration
            reason = " ".join(str(error).split())[:200]
            raise ConfigError(
                f"--task {task}", f"cannot be generated ({reason})", "leave the task out"
            ) from error
        for index in range(size):
            number += 1
            entry = dataset[index]
            row = Row(f"{task}[{index}]", number, entry)
            try:
                yield row, _example(row, task, index, reward)
            except DataError as error:
                yield row, error


def _example(row: Row, task: str, index: int, reward: Reward) -> Example:
    entry = row.values
    known = {"task": task, "answer": entry["answer"], "metadata": entry["metadata"]}
    try:
        answer = json.dumps(known, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise row.error(f"what it knows is not JSON ({error})", _REMEDY) from error
    if entry["answer"] is not None:
        score = reward(f"<answer>{entry['answer']}</answer>", answer)
        if score < 1:
            raise row.error(f"its own answer scores {score:g}, not 1", _REMEDY)
    elif _scored(json.loads(answer)["metadata"]) != _scored(entry["metadata"]):
        # A task with many right answers names none; then nothing may be lost on the way.
        raise row.error("what it knows is another thing as JSON, and it has no answer", _REMEDY)
    return Example(entry["question"], answer, f"{task}-{index}", task)


def _scored(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What scoring may look at: all but the record of how hard the problem was made."""
    return {key: value for key, value in metadata.items() if key != "difficulty"}
