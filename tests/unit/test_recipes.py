"""Every recipe can be laid over a run, and has its paragraph."""

from __future__ import annotations

from pathlib import Path

import pytest

from megaopd.config import LoraConfig, load, validate

REPOSITORY = Path(__file__).resolve().parents[2]
RECIPES = sorted(file.stem for file in (REPOSITORY / "conf" / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_lies_over_the_demo(name: str) -> None:
    config = load(["conf=demo_cpu", f"+recipes={name}"])
    assert config != load(["conf=demo_cpu"])
    validate(config, 3)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_has_its_paragraph(name: str) -> None:
    text = (REPOSITORY / "docs" / "recipes.md").read_text()
    assert f"\n## {name}\n\n" in text
    paragraph = text.split(f"\n## {name}\n")[1].split("\n## ")[0]
    assert len(paragraph) > 200
    # The keys of the originals, and what they are here.
    assert " | here |\n|-|-|\n" in paragraph


def test_self_distillation_with_and_without_a_second_copy() -> None:
    config = load(["conf=demo_cpu", "+recipes=self_distill"])
    validate(config, 3)
    assert (config.teacher.kind, config.teacher.path) == ("self", "")
    assert config.teacher.dtype == config.student.dtype == "fp32"
    config = load(["conf=demo_cpu", "+recipes=[self_distill,lora]", "teacher.kind=base"])
    validate(config, 3)
    assert config.student.lora == LoraConfig(rank=32, alpha=64)


def test_opsd_is_one_set_of_weights() -> None:
    config = load(["conf=demo_cpu", "+recipes=opsd"])
    validate(config, 3)
    assert config.teacher.kind == "base"
    assert config.student.lora is not None
    assert config.student.lora.scale == 2.0
    assert config.data.teacher_prompt_column == "teacher_prompt"


def test_teachers_are_routed_or_averaged() -> None:
    teachers = ("teachers.math.path=a", "teachers.code.path=b")
    teachers += ("teachers.math.dtype=fp32", "teachers.code.dtype=fp32")
    config = load(["conf=demo_cpu", "+recipes=multi_teacher", *teachers])
    validate(config, 3)
    assert config.data.teacher_column == "data_source"
    average = ("teacher.kind=average", "teacher.path=", "teacher.members=[math,code]")
    config = load(
        ["conf=demo_cpu", "+recipes=multi_teacher", *teachers, *average, "eval.teacher=false"]
    )
    validate(config, 3)
