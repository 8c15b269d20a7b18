"""Trains: `torchrun --nproc-per-node N -m megaopd.train conf=NAME key=value ...`.

The only place where concrete classes meet: it reads the configuration, checks everything that can
be checked before a device is touched, builds the parts and hands them to the trainer.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from megaopd.batch import Prompt, Sample
from megaopd.config import Config, to_yaml
from megaopd.errors import ConfigError, MegaOPDError, NumericError, RolloutError, run_cli
from megaopd.inputs import Inputs, read_config, read_inputs, teacher_configs
from megaopd.train_loop import build_trainer
from megaopd.train_rollout import ENGINES, mixture, teacher_engine
from megaopd.train_teachers import build_teacher, student_side

if TYPE_CHECKING:
    from megaopd.engine.student import MegatronStudent
    from megaopd.evaluation import EvalResult
    from megaopd.parallel.groups import ParallelGroups
    from megaopd.protocols import RolloutEngine

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
    config = read_config(argv, int(os.environ.get("WORLD_SIZE", "1")))
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

    from megaopd.logger import get_logger, setup_logging
    from megaopd.metrics import MetricsWriter
    from megaopd.parallel import groups as parallel_groups
    from megaopd.parallel.device import init_distributed
    from megaopd.summary import summarise, write_results

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
        "%d training prompts, %d for evaluation; longer than data.max_prompt_tokens and set aside: "
        "%d and %d",
        len(inputs.train_prompts),
        len(inputs.eval_prompts),
        inputs.num_overlong,
        inputs.num_overlong_eval,
    )

    side = student_side(config, inputs, groups)
    teacher_result = _teacher_result(config, inputs, groups)
    # The engine comes before the models: colocated servers take their memory first.
    with (
        closing(ENGINES[config.rollout.kind](config, inputs, groups)) as engine,
        closing(mixture(config, inputs, groups, engine)) as authors,
        MetricsWriter(run_dir, config, enabled=is_main) as metrics,
        closing(build_teacher(config, inputs, side)) as teacher,
    ):
        student = side.model()
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


def _recorder(
    config: Config, is_main: bool
) -> Callable[[int, Sequence[Prompt], Sequence[Sample]], None] | None:
    from megaopd.rollout.recorded import SampleRecorder

    if not config.rollout.record or not is_main:
        return None
    return SampleRecorder(config.rollout.record).record


def _teacher_result(config: Config, inputs: Inputs, groups: ParallelGroups) -> EvalResult | None:
    """The teachers' own accuracy, each on the prompts that are routed to it and as it sees
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
    """Writes the student as the configuration asks, to run.dir/hf, run.dir/adapter and
    run.dir/megatron; collective. Returns the Hugging Face directory."""
    from megaopd.models.hf_io import HFWriter

    if config.train.export_megatron:
        student.save(Path(config.run.dir) / "megatron", config.student.path)
    if not config.train.export:
        return None
    _export_adapter(config, student, inputs, is_main)
    destination = Path(config.run.dir) / "hf"
    if is_main:
        with HFWriter(destination, config.student.path, inputs.student_arch, overwrite=True) as out:
            out.add_all(student.export_weights())
    else:
        for _ in student.export_weights():
            pass
    return str(destination)


def _export_adapter(
    config: Config, student: MegatronStudent, inputs: Inputs, is_main: bool
) -> None:
    """Writes the LoRA adapters, if there are any, to run.dir/adapter as PEFT does; collective."""
    from megaopd.models.build import DTYPES
    from megaopd.models.hf_io.adapter import adapter_config, write_adapter
    from megaopd.models.lora_spec import adapter_mappings, targets

    lora, arch = config.student.lora, inputs.student_arch
    if lora is None:
        return
    if is_main:
        write_adapter(
            Path(config.run.dir) / "adapter",
            adapter_config(lora, targets(arch, lora), config.student.path),
            adapter_mappings(arch, lora).values(),
            student.export_adapter(),
            DTYPES[config.student.dtype],
        )
    else:
        for _ in student.export_adapter():
            pass


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
