"""Imports what processes of the tests need, early or late, for the server that they are forked
from: all of this project, and the parts of transformers and Hydra that are imported at first use.

A collection in a forked process need not look at all that, nor copy the pages it is on.
"""

import gc
import pkgutil
from importlib import import_module

import megaopd

gc.disable()

for name in (
    *("hydra.core.config_store", "hydra.core.global_hydra", "hydra._internal.config_loader_impl"),
    *("transformers.models.llama.modeling_llama", "transformers.models.qwen3.modeling_qwen3"),
    "megaopd.engine.student",  # before anything else imports Megatron-Core
):
    import_module(name)
for module in pkgutil.walk_packages(megaopd.__path__, "megaopd."):
    # Not those that are the program of a process of their own.
    if not module.name.endswith(("__main__", "_worker", "launcher")):
        import_module(module.name)

gc.freeze()
gc.enable()
