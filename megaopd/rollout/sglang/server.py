"""One SGLang server as a child of this process: started, seen ready, stopped.

A server lives in a session of its own, so that stopping its process group leaves nothing behind,
and the kernel kills it when this process dies, however it dies. How its requests go is the client's
and the pool's business.
"""

from __future__ import annotations

import contextlib
import getpass
import http.client
import json
import os
import secrets
import selectors
import signal
import subprocess
import tempfile
import time
import urllib.error
import urllib.parse
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from megaopd.errors import RolloutError
from megaopd.logger import get_logger
from megaopd.rollout.sglang.address import check_not_public, free_port
from megaopd.rollout.sglang.flags import (
    DEVICE_ENVIRONMENT,
    SECRET_FLAGS,
    ServerSpec,
    check_args,
    server_options,
)
from megaopd.rollout.sglang.scratch import make_scratch, note_shared_memory, remove_scratch

logger = get_logger(__name__)

LAUNCHER = Path(__file__).with_name("launcher.py")

# The kernel's "parent died" is the death of the thread that started the child, so all servers are
# started by one thread, which lives as long as the process.
_starter = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sglang-starter")

# Loopback is never reached through a proxy, whatever the environment says.
_http = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class SGLangServer:
    """One server process and what is needed to reach it.

    Args:
        spec: what it serves.
        index: its number among the servers of this run, for its log.
        log_dir: directory of its log, ``sglang_<index>.log``; every start appends.
        api_key: the key for generation; empty makes a random one.
        admin_key: the key for weight updates and the like; empty makes a random one.
        start_timeout_s: longest time from its start to its first answer.

    Attributes:
        url: ``http://host:port`` of the last start.
        api_key: see above.
        admin_key: see above; the API key where the server's version has no other.
        keep_port: whether a later start takes the port of the one before, for those who know it by
            its URL alone.
        version: of sglang, once it has started.
        start_s: seconds from the last start to the first answer.
    """

    def __init__(
        self,
        spec: ServerSpec,
        index: int,
        log_dir: str | Path,
        *,
        api_key: str = "",
        admin_key: str = "",
        start_timeout_s: float = 600.0,
    ) -> None:
        self.spec = spec
        self.index = index
        self.log = Path(log_dir) / f"sglang_{index}.log"
        self.api_key = api_key or secrets.token_urlsafe(32)
        self._own_admin_key = admin_key or secrets.token_urlsafe(32)
        self.admin_key = self._own_admin_key
        self.url = ""
        self.keep_port = False
        self.version = ""
        self.start_s = 0.0
        self._start_timeout_s = start_timeout_s
        self._process: subprocess.Popen[bytes] | None = None
        self._reported = b""
        self._started_at = 0.0
        self._scratch: Path | None = None

    @property
    def pid(self) -> int | None:
        """The process id of the server, which is also its process group's; None before a start."""
        return self._process.pid if self._process else None

    def is_running(self) -> bool:
        """Whether the process exists; it may be stopped or hang all the same."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Starts the process and returns at once; `wait_ready` says when it serves.

        Raises:
            RolloutError: the address is open to the world, the arguments contain what we set, or
                the interpreter cannot be run.
        """
        self.stop()
        check_args(self.spec.args)
        check_not_public(self.spec.host)
        port = urllib.parse.urlsplit(self.url).port if self.keep_port and self.url else None
        port = port or free_port(self.spec.host)
        host = f"[{self.spec.host}]" if ":" in self.spec.host else self.spec.host
        self.url = f"http://{host}:{port}"
        order = {
            "parent": os.getpid(),
            "options": server_options(self.spec, port),
            "args": list(self.spec.args),
            "secrets": {
                SECRET_FLAGS["api"]: self.api_key,
                SECRET_FLAGS["admin"]: self._own_admin_key,
            },
        }
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self._started_at = time.monotonic()
        self._reported = b""
        # Its sockets take pickled objects: they lie where no other user of this host gets at them.
        self._scratch = make_scratch()
        self._process = process = _starter.submit(self._spawn, self._scratch).result()
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(order).encode() + b"\n")
            process.stdin.close()
        except BrokenPipeError:
            # It has ended already; wait_ready finds out and says why.
            pass

    def _spawn(self, scratch: Path) -> subprocess.Popen[bytes]:
        log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            return subprocess.Popen(
                # The last two are for whoever looks at the list of processes.
                [self.spec.python, "-u", str(LAUNCHER), self.spec.model_path, self.url],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=_environment(self.spec, scratch, (self.api_key, self._own_admin_key)),
                start_new_session=True,
            )
        except OSError as error:
            raise RolloutError(
                "rollout.sglang.python",
                f"{self.spec.python} cannot be run ({error.strerror})",
                "name the interpreter of an environment that has sglang",
            ) from error
        finally:
            os.close(log)

    def wait_ready(self) -> None:
        """Waits until the server answers, and only to those who have the key.

        Raises:
            RolloutError: it ended or was stopped, took longer than the limit, lost its port to
                another process, or answers everyone.
        """
        deadline = self._started_at + self._start_timeout_s
        while not (self._read_report() and self._is_healthy()):
            if not self.is_running():
                status = self._process.returncode if self._process else None
                raise self._error(f"ended with status {status} before it was ready")
            if time.monotonic() > deadline:
                self.stop()
                raise self._error(f"was not ready after {self._start_timeout_s:.0f} s")
            time.sleep(0.1)
        if not self._listens():
            self.stop()
            raise self._error("is not who answers at its port: another process took it")
        for key, expected in (("", 401), (self.api_key, 200)):
            status = self._model_info_status(key)
            if status != expected:
                self.stop()
                whom = "the right key" if key else "no key"
                raise self._error(f"answers {status} to {whom}, not {expected}")
        self.start_s = time.monotonic() - self._started_at
        if self._scratch is not None:
            note_shared_memory(self._scratch, _shared_memory_of(self._family()))
        logger.info(
            "sglang server %d: version %s at %s, ready after %.1f s, log %s",
            *(self.index, self.version, self.url, self.start_s, self.log),
        )

    def stop(self, grace_s: float | None = None) -> None:
        """Ends the server and everything that it started; without one it does nothing.

        Args:
            grace_s: how long it may take to give memory back by itself before it is killed; None is
                10 on GPUs and nothing on a CPU, where the kernel does all of it.
        """
        # Of those that left the group only the parent knows.
        family = self._family()
        process, self._process = self._process, None
        scratch, self._scratch = self._scratch, None
        if process is None:
            if scratch is not None:
                # It could not be started.
                remove_scratch(scratch)
            return
        if process.stdout is not None:
            process.stdout.close()
        if grace_s is None:
            grace_s = 10.0 if self.spec.device == "cuda" else 0.0
        if scratch is not None:
            note_shared_memory(scratch, _shared_memory_of(family))
        if grace_s > 0 and process.poll() is None:
            process.terminate()
            try:
                process.wait(grace_s)
            except subprocess.TimeoutExpired:
                logger.warning("sglang server %d: did not stop, killed", self.index)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        process.wait()
        psutil.wait_procs(family, timeout=10)
        if scratch is not None:
            # It leaves files behind even when it stops by itself.
            remove_scratch(scratch)

    def _family(self) -> list[psutil.Process]:
        """The server's process and all that it started, as far as they live."""
        if self._process is None:
            return []
        try:
            parent = psutil.Process(self._process.pid)
            return [parent, *parent.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def _read_report(self) -> bool:
        """Takes in the launcher's line, without waiting for it; whether it is complete."""
        if self._reported.endswith(b"\n"):
            return True
        process = self._process
        if process is None or process.stdout is None or process.stdout.closed:
            return False
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while selector.select(timeout=0):
                chunk = os.read(process.stdout.fileno(), 65536)
                if not chunk:
                    return False
                self._reported += chunk
                if self._reported.endswith(b"\n"):
                    report = json.loads(self._reported)
                    self.version = report["version"]
                    two_keys = SECRET_FLAGS["admin"] in report["secrets"]
                    self.admin_key = self._own_admin_key if two_keys else self.api_key
                    logger.debug("sglang server %d: %s", self.index, " ".join(report["argv"]))
                    return True
        return False

    def _is_healthy(self) -> bool:
        try:
            with _http.open(f"{self.url}/health", timeout=10):
                return True
        except (OSError, http.client.HTTPException):
            return False

    def _listens(self) -> bool:
        """Whether it is this server that listens at the port, which others may take before it, to
        be told its keys."""
        port = urllib.parse.urlsplit(self.url).port
        for member in self._family():
            with contextlib.suppress(psutil.Error):
                for socket in member.net_connections("tcp"):
                    if socket.status == psutil.CONN_LISTEN and socket.laddr.port == port:
                        return True
        return False

    def _model_info_status(self, key: str) -> int:
        """The HTTP status of the model's description; 0 where there is no answer."""
        status = 0
        # The second is its name before 0.5.8.
        for path in ("/model_info", "/get_model_info"):
            request = urllib.request.Request(self.url + path)
            if key:
                request.add_header("Authorization", f"Bearer {key}")
            try:
                with _http.open(request, timeout=10) as answer:
                    status = answer.status
            except urllib.error.HTTPError as error:
                status = error.code
            except (OSError, http.client.HTTPException):
                status = 0
            if status != 404:
                break
        return status

    def _error(self, found: str) -> RolloutError:
        return RolloutError(
            f"sglang server {self.index}", f"{found} ({self._last_words()})", f"read {self.log}"
        )

    def _last_words(self) -> str:
        """The last line of the log that says what went wrong, or else its last line."""
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        lines = [line.strip() for line in lines[-200:] if line.strip()]
        telling = [line for line in lines if "Error: " in line or "error: " in line]
        return (telling or lines or ["its log is empty"])[-1][:300]


# What torchrun tells a rank is not for the server, which makes process groups of its own.
_RANK_VARIABLES = {
    "RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "ROLE_NAME", "WORLD_SIZE", "LOCAL_WORLD_SIZE",
    "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT",
}  # fmt: skip


def _environment(spec: ServerSpec, scratch: Path, keys: tuple[str, ...]) -> dict[str, str]:
    """This process's environment without its rank, its search path and any variable with a key;
    temporary files go to `scratch`, compiled kernels where they always go."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in _RANK_VARIABLES
        and not name.startswith(("TORCHELASTIC_", "PYTHONPATH", "PYTHONHOME"))
        and value not in keys
    }
    # Compilers of kernels are looked for beside the interpreter.
    beside = str(Path(spec.python).absolute().parent)
    environment["PATH"] = beside + os.pathsep + environment.get("PATH", os.defpath)
    kernels = Path(tempfile.gettempdir()) / f"torchinductor_{getpass.getuser()}"
    environment.setdefault("TORCHINDUCTOR_CACHE_DIR", str(kernels))
    return environment | {"TMPDIR": str(scratch)} | dict(DEVICE_ENVIRONMENT[spec.device])


def _shared_memory_of(processes: list[psutil.Process]) -> set[str]:
    """The files of shared memory that the server made and these processes use."""
    paths = set()
    for process in processes:
        with contextlib.suppress(psutil.Error):
            paths |= {region.path for region in process.memory_maps()}
    return {path for path in paths if path.startswith(("/dev/shm/sglang_", "/dev/shm/sem.mp-"))}
