"""Trains: `torchrun --nproc-per-node N -m megaopd.train conf=NAME key=value ...`.

The only place where concrete classes meet: it reads the configuration, checks everything that can
be checked before a device is touched, builds the parts and hands them to the trainer.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from megaopd.batch import Prompt, Sample
from megaopd.config import Config, to_yaml
from megaopd.errors import ConfigError, MegaOPDError, NumericError, RolloutError, run_cli
from megaopd.inputs import Inputs, read_config, read_inputs, teacher_configs
from megaopd.interruption import INTERRUPTION
from megaopd.logger import get_logger, setup_logging
from megaopd.storage.run_files import run_files
from megaopd.storage.run_lock import run_lock
from megaopd.train_checkpoints import build_checkpoints, find_resumable, resume
from megaopd.train_export import export_student
from megaopd.train_loop import build_trainer
from megaopd.train_rollout import ENGINES, mixture, teacher_engine
from megaopd.train_teachers import build_teacher, student_side
from megaopd.train_watch import run_watch

if TYPE_CHECKING:
    from megaopd.checkpoint.resumable import Resumable
    from megaopd.evaluation import EvalResult
    from megaopd.evaluation.of_run import Evaluation
    from megaopd.parallel.groups import ParallelGroups
    from megaopd.protocols import RolloutEngine
    from megaopd.train_watch import RunWatch

logger = get_logger(__name__)

USAGE = """usage: torchrun --nproc-per-node N -m megaopd.train conf=NAME [key=value ...] [--debug]

conf=NAME    conf/NAME.yaml, or the path of a YAML file
key=value    any field, as in loss.kind=jsd optimizer.lr=1e-5 data=my_group (Hydra overrides)
--debug      show the traceback of an error

`python -m megaopd.config conf=NAME` prints every field with its value and its meaning.
The run is written to runs/NAME: metrics.jsonl, tensorboard/, report.html, summary.json, hf/;
with train.export_megatron=true also megatron/; with checkpoint.interval=N checkpoints/, from the
newest of which the same command goes on.

SIGUSR1, SIGTERM or the end of train.max_wall_time: a checkpoint, and exit status 75, which asks to
be started again. Other statuses: 2 configuration, 3 data, 4 checkpoint, 5 environment (no room, out
of memory, a rank that died or hung), 6 numbers, 7 rollout.
"""


def main(argv: list[str]) -> None:
    if not argv or "--help" in argv or "-h" in argv:
        print(USAGE, end="")
        return
    config = read_config(argv, int(os.environ.get("WORLD_SIZE", "1")))
    INTERRUPTION.install(config.train.max_wall_time)
    train(config, read_inputs(config))


@contextmanager
def _leaving_together() -> Iterator[None]:
    """Ranks that agree on an error leave together: torchrun ends all others as soon as one has
    left, and rank 0 may still be writing the student, stopping servers or saying what is wrong."""
    import torch.distributed as dist

    try:
        yield
    except MegaOPDError as error:
        if error.agreed and dist.is_initialized():
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

    from megaopd.parallel import groups as parallel_groups
    from megaopd.parallel.agreement import agreed
    from megaopd.parallel.device import init_distributed

    disable_progress_bar()
    setup_logging(int(os.environ.get("RANK", "0")))
    device = init_distributed()
    # The student's layout comes first: it is the one that is active.
    groups = parallel_groups.initialize(config.parallel, device, config.run.seed)
    is_main = groups.rank == 0
    run_dir = Path(config.run.dir)
    with ExitStack() as held:
        with agreed(), run_files(run_dir):
            if is_main:
                _make_run_dir(run_dir)
                held.enter_context(run_lock(run_dir))
        found = find_resumable(config)
        step = found.step if found else 0
        with run_watch(config, inputs, groups, step) as watch, run_files(run_dir):
            _run(config, inputs, groups, found, watch)
    parallel_groups.shutdown()


def _run(
    config: Config,
    inputs: Inputs,
    groups: ParallelGroups,
    found: Resumable | None,
    watch: RunWatch,
) -> None:
    """The run, from its first step or from a checkpoint to its end."""
    from megaopd.metrics import MetricsWriter
    from megaopd.summary import summarise, write_results

    logger.info(
        "%d training prompts, %d for evaluation; longer than data.max_prompt_tokens and set aside: "
        "%d and %d",
        len(inputs.train_prompts),
        len(inputs.eval_prompts),
        inputs.num_overlong,
        inputs.num_overlong_eval,
    )
    is_main, run_dir = groups.rank == 0, Path(config.run.dir)
    if is_main:
        (run_dir / "config.yaml").write_text(to_yaml(config))
    done = found.step if found else 0
    record = _recorder(config, is_main, done)
    side = student_side(config, inputs, groups)
    with ExitStack() as started:
        with watch("start", done):
            metrics = started.enter_context(
                MetricsWriter(
                    run_dir, config, enabled=is_main, resume_step=found.step if found else None
                )
            )
            teacher_result = _teacher_result(config, inputs, groups, resumed=found is not None)
            if teacher_result is not None and found is None:
                metrics.write(0, {"eval/teacher_accuracy": teacher_result.accuracy})
            # The engine comes before the models: colocated servers take their memory first.
            engine = started.enter_context(
                closing(ENGINES[config.rollout.kind](config, inputs, groups))
            )
            authors = started.enter_context(closing(mixture(config, inputs, groups, engine)))
            teacher = started.enter_context(closing(build_teacher(config, inputs, side)))
            student = side.model()
            checkpoints = started.enter_context(
                closing(build_checkpoints(config, inputs, student, teacher, watch.checkpoint))
            )
            trainer = build_trainer(
                config,
                inputs,
                side,
                engine=engine,
                authors=authors,
                teacher=teacher,
                metrics=metrics,
                evaluator=_evaluator(config, inputs, inputs.eval_prompts),
                record=record,
                checkpoints=checkpoints,
                interruption=INTERRUPTION,
                watch=watch,
                keep_evaluation=_keeper(run_dir, inputs, is_main),
                throughput=watch.throughput,
            )
            if found is not None:
                resume(config, found, trainer, checkpoints)
        try:
            result = trainer.fit()
        except (NumericError, RolloutError):
            # Skipped steps change nothing, and an engine that fails touches no weights: they are
            # those of the last good step.
            with watch("checkpoint", trainer.done):
                checkpoints.finish()
                export_student(config, student, inputs)
            raise
    with watch("checkpoint", trainer.done):
        hf_export = export_student(config, student, inputs)
    if is_main:
        dp_size = groups.layout.dp_size
        summary = summarise(config, inputs, result, teacher_result, hf_export, dp_size)
        write_results(config, summary, result)


def _make_run_dir(run_dir: Path) -> None:
    """Makes the directory of everything that the run writes.

    Raises:
        ConfigError: nothing can be written there.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "config.yaml").open("a").close()
    except OSError as error:
        raise ConfigError(
            "run.dir", f"{run_dir} cannot be written ({error.strerror})", "choose another directory"
        ) from error


