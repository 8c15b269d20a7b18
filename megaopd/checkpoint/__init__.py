"""Megatron's distributed checkpoints: reading them by Hugging Face names, saving a running model.

A checkpoint of any layout is read by any other. Importing this does not import Megatron-Core;
`loading` and `saving`, which have to do with a running model, do.
"""

from megaopd.checkpoint.opening import open_weights
from megaopd.checkpoint.reader import MegatronReader

__all__ = ["MegatronReader", "open_weights"]
