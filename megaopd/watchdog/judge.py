"""From what rank 0 hears of all ranks to a verdict on the run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from megaopd.errors import EnvironmentFault
from megaopd.watchdog.phases import Place

# Ranks that are lost with a first one are named with it.
COLLECT_S = 1.5
# A rank that failed has said why; the others have so long to fail of the same by themselves.
GRACE_S = 3.0


@dataclass(frozen=True)
class Verdict:
    """The end of the run.

    Attributes:
        ranks: at fault, the first one first.
        found: what was seen of that one.
        status: exit status of all ranks.
        failed: the rank at fault has said by itself what is wrong, and nothing is to be added.
        limit_s: of the deadline that was passed.
        seen: what else is known about them.
    """

    ranks: tuple[int, ...]
    found: str
    status: int = EnvironmentFault.exit_status
    failed: bool = False
    limit_s: float = 0.0
    seen: str = ""

    def fault(self, stacks: str) -> EnvironmentFault:
        """The line for a person.

        Args:
            stacks: the directory of all stacks.
        """
        first, *others = self.ranks
        found = self.found + (f", and so it is with {_listed(others)}" if others else "")
        found += f"; {self.seen}" if self.seen else ""
        remedy = f"look at its log, and at {stacks} for what the others did"
        if self.limit_s:
            remedy = f"look at {stacks}/rank_{first}.txt, or set a longer deadline"
        return EnvironmentFault(f"rank {first}", found, remedy)


@dataclass(frozen=True)
class _Fault:
    rank: int
    kind: str
    found: str
    at: float
    status: int = EnvironmentFault.exit_status
    limit_s: float = 0.0


class Judge:
    """Hears of ranks and judges. Times are of one clock that only increases.

    Args:
        world_size: number of ranks, all of which are there.
        silence_s: a rank that nothing is heard of for so long is lost.
        now: the time.
    """

    def __init__(self, world_size: int, silence_s: float, now: float) -> None:
        self._silence_s = silence_s
        self._heard_at = dict.fromkeys(range(world_size), now)
        self._places = dict.fromkeys(range(world_size), Place())
        self._faults: dict[int, _Fault] = {}

    @property
    def watched(self) -> set[int]:
        """The ranks that are still there."""
        return set(self._heard_at)

    def heard(self, rank: int, place: Place, now: float) -> None:
        """A sign of life."""
        if rank in self._heard_at:
            self._heard_at[rank], self._places[rank] = now, place

    def overdue(self, rank: int, place: Place, limit_s: float, now: float) -> None:
        """It is past a deadline, by its own word."""
        found = f"{place.seconds:.0f} s in {place}, and deadline.{place.phase}_s is {limit_s:g}"
        self._accuse(_Fault(rank, "overdue", found, now, limit_s=limit_s))

    def left(self, rank: int) -> None:
        """It is done."""
        self._heard_at.pop(rank, None)

    def failed(self, rank: int, status: int, place: Place, now: float) -> None:
        """It leaves with an error of its own."""
        self._accuse(_Fault(rank, "failed", f"failed in {place}", now, status))
        self.left(rank)

    def lost(self, rank: int, now: float) -> None:
        """Its connection ended without a word."""
        if rank not in self._heard_at:
            return
        quiet_s = now - self._heard_at[rank]
        # It may have been stopped, and killed by somebody in the end.
        died = f"died, last seen in {self._places[rank]}"
        found = died if quiet_s < self._silence_s / 2 else f"{died}, silent for {quiet_s:.0f} s"
        self._accuse(_Fault(rank, "lost", found, now))
        self.left(rank)

    def verdict(self, now: float) -> Verdict | None:
        """The verdict, as soon as there is one: about the first fault, and all others of its
        kind."""
        for rank, at in list(self._heard_at.items()):
            if now - at > self._silence_s:
                found = f"no sign of life for {now - at:.0f} s in {self._places[rank]}"
                self._accuse(_Fault(rank, "lost", found, now))
        if not self._faults:
            return None
        first = min(self._faults.values(), key=lambda fault: fault.at)
        failed = first.kind == "failed"
        if now - first.at < (GRACE_S if failed else COLLECT_S):
            return None
        others = [f.rank for f in self._faults.values() if f.kind == first.kind and f is not first]
        ranks = (first.rank, *sorted(others))
        return Verdict(ranks, first.found, first.status, failed, first.limit_s)

    def _accuse(self, fault: _Fault) -> None:
        self._faults.setdefault(fault.rank, fault)


def of_the_guilty(verdict: Verdict, at: Mapping[int, tuple[str, bool]]) -> Verdict:
    """A verdict on those past a deadline that names whom the others wait for, if that can be told.

    Args:
        at: rank -> what its main thread is at, and whether that is waiting for other ranks; a rank
            that is not there gave no answer.
    """
    waiting = sorted(rank for rank in verdict.ranks if at.get(rank, ("", False))[1])
    guilty = tuple(rank for rank in verdict.ranks if rank not in waiting)
    if not verdict.limit_s or not guilty:
        return verdict
    where = at.get(guilty[0], ("", False))[0]
    seen = [f"it is at {where}"] if where else []
    if waiting:
        seen.append(f"{_listed(waiting)} wait{'s' * (len(waiting) == 1)} for others")
    return replace(verdict, ranks=guilty, seen=" and ".join(seen))


def _listed(ranks: list[int]) -> str:
    """Ranks in words, the first ones of many."""
    names = ", ".join(map(str, ranks[:8])) + (f", ... ({len(ranks)})" if len(ranks) > 8 else "")
    return f"rank {names}" if len(ranks) == 1 else f"ranks {names}"
