"""LoRA adapters as PEFT stores them: adapter_config.json and adapter_model.safetensors.

The layout is that of PEFT's documentation ("PEFT checkpoint format"): every tensor is called
base_model.model.LAYER.lora_A.weight or ...lora_B.weight, with LAYER the linear layer's name in the
model, A [r, in] and B [out, r].
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megaopd.config_lora import LoraConfig
from megaopd.errors import CheckpointError
from megaopd.models.hf_io.companions import write_json
from megaopd.models.hf_io.header import COPY_AGAIN, MAX_JSON_BYTES, parse_json, read_header
from megaopd.models.hf_io.reader import DTYPES
from megaopd.models.hf_io.writer import Shard, ShardFile
from megaopd.models.mapping import ParamMapping, Read
from megaopd.storage.manifest import MANIFEST, verify_manifest
from megaopd.storage.staged import StagedDirectory

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."

# What else an adapter of PEFT can have -> the values that mean that it has not.
_WITHOUT: dict[str, tuple[Any, ...]] = {
    "bias": (None, "none"),
    "use_dora": (None, False),
    "modules_to_save": (None, []),
    "layers_to_transform": (None, []),
    "layer_replication": (None, []),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "target_parameters": (None, []),
    "trainable_token_indices": (None, [], {}),
    "lora_bias": (None, False),
    "alora_invocation_tokens": (None, []),
    "use_qalora": (None, False),
    "use_bdlora": (None, False),
    "fan_in_fan_out": (None, False),
    # Others, PiSSA's say, have changed the base.
    "init_lora_weights": (None, True, False, "gaussian", "eva", "orthogonal"),
}


def is_adapter(path: Path) -> bool:
    """Whether `path` is a directory that `write_adapter` may replace."""
    return (path / CONFIG).is_file()


def adapter_config(lora: LoraConfig, targets: Sequence[str], base: str) -> dict[str, Any]:
    """What adapter_config.json says.

    Args:
        targets: the last parts of the adapted layers' names.
        base: name or directory of the model that is adapted.
    """
    alpha = int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha
    return {
        "alpha_pattern": {},
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": lora.rank,
        "rank_pattern": {},
        "target_modules": sorted(targets),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": lora.rslora,
    }


def write_adapter(
    dst: str | Path,
    config: Mapping[str, Any],
    mappings: Iterable[ParamMapping],
    tensors: Iterable[tuple[str, Tensor]],
    dtype: torch.dtype,
) -> None:
    """Writes an adapter, replacing one that is there; it appears when it is complete.

    Args:
        config: of `adapter_config`.
        mappings: of every A and B.
        tensors: (name inside the model, full tensor) in the same order, all of `dtype`.

    Raises:
        CheckpointError: a tensor is not the one that is due, or the file cannot be written.
        ConfigError: `dst` is there and no adapter.
        EnvironmentFault: the disk has no room.
    """
    shapes = {
        f"{_PREFIX}{name}": (dtype, shape)
        for mapping in mappings
        for name, shape in zip(mapping.hf, mapping.layout.hf_shapes(), strict=True)
    }
    shard = Shard(WEIGHTS, shapes)
    staged = StagedDirectory(dst, overwrite=True, needed_bytes=shard.nbytes, replaceable=is_adapter)
    with staged:
        file = ShardFile(staged.path, shard)
        with file:
            for name, tensor in tensors:
                file.add(f"{_PREFIX}{name}", tensor)
        if file.due:
            raise CheckpointError(
                str(dst), f"{file.due[0][0]} was not written", "export every adapter"
            )
        staged.digest(WEIGHTS, file.hexdigest())
        write_json(staged.path / CONFIG, config, sort_keys=True)


class AdapterReader:
    """An adapter's directory.

    Args:
        path: directory with adapter_config.json and adapter_model.safetensors.

    Raises:
        CheckpointError: a file is missing, damaged or not one.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self._read_config()
        if not (self.path / WEIGHTS).is_file():
            raise CheckpointError(
                str(self.path / WEIGHTS), "no such file", "save the adapter as safetensors"
            )
        self._stored = read_header(self.path / WEIGHTS)
        if (self.path / MANIFEST).exists():
            verify_manifest(self.path)

    def _read_config(self) -> dict[str, Any]:
        file = self.path / CONFIG
        try:
            if file.stat().st_size > MAX_JSON_BYTES:
                raise ValueError(f"{file.stat().st_size} bytes")
            config = parse_json(file.read_bytes())
            if not isinstance(config, dict):
                raise ValueError("no JSON object")
        except FileNotFoundError:
            raise CheckpointError(
                str(file), "no such file", "give the directory of an adapter in PEFT's format"
            ) from None
        except (OSError, ValueError) as error:
            raise CheckpointError(str(file), f"cannot be read ({error})", COPY_AGAIN) from None
        return config

    def check(self, lora: LoraConfig, mappings: Mapping[str, ParamMapping]) -> None:
        """Checks that the adapter is one of this kind, on these layers.

        Raises:
            CheckpointError: another kind of adapter, rank or scale, or other layers.
        """
        where, config = str(self.path / CONFIG), self.config
        if config.get("peft_type") != "LORA":
            found = f"peft_type {json.dumps(config.get('peft_type'))}"
            raise CheckpointError(where, found, "give a LoRA adapter")
        for key, values in _WITHOUT.items():
            if config.get(key) not in values:
                raise CheckpointError(
                    where,
                    f"{key} is {json.dumps(config[key])[:80]}",
                    "merge the adapter into its base with peft and start from the result",
                )
        for key, ours, name in (
            ("r", lora.rank, "rank"),
            ("lora_alpha", lora.alpha, "alpha"),
            ("use_rslora", lora.rslora, "rslora"),
        ):
            if config.get(key, False) != ours:
                raise CheckpointError(
                    where,
                    f"{key} is {json.dumps(config.get(key))}, student.lora.{name} "
                    f"{json.dumps(ours)}",
                    f"set student.lora.{name} as the adapter has it",
                )
        self._check_tensors(mappings)

    def _check_tensors(self, mappings: Mapping[str, ParamMapping]) -> None:
        shapes = {
            f"{_PREFIX}{name}": shape
            for m in mappings.values()
            for name, shape in zip(m.hf, m.layout.hf_shapes(), strict=True)
        }
        stored, where = self._stored, str(self.path / WEIGHTS)
        for name, shape in shapes.items():
            if name not in stored:
                raise CheckpointError(
                    f"{where}: {name}",
                    "no such tensor",
                    "set student.lora.targets to the layers that the adapter is on",
                )
            if stored[name].shape != shape:
                found = (
                    f"has shape {list(stored[name].shape)}, the student's would be {list(shape)}"
                )
                raise CheckpointError(f"{where}: {name}", found, "give an adapter of this model")
            if stored[name].dtype not in DTYPES:
                found = f"has dtype {stored[name].dtype}"
                raise CheckpointError(
                    f"{where}: {name}", found, f"save it in one of {', '.join(DTYPES)}"
                )
        for name in stored:
            if name not in shapes:
                raise CheckpointError(
                    f"{where}: {name}",
                    "is on a layer that gets no adapter",
                    "set student.lora.targets to the layers that the adapter is on",
                )

    def reader_of(self, mapping: ParamMapping) -> Read:
        """Reads slices of the tensors of a mapping."""

        def read(index: int, rows: slice | None = None, cols: slice | None = None) -> Tensor:
            whole = self._whole(f"{_PREFIX}{mapping.hf[index]}")
            return whole[rows or slice(None), cols or slice(None)]

        return read

    def _whole(self, name: str) -> Tensor:
        """A tensor after `check`; they are small."""
        stored, file = self._stored[name], self.path / WEIGHTS
        try:
            with file.open("rb") as stream:
                stream.seek(stored.start)
                data = bytearray(stream.read(stored.stop - stored.start))
            return torch.frombuffer(data, dtype=DTYPES[stored.dtype]).view(stored.shape)
        except (OSError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"{file}: {name}", f"cannot be read ({error})", COPY_AGAIN
            ) from None
