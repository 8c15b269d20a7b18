"""report.html of an evaluation: its figures, pass@k, and responses to look at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from statistics import fmean
from typing import Any

from megaopd.evaluation.estimates import Estimate, Figures
from megaopd.evaluation.scoring import EvalRecord, by_prompt
from megaopd.report_page import write_page
from megaopd.report_svg import legend, line_chart


@dataclass(frozen=True)
class Part:
    """The evaluation of one set of questions.

    Attributes:
        set_aside: prompts without a response, by reason.
    """

    name: str
    figures: Figures
    records: Sequence[EvalRecord]
    set_aside: Mapping[str, int]


def write_evaluation(
    path: Path, title: str, settings: Mapping[str, Any], parts: Sequence[Part], num_samples: int
) -> None:
    """Writes the page.

    Args:
        settings: what was asked, by name.
        num_samples: prompts of each part whose responses are shown, from those that were never
            solved to those that always were.
    """
    body = [f"<h1>{escape(title)}</h1>", "<h2>Figures</h2>", _figures(parts)]
    charts = _charts(parts)
    if charts:
        body.append(f'<h2>pass@k</h2><div class="charts">{charts}</div>')
    body += [_responses(part, num_samples) for part in parts if num_samples]
    rows = "".join(
        f"<tr><th>{escape(str(key))}</th><td>{escape(str(value))}</td></tr>"
        for key, value in settings.items()
    )
    body.append(f'<h2>Settings</h2><div class="wide"><table>{rows}</table></div>')
    write_page(path, title, "\n".join(body))


def _figures(parts: Sequence[Part]) -> str:
    ks = sorted({k for part in parts for k in part.figures.pass_at if k > 1})
    n = max(part.figures.num_samples for part in parts)
    heads = ["questions", "prompts", f"mean@{n}", *[f"pass@{k}" for k in ks]]
    heads += [f"maj@{n}"] * (n > 1)
    heads += ["tokens, mean", "p90", "max", "truncated", "no answer found", "set aside"]
    rows = []
    for part in parts:
        found = part.figures
        cells = [escape(part.name), str(found.num_prompts), _percent(found.mean)]
        cells += [_percent(found.pass_at[k]) if k in found.pass_at else "" for k in ks]
        cells += [_percent(found.majority)] * (n > 1)
        cells += [f"{found.lengths[name] or 0:,.0f}" for name in ("mean", "p90", "max")]
        cells += [_percent(found.truncated), f"{100 * found.unanswered:.1f}"]
        aside = [f"{num} {escape(why)}" for why, num in part.set_aside.items() if num]
        cells.append(", ".join(aside) or "0")
        rows.append("".join(f"<td>{cell}</td>" for cell in cells))
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f'<div class="wide"><table><tr>{head}</tr>{body}</table></div>'


def _percent(found: Estimate) -> str:
    return f"{100 * found.value:.1f} <small>[{100 * found.low:.1f}, {100 * found.high:.1f}]</small>"


def _charts(parts: Sequence[Part]) -> str:
    series = {
        part.name: [(k, found.value) for k, found in sorted(part.figures.pass_at.items())]
        for part in parts
        if len(part.figures.pass_at) > 1
    }
    if not series:
        return ""
    svg = line_chart(series, "share of the prompts", (0.0, 1.05), x_title="k")
    return f"<figure>{legend(list(series)) if len(series) > 1 else ''}{svg}</figure>"


def _responses(part: Part, num: int) -> str:
    groups = list(by_prompt(part.records).values())
    # From the hardest to the easiest, at equal distances: the same ones every time.
    order = sorted(
        range(len(groups)),
        key=lambda i: (fmean(r.score for r in groups[i]), groups[i][0].prompt_id),
    )
    num = min(num, len(order))
    chosen = [order[i * (len(order) - 1) // max(num - 1, 1)] for i in range(num)]
    rows = []
    for index in chosen:
        group = groups[index]
        first = group[0]
        right = sum(r.correct for r in group)
        answer = "" if first.answer is None else escape(first.answer)
        shown = "".join(_response(record) for record in group[:1])
        if len(group) > 1:
            rest = "".join(_response(record) for record in group[1:])
            shown += f"<details><summary>{len(group) - 1} more</summary>{rest}</details>"
        rows.append(
            f"<tr><td><small>{escape(first.prompt_id)}</small>"
            f"<pre>{escape(first.prompt_text)}</pre></td><td><pre>{answer}</pre>"
            f"<small>{right} of {len(group)}</small></td><td>{shown}</td></tr>"
        )
    head = "<tr><th>prompt</th><th>answer</th><th>responses</th></tr>"
    return (
        f"<h2>{escape(part.name)}: {num} of {len(groups)} prompts, hardest first</h2>"
        f'<div class="wide"><table class="samples">{head}{"".join(rows)}</table></div>'
    )


def _response(record: EvalRecord) -> str:
    kind, mark = ("right", "&#10003;") if record.correct else ("wrong", "&#10007;")
    cut = ", truncated" if record.truncated else ""
    return (
        f"<pre>{escape(record.response_text)}</pre>"
        f'<span class="{kind}">{mark} {record.score:g}, {len(record.response_ids)} tokens{cut}'
        "</span>"
    )
