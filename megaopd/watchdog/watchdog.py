"""The thread that watches over a rank, and on rank 0 over all of them."""

from __future__ import annotations

import os
import resource
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist

from megaopd.config_reliability import DeadlineConfig
from megaopd.errors import EnvironmentFault, MegaOPDError
from megaopd.redaction import redact
from megaopd.watchdog.judge import GRACE_S, Judge, Verdict, of_the_guilty
from megaopd.watchdog.phases import Phases, Place
from megaopd.watchdog.stacks import MainThread, StackFile, main_thread
from megaopd.watchdog.wire import LINGER_S, Hub, Link, Member, Message

# The thread looks around so often, and gives a sign of life every so often.
TICK_S = 0.2
BEAT_S = 2.0
# Ranks write their stacks within this time, or without them.
DUMP_S = 5.0


class Watchdog(AbstractContextManager["Watchdog"]):
    """Ends the run with exit status 5 and all stacks in run_dir/stacks when a phase takes too long
    on some rank, or a rank dies or stops.

    A context manager around everything that the ranks do together. A rank that leaves it is watched
    no longer. One that leaves it with an error of its own takes the others with it after a moment,
    with its exit status and without further words; with one that the ranks agree on
    (`MegaOPDError.agreed`) each of them leaves by itself. An error of torch.distributed waits there
    for the verdict on the rank that is the cause of it.

    The constructor is collective, and comes after the default process group.

    Args:
        config: the deadlines.
        run_dir: directory of the run.
        rank, world_size: of this process.
        on_end: on rank 0, takes what a person is told when the watchdog ends the run, just before
            it does; it has a moment for it.

    Raises:
        ConfigError: run_dir cannot be written.
        EnvironmentFault: rank 0 cannot be reached.
    """

    def __init__(
        self,
        config: DeadlineConfig,
        run_dir: str | Path,
        rank: int,
        world_size: int,
        *,
        on_end: Callable[[str], None] | None = None,
    ) -> None:
        self._silence_s = config.silence_s
        self._rank = rank
        self._on_end = on_end
        self._phases = Phases(config)
        self._stacks_dir = Path(run_dir) / "stacks"
        self._stacks = StackFile(self._stacks_dir / f"rank_{rank}.txt")
        # What the main thread ran into because of another rank.
        self._error: BaseException | None = None
        # What it leaves behind: "bye", or "failed".
        self._last_word: Message | None = None
        self._wake = threading.Event()
        self._link = _connect(rank, world_size)
        self._judge = Judge(world_size, config.silence_s, time.monotonic())
        self._stacks.dump_unless_put_off(self._silence_s)
        watch = self._watch_all if rank == 0 else self._watch_rank_0
        self._thread = threading.Thread(target=watch, name="megaopd-watchdog", daemon=True)
        self._thread.start()

    def phase(self, name: str, step: int = 0) -> AbstractContextManager[None]:
        """The block is a phase of a step, numbered from 1. Those of `DeadlineConfig` have a
        deadline; a phase around another one goes on counting."""
        return self._phases.enter(name, step)

    def close(self) -> None:
        """Ends the watch over this rank; again does nothing."""
        self._close({"kind": "bye"})

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None and _is_of_others(error):
            self._error = error
            # The thread ends the process as soon as it hears of the cause.
            self._thread.join(self._silence_s + DUMP_S + GRACE_S)
        if error is None or (isinstance(error, MegaOPDError) and error.agreed):
            self.close()
            return
        status = error.exit_status if isinstance(error, MegaOPDError) else 1
        self._close({"kind": "failed", "status": status, **vars(self._phases.place(error))})

    def _close(self, last_word: Message) -> None:
        if self._last_word is None:
            self._last_word = last_word
            self._wake.set()
            self._thread.join(TICK_S + LINGER_S)
            if not self._thread.is_alive():
                self._stacks.close()

    # The thread, on rank 0.

    def _watch_all(self) -> None:
        told_at = 0.0
        while self._last_word is None:
            now = time.monotonic()
            for rank, message in self._link.poll():
                self._hear(rank, message, now)
            self._hear(0, self._beat(), now)
            if (verdict := self._judge.verdict(now)) is not None:
                self._end_all(verdict)
            if now - told_at >= BEAT_S:
                told_at = now
                self._give_sign()
            self._wake.wait(TICK_S)
        self._link.say_last(self._last_word)

    def _hear(self, rank: int, message: Message, now: float) -> None:
        kind = message["kind"]
        if kind == "beat":
            self._judge.heard(rank, _place(message), now)
            if "limit_s" in message:
                self._judge.overdue(rank, _place(message["overdue"]), message["limit_s"], now)
        elif kind == "bye":
            self._judge.left(rank)
        elif kind == "failed":
            self._judge.failed(rank, message["status"], _place(message), now)
        elif kind == "lost":
            self._judge.lost(rank, now)

    def _end_all(self, verdict: Verdict) -> None:
        """Ends all ranks, this one last; does not return."""
        self._link.tell({"kind": "verdict", **vars(verdict)})
        if not verdict.failed:
            main = self._dump(verdict)
            at = {0: (main.at, main.waits)}
            # Who is lost has no answer.
            awaited = self._judge.watched - {0} - set(() if verdict.limit_s else verdict.ranks)
            until = time.monotonic() + DUMP_S
            while awaited and (left_s := until - time.monotonic()) > 0:
                for rank, message in self._link.poll(left_s):
                    if message["kind"] == "dumped":
                        at[rank] = message["at"], message["waits"]
                    if message["kind"] in ("dumped", "lost", "bye"):
                        awaited.discard(rank)
            verdict = of_the_guilty(verdict, at)
            _say(f"error: {verdict.fault(str(self._stacks_dir))}")
            self._link.tell({"kind": "leave"})
        if self._on_end is not None:
            _in_time(partial(self._on_end, str(verdict.fault(str(self._stacks_dir)))))
        os._exit(verdict.status)

    # The thread, on the others.

    def _watch_rank_0(self) -> None:
        told_at, told = 0.0, ("", 0, False)
        heard_at, there = time.monotonic(), Place()
        while self._last_word is None:
            now = time.monotonic()
            for _, message in self._link.poll():
                heard_at = now
                if message["kind"] == "beat":
                    there = _place(message)
                elif message["kind"] == "bye":
                    # Whoever is not done yet finishes unwatched.
                    self._link.close()
                    self._stacks.close()
                    return
                elif message["kind"] == "verdict":
                    self._end(_verdict(message))
                elif message["kind"] == "failed":
                    self._leave_after_rank_0(message["status"])
                elif message["kind"] == "lost":
                    self._end_alone(f"died, last seen in {there}")
            if now - heard_at > self._silence_s:
                self._end_alone(f"no sign of life for {now - heard_at:.0f} s in {there}")
            place = self._phases.place()
            here = place.phase, place.step, self._phases.overdue() is not None
            if now - told_at >= BEAT_S or here != told:
                told_at, told = now, here
                self._give_sign()
            self._wake.wait(TICK_S)
        self._link.say_last(self._last_word)

    def _leave_after_rank_0(self, status: int) -> None:
        """Rank 0 says why; does not return."""
        self._link.close()
        # It may be everybody's own error, which this rank is about to say.
        time.sleep(0.0 if self._error else GRACE_S)
        os._exit(status)

    def _end(self, verdict: Verdict) -> None:
        """Ends this rank with the others; does not return."""
        if not verdict.failed:
            main = self._dump(verdict)
            self._link.tell({"kind": "dumped", "at": main.at, "waits": main.waits})
            # Rank 0 says what happened, and the first one that leaves may be the end of all.
            until, heard = time.monotonic() + 2 * DUMP_S, set[str]()
            while not heard & {"leave", "lost"} and (left_s := until - time.monotonic()) > 0:
                heard |= {message["kind"] for _, message in self._link.poll(left_s)}
        os._exit(verdict.status)

    def _end_alone(self, found: str) -> None:
        """Ends this rank, for rank 0 is lost; does not return."""
        verdict = Verdict((0,), found)
        self._dump(verdict)
        if self._rank == 1:
            _say(f"error: {verdict.fault(str(self._stacks_dir))}")
        # One that leaves may be the end of those that still write.
        time.sleep(1.0)
        os._exit(verdict.status)

    # The thread, on all.

    def _give_sign(self) -> None:
        self._stacks.dump_unless_put_off(self._silence_s)
        self._link.tell(self._beat())

    def _beat(self) -> Message:
        place, overdue = self._phases.place(), self._phases.overdue()
        beat = {"kind": "beat", **vars(place)}
        return beat | ({"overdue": vars(overdue[0]), "limit_s": overdue[1]} if overdue else {})

    def _dump(self, verdict: Verdict) -> MainThread:
        """Writes this rank's stacks; returns what its main thread is doing."""
        # Not even this takes for ever.
        self._stacks.dump_unless_put_off(4 * DUMP_S)
        main = main_thread(self._error)
        place, met = self._phases.place(self._error), ""
        if self._error is not None:
            met = "".join(traceback.format_exception(self._error))
        head = f"rank {self._rank}: {place.seconds:.1f} s in {place}"

        def write() -> None:
            with suppress(OSError):  # the disk is full, or nobody reads any more
                _say(f"{head}: {main.calls}")
                about = f"verdict on rank {verdict.ranks[0]}: {verdict.found}"
                self._stacks.write(redact(f"{head}\n{about}\n{met}"))

        _in_time(write)
        return main


