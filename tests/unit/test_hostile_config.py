"""A configuration from somebody else: it is values or one line, and no code runs.

Each attack that would execute something leaves a file behind if it does.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from megaopd import config_compose, config_files
from megaopd.config import load
from megaopd.errors import ConfigError

BASE = "student: {path: s}\nteacher: {path: t}\ndata: {train: x.jsonl}\n"
TOUCH = "touch EXECUTED"
ACTED_UPON = "a key that Hydra would act upon"
INTERPOLATION = "only plain references such as"
TAG = "not valid YAML (the tag "
DEFAULTS = "write _self_, a name, or `group: name`"


@pytest.fixture
def conf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with conf/; returns conf/."""
    (tmp_path / "conf" / "parallel").mkdir(parents=True)
    (tmp_path / "conf" / "recipes").mkdir()
    (tmp_path / "conf" / "run.yaml").write_text(BASE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(config_compose, "REPOSITORY_CONF", tmp_path / "none")
    monkeypatch.setenv("CANARY", "canary-value")
    return tmp_path / "conf"


def refusal(words: list[str]) -> str:
    """The line that says why it is refused; within a second, and with nothing executed."""
    started = time.process_time()
    with pytest.raises(ConfigError) as caught:
        load(words)
    assert time.process_time() - started < 5  # a second, but for a busy machine
    line = str(caught.value)
    assert "\n" not in line
    assert "canary-value" not in line
    assert caught.value.exit_status == 2
    assert not Path("EXECUTED").exists()
    return line


def _laughs(head: str = "x") -> str:
    """Ten lists, each of nine of the one before: 3.5e9 values."""
    lines = [f"l0: &l0 [{', '.join([head] * 9)}]"]
    lines += [f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 9)}]" for i in range(1, 10)]
    return "\n".join(lines) + "\n"


def _merges() -> str:
    lines = ["m0: &m0 {a: 1}"]
    lines += [f"m{i}: &m{i} {{<<: [{', '.join([f'*m{i - 1}'] * 9)}]}}" for i in range(1, 12)]
    return "\n".join(lines) + "\n"


def _doubling() -> str:
    lines = [f"k{i}: '${{k{i + 1}}}${{k{i + 1}}}'" for i in range(40)]
    return "\n".join([*lines, "k40: x", "run: {name: '${k0}'}"]) + "\n"


