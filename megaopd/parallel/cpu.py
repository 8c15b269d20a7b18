"""Lets Megatron-Core run where there is no CUDA device.

Megatron-Core names the CUDA device in many places: `torch.zeros(..., device="cuda")`,
`torch.cuda.current_device()`, `tensor.cuda()`, `tensor.type() == "torch.cuda.FloatTensor"`. On a
machine without CUDA all of these are meant to be "the device of this rank", which is the CPU. An
import hook gives modules named `megatron.*`, and only those, a view of torch in which that is so:
their global `torch` is a `_TorchView`, and the two tensor methods that a view cannot reach are
rewritten in their syntax tree. torch itself is left as it is, so every other library in the
process sees it unchanged (patching it for all silently corrupts transformers' rotary embeddings).

`install()` runs when megaopd is imported, before megatron can be; the hook decides at the first
import of megatron whether there is CUDA, and does nothing where there is. Nothing here imports
torch earlier.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.machinery
import sys
import types
import warnings
from collections.abc import Callable, Sequence
from typing import Any

_SCOPE = "megatron."
_FACTORIES = ("arange", "empty", "full", "ones", "rand", "randn", "tensor", "zeros")


class _ModuleView(types.ModuleType):
    """A module's namespace with some names replaced."""

    def __init__(self, module: types.ModuleType, replaced: dict[str, Any]) -> None:
        super().__init__(module.__name__)
        self.__dict__.update(replaced)
        self.__dict__["_module"] = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_module"], name)


class _Stream:
    """The CPU's only stream: everything on it is already in order."""

    def record_event(self, event: Any = None) -> _Stream:
        """What to wait for: nothing, as everything before it is done."""
        return self

    def __getattr__(self, name: str) -> Callable[..., None]:
        return _nothing


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    """A tensor factory for which the CUDA device is the CPU and pinned memory is plain memory."""

    def create(*args: Any, **kwargs: Any) -> Any:
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return factory(*args, **kwargs)

    return create


def _all_gather(tensors: Sequence[Any], tensor: Any, group: Any = None, **kwargs: Any) -> Any:
    """`torch.distributed.all_gather`, also of unequal lengths, which gloo lacks and NCCL has."""
    import torch.distributed as dist

    longest = max(len(t) for t in tensors)
    if all(len(t) == longest for t in tensors):
        return dist.all_gather(tensors, tensor, group=group, **kwargs)
    padded = [tensor.new_empty((longest, *tensor.shape[1:])) for _ in tensors]
    mine = tensor.new_zeros(padded[0].shape)
    mine[: len(tensor)] = tensor
    dist.all_gather(padded, mine, group=group)
    for out, part in zip(tensors, padded, strict=True):
        out.copy_(part[: len(out)])
    return None


def _reduce_scatter(output: Any, inputs: Sequence[Any], *args: Any, **kwargs: Any) -> Any:
    """`torch.distributed.reduce_scatter`, also of unequal lengths."""
    import torch.distributed as dist

    longest = max(len(t) for t in inputs)
    if all(len(t) == longest for t in inputs):
        return dist.reduce_scatter(output, inputs, *args, **kwargs)
    padded = [output.new_zeros((longest, *output.shape[1:])) for _ in inputs]
    for part, given in zip(padded, inputs, strict=True):
        part[: len(given)] = given
    mine = output.new_empty(padded[0].shape)
    dist.reduce_scatter(mine, padded, *args, **kwargs)
    output.copy_(mine[: len(output)])
    return None


def _torch_view() -> _ModuleView:
    import torch

    cpu = torch.device("cpu")
    cuda = _ModuleView(
        torch.cuda,
        {
            "current_device": lambda: cpu,
            "set_device": _nothing,
            "synchronize": _nothing,
            "empty_cache": _nothing,
            "current_stream": lambda *a: _Stream(),
            "default_stream": lambda *a: _Stream(),
            "Stream": lambda *a, **k: _Stream(),
            "stream": lambda stream: contextlib.nullcontext(),
            "get_rng_state": lambda device=None: torch.random.get_rng_state(),
            "set_rng_state": lambda state, device=None: torch.random.set_rng_state(state),
            "manual_seed": lambda seed: torch.random.manual_seed(seed) and None,
        },
    )
    factories = {name: _on_cpu(getattr(torch, name)) for name in _FACTORIES}
    distributed = _ModuleView(
        torch.distributed, {"all_gather": _all_gather, "reduce_scatter": _reduce_scatter}
    )
    return _ModuleView(torch, {"cuda": cuda, "distributed": distributed, **factories})


