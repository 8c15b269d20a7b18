"""Weight sync to SGLang servers: the student's side of it."""

from __future__ import annotations

from megaopd.protocols import RolloutEngine, Student
from megaopd.rollout.sglang.engine import SGLangEngine
from megaopd.weight_sync.transport import NoServerTookWeights, ServerTransport

# Right after a sync, for the servers that it failed at: once more, and once by the fallback.
REPAIRS = 2


class ServerSync:
    """Implements `megaopd.protocols.WeightSync` for `SGLangEngine`.

    Servers get all weights every time, frozen ones too: one that was restarted has others. A server
    that comes back while samples are waited for gets them then, from `SGLangEngine.refresh`.
    """

    def sync(self, student: Student, engine: RolloutEngine, version: int) -> None:
        """Collective. Afterwards the engine's samples carry `version`.

        Raises:
            RolloutError: on all ranks alike: servers are up, and none of them has the weights.
        """
        assert isinstance(engine, SGLangEngine)
        engine.refresh = lambda: self._refresh(student, engine, version)
        failure: NoServerTookWeights | None = None
        for attempt in range(1 + REPAIRS):
            if attempt and not self._repairable(engine):
                break
            failure = self._send(student, engine, version)
        if failure is not None:
            raise failure

    def _refresh(self, student: Student, engine: SGLangEngine, version: int) -> None:
        """Collective, while samples are waited for: sends the weights to the servers that came back
        without them.

        Raises:
            NoServerTookWeights: on all ranks alike: none that is up has them, and none of these is
                worth another attempt. One that is brought down meanwhile may come back once more.
        """
        if self._repairable(engine):
            self._send(student, engine, version)
        transport = _transport(engine)
        if engine.ranks.broadcast(engine.ranks.rank == 0 and transport.hopeless(engine)):
            raise NoServerTookWeights(
                "weight sync",
                f"no server that is up could be given version {version}",
                "read their logs",
            )

    def _repairable(self, engine: SGLangEngine) -> bool:
        rank_0 = engine.ranks.rank == 0
        return bool(engine.ranks.broadcast(rank_0 and _transport(engine).repairable(engine)))

    def _send(
        self, student: Student, engine: SGLangEngine, version: int
    ) -> NoServerTookWeights | None:
        try:
            engine.load_weights(student.export_weights(), version)
        except NoServerTookWeights as failure:
            return failure
        return None


def _transport(engine: SGLangEngine) -> ServerTransport:
    assert isinstance(engine.transport, ServerTransport)
    return engine.transport
