"""The tensors of a Hugging Face directory, read slice by slice."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megaopd.errors import CheckpointError
from megaopd.models.mapping import ParamMapping, Read, Shape

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
COPY_AGAIN = "copy or download the checkpoint again"

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


# All experts of a layer in one tensor, and the projections whose rows follow one another in it.
_FUSED_EXPERTS = re.compile(r"^(.+\.mlp\.experts)\.(gate_up_proj|down_proj)$")
_PROJECTIONS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}


@dataclass(frozen=True)
class _ExpertPart:
    """One expert's projection inside a fused tensor: `shape[0]` rows of its matrix `expert`."""

    fused: str
    expert: int
    first_row: int
    shape: Shape


class HFReader:
    """The tensors of a Hugging Face directory, by name; files are opened when they are needed.

    transformers 5 fuses the experts of a layer into gate_up_proj [experts, 2 x features, hidden]
    and down_proj [experts, hidden, features]. It saves them apart, as they were before, unless told
    otherwise; where a file has them fused they too are read under the names of single experts.

    Args:
        path: directory with model.safetensors, or with model.safetensors.index.json and its files.

    Raises:
        CheckpointError: there are no safetensors, or the index is not one.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._files: dict[str, Any] = {}
        self._names_in: dict[str, frozenset[str]] = {}
        self._file_of = self._locate()
        self._parts = self._expert_parts()

    def _locate(self) -> dict[str, str]:
        """Tensor name -> file name."""
        if (self.path / WEIGHTS).exists():
            self._open(WEIGHTS)
            return dict.fromkeys(self._names_in[WEIGHTS], WEIGHTS)
        index = self.path / INDEX
        if index.exists():
            return _read_index(index)
        pickled = sorted(self.path.glob("*.bin"))
        if pickled:
            raise CheckpointError(
                str(self.path),
                f"has {pickled[0].name} but no safetensors",
                "load it with transformers and save_pretrained it, which writes safetensors",
            )
        raise CheckpointError(
            str(self.path), f"has neither {WEIGHTS} nor {INDEX}", "give a Hugging Face directory"
        )

    def _open(self, name: str, tensor: str = "") -> Any:
        """Returns the open file; `tensor` is what it is opened for."""
        if name not in self._files:
            file = self.path / name
            try:
                opened = safe_open(file, framework="pt")
            except FileNotFoundError:
                raise CheckpointError(
                    str(file), f"no such file, though {INDEX} places {tensor} in it", COPY_AGAIN
                ) from None
            except (SafetensorError, OSError) as error:
                raise CheckpointError(
                    str(file), f"truncated or corrupt ({error})", COPY_AGAIN
                ) from None
            self._files[name] = opened
            self._names_in[name] = frozenset(opened.keys())
        return self._files[name]

    def _expert_parts(self) -> dict[str, _ExpertPart]:
        """Single expert's name -> its part of a fused tensor."""
        parts = {}
        for fused in self._file_of:
            if (match := _FUSED_EXPERTS.match(fused)) is None:
                continue
            experts, projections = match[1], _PROJECTIONS[match[2]]
            shape = self._slice(fused).get_shape()
            if len(shape) != 3 or shape[1] % len(projections):
                continue  # it stays what it is: a tensor that no model has
            rows = shape[1] // len(projections)
            for expert in range(shape[0]):
                for i, projection in enumerate(projections):
                    parts[f"{experts}.{expert}.{projection}.weight"] = _ExpertPart(
                        fused, expert, i * rows, (rows, shape[2])
                    )
        return parts

    def names(self) -> frozenset[str]:
        fused = {part.fused for part in self._parts.values()}
        return frozenset((self._file_of.keys() - fused) | self._parts.keys())

    def where(self, name: str) -> str:
        """The tensor's place, for an error message."""
        stored = self._parts[name].fused if name in self._parts else name
        file = self._file_of.get(stored, WEIGHTS if WEIGHTS in self._files else INDEX)
        return f"{self.path / file}: {name}"

    def _slice(self, name: str) -> Any:
        if name not in self._file_of:
            raise CheckpointError(self.where(name), "no such tensor", COPY_AGAIN)
        file = self._file_of[name]
        opened = self._open(file, name)
        if name not in self._names_in[file]:
            raise CheckpointError(
                self.where(name), f"{INDEX} places the tensor here, but it is not", COPY_AGAIN
            )
        return opened.get_slice(name)

    def shape(self, name: str) -> Shape:
        if name in self._parts:
            return self._parts[name].shape
        return tuple(self._slice(name).get_shape())

    def dtype(self, name: str) -> torch.dtype:
        part = self._parts.get(name)
        stored = self._slice(part.fused if part else name).get_dtype()
        if stored not in _DTYPES:
            raise CheckpointError(
                self.where(name),
                f"has dtype {stored}",
                f"convert the weights to one of {', '.join(_DTYPES)}",
            )
        return _DTYPES[stored]

    def read(self, name: str, rows: slice | None = None, cols: slice | None = None) -> Tensor:
        """Returns a slice of the tensor; None takes the whole dim.

        The result is a view of the mapped file, not contiguous where `cols` is given; only what is
        touched is read from disk. It keeps the file mapped, and is lost when the file is changed in
        place: copy it to keep it or to write to it.
        """
        if (part := self._parts.get(name)) is not None:
            start, stop, _ = (rows or slice(None)).indices(part.shape[0])
            rows = slice(part.first_row + start, part.first_row + stop)
            return self._slice(part.fused)[part.expert, rows, cols or slice(None)]
        stored = self._slice(name)
        if cols is not None:
            return stored[rows or slice(None), cols]
        return stored[rows or slice(None)]

    def reader_of(self, mapping: ParamMapping) -> Read:
        """Returns `read` with the mapping's tensors by their index."""

        def read(index: int, rows: slice | None = None, cols: slice | None = None) -> Tensor:
            return self.read(mapping.hf[index], rows, cols)

        return read


def _read_index(index: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        pairs = [(name, file, Path(file).name) for name, file in weight_map.items()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            str(index), f"is not an index with a weight_map ({error})", COPY_AGAIN
        ) from None
    for name, file, plain in pairs:
        if file != plain:
            raise CheckpointError(
                f"{index}: {name}", f"is in {file}, outside the directory", COPY_AGAIN
            )
    return weight_map
