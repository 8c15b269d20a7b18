"""Lets a server's scheduler and detokenizer be forked from it, where SGLang spawns them.

A spawned process imports SGLang anew, which takes 15 s of a core: two thirds of what a start costs.
Forking is safe here, where no CUDA context and no thread is there to be torn apart. The
environment's .pth file imports this module in every process.
"""

from __future__ import annotations

from multiprocessing import context

context._concrete_contexts["spawn"] = context._concrete_contexts["fork"]
