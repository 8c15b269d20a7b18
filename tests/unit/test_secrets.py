"""Keys and passwords never reach a configuration's copies, nor what a process says."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megaopd.config import Config, StudentConfig, TeacherConfig, to_yaml, validate
from megaopd.config_schema import build
from megaopd.errors import ConfigError
from megaopd.redaction import redact, secrets_of

ROOT = Path(__file__).resolve().parents[2]
SECRET = "c4nary-S3CRET/+="
ENVIRON = {
    "WANDB_API_KEY": SECRET,
    "HF_TOKEN": "hf_" + SECRET,
    "HOME": "/home/someone",
    "USE_KEY": "true",  # a word, not a key
    "TOKENIZERS_PARALLELISM": "falsefalse",
}


def _config(**sections: dict) -> Config:
    base = {
        "student": {"path": "s"},
        "teacher": {"path": "t"},
        "data": {"train": "x.jsonl"},
        "run": {"name": "x", "dir": "runs/x"},
    }
    for name, values in sections.items():
        base[name] = {**base.get(name, {}), **values}
    return build(Config, base)


LEAKS = {
    "run.name": {"run": {"name": f"x-{SECRET}"}},
    "run.dir": {"run": {"dir": f"/tmp/{SECRET}/x"}},
    "data.train": {"data": {"train": "https://me:pw@host/train.jsonl"}},
    "student.path": {"student": {"path": "https://pw@host/model"}},
    "log.wandb_project": {"log": {"wandb_project": SECRET}},
    "rollout.stop[1]": {"rollout": {"stop": ["x", SECRET]}},
    "rollout.sglang.args[0]": {"rollout": {"sglang": {"args": [f"--served-model-name={SECRET}"]}}},
    "rollout.sglang.api_key_env": {"rollout": {"sglang": {"api_key_env": "sk-live-123"}}},
    "rollout.sglang.admin_key_env": {"rollout": {"sglang": {"admin_key_env": "hf_AbCdEf"}}},
    "teacher.api_key_env": {"teacher": {"api_key_env": SECRET}},
    "teachers.math.api_key_env": {"teachers": {"math": {"path": "t", "api_key_env": "s3cret"}}},
    "teachers (name 1)": {"teachers": {SECRET: {"path": "t"}}},
    "teachers.math.urls[0]": {"teachers": {"math": {"urls": ["http://me:a/b@host:1"]}}},
}


@pytest.mark.parametrize("key", LEAKS)
def test_a_value_that_holds_a_secret_is_refused_and_not_repeated(key):
    config = _config(**LEAKS[key])
    with pytest.raises(ConfigError) as caught:
        validate(config, 1, environ=ENVIRON)
    line = str(caught.value)
    assert line.startswith(f"{key}: ")
    for secret in (SECRET, "me:a", "pw@", "sk-live-123", "hf_AbCdEf", "s3cret"):
        assert secret not in line


def test_a_key_under_any_variable_that_the_configuration_names():
    sglang = {"sglang": {"api_key_env": "MY_SERVERS", "args": ["--x=under-another-name"]}}
    environ = {"MY_SERVERS": "under-another-name"}
    with pytest.raises(ConfigError, match=r"args\[0\]: it holds the value of \$MY_SERVERS"):
        validate(_config(rollout=sglang), 1, environ=environ)


def test_values_without_secrets_pass_and_are_all_that_is_written():
    config = _config(data={"train": "/home/someone/true/falsefalse/a@b.jsonl"})
    validate(config, 1, environ=ENVIRON)
    text = to_yaml(config)
    assert "a@b.jsonl" in text
    assert SECRET not in text


@pytest.mark.parametrize(
    "words",
    [
        ["--api-key", "sk-123"],
        ["--api-key=sk-123"],
        ["--api-key sk-123"],
        ["--api-k=sk-123"],
        ["--admin-api=sk-123"],
        ["--x", "--ssl-keyfile-password=sk-123"],
        ["--ssl-keyfile-p=sk-123"],
    ],
)
def test_arguments_of_servers_take_no_key(words):
    rollout = {"kind": "sglang", "launch": True, "sglang": {"args": words}}
    with pytest.raises(ConfigError) as caught:
        validate(_config(rollout=rollout), 1, environ={})
    assert "rollout.sglang.args[" in str(caught.value)
    assert "sk-123" not in str(caught.value)


def test_arguments_of_servers_that_only_look_alike():
    words = ["--max-total-tokens", "1", "--tokenizer-mode=auto", "--ssl-keyfile", "key.pem", "-x"]
    rollout = {"kind": "sglang", "launch": True, "sglang": {"args": words}}
    validate(_config(rollout=rollout), 1, environ={})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"bad key {SECRET!r}.", "bad key '***'."),
        (f"hf_{SECRET}x", "***x"),
        ("no answer from http://me:pw@host:1/x", "no answer from http://***@host:1/x"),
        ("at ftp://a:b@c@host, file://x", "at ftp://***@host, file://x"),
        ("input +rollout.api_key=sk-1 here", "input +rollout.api_key=*** here"),
        ("args=[--api-key,sk-1]", "args=[--api-key,***]"),
        ("['--admin-api-key', 'sk-1']", "['--admin-api-key', '***']"),
        ('{"password": "sk-1"}', '{"password": "***"}'),
        # Nothing is taken from what holds none.
        *[(text, text) for text in (
            "rollout.sglang.args[0]: --api-key, which the run sets by itself; put the key into it",
            "start the server with --api-key and put the key into that variable",
            "a user name or password; take it out",
            "loss.kind=jsd at http://host:1/x, mail a@b",
            "true falsefalse",
        )],
    ],
)  # fmt: skip
def test_what_is_said_holds_no_secret(text, said):
    assert redact(text, ENVIRON) == said


def test_variables_that_hold_secrets_are_known_by_their_names():
    names = ["WANDB_API_KEY", "AWS_SECRET_ACCESS_KEY", "GITHUB_TOKEN", "apikey", "DB_PASSWORD"]
    others = ["KEYBOARD", "TOKENIZERS_PARALLELISM", "PATH", "SSH_AUTH_SOCK", "MONKEY"]
    environ = dict.fromkeys([*names, *others], "12345678")
    assert list(secrets_of(environ)) == names
    assert list(secrets_of(environ, ("MONKEY",))) == [*names, "MONKEY"]


SCRIPT = """
import asyncio, logging, os, sys, threading
from megaopd.errors import RolloutError, run_cli
from megaopd.logger import get_logger, setup_logging

