"""Weights in portions: what is gathered and sent at a time, so that no place holds all of them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Bucket:
    """Some of a model's weights.

    Attributes:
        tensors: (Hugging Face name, full tensor) pairs, on the exporting rank's device.
        is_last: none comes after it.
    """

    tensors: tuple[tuple[str, Tensor], ...]
    is_last: bool

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for _, tensor in self.tensors)


def buckets(weights: Iterator[tuple[str, Tensor]], max_bytes: int) -> Iterator[Bucket]:
    """Cuts a stream of tensors into buckets, in order.

    Args:
        weights: (name, tensor) pairs; a bucket holds on to them.
        max_bytes: the most in a bucket; a tensor that is larger has one of its own.

    Yields:
        at least one bucket, if there is a tensor at all; the last one says that it is.
    """
    tensors: list[tuple[str, Tensor]] = []
    num_bytes = 0
    for name, tensor in weights:
        if tensors and num_bytes + tensor.nbytes > max_bytes:
            yield Bucket(tuple(tensors), is_last=False)
            tensors, num_bytes = [], 0
        tensors.append((name, tensor))
        num_bytes += tensor.nbytes
    if tensors:
        yield Bucket(tuple(tensors), is_last=True)


def on_host(tensor: Tensor) -> Tensor:
    """The tensor in host memory, contiguous, in a storage that holds nothing else.

    A tensor of the student may be a view of the memory of all its parameters, and what writes or
    pickles a view takes all of that along.
    """
    tensor = tensor.detach().cpu().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
