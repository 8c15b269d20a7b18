"""The watchdog's parts by themselves; tests/distributed/test_watchdog_ranks.py has real ranks."""

from __future__ import annotations

import json
import re
import socket
import threading
import time

import pytest

from megaopd.config_reliability import DeadlineConfig
from megaopd.errors import ConfigError, EnvironmentFault
from megaopd.watchdog import Watchdog, phases, wire
from megaopd.watchdog.judge import COLLECT_S, GRACE_S, Judge, Verdict, of_the_guilty
from megaopd.watchdog.phases import PHASES, Phases, Place
from megaopd.watchdog.stacks import StackFile, all_stacks, main_thread
from megaopd.watchdog.wire import LOST, MAX_LINE, Hub, Member, Wire

ROLLOUT = Place("rollout", 7, 3.0)
STUDENT = Place("student", 7, 12.4)


def test_every_deadline_is_a_phase_s():
    names = {name.removesuffix("_s") for name in vars(DeadlineConfig())}
    assert names == {*PHASES, "silence"}


class TestPhases:
    @pytest.fixture
    def clock(self, monkeypatch) -> list[float]:
        now = [100.0]
        monkeypatch.setattr(phases.time, "monotonic", lambda: now[0])
        return now

    def test_the_innermost_one_is_the_place(self, clock):
        entered = Phases(DeadlineConfig())
        assert entered.place() == Place()
        assert str(entered.place()) == "no phase"
        with entered.enter("eval", 4):
            clock[0] += 2
            with entered.enter("rollout", 4):
                clock[0] += 3
                assert entered.place() == Place("rollout", 4, 3.0)
            assert entered.place() == Place("eval", 4, 5.0)
            assert str(entered.place()) == "phase eval of step 4"
        assert entered.place() == Place()
        with entered.enter("start", 0):
            assert str(entered.place()) == "phase start"

    def test_deadlines(self, clock):
        entered = Phases(DeadlineConfig(rollout_s=2, eval_s=5, teacher_s=0))
        with entered.enter("eval", 1), entered.enter("rollout", 1):
            clock[0] += 2
            assert entered.overdue() is None
            clock[0] += 1
            assert entered.overdue() == (Place("rollout", 1, 3.0), 2)
            clock[0] += 3
            assert entered.overdue() == (Place("eval", 1, 6.0), 5)
        for unlimited in ("teacher", "pack"):
            with entered.enter(unlimited, 1):
                clock[0] += 1e6
                assert entered.overdue() is None

    def test_an_error_leaves_a_phase(self, clock):
        entered = Phases(DeadlineConfig())

        def fail() -> None:
            clock[0] += 2
            raise KeyError

        with (
            pytest.raises(KeyError) as caught,
            entered.enter("eval", 1),
            entered.enter("rollout", 1),
        ):
            fail()
        assert entered.place() == Place()
        assert entered.place(caught.value) == Place("rollout", 1, 2.0)
        assert entered.place(KeyError()) == Place()


