"""Sizes of published models, for planning before anything is downloaded."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from megaopd.errors import ConfigError
from megaopd.models.arch import ModelArch, read_arch
from megaopd.storage.steps import hf_directory


def _qwen3(
    layers: int, hidden: int, heads: int, kv_heads: int, ffn: int, **more: Any
) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": 128,
        "intermediate_size": ffn,
        "vocab_size": 151_936,
        "max_position_embeddings": 40_960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        **more,
    }


def _qwen3_moe(experts: int, top_k: int, expert_ffn: int, *sizes: int) -> dict[str, Any]:
    return _qwen3(
        *sizes,
        architectures=["Qwen3MoeForCausalLM"],
        num_experts=experts,
        num_experts_per_tok=top_k,
        moe_intermediate_size=expert_ffn,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
    )


def _llama3(layers: int, hidden: int, heads: int, ffn: int) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": ffn,
        "vocab_size": 128_256,
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
    }


# Name -> what matters of the model's config.json.
PRESETS: dict[str, dict[str, Any]] = {
    "Qwen3-0.6B": _qwen3(28, 1024, 16, 8, 3072, tie_word_embeddings=True),
    "Qwen3-1.7B": _qwen3(28, 2048, 16, 8, 6144, tie_word_embeddings=True),
    "Qwen3-4B": _qwen3(36, 2560, 32, 8, 9728, tie_word_embeddings=True),
    "Qwen3-8B": _qwen3(36, 4096, 32, 8, 12_288),
    "Qwen3-14B": _qwen3(40, 5120, 40, 8, 17_408),
    "Qwen3-32B": _qwen3(64, 5120, 64, 8, 25_600),
    "Qwen3-30B-A3B": _qwen3_moe(128, 8, 768, 48, 2048, 32, 4, 6144),
    "Qwen3-235B-A22B": _qwen3_moe(128, 8, 1536, 94, 4096, 64, 4, 12_288),
    "Llama-3.1-8B": _llama3(32, 4096, 32, 14_336),
    "Llama-3.1-70B": _llama3(80, 8192, 64, 28_672),
}


def find_arch(name: str, key: str) -> ModelArch:
    """The architecture of a directory of either format (its config.json is enough) or of a preset.

    A directory is looked for first; a path whose last part is a preset's name, such as
    `models/Qwen3-8B`, means the preset where there is no such directory.

    Args:
        key: the field that the name came from, for errors.

    Raises:
        ConfigError: neither a directory with a config.json nor a preset.
        CheckpointError: the config.json is not whole.
    """
    if name and (hf_directory(name) / "config.json").is_file():
        return read_arch(hf_directory(name))
    preset = PRESETS.get(Path(name).name) if name else None
    if preset is None:
        raise ConfigError(
            key,
            f"no config.json in {name!r}" if name else "not given",
            f"give a directory that has one, or one of {', '.join(PRESETS)}",
        )
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(preset), encoding="utf-8")
        return read_arch(folder)
