"""The report: what is drawn is what was measured, and nothing is fetched or run."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest

from megaopd.config import Config, LogConfig
from megaopd.errors import DataError
from megaopd.metrics import MetricsWriter
from megaopd.report import CHARTS, write_report
from megaopd.report_svg import (
    BOTTOM,
    HEIGHT,
    LEFT,
    MAX_BARS,
    MAX_POINTS,
    RIGHT,
    TOP,
    WIDTH,
    format_number,
    line_chart,
    stacked_chart,
    ticks,
)

HOSTILE = "<script>alert('x')</script> & \"q\""


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    directory = tmp_path / "runs" / "<demo>"
    with MetricsWriter(directory, Config(log=LogConfig(tensorboard=False))) as writer:
        writer.write(0, {"eval/accuracy": 0.25, "eval/reverse_kl": 2.0, "time/eval_s": 3.0})
        for step in range(1, 6):
            metrics = {name: step / 10 for chart in CHARTS for name in chart.series}
            metrics["loss/divergence"] = math.nan if step == 3 else 1 / step
            del metrics["eval/accuracy"]
            times = {"rollout": 1.0, "pack": 0.5, "teacher": 2.0, "student": 4.0, "step": 8.0}
            writer.write(step, metrics | {f"time/{k}_s": v for k, v in times.items()})
        writer.write(5, {"eval/accuracy": 0.75})
    return directory


class Page(HTMLParser):
    """Collects tags with their attributes and checks that they are closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def test_the_page_is_whole_and_fetches_nothing(run_dir: Path) -> None:
    samples = [
        {
            "prompt": HOSTILE,
            "answer": HOSTILE,
            "before": "a\nb",
            "after": HOSTILE,
            "before_correct": False,
            "after_correct": True,
        }
    ]
    summary = {
        "task": HOSTILE,
        "teacher_accuracy": 0.875,
        "student_accuracy_before": 0.25,
        "student_accuracy_after": 0.75,
        "hf_export": None,
    }
    path = write_report(run_dir, summary, samples)
    assert path == run_dir / "report.html"
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    assert page.words.count(HOSTILE) == 4  # three cells and the summary, as text
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "link", "img", "iframe", "object"})
    for tag, attributes in page.tags:
        assert not any(name.startswith("on") or name in ("src", "href") for name in attributes), tag
    assert not re.search(r"https?://|url\(|@import", text)
    assert "<demo>" in page.words

    captions = re.findall("<figcaption>(.*?)</figcaption>", text)
    assert captions == [*(chart.title for chart in CHARTS), "Time per phase"]
    words = " ".join(page.words)
    assert "0.25 → 0.75" in words.replace("  ", " ")
    assert "teacher 0.875" in words
    assert "✗ wrong" in words
    assert "✓ correct" in words
    points = [word.splitlines() for word in page.words]
    assert ["step 2", "training loss: 0.5", "held-out reverse KL: 0.2"] in [p[:3] for p in points]
    assert ["step 3", "training loss: not a number"] in [p[:2] for p in points]
    # 8 s a step, 7.5 of them in named phases; the evaluation before step 1 stands alone.
    assert "step 1\nrollout: 1\npack: 0.5\nteacher: 2\nstudent: 4\nother: 0.5" in page.words
    assert "step 0\neval: 3" in page.words


def test_a_run_without_evaluation_or_samples_has_a_report(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, Config(log=LogConfig(tensorboard=False))) as writer:
        writer.write(1, {"loss/divergence": 1.0})
    text = write_report(tmp_path, {"teacher_accuracy": None}).read_text()
    assert "Divergence" in text
    assert "Accuracy</figcaption>" not in text
    assert "Samples" not in text


def test_a_missing_metrics_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"metrics\.jsonl: No such file"):
        write_report(tmp_path, {})


def parse(svg: str) -> ElementTree.Element:
    return ElementTree.fromstring(svg)


def points_of(line: ElementTree.Element) -> list[tuple[float, float]]:
    pairs = (pair.split(",") for pair in line.attrib["points"].split())
    return [(float(x), float(y)) for x, y in pairs]