class TestJudge:
    @pytest.fixture
    def judge(self) -> Judge:
        judge = Judge(4, silence_s=40.0, now=0.0)
        for rank in range(4):
            judge.heard(rank, ROLLOUT, 1.0)
        return judge

    def test_all_is_well(self, judge):
        assert judge.verdict(41.0) is None

    def test_silence(self, judge):
        for rank in (0, 1, 3):
            judge.heard(rank, ROLLOUT, 30.0)
        assert judge.verdict(41.1) is None
        verdict = judge.verdict(41.1 + COLLECT_S)
        assert verdict == Verdict((2,), "no sign of life for 40 s in phase rollout of step 7")
        fault = verdict.fault("out/stacks")
        assert type(fault) is EnvironmentFault
        assert str(fault) == (
            "rank 2: no sign of life for 40 s in phase rollout of step 7; look at its log, and at "
            "out/stacks for what the others did"
        )

    def test_who_was_never_heard_of_is_silent(self):
        judge = Judge(2, silence_s=5.0, now=0.0)
        judge.heard(0, Place("start"), 6.0)
        judge.verdict(6.0)
        assert judge.verdict(8.0).found == "no sign of life for 6 s in no phase"

    def test_ranks_that_die_together_are_named_together(self, judge):
        judge.lost(3, 2.0)
        judge.lost(1, 2.3)
        assert judge.verdict(2.5) is None
        verdict = judge.verdict(4.0)
        assert verdict.ranks == (3, 1)
        assert (
            "rank 3: died, last seen in phase rollout of step 7, and so it is with rank 1; "
            in str(verdict.fault(""))
        )
        assert judge.watched == {0, 2}

    def test_who_stopped_and_was_ended_had_stopped(self, judge):
        judge.lost(1, 32.0)
        expected = "died, last seen in phase rollout of step 7, silent for 31 s"
        assert judge.verdict(34.0).found == expected

    def test_who_left_is_missed_by_nobody(self, judge):
        for rank in (1, 2, 3):
            judge.left(rank)
            judge.lost(rank, 2.0)
        judge.heard(0, Place(), 99.0)
        judge.heard(1, Place(), 99.0)
        assert judge.verdict(100.0) is None

    def test_a_rank_that_fails_takes_the_others_with_it_after_a_moment(self, judge):
        judge.failed(2, 3, STUDENT, 2.0)
        judge.lost(2, 2.1)
        judge.lost(1, 2.2)  # of the same
        assert judge.verdict(2.0 + GRACE_S - 0.1) is None
        verdict = judge.verdict(2.0 + GRACE_S)
        assert (verdict.ranks, verdict.status, verdict.failed) == ((2,), 3, True)
        assert verdict.found == "failed in phase student of step 7"

    def test_a_rank_that_fails_because_another_died_is_not_to_blame(self, judge):
        judge.lost(1, 2.0)
        judge.failed(2, 1, ROLLOUT, 2.1)
        verdict = judge.verdict(4.0)
        assert (verdict.ranks, verdict.status, verdict.failed) == ((1,), 5, False)

    def test_deadlines(self, judge):
        for rank in (1, 0, 2):
            judge.overdue(rank, STUDENT, 12.0, 5.0)
            judge.overdue(rank, STUDENT, 12.0, 5.5)
        verdict = judge.verdict(7.0)
        assert verdict.ranks == (1, 0, 2)
        assert verdict.found == "12 s in phase student of step 7, and deadline.student_s is 12"
        at = {0: ("c10d.py:3 wait", True), 1: ("mine.py:4 sleep", False), 2: ("c10d.py:3", True)}
        assert str(of_the_guilty(verdict, at).fault("out")) == (
            "rank 1: 12 s in phase student of step 7, and deadline.student_s is 12; it is at "
            "mine.py:4 sleep and ranks 0, 2 wait for others; look at out/rank_1.txt, or set a "
            "longer deadline"
        )
        # Whoever gives no answer cannot be waiting in Python.
        assert of_the_guilty(verdict, {0: at[0], 2: at[2]}).ranks == (1,)
        everybody_waits = dict.fromkeys(range(3), at[0])
        assert of_the_guilty(verdict, everybody_waits) == verdict
        nobody_waits = dict.fromkeys(range(3), at[1])
        assert of_the_guilty(verdict, nobody_waits).ranks == (1, 0, 2)


class TestWires:
    @pytest.fixture
    def hub(self):
        hub = Hub("127.0.0.1")
        yield hub
        hub.close()

    def of(self, link, count: int):
        """The next `count` messages."""
        found, until = [], time.monotonic() + 10
        while len(found) < count and time.monotonic() < until:
            found += link.poll(0.1)
        return found

    def test_messages_and_ends(self, hub):
        members = [Member("127.0.0.1", hub.port, hub.token, rank) for rank in (1, 2)]
        for number, member in enumerate(members, start=1):
            for i in range(3):
                member.tell({"kind": "beat", "i": i * number})
        # Nothing is lost of what comes while the others are waited for.
        assert hub.missing_of(3) == []
        found = self.of(hub, 6)
        assert [m["i"] for rank, m in found if rank == 1] == [0, 1, 2]
        assert [m["i"] for rank, m in found if rank == 2] == [0, 2, 4]
        hub.tell({"kind": "leave"})
        assert [self.of(m, 1) for m in members] == [[(0, {"kind": "leave"})]] * 2
        leaving = threading.Thread(target=members[1].say_last, args=({"kind": "bye"},))
        leaving.start()
        assert self.of(hub, 2) == [(2, {"kind": "bye"}), (2, LOST)]
        leaving.join(10)
        for _ in range(3):  # nobody reads them any more
            members[0].tell({"kind": "beat"})
        leaving = threading.Thread(target=hub.say_last, args=({"kind": "failed"},))
        leaving.start()
        assert self.of(members[0], 1) == [(0, {"kind": "failed"})]
        members[0].close()
        leaving.join(10)
        members[0].close()

    def test_who_does_not_come_is_named(self, hub, monkeypatch):
        monkeypatch.setattr(wire, "CONNECT_TIMEOUT_S", 0.3)
        member = Member("127.0.0.1", hub.port, hub.token, 2)
        assert hub.missing_of(4) == [1, 3]
        member.close()

    def test_a_process_that_ends_says_nothing(self, hub):
        member = Member("127.0.0.1", hub.port, hub.token, 1)
        member.tell({"kind": "beat"})
        assert self.of(hub, 1) == [(1, {"kind": "beat"})]
        hub.close()
        assert self.of(member, 1) == [(0, LOST)]
        member.tell({"kind": "beat"})
        assert member.poll() == []
        member.close()

    @pytest.mark.parametrize(
        "words",
        [
            b"GET / HTTP/1.1\r\n\r\n",
            b'{"kind": "hello", "token": "wrong", "rank": 1}\n',
            b'{"kind": "beat", "rank": 1}\n',
            b"[1]\n",
            b"x" * (MAX_LINE + 1),
            b"\xff\n",
        ],
    )
    def test_strangers_are_not_listened_to(self, hub, words):
        with socket.create_connection(("127.0.0.1", hub.port), timeout=10) as stranger:
            stranger.sendall(words)
            until = time.monotonic() + 10
            closed = b"."
            while closed and time.monotonic() < until:
                assert hub.poll(0.05) == []
                stranger.settimeout(0.05)
                try:
                    closed = stranger.recv(1)
                except TimeoutError:
                    continue
                except ConnectionResetError:
                    break
            assert closed != b"." or time.monotonic() < until

    def test_who_reads_nothing_holds_nobody_up(self):
        ours, theirs = socket.socketpair(socket.AF_UNIX)
        ours.close()
        with socket.create_server(("127.0.0.1", 0)) as server:
            theirs = socket.create_connection(server.getsockname())
            ours, _ = server.accept()
        writer = Wire(ours)
        began = time.monotonic()
        for i in range(20000):
            writer.send({"kind": "beat", "text": "x" * 1000, "i": i})
        assert time.monotonic() - began < 30
        assert not writer.ended
        # What arrives is whole.
        reader, found = Wire(theirs), []
        for _ in range(200):
            found += reader.receive()
            writer.send({"kind": "last"})
        assert [m["i"] for m in found[:50]] == list(range(50))
        assert not reader.ended
        ours.close()
        theirs.close()


