"""Trains: `torchrun --nproc-per-node N -m megaopd.train conf=NAME key=value ...`.

The only place where concrete classes meet: it reads the configuration, checks everything that can
be checked before a device is touched, builds the parts and hands them to the trainer.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from megaopd.batch import Prompt, Sample
from megaopd.config import Config, TeacherConfig, load, to_yaml, validate
from megaopd.errors import ConfigError, NumericError, RolloutError, run_cli
from megaopd.inputs import Inputs, read_inputs, teacher_configs
from megaopd.train_rollout import ENGINES, teacher_engine, weight_sync

if TYPE_CHECKING:
    from megaopd.data.packing import Batching, Side
    from megaopd.engine.student import MegatronStudent
    from megaopd.evaluation import EvalResult
    from megaopd.models.arch import ModelArch
    from megaopd.parallel.groups import ParallelGroups
    from megaopd.protocols import RolloutEngine, Teacher
    from megaopd.teacher.head import HeadSlot

USAGE = """usage: torchrun --nproc-per-node N -m megaopd.train conf=NAME [key=value ...] [--debug]

conf=NAME    conf/NAME.yaml, or the path of a YAML file
key=value    any field, as in loss.kind=jsd optimizer.lr=1e-5 data=my_group (Hydra overrides)
--debug      show the traceback of an error

`python -m megaopd.config conf=NAME` prints every field with its value and its meaning.
The run is written to runs/NAME: metrics.jsonl, tensorboard/, report.html, summary.json, hf/;
with train.export_megatron=true also megatron/.
"""


def main(argv: list[str]) -> None:
    if not argv or "--help" in argv or "-h" in argv:
        print(USAGE, end="")
        return
    from megaopd.losses import DIVERGENCES
    from megaopd.rewards import REWARDS, find_reward
    from megaopd.rollout.agent import TOOLS

    config = load(argv)
    validate(
        config,
        int(os.environ.get("WORLD_SIZE", "1")),
        divergences=tuple(DIVERGENCES),
        rewards=tuple(REWARDS),
        tools=tuple(TOOLS),
    )
    find_reward(config.eval.reward)  # says now what is wrong with one of the user's
    train(config, read_inputs(config))


@contextmanager
def _leaving_together() -> Iterator[None]:
    """Ranks that fail alike leave together: torchrun ends all others as soon as one has left, and
    rank 0 may still be writing the student, stopping servers or saying what went wrong."""
    import torch.distributed as dist

    try:
        yield
    except (NumericError, RolloutError):
        if dist.is_initialized():
            with suppress(RuntimeError):  # one of them died on its way here
                dist.barrier()
        raise


@_leaving_together()
def train(config: Config, inputs: Inputs) -> None:
    """Runs `config`; every rank of the world calls it.

    Raises:
        MegaOPDError: in one line, what ended the run.
    """
    from transformers.utils.logging import disable_progress_bar

    from megaopd.data.prompts import PromptStream
    from megaopd.engine.student import MegatronStudent
    from megaopd.logger import get_logger, setup_logging
    from megaopd.metrics import MetricsWriter
    from megaopd.models.mapping import padded_vocab_size
    from megaopd.parallel import groups as parallel_groups
    from megaopd.parallel.device import init_distributed
    from megaopd.summary import summarise, write_results
    from megaopd.trainer import OPDTrainer

    logger = get_logger(__name__)
    disable_progress_bar()
    setup_logging(int(os.environ.get("RANK", "0")))
    device = init_distributed()
    # The student's layout comes first: it is the one that is active.
    groups = parallel_groups.initialize(config.parallel, device, config.run.seed)
    is_main = groups.rank == 0
    run_dir = Path(config.run.dir)
    if is_main:
        _open_run_dir(run_dir, config)
    record = _recorder(config, is_main)
    logger.info(
        "%d training prompts (%d longer than data.max_prompt_tokens set aside), %d for evaluation",
        len(inputs.train_prompts),
        inputs.num_overlong,
        len(inputs.eval_prompts),
    )

    vocab_rows = padded_vocab_size(inputs.student_arch.vocab_size, config.parallel.tensor)
    batching = _batching(
        config, groups, inputs.student_arch, config.train.max_tokens_per_micro_batch, "student"
    )
    teacher_result = _teacher_result(config, inputs, groups)
    # The engine comes before the models: colocated servers take their memory first.
    with (
        closing(ENGINES[config.rollout.kind](config, inputs, groups)) as engine,
        MetricsWriter(run_dir, config, enabled=is_main) as metrics,
        closing(_teacher(config, inputs, StudentSide(groups, batching, vocab_rows))) as teacher,
    ):
        student = MegatronStudent(
            config, inputs.student_arch, groups, vocab_rows, inputs.vocab_size
        )
        trainer = OPDTrainer(
            config,
            student=student,
            teacher=teacher,
            engine=engine,
            weight_sync=weight_sync(engine),
            prompts=PromptStream(inputs.train_prompts, config.run.seed, config.data.shuffle),
            sampling=inputs.sampling,
            batching=batching,
            rank=groups.rank,
            evaluate_greedy=_evaluator(config, inputs, inputs.eval_prompts),
            eval_prompts=inputs.eval_prompts,
            metrics=metrics,
            record=record,
        )
        try:
            result = trainer.fit()
        except (NumericError, RolloutError):
            # Skipped steps change nothing, and an engine that fails touches no weights: they are
            # those of the last good step.
            _export(config, student, inputs, is_main)
            raise
    hf_export = _export(config, student, inputs, is_main)
    if is_main:
        dp_size = groups.layout.dp_size
        summary = summarise(config, inputs, result, teacher_result, hf_export, dp_size)
        write_results(config, inputs, summary, result)
    parallel_groups.shutdown()


def _open_run_dir(run_dir: Path, config: Config) -> None:
    """Writes the configuration to where everything else will be.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "config.yaml").write_text(to_yaml(config))
    except OSError as error:
        raise ConfigError(
            "run.dir", f"{run_dir} cannot be written ({error.strerror})", "choose another directory"
        ) from error


