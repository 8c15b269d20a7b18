"""The batch script on a real Slurm of two virtual nodes, and what becomes of its jobs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.helpers.runs import metrics_of, run_command
from tests.helpers.slurm.cluster import NoSlurm, VirtualCluster, install, until
from tests.helpers.slurm.held import reached_file
from tools.prepare_debug import prepare

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = "slurm/opd_32b_to_8b.sbatch"
# The debug run, and less of it.
RUN = (
    *("conf=debug", "rollout.max_new_tokens=6", "eval.num_prompts=2"),
    "eval.reward=tests/helpers/slurm/held.py:reward",
)
# Threads of a rank follow from the cores that it sees; with these all runs have one.
CORES = set(sorted(os.sched_getaffinity(0))[:2])

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VirtualCluster]:
    try:
        install()
    except NoSlurm as error:
        pytest.skip(f"Slurm: {error}")
    cluster = VirtualCluster(tmp_path_factory.mktemp("slurm"), cores=CORES)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """An environment whose Python has imported everything already."""
    directory = tmp_path_factory.mktemp("quick")
    command = ["taskset", "-c", ",".join(map(str, CORES))]
    command += [sys.executable, "-m", "tests.helpers.slurm.fork_server", str(directory)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as server:
        assert server.stdout is not None
        assert server.stdin is not None
        assert server.stdout.readline() == b"ready\n"
        yield directory
        server.stdin.close()


@pytest.fixture(scope="module")
def debug() -> None:
    """The models and prompts of conf/debug.yaml, whose paths are relative to the repository."""
    prepare(ROOT / ".cache/debug")


@pytest.fixture(scope="module")
def unbroken(quick: Path, debug: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a debug run under torchrun, which nothing interrupts."""
    run_dir = tmp_path_factory.mktemp("unbroken") / "run"
    command = ["taskset", "-c", ",".join(map(str, CORES))]
    command += [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "4", "--no-python", str(quick / "bin/python")]
    command += ["-m", "megaopd.train", *RUN, f"run.dir={run_dir}"]
    done = run_command(command, timeout_s=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return run_dir


def submit(cluster: VirtualCluster, out: Path, *words: str, **environment: str) -> str:
    """The batch script with these words; those that begin with -- are for sbatch."""
    options = [word for word in words if word.startswith("--")]
    rest = [word for word in words if not word.startswith("--")]
    return cluster.submit(
        "--gpus-per-node=0", f"--output={out}", *options, SCRIPT, *rest, **environment
    )


def assert_same_run(run_dir: Path, unbroken: Path) -> None:
    for name in ("loss/divergence", "train/grad_norm"):
        values = metrics_of(run_dir, name)
        assert len(values) == 8
        assert values == metrics_of(unbroken, name)
    manifests = [(directory / "hf/SHA256SUMS").read_text() for directory in (run_dir, unbroken)]
    assert manifests[0] == manifests[1]


def test_slurm_takes_the_script_as_it_is(cluster):
    for words in ((), ("--nodes=1",), ("--array=0-3",)):
        cluster.run("sbatch", "--test-only", *words, SCRIPT)


def test_debug_run_is_the_run_of_torchrun(cluster, unbroken, tmp_path):
    """With an interpreter of its own for each rank, and a directory with a blank in its name."""
    run_dir, out = tmp_path / "a run", tmp_path / "out.txt"
    job = submit(cluster, out, *RUN, f"run.dir={run_dir}", MEGAOPD_ENV=f"venv:{sys.prefix}")
    cluster.wait(job, "COMPLETED", 400, out)
    assert_same_run(run_dir, unbroken)
    logs = run_dir / "logs" / f"{job}-0"
    assert sorted(f.name for f in logs.glob("rank_*")) == [f"rank_{i}.log" for i in range(4)]
    assert "step 8/8" in (logs / "rank_0.log").read_text()
    said = (logs / "job.log").read_text()
    assert "\nWORLD_SIZE=4\n" in said
    assert "\nMASTER_ADDR=127.0.0.1\n" in said
    assert out.read_text().endswith(f"job {job}: done\n")


@pytest.mark.parametrize(
    ("word", "error"),
    [
        ("trian.num_steps=3", "error: trian: "),  # found before a rank is started
        ("parallel.tensor=3", "error: parallel: "),
    ],
)
def test_wrong_words_end_the_job_in_one_line(cluster, quick, debug, tmp_path, word, error):
    out = tmp_path / "out.txt"
    words = (*RUN, f"run.dir={tmp_path}/run", word)
    job = cluster.wait(
        submit(cluster, out, *words, MEGAOPD_ENV=f"venv:{quick}"), "FAILED", 200, out
    )
    assert (job["ExitCode"], job["Restarts"]) == ("2:0", "0")
    assert out.read_text().splitlines()[-1].startswith(error)


def test_a_line_of_a_sweep_for_each_task(cluster, quick, debug, tmp_path):
    """Each has its own directory; words reach the run as they are, and no shell reads them."""
    sweep, name = tmp_path / "sweep.txt", f"a [b]; $(touch {tmp_path}/ran) `touch {tmp_path}/ran`"
    sweep.write_text(
        f"# a comment\noptimizer.lr=3.0e-4 \"data.name='of $(touch {tmp_path}/ran)'\"\n\n"
        f"optimizer.lr=5.0e-4 train.num_steps=2\n"
    )
    words = ("--array=0-1", *RUN, f"sweep={sweep}", f"run.dir={tmp_path}/run")
    words += ("train.num_steps=1", "train.export=false", "eval.interval=0", f"data.name='{name}'")
    job = submit(cluster, tmp_path / "out-%a.txt", *words, MEGAOPD_ENV=f"venv:{quick}")
    for task in (0, 1):
        cluster.wait(f"{job}_{task}", "COMPLETED", 300, tmp_path / f"out-{task}.txt")
    configs = [yaml.safe_load((tmp_path / f"run/{i}/config.yaml").read_text()) for i in (0, 1)]
    assert [config["optimizer"]["lr"] for config in configs] == [3.0e-4, 5.0e-4]
    assert [config["data"]["name"] for config in configs] == [f"of $(touch {tmp_path}/ran)", name]
    assert [len(metrics_of(tmp_path / f"run/{i}", "loss/divergence")) for i in (0, 1)] == [1, 2]
    assert not (tmp_path / "ran").exists()


def test_a_run_outlives_all_that_ends_a_job(cluster, quick, unbroken, tmp_path):
    """Signals in each phase, preemption, a lost node: the run is that of an unbroken one."""
    run_dir, out, order = tmp_path / "run", tmp_path / "out.txt", tmp_path / "hold"
    job = submit(
        cluster,
        out,
        *RUN,
        f"run.dir={run_dir}",
        MEGAOPD_ENV=f"venv:{quick}",
        MEGAOPD_TEST_HOLD=str(order),
    )

    def reach(phase: str, step: int) -> None:
        """Lets the job start, and waits until its ranks are held there."""
        order.write_text(f"{phase} {step}")
        if cluster.job(job)["Restarts"] != "0":
            cluster.release(job)
        until(reached_file(order).exists, 200, out.read_text)
        assert reached_file(order).read_text() == f"{phase} {step}"
        reached_file(order).unlink()

    phases = (("rollout", 2), ("teacher", 3), ("student", 4), ("eval", 4), ("checkpoint", 6))
    for attempt, (phase, step) in enumerate(phases):
        reach(phase, step)
        cluster.run("scancel", "--signal=USR1", job)
        state = cluster.wait(job, "PENDING", 100, out)
        assert state["Restarts"] == str(attempt + 1)
        done = step - 1 if phase in ("rollout", "teacher") else step
        stopped = [line for line in out.read_text().splitlines() if line.startswith("stopped: ")]
        assert len(stopped) == attempt + 1
        assert f"; the checkpoint of step {done} is complete; " in stopped[-1]

    reach("rollout", 7)
    cluster.kill_rank(3)
    assert cluster.wait(job, "PENDING", 100, out)["Restarts"] == "6"
    assert (run_dir / f"logs/{job}.failures").read_text().startswith("1\n")

    reach("weight_sync", 7)
    urgent = cluster.submit(
        *("--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=true")
    )
    cluster.wait(urgent, "COMPLETED", 100, out)
    assert cluster.wait(job, "PENDING", 100, out)["Restarts"] == "7"
    assert "the checkpoint of step 7 is complete" in out.read_text()

    reach("rollout", 8)
    cluster.kill_node("n2")
    assert cluster.wait(job, "PENDING", 200, out)["Restarts"] == "8"
    cluster.start_node("n2")
    order.unlink()
    cluster.release(job)
    state = cluster.wait(job, "COMPLETED", 200, out)
    assert state["Restarts"] == "8"
    assert_same_run(run_dir, unbroken)
    attempts = sorted(directory.name for directory in (run_dir / "logs").glob(f"{job}-*"))
    assert attempts == [f"{job}-{i}" for i in range(9)]
