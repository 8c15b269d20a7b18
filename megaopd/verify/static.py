"""Checks that touch no device: configuration, models' files, tokenizers, templates, data, disk."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from itertools import zip_longest
from math import prod
from pathlib import Path

from megaopd.batch import Prompt
from megaopd.config import load, validate, validate_models
from megaopd.errors import ConfigError, DataError, EnvironmentFault
from megaopd.inputs import read_inputs, teacher_configs
from megaopd.verify.setup import Setup, small_config
from megaopd.verify.table import Check, NotApplicable

_DTYPE_BYTES = {"fp32": 4, "bf16": 2}


def _configuration(setup: Setup) -> str:
    from megaopd.losses import DIVERGENCES
    from megaopd.rewards import REWARDS, find_reward
    from megaopd.rollout.agent import TOOLS

    setup.config = config = load(setup.argv)
    validate(
        config,
        setup.world_size,
        divergences=tuple(DIVERGENCES),
        rewards=tuple(REWARDS),
        tools=tuple(TOOLS),
    )
    find_reward(config.eval.reward)
    setup.small = small_config(config, setup.world_size, setup.num_tokens)
    p = config.parallel
    data_size = setup.world_size // (p.tensor * p.pipeline * p.context)
    kinds = ", ".join(t.kind for t in teacher_configs(config).values())
    return (
        f"{setup.world_size} ranks = TP {p.tensor} x PP {p.pipeline} x CP {p.context} x "
        f"DP {data_size}; teacher: {kinds}; rollout: {config.rollout.kind}"
    )


def _models(setup: Setup) -> str:
    from megaopd.checkpoint import open_weights
    from megaopd.models.arch import read_arch
    from megaopd.models.families import hf_shapes
    from megaopd.models.freeze import check_freeze
    from megaopd.models.hf_io import check_weights
    from megaopd.models.lora_spec import adapter_mappings, check_lora
    from megaopd.storage.steps import hf_directory

    config, student = setup.config, setup.config.student
    paths = {"student": student.path}
    for name, teacher in teacher_configs(config).items():
        if teacher.path:
            paths[f"teacher {name}".strip()] = teacher.path
    archs = {role: read_arch(hf_directory(path)) for role, path in paths.items()}
    arch = archs["student"]
    named = {r.removeprefix("teacher "): a for r, a in archs.items() if r.startswith("teacher ")}
    validate_models(config, arch, archs.get("teacher", arch), named)
    check_freeze(arch, student.freeze)
    trained = sum(prod(shape) for shape in hf_shapes(arch).values())
    adapters = ""
    if student.lora is not None:
        check_lora(arch, student.lora)
        mappings = adapter_mappings(arch, student.lora).values()
        count = sum(prod(s) for m in mappings for s in m.layout.hf_shapes())
        adapters = f", {count / 1e6:.3g} M in LoRA adapters"
    on_servers = {t.path for t in teacher_configs(config).values() if t.kind == "sglang"}
    for role, path in paths.items():
        if role == "student" or path not in on_servers:
            check_weights(open_weights(path), archs[role])
    others = [f"{role} {archs[role].family}" for role in archs if role != "student"]
    return "; ".join([f"student {arch.family}, {trained / 1e6:.4g} M{adapters}", *others])


def _tokenizers(setup: Setup) -> str:
    from megaopd.data.tokenizer import check_same_tokenizer, load_tokenizer

    path = setup.config.student.path
    tokenizer = load_tokenizer(path)
    for key, teacher_path in _teacher_paths(setup).items():
        check_same_tokenizer(path, teacher_path, f"{key}.path")
    return f"{len(tokenizer)} tokens, the same for all"


def _templates(setup: Setup) -> str:
    from megaopd.data.tokenizer import load_tokenizer, template_options

    data, paths = setup.config.data, _teacher_paths(setup)
    if not paths:
        raise NotApplicable("the teacher is the student's own model")
    tokenizer = load_tokenizer(setup.config.student.path)
    if tokenizer.chat_template is None:
        raise NotApplicable("the student's tokenizer has no chat template")
    options = template_options(data, tokenizer)
    messages = [
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": "2"},
        {"role": "user", "content": "And 2 + 2?"},
    ]

    def rendered(path: str) -> str:
        own = load_tokenizer(path)
        if own.chat_template is None:
            return ""
        return str(
            own.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)
        )

    ours = rendered(setup.config.student.path)
    for key, path in paths.items():
        theirs = rendered(path)
        if theirs and theirs != ours:
            pairs = zip_longest(ours, theirs, fillvalue="")
            at = next(i for i, (a, b) in enumerate(pairs) if a != b)
            raise ConfigError(
                f"{key}.path",
                f"the chat templates differ, first at {ours[at : at + 24]!r} in the student's, "
                f"{theirs[at : at + 24]!r} in the teacher's",
                "the teacher sees the student's: give both the teacher's chat_template.jinja, or "
                "make sure that it knows the student's",
            )
    return "student and teachers render a conversation alike"


def _data(setup: Setup) -> str:
    setup.inputs = inputs = read_inputs(setup.config)
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


def _disk(setup: Setup) -> str:
    from megaopd.models.families import hf_shapes
    from megaopd.models.lora_spec import adapter_mappings

    config, arch = setup.config, setup.inputs.student_arch
    width = _DTYPE_BYTES[config.student.dtype]
    model = width * sum(prod(shape) for shape in hf_shapes(arch).values())
    exports = config.train.export + config.train.export_megatron
    needs = {"run.dir": (config.run.dir, model * exports)}
    if config.student.lora is not None and config.train.export:
        adapters = adapter_mappings(arch, config.student.lora).values()
        extra = width * sum(prod(s) for m in adapters for s in m.layout.hf_shapes())
        needs["run.dir"] = (config.run.dir, model * exports + extra)
    sglang = config.rollout.sglang
    if config.rollout.kind == "sglang" and sglang.sync == "disk":
        needs["rollout.sglang.sync_dir"] = (sglang.sync_dir, model)
    found = []
    for key, (directory, wanted) in needs.items():
        place = _existing(Path(directory or "."))
        free = shutil.disk_usage(place).free
        if not os.access(place, os.W_OK):
            raise EnvironmentFault(key, f"{place} cannot be written", "choose another directory")
        if free < wanted:
            raise EnvironmentFault(
                key,
                f"{free / 1e9:.3g} GB free at {place}, {wanted / 1e9:.3g} GB will be written",
                "make room, or choose another directory",
            )
        found.append(f"{key}: {wanted / 1e9:.3g} GB to write, {free / 1e9:.3g} GB free")
    return "; ".join(found)


def _existing(path: Path) -> Path:
    path = path.resolve()
    while not path.exists():
        path = path.parent
    return path


def _teacher_paths(setup: Setup) -> dict[str, str]:
    """Teachers with a directory of their own, by key."""
    return {
        f"teachers.{name}" if name else "teacher": teacher.path
        for name, teacher in teacher_configs(setup.config).items()
        if teacher.path and Path(teacher.path) != Path(setup.config.student.path)
    }


STATIC: dict[str, Check] = {
    "configuration": Check(_configuration),
    "models' files": Check(_models, ("configuration",)),
    "tokenizers": Check(_tokenizers, ("models' files",)),
    "chat templates": Check(_templates, ("tokenizers",)),
    "data": Check(_data, ("tokenizers",)),
    "disk space": Check(_disk, ("data",)),
}
"""Checks without a device, in order."""
