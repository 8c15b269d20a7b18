"""A whole run with keys in its environment: none of them is in anything that it writes or says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.processes import run_module
from tests.helpers.runs import make_run

pytestmark = pytest.mark.slow

KEYS = {
    "WANDB_API_KEY": "canary-wandb-0123456789",
    "HF_TOKEN": "hf_canary0123456789",
    "MEGAOPD_SGLANG_API_KEY": "canary-sglang-0123456789",
    "MEGAOPD_SGLANG_ADMIN_KEY": "canary-admin-0123456789",
    "MEGAOPD_TEACHER_API_KEY": "canary-teacher-0123456789",
    "AWS_SECRET_ACCESS_KEY": "canary/aws+0123456789",
}
# A reward of the user's that is careless with them: what it logs is said, without its key.
REWARD = """
import logging, os

def careless(response, answer):
    logging.getLogger("careless").warning("asked with %s", os.environ["HF_TOKEN"])
    return 1.0
"""
# The run ends with a line that says how it failed, or with a traceback.
BUG = """
import os

def bug(response, answer):
    raise KeyError(os.environ["HF_TOKEN"])
"""


def files_with(directory: Path, text: str) -> list[str]:
    return [
        str(path.relative_to(directory))
        for path in sorted(directory.rglob("*"))
        if path.is_file() and (text.encode() in path.read_bytes() or text in path.name)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("secrets")
    make_run(directory)
    (directory / "reward.py").write_text(REWARD)
    (directory / "bug.py").write_text(BUG)
    return directory


def test_nothing_that_a_run_leaves_holds_a_key(folder):
    done = run_module(
        "megaopd.train",
        [
            f"conf={folder}/run.yaml",
            "run.name=findable",
            *("train.num_steps=2", "train.export=true", "train.export_megatron=true"),
            *("checkpoint.interval=1", "checkpoint.export_hf=true", "log.tensorboard=true"),
            *("log.report_interval=1", "eval.interval=1", f"rollout.record={folder}/out/samples"),
            f"eval.reward={folder}/reward.py:careless",
        ],
        timeout_s=200,
        **KEYS,
    )
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert "asked with ***" in said
    written = {path.relative_to(folder / "out").parts[0] for path in (folder / "out").rglob("*")}
    assert written >= {"config.yaml", "metrics.jsonl", "report.html", "summary.json", "samples"}
    assert written >= {"checkpoints", "tensorboard", "hf", "hf_steps", "megatron"}
    for key in KEYS.values():
        assert key not in said
        assert files_with(folder / "out", key) == []
    # What is looked for is found where it is.
    found = files_with(folder / "out", "findable")
    assert "config.yaml" in found
    assert "checkpoints/iter_0000002/run_state.json" in found


@pytest.mark.parametrize("debug", [(), ("--debug",)], ids=["", "debug"])
def test_an_error_of_the_users_code_that_holds_a_key(folder, tmp_path, debug):
    done = run_module(
        "megaopd.train",
        [
            *(f"conf={folder}/run.yaml", f"run.dir={tmp_path}/out"),
            *(f"eval.reward={folder}/bug.py:bug", *debug),
        ],
        timeout_s=100,
        **KEYS,
    )
    said = done.stdout + done.stderr
    assert done.returncode != 0
    assert "***" in said
    assert "canary" not in said
    assert files_with(tmp_path, "canary") == []


@pytest.mark.parametrize("rank", [0, 1])
def test_a_crash_that_holds_a_key(folder, tmp_path, rank):
    """Its traceback, the stacks of all ranks and the status."""
    out = tmp_path / "out"
    fault = {"kind": "crash", "rank": rank, "step": 2, "variable": "HF_TOKEN"}
    done = run_module(
        "tests.faults.injected",
        [f"conf={folder}/run.yaml", f"run.dir={out}", "data.eval=", "eval.teacher=false"],
        num_ranks=2,
        timeout_s=100,
        FAULT=json.dumps(fault),
        **KEYS,
    )
    said = done.stdout + done.stderr
    assert done.returncode != 0
    assert "LookupError: ***" in said
    assert "canary" not in said
    assert '"state": "failed"' in (out / "status.json").read_text()
    assert files_with(out, "canary") == []


# In words of the command line, with what must be said and what must not.
MISTAKES = {
    "a key as a value": (
        "log.wandb_project=canary-wandb-0123456789",
        "the value of $WANDB_API_KEY",
    ),
    "a key as a variable": ("rollout.sglang.api_key_env=canary-x", "perhaps a key"),
    "a password in a URL": ("data.train=https://me:canary-x@host/x", "a user name or password"),
    "an argument of servers": (
        "rollout.sglang.args=[--api-key,canary-x]",
        "which the run sets by itself",
    ),
    "a key of no field": ("wandb.api_key=canary-x", "unknown key"),
    "a slip": ("log.wandb_project=[canary-wandb-0123456789", "mend the file or the override"),
    "a slip with a URL": ("data.train=[http://me:canary-x@host", "mend the file or the override"),
    "a slip with a flag": ("rollout.sglang.args=[--api-key,canary-x", "mend the file"),
}


@pytest.mark.parametrize("name", MISTAKES)
@pytest.mark.parametrize("debug", [(), ("--debug",)], ids=["", "debug"])
def test_a_mistake_with_a_key_is_said_without_it(folder, tmp_path, name, debug):
    word, says = MISTAKES[name]
    words = [word]
    if name == "an argument of servers":
        words += ["rollout.kind=sglang", "rollout.launch=true"]
    out = tmp_path / "out"
    done = run_module(
        "megaopd.train", [f"conf={folder}/run.yaml", f"run.dir={out}", *words, *debug], **KEYS
    )
    said = done.stdout + done.stderr
    assert done.returncode == (1 if debug else 2), said
    assert says in said
    assert "canary" not in said
    assert not out.exists()
