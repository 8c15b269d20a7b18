"""Adapters on one rank: what a layer computes is what its merged weight would; PEFT's names."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM

from megaopd.config import LoraConfig
from megaopd.errors import CheckpointError, ConfigError
from megaopd.models.arch import read_arch
from megaopd.models.families import FAMILIES
from megaopd.models.hf_io.adapter import AdapterReader, adapter_config, write_adapter
from megaopd.models.lora_layers import Adapter, adapt, adapters_of, base_only
from megaopd.models.lora_spec import (
    adapter_mappings,
    adapter_spec,
    check_lora,
    linear_layers,
    targets,
)
from megaopd.models.mapping import QKV, GatedMLP, Layout, ParamMapping, RowParallel
from tests.helpers.tiny_models import make_tiny_model

HIDDEN, RANK = 12, 3
CONFIG: Any = SimpleNamespace(sequence_parallel=False)
# 2 groups of 2 query heads, a key head and a value head of 4 features.
QKV_LAYOUT = QKV(num_heads=4, num_kv_heads=2, head_dim=4, cols=HIDDEN)
LAYOUTS: dict[str, tuple[Layout, tuple[str, ...], tuple[int, int]]] = {
    "qkv": (QKV_LAYOUT, ("q_proj", "k_proj", "v_proj"), (32, HIDDEN)),
    "gate and up": (GatedMLP(5, HIDDEN), ("gate_proj", "up_proj"), (10, HIDDEN)),
    "gate and up in one": (GatedMLP(5, HIDDEN, fused=True), ("gate_up_proj",), (10, HIDDEN)),
    "row": (RowParallel(HIDDEN, 7), ("o_proj",), (HIDDEN, 7)),
}


class OneRank:
    """A process group of one."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


class Linear(torch.nn.Module):
    """A layer as Megatron has them: it returns its output and no bias."""

    def __init__(self, out_features: int, in_features: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(out_features, in_features))

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return F.linear(x, self.weight), None


class NormedLinear(Linear):
    """As TransformerEngine's: the norm before the layer is part of it."""

    def __init__(self, out_features: int, in_features: int, zero_centered: bool) -> None:
        super().__init__(out_features, in_features)
        self.layer_norm_weight = torch.nn.Parameter(torch.rand(in_features))
        self.eps, self.zero_centered_gamma = 1e-3, zero_centered

    def normed(self, x: Tensor) -> Tensor:
        gamma = self.layer_norm_weight + float(self.zero_centered_gamma)
        return x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt() * gamma

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return F.linear(self.normed(x), self.weight), None


class GroupedLinear(torch.nn.Module):
    """As TransformerEngine's: the experts' tokens one after another."""

    def __init__(self, num_experts: int, out_features: int, in_features: int) -> None:
        super().__init__()
        for e in range(num_experts):
            weight = torch.nn.Parameter(torch.randn(out_features, in_features))
            self.register_parameter(f"weight{e}", weight)

    def forward(self, x: Tensor, m_splits: list[int]) -> tuple[Tensor, None]:
        parts = x.split(m_splits)
        out = [F.linear(p, getattr(self, f"weight{e}")) for e, p in enumerate(parts)]
        return torch.cat(out), None


def _adapter(
    name: str, weight: torch.nn.Parameter, lora: LoraConfig, expert: int | None = None
) -> Adapter:
    layout, layers, _ = LAYOUTS[name]
    hf = tuple(f"model.layers.0.{layer}.weight" for layer in layers)
    spec = adapter_spec(ParamMapping(f"layer{expert}.weight", hf, layout, expert), lora)
    assert spec is not None
    group: Any = OneRank()
    adapter = Adapter(spec, weight, lora.rank, lora.scale, CONFIG, group)
    for param in adapter.parameters():
        torch.nn.init.normal_(param)
    return adapter


