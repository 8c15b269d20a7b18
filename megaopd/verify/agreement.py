"""What all ranks say of a check that they ran together."""

from __future__ import annotations

import os
import sys
import threading

import torch.distributed as dist

from megaopd.verify.table import Outcome, row


class Agreement:
    """Called by every rank with its own outcome of a check; gives all of them the same: that of the
    first that failed.

    Where one has failed alone, the others may be waiting for it inside the check, and never come.
    It then says by itself what it met, and leaves; torchrun ends the others.

    Args:
        patience_s: for how long a rank that failed waits for the others.
    """

    def __init__(self, patience_s: float = 60.0) -> None:
        self._patience_s = patience_s
        self._group: dist.ProcessGroup | None = None

    def __call__(self, name: str, outcome: Outcome) -> Outcome:
        if not dist.is_initialized():
            return outcome
        alarm = threading.Timer(self._patience_s, _leave, (name, outcome))
        alarm.daemon = True
        if outcome.status == "FAIL":
            alarm.start()
        if self._group is None:
            # Of its own: no collective that a check broke off is in its way.
            self._group = dist.new_group(backend="gloo")
        outcomes: list[Outcome] = [outcome] * dist.get_world_size()
        dist.all_gather_object(outcomes, outcome, group=self._group)
        alarm.cancel()
        return next((o for o in outcomes if o.status == "FAIL"), outcome)

    def wait(self) -> None:
        """Until all ranks are here."""
        dist.barrier(group=self._group)


def _leave(name: str, outcome: Outcome) -> None:
    for line in row(name, outcome):
        print(f"rank {dist.get_rank()} alone: {line}", file=sys.stderr, flush=True)
    os._exit(outcome.exit_status)
