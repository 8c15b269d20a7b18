"""Which backend does the passes over logits.

"eager" is plain torch and runs anywhere. "compiled" is the same functions through torch.compile and
needs a C++ compiler on a CPU. "triton" is a set of CUDA kernels. "auto" takes triton on a GPU
where it is installed, and on a CPU the compiled form for calls large enough to repay the seconds of
compiling; all of them agree to rounding.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import warnings
from functools import lru_cache

import torch

from megaopd.losses.divergences import Part
from megaopd.losses.engine import Backend
from megaopd.losses.torch_backend import TorchBackend
from megaopd.losses.validation import require

BACKENDS = ("auto", "eager", "compiled", "triton")

# Logits per call from which "auto" compiles on a CPU.
_WORTH_COMPILING = 2**24


@lru_cache(maxsize=1)
def can_compile() -> bool:
    """Whether torch.compile works for CPU tensors here: a compiler, Python's headers, a place to
    write.

    Compiles a tiny function the first time; a failure is reported as a warning, once.
    """
    if shutil.which(os.environ.get("CXX", "g++")) is None:
        return False
    try:
        torch.compile(_increment, options={"pattern_matcher": False})(torch.zeros(2))
    except Exception as error:  # whatever part of the toolchain is missing, eager still works
        warnings.warn(f"losses run eagerly, torch.compile fails: {error}", stacklevel=2)
        return False
    return True


def _increment(x: torch.Tensor) -> torch.Tensor:
    return x + 1


@lru_cache(maxsize=1)
def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def choose_backend(
    name: str,
    parts: tuple[Part, ...],
    device: torch.device,
    dtype: torch.dtype,
    num_logits: int,
) -> str:
    """The backend that `name` stands for, "eager", "compiled" or "triton".

    Raises:
        LossArgumentError: an unknown name, or one that cannot do this here.
    """
    known = ", ".join(BACKENDS)
    require(name in BACKENDS, "loss.backend", f"no backend {name!r}", f"choose one of {known}")
    if name == "auto":
        if device.type == "cuda":
            return "triton" if _triton_fits(parts, dtype) else "eager"
        worth_it = device.type == "cpu" and num_logits >= _WORTH_COMPILING
        return "compiled" if worth_it and can_compile() else "eager"
    require(
        name != "compiled" or device.type != "cpu" or can_compile(),
        "loss.backend",
        "compiled, where torch.compile does not work",
        "install g++ and Python's headers or set CXX, or choose eager",
    )
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    require(
        name != "triton" or ((device.type == "cuda" or interpreted) and _triton_fits(parts, dtype)),
        "loss.backend",
        f"triton, for {dtype} on {device.type} or without triton",
        "choose auto, eager or compiled",
    )
    return name


def _triton_fits(parts: tuple[Part, ...], dtype: torch.dtype) -> bool:
    if not has_triton() or dtype == torch.float64:
        return False
    from megaopd.losses.triton_backend import supports

    return supports(parts)


def make_backend(
    name: str,
    parts: tuple[Part, ...],
    temperature: float,
    logprob_temperature: float | None,
    like: torch.Tensor,
    num_logits: int,
    entropy_coef: float = 0.0,
) -> Backend:
    """The backend for one divergence, less entropy_coef times the student's entropy.

    Args:
        like: a tensor of the work's device and dtype.
        num_logits: student logits of the call on this rank.
    """
    chosen = choose_backend(name, parts, like.device, like.dtype, num_logits)
    inv_tau = 1.0 / temperature
    extra_inv_tau = None if logprob_temperature is None else 1.0 / logprob_temperature
    if chosen == "triton":
        from megaopd.losses.triton_backend import TritonBackend

        return TritonBackend(parts, inv_tau, extra_inv_tau, entropy_coef)
    return TorchBackend(parts, inv_tau, extra_inv_tau, chosen == "compiled", entropy_coef)
