"""Our table against mbridge's own, for the families that it has: names, and values bit by bit.

mbridge joins Hugging Face tensors to whole Megatron parameters and cuts those for tensor
parallelism; on the way back it merges and splits. Each of the four is compared with our layouts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig

# megaopd first: it lets megatron be imported where there is no CUDA.
from megaopd.models.arch import ModelArch, read_arch  # isort: split

from megaopd.models.families import FAMILIES, param_mappings
from megaopd.models.mapping import (
    ParamMapping,
    Partition,
    Replicated,
    RowParallel,
    canonical_name,
    padded_vocab_size,
)
from tests.helpers.tiny_models import make_tiny_model

mbridge = pytest.importorskip(
    "mbridge", reason="mbridge 0.15.1 needs megatron-core 0.16", exc_type=ImportError
)

from mbridge.core.parallel_states import ParallelStates  # noqa: E402
from mbridge.models import (  # noqa: E402
    Gemma3Bridge,
    Glm4VLBridgeDense,
    LLaMABridge,
    Qwen2Bridge,
    Qwen3Bridge,
    Qwen3MoEBridge,
)


class Glm4Bridge(Glm4VLBridgeDense):
    """mbridge has GLM-4 0414 as the language model of GLM-4.1V."""

    def _build_config(self) -> Any:
        return self._build_base_config()


class Gemma3TextBridge(Gemma3Bridge):
    """mbridge has Gemma 3 as the language model of its multimodal one."""

    def _build_config(self) -> Any:
        self.hf_config.text_config = self.hf_config
        return self._build_base_config(rope_local_base_freq=10_000.0)


# Our name of a parameter -> mbridge's, which is TransformerEngine's.
FUSED_NORMS = {
    ".input_layernorm.weight": ".self_attention.linear_qkv.layer_norm_weight",
    ".pre_mlp_layernorm.weight": ".mlp.linear_fc1.layer_norm_weight",
}


def _experts_last(name: str) -> str:
    """mlp.experts.3.linear_fc1.weight -> mlp.experts.linear_fc1.weight3"""
    head, found, tail = name.partition(".mlp.experts.")
    if not found:
        return name
    expert, linear = tail.split(".", 1)
    return f"{head}.mlp.experts.{linear}{expert}"


@dataclass(frozen=True)
class Peer:
    """mbridge's counterpart of a family.

    Attributes:
        renamed: ends of our names -> ends of mbridge's.
        prefix: of mbridge's Megatron names, and what its Hugging Face names have in place of ours.
        vocab_size: one that mbridge pads as we do, or needs no padding where it does not.
    """

    bridge: type
    renamed: dict[str, str] = field(default_factory=lambda: FUSED_NORMS)
    prefix: str = ""
    hf_prefix: tuple[str, str] = ("", "")
    vocab_size: int = 509

    def name(self, ours: str) -> str:
        for mine, theirs in self.renamed.items():
            if ours.startswith("decoder.layers.") and ours.endswith(mine):
                ours = ours.removesuffix(mine) + theirs
        return self.prefix + _experts_last(ours)


PEERS = {
    "LlamaForCausalLM": Peer(LLaMABridge),
    "Qwen2ForCausalLM": Peer(Qwen2Bridge),
    "Qwen3ForCausalLM": Peer(Qwen3Bridge),
    # The norm before a mixture of experts is not fused with anything.
    "Qwen3MoeForCausalLM": Peer(
        Qwen3MoEBridge,
        {k: v for k, v in FUSED_NORMS.items() if "pre_mlp" not in k},
    ),
    "Glm4ForCausalLM": Peer(
        Glm4Bridge,
        FUSED_NORMS
        | {
            ".self_attn_bda.norm.weight": ".post_self_attn_layernorm.weight",
            ".mlp_bda.norm.weight": ".post_mlp_layernorm.weight",
        },
        prefix="language_model.",
        hf_prefix=("model.language_model.", "model."),
        vocab_size=512,
    ),
    "Gemma3ForCausalLM": Peer(
        Gemma3TextBridge,
        FUSED_NORMS
        | {
            ".self_attn_bda.norm.weight": ".post_attention_layernorm.weight",
            ".mlp_bda.norm.weight": ".post_feedforward_layernorm.weight",
        },
        prefix="language_model.",
        hf_prefix=("language_model.model.", "model."),
        vocab_size=512,
    ),
}
ABSENT = {"MistralForCausalLM", "GlmForCausalLM"}


def test_every_family_has_a_peer_or_is_absent_from_mbridge():
    assert FAMILIES.keys() == PEERS.keys() | ABSENT
    known = set(mbridge.AutoBridge.list_supported_models())
    assert not known & {"mistral", "glm", "glm4"}


def _bridge(peer: Peer, path: Any, arch: ModelArch, tp_size: int) -> Any:
    # Tied models write into a table of the class, and so into other models': here it is a copy.
    own = {"_DIRECT_MAPPING": dict(peer.bridge._DIRECT_MAPPING)}
    bridge_class = type(peer.bridge.__name__, (peer.bridge,), own)
    multiple = 128 * tp_size if arch.vocab_size % 128 else None
    bridge = bridge_class(
        AutoConfig.from_pretrained(path),
        dtype=torch.float32,
        parallel_states=ParallelStates(tp_size=tp_size, etp_size=tp_size, vpp_size=None),
        make_vocab_size_divisible_by=multiple,
    )
    bridge.vocab_size = arch.vocab_size
    bridge.padded_vocab_size = padded_vocab_size(arch.vocab_size, tp_size)
    return bridge


def _reader(mapping: ParamMapping, tensors: dict[str, Tensor]) -> Callable[..., Tensor]:
    def read(index: int, rows: slice | None = None, cols: slice | None = None) -> Tensor:
        tensor = tensors[mapping.hf[index]]
        tensor = tensor if rows is None else tensor[rows]
        return tensor if cols is None else tensor[:, cols]

    return read


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("tp_size", [1, 2])
@pytest.mark.parametrize("family", PEERS)
def test_names_and_values_are_those_of_mbridge(tmp_path, family, tp_size, tied):
    peer = PEERS[family]
    path = make_tiny_model(
        tmp_path, family, vocab_size=peer.vocab_size, num_hidden_layers=2, tie_word_embeddings=tied
    )
    arch, tensors = read_arch(path), load_file(path / "model.safetensors")
    bridge = _bridge(peer, path, arch, tp_size)
    rows = padded_vocab_size(arch.vocab_size, tp_size)
    exported = {}
    for ours, mapping in param_mappings(arch).items():
        theirs = peer.name(ours)
        if not peer.prefix:
            assert canonical_name(theirs, range(arch.num_layers)) == ours
        hf_names = [
            n.replace(*peer.hf_prefix) for n in bridge._weight_name_mapping_mcore_to_hf(theirs)
        ]
        assert tuple(hf_names) == mapping.hf

        # From Hugging Face to the ranks.
        read = _reader(mapping, tensors)
        shards = [mapping.layout.load(read, Partition(r, tp_size, rows)) for r in range(tp_size)]
        whole = bridge._weight_to_mcore_format(theirs, [tensors[name] for name in mapping.hf])
        param = torch.nn.Parameter(torch.empty_like(shards[0]))
        cut = bridge._weight_split_across_tp(theirs, whole, param, tp_size)
        assert len(cut) == tp_size
        for mine, other in zip(shards, cut, strict=True):
            assert torch.equal(mine, other), ours

        # And back. Megatron's marks say how a parameter is sharded.
        if isinstance(mapping.layout, Replicated):
            merged = shards[0]
        else:
            param.tensor_model_parallel = True
            param.partition_dim = int(isinstance(mapping.layout, RowParallel))
            merged = bridge._weight_merge_across_tp(theirs, shards, param)
        names, values = bridge._weight_to_hf_format(theirs, merged)
        back = mapping.layout.export(shards)
        for name, value, mine in zip(names, values, back, strict=True):
            assert torch.equal(value, mine), name
            exported[name.replace(*peer.hf_prefix)] = value
    assert exported.keys() == tensors.keys()
    assert all(torch.equal(exported[name], tensors[name]) for name in tensors)
