"""report.html: what a run did, on one page that opens anywhere, without network or scripts.

A new curve is a row in `CHARTS`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from megaopd.metrics_file import METRICS_FILE, Row, read_metrics
from megaopd.report_page import write_page
from megaopd.report_svg import Point, format_number, legend, line_chart, stacked_chart

REPORT_FILE = "report.html"


@dataclass(frozen=True)
class Chart:
    """A line chart of the report.

    Attributes:
        title: heading.
        y_title: quantity and unit.
        series: metric -> label; metrics that the run did not write are left out.
        y_range: fixed ends of the axis.
        references: key of the summary -> label of a horizontal line.
    """

    title: str
    y_title: str
    series: dict[str, str]
    y_range: tuple[float, float] | None = None
    references: dict[str, str] = field(default_factory=dict)


CHARTS = (
    Chart(
        "Divergence",
        "nats per token",
        {
            "loss/divergence": "training loss",
            "eval/reverse_kl": "held-out reverse KL",
            "eval/reverse_kl_lower_bound": "held-out reverse KL, at least",
            "eval/reverse_kl_estimate": "held-out reverse KL, estimated",
            "loss/estimator": "training loss, estimator",
        },
    ),
    Chart(
        "Accuracy",
        "share of the evaluation prompts",
        {"eval/accuracy": "student"},
        y_range=(0.0, 1.05),
        references={"teacher_accuracy": "teacher"},
    ),
    Chart("Response length", "tokens, mean", {"rollout/response_tokens_mean": "training samples"}),
    Chart(
        "Truncated responses",
        "share of the samples",
        {"rollout/truncated_fraction": "training samples"},
        y_range=(0.0, 1.05),
    ),
    Chart(
        "Entropy",
        "nats per token",
        {"student/entropy": "student", "teacher/entropy": "teacher"},
    ),
    Chart(
        "Trainer against rollout engine",
        "KL of the sampled tokens, nats",
        {"rollout/mismatch_kl": "mismatch"},
    ),
    Chart(
        "Staleness",
        "updates behind the weights in training",
        {"rollout/staleness_mean": "mean", "rollout/staleness_max": "largest"},
    ),
    Chart(
        "Reward",
        "mean over the training samples",
        {"credit/reward_mean": "reward", "credit/pass_rate_mean": "pass rate of the prompts"},
    ),
    Chart(
        "Likelihood",
        "nats per token",
        {"loss/likelihood": "training loss"},
    ),
    Chart(
        "Policy gradient",
        "",
        {"loss/policy_gradient": "training loss", "credit/advantage_std": "spread of advantages"},
    ),
    Chart(
        "Chosen tokens",
        "share of the loss tokens",
        {"loss/clip_fraction": "past a clipping bound", "loss/selected_fraction": "selected"},
    ),
    Chart(
        "Importance",
        "share of the loss tokens",
        {"loss/importance_clip_fraction": "cut or left out"},
    ),
    Chart("Conversations", "turns, mean", {"agent/num_turns": "turns of the student"}),
    Chart(
        "Tools",
        "share of the response tokens",
        {"agent/tool_ratio": "tool output"},
        y_range=(0.0, 1.05),
    ),
    Chart("Gradient norm", "before clipping", {"train/grad_norm": "gradient norm"}),
    Chart("Learning rate", "", {"train/lr": "learning rate"}),
    Chart("Throughput", "tokens per second", {"perf/tokens_per_s": "tokens/s"}),
)

# Phases of a step from the bottom of the stack; what a step spends outside them is "other".
PHASES = ("rollout", "pack", "teacher", "credit", "student", "weight_sync", "eval")

# The figures at the top of the page: heading, key before (if any), key of the figure.
HEADLINES = (
    ("Accuracy", "student_accuracy_before", "student_accuracy_after"),
    ("Teacher's accuracy", None, "teacher_accuracy"),
    ("Held-out reverse KL", "reverse_kl_before", "reverse_kl_after"),
    ("Steps", None, "num_steps"),
    ("Training, seconds", None, "train_wall_s"),
    ("Largest mismatch", None, "mismatch_kl_max"),
)


def write_report(
    run_dir: str | Path,
    summary: Mapping[str, Any],
    samples: Sequence[Mapping[str, Any]] = (),
    state: str = "",
    rows: Sequence[Row] | None = None,
) -> Path:
    """Writes run_dir/report.html from run_dir/metrics.jsonl.

    Args:
        summary: what summary.json holds; missing or null figures are left out.
        samples: dictionaries with prompt, answer, before, after, before_correct, after_correct.
        state: what the run is at, for the top of the page.
        rows: the metrics, where they are read already.

    Returns:
        The path of the page.

    Raises:
        DataError: metrics.jsonl cannot be read.
    """
    directory = Path(run_dir)
    if rows is None:
        rows = read_metrics(directory / METRICS_FILE)
    name = directory.resolve().name
    body = "\n".join(
        [
            f"<h1>{escape(name)}</h1>",
            f'<p class="state">{escape(state)}</p>' if state else "",
            _headlines(summary),
            "<h2>Curves</h2>",
            f'<div class="charts">{_charts(rows, summary)}</div>',
            _samples(samples),
            "<h2>Summary</h2>",
            _table(summary),
        ]
    )
    path = directory / REPORT_FILE
    write_page(path, name, body)
    return path


def _headlines(summary: Mapping[str, Any]) -> str:
    tiles = []
    for heading, before_key, key in HEADLINES:
        value, before = summary.get(key), summary.get(before_key) if before_key else None
        if value is None:
            continue
        origin = "" if before is None else f"<small>{_show(before)} &rarr; </small>"
        tiles.append(f"<div><span>{escape(heading)}</span><b>{origin}{_show(value)}</b></div>")
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _charts(rows: Sequence[Mapping[str, Any]], summary: Mapping[str, Any]) -> str:
    figures = []
    for chart in CHARTS:
        series = {
            label: points
            for metric, label in chart.series.items()
            if (points := _points(rows, metric))
        }
        if not series:
            continue
        references = {
            label: float(summary[key])
            for key, label in chart.references.items()
            if summary.get(key) is not None
        }
        svg = line_chart(series, chart.y_title, chart.y_range, references)
        figures.append(_figure(chart.title, list(series) if len(chart.series) > 1 else [], svg))
    phases = _phase_series(rows)
    if phases:
        svg = stacked_chart(phases, "seconds per step")
        figures.append(_figure("Time per phase", list(phases), svg))
    return "".join(figures)


def _figure(title: str, labels: list[str], svg: str) -> str:
    explanation = legend(labels) if labels else ""
    return f"<figure><figcaption>{escape(title)}</figcaption>{explanation}{svg}</figure>"


def _points(rows: Sequence[Mapping[str, Any]], metric: str) -> list[Point]:
    """(step, value) of a metric, ascending; the last value where a step has several."""
    return sorted({row["step"]: row[metric] for row in rows if metric in row}.items())


def _phase_series(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[Point]]:
    series = {phase: dict(_points(rows, f"time/{phase}_s")) for phase in PHASES}
    whole = dict(_points(rows, "time/step_s"))
    # An evaluation is not part of the step, though it carries the step's number.
    named = [values for phase, values in series.items() if phase != "eval"]
    series["other"] = {
        step: max(0.0, total - sum(values.get(step, 0.0) for values in named))
        for step, total in whole.items()
    }
    return {phase: sorted(values.items()) for phase, values in series.items() if values}


def _samples(samples: Sequence[Mapping[str, Any]]) -> str:
    if not samples:
        return ""
    rows = []
    for sample in samples:
        answers = "".join(
            f"<td><pre>{escape(str(sample.get(when, '')))}</pre>"
            f"{_verdict(sample.get(f'{when}_correct'))}</td>"
            for when in ("before", "after")
        )
        answer = sample.get("answer")
        rows.append(
            f"<tr><td><pre>{escape(str(sample.get('prompt', '')))}</pre></td>"
            f"<td><pre>{'' if answer is None else escape(str(answer))}</pre></td>{answers}</tr>"
        )
    head = "<tr><th>prompt</th><th>answer</th><th>before</th><th>after</th></tr>"
    return (
        "<h2>Samples, before and after</h2>"
        f'<div class="wide"><table class="samples">{head}{"".join(rows)}</table></div>'
    )


def _verdict(correct: Any) -> str:
    if correct is None:
        return ""
    kind, text = ("right", "&#10003; correct") if correct else ("wrong", "&#10007; wrong")
    return f'<span class="{kind}">{text}</span>'


def _table(summary: Mapping[str, Any]) -> str:
    rows = "".join(
        f"<tr><th>{escape(str(key))}</th><td>{_show(value)}</td></tr>"
        for key, value in summary.items()
    )
    return f'<div class="wide"><table>{rows}</table></div>'


def _show(value: Any) -> str:
    if isinstance(value, float):
        return format_number(value)
    return "none" if value is None else escape(str(value))
