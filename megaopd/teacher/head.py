"""Teachers' LM heads in the student's vocabulary partition, and the room for one on the device."""

from __future__ import annotations

import torch
from torch import Tensor

from megaopd.checkpoint import open_weights
from megaopd.models.arch import ModelArch
from megaopd.models.hf_io import load_vocab_rows
from megaopd.parallel.layout import Layout


class HeadSlot:
    """Room for one head on the device, shared by the teachers of a run: they take turns.

    Args:
        device: where heads are used; on the CPU nothing is copied.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._guest: HostedHead | None = None
        self._rows: Tensor | None = None

    def bring(self, head: HostedHead) -> Tensor:
        """The head's rows on the device, once whoever was there has left."""
        if self._guest is not head or self._rows is None:
            self._guest, self._rows = head, None
            self._rows = head.rows.to(self.device, non_blocking=True)
        return self._rows

    def vacate(self) -> None:
        """Nobody is there."""
        self._guest = self._rows = None


class HostedHead:
    """A `TeacherHead` that lies in host memory and comes to the device when it is asked for.

    Args:
        rows: this rank's rows, [V / tp_size, H].
        slot: where it goes.
    """

    def __init__(self, rows: Tensor, slot: HeadSlot) -> None:
        self.rows = rows.pin_memory() if torch.cuda.is_available() else rows
        self.slot = slot

    def shard(self) -> Tensor:
        return self.slot.bring(self)

    def renew(self, rows: Tensor) -> None:
        """Takes other values, of the same shape; what is on the device is given up."""
        self.rows.copy_(rows)
        self.slot.vacate()


class ModelHead:
    """A `TeacherHead` that is part of a teacher's own model on this rank, and costs nothing more.

    Args:
        rows: a view of the model's head.
    """

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def shard(self) -> Tensor:
        return self.rows


def vocab_rows_of(layout: Layout, rank: int, vocab_rows: int) -> range:
    """The rows of embedding and head that a rank holds, of `vocab_rows` in all."""
    width = vocab_rows // layout.parallel.tensor
    first = layout.coordinates(rank).tp * width
    return range(first, first + width)


def teacher_head(
    own_rows: Tensor | None,
    own_range: range,
    wanted: range,
    path: str,
    arch: ModelArch,
    dtype: torch.dtype,
    slot: HeadSlot,
    apart: bool = False,
) -> ModelHead | HostedHead:
    """The head for the rows that the student's partition gives this rank.

    It is the model's own where the teacher's layout puts those rows on this rank, else they are
    read from the teacher's directory.

    Args:
        own_rows: the model's head on this rank; None on a rank without.
        own_range: the rows that it has.
        wanted: the rows that the student's head has on this rank; empty on a rank without.
        path: the teacher's directory, of either format; its files have been verified.
        dtype: of the teacher.
        apart: the head must outlast the model's stay on the device: its own rows are copied.
    """
    if own_rows is not None and own_range.start <= wanted.start and wanted.stop <= own_range.stop:
        own = own_rows[wanted.start - own_range.start : wanted.stop - own_range.start].detach()
        return HostedHead(own.to("cpu", copy=True), slot) if apart else ModelHead(own)
    rows = load_vocab_rows(open_weights(path), arch, wanted.start, wanted.stop)
    return HostedHead(rows.to(dtype), slot)
