"""Writes a Hugging Face directory, one tensor at a time."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from megaopd.errors import CheckpointError
from megaopd.models.arch import ModelArch, read_arch
from megaopd.models.families import hf_shapes
from megaopd.models.hf_io.reader import INDEX, WEIGHTS

# What, beside config.json and the weights, makes the directory a model that can be used.
_COMPANIONS = (
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template*",
    "additional_chat_templates",
)


class HFWriter:
    """Writes a Hugging Face directory that `from_pretrained` loads, one tensor at a time.

    A context manager: `add` every tensor inside, and leaving it completes the directory. Until then
    all is written to a hidden sibling of `dst`, which disappears if an error leaves the context; at
    the end it is synced to disk and renamed, so `dst` is never half a model.

    Args:
        dst: directory to write.
        source_dir: directory of the model that the weights came from: its config.json, with the
            dtype written, its generation configuration, tokenizer and chat template go along.
        arch: the architecture, which must be that of `source_dir`.
        max_shard_bytes: a file is closed before it exceeds this; so much is held in memory.
        overwrite: replace `dst` if it is a model directory. It is moved aside and deleted only when
            the new one is in place.

    Raises:
        CheckpointError: `dst` exists or cannot be written, or `source_dir` holds another
            architecture.
    """

    def __init__(
        self,
        dst: str | Path,
        source_dir: str | Path,
        arch: ModelArch,
        max_shard_bytes: int = 5_000_000_000,
        overwrite: bool = False,
    ) -> None:
        self.dst, self.source = Path(dst).resolve(), Path(source_dir)
        _check_replaceable(self.dst, overwrite)
        if read_arch(self.source) != arch:
            raise CheckpointError(
                str(self.source), "config.json is of another architecture", "give the model's own"
            )
        self.max_shard_bytes = max_shard_bytes
        self._missing = hf_shapes(arch)
        self._tmp = self.dst.with_name(f".{self.dst.name}.{uuid.uuid4().hex[:8]}.partial")
        self._shard: dict[str, Tensor] = {}
        self._shard_bytes = 0
        self._shards: list[list[str]] = []
        self._total_bytes = 0
        self._dtype: torch.dtype | None = None

    def __enter__(self) -> HFWriter:
        try:
            self._tmp.mkdir(parents=True)
        except OSError as error:
            raise self._unwritable(error) from None
        return self

    def __exit__(
        self,
        error_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            if error_type is None:
                self._finish()
        except OSError as failure:
            raise self._unwritable(failure) from None
        finally:
            shutil.rmtree(self._tmp, ignore_errors=True)

    def _unwritable(self, error: Exception) -> CheckpointError:
        return CheckpointError(
            str(self.dst), f"cannot be written ({error})", "check the disk and the permissions"
        )

    def add(self, name: str, tensor: Tensor) -> None:
        """Takes a copy of one whole tensor, from any device; the order is the order in the files.

        Raises:
            CheckpointError: the model has no such tensor, has had it already, or has it in another
                shape or dtype than the others; or the disk is full.
        """
        shape = self._missing.pop(name, None)
        dtype = self._dtype = self._dtype or tensor.dtype
        if shape != tensor.shape or tensor.dtype != dtype:
            due = (
                "nothing of that name is due" if shape is None else f"{list(shape)} {dtype} is due"
            )
            raise CheckpointError(
                f"{self.dst}: {name}",
                f"got {list(tensor.shape)} {tensor.dtype}, where {due}",
                "export each tensor of the architecture once, in one dtype",
            )
        size = tensor.numel() * tensor.element_size()
        if self._shard and self._shard_bytes + size > self.max_shard_bytes:
            self._flush()
        # One copy: the exporter may reuse the memory, and safetensors wants contiguous tensors.
        self._shard[name] = torch.empty(tensor.shape, dtype=dtype).copy_(tensor.detach())
        self._shard_bytes += size
        self._total_bytes += size

    def add_all(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        for name, tensor in tensors:
            self.add(name, tensor)

    def _flush(self) -> None:
        try:
            file = self._tmp / _numbered(len(self._shards) + 1)
            save_file(self._shard, file, metadata={"format": "pt"})
        except (SafetensorError, OSError) as error:
            raise self._unwritable(error) from None
        self._shards.append(list(self._shard))
        self._shard, self._shard_bytes = {}, 0

    def _finish(self) -> None:
        if self._missing:
            raise CheckpointError(
                str(self.dst),
                f"{len(self._missing)} tensors were not written, {min(self._missing)} among them",
                "export every tensor of the architecture",
            )
        self._flush()
        self._write_config()
        self._name_shards()
        for pattern in _COMPANIONS:
            for file in self.source.glob(pattern):
                if file.is_dir():
                    shutil.copytree(file, self._tmp / file.name, dirs_exist_ok=True)
                else:
                    shutil.copyfile(file, self._tmp / file.name)
        for path in (*self._tmp.rglob("*"), self._tmp):
            _fsync(path)
        self._replace()

    def _write_config(self) -> None:
        config = json.loads((self.source / "config.json").read_text(encoding="utf-8"))
        # transformers 4 writes torch_dtype and 5 dtype; the source's spelling is kept.
        for key in [k for k in ("dtype", "torch_dtype") if k in config] or ["dtype"]:
            config[key] = str(self._dtype).removeprefix("torch.")
        _write_json(self._tmp / "config.json", config)

    def _name_shards(self) -> None:
        total = len(self._shards)
        weight_map = {}
        # safetensors gives its files to their owner alone; the model is as readable as its config.
        mode = (self._tmp / "config.json").stat().st_mode
        for number, names in enumerate(self._shards, start=1):
            file = self._tmp / _numbered(number)
            file.chmod(mode)
            final = WEIGHTS if total == 1 else f"model-{number:05d}-of-{total:05d}.safetensors"
            file.rename(self._tmp / final)
            weight_map.update(dict.fromkeys(names, final))
        if total > 1:
            metadata = {"total_size": self._total_bytes}
            _write_json(self._tmp / INDEX, {"metadata": metadata, "weight_map": weight_map})

    def _replace(self) -> None:
        old = None
        if self.dst.exists():
            old = self._tmp.with_suffix(".old")
            self.dst.rename(old)
        self._tmp.rename(self.dst)
        _fsync(self.dst.parent)
        if old is not None:
            shutil.rmtree(old)


def _check_replaceable(dst: Path, overwrite: bool) -> None:
    if not dst.exists() or (dst.is_dir() and not any(dst.iterdir())):
        return
    if not overwrite:
        raise CheckpointError(
            str(dst), "exists", "choose another directory, or ask to overwrite it"
        )
    if not (dst / "config.json").is_file():
        raise CheckpointError(
            str(dst), "is not a Hugging Face directory, so it is not replaced", "choose another"
        )


def _numbered(number: int) -> str:
    return f"shard-{number}.safetensors"


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
