"""What a run reads and checks before it touches a device: its configuration, models, tokenizers,
prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from megaopd.batch import Prompt, SamplingParams
from megaopd.config import Config, TeacherConfig, load, validate, validate_models
from megaopd.config_mixture import data_share
from megaopd.config_servers import check_local

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from megaopd.models.arch import ModelArch


@dataclass(frozen=True)
class Inputs:
    """What a run reads before it touches a device.

    Attributes:
        teacher_archs: by the name that `Prompt.teacher` holds; the empty one is `teacher`'s.
        num_overlong: training prompts that are longer than data.max_prompt_tokens, set aside;
            num_overlong_eval: those for evaluation.
        responses: tokens of the data set's own responses by prompt id, where a mixture has some.
    """

    student_arch: ModelArch
    teacher_archs: Mapping[str, ModelArch]
    tokenizer: PreTrainedTokenizerBase
    train_prompts: tuple[Prompt, ...]
    eval_prompts: tuple[Prompt, ...]
    num_overlong: int
    sampling: SamplingParams
    responses: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    num_overlong_eval: int = 0

    @property
    def vocab_size(self) -> int:
        """Of all models together: ids that only some know are in nobody's vocabulary."""
        archs = (self.student_arch, *self.teacher_archs.values())
        return min(arch.vocab_size for arch in archs)


def teacher_configs(config: Config) -> dict[str, TeacherConfig]:
    """All teachers of a run, by the name that `Prompt.teacher` holds."""
    return {"": config.teacher, **config.teachers}


def routed_teachers(config: Config) -> dict[str, TeacherConfig]:
    """The teachers that prompts can be routed to: all but the members of averages."""
    teachers = teacher_configs(config)
    members = {name for teacher in teachers.values() for name in teacher.members}
    return {name: teacher for name, teacher in teachers.items() if name not in members}


def teacher_key(name: str) -> str:
    """The key of a teacher in the configuration, by the name that `Prompt.teacher` holds."""
    return f"teachers.{name}" if name else "teacher"


def _teacher_paths(config: Config) -> dict[str, str]:
    """By name; a teacher without a directory of its own has the student's weights, or others'."""
    return {name: t.path or config.student.path for name, t in teacher_configs(config).items()}


def read_config(argv: Sequence[str], world_size: int) -> Config:
    """Reads the configuration from the words of a command line, and checks it.

    Raises:
        ConfigError: an unknown key, or the first rule that does not hold.
    """
    from megaopd.losses import DIVERGENCES
    from megaopd.rewards import REWARDS, find_reward
    from megaopd.rollout.agent import TOOLS

    config = load(list(argv))
    validate(
        config,
        world_size,
        divergences=tuple(DIVERGENCES),
        rewards=tuple(REWARDS),
        tools=tuple(TOOLS),
    )
    # These say now what is wrong with one of the user's.
    find_reward(config.eval.reward)
    find_reward(config.credit.reward or config.eval.reward, "credit.reward")
    return config


def read_inputs(config: Config) -> Inputs:
    """Reads and checks models, tokenizers and prompts; no device, no process group.

    Raises:
        MegaOPDError: whatever is wrong with them, in one line.
    """
    student_arch, teacher_archs = read_models(config)
    return read_prompts(config, student_arch, teacher_archs, read_tokenizer(config))


