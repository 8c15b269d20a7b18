"""The status screen: what it says of runs in every state, of half of a run, and of hostile ones."""

from __future__ import annotations

import functools
import json
import os
import pty
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from megaopd.config import CheckpointConfig, Config, ParallelConfig, RunConfig, TrainConfig, to_yaml
from megaopd.errors import ConfigError, DataError
from megaopd.metrics_file import json_line
from megaopd.run_status import RunStatus
from megaopd.status import __main__ as cli
from megaopd.status import files
from megaopd.status.files import clean, read_rows, read_settings
from megaopd.status.screen import screen, sparkline
from megaopd.status.snapshot import take_snapshot

NOW = 1_800_000_000.0
ROOT = Path(__file__).resolve().parents[2]
STATUS: dict[str, Any] = {
    "state": "running",
    "message": "",
    "phase": "student",
    "phase_since": NOW - 42,
    "step": 31,
    "num_steps": 200,
    "world_size": 16,
    "device": "NVIDIA H200",
    "started": NOW - 3000,
    "updated": NOW - 3,
    "resumed_from": 20,
    "pid": 4242,
    "host": "node1",
    "slurm_job_id": "77",
    "slurm_restarts": "1",
    "warnings": [{"step": 29, "at": NOW - 90, "message": "loss 3.2 is 6 times its median"}],
}


@functools.cache
def config_yaml() -> str:
    return to_yaml(
        Config(
            run=RunConfig(name="opd"),
            parallel=ParallelConfig(tensor=2, pipeline=2, sequence_parallel=True),
            train=TrainConfig(num_steps=200),
            checkpoint=CheckpointConfig(interval=20),
        )
    )


def make_run(directory: Path, done: int = 30, **status: object) -> Path:
    """A run of 200 steps, so many of which are done; status.json as given."""
    directory.mkdir(exist_ok=True)
    (directory / "config.yaml").write_text(config_yaml())
    lines = [
        json_line(0, {"eval/teacher_accuracy": 0.9}),
        json_line(0, {"eval/accuracy": 0.25, "time/eval_s": 30.0}),
    ]
    for step in range(1, done + 1):
        metrics = {"loss/divergence": 2.0 - step / 20, "train/skipped": float(step == 7)}
        metrics |= {"time/rollout_s": 50.0, "time/teacher_s": 20.0, "time/student_s": 25.0}
        metrics |= {"time/step_s": 100.0, "perf/tokens_per_s": 12345.6, "perf/mfu": 0.412}
        metrics |= {"perf/tflops_per_gpu": 407.5, "perf/teacher_tflops": 512.0}
        metrics |= {"rollout/staleness_mean": 0.5, "rollout/mismatch_kl": 7.5e-11}
        metrics |= {"rollout/servers_up": 2.0, "rollout/servers_lost": float(step == 9)}
        lines.append(json_line(step, metrics))
        if step % 10 == 0:
            lines.append(json_line(step, {"eval/accuracy": 0.25 + step / 100, "time/eval_s": 20.0}))
    (directory / "metrics.jsonl").write_text("".join(lines))
    for step in (0, 20):
        iteration = directory / "checkpoints" / f"iter_{step:07d}"
        iteration.mkdir(parents=True, exist_ok=True)
        (iteration / "__0_0.distcp").write_bytes(bytes(3 << 20))
        (iteration / "SHA256SUMS").write_text("")
        os.utime(iteration / "SHA256SUMS", (NOW - 190, NOW - 190))
    (directory / "checkpoints" / "iter_0000040").mkdir(exist_ok=True)  # not complete
    (directory / "status.json").write_text(json.dumps(STATUS | status))
    return directory


def lines_of(run_dir: Path, **options: Any) -> list[str]:
    return screen(take_snapshot(run_dir, now=NOW, **options), width=120)