def _batching(
    config: Config, groups: ParallelGroups, arch: ModelArch, max_tokens: int | None, side: Side
) -> Batching:
    """How a model's ranks share out and pack the samples of a step."""
    from megaopd.data.packing import Batching, CostModel, Packing

    packing = Packing(config.train.micro_batch_size, max_tokens, groups.parallel.tensor)
    return Batching(groups.layout, packing, side, CostModel.of(arch))


@dataclass(frozen=True)
class StudentSide:
    """What a teacher must know of the student: who computes which tokens and vocabulary."""

    groups: ParallelGroups
    batching: Batching
    vocab_rows: int


def _teacher(config: Config, inputs: Inputs, student: StudentSide) -> Teacher:
    """The run's one teacher, or all of them behind one."""
    from megaopd.teacher.head import HeadSlot
    from megaopd.teacher.routed import RoutedTeacher

    slot = HeadSlot(student.groups.device)
    teachers = {
        name: TEACHERS[own.kind](name, own, config, inputs, student, slot)
        for name, own in teacher_configs(config).items()
    }
    if len(teachers) == 1:
        return teachers[""]
    return RoutedTeacher(teachers, student.batching, student.groups.rank)


def _checkpoint_teacher(
    name: str,
    own: TeacherConfig,
    config: Config,
    inputs: Inputs,
    student: StudentSide,
    slot: HeadSlot,
) -> Teacher:
    from megaopd.parallel import groups as parallel_groups
    from megaopd.teacher.ema import EMATeacher
    from megaopd.teacher.megatron import MegatronTeacher

    groups = parallel_groups.initialize(
        own.parallel or config.parallel, student.groups.device, config.run.seed
    )
    arch = inputs.teacher_archs[name]
    max_tokens = own.max_tokens_per_micro_batch or config.train.max_tokens_per_micro_batch
    batching = _batching(config, groups, arch, max_tokens, "teacher")
    teacher = EMATeacher if own.kind == "ema" else MegatronTeacher
    return teacher(own, arch, groups, batching, student.batching, student.vocab_rows, name, slot)


