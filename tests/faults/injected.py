"""`megaopd.train` with a fault in it: `python -m tests.faults.injected conf=...`, the fault as a
JSON object in $FAULT: its `kind`, an entry of `FAULTS`, and what that takes.

The faults are put between the program and what it stands on (the file system, the models' numbers),
where the world would put them; what is tested is the rest.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

RANK = int(os.environ.get("RANK", "0"))
Fault = dict[str, Any]


def say(text: str) -> None:
    os.write(2, f"injected on rank {RANK}: {text}\n".encode())


def is_here(fault: Fault) -> bool:
    """Whether it is this rank's."""
    return bool(fault["rank"] == RANK)


# Of the many writes of tensors, one in so many counts: the other moments are few.
WRITES_PER_POINT = 40


class SavePoints:
    """The moments of a save at which a file is about to be opened, made, renamed, removed or
    synced, is half written, or anything else is about to be done to one."""

    def __init__(self, number_of_save: int, at: int, then: Callable[[str], None]) -> None:
        self.number_of_save, self.at, self.then = number_of_save, at, then
        self.saves = self.count = self.writes = 0
        self._lock = threading.Lock()

    def install(self) -> None:
        from megaopd.checkpoint.run_checkpoints import RunCheckpoints
        from megaopd.storage.streamed import StreamedFile

        save, complete = RunCheckpoints.save, RunCheckpoints._complete
        append, fsync = StreamedFile._append, os.fsync

        def counted_save(checkpoints: Any, step: int, state: Any) -> None:
            checkpoints.poll(wait=True)  # the one before it is not this one's
            if checkpoints.newest != step:
                self.saves += 1
                if self.at and self.saves == self.number_of_save:
                    say(f"in the save of step {step}")
            save(checkpoints, step, state)

        def counted_complete(checkpoints: Any, pending: Any) -> None:
            complete(checkpoints, pending)
            if self.saves == self.number_of_save:
                say(f"{self.count} points")
                if self.at:
                    self.then("the end of the save")
                self.saves += 1000

        def halved(file: StreamedFile, view: memoryview) -> None:
            half = len(view) // 2
            append(file, view[:half])
            self.writes += 1
            if self.writes % WRITES_PER_POINT == 0:
                self.reached("half of a write")
            append(file, view[half:])

        def counted_fsync(descriptor: int) -> None:
            self.reached("fsync")
            fsync(descriptor)

        RunCheckpoints.save, RunCheckpoints._complete = counted_save, counted_complete  # type: ignore[method-assign]
        StreamedFile._append = halved  # type: ignore[method-assign]
        os.fsync = counted_fsync
        sys.addaudithook(self._audit)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event.split(".")[0] in ("open", "os", "shutil") and any(
            "/checkpoints" in str(argument) for argument in arguments[:2]
        ):
            self.reached(f"{event} {' '.join(map(str, arguments[:2]))}")

    def reached(self, name: str) -> None:
        with self._lock:
            if self.saves == self.number_of_save:
                self.count += 1
                if self.count == self.at:
                    self.then(name)


def kill_in_save(fault: Fault) -> None:
    """SIGKILL at point `point` of save number `save`, or at its end if that has fewer, on `rank`;
    point 0 counts them."""

    def die(name: str) -> None:
        say(f"SIGKILL before: {name}")
        os.kill(os.getpid(), signal.SIGKILL)

    point = fault["point"] if is_here(fault) else 0
    SavePoints(fault["save"], point, die).install()


def write_error(fault: Fault) -> None:
    """The `at`-th write of tensors on `rank` fails, and all after it."""
    from megaopd.storage.streamed import StreamedFile

    append, count = StreamedFile._append, 0

    def failing(file: StreamedFile, view: memoryview) -> None:
        nonlocal count
        count += 1
        if is_here(fault) and count >= fault["at"]:
            if count == fault["at"]:
                say(f"write {count} fails with {fault['errno']} at {time.time():.2f}")
            number = getattr(errno, fault["errno"])
            raise OSError(number, os.strerror(number))
        append(file, view)

    StreamedFile._append = failing  # type: ignore[method-assign]


def room_that_is_not_there(fault: Fault) -> None:
    """The file system says that it has room until it is written to, as with quotas."""
    from megaopd.storage.staged import StagedDirectory

    StagedDirectory._check_room = lambda staged: None  # type: ignore[method-assign]


def writer_dies(fault: Fault) -> None:
    """The thread that writes ends without a word at its `at`-th write on `rank`."""
    from megaopd.storage.streamed import StreamedFile

    append, count = StreamedFile._append, 0

    def ending(file: StreamedFile, view: memoryview) -> None:
        nonlocal count
        count += 1
        if is_here(fault) and count == fault["at"]:
            say(f"the writer ends at {time.time():.2f}")
            raise SystemExit
        append(file, view)

    StreamedFile._append = ending  # type: ignore[method-assign]


def asleep(fault: Fault) -> None:
    """`rank` falls asleep in `phase` of step `step`, for ever."""
    from megaopd.trainer import OPDTrainer

    phase, number = fault["phase"], 0
    name = {"teacher": "score", "student": "train_step", "rollout": "generate"}[phase]

    def slow(part: Any) -> None:
        method = getattr(part, name)

        def sleeping(*args: Any, **kwargs: Any) -> Any:
            nonlocal number
            number += 1
            if is_here(fault) and number == fault["step"]:
                say(f"asleep in the phase {phase} of step {number} at {time.time():.2f}")
                time.sleep(10**6)
            return method(*args, **kwargs)

        setattr(part, name, sleeping)

    _before_fit(
        OPDTrainer, lambda trainer: slow(getattr(trainer, {"rollout": "engine"}.get(phase, phase)))
    )