def test_a_line_goes_through_its_points() -> None:
    svg = parse(line_chart({"a": [(0, 0.0), (5, 1.0), (10, 0.5)]}, "y", y_range=(0.0, 1.0)))
    (line,) = svg.iter("polyline")
    right, base, middle = WIDTH - RIGHT, HEIGHT - BOTTOM, (TOP + HEIGHT - BOTTOM) / 2
    assert points_of(line) == [(LEFT, base), ((LEFT + right) / 2, TOP), (right, middle)]


def test_a_line_breaks_where_a_value_is_not_finite() -> None:
    values = [1.0, 2.0, math.nan, 3.0, math.inf, 4.0, 5.0]
    svg = parse(line_chart({"a": list(enumerate(values))}, "y"))
    assert [len(points_of(line)) for line in svg.iter("polyline")] == [2, 1, 2]


@pytest.mark.parametrize("points", [[], [(3, math.nan)], [(3, 0.0)], [(1, 7.0), (2, 7.0)]])
def test_charts_of_little_are_drawn(points: list[tuple[int, float]]) -> None:
    for svg in (line_chart({"a": points}, "y"), stacked_chart({"a": points}, "y")):
        for element in parse(svg).iter():
            for value in element.attrib.values():
                assert "nan" not in value
                assert "inf" not in value


def test_labels_are_escaped() -> None:
    svg = line_chart({HOSTILE: [(1, 1.0)]}, HOSTILE, references={HOSTILE: 1.0})
    texts = [element.text or "" for element in parse(svg).iter()]
    assert any(text == HOSTILE for text in texts)
    assert any(text.startswith(f"step 1\n{HOSTILE}: 1") for text in texts)


def test_bars_stack_to_the_sum() -> None:
    series = {"a": [(1, 1.0), (2, 3.0)], "b": [(1, 1.0)], "c": [(1, math.nan)]}
    svg = parse(stacked_chart(series, "s"))
    bars = [r for r in svg.iter("rect") if r.attrib.get("class") != "hover"]
    unit = (HEIGHT - TOP - BOTTOM) / 3
    heights = [float(bar.attrib["height"]) for bar in bars]
    assert heights == pytest.approx([unit, unit, 3 * unit], abs=0.02)
    tops = [float(bar.attrib["y"]) for bar in bars]
    assert tops == pytest.approx([TOP + 2 * unit, TOP + unit, TOP], abs=0.02)


def test_long_runs_are_thinned_and_keep_their_mean() -> None:
    num = 10_000
    svg = parse(line_chart({"a": [(s, float(s % 2)) for s in range(1, num + 1)]}, "y", (0.0, 1.0)))
    (line,) = svg.iter("polyline")
    points = points_of(line)
    assert len(points) <= MAX_POINTS
    heights = {y for _, y in points}
    assert heights == {round((TOP + HEIGHT - BOTTOM) / 2, 2)}
    # Phases that are measured at different steps share their bars.
    dense, sparse = [(s, 1.0) for s in range(1, 901)], [(s, 30.0) for s in range(1, 901, 30)]
    chart = parse(stacked_chart({"dense": dense, "sparse": sparse}, "s"))
    hovers = [r for r in chart.iter("rect") if r.attrib.get("class") == "hover"]
    assert len(hovers) == MAX_BARS
    title = hovers[0].find("title")
    assert title is not None
    assert title.text == "step 10\ndense: 1\nsparse: 3"


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 1.0, [0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (0.0, 3e-7, [0, 1e-7, 2e-7, 3e-7]),
        (-1.0, 1.0, [-1, -0.5, 0, 0.5, 1]),
        (7.5, 8.5, [7.6, 7.8, 8.0, 8.2, 8.4]),
        (2.0, 2.0, [2.0]),
    ],
)
def test_ticks_are_round(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected, rel=1e-12, abs=1e-20)


def test_ticks_of_steps_are_whole() -> None:
    assert ticks(1, 4, 6, integer=True) == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0"),
        (0.98, "0.98"),
        (1234.5, "1,234"),
        (2.9e-7, "2.9e-07"),
        (-0.5, "-0.5"),
        (1.23456789, "1.235"),
        (math.inf, "infinity"),
    ],
)
def test_numbers_are_readable(value: float, text: str) -> None:
    assert format_number(value) == text
