"""A run that is told to stop, in every phase, and what of it goes on."""

from __future__ import annotations

import json

import pytest

from megaopd.errors import StopRequested
from megaopd.interruption import Interruption
from tests.helpers.background_engine import BackgroundEngine, ListedStudent, SilentTeacher
from tests.unit.test_trainer import NUM_STEPS, make_trainer


class KeptState:
    """`Checkpoints` that keep the state as a file would."""

    def __init__(self):
        self.newest, self.metrics = None, {}
        self.states = {}
        self.finished = False

    def save(self, step, state):
        self.states[step] = json.dumps(state)
        self.newest, self.finished = step, False

    def poll(self):
        pass

    def finish(self):
        self.finished = True


class StoppingEngine(BackgroundEngine):
    """Gives up its k-th rollout, from 0, in the name of the interruption."""

    def __init__(self, interruption, at):
        super().__init__()
        self.interruption, self.at = interruption, at

    def start(self, prompts, params):
        rollout = super().start(prompts, params)
        if len(self.rollouts) - 1 == self.at:
            rollout.result = self.stop
        return rollout

    def stop(self):
        self.interruption.request("SIGUSR1")
        raise StopRequested("run", "SIGUSR1 during a rollout", "start it again to go on")


class StoppingTeacher(SilentTeacher):
    def __init__(self, interruption, at):
        super().__init__()
        self.interruption, self.at, self.calls = interruption, at, 0

    def score(self, samples):
        if self.calls == self.at:
            self.interruption.request("SIGTERM")
        self.calls += 1
        return []


def stopped_run(phase, max_staleness):
    """(the run, what it trained on, its checkpoints), told to stop in its third step."""
    interruption, engine, student, teacher = Interruption(), None, None, None
    if phase == "rollout":
        engine = StoppingEngine(interruption, at=2)
    elif phase == "teacher":
        teacher = StoppingTeacher(interruption, at=2)
    else:
        student = ListedStudent(
            before_step=lambda step: step == 3 and interruption.request("SIGUSR1")
        )
    trainer, recorded = make_trainer(max_staleness, engine, student)
    trainer.teacher = teacher or trainer.teacher
    trainer.interruption, trainer.checkpoints = interruption, KeptState()
    with pytest.raises(StopRequested) as stop:
        trainer.fit()
    return trainer, recorded, str(stop.value)


def resumed_run(state, trained, max_staleness):
    student = ListedStudent()
    student.trained = list(trained)
    trainer, recorded = make_trainer(max_staleness, student=student)
    trainer.load_state_dict(json.loads(state), None, None)
    trainer.fit()
    return trainer, recorded


@pytest.mark.parametrize("max_staleness", [0, 1, 2])
@pytest.mark.parametrize(("phase", "done"), [("rollout", 2), ("teacher", 2), ("student", 3)])
def test_a_stop_in_every_phase(phase, done, max_staleness):
    """Rollout and teacher change nothing: the step is begun anew, with the same prompts and random
    numbers. The student's step is finished."""
    unbroken, all_recorded = make_trainer(max_staleness)
    unbroken.fit()
    trainer, recorded, said = stopped_run(phase, max_staleness)
    assert trainer.done == done
    assert f"; the checkpoint of step {done} is complete; start the same command again" in said
    assert trainer.checkpoints.finished
    assert list(trainer.checkpoints.states) == [done]
    assert not trainer.rollouts.pending

    state = trainer.checkpoints.states[done]
    resumed, more = resumed_run(state, trainer.student.trained, max_staleness)
    assert resumed.student.trained == unbroken.student.trained
    assert [step for step, _, _ in recorded + more] == [1, 2, 3, 4]
    expected = [[s.sample_id for s in samples] for _, _, samples in all_recorded]
    assert [[s.sample_id for s in samples] for _, _, samples in recorded + more] == expected
    # The random numbers of those that were sampled again.
    assert set(resumed.engine.asked) <= set(unbroken.engine.asked)
    assert resumed.engine.weight_version == NUM_STEPS


def test_samples_that_are_there_are_not_sampled_again():
    """Told to stop behind the teacher's word, the step has its samples; they are trained on after
    the resume, of the weights that sampled them."""
    trainer, _, _ = stopped_run("teacher", 0)
    state = json.loads(trainer.checkpoints.states[2])
    (kept,) = state["rollouts"]
    assert kept["step"] == 3
    assert len(kept["samples"]) == 4
    resumed, more = resumed_run(json.dumps(state), trainer.student.trained, 0)
    assert len(resumed.engine.asked) == 1  # step 4's alone
    assert [tuple(s.token_versions) for s in more[0][2]] == [(2, 2, 2, 2)] * 4


def test_a_rollout_that_goes_on_is_given_up():
    trainer, _, _ = stopped_run("student", 1)
    assert [e for e in trainer.engine.events if e[0] == "give up"] == []  # it was done, and is kept
    state = json.loads(trainer.checkpoints.states[3])
    assert [r["samples"] is not None for r in state["rollouts"]] == [True]
    trainer, _, _ = stopped_run("rollout", 1)
    given_up = [e[1] for e in trainer.engine.events if e[0] == "give up"]
    assert given_up == [3]
    state = json.loads(trainer.checkpoints.states[2])
    # The one that nobody waits for any more had all of its samples.
    assert [r["samples"] is not None for r in state["rollouts"]] == [True, False]


def test_before_the_first_step_there_is_nothing_to_save():
    trainer, _ = make_trainer()
    trainer.checkpoints = KeptState()
    trainer.interruption.request("SIGTERM")
    with pytest.raises(StopRequested, match="SIGTERM, before the first step was done"):
        trainer.fit()
    assert trainer.checkpoints.states == {}


def test_a_step_that_is_saved_is_not_saved_again():
    """A signal during a save, or a second one, makes no second checkpoint."""

    class Signalled(KeptState):
        num_saves = 0

        def save(self, step, state):
            self.num_saves += 1
            trainer.interruption.request("SIGUSR1")
            trainer.interruption.request("SIGTERM")
            super().save(step, state)

    trainer, _ = make_trainer()
    object.__setattr__(trainer.config.checkpoint, "interval", 2)
    trainer.checkpoints = Signalled()
    with pytest.raises(StopRequested, match=r"run: SIGUSR1; the checkpoint of step 2 is complete"):
        trainer.fit()
    assert trainer.checkpoints.num_saves == 1


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda s: s["prompts"].update(prompts_sha256="0"), "the prompts of data.train changed"),
        (lambda s: s["rollouts"][0].update(prompts=["x"]), "samples in flight: of the prompt 'x'"),
    ],
)
def test_other_data(change, line):
    from megaopd.errors import CheckpointError

    trainer, _, _ = stopped_run("teacher", 0)
    state = json.loads(trainer.checkpoints.states[2])
    change(state)
    fresh, _ = make_trainer()
    with pytest.raises(CheckpointError, match=line):
        fresh.load_state_dict(state, None, None)
