"""Stands in for SGLang's package of compiled kernels, which needs CUDA or a CPU with AMX.

SGLang imports many names from it and calls few of them on a plain CPU, where it has torch
implementations. Any name can be imported; calling one says which kernel was wanted.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn


def __getattr__(name: str) -> Callable[..., NoReturn]:
    if name.startswith("__"):
        raise AttributeError(name)

    def kernel(*args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(f"sgl_kernel.{name}: no such kernel on this CPU")

    return kernel
