"""What a run leaves behind for people: summary.json, evaluated answers, report.html."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megaopd.config import Config

if TYPE_CHECKING:
    from megaopd.evaluation import EvalResult
    from megaopd.evaluation.of_run import Evaluation
    from megaopd.inputs import Inputs
    from megaopd.trainer import FitResult


def summarise(
    config: Config,
    inputs: Inputs,
    result: FitResult,
    teacher: EvalResult | None,
    hf_export: str | None,
    data_parallel_size: int,
) -> dict[str, Any]:
    """What summary.json holds.

    Args:
        teacher: the teacher's own accuracy, where it was measured.
        hf_export: the directory of the exported student, if there is one.
    """
    before, after = result.before, result.after
    summary: dict[str, Any] = {
        "task": config.data.name,
        "seed": config.run.seed,
        "teacher_accuracy": teacher.accuracy if teacher else None,
        "student_accuracy_before": before.answers.accuracy if before else None,
        "student_accuracy_after": after.answers.accuracy if after else None,
        "lead_recovered": None,
        "reverse_kl_before": before.reverse_kl if before else None,
        "reverse_kl_after": after.reverse_kl if after else None,
        "num_eval_prompts": len(inputs.eval_prompts),
        "eval_samples_per_prompt": config.eval.n,
        "eval_temperature": config.eval.temperature,
        "num_overlong_prompts": inputs.num_overlong,
        "num_steps": result.num_steps,
        "train_wall_s": round(result.train_wall_s, 2),
        "tensor_parallel_size": config.parallel.tensor,
        "data_parallel_size": data_parallel_size,
        "student_layers": inputs.student_arch.num_layers,
        "rollout": config.rollout.kind,
        "max_staleness": config.rollout.max_staleness,
        "mismatch_kl_max": result.mismatch_kl_max,
        "hf_export": hf_export,
        "max_new_tokens": config.rollout.max_new_tokens,
        "stop_token_ids": list(inputs.sampling.stop_token_ids),
    }
    if teacher and before and after and teacher.accuracy > before.answers.accuracy:
        summary["lead_recovered"] = (after.answers.accuracy - before.answers.accuracy) / (
            teacher.accuracy - before.answers.accuracy
        )
    return summary


def write_results(config: Config, summary: dict[str, Any], result: FitResult) -> None:
    """summary.json, report.html, and the summary on the console."""
    from megaopd.report import write_report

    run_dir = Path(config.run.dir)
    (run_dir / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
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
    # An engine may set a prompt aside in one evaluation alone.
    answers = {r.prompt_id: r for r in after.answers.records if r.index == 0}
    first = [r for r in before.answers.records if r.index == 0]
    pairs = [(r, answers[r.prompt_id]) for r in first if r.prompt_id in answers]
    return [
        {
            "prompt": old.prompt_text,
            "answer": old.answer,
            "before": old.response_text,
            "after": new.response_text,
            "before_correct": old.correct,
            "after_correct": new.correct,
        }
        for old, new in pairs[: log.num_report_samples]
    ]
