"""Trains: `torchrun --nproc-per-node N -m megaopd.train conf=NAME key=value ...`.

The only place where concrete classes meet: it reads the configuration, checks everything that can
be checked before a device is touched, builds the parts and hands them to the trainer.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megaopd.batch import Prompt, Sample, SamplingParams
from megaopd.config import Config, load, to_yaml, validate, validate_models
from megaopd.errors import NumericError, run_cli

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from megaopd.engine.student import MegatronStudent
    from megaopd.evaluation import EvalResult
    from megaopd.models.arch import ModelArch
    from megaopd.parallel.groups import ParallelGroups
    from megaopd.protocols import RolloutEngine
    from megaopd.trainer import Evaluation, FitResult

USAGE = """usage: torchrun --nproc-per-node N -m megaopd.train conf=NAME [key=value ...] [--debug]

conf=NAME    conf/NAME.yaml, or the path of a YAML file
key=value    any field, as in loss.kind=jsd optimizer.lr=1e-5 data=my_group (Hydra overrides)
--debug      show the traceback of an error

`python -m megaopd.config conf=NAME` prints every field with its value and its meaning.
The run is written to runs/NAME: metrics.jsonl, tensorboard/, report.html, summary.json, hf/.
"""


def main(argv: list[str]) -> None:
    if not argv or "--help" in argv or "-h" in argv:
        print(USAGE, end="")
        return
    from megaopd.losses import DIVERGENCES
    from megaopd.rewards import REWARDS

    config = load(argv)
    validate(
        config,
        int(os.environ.get("WORLD_SIZE", "1")),
        divergences=tuple(DIVERGENCES),
        rewards=tuple(REWARDS),
    )
    train(config, read_inputs(config))


@dataclass(frozen=True)
class Inputs:
    """What a run reads before it touches a device."""

    student_arch: ModelArch
    teacher_arch: ModelArch
    tokenizer: PreTrainedTokenizerBase
    train_prompts: tuple[Prompt, ...]
    eval_prompts: tuple[Prompt, ...]
    num_overlong: int
    sampling: SamplingParams


def read_inputs(config: Config) -> Inputs:
    """Reads and checks models, tokenizers and prompts; no device, no process group.

    Raises:
        MegaOPDError: whatever is wrong with them, in one line.
    """
    from megaopd.data.prompts import load_prompts
    from megaopd.data.tokenizer import check_same_tokenizer, load_tokenizer, stop_token_ids
    from megaopd.models.arch import read_arch
    from megaopd.models.freeze import check_freeze
    from megaopd.models.hf_io import HFReader, check_weights
    from megaopd.rollout.recorded import RecordedEngine

    student, teacher = config.student.path, config.teacher.path
    student_arch, teacher_arch = read_arch(student), read_arch(teacher)
    validate_models(config, student_arch, teacher_arch)
    check_freeze(student_arch, config.student.freeze)
    if config.rollout.kind == "recorded":
        RecordedEngine(config.rollout.path)  # says now if the file is not there
    for path, arch in ((student, student_arch), (teacher, teacher_arch)):
        check_weights(HFReader(path), arch)
    tokenizer = load_tokenizer(student)
    check_same_tokenizer(student, teacher)
    train_set = load_prompts(config.data.train, config.data, tokenizer)
    eval_prompts: tuple[Prompt, ...] = ()
    if config.data.eval:
        eval_prompts = load_prompts(config.data.eval, config.data, tokenizer).prompts
    rollout = config.rollout
    return Inputs(
        student_arch,
        teacher_arch,
        tokenizer,
        train_set.prompts,
        eval_prompts[: config.eval.num_prompts or None],
        train_set.num_overlong,
        SamplingParams(
            max_new_tokens=rollout.max_new_tokens,
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            top_k=rollout.top_k,
            n=rollout.n,
            stop_token_ids=stop_token_ids(tokenizer, student, rollout.stop),
        ),
    )


def train(config: Config, inputs: Inputs) -> None:
    """Runs `config`; every rank of the world calls it.

    Raises:
        MegaOPDError: in one line, what ended the run.
    """
    from transformers.utils.logging import disable_progress_bar

    from megaopd.data.packing import micro_batches
    from megaopd.data.prompts import PromptStream
    from megaopd.engine.student import MegatronStudent
    from megaopd.logger import get_logger, setup_logging
    from megaopd.metrics import MetricsWriter
    from megaopd.models.build import padded_vocab_size
    from megaopd.parallel import groups as parallel_groups
    from megaopd.parallel.device import init_distributed
    from megaopd.teacher.megatron import MegatronTeacher
    from megaopd.trainer import OPDTrainer
    from megaopd.weight_sync.in_process import InProcessSync

    logger = get_logger(__name__)
    disable_progress_bar()
    setup_logging(int(os.environ.get("RANK", "0")))
    device = init_distributed()
    groups = parallel_groups.initialize(config.parallel, device, config.run.seed)
    is_main = groups.rank == 0
    run_dir = Path(config.run.dir)
    if is_main:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "config.yaml").write_text(to_yaml(config))
    logger.info(
        "%d training prompts (%d longer than data.max_prompt_tokens set aside), %d for evaluation",
        len(inputs.train_prompts),
        inputs.num_overlong,
        len(inputs.eval_prompts),
    )

    archs = (inputs.student_arch, inputs.teacher_arch)
    # Ids that only one of the models knows are in nobody's vocabulary.
    vocab_size = min(arch.vocab_size for arch in archs)
    vocab_rows = padded_vocab_size(max(arch.vocab_size for arch in archs), config.parallel.tensor)
    teacher_result = _teacher_result(config, inputs, groups)
    teacher = MegatronTeacher(
        config.teacher, config.parallel, inputs.teacher_arch, groups, vocab_rows
    )
    student = MegatronStudent(config, inputs.student_arch, groups, vocab_rows, vocab_size)
    with MetricsWriter(run_dir, config, enabled=is_main) as metrics:
        trainer = OPDTrainer(
            config,
            student=student,
            teacher=teacher,
            engine=ENGINES[config.rollout.kind](config, groups),
            weight_sync=InProcessSync(),
            prompts=PromptStream(inputs.train_prompts, config.run.seed, config.data.shuffle),
            sampling=inputs.sampling,
            make_micro_batches=partial(
                micro_batches,
                micro_batch_size=config.train.micro_batch_size,
                dp_rank=groups.dp.rank(),
                dp_size=groups.dp.size(),
                pad_to_multiple=config.parallel.tensor,
            ),
            evaluate_greedy=_evaluator(config, inputs),
            eval_prompts=inputs.eval_prompts,
            metrics=metrics,
            record=_recorder(config, is_main),
        )
        try:
            result = trainer.fit()
        except NumericError:
            # Skipped steps changed nothing: the weights are those of the last good step.
            _export(config, student, inputs, is_main)
            raise
    hf_export = _export(config, student, inputs, is_main)
    if is_main:
        summary = summarise(config, inputs, result, teacher_result, hf_export)
        _write_results(config, inputs, summary, result)
    parallel_groups.shutdown()


def _evaluator(config: Config, inputs: Inputs) -> Callable[[RolloutEngine], EvalResult] | None:
    """Greedy accuracy of an engine on the held-out prompts, or None where there are none."""
    from megaopd.evaluation import evaluate
    from megaopd.rewards import REWARDS

    if not inputs.eval_prompts:
        return None
    return partial(
        evaluate,
        prompts=inputs.eval_prompts,
        reward=REWARDS[config.eval.reward],
        tokenizer=inputs.tokenizer,
        params=inputs.sampling,
    )


def _embedded_engine(config: Config, groups: ParallelGroups) -> RolloutEngine:
    from megaopd.models.build import DTYPES
    from megaopd.rollout.embedded import EmbeddedEngine

    return EmbeddedEngine(
        config.student.path,
        device=groups.device,
        dtype=DTYPES[config.student.dtype],
        batch_size=config.rollout.batch_size,
        rank=groups.rank,
        world_size=groups.world_size,
    )


def _recorded_engine(config: Config, groups: ParallelGroups) -> RolloutEngine:
    from megaopd.rollout.recorded import RecordedEngine

    return RecordedEngine(config.rollout.path)


# By rollout.kind.
ENGINES: dict[str, Callable[[Config, ParallelGroups], RolloutEngine]] = {
    "embedded": _embedded_engine,
    "recorded": _recorded_engine,
}


def _recorder(config: Config, is_main: bool) -> Callable[[int, Sequence[Sample]], None] | None:
    from megaopd.rollout.recorded import SampleRecorder

    if not config.rollout.record or not is_main:
        return None
    return SampleRecorder(config.rollout.record).record


def _teacher_result(config: Config, inputs: Inputs, groups: ParallelGroups) -> EvalResult | None:
    """The teacher's own greedy accuracy; its generation weights are gone when this returns."""
    from megaopd.models.build import DTYPES
    from megaopd.rollout.embedded import EmbeddedEngine

    evaluator = _evaluator(config, inputs)
    if evaluator is None or not config.eval.teacher:
        return None
    return evaluator(
        EmbeddedEngine.from_pretrained(
            config.teacher.path,
            device=groups.device,
            dtype=DTYPES[config.teacher.dtype],
            batch_size=config.rollout.batch_size,
            rank=groups.rank,
            world_size=groups.world_size,
        )
    )


