"""Which run tools/check_export.py looks at; that it compares rightly is shown by
tests/e2e/test_run.py."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from megaopd.errors import CheckpointError
from tools.check_export import main, run_directory

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("words", "directory"),
    [
        (["runs/demo"], "runs/demo"),
        (["odd=name/out"], "odd=name/out"),
        (["conf=demo_cpu"], "runs/demo"),
        (["conf=demo_cpu", "run.name=second"], "runs/second"),
        (["conf=demo_cpu", "data=demo_sequence", "run.dir=elsewhere/out"], "elsewhere/out"),
    ],
)
def test_run_directory(words, directory, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert run_directory(words) == Path(directory)


def test_no_run_and_no_export(tmp_path):
    with pytest.raises(CheckpointError, match=r"summary.json: not there; give the directory"):
        main([str(tmp_path)])
    (tmp_path / "summary.json").write_text(json.dumps({"hf_export": None}))
    (tmp_path / "eval_after.jsonl").write_text("")
    with pytest.raises(CheckpointError, match=r"exported nothing; run it with train.export=true"):
        main([str(tmp_path)])
    summary = {"hf_export": "hf", "eval_temperature": 0.6}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(
        CheckpointError, match=r"sample at temperature 0.6, .*; run it with eval\.t"
    ):
        main([str(tmp_path)])


@pytest.mark.skipif(shutil.which("make") is None, reason="no make")
def test_make_demo_trains_and_checks_the_same_run():
    command = ["make", "-n", "demo", "TASK=sequence", "ARGS=run.dir=elsewhere run.seed=2"]
    # A make that runs the tests must not make this one say which directory it is in.
    env = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    lines = subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, check=True
    ).stdout
    train, check = lines.splitlines()[-2:]
    words = "conf=demo_cpu data=demo_sequence run.dir=elsewhere run.seed=2"
    assert train.endswith(f"-m megaopd.train {words}")
    assert check.endswith(f"tools/check_export.py {words}")