def test_the_screen_of_a_run_that_runs(tmp_path: Path) -> None:
    found = lines_of(make_run(tmp_path / "run"))
    wanted = [
        "opd: running, for 50m00s, node1, process 4242, Slurm job 77 (start 2), resumed from step "
        "20",
        "step 30/200   ████░░░░░░░░░░░░░░░░░░░░░░░░░░░░ 15 %   ETA 4h49m   102.00 s/step",
        "",
        "phase       student of step 31, for 42s",
        "last step   rollout 50s 50 %   teacher 20s 20 %   student 25s 25 %   other 5s 5 %",
        "speed       12,346 tok/s   MFU 41.2 %   student 408 TFLOP/s a rank   teacher 512",
        "loss        divergence 0.5   ███▇▇▇▇▆▆▆▆▅▅▅▅▄▄▄▄▃▃▃▃▂▂▂▂▁▁▁   falling -47 % in 15 steps",
        "accuracy    before 0.250   now 0.550 (step 30)   teacher 0.900",
        "rollout     staleness 0.5 (at most 0)   mismatch KL 7.5e-11",
        "health      1 steps skipped   2 servers up   1 lost",
        "checkpoint  step 20, 3m10s ago, 3.0 MiB, checkpoints/iter_0000020; next after step 40, in "
        "about 17m00s",
        "layout      16 ranks on NVIDIA H200; student TP2 PP2 SP; rollout embedded",
        "warnings    step 29, 1m30s ago: loss 3.2 is 6 times its median",
    ]
    assert "\n".join(found).replace("\n            ", " ") == "\n".join(wanted)


@pytest.mark.parametrize(
    ("status", "alive", "title"),
    [
        ({"state": "finished"}, True, "opd: finished, node1, process 4242"),
        (
            {"state": "failed", "message": "run.dir: full; make room"},
            True,
            "opd: FAILED: run.dir: full; make room",
        ),
        (
            {"state": "stopped", "message": "step 30: SIGUSR1; start it again"},
            True,
            "opd: stopped, asks to be started again: step 30: SIGUSR1",
        ),
        ({"updated": NOW - 600}, True, "opd: SILENT: no sign of life for 10 min"),
        ({"updated": NOW - 600}, False, "opd: SILENT: no sign of life for 10 min"),  # not of here
        (
            {"updated": NOW - 600, "host": socket.gethostname()},
            False,
            "opd: GONE: process 4242 ended without a word, 10 min ago",
        ),
        ({"updated": NOW - 600, "host": socket.gethostname()}, True, "opd: SILENT: no sign"),
    ],
)
def test_the_states_of_a_run(
    tmp_path: Path, status: dict[str, object], alive: bool, title: str
) -> None:
    run_dir = make_run(tmp_path / "run", **status)
    found = lines_of(run_dir, is_alive=lambda pid: alive)
    assert found[0].startswith(title)
    if status.get("state"):
        assert not any(line.startswith("phase") for line in found)
        assert "ETA" not in found[1]