# What a file holds -> what the line must say. Each is tried in the file itself, in one that its
# defaults list names, in one that that one names, and in a recipe that the command line adds.
VALUES = {
    **{
        f"loss: {{{key}: os.system, command: '{TOUCH}'}}": ACTED_UPON
        for key in ("_target_", "_partial_", "_args_", "_convert_", "_recursive_", "_Target_")
    },
    f"_target_: os.system\ncommand: '{TOUCH}'": ACTED_UPON,
    f"rollout: {{stop: [[{{_target_: os.system, command: '{TOUCH}'}}]]}}": ACTED_UPON,
    "hydra: {searchpath: ['pkg://os']}": ACTED_UPON,
    "hydra/launcher: basic": ACTED_UPON,
    "loss: {hydra: 1}": ACTED_UPON,
    "loss: {\uff3ftarget\uff3f: os.system}": "no name of a key",
    "loss: {'ki\u200bnd': jsd}": "no name of a key",
    "loss: {'${oc.env:CANARY}': 1}": "no name of a key",
    "'': 1": "no name of a key",
    "~: 1": "no name of a key",
    "parallel@hydra.launcher: 1": ACTED_UPON,
    **{
        f"data: {{name: '{text}'}}": INTERPOLATION
        for text in (
            "${oc.env:CANARY}",
            "${oc.env:CANARY,x}",
            "${ oc.env:CANARY }",
            "${oc.env:${run.name}}",
            "${${oc.env:CANARY}}",
            "${oc${run.name}.env:CANARY}",
            "${oc.decode:x}",
            "${oc.create:{a: 1}}",
            "${oc.select:run.seed}",
            "${oc.dict.values:run}",
            "${oc.deprecated:run.seed}",
            "${hydra:runtime.cwd}",
            "${eval:1+1}",
            "${now:%Y}",
            "${.train}",
            "${..run.name}",
            "${run[name]}",
            r"\${oc.env:CANARY}",
            r"\\${oc.env:CANARY}",
            "$${oc.env:CANARY}",
            "${run.name}${oc.env:CANARY}",
            "${",
            "${}",
        )
    },
    "rollout: {stop: ['${oc.env:CANARY}']}": INTERPOLATION,
    f"loss: !!python/object/apply:os.system ['{TOUCH}']": TAG,
    f"loss: !!python/object/new:os.system ['{TOUCH}']": TAG,
    "loss: !!python/name:os.system": TAG,
    "loss: !!python/module:os": TAG,
    "loss: !!python/tuple [a]": TAG,
    "run: {name: !!python/object/apply:pathlib.Path [a]}": TAG,
    "run: {name: !!binary aGk=}": TAG,
    "run: {name: !mine x}": TAG,
    "student: {freeze: !!set {a}}": TAG,
    _laughs(): "aliases stand for more than",
    _laughs("{a: 1}"): "aliases stand for more than",
    _merges(): "aliases stand for more than",
    "a: &a [*a]": "an anchor that holds itself",
    "a: &a {b: *a}": "an anchor that holds itself",
    "a: " + "[" * 20000 + "]" * 20000: "brackets more than 50 deep",
    "a: " + "{a: " * 3000 + "}" * 3000: "brackets more than 50 deep",
    "\n".join(f"{' ' * i}a:" for i in range(600)): "nested too deeply",
    "a: [" + "1," * 100_000 + "]": "more than 5000 values",
    "#" * (1 << 18) + "#": "a configuration has 262144 at most",
    "run: {seed: " + "9" * 5000 + "}": "not valid YAML (Exceeds the limit",
    "run: {seed: 0x" + "f" * 5000 + "}": "an integer of more than 64 bits",
    "run: {seed: 9223372036854775808}": "an integer of more than 64 bits",
    "[a]: 1": "not valid YAML",
    "a: \0": "not valid YAML",
    "a: 1\n---\na: 1": "not valid YAML",
    "a: \udc80": "not valid YAML",
    "- 1": "a YAML list",
}


def _in_the_file(conf: Path, text: bytes) -> list[str]:
    (conf / "evil.yaml").write_bytes(text)
    return ["conf=evil"]


def _in_a_default(conf: Path, text: bytes) -> list[str]:
    (conf / "outer.yaml").write_text("defaults: [evil, _self_]\n")
    return [*_in_the_file(conf, text)[:0], "conf=outer"]


def _in_a_default_of_a_default(conf: Path, text: bytes) -> list[str]:
    (conf / "parallel" / "evil.yaml").write_bytes(text)
    (conf / "middle.yaml").write_text("defaults: [parallel@_global_: evil]\n")
    (conf / "outer.yaml").write_text("defaults: [middle, _self_]\n")
    return ["conf=outer"]


def _in_a_recipe(conf: Path, text: bytes) -> list[str]:
    (conf / "recipes" / "evil.yaml").write_bytes(b"# @package _global_\n" + text)
    return ["conf=run", "+recipes=evil"]