def _evaluator(
    config: Config, inputs: Inputs, prompts: Sequence[Prompt]
) -> Callable[[RolloutEngine], EvalResult] | None:
    """Scores of an engine's answers to prompts, or None where there are none."""
    from megaopd.evaluation import evaluate
    from megaopd.rewards import find_reward

    if not prompts:
        return None
    return partial(
        evaluate,
        prompts=prompts,
        reward=find_reward(config.eval.reward),
        tokenizer=inputs.tokenizer,
        # The same random numbers at every evaluation: what differs is the model.
        params=replace(
            inputs.sampling,
            n=config.eval.n,
            temperature=config.eval.temperature,
            top_p=config.eval.top_p,
            top_k=config.eval.top_k,
            seed=config.run.seed,
        ),
    )


def _keeper(run_dir: Path, inputs: Inputs, is_main: bool) -> Callable[[str, Evaluation], None]:
    """Writes evaluations to files as soon as there are any."""
    from megaopd.evaluation.of_run import write_answers

    prompt_ids = {prompt.prompt_id: prompt.token_ids for prompt in inputs.eval_prompts}

    def keep(name: str, evaluation: Evaluation) -> None:
        if is_main:
            write_answers(run_dir, name, evaluation.answers, prompt_ids)

    return keep


def _recorder(
    config: Config, is_main: bool, done: int
) -> Callable[[int, Sequence[Prompt], Sequence[Sample]], None] | None:
    from megaopd.rollout.recorded import SampleRecorder

    if not config.rollout.record or not is_main:
        return None
    return SampleRecorder(config.rollout.record, done).record


def _teacher_result(
    config: Config, inputs: Inputs, groups: ParallelGroups, resumed: bool
) -> EvalResult | None:
    """The teachers' own accuracy, each on the prompts that are routed to it and as it sees
    them; their generation weights are gone when this returns. A resumed run has it already."""
    from megaopd.evaluation import EvalRecord, EvalResult
    from megaopd.evaluation.of_run import read_answers, write_answers

    run_dir = Path(config.run.dir)
    if not config.eval.teacher:
        return None
    if resumed and (known := read_answers(run_dir, "teacher")) is not None:
        return known
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
    if not records:
        return None
    result = EvalResult.of(records)
    if groups.rank == 0:
        prompt_ids = {prompt.prompt_id: prompt.token_ids for prompt in inputs.eval_prompts}
        write_answers(run_dir, "teacher", result, prompt_ids)
    return result


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
