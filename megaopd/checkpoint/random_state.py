"""The random generators of a process, as JSON-compatible values."""

from __future__ import annotations

import base64
import random
from typing import Any

import numpy as np
import torch


def random_state() -> dict[str, Any]:
    """The state of the generators of Python, numpy, torch and, where one is in use, the GPU."""
    version, words, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    state = {
        "python": [version, list(words), gauss],
        "numpy": [kind, _encoded(np.asarray(keys).tobytes()), position, has_gauss, cached],
        "torch": _encoded(torch.get_rng_state().numpy().tobytes()),
    }
    if torch.cuda.is_initialized():
        state["cuda"] = _encoded(torch.cuda.get_rng_state().numpy().tobytes())
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Puts the generators where `random_state` found them."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    words_np = np.frombuffer(base64.b64decode(keys), dtype=np.uint32)
    np.random.set_state((kind, words_np, position, has_gauss, cached))
    torch.set_rng_state(_decoded(state["torch"]))
    if "cuda" in state and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(_decoded(state["cuda"]))


def _encoded(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _decoded(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
