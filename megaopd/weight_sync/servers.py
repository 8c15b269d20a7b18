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
        engine.refresh = lambda: self._repair(student, engine, version, times=1)
        try:
            engine.load_weights(student.export_weights(), version)
        except NoServerTookWeights as failure:
            self._repair(student, engine, version, REPAIRS, failure)
        else:
            self._repair(student, engine, version, REPAIRS)

    def _repair(
        self,
        student: Student,
        engine: SGLangEngine,
        version: int,
        times: int,
        failure: NoServerTookWeights | None = None,
    ) -> None:
        """Collective: sends the weights again to the servers that lack them.

        Raises:
            NoServerTookWeights: on all ranks alike, as after `failure`.
        """
        for _ in range(times):
            assert isinstance(engine.transport, ServerTransport)
            rank_0 = engine.ranks.rank == 0
            if not engine.ranks.broadcast(rank_0 and engine.transport.repairable(engine)):
                break
            try:
                engine.load_weights(student.export_weights(), version)
                failure = None
            except NoServerTookWeights as error:
                failure = error
        if failure is not None:
            raise failure