def _to_device(value: Any, *args: Any, **kwargs: Any) -> Any:
    """`value.cuda(...)`: a tensor or module is already on this rank's device."""
    return value


def _cuda_type(tensor: Any) -> str:
    """`tensor.type()` as it would read on the CUDA device."""
    return tensor.type().replace("torch.", "torch.cuda.", 1)


def _to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """A tensor of the device as collectives take their sizes from it: already on the host, so
    Megatron would leave it a tensor."""
    return tensor.numpy() if as_numpy and hasattr(tensor, "numpy") else tensor


class _DeviceCalls(ast.NodeTransformer):
    """Rewrites `x.cuda(...)` and `x.type()` into calls of the two functions above."""

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        method = node.func
        if not isinstance(method, ast.Attribute):
            return node
        if method.attr == "cuda":
            name = "_megaopd_to_device"
        elif method.attr == "type" and not node.args and not node.keywords:
            name = "_megaopd_cuda_type"
        else:
            return node
        call = ast.Call(ast.Name(name, ast.Load()), [method.value, *node.args], node.keywords)
        return ast.copy_location(call, node)


class _Loader(importlib.machinery.SourceFileLoader):
    """Loads a megatron module with the view in place of torch; writes no bytecode cache."""

    view: _ModuleView

    def get_code(self, fullname: str) -> types.CodeType | None:
        source = self.get_data(self.get_filename(fullname))
        if b".cuda(" not in source and b".type()" not in source:
            return super().get_code(fullname)
        tree = ast.fix_missing_locations(_DeviceCalls().visit(ast.parse(source)))
        return compile(tree, self.get_filename(fullname), "exec", dont_inherit=True)

    def exec_module(self, module: types.ModuleType) -> None:
        module.__dict__["_megaopd_to_device"] = _to_device
        module.__dict__["_megaopd_cuda_type"] = _cuda_type
        super().exec_module(module)
        if isinstance(module.__dict__.get("torch"), types.ModuleType):
            module.__dict__["torch"] = self.view
        if module.__name__ == "megatron.core.transformer.moe.moe_utils":
            module.__dict__["maybe_move_tensor_to_cpu"] = _to_host
        if module.__name__ == "megatron.core.tensor_parallel.random":
            import torch

            # One generator plays both parts, the CPU's and the device's.
            module.__dict__["_get_cuda_rng_state"] = lambda *a, **k: torch.random.get_rng_state()
            module.__dict__["_set_cuda_rng_state"] = lambda state, *a, **k: (
                torch.random.set_rng_state(state)
            )


class _Finder:
    """Meta-path finder that hands `megatron.*` source modules to `_Loader` where CUDA is
    missing."""

    def __init__(self) -> None:
        self.view: _ModuleView | None = None
        self.needed: bool | None = None

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if not name.startswith(_SCOPE):
            return None
        if self.needed is None:
            import torch

            self.needed = not torch.cuda.is_available()
            if self.needed:
                self.view = _torch_view()
                # Megatron says on every rank that kernels which need a GPU are not there.
                warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core")
        if self.view is None:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or not isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            return spec
        loader = _Loader(spec.loader.name, spec.loader.path)
        loader.view = self.view
        spec.loader = loader
        return spec


def install() -> None:
    """Puts the import hook in place, once.

    Raises:
        RuntimeError: there is no CUDA, and a megatron module was imported before megaopd.
    """
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    early = next((name for name in sys.modules if name.startswith("megatron.core")), None)
    if early is not None:
        import torch

        if not torch.cuda.is_available():
            raise RuntimeError(f"{early} was imported before megaopd; import megaopd first")
    sys.meta_path.insert(0, _Finder())