def _export(config: Config, student: MegatronStudent, inputs: Inputs, is_main: bool) -> str | None:
    """Writes the student to run.dir/hf; collective. Returns the directory."""
    from megaopd.models.hf_io import HFWriter

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


def summarise(
    config: Config,
    inputs: Inputs,
    result: FitResult,
    teacher: EvalResult | None,
    hf_export: str | None,
) -> dict[str, Any]:
    """What summary.json holds."""
    before, after = result.before, result.after
    summary: dict[str, Any] = {
        "task": config.data.name,
        "seed": config.run.seed,
        "teacher_accuracy": teacher.accuracy if teacher else None,
        "student_accuracy_before": before.greedy.accuracy if before else None,
        "student_accuracy_after": after.greedy.accuracy if after else None,
        "lead_recovered": None,
        "reverse_kl_before": before.reverse_kl if before else None,
        "reverse_kl_after": after.reverse_kl if after else None,
        "num_eval_prompts": len(inputs.eval_prompts),
        "num_overlong_prompts": inputs.num_overlong,
        "num_steps": result.num_steps,
        "train_wall_s": round(result.train_wall_s, 2),
        "tensor_parallel_size": config.parallel.tensor,
        "data_parallel_size": int(os.environ.get("WORLD_SIZE", "1"))
        // (config.parallel.tensor * config.parallel.pipeline * config.parallel.context),
        "student_layers": inputs.student_arch.num_layers,
        "mismatch_kl_max": result.mismatch_kl_max,
        "hf_export": hf_export,
        "max_new_tokens": config.rollout.max_new_tokens,
        "stop_token_ids": list(inputs.sampling.stop_token_ids),
    }
    if teacher and before and after and teacher.accuracy > before.greedy.accuracy:
        summary["lead_recovered"] = (after.greedy.accuracy - before.greedy.accuracy) / (
            teacher.accuracy - before.greedy.accuracy
        )
    return summary


