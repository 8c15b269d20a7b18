"""Where a running model's parameters lie in a checkpoint, as Megatron-Core places its shards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from torch import Tensor

from megaopd.checkpoint.keys import StoredParam
from megaopd.checkpoint.pieces import Place
from megaopd.models.build import HiddenGPTModel
from megaopd.models.lora_layers import ADAPTERS, Adapter, adapters_of
from megaopd.parallel.groups import ParallelGroups

# TransformerEngine's, of scaling factors that bf16 and fp32 do not have.
EXTRA_STATE = "_extra_state"
ADAPTER_KEYS = "adapter."


def model_state(chunk: HiddenGPTModel, groups: ParallelGroups) -> list[Any]:
    """Megatron-Core's sharded tensors of a chunk, and factories of some, without LoRA adapters'."""
    state = chunk.sharded_state_dict(metadata={"dp_cp_group": groups.dp_cp})
    return [v for name, v in state.items() if EXTRA_STATE not in name and ADAPTERS not in name]


def stored_param(shard: ShardedTensor) -> StoredParam:
    """The place of a sharded tensor."""
    shape = (1,) * shard.prepend_axis_num + tuple(shard.local_shape)
    return StoredParam(shard.key, shard.global_shape, shard.global_offset, shape)


def built(value: Any) -> Iterator[ShardedTensor]:
    """The sharded tensors of what `model_state` lists, such as a gate and up projection in one."""
    if isinstance(value, ShardedTensorFactory):
        for part in nested_values(value.build()):
            yield from built(part)
    else:
        yield value


class ParameterPlaces:
    """The places of all parameters of a model, those of LoRA adapters too.

    Made while the weights are on the device; it holds no tensor.

    Args:
        chunks: this rank's chunks of the model.
        groups: of its layout.
    """

    def __init__(self, chunks: Sequence[HiddenGPTModel], groups: ParallelGroups) -> None:
        self._places: dict[int, list[Place]] = {}
        self.adapters: set[int] = set()
        by_memory = {p.data_ptr(): p for chunk in chunks for p in chunk.parameters()}
        with groups.active():
            for chunk in chunks:
                for value in model_state(chunk, groups):
                    param = by_memory[value.data.data_ptr()]
                    self._places[id(param)] = [
                        _place(shard, param, value.allow_shape_mismatch)
                        if isinstance(value, ShardedTensor)
                        else _place(shard, param, False)
                        for shard in built(value)
                    ]
        for adapter in adapters_of(chunks).values():
            for name, param in adapter.named_shards():
                is_a = any(param is a for a in adapter.lora_A.values())
                self._places[id(param)] = [_adapter_place(name, is_a, param, adapter)]
                self.adapters.add(id(param))

    def __getitem__(self, param: Tensor) -> list[Place]:
        return self._places[id(param)]


def _place(shard: ShardedTensor, param: Tensor, padded: bool) -> Place:
    start = (shard.data.data_ptr() - param.data_ptr()) // param.element_size()
    assert shard.data.is_contiguous(), f"{shard.key}: a shard in pieces"
    # The last one counts the ranks that hold the same weights, which share the state out.
    *replica, _ = shard.replica_id
    return Place(stored_param(shard), start, not any(replica), padded)


def _adapter_place(name: str, is_a: bool, param: Tensor, adapter: Adapter) -> Place:
    """Megatron-Core does not know adapters: the ranks share A's columns or B's rows, see
    `megaopd.models.lora_layers`, and hold the other one whole."""
    group, shape = adapter.group, tuple(param.shape)
    split = is_a == adapter.spec.splits_input
    sizes, offset, dim = list(shape), [0, 0], int(is_a)
    if split:
        sizes[dim] *= group.size()
        offset[dim] = group.rank() * shape[dim]
    block = StoredParam(ADAPTER_KEYS + name, tuple(sizes), tuple(offset), shape)
    return Place(block, 0, split or group.rank() == 0)