def _in_time(work: Callable[[], None]) -> None:
    """Does it, or goes on without: files and pipes may be what everything waits for."""
    worker = threading.Thread(target=work, name="megaopd-last-words", daemon=True)
    worker.start()
    worker.join(DUMP_S / 2)


def _connect(rank: int, world_size: int) -> Link:
    """The way from and to the other ranks; collective."""
    if world_size == 1:
        return Link()
    host = os.environ["MASTER_ADDR"]
    address: list[Any] = [None]
    hub = None
    if rank == 0:
        _allow_files(2 * world_size + 1024)
        hub = Hub(host)
        address = [(hub.port, hub.token)]
    dist.broadcast_object_list(address, src=0)
    if hub is not None:
        if missing := hub.missing_of(world_size):
            raise EnvironmentFault(
                f"rank {missing[0]}",
                f"it and {len(missing) - 1} more do not reach rank 0 at {host}:{hub.port}",
                "let the ranks connect to all ports of MASTER_ADDR",
            )
        return hub
    port, token = address[0]
    try:
        return Member(host, port, token, rank)
    except OSError as error:
        raise EnvironmentFault(
            f"rank {rank}",
            f"cannot reach rank 0 at {host}:{port} ({error})",
            "let the ranks connect to all ports of MASTER_ADDR",
        ) from error


def _allow_files(wanted: int) -> None:
    """As many open files as there may be: every rank has a connection."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def _is_of_others(error: BaseException) -> bool:
    """Whether an error may be another rank's end, seen by a collective."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(w in str(error) for w in ("gloo", "NCCL"))


def _place(message: Message) -> Place:
    return Place(message["phase"], message["step"], message["seconds"])


def _verdict(message: Message) -> Verdict:
    ranks, found = tuple(message["ranks"]), message["found"]
    return Verdict(ranks, found, message["status"], message["failed"], message["limit_s"])


def _say(line: str) -> None:
    """A line on stderr, whoever is writing there."""
    os.write(2, f"{redact(line)}\n".encode())
