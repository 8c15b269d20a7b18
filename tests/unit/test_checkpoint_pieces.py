"""Runs of elements as blocks: what a rank owns of a tensor, under whatever layout."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from megaopd.checkpoint.keys import StoredParam
from megaopd.checkpoint.pieces import Piece, Place, StoredPieces, blocks_of_run, pieces
from megaopd.checkpoint.torch_dist import ChunkFile, write_metadata
from megaopd.errors import CheckpointError


@pytest.mark.parametrize("shape", [(7,), (3, 4), (1, 5), (2, 3, 4), (1, 1, 6), (2, 1, 3)])
def test_every_run_is_its_blocks_in_order(shape):
    numbers = torch.arange(math.prod(shape)).view(shape)
    for start, stop in itertools.combinations_with_replacement(range(math.prod(shape) + 1), 2):
        found, num_blocks = [], 0
        for offset, size in blocks_of_run(shape, start, stop):
            block = numbers[tuple(slice(o, o + n) for o, n in zip(offset, size, strict=True))]
            assert tuple(block.shape) == size
            found += block.flatten().tolist()
            num_blocks += 1
        assert found == list(range(start, stop))
        assert num_blocks <= 2 * len(shape) - 1


def place(key, global_shape, offset, shape, start=0, is_main=True, padded=False):
    return Place(StoredParam(key, global_shape, offset, shape), start, is_main, padded)


def write(directory, written):
    """A checkpoint of (pieces of a rank) by rank."""
    chunks = []
    for rank, own in enumerate(written):
        with ChunkFile(directory, rank, 0) as file:
            for piece in own:
                file.add(piece.block, piece.values)
        chunks += file.chunks
    write_metadata(directory, chunks)


def test_two_layouts(tmp_path):
    """Rows over two ranks whose shares end inside a row; read as columns over three."""
    whole = torch.randn(6, 5)
    written = []
    for rank, half in enumerate(whole.chunk(2)):
        flat = half.reshape(-1)
        here = [place("w", (6, 5), (3 * rank, 0), (3, 5))]
        for low, high in ((0, 7), (7, 15)):
            written.append(list(pieces("o.", here, flat[low:high], low, for_saving=True)))
    write(tmp_path, written)
    stored = StoredPieces(tmp_path)
    assert "o.w" in stored
    for first, width in ((0, 2), (2, 2), (4, 1)):
        out = torch.empty(6, width)
        here = [place("w", (6, 5), (0, first), (6, width))]
        for piece in pieces("o.", here, out.view(-1), for_saving=False):
            stored.fill(piece)
        assert torch.equal(out, whole[:, first : first + width])


def test_one_parameter_in_two_tensors():
    """A gate and an up projection side by side: a share reaches from one into the other."""
    both = [place("gate", (2, 3), (0, 0), (2, 3)), place("up", (2, 3), (0, 0), (2, 3), start=6)]
    found = list(pieces("", both, torch.arange(4, 9).float(), 4, for_saving=True))
    assert [(p.block.key, p.block.offset, p.values.tolist()) for p in found] == [
        ("gate", (1, 1), [4, 5]),
        ("up", (0, 0), [6, 7, 8]),
    ]


def test_replicas_are_read_and_not_stored():
    copy = [place("norm", (4,), (0,), (4,), is_main=False)]
    assert list(pieces("", copy, torch.zeros(4), for_saving=True)) == []
    assert len(list(pieces("", copy, torch.zeros(4), for_saving=False))) == 1


def test_a_vocabulary_with_another_padding(tmp_path):
    rows = torch.cat([torch.randn(5, 2), torch.zeros(3, 2)])
    write(tmp_path, [[Piece(StoredParam("e", (8, 2), (0, 0), (8, 2)), rows)]])
    stored = StoredPieces(tmp_path)
    for first, num in ((0, 6), (6, 6)):
        out = torch.full((num, 2), 7.0)
        block = StoredParam("e", (12, 2), (first, 0), (num, 2))
        stored.fill(Piece(block, out, padded=True))
        expected = torch.zeros(12, 2)
        expected[:8] = rows
        assert torch.equal(out, expected[first : first + num])


@pytest.mark.parametrize(
    ("block", "line"),
    [
        (StoredParam("x", (4,), (0,), (4,)), "no such tensor"),
        (StoredParam("w", (5,), (0,), (5,)), r"has shape \[4\], this run's has \[5\]"),
        (StoredParam("w", (4, 1), (0, 0), (4, 1)), r"has shape \[4\], this run's has \[4, 1\]"),
    ],
)
def test_of_another_run(tmp_path, block, line):
    write(tmp_path, [[Piece(StoredParam("w", (4,), (0,), (4,)), torch.ones(4))]])
    with pytest.raises(CheckpointError, match=line):
        StoredPieces(tmp_path).fill(Piece(block, torch.empty(block.shape)))


def test_holes(tmp_path):
    write(tmp_path, [[Piece(StoredParam("w", (4,), (0,), (3,)), torch.ones(3))]])
    with pytest.raises(CheckpointError, match=r"w: holds 3 of the 4 elements at \[0\]"):
        StoredPieces(tmp_path).fill(Piece(StoredParam("w", (4,), (0,), (4,)), torch.empty(4)))