@pytest.mark.parametrize("text", VALUES, ids=lambda text: text[:40].encode("unicode_escape"))
def test_what_is_no_value_is_refused_in_every_file(conf: Path, text: str) -> None:
    data = text.encode(errors="surrogateescape")
    for place in (_in_the_file, _in_a_default, _in_a_default_of_a_default, _in_a_recipe):
        line = refusal(place(conf, data))
        assert VALUES[text] in line, place.__name__
        assert "evil.yaml" in line, place.__name__  # the file at fault is named


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ("[parallel: ../../x]", DEFAULTS),
        ("[parallel: /etc/passwd]", DEFAULTS),
        ("[../x]", DEFAULTS),
        ("[/etc/passwd]", DEFAULTS),
        ("['pkg://os']", DEFAULTS),
        ("['file:///etc/x']", DEFAULTS),
        ("[parallel: 'pkg://os']", DEFAULTS),
        ("['pkg://os': x]", DEFAULTS),
        ("[/hydra/launcher: basic]", DEFAULTS),
        ("[override hydra/launcher: basic]", DEFAULTS),
        ("[override /hydra/job_logging: none]", DEFAULTS),
        ("[hydra/launcher/basic]", DEFAULTS),
        ("[hydra: x]", DEFAULTS),
        ("[parallel@hydra.launcher: two]", "the package 'hydra.launcher'"),
        ("[parallel@a@b: two]", "the package 'a@b'"),
        ("[parallel@_target_: two]", "the package '_target_'"),
        ("[parallel: '${oc.env:CANARY}']", INTERPOLATION),
        ("['${oc.env:CANARY}']", INTERPOLATION),
        ("['${oc.env:CANARY}': x]", INTERPOLATION),
        ("[parallel: [two, '${oc.env:CANARY}']]", INTERPOLATION),
        ("[{parallel: two, loss: x}]", DEFAULTS),
        ("[{}]", DEFAULTS),
        ("[[two]]", DEFAULTS),
        ("[1]", DEFAULTS),
        ("[null]", DEFAULTS),
        ("[parallel: 1]", DEFAULTS),
        ("[parallel: {a: b}]", DEFAULTS),
        ("{parallel: two}", "a dict, not a list"),
        ("parallel", "a str, not a list"),
    ],
)
def test_a_defaults_list_holds_names_alone(conf: Path, entries: str, message: str) -> None:
    (conf / "parallel" / "two.yaml").write_text("tensor: 2\n")
    text = f"defaults: {entries}\n".encode()
    for place in (_in_the_file, _in_a_default_of_a_default):
        assert message in refusal(place(conf, text)), place.__name__


@pytest.mark.parametrize("package", ["hydra", "hydra.launcher", "_target_", "a:b", "${run.name}"])
def test_a_file_is_for_no_package_of_hydra(conf: Path, package: str) -> None:
    text = f"# @package {package}\nsearchpath: [pkg://os]\n".encode()
    assert f"the package {package!r}" in refusal(_in_the_file(conf, text))
    (conf / "parallel" / "evil.yaml").write_bytes(text)
    assert f"the package {package!r}" in refusal(["conf=run", "+parallel=evil"])


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("+a={_target_:os.system,command:x}", ACTED_UPON),
        ("+a=[{b:{_target_:os.system}}]", ACTED_UPON),
        ("loss._target_=os.system", ACTED_UPON),
        ("+a={hydra:{searchpath:[x]}}", ACTED_UPON),
        ("data.name=${oc.env:CANARY}", INTERPOLATION),
        ("data.name='${oc.env:CANARY}'", INTERPOLATION),
        (r"data.name=\${oc.env:CANARY}", INTERPOLATION),
        ("rollout.stop=[${oc.decode:x}]", INTERPOLATION),
        ("parallel=${oc.env:CANARY}", INTERPOLATION),
        ("+recipes=${oc.env:CANARY}", INTERPOLATION),
        ("+${oc.env:CANARY}=x", INTERPOLATION),
        ("hydra.searchpath=[/]", "a setting of Hydra itself"),
        ("++hydra.searchpath=[pkg://os]", "a setting of Hydra itself"),
        ("+hydra/launcher=basic", "a setting of Hydra itself"),
        ("~hydra", "a setting of Hydra itself"),
        ("+parallel@hydra.launcher=two", "a setting of Hydra itself"),
        ("+recipes=../run", "outside of the directories of configurations"),
        ("+recipes=/etc/passwd", "Could not find"),
        ("data.name=glob(*)", "Sweep parameters"),
        ("run.seed=choice(1,2)", "Sweep parameters"),
        ("run.seed=" + "9" * 5000, "Exceeds the limit"),
        ("a=" + "[" * 2000 + "]" * 2000, "nested too deeply"),
        ("--config-dir=/etc", "LexerNoViableAlt"),
        ("--multirun", "neither conf=NAME nor key=value"),
        ("=x", "neither conf=NAME nor key=value"),
        ("+=x", "neither conf=NAME nor key=value"),
        ("~", "neither conf=NAME nor key=value"),
    ],
)
def test_an_override_holds_values_alone(conf: Path, word: str, message: str) -> None:
    (conf / "parallel" / "two.yaml").write_text("tensor: 2\n")
    assert message in refusal(["conf=run", word])


