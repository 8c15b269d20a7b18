"""What makes weights a model that can be used: config.json, tokenizer, chat template and the like.

Everything that lies beside the weights goes along with them, so that a file of a kind nobody
thought of is not lost; only weights and code stay behind.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch

CONFIG = "config.json"

# Weights of every framework with their indices, pickles, and code, which is never executed.
_LEFT_BEHIND = re.compile(
    r"""\.(
        (safetensors|bin|pt|pth|ckpt|gguf|ggml|h5|msgpack|onnx|onnx_data|ot|npz|tflite|pkl|pickle)
        (\.index(\.\w+)?\.json)?
      | py | pyc
    )$""",
    re.VERBOSE | re.IGNORECASE,
)
_MANIFEST = "SHA256SUMS"  # the copy gets its own


def companions(source: Path) -> list[str]:
    """Names of the files that go along, relative to `source`, in sub-directories too; sorted.

    Weights of any format and their indices, code, manifests and hidden files stay behind. A link to
    a file counts as the file, a link to a directory as nothing.
    """
    return sorted(_walk(source, ""))


def _walk(directory: Path, prefix: str) -> Iterator[str]:
    with os.scandir(directory) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False):
                yield from _walk(directory / entry.name, f"{prefix}{entry.name}/")
            elif (
                entry.is_file()
                and entry.name != _MANIFEST
                and _LEFT_BEHIND.search(entry.name) is None
            ):
                yield prefix + entry.name


def companion_bytes(source: Path) -> int:
    """Bytes of all companions."""
    return sum((source / name).stat().st_size for name in companions(source))


def copy_companions(source: Path, dst: Path) -> None:
    """Copies the companions, byte for byte, into the existing directory `dst`."""
    for name in companions(source):
        file = dst / name
        file.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, file)


def set_config_dtype(directory: Path, dtype: torch.dtype) -> None:
    """Makes config.json say that the weights are `dtype`; a file that says so already is kept."""
    file = directory / CONFIG
    config = json.loads(file.read_text(encoding="utf-8"))
    # transformers 4 writes torch_dtype and 5 dtype; the source's spelling is kept.
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]
    said = str(dtype).removeprefix("torch.")
    if any(config.get(key) != said for key in keys):
        write_json(file, config | dict.fromkeys(keys, said))


def write_json(file: Path, content: object, *, sort_keys: bool = False) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False, sort_keys=sort_keys)
    file.write_text(text + "\n", encoding="utf-8")