def nan_in_the_teachers_signal(fault: Fault) -> None:
    """One row of the signal is NaN on `rank` at step `step`."""
    import torch

    from megaopd.trainer import OPDTrainer

    def spoil(trainer: OPDTrainer) -> None:
        score, number = trainer.teacher.score, 0

        def spoilt(samples: Any) -> Any:
            nonlocal number
            number += 1
            signals = score(samples)
            if is_here(fault) and number == fault["step"]:
                tensors = [
                    value
                    for value in vars(signals[0]).values()
                    if isinstance(value, torch.Tensor) and value.is_floating_point()
                ]
                tensors[0][0] = torch.nan
                say(f"NaN in a row of the teacher's signal of step {number}")
            return signals

        trainer.teacher.score = spoilt  # type: ignore[method-assign]

    _before_fit(OPDTrainer, spoil)


def nan_gradient(fault: Fault) -> None:
    """One element of the gradient is NaN on `rank` at step `step`, or up to step `last`, before
    ranks add theirs up."""
    import torch

    from megaopd.trainer import OPDTrainer

    def spoil(trainer: Any) -> None:
        train_step = trainer.student.train_step
        weight = next(p for p in trainer.student.chunks[0].parameters() if p.requires_grad)

        def spoilt(micro_batches: Any, signals: Any, step: int) -> Any:
            handle = None
            if is_here(fault) and fault["step"] <= step <= fault.get("last", fault["step"]):

                def hook(gradient: torch.Tensor) -> torch.Tensor:
                    gradient = gradient.clone()
                    gradient.view(-1)[0] = torch.nan
                    return gradient

                handle = weight.register_hook(hook)
                say(f"NaN in the gradient of step {step}")
            result = train_step(micro_batches, signals, step)
            if handle is not None:
                handle.remove()
            return result

        trainer.student.train_step = spoilt

    _before_fit(OPDTrainer, spoil)


def no_tokens(fault: Fault) -> None:
    """No token of the samples of step `step` counts, on all ranks."""
    from dataclasses import replace

    from megaopd.trainer import OPDTrainer

    def spoil(trainer: Any) -> None:
        first, number = trainer.rollouts.first, 0

        def masked() -> Any:
            nonlocal number
            number += 1
            prompts, samples, metrics = first()
            if number == fault["step"]:
                say(f"all loss masks of step {number} are empty")
                samples = [
                    replace(s, response_mask=type(s.response_mask)([False] * len(s.response_mask)))
                    for s in samples
                ]
            return prompts, samples, metrics

        trainer.rollouts.first = masked

    _before_fit(OPDTrainer, spoil)


def crash(fault: Fault) -> None:
    """A bug: step `step` raises on `rank`, with the value of `variable` in its text."""
    from megaopd.trainer import OPDTrainer

    step = OPDTrainer.step

    def crashing(trainer: OPDTrainer, number: int) -> Any:
        if is_here(fault) and number == fault["step"]:
            raise LookupError(os.environ[fault["variable"]])
        return step(trainer, number)

    OPDTrainer.step = crashing  # type: ignore[method-assign]


def wrong_resume(fault: Fault) -> None:
    """A resume that forgets `what`: what comparing runs is worth."""
    from megaopd.checkpoint.training_state import ModelState
    from megaopd.data.prompts import PromptStream

    if fault["what"] == "moments":
        restore = ModelState.restore

        def forgetful(state: ModelState, stored: Any, num_updates: int) -> None:
            restore(state, stored, num_updates)
            for _, _, _, tensors in state._owned():
                tensors["exp_avg"].zero_()

        ModelState.restore = forgetful  # type: ignore[method-assign]
    elif fault["what"] == "data position":
        PromptStream.load_state_dict = lambda stream, state: None  # type: ignore[method-assign]
    elif fault["what"] == "one bit of a weight":
        restore = ModelState.restore

        def inexact(state: ModelState, stored: Any, num_updates: int) -> None:
            import torch

            restore(state, stored, num_updates)
            weight = state._params[0].detach().view(-1)
            weight[:1].view(torch.int32).bitwise_xor_(1)

        ModelState.restore = inexact  # type: ignore[method-assign]


def _before_fit(trainer_class: Any, change: Callable[[Any], None]) -> None:
    fit = trainer_class.fit

    def changed(trainer: Any) -> Any:
        change(trainer)
        return fit(trainer)

    trainer_class.fit = changed


FAULTS: dict[str, Callable[[Fault], None]] = {
    f.__name__: f
    for f in (
        kill_in_save,
        write_error,
        room_that_is_not_there,
        writer_dies,
        asleep,
        nan_in_the_teachers_signal,
        nan_gradient,
        no_tokens,
        crash,
        wrong_resume,
    )
}

if __name__ == "__main__":
    from megaopd.errors import run_cli
    from megaopd.train import main

    fault = json.loads(os.environ["FAULT"])
    FAULTS[fault["kind"]](fault)
    run_cli(main, sys.argv[1:])