def test_half_of_a_run_is_shown_as_far_as_it_is_there(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run")
    (run_dir / "status.json").unlink()
    os.utime(run_dir / "metrics.jsonl", (NOW - 600, NOW - 600))
    assert lines_of(run_dir)[0] == "opd: unknown: no status.json; last metrics 10 min ago"
    (run_dir / "summary.json").write_text('{"teacher_accuracy": 0.9}')
    os.utime(run_dir / "summary.json", (NOW, NOW))
    assert lines_of(run_dir)[0] == "opd: finished"
    for name in ("summary.json", "metrics.jsonl"):
        (run_dir / name).unlink()
    assert lines_of(run_dir)[:2] == [
        "opd: not started: no metrics yet",
        "step 0/200   ░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░░ 0 %",
    ]
    (run_dir / "config.yaml").unlink()
    (run_dir / "metrics.jsonl").write_text(json_line(1, {"loss/likelihood": 1.0}))
    assert lines_of(run_dir)[1:] == [
        "step 1",
        "",
        "loss        likelihood 1   ▁",
        *lines_of(run_dir)[4:],
    ]


def test_the_summary_of_an_earlier_run_is_not_this_one(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run", done=0)
    (run_dir / "metrics.jsonl").write_text("")
    (run_dir / "summary.json").write_text('{"teacher_accuracy": 0.5}')
    os.utime(run_dir / "summary.json", (NOW - 9000, NOW - 9000))
    assert take_snapshot(run_dir, NOW)["accuracy"]["teacher"] is None
    os.utime(run_dir / "summary.json", (NOW, NOW))
    assert take_snapshot(run_dir, NOW)["accuracy"]["teacher"] == 0.5


def test_a_half_written_line_and_lines_that_are_none(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run", done=3)
    with (run_dir / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 4, "loss/divergence": 1')
    rows, num_bad = read_rows(run_dir)
    assert (rows[-1]["step"], num_bad) == (3, 0)
    with (run_dir / "metrics.jsonl").open("ab") as file:
        file.write(b'\n[1]\n{"step": 1e999}\n{"step": 5, "x": {}}\n' + b"[" * 100_000 + b"\n")
    assert read_rows(run_dir)[1] == 5
    assert "note        5 lines of metrics.jsonl are no metrics" in lines_of(run_dir)


def test_of_a_long_run_head_and_end_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "HEAD_BYTES", 2000)
    monkeypatch.setattr(files, "TAIL_BYTES", 8000)
    run_dir = make_run(tmp_path / "run", done=200)
    rows, num_bad = read_rows(run_dir)
    steps = [row["step"] for row in rows]
    assert num_bad == 0
    assert steps == sorted(steps)
    assert (steps[0], steps[-1]) == (0, 200)
    assert len(steps) < 40
    found = take_snapshot(run_dir, NOW)["accuracy"]
    assert (found["before"], found["now"], found["teacher"]) == (0.25, 2.25, 0.9)
    # A line without an end is no reason to read more.
    (run_dir / "metrics.jsonl").write_bytes(b'{"step": 1, "' + b"x" * 50_000)
    assert read_rows(run_dir) == ([], 0)


ESCAPE = "\x1b]0;title\x07\x1b[2J\x1b[31m\u202e\u009b31m\x00\r\nred"


def test_a_hostile_directory_ends_as_plain_text(tmp_path: Path) -> None:
    run_dir = make_run(
        tmp_path / "run",
        state="failed",
        message=ESCAPE * 300,
        host=ESCAPE,
        device={"a": 1},
        pid=10**400,
        step=float("inf"),
        started=[],
        num_steps="many",
        warnings=[1, {"message": ESCAPE, "step": "x", "at": 1e300}, {"message": 7}] * 9,
    )
    text = (run_dir / "config.yaml").read_text().replace('"opd"', json.dumps(ESCAPE))
    (run_dir / "config.yaml").write_text(text + "\nlog: !!python/object/apply:os.system [id]\n")
    (run_dir / "metrics.jsonl").write_text(
        json_line(1, {f"time/{ESCAPE}_s": 1.0, f"memory/{ESCAPE}_peak_gib": 1e300})
        + json_line(2, {"loss/divergence": float("nan"), "time/step_s": float("inf")})
    )
    (run_dir / "checkpoints" / f"iter_{'9' * 12}").mkdir()
    (run_dir / "checkpoints" / f"iter_{'9' * 12}" / "SHA256SUMS").symlink_to("/dev/zero")
    found = lines_of(run_dir)
    text = "\n".join(found)
    assert all(c.isprintable() for c in text.replace("\n", ""))
    assert max(len(line) for line in found) <= 120
    assert found[0].startswith("]0;title[2J[31m31m  red: FAILED: ]0;title")
    assert "loss        divergence not finite" in found
    json.dumps(take_snapshot(run_dir, NOW), allow_nan=False)
    assert clean("a" * 5000, 10) == "aaaaaaa..."


@pytest.mark.parametrize("name", ["metrics.jsonl", "status.json", "config.yaml"])
def test_what_is_no_file_is_not_waited_for(tmp_path: Path, name: str) -> None:
    run_dir = make_run(tmp_path / "run")
    (run_dir / name).unlink()
    os.mkfifo(run_dir / name)
    with pytest.raises(DataError, match=rf"{name}: not a regular file; look at"):
        cli.main([str(run_dir), "--once"])
    (run_dir / name).unlink()
    (run_dir / name).symlink_to("/dev/zero")
    with pytest.raises(DataError, match="not a regular file"):
        cli.main([str(run_dir), "--json"])


@pytest.mark.parametrize(
    "damage", [b"", b"{", b"[]", b"\xff\xfe", b'{"state": 1e999}', b"[" * 99999]
)
def test_a_damaged_status_is_no_status(tmp_path: Path, damage: bytes) -> None:
    run_dir = make_run(tmp_path / "run")
    (run_dir / "status.json").write_bytes(damage)
    assert lines_of(run_dir)[0].startswith("opd: unknown: no status.json")


def test_the_settings_are_those_of_the_configuration(tmp_path: Path) -> None:
    settings = read_settings(make_run(tmp_path / "run"))
    assert settings["run.name"] == "opd"
    assert settings["parallel.tensor"] == 2
    assert settings["checkpoint.interval"] == 20
    assert settings["teacher.parallel"] is None
    assert settings["data.train"] == ""
    assert settings["guard.loss_spike"] == 5.0


@pytest.mark.parametrize(
    ("argv", "kind", "line"),
    [
        (["--once"], ConfigError, "RUN: no run; name the directory of one run"),
        (["a", "b"], ConfigError, "RUN: 2 runs; name"),
        (["a", "--twice"], ConfigError, "--twice: not an option; see --help"),
        (["a", "--interval", "0"], ConfigError, "--interval: '0'; give seconds from 0.1 on"),
        (["a", "--interval=nan"], ConfigError, "--interval: 'nan'"),
        (["a", "--interval"], ConfigError, "--interval: ''"),
        (["none\x1b[2J"], DataError, "none[2J: no such directory; name the run.dir of a run"),
        (["\x00"], DataError, ": no such directory"),
        (["."], DataError, ".: not a run's directory: no config.yaml, metrics.jsonl or status"),
    ],
)
def test_words_that_make_no_sense(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    argv: list[str],
    kind: type[Exception],
    line: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "a")
    with pytest.raises(kind) as raised:
        cli.main(argv)
    assert str(raised.value).startswith(line)


def test_a_run_is_found_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "runs").mkdir()
    make_run(tmp_path / "runs" / "opd")
    monkeypatch.chdir(tmp_path)
    cli.main(["opd", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert (found["name"], found["step"], found["num_steps"]) == ("opd", 30, 200)
    assert found["checkpoint"]["step"] == 20
    cli.main(["--help"])
    assert capsys.readouterr().out.startswith("usage: python -m megaopd.status RUN")


def test_curves() -> None:
    assert sparkline([]) == ""
    assert sparkline([1.0, 1.0]) == "▁▁"
    assert sparkline(list(range(8))) == "▁▂▃▄▅▆▇█"
    assert len(sparkline(list(range(1000)))) == len(sparkline(list(range(33)))) == 32
    assert sparkline([0.0, 1.0], unicode=False) == "_#"


def test_the_command_prints_once_and_starts_at_once(tmp_path: Path) -> None:
    """It took 0.15 s of one core."""
    run_dir = make_run(tmp_path / "run")
    with RunStatus(run_dir, 200, 1) as status:
        status.state("running")
        before = os.times()
        done = subprocess.run(
            [sys.executable, "-m", "megaopd.status", str(run_dir)],
            capture_output=True,
            cwd=ROOT,
            env={**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"},
            timeout=60,
        )
        after = os.times()
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.startswith(b"opd: running, for ")
    assert b"step 30/200   ####----" in done.stdout
    assert after.children_user + after.children_system - before.children_user < 0.5 + (
        before.children_system
    )


def test_it_refreshes_in_place_on_a_terminal(tmp_path: Path) -> None:
    run_dir = make_run(tmp_path / "run")
    main_end, terminal = pty.openpty()
    with RunStatus(run_dir, 200, 1) as status:
        status.phase("student", 31)
        process = subprocess.Popen(
            [sys.executable, "-m", "megaopd.status", str(run_dir), "--interval", "0.1"],
            stdout=terminal,
            stderr=terminal,
            cwd=ROOT,
        )
        try:
            os.close(terminal)
            seen, until = "", time.monotonic() + 30
            while seen.count("\x1b[H") < 3:
                assert time.monotonic() < until
                seen += os.read(main_end, 65536).decode()
            status.state("finished")
            try:
                while more := os.read(main_end, 65536):
                    seen += more.decode()
            except OSError:  # its end of the terminal is closed
                pass
            assert process.wait(timeout=30) == 0
        finally:
            process.kill()
            process.wait()
            os.close(main_end)
    assert seen.startswith("\x1b[2J\x1b[Hopd: running")
    assert "opd: finished" in seen.split("\x1b[H")[-1]
