"""munged, slurmctld and some slurmd on this machine: real daemons, virtual nodes.

Everything lies in one directory, nothing in /etc is read or changed, and what is stopped is what
was started. `python -m tests.helpers.slurm.cluster DIR` starts one to try things on.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import random
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil

PACKAGES = ("slurm-wlm", "munge")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
# Advertised, not enforced.
CPUS, GPUS = 16, 8

CONF = """\
ClusterName=virtual
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={root}/run/munge.socket
CredType=cred/munge
SlurmctldPort={port}
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/run/slurmctld.pid
SlurmdPidFile={root}/run/slurmd.%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
ReturnToService=2
KillWait=15
MessageTimeout=20
SlurmctldTimeout=30
SlurmdTimeout=10
InactiveLimit=0
MinJobAge=3600
FirstJobId={first_job}
SlurmdParameters=config_overrides
GresTypes=gpu
PartitionName=main Nodes=ALL Default=YES MaxTime=UNLIMITED PriorityTier=1 PreemptMode=REQUEUE
PartitionName=urgent Nodes=ALL MaxTime=UNLIMITED PriorityTier=10 PreemptMode=OFF
"""
NODE = (
    "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs={cpus} "
    "RealMemory={memory_mib} Gres=gpu:{gpus} State=UNKNOWN\n"
)

Job = dict[str, str]
FINAL = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}


class NoSlurm(Exception):
    """Slurm is not installed here and cannot be."""


def install() -> None:
    """Sees to it that the daemons are there: root gets them by apt-get.

    Raises:
        NoSlurm: they are not.
    """
    # Debian's place for daemons is on root's path alone.
    os.environ["PATH"] += os.pathsep + "/usr/sbin"
    missing = [program for program in PROGRAMS if not shutil.which(program)]
    if not missing:
        return
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        raise NoSlurm(f"there is no {', '.join(missing)}; apt-get install {' '.join(PACKAGES)}")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    apt = ["apt-get", "-qq", "-o", "DPkg::Lock::Timeout=300"]
    for words in (["update"], ["install", "-y", "--no-install-recommends", *PACKAGES]):
        done = subprocess.run([*apt, *words], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise NoSlurm(f"apt-get cannot install {' '.join(PACKAGES)}: {done.stderr[-300:]}")


class VirtualCluster:
    """Nodes n1, n2, ... on loopback, with GPUs that are not there.

    Args:
        root: an empty directory, for everything.
        cores: of this machine, for everything that it runs; None leaves all.

    Attributes:
        environment: what makes a Slurm command speak to this cluster.
    """

    def __init__(self, root: Path, num_nodes: int = 2, cores: set[int] | None = None) -> None:
        self.root, self.cores = root, cores
        self.nodes = [f"n{i}" for i in range(1, num_nodes + 1)]
        self.conf = root / "slurm.conf"
        self.environment = {**os.environ, "SLURM_CONF": str(self.conf)}
        for name in list(self.environment):
            if name.startswith(("SLURM_", "SBATCH_")) and name != "SLURM_CONF":
                del self.environment[name]

    def start(self) -> None:
        """Starts the daemons and waits until all nodes are idle.

        Raises:
            RuntimeError: they are not after a minute; it ends with the last lines of the logs.
        """
        for name in ("state", "spool", "log", "run", "dev"):
            (self.root / name).mkdir(parents=True, exist_ok=True)
        self._write_conf()
        key = self.root / "run/munge.key"
        key.touch(0o600)
        key.write_bytes(os.urandom(1024))
        run, log = self.root / "run", self.root / "log"
        # --force: the directories above may be anybody's.
        self._call(
            *("munged", "--force", f"--key-file={key}", f"--socket={run}/munge.socket"),
            *(f"--pid-file={run}/munged.pid", f"--log-file={log}/munged.log"),
            *(f"--seed-file={run}/munge.seed", "--num-threads=2"),
        )
        self._call("slurmctld", "-f", str(self.conf), "-c")
        for node in self.nodes:
            self.start_node(node)
        until(self._all_idle, 60, self._last_words)

    def start_node(self, node: str) -> None:
        (self.root / "spool" / node).mkdir(exist_ok=True)
        self._call("slurmd", "-f", str(self.conf), "-N", node)

    def kill_node(self, node: str) -> None:
        """SIGKILL for a node's slurmd and whatever it runs: the node is gone."""
        self._kill(self._daemon(f"slurmd.{node}"), *self._processes(node))

    def kill_rank(self, rank: int) -> None:
        """SIGKILL for a rank of the job that runs."""
        found = self._processes()
        ranks = [p for p in found if p.environ().get("SLURM_PROCID") == str(rank)]
        self._kill(*ranks)

    def stop(self) -> None:
        """Ends all jobs and the daemons, and whatever a job may have left."""
        with contextlib.suppress(RuntimeError, subprocess.TimeoutExpired):
            self.run("scancel", f"--user={getpass.getuser()}")
            until(lambda: not self.run("squeue", "-h", "-t", "R,CG"), 30)
        daemons = [f"slurmd.{node}" for node in self.nodes] + ["slurmctld", "munged"]
        running = [process for name in daemons if (process := self._daemon(name))]
        for process in running:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.terminate()
        _, alive = psutil.wait_procs(running, timeout=20)
        self._kill(*alive, *self._processes())

    def run(self, *command: str) -> str:
        """What one of Slurm's commands says.

        Raises:
            RuntimeError: it fails.
        """
        return self._call(*command).stdout.strip()

    def submit(self, *words: str, **environment: str) -> str:
        """`sbatch words` from the working directory; returns the job's number."""
        return self._call("sbatch", "--parsable", *words, **environment).stdout.strip()

    def job(self, number: str) -> Job:
        """The fields of `scontrol show job`; of those with a blank in them the first word."""
        text = self.run("scontrol", "show", "job", number, "--oneliner")
        return dict(word.split("=", 1) for word in text.split() if "=" in word)

    def wait(self, number: str, state: str, timeout_s: float, tail: Path | None = None) -> Job:
        """Waits until a job is in `state`, and is not on the way there any more.

        Args:
            tail: a file whose end is shown where that does not happen.
        """

        def said() -> str:
            text = tail.read_text()[-3000:] if tail and tail.exists() else ""
            return f"{self.job(number)}\n{text}"

        def there() -> bool:
            now = self.job(number)["JobState"]
            if now in FINAL and now != state:
                raise RuntimeError(said())
            return now == state

        until(there, timeout_s, said)
        return self.job(number)

    def release(self, number: str, timeout_s: float = 60) -> None:
        """Starts a requeued job now; by itself it waits for two minutes."""
        self.wait(number, "PENDING", timeout_s)
        # A node refuses a job within the second in which it was told to forget it.
        time.sleep(1.1)
        self.run("scontrol", "update", f"JobId={number}", "StartTime=now")

    def _write_conf(self) -> None:
        host = socket.gethostname().split(".")[0]
        first, *ports = _free_ports(1 + len(self.nodes))
        memory_mib = psutil.virtual_memory().total // 2**20 * 9 // 10
        text = CONF.format(
            root=self.root,
            host=host,
            user=getpass.getuser(),
            port=first,
            # Ports of runs are derived from it: other clusters of this machine have others.
            first_job=random.SystemRandom().randrange(10_000, 50_000),
        )
        for name, port in zip(self.nodes, ports, strict=True):
            text += NODE.format(
                name=name, host=host, port=port, cpus=CPUS, gpus=GPUS, memory_mib=memory_mib
            )
        self.conf.write_text(text)
        # slurmd counts files. Null devices make a job's CUDA_VISIBLE_DEVICES what it would be.
        for gpu in range(GPUS):
            device = self.root / f"dev/nvidia{gpu}"
            if os.geteuid() == 0:
                os.mknod(device, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
            else:
                device.touch()
        gres = f"Name=gpu File={self.root}/dev/nvidia[0-{GPUS - 1}]\n"
        (self.root / "gres.conf").write_text(gres)

    def _all_idle(self) -> bool:
        try:
            lines = self.run("sinfo", "-h", "-N", "-p", "main", "-t", "idle", "-o", "%N")
        except RuntimeError:  # slurmctld does not answer yet
            return False
        return len(lines.split()) == len(self.nodes)

    def _last_words(self) -> str:
        return "\n".join(
            f"== {log}\n{log.read_text()[-800:]}" for log in sorted((self.root / "log").iterdir())
        )

    def _daemon(self, name: str) -> psutil.Process | None:
        pid = self.root / "run" / f"{name}.pid"
        try:
            return psutil.Process(int(pid.read_text()))
        except (FileNotFoundError, ValueError, psutil.NoSuchProcess):
            return None

    def _processes(self, node: str = "") -> list[psutil.Process]:
        """The tasks of this cluster's jobs, of one node or of all, and their slurmstepds."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                environment = process.environ()
                if environment.get("SLURM_CONF") != str(self.conf):
                    continue
                where = environment.get("SLURMD_NODENAME")
                if where and node in ("", where):
                    found.append(process)
                    parent = process.parent()
                    if parent is not None and parent.name().startswith("slurmstepd"):
                        found.append(parent)
        return found

    def _kill(self, *processes: psutil.Process | None) -> None:
        running = [process for process in processes if process]
        for process in running:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(running, timeout=10)

    def _take_cores(self) -> None:
        if self.cores:
            os.sched_setaffinity(0, self.cores)

    def _call(self, *command: str, **environment: str) -> subprocess.CompletedProcess[str]:
        # Its daemons inherit the descriptors: a pipe would stay open as long as they live.
        out = self.root / "log" / f"call_{time.monotonic_ns()}.txt"
        with out.open("w+") as text:
            done = subprocess.run(
                command,
                env={**self.environment, **environment},
                stdin=subprocess.DEVNULL,
                stdout=text,
                stderr=subprocess.STDOUT,
                timeout=120,
                preexec_fn=self._take_cores,
            )
        said = out.read_text()
        out.unlink()
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: status {done.returncode}: {said}")
        return subprocess.CompletedProcess(command, 0, said)


def until(
    holds: Callable[[], bool], timeout_s: float, said: Callable[[], str] = lambda: ""
) -> None:
    """Waits until `holds()`.

    Raises:
        RuntimeError: it does not in time; `said()` tells more.
    """
    deadline = time.monotonic() + timeout_s
    while not holds():
        if time.monotonic() > deadline:
            raise RuntimeError(f"not after {timeout_s:.0f} s: {said()}")
        time.sleep(0.1)


def _free_ports(number: int) -> Sequence[int]:
    """Neighbours that nobody listens on, below those that the kernel gives out by itself."""
    while True:
        first = random.SystemRandom().randrange(20_000, 32_000)
        with contextlib.suppress(OSError), contextlib.ExitStack() as probes:
            for port in range(first, first + number):
                probe = probes.enter_context(socket.socket())
                probe.bind(("", port))
            return range(first, first + number)


def main(argv: list[str]) -> None:
    install()
    cluster = VirtualCluster(Path(argv[0]).resolve())
    cluster.start()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    print(f"export SLURM_CONF={cluster.conf}\n# Ctrl-C stops it", flush=True)
    # A shell that starts it in the background ignores the first for it.
    signal.sigwait({signal.SIGINT, signal.SIGTERM})
    cluster.stop()


if __name__ == "__main__":
    main(sys.argv[1:])
