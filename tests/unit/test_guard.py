"""What ends a run whose numbers have gone wrong, and what only warns."""

from __future__ import annotations

import json
import logging

import pytest

from megaopd.config import GuardConfig
from megaopd.errors import NumericError
from megaopd.guard import Guard

CONFIG = GuardConfig(patience=3, loss_spike=5.0, window=8, mismatch_kl=0.5)


def run(guard, losses, first=1):
    for step, loss in enumerate(losses, start=first):
        guard.check(step, {"loss/divergence": loss, "rollout/mismatch_kl": 0.0})


def test_a_spike_warns_and_several_end_the_run(caplog):
    guard = Guard(CONFIG)
    with caplog.at_level(logging.WARNING, "megaopd"):
        logging.getLogger("megaopd").propagate = True
        run(guard, [1.0, 2.0, 1.0, 2.0, 7.6, 1.0, 7.6, 7.6])
        assert len([r for r in caplog.records if r.name.startswith("megaopd")]) == 3
        assert "step 5: loss 7.6 is above guard.loss_spike 5 x the median 1.5" in caplog.text
        with pytest.raises(NumericError, match=r"step 9: loss 7.6 is above .* 3 steps in a row;"):
            run(guard, [7.6], first=9)


def test_no_bound_before_half_a_window_and_none_without_one():
    run(Guard(CONFIG), [1.0, 1.0, 1.0, 900.0])
    run(Guard(GuardConfig(patience=1, loss_spike=0.0)), [1.0] * 40 + [1e9])


def test_a_spike_does_not_raise_the_bound():
    """Otherwise a run that explodes slowly enough is never seen."""
    guard = Guard(GuardConfig(patience=0, window=4))
    run(guard, [1.0] * 4 + [6.0] * 20)
    assert guard.state_dict()["losses"] == [1.0] * 4
    assert guard.state_dict()["in_a_row"]["loss"] == 20


def test_mismatch():
    guard = Guard(GuardConfig(patience=2))
    guard.check(1, {"rollout/mismatch_kl": 0.6})
    guard.check(2, {"rollout/mismatch_kl": 0.4})
    guard.check(3, {"rollout/mismatch_kl": 0.6})
    with pytest.raises(NumericError, match="step 4: rollout/mismatch_kl 0.6 is above guard.mismat"):
        guard.check(4, {"rollout/mismatch_kl": 0.6})


def test_a_resumed_guard_decides_as_an_unbroken_one():
    losses = [1.0, 2.0, 1.0, 2.0, 8.0, 8.0]
    one = Guard(CONFIG)
    run(one, losses)
    two = Guard(CONFIG)
    two.load_state_dict(json.loads(json.dumps(one.state_dict())))
    for guard in (one, two):
        with pytest.raises(NumericError):
            run(guard, [8.0], first=7)
