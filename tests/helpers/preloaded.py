"""Imports what most processes of the tests need, for the server that they are forked from.

Several parts, of transformers and of Hydra too, are imported when they are first used; here that is
before. A collection in a forked process need not look at all that, nor copy the pages it is on.
"""

import gc
from importlib import import_module

gc.disable()

for name in (
    *("hydra.core.config_store", "hydra.core.global_hydra", "hydra._internal.config_loader_impl"),
    *("transformers.models.llama.modeling_llama", "transformers.models.qwen3.modeling_qwen3"),
    *("megaopd.checkpoint.hf_export", "megaopd.checkpoint.resumable", "megaopd.convert.cli"),
    *("megaopd.checkpoint.run_checkpoints", "megaopd.data.prompts", "megaopd.engine.student"),
    *("megaopd.plan.__main__", "megaopd.report", "megaopd.rewards.math_answer"),
    *("megaopd.rollout.embedded", "megaopd.rollout.sglang.engine", "megaopd.run_status"),
    *("megaopd.teacher.megatron", "megaopd.train", "megaopd.train_loop", "megaopd.train_rollout"),
    *("megaopd.trainer", "megaopd.watchdog", "megaopd.weight_sync.in_process"),
    *("megaopd.weight_sync.servers",),
):
    import_module(name)
gc.freeze()
gc.enable()
