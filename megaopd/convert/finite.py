"""Refuses weights that are not numbers, at the speed of memory."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from megaopd.errors import CheckpointError
from megaopd.models.hf_io import WeightSource
from megaopd.models.mapping import ParamMapping, Read


def check_finite(tensor: Tensor, where: str) -> Tensor:
    """Returns the tensor itself.

    Args:
        where: its name and place, for the error.

    Raises:
        CheckpointError: a value is NaN or infinite.
    """
    if tensor.numel():
        # Minimum and maximum carry NaN with them, and make no temporary of the tensor's size.
        low, high = torch.aminmax(tensor)
        if not (math.isfinite(low.item()) and math.isfinite(high.item())):
            wrong = tensor.numel() - int(torch.isfinite(tensor).sum())
            raise CheckpointError(
                where,
                f"{wrong} of {tensor.numel()} values are NaN or infinite",
                "take the weights from a sound checkpoint",
            )
    return tensor


def finite_reader(source: WeightSource, mapping: ParamMapping) -> Read:
    """`source.reader_of(mapping)`, which refuses what is not finite by its Hugging Face name."""
    read = source.reader_of(mapping)

    def checked(index: int, rows: slice | None = None, cols: slice | None = None) -> Tensor:
        return check_finite(read(index, rows, cols), source.where(mapping.hf[index]))

    return checked
