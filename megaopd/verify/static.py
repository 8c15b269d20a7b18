"""Checks that touch no device: configuration, models' files, tokenizers, data, templates, disk."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from math import lcm, prod
from pathlib import Path
from typing import Any

from megaopd.batch import Prompt
from megaopd.config import Config
from megaopd.errors import ConfigError, DataError, EnvironmentFault
from megaopd.inputs import (
    read_config,
    read_models,
    read_prompts,
    read_tokenizer,
    teacher_configs,
    teacher_key,
)
from megaopd.models.arch import ModelArch
from megaopd.models.families import param_mappings
from megaopd.models.freeze import is_frozen
from megaopd.models.lora_spec import adapter_mappings
from megaopd.models.mapping import ParamMapping
from megaopd.verify.setup import Setup, small_config
from megaopd.verify.table import Check, NotApplicable

_DTYPE_BYTES = {"fp32": 4, "bf16": 2}


def _configuration(setup: Setup) -> str:
    setup.config = config = read_config(setup.argv, setup.world_size)
    setup.small = small_config(config, setup.world_size, setup.num_tokens)
    p = config.parallel
    data_size = setup.world_size // (p.tensor * p.pipeline * p.context)
    kinds = ", ".join(t.kind for t in teacher_configs(config).values())
    return (
        f"{setup.world_size} ranks = TP {p.tensor} x PP {p.pipeline} x CP {p.context} x "
        f"DP {data_size}; teacher: {kinds}; rollout: {config.rollout.kind}"
    )


def _models(setup: Setup) -> str:
    setup.student_arch, setup.teacher_archs = arch, teachers = read_models(setup.config)
    said = [f"student {arch.family}, {_millions(param_mappings(arch).values())}"]
    lora = setup.config.student.lora
    if lora is not None:
        said[0] += f", {_millions(adapter_mappings(arch, lora).values())} in LoRA adapters"
    for name in _teacher_paths(setup):
        its = teachers[name]
        key = teacher_key(name)
        said.append(f"{key} {its.family}, {_millions(param_mappings(its).values())}")
    return "; ".join(said)


def _millions(mappings: Iterable[ParamMapping]) -> str:
    return f"{_numel(mappings) / 1e6:.4g} M"


def _numel(mappings: Iterable[ParamMapping]) -> int:
    return sum(prod(shape) for mapping in mappings for shape in mapping.layout.hf_shapes())


def _tokenizers(setup: Setup) -> str:
    setup.tokenizer = read_tokenizer(setup.config)
    return f"{len(setup.tokenizer)} tokens, the same for all"


def _data(setup: Setup) -> str:
    setup.inputs = inputs = read_prompts(
        setup.config, setup.student_arch, setup.teacher_archs, setup.tokenizer
    )
    wanted = setup.config.train.global_batch_size // setup.config.rollout.n
    if wanted > len(inputs.train_prompts):
        raise DataError(
            "data.train",
            f"{len(inputs.train_prompts)} usable prompts, and a step needs {wanted}",
            "add prompts, or lower train.global_batch_size",
        )
    shared = _overlap(inputs.train_prompts, inputs.eval_prompts)
    if shared:
        raise DataError(
            "data.eval",
            f"{len(shared)} of {len(inputs.eval_prompts)} prompts are in data.train too, "
            f"{shared[0]} first",
            "prepare the training data with tools/prepare_data.py --against",
        )
    routed = len({p.teacher for p in inputs.train_prompts})
    return (
        f"{len(inputs.train_prompts)} prompts for {routed} teacher(s), {inputs.num_overlong} too "
        f"long and set aside; {len(inputs.eval_prompts)} for evaluation, none of them in training"
    )


def _overlap(train: Sequence[Prompt], evaluated: Sequence[Prompt]) -> list[str]:
    """Ids of evaluation prompts whose tokens are a training prompt's."""
    known = {p.token_ids for p in train}
    return [p.prompt_id for p in evaluated if p.token_ids in known]


