"""The page of an evaluation: what it shows, and that nothing in it runs or hides."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from megaopd.evaluation.page import Part, write_evaluation
from megaopd.evaluation.scoring import EvalRecord, figures

HOSTILE = [
    "<script>alert('x')</script>",
    "</pre></td></tr></table><img src=x onerror=alert(1)>",
    '"><svg/onload=alert(1)>',
    "&lt;b&gt; & &amp; &#60;i&#62;",
    "<!-- --> <style>*{display:none}</style> <meta http-equiv=refresh content=0>",
    "javascript:alert(1) ${1+1} {{7*7}} {title} {body} %s",
    "\ud800 half a pair, \x00 nul, \u202e turned round",
    "<a href='http://example.org'>link</a>",
]


class Page(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words = ""

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.open.append(tag)

    def handle_endtag(self, tag):
        while self.open and self.open.pop() != tag:
            pass

    def handle_data(self, data):
        if "style" not in self.open[-1:]:
            self.words += data


def record(prompt_id: str, text: str, score: float, index: int = 0) -> EvalRecord:
    return EvalRecord(
        prompt_id,
        f"prompt {text}",
        f"answer {text}",
        text,
        (1, 2),
        score == 1.0,
        score,
        False,
        index,
    )


def page_of(parts: list[Part], tmp_path, title: str = "model", num_samples: int = 99) -> Page:
    path = tmp_path / "report.html"
    write_evaluation(path, title, {"model": title}, parts, num_samples)
    page = Page()
    page.feed(path.read_text(encoding="utf-8"))
    return page


def part(records: list[EvalRecord], name: str = "data", **set_aside: int) -> Part:
    return Part(name, figures(records, "math"), records, set_aside)


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_text(tmp_path, text: str):
    records = [record(f"id {text}", text, 1.0, index) for index in range(2)]
    page = page_of([part(records, f"data {text}")], tmp_path, f"model {text}")
    # Exactly the tags of a page with harmless texts, in the same order.
    calm_records = [record("id", "calm", 1.0, index) for index in range(2)]
    calm = page_of([part(calm_records, "data")], tmp_path, "model")
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in calm.tags]
    assert [attrs for _, attrs in page.tags] == [attrs for _, attrs in calm.tags]
    assert not {"script", "img", "iframe", "object", "link", "a"} & {tag for tag, _ in page.tags}
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    # It is all there to be read. (HTML itself has no nul, no half of a pair.)
    if "\x00" not in text:
        for where in ("prompt ", "answer ", "id ", "data ", "model "):
            assert where + text in page.words
        assert page.words.count(text) >= 8
    policies = [attrs for tag, attrs in page.tags if tag == "meta" and "http-equiv" in attrs]
    assert [a["content"] for a in policies] == ["default-src 'none'; style-src 'unsafe-inline'"]


def test_figures_are_shown(tmp_path):
    records = [record("a", "\\boxed{1}", 1.0), record("a", "\\boxed{2}", 0.0, 1)]
    records += [record("b", "\\boxed{1}", 0.0), record("b", "none", 0.0, 1)]
    words = page_of([part(records, "aime", refused=3)], tmp_path).words
    for shown in ("mean@2", "pass@2", "maj@2", "aime", "25.0", "50.0", "3 refused"):
        assert shown in words, shown
    assert "1 of 2" in words
    assert "pass@1" not in words  # it is the mean


def test_greedy_figures_are_shown(tmp_path):
    words = page_of([part([record("a", "\\boxed{1}", 1.0)])], tmp_path).words
    assert "mean@1" in words
    assert "maj@1" not in words
    assert "pass@k" not in words


def test_from_the_hardest_to_the_easiest(tmp_path):
    records = [record(f"p{i}", "x", i / 10) for i in range(11)]
    words = page_of([part(records)], tmp_path, num_samples=3).words
    assert "3 of 11 prompts" in words
    shown = re.findall(r"p\d+(?=prompt)", words)
    assert shown == ["p0", "p5", "p10"]


def test_no_samples(tmp_path):
    words = page_of([part([record("a", "secret", 1.0)])], tmp_path, num_samples=0).words
    assert "secret" not in words