def read_models(config: Config) -> tuple[ModelArch, dict[str, ModelArch]]:
    """The architectures of the student and, by name, of the teachers, whose files are checked.

    Raises:
        MegaOPDError: a model is not complete, or a layout, a freeze pattern or an adapter is not
            for it.
    """
    from megaopd.checkpoint import open_weights
    from megaopd.models.arch import read_arch
    from megaopd.models.freeze import check_freeze
    from megaopd.models.hf_io import check_weights
    from megaopd.models.hf_io.adapter import AdapterReader
    from megaopd.models.lora_spec import adapter_mappings, check_lora
    from megaopd.storage.steps import hf_directory

    check_local(config.rollout)
    student, paths = config.student, _teacher_paths(config)
    arch = read_arch(hf_directory(student.path))
    teacher_archs = {name: read_arch(hf_directory(path)) for name, path in paths.items()}
    named = {name: of_teacher for name, of_teacher in teacher_archs.items() if name}
    validate_models(config, arch, teacher_archs[""], named)
    check_freeze(arch, student.freeze)
    if student.lora is not None:
        check_lora(arch, student.lora)
        if student.lora.adapter:
            adapter = AdapterReader(student.lora.adapter)
            adapter.check(student.lora, adapter_mappings(arch, student.lora))
    # The weights of a teacher on servers are their affair.
    ours = [name for name, teacher in teacher_configs(config).items() if teacher.kind != "sglang"]
    for path, its in {student.path: arch, **{paths[n]: teacher_archs[n] for n in ours}}.items():
        check_weights(open_weights(path), its)
    return arch, teacher_archs


def read_tokenizer(config: Config) -> PreTrainedTokenizerBase:
    """The student's, after a comparison with the teachers'.

    Raises:
        ConfigError: one cannot be read, or a token id means something else to a teacher.
    """
    from megaopd.data.tokenizer import check_same_tokenizer, load_tokenizer

    student = config.student.path
    tokenizer = load_tokenizer(student)
    for name, path in _teacher_paths(config).items():
        check_same_tokenizer(student, path, f"{teacher_key(name)}.path")
    return tokenizer


def read_prompts(
    config: Config,
    student_arch: ModelArch,
    teacher_archs: Mapping[str, ModelArch],
    tokenizer: PreTrainedTokenizerBase,
) -> Inputs:
    """The prompts, and with them all inputs.

    Raises:
        MegaOPDError: what is wrong with the data.
    """
    from megaopd.credit import CreditAssignment
    from megaopd.data.prompts import load_prompts
    from megaopd.data.responses import ResponseForm
    from megaopd.data.tokenizer import stop_token_ids, template_options
    from megaopd.data.tool_template import ToolTemplate
    from megaopd.rewards import check_answers, find_reward
    from megaopd.rollout.agent import tool_schemas
    from megaopd.rollout.recorded import RecordedEngine

    if config.rollout.kind == "recorded":
        RecordedEngine(config.rollout.path)  # says now if the file is not there
    agent, routed = config.rollout.agent, routed_teachers(config)
    options = template_options(config.data, tokenizer)
    tools = ToolTemplate(tokenizer, tool_schemas(agent), options) if agent else None
    rollout = config.rollout
    ends = stop_token_ids(tokenizer, config.student.path, rollout.stop)
    form = None
    if data_share(rollout.mixture):
        form = ResponseForm(config.data.response_column, ends, rollout.max_new_tokens)
    train_set = load_prompts(
        config.data.train, config.data, tokenizer, routed, tools, responses=form
    )
    eval_prompts: tuple[Prompt, ...] = ()
    num_overlong_eval = 0
    if config.data.eval:
        eval_set = load_prompts(config.data.eval, config.data, tokenizer, routed, tools)
        eval_prompts = eval_set.prompts[: config.eval.num_prompts or None]
        num_overlong_eval = eval_set.num_overlong
    check_answers(eval_prompts, find_reward(config.eval.reward))
    if CreditAssignment(config, lambda samples: ()).needs_rewards:
        check_answers(train_set.prompts, find_reward(config.credit.reward or config.eval.reward))
    return Inputs(
        student_arch,
        teacher_archs,
        tokenizer,
        train_set.prompts,
        eval_prompts,
        train_set.num_overlong,
        SamplingParams(
            max_new_tokens=rollout.max_new_tokens,
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            top_k=rollout.top_k,
            n=rollout.n,
            stop_token_ids=ends,
        ),
        train_set.responses,
        num_overlong_eval,
    )
