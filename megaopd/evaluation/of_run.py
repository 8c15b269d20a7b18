"""The evaluations of a run: what the trainer makes of them, and the files that keep them."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from megaopd.errors import DataError
from megaopd.evaluation.scoring import EvalRecord, EvalResult


@dataclass(frozen=True)
class Evaluation:
    """One evaluation of the student on the held-out prompts.

    Attributes:
        answers: scores and responses, sampled as `eval` says.
        reverse_kl: mean reverse KL to the teacher over the tokens of samples at the rollout's
            temperature, as far as the teacher's signals tell: exact, bounded or estimated.
    """

    answers: EvalResult
    reverse_kl: float


def write_answers(
    run_dir: Path, name: str, answers: EvalResult, prompt_ids: Mapping[str, tuple[int, ...]]
) -> None:
    """Writes RUN/eval_NAME.jsonl, a line per response; replaced in one go.

    Args:
        name: "before", "after" or "teacher".
        prompt_ids: tokens of the prompts by id, which go along.
    """
    rows = ({**asdict(r), "prompt_ids": prompt_ids[r.prompt_id]} for r in answers.records)
    file = _file(run_dir, name)
    partial = file.with_name(f".{file.name}.partial")
    partial.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    os.replace(partial, file)


def read_answers(run_dir: Path, name: str) -> EvalResult | None:
    """Reads what `write_answers` wrote; None where there is no such file.

    Raises:
        DataError: a line is not what it wrote.
    """
    file = _file(run_dir, name)
    if not file.is_file():
        return None
    records = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
            row.pop("prompt_ids")
            records.append(EvalRecord(**{**row, "response_ids": tuple(row["response_ids"])}))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DataError(
                f"{file}:{number}", "not a line of an evaluation", "remove the file"
            ) from error
    return EvalResult.of(records) if records else None


def _file(run_dir: Path, name: str) -> Path:
    return run_dir / f"eval_{name}.jsonl"
