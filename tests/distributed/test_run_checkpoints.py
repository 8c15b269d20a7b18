"""What is kept of a run's checkpoints, and what a failed save leaves; one rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from megaopd.checkpoint.keys import StoredParam
from megaopd.checkpoint.pieces import Piece, StoredPieces
from megaopd.config import CheckpointConfig
from megaopd.storage.steps import complete_steps, is_complete, step_directory
from tests.helpers.distributed import run_distributed
from tests.helpers.tiny_models import make_tiny_model

pytestmark = pytest.mark.slow


class Counter:
    """A `StatePart` of one number."""

    def __init__(self) -> None:
        self.value = torch.zeros(3)

    def saved_pieces(self):
        yield Piece(StoredParam("optimizer.counter", (3,), (0,), (3,)), self.value)

    def restore(self, stored: StoredPieces, num_updates: int) -> None:
        for piece in self.saved_pieces():
            stored.fill(piece)


def checkpoints(folder: Path, part: Counter, **config: Any) -> Any:
    from megaopd.checkpoint.run_checkpoints import RunCheckpoints

    return RunCheckpoints(
        CheckpointConfig(**config),
        folder / "checkpoints",
        [part],
        num_updates=lambda: 1,
        source_dir=str(folder / "model"),
        dtype=torch.float32,
        layout={},
    )


def _kept(rank: int, world_size: int, folder: Path) -> None:
    import random

    from megaopd.checkpoint.resumable import find_resumable

    root, part = folder / "checkpoints", Counter()
    saved = checkpoints(folder, part, keep_last=2, keep_every=4)
    for step in range(1, 8):
        part.value.fill_(step)
        random.seed(step)
        saved.save(step, {"at": step})
        # What is saved is what was there, not what comes after.
        part.value.fill_(-1)
        random.seed(-1)
        if step % 2:
            saved.poll()
    saved.finish()
    assert complete_steps(root) == [4, 6, 7]
    assert not [p for p in root.iterdir() if p.name.startswith(".")]
    saved.save(7, {"at": "again"})  # it is there
    found = find_resumable(root, "auto")
    assert found is not None
    assert found.state["at"] == 7
    saved.restore(found)
    assert part.value.tolist() == [7, 7, 7]
    drawn = random.random()
    random.seed(7)
    assert drawn == random.random()

    # The newest is damaged: the run goes on from the one before it, and what it saves then is kept.
    (step_directory(root, 7) / "__0_0.distcp").write_bytes(b"garbage")
    found = find_resumable(root, "auto")
    assert found is not None
    assert found.step == 6
    saved = checkpoints(folder, part, keep_last=1)
    saved.restore(found)
    assert part.value.tolist() == [6, 6, 6]
    saved.newest = 4
    saved.save(5, {"at": 5})
    saved.finish()
    assert is_complete(step_directory(root, 5))
    assert 4 not in complete_steps(root)


def test_what_is_kept(tmp_path):
    make_tiny_model(tmp_path / "model", num_hidden_layers=1)
    run_distributed(_kept, 1, tmp_path)
