"""The command line `python -m megaopd.plan`."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from megaopd.config import Config, load
from megaopd.config_schema import field_docs
from megaopd.errors import ConfigError, run_cli
from megaopd.models.freeze import check_freeze
from megaopd.models.lora_spec import check_lora
from megaopd.plan.machine import Machine
from megaopd.plan.parameters import check_layout
from megaopd.plan.presets import PRESETS, find_arch
from megaopd.plan.table import as_text, as_values, make_plan
from megaopd.plan.workload import Workload

_HELP = f"""\
usage: python -m megaopd.plan [conf=NAME] [option=value ...] [key=value ...] [--json FILE]

Bytes, traffic and time of a run before it is started: without GPUs, weights or other processes.
Of both models config.json is enough, or the name of a preset.

conf=NAME             the run, as `megaopd.train` takes it; without it, the defaults
key=value             overrides of the run, e.g. parallel.tensor=2 train.recompute=full

options, all of them optional:
student=, teacher=    a Hugging Face directory or a preset; else student.path and teacher.path
world=N               ranks (default 8)
tokens_per_sample=N   mean tokens of prompt and response together; default the longest
response_tokens=N     mean tokens of a response; default its share of the longest
tokens_per_rank=N     tokens that a data-parallel rank packs into one micro-batch, over all its
                      context-parallel ranks; default train.max_tokens_per_micro_batch, else
                      train.micro_batch_size samples
top=N                 layouts to list (default 10); 0 searches none
--json FILE           also write everything, in bytes and seconds, to FILE (- is stdout, alone)

the machine; each may be overridden:
{{machine}}

presets: {", ".join(PRESETS)}

examples:
  # Does an 8B student with a 32B teacher fit on one node of 8 H200, and how best?
  python -m megaopd.plan student=Qwen3-8B teacher=Qwen3-32B world=8

  # Two nodes, layouts of one's own, the teacher's weights on the host between its phases.
  python -m megaopd.plan student=Qwen3-8B teacher=Qwen3-32B world=16 \\
      parallel.tensor=2 parallel.sequence_parallel=true \\
      teacher.parallel.tensor=4 teacher.parallel.sequence_parallel=true teacher.offload=true

  # A run's own configuration on GPUs of 80 GB with a slower network.
  python -m megaopd.plan conf=NAME world=16 gpu_memory=80GB network=25

Formulas and their sources: the docstrings of megaopd/plan and docs/parallelism.md.
"""

_OPTIONS = (
    *("student", "teacher", "world", "tokens_per_sample", "response_tokens", "tokens_per_rank"),
    "top",
)
_UNITS = {"": 1e9, "B": 1.0, "GB": 1e9, "GIB": 2.0**30, "MB": 1e6, "MIB": 2.0**20}


def main(argv: list[str]) -> None:
    """Reads the words of the command line and prints the plan."""
    if {"-h", "--help"} & set(argv):
        print(_HELP.replace("{machine}", _machine_help()), end="")
        return
    argv, json_file = _take_json(argv)
    options, words = _take_options(argv)
    config = _load(words, options)
    plan = make_plan(_workload(config, options), _machine(options), _integer(options, "top", 10, 0))
    if json_file:
        text = json.dumps(as_values(plan), indent=2) + "\n"
        if json_file == "-":
            print(text, end="")
            return
        try:
            Path(json_file).write_text(text, encoding="utf-8")
        except OSError as error:
            raise ConfigError(
                "--json", f"{json_file}: {error.strerror}", "give another file"
            ) from (error)
    print(as_text(plan), end="")


def _take_json(argv: list[str]) -> tuple[list[str], str]:
    """The other words, and the file of `--json FILE` or `--json=FILE`."""
    rest, file = [], ""
    words = iter(argv)
    for word in words:
        if word.startswith("--json="):
            file = word.removeprefix("--json=")
        elif word == "--json":
            file = next(words, "")
        elif word.startswith("-"):
            raise ConfigError(word, "not an option", "see --help")
        else:
            rest.append(word)
            continue
        if not file and word.startswith("--json"):
            raise ConfigError("--json", "without a file", "give --json FILE")
    return rest, file


def _take_options(argv: list[str]) -> tuple[dict[str, str], list[str]]:
    """The plan's own options, and the words of the configuration."""
    names = {*_OPTIONS, *(f.name for f in dataclasses.fields(Machine))}
    options, rest = {}, []
    for word in argv:
        key, _, value = word.partition("=")
        if key in names and "=" in word:
            options[key] = value
        else:
            rest.append(word)
    return options, rest


