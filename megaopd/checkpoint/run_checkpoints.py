"""The checkpoints of a run: saved beside the training, complete or not there, the old ones removed.

    ROOT/iter_0000200/              a step: a Megatron checkpoint of the model that any tool reads,
        __RANK_0.distcp             what each rank owns,
        run_state.json              and where the run was: data, samples in flight, generators
        hf/ .metadata SHA256SUMS
    ROOT/latest_checkpointed_iteration.txt

Saving has two ends. `save` takes a copy of this rank's share and lets a thread write it; `poll`,
which every rank calls between the phases of a step, completes the checkpoint once all ranks have
written: metadata, manifest, rename, pointer. Until the rename nothing of it has its name.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megaopd.checkpoint.hf_export import HFExporter
from megaopd.checkpoint.keys import StoredParam
from megaopd.checkpoint.pieces import StoredPieces
from megaopd.checkpoint.random_state import random_state, set_random_state
from megaopd.checkpoint.resumable import FORMAT, RUN_STATE, Resumable
from megaopd.checkpoint.shard_writer import ShardWriter
from megaopd.checkpoint.torch_dist import WrittenChunk, write_metadata
from megaopd.checkpoint.training_state import StatePart
from megaopd.config import CheckpointConfig
from megaopd.errors import CheckpointError, MegaOPDError
from megaopd.logger import get_logger
from megaopd.models.hf_io.companions import companion_bytes, copy_companions, set_config_dtype
from megaopd.parallel.agreement import agreed
from megaopd.storage.staged import StagedDirectory
from megaopd.storage.steps import (
    hf_directory,
    remove_leftovers,
    step_directory,
    stored_steps,
    write_pointer,
)

logger = get_logger(__name__)

_COMPANIONS = "hf"
# What a piece's archive and its line in .metadata take at most, beside its values.
_BYTES_PER_PIECE = 2048


@dataclass
class _Pending:
    """A checkpoint under way."""

    step: int
    state: dict[str, Any]
    random: dict[str, Any]
    staged: StagedDirectory
    writer: ShardWriter
    num_bytes: int
    started: float
    waited_s: float


class RunCheckpoints:
    """Saves and restores a run. Every method is collective.

    Args:
        config: when and how.
        root: the directory of all steps, seen by all ranks.
        parts: what has tensors to save.
        num_updates: optimizer steps that were taken; skipped ones are none.
        source_dir: the model's directory, whose configuration and tokenizer go along.
        dtype: of the weights.
        layout: what the checkpoint is said to be written by, in words.
        exports: directory of Hugging Face exports; None makes none.
        export_adapter: writes LoRA adapters into a directory, in place of an export; collective.
        on_failure: called in a thread when this rank cannot write its share.
        on_complete: called with step and directory of every checkpoint, once it is complete.

    Attributes:
        newest: step of the newest complete checkpoint, None where there is none.
        metrics: `checkpoint/step`, and the seconds that writing it took and training waited.
    """

    def __init__(
        self,
        config: CheckpointConfig,
        root: Path,
        parts: Sequence[StatePart],
        *,
        num_updates: Callable[[], int],
        source_dir: str,
        dtype: torch.dtype,
        layout: dict[str, Any],
        exports: Path | None = None,
        export_adapter: Callable[[Path], None] | None = None,
        on_failure: Callable[[], None] = lambda: None,
        on_complete: Callable[[int, Path], None] = lambda step, directory: None,
    ) -> None:
        self.config, self.root, self.parts = config, root, tuple(parts)
        self._num_updates = num_updates
        self._source, self._dtype, self._layout = hf_directory(source_dir), dtype, layout
        self._exports, self._export_adapter = exports, export_adapter
        self._on_failure, self._on_complete = on_failure, on_complete
        self._rank, self._world_size = dist.get_rank(), dist.get_world_size()
        self._pending: _Pending | None = None
        self._exporter = HFExporter()
        self.newest: int | None = None
        self.metrics: dict[str, float] = {}
        if self._rank == 0:
            remove_leftovers(root)

    def restore(self, resumable: Resumable) -> None:
        """Puts all parts and the generators where they were.

        Raises:
            CheckpointError: on every rank alike: something is not there, or of another model.
        """
        state = resumable.state
        with agreed():
            stored = StoredPieces(resumable.directory)
            for part in self.parts:
                part.restore(stored, state["num_updates"])
        if state["world_size"] == self._world_size:
            set_random_state(state["random"][self._rank])
        else:
            logger.info(
                "random generators start anew: %d ranks wrote the checkpoint, this run has %d",
                *(state["world_size"], self._world_size),
            )
        self.newest = resumable.step

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Begins to save; complete at a later `poll`, or at the end of the call if the
        configuration is not asynchronous. One that is under way is completed first, and a step that
        is there already is not saved again.

        Args:
            state: JSON-compatible, equal on every rank.

        Raises:
            EnvironmentFault: the disk has no room.
            CheckpointError: the checkpoint cannot be written.
        """
        started = time.monotonic()
        self.poll(wait=True)
        if self.newest == step:
            return
        directory = step_directory(self.root, step)
        pieces = [(p.block, p.values.nbytes) for part in self.parts for p in part.saved_pieces()]
        num_bytes = sum(size for _, size in pieces)
        total = torch.tensor([num_bytes + len(pieces) * _BYTES_PER_PIECE])
        dist.all_reduce(total)
        described = json.dumps(state)  # as it is now
        staged = StagedDirectory(
            directory,
            overwrite=True,
            needed_bytes=int(total) + companion_bytes(self._source) + len(described),
        )
        with ExitStack() as undo:
            with agreed():
                if self._rank == 0:
                    undo.enter_context(staged)
            writer = ShardWriter(
                *(staged.path, self._rank, self._shares()),
                in_background=self.config.asynchronous,
                on_failure=self._on_failure,
            )
            undo.pop_all()
        state = {
            **json.loads(described),
            "format": FORMAT,
            "step": step,
            "num_updates": self._num_updates(),
            "world_size": self._world_size,
            "layout": self._layout,
        }
        self._pending = _Pending(
            step, state, random_state(), staged, writer, num_bytes, started, waited_s=0.0
        )
        if self._export_adapter is not None and self._exports is not None:
            self._export_adapter(step_directory(self._exports, step))
        self._pending.waited_s = time.monotonic() - started
        if not self.config.asynchronous:
            self.poll(wait=True)

    def poll(self, *, wait: bool = False) -> None:
        """Completes the checkpoint under way, once all ranks have written their share.

        Args:
            wait: until they have.

        Raises:
            EnvironmentFault: on every rank alike: the disk is full.
            CheckpointError: likewise: a rank cannot write.
        """
        if self._rank == 0:
            self._exporter.poll()
        pending = self._pending
        if pending is None:
            return
        if wait:
            pending.writer.join()
        done = pending.writer.done
        well = not (done and pending.writer.error is not None)
        flags = torch.tensor([int(done), int(well)])
        dist.all_reduce(flags, op=dist.ReduceOp.MIN)
        if not flags[1]:
            pending.writer.give_up()
        elif not flags[0]:
            return
        self._pending = None
        self._complete(pending)

    def finish(self) -> None:
        """Waits for the checkpoint under way and for all exports."""
        self.poll(wait=True)
        if self._rank == 0 and self._exporter.in_use:
            self._exporter.finish()
            self._remove_old()

    def close(self) -> None:
        """Gives up what is under way; for a run that fails. Not collective."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.writer.give_up()
            if self._rank == 0:
                error = CheckpointError(str(pending.staged.dst), "was given up", "start again")
                pending.staged.__exit__(CheckpointError, error, None)
        self._exporter.close()

    def _shares(self) -> Iterator[tuple[StoredParam, Tensor]] | list[tuple[StoredParam, Tensor]]:
        """This rank's pieces in host memory: copies of all of them where training goes on."""
        if self.config.asynchronous:
            return [
                (piece.block, piece.values.detach().to("cpu", copy=True))
                for part in self.parts
                for piece in part.saved_pieces()
            ]
        return (
            (piece.block, piece.values.detach().cpu())
            for part in self.parts
            for piece in part.saved_pieces()
        )

    def _complete(self, pending: _Pending) -> None:
        staged, started = pending.staged, time.monotonic()
        with ExitStack() as undo:
            if self._rank == 0:
                undo.push(staged.__exit__)
            with agreed(), staged.reporting():
                if pending.writer.error is not None:
                    raise _as_ours(pending.writer.error, staged.dst)
            mine = (pending.writer.chunks, pending.writer.digests, pending.random)
            by_rank: list[Any] | None = [None] * self._world_size if self._rank == 0 else None
            dist.gather_object(mine, by_rank, dst=0)
            with agreed(), staged.reporting():
                if by_rank is not None:
                    self._describe(pending, by_rank)
            with agreed():
                undo.close()  # rank 0 gives the directory its name
        with agreed(), staged.reporting():
            if self._rank == 0:
                write_pointer(self.root, pending.step)
        self.newest = pending.step
        self._on_complete(pending.step, staged.dst)
        now = time.monotonic()
        waited_s, total_s = pending.waited_s + now - started, now - pending.started
        self.metrics = {
            "checkpoint/step": float(pending.step),
            "checkpoint/write_s": total_s,
            "checkpoint/wait_s": waited_s,
        }
        logger.info(
            "checkpoint of step %d: %.2f GB a rank in %.1f s, of which training waited %.2f s",
            *(pending.step, pending.num_bytes / 1e9, total_s, waited_s),
        )
        if self._rank == 0:
            if self._exports is not None and self._export_adapter is None:
                self._exporter.add(staged.dst, step_directory(self._exports, pending.step))
            self._remove_old()

    def _describe(self, pending: _Pending, by_rank: Sequence[Any]) -> None:
        """What makes the ranks' files a checkpoint; on rank 0."""
        staged = pending.staged
        chunks = [chunk for written, _, _ in by_rank for chunk in written]
        _check_complete(chunks, staged.dst)
        write_metadata(staged.path, chunks)
        for name, digest in (item for _, part, _ in by_rank for item in part.items()):
            staged.digest(name, digest)
        state = pending.state | {"random": [generators for _, _, generators in by_rank]}
        (staged.path / RUN_STATE).write_text(json.dumps(state), encoding="utf-8")
        (staged.path / _COMPANIONS).mkdir()
        copy_companions(self._source, staged.path / _COMPANIONS)
        set_config_dtype(staged.path / _COMPANIONS, self._dtype)

    def _remove_old(self) -> None:
        """Removes what is not to be kept: first its name, then its files.

        A step past the newest one is what a damaged checkpoint has left; it counts for nothing.
        """
        steps = [step for step in stored_steps(self.root) if step <= (self.newest or 0)]
        every = self.config.keep_every
        kept = set(steps[-self.config.keep_last :]) | {s for s in steps if every and s % every == 0}
        for step in steps:
            directory = step_directory(self.root, step)
            if step in kept or directory in self._exporter.in_use:
                continue
            hidden = directory.with_name(f".{directory.name}.removed")
            try:
                os.rename(directory, hidden)
                shutil.rmtree(hidden)
            except OSError as error:
                logger.warning("%s cannot be removed (%s)", directory, error.strerror)


def _check_complete(chunks: Sequence[WrittenChunk], where: Path) -> None:
    """Checks that the ranks together wrote every tensor, and wrote it once.

    Raises:
        CheckpointError: they did not.
    """
    counts: dict[str, int] = {}
    sizes: dict[str, int] = {}
    for chunk in chunks:
        param = chunk.param
        counts[param.key] = counts.get(param.key, 0) + _numel(param.shape)
        sizes[param.key] = _numel(param.global_shape)
    for key, count in counts.items():
        if count != sizes[key]:
            raise CheckpointError(
                f"{where}: {key}", f"{count} of {sizes[key]} elements written", "report a bug"
            )


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def _as_ours(error: BaseException, where: Path) -> BaseException:
    """What a rank's thread met, as what all ranks can raise."""
    if isinstance(error, MegaOPDError | OSError):
        return error
    return CheckpointError(str(where), f"cannot be written ({error!r})", "look at the log")
