"""Reading, checking, printing and documenting a configuration."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import get_type_hints

import pytest

from megaopd import config_compose
from megaopd.config import Config, load, main, to_yaml, validate, validate_models
from megaopd.config_schema import field_docs, paths
from megaopd.errors import ConfigError

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
    assert dataclasses.astuple(config.parallel) == (2, 2, 1, True)


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
        (["word"], "word: neither conf=NAME nor key=value; write overrides as key=value"),
        (["loss.kind=a,b"], "conf=tiny: Ambiguous value"),
        (["run.name=a(=b"], "conf=tiny: no viable alternative at input"),
        (["parallel=tp9"], "Available options in 'parallel': tp2 tp3"),
        (["run.name=${loss.nothing}"], "Interpolation key 'loss.nothing' not found"),
        (["hydra.run.dir=x"], "hydra.run.dir: a setting of Hydra itself"),
        (["~hydra"], "hydra: a setting of Hydra itself"),
        (["+loss._target_=os.system"], "_target_: a key that Hydra would act upon"),
        (["run.name=${oc.env:HOME}"], "the interpolation '${oc.env:HOME}'; only plain references"),
        (["student.freeze=['${now:%Y}']"], "the interpolation '${now:%Y}'"),
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
    with pytest.raises(ConfigError, match=r"parallel\.tensor: the interpolation|parallel: tensor"):
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
    main(words)
    text = capsys.readouterr().out
    assert "  # Samples per prompt.\n  n: 1\n" in text
    assert "  seed: 5    # default: 1234\n" in text
    for section in get_type_hints(Config).values():
        for doc in field_docs(section).values():
            assert f"  # {doc}\n" in text
    copy = tmp_path / "copy.yaml"
    copy.write_text(text)
    assert load([f"conf={copy}"]) == load(words)
    assert text == to_yaml(load(words))


@pytest.mark.parametrize("key", list(paths(Config)))
def test_every_field_has_a_doc_that_is_a_sentence(key: str) -> None:
    section, name = key.split(".")
    doc = field_docs(get_type_hints(Config)[section])[name]
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
class Arch:
    num_layers: int = 12
    num_heads: int = 9
    num_kv_heads: int = 3
    vocab_size: int = 100
    max_positions: int = 2048


def _valid(conf: Path, *words: str) -> Config:
    return load(["conf=tiny", *words])


def test_a_sound_configuration_passes(conf: Path) -> None:
    validate(_valid(conf), 3, Arch(), Arch(), divergences={"reverse_kl"}, rewards={"exact_match"})
    validate(_valid(conf), 12)  # 4 data-parallel ranks, 8 samples


@pytest.mark.parametrize(
    ("words", "world_size", "message"),
    [
        (
            ["parallel.pipeline=2"],
            8,
            "parallel: tensor 3 x pipeline 2 x context 1 = 6 does not divide the world size 8",
        ),
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
        (
            ["parallel.context=2"],
            6,
            "parallel.context: 2, and context parallelism is not supported",
        ),
        (["rollout.kind=recorded"], 3, "rollout.path: not set, and rollout.kind is recorded"),
        (["rollout.path=a", "rollout.record=a"], 3, "rollout.record: the recording that is"),
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
        (["train.num_steps=0"], 3, "train.num_steps: found 0; expected a positive number"),
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
        validate(config, world_size, divergences=["reverse_kl", "jsd"], rewards=["exact_match"])
    # A kind outside the table comes first; the rule on alpha holds for every kind of its name.
    assert message in str(caught.value)


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
            "parallel.pipeline: 5 does not divide the student's 12 layers (12 = 2 x 5 + 2)",
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
