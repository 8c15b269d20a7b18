"""Reading, checking, printing and documenting a configuration."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import yaml

from megaopd import config_compose
from megaopd.config import (
    Config,
    ParallelConfig,
    RolloutConfig,
    SGLangConfig,
    TeacherConfig,
    load,
    main,
    to_yaml,
    validate,
    validate_models,
)
from megaopd.config_schema import build, field_docs, paths, section_of, to_markdown
from megaopd.config_servers import check_local
from megaopd.errors import ConfigError
from megaopd.train_rollout import ENGINES
from megaopd.train_servers import TRANSPORTS
from megaopd.train_teachers import TEACHERS

REPOSITORY = Path(__file__).resolve().parents[2]

YAML = """\
defaults:
  - parallel: tp3
  - _self_
student:
  path: student
teacher:
  path: teacher
data:
  train: train.jsonl
optimizer:
  lr: 1e-4
  min_lr: ${optimizer.lr}
  warmup_steps: ${train.max_skipped_steps}
rollout:
  stop: ["\\n", "<|im_end|>"]
train:
  global_batch_size: 8
"""


@pytest.fixture
def conf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with conf/tiny.yaml and the group conf/parallel; returns conf/."""
    directory = tmp_path / "conf"
    (directory / "parallel").mkdir(parents=True)
    (directory / "tiny.yaml").write_text(YAML)
    (directory / "parallel" / "tp3.yaml").write_text("tensor: 3\n")
    (directory / "parallel" / "tp2.yaml").write_text("tensor: 2\nsequence_parallel: true\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(config_compose, "REPOSITORY_CONF", tmp_path / "none")
    return directory


def test_values_come_from_defaults_file_group_reference_and_override(conf: Path) -> None:
    config = load(["conf=tiny", "loss.kind=jsd", "loss.chunk_tokens=64", "student.freeze=[a,b]"])

    assert config.train.num_steps == Config().train.num_steps
    assert config.train.global_batch_size == 8
    assert config.parallel.tensor == 3
    assert config.optimizer.lr == config.optimizer.min_lr == 1e-4
    # The reference names a key that the file does not mention.
    assert config.optimizer.warmup_steps == Config().train.max_skipped_steps
    assert config.rollout.stop == ("\n", "<|im_end|>")
    assert (config.loss.kind, config.loss.chunk_tokens) == ("jsd", 64)
    assert config.student.freeze == ("a", "b")
    assert (config.run.name, config.run.dir) == ("tiny", "runs/tiny")


def test_an_integer_becomes_a_float_where_a_number_is_asked(conf: Path) -> None:
    lr = load(["conf=tiny", "optimizer.lr=1"]).optimizer.lr
    assert (lr, type(lr)) == (1.0, float)


def test_a_group_is_chosen_on_the_command_line(conf: Path) -> None:
    config = load(["conf=tiny", "parallel=tp2", "parallel.pipeline=2"])
    assert config.parallel == ParallelConfig(tensor=2, pipeline=2, sequence_parallel=True)


def test_a_group_serves_either_side(conf: Path) -> None:
    (conf / "two.yaml").write_text(
        "defaults: [parallel: tp3, parallel@teacher.parallel: tp2, _self_]\n"
        "teacher: {parallel: {context: 2}}\n"
    )
    config = load(["conf=two"])
    assert config.parallel == ParallelConfig(tensor=3)
    assert config.teacher.parallel == ParallelConfig(tensor=2, context=2, sequence_parallel=True)
    swapped = load(["conf=two", "parallel=tp2", "parallel@teacher.parallel=tp3"])
    assert swapped.parallel == ParallelConfig(tensor=2, sequence_parallel=True)
    assert swapped.teacher.parallel == ParallelConfig(tensor=3, context=2)
    added = load(["conf=tiny", "+parallel@teacher.parallel=tp2"])
    assert added.teacher.parallel == ParallelConfig(tensor=2, sequence_parallel=True)


def test_an_optional_section_takes_the_defaults_of_its_own_keys(conf: Path) -> None:
    assert load(["conf=tiny"]).teacher.parallel is None
    config = load(
        ["conf=tiny", "teacher.parallel.tensor=2", "teacher.parallel.layers_per_stage=[7]"]
    )
    assert config.teacher.parallel == ParallelConfig(tensor=2, layers_per_stage=(7,))
    assert load(["conf=tiny", "teacher.parallel={}"]).teacher.parallel == ParallelConfig()
    (conf / "null.yaml").write_text("teacher: {path: x, parallel: null}\n")
    assert load(["conf=null", "teacher.parallel.tensor=2"]).teacher.parallel == ParallelConfig(2)
    (conf / "set.yaml").write_text("teacher: {path: x, parallel: {tensor: 2}}\n")
    assert load(["conf=set", "teacher.parallel=null"]).teacher.parallel is None


def test_named_sections_come_from_file_and_overrides(conf: Path) -> None:
    (conf / "many.yaml").write_text("teachers: {math: {path: m, dtype: fp32}, 7: {path: s}}\n")
    config = load(
        ["conf=many", "teachers.math.path=n", "+teachers.co-de.path=c", "teachers.de.kind=self"]
    )
    assert config.teachers == {
        "math": TeacherConfig(path="n", dtype="fp32"),
        "7": TeacherConfig(path="s"),
        "co-de": TeacherConfig(path="c"),
        "de": TeacherConfig(kind="self"),
    }
    layout = load(["conf=many", "teachers.math.parallel.tensor=2"]).teachers["math"].parallel
    assert layout == ParallelConfig(tensor=2)


def test_a_path_finds_its_own_groups_and_those_of_conf(conf: Path, tmp_path: Path) -> None:
    file = tmp_path / "elsewhere" / "mine.yaml"
    (file.parent / "loss").mkdir(parents=True)
    (file.parent / "loss" / "soft.yaml").write_text("kind: jsd\n")
    file.write_text("defaults:\n  - loss: soft\n  - parallel: tp2\n")
    config = load([f"conf={file}"])
    assert (config.loss.kind, config.parallel.tensor, config.run.name) == ("jsd", 2, "mine")


def test_the_repository_conf_comes_after_the_working_directory(
    conf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shipped = tmp_path / "shipped"
    shipped.mkdir()
    (shipped / "tiny.yaml").write_text("train: {num_steps: 1}\n")
    (shipped / "other.yaml").write_text("train: {num_steps: 2}\n")
    monkeypatch.setattr(config_compose, "REPOSITORY_CONF", shipped)
    assert load(["conf=tiny"]).train.num_steps == Config().train.num_steps
    assert load(["conf=other"]).train.num_steps == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["loss.knd=jsd"], "loss.knd: unknown key; did you mean loss.kind?"),
        (["los.kind=jsd"], "los: unknown key; did you mean loss?"),
        (["lr=1"], "lr: unknown key; did you mean optimizer.lr?"),
        (["train.lr=1"], "train.lr: unknown key; did you mean optimizer.lr?"),
        (
            ["run.qqqqqq=1"],
            "run.qqqqqq: unknown key; known here: name, dir, seed",
        ),
        (["train.num_steps=many"], 'train.num_steps: found "many"; expected an integer'),
        (["train.num_steps=1e3"], "train.num_steps: found 1000.0; expected an integer"),
        (["run.seed=true"], "run.seed: found true; expected an integer"),
        (["optimizer.lr=nan"], "optimizer.lr: found NaN; expected a finite number"),
        (["optimizer.lr=null"], "optimizer.lr: found null; expected a finite number"),
        (["data.shuffle=1"], "data.shuffle: found 1; expected true or false"),
        (
            ["student.dtype=fp23"],
            'student.dtype: found "fp23"; did you mean fp32? expected one of fp32, bf16',
        ),
        (["loss.chunk_tokens=x"], 'loss.chunk_tokens: found "x"; expected an integer or null'),
        (["student.freeze=a"], 'student.freeze: found "a"; expected a list, each item a string'),
        (["student.freeze=[a,2]"], "student.freeze[1]: found 2; expected a string"),
        (["run.name=3"], "run.name: found 3; expected a string, quoted"),
        (["loss=3"], "loss: found 3, not a section; write its keys below it"),
        (["loss=null"], "loss: found null, not a section"),
        (["tensor=2"], "tensor: unknown key; did you mean parallel.tensor?"),
        (
            ["teacher.parallel.tesnor=2"],
            "teacher.parallel.tesnor: unknown key; did you mean teacher.parallel.tensor?",
        ),
        (["teacher.paralel.tensor=2"], "teacher.paralel: unknown key; did you mean teacher.par"),
        (["teacher.parallel=3"], "teacher.parallel: found 3, not a section; write its keys below"),
        (
            ["teacher.parallel.tensor=x"],
            'teacher.parallel.tensor: found "x"; expected an integer',
        ),
        (["teacher.parallel.layers_per_stage=[2,a]"], 'layers_per_stage[1]: found "a"; expected'),
        (
            ["teachers.math.pth=x"],
            "teachers.math.pth: unknown key; did you mean teachers.math.path?",
        ),
        (["teachers.math=x"], 'teachers.math: found "x", not a section; write its keys below it'),
        (["teachers=[x]"], "teachers: found a list, not a section; write its keys below it"),
        (["teachers=x"], 'teachers: found "x", not a section; write a name and its keys'),
        (["teachers.math.kind=slef"], 'teachers.math.kind: found "slef"; did you mean self?'),
        (["train.recompute=half"], 'found "half"; expected one of none, selective, full'),
        (["word"], "word: neither conf=NAME nor key=value; write overrides as key=value"),
        (["loss.kind=a,b"], "conf=tiny: Ambiguous value"),
        (["run.name=a(=b"], "conf=tiny: no viable alternative at input"),
        (["parallel=tp9"], "Available options in 'parallel': tp2 tp3"),
        (["run.name=${loss.nothing}"], "Interpolation key 'loss.nothing' not found"),
        (["hydra.run.dir=x"], "hydra.run.dir: a setting of Hydra itself"),
        (["~hydra"], "hydra: a setting of Hydra itself"),
        (["+loss._target_=os.system"], "_target_: a key that Hydra would act upon"),
        (["run.name=${oc.env:HOME}"], "the interpolation '${oc.env:HOME}'; only plain references"),
        (["student.freeze=['${now:%Y}']"], "only plain references"),
        (["conf=tiny"], "conf: given more than once"),
    ],
)
def test_a_bad_word_is_one_line(conf: Path, words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(["conf=tiny", *words])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_status == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("loss: {kind: [}", "bad.yaml:1: not valid YAML"),
        ("run:\n  seed: 1\n   name: x\n", "bad.yaml:3: not valid YAML"),
        ("run:\n  seed: 1\n  seed: 2\n", "found duplicate key seed"),
        ("- 1\n", "bad.yaml: a YAML list; write keys and values"),
        ("run: {name: !!python/name:os.system x}", "bad.yaml:1: not valid YAML"),
        ("hydra: {searchpath: ['pkg://os']}", "bad.yaml: hydra: a key that Hydra would act upon"),
        ("defaults: ['parallel: ${oc.env:X}']", "the interpolation '"),
        ("train: {nun_steps: 3}", "train.nun_steps: unknown key; did you mean train.num_steps?"),
    ],
)
def test_a_bad_file_is_one_line(conf: Path, text: str, message: str) -> None:
    (conf / "bad.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(["conf=bad"])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_refused_reference_in_a_group_file_names_its_key(conf: Path) -> None:
    (conf / "parallel" / "bad.yaml").write_text("tensor: ${oc.decode:3}\n")
    with pytest.raises(ConfigError, match=r"parallel/bad\.yaml: tensor: the interpolation"):
        load(["conf=tiny", "parallel=bad"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["conf=tyni"], "did you mean tiny?"),
        ([], "conf: not given; give conf=NAME once: one of tiny,"),
        (["conf=no/such.yaml"], "conf: there is no file no/such.yaml"),
        (["conf=conf"], "there is no conf.yaml in ./conf"),
    ],
)
def test_a_missing_configuration_is_named(conf: Path, words: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(words)
    assert message in str(caught.value)


def test_what_is_printed_has_every_doc_and_reads_back(
    conf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["conf=tiny", "optimizer.eps=1e-9", "loss.chunk_tokens=7", "run.seed=5"]
    words += ["teacher.parallel.tensor=2", "teachers.no.path=x", "parallel.layers_per_stage=[4,8]"]
    words += ["teachers.b-2.parallel.pipeline=3", "teachers.b-2.offload=true"]
    main(words)
    text = capsys.readouterr().out
    assert "  # Samples per prompt.\n  n: 1\n" in text
    assert "  seed: 5    # default: 1234\n" in text
    assert "  parallel:    # default: null\n" in text
    assert "    tensor: 2    # default: 1\n" in text
    for section in map(section_of, get_type_hints(Config).values()):
        assert section is not None
        for doc in field_docs(section).values():
            assert f"  # {doc}\n" in text
    copy = tmp_path / "copy.yaml"
    copy.write_text(text)
    assert load([f"conf={copy}"]) == load(words)
    assert text == to_yaml(load(words))


@dataclass
class Inner:
    size: int = 1
    """How big it is."""


@dataclass
class Outer:
    inner: Inner = field(default_factory=Inner)
    maybe: Inner | None = None
    """There or not."""
    parts: dict[str, Inner] = field(default_factory=dict)
    """By name."""


@dataclass
class Schema:
    outer: Outer = field(default_factory=Outer)


def test_sections_nest_at_any_depth() -> None:
    keys = ["outer.inner.size", "outer.maybe", "outer.maybe.size", "outer.parts.NAME.size"]
    assert list(paths(Schema)) == keys
    values = {"outer": {"inner": {"size": 2}, "maybe": {}, "parts": {"a": {"size": 3}}}}
    built = build(Schema, values)
    assert built == Schema(Outer(Inner(2), Inner(), {"a": Inner(3)}))
    text = to_yaml(built)
    assert [line for line in text.splitlines() if "size" in line] == [
        "    size: 2    # default: 1",
        "    size: 1",
        "      size: 3    # default: 1",
    ]
    rows = [line.split(" | ")[:3] for line in to_markdown(Schema).splitlines() if "`" in line]
    assert rows == [
        ["| `outer.inner.size`", "an integer", "`1`"],
        ["| `outer.maybe`", "a section or null", "`null`"],
        ["| `outer.maybe.size`", "an integer", "`1`"],
        ["| `outer.parts`", "names, each of a section", "`{}`"],
        ["| `outer.parts.NAME.size`", "an integer", "`1`"],
    ]


@pytest.mark.parametrize("key", list(paths(Config)))
def test_every_field_has_a_doc_that_is_a_sentence(key: str) -> None:
    *parents, name = [part for part in key.split(".") if part != "NAME"]
    section: type = Config
    for parent in parents:
        inner = section_of(get_type_hints(section)[parent])
        assert inner is not None
        section = inner
    doc = field_docs(section)[name]
    assert doc.endswith(".")
    assert len(doc) > 15


def test_the_committed_reference_is_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--markdown"])
    generated = capsys.readouterr().out
    committed = (REPOSITORY / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert committed == generated, (
        "run: python -m megaopd.config --markdown > docs/configuration.md"
    )


@pytest.mark.parametrize("name", sorted(p.stem for p in (REPOSITORY / "conf").glob("*.yaml")))
def test_every_shipped_configuration_loads(name: str) -> None:
    config = load([f"conf={name}"])
    assert config.run.dir == f"runs/{config.run.name}"


# What a part of a layout's file name stands for; "sp" and "single" take no number.
_SIZES = {"tp": "tensor", "pp": "pipeline", "cp": "context", "ep": "expert"}


@pytest.mark.parametrize("name", sorted(p.stem for p in REPOSITORY.glob("conf/parallel/*.yaml")))
def test_a_shipped_layout_is_what_its_name_says(tmp_path: Path, name: str) -> None:
    named: dict[str, int | bool] = {}
    for part in name.split("_"):
        if part == "sp":
            named["sequence_parallel"] = True
        elif part != "single":
            named[_SIZES[part[:2]]] = int(part[2:])
    file = tmp_path / "layouts.yaml"
    file.write_text(f"defaults: [parallel: {name}, parallel@teacher.parallel: {name}]\n")
    config = load([f"conf={file}"])
    assert config.parallel == config.teacher.parallel == ParallelConfig(**named)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("words", "kind", "max_staleness"),
    [
        (["rollout=embedded"], "embedded", 0),
        (["rollout=sglang"], "sglang", 0),
        (["rollout=sglang_async"], "sglang", 1),
        (["+teacher=sglang", "teacher.urls=['http://localhost:1']"], "embedded", 0),
    ],
)
def test_a_shipped_way_to_sample_or_score_is_sound(
    words: list[str], kind: str, max_staleness: int
) -> None:
    config = load(["conf=demo_cpu", *words])
    validate(config, 3)
    assert (config.rollout.kind, config.rollout.max_staleness) == (kind, max_staleness)
    # What the demo itself says of sampling and of the teacher is kept.
    assert (config.rollout.max_new_tokens, config.rollout.stop) == (8, ("\n",))
    assert config.teacher.path == ".cache/demo/teacher"


def test_the_reference_run_fits_two_nodes() -> None:
    """Heads, layers and contexts of Qwen3-8B and Qwen3-32B, as their config.json has them."""
    student = Arch(36, 32, 8, 12288, 40960)
    teacher = Arch(64, 64, 8, 25600, 40960)
    validate(load(["conf=opd_32b_to_8b"]), 16, student, teacher)


def test_the_command_line_exits_with_2_and_one_line(conf: Path) -> None:
    command = [sys.executable, "-m", "megaopd.config"]
    environment = {"PYTHONPATH": str(REPOSITORY), "PATH": ""}
    done = subprocess.run(
        [*command, "conf=tiny", "loss.knd=1"],
        capture_output=True, text=True, timeout=60, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr == "error: loss.knd: unknown key; did you mean loss.kind?\n"
    helped = subprocess.run(
        [*command, "--help"],
        capture_output=True, text=True, timeout=60, env=environment, check=True,
    )  # fmt: skip
    assert "conf=NAME" in helped.stdout
    assert "loss.kind=jsd" in helped.stdout


@dataclass
class Experts:
    num_experts: int = 6
    ffn_hidden_size: int = 32
    layers: tuple[int, ...] = tuple(range(12))


@dataclass
class Arch:
    num_layers: int = 12
    num_heads: int = 9
    num_kv_heads: int = 3
    ffn_hidden_size: int = 36
    max_positions: int = 2048
    moe: Experts | None = None


AVERAGE = (
    "teacher={kind: average, path: '', members: [a, b]}",
    "teachers.a.path=x",
    "teachers.b.path=x",
)
# Rollouts by a server of this host.
SGLANG = "rollout={kind: sglang, urls: ['http://localhost:9']}"


@cache
def _tiny() -> str:
    return json.dumps(asdict(load(["conf=tiny"])))


def _valid(conf: Path, *words: str) -> Config:
    """What `load(["conf=tiny", *words])` gives, without Hydra's 0.1 s for each of 200 rules."""
    values = json.loads(_tiny())
    for word in words:
        key, text = word.split("=", 1)
        *sections, name = key.split(".")
        place = values
        for section in sections:
            place[section] = place = place.get(section) or {}
        value = yaml.safe_load(text) if text else ""
        inner = place.get(name) if isinstance(value, dict) else None
        place[name] = {**inner, **value} if inner else value
    return build(Config, values)


def test_the_short_cut_is_none(conf: Path) -> None:
    words = [SGLANG, "teachers.math.path=x", "parallel.layers_per_stage=[5,7]", "teacher.path="]
    assert _valid(conf, *words) == load(["conf=tiny", *words])


def test_a_sound_configuration_passes(conf: Path) -> None:
    validate(_valid(conf), 3, Arch(), Arch(), divergences={"reverse_kl"}, rewards={"exact_match"})
    validate(_valid(conf), 12)  # 4 data-parallel ranks, 8 samples
    # A function of the user's is looked for when it is loaded.
    validate(_valid(conf, "eval.reward='my.py:score'"), 3, rewards={"exact_match"})


@pytest.mark.parametrize(
    ("words", "world_size", "student", "teacher"),
    [
        # Layouts that differ; layers shared out unevenly; a teacher of another depth.
        (
            ["parallel.pipeline=2", "parallel.layers_per_stage=[5,7]", "teacher.parallel.tensor=2"],
            6,
            Arch(),
            Arch(num_layers=5, num_heads=4, num_kv_heads=2),
        ),
        (["parallel.pipeline=2", "parallel.virtual_pipeline=3"], 6, Arch(), Arch()),
        # A token budget needs no multiple of the data-parallel size, only the longest sequence.
        (
            [
                *("parallel.tensor=1", "parallel.context=2", "rollout.max_new_tokens=10"),
                *("data.max_prompt_tokens=9", "train.max_tokens_per_micro_batch=20"),
            ],
            6,
            Arch(),
            Arch(),
        ),
        # A dense student, a mixture of experts above it in its own layout.
        (
            [
                *("teacher.parallel.tensor=3", "teacher.parallel.expert=6"),
                "teacher.parallel.expert_tensor=1",
            ],
            6,
            Arch(),
            Arch(moe=Experts()),
        ),
        (
            [
                *("parallel.sequence_parallel=true", "parallel.expert=3"),
                *("parallel.expert_tensor=2", "student.router_aux_loss_coef=0.01"),
            ],
            6,
            Arch(moe=Experts()),
            Arch(moe=Experts()),
        ),
        (["teacher.kind=ema", "teacher.path=", "teacher.parallel.tensor=3"], 3, Arch(), Arch()),
        # Servers of this host need no key; a teacher on servers has no layout here.
        (
            [
                *("rollout.kind=sglang", "rollout.urls=['http://localhost:1','http://[::1]:2']"),
                *("rollout.max_staleness=2", "teacher.kind=sglang", "teacher.parallel.tensor=7"),
                "teacher.urls=['http://127.0.0.1:3/']",
            ],
            3,
            Arch(),
            Arch(num_heads=7),
        ),
        (["rollout.kind=sglang", "rollout.launch=true"], 3, Arch(), Arch()),
    ],
)
def test_what_can_work_is_not_refused(
    conf: Path, words: list[str], world_size: int, student: Arch, teacher: Arch
) -> None:
    validate(_valid(conf, *words), world_size, student, teacher)


@pytest.mark.parametrize(
    ("words", "world_size", "message"),
    [
        (
            ["parallel.pipeline=2"],
            8,
            "parallel: the student's tensor 3 x pipeline 2 x context 1 = 6 does not divide the "
            "world size 8; start a multiple of 6 ranks",
        ),
        (
            ["teacher.parallel.tensor=2", "teacher.parallel.context=2"],
            6,
            "teacher.parallel: the teacher's tensor 2 x pipeline 1 x context 2 = 4 does not divide "
            "the world size 6, the ranks that teacher and student share",
        ),
        (
            ["teachers.math.path=x", "teachers.math.parallel.tensor=4"],
            6,
            "teachers.math.parallel: the teacher math's tensor 4 x",
        ),
        (
            ["teacher.parallel.tensor=2", "teacher.parallel.expert=2"],
            6,
            "teacher.parallel.expert: the teacher's expert 2 x expert_tensor 2 = 4 does not divide "
            "the 6 ranks of a pipeline stage (tensor 2 x context 1 x data 3)",
        ),
        (
            ["parallel.pipeline=2", "parallel.expert=4", "parallel.expert_tensor=1"],
            12,
            "parallel.expert: the student's expert 4 x expert_tensor 1 = 4 does not divide the 6 "
            "ranks of a pipeline stage (tensor 3 x context 1 x data 2)",
        ),
        (
            ["parallel.virtual_pipeline=2"],
            3,
            "parallel.virtual_pipeline: 2 with parallel.pipeline 1",
        ),
        (
            ["parallel.pipeline=2", "parallel.layers_per_stage=[4,4,4]"],
            6,
            "parallel.layers_per_stage: 3 numbers for pipeline 2 x virtual_pipeline 1 = 2 stages",
        ),
        (
            ["parallel.pipeline=2", "parallel.layers_per_stage=[12,0]"],
            6,
            "parallel.layers_per_stage: 0 layers in stage 1; give every stage at least 1",
        ),
        (
            ["teacher.parallel.expert_tensor=0"],
            3,
            "teacher.parallel.expert_tensor: found 0; expected a positive number",
        ),
        (
            [
                *("parallel.context=2", "train.max_tokens_per_micro_batch=18"),
                *("rollout.max_new_tokens=10", "data.max_prompt_tokens=8"),
            ],
            6,
            "train.max_tokens_per_micro_batch: 18 is less than the 20 tokens of the longest "
            "sequence (data.max_prompt_tokens 8 + rollout.max_new_tokens 10 = 18, padded to "
            "20 = 5 x 2 x context 2); give at least 20",
        ),
        (
            ["teacher.max_tokens_per_micro_batch=2047"],
            3,
            "teacher.max_tokens_per_micro_batch: 2047 is less than the 2048 tokens of the longest "
            "sequence (data.max_prompt_tokens 1024 + rollout.max_new_tokens 1024 = 2048); give",
        ),
        (
            ["train.max_tokens_per_micro_batch=2050", "teacher.parallel.context=3"],
            3,
            "train.max_tokens_per_micro_batch: 2050 is less than the 2052 tokens",
        ),
        (
            ["teacher.max_tokens_per_micro_batch=0"],
            3,
            "teacher.max_tokens_per_micro_batch: found 0; expected a positive number",
        ),
        (["teacher.kind=self"], 3, "teacher.path: 'teacher' with teacher.kind self, whose weights"),
        (
            ["teacher={kind: average, path: '', members: [a]}"],
            3,
            "teacher.members: found ['a']; name two or more",
        ),
        (
            ["teacher={kind: average, path: '', members: [a, b]}", "teachers.a.path=x"],
            3,
            "teacher.members: 'b' is no teacher",
        ),
        (
            [*AVERAGE, "teachers.b.dtype=fp32"],
            3,
            "teachers.b.dtype: fp32, where teacher.dtype is bf16",
        ),
        ([*AVERAGE, "teacher.member_weights=[1]"], 3, "teacher.member_weights: found [1.0] for 2"),
        ([*AVERAGE, "teacher.path=x"], 3, "teacher.path: 'x' with teacher.kind average"),
        ([*AVERAGE, "teachers.b={kind: ema, path: ''}"], 3, "teacher.members: 'b' is ema"),
        (
            [*AVERAGE, "data.eval=x"],
            3,
            "eval.teacher: set with teacher.kind average, from which nobody can sample",
        ),
        (["teacher.members=[a, b]"], 3, "teacher.members: set, and teacher.kind is checkpoint"),
        (["student.lora.rank=0"], 3, "student.lora.rank: found 0; expected a positive number"),
        (
            ["student.lora.rank=8", "student.freeze=['*norm*']"],
            3,
            "student.freeze: set together with student.lora",
        ),
        (
            ["teacher.kind=base", "teacher.path="],
            3,
            "teacher.kind: base, and the student has no LoRA adapters",
        ),
        (
            ["teacher.kind=base", "teacher.path=", "student.lora.rank=8", "teacher.offload=true"],
            3,
            "teacher.offload: true with teacher.kind base",
        ),
        (
            ["teacher.kind=self", "teacher.path=", "student.lora.adapter=x"],
            3,
            "teacher.kind: self, and student.lora.adapter is set",
        ),
        (
            ["teacher.kind=ema", "teacher.path=", "teacher.parallel.tensor=1"],
            3,
            "teacher.parallel: another layout than the student's with teacher.kind ema",
        ),
        (
            ["teacher.kind=self", "teacher.path=", "student.dtype=fp32"],
            3,
            "teacher.dtype: bf16 with teacher.kind self and student.dtype fp32: rounding alone "
            "would set the teacher apart; set teacher.dtype=fp32",
        ),
        (["teacher.ema_decay=1"], 3, "teacher.ema_decay: found 1.0; expected a value in [0, 1)"),
        (
            ["teachers.math.path=x", "teachers.math.ema_decay=-1"],
            3,
            "teachers.math.ema_decay: found -1.0; expected a value in [0, 1)",
        ),
        (["teachers.math.dtype=fp32"], 3, "teachers.math.path: not set; give teachers.math.path="),
        (["teachers={a.b: {path: x}}"], 3, "teachers: the name 'a.b'; name it in letters"),
        (["student.router_aux_loss_coef=-1"], 3, "student.router_aux_loss_coef: found -1.0; exp"),
        (
            ["train.micro_batch_size=3"],
            6,
            "train.global_batch_size: 8 is not a multiple of data-parallel size 2 (= 6 / 3) x "
            "train.micro_batch_size 3 = 6",
        ),
        (["rollout.n=3"], 3, "train.global_batch_size: 8 is not a multiple of rollout.n 3"),
        (
            ["parallel.tensor=1", "parallel.sequence_parallel=true"],
            1,
            "parallel.sequence_parallel: true with parallel.tensor 1",
        ),
        (["rollout.kind=recorded"], 3, "rollout.path: not set, and rollout.kind is recorded"),
        (["rollout.path=a", "rollout.record=a"], 3, "rollout.record: the recording that is"),
        (["rollout.kind=sglang"], 3, "rollout.urls: not set, and rollout.kind is sglang; name the"),
        (
            [SGLANG, "rollout.launch=true"],
            3,
            "rollout.urls: set, and rollout.launch is true; set rollout.launch=false to use these",
        ),
        (["rollout.urls=['http://localhost:1']"], 3, "rollout.urls: set, and rollout.kind is embe"),
        (["rollout.launch=true"], 3, "rollout.launch: set, and rollout.kind is embedded; set"),
        (
            [SGLANG, "rollout.urls=['http://localhost:1','http://10.0.0.7:30000']"],
            3,
            "rollout.urls[1]: http://10.0.0.7:30000 is not on this host, and "
            "$MEGAOPD_SGLANG_API_KEY is not set; start the server with --api-key",
        ),
        (
            [SGLANG, "rollout.urls=['http://node7:1']", "rollout.sglang.api_key_env=KEY"],
            3,
            "rollout.urls[0]: http://node7:1 is not on this host, and $KEY is not set",
        ),
        (
            [SGLANG, "rollout.urls=['http://me:secret@localhost:1']"],
            3,
            "rollout.urls[0]: it holds a user name or password; take it out",
        ),
        *(
            (
                [SGLANG, f"rollout.urls=['{url}']"],
                3,
                f"rollout.urls[0]: found '{url}'{found}; write it as http://host:port",
            )
            for url, found in (
                ("localhost:1", ""),
                ("ftp://localhost:1", ""),
                ("http://localhost:1/generate", ""),
                ("http://:1", ""),
                ("http://localhost:0", ""),
                ("http://localhost:70000", " (Port out of range 0-65535)"),
            )
        ),
        (
            [SGLANG, "rollout.urls=['http://localhost:1','http://localhost:1']"],
            3,
            "rollout.urls[1]: http://localhost:1 is there twice; name each server once",
        ),
        (
            [SGLANG, "rollout.urls=['http://localhost:1','http://LOCALHOST:1/']"],
            3,
            "rollout.urls[1]: http://LOCALHOST:1/ is there twice; name each server once",
        ),
        (
            [SGLANG, "rollout.sglang.args=[--log-level,info,'--host=0.0.0.0']"],
            3,
            "rollout.sglang.args[2]: --host, which the run sets by itself; set rollout.sglang.host",
        ),
        (
            [SGLANG, "rollout.sglang.args=[--api-key,secret]"],
            3,
            "rollout.sglang.args[0]: --api-key, which the run sets by itself; put the key into the",
        ),
        *(
            (
                ["rollout.kind=sglang", "rollout.launch=true", f"rollout.sglang.host='{host}'"],
                3,
                f"rollout.sglang.host: {host}, which the whole network reaches; give the address",
            )
            for host in ("0.0.0.0", "::", "8.8.8.8")
        ),
        (
            ["rollout.max_staleness=1"],
            3,
            "rollout.max_staleness: 1 with rollout.kind embedded, which generates nothing while",
        ),
        (
            [SGLANG, "rollout.sglang.colocated=true", "rollout.max_staleness=1"],
            3,
            "rollout.max_staleness: 1 with rollout.sglang.colocated: the servers give up their",
        ),
        (
            [SGLANG, "rollout.sglang.colocated=true", "rollout.sglang.sync=distributed"],
            3,
            "rollout.sglang.sync: distributed with rollout.sglang.colocated: NCCL joins no two",
        ),
        (["rollout.sglang.num_servers=0"], 3, "rollout.sglang.num_servers: found 0; expected a po"),
        (["rollout.max_staleness=-1"], 3, "rollout.max_staleness: found -1; expected 0 or more"),
        (["rollout.agent={}"], 3, "rollout.agent.tools: none; name the tools, or set rollout.agen"),
        (
            ["rollout.agent.tools=[calculater]"],
            3,
            "rollout.agent.tools[0]: no 'calculater'; did you mean calculator? choose one of calc",
        ),
        (
            ["rollout.agent.tools=[calculator]", "rollout.agent.max_turns=0"],
            3,
            "rollout.agent.max_turns: found 0; expected a positive number",
        ),
        (["teacher.kind=sglang"], 3, "teacher.urls: not set, and teacher.kind is sglang; name the"),
        (
            ["teacher.urls=['http://localhost:1']"],
            3,
            "teacher.urls: set, and teacher.kind is checkpoint; set teacher.kind=sglang",
        ),
        (
            [
                "teachers.m.path=x",
                "teachers.m.kind=sglang",
                "teachers.m.urls=['http://10.1.1.1:1']",
            ],
            3,
            "teachers.m.urls[0]: http://10.1.1.1:1 is not on this host, and $MEGAOPD_TEACHER_API_K",
        ),
        (["teacher.top_k=-1"], 3, "teacher.top_k: found -1; expected 0 or more"),
        (
            ["teacher.kind=sglang", "teacher.urls=['http://localhost:1']", "loss.temperature=0.5"],
            3,
            "loss.temperature: 0.5 with teacher.kind sglang, whose log-probs are at temperature 1",
        ),
        (
            [
                "teacher.kind=sglang",
                "teacher.urls=['http://localhost:1']",
                "teacher.top_k=0",
                "rollout.top_p=0.9",
            ],
            3,
            "rollout.top_p: the sampler leaves tokens out, and teacher.top_k is 0: an estimate",
        ),
        (
            [
                "teacher.kind=sglang",
                "teacher.urls=['http://localhost:1']",
                "teacher.top_k=0",
                "rollout.temperature=0",
            ],
            3,
            "rollout.temperature: 0, and teacher.top_k is 0: an estimate from sampled tokens needs",
        ),
        (["loss.importance_cap=0.5"], 3, "loss.importance_cap: found 0.5; expected 1 or more"),
        (["loss.icepop_low=1.5"], 3, "loss.icepop_low: found 1.5; expected a value in [0, 1]"),
        (["loss.icepop_high=0.9"], 3, "loss.icepop_high: found 0.9; expected 1 or more"),
        (["data.train="], 3, "data.train: not set; give data.train=PATH"),
        (["student.path="], 3, "student.path: not set"),
        (["teacher.path="], 3, "teacher.path: not set"),
        (["eval.interval=5"], 3, "eval.interval: 5 without data.eval"),
        (["optimizer.min_lr=1"], 3, "optimizer.min_lr: 1.0 > optimizer.lr 0.0001"),
        (
            ["optimizer.decay=cosine", "train.num_steps=3"],
            3,
            "optimizer.warmup_steps: 3 of train.num_steps 3 leave no step for the cosine decay",
        ),
        (
            ["loss.kind=jds"],
            3,
            "loss.kind: no 'jds'; did you mean jsd? choose one of reverse_kl, jsd",
        ),
        (["eval.reward=x"], 3, "eval.reward: no 'x'; choose one of exact_match"),
        (["loss.kind=skew_x", "loss.alpha=1"], 3, "loss.alpha: found 1.0 for skew_x"),
        (
            ["train.max_wall_time=4h"],
            3,
            "train.max_wall_time: found '4h'; expected a time as \"[DAYS-]HH:MM:SS\"",
        ),
        (["train.num_steps=0"], 3, "train.num_steps: found 0; expected a positive number"),
        *(
            ([f"log.prometheus_port={port}"], 3, f"log.prometheus_port: found {port}; expected a p")
            for port in (-1, 65536)
        ),
        *(
            ([f"log.prometheus_host='{host}'"], 3, f"log.prometheus_host: {found}, which the whole")
            for host, found in (("0.0.0.0", "0.0.0.0"), ("::", "::"), ("", "empty"))
        ),
        (["train.global_batch_size=-8"], 3, "train.global_batch_size: found -8; expected a pos"),
        (["loss.chunk_tokens=0"], 3, "loss.chunk_tokens: found 0; expected a positive number"),
        (["rollout.top_p=0"], 3, "rollout.top_p: found 0.0; expected a value in (0, 1]"),
        (["rollout.top_p=1.5"], 3, "rollout.top_p: found 1.5; expected a value in (0, 1]"),
        (["rollout.temperature=-1"], 3, "rollout.temperature: found -1.0; expected 0 or more"),
        (["loss.beta=1.1"], 3, "loss.beta: found 1.1; expected a value in [0, 1]"),
        (["optimizer.beta2=1"], 3, "optimizer.beta2: found 1.0; expected a value in [0, 1)"),
        (["parallel.tensor=0"], 3, "parallel.tensor: found 0; expected a positive number"),
    ],
)
def test_a_broken_rule_is_named(
    conf: Path, words: list[str], world_size: int, message: str
) -> None:
    config = _valid(conf, *words)
    with pytest.raises(ConfigError) as caught:
        validate(
            config,
            world_size,
            divergences=["reverse_kl", "jsd"],
            rewards=["exact_match"],
            tools=["calculator"],
            environ={},
        )
    # A kind outside the table comes first; the rule on alpha holds for every kind of its name.
    assert message in str(caught.value)


def test_a_server_of_another_host_needs_a_key(conf: Path) -> None:
    words = ["rollout.kind=sglang", "rollout.urls=['http://10.0.0.7:30000']"]
    words += ["teacher.kind=sglang", "teacher.urls=['http://10.0.0.8:30000']"]
    keys = {"MEGAOPD_SGLANG_API_KEY": "a", "MEGAOPD_TEACHER_API_KEY": "b"}
    validate(_valid(conf, *words), 3, environ=keys)
    with pytest.raises(ConfigError, match=r"^teacher\.urls\[0\]: .*TEACHER_API_KEY is not set"):
        validate(_valid(conf, *words), 3, environ={"MEGAOPD_SGLANG_API_KEY": "a"})


def test_what_servers_need_on_this_host(conf: Path, tmp_path: Path) -> None:
    def check(*words: str, rank: str = "0") -> None:
        given = ("rollout.kind=sglang", "rollout.launch=true", *words)
        check_local(_valid(conf, *given).rollout, {"RANK": rank})

    folder, python = f"rollout.sglang.sync_dir={tmp_path}", "rollout.sglang.python=python3"
    check(folder, python)
    for words, message in (
        (["rollout.sglang.sync_dir=/no/where", python], "sync_dir: /no/where is no directory that"),
        ([folder, "rollout.sglang.python=/no/python"], "python: /no/python cannot be run; name"),
        ([folder], "python: not set, and this interpreter has no sglang; name the interpreter"),
    ):
        with pytest.raises(ConfigError, match=rf"^rollout\.sglang\.{message}"):
            check(*words)
        # Rank 0 alone starts servers and writes for them.
        check(*words, rank="1")
    check("rollout.sglang.sync=tensor", "rollout.sglang.sync_dir=/no/where", python)


@pytest.mark.parametrize(
    ("field", "table"),
    [
        ((RolloutConfig, "kind"), ENGINES),
        ((SGLangConfig, "sync"), TRANSPORTS),
        ((TeacherConfig, "kind"), TEACHERS),
    ],
)
def test_what_may_be_chosen_is_what_there_is(field: tuple[type, str], table: dict) -> None:
    cls, name = field
    assert get_args(get_type_hints(cls)[name]) == tuple(table)


@pytest.mark.parametrize(
    ("words", "student", "teacher", "message"),
    [
        (
            ["parallel.tensor=2"],
            Arch(),
            Arch(num_heads=8, num_kv_heads=8),
            "parallel.tensor: 2 does not divide the student's 9 attention heads (9 = 4 x 2 + 1); "
            "choose one of 1, 3, 9",
        ),
        (
            ["parallel.tensor=9"],
            Arch(),
            Arch(),
            "parallel.tensor: 9 does not divide the student's 3 KV heads (3 = 0 x 9 + 3)",
        ),
        (
            [],
            Arch(),
            Arch(num_heads=32, num_kv_heads=8),
            "parallel.tensor: 3 does not divide the teacher's 32 attention heads",
        ),
        (
            ["parallel.pipeline=5"],
            Arch(),
            Arch(),
            "parallel.pipeline: pipeline 5 x virtual_pipeline 1 = 5 stages do not divide the "
            "student's 12 layers (12 = 2 x 5 + 2); choose one of 1, 2, 3, 4, 6, 12 stages",
        ),
        (
            ["parallel.pipeline=4", "parallel.virtual_pipeline=4"],
            Arch(),
            Arch(num_layers=16),
            "parallel.pipeline: pipeline 4 x virtual_pipeline 4 = 16 stages are more than the "
            "student's 12 layers",
        ),
        (
            ["parallel.pipeline=2", "parallel.layers_per_stage=[5,6]"],
            Arch(),
            Arch(),
            "parallel.layers_per_stage: 5 + 6 = 11, and the student has 12 layers",
        ),
        (
            ["parallel.pipeline=2", "parallel.layers_per_stage=[5,7]"],
            Arch(),
            Arch(num_layers=24),
            "parallel.layers_per_stage: 5 + 7 = 12, and the teacher has 24 layers; give 2 numbers "
            "that sum to 24, or give the teacher a layout of its own",
        ),
        (
            ["teacher.parallel.tensor=2"],
            Arch(),
            Arch(),
            "teacher.parallel.tensor: 2 does not divide the teacher's 9 attention heads "
            "(9 = 4 x 2 + 1); choose one of 1, 3, 9",
        ),
        (
            [],
            Arch(ffn_hidden_size=37),
            Arch(),
            "parallel.tensor: 3 does not divide the student's 37 MLP features (37 = 12 x 3 + 1)",
        ),
        (
            ["teacher.parallel.tensor=3"],
            Arch(),
            Arch(ffn_hidden_size=37, moe=Experts(layers=(1,))),
            "teacher.parallel.tensor: 3 does not divide the teacher's 37 MLP features",
        ),
        (
            ["teacher.parallel.expert=4"],
            Arch(),
            Arch(moe=Experts()),
            "teacher.parallel.expert: 4 does not divide the teacher's 6 experts (6 = 1 x 4 + 2)",
        ),
        (
            ["teacher.parallel.expert=2", "teacher.parallel.expert_tensor=3"],
            Arch(),
            Arch(moe=Experts()),
            "teacher.parallel.expert_tensor: 3 does not divide the teacher's 32 features of an "
            "expert (32 = 10 x 3 + 2)",
        ),
        (
            ["parallel.expert=2"],
            Arch(),
            Arch(moe=Experts()),
            "parallel.expert: 2, and the student is not a mixture of experts; set it to 1",
        ),
        (
            ["parallel.tensor=1", "parallel.expert=2"],
            Arch(moe=Experts()),
            Arch(),
            "parallel.expert: 2, and the teacher is not a mixture of experts; set it to 1, or give "
            "the teacher a layout of its own",
        ),
        (
            ["teacher.parallel.expert_tensor=1"],
            Arch(),
            Arch(),
            "teacher.parallel.expert_tensor: 1, and the teacher is not a mixture of experts; set "
            "it to null",
        ),
        (
            ["parallel.expert_tensor=1"],
            Arch(moe=Experts()),
            Arch(moe=Experts()),
            "parallel.sequence_parallel: false with parallel.tensor 3: Megatron trains a mixture",
        ),
        (
            ["student.router_aux_loss_coef=0.1"],
            Arch(),
            Arch(),
            "student.router_aux_loss_coef: 0.1, and the student is not a mixture of experts",
        ),
        (
            ["data.max_prompt_tokens=1500", "rollout.max_new_tokens=549"],
            Arch(),
            Arch(),
            "data.max_prompt_tokens + rollout.max_new_tokens: 1500 + 549 = 2049 tokens, longer "
            "than the student's context of 2048",
        ),
        ([], Arch(), Arch(max_positions=2047), "longer than the teacher's context of 2047"),
    ],
)
def test_a_model_that_does_not_fit_is_named(
    conf: Path, words: list[str], student: Arch, teacher: Arch, message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        validate_models(_valid(conf, *words), student, teacher)
    assert message in str(caught.value)


def test_every_teacher_is_checked_against_its_own_model(conf: Path) -> None:
    words = ["teachers.math.path=x", "teachers.math.parallel.pipeline=2", "teachers.code.path=y"]
    config = _valid(conf, *words)
    archs = {"math": Arch(), "code": Arch()}
    validate_models(config, Arch(), Arch(), archs)
    with pytest.raises(
        ConfigError, match=r"^teachers\.math\.parallel\.pipeline: .* teacher math's"
    ):
        validate_models(config, Arch(), Arch(), archs | {"math": Arch(num_layers=13)})
    with pytest.raises(ConfigError, match=r"^parallel\.tensor: .*teacher code's 8 KV heads"):
        validate_models(config, Arch(), Arch(), archs | {"code": Arch(num_kv_heads=8)})
    with pytest.raises(ConfigError, match="the teacher code's context of 2047"):
        validate_models(config, Arch(), Arch(), archs | {"code": Arch(max_positions=2047)})