def _student_as_teacher(
    name: str,
    own: TeacherConfig,
    config: Config,
    inputs: Inputs,
    student: StudentSide,
    slot: HeadSlot,
) -> Teacher:
    """Starts as the student does: from its directory, in its layout."""
    own = replace(own, path=config.student.path)
    return _checkpoint_teacher(name, own, config, inputs, student, slot)


def _server_teacher(
    name: str,
    own: TeacherConfig,
    config: Config,
    inputs: Inputs,
    student: StudentSide,
    slot: HeadSlot,
) -> Teacher:
    from megaopd.teacher.sglang import SGLangTeacher

    groups = student.groups
    return SGLangTeacher(
        own,
        config.rollout.sglang,
        inputs.vocab_size,
        student.batching,
        device=groups.device,
        rank=groups.rank,
        world_size=groups.world_size,
        name=name,
    )


# By teacher.kind: (name, its configuration, the run's, inputs, the student's side, room for a head)
# -> the teacher of the samples whose Prompt.teacher is that name. Collective.
TEACHERS: dict[
    str, Callable[[str, TeacherConfig, Config, Inputs, StudentSide, HeadSlot], Teacher]
] = {
    "checkpoint": _checkpoint_teacher,
    "self": _student_as_teacher,
    "ema": _student_as_teacher,
    "sglang": _server_teacher,
}


def _evaluator(
    config: Config, inputs: Inputs, prompts: Sequence[Prompt]
) -> Callable[[RolloutEngine], EvalResult] | None:
    """Greedy accuracy of an engine on prompts, or None where there are none."""
    from megaopd.evaluation import evaluate
    from megaopd.rewards import find_reward

    if not prompts:
        return None
    return partial(
        evaluate,
        prompts=prompts,
        reward=find_reward(config.eval.reward),
        tokenizer=inputs.tokenizer,
        params=inputs.sampling,
    )


def _recorder(
    config: Config, is_main: bool
) -> Callable[[int, Sequence[Prompt], Sequence[Sample]], None] | None:
    from megaopd.rollout.recorded import SampleRecorder

    if not config.rollout.record or not is_main:
        return None
    return SampleRecorder(config.rollout.record).record


def _teacher_result(config: Config, inputs: Inputs, groups: ParallelGroups) -> EvalResult | None:
    """The teachers' own greedy accuracy, each on the prompts that are routed to it and as it sees
    them; their generation weights are gone when this returns."""
    from megaopd.evaluation import EvalRecord, EvalResult

    if not config.eval.teacher:
        return None
    records: list[EvalRecord] = []
    for name, own in teacher_configs(config).items():
        prompts = [
            replace(p, token_ids=p.teacher_token_ids or p.token_ids)
            for p in inputs.eval_prompts
            if p.teacher == name
        ]
        evaluator = _evaluator(config, inputs, prompts)
        if evaluator is None:
            continue
        with closing(teacher_engine(own, config, inputs, groups)) as engine:
            records += evaluator(engine).records
    return EvalResult.of(records) if records else None


def _export(config: Config, student: MegatronStudent, inputs: Inputs, is_main: bool) -> str | None:
    """Writes the student as the configuration asks, to run.dir/hf and run.dir/megatron; collective.
    Returns the Hugging Face directory."""
    from megaopd.models.hf_io import HFWriter

    if config.train.export_megatron:
        student.save(Path(config.run.dir) / "megatron", config.student.path)
    if not config.train.export:
        return None
    destination = Path(config.run.dir) / "hf"
    if is_main:
        with HFWriter(destination, config.student.path, inputs.student_arch, overwrite=True) as out:
            out.add_all(student.export_weights())
    else:
        for _ in student.export_weights():
            pass
    return str(destination)


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
