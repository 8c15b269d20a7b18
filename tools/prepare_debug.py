"""Prepares the debug run (conf/debug.yaml): a tiny random teacher and student, their tokenizer, and
prompts. The same files every time, in seconds, from nothing but this program."""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from megaopd.errors import ConfigError, EnvironmentFault, run_cli

DEFAULT = ".cache/debug"
MARKER = "prepared.json"
VOCAB_SIZE = 512
# By directory: the seed of its weights, and its layers. The rest is the same for both.
MODELS = {"teacher": (1, 4), "student": (2, 2)}
NUM_PROMPTS = {"train": 256, "eval": 8}


def write_model(directory: Path, seed: int, num_layers: int) -> None:
    """A random Qwen3 model whose logits are far from uniform."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    config = Qwen3Config(
        hidden_size=64,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=128,
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        initializer_range=0.1,
        bos_token_id=None,
        pad_token_id=VOCAB_SIZE - 2,
        eos_token_id=VOCAB_SIZE - 1,
    )
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(config)
    # The row of pad would be zero, and a random student samples pad now and then: a norm of zeros
    # has a gradient of 1000.
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=config.initializer_range)
    model.save_pretrained(directory)


def write_tokenizer(directory: Path) -> None:
    """One token a byte; the ids above them, up to pad and end, are never in a prompt."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens += [f"<unused_{i}>" for i in range(VOCAB_SIZE - 2 - len(tokens))]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<pad>", "<eos>"])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>"
    ).save_pretrained(directory)


def write_prompts(file: Path, name: str, number: int) -> None:
    """Words of random letters; the answer is one that a random model gives now and then."""
    rng = random.Random(name)
    with file.open("w") as lines:
        for i in range(number):
            text = "".join(rng.choice("abcdefgh ") for _ in range(rng.randint(4, 16)))
            row = {"id": f"{name}-{i}", "prompt": f"say: {text}", "answer": rng.choice("abc")}
            lines.write(json.dumps(row) + "\n")


def prepare(target: Path) -> bool:
    """Writes everything to `target`, which is complete or not there; whether there was need to.

    Raises:
        ConfigError: the directory exists and is not this tool's.
        EnvironmentFault: it cannot be written.
    """
    recipe = {"version": 1, "models": MODELS, "prompts": NUM_PROMPTS, "vocab_size": VOCAB_SIZE}
    recipe = json.loads(json.dumps(recipe))
    if target.exists() and _recipe_of(target) == recipe:
        return False
    if target.exists() and (not target.is_dir() or (os.listdir(target) and not _recipe_of(target))):
        raise ConfigError("--out", f"{target} is not this tool's", "name another directory")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise EnvironmentFault(
            "--out", f"{target} cannot be written ({error.strerror})", "name another directory"
        ) from error
    try:
        for name, (seed, num_layers) in MODELS.items():
            write_model(partial / name, seed, num_layers)
            write_tokenizer(partial / name)
        for name, number in NUM_PROMPTS.items():
            write_prompts(partial / f"{name}.jsonl", name, number)
        (partial / MARKER).write_text(json.dumps(recipe))
        partial.chmod(0o755)
        if target.exists():
            shutil.rmtree(target)
        try:
            partial.rename(target)
        except OSError:
            # Another process was quicker with the same.
            if _recipe_of(target) != recipe:
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return True


def _recipe_of(target: Path) -> object:
    """What a directory was made from, None where this tool did not make it."""
    marker = target / MARKER
    return json.loads(marker.read_text()) if marker.is_file() else None


def main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description="Makes the models and prompts of conf/debug.yaml; what is there is left alone."
    )
    parser.add_argument(
        "--out", type=Path, default=Path(DEFAULT), metavar="DIR", help=f"directory ({DEFAULT})"
    )
    args = parser.parse_args(argv)
    made = prepare(args.out)
    print(f"{args.out}: {'made' if made else 'is there already'}")


if __name__ == "__main__":
    run_cli(main, sys.argv[1:])