def test_references_do_not_multiply(conf: Path) -> None:
    assert "expands to more than" in refusal(_in_the_file(conf, _doubling().encode()))
    sections = "teachers:\n  t0: {path: x}\n" + "".join(
        f"  t{i}: {{p: '${{teachers.t{i - 1}}}', q: '${{teachers.t{i - 1}}}'}}\n"
        for i in range(1, 40)
    )
    assert "expands to more than" in refusal(_in_the_file(conf, sections.encode()))
    cycle = b"run: {name: '${run.dir}', dir: '${run.name}'}\n"
    assert "Recursive interpolation" in refusal(_in_the_file(conf, cycle))


def test_what_a_reference_makes_is_not_read_again(conf: Path) -> None:
    (conf / "run.yaml").write_text(BASE + "run: {name: '$', dir: '${run.name}{oc.env:CANARY}'}\n")
    assert load(["conf=run"]).run.dir == "${oc.env:CANARY}"


def test_duplicate_keys_and_defaults_that_lead_to_themselves(conf: Path) -> None:
    for place in (_in_the_file, _in_a_recipe):
        assert "duplicate key run" in refusal(place(conf, b"run: {seed: 1}\nrun: {seed: 2}\n"))
    (conf / "one.yaml").write_text("defaults: [two]\n")
    (conf / "two.yaml").write_text("defaults: [one]\n")
    assert "nested too deeply" in refusal(["conf=one"])


def test_only_a_file_is_read(conf: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.yaml")
    (tmp_path / "directory.yaml").mkdir()
    (tmp_path / "zero.yaml").symlink_to("/dev/zero")
    (tmp_path / "nowhere.yaml").symlink_to("nothing")
    paths = ["fifo.yaml", "directory.yaml", "zero.yaml", "nowhere.yaml", "/dev/zero", "/", "./"]
    paths += [
        "x" * 300 + ".yaml",
        "~nobody/x.yaml",
        "pkg://os/x.yaml",
        "file:///x.yaml",
        "a\0.yaml",
    ]
    for path in paths:
        assert "conf: there is no file" in refusal([f"conf={path}"])
    # Nor by a group.
    (conf / "parallel" / "evil.yaml").symlink_to("/dev/zero")
    assert "Could not find 'parallel/evil'" in refusal(["conf=run", "+parallel=evil"])
    (tmp_path / "utf16.yaml").write_bytes(BASE.encode("utf-16"))
    assert "save it as UTF-8" in refusal(["conf=utf16.yaml"])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_that_may_not_be_read(conf: Path) -> None:
    (conf / "run.yaml").chmod(0)
    assert "cannot be read (Permission denied)" in refusal(["conf=run"])


def test_every_file_is_checked_before_hydra_reads_it(
    conf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked = []
    monkeypatch.setattr(
        config_compose,
        "check_file",
        lambda path: (checked.append(path.name), config_files.check_file(path)),
    )
    (conf / "parallel" / "two.yaml").write_text("tensor: 2\n")
    (conf / "middle.yaml").write_text("defaults: [parallel: two, _self_]\n")
    (conf / "outer.yaml").write_text(f"defaults: [middle, _self_]\n{BASE}")
    (conf / "recipes" / "soft.yaml").write_text("# @package _global_\nloss: {kind: jsd}\n")
    config = load(["conf=outer", "+recipes=soft"])
    assert (config.parallel.tensor, config.loss.kind) == (2, "jsd")
    assert {*checked} == {"outer.yaml", "middle.yaml", "two.yaml", "soft.yaml"}


def test_what_is_allowed_stays_allowed(conf: Path) -> None:
    (conf / "parallel" / "two.yaml").write_text("tensor: 2\n")
    (conf / "run.yaml").write_text(
        "defaults: [optional parallel: none, parallel@teacher.parallel: two, _self_]\n"
        "base: &base {path: t, dtype: fp32}\n".replace("base:", "teacher:")
        + "teachers: {\u6570\u5b66: *base, b-2 c: {<<: *base, dtype: bf16}, 7: *base}\n"
        "student: {path: '${teacher.path}'}\n"
        "run: {name: 2001-01-01, dir: 'runs/${run.name}/${run.seed}'}\n"
    )
    config = load(["conf=run"])
    assert config.run.dir == "runs/2001-01-01/1234"
    assert (config.student.path, config.teacher.dtype) == ("t", "fp32")
    assert {name: teacher.dtype for name, teacher in config.teachers.items()} == {
        "\u6570\u5b66": "fp32",
        "b-2 c": "bf16",
        "7": "fp32",
    }