def _write_results(
    config: Config, inputs: Inputs, summary: dict[str, Any], result: FitResult
) -> None:
    """summary.json, the answers of the evaluations, report.html, and the summary on the console."""
    from megaopd.report import write_report

    run_dir = Path(config.run.dir)
    (run_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    prompt_ids = {p.prompt_id: p.token_ids for p in inputs.eval_prompts}
    for name, evaluation in (("before", result.before), ("after", result.after)):
        if evaluation:
            rows = (
                {**asdict(r), "prompt_ids": prompt_ids[r.prompt_id]}
                for r in evaluation.greedy.records
            )
            (run_dir / f"eval_{name}.jsonl").write_text(
                "".join(f"{json.dumps(row)}\n" for row in rows)
            )
    report = write_report(
        run_dir, summary, _report_samples(result.before, result.after, config.log)
    )
    for key, value in summary.items():
        print(f"{key:>26}  {value}")
    print(f"{'report':>26}  {report}")


def _report_samples(
    before: Evaluation | None, after: Evaluation | None, log: Any
) -> list[dict[str, Any]]:
    if not before or not after:
        return []
    pairs = zip(before.greedy.records, after.greedy.records, strict=True)
    return [
        {
            "prompt": old.prompt_text,
            "answer": old.answer,
            "before": old.response_text,
            "after": new.response_text,
            "before_correct": old.correct,
            "after_correct": new.correct,
        }
        for old, new in list(pairs)[: log.num_report_samples]
    ]


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
