"""Tiny random Hugging Face models, with a tokenizer, as real directories on disk."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedConfig, PreTrainedTokenizerFast

PAD_TOKEN, EOS_TOKEN = "<pad>", "<eos>"

TINY_CONFIG: dict[str, Any] = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 128,
    "vocab_size": 512,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "initializer_range": 0.1,
}

# What a mixture of experts has besides; 2, 3 and 4 ranks divide an expert.
TINY_MOE: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "norm_topk_prob": True,
}

# What only models of one `model_type` have; Mistral's class has a window where none is given.
# Gemma 3 gets a window shorter than the tests' sequences, in every other layer, and a scale of the
# attention that is not the default's.
TINY_FIELDS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None},
    "gemma3_text": {
        "sliding_window": 4,
        "sliding_window_pattern": 2,
        "query_pre_attn_scalar": 24,
    },
}
WINDOW_ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 1_000.0}

# Sizes that 3 tensor-parallel ranks divide, with a vocabulary that nothing divides.
TP3_CONFIG: dict[str, Any] = {
    "hidden_size": 72,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "head_dim": 8,
    "intermediate_size": 96,
    "vocab_size": 509,
}

# Values of `rope_parameters`, as transformers 5 spells them.
ROPE_VARIANTS: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 10_000.0},
    "linear": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 500_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10_000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


def tiny_config(config_class: type[PreTrainedConfig], rope: str = "default") -> dict[str, Any]:
    """The fields of a tiny model's configuration, with an entry of `ROPE_VARIANTS`."""
    moe = TINY_MOE if hasattr(config_class, "moe_intermediate_size") else {}
    own = TINY_FIELDS.get(config_class.model_type, {})
    return TINY_CONFIG | moe | own | {"rope_parameters": rope_parameters(config_class, rope)}


def rope_parameters(config_class: type[PreTrainedConfig], rope: str) -> dict[str, Any]:
    """An entry of `ROPE_VARIANTS` as a class spells it: Gemma 3 has one by type of layer."""
    if config_class.model_type == "gemma3_text":
        return {"full_attention": dict(ROPE_VARIANTS[rope]), "sliding_attention": dict(WINDOW_ROPE)}
    return dict(ROPE_VARIANTS[rope])


def make_tiny_model(
    dst: str | Path,
    family: str = "Qwen3ForCausalLM",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    max_shard_size: str = "5GB",
    **overrides: Any,
) -> Path:
    """Writes a random model of `family`, with its tokenizer, to directory `dst` and returns it.

    Norm weights lie around 1 (around 0 where 1 is added to them) and biases around 0, neither
    exactly, so that a tensor which is left out or put in the wrong place changes the logits. The
    same arguments write the same bytes.

    Args:
        family: the name of a transformers class, such as "LlamaForCausalLM".
        max_shard_size: a size below the model's, such as "200KB", writes several safetensors files.
        **overrides: fields of the family's configuration, over `tiny_config`.
    """
    dst = Path(dst)
    model_class = getattr(transformers, family)
    fields = tiny_config(model_class.config_class) | overrides
    vocab_size = fields["vocab_size"]
    fields.update(bos_token_id=None, pad_token_id=vocab_size - 2, eos_token_id=vocab_size - 1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(model_class.config_class(**fields))
        with torch.no_grad():
            for name, param in model.named_parameters():
                if param.dim() == 1:
                    around_1 = "norm" in name and "Gemma" not in family
                    param.normal_(mean=float(around_1), std=0.2)
    model.to(dtype).save_pretrained(dst, max_shard_size=max_shard_size)
    tiny_tokenizer(vocab_size).save_pretrained(dst)
    return dst


def tiny_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Returns a byte-level BPE tokenizer of exactly `vocab_size` >= 258 tokens.

    The 256 bytes come first, then merged pairs of bytes; the last two ids are pad and eos.
    """
    num_merges = vocab_size - 258
    if num_merges < 0:
        raise ValueError(f"vocab_size {vocab_size}: 256 bytes, pad and eos need at least 258")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet(), key=lambda c: (not c.islower(), c))
    merges = list(itertools.islice(itertools.product(alphabet, repeat=2), num_merges))
    tokens = [*alphabet, *(a + b for a, b in merges)]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([PAD_TOKEN, EOS_TOKEN])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD_TOKEN, eos_token=EOS_TOKEN
    )
    fast.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    return fast


def edit_config(model_dir: str | Path, remove: tuple[str, ...] = (), **fields: Any) -> None:
    """Sets `fields` in the directory's config.json and removes the fields named in `remove`."""
    path = Path(model_dir) / "config.json"
    config = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({k: v for k, v in config.items() if k not in remove}, indent=2))