def _templates(setup: Setup) -> str:
    """The teacher sees the student's prompts: it should know their form."""
    from megaopd.data.rows import read_rows
    from megaopd.data.tokenizer import load_tokenizer, template_options

    data, paths = setup.config.data, _teacher_paths(setup)
    if not paths:
        raise NotApplicable("the teacher is the student's own model")
    prompt = next(read_rows(data.train)).get(data.prompt_column)
    if isinstance(prompt, str) and not data.chat_template:
        raise NotApplicable("prompts are strings, and data.chat_template is false")
    messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    options = template_options(data, setup.tokenizer)
    ours = _rendered(setup.tokenizer, messages, options)
    none = []
    for name, path in paths.items():
        own = load_tokenizer(path)
        if own.chat_template is None:
            none.append(teacher_key(name))
            continue
        theirs = _rendered(own, messages, options)
        if theirs != ours:
            pairs = zip_longest(ours, theirs, fillvalue="")
            at = next(i for i, (a, b) in enumerate(pairs) if a != b)
            raise ConfigError(
                f"{teacher_key(name)}.path",
                f"the chat templates differ, first at {ours[at : at + 24]!r} in the student's, "
                f"{theirs[at : at + 24]!r} in the teacher's",
                "the teacher sees the student's: give both the teacher's chat_template.jinja, or "
                "make sure that it knows the student's",
            )
    without = f"; {', '.join(none)} without a template" if none else ""
    return f"student and teachers render the first prompt alike{without}"


def _rendered(tokenizer: Any, messages: list[Any], options: dict[str, Any]) -> str:
    """The text of a conversation, or why the template refuses it."""
    import jinja2

    # Parquet gives every message all fields that any message has.
    messages = [{k: v for k, v in m.items() if v is not None} for m in messages]
    try:
        return str(
            tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, **options
            )
        )
    except jinja2.TemplateError as error:
        return f"({error})"


def _disk(setup: Setup) -> str:
    config, arch, lora = setup.config, setup.student_arch, setup.config.student.lora
    width = _DTYPE_BYTES[config.student.dtype]
    model = width * _numel(param_mappings(arch).values())
    exported = model * (config.train.export + config.train.export_megatron)
    if lora is not None and config.train.export:
        exported += width * _numel(adapter_mappings(arch, lora).values())
    needs = {"run.dir": (config.run.dir, exported + checkpoint_bytes(config, arch))}
    sglang = config.rollout.sglang
    if config.rollout.kind == "sglang" and sglang.sync == "disk":
        needs["rollout.sglang.sync_dir"] = (sglang.sync_dir, model)
    found = []
    for key, (directory, wanted) in needs.items():
        place = _existing(Path(directory or "."))
        if not place.is_dir() or not os.access(place, os.W_OK):
            raise EnvironmentFault(key, f"{place} cannot be written", "choose another directory")
        free = shutil.disk_usage(place).free
        if free < wanted:
            raise EnvironmentFault(
                key,
                f"{free / 1e9:.3g} GB free at {place}, {wanted / 1e9:.3g} GB will be written",
                "make room, or choose another directory",
            )
        found.append(f"{key}: {wanted / 1e9:.3g} GB to write, {free / 1e9:.3g} GB free")
    return "; ".join(found)


def checkpoint_bytes(config: Config, arch: ModelArch) -> int:
    """Of all checkpoints of a run that lie there at one time, the next one under way beside those
    that are kept, and of their exports."""
    lora, kept = config.student.lora, config.checkpoint
    width, frozen = _DTYPE_BYTES[config.student.dtype], config.student.freeze
    weights = param_mappings(arch).values()
    adapters = adapter_mappings(arch, lora).values() if lora is not None else None
    stored = _numel(weights if adapters is None else adapters)
    trained = stored
    if adapters is None:
        trained = _numel(mapping for mapping in weights if not is_frozen(mapping, frozen))
    # Two moments in fp32, and main weights where the model's are not fp32 themselves.
    state = 4 * (2 + (config.student.dtype != "fp32"))
    num_averages = sum(t.kind == "ema" for t in teacher_configs(config).values())
    one = width * stored + state * trained + 4 * _numel(weights) * num_averages
    num_saves, at_once = 1, kept.keep_last + 1
    if kept.interval:
        num_saves = -(-config.train.num_steps // kept.interval)
        if kept.keep_every:
            at_once += config.train.num_steps // lcm(kept.interval, kept.keep_every)
    exports = width * stored * num_saves if kept.export_hf else 0
    return min(num_saves, at_once) * one + exports


def _existing(path: Path) -> Path:
    path = path.resolve()
    while not path.exists():
        path = path.parent
    return path


def _teacher_paths(setup: Setup) -> dict[str, str]:
    """Teachers with a directory of their own, by name."""
    return {
        name: teacher.path
        for name, teacher in teacher_configs(setup.config).items()
        if teacher.path and Path(teacher.path) != Path(setup.config.student.path)
    }


STATIC: dict[str, Check] = {
    "configuration": Check(_configuration),
    "models' files": Check(_models, ("configuration",)),
    "tokenizers": Check(_tokenizers, ("models' files",)),
    "data": Check(_data, ("tokenizers",)),
    "chat templates": Check(_templates, ("data",)),
    "disk space": Check(_disk, ("models' files",)),
}
"""Checks without a device, in order."""