def _load(words: list[str], options: dict[str, str]) -> Config:
    if any(word.startswith("conf=") for word in words):
        config = load(words)
    else:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "plan.yaml"
            file.write_text("{}\n", encoding="utf-8")
            config = load([f"conf={file}", *words])
    student = options.get("student", config.student.path)
    teacher = options.get("teacher", config.teacher.path)
    if config.teacher.kind != "checkpoint":
        teacher = student  # its weights are the student's
    return dataclasses.replace(
        config,
        student=dataclasses.replace(config.student, path=student),
        teacher=dataclasses.replace(config.teacher, path=teacher),
    )


def _workload(config: Config, options: dict[str, str]) -> Workload:
    student = find_arch(config.student.path, "student")
    teacher = find_arch(config.teacher.path, "teacher")
    if student.vocab_size != teacher.vocab_size:
        raise ConfigError(
            "teacher",
            f"a vocabulary of {teacher.vocab_size}, the student's has {student.vocab_size}",
            "choose models of one tokenizer",
        )
    check_freeze(student, config.student.freeze)
    if config.student.lora is not None:
        check_lora(student, config.student.lora)
    world = _integer(options, "world", 8)
    where = "parallel" if config.teacher.parallel is None else "teacher.parallel"
    check_layout(student, config.parallel, world, "parallel", "student")
    check_layout(teacher, config.teacher.parallel or config.parallel, world, where, "teacher")

    response = config.rollout.max_new_tokens
    longest = config.data.max_prompt_tokens + response
    mean = _integer(options, "tokens_per_sample", longest)
    if mean > longest:
        raise ConfigError(
            "tokens_per_sample",
            f"{mean}, more than data.max_prompt_tokens + rollout.max_new_tokens = {longest}",
            "raise those",
        )
    work = Workload.of(
        config,
        student,
        teacher,
        world,
        tokens_per_sample=mean,
        loss_tokens_per_sample=_optional(options, "response_tokens"),
        tokens_per_rank=_optional(options, "tokens_per_rank"),
    )
    if work.loss_tokens_per_sample > mean:
        found = f"{work.loss_tokens_per_sample} of {mean} tokens"
        raise ConfigError("response_tokens", found, "give fewer")
    return work


def _optional(options: dict[str, str], name: str) -> int | None:
    return _integer(options, name, 0) if name in options else None


def _integer(options: dict[str, str], name: str, default: int, least: int = 1) -> int:
    value = options.get(name)
    if value is None:
        return default
    if not re.fullmatch(r"\d+", value) or int(value) < least:
        raise ConfigError(name, f"{value!r}", f"give an integer of {least} or more")
    return int(value)


def _machine(options: dict[str, str]) -> Machine:
    values: dict[str, Any] = {}
    for f in dataclasses.fields(Machine):
        if f.name not in options:
            continue
        text = options[f.name]
        if f.name == "gpu_memory":
            values[f.name] = _bytes(f.name, text)
            continue
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not 0 <= value < float("inf") or (
            value == 0 and f.name not in ("headroom", "latency_us")
        ):
            raise ConfigError(f.name, f"{text!r}", "give a positive number")
        values[f.name] = int(value) if f.name == "gpus_per_node" else value
    machine = Machine(**values)
    if machine.headroom >= 1:
        raise ConfigError("headroom", f"{machine.headroom}", "give a share below 1")
    return machine


def _bytes(name: str, text: str) -> float:
    """Bytes of `141GB`, `80GiB`, `512MB`, or a number of GB."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text)
    unit = _UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None or float(match[1]) == 0:
        raise ConfigError(name, f"{text!r}", "give bytes as 141GB or 80GiB")
    return float(match[1]) * unit


def _machine_help() -> str:
    docs = field_docs(Machine)
    lines = []
    for f in dataclasses.fields(Machine):
        default = "141GB" if f.name == "gpu_memory" else f"{f.default:g}"
        lines.append(f"{f.name + '=' + default:<22}{docs[f.name]}")
    return "\n".join(lines)


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
