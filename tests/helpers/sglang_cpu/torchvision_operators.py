"""Lets torchvision's CUDA build be imported beside a CPU build of torch.

Its compiled library cannot be loaded there, so the operators of which its Python code registers
shape functions do not exist and the import fails. Before that module is imported, the missing
operators are declared (without an implementation: nothing here calls them). The environment's
.pth file imports this module in every process, so it must stay cheap until torchvision is used.
"""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from typing import Any

OPERATORS = ("nms", "qnms")
SIGNATURE = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


class OperatorDeclarer(MetaPathFinder):
    """Finds no module; declares the operators when the module that needs them is looked for."""

    def __init__(self) -> None:
        # The declarations live as long as the library object.
        self.library: Any = None

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        if fullname == "torchvision._meta_registrations" and self.library is None:
            import torch

            self.library = torch.library.Library("torchvision", "FRAGMENT")
            for name in OPERATORS:
                if not hasattr(torch.ops.torchvision, name):
                    self.library.define(name + SIGNATURE)


sys.meta_path.insert(0, OperatorDeclarer())