def _by_hand(adapter: Adapter, name: str, lora: LoraConfig) -> Tensor:
    """W + s B A by Hugging Face layer, put together by the layout that loads weights."""
    layout, layers, _ = LAYOUTS[name]
    parts = list(layout.export([adapter.weight.detach()]))
    for i, layer in enumerate(layers):
        if layer in adapter.lora_A:
            # The B of a layer that is one tensor of Hugging Face's has that tensor's rows.
            delta = adapter.lora_B[layer].detach() @ adapter.lora_A[layer].detach()
            parts[i] = parts[i] + lora.scale * delta

    def read(index: int, rows: slice | None = None, cols: slice | None = None) -> Tensor:
        return parts[index][rows or slice(None), cols or slice(None)]

    from megaopd.models.mapping import Partition

    return layout.load(read, Partition(0, 1, 128))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layer_with_an_adapter_is_its_merged_weight(name: str, rslora: bool) -> None:
    lora = LoraConfig(rank=RANK, alpha=2.0, rslora=rslora)
    assert lora.scale == pytest.approx(2 / 3**0.5 if rslora else 2 / 3)
    layer = Linear(*LAYOUTS[name][2])
    adapter = _adapter(name, layer.weight, lora)
    adapt(layer, {"weight": adapter})
    x = torch.randn(5, 1, layer.weight.shape[1])
    expected = F.linear(x, _by_hand(adapter, name, lora))
    torch.testing.assert_close(layer(x)[0], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(adapter.merged(), _by_hand(adapter, name, lora))
    with base_only([layer]):
        assert layer(x)[0].equal(F.linear(x, layer.weight))
    assert not layer(x)[0].equal(F.linear(x, layer.weight))
    assert list(adapters_of([layer])) == ["layerNone.weight"]


@pytest.mark.parametrize("chosen", ["q_proj", "k_proj", "v_proj"])
def test_one_of_the_layers_that_are_fused(chosen: str) -> None:
    lora = LoraConfig(rank=RANK, alpha=3.0, targets=(chosen,))
    layer = Linear(*LAYOUTS["qkv"][2])
    adapter = _adapter("qkv", layer.weight, lora)
    assert list(adapter.lora_A) == [chosen]
    adapt(layer, {"weight": adapter})
    x = torch.randn(5, HIDDEN)
    expected = F.linear(x, _by_hand(adapter, "qkv", lora))
    torch.testing.assert_close(layer(x)[0], expected, rtol=1e-4, atol=1e-4)
    for part, before in zip(
        QKV_LAYOUT.export([layer(x)[0].t()]),
        QKV_LAYOUT.export([(x @ layer.weight.t()).t()]),
        strict=True,
    ):
        same = torch.allclose(part, before)
        changed = part.shape[0] == {"q_proj": 16}.get(chosen, 8)
        assert same or changed


@pytest.mark.parametrize("zero_centered", [False, True])
def test_a_layer_that_norms_its_input_first(zero_centered: bool) -> None:
    lora = LoraConfig(rank=RANK, alpha=3.0)
    layer = NormedLinear(*LAYOUTS["qkv"][2], zero_centered)
    adapter = _adapter("qkv", layer.weight, lora)
    adapt(layer, {"weight": adapter})
    x = torch.randn(5, 1, HIDDEN)
    expected = F.linear(layer.normed(x), adapter.merged())
    torch.testing.assert_close(layer(x)[0], expected, rtol=1e-4, atol=1e-4)


def test_experts_in_one_layer() -> None:
    lora = LoraConfig(rank=RANK, alpha=3.0)
    layer = GroupedLinear(3, *LAYOUTS["gate and up"][2])
    adapters = {
        f"weight{e}": _adapter("gate and up", getattr(layer, f"weight{e}"), lora, e)
        for e in range(3)
    }
    adapt(layer, adapters)
    x, counts = torch.randn(7, HIDDEN), [4, 0, 3]
    out, _ = layer(x, counts)
    expected = [
        F.linear(part, adapter.merged())
        for part, adapter in zip(x.split(counts), adapters.values(), strict=True)
    ]
    torch.testing.assert_close(out, torch.cat(expected), rtol=1e-4, atol=1e-4)
    out.sum().backward()
    assert not adapters["weight1"].lora_A["up_proj"].grad.any()  # it got no token
    assert adapters["weight2"].lora_A["up_proj"].grad.any()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_names_and_shapes_are_those_of_transformers_layers(family: str, tmp_path: Path) -> None:
    make_tiny_model(tmp_path, family, seed=0)
    arch, lora = read_arch(tmp_path), LoraConfig(rank=RANK)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    linear = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    adapted: dict[str, dict[str, tuple[int, ...]]] = {}
    for mapping in adapter_mappings(arch, lora).values():
        if mapping.expert is None:  # transformers 5 keeps experts in one tensor
            layer, _, kind = mapping.hf[0].removesuffix(".weight").rpartition(".")
            adapted.setdefault(layer, {})[kind] = mapping.layout.hf_shapes()[0]
    assert adapted.keys() == linear.keys() - {"lm_head"}
    for name, shapes in adapted.items():
        module = linear[name]
        assert shapes == {
            "lora_A": (RANK, module.in_features),
            "lora_B": (module.out_features, RANK),
        }
    assert targets(arch, lora) == linear_layers(arch)
    with pytest.raises(ConfigError, match="has no linear layer 'nothing'"):
        check_lora(arch, LoraConfig(targets=("nothing",)))


def test_the_files_are_pefts(tmp_path: Path) -> None:
    make_tiny_model(tmp_path / "base", "LlamaForCausalLM", seed=0, num_hidden_layers=1)
    arch, lora = read_arch(tmp_path / "base"), LoraConfig(rank=2, alpha=4, targets=("q_proj",))
    mappings = adapter_mappings(arch, lora)
    tensors = [(m.hf[0], torch.randn(m.layout.hf_shapes()[0])) for m in mappings.values()]
    config = adapter_config(lora, lora.targets, "base")
    write_adapter(tmp_path / "adapter", config, mappings.values(), tensors, torch.float32)
    said = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert {k: said[k] for k in ("peft_type", "task_type", "r", "lora_alpha", "bias")} == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 2,
        "lora_alpha": 4,
        "bias": "none",
    }
    assert said["target_modules"] == ["q_proj"]
    reader = AdapterReader(tmp_path / "adapter")
    reader.check(lora, mappings)
    for mapping, (_, tensor) in zip(mappings.values(), tensors, strict=True):
        assert reader.reader_of(mapping)(0).equal(tensor)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    stored = file.read_bytes()
    assert b'"base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"' in stored
    wider = LoraConfig(rank=2, alpha=4, targets=("q_proj", "v_proj"))
    others = adapter_mappings(arch, wider)
    with pytest.raises(CheckpointError, match="no such tensor; set student.lora.targets"):
        reader.check(wider, others)
    file.write_bytes(stored[:-1] + bytes([stored[-1] ^ 1]))
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors"):
        AdapterReader(tmp_path / "adapter")
    file.unlink()
    with pytest.raises(CheckpointError, match="no such file"):
        AdapterReader(tmp_path / "adapter")