SECRET = os.environ["SERVICE_TOKEN"]

def main(argv):
    setup_logging(0)
    get_logger("x").warning("a server said %s", SECRET)
    logging.getLogger("another.library").error("a library said " + SECRET)
    logging.getLogger("another.library").error("%d of %d", SECRET)
    try:
        raise ValueError(SECRET)
    except ValueError:
        get_logger("x").exception("an exception of %s", SECRET)
    thread = threading.Thread(target=int, args=[SECRET])
    thread.start()
    thread.join()
    if argv == ["bug"]:
        raise KeyError(SECRET)
    raise RolloutError("a server", f"it answered {SECRET}", "see http://me:pw@host")

run_cli(main, sys.argv[1:])
"""


@pytest.mark.parametrize("argv", [["error"], ["error", "--debug"], ["bug"]], ids=" ".join)
def test_lines_logs_and_tracebacks_of_a_process(argv):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *argv],
        capture_output=True,
        text=True,
        timeout=60,
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "SERVICE_TOKEN": SECRET},
    )
    said = done.stdout + done.stderr
    assert SECRET not in said
    assert "me:pw" not in said
    assert "a server said ***" in said
    assert "a library said ***" in said
    assert "%d of %d % ('***',)" in said
    assert "an exception of ***\nTraceback" in said
    assert "\nValueError: ***\n" in said
    assert "invalid literal for int() with base 10: '***'" in said  # of the thread
    last = said.splitlines()[-1]
    if argv == ["bug"]:
        assert last == "KeyError: '***'"
    else:
        # --debug shows the traceback, whose last line is the same.
        assert last.endswith("a server: it answered ***; see http://***@host")
        assert done.returncode == (1 if "--debug" in argv else 7)


def test_wandb_is_told_a_configuration_without_secrets(monkeypatch, tmp_path):
    """What it is given is the configuration as it was checked, nothing of the environment."""
    from types import ModuleType, SimpleNamespace

    from megaopd import metrics

    told = {}
    wandb = ModuleType("wandb")
    wandb.init = lambda **given: (told.update(given), SimpleNamespace(finish=lambda: None))[1]
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.setattr(metrics.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    config = _config(log={"wandb_project": "mine", "tensorboard": False})
    config = replace(config, student=StudentConfig("s"), teacher=TeacherConfig(path="t"))
    validate(config, 1)
    metrics.MetricsWriter(tmp_path, config).close()
    assert told["config"]["log"]["wandb_project"] == "mine"
    assert SECRET not in repr(told)