def in_a_phase(entered: threading.Event, leave: threading.Event) -> None:
    entered.set()
    leave.wait(10)


class TestStacks:
    def test_all_threads_by_name(self):
        entered, leave = threading.Event(), threading.Event()
        thread = threading.Thread(target=in_a_phase, args=(entered, leave), name="the other one")
        thread.start()
        entered.wait(10)
        text = all_stacks()
        leave.set()
        thread.join()
        main, other = text.split("\n\n")[0], text.split("the other one:\n")[1].split("\n\n")[0]
        assert main.startswith("MainThread:\n")
        assert "tests/unit/test_watchdog.py:" in main
        assert " test_all_threads_by_name\n" in main
        # The last call is the last line.
        names = [line.split()[-1] for line in other.splitlines()]
        assert names[0] == "_bootstrap"
        assert "in_a_phase" in names[3:]

    def test_where_the_main_thread_is(self):
        main = main_thread()
        assert main.calls.startswith("megaopd/watchdog/stacks.py:")
        assert " < tests/unit/test_watchdog.py:" in main.calls
        assert main.at.endswith(" main_thread")
        assert not main.waits
        try:
            in_a_phase(threading.Event(), None)
        except AttributeError as error:
            main = main_thread(error)
        assert [call.split()[-1] for call in main.calls.split(" < ")] == [
            "in_a_phase",
            "test_where_the_main_thread_is",
        ]
        assert main.at.startswith("tests/unit/test_watchdog.py:")

    def test_who_calls_a_library_is_told(self):
        try:
            json.loads("{")
        except ValueError as error:
            at = main_thread(error).at
        assert re.fullmatch(
            r"python3.*/json/decoder.py:\d+ raw_decode, called from "
            r"tests/unit/test_watchdog.py:\d+ test_who_calls_a_library_is_told",
            at,
        )

    def test_a_file_without_stacks_goes(self, tmp_path):
        path = tmp_path / "stacks" / "rank_3.txt"
        file = StackFile(path)
        assert path.exists()
        file.dump_unless_put_off(60)
        file.close()
        assert not path.parent.exists()
        file = StackFile(path)
        file.write("rank 3, phase x")
        file.close()
        assert path.read_text().startswith("rank 3, phase x\n\nMainThread:\n")

    def test_nowhere_to_write(self, tmp_path):
        (tmp_path / "stacks").write_text("a file")
        with pytest.raises(ConfigError, match="run.dir: .*rank_0.txt cannot be written"):
            StackFile(tmp_path / "stacks" / "rank_0.txt")


def test_nothing_is_left_of_a_watch_that_saw_nothing(tmp_path):
    before = threading.active_count()
    with Watchdog(DeadlineConfig(), tmp_path, 0, 1) as dog, dog.phase("start"):
        assert (tmp_path / "stacks" / "rank_0.txt").exists()
        assert threading.active_count() == before + 1
    assert threading.active_count() == before
    assert list(tmp_path.iterdir()) == []
    dog.close()


def test_an_error_passes(tmp_path):
    with pytest.raises(KeyError), Watchdog(DeadlineConfig(), tmp_path, 0, 1):
        raise KeyError
    assert list(tmp_path.iterdir()) == []
