"""Saves a running model as a Megatron checkpoint that any layout can load.

Megatron-Core says where each rank's shards belong (`sharded_state_dict`), and its
`dist_checkpointing.load` reads what is written here. Its own `save` is not used: it writes from
processes that it starts, the death of one of which makes the others wait for ever, and from a copy
of all shards in host memory; here a rank writes one tensor after another and hashes it meanwhile.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedTensor,
    ShardedTensorFactory,
    is_main_replica,
)

from megaopd.checkpoint.keys import StoredParam, stored_params
from megaopd.checkpoint.torch_dist import ChunkFile, WrittenChunk, write_metadata
from megaopd.models.arch import ModelArch
from megaopd.models.build import HiddenGPTModel
from megaopd.models.hf_io.companions import companion_bytes, copy_companions, set_config_dtype
from megaopd.models.lora_layers import ADAPTERS, adapters_of
from megaopd.parallel.agreement import agreed
from megaopd.parallel.groups import ParallelGroups
from megaopd.storage.manifest import MANIFEST
from megaopd.storage.staged import StagedDirectory
from megaopd.storage.steps import hf_directory, step_directory, write_pointer

_COMPANIONS = "hf"
# TransformerEngine's, of scaling factors that these dtypes do not have.
_EXTRA_STATE = "_extra_state"
# What `.metadata`, the archives around the tensors and the small files take at most, per tensor.
_BYTES_PER_TENSOR = 4096


def save_model(
    chunks: Sequence[HiddenGPTModel],
    arch: ModelArch,
    groups: ParallelGroups,
    root: str | Path,
    step: int,
    source_dir: str | Path,
    *,
    overwrite: bool = False,
) -> Path:
    """Writes the weights as step `step` below `root`; collective over the world.

    LoRA adapters are merged into the weights. Each rank writes its shards into a file of its own.
    The step has its name only when all of it is on the disk; then the pointer is moved to it.

    Args:
        source_dir: the directory, of either format, that the model came from: config.json, the
            tokenizer and what else lies beside the weights goes along.
        overwrite: replace the step if it is there.

    Returns:
        The step's directory.

    Raises:
        ConfigError: the step is there already, or being written by another run.
        EnvironmentFault: the disk has no room.
        CheckpointError: the checkpoint cannot be written.
    """
    directory, source = step_directory(root, step), hf_directory(source_dir)
    dtype = chunks[0].config.params_dtype
    sizes = [math.prod(param.shape) for param in stored_params(arch).values()]
    staged = StagedDirectory(
        directory,
        overwrite=overwrite,
        needed_bytes=sum(sizes) * dtype.itemsize
        + len(sizes) * _BYTES_PER_TENSOR
        + companion_bytes(source),
        replaceable=lambda path: (path / MANIFEST).is_file(),
    )
    with _entered(staged):
        with agreed(), staged.reporting():
            written, digests = _write_shards(chunks, groups, staged.path)
        by_rank: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(by_rank, (written, digests))
        with agreed(), staged.reporting():
            if dist.get_rank() == 0:
                _check_complete(arch, [chunk for part, _ in by_rank for chunk in part])
                write_metadata(staged.path, [chunk for part, _ in by_rank for chunk in part])
                for name, digest in (item for _, part in by_rank for item in part.items()):
                    staged.digest(name, digest)
                (staged.path / _COMPANIONS).mkdir()
                copy_companions(source, staged.path / _COMPANIONS)
                set_config_dtype(staged.path / _COMPANIONS, dtype)
    with agreed(), staged.reporting():
        if dist.get_rank() == 0:
            write_pointer(root, step)
    return directory


@contextlib.contextmanager
def _entered(staged: StagedDirectory) -> Iterator[None]:
    """The directory is rank 0's; the others learn of what goes wrong at its ends."""
    is_main = dist.get_rank() == 0
    with agreed():
        if is_main:
            staged.__enter__()
    try:
        yield
    except BaseException as error:
        if is_main:
            staged.__exit__(type(error), error, error.__traceback__)
        raise
    with agreed():
        if is_main:
            staged.__exit__(None, None, None)


def _write_shards(
    chunks: Sequence[HiddenGPTModel], groups: ParallelGroups, path: Path
) -> tuple[list[WrittenChunk], dict[str, str]]:
    """Writes what this rank is the first to hold, one tensor at a time.

    Returns:
        Its chunks, and the SHA-256 of its file by name; nothing where the rank holds replicas only.
    """
    with groups.active():
        shards = [shard for chunk in chunks for shard in _shards(chunk, groups)]
    if not shards:
        return [], {}
    with ChunkFile(path, dist.get_rank(), 0) as file:
        for shard in shards:
            shape = (1,) * shard.prepend_axis_num + tuple(shard.local_shape)
            place = StoredParam(shard.key, shard.global_shape, shard.global_offset, shape)
            file.add(place, shard.data.detach().cpu())
    return file.chunks, {file.name: file.hexdigest()}


def _shards(chunk: HiddenGPTModel, groups: ParallelGroups) -> Iterator[ShardedTensor]:
    """The shards of which this rank has the main replica, as Megatron-Core places them."""
    state = chunk.sharded_state_dict(metadata={"dp_cp_group": groups.dp_cp})
    queue = [v for name, v in state.items() if _EXTRA_STATE not in name and ADAPTERS not in name]
    state.clear()  # of what is merged, one weight exists at a time
    adapters = {a.weight.data_ptr(): a for a in adapters_of([chunk]).values()}
    while queue:
        value = queue.pop(0)
        if adapter := adapters.pop(value.data.data_ptr(), None):
            value.data = adapter.merged().view_as(value.data)
        if isinstance(value, ShardedTensorFactory):  # such as a gate and up projection in one
            queue[:0] = nested_values(value.build())
        elif is_main_replica(value.replica_id):
            yield value
    names = [adapter.spec.base.megatron for adapter in adapters.values()]
    assert not names, f"saved without their adapters: {names}"


def _check_complete(arch: ModelArch, written: Sequence[WrittenChunk]) -> None:
    """Checks that the ranks together wrote every parameter, and wrote it once."""
    counts: dict[str, int] = dict.fromkeys((p.key for p in stored_params(arch).values()), 0)
    sizes = {}
    for chunk in written:
        counts[chunk.param.key] = counts.get(chunk.param.key, 0) + math.prod(chunk.param.shape)
        sizes[chunk.param.key] = math.prod(chunk.param.global_shape)
    for key, count in counts.items():
        assert count == sizes.get(key), f"{key}: {count} of {sizes.get(key)} elements written"
